//! One metric of one cell: how far apart the two arms are, how sure that is, and what change could have been seen. The
//! unit is the session, the value the mean of the logarithm over its runs; smaller is worse. Numbers in, numbers out.

use crate::analysis::stats::{TQuantiles, f_cdf, mean, sum_of_squares, t_cdf};

/// Standard deviation between sessions that is assumed where nothing is known: one session in each arm, no noise records.
pub const ASSUMED_SIGMA: f64 = 0.005;
/// Degrees of freedom that the assumed deviation is taken to have.
const ASSUMED_NU: f64 = 5.0;
/// Fewer degrees of freedom allow no statement.
const LEAST_NU: f64 = 3.0;
/// Ratios of the arms' variances between runs beyond which they count as different, if the F test agrees.
const VARIANCE_RATIO: f64 = 4.0;
const VARIANCE_LEVEL: f64 = 0.01;
/// Fewest sessions in each arm for unequal variances.
const WELCH_SESSIONS: usize = 3;
/// Level from which a loss is looked at twice.
const SUSPECTED_LEVEL: f64 = 0.05;
/// Level at which a loss must hold without the session that speaks for it most. Real sessions scatter unevenly: now and
/// then one is slow for reasons of its own, which Student's test does not expect. Of random halves of sessions of a CPU
/// without any change (results/*-aa-sessions), the test alone called 9 % slower, with this rule 0.4 %.
const ALONE_LEVEL: f64 = 0.01;
/// Most sessions per arm that are ever asked for.
const MOST_SESSIONS: usize = 1000;

/// Sums of squares of runs within their sessions, over one arm.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunSpread {
    pub sum_of_squares: f64,
    pub degrees: f64,
}

impl RunSpread {
    fn variance(&self) -> f64 {
        self.sum_of_squares / self.degrees
    }
}

/// Logarithms of one metric of one cell by session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    pub baseline: Vec<f64>,
    pub candidate: Vec<f64>,
    /// Sessions between which only chance differs, batch by batch.
    pub noise: Vec<Vec<f64>>,
    /// Of the baseline's and the candidate's runs.
    pub runs: [RunSpread; 2],
}

/// Where the deviation between sessions comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Noise {
    /// Both arms and the noise batches together.
    Pooled,
    /// The arms' own, because their runs scatter differently.
    Welch,
    /// A default: nothing was measured.
    Assumed,
    /// Too few sessions for any statement.
    Unknown,
}

/// The difference of two arms in logarithms: negative is worse.
#[derive(Clone, Debug, PartialEq)]
pub struct Effect {
    pub difference: f64,
    pub noise: Noise,
    /// Standard deviation between sessions; NaN when unknown.
    pub sigma: f64,
    /// Standard error of the difference; NaN when unknown.
    pub standard_error: f64,
    /// Degrees of freedom of both.
    pub nu: f64,
    /// Chance of a difference this low, and this high, if there were none.
    pub p_worse: f64,
    pub p_better: f64,
    /// The runs of the two arms scatter differently.
    pub variance_changed: bool,
    /// The arm is worse by chance alone at most once in twenty, but without the one session that speaks for it most the
    /// loss might well be chance.
    pub rests_on_one_session: bool,
    sessions: (usize, usize),
    noise_nu: f64,
}

/// Estimates the effect. Both arms hold at least one session.
pub fn estimate(series: &Series) -> Effect {
    let (baseline, candidate) = (&series.baseline, &series.candidate);
    let (n_b, n_c) = (baseline.len() as f64, candidate.len() as f64);
    let difference = mean(candidate) - mean(baseline);
    let variance_changed = variance_changed(series.runs);
    let noise_nu: f64 = series.noise.iter().map(|batch| batch.len().saturating_sub(1) as f64).sum();
    let nu = n_b + n_c - 2.0 + noise_nu;
    let squares = sum_of_squares(baseline) + sum_of_squares(candidate);
    let noise_squares: f64 = series.noise.iter().map(|batch| sum_of_squares(batch)).sum();
    let sigma = ((squares + noise_squares) / nu).sqrt();
    let error_of = |sigma: f64| sigma * (1.0 / n_b + 1.0 / n_c).sqrt();
    let welch = (variance_changed && baseline.len().min(candidate.len()) >= WELCH_SESSIONS)
        .then(|| welch(baseline, candidate));
    let (noise, sigma, standard_error, nu) = match welch.flatten() {
        Some((error, nu)) => (Noise::Welch, error / (1.0 / n_b + 1.0 / n_c).sqrt(), error, nu),
        None if nu >= LEAST_NU => (Noise::Pooled, sigma, error_of(sigma), nu),
        None if nu == 0.0 => (Noise::Assumed, ASSUMED_SIGMA, error_of(ASSUMED_SIGMA), ASSUMED_NU),
        None => (Noise::Unknown, f64::NAN, f64::NAN, nu),
    };
    let (p_worse, p_better) = match noise {
        Noise::Unknown => (1.0, 1.0),
        _ => (tail(difference, standard_error, nu), tail(-difference, standard_error, nu)),
    };
    Effect {
        difference,
        noise,
        sigma,
        standard_error,
        nu,
        p_worse,
        p_better,
        variance_changed,
        rests_on_one_session: p_worse <= SUSPECTED_LEVEL
            && rests_on_one_session(baseline, candidate, sigma, nu),
        sessions: (baseline.len(), candidate.len()),
        noise_nu,
    }
}

