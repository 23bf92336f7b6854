//! How a sensor behaves, found out by reading it: how often its counter is updated, in which units, how long a call
//! takes, whether energy adds up; and the arithmetic of what only a load shows, which [`super::duty`] brings. The
//! arithmetic is pure functions of readings.

use super::counter::{self, Update};
use super::integral::integrate;
use super::sampler::{Gauge, Sampler, poll};
use super::samples::{CounterReading, PowerReading, Reason};
use super::{Quantity, SensorInfo};
use crate::clock::Clock;

/// Updates that the probe looks at.
const UPDATES: usize = 20;
/// How long energy is watched for adding up, ns.
const WATCH_NS: u64 = 4_000_000_000;

/// What was found out about one device. Times are ns.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    pub update_period_ns: Result<u64, Reason>,
    /// Upper bound: the largest unit that divides every step seen.
    pub resolution_uj: Result<u64, Reason>,
    /// Median and 99th percentile of one call.
    pub call_ns: Result<(u64, u64), Reason>,
    /// Counter over integrated power, as a ratio.
    pub counter_over_power: Result<f64, Reason>,
    /// How far E(0…T) is from E(0…T/2) + E(T/2…T) measured apart, relative.
    pub additivity_error: Result<f64, Reason>,
}

/// Reads one device, whatever it does; takes about ten seconds.
pub fn probe(gauge: &mut dyn Gauge, clock: &Clock, info: &SensorInfo, device: usize) -> Probe {
    let polled = match info.quantity {
        Quantity::Power => Err("no_counter".to_owned()),
        _ => poll(gauge, clock, device, UPDATES),
    };
    let updates = polled.clone().and_then(|readings| Ok(counter::updates(&readings)?));
    let stuck = || "counter_stuck".to_owned();
    let (whole, halves) = (watch(gauge, clock, info, device), watch_halves(gauge, clock, info, device));
    Probe {
        update_period_ns: updates.clone().and_then(|updates| counter::period_ns(&updates).ok_or_else(stuck)),
        resolution_uj: updates.and_then(|updates| counter::resolution_uj(&updates).ok_or_else(stuck)),
        call_ns: polled.and_then(|readings| call_ns(&readings).ok_or_else(stuck)),
        counter_over_power: whole.clone().and_then(|(energy_j, integral_j)| Ok(energy_j / integral_j?)),
        additivity_error: halves,
    }
}

/// Median and 99th percentile of the calls' durations.
pub fn call_ns(readings: &[CounterReading]) -> Option<(u64, u64)> {
    let mut calls: Vec<u64> = readings.iter().map(|reading| reading.after_ns - reading.before_ns).collect();
    calls.sort_unstable();
    let last = calls.len().checked_sub(1)?;
    Some((calls[calls.len() / 2], calls[(calls.len() * 99 / 100).min(last)]))
}

/// Energy by the counter and by integrated power over the same interval.
type Both = (f64, Result<f64, Reason>);

/// What one device gave, and between which times.
struct Watched {
    updates: Vec<Update>,
    power: Vec<PowerReading>,
    t0_ns: u64,
    t1_ns: u64,
}

fn sampled(
    gauge: &mut dyn Gauge,
    clock: &Clock,
    info: &SensorInfo,
    device: usize,
) -> Result<Watched, Reason> {
    let t0_ns = clock.now_ns();
    let mut sampler = Sampler::new(gauge, clock, info);
    while clock.now_ns() < t0_ns + WATCH_NS && sampler.turn() {}
    let mut series = sampler.finish();
    let series = series.swap_remove(device);
    let updates = counter::updates(&series.counter?)?;
    Ok(Watched { updates, power: series.power.unwrap_or_default(), t0_ns, t1_ns: clock.now_ns() })
}

fn watch(gauge: &mut dyn Gauge, clock: &Clock, info: &SensorInfo, device: usize) -> Result<Both, Reason> {
    let Watched { updates, power, t0_ns, t1_ns } = sampled(gauge, clock, info, device)?;
    let (a, b) = counter::edges(&updates, t0_ns, t1_ns)?;
    let integral = integrate(&power, a.mid_ns(), b.mid_ns());
    let integral_j = integral.map(|integral| integral.energy_j).map_err(str::to_owned);
    Ok(((b.energy_uj - a.energy_uj) as f64 / 1e6, integral_j))
}

