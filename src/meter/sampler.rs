//! Reads a gauge over a window, in a thread of its own that shares one flag and nothing else with the thread that is
//! measured. When to read is decided from what was read: the first two updates of a counter are waited for, later ones
//! are met a moment before they are due. On a scripted clock the same turns run without a thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::samples::{CounterReading, PowerReading, Reason, Samples, Series, State};
use super::{PowerSensor, Quantity, SensorInfo};
use super::{counter, cpu_time};
use crate::clock::Clock;
use crate::record::Maybe;

/// Between two reads while an update is waited for.
const POLL_NS: u64 = 1_000_000;
/// Between two reads of a counter that has stood still for [`PATIENCE_NS`].
const IDLE_POLL_NS: u64 = 50_000_000;
const PATIENCE_NS: u64 = 1_000_000_000;
/// Updates are met at most this far apart.
const STRIDE_NS: u64 = 400_000_000;
/// Between two reads of a counter that is never old.
const FRESH_NS: u64 = 50_000_000;
/// Between two reads of power; no simple fraction of the 100 ms at which sensors and loads like to change.
const POWER_NS: u64 = 73_000_000;
/// Between two looks at clocks and temperature.
const STATE_NS: u64 = 1_000_000_000;
/// Readings of one kind for which room is made before a window.
const ROOM: usize = 1 << 14;
/// Updates that give a period, and the longest time for them.
const CALIBRATION_UPDATES: usize = 9;
const CALIBRATION_NS: u64 = 2_500_000_000;

/// Answers one question about one device at a time; the sampler notes when.
pub trait Gauge: Send {
    /// A window begins: what was read before may be long ago.
    fn begin(&mut self) {}

    /// Energy since the counter's own zero, µJ.
    fn counter_uj(&mut self, device: usize) -> Result<u64, Reason>;

    /// Power now, W.
    fn power_w(&mut self, device: usize) -> Result<f64, Reason>;

    /// Clocks and temperature, where the sensor knows them.
    fn state(&mut self, _device: usize) -> Option<State> {
        None
    }
}

/// When one device is read next.
struct Track {
    counter_ns: Option<u64>,
    power_ns: Option<u64>,
    state_ns: Option<u64>,
    pace: Pace,
}

/// The readings of one window in the making.
pub struct Sampler<'a> {
    gauge: &'a mut dyn Gauge,
    clock: &'a Clock,
    tracks: Vec<Track>,
    series: Vec<Series>,
}

impl<'a> Sampler<'a> {
    pub fn new(gauge: &'a mut dyn Gauge, clock: &'a Clock, info: &SensorInfo) -> Self {
        gauge.begin();
        let now_ns = clock.now_ns();
        let counts = !matches!(info.quantity, Quantity::Power);
        let track = |device: &crate::record::MeteredDevice| Track {
            counter_ns: counts.then_some(now_ns),
            power_ns: Some(now_ns),
            state_ns: Some(now_ns),
            pace: Pace::new(info.quantity, device.update_period_ns.value().copied()),
        };
        let series = |_: &crate::record::MeteredDevice| match counts {
            true => Series::with_capacity(ROOM),
            false => Series { counter: Err("no_counter".to_owned()), ..Series::with_capacity(ROOM) },
        };
        Sampler {
            gauge,
            clock,
            tracks: info.devices.iter().map(track).collect(),
            series: info.devices.iter().map(series).collect(),
        }
    }

    /// Waits until something is due and reads it. `false` when nothing will be due any more.
    pub fn turn(&mut self) -> bool {
        let due = |(device, track): (usize, &Track)| {
            [track.counter_ns, track.power_ns, track.state_ns]
                .into_iter()
                .flatten()
                .min()
                .map(|at| (at, device))
        };
        let Some((at_ns, device)) = self.tracks.iter().enumerate().filter_map(due).min() else {
            return false;
        };
        self.clock.sleep_until_ns(at_ns);
        let track = &self.tracks[device];
        if track.counter_ns == Some(at_ns) {
            self.read_counter(device);
        } else if track.power_ns == Some(at_ns) {
            self.read_power(device);
        } else {
            self.read_state(device);
        }
        true
    }

    /// Ends the window.
    pub fn finish(mut self) -> Vec<Series> {
        for device in 0..self.tracks.len() {
            self.read_state(device);
        }
        self.series
    }

