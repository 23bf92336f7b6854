//! From effects to verdicts: the family of tests, the practical thresholds, and what all cells together say. Numbers in,
//! words out; METHODOLOGY.md gives the rules and their sources.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::effect::{Effect, Noise, Series, estimate};
use crate::analysis::stats::{TQuantiles, holm};

/// Standard errors that a difference must exceed where the noise is only assumed.
const ASSUMED_ERRORS: f64 = 4.0;
/// Level of the whole family of tests at the first, second and third look at a growing set of sessions (Pocock,
/// Biometrika 64, 1977).
const LEVELS: [f64; 3] = [0.05, 0.0294, 0.0221];

/// What a comparison says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Worse by at least the threshold, beyond chance.
    Regressed,
    /// Better by at least the threshold, beyond chance.
    Improved,
    /// Shown to be worse by less than the threshold.
    Pass,
    /// Shown to differ by less than the threshold either way.
    Same,
    /// Neither could be shown.
    Inconclusive,
    /// Another thing was measured, or nothing on one side.
    NotComparable,
    /// The power sensor is another one, or measures otherwise.
    MeterChanged,
}

impl Verdict {
    /// As it is printed.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Regressed => "REGRESSED",
            Verdict::Improved => "IMPROVED",
            Verdict::Pass => "PASS",
            Verdict::Same => "SAME",
            Verdict::Inconclusive => "INCONCLUSIVE",
            Verdict::NotComparable => "NOT COMPARABLE",
            Verdict::MeterChanged => "METER CHANGED",
        }
    }

    /// The program's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Verdict::Improved | Verdict::Pass | Verdict::Same => 0,
            Verdict::Regressed => 10,
            Verdict::Inconclusive => 11,
            Verdict::NotComparable => 12,
            Verdict::MeterChanged => 13,
        }
    }

    pub(super) fn passes(self) -> bool {
        matches!(self, Verdict::Improved | Verdict::Pass | Verdict::Same)
    }
}

/// How strict the judgement is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Rules {
    /// Chance of any false REGRESSED, and of a false PASS.
    pub alpha: f64,
    /// REGRESSED only when the whole interval is beyond the threshold.
    pub strict: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Rules { alpha: LEVELS[0], strict: false }
    }
}

impl Rules {
    /// Level of the family at the `look`-th look, from 1; none beyond the third.
    pub fn level_at_look(look: u32) -> Option<f64> {
        LEVELS.get((look as usize).checked_sub(1)?).copied()
    }
}

/// One metric of one cell, judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    pub effect: Effect,
    /// `−ln(1 − threshold)`
    pub threshold_ln: f64,
    /// p values adjusted for the family.
    pub p_worse: f64,
    pub p_better: f64,
    pub verdict: Verdict,
}

/// Judges a family: each series with its threshold, the share of the value that may be lost.
pub fn judge(family: &[(Series, f64)], rules: Rules, quantiles: &TQuantiles) -> Vec<Judged> {
    let effects: Vec<Effect> = family.iter().map(|(series, _)| estimate(series)).collect();
    let adjusted = |pick: fn(&Effect) -> f64| holm(&effects.iter().map(pick).collect::<Vec<f64>>());
    let (worse, better) = (adjusted(|effect| effect.p_worse), adjusted(|effect| effect.p_better));
    effects
        .into_iter()
        .zip(family)
        .zip(worse.into_iter().zip(better))
        .map(|((effect, (_, threshold)), (p_worse, p_better))| {
            let threshold_ln = -(-threshold).ln_1p();
            let mut judged =
                Judged { effect, threshold_ln, p_worse, p_better, verdict: Verdict::Inconclusive };
            judged.verdict = judged.decide(rules, quantiles);
            judged
        })
        .collect()
}

impl Judged {
    fn decide(&self, rules: Rules, quantiles: &TQuantiles) -> Verdict {
        let (effect, threshold) = (&self.effect, self.threshold_ln);
        let difference = effect.difference;
        match effect.noise {
            Noise::Unknown => return Verdict::Inconclusive,
            Noise::Assumed => {
                let enough = threshold.max(ASSUMED_ERRORS * effect.standard_error);
                return if difference <= -enough { Verdict::Regressed } else { Verdict::Inconclusive };
            }
            Noise::Pooled | Noise::Welch => {}
        }
        let beyond = if rules.strict { effect.half_width(0.95, quantiles) } else { 0.0 };
        // One side of the interval that has 1 − α on that side.
        let side = effect.half_width(1.0 - 2.0 * rules.alpha, quantiles);
        if self.p_worse <= rules.alpha && difference + beyond <= -threshold {
            if effect.rests_on_one_session { Verdict::Inconclusive } else { Verdict::Regressed }
        } else if self.p_better <= rules.alpha && difference - beyond >= threshold {
            Verdict::Improved
        } else if difference - side > -threshold {
            if difference + side < threshold { Verdict::Same } else { Verdict::Pass }
        } else {
            Verdict::Inconclusive
        }
    }
}

