//! From readings to the energy of a window, or the reason why there is none. A window whose numbers contradict each
//! other has no energy: nothing here guesses, and nothing is repaired. Pure functions of readings and stamps.

use super::counter::{self, Update};
use super::integral::{Integral, integrate};
use super::progress::{Piece, tokens_between};
use super::samples::{Reason, Samples, Series};
use super::{Quantity, SensorInfo};
use crate::record::{DeviceEnergy, Energy, Maybe, identities};

/// Fewer updates than this in a window put its energy in doubt: a hundred, less what a measured period is off by.
const FEWEST_UPDATES: u64 = 95;
/// A window must hold this many gaps between readings of power.
const FEWEST_READINGS: u64 = 10;
/// The update period may be this many times larger or smaller than it was before the first cell.
const PERIOD_RATIO: f64 = 2.0;

/// What the clock and the tokens say of a window.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    pub t0_ns: u64,
    pub t1_ns: u64,
    /// Output tokens that became visible in the window.
    pub tokens_out: u64,
    pub pieces: &'a [Piece],
}

/// One device's energy between its own readings.
struct Part {
    record: DeviceEnergy,
    uncertainty_j: f64,
    /// Bounds of the power at any time of the window, as far as known.
    low_w: f64,
    high_w: f64,
}

/// The window's energy.
///
/// # Errors
/// The reason code that stands in the record; METHODOLOGY.md lists them.
pub fn assess(info: &SensorInfo, samples: &Samples, window: &Measured<'_>) -> Result<Energy, Reason> {
    if samples.series.is_empty() || samples.series.len() != info.devices.len() {
        return Err("no_reading".to_owned());
    }
    let parts = (0..info.devices.len())
        .map(|device| part(info, device, &samples.series[device], window))
        .collect::<Result<Vec<Part>, Reason>>()?;
    let t_a_ns = parts.iter().map(|part| part.record.t_a_ns).max().unwrap_or(window.t0_ns);
    let t_b_ns = parts.iter().map(|part| part.record.t_b_ns).min().unwrap_or(window.t1_ns);
    if t_b_ns <= t_a_ns {
        return Err("too_few_updates".to_owned());
    }
    let (mut energy_j, mut uncertainty_j) = (0.0, 0.0);
    for part in &parts {
        let (energy, uncertainty) = over_common(part, t_a_ns, t_b_ns);
        energy_j += energy;
        uncertainty_j += uncertainty;
    }
    let (tokens_in, tokens_out) = tokens_between(window.pieces, t_a_ns, t_b_ns);
    let energy = Energy {
        t_a_ns,
        t_b_ns,
        energy_j,
        uncertainty_j,
        tokens_in,
        tokens_out,
        doubts: doubts(info, samples, &parts, window),
        devices: parts.into_iter().map(|part| part.record).collect(),
        sampler_cpu_ns: samples.sampler_cpu_ns.clone(),
    };
    expect_plausible(info, &energy, window)?;
    Ok(energy)
}

/// Mean power of all devices over an interval, and its half-width, W.
///
/// # Errors
/// As [`assess`], without the identities that need tokens.
pub fn mean_power(
    info: &SensorInfo,
    samples: &Samples,
    t0_ns: u64,
    t1_ns: u64,
) -> Result<(f64, f64), Reason> {
    metered(info, samples, t0_ns, t1_ns).map(|metered| (metered.power_w, metered.uncertainty_w))
}

/// Mean power of all devices, each between its own readings.
pub(super) struct Metered {
    /// The first device's readings.
    pub(super) t_a_ns: u64,
    pub(super) t_b_ns: u64,
    pub(super) power_w: f64,
    pub(super) uncertainty_w: f64,
}

/// Mean power over an interval, and between which readings it was metered.
///
/// # Errors
/// As [`mean_power`].
pub(super) fn metered(
    info: &SensorInfo,
    samples: &Samples,
    t0_ns: u64,
    t1_ns: u64,
) -> Result<Metered, Reason> {
    let window = Measured { t0_ns, t1_ns, tokens_out: 0, pieces: &[] };
    let parts = samples.series.iter().enumerate().map(|(device, series)| part(info, device, series, &window));
    let parts = parts.collect::<Result<Vec<Part>, Reason>>()?;
    let first = parts.first().ok_or("no_reading")?;
    let mut found = Metered {
        t_a_ns: first.record.t_a_ns,
        t_b_ns: first.record.t_b_ns,
        power_w: 0.0,
        uncertainty_w: 0.0,
    };
    for part in &parts {
        let own_s = seconds(part.record.t_a_ns, part.record.t_b_ns);
        found.power_w += part.record.energy_j / own_s;
        found.uncertainty_w += part.uncertainty_j / own_s;
    }
    if found.power_w > 0.0 { Ok(found) } else { Err("no_reading".to_owned()) }
}

