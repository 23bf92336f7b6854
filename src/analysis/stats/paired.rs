//! The mean of paired differences with its interval.

use serde::Serialize;

use super::{mean, sum_of_squares, t_quantile};

/// A relative change and the ends of its interval: −0.01 is one percent less.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Change {
    pub ratio: f64,
    pub low: f64,
    pub high: f64,
}

/// How much larger the first of each pair is than the second: the mean of the logarithms of their quotients, with the
/// interval of Student's t over pairs. None for fewer than two pairs, or where a value is not above 0.
pub fn paired_change(pairs: &[(f64, f64)], confidence: f64) -> Option<Change> {
    if pairs.len() < 2 || pairs.iter().any(|(one, other)| !(*one > 0.0 && *other > 0.0)) {
        return None;
    }
    let logs: Vec<f64> = pairs.iter().map(|(one, other)| (one / other).ln()).collect();
    let (n, center) = (logs.len() as f64, mean(&logs));
    let standard_error = (sum_of_squares(&logs) / (n - 1.0) / n).sqrt();
    let half = t_quantile((1.0 + confidence) / 2.0, n - 1.0) * standard_error;
    let change = |log: f64| log.exp_m1();
    Some(Change { ratio: change(center), low: change(center - half), high: change(center + half) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_students_t_over_pairs() {
        // Logarithms of the quotients 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / √3, t(0.975, 2) = 4.302653.
        let pairs: Vec<(f64, f64)> = [0.01f64, 0.02, 0.03].iter().map(|log| (5.0 * log.exp(), 5.0)).collect();
        let found = paired_change(&pairs, 0.95).unwrap();
        let half = 4.302_653 * 0.01 / 3f64.sqrt();
        for (found, log) in [(found.ratio, 0.02), (found.low, 0.02 - half), (found.high, 0.02 + half)] {
            assert!((found - log.exp_m1()).abs() < 1e-7, "{found} against {log}");
        }
    }

    #[test]
    fn what_both_of_a_pair_share_does_not_count_and_too_little_is_nothing() {
        let pairs: Vec<(f64, f64)> = (1..=20).map(|k| (f64::from(k) * 0.99, f64::from(k))).collect();
        let found = paired_change(&pairs, 0.95).unwrap();
        assert!((found.ratio + 0.01).abs() < 1e-12 && found.high - found.low < 1e-12, "{found:?}");
        assert_eq!(paired_change(&pairs[..1], 0.95), None);
        assert_eq!(paired_change(&[(1.0, 0.0), (1.0, 1.0)], 0.95), None);
    }
}