/// What the cells and their geometric mean say together. Passing needs every cell to pass, each at the full level: the
/// chance that a cell which truly is worse by its threshold passes stays below it (an intersection-union test).
pub fn overall(cells: &[Verdict], aggregate: Option<Verdict>) -> Verdict {
    let any = |verdict| cells.contains(&verdict);
    if cells.is_empty() || any(Verdict::NotComparable) {
        Verdict::NotComparable
    } else if any(Verdict::Regressed) || aggregate == Some(Verdict::Regressed) {
        Verdict::Regressed
    } else if any(Verdict::MeterChanged) {
        Verdict::MeterChanged
    } else if !cells.iter().all(|verdict| verdict.passes()) {
        Verdict::Inconclusive
    } else if any(Verdict::Improved) {
        Verdict::Improved
    } else if any(Verdict::Pass) {
        Verdict::Pass
    } else {
        Verdict::Same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arms of three sessions around 0 and `difference`, and six quiet noise sessions.
    fn series(difference: f64, scatter: f64) -> Series {
        let around = |center: f64| vec![center - scatter, center, center + scatter];
        Series {
            baseline: around(0.0),
            candidate: around(difference),
            noise: vec![[around(0.0), around(0.0)].concat()],
            runs: Default::default(),
        }
    }

    fn verdict_of(series: Series, rules: Rules) -> Verdict {
        judge(&[(series, 0.02)], rules, &TQuantiles::default())[0].verdict
    }

    #[test]
    fn each_verdict_has_its_case() {
        let rules = Rules::default();
        for (difference, scatter, expected) in [
            (-0.04, 0.003, Verdict::Regressed),
            (0.04, 0.003, Verdict::Improved),
            (0.0, 0.003, Verdict::Same),
            (0.018, 0.003, Verdict::Pass),
            (-0.019, 0.003, Verdict::Inconclusive),
            (0.0, 0.05, Verdict::Inconclusive),
            (-0.01, 0.0, Verdict::Same),
            (-0.0203, 0.0, Verdict::Regressed),
            (-0.0201, 0.0, Verdict::Same),
        ] {
            assert_eq!(verdict_of(series(difference, scatter), rules), expected, "{difference} ± {scatter}");
        }
    }

    #[test]
    fn strictness_asks_for_the_whole_interval() {
        let strict = Rules { strict: true, ..Rules::default() };
        assert_eq!(verdict_of(series(-0.024, 0.003), Rules::default()), Verdict::Regressed);
        assert_eq!(verdict_of(series(-0.024, 0.003), strict), Verdict::Inconclusive);
        assert_eq!(verdict_of(series(-0.04, 0.003), strict), Verdict::Regressed);
    }

    #[test]
    fn assumed_noise_finds_large_losses_and_never_passes() {
        let pair =
            |difference| Series { baseline: vec![0.0], candidate: vec![difference], ..Series::default() };
        // Four standard errors: 4 · 0.005 · √2 = 0.0283.
        for (difference, expected) in
            [(0.0, Verdict::Inconclusive), (-0.028, Verdict::Inconclusive), (-0.0284, Verdict::Regressed)]
        {
            assert_eq!(verdict_of(pair(difference), Rules::default()), expected);
        }
        assert_eq!(verdict_of(pair(0.5), Rules::default()), Verdict::Inconclusive);
    }

    #[test]
    fn the_worst_cell_decides_by_the_order_of_the_exit_codes() {
        use Verdict::*;
        for (cells, aggregate, expected) in [
            (&[][..], None, NotComparable),
            (&[Same, Same], None, Same),
            (&[Same, Pass], None, Pass),
            (&[Same, Improved], Some(Improved), Improved),
            (&[Improved, Inconclusive], None, Inconclusive),
            (&[Inconclusive, MeterChanged], None, MeterChanged),
            (&[Regressed, MeterChanged, Pass], None, Regressed),
            (&[Regressed, NotComparable], None, NotComparable),
            (&[Inconclusive, Same], Some(Regressed), Regressed),
        ] {
            assert_eq!(overall(cells, aggregate), expected, "{cells:?} {aggregate:?}");
        }
    }

    #[test]
    fn later_looks_have_pocock_s_levels() {
        assert_eq!(
            [0, 1, 2, 3, 4].map(Rules::level_at_look),
            [None, Some(0.05), Some(0.0294), Some(0.0221), None]
        );
    }
}