    fn read_counter(&mut self, device: usize) {
        let before_ns = self.clock.now_ns();
        let energy_uj = self.gauge.counter_uj(device);
        let after_ns = self.clock.now_ns();
        let (track, series) = (&mut self.tracks[device], &mut self.series[device]);
        match (energy_uj, &mut series.counter) {
            (Ok(energy_uj), Ok(readings)) => {
                let reading = CounterReading { before_ns, after_ns, energy_uj };
                readings.push(reading);
                track.counter_ns = Some(track.pace.next_ns(reading));
            }
            (Err(reason), _) => {
                series.counter = Err(reason);
                track.counter_ns = None;
            }
            (Ok(_), Err(_)) => track.counter_ns = None,
        }
    }

    fn read_power(&mut self, device: usize) {
        let before_ns = self.clock.now_ns();
        let power_w = self.gauge.power_w(device);
        let after_ns = self.clock.now_ns();
        let (track, series) = (&mut self.tracks[device], &mut self.series[device]);
        track.power_ns = match (power_w, &mut series.power) {
            (Ok(power_w), Ok(readings)) => {
                readings.push(PowerReading { at_ns: before_ns + (after_ns - before_ns) / 2, power_w });
                Some(after_ns + POWER_NS)
            }
            (Err(reason), _) => {
                series.power = Err(reason);
                None
            }
            (Ok(_), Err(_)) => None,
        };
    }

    fn read_state(&mut self, device: usize) {
        let state = self.gauge.state(device);
        self.tracks[device].state_ns = state.is_some().then(|| self.clock.now_ns() + STATE_NS);
        self.series[device].states.extend(state);
    }
}

/// Decides when a counter is read next.
struct Pace {
    quantity: Quantity,
    period_ns: Option<u64>,
    last: Option<CounterReading>,
    /// The last two readings stand side by side: an update between them is a sharp one.
    is_polling: bool,
    last_update_ns: Option<u64>,
    updates: u64,
    polling_since_ns: u64,
    slowest_call_ns: u64,
}

impl Pace {
    fn new(quantity: Quantity, period_ns: Option<u64>) -> Self {
        Pace {
            quantity,
            period_ns: period_ns.filter(|period_ns| *period_ns > 0),
            last: None,
            is_polling: false,
            last_update_ns: None,
            updates: 0,
            polling_since_ns: 0,
            slowest_call_ns: 0,
        }
    }

    fn next_ns(&mut self, reading: CounterReading) -> u64 {
        if let Quantity::FreshCounter { .. } = self.quantity {
            return reading.after_ns + FRESH_NS;
        }
        let call_ns = reading.after_ns - reading.before_ns;
        // The slowest call of late; old ones are forgotten.
        self.slowest_call_ns = call_ns.max(self.slowest_call_ns - self.slowest_call_ns / 8);
        let last = self.last.replace(reading);
        let changed = last.is_some_and(|last| last.energy_uj != reading.energy_uj);
        match last {
            Some(last) if changed && self.is_polling => {
                let update_ns = last.before_ns + (reading.after_ns - last.before_ns) / 2;
                self.updated(update_ns, reading.after_ns)
            }
            _ => {
                if !self.is_polling || changed {
                    self.polling_since_ns = reading.before_ns;
                }
                self.is_polling = true;
                let is_idle = reading.after_ns - self.polling_since_ns > PATIENCE_NS;
                reading.after_ns + if is_idle { IDLE_POLL_NS } else { POLL_NS }
            }
        }
    }

    /// An update was seen: the next one to meet, and when to begin to look for it.
    fn updated(&mut self, update_ns: u64, now_ns: u64) -> u64 {
        self.updates += 1;
        self.polling_since_ns = now_ns;
        let gap_ns = self.last_update_ns.replace(update_ns).map(|last_ns| update_ns - last_ns);
        let Some(gap_ns) = gap_ns else { return now_ns + POLL_NS };
        let period_ns = match self.period_ns {
            None => gap_ns,
            Some(period_ns) => {
                let periods = ((gap_ns + period_ns / 2) / period_ns).max(1);
                period_ns - period_ns / 4 + gap_ns / periods / 4
            }
        };
        self.period_ns = Some(period_ns.max(1));
        let stride = (STRIDE_NS / period_ns.max(1)).max(1);
        let margin_ns = (POLL_NS + POLL_NS / 2 + 2 * self.slowest_call_ns).min(period_ns / 2);
        self.is_polling = false;
        (update_ns + stride * period_ns - margin_ns).max(now_ns + POLL_NS)
    }
}

/// The update period of a device's counter, ns: reads it without pause until enough updates were seen.
///
/// # Errors
/// The gauge's reason, `counter_reset`, or `counter_stuck` when there were too few updates.
pub fn measure_period(gauge: &mut dyn Gauge, clock: &Clock, device: usize) -> Result<u64, Reason> {
    let readings = poll(gauge, clock, device, CALIBRATION_UPDATES)?;
    counter::period_ns(&counter::updates(&readings)?).ok_or_else(|| "counter_stuck".to_owned())
}

