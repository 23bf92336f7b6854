//! Records → points: the time and energy of each grid cell's step or batch of prompts.

use std::collections::BTreeMap;

use super::load::{Load, Phase};
use crate::analysis::nnls::median;
use crate::record::{Cell, ClockEvents, Energy, HoldOut, Maybe, Outcome, Record, Run, Workload};

/// Which points a law learns from and which it is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fold {
    Training,
    Interior,
    Row,
    Frontier,
}

/// One grid point, all its visits together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Observation {
    pub(super) key: String,
    pub(super) load: Load,
    pub(super) fold: Fold,
    /// Median over the runs, of one step (decode) or one batch of prompts.
    pub(super) seconds: f64,
    /// Median over the runs; none when a window lacks its energy.
    pub(super) joules: Maybe<f64>,
    /// Standard deviation over mean of the runs' seconds; none of one run.
    pub(super) variation_share: Option<f64>,
    /// Mean seconds of each visit, in the order of the records: an anchor has several.
    pub(super) visits: Vec<f64>,
    /// Some window's clocks were held down by heat.
    pub(super) throttled: bool,
}

/// All points of all records, sorted by phase and key, and sentences about cells that give none.
pub(super) fn observe(records: &[Record], held_out: &HoldOut) -> (Vec<Observation>, Vec<String>) {
    let mut cells: BTreeMap<String, Vec<(&Record, &Cell)>> = BTreeMap::new();
    for record in records {
        for cell in &record.cells {
            if matches!(cell.workload, Workload::Decode { .. } | Workload::Prefill { .. }) {
                cells.entry(cell.key.clone()).or_default().push((record, cell));
            }
        }
    }
    let mut notes = Vec::new();
    let mut observations = Vec::new();
    for (key, visits) in cells {
        match observation(&visits, fold_of(&key, held_out)) {
            Ok(observation) => observations.push(observation),
            Err(why) => notes.push(format!("{key} is left out: {why}")),
        }
    }
    observations.sort_by(|a, b| (a.load.phase(), &a.key).cmp(&(b.load.phase(), &b.key)));
    (observations, notes)
}

fn fold_of(key: &str, held_out: &HoldOut) -> Fold {
    let is_in = |keys: &[String]| keys.iter().any(|other| other == key);
    if is_in(&held_out.frontier) {
        Fold::Frontier
    } else if is_in(&held_out.row) {
        Fold::Row
    } else if is_in(&held_out.interior) {
        Fold::Interior
    } else {
        Fold::Training
    }
}

fn observation(visits: &[(&Record, &Cell)], fold: Fold) -> Result<Observation, String> {
    let (first_record, first) = visits[0];
    let load = load_of(first_record, &first.workload).ok_or("it is no grid point")?;
    let (mut seconds, mut joules, mut means) = (Vec::new(), Vec::new(), Vec::new());
    let mut missing = None;
    for (record, cell) in visits {
        if !matches!(cell.outcome, Outcome::Measured) {
            continue;
        }
        let runs: Vec<Unit> = cell
            .runs
            .iter()
            .map(|run| unit_of(record, &cell.workload, run))
            .collect::<Result<_, String>>()?;
        means.push(runs.iter().map(|unit| unit.seconds).sum::<f64>() / runs.len().max(1) as f64);
        for unit in runs {
            seconds.push(unit.seconds);
            match unit.joules {
                Maybe::Value(value) => joules.push(value),
                Maybe::Missing(reason) => missing = Some(reason.missing),
            }
        }
    }
    if seconds.is_empty() {
        return Err("it was not measured".to_owned());
    }
    let windows = || visits.iter().flat_map(|(_, cell)| &cell.runs).flat_map(|run| &run.windows);
    Ok(Observation {
        key: first.key.clone(),
        load,
        fold,
        seconds: median(&seconds),
        joules: match missing {
            Some(reason) => Maybe::missing(reason),
            None => Maybe::Value(median(&joules)),
        },
        variation_share: variation(&seconds),
        visits: means,
        throttled: windows().any(|window| window.clock_events.value().is_some_and(held_down_by_heat)),
    })
}

/// What a grid cell asks of a step. A decode cell's contexts grow by one token a step; their mean stands for all, which
/// is exact as long as time is linear in them.
fn load_of(record: &Record, workload: &Workload) -> Option<Load> {
    match *workload {
        Workload::Decode { batch, depth, osl } => {
            let context = f64::from(depth) + (f64::from(osl) + 1.0) / 2.0;
            Some(Load::Decode { batch: f64::from(batch), kv_tokens: f64::from(batch) * context })
        }
        Workload::Prefill { batch, isl } => Some(Load::Prefill {
            batch: f64::from(batch),
            isl: f64::from(isl),
            chunk: f64::from(record.engine.chunk_tokens.max(1)),
        }),
        _ => None,
    }
}

/// One step, or one batch of prompts.
struct Unit {
    seconds: f64,
    joules: Maybe<f64>,
}

fn unit_of(record: &Record, workload: &Workload, run: &Run) -> Result<Unit, String> {
    let sum = |pick: fn(&crate::record::Window) -> u64| -> f64 {
        run.windows.iter().map(|window| pick(window) as f64).sum()
    };
    let seconds = sum(|window| window.t1_ns.saturating_sub(window.t0_ns)) / 1e9;
    let (steps, passes) = (sum(|window| window.steps), sum(|window| window.passes));
    let units = match *workload {
        Workload::Prefill { batch, isl } => {
            let tokens = f64::from(batch) * f64::from(isl);
            let expected = passes * (tokens / f64::from(record.engine.chunk_tokens.max(1))).ceil();
            if steps != expected {
                return Err(format!("its prompts took {steps} steps, expected {expected}"));
            }
            passes
        }
        _ => steps,
    };
    if !(seconds > 0.0 && units > 0.0) {
        return Err("a run has no time or no steps".to_owned());
    }
    Ok(Unit { seconds: seconds / units, joules: joules(run).map(|joules| joules / units) })
}

/// Energy of a run's windows. A reading's edges are not the window's: its power holds for the window's whole time.
pub(super) fn joules(run: &Run) -> Maybe<f64> {
    let mut sum = 0.0;
    for window in &run.windows {
        match &window.energy {
            Maybe::Value(energy) if metered_s(energy) > 0.0 && energy.energy_j > 0.0 => {
                let seconds = window.t1_ns.saturating_sub(window.t0_ns) as f64 / 1e9;
                sum += energy.energy_j / metered_s(energy) * seconds;
            }
            Maybe::Value(_) => return Maybe::missing("energy_reads_zero"),
            Maybe::Missing(missing) => return Maybe::missing(missing.missing.clone()),
        }
    }
    Maybe::Value(sum)
}

/// Coefficient of variation; none of fewer than two values.
pub(super) fn variation(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean > 0.0).then(|| variance.sqrt() / mean)
}

/// The points of a phase.
pub(super) fn of_phase(observations: &[Observation], phase: Phase) -> Vec<&Observation> {
    observations.iter().filter(|observation| observation.load.phase() == phase).collect()
}
/// Time between the two readings of a window's energy.
fn metered_s(energy: &Energy) -> f64 {
    energy.t_b_ns.saturating_sub(energy.t_a_ns) as f64 / 1e9
}

fn held_down_by_heat(events: &ClockEvents) -> bool {
    let times = [&events.software_thermal_ns, &events.hardware_thermal_ns];
    times.into_iter().any(|time| time.value().is_some_and(|ns| *ns > 0))
}
