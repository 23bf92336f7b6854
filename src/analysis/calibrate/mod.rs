//! Records → a calibration: laws of time and energy over physical quantities, each tested on points that were set aside
//! before they were measured. Also others' published serving rows, by the laws of serving. Pure functions; the grid and
//! what is held out are decided in [`crate::record`], the formulas stand in PLANNING.md.

mod file;
mod ladder;
mod law;
mod load;
mod observe;
mod physics;
mod published;
mod score;

pub use file::{
    Baseline, Basis, CALIBRATION_SCHEMA, Calibration, Composition, ErrorStatistics, FittedLaw, Grade,
    Outlier, Quantity, ReadOut, Source, Subject, calibration_schema, parse_calibration, read_calibration,
};
pub use ladder::PowerStep;
pub use law::{CONFIDENCE, Coefficient, Forecast, Law, Range};
pub use load::{Load, Phase, Term};
pub use published::{Group, GroupFit, Rows, RowsForm, fit_groups, read_rows};

use std::collections::BTreeSet;

use self::law::Points;
use self::observe::{Fold, Observation};
use self::physics::Physics;
use super::devices;
use super::nnls::median;
use crate::record::{HoldOut, Maybe, Record, Workload, canonical_sha256, hold_out};

/// Points that a law needs.
const LEAST_POINTS: usize = 8;
/// Visits of one cell that make it an anchor.
const LEAST_VISITS: usize = 3;
/// Most that an anchor may vary between its visits.
const MOST_DRIFT_SHARE: f64 = 0.03;

/// Why nothing was fitted: each a sentence.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("refused: {}", .0.join("\nrefused: "))]
pub struct Refusal(pub Vec<String>);

/// A record and the name of its file.
#[derive(Clone, Debug)]
pub struct Given {
    pub file: String,
    pub record: Record,
}

/// Fits all laws that the records' cells determine.
///
/// # Errors
/// When the records do not belong together, or do not determine a physical law; every reason is named.
pub fn calibrate(given: &[Given], command: Vec<String>) -> Result<Calibration, Refusal> {
    let one = |reason: String| Refusal(vec![reason]);
    let first = &given.first().ok_or_else(|| one("there are no records".to_owned()))?.record;
    check_kinship(given)?;
    let records: Vec<Record> = given.iter().map(|given| given.record.clone()).collect();
    let held_out = held_out(&records).map_err(one)?;
    let (observations, mut notes) = observe::observe(&records, &held_out);
    let mut reasons = drifting_anchors(&observations);
    let physics = Physics::of(first);
    let mut laws = Vec::new();
    for phase in [Phase::Decode, Phase::Prefill] {
        let points = observe::of_phase(&observations, phase);
        if points.is_empty() {
            notes.push(format!("{}: no cells, so no law", phase.name()));
            continue;
        }
        match fit_phase(phase, &points, &physics, first) {
            Ok(fitted) => laws.extend(fitted),
            Err(found) => reasons.extend(found),
        }
    }
    if laws.is_empty() && reasons.is_empty() {
        reasons.push("there is no decode and no prefill cell to learn from".to_owned());
    }
    if !reasons.is_empty() {
        return Err(Refusal(reasons));
    }
    notes.extend(remarks(&laws, &observations));
    let mut calibration = Calibration {
        schema: CALIBRATION_SCHEMA.to_owned(),
        basis: Basis::Measured,
        not_a_measurement: records.iter().find_map(|record| record.not_a_measurement.clone()),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        command,
        sources: given.iter().map(source).collect::<Result<_, _>>().map_err(one)?,
        subject: subject(first, &physics),
        hold_out: Maybe::Value(held_out),
        read_outs: laws
            .iter()
            .filter(|fitted| fitted.quantity == Quantity::Time)
            .flat_map(|fitted| physics.read_outs(&fitted.law))
            .collect(),
        grade: laws.iter().map(|fitted| score::grade(fitted).0).max().unwrap_or(Grade::C),
        laws,
        idle_w: ladder::idle_w(&records, |record| &record.meter.idle_no_context),
        ready_w: ladder::idle_w(&records, |record| &record.meter.idle_context_resident),
        power_steps: ladder::power_steps(&records),
        compositions: Vec::new(),
        notes,
    };
    calibration.compositions = compositions(&calibration, &records);
    Ok(calibration)
}

