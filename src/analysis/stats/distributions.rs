//! Normal, t, F and binomial distributions. All follow from the incomplete beta and the error function (Abramowitz and
//! Stegun, chapter 26).

use std::cell::RefCell;
use std::collections::HashMap;

use super::special::{erfc, incomplete_beta, ln_gamma};

const MOST_ROUNDS: u32 = 200;

/// P(Z ≤ z) of a standard normal.
pub fn normal_cdf(z: f64) -> f64 {
    let tail = 0.5 * erfc(z.abs() / std::f64::consts::SQRT_2);
    if z > 0.0 { 1.0 - tail } else { tail }
}

/// The z with P(Z ≤ z) = `p`, 0 < p < 1.
pub fn normal_quantile(p: f64) -> f64 {
    let density = |z: f64| (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    invert(p, rough_normal_quantile(p), normal_cdf, density)
}

/// P(T ≤ t) of Student's t with `nu` degrees of freedom, not necessarily whole.
pub fn t_cdf(t: f64, nu: f64) -> f64 {
    let tail = 0.5 * incomplete_beta(nu / 2.0, 0.5, nu / (nu + t * t));
    if t > 0.0 { 1.0 - tail } else { tail }
}

/// The t with P(T ≤ t) = `p`, 0 < p < 1.
pub fn t_quantile(p: f64, nu: f64) -> f64 {
    let ln_scale = ln_gamma((nu + 1.0) / 2.0) - ln_gamma(nu / 2.0) - 0.5 * (nu * std::f64::consts::PI).ln();
    let density = |t: f64| (ln_scale - (nu + 1.0) / 2.0 * (t * t / nu).ln_1p()).exp();
    // Cornish and Fisher's first term (Abramowitz and Stegun 26.7.5).
    let z = rough_normal_quantile(p);
    invert(p, z + (z.powi(3) + z) / (4.0 * nu), |t| t_cdf(t, nu), density)
}

/// t quantiles, each computed once: a comparison asks for few of them very often.
#[derive(Debug, Default)]
pub struct TQuantiles {
    known: RefCell<HashMap<(u64, u64), f64>>,
}

impl TQuantiles {
    /// As [`t_quantile`].
    pub fn at(&self, p: f64, nu: f64) -> f64 {
        *self.known.borrow_mut().entry((p.to_bits(), nu.to_bits())).or_insert_with(|| t_quantile(p, nu))
    }
}

/// P(F ≤ f) of the ratio of two variances with these degrees of freedom.
pub fn f_cdf(f: f64, numerator: f64, denominator: f64) -> f64 {
    if f.is_infinite() {
        return 1.0;
    }
    incomplete_beta(numerator / 2.0, denominator / 2.0, numerator * f / (numerator * f + denominator))
}

/// P(X ≤ k) of successes in `n` trials of probability `p`.
pub fn binomial_cdf(k: u64, n: u64, p: f64) -> f64 {
    if k >= n { 1.0 } else { 1.0 - incomplete_beta(k as f64 + 1.0, (n - k) as f64, p) }
}

/// Abramowitz and Stegun 26.2.23: error below 4.5e-4, a start for [`invert`].
fn rough_normal_quantile(p: f64) -> f64 {
    let t = (-2.0 * p.min(1.0 - p).ln()).sqrt();
    let above = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let below = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    let z = t - above / below;
    if p < 0.5 { -z } else { z }
}

/// Newton's method on a distribution, kept between bounds that close in.
fn invert(p: f64, start: f64, cdf: impl Fn(f64) -> f64, density: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (f64::NEG_INFINITY, f64::INFINITY);
    let mut x = start;
    for _ in 0..MOST_ROUNDS {
        let error = cdf(x) - p;
        if error == 0.0 {
            break;
        }
        if error < 0.0 {
            low = x
        } else {
            high = x
        }
        let mut next = x - error / density(x);
        if !(low < next && next < high) {
            next = match (low.is_finite(), high.is_finite()) {
                (true, true) => 0.5 * (low + high),
                (true, false) => 2.0 * low.abs() + 1.0,
                _ => -2.0 * high.abs() - 1.0,
            };
        }
        let moved = (next - x).abs();
        x = next;
        if moved <= 1e-13 * x.abs().max(1.0) {
            break;
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_quantiles_follow_their_table() {
        for (p, z) in [
            (0.5, 0.0),
            (0.80, 0.841_621_233_6),
            (0.95, 1.644_853_627_0),
            (0.975, 1.959_963_984_5),
            (0.999, 3.090_232_306_2),
        ] {
            assert!((normal_quantile(p) - z).abs() < 1e-9, "z({p}) = {}", normal_quantile(p));
            assert!((normal_quantile(1.0 - p) + z).abs() < 1e-9, "z(1 - {p})");
            assert!((normal_cdf(z) - p).abs() < 1e-9);
        }
        // Far out: P(Z ≤ −8) = 6.220960574e-16 (Abramowitz and Stegun, table 26.2).
        assert!((normal_cdf(-8.0) / 6.220_960_574e-16 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn t_quantiles_follow_their_table() {
        // Abramowitz and Stegun, table 26.10; the first column by its closed form tan(π(p − ½)).
        for (p, nu, t) in [
            (0.975, 1.0, 12.706_204_736),
            (0.95, 2.0, 2.919_985_580),
            (0.975, 2.0, 4.302_652_730),
            (0.95, 5.0, 2.015_048_373),
            (0.975, 5.0, 2.570_581_836),
            (0.975, 10.0, 2.228_138_852),
            (0.80, 7.0, 0.896_029_645),
            (0.995, 30.0, 2.749_995_654),
            (0.975, 1e7, 1.959_964_2),
        ] {
            assert!((t_quantile(p, nu) - t).abs() < 2e-7 * t.abs(), "t({p}, {nu}) = {}", t_quantile(p, nu));
            assert!((t_quantile(1.0 - p, nu) + t).abs() < 2e-7 * t.abs());
        }
    }

    #[test]
    fn quantile_and_distribution_undo_each_other_everywhere() {
        for nu in [1.0, 2.5, 3.0, 9.0, 47.3, 1e4] {
            for p in [1e-9, 1e-4, 0.02, 0.4, 0.5, 0.77, 0.999, 1.0 - 1e-9] {
                let found = t_cdf(t_quantile(p, nu), nu);
                assert!((found - p).abs() < 1e-12, "p {p}, nu {nu}: {found}");
            }
        }
        let table = TQuantiles::default();
        assert_eq!(table.at(0.975, 9.0), t_quantile(0.975, 9.0));
        assert_eq!(table.at(0.975, 9.0), table.at(0.975, 9.0));
    }

    #[test]
    fn ratios_of_variances_follow_their_table() {
        // F(.99; 5, 10) = 5.64, F(.95; 3, 20) = 3.10, F(.99; 1, 1) = 4052.2 (Abramowitz and Stegun, table 26.9).
        for (p, f, numerator, denominator) in
            [(0.99, 5.636, 5.0, 10.0), (0.95, 3.098, 3.0, 20.0), (0.99, 4052.18, 1.0, 1.0)]
        {
            assert!((f_cdf(f, numerator, denominator) - p).abs() < 1e-4);
        }
        assert_eq!((f_cdf(0.0, 2.0, 2.0), f_cdf(f64::INFINITY, 2.0, 2.0)), (0.0, 1.0));
    }

    #[test]
    fn the_binomial_follows_its_sum() {
        // 10 throws of a fair coin: (1 + 10 + 45) / 1024 for at most two heads.
        assert!((binomial_cdf(2, 10, 0.5) - 56.0 / 1024.0).abs() < 1e-14);
        // 20 trials of 0.05: 0.735840 for at most one (Handbook of tables for probability and statistics).
        assert!((binomial_cdf(1, 20, 0.05) - 0.735_840).abs() < 5e-7);
        assert_eq!(binomial_cdf(10, 10, 0.5), 1.0);
    }
}
