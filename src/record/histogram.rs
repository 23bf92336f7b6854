//! Latency distributions: HdrHistogram in nanoseconds, stored whole so that runs can be merged without averaging
//! percentiles. The wire form is the V2 deflate format that every HdrHistogram port reads, in base64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer as _, V2DeflateSerializer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Maybe;

const LOW_NS: u64 = 1_000;
const HIGH_NS: u64 = 3_600_000_000_000;
const SIGNIFICANT_DIGITS: u8 = 3;
const ENCODING: &str = "hdr-v2-deflate-base64";
/// Longest base64 text that is decoded; a real histogram of these bounds stays far below.
const LONGEST_DATA: usize = 4 << 20;

/// The distributions of one run, each over the requests that arrived in its windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    /// Time to first token, from the intended arrival.
    pub ttft: Maybe<LatencyHistogram>,
    /// Each gap between consecutive output tokens of one request.
    pub itl: Maybe<LatencyHistogram>,
    /// Per request, (last token − first token) / (output tokens − 1).
    pub tpot: Maybe<LatencyHistogram>,
    /// From the intended arrival to the last token.
    pub e2e: Maybe<LatencyHistogram>,
    /// Time of each forward pass in a window.
    pub step: Maybe<LatencyHistogram>,
}

/// A histogram of nanoseconds with its exact extremes and sum beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LatencyHistogram {
    /// `hdr-v2-deflate-base64`
    pub encoding: String,
    /// `ns`
    pub unit: String,
    pub significant_digits: u8,
    pub low_ns: u64,
    pub high_ns: u64,
    pub count: u64,
    /// Exact.
    pub min_ns: u64,
    /// Exact.
    pub max_ns: u64,
    /// Exact.
    pub sum_ns: u64,
    /// The histogram itself.
    pub data: String,
}

impl LatencyHistogram {
    /// Records every value; values outside 1 µs … 1 h are kept at the nearer bound (the exact extremes tell).
    /// `None` when there is no value.
    pub fn of(values_ns: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut histogram = empty();
        let (mut count, mut min_ns, mut max_ns, mut sum_ns) = (0u64, u64::MAX, 0u64, 0u64);
        for value in values_ns {
            histogram.saturating_record(value.clamp(LOW_NS, HIGH_NS));
            (count, sum_ns) = (count + 1, sum_ns.saturating_add(value));
            (min_ns, max_ns) = (min_ns.min(value), max_ns.max(value));
        }
        (count > 0).then(|| LatencyHistogram {
            encoding: ENCODING.to_owned(),
            unit: "ns".to_owned(),
            significant_digits: SIGNIFICANT_DIGITS,
            low_ns: LOW_NS,
            high_ns: HIGH_NS,
            count,
            min_ns,
            max_ns,
            sum_ns,
            data: encode(&histogram),
        })
    }

    /// The stored histogram.
    ///
    /// # Errors
    /// When the encoding is another one, or the data is broken or disagrees with `count`.
    pub fn decode(&self) -> Result<Histogram<u64>, String> {
        if self.encoding != ENCODING || self.unit != "ns" {
            return Err(format!(
                "histogram is {} in {}, expected {ENCODING} in ns",
                self.encoding, self.unit
            ));
        }
        if self.data.len() > LONGEST_DATA {
            return Err(format!(
                "histogram has {} characters, expected at most {LONGEST_DATA}",
                self.data.len()
            ));
        }
        let bytes =
            STANDARD.decode(&self.data).map_err(|error| format!("histogram is no base64: {error}"))?;
        let histogram: Histogram<u64> = Deserializer::new()
            .deserialize(&mut bytes.as_slice())
            .map_err(|error| format!("histogram cannot be decoded: {error:?}"))?;
        if histogram.len() != self.count {
            return Err(format!("histogram holds {} values, expected count {}", histogram.len(), self.count));
        }
        Ok(histogram)
    }
}

/// Merges histograms of several runs; `None` when there are none.
///
/// # Errors
/// When one of them cannot be decoded.
pub fn merge<'a>(
    parts: impl IntoIterator<Item = &'a LatencyHistogram>,
) -> Result<Option<Histogram<u64>>, String> {
    let mut merged: Option<Histogram<u64>> = None;
    for part in parts {
        let histogram = part.decode()?;
        match &mut merged {
            Some(merged) => {
                merged.add(&histogram).map_err(|error| format!("histograms differ: {error:?}"))?
            }
            None => merged = Some(histogram),
        }
    }
    Ok(merged)
}

fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(LOW_NS, HIGH_NS, SIGNIFICANT_DIGITS).expect("the constant bounds are valid")
}

fn encode(histogram: &Histogram<u64>) -> String {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new()
        .serialize(histogram, &mut bytes)
        .expect("a histogram can always be written to memory");
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seed: u64) -> Vec<u64> {
        (0..5000u64).map(|i| 1_000_000 + (i * 7919 + seed * 104_729) % 3_000_017).collect()
    }

    #[test]
    fn quantiles_survive_the_wire_within_a_thousandth() {
        let mut values = sample(1);
        let stored = LatencyHistogram::of(values.iter().copied()).expect("there are values");
        assert!(stored.data.starts_with("HISTFAAA"), "V2 deflate cookie, got {}", &stored.data[..8]);
        let decoded = stored.decode().expect("it decodes");
        values.sort_unstable();
        for quantile in [0.5, 0.9, 0.99] {
            let exact = values[((values.len() as f64 * quantile).ceil() as usize) - 1] as f64;
            let read = decoded.value_at_quantile(quantile) as f64;
            assert!((read / exact - 1.0).abs() <= 1e-3, "p{quantile}: {read} against {exact}");
        }
        assert_eq!((stored.min_ns, stored.max_ns), (values[0], values[values.len() - 1]));
        assert_eq!(stored.sum_ns, values.iter().sum::<u64>());
    }

    #[test]
    fn merging_equals_the_histogram_of_the_union() {
        let (one, two) = (sample(1), sample(2));
        let parts =
            [LatencyHistogram::of(one.clone()), LatencyHistogram::of(two.clone())].map(Option::unwrap);
        let merged = merge(&parts).unwrap().unwrap();
        let union = LatencyHistogram::of(one.into_iter().chain(two)).unwrap().decode().unwrap();
        assert_eq!(merged, union);
    }

    #[test]
    fn values_outside_the_bounds_keep_their_exact_extremes() {
        let stored = LatencyHistogram::of([5, HIGH_NS * 2]).unwrap();
        assert_eq!((stored.min_ns, stored.max_ns, stored.count), (5, HIGH_NS * 2, 2));
        assert_eq!(stored.decode().unwrap().len(), 2);
        assert_eq!(LatencyHistogram::of([]), None);
    }

    #[test]
    fn broken_data_is_refused_with_a_reason() {
        let good = LatencyHistogram::of(sample(3)).unwrap();
        let broken = [
            LatencyHistogram { data: "not base64!".into(), ..good.clone() },
            LatencyHistogram { data: STANDARD.encode("HIST"), ..good.clone() },
            LatencyHistogram { data: good.data[..good.data.len() / 2 / 4 * 4].into(), ..good.clone() },
            LatencyHistogram { count: 1, ..good.clone() },
            LatencyHistogram { encoding: "csv".into(), ..good.clone() },
        ];
        for histogram in broken {
            assert!(histogram.decode().is_err());
        }
    }
}