/// Refuses records whose numbers do not belong to one law.
fn check_kinship(given: &[Given]) -> Result<(), Refusal> {
    let (first, rest) = given.split_first().expect("there is a record");
    let mut reasons = Vec::new();
    for other in rest {
        let mut same = |what: &str, a: String, b: String| {
            if a != b {
                reasons.push(format!("{} has {what} {b}, expected {a} as in {}", other.file, first.file));
            }
        };
        let (a, b) = (&first.record, &other.record);
        same("model", a.model.name.clone(), b.model.name.clone());
        same("configuration", format!("{:?}", a.model.config), format!("{:?}", b.model.config));
        same("compute type", a.engine.compute_dtype.clone(), b.engine.compute_dtype.clone());
        same("backend", a.engine.backend.clone(), b.engine.backend.clone());
        same("device", device_name(a), device_name(b));
        same("steps of at most", a.engine.chunk_tokens.to_string(), b.engine.chunk_tokens.to_string());
        same("threads", a.engine.threads.to_string(), b.engine.threads.to_string());
    }
    if reasons.is_empty() { Ok(()) } else { Err(Refusal(reasons)) }
}

/// The rule applied to the cells of all records together. Where a record holds its own choice, it must be the rule's.
fn held_out(records: &[Record]) -> Result<HoldOut, String> {
    for record in records {
        let planned: Vec<Workload> = record.cells.iter().map(|cell| cell.workload).collect();
        let is_whole = planned.len() == record.command.planned_cells.len();
        if let Maybe::Value(recorded) = &record.command.hold_out
            && is_whole
            && *recorded != hold_out(&planned)
        {
            return Err(
                "command.hold_out is not what the rule makes of the planned cells: it was changed".to_owned()
            );
        }
    }
    if let [record] = records
        && let Maybe::Value(recorded) = &record.command.hold_out
    {
        return Ok(recorded.clone());
    }
    Ok(hold_out(
        &records.iter().flat_map(|record| &record.cells).map(|cell| cell.workload).collect::<Vec<_>>(),
    ))
}

/// Cells that were visited again and again must not have changed.
fn drifting_anchors(observations: &[Observation]) -> Vec<String> {
    observations
        .iter()
        .filter(|observation| observation.visits.len() >= LEAST_VISITS)
        .filter_map(|observation| {
            let drift = observe::variation(&observation.visits).filter(|drift| *drift > MOST_DRIFT_SHARE)?;
            Some(format!(
                "{} varies by {:.1} % between its {} visits, expected at most {:.0} %: the machine was not steady",
                observation.key,
                drift * 100.0,
                observation.visits.len(),
                MOST_DRIFT_SHARE * 100.0
            ))
        })
        .collect()
}

/// The time law of a phase, and its energy law where every point has its energy.
fn fit_phase(
    phase: Phase,
    observations: &[&Observation],
    physics: &Physics,
    record: &Record,
) -> Result<Vec<FittedLaw>, Vec<String>> {
    let points = score::measured(observations, Quantity::Time).map_err(|reason| vec![reason])?;
    let training = score::training(&points);
    let reasons = too_few(phase, &training);
    if !reasons.is_empty() {
        return Err(reasons);
    }
    let time = Law::fit(phase, &training, false).map_err(|no_law| vec![no_law.0])?;
    let mut reasons = Vec::new();
    if let Some(needed) = phase.needed().filter(|term| is_absent(&time, *term)) {
        reasons.push(format!(
            "{}: the coefficient of {} is zero, expected more: no step is free of it",
            phase.name(),
            needed.name()
        ));
    }
    reasons.extend(physics.contradictions(&time).into_iter().map(|what| format!("{}: {what}", phase.name())));
    if !reasons.is_empty() {
        return Err(reasons);
    }
    let sheet = devices::device_of(&device_name(record)).and_then(devices::device_sheet);
    let rooflines = || {
        let spec_sheet = physics.spec_sheet_roofline(sheet, &record.engine.compute_dtype);
        physics.measured_roofline().into_iter().chain(spec_sheet).collect()
    };
    let noise = noise_floor(observations);
    let mut laws = vec![score::score(Quantity::Time, time.clone(), &points, noise.clone(), rooflines())];
    if let Ok(points) = score::measured(observations, Quantity::Energy) {
        let energy = Law::fit_like(&time, &score::training(&points));
        laws.push(score::score(
            Quantity::Energy,
            energy,
            &points,
            Maybe::missing("not_assessed"),
            Vec::new(),
        ));
    }
    Ok(laws)
}