fn part(info: &SensorInfo, device: usize, series: &Series, window: &Measured<'_>) -> Result<Part, Reason> {
    match info.quantity {
        Quantity::Power => integrated(info, device, series, window),
        Quantity::TickingCounter | Quantity::FreshCounter { .. } => counted(info, device, series, window),
    }
}

fn counted(info: &SensorInfo, device: usize, series: &Series, window: &Measured<'_>) -> Result<Part, Reason> {
    let readings = series.counter.as_ref().map_err(Reason::clone)?;
    let updates = match info.quantity {
        Quantity::FreshCounter { age_ns } => counter::fresh(readings, age_ns),
        _ => counter::updates(readings),
    }?;
    let (a, b) = counter::edges(&updates, window.t0_ns, window.t1_ns)?;
    let period_ns = seen_period(info, &updates, window);
    expect_period(&info.devices[device].update_period_ns, period_ns.as_ref())?;
    let integral = series.power.clone().and_then(|power| Ok(integrate(&power, a.mid_ns(), b.mid_ns())?));
    let energy_j = (b.energy_uj - a.energy_uj) as f64 / 1e6;
    if energy_j <= 0.0 {
        return Err("counter_stuck".to_owned());
    }
    let mean_w = energy_j / seconds(a.mid_ns(), b.mid_ns());
    let (low_w, high_w) = bounds(info, device, mean_w, integral.as_ref().ok());
    let half_width_ns = a.half_width_ns() + b.half_width_ns();
    let seen = updates.iter().filter(|update| a.lo_ns <= update.lo_ns && update.hi_ns <= b.hi_ns).count();
    let record = DeviceEnergy {
        device: info.devices[device].device.clone(),
        t_a_ns: a.mid_ns(),
        t_b_ns: b.mid_ns(),
        half_width_a_ns: a.half_width_ns(),
        half_width_b_ns: b.half_width_ns(),
        energy_j,
        readings: seen as u64,
        update_period_ns: period_ns,
        integral_j: integral.clone().map(|integral| integral.energy_j).into(),
        power_min_w: integral.clone().map(|integral| integral.min_w).into(),
        power_max_w: integral.map(|integral| integral.max_w).into(),
    };
    Ok(Part { record, uncertainty_j: high_w * half_width_ns as f64 / 1e9, low_w, high_w })
}

fn integrated(
    info: &SensorInfo,
    device: usize,
    series: &Series,
    window: &Measured<'_>,
) -> Result<Part, Reason> {
    let readings = series.power.as_ref().map_err(Reason::clone)?;
    let integral = integrate(readings, window.t0_ns, window.t1_ns)?;
    let (low_w, high_w) = bounds(info, device, integral.min_w, Some(&integral));
    let record = DeviceEnergy {
        device: info.devices[device].device.clone(),
        t_a_ns: window.t0_ns,
        t_b_ns: window.t1_ns,
        half_width_a_ns: 0,
        half_width_b_ns: 0,
        energy_j: integral.energy_j,
        readings: integral.readings,
        update_period_ns: Maybe::missing("no_counter"),
        integral_j: Maybe::missing("no_counter"),
        power_min_w: Maybe::Value(integral.min_w),
        power_max_w: Maybe::Value(integral.max_w),
    };
    Ok(Part { record, uncertainty_j: integral.uncertainty_j, low_w, high_w })
}

/// Energy of a part over an interval inside its own, at its mean power, and what that leaves open.
fn over_common(part: &Part, t_a_ns: u64, t_b_ns: u64) -> (f64, f64) {
    let record = &part.record;
    let own_s = seconds(record.t_a_ns, record.t_b_ns);
    let cut_s = own_s - seconds(t_a_ns, t_b_ns);
    if cut_s <= 0.0 {
        return (record.energy_j, part.uncertainty_j);
    }
    let mean_w = record.energy_j / own_s;
    (record.energy_j - mean_w * cut_s, part.uncertainty_j + (part.high_w - part.low_w) * cut_s)
}

