//! What a sensor shows under a load that is switched on and off by the clock: whether energy grows in proportion to the
//! time that the device works, and how wide the average behind its power is. What the load does is its owner's affair:
//! here it is a call that works for a moment. The arithmetic is in [`super::probe`].

use serde::Serialize;

use super::energy::metered;
use super::probe::{Probe, average_width_ns, linearity, plateaus_w, probe};
use super::{Gauge, PowerSensor, Reason, SensorInfo};
use crate::backend::peaks::Load;
use crate::clock::Clock;

/// Period of the staircase's load, ns: no simple fraction of the 100 ms at which sensors like to be updated.
const PERIOD_NS: u64 = 93_000_000;
/// Shares of the time that the load is on, in an order in which a drift of temperature is no slope.
const SHARES: [f64; 9] = [0.5, 0.0, 1.0, 0.25, 0.75, 0.125, 0.875, 0.375, 0.625];
/// The load's periods that the width is looked for with, and for how long each is watched, ns. An average of more than
/// half a period flattens the load, and a longer one is tried.
const WIDTH_LOADS: [(u64, u64); 3] =
    [(PERIOD_NS, 12_000_000_000), (10 * PERIOD_NS, 19_000_000_000), (44 * PERIOD_NS, 25_000_000_000)];
/// A load of its own share of the time, before a step counts, ns.
const SETTLE_NS: u64 = 500_000_000;
/// Under a load that is switched, power must come this near to the powers of rest and of full load.
const FULL_SPAN: f64 = 0.8;

/// One share of the time that the load was on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DutyStep {
    /// Share of the metered time in which the load worked, by the clock around it.
    pub busy_share: f64,
    pub power_w: f64,
    pub uncertainty_w: f64,
}

/// Width of the average behind power readings, and the period of the load that showed it, ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    pub width_ns: u64,
    pub load_period_ns: u64,
}

/// What a load brought to light.
#[derive(Clone, Debug, PartialEq)]
pub struct UnderLoad {
    pub steps: Result<Vec<DutyStep>, Reason>,
    /// R² of power against the share of the time that the load was on.
    pub linearity_r2: Result<f64, Reason>,
    pub average_width: Result<Width, Reason>,
}

/// When the load worked.
struct Worked {
    t0_ns: u64,
    t1_ns: u64,
    /// Beginnings and ends of unbroken work, in order.
    busy_ns: Vec<(u64, u64)>,
}

impl Worked {
    fn busy_share(&self, from_ns: u64, to_ns: u64) -> f64 {
        let inside = |(begin, end): &(u64, u64)| (*end).min(to_ns).saturating_sub((*begin).max(from_ns));
        self.busy_ns.iter().map(inside).sum::<u64>() as f64 / to_ns.saturating_sub(from_ns).max(1) as f64
    }
}

/// Reads the device by [`probe`], in a thread of its own, while the load is on without a pause.
///
/// # Errors
/// The load's own.
pub fn probe_under_load(
    gauge: &mut dyn Gauge,
    clock: &Clock,
    info: &SensorInfo,
    load: &mut Load<'_>,
) -> anyhow::Result<Probe> {
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| probe(gauge, clock, info, 0));
        let mut worked = Ok(());
        while worked.is_ok() && !reading.is_finished() {
            worked = load();
        }
        let found = reading.join().map_err(|_| anyhow::anyhow!("the thread that reads the sensor failed"))?;
        worked.map(|()| found)
    })
}

/// Puts the device under nine shares of the load, each for `step_ns`, and then under a load that drifts through the
/// sensor's average.
///
/// # Errors
/// The load's own.
pub fn under_load(
    sensor: &mut dyn PowerSensor,
    clock: &Clock,
    load: &mut Load<'_>,
    step_ns: u64,
) -> anyhow::Result<UnderLoad> {
    let mut steps = SHARES
        .iter()
        .map(|share| step(sensor, clock, load, *share, step_ns))
        .collect::<anyhow::Result<Result<Vec<DutyStep>, Reason>>>()?;
    if let Ok(steps) = &mut steps {
        steps.sort_by(|a, b| a.busy_share.total_cmp(&b.busy_share));
    }
    let linearity_r2 = match &steps {
        Ok(steps) => linearity(&steps.iter().map(|step| (step.busy_share, step.power_w)).collect::<Vec<_>>()),
        Err(reason) => Err(reason.clone()),
    };
    let average_width = match &steps {
        Ok(steps) => width(sensor, clock, load, span_w(steps))?,
        Err(_) => Err("no_reference_power".to_owned()),
    };
    Ok(UnderLoad { steps, linearity_r2, average_width })
}

