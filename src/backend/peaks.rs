//! How a ceiling is found, on any device: work of one kind is repeated, each repetition long enough that starting and
//! waiting for it do not count, and the best that is sustained over three repetitions in a row is the ceiling. What
//! the work is stands in each backend's `peaks`; what the ceilings are used for is decided above. The same work is lent
//! to who needs a load that can be switched.

use crate::clock::Clock;
use crate::record::{Ceiling, Maybe};

/// Repetitions in a row that make a value sustained, and the fewest that are made while time is left.
pub const SUSTAINED: usize = 3;
/// Most repetitions of one probe.
const MOST_REPETITIONS: usize = 1000;
/// Most units of work in one repetition.
const MOST_UNITS: u64 = 1 << 24;
/// A buffer so many times the last-level cache cannot be held by it to a part that matters.
pub const TIMES_CACHE: u64 = 8;
/// Reason where nothing could be timed before the deadline.
const NO_TIME: &str = "no_time";

/// Memory of the host, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMemory {
    pub last_level_cache_bytes: Maybe<u64>,
    pub available_bytes: Maybe<u64>,
}

/// How long is measured, and where.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub clock: Clock,
    /// Time for each probe, ns.
    pub probe_ns: u64,
    /// Time of the clock after which no repetition begins, ns.
    pub deadline_ns: u64,
    pub host: HostMemory,
    /// Only the probes of arithmetic: the others are known for this device.
    pub arithmetic_only: bool,
}

/// A moment of steady work, a few milliseconds at most where the device is fast enough; returns when it is done.
pub type Load<'a> = dyn FnMut() -> anyhow::Result<()> + 'a;

/// Repetitions of one kind of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed {
    /// Units of work in each repetition.
    pub units: u64,
    /// None when the deadline came first.
    pub times_ns: Vec<u64>,
}

/// What a ceiling's number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Work per second: more is better.
    Rate,
    /// Nanoseconds per unit of work: less is better.
    Latency,
}

/// The work behind a ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    pub by: &'static str,
    /// Bytes, flops or launches in one unit.
    pub per_unit: u64,
    pub working_set_bytes: u64,
}

