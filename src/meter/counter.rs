//! Arithmetic over the readings of an energy counter that is updated from time to time. Reading it at any instant
//! errs by up to one update period; between two updates whose times are known it errs by what those times are
//! uncertain by. Pure functions of readings.

use super::samples::CounterReading;

/// Edges are looked for in this part of the window at either end.
const EDGE_SHARE: f64 = 0.05;
/// At least so many updates are looked at for an edge.
const EDGE_UPDATES: usize = 3;
/// One part of half-width is worth this many parts of distance from the window's edge.
const NARROW_OVER_NEAR: f64 = 500.0;
/// A counter that stands still for so long under load is stuck, ns.
const STUCK_NS: u64 = 1_000_000_000;

/// An update of the counter: `energy_uj` was first shown at some time in (`lo_ns`, `hi_ns`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    pub lo_ns: u64,
    pub hi_ns: u64,
    pub energy_uj: u64,
}

impl Update {
    pub fn mid_ns(&self) -> u64 {
        self.lo_ns + (self.hi_ns - self.lo_ns) / 2
    }

    pub fn half_width_ns(&self) -> u64 {
        (self.hi_ns - self.lo_ns).div_ceil(2)
    }
}

/// The updates that the readings saw: wherever two neighbours differ, the new value was shown after the first was
/// asked for and before the second was answered.
///
/// # Errors
/// `counter_reset` when the counter is ever smaller than before.
pub fn updates(readings: &[CounterReading]) -> Result<Vec<Update>, &'static str> {
    let mut updates = Vec::new();
    for pair in readings.windows(2) {
        let (earlier, later) = (pair[0], pair[1]);
        if later.energy_uj < earlier.energy_uj {
            return Err("counter_reset");
        }
        if later.energy_uj > earlier.energy_uj {
            let (lo_ns, hi_ns) = (earlier.before_ns, later.after_ns.max(earlier.before_ns));
            updates.push(Update { lo_ns, hi_ns, energy_uj: later.energy_uj });
        }
    }
    Ok(updates)
}

/// Readings of a counter that is never older than `age_ns`: each is as good as an update of that uncertainty.
///
/// # Errors
/// `counter_reset` as [`updates`].
pub fn fresh(readings: &[CounterReading], age_ns: u64) -> Result<Vec<Update>, &'static str> {
    if readings.windows(2).any(|pair| pair[1].energy_uj < pair[0].energy_uj) {
        return Err("counter_reset");
    }
    let fresh = |reading: &CounterReading| Update {
        lo_ns: reading.before_ns.saturating_sub(age_ns),
        hi_ns: reading.after_ns,
        energy_uj: reading.energy_uj,
    };
    Ok(readings.iter().map(fresh).collect())
}

/// Two updates inside the window, as far apart and as sharp as can be had.
///
/// # Errors
/// `counter_stuck` when the counter stands still for `STUCK_NS` somewhere in the window, `too_few_updates` when less
/// than half of the window lies between two of them.
pub fn edges(updates: &[Update], t0_ns: u64, t1_ns: u64) -> Result<(Update, Update), &'static str> {
    let inside: Vec<Update> =
        updates.iter().copied().filter(|update| update.lo_ns >= t0_ns && update.hi_ns <= t1_ns).collect();
    let span_ns = t1_ns.saturating_sub(t0_ns);
    let mut times: Vec<u64> = inside.iter().map(Update::mid_ns).collect();
    times.insert(0, t0_ns);
    times.push(t1_ns);
    if times.windows(2).any(|pair| pair[1].saturating_sub(pair[0]) > STUCK_NS) {
        return Err("counter_stuck");
    }
    let edge_ns = (span_ns as f64 * EDGE_SHARE) as u64;
    let leading = best(inside.iter(), |update| update.lo_ns - t0_ns, edge_ns);
    let trailing = best(inside.iter().rev(), |update| t1_ns - update.hi_ns, edge_ns);
    match (leading, trailing) {
        (Some(a), Some(b)) if b.lo_ns > a.hi_ns && 2 * (b.mid_ns() - a.mid_ns()) >= span_ns => Ok((a, b)),
        _ => Err("too_few_updates"),
    }
}

