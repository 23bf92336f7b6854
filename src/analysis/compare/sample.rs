//! What a comparison takes from one record: the values of each cell, the environment, and what was left out by rule. The
//! record itself, with its requests and histograms, is let go, so that many can be compared.

use std::collections::BTreeMap;

use super::environment::{self, Fact};
use super::library::{self, StepRows};
use super::probes::{self, ProbeKind};
use super::session::{SessionId, recognised};
use crate::analysis::throttle::is_disturbed;
use crate::analysis::{CellSummary, Flag, Quantiles, TokenKind, refuse_unmeasured, summarize};
use crate::record::{Cell, CublasLt, Maybe, Outcome, Record, Run, Steady, Workload, violations};

/// Share of all cores' time that other processes, or the hypervisor's other guests, may take in a window. Above it the
/// window's run is left out: a tenth of the machine was somebody else's.
pub const DISTURBED_SHARE: f64 = 0.10;

/// One record, as a comparison sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The file, or whatever else names the record to the user.
    pub name: String,
    pub session: SessionId,
    pub started_at: String,
    pub not_a_measurement: Option<String>,
    /// Suite, or why there is none.
    pub suite: Maybe<String>,
    /// The device: a GPU's hashed UUID, or the CPU's model.
    pub subject: String,
    pub model: String,
    /// The look at the device's numerics failed.
    pub(super) computes_wrong: bool,
    pub(super) boot: Option<(String, Option<String>)>,
    pub(super) facts: Vec<Fact>,
    /// The library that computed large products, if one did.
    pub(super) library: Option<CublasLt>,
    /// ln of what the device can do at most, and of its power.
    pub(super) probes: BTreeMap<ProbeKind, f64>,
    /// By key; with [`PTX`] behind it where the driver compiled the kernels.
    pub(super) cells: BTreeMap<String, CellSample>,
    /// Runs that were left out, one sentence each.
    pub(super) exclusions: Vec<String>,
}

/// Follows the key of a cell whose kernels the driver compiled: another cell than the same workload by machine code.
pub(super) const PTX: &str = "@ptx";

/// One cell of one record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CellSample {
    pub(super) workload: Workload,
    /// Rows of the products of its steps, where the library computes some of them.
    pub(super) library_rows: Option<StepRows>,
    /// Kept runs that were not steady, or whose clocks something else than the power limit held down.
    pub(super) unsettled_runs: usize,
    /// ln of each kept run's headline tokens over its time.
    pub(super) ln_rates: Vec<f64>,
    /// Why there is none.
    pub(super) absent: Option<String>,
    pub(super) tokens: Option<TokenKind>,
    /// ln of headline tokens per second over all kept runs together.
    pub(super) ln_rate: Maybe<f64>,
    pub(super) ln_tokens_per_joule: Maybe<f64>,
    /// Why the energy must not decide; empty when it may.
    pub(super) energy_doubts: String,
    /// ln of the counter's energy over the energy from power readings: the meter's agreement with itself.
    pub(super) ln_meter_ratio: Maybe<f64>,
    /// ln of the mean clock, MHz.
    pub(super) ln_clock: Maybe<f64>,
    /// ln of latencies in ns, in the order of [`DIAGNOSTICS`].
    pub(super) ln_latencies: [Option<f64>; DIAGNOSTICS.len()],
    pub(super) conditions: Conditions,
    /// The output tokens' hash, when all runs agree on one.
    pub(super) output: Option<String>,
}

/// Latencies that are looked at and never decide.
pub(super) const DIAGNOSTICS: [&str; 6] =
    ["TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "E2E p50", "step p50"];

/// What went on while a cell was measured, summed over its windows; a missing sum says why.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conditions {
    pub(super) window_s: f64,
    pub(super) power_cap_s: Maybe<f64>,
    pub(super) thermal_s: Maybe<f64>,
    pub(super) power_brake_s: Maybe<f64>,
    /// Means over the windows' time.
    pub(super) temperature_c: Maybe<f64>,
    pub(super) foreign_share: Maybe<f64>,
    pub(super) steal_share: Maybe<f64>,
}

