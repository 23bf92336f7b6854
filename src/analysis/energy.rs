//! Joules, from the windows' energies and the tokens between the same readings. Gross: idle power is part of it, since a
//! device that waits burns it too; net of idle only where idle power was watched for long enough.

use serde::Serialize;

use super::TokenKind;
use crate::record::{Cell, Energy, Maybe, Record};

/// Idle power that was watched for a shorter time is not subtracted, ns.
const LONG_IDLE_NS: u64 = 60_000_000_000;

/// What a cell's energy says, over all windows together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellEnergy {
    /// Headline tokens over joules.
    pub tokens_per_joule: Maybe<f64>,
    /// Joules over headline tokens.
    pub joules_per_token: Maybe<f64>,
    /// Joules over seconds, W.
    pub power_w: Maybe<f64>,
    /// Half-width of the joules per token over themselves: what the readings leave open, or half the distance between the
    /// runs, whichever is larger. Without the sensor's gain, which all runs share.
    pub energy_uncertainty_ratio: Maybe<f64>,
    /// The same tokens over what is left of the energy without the power of the loaded, idle device.
    pub net_tokens_per_joule: Maybe<f64>,
}

/// Sums over the metered parts of all windows.
#[derive(Default)]
struct Sums {
    energy_j: f64,
    uncertainty_j: f64,
    duration_s: f64,
    tokens: f64,
}

pub(super) fn of_cell(record: &Record, cell: &Cell, kind: TokenKind) -> CellEnergy {
    let sums = sums(cell, kind);
    let ratio = |value: fn(&Sums) -> f64| match &sums {
        Ok(sums) => {
            Some(value(sums)).filter(|value| value.is_finite() && *value > 0.0).ok_or("no_run").into()
        }
        Err(reason) => Maybe::missing(reason),
    };
    CellEnergy {
        tokens_per_joule: ratio(|sums| sums.tokens / sums.energy_j),
        joules_per_token: ratio(|sums| sums.energy_j / sums.tokens),
        power_w: ratio(|sums| sums.energy_j / sums.duration_s),
        energy_uncertainty_ratio: sums
            .as_ref()
            .map_err(String::clone)
            .and_then(|sums| uncertainty_ratio(cell, sums, kind))
            .into(),
        net_tokens_per_joule: sums.and_then(|sums| net(record, &sums)).into(),
    }
}

/// # Errors
/// The first window's reason: energy of a part of the windows is not the cell's.
fn sums(cell: &Cell, kind: TokenKind) -> Result<Sums, String> {
    let mut sums = Sums::default();
    for window in cell.runs.iter().flat_map(|run| &run.windows) {
        match &window.energy {
            Maybe::Value(energy) => {
                sums.energy_j += energy.energy_j;
                sums.uncertainty_j += energy.uncertainty_j;
                sums.duration_s += duration_s(energy);
                sums.tokens += tokens(energy, kind);
            }
            Maybe::Missing(missing) => return Err(missing.missing.clone()),
        }
    }
    if cell.runs.is_empty() { Err("no_run".to_owned()) } else { Ok(sums) }
}

fn tokens(energy: &Energy, kind: TokenKind) -> f64 {
    match kind {
        TokenKind::Input => energy.tokens_in,
        TokenKind::Output => energy.tokens_out,
    }
}

/// # Errors
/// `needs_2_runs` for power alone: a load in step with the sensor misleads it by as much as half, which only another
/// phase shows, and each run meets the sensor in another.
fn uncertainty_ratio(cell: &Cell, sums: &Sums, kind: TokenKind) -> Result<f64, String> {
    let energies: Vec<&Energy> =
        cell.runs.iter().flat_map(|run| &run.windows).filter_map(|window| window.energy.value()).collect();
    let is_blind = |energy: &&Energy| energy.doubts.iter().any(|doubt| doubt == "power_integrated_only");
    if energies.len() < 2 && energies.iter().any(is_blind) {
        return Err("needs_2_runs".to_owned());
    }
    let costs: Vec<f64> = energies.iter().map(|energy| energy.energy_j / tokens(energy, kind)).collect();
    let (low, high) =
        costs.iter().fold((f64::MAX, f64::MIN), |(low, high), cost| (low.min(*cost), high.max(*cost)));
    let ratio = (sums.uncertainty_j / sums.energy_j).max((high - low) / (high + low));
    if ratio.is_finite() { Ok(ratio) } else { Err("no_run".to_owned()) }
}

fn duration_s(energy: &Energy) -> f64 {
    energy.t_b_ns.saturating_sub(energy.t_a_ns) as f64 / 1e9
}

fn net(record: &Record, sums: &Sums) -> Result<f64, String> {
    let idle = match &record.meter.idle_context_resident {
        Maybe::Value(idle) => idle,
        Maybe::Missing(missing) => return Err(missing.missing.clone()),
    };
    if idle.duration_ns < LONG_IDLE_NS {
        return Err("idle_watched_too_shortly".to_owned());
    }
    let net_j = sums.energy_j - idle.power_w * sums.duration_s;
    if net_j > 0.0 { Ok(sums.tokens / net_j) } else { Err("power_below_idle".to_owned()) }
}

/// Why the cell's energy must not decide anything, each reason once.
pub(super) fn doubts(cell: &Cell) -> Vec<String> {
    let windows = cell.runs.iter().flat_map(|run| &run.windows);
    let doubts = windows.filter_map(|window| window.energy.value()).flat_map(|energy| energy.doubts.iter());
    doubts.cloned().collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}
