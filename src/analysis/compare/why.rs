//! Why the arms differ, as far as the records tell: parts of a change, kinds of cells, latencies, output tokens. Nothing
//! here decides a verdict.

use std::collections::BTreeSet;

use super::arms::Arms;
use super::cells::interval_ratio;
use super::effect::{Series, estimate};
use super::library::library_cells;
use super::probes;
use super::result::{
    AlgorithmChange, Comparand, Decomposition, FormPair, Layer, Library, Metric, MovedLatency, Part, Why,
};
use super::sample::{CellSample, DIAGNOSTICS, PTX, Sample};
use super::session::Group;
use super::verdict::Verdict;
use crate::analysis::stats::{TQuantiles, benjamini_hochberg, mean};
use crate::record::{Maybe, Workload};

/// Share of falsely named latencies that is accepted.
const DISCOVERY_RATE: f64 = 0.10;

/// Kinds of work, each by the cells that show it alone.
const LAYERS: [&str; 5] = ["prefill", "decode", "attention", "generation", "serving"];
/// Context from which a decode cell shows attention more than the reading of weights, tokens.
const LONG_CONTEXT: u32 = 2048;

fn layer_of(workload: &Workload) -> &'static str {
    match workload {
        Workload::Prefill { .. } => LAYERS[0],
        Workload::Decode { depth, .. } if *depth >= LONG_CONTEXT => LAYERS[2],
        Workload::Decode { .. } => LAYERS[1],
        Workload::Generate { .. } => LAYERS[3],
        Workload::ServeClosed { .. } | Workload::ServeOpen { .. } => LAYERS[4],
    }
}

pub(super) fn explain(
    arms: &Arms<'_>,
    cells: &[Comparand],
    algorithms: Vec<AlgorithmChange>,
    quantiles: &TQuantiles,
) -> Why {
    let compared: Vec<&Comparand> = cells
        .iter()
        .filter(|cell| cell.metric == Metric::Throughput && cell.numbers.value().is_some())
        .collect();
    let (latencies_tested, latencies) = moved_latencies(arms, &compared);
    let in_library = library_cells(arms);
    let is_library = |cell: &&&Comparand| in_library.contains_key(cell.cell.as_str());
    let (by_library, by_kernels): (Vec<&Comparand>, Vec<&Comparand>) =
        compared.iter().copied().partition(|cell| is_library(&cell));
    let apart = LAYERS.iter().map(|name| Layer {
        layer: format!("{name}, products by cuBLASLt"),
        ..layer(arms, name, &by_library)
    });
    let has_other_algorithm =
        |key: &String| algorithms.iter().any(|change| change.cells.iter().any(|cell| cell == key));
    let changed =
        compared.iter().filter(|cell| output_changed(arms, &cell.cell)).map(|cell| cell.cell.clone());
    let (library_outputs, outputs_changed): (Vec<String>, Vec<String>) =
        changed.partition(has_other_algorithm);
    Why {
        decompositions: compared.iter().filter_map(|cell| decompose(arms, &cell.cell, quantiles)).collect(),
        layers: LAYERS
            .iter()
            .map(|name| layer(arms, name, &by_kernels))
            .chain(apart.filter(|layer| layer.cells > 0))
            .collect(),
        probes: probes::compare(arms, quantiles),
        library: Library {
            cells: by_library.iter().map(|cell| cell.cell.clone()).collect(),
            outputs_changed: library_outputs,
            algorithms,
        },
        forms: form_pairs(&compared),
        latencies,
        latencies_tested,
        outputs_changed,
    }
}