/// From rest to full load, W.
fn span_w(steps: &[DutyStep]) -> f64 {
    let powers = || steps.iter().map(|step| step.power_w);
    powers().fold(f64::MIN, f64::max) - powers().fold(f64::MAX, f64::min)
}

fn step(
    sensor: &mut dyn PowerSensor,
    clock: &Clock,
    load: &mut Load<'_>,
    share: f64,
    duration_ns: u64,
) -> anyhow::Result<Result<DutyStep, Reason>> {
    let on_ns = (PERIOD_NS as f64 * share) as u64;
    drive(clock, load, PERIOD_NS, on_ns, SETTLE_NS)?;
    sensor.begin(clock);
    let worked = drive(clock, load, PERIOD_NS, on_ns, duration_ns)?;
    sensor.end();
    let samples = sensor.collect(clock, (worked.t0_ns, worked.t1_ns));
    let metered = metered(&sensor.info(), &samples, worked.t0_ns, worked.t1_ns);
    Ok(metered.map(|metered| DutyStep {
        busy_share: worked.busy_share(metered.t_a_ns, metered.t_b_ns),
        power_w: metered.power_w,
        uncertainty_w: metered.uncertainty_w,
    }))
}

fn width(
    sensor: &mut dyn PowerSensor,
    clock: &Clock,
    load: &mut Load<'_>,
    span_w: f64,
) -> anyhow::Result<Result<Width, Reason>> {
    let mut found = Err("not_reached".to_owned());
    for (load_period_ns, duration_ns) in WIDTH_LOADS {
        drive(clock, load, load_period_ns, load_period_ns / 2, SETTLE_NS)?;
        sensor.begin(clock);
        let worked = drive(clock, load, load_period_ns, load_period_ns / 2, duration_ns)?;
        sensor.end();
        let samples = sensor.collect(clock, (worked.t0_ns, worked.t1_ns));
        let readings = samples
            .series
            .into_iter()
            .next()
            .map_or_else(|| Err("no_power_reading".to_owned()), |series| series.power);
        found = readings
            .and_then(|readings| {
                let (low_w, high_w) = plateaus_w(&readings).ok_or("too_few_readings")?;
                if high_w - low_w < FULL_SPAN * span_w {
                    return Err("average_too_wide".to_owned());
                }
                average_width_ns(&readings, load_period_ns)
            })
            .map(|width_ns| Width { width_ns, load_period_ns });
        let is_flattened = |reason: &Reason| ["average_too_wide", "no_contrast"].contains(&reason.as_str());
        if !found.as_ref().is_err_and(is_flattened) {
            break;
        }
    }
    Ok(found)
}

/// The load on for `on_ns` of every `period_ns`.
fn drive(
    clock: &Clock,
    load: &mut Load<'_>,
    period_ns: u64,
    on_ns: u64,
    duration_ns: u64,
) -> anyhow::Result<Worked> {
    let t0_ns = clock.now_ns();
    let end_ns = t0_ns + duration_ns;
    let mut busy_ns: Vec<(u64, u64)> = Vec::with_capacity((duration_ns / period_ns) as usize + 1);
    let mut begin_ns = t0_ns;
    while begin_ns < end_ns {
        clock.sleep_until_ns(begin_ns);
        let (from_ns, off_ns) = (clock.now_ns(), (begin_ns + on_ns).min(end_ns));
        while clock.now_ns() < off_ns {
            load()?;
        }
        if clock.now_ns() > from_ns && on_ns > 0 {
            busy_ns.push((from_ns, clock.now_ns()));
        }
        begin_ns += period_ns;
    }
    clock.sleep_until_ns(end_ns);
    Ok(Worked { t0_ns, t1_ns: clock.now_ns(), busy_ns })
}
