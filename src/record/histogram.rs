//! Latency distributions: HdrHistogram in nanoseconds, stored whole so that runs can be merged without averaging
//! percentiles. The wire form is the V2 deflate format that every HdrHistogram port reads, in base64.

use std::io::Read as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::read::ZlibDecoder;
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
/// Most bytes that it may inflate to: these bounds have about 23 000 counts of at most nine bytes.
const LONGEST_PLAIN: usize = 1 << 20;
/// Most values in one histogram. Sums over thousands of runs then stay far inside 64 bits.
const MOST_VALUES: u64 = 1 << 48;
/// Begins the deflated form.
const DEFLATED_COOKIE: [u8; 4] = 0x1c84_9314_u32.to_be_bytes();
/// Bytes before the counts: cookie, their length, then what [`plain_parameters`] gives.
const PLAIN_HEADER: usize = 40;

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
    /// When the encoding or the bounds are others, or the data is broken or disagrees with `count`.
    pub fn decode(&self) -> Result<Histogram<u64>, String> {
        if self.encoding != ENCODING || self.unit != "ns" {
            return Err(format!(
                "histogram is {} in {}, expected {ENCODING} in ns",
                self.encoding, self.unit
            ));
        }
        if (self.low_ns, self.high_ns, self.significant_digits) != (LOW_NS, HIGH_NS, SIGNIFICANT_DIGITS) {
            return Err(format!(
                "histogram spans {} to {} ns with {} digits, expected {LOW_NS} to {HIGH_NS} with {SIGNIFICANT_DIGITS}",
                self.low_ns, self.high_ns, self.significant_digits
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
            .deserialize(&mut inflate(&bytes)?.as_slice())
            .map_err(|error| format!("histogram cannot be decoded: {error:?}"))?;
        if histogram.len() != self.count || self.count > MOST_VALUES {
            return Err(format!(
                "histogram holds {} values, expected count {} and at most {MOST_VALUES}",
                histogram.len(),
                self.count
            ));
        }
        Ok(histogram)
    }
}

/// The plain V2 form. Its header is checked here because the decoder reserves whatever a header announces.
fn inflate(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let Some(deflated) = bytes.strip_prefix(&DEFLATED_COOKIE).and_then(|rest| rest.get(4..)) else {
        return Err("histogram does not begin as the V2 deflate format does".to_owned());
    };
    let mut plain = Vec::new();
    ZlibDecoder::new(deflated)
        .take(LONGEST_PLAIN as u64 + 1)
        .read_to_end(&mut plain)
        .map_err(|error| format!("histogram cannot be inflated: {error}"))?;
    if plain.len() > LONGEST_PLAIN || plain.len() < PLAIN_HEADER {
        return Err(format!(
            "histogram inflates to {} bytes or more, expected {PLAIN_HEADER} to {LONGEST_PLAIN}",
            plain.len()
        ));
    }
    let (header, counts) = plain.split_at(PLAIN_HEADER);
    if header[4..8] != (counts.len() as u32).to_be_bytes() || header[8..] != plain_parameters() {
        return Err("histogram's own header has another length or other bounds".to_owned());
    }
    // The one code whose negation overflows in the decoder; counts below MOST_VALUES never look like it.
    if counts.windows(9).any(|code| code == [0xff; 9]) {
        return Err("histogram skips more counts than there are".to_owned());
    }
    Ok(plain)
}

/// Offset, digits, bounds and ratio as the V2 header has them.
fn plain_parameters() -> [u8; PLAIN_HEADER - 8] {
    let mut parameters = [0; PLAIN_HEADER - 8];
    parameters[4..8].copy_from_slice(&u32::from(SIGNIFICANT_DIGITS).to_be_bytes());
    parameters[8..16].copy_from_slice(&LOW_NS.to_be_bytes());
    parameters[16..24].copy_from_slice(&HIGH_NS.to_be_bytes());
    parameters[24..].copy_from_slice(&1.0_f64.to_be_bytes());
    parameters
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
            LatencyHistogram { low_ns: 1, ..good.clone() },
            LatencyHistogram { significant_digits: 2, ..good.clone() },
        ];
        for histogram in broken {
            assert!(histogram.decode().is_err());
        }
    }

    /// The deflated form of any plain bytes.
    fn deflated(plain: &[u8]) -> String {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut encoder, plain).unwrap();
        let body = encoder.finish().unwrap();
        STANDARD.encode([&DEFLATED_COOKIE[..], &(body.len() as u32).to_be_bytes(), &body].concat())
    }

    #[test]
    fn a_header_that_would_reserve_gigabytes_is_refused_before_it_does() {
        let good = LatencyHistogram::of(sample(3)).unwrap();
        let plain = inflate(&STANDARD.decode(&good.data).unwrap()).unwrap();
        let data = |data| LatencyHistogram { data, ..good.clone() };
        assert_eq!(data(deflated(&plain)).decode(), good.decode(), "the helper is right");
        let edited = |at: usize, bytes: &[u8]| {
            let mut plain = plain.clone();
            plain[at..at + bytes.len()].copy_from_slice(bytes);
            deflated(&plain)
        };
        let cases = [
            (edited(4, &[0xff; 4]), "another length"),
            (edited(8, &[1]), "other bounds"),
            (edited(15, &[5]), "other bounds"),
            (edited(24, &[0x7f; 8]), "other bounds"),
            (edited(PLAIN_HEADER, &[0xff; 9]), "skips more counts"),
            (deflated(&vec![0; 3 * LONGEST_PLAIN]), "inflates to"),
            (deflated(&plain[..20]), "inflates to"),
        ];
        for (broken, expected) in cases {
            let reason = data(broken).decode().expect_err(expected);
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
