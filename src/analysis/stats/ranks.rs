//! What the order of observations says: quantiles, their intervals, and the rank-sum test.

use super::{binomial_cdf, normal_cdf};

/// Deviations, in normal standard deviations by the median of deviations, above which a value is remarked on.
const FAR: f64 = 5.0;
/// Makes the median absolute deviation of a normal its standard deviation: 1 / Φ⁻¹(3/4).
const NORMAL_MAD: f64 = 1.482_602_218_505_602;
/// Largest product of two samples' sizes whose rank-sum distribution is counted out.
const MOST_COUNTED: usize = 2500;

/// The `q` quantile by linear interpolation between order statistics (Hyndman and Fan's type 7); `None` of nothing.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = q.clamp(0.0, 1.0) * (sorted.len().checked_sub(1)?) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// Ranks (from 1) of the order statistics that enclose the `q` quantile of `n` independent observations with at least
/// `confidence`, equal tails. `None` when there are too few.
pub fn quantile_ranks(n: u64, q: f64, confidence: f64) -> Option<(u64, u64)> {
    let tail = (1.0 - confidence) / 2.0;
    let lower = (1..=n).rev().find(|rank| binomial_cdf(rank - 1, n, q) <= tail)?;
    let upper = (1..=n).find(|rank| 1.0 - binomial_cdf(rank - 1, n, q) <= tail)?;
    Some((lower, upper))
}

/// Places of values further than five robust standard deviations from the median. They are remarked on, never removed.
pub fn far_from_median(values: &[f64]) -> Vec<usize> {
    let Some(center) = median(values) else { return Vec::new() };
    let deviations: Vec<f64> = values.iter().map(|value| (value - center).abs()).collect();
    let scale = NORMAL_MAD * median(&deviations).unwrap_or(0.0);
    (0..values.len()).filter(|index| scale > 0.0 && deviations[*index] > FAR * scale).collect()
}

/// One-sided p value of the rank-sum test that `low` tends to smaller values than `high` (Mann and Whitney, Annals of
/// Mathematical Statistics 18, 1947): counted out for small samples without ties, else by the normal approximation with
/// corrections for ties and continuity.
pub fn mann_whitney(low: &[f64], high: &[f64]) -> f64 {
    if low.is_empty() || high.is_empty() {
        return 1.0;
    }
    // Pairs in which `low` is the larger one, ties half.
    let pairs = || low.iter().flat_map(|a| high.iter().map(move |b| a.total_cmp(b)));
    let larger = pairs().filter(|order| order.is_gt()).count() as f64;
    let ties = pairs().filter(|order| order.is_eq()).count() as f64;
    let u = larger + ties / 2.0;
    let tied = tied_groups(low, high);
    if tied.is_empty() && low.len() * high.len() <= MOST_COUNTED {
        return counted(low.len(), high.len(), u as usize);
    }
    let (n, m) = (low.len() as f64, high.len() as f64);
    let all = n + m;
    let correction: f64 = tied.iter().map(|t| t.powi(3) - t).sum::<f64>() / (all * (all - 1.0));
    let deviation = (n * m / 12.0 * (all + 1.0 - correction)).max(0.0).sqrt();
    if deviation == 0.0 { 1.0 } else { normal_cdf((u + 0.5 - n * m / 2.0) / deviation) }
}

/// Sizes of the groups of equal values.
fn tied_groups(low: &[f64], high: &[f64]) -> Vec<f64> {
    let mut all: Vec<f64> = low.iter().chain(high).copied().collect();
    all.sort_by(f64::total_cmp);
    all.chunk_by(|a, b| a == b).filter(|group| group.len() > 1).map(|group| group.len() as f64).collect()
}

