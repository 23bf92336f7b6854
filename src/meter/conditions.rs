//! Under which clocks, temperature and limits a window ran: from a device's states to the record. Pure functions.

use super::samples::{Reason, State};
use crate::record::{ClockEvents, Clocks, Maybe, Temperature};

/// What the record keeps of a window beside its energy. Of several devices, the first.
#[derive(Clone, Debug, PartialEq)]
pub struct Conditions {
    pub clocks: Maybe<Clocks>,
    pub temperature: Maybe<Temperature>,
    pub clock_events: Maybe<ClockEvents>,
}

impl Conditions {
    pub fn missing(reason: &str) -> Self {
        Conditions {
            clocks: Maybe::missing(reason),
            temperature: Maybe::missing(reason),
            clock_events: Maybe::missing(reason),
        }
    }
}

/// The states of one device over a window, the first at its beginning and the last at its end.
pub fn conditions(states: &[State]) -> Conditions {
    let [first, .., last] = states else { return Conditions::missing("not_seen") };
    Conditions {
        clocks: clocks(states).into(),
        temperature: temperature(states).into(),
        clock_events: Maybe::Value(clock_events(states, first, last)),
    }
}

fn clocks(states: &[State]) -> Result<Clocks, Reason> {
    let sm = all(states, |state| state.sm_mhz.clone().map(f64::from))?;
    Ok(Clocks {
        sm_mean_mhz: sm.iter().sum::<f64>() / sm.len() as f64,
        sm_min_mhz: sm.iter().copied().fold(f64::MAX, f64::min),
        memory_mhz: all(states, |state| state.memory_mhz.clone().map(f64::from))
            .map(|memory| memory[0])
            .into(),
    })
}

fn temperature(states: &[State]) -> Result<Temperature, Reason> {
    let temperatures = all(states, |state| state.temperature_c.clone())?;
    Ok(Temperature {
        start_c: temperatures[0],
        end_c: temperatures[temperatures.len() - 1],
        max_c: temperatures.iter().copied().fold(f64::MIN, f64::max),
    })
}

/// Every state's value, or the first reason.
fn all(states: &[State], value: impl Fn(&State) -> Result<f64, Reason>) -> Result<Vec<f64>, Reason> {
    states.iter().map(value).collect()
}

fn clock_events(states: &[State], first: &State, last: &State) -> ClockEvents {
    let between = |time_ns: fn(&State) -> &Result<u64, Reason>| -> Maybe<u64> {
        let begin_ns = time_ns(first).clone();
        let end_ns = time_ns(last).clone();
        begin_ns
            .and_then(|begin_ns| end_ns?.checked_sub(begin_ns).ok_or_else(|| "counter_went_back".to_owned()))
            .into()
    };
    let masks: Result<Vec<u64>, Reason> = states.iter().map(|state| state.reasons_mask.clone()).collect();
    ClockEvents {
        software_power_cap_ns: between(|state| &state.software_power_cap_ns),
        software_thermal_ns: between(|state| &state.software_thermal_ns),
        hardware_thermal_ns: between(|state| &state.hardware_thermal_ns),
        hardware_power_brake_ns: between(|state| &state.hardware_power_brake_ns),
        reasons_mask: masks.map(|masks| format!("{:#x}", masks.iter().fold(0, |or, mask| or | mask))).into(),
    }
}