/// Whether a law goes without a term, beyond its knot too: a short prompt's tokens may hide behind the weights' reading.
fn is_absent(law: &Law, term: Term) -> bool {
    let beyond = if term == Term::NewTokens { law.coefficient(Term::NewTokensBeyondKnot) } else { 0.0 };
    law.coefficient(term) + beyond <= 0.0
}

/// What is missing before a law can be thought of.
fn too_few(phase: Phase, training: &Points) -> Vec<String> {
    let distinct = |pick: fn(&law_grid::Grid) -> u64| -> usize {
        training.loads.iter().map(law_grid::of).map(|grid| pick(&grid)).collect::<BTreeSet<_>>().len()
    };
    let mut reasons = Vec::new();
    let mut need = |what: &str, found: usize, least: usize| {
        if found < least {
            reasons
                .push(format!("{}: {found} {what} to learn from, expected at least {least}", phase.name()));
        }
    };
    need("points", training.values.len(), LEAST_POINTS);
    let (sizes, rows) = (distinct(|grid| grid.size), distinct(|grid| grid.row));
    match phase {
        Phase::Decode => {
            need("contexts", rows, 2);
            need("batch sizes", sizes, 3);
        }
        Phase::Prefill => need("lengths", sizes, 3),
        Phase::Serving | Phase::Saturated => {}
    }
    reasons
}

/// Grid places as whole numbers, which can be counted.
mod law_grid {
    use super::load::Load;

    pub(super) struct Grid {
        pub(super) size: u64,
        pub(super) row: u64,
    }

    pub(super) fn of(load: &Load) -> Grid {
        let (size, row) = load.grid();
        Grid { size: size as u64, row: row[0] as u64 }
    }
}

fn noise_floor(observations: &[&Observation]) -> Maybe<f64> {
    let variations: Vec<f64> =
        observations.iter().filter_map(|observation| observation.variation_share).collect();
    if variations.is_empty() { Maybe::missing("needs_2_runs") } else { Maybe::Value(median(&variations)) }
}

/// Sentences beside the numbers.
fn remarks(laws: &[FittedLaw], observations: &[Observation]) -> Vec<String> {
    let mut notes: Vec<String> = laws.iter().filter_map(|fitted| score::grade(fitted).1).collect();
    notes.extend(laws.iter().flat_map(score::beaten_by));
    let has_energy = laws.iter().any(|fitted| fitted.quantity == Quantity::Energy);
    if !has_energy && let Some(reason) = observations.iter().find_map(|found| found.joules.reason()) {
        notes.push(format!("energy: no law, because a window has none ({})", reason.replace('_', " ")));
    }
    for outlier in laws.iter().flat_map(|fitted| &fitted.outliers) {
        notes.push(format!("{} took {:.2} times what the law gives", outlier.key, outlier.ratio));
    }
    for observation in observations.iter().filter(|found| found.throttled) {
        let role = if observation.fold == Fold::Training { "learnt from" } else { "held out" };
        notes.push(format!("{} ({role}): clocks were held down by heat", observation.key));
    }
    if !observations.iter().any(|found| found.visits.len() >= LEAST_VISITS) {
        notes.push("no cell was visited three times, so drift is unknown".to_owned());
    }
    notes
}

fn source(given: &Given) -> Result<Source, String> {
    let sha256 = canonical_sha256(&given.record).map_err(|error| format!("{}: {error:#}", given.file))?;
    Ok(Source { file: given.file.clone(), sha256, origin: format!("record of {}", given.record.started_at) })
}