/// P(U ≤ `u`) when all orders of `n + m` values are equally likely. `ways[j][u]` counts the orders of `i` and `j` values
/// with `u` inversions: the last value is of the first kind and exceeds all `j`, or it is of the second.
fn counted(n: usize, m: usize, u: usize) -> f64 {
    let most = n * m;
    let mut ways = vec![vec![0.0f64; most + 1]; m + 1];
    ways.iter_mut().for_each(|row| row[0] = 1.0);
    for _ in 0..n {
        let mut next = vec![vec![0.0f64; most + 1]; m + 1];
        next[0][0] = 1.0;
        for j in 1..=m {
            for inversions in 0..=most {
                let from_first = if inversions >= j { ways[j][inversions - j] } else { 0.0 };
                next[j][inversions] = from_first + next[j - 1][inversions];
            }
        }
        ways = next;
    }
    let all: f64 = ways[m].iter().sum();
    ways[m][..=u.min(most)].iter().sum::<f64>() / all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate_between_order_statistics() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!((median(&values), quantile(&values, 0.25)), (Some(2.5), Some(1.75)));
        assert_eq!((quantile(&values, 0.0), quantile(&values, 1.0)), (Some(1.0), Some(4.0)));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn the_fewest_observations_for_an_interval_follow_from_the_tail() {
        // n ≥ ln 0.025 / ln q: 6, 36, 72, 368 for p50, p90, p95, p99.
        for (q, fewest) in [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)] {
            assert!(quantile_ranks(fewest, q, 0.95).is_some(), "p{q}");
            assert_eq!(quantile_ranks(fewest - 1, q, 0.95), None, "p{q}");
        }
    }

    #[test]
    fn the_interval_of_the_median_is_the_published_one() {
        // Conover, Practical Nonparametric Statistics, table A3: ranks 2 and 9 of 10 (97.9 %), 6 and 15 of 20 (95.9 %).
        assert_eq!(quantile_ranks(10, 0.5, 0.95), Some((2, 9)));
        assert_eq!(quantile_ranks(20, 0.5, 0.95), Some((6, 15)));
    }

    #[test]
    fn the_smallest_rank_sum_has_the_published_probability() {
        // One of C(10, 5) = 252 orders, and of C(8, 4) = 70; two-sided .00794 and .0286.
        for (n, orders) in [(4, 70.0), (5, 252.0), (6, 924.0)] {
            let low: Vec<f64> = (0..n).map(f64::from).collect();
            let high: Vec<f64> = (0..n).map(|i| f64::from(i) + 100.0).collect();
            assert!((mann_whitney(&low, &high) - 1.0 / orders).abs() < 1e-12, "{n}");
            assert!((mann_whitney(&high, &low) - 1.0).abs() < 1e-12, "{n}");
        }
        // U = 2 for n = m = 4: 1 + 1 + 2 of 70 orders (Mann and Whitney's table: .057).
        assert!((mann_whitney(&[1.0, 2.0, 3.0, 6.0], &[4.0, 5.0, 7.0, 8.0]) - 4.0 / 70.0).abs() < 1e-12);
    }

    #[test]
    fn ties_and_large_samples_use_the_normal_approximation() {
        assert_eq!(mann_whitney(&[1.0; 5], &[1.0; 5]), 1.0);
        let low: Vec<f64> = (0..60).map(|i| f64::from(i) - 20.0).collect();
        let high: Vec<f64> = (0..60).map(|i| f64::from(i) + 0.5).collect();
        // 39 · 40 / 2 = 780 of 3600 pairs are in the other order; the deviation is √(60 · 60 · 121 / 12).
        let expected = normal_cdf((780.5 - 1800.0) / 36_300f64.sqrt());
        assert!((mann_whitney(&low, &high) / expected - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_value_far_from_all_others_is_found_and_equal_ones_are_not() {
        assert_eq!(far_from_median(&[1.0, 1.1, 0.9, 1.05, 9.0]), [4]);
        assert!(far_from_median(&[1.0; 6]).is_empty());
        assert!(far_from_median(&[]).is_empty());
    }
}
