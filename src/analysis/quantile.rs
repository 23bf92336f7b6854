//! Percentiles of merged histograms, and the smallest number of observations each of them needs.

use serde::Serialize;

use crate::record::{LatencyHistogram, Maybe, merge_histograms};

/// Percentiles of one latency over all runs of a cell, ns.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    pub count: u64,
    pub mean_ns: f64,
    pub p50_ns: Maybe<f64>,
    pub p90_ns: Maybe<f64>,
    pub p99_ns: Maybe<f64>,
}

/// Observations below which a percentile is not printed: with fewer, not even the largest observation is an upper
/// 95 % confidence bound of it, `ln 0.05 / ln q` (order statistics, one-sided).
const FEWEST: [(f64, u64); 3] = [(0.50, 5), (0.90, 29), (0.99, 299)];

impl Quantiles {
    /// Merges the runs' histograms. Missing with the runs' own reason when none has one.
    pub fn of<'a>(runs: impl Iterator<Item = &'a Maybe<LatencyHistogram>>) -> Maybe<Quantiles> {
        let mut reason = "no_run".to_owned();
        let mut parts = Vec::new();
        for run in runs {
            match run {
                Maybe::Value(histogram) => parts.push(histogram),
                Maybe::Missing(missing) => reason.clone_from(&missing.missing),
            }
        }
        // A histogram answers with the upper end of a bucket; the exact extremes are tighter.
        let exact = |pick: fn(&LatencyHistogram) -> u64| parts.iter().map(move |part| pick(part));
        let (min_ns, max_ns) = (
            exact(|part| part.min_ns).min().unwrap_or(0),
            exact(|part| part.max_ns).max().unwrap_or(u64::MAX),
        );
        let sum_ns: u128 = parts.iter().map(|part| u128::from(part.sum_ns)).sum();
        let merged = match merge_histograms(parts) {
            Ok(Some(merged)) => merged,
            Ok(None) => return Maybe::missing(reason),
            Err(_) => return Maybe::missing("histogram_unreadable"),
        };
        let at = |(quantile, fewest): (f64, u64)| {
            if merged.len() < fewest {
                return Maybe::missing(format!("needs_{fewest}_observations"));
            }
            Maybe::Value(merged.value_at_quantile(quantile).min(max_ns).max(min_ns) as f64)
        };
        Maybe::Value(Quantiles {
            count: merged.len(),
            mean_ns: sum_ns as f64 / merged.len() as f64,
            p50_ns: at(FEWEST[0]),
            p90_ns: at(FEWEST[1]),
            p99_ns: at(FEWEST[2]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(values: impl Iterator<Item = u64>) -> Maybe<LatencyHistogram> {
        LatencyHistogram::of(values).map_or(Maybe::missing("no_request"), Maybe::Value)
    }

    #[test]
    fn percentiles_are_taken_over_the_union_of_runs() {
        let runs = [run((1..=200).map(|ms| ms * 1_000_000)), run((201..=400).map(|ms| ms * 1_000_000))];
        let quantiles = Quantiles::of(runs.iter()).value().cloned().unwrap();
        assert_eq!(quantiles.count, 400);
        for (found, expected) in
            [(&quantiles.p50_ns, 200e6), (&quantiles.p90_ns, 360e6), (&quantiles.p99_ns, 396e6)]
        {
            let found = found.value().copied().unwrap();
            assert!((found / expected - 1.0).abs() < 2e-3, "{found} against {expected}");
        }
        assert!((quantiles.mean_ns - 200.5e6).abs() < 1.0);
    }

    #[test]
    fn a_percentile_of_too_few_observations_is_missing() {
        let quantiles = Quantiles::of([run((0..29).map(|i| 1_000_000 + i))].iter()).value().cloned().unwrap();
        assert!(quantiles.p90_ns.value().is_some());
        assert_eq!(quantiles.p99_ns, Maybe::missing("needs_299_observations"));
        assert_eq!(Quantiles::of([run(std::iter::empty())].iter()), Maybe::missing("no_request"));
    }

    #[test]
    fn the_fewest_observations_follow_from_the_confidence_level() {
        for (quantile, fewest) in FEWEST {
            let exact = 0.05f64.ln() / f64::ln(quantile);
            assert_eq!(exact.ceil() as u64, fewest, "p{quantile}");
        }
    }
}
