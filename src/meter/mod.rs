//! Power and energy of what is measured. Sensors read (`nvml`, `rapl`, `hwmon`, `trace`), a thread of its own does the
//! reading (`sampler`), and pure functions make energy of the readings (`counter`, `integral`, `energy`). Knows no
//! engine and no workload: the runner says when a window begins and ends and which work was done in it.
//!
//! Nothing is estimated. What a sensor does not give is a reason, never a number, and never a nameplate value.

mod absent;
mod conditions;
pub mod counter;
mod cpu_time;
pub mod duty;
mod energy;
mod hwmon;
pub mod integral;
pub mod nvml;
mod power_meter;
pub mod probe;
mod progress;
mod rapl;
mod sampler;
mod samples;
mod sysfs;
mod trace;

pub use absent::Absent;
pub use conditions::{Conditions, conditions};
pub use energy::{Measured, assess, mean_power};
pub use hwmon::Hwmon;
pub use power_meter::{Choice, PowerMeter, Subject};
pub use progress::{Piece, tokens_between};
pub use rapl::{Rapl, remedy as rapl_remedy};
pub use sampler::{Gauge, Sampled, Sampler, measure_period};
pub use samples::{CounterReading, PowerReading, Reason, Samples, Series, State};
pub use trace::TraceFile;

use crate::clock::Clock;
use crate::record::{FileRecord, Maybe, MeteredDevice};

/// GPUs change their power readings about so often, ns.
const USUAL_PERIOD_NS: u64 = 100_000_000;

/// What a sensor gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// An energy counter that is updated from time to time; it must be read at its updates.
    TickingCounter,
    /// An energy counter whose value is never older than `age_ns`.
    FreshCounter { age_ns: u64 },
    /// Power only; energy is its integral.
    Power,
}

/// A sensor as the record describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct SensorInfo {
    /// As [`crate::record::Meter::source`].
    pub source: &'static str,
    /// As [`crate::record::Meter::scope`].
    pub scope: &'static str,
    pub quantity: Quantity,
    pub devices: Vec<MeteredDevice>,
    /// Relative error that all readings share.
    pub systematic_share: Maybe<f64>,
    /// Energy of a shorter window is in doubt.
    pub shortest_window_ns: u64,
    /// Power below which a working device cannot be; known after idle power was measured.
    pub idle_floor_w: Option<f64>,
    pub trace: Maybe<FileRecord>,
}

impl SensorInfo {
    /// The longest period of any device's readings; 0 where none is known.
    pub fn period_ns(&self) -> u64 {
        let periods = self.devices.iter().filter_map(|device| device.update_period_ns.value().copied());
        let unseen_ns = if self.source.starts_with("nvml") { USUAL_PERIOD_NS } else { 0 };
        periods.max().unwrap_or(unseen_ns)
    }
}

/// Reads power or energy over windows.
pub trait PowerSensor {
    fn info(&self) -> SensorInfo;

    /// A window is about to open.
    fn begin(&mut self, clock: &Clock);

    /// The window has closed. Returns at once: the load may still be running.
    fn end(&mut self);

    /// Everything that was read since [`PowerSensor::begin`]; called after the load has ended.
    fn collect(&mut self, clock: &Clock, window_ns: (u64, u64)) -> Samples;
}
