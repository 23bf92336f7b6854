//! The warm-up that waits: stretches of the cell's own load until times, clocks and temperature are flat, or until the
//! longest time is over. Which load it is, static and serving cells know; what flat means, `steady` does.

use super::{Halt, Protocol, Stage, steady};
use crate::meter::Conditions;
use crate::record::{Maybe, WarmupEnd};

/// Longest warm-up, in multiples of the one that is asked for.
const LONGEST: u64 = 10;
/// Change of the mean clock from one stretch to the next that counts as none: one step of a GPU's clock.
const SAME_CLOCK_MHZ: f64 = 15.0;
/// Change of the temperature within a stretch that counts as none: what the sensor resolves.
const SAME_TEMPERATURE_C: f64 = 1.0;

/// How long one stretch of load lasts.
pub(super) struct Stretch {
    least_pieces: usize,
    end_ns: u64,
    bound_ns: u64,
}

impl Stretch {
    /// For a warm-up of fixed length that ends at `end_ns`.
    pub(super) fn fixed(end_ns: u64) -> Self {
        Stretch { least_pieces: 0, end_ns, bound_ns: end_ns }
    }

    /// Whether it has lasted long enough at `now_ns`, after so many pieces of work.
    pub(super) fn is_over(&self, now_ns: u64, pieces: usize) -> bool {
        now_ns >= self.bound_ns || (pieces >= self.least_pieces && now_ns >= self.end_ns)
    }
}

/// Calls `work`, which runs the load for a stretch and returns the time of each piece of work, until it is flat or ten
/// times the warm-up's length have passed since `begin_ns`.
pub(super) fn until_flat(
    stage: &mut Stage<'_>,
    protocol: &Protocol,
    begin_ns: u64,
    mut work: impl FnMut(&mut Stage<'_>, &Stretch) -> Result<Vec<u64>, Halt>,
) -> Result<WarmupEnd, Halt> {
    let bound_ns = begin_ns.saturating_add(protocol.warmup_ns.saturating_mul(LONGEST));
    let mut before: Option<Conditions> = None;
    while stage.clock.now_ns() < bound_ns {
        let t0_ns = stage.clock.now_ns();
        let end_ns = t0_ns.saturating_add(protocol.warmup_ns);
        stage.witness.watch(&stage.clock);
        let times_ns = work(stage, &Stretch { least_pieces: steady::LEAST_PIECES, end_ns, bound_ns })?;
        let now_ns = stage.clock.now_ns();
        let conditions = stage.witness.conditions(&stage.clock, (t0_ns, now_ns));
        if steady::is_flat(&times_ns) && is_calm(before.as_ref(), &conditions) {
            return Ok(WarmupEnd::Flat);
        }
        before = Some(conditions);
    }
    Ok(WarmupEnd::Bound)
}

/// Whether clocks, what held them down, and temperature stayed as they were. What no sensor shows cannot change here;
/// the first stretch of a device whose clocks are shown has nothing to stay as.
fn is_calm(before: Option<&Conditions>, now: &Conditions) -> bool {
    let temperature = now.temperature.value();
    let warmer = temperature.is_some_and(|shown| (shown.end_c - shown.start_c).abs() > SAME_TEMPERATURE_C);
    let Some(clocks) = now.clocks.value() else { return !warmer };
    let Some(before) = before else { return false };
    let same_clock = before
        .clocks
        .value()
        .is_some_and(|before| (before.sm_mean_mhz - clocks.sm_mean_mhz).abs() <= SAME_CLOCK_MHZ);
    !warmer && same_clock && mask(before) == mask(now)
}

fn mask(conditions: &Conditions) -> Option<&Maybe<String>> {
    conditions.clock_events.value().map(|events| &events.reasons_mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{ClockEvents, Clocks, Temperature};

    fn conditions(sm_mean_mhz: f64, end_c: f64, mask: &str) -> Conditions {
        let held = || Maybe::Value(0);
        Conditions {
            clocks: Maybe::Value(Clocks {
                sm_mean_mhz,
                sm_min_mhz: sm_mean_mhz,
                memory_mhz: Maybe::Value(2619.0),
            }),
            temperature: Maybe::Value(Temperature { start_c: 60.0, end_c, max_c: end_c.max(60.0) }),
            clock_events: Maybe::Value(ClockEvents {
                software_power_cap_ns: held(),
                software_thermal_ns: held(),
                hardware_thermal_ns: held(),
                hardware_power_brake_ns: held(),
                reasons_mask: Maybe::Value(mask.to_owned()),
            }),
        }
    }

    #[test]
    fn a_device_is_calm_when_clock_cause_and_temperature_stay() {
        let before = conditions(1980.0, 60.0, "0x0");
        for (now, calm) in [
            (conditions(1970.0, 61.0, "0x0"), true),
            (conditions(1950.0, 60.0, "0x0"), false),
            (conditions(1980.0, 62.0, "0x0"), false),
            (conditions(1980.0, 60.0, "0x4"), false),
        ] {
            assert_eq!(is_calm(Some(&before), &now), calm, "{now:?}");
            assert!(!is_calm(None, &now), "there is nothing to compare it with");
        }
    }

    #[test]
    fn what_no_sensor_shows_holds_nothing_up() {
        assert!(is_calm(None, &Conditions::missing("no_sensor")));
    }

    #[test]
    fn a_stretch_has_its_time_and_its_pieces_but_ends_at_the_bound() {
        let stretch = Stretch { least_pieces: 8, end_ns: 100, bound_ns: 1000 };
        assert!(!stretch.is_over(99, 20) && !stretch.is_over(999, 7));
        assert!(stretch.is_over(100, 8) && stretch.is_over(1000, 0));
        assert!(Stretch::fixed(5).is_over(5, 0) && !Stretch::fixed(5).is_over(4, 9));
    }
}