/// Reads a counter without pause until it has changed `updates` times, or for [`CALIBRATION_NS`].
pub(super) fn poll(
    gauge: &mut dyn Gauge,
    clock: &Clock,
    device: usize,
    updates: usize,
) -> Result<Vec<CounterReading>, Reason> {
    let begin_ns = clock.now_ns();
    let mut readings: Vec<CounterReading> = Vec::new();
    let mut seen = 0;
    while seen < updates && clock.now_ns() - begin_ns < CALIBRATION_NS {
        let before_ns = clock.now_ns();
        let energy_uj = gauge.counter_uj(device)?;
        let after_ns = clock.now_ns();
        seen += usize::from(readings.last().is_some_and(|last| last.energy_uj != energy_uj));
        readings.push(CounterReading { before_ns, after_ns, energy_uj });
        clock.sleep_until_ns(after_ns + POLL_NS);
    }
    Ok(readings)
}

/// What a sampling thread hands back.
type Returned = (Box<dyn Gauge>, Vec<Series>, Maybe<u64>);

/// A gauge that is read by a thread.
pub struct Sampled {
    info: SensorInfo,
    gauge: Option<Box<dyn Gauge>>,
    running: Option<JoinHandle<Returned>>,
    stop: Arc<AtomicBool>,
    /// Wall time minus the clock's, when the window began.
    offset_ns: i128,
}

impl Sampled {
    pub fn new(gauge: Box<dyn Gauge>, info: SensorInfo) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        Sampled { info, gauge: Some(gauge), running: None, stop, offset_ns: 0 }
    }

    /// Ends the thread, if one runs, and takes the gauge back.
    fn join(&mut self) -> Option<(Vec<Series>, Maybe<u64>)> {
        self.stop.store(true, Ordering::Relaxed);
        let (gauge, series, cpu_ns) = self.running.take()?.join().ok()?;
        self.gauge = Some(gauge);
        Some((series, cpu_ns))
    }

    fn failed(&self, reason: &str) -> Samples {
        let series = self.info.devices.iter().map(|_| Series::failed(reason)).collect();
        Samples { series, sampler_cpu_ns: Maybe::missing(reason), clock_stepped: false }
    }
}

impl Drop for Sampled {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl PowerSensor for Sampled {
    fn info(&self) -> SensorInfo {
        self.info.clone()
    }

    /// On a scripted clock nothing is read: a machine's power means nothing there.
    fn begin(&mut self, clock: &Clock) {
        self.offset_ns = wall_offset_ns(clock);
        // A window that broke off was never collected.
        self.join();
        let Clock::Monotonic { .. } = clock else { return };
        let Some(gauge) = self.gauge.take() else { return };
        self.stop = Arc::new(AtomicBool::new(false));
        let (stop, clock, info) = (Arc::clone(&self.stop), clock.clone(), self.info.clone());
        let thread = std::thread::Builder::new().name("power".to_owned());
        self.running = thread.spawn(move || sample(gauge, &clock, &info, &stop)).ok();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn collect(&mut self, clock: &Clock, _: (u64, u64)) -> Samples {
        if matches!(clock, Clock::Scripted(_)) {
            return self.failed("scripted_clock");
        }
        let Some((series, sampler_cpu_ns)) = self.join() else { return self.failed("sampler_failed") };
        let clock_stepped = has_stepped(self.offset_ns, clock);
        Samples { series, sampler_cpu_ns, clock_stepped }
    }
}

fn sample(mut gauge: Box<dyn Gauge>, clock: &Clock, info: &SensorInfo, stop: &AtomicBool) -> Returned {
    let begin_ns = cpu_time::of_this_thread_ns();
    let mut sampler = Sampler::new(gauge.as_mut(), clock, info);
    while !stop.load(Ordering::Relaxed) && sampler.turn() {}
    let series = sampler.finish();
    let cpu_ns = begin_ns.and_then(|begin_ns| Ok(cpu_time::of_this_thread_ns()?.saturating_sub(begin_ns)));
    (gauge, series, cpu_ns.into())
}

/// Wall time minus the clock's own, ns.
pub(super) fn wall_offset_ns(clock: &Clock) -> i128 {
    clock.unix_ns() as i128 - i128::from(clock.now_ns())
}

/// Whether the wall clock was set by more than a millisecond since it was `offset_ns` ahead.
pub(super) fn has_stepped(offset_ns: i128, clock: &Clock) -> bool {
    (wall_offset_ns(clock) - offset_ns).abs() > 1_000_000
}
