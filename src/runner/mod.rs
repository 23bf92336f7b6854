//! Measures one cell: warm-up, timed windows, drain. In the timed path there is the engine, one time stamp per step
//! (which all its tokens share) and an append to a list; everything else is computed from that list afterwards.
//! Knows requests and clocks; knows no model, no file and no statistics.

mod cooldown;
mod rehearsal;
mod serve;
mod stationary;
mod steady;
mod summary;
mod trace;
mod warmup;
mod witness;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::clock::{Clock, rfc3339_utc};
use crate::engine::{Engine, StepOutput};
use crate::meter::{Measured, Piece};
use crate::record::{Cell, Cooldown, Maybe, Outcome, Run, Warmup, WarmupEnd, Workload};

use cooldown::Cooled;
use trace::Trace;
pub use witness::Witness;

/// How every cell is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Protocol {
    /// Measured repetitions.
    pub repeat: u32,
    /// Shortest window, ns.
    pub min_window_ns: u64,
    /// Longest serving window, and longest drain after it, ns.
    pub max_window_ns: u64,
    /// Shortest warm-up, ns; at least one whole pass is warmed up whatever this says.
    pub warmup_ns: u64,
    /// The warm-up goes on until times are flat, ten times `warmup_ns` at most, and each run is assessed.
    pub steady: bool,
    /// Before each run the device cools to this temperature, °C, and is warmed up again.
    pub cool_to_c: Option<f64>,
    /// Seed of prompts and arrivals.
    pub seed: u64,
}

/// What a measurement needs beside the workload.
pub struct Stage<'a> {
    pub engine: &'a mut dyn Engine,
    pub clock: Clock,
    pub witness: Witness<'a>,
    /// Set by a signal; looked at between steps.
    pub stop: &'a AtomicBool,
    /// Name of the device, for the record.
    pub device: String,
    /// Told before each run: its index, and how many there are.
    pub on_run: &'a mut dyn FnMut(u32, u32),
}

/// Why a run ended early.
pub(crate) enum Halt {
    Interrupted,
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Halt {
    fn from(error: anyhow::Error) -> Self {
        Halt::Failed(error)
    }
}

/// Measures `workload` and never fails as a whole: what went wrong is the cell's outcome, and the runs before it are
/// kept.
pub fn measure(stage: &mut Stage<'_>, workload: &Workload, protocol: &Protocol) -> Cell {
    let mut cell = Cell {
        key: workload.key(),
        workload: *workload,
        devices: vec![stage.device.clone()],
        outcome: Outcome::Measured,
        warmup: Maybe::missing("not_reached"),
        gpus: Maybe::missing("no_gpu_in_use"),
        runs: Vec::new(),
    };
    let measured = measure_runs(stage, workload, protocol, &mut cell);
    let cleared = stage.engine.reset();
    match measured.and(cleared.map_err(Halt::Failed)) {
        Ok(()) => {}
        Err(Halt::Interrupted) => cell.outcome = Outcome::Interrupted,
        Err(Halt::Failed(error)) => cell.outcome = Outcome::Failed { error: format!("{error:#}") },
    }
    cell
}

fn measure_runs(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    cell: &mut Cell,
) -> Result<(), Halt> {
    let mut trace = Trace::default();
    for index in 0..protocol.repeat {
        let cooled = protocol.cool_to_c.map(|cool_to_c| cooldown::cool_down(stage, cool_to_c)).transpose()?;
        let mut cooldown = Maybe::missing("hot");
        if index == 0 || cooled.is_some() {
            let warmup = warm_up(stage, workload, protocol, &mut trace)?;
            if index == 0 {
                cell.warmup = Maybe::Value(warmup.clone());
            }
            if let Some(Cooled { duration_ns, end_c, reached }) = cooled {
                cooldown = Maybe::Value(Cooldown { duration_ns, end_c, reached, warmup });
            }
        }
        (stage.on_run)(index, protocol.repeat);
        trace.clear();
        let started_at = rfc3339_utc(stage.clock.unix_ns());
        let run = match workload.static_batch() {
            Some(_) => stationary::run(stage, workload, protocol, index, &mut trace)?,
            None => serve::run(stage, workload, protocol, index, &mut trace)?,
        };
        cell.runs.push(Run { index, started_at, cooldown, ..run });
    }
    Ok(())
}

/// On an empty engine.
fn warm_up(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    trace: &mut Trace,
) -> Result<Warmup, Halt> {
    stage.engine.reset()?;
    trace.clear();
    match workload.static_batch() {
        Some(_) => stationary::warm_up(stage, workload, protocol, trace),
        None => {
            rehearsal::rehearse(stage, workload, protocol, trace)?;
            serve::warm_up(stage, workload, protocol, trace)
        }
    }
}

impl Stage<'_> {
    /// One step of the engine, appended to `trace`. `false` when the engine is idle.
    fn step(&mut self, output: &mut StepOutput, trace: &mut Trace) -> Result<bool, Halt> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Halt::Interrupted);
        }
        let busy = self.engine.step(output)?;
        if busy {
            trace.push(output);
        }
        Ok(busy)
    }

    /// Waits for a random part of the power sensor's period, so that a load in step with the sensor meets it in another
    /// phase in every run. Says whether it did: the load must then be brought up again before the window opens.
    fn shift_phase(&self, protocol: &Protocol, run: u32) -> bool {
        let period_ns = self.witness.sensor_period_ns();
        if period_ns == 0 {
            return false;
        }
        let wait_ns = crate::workload::random(protocol.seed, u64::from(run)) % period_ns;
        self.clock.sleep_until_ns(self.clock.now_ns() + wait_ns);
        true
    }

    /// Adds what the power meter saw of the run's window, in which these pieces of work were done.
    fn with_power(&mut self, mut run: Run, pieces: &[Piece]) -> Run {
        for window in &mut run.windows {
            let (t0_ns, t1_ns, tokens_out) = (window.t0_ns, window.t1_ns, window.tokens_out);
            let measured = Measured { t0_ns, t1_ns, tokens_out, pieces };
            let (energy, conditions) = self.witness.power(&self.clock, &measured);
            window.energy = energy;
            window.clocks = conditions.clocks;
            window.temperature = conditions.temperature;
            window.clock_events = conditions.clock_events;
        }
        run
    }

    /// Steps until every submitted request has finished.
    fn finish_all(&mut self, output: &mut StepOutput, trace: &mut Trace) -> Result<(), Halt> {
        while self.engine.unfinished() > 0 {
            if !self.step(output, trace)? {
                return Err(Halt::Failed(anyhow::anyhow!(
                    "the engine is idle with {} unfinished requests",
                    self.engine.unfinished()
                )));
            }
        }
        Ok(())
    }
}

fn warmup_of(trace: &Trace, duration_ns: u64, requests: u64, ended: WarmupEnd) -> Warmup {
    Warmup { duration_ns, steps: trace.steps.len() as u64, requests, ended: Maybe::Value(ended) }
}