/// P(T ≤ difference / error); where nothing scatters, the difference itself decides.
fn tail(difference: f64, standard_error: f64, nu: f64) -> f64 {
    if difference == 0.0 {
        0.5
    } else if standard_error == 0.0 {
        if difference < 0.0 { 0.0 } else { 1.0 }
    } else {
        t_cdf(difference / standard_error, nu)
    }
}

/// Standard error and degrees of freedom of Welch's test; none when neither arm scatters.
fn welch(baseline: &[f64], candidate: &[f64]) -> Option<(f64, f64)> {
    let part = |arm: &[f64]| sum_of_squares(arm) / (arm.len() as f64 - 1.0) / arm.len() as f64;
    let share = |part: f64, arm: &[f64]| part * part / (arm.len() as f64 - 1.0);
    let (b, c) = (part(baseline), part(candidate));
    (b + c > 0.0).then(|| ((b + c).sqrt(), (b + c).powi(2) / (share(b, baseline) + share(c, candidate))))
}

/// Two-sided F test of the variance between runs, and a ratio beyond [`VARIANCE_RATIO`].
fn variance_changed([baseline, candidate]: [RunSpread; 2]) -> bool {
    if baseline.degrees < 1.0 || candidate.degrees < 1.0 {
        return false;
    }
    let (b, c) = (baseline.variance(), candidate.variance());
    let (large, small) = if b > c { (baseline, candidate) } else { (candidate, baseline) };
    if large.variance() <= VARIANCE_RATIO * small.variance() {
        return false;
    }
    let ratio = large.variance() / small.variance();
    2.0 * (1.0 - f_cdf(ratio, large.degrees, small.degrees)) < VARIANCE_LEVEL
}

/// Whether a loss would be within chance without the one session that speaks for it most: the slowest
/// of the candidate, or the fastest of the baseline.
fn rests_on_one_session(baseline: &[f64], candidate: &[f64], sigma: f64, nu: f64) -> bool {
    if baseline.len() < 2 || candidate.len() < 2 {
        return false;
    }
    let without = |arm: &[f64], one: f64| (mean(arm) * arm.len() as f64 - one) / (arm.len() as f64 - 1.0);
    let highest = baseline.iter().copied().fold(f64::MIN, f64::max);
    let lowest = candidate.iter().copied().fold(f64::MAX, f64::min);
    let (n_b, n_c) = (baseline.len() as f64, candidate.len() as f64);
    // Of two sessions, one is left: only a loss that turns into a gain is the other's.
    let level = if baseline.len().min(candidate.len()) > 2 { ALONE_LEVEL } else { 0.5 };
    let is_chance =
        |difference: f64, inverse_sizes: f64| tail(difference, sigma * inverse_sizes.sqrt(), nu) > level;
    is_chance(without(candidate, lowest) - mean(baseline), 1.0 / n_b + 1.0 / (n_c - 1.0))
        || is_chance(mean(candidate) - without(baseline, highest), 1.0 / (n_b - 1.0) + 1.0 / n_c)
}

impl Effect {
    /// Half the width of the two-sided interval at `confidence`.
    pub fn half_width(&self, confidence: f64, quantiles: &TQuantiles) -> f64 {
        match self.noise {
            Noise::Unknown => f64::INFINITY,
            _ => quantiles.at(0.5 + confidence / 2.0, self.nu) * self.standard_error,
        }
    }

