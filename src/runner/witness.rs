//! What else happened during a window: on the machine, read at the window's two edges only, and at the power meter, which
//! reads in a thread of its own.

use crate::clock::Clock;
use crate::machine::{CpuSnapshot, Roots};
use crate::meter::{Conditions, Measured, PowerMeter};
use crate::record::machine::CpuShare;
use crate::record::{Energy, Maybe};

/// Takes the readings at both ends of a window.
pub struct Witness<'a> {
    /// `None` where time is scripted and the machine means nothing.
    roots: Option<Roots>,
    opened: Option<CpuSnapshot>,
    power: Option<&'a mut PowerMeter>,
}

impl<'a> Witness<'a> {
    pub fn new(roots: Roots) -> Self {
        Witness { roots: Some(roots), opened: None, power: None }
    }

    /// For the fake engine.
    pub fn blind() -> Self {
        Witness { roots: None, opened: None, power: None }
    }

    /// The same with a power meter.
    #[must_use]
    pub fn metered(self, power: &'a mut PowerMeter) -> Self {
        Witness { power: Some(power), ..self }
    }

    /// Longest update period of the power sensor, ns; 0 where the phase of the load against it means nothing.
    pub(crate) fn sensor_period_ns(&self) -> u64 {
        self.power.as_ref().map_or(0, |power| power.period_ns())
    }

    pub(crate) fn window_opens(&mut self, clock: &Clock) {
        if let Some(power) = &mut self.power {
            power.begin(clock);
        }
        self.opened = self.roots.as_ref().map(CpuSnapshot::take);
    }

    /// A stretch of warm-up begins, of which only the device's conditions matter.
    pub(crate) fn watch(&mut self, clock: &Clock) {
        if let Some(power) = &mut self.power {
            power.begin(clock);
        }
    }

    /// The conditions since [`Witness::watch`]; ends the watch.
    pub(crate) fn conditions(&mut self, clock: &Clock, window_ns: (u64, u64)) -> Conditions {
        let Some(power) = &mut self.power else { return Conditions::missing("no_sensor") };
        power.end();
        power.conditions(clock, window_ns)
    }

    pub(crate) fn temperature_c(&mut self, clock: &Clock) -> Maybe<f64> {
        self.power.as_mut().map_or_else(|| Maybe::missing("no_sensor"), |power| power.temperature_c(clock))
    }

    /// Returns at once: in a serving cell the load goes on.
    pub(crate) fn window_closes(&mut self) -> Maybe<CpuShare> {
        if let Some(power) = &mut self.power {
            power.end();
        }
        match (&self.roots, self.opened.take()) {
            (Some(roots), Some(opened)) => opened.until(&CpuSnapshot::take(roots)),
            _ => Maybe::missing("scripted_clock"),
        }
    }

    /// What the meter saw, once the load has ended.
    pub(crate) fn power(&mut self, clock: &Clock, window: &Measured<'_>) -> (Maybe<Energy>, Conditions) {
        match &mut self.power {
            Some(power) => power.collect(clock, window),
            None => (Maybe::missing("no_sensor"), Conditions::missing("no_sensor")),
        }
    }
}