/// The sharpest of the updates near an edge; `distance` is that from the edge.
fn best<'a>(
    updates: impl Iterator<Item = &'a Update>,
    distance: impl Fn(&Update) -> u64,
    edge_ns: u64,
) -> Option<Update> {
    let score = |update: &Update| update.half_width_ns() as f64 * NARROW_OVER_NEAR + distance(update) as f64;
    updates
        .enumerate()
        .take_while(|(index, update)| *index < EDGE_UPDATES || distance(update) <= edge_ns)
        .map(|(_, update)| *update)
        .min_by(|a, b| score(a).total_cmp(&score(b)))
}

/// The update period: the median gap between neighbouring updates, ns. Only for readings dense enough to miss none.
pub fn period_ns(updates: &[Update]) -> Option<u64> {
    let mut gaps: Vec<u64> =
        updates.windows(2).map(|pair| pair[1].mid_ns().saturating_sub(pair[0].mid_ns())).collect();
    gaps.sort_unstable();
    gaps.get(gaps.len() / 2).copied()
}

/// The largest unit that divides every step of the counter, µJ: an upper bound of its resolution.
pub fn resolution_uj(updates: &[Update]) -> Option<u64> {
    let steps = updates.windows(2).map(|pair| pair[1].energy_uj - pair[0].energy_uj);
    steps.reduce(gcd).filter(|unit| *unit > 0)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn reading(at_ms: u64, energy_uj: u64) -> CounterReading {
        CounterReading { before_ns: at_ms * MS, after_ns: at_ms * MS + 1000, energy_uj }
    }

    #[test]
    fn an_update_lies_between_the_last_old_reading_and_the_first_new_one() {
        let found = updates(&[reading(0, 5), reading(1, 5), reading(2, 9), reading(3, 9)]).unwrap();
        assert_eq!(found, [Update { lo_ns: MS, hi_ns: 2 * MS + 1000, energy_uj: 9 }]);
        assert_eq!(found[0].half_width_ns(), MS / 2 + 500);
        assert_eq!(updates(&[reading(0, 5), reading(1, 4)]), Err("counter_reset"));
    }

    #[test]
    fn a_counter_that_stands_still_is_stuck_and_one_update_is_no_interval() {
        let still: Vec<_> = (0..3000).map(|ms| reading(ms, 7)).collect();
        assert_eq!(edges(&updates(&still).unwrap(), 0, 3000 * MS), Err("counter_stuck"));
        let stops: Vec<_> = (0..3000).map(|ms| reading(ms, ms.min(1500) / 100)).collect();
        assert_eq!(edges(&updates(&stops).unwrap(), 0, 3000 * MS), Err("counter_stuck"));
        let few: Vec<_> = (0..500).map(|ms| reading(ms, ms / 300)).collect();
        assert_eq!(edges(&updates(&few).unwrap(), 0, 500 * MS), Err("too_few_updates"));
    }

    #[test]
    fn the_sharpest_update_near_an_edge_is_taken() {
        let update = |mid_ms: u64, half_us: u64, energy_uj: u64| Update {
            lo_ns: mid_ms * MS - half_us * 1000,
            hi_ns: mid_ms * MS + half_us * 1000,
            energy_uj,
        };
        let mut all: Vec<Update> = (1..100).map(|k| update(k * 100, 5000, k)).collect();
        all[2] = update(300, 500, 3);
        all[97] = update(9800, 400, 98);
        let (a, b) = edges(&all, 0, 10_000 * MS).unwrap();
        assert_eq!((a.energy_uj, b.energy_uj), (3, 98));
    }

    #[test]
    fn period_and_resolution_are_read_off_the_updates() {
        let readings: Vec<_> = (0..1000).map(|ms| reading(ms, ms / 97 * 1500)).collect();
        let updates = updates(&readings).unwrap();
        assert_eq!(period_ns(&updates), Some(97 * MS));
        assert_eq!(resolution_uj(&updates), Some(1500));
    }
}