    /// Smallest true difference that would be found with a power of 80 % by a two-sided test at `alpha`.
    pub fn detectable(&self, alpha: f64, quantiles: &TQuantiles) -> Option<f64> {
        (self.noise != Noise::Unknown).then(|| {
            (quantiles.at(1.0 - alpha / 2.0, self.nu) + quantiles.at(0.80, self.nu)) * self.standard_error
        })
    }

    /// Sessions per arm from which a true difference of `size` would be found with a power of 80 % at `alpha`, two-sided,
    /// with the noise records that there are: `2 (t₁₋α⸝₂ + t.₈₀)² σ² / size²`, solved for the sessions.
    pub fn sessions_needed(&self, size: f64, alpha: f64, quantiles: &TQuantiles) -> Option<usize> {
        if self.noise == Noise::Unknown || size <= 0.0 {
            return None;
        }
        let noise_nu = if self.noise == Noise::Welch { 0.0 } else { self.noise_nu };
        let enough = |sessions: usize| {
            let nu = 2.0 * (sessions as f64 - 1.0) + noise_nu;
            let error = self.sigma * (2.0 / sessions as f64).sqrt();
            nu >= LEAST_NU && (quantiles.at(1.0 - alpha / 2.0, nu) + quantiles.at(0.80, nu)) * error <= size
        };
        // The normal quantiles, which are the smaller ones, give a number from which to go up.
        let power = quantiles.at(1.0 - alpha / 2.0, 1e9) + quantiles.at(0.80, 1e9);
        let start = (2.0 * (power * self.sigma / size).powi(2)).floor().clamp(1.0, MOST_SESSIONS as f64);
        (start as usize..=MOST_SESSIONS).find(|sessions| enough(*sessions))
    }

