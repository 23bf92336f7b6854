//! What a sensor leaves behind: readings with the times between which they were taken. No arithmetic.

use crate::record::Maybe;

/// Why a value could not be had, as it stands in the record.
pub type Reason = String;

/// One call that read an energy counter. The counter was sampled at an unknown time between the two stamps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterReading {
    pub before_ns: u64,
    pub after_ns: u64,
    /// Since the counter's own zero.
    pub energy_uj: u64,
}

/// Power at one time, the middle of the call that read it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerReading {
    pub at_ns: u64,
    pub power_w: f64,
}

/// All readings of one device over one window.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// In the order of time; the first failure ends the list.
    pub counter: Result<Vec<CounterReading>, Reason>,
    pub power: Result<Vec<PowerReading>, Reason>,
    pub states: Vec<State>,
}

impl Series {
    /// Without any reading, and room for `readings` of each kind: a vector that grows would take the allocator's time.
    pub fn with_capacity(readings: usize) -> Self {
        let (counter, power) = (Vec::with_capacity(readings), Vec::with_capacity(readings));
        Series { counter: Ok(counter), power: Ok(power), states: Vec::with_capacity(64) }
    }

    /// A device of which nothing can be read, and why.
    pub fn failed(reason: &str) -> Self {
        Series { counter: Err(reason.to_owned()), power: Err(reason.to_owned()), states: Vec::new() }
    }
}

/// Clocks, temperature and what holds the clocks down, at one time. Time held down is counted since the driver was
/// loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub sm_mhz: Result<u32, Reason>,
    pub memory_mhz: Result<u32, Reason>,
    pub temperature_c: Result<f64, Reason>,
    /// Every bit as the driver gives it, those without a name included.
    pub reasons_mask: Result<u64, Reason>,
    pub software_power_cap_ns: Result<u64, Reason>,
    pub software_thermal_ns: Result<u64, Reason>,
    pub hardware_thermal_ns: Result<u64, Reason>,
    pub hardware_power_brake_ns: Result<u64, Reason>,
}

/// Everything that was read over one window.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// As in [`super::SensorInfo::devices`].
    pub series: Vec<Series>,
    /// CPU time of the thread that read them.
    pub sampler_cpu_ns: Maybe<u64>,
    /// The wall clock was set, by more than a millisecond, while they were read.
    pub clock_stepped: bool,
}