impl Sample {
    /// # Errors
    /// When the record says that it is no measurement and that was not allowed, or when it contradicts itself.
    pub fn of(mut record: Record, name: &str, allow_not_a_measurement: bool) -> Result<Self, String> {
        if !allow_not_a_measurement {
            refuse_unmeasured(record.not_a_measurement.as_deref())?;
        }
        let faults = violations_without_failed_checks(&record);
        if let Some(first) = faults.first() {
            let more = match faults.len() {
                1 => String::new(),
                count => format!(" (and {} more)", count - 1),
            };
            return Err(format!("contradicts itself: {first}{more}"));
        }
        let mut exclusions = Vec::new();
        for cell in &mut record.cells {
            exclude(cell, name, &mut exclusions);
        }
        let summary = summarize(&record);
        let form = if environment::is_ptx(&record) { PTX } else { "" };
        let cells = record.cells.iter().zip(&summary.cells).map(|(cell, summary)| {
            let rows = library::step_rows(&cell.workload, &record.engine);
            (format!("{}{form}", cell.key), CellSample::of(cell, summary, rows))
        });
        Ok(Sample {
            name: name.to_owned(),
            session: SessionId::of(&record.session),
            boot: recognised(&record.session),
            started_at: record.started_at.clone(),
            not_a_measurement: record.not_a_measurement.clone(),
            suite: record.command.suite.clone(),
            computes_wrong: record.numerics.value().is_some_and(|numerics| !numerics.ok),
            subject: environment::subject(&record),
            model: record.model.name.clone(),
            facts: environment::facts(&record),
            library: record.engine.cublaslt.value().cloned(),
            probes: probes::of(&record),
            cells: cells.collect(),
            exclusions,
        })
    }

    /// Two files of one measurement, such as a record and its redacted copy.
    pub(super) fn is_same_measurement(&self, other: &Sample) -> bool {
        self.session == other.session && self.started_at == other.started_at && self.cells == other.cells
    }
}

/// Text of a record in one line: whatever a file says must not move a terminal's cursor.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// What makes a record unusable as a whole. A failed check is no contradiction: its run is left out.
fn violations_without_failed_checks(record: &Record) -> Vec<String> {
    violations(record)
        .into_iter()
        .filter(|violation| !violation.what.starts_with("check "))
        .map(|violation| format!("{}: {}", violation.place, violation.what))
        .collect()
}

/// Takes out the runs that a rule excludes. No rule looks at how fast they were.
fn exclude(cell: &mut Cell, name: &str, exclusions: &mut Vec<String>) {
    let key = cell.key.clone();
    let all = cell.runs.len();
    let unfinished = match &cell.outcome {
        Outcome::Measured => None,
        Outcome::Failed { error } => Some(format!("failed: {}", printable(error))),
        Outcome::Interrupted => Some("interrupted".to_owned()),
        Outcome::Skipped { why } => Some(format!("skipped: {}", printable(why))),
    };
    if let Some(why) = unfinished {
        cell.runs.clear();
        exclusions.push(format!("{name}: {key}: {why}"));
        return;
    }
    cell.runs.retain(|run| match fault(run) {
        None => true,
        Some(why) => {
            exclusions.push(format!("{name}: {key}: run {} of {all}: {why}", run.index + 1));
            false
        }
    });
}

fn fault(run: &Run) -> Option<String> {
    if let Some(check) = run.checks.iter().find(|check| !check.ok) {
        return Some(format!("check {} failed: {}", printable(&check.name), printable(&check.detail)));
    }
    if run.steady == Steady::Unsustainable {
        return Some("unsustainable: requests arrived faster than they were served".to_owned());
    }
    let shares = run.windows.iter().filter_map(|window| window.cpu.value());
    let worst = shares
        .flat_map(|cpu| [("other processes", &cpu.foreign_share), ("the hypervisor", &cpu.steal_share)])
        .filter_map(|(who, share)| share.value().map(|share| (who, *share)))
        .max_by(|a, b| a.1.total_cmp(&b.1))?;
    (worst.1 > DISTURBED_SHARE).then(|| format!("{} took {:.0} % of the cores", worst.0, worst.1 * 100.0))
}

