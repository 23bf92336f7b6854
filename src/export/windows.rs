//! Sums over the windows of runs: time, steps, tokens and energy. Rates are ratios of these sums, never means of rates.

use std::collections::BTreeSet;

use crate::analysis::{CellSummary, Summary};
use crate::record::{Cell, Energy, Maybe, Outcome, Record, Run, Window};

/// What some windows did together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sums {
    pub(super) seconds: f64,
    pub(super) steps: f64,
    pub(super) passes: f64,
    pub(super) tokens_in: f64,
    pub(super) tokens_out: f64,
    pub(super) requests_completed: f64,
}

impl Sums {
    /// `None` when there is no time to divide by.
    pub(super) fn of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Option<Sums> {
        let mut sums = Sums::default();
        for window in runs.into_iter().flat_map(|run| &run.windows) {
            sums.seconds += seconds(window.t0_ns, window.t1_ns);
            sums.steps += window.steps as f64;
            sums.passes += window.passes as f64;
            sums.tokens_in += window.tokens_in as f64;
            sums.tokens_out += window.tokens_out as f64;
            sums.requests_completed += window.requests_completed as f64;
        }
        (sums.seconds > 0.0).then_some(sums)
    }

    /// Seconds of a forward pass.
    pub(super) fn step_s(&self) -> Option<f64> {
        (self.steps > 0.0).then(|| self.seconds / self.steps)
    }

    /// Seconds of a whole repetition of a static cell.
    pub(super) fn pass_s(&self) -> Option<f64> {
        (self.passes > 0.0).then(|| self.seconds / self.passes)
    }
}

/// Energy of all windows of a cell, all devices together, and what else lies between the same readings.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct EnergySums {
    pub(super) joules: f64,
    pub(super) seconds: f64,
    pub(super) tokens_in: f64,
    pub(super) tokens_out: f64,
    /// Why it must not decide a comparison.
    pub(super) doubts: BTreeSet<String>,
}

impl EnergySums {
    /// # Errors
    /// The first window's reason: energy of a part of the windows is not the cell's.
    pub(super) fn of(cell: &Cell) -> Result<EnergySums, String> {
        let mut sums = EnergySums::default();
        for window in windows(cell) {
            match &window.energy {
                Maybe::Value(energy) => sums.add(energy),
                Maybe::Missing(missing) => return Err(missing.missing.clone()),
            }
        }
        if sums.seconds > 0.0 && sums.joules > 0.0 { Ok(sums) } else { Err("energy_reads_zero".to_owned()) }
    }

    fn add(&mut self, energy: &Energy) {
        self.joules += energy.energy_j;
        self.seconds += seconds(energy.t_a_ns, energy.t_b_ns);
        self.tokens_in += energy.tokens_in;
        self.tokens_out += energy.tokens_out;
        self.doubts.extend(energy.doubts.iter().cloned());
    }

    /// Power of all devices together, W.
    pub(super) fn power_w(&self) -> f64 {
        self.joules / self.seconds
    }
}

/// Cells that were measured whole.
pub(super) fn measured(record: &Record) -> impl Iterator<Item = &Cell> {
    record.cells.iter().filter(|cell| is_measured(cell))
}

/// The same with what follows from each. A cell may have been visited several times: they are told apart by place.
pub(super) fn measured_with_summary<'a>(
    record: &'a Record,
    summary: &'a Summary,
) -> impl Iterator<Item = (&'a Cell, &'a CellSummary)> {
    record.cells.iter().zip(&summary.cells).filter(|(cell, _)| is_measured(cell))
}

pub(super) fn is_measured(cell: &Cell) -> bool {
    cell.outcome == Outcome::Measured && Sums::of(&cell.runs).is_some()
}

fn windows(cell: &Cell) -> impl Iterator<Item = &Window> {
    cell.runs.iter().flat_map(|run| &run.windows)
}

fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e9
}