/// A value per session: the mean over its records of what `pick` gives, missing as soon as one lacks it.
fn by_session(
    groups: &[Group<'_>],
    key: &str,
    pick: &dyn Fn(&CellSample) -> Maybe<f64>,
) -> Result<Vec<f64>, String> {
    let mut values = Vec::new();
    for group in groups {
        let cells = group.samples.iter().filter_map(|sample| sample.cells.get(key));
        let mut own = Vec::new();
        for cell in cells.filter(|cell| cell.absent.is_none()) {
            match pick(cell) {
                Maybe::Value(value) => own.push(value),
                Maybe::Missing(missing) => return Err(missing.missing),
            }
        }
        if !own.is_empty() {
            values.push(mean(&own));
        }
    }
    if values.is_empty() { Err("no_run".to_owned()) } else { Ok(values) }
}

fn series(arms: &Arms<'_>, key: &str, pick: &dyn Fn(&CellSample) -> Maybe<f64>) -> Result<Series, String> {
    Ok(Series {
        baseline: by_session(&arms.baseline, key, pick)?,
        candidate: by_session(&arms.candidate, key, pick)?,
        // A batch without the value has no say.
        noise: arms.noise.iter().filter_map(|batch| by_session(batch, key, pick).ok()).collect(),
        runs: Default::default(),
    })
}

fn part(
    arms: &Arms<'_>,
    key: &str,
    quantiles: &TQuantiles,
    pick: &dyn Fn(&CellSample) -> Maybe<f64>,
) -> Maybe<Part> {
    match series(arms, key, pick) {
        Err(reason) => Maybe::missing(reason),
        Ok(series) => {
            let effect = estimate(&series);
            Maybe::Value(Part {
                effect_ratio: effect.difference.exp_m1(),
                interval_95_ratio: interval_ratio(&effect, quantiles),
            })
        }
    }
}

fn decompose(arms: &Arms<'_>, key: &str, quantiles: &TQuantiles) -> Option<Decomposition> {
    let less = |a: &Maybe<f64>, b: &Maybe<f64>| a.as_ref().zip(b.as_ref()).map(|(a, b)| a - b);
    let of = |pick: &dyn Fn(&CellSample) -> Maybe<f64>| part(arms, key, quantiles, pick);
    Some(Decomposition {
        cell: key.to_owned(),
        throughput: of(&|cell| cell.ln_rate.clone()).into_value()?,
        clock: of(&|cell| cell.ln_clock.clone()),
        tokens_per_cycle: of(&|cell| less(&cell.ln_rate, &cell.ln_clock)),
        tokens_per_joule: of(&|cell| cell.ln_tokens_per_joule.clone()),
        power: of(&|cell| less(&cell.ln_rate, &cell.ln_tokens_per_joule)),
    })
}

fn layer(arms: &Arms<'_>, name: &str, compared: &[&Comparand]) -> Layer {
    let is_own = |cell: &&&Comparand| arms.workload(&cell.cell).is_some_and(|work| layer_of(work) == name);
    let own: Vec<&&Comparand> = compared.iter().filter(is_own).collect();
    let count = |verdict| own.iter().filter(|cell| cell.verdict == verdict).count() as u32;
    let changes: Vec<f64> = own
        .iter()
        .filter_map(|cell| cell.numbers.value().map(|numbers| numbers.effect_ratio.ln_1p()))
        .collect();
    Layer {
        layer: name.to_owned(),
        cells: own.len() as u32,
        regressed: count(Verdict::Regressed),
        improved: count(Verdict::Improved),
        effect_ratio: match changes.len() {
            0 => Maybe::missing("no_such_cell"),
            _ => Maybe::Value(mean(&changes).exp_m1()),
        },
    }
}

/// Cells that were measured with kernels of both forms.
fn form_pairs(compared: &[&Comparand]) -> Vec<FormPair> {
    let pair = |ptx: &&Comparand| {
        let cell = ptx.cell.strip_suffix(PTX)?;
        let sass = compared.iter().find(|other| other.cell == cell)?;
        Some(FormPair {
            cell: cell.to_owned(),
            sass: sass.verdict,
            sass_effect_ratio: sass.numbers.value()?.effect_ratio,
            ptx: ptx.verdict,
            ptx_effect_ratio: ptx.numbers.value()?.effect_ratio,
        })
    };
    compared.iter().filter_map(pair).collect()
}

fn moved_latencies(arms: &Arms<'_>, compared: &[&Comparand]) -> (u32, Vec<MovedLatency>) {
    let mut tested = Vec::new();
    for cell in compared {
        for (index, name) in DIAGNOSTICS.iter().enumerate() {
            let latency = |sample: &CellSample| match sample.ln_latencies[index] {
                Some(value) => Maybe::Value(value),
                None => Maybe::missing("too_few_observations"),
            };
            if let Ok(series) = series(arms, &cell.cell, &latency) {
                let effect = estimate(&series);
                let p = (2.0 * effect.p_worse.min(effect.p_better)).min(1.0);
                tested.push((cell.cell.clone(), (*name).to_owned(), effect.difference.exp_m1(), p));
            }
        }
    }
    let adjusted = benjamini_hochberg(&tested.iter().map(|(.., p)| *p).collect::<Vec<f64>>());
    let count = tested.len() as u32;
    let moved = tested.into_iter().zip(adjusted).filter(|(_, p)| *p <= DISCOVERY_RATE);
    let moved = moved.map(|((cell, latency, effect_ratio, _), p_adjusted)| MovedLatency {
        cell,
        latency,
        effect_ratio,
        p_adjusted,
    });
    (count, moved.collect())
}

/// Each side agrees with itself, so its output is reproducible, and the sides differ.
fn output_changed(arms: &Arms<'_>, key: &str) -> bool {
    let outputs = |groups: &[Group<'_>]| -> Option<BTreeSet<String>> {
        let samples = groups.iter().flat_map(|group| group.samples.iter());
        let cells = samples.filter_map(|sample: &&Sample| sample.cells.get(key));
        cells.filter(|cell| cell.absent.is_none()).map(|cell| cell.output.clone()).collect()
    };
    match (outputs(&arms.baseline), outputs(&arms.candidate)) {
        (Some(one), Some(other)) => one.len() == 1 && other.len() == 1 && one != other,
        _ => false,
    }
}