impl CellSample {
    fn of(cell: &Cell, summary: &CellSummary, library_rows: Option<StepRows>) -> Self {
        let tokens = summary.throughput.value().map(|rate| rate.tokens);
        let ln_rate = positive_ln(&summary.throughput.as_ref().map(|rate| rate.tokens_per_s));
        let ln_rates: Vec<f64> = tokens
            .map(|kind| cell.runs.iter().filter_map(|run| run_rate(run, kind)).map(f64::ln).collect())
            .unwrap_or_default();
        CellSample {
            workload: cell.workload,
            library_rows,
            unsettled_runs: cell.runs.iter().filter(|run| is_unsettled(run)).count(),
            absent: ln_rates.is_empty().then(|| absence(cell)),
            ln_rates,
            tokens,
            ln_rate,
            ln_tokens_per_joule: positive_ln(&summary.energy.tokens_per_joule),
            energy_doubts: energy_doubts(summary),
            ln_meter_ratio: positive_ln(&meter_ratio(cell)),
            ln_clock: positive_ln(&mean_over_windows(cell, |window| {
                window.clocks.as_ref().map(|clocks| clocks.sm_mean_mhz)
            })),
            ln_latencies: latencies(summary),
            conditions: Conditions::of(cell),
            output: agreed_output(cell),
        }
    }
}

/// Whether the run's speed is that of a state that does not last.
fn is_unsettled(run: &Run) -> bool {
    matches!(run.steady, Steady::Warmup | Steady::Slowdown | Steady::NoSteadyState) || is_disturbed(run)
}

fn energy_doubts(summary: &CellSummary) -> String {
    let doubts = summary.flags.iter().filter_map(|flag| match flag {
        Flag::EnergyInDoubt { reasons } => Some(reasons.join(", ")),
        _ => None,
    });
    printable(&doubts.collect::<Vec<String>>().join(", ").replace('_', " "))
}

/// Energy by the counter over energy by power readings, over all windows and devices; missing where one has no witness.
fn meter_ratio(cell: &Cell) -> Maybe<f64> {
    let (mut counter_j, mut integral_j) = (0.0, 0.0);
    for window in cell.runs.iter().flat_map(|run| &run.windows) {
        let energy = match &window.energy {
            Maybe::Value(energy) => energy,
            Maybe::Missing(missing) => return Maybe::Missing(missing.clone()),
        };
        for device in &energy.devices {
            match &device.integral_j {
                Maybe::Value(joules) => integral_j += joules,
                Maybe::Missing(missing) => return Maybe::Missing(missing.clone()),
            }
            counter_j += device.energy_j;
        }
    }
    if integral_j > 0.0 { Maybe::Value(counter_j / integral_j) } else { Maybe::missing("no_run") }
}

fn absence(cell: &Cell) -> String {
    match &cell.outcome {
        Outcome::Measured => "all its runs were left out".to_owned(),
        Outcome::Failed { error } => format!("failed: {}", printable(error)),
        Outcome::Interrupted => "was interrupted".to_owned(),
        Outcome::Skipped { why } => format!("was skipped: {}", printable(why)),
    }
}

fn positive_ln(value: &Maybe<f64>) -> Maybe<f64> {
    match value {
        Maybe::Value(value) if value.is_finite() && *value > 0.0 => Maybe::Value(value.ln()),
        Maybe::Value(_) => Maybe::missing("not_positive"),
        Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
    }
}

/// Headline tokens over time of one run, tokens/s; none when nothing was counted.
fn run_rate(run: &Run, kind: TokenKind) -> Option<f64> {
    let tokens: f64 = run
        .windows
        .iter()
        .map(|window| match kind {
            TokenKind::Input => window.tokens_in as f64,
            TokenKind::Output => window.tokens_out as f64,
        })
        .sum();
    let seconds: f64 = run.windows.iter().map(seconds).sum();
    (tokens > 0.0 && seconds > 0.0).then(|| tokens / seconds)
}