/// The limit bounds the power where it is known: readings may all have missed a peak.
fn bounds(info: &SensorInfo, device: usize, mean_w: f64, integral: Option<&Integral>) -> (f64, f64) {
    let limit_w = info.devices[device].power_limit_w.value().copied().unwrap_or(0.0);
    let (min_w, max_w) = integral.map_or((mean_w, mean_w), |integral| (integral.min_w, integral.max_w));
    (min_w.min(mean_w), max_w.max(mean_w).max(limit_w))
}

/// The first gap between two updates: the sampler polls through it.
fn seen_period(info: &SensorInfo, updates: &[Update], window: &Measured<'_>) -> Maybe<u64> {
    if !matches!(info.quantity, Quantity::TickingCounter) {
        return Maybe::missing("not_seen");
    }
    let first = updates.iter().filter(|update| update.hi_ns <= window.t1_ns).take(2).copied();
    counter::period_ns(&first.collect::<Vec<_>>()).ok_or("not_seen").into()
}

fn expect_period(before: &Maybe<u64>, now: Maybe<&u64>) -> Result<(), Reason> {
    let (Some(before), Maybe::Value(now)) = (before.value(), now) else { return Ok(()) };
    let ratio = *now as f64 / *before as f64;
    // Calls take milliseconds at worst; below that a gap says nothing about the period.
    let sharp = now.abs_diff(*before) > 25_000_000;
    if sharp && !(1.0 / PERIOD_RATIO..=PERIOD_RATIO).contains(&ratio) {
        return Err("update_period_changed".to_owned());
    }
    Ok(())
}

fn doubts(info: &SensorInfo, samples: &Samples, parts: &[Part], window: &Measured<'_>) -> Vec<String> {
    let mut doubts = Vec::new();
    let mut doubt = |holds: bool, reason: &str| {
        if holds {
            doubts.push(reason.to_owned());
        }
    };
    let span_ns = window.t1_ns.saturating_sub(window.t0_ns);
    let period_ns = info.devices.iter().filter_map(|device| device.update_period_ns.value()).max();
    let few_updates = period_ns.is_some_and(|period_ns| span_ns < FEWEST_UPDATES * period_ns);
    let is_power = matches!(info.quantity, Quantity::Power);
    let few_readings = is_power && parts.iter().any(|part| part.record.readings < FEWEST_READINGS);
    doubt(span_ns < info.shortest_window_ns || few_updates || few_readings, "short_window");
    doubt(parts.iter().any(|part| identities::disagrees(&part.record)), identities::DISAGREEMENT);
    doubt(info.devices.iter().any(|device| device.shared.value() == Some(&true)), "device_shared");
    doubt(info.source.starts_with("nvml") && is_power, "power_integrated_only");
    doubt(samples.clock_stepped, "clock_stepped");
    doubts
}

/// The identities of a window's energy.
fn expect_plausible(info: &SensorInfo, energy: &Energy, window: &Measured<'_>) -> Result<(), Reason> {
    let power_w = energy.energy_j / seconds(energy.t_a_ns, energy.t_b_ns);
    if !(power_w.is_finite() && power_w > 0.0) {
        return Err("power_is_zero".to_owned());
    }
    let limits: Option<f64> = info.devices.iter().map(|device| device.power_limit_w.value()).sum();
    if limits.is_some_and(|limit_w| power_w > identities::LIMIT_MARGIN * limit_w) {
        return Err("power_above_limit".to_owned());
    }
    if info.idle_floor_w.is_some_and(|floor_w| power_w < floor_w) {
        return Err("power_below_idle".to_owned());
    }
    let rate_per_s = window.tokens_out as f64 / seconds(window.t0_ns, window.t1_ns);
    match identities::power_from_tokens(energy, rate_per_s) {
        Some(from_tokens_w) if (from_tokens_w / power_w - 1.0).abs() > identities::POWER_AGREEMENT => {
            Err("power_is_not_energy_per_token_times_rate".to_owned())
        }
        Some(_) => Ok(()),
        None => Err("no_token".to_owned()),
    }
}

fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e9
}
