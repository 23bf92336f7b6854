//! Baseline against candidate: a verdict with its reasons, from records alone. [`Sample`] is what one record
//! contributes; `environment` is the gate; `effect` and `verdict` are the statistics (numbers in, numbers out); `cells`
//! applies them; `why`, `probes` and `library` explain; [`Comparison`] is the result. METHODOLOGY.md gives the rules and
//! their sources.

mod advice;
mod arms;
mod cells;
mod effect;
mod environment;
mod library;
mod probes;
mod result;
mod sample;
mod session;
mod verdict;
mod why;

pub use effect::{ASSUMED_SIGMA, Effect, Noise, RunSpread, Series, estimate};
pub use environment::{Class, Declared, Difference, GROUPS};
pub use result::{
    Algorithm, AlgorithmChange, Arm, CellThreshold, Comparand, Comparison, ConditionMeans, Decomposition,
    FormPair, HeldBack, Layer, Library, Metric, MovedLatency, NoiseArm, Numbers, Part, Probe, SCHEMA,
    SessionCounts, Settings, Thresholds, Why, json_schema, parse,
};
pub use sample::{DISTURBED_SHARE, Sample};
pub use session::{SessionId, align};
pub use verdict::{Judged, Rules, Verdict, judge, overall};

use std::collections::BTreeSet;

use super::stats::TQuantiles;
use crate::record::Maybe;

/// Compares two sets of records, with further ones as noise. The order of records and of cells does not matter.
pub fn compare(
    baseline: &[Sample],
    candidate: &[Sample],
    noise: &[Sample],
    settings: &Settings,
) -> Comparison {
    let mut remarks = Vec::new();
    let quantiles = TQuantiles::default();
    let declared = &settings.declared;
    let sides = [baseline, candidate];
    let environment = environment::differences(&references(baseline), &references(candidate), declared);
    let has = |class| environment.iter().any(|line| line.class == class && !line.allowed);
    let arms = arms::arrange(baseline, candidate, noise, declared, &mut remarks);
    let wrong = wrong_numerics(&sides);
    let is_comparable =
        !has(Class::Identity) && wrong.is_empty() && sides.iter().all(|side| !side.is_empty());
    let algorithms = library::changes(&arms);
    // A library that is updated on purpose is what the comparison is about.
    let is_declared = declared.changing.iter().any(|changing| changing == LIBRARY_GROUP);
    let circumstances = cells::Circumstances {
        meter_changed: has(Class::Meter),
        with_other_algorithm: match is_declared {
            true => BTreeSet::new(),
            false => algorithms.iter().flat_map(|change| &change.cells).map(String::as_str).collect(),
        },
    };
    let (cells, aggregate) = match is_comparable {
        true => cells::judge_cells(&arms, &circumstances, settings, &quantiles, &mut remarks),
        false => (Vec::new(), Maybe::missing(NOT_COMPARABLE)),
    };
    let verdict_of_the_cells = match is_comparable {
        true => {
            let verdicts: Vec<Verdict> = cells.iter().map(|cell| cell.verdict).collect();
            Maybe::Value(overall(&verdicts, aggregate.value().map(|aggregate| aggregate.verdict)))
        }
        false => Maybe::missing(NOT_COMPARABLE),
    };
    let confounded = has(Class::Suspicious);
    arms::remark_on_arms(&arms, declared, &environment, &mut remarks);
    let mut exclusions: Vec<String> =
        sides.into_iter().flatten().flat_map(|sample| sample.exclusions.clone()).collect();
    exclusions.sort();
    let mut result = Comparison {
        schema: SCHEMA.to_owned(),
        not_a_measurement: sides
            .into_iter()
            .chain([noise])
            .flatten()
            .find_map(|sample| sample.not_a_measurement.clone()),
        verdict: match &verdict_of_the_cells {
            Maybe::Value(verdict) if !confounded => *verdict,
            _ => Verdict::NotComparable,
        },
        verdict_of_the_cells,
        confounded,
        reasons: wrong,
        next: Vec::new(),
        settings: settings.clone(),
        baseline: arms::arm(baseline, &arms.baseline),
        candidate: arms::arm(candidate, &arms.candidate),
        noise: arms::noise_arm(&arms.noise),
        why: why::explain(&arms, &cells, algorithms, &quantiles),
        environment,
        cells,
        aggregate,
        exclusions,
        remarks,
    };
    result.reasons.extend(advice::reasons(&result));
    result.next = advice::next_steps(&result, baseline.first().or(candidate.first()));
    result
}

/// What `--changing` calls the libraries.
const LIBRARY_GROUP: &str = "kernels";
/// Reason code where no cell was judged.
const NOT_COMPARABLE: &str = "not_comparable";

/// Kept sessions as a baseline and as noise: those of the environment of the newest one, and all others.
pub fn split_by_age(samples: Vec<Sample>) -> (Vec<Sample>, Vec<Sample>) {
    let newest = samples.iter().max_by(|a, b| a.started_at.cmp(&b.started_at)).cloned();
    samples.into_iter().partition(|sample| {
        newest.as_ref().is_some_and(|newest| environment::batch_key(sample) == environment::batch_key(newest))
    })
}

fn references(side: &[Sample]) -> Vec<&Sample> {
    side.iter().collect()
}

/// A device that computes wrong has no speed worth a verdict.
fn wrong_numerics(sides: &[&[Sample]]) -> Vec<String> {
    let wrong = sides.iter().copied().flatten().filter(|sample| sample.computes_wrong);
    wrong.map(|sample| format!("{}: the look at the device's numerics failed", sample.name)).collect()
}