fn seconds(window: &crate::record::Window) -> f64 {
    window.t1_ns.saturating_sub(window.t0_ns) as f64 / 1e9
}

fn latencies(summary: &CellSummary) -> [Option<f64>; DIAGNOSTICS.len()] {
    let ln = |latency: &Maybe<Quantiles>, pick: fn(&Quantiles) -> &Maybe<f64>| {
        latency.value().and_then(|quantiles| positive_ln(pick(quantiles)).into_value())
    };
    [
        ln(&summary.ttft, |quantiles| &quantiles.p50_ns),
        ln(&summary.ttft, |quantiles| &quantiles.p99_ns),
        ln(&summary.itl, |quantiles| &quantiles.p50_ns),
        ln(&summary.itl, |quantiles| &quantiles.p99_ns),
        ln(&summary.e2e, |quantiles| &quantiles.p50_ns),
        ln(&summary.step, |quantiles| &quantiles.p50_ns),
    ]
}

/// The mean over all windows of a cell, weighted by their time; missing when it is for any.
fn mean_over_windows(cell: &Cell, pick: impl Fn(&crate::record::Window) -> Maybe<f64>) -> Maybe<f64> {
    sum_over_windows(cell, |window| pick(window).map(|value| value * seconds(window))).map(|sum| {
        let all: f64 = cell.runs.iter().flat_map(|run| &run.windows).map(seconds).sum();
        sum / all
    })
}

fn sum_over_windows(cell: &Cell, pick: impl Fn(&crate::record::Window) -> Maybe<f64>) -> Maybe<f64> {
    let mut sum = None;
    for window in cell.runs.iter().flat_map(|run| &run.windows) {
        match pick(window) {
            Maybe::Value(value) => sum = Some(sum.unwrap_or(0.0) + value),
            missing => return missing,
        }
    }
    sum.map_or(Maybe::missing("no_run"), Maybe::Value)
}

impl Conditions {
    fn of(cell: &Cell) -> Self {
        let events = |pick: fn(&crate::record::ClockEvents) -> Maybe<u64>| {
            sum_over_windows(cell, |window| match &window.clock_events {
                Maybe::Value(events) => pick(events).map(|ns| ns as f64 / 1e9),
                Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
            })
        };
        let share = |pick: fn(&crate::record::machine::CpuShare) -> &Maybe<f64>| {
            mean_over_windows(cell, |window| match &window.cpu {
                Maybe::Value(cpu) => pick(cpu).clone(),
                Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
            })
        };
        Conditions {
            window_s: cell.runs.iter().flat_map(|run| &run.windows).map(seconds).sum(),
            power_cap_s: events(|events| events.software_power_cap_ns.clone()),
            thermal_s: events(thermal_ns),
            power_brake_s: events(|events| events.hardware_power_brake_ns.clone()),
            temperature_c: mean_over_windows(cell, |window| {
                window.temperature.as_ref().map(|temperature| 0.5 * (temperature.start_c + temperature.end_c))
            }),
            foreign_share: share(|cpu| &cpu.foreign_share),
            steal_share: share(|cpu| &cpu.steal_share),
        }
    }
}

/// Time for which heat held the clock down, by the driver's or the hardware's decision; both may last at once.
fn thermal_ns(events: &crate::record::ClockEvents) -> Maybe<u64> {
    let both = events.software_thermal_ns.as_ref().zip(events.hardware_thermal_ns.as_ref());
    both.map(|(software, hardware)| *software.max(hardware))
}

/// Only static cells repeat the same requests in the same batch, so only they have a hash.
fn agreed_output(cell: &Cell) -> Option<String> {
    let mut hashes = cell.runs.iter().map(|run| run.output_token_sha256.value());
    let first = hashes.next()??;
    hashes.all(|hash| hash == Some(first)).then(|| first.clone())
}
