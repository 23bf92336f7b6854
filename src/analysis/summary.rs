//! A record as rates and percentiles. Throughput is tokens over time, summed over all windows: never a mean of rates.

use serde::Serialize;

use super::Quantiles;
use super::anchors::{self, Distance};
use super::cost::{self, CellCost, Work, cell_cost};
use super::energy::{self, CellEnergy};
use super::roofline::{self, Utilization};
use super::throttle::throttled;
use crate::record::{Cell, Latency, LatencyHistogram, Maybe, Outcome, Record, Run, Steady, Workload};

/// Share of the cores that others may take before a window is flagged.
const QUIET_SHARE: f64 = 0.02;

/// All cells of one record, derived anew at each reading.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub model: String,
    pub device: String,
    pub backend: String,
    pub compute_dtype: String,
    pub synthetic_weights: bool,
    pub currency: Maybe<String>,
    /// The cost model in a sentence.
    pub prices: Maybe<String>,
    /// Which sensor energy comes from, and what is inside its reading: `nvml_total_energy, gpu`.
    pub energy_from: Maybe<String>,
    pub started_at: String,
    pub not_a_measurement: Option<String>,
    pub cells: Vec<CellSummary>,
}

/// Which tokens a rate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    Input,
    Output,
}

/// The headline rate of a cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Throughput {
    pub tokens: TokenKind,
    /// All tokens of all windows over all their time.
    pub tokens_per_s: f64,
    /// Half the distance between the slowest and the fastest run, over the headline rate.
    pub spread_ratio: Maybe<f64>,
    /// Input and output tokens together.
    pub total_tokens_per_s: f64,
}