    /// Sessions of the smaller arm.
    pub fn least_sessions(&self) -> usize {
        self.sessions.0.min(self.sessions.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(baseline: &[f64], candidate: &[f64], noise: &[&[f64]]) -> Series {
        Series {
            baseline: baseline.to_vec(),
            candidate: candidate.to_vec(),
            noise: noise.iter().map(|batch| batch.to_vec()).collect(),
            runs: Default::default(),
        }
    }

    #[test]
    fn the_pooled_test_is_student_s_by_hand() {
        // Means 2 and 5, squares 2 and 2, 4 degrees: s² = 1, error √(2/3), t = 3.674, p = 0.01066 one-sided.
        let effect = estimate(&series(&[4.0, 5.0, 6.0], &[1.0, 2.0, 3.0], &[]));
        assert_eq!(
            (effect.difference, effect.noise, effect.nu, effect.sigma),
            (-3.0, Noise::Pooled, 4.0, 1.0)
        );
        assert!((effect.standard_error - (2.0f64 / 3.0).sqrt()).abs() < 1e-15);
        assert!((effect.p_worse - 0.010_655).abs() < 1e-5, "{}", effect.p_worse);
        assert!((effect.p_worse + effect.p_better - 1.0).abs() < 1e-12);
        let quantiles = TQuantiles::default();
        assert!((effect.half_width(0.95, &quantiles) - 2.776_445 * (2.0f64 / 3.0).sqrt()).abs() < 1e-5);
    }

    #[test]
    fn noise_batches_lend_their_deviations_but_not_their_means() {
        let alone = estimate(&series(&[0.0], &[-1.0], &[&[7.0, 8.0, 9.0], &[-4.0, -2.0]]));
        // Squares 2 and 2 over 2 + 1 degrees.
        assert_eq!((alone.noise, alone.nu, alone.difference), (Noise::Pooled, 3.0, -1.0));
        assert!((alone.sigma - (4.0f64 / 3.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn without_enough_sessions_nothing_is_inferred() {
        let one_each = estimate(&series(&[0.0], &[-0.1], &[]));
        assert_eq!((one_each.noise, one_each.sigma, one_each.nu), (Noise::Assumed, 0.005, 5.0));
        for (baseline, candidate) in [(&[0.0, 0.1][..], &[0.0, 0.1][..]), (&[0.0, 0.1], &[-5.0])] {
            let effect = estimate(&series(baseline, candidate, &[]));
            assert_eq!((effect.noise, effect.p_worse, effect.p_better), (Noise::Unknown, 1.0, 1.0));
            assert_eq!(effect.detectable(0.05, &TQuantiles::default()), None);
            assert_eq!(effect.half_width(0.95, &TQuantiles::default()), f64::INFINITY);
        }
    }

    #[test]
    fn equal_values_are_compared_exactly() {
        let quantiles = TQuantiles::default();
        for (candidate, p_worse) in [(1.0, 0.5), (0.9, 0.0), (1.1, 1.0)] {
            let effect = estimate(&series(&[1.0; 3], &[candidate; 3], &[]));
            assert_eq!((effect.standard_error, effect.p_worse), (0.0, p_worse));
            assert_eq!(
                (effect.half_width(0.95, &quantiles), effect.detectable(0.05, &quantiles)),
                (0.0, Some(0.0))
            );
            assert_eq!(effect.sessions_needed(0.02, 0.05, &quantiles), Some(3));
        }
    }

    #[test]
    fn the_smallest_detectable_effect_is_the_published_one() {
        // Percent, at a session deviation of 0.5 %: sessions per arm, noise sessions, plain, Holm's first step of 12.
        let quantiles = TQuantiles::default();
        for (sessions, noise, plain, holm) in [
            (3, 0, 1.52, 2.79),
            (5, 0, 1.01, 1.53),
            (10, 0, 0.66, 0.93),
            (1, 6, 2.47, 4.17),
            (2, 6, 1.63, 2.54),
            (3, 6, 1.28, 1.92),
            (5, 6, 0.96, 1.37),
            (3, 10, 1.24, 1.77),
        ] {
            let nu = 2.0 * (sessions as f64 - 1.0) + f64::from(i32::max(noise - 1, 0));
            let effect = Effect {
                nu,
                standard_error: 0.5 * (2.0 / f64::from(sessions)).sqrt(),
                ..estimate(&series(&[0.0; 3], &[0.0; 3], &[]))
            };
            for (alpha, expected) in [(0.05, plain), (0.05 / 12.0, holm)] {
                let found = effect.detectable(alpha, &quantiles).unwrap();
                assert!(
                    (found - expected).abs() < 0.006,
                    "{sessions} and {noise}: {found} against {expected}"
                );
            }
        }
    }

    #[test]
    fn the_sessions_needed_are_the_first_that_detect() {
        let quantiles = TQuantiles::default();
        let noise: Vec<f64> = (0..6).map(|i| [-1.0, 1.0][i % 2] * 0.004_564_354_645_876_384).collect();
        let effect = estimate(&series(&[0.0; 3], &[0.0; 3], &[&noise]));
        let (sigma, size) = (effect.sigma, 0.01);
        let needed = effect.sessions_needed(size, 0.05, &quantiles).unwrap();
        let detectable = |n: f64| {
            let nu = 2.0 * (n - 1.0) + 5.0;
            (quantiles.at(0.975, nu) + quantiles.at(0.8, nu)) * sigma * (2.0 / n).sqrt()
        };
        assert!(detectable(needed as f64) <= size && detectable(needed as f64 - 1.0) > size, "{needed}");
    }

    #[test]
    fn runs_that_scatter_differently_are_judged_by_their_own_arms() {
        let spread = |variance: f64| RunSpread { sum_of_squares: variance * 20.0, degrees: 20.0 };
        let mut series = series(&[0.0, 0.1, 0.2], &[0.0, 3.0, 6.0], &[&[0.0, 0.1, 0.2]]);
        assert_eq!(estimate(&series).noise, Noise::Pooled);
        series.runs = [spread(1.0), spread(100.0)];
        let effect = estimate(&series);
        assert_eq!((effect.noise, effect.variance_changed), (Noise::Welch, true));
        // Variances 0.01 and 9 over 3: error √(9.01/3).
        assert!((effect.standard_error - (9.01f64 / 3.0).sqrt()).abs() < 1e-12);
        series.runs = [spread(1.0), spread(3.9)];
        assert!(!estimate(&series).variance_changed);
        series.runs = [spread(0.0), spread(0.0)];
        assert!(!estimate(&series).variance_changed);
        series.runs = [spread(0.0), spread(1.0)];
        assert!(estimate(&series).variance_changed);
    }

    #[test]
    fn a_difference_made_by_one_session_is_recognised() {
        // So many quiet noise sessions that one outlier cannot spoil the deviation.
        let quiet: Vec<f64> = (0..60).map(|index| 0.001 * f64::from(index % 2)).collect();
        let noise: &[&[f64]] = &[&quiet];
        let one = estimate(&series(&[0.0, 0.001, 0.002, 0.001], &[0.001, 0.002, 0.003, -0.3], noise));
        assert!(one.rests_on_one_session);
        let all = estimate(&series(&[0.0, 0.001, 0.002, 0.001], &[-0.1, -0.11, -0.1, -0.3], noise));
        assert!(!all.rests_on_one_session);
    }
}