impl Protocol {
    /// Times `run(units)`, which does so much work and returns when it is done. Everything before the first counted
    /// repetition is warm-up. A repetition lasts at least `least_ns` where the work can be made so long.
    ///
    /// # Errors
    /// Those of `run`.
    pub fn time(
        &self,
        least_ns: u64,
        mut run: impl FnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<Timed> {
        let mut once = |units: u64| -> anyhow::Result<u64> {
            let begin_ns = self.clock.now_ns();
            run(units)?;
            Ok((self.clock.now_ns() - begin_ns).max(1))
        };
        let begin_ns = self.clock.now_ns();
        let mut timed = Timed { units: 1, times_ns: Vec::new() };
        once(1)?;
        loop {
            let time_ns = once(timed.units)?;
            let wanted = units_for(timed.units, time_ns, least_ns);
            if wanted <= timed.units {
                timed.times_ns.push(time_ns);
                break;
            }
            // Short calls overestimate what one unit takes, so the estimate is taken again.
            let is_close = wanted <= timed.units.saturating_mul(2);
            timed.units = wanted;
            if is_close || self.is_over() {
                break;
            }
        }
        while !self.is_over() && timed.times_ns.len() < MOST_REPETITIONS {
            let is_enough = timed.times_ns.len() >= SUSTAINED;
            if is_enough && self.clock.now_ns() - begin_ns >= self.probe_ns {
                break;
            }
            timed.times_ns.push(once(timed.units)?);
        }
        Ok(timed)
    }

    fn is_over(&self) -> bool {
        self.clock.now_ns() >= self.deadline_ns
    }

    /// Bytes that a probe of the host's memory goes through.
    ///
    /// # Errors
    /// The reason where a cache would hold them, or nobody knows.
    pub fn host_buffer_bytes(&self) -> Result<u64, String> {
        let known = |value: &Maybe<u64>| match value {
            Maybe::Value(bytes) => Ok(*bytes),
            Maybe::Missing(missing) => Err(missing.missing.clone()),
        };
        let bytes = known(&self.host.last_level_cache_bytes)?.saturating_mul(TIMES_CACHE);
        // Others need memory too.
        if bytes > known(&self.host.available_bytes)? / 4 { Err(TOO_LITTLE.to_owned()) } else { Ok(bytes) }
    }
}

/// Reason where the device has too little free memory for a probe.
pub const TOO_LITTLE: &str = "memory_too_small";

/// Units that fill `least_ns` when `units` took `time_ns`, at most 64 times as many.
fn units_for(units: u64, time_ns: u64, least_ns: u64) -> u64 {
    let wanted = (u128::from(units) * u128::from(least_ns)).div_ceil(u128::from(time_ns));
    (wanted as u64).clamp(1, units.saturating_mul(64)).min(MOST_UNITS)
}

impl Timed {
    /// The ceiling that the repetitions show.
    pub fn ceiling(&self, kind: Kind, work: Work) -> Maybe<Ceiling> {
        if self.times_ns.is_empty() {
            return Maybe::missing(NO_TIME);
        }
        let work_per_repetition = self.units.saturating_mul(work.per_unit);
        let value = |times_ns: &[u64]| {
            let (count, time_ns) = (times_ns.len() as f64, times_ns.iter().sum::<u64>() as f64);
            match kind {
                Kind::Rate => count * work_per_repetition as f64 / time_ns * 1e9,
                Kind::Latency => time_ns / (count * work_per_repetition as f64),
            }
        };
        let fastest_ns = |row: usize| -> &[u64] {
            let windows = self.times_ns.windows(row.min(self.times_ns.len()));
            windows.min_by_key(|times_ns| times_ns.iter().sum::<u64>()).unwrap_or_default()
        };
        let mut sorted_ns = self.times_ns.clone();
        sorted_ns.sort_unstable();
        let singly = |time_ns: u64| value(&[time_ns]);
        let (low, high) = (sorted_ns.len().div_ceil(2) - 1, sorted_ns.len() / 2);
        let median = (singly(sorted_ns[low]) + singly(sorted_ns[high])) / 2.0;
        let (best, worst) = (singly(sorted_ns[0]), singly(sorted_ns[sorted_ns.len() - 1]));
        Maybe::Value(Ceiling {
            value: value(fastest_ns(SUSTAINED)),
            median,
            best,
            spread_ratio: (best - worst).abs() / 2.0 / median,
            by: work.by.to_owned(),
            repetitions: self.times_ns.len() as u32,
            work_per_repetition,
            working_set_bytes: work.working_set_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn protocol(probe_ns: u64, deadline_ns: u64) -> Protocol {
        let unknown = HostMemory {
            last_level_cache_bytes: Maybe::missing("not_found"),
            available_bytes: Maybe::missing("not_found"),
        };
        Protocol { clock: Clock::scripted(), probe_ns, deadline_ns, host: unknown, arithmetic_only: false }
    }

    const WORK: Work = Work { by: "own", per_unit: 1000, working_set_bytes: 64 };

    #[test]
    fn repetitions_are_made_long_enough_and_fill_the_time() {
        let protocol = protocol(1_000_000, u64::MAX);
        // 500 ns to start and wait, 100 ns a unit.
        let run = |units: u64| {
            protocol.clock.advance_ns(500 + 100 * units);
            Ok(())
        };
        let timed = protocol.time(50_000, run).unwrap();
        assert!((495..=500).contains(&timed.units), "{}", timed.units);
        assert!((15..=20).contains(&timed.times_ns.len()), "{}", timed.times_ns.len());
        let ceiling = timed.ceiling(Kind::Rate, WORK).into_value().unwrap();
        // 1000 per 100 ns is 1e10 a second; the start costs a hundredth.
        assert!((ceiling.value / 1e10 - 0.99).abs() < 2e-3, "{}", ceiling.value);
        assert_eq!((ceiling.spread_ratio, ceiling.work_per_repetition), (0.0, timed.units * 1000));
    }

    #[test]
    fn slow_work_is_repeated_three_times_and_not_after_the_deadline() {
        let slow = |protocol: &Protocol| {
            let clock = protocol.clock.clone();
            protocol.time(1000, move |units| {
                clock.advance_ns(1_000_000 * units);
                Ok(())
            })
        };
        assert_eq!(slow(&protocol(1, u64::MAX)).unwrap(), Timed { units: 1, times_ns: vec![1_000_000; 3] });
        assert_eq!(slow(&protocol(1, 3_000_000)).unwrap().times_ns.len(), 2);
        let none = Timed { units: 1, times_ns: Vec::new() }.ceiling(Kind::Rate, WORK);
        assert_eq!(none.reason(), Some("no_time"));
    }

    #[test]
    fn a_single_lucky_repetition_makes_no_ceiling() {
        let timed = Timed { units: 2, times_ns: vec![100, 50, 200, 100, 100, 110] };
        let rate = timed.ceiling(Kind::Rate, WORK).into_value().unwrap();
        // 2000 in 50 ns at best; over three in a row 6000 in 310 ns (100, 100, 110).
        assert_eq!(rate.best, 4e10);
        assert!((rate.value - 6000.0 / 310e-9).abs() < 1.0, "{}", rate.value);
        assert_eq!(rate.median, 2e10);
        assert!((rate.spread_ratio - (4e10 - 1e10) / 2.0 / 2e10).abs() < 1e-12);
        let latency = timed.ceiling(Kind::Latency, Work { per_unit: 1, ..WORK }).into_value().unwrap();
        assert_eq!((latency.best, latency.median), (25.0, 50.0));
        assert!((latency.value - 310.0 / 6.0).abs() < 1e-9);
    }

    #[test]
    fn a_buffer_that_a_cache_could_hold_is_not_measured() {
        let with = |cache: u64, available: u64| {
            let host = HostMemory {
                last_level_cache_bytes: Maybe::Value(cache),
                available_bytes: Maybe::Value(available),
            };
            Protocol { host, ..protocol(1, 1) }.host_buffer_bytes()
        };
        assert_eq!(with(100, 3200), Ok(800));
        assert_eq!(with(100, 3199), Err("memory_too_small".to_owned()));
        assert_eq!(protocol(1, 1).host_buffer_bytes(), Err("not_found".to_owned()));
    }
}