/// Something about a cell that a reader must know before using its numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Flag {
    Failed {
        error: String,
    },
    Interrupted,
    Skipped {
        why: String,
    },
    /// Other processes, or the hypervisor, took this share of the cores in some window.
    NotQuiet {
        foreign_share: f64,
        steal_share: f64,
    },
    /// The open loop's backlog grew: its latencies belong to the length of the window.
    Unsustainable,
    /// So many of the cell's runs had no steady state, of these classes.
    NotSteady {
        runs: usize,
        classes: Vec<Steady>,
    },
    /// Clocks were held down for this share of some window; the windows are kept.
    Throttled {
        share: Maybe<f64>,
        causes: Vec<String>,
    },
    /// Requests of the window that did not finish in time.
    Unfinished {
        requests: u64,
    },
    CheckFailed {
        check: String,
        detail: String,
    },
    /// Faster than the device can be: bytes, flops, time or ceiling is wrong.
    AboveCeiling {
        mbu_share: Maybe<f64>,
        mfu_share: Maybe<f64>,
    },
    /// The energy is shown, and must not decide a comparison.
    EnergyInDoubt {
        reasons: Vec<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellSummary {
    pub key: String,
    pub runs: usize,
    pub throughput: Maybe<Throughput>,
    pub ttft: Maybe<Quantiles>,
    pub itl: Maybe<Quantiles>,
    pub tpot: Maybe<Quantiles>,
    pub e2e: Maybe<Quantiles>,
    pub step: Maybe<Quantiles>,
    /// Memory bandwidth utilisation: of the bandwidth measured in the same run.
    pub mbu_share: Maybe<f64>,
    /// Model flops utilisation: of the matmul peak measured in the same run.
    pub mfu_share: Maybe<f64>,
    #[serde(flatten)]
    pub energy: CellEnergy,
    /// Tokens for one unit of the record's currency.
    pub tokens_per_money: Maybe<f64>,
    /// What tokens cost, in the record's currency.
    pub cost: Maybe<CellCost>,
    /// How far published figures of such a cell lie.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub anchors: Vec<Distance>,
    pub flags: Vec<Flag>,
}

/// Refuses records that are no measurement.
///
/// # Errors
/// With the record's own reason.
pub fn refuse_unmeasured(not_a_measurement: Option<&str>) -> Result<(), String> {
    match not_a_measurement {
        Some(reason) => Err(format!("is not a measurement: {reason}")),
        None => Ok(()),
    }
}

pub fn summarize(record: &Record) -> Summary {
    Summary {
        model: record.model.name.clone(),
        device: record.engine.device.clone(),
        backend: record.engine.backend.clone(),
        compute_dtype: record.engine.compute_dtype.clone(),
        synthetic_weights: record.model.weights.format == "synthetic",
        currency: match &record.cost_model {
            Maybe::Value(model) => Maybe::Value(model.currency.to_string()),
            Maybe::Missing(missing) => Maybe::missing(missing.missing.clone()),
        },
        prices: record.cost_model.as_ref().map(cost::describe),
        energy_from: energy_from(record),
        started_at: record.started_at.clone(),
        not_a_measurement: record.not_a_measurement.clone(),
        cells: record.cells.iter().map(|cell| summarize_cell(record, cell)).collect(),
    }
}

fn energy_from(record: &Record) -> Maybe<String> {
    let scope = record.meter.scope.value().map_or("scope unknown", String::as_str);
    record.meter.source.as_ref().map(|source| format!("{source}, {scope}"))
}

fn summarize_cell(record: &Record, cell: &Cell) -> CellSummary {
    let quantiles = |pick: fn(&Latency) -> &Maybe<LatencyHistogram>| {
        Quantiles::of(cell.runs.iter().map(|run| pick(&run.latency)))
    };
    let throughput = throughput(cell);
    let energy = energy::of_cell(record, cell, headline(&cell.workload));
    let cost = cost_of(record, cell, &energy);
    let utilization = roofline::utilization(record, cell);
    CellSummary {
        key: cell.key.clone(),
        runs: cell.runs.len(),
        ttft: quantiles(|latency| &latency.ttft),
        itl: quantiles(|latency| &latency.itl),
        tpot: quantiles(|latency| &latency.tpot),
        e2e: quantiles(|latency| &latency.e2e),
        step: quantiles(|latency| &latency.step),
        anchors: anchors::distances(record, cell, &throughput, &energy.joules_per_token),
        tokens_per_money: tokens_per_money(cell, &cost),
        cost,
        energy,
        throughput,
        flags: flags(cell).into_iter().chain(above_ceiling(&utilization)).collect(),
        mbu_share: utilization.mbu_share,
        mfu_share: utilization.mfu_share,
    }
}

/// The tokens that the headline counts: the prompt's where the prompt is the work.
fn headline(workload: &Workload) -> TokenKind {
    match workload {
        Workload::Prefill { .. } => TokenKind::Input,
        _ => TokenKind::Output,
    }
}

/// Tokens of `kind` and seconds of one run's windows.
fn tokens_and_seconds(run: &Run, kind: TokenKind) -> (u64, f64) {
    run.windows.iter().fold((0, 0.0), |(tokens, seconds), window| {
        let counted = match kind {
            TokenKind::Input => window.tokens_in,
            TokenKind::Output => window.tokens_out,
        };
        (tokens.saturating_add(counted), seconds + window.t1_ns.saturating_sub(window.t0_ns) as f64 / 1e9)
    })
}

fn throughput(cell: &Cell) -> Maybe<Throughput> {
    let kind = headline(&cell.workload);
    let parts: Vec<(u64, f64)> = cell.runs.iter().map(|run| tokens_and_seconds(run, kind)).collect();
    let tokens: u128 = parts.iter().map(|(tokens, _)| u128::from(*tokens)).sum();
    let seconds: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    if seconds <= 0.0 {
        return Maybe::missing("no_run");
    }
    let tokens_per_s = tokens as f64 / seconds;
    let all: u128 = [TokenKind::Input, TokenKind::Output]
        .iter()
        .flat_map(|kind| cell.runs.iter().map(|run| u128::from(tokens_and_seconds(run, *kind).0)))
        .sum();
    let rates: Vec<f64> =
        parts.iter().filter(|(_, s)| *s > 0.0).map(|(tokens, s)| *tokens as f64 / s).collect();
    Maybe::Value(Throughput {
        tokens: kind,
        tokens_per_s,
        spread_ratio: spread(&rates, tokens_per_s),
        total_tokens_per_s: all as f64 / seconds,
    })
}

fn spread(rates: &[f64], center: f64) -> Maybe<f64> {
    if rates.len() < 2 || center <= 0.0 {
        return Maybe::missing("needs_2_runs");
    }
    let high = rates.iter().copied().fold(f64::MIN, f64::max);
    let low = rates.iter().copied().fold(f64::MAX, f64::min);
    Maybe::Value((high - low) / 2.0 / center)
}

fn cost_of(record: &Record, cell: &Cell, energy: &CellEnergy) -> Maybe<CellCost> {
    let devices = cell.devices.len().max(1);
    let idle_power_w = record.meter.idle_context_resident.as_ref().map(|idle| idle.power_w);
    record.cost_model.as_ref().map(|model| {
        let seconds: f64 = cell.runs.iter().map(|run| tokens_and_seconds(run, TokenKind::Output).1).sum();
        let rate = |kind| {
            let tokens: f64 = cell.runs.iter().map(|run| tokens_and_seconds(run, kind).0 as f64).sum();
            if seconds > 0.0 { tokens / seconds } else { 0.0 }
        };
        let work = Work {
            devices,
            input_tokens_per_s: rate(TokenKind::Input),
            output_tokens_per_s: rate(TokenKind::Output),
            device_watts: energy.power_w.as_ref().map(|watts| watts / devices as f64),
            idle_watts: idle_power_w.map(|watts| watts / devices as f64),
        };
        cell_cost(model, &work)
    })
}

/// Tokens of the headline for one unit of money.
fn tokens_per_money(cell: &Cell, cost: &Maybe<CellCost>) -> Maybe<f64> {
    let per_mtok = match cost {
        Maybe::Missing(missing) => return Maybe::missing(missing.missing.clone()),
        Maybe::Value(cost) => match headline(&cell.workload) {
            TokenKind::Input => &cost.per_mtok_input,
            TokenKind::Output => &cost.per_mtok_output,
        },
    };
    match per_mtok {
        Maybe::Value(price) if *price > 0.0 => Maybe::Value(1e6 / price),
        Maybe::Value(_) => Maybe::missing("costs_nothing"),
        Maybe::Missing(missing) => Maybe::missing(missing.missing.clone()),
    }
}

fn flags(cell: &Cell) -> Vec<Flag> {
    let mut flags = Vec::new();
    match &cell.outcome {
        Outcome::Measured => {}
        Outcome::Failed { error } => flags.push(Flag::Failed { error: error.clone() }),
        Outcome::Interrupted => flags.push(Flag::Interrupted),
        Outcome::Skipped { why } => flags.push(Flag::Skipped { why: why.clone() }),
    }
    flags.extend(not_quiet(cell));
    if cell.runs.iter().any(|run| run.steady == Steady::Unsustainable) {
        flags.push(Flag::Unsustainable);
    }
    flags.extend(not_steady(cell));
    flags.extend(throttled(cell));
    let drains = cell.runs.iter().filter_map(|run| run.drain.value());
    let requests = drains.fold(0u64, |sum, drain| sum.saturating_add(drain.unfinished));
    if requests > 0 {
        flags.push(Flag::Unfinished { requests });
    }
    let reasons = energy::doubts(cell);
    if !reasons.is_empty() {
        flags.push(Flag::EnergyInDoubt { reasons });
    }
    let failed = cell.runs.iter().flat_map(|run| &run.checks).filter(|check| !check.ok);
    flags.extend(
        failed.map(|check| Flag::CheckFailed { check: check.name.clone(), detail: check.detail.clone() }),
    );
    flags
}

fn above_ceiling(utilization: &Utilization) -> Option<Flag> {
    let Utilization { mbu_share, mfu_share } = utilization.clone();
    let is_above = |share: &Maybe<f64>| share.value().is_some_and(|share| roofline::is_impossible(*share));
    (is_above(&mbu_share) || is_above(&mfu_share)).then_some(Flag::AboveCeiling { mbu_share, mfu_share })
}

fn not_steady(cell: &Cell) -> Option<Flag> {
    let restless =
        |class: &Steady| matches!(class, Steady::Warmup | Steady::Slowdown | Steady::NoSteadyState);
    let mut classes: Vec<Steady> = cell.runs.iter().map(|run| run.steady).filter(restless).collect();
    let runs = classes.len();
    classes.sort_by_key(|class| *class as u8);
    classes.dedup();
    (runs > 0).then_some(Flag::NotSteady { runs, classes })
}

/// The worst window, when it is above [`QUIET_SHARE`].
fn not_quiet(cell: &Cell) -> Option<Flag> {
    let shares = || cell.runs.iter().flat_map(|run| &run.windows).filter_map(|window| window.cpu.value());
    let worst = |pick: fn(&crate::record::machine::CpuShare) -> &Maybe<f64>| {
        shares().filter_map(|share| pick(share).value().copied()).fold(0.0, f64::max)
    };
    let foreign_share = worst(|share| &share.foreign_share);
    let steal_share = worst(|share| &share.steal_share);
    (foreign_share.max(steal_share) > QUIET_SHARE).then_some(Flag::NotQuiet { foreign_share, steal_share })
}