/// Mean power of the whole against the two halves, each between its own updates.
fn watch_halves(
    gauge: &mut dyn Gauge,
    clock: &Clock,
    info: &SensorInfo,
    device: usize,
) -> Result<f64, Reason> {
    let Watched { updates, t0_ns, t1_ns, .. } = sampled(gauge, clock, info, device)?;
    let middle_ns = t0_ns + (t1_ns - t0_ns) / 2;
    let energy_j = |from_ns, to_ns| -> Result<f64, Reason> {
        let (a, b) = counter::edges(&updates, from_ns, to_ns)?;
        let power_w = (b.energy_uj - a.energy_uj) as f64 / 1e6 / ((b.mid_ns() - a.mid_ns()) as f64 / 1e9);
        Ok(power_w * (to_ns - from_ns) as f64 / 1e9)
    };
    let whole_j = energy_j(t0_ns, t1_ns)?;
    let halves_j = energy_j(t0_ns, middle_ns)? + energy_j(middle_ns, t1_ns)?;
    Ok(halves_j / whole_j - 1.0)
}

/// Width of the average behind power readings, ns, from a load that switches between two powers with equal times on and
/// off every `load_period_ns`. As the readings' phase drifts through the load's, the share of them that lies between the
/// two powers is twice the width over the period, as long as the width is below half a period.
///
/// # Errors
/// `too_few_readings`, `no_contrast` when the readings do not show two powers, `average_too_wide` when hardly any reading
/// is at either of them.
pub fn average_width_ns(readings: &[PowerReading], load_period_ns: u64) -> Result<u64, Reason> {
    let (low_w, high_w) = plateaus_w(readings).ok_or("too_few_readings")?;
    let span_w = high_w - low_w;
    if span_w <= 0.05 * high_w {
        return Err("no_contrast".to_owned());
    }
    // The middle eight tenths of the flanks, since noise blurs where they begin and end.
    let flank_w = low_w + 0.1 * span_w..high_w - 0.1 * span_w;
    let between = readings.iter().filter(|reading| flank_w.contains(&reading.power_w)).count();
    let share = between as f64 / readings.len() as f64 / 0.8;
    if share > 0.9 {
        return Err("average_too_wide".to_owned());
    }
    Ok((share * load_period_ns as f64 / 2.0) as u64)
}

/// The powers between which a load switches, W, without the outermost two hundredths on either side. None for fewer than
/// a hundred readings.
pub(super) fn plateaus_w(readings: &[PowerReading]) -> Option<(f64, f64)> {
    let mut powers: Vec<f64> = readings.iter().map(|reading| reading.power_w).collect();
    powers.sort_by(f64::total_cmp);
    let cut = powers.len() / 50;
    (powers.len() >= 100).then(|| (powers[cut], powers[powers.len() - 1 - cut]))
}

/// R² of energies against the number of equal pieces of work that each was for.
///
/// # Errors
/// `too_few_readings` for fewer than three, or when all numbers are equal.
pub fn linearity(pieces_and_joules: &[(f64, f64)]) -> Result<f64, Reason> {
    let n = pieces_and_joules.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| pieces_and_joules.iter().map(pick).sum::<f64>() / n;
    let (mean_x, mean_y) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        pieces_and_joules.iter().map(|(x, y)| f(x - mean_x, y - mean_y)).sum()
    };
    let (xx, yy, xy) = (sum(&|x, _| x * x), sum(&|_, y| y * y), sum(&|x, y| x * y));
    if n < 3.0 || xx == 0.0 || yy == 0.0 {
        return Err("too_few_readings".to_owned());
    }
    Ok(xy * xy / (xx * yy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_straight_line_is_linear_and_a_bent_one_is_not() {
        let line: Vec<_> = (1..=8).map(|k| (f64::from(k), 3.0 + 20.0 * f64::from(k))).collect();
        let bent: Vec<_> = (1..=8).map(|k| (f64::from(k), f64::from(k).powi(2))).collect();
        assert!((linearity(&line).unwrap() - 1.0).abs() < 1e-12);
        // By hand: Σxy² / (Σx² Σy²) of 1…8 and their squares is 0.952.
        assert!((linearity(&bent).unwrap() - 0.952).abs() < 1e-3, "{:?}", linearity(&bent));
        assert!(linearity(&line[..2]).is_err());
    }

    #[test]
    fn calls_are_summed_up_by_median_and_tail() {
        let reading = |call_ns: u64| CounterReading { before_ns: 100, after_ns: 100 + call_ns, energy_uj: 0 };
        let calls: Vec<_> = (1..=100).map(reading).collect();
        assert_eq!(call_ns(&calls), Some((51, 100)));
        assert_eq!(call_ns(&[]), None);
    }
}