fn subject(record: &Record, physics: &Physics) -> Subject {
    let name = device_name(record);
    let devices = record.cells.iter().map(|cell| cell.devices.len()).max().unwrap_or(1).max(1);
    let engine = &record.engine;
    Subject {
        device: devices::device_of(&name).map_or(name, str::to_owned),
        gpus_per_replica: devices as u32,
        model: record.model.name.clone(),
        precision: engine.compute_dtype.clone(),
        engine: format!("tokmeter/{}", engine.backend),
        parallelism: Maybe::missing("one_device"),
        chunk_tokens: Maybe::Value(engine.chunk_tokens.max(1)),
        weights_bytes: physics.weights_bytes.clone(),
        kv_bytes_per_token: physics.kv_bytes_per_token.clone(),
        kv_tokens_held: Maybe::Value(u64::from(engine.kv_pages) * u64::from(engine.page_size_tokens)),
    }
}

/// What the driver calls the GPU that ran, or what the kernel calls the CPU.
fn device_name(record: &Record) -> String {
    let index = record.engine.device.strip_prefix("cuda:").and_then(|index| index.parse::<u32>().ok());
    let gpu = index.and_then(|index| record.machine.gpus.iter().find(|gpu| gpu.index == index));
    let name = match gpu {
        Some(gpu) => gpu.name.value(),
        None => record.machine.cpu.model.value(),
    };
    name.cloned().unwrap_or_else(|| record.engine.device.clone())
}

/// Seconds of an output token of each request, and their sum over a batch: the composition that serving forecasts rest on.
///
/// `TPOT(c, S, O) = t_decode(c, c (S + O / 2)) + c · t_prefill(S) / O`
pub fn composed_tpot(decode: &Law, prefill: &Law, chunk: f64, serving: &Load) -> f64 {
    let Load::Serving { concurrency, isl, osl } = *serving else { return f64::NAN };
    let step = Load::Decode { batch: concurrency, kv_tokens: concurrency * (isl + osl / 2.0) };
    decode.at(&step) + concurrency * prefill.at(&Load::Prefill { batch: 1.0, isl, chunk }) / osl
}

/// Cells of prefill and decode together, forecast by composition. They are not learnt from.
fn compositions(calibration: &Calibration, records: &[Record]) -> Vec<Composition> {
    let law = |phase| calibration.law(phase, Quantity::Time);
    let (Some(decode), Some(prefill)) = (law(Phase::Decode), law(Phase::Prefill)) else { return Vec::new() };
    let mut found = Vec::new();
    for record in records {
        let chunk = f64::from(record.engine.chunk_tokens.max(1));
        for cell in &record.cells {
            let windows = || cell.runs.iter().flat_map(|run| &run.windows);
            let seconds: f64 =
                windows().map(|window| window.t1_ns.saturating_sub(window.t0_ns) as f64 / 1e9).sum();
            let tokens: f64 = windows().map(|window| window.tokens_out as f64).sum();
            let forecast = match cell.workload {
                Workload::ServeClosed { concurrency, isl, osl, .. } => {
                    let [concurrency, isl, osl] = [concurrency, isl, osl].map(f64::from);
                    let serving = Load::Serving { concurrency, isl, osl };
                    concurrency / composed_tpot(decode, prefill, chunk, &serving)
                }
                Workload::Generate { batch, isl, osl } => {
                    let [batch, isl, osl] = [batch, isl, osl].map(f64::from);
                    let step = Load::Decode { batch, kv_tokens: batch * (isl + osl / 2.0) };
                    let pass =
                        prefill.at(&Load::Prefill { batch, isl, chunk }) + (osl - 1.0) * decode.at(&step);
                    batch * osl / pass
                }
                _ => continue,
            };
            if seconds > 0.0 && tokens > 0.0 {
                found.push(Composition {
                    key: cell.key.clone(),
                    measured_output_tokens_per_s: tokens / seconds,
                    forecast_output_tokens_per_s: forecast,
                });
            }
        }
    }
    found
}
