//! The power sensor of a run: opened before anything touches the device, and what `--require-energy` makes of a cell
//! without energy.

use super::choices::{Choices, Subject};
use crate::clock::Clock;
use crate::cmd::device::{Target, gpu_id};
use crate::cmd::{bad_file, remark, usage};
use crate::machine::Roots;
use crate::meter::nvml::GpuId;
use crate::meter::{self, Absent, Choice, PowerMeter};
use crate::record::{Cell, Energy, Maybe, Outcome, Thermal};

/// After the last kernel a device needs this long to come to rest, ns.
const REST_NS: u64 = 30_000_000_000;

/// A device that cools down before each run comes this close to the temperature it had before the first.
const COOL_ENOUGH_C: f64 = 2.0;

/// # Errors
/// When a trace cannot be read, and when there is no sensor though energy is required.
pub(super) fn open(choices: &Choices) -> anyhow::Result<PowerMeter> {
    let (subject, clock) = match &choices.subject {
        Subject::Script(_) => (meter::Subject::Script, Clock::scripted()),
        Subject::Model(Target::Cpu(_)) => (meter::Subject::Cpu, Clock::monotonic()),
        Subject::Model(Target::Cuda { .. }) => (meter::Subject::Gpus(gpus(choices)), Clock::monotonic()),
    };
    let mut meter =
        PowerMeter::open(&choices.power, &subject, &clock, &Roots::default().sys).map_err(bad_file)?;
    if let Some(absent) = meter.absence() {
        if choices.require_energy {
            anyhow::bail!("--require-energy: {}", with_hint(absent));
        }
        if !matches!(choices.power, Choice::Auto | Choice::None) {
            remark(&format!("no power sensor: {}", with_hint(absent)));
        }
    }
    if choices.idle_ns > 0 {
        meter.observe_idle_without_context(&clock, choices.idle_ns);
    }
    Ok(meter)
}

/// The temperature to which the device cools between runs, if it is asked to.
///
/// # Errors
/// When no sensor shows its temperature.
pub(super) fn cool_to_c(choices: &Choices, meter: &mut PowerMeter) -> anyhow::Result<Option<f64>> {
    if choices.thermal == Thermal::Hot {
        return Ok(None);
    }
    let clock = match choices.subject {
        Subject::Script(_) => Clock::scripted(),
        Subject::Model(_) => Clock::monotonic(),
    };
    match meter.temperature_c(&clock) {
        Maybe::Value(temperature_c) => Ok(Some(temperature_c + COOL_ENOUGH_C)),
        Maybe::Missing(missing) => Err(usage(format!(
            "--thermal cooldown: the temperature cannot be read ({}), expected a sensor that shows it\nhint: leave \
             --thermal out, or ask tokmeter doctor what the sensor lacks",
            missing.missing
        ))),
    }
}

/// The GPUs in use as NVML knows them. Without an identity none is metered: another one's power would be worse than
/// none.
pub(super) fn gpus(choices: &Choices) -> Vec<GpuId> {
    match &choices.subject {
        Subject::Model(Target::Cuda { index, .. }) => gpu_id(*index).into_iter().collect(),
        _ => Vec::new(),
    }
}

fn with_hint(absent: &Absent) -> String {
    match &absent.remedy {
        Some(remedy) => format!("{absent}\nhint: {remedy}"),
        None => absent.to_string(),
    }
}

/// Idle power with the weights resident, once the device has come to rest.
pub(super) fn observe_idle(choices: &Choices, meter: &mut PowerMeter, clock: &Clock) {
    if choices.idle_ns > 0 && meter.absence().is_none() {
        clock.sleep_until_ns(clock.now_ns() + REST_NS);
        meter.observe_idle_with_context(clock, choices.idle_ns);
    }
}

/// Power from the end of the load on.
pub(super) fn observe_after_load(choices: &Choices, meter: &mut PowerMeter, clock: &Clock) {
    if choices.idle_ns > 0 && meter.absence().is_none() {
        meter.observe_idle_after_load(clock, choices.idle_ns);
    }
}

/// A cell in which every window has energy that nothing speaks against; else it has failed.
pub(super) fn require_energy(cell: Cell) -> Cell {
    let windows = cell.runs.iter().flat_map(|run| &run.windows);
    let fault = windows.filter_map(|window| fault(&window.energy)).next();
    match (&cell.outcome, fault) {
        (Outcome::Measured, Some(fault)) => {
            Cell { outcome: Outcome::Failed { error: format!("--require-energy: {fault}") }, ..cell }
        }
        _ => cell,
    }
}

fn fault(energy: &Maybe<Energy>) -> Option<String> {
    match energy {
        Maybe::Missing(missing) => Some(format!("a window has no energy ({})", missing.missing)),
        Maybe::Value(energy) if energy.doubts.is_empty() => None,
        Maybe::Value(energy) => Some(format!("a window's energy is in doubt ({})", energy.doubts.join(", "))),
    }
}
