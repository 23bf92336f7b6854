//! Reads the time. This is the only place that does: everything else is given a [`Clock`], so that a scripted
//! clock makes whole command-line runs exact to the byte.

#![allow(clippy::disallowed_methods)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2026-01-01T00:00:00Z, where every scripted clock starts. Unix seconds.
const SCRIPTED_EPOCH_S: u64 = 1_767_225_600;

/// A monotonic clock in nanoseconds since its own origin, and the wall time beside it.
#[derive(Clone, Debug)]
pub enum Clock {
    /// `CLOCK_MONOTONIC` (never stepped by NTP).
    Monotonic { origin: Instant },
    /// Moves only when told to; clones share one time.
    Scripted(Arc<AtomicU64>),
}

impl Clock {
    pub fn monotonic() -> Self {
        Clock::Monotonic { origin: Instant::now() }
    }

    pub fn scripted() -> Self {
        Clock::Scripted(Arc::new(AtomicU64::new(0)))
    }

    /// Nanoseconds since this clock's origin.
    pub fn now_ns(&self) -> u64 {
        match self {
            Clock::Monotonic { origin } => origin.elapsed().as_nanos() as u64,
            Clock::Scripted(now) => now.load(Ordering::Relaxed),
        }
    }

    /// Moves a scripted clock on; a real clock moves by itself and ignores this.
    pub fn advance_ns(&self, by_ns: u64) {
        if let Clock::Scripted(now) = self {
            now.fetch_add(by_ns, Ordering::Relaxed);
        }
    }

    /// Waits until `now_ns() >= deadline_ns`. A scripted clock jumps there.
    pub fn sleep_until_ns(&self, deadline_ns: u64) {
        let now = self.now_ns();
        let Some(left) = deadline_ns.checked_sub(now) else { return };
        match self {
            Clock::Monotonic { .. } => std::thread::sleep(Duration::from_nanos(left)),
            Clock::Scripted(_) => self.advance_ns(left),
        }
    }

    /// Wall time as Unix nanoseconds. Used for names and for alignment with external meters, never for durations.
    pub fn unix_ns(&self) -> u128 {
        match self {
            Clock::Monotonic { .. } => {
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos())
            }
            Clock::Scripted(now) => {
                u128::from(SCRIPTED_EPOCH_S) * 1_000_000_000 + u128::from(now.load(Ordering::Relaxed))
            }
        }
    }

    /// What one call of [`Clock::now_ns`] costs, ns: the mean over many calls. 0 for a scripted clock.
    pub fn overhead_ns(&self) -> f64 {
        const CALLS: u32 = 10_000;
        let begin = self.now_ns();
        for _ in 0..CALLS {
            std::hint::black_box(self.now_ns());
        }
        (self.now_ns() - begin) as f64 / f64::from(CALLS)
    }
}

/// Formats Unix nanoseconds as RFC 3339 UTC with milliseconds, `2026-11-22T10:11:12.345Z`.
pub fn rfc3339_utc(unix_ns: u128) -> String {
    let timestamp = jiff::Timestamp::from_nanosecond(unix_ns as i128).unwrap_or_default();
    format!("{timestamp:.3}")
}

/// Formats Unix nanoseconds for a file name, `20261122T101112Z`.
pub fn file_stamp_utc(unix_ns: u128) -> String {
    let timestamp = jiff::Timestamp::from_nanosecond(unix_ns as i128).unwrap_or_default();
    timestamp.strftime("%Y%m%dT%H%M%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scripted_clock_moves_only_when_told_to() {
        let clock = Clock::scripted();
        let copy = clock.clone();
        assert_eq!(clock.now_ns(), 0);
        copy.advance_ns(5);
        clock.sleep_until_ns(3);
        assert_eq!(clock.now_ns(), 5);
        clock.sleep_until_ns(12);
        assert_eq!(copy.now_ns(), 12);
    }

    #[test]
    fn wall_times_are_written_as_utc() {
        let unix_ns = Clock::scripted().unix_ns() + 345_000_000;
        assert_eq!(rfc3339_utc(unix_ns), "2026-01-01T00:00:00.345Z");
        assert_eq!(file_stamp_utc(unix_ns), "20260101T000000Z");
    }
}
