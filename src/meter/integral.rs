//! Energy as the integral of power readings over an interval. Between two readings power is taken to go straight from
//! one to the other; at the edges the nearest reading is held, so that a slow sensor loses no sliver. Pure functions.

use super::samples::PowerReading;

/// Energy over an interval, and what the readings say of its error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Integral {
    pub energy_j: f64,
    /// Of the quadrature: half of each step between neighbours over half of their gap, added as independent errors,
    /// and the whole span of power over the held edges.
    pub uncertainty_j: f64,
    pub min_w: f64,
    pub max_w: f64,
    /// Readings inside the interval.
    pub readings: u64,
    /// Longest time between two neighbours, edges included, ns.
    pub longest_gap_ns: u64,
}

/// Integrates over [`from_ns`, `to_ns`]. Readings are in the order of time and may lie outside; the nearest ones
/// outside are used where there are any. A device that is on draws power, so a reading of zero is none.
///
/// # Errors
/// `no_power_reading` when none lies inside, `power_is_zero` when all that do are zero.
pub fn integrate(readings: &[PowerReading], from_ns: u64, to_ns: u64) -> Result<Integral, &'static str> {
    let inside = |reading: &PowerReading| from_ns <= reading.at_ns && reading.at_ns <= to_ns;
    let usable: Vec<PowerReading> = readings
        .iter()
        .copied()
        .filter(|reading| reading.power_w.is_finite() && reading.power_w > 0.0)
        .collect();
    let none = if readings.iter().any(inside) { "power_is_zero" } else { "no_power_reading" };
    over(&usable, from_ns, to_ns).ok_or(none)
}

/// The same over readings that are all above zero; `None` when none lies inside.
fn over(readings: &[PowerReading], from_ns: u64, to_ns: u64) -> Option<Integral> {
    let first = readings.partition_point(|reading| reading.at_ns < from_ns);
    let last = readings.partition_point(|reading| reading.at_ns <= to_ns);
    let inside = readings.get(first..last).unwrap_or_default();
    if inside.is_empty() || to_ns <= from_ns {
        return None;
    }
    let outside = |index: Option<usize>| index.and_then(|index| readings.get(index));
    let power_at = |at_ns: u64, outer: Option<&PowerReading>, inner: &PowerReading| match outer {
        Some(outer) => straight(outer, inner, at_ns),
        None => inner.power_w,
    };
    let (before, after) = (outside(first.checked_sub(1)), outside(Some(last)));
    let (head, tail) = (inside[0], inside[inside.len() - 1]);
    let mut points = Vec::with_capacity(inside.len() + 2);
    points.push(PowerReading { at_ns: from_ns, power_w: power_at(from_ns, before, &head) });
    points.extend_from_slice(inside);
    points.push(PowerReading { at_ns: to_ns, power_w: power_at(to_ns, after, &tail) });
    let (min_w, max_w) = inside.iter().fold((f64::MAX, f64::MIN), |(min, max), reading| {
        (min.min(reading.power_w), max.max(reading.power_w))
    });
    let gap_s = |pair: &[PowerReading]| (pair[1].at_ns - pair[0].at_ns) as f64 / 1e9;
    let energy_j =
        points.windows(2).map(|pair| (pair[0].power_w + pair[1].power_w) / 2.0 * gap_s(pair)).sum();
    let squares: f64 = points
        .windows(2)
        .map(|pair| ((pair[1].power_w - pair[0].power_w) / 2.0 * gap_s(pair) / 2.0).powi(2))
        .sum();
    let held_s = [(before, gap_s(&points[..2])), (after, gap_s(&points[points.len() - 2..]))];
    let held_s: f64 = held_s.iter().filter(|(outer, _)| outer.is_none()).map(|(_, gap_s)| gap_s).sum();
    Some(Integral {
        energy_j,
        uncertainty_j: squares.sqrt() + (max_w - min_w) * held_s,
        min_w,
        max_w,
        readings: inside.len() as u64,
        longest_gap_ns: points.windows(2).map(|pair| pair[1].at_ns - pair[0].at_ns).max().unwrap_or(0),
    })
}

/// Power at `at_ns` on the straight line through two readings.
fn straight(a: &PowerReading, b: &PowerReading, at_ns: u64) -> f64 {
    let (t_a, t_b, t) = (a.at_ns as f64, b.at_ns as f64, at_ns as f64);
    if t_a == t_b { b.power_w } else { a.power_w + (b.power_w - a.power_w) * (t - t_a) / (t_b - t_a) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64, power_w: f64) -> PowerReading {
        PowerReading { at_ns: ms * 1_000_000, power_w }
    }

    #[test]
    fn one_reading_in_the_middle_is_held_to_both_edges() {
        let integral = integrate(&[at(500, 300.0)], 0, 1_000_000_000).unwrap();
        assert_eq!((integral.energy_j, integral.readings), (300.0, 1));
    }

    #[test]
    fn a_ramp_that_reaches_beyond_both_edges_is_exact() {
        // 100 W at 0 s to 300 W at 2 s; from 0.5 s to 1.5 s the mean is 200 W.
        let readings: Vec<_> = (0..=20).map(|k| at(k * 100 + 3, 100.0 + 10.0 * k as f64)).collect();
        let integral = integrate(&readings, 503_000_000, 1_503_000_000).unwrap();
        assert!((integral.energy_j - 200.0).abs() < 1e-9, "{integral:?}");
        assert!(integral.uncertainty_j < 2.0);
    }

    #[test]
    fn without_power_there_is_no_energy() {
        assert_eq!(integrate(&[], 0, 10), Err("no_power_reading"));
        assert_eq!(integrate(&[at(5, 9.0)], 0, 10), Err("no_power_reading"));
        assert_eq!(integrate(&[at(0, 0.0), at(1, 0.0)], 0, 10_000_000), Err("power_is_zero"));
        assert_eq!(integrate(&[at(0, f64::NAN)], 0, 10_000_000), Err("power_is_zero"));
    }
}
