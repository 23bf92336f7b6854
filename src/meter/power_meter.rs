//! The sensor that a run uses, chosen once, and the reason when there is none.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::energy::{Measured, assess, mean_power};
use super::nvml::{GpuId, Library};
use super::{Absent, Conditions, Hwmon, PowerSensor, Rapl, Samples, SensorInfo, TraceFile, conditions};
use crate::clock::Clock;
use crate::record::{Energy, IdlePower, Maybe, Meter};

/// Time that one look at the temperature takes.
const TEMPERATURE_NS: u64 = 500_000_000;
/// Parts of an idle watch whose means are kept.
const IDLE_PARTS: u64 = 3;

/// What `--power` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The sensor of what is measured: NVML for a GPU, RAPL or else hwmon for a CPU.
    Auto,
    None,
    Nvml,
    Rapl,
    Hwmon,
    Replay(PathBuf),
    Csv(PathBuf),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("auto", _) => Ok(Choice::Auto),
            ("none", _) => Ok(Choice::None),
            ("nvml", _) => Ok(Choice::Nvml),
            ("rapl", _) => Ok(Choice::Rapl),
            ("hwmon", _) => Ok(Choice::Hwmon),
            (_, Some(("replay", file))) if !file.is_empty() => Ok(Choice::Replay(file.into())),
            (_, Some(("csv", file))) if !file.is_empty() => Ok(Choice::Csv(file.into())),
            _ => Err(format!("is '{text}', expected auto, none, nvml, rapl, hwmon, replay:FILE or csv:FILE")),
        }
    }
}

/// What draws the power that is to be measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Cpu,
    Gpus(Vec<GpuId>),
    /// A scripted engine, which draws none: only a trace can stand for it.
    Script,
}

/// A sensor over the windows of a run, or why there is none.
pub struct PowerMeter {
    sensor: Result<Box<dyn PowerSensor>, Absent>,
    /// As the sensor described itself when it was opened, and the idle floor.
    info: Option<SensorInfo>,
    idle_no_context: Maybe<IdlePower>,
    idle_context_resident: Maybe<IdlePower>,
    idle_after_load: Maybe<IdlePower>,
}

impl PowerMeter {
    /// The sensor that is asked for. `sys` is `/sys`.
    ///
    /// # Errors
    /// When a trace cannot be read: a file that was named is never passed over. A sensor that is not there is a meter
    /// that says so.
    pub fn open(choice: &Choice, subject: &Subject, clock: &Clock, sys: &Path) -> anyhow::Result<Self> {
        let rapl = || Rapl::open(&sys.join("class/powercap")).map(boxed_rapl);
        let hwmon = || Hwmon::open(&sys.join("class/hwmon")).map(boxed_hwmon);
        let sensor = match (choice, subject) {
            (Choice::None, _) => {
                Err(Absent::new("not_asked", "no power sensor was asked for (--power none)"))
            }
            (Choice::Replay(file), _) => Ok(Box::new(TraceFile::replay(file)?) as Box<dyn PowerSensor>),
            (Choice::Csv(file), _) => Ok(Box::new(TraceFile::external(file)?) as Box<dyn PowerSensor>),
            (_, Subject::Script) => Err(Absent::new("no_sensor", "a scripted engine draws no power")
                .with_remedy("--power replay:FILE plays a trace")),
            (Choice::Auto | Choice::Nvml, Subject::Gpus(gpus)) => nvml(gpus, clock),
            (Choice::Nvml, Subject::Cpu) => {
                Err(Absent::new("not_a_gpu", "NVML measures GPUs, and the device is the CPU")
                    .with_remedy("--power rapl, or --device cuda:0"))
            }
            (Choice::Auto, Subject::Cpu) => rapl().or_else(|absent| {
                if absent.reason == "no_powercap" { hwmon().map_err(|_| absent) } else { Err(absent) }
            }),
            (Choice::Rapl, _) => rapl(),
            (Choice::Hwmon, _) => hwmon(),
        };
        Ok(Self::of(sensor))
    }

    /// A meter over this sensor.
    pub fn of(sensor: Result<Box<dyn PowerSensor>, Absent>) -> Self {
        let info = sensor.as_ref().ok().map(|sensor| sensor.info());
        let reason = sensor.as_ref().err().map_or("not_asked", |absent| &absent.reason).to_owned();
        PowerMeter {
            sensor,
            info,
            idle_no_context: Maybe::missing(&*reason),
            idle_context_resident: Maybe::missing(&*reason),
            idle_after_load: Maybe::missing(&*reason),
        }
    }

    /// Why there is no sensor.
    pub fn absence(&self) -> Option<&Absent> {
        self.sensor.as_ref().err()
    }

    /// Longest update period of a counter; 0 without one.
    pub fn period_ns(&self) -> u64 {
        self.info.as_ref().map_or(0, SensorInfo::period_ns)
    }

    /// The trace was made up or belongs to another run, so that energy from it is no measurement.
    pub fn is_replay(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.source == "replay")
    }

    pub fn begin(&mut self, clock: &Clock) {
        if let Ok(sensor) = &mut self.sensor {
            sensor.begin(clock);
        }
    }

    pub fn end(&mut self) {
        if let Ok(sensor) = &mut self.sensor {
            sensor.end();
        }
    }

    /// The energy and the conditions of the window that began with [`PowerMeter::begin`].
    pub fn collect(&mut self, clock: &Clock, window: &Measured<'_>) -> (Maybe<Energy>, Conditions) {
        let (sensor, info) = match (&mut self.sensor, &self.info) {
            (Ok(sensor), Some(info)) => (sensor, info),
            (Err(absent), _) => {
                return (Maybe::missing(&*absent.reason), Conditions::missing(&absent.reason));
            }
            (Ok(_), None) => return (Maybe::missing("no_sensor"), Conditions::missing("no_sensor")),
        };
        let samples = sensor.collect(clock, (window.t0_ns, window.t1_ns));
        (assess(info, &samples, window).into(), conditions_in(&samples))
    }

    /// Clocks and temperature alone since [`PowerMeter::begin`].
    pub fn conditions(&mut self, clock: &Clock, window_ns: (u64, u64)) -> Conditions {
        match &mut self.sensor {
            Ok(sensor) => conditions_in(&sensor.collect(clock, window_ns)),
            Err(absent) => Conditions::missing(&absent.reason),
        }
    }

    /// CPU time of the thread that has read the sensor since [`PowerMeter::begin`].
    pub fn sampler_cpu_ns(&mut self, clock: &Clock, window_ns: (u64, u64)) -> Maybe<u64> {
        match &mut self.sensor {
            Ok(sensor) => sensor.collect(clock, window_ns).sampler_cpu_ns,
            Err(absent) => Maybe::missing(&*absent.reason),
        }
    }

    /// The device's temperature, watched for `TEMPERATURE_NS`.
    pub fn temperature_c(&mut self, clock: &Clock) -> Maybe<f64> {
        self.begin(clock);
        let t0_ns = clock.now_ns();
        clock.sleep_until_ns(t0_ns + TEMPERATURE_NS);
        self.end();
        self.conditions(clock, (t0_ns, clock.now_ns())).temperature.map(|shown| shown.end_c)
    }

    /// Watches the device while nothing uses it, before this program has touched it.
    pub fn observe_idle_without_context(&mut self, clock: &Clock, duration_ns: u64) {
        self.idle_no_context = self.observe_idle(clock, duration_ns);
        if let (Some(info), Some(idle)) = (&mut self.info, self.idle_no_context.value()) {
            info.idle_floor_w = Some(idle.power_w - idle.uncertainty_w);
        }
    }

    /// Watches the device with the weights resident and nothing running.
    pub fn observe_idle_with_context(&mut self, clock: &Clock, duration_ns: u64) {
        self.idle_context_resident = self.observe_idle(clock, duration_ns);
        self.idle_after_load = Maybe::missing("not_reached");
    }

    /// Watches the device from now on, when its load has just ended.
    pub fn observe_idle_after_load(&mut self, clock: &Clock, duration_ns: u64) {
        self.idle_after_load = self.observe_idle(clock, duration_ns);
    }

    fn observe_idle(&mut self, clock: &Clock, duration_ns: u64) -> Maybe<IdlePower> {
        let (sensor, info) = match (&mut self.sensor, &self.info) {
            (Ok(sensor), Some(info)) => (sensor, info),
            (Err(absent), _) => return Maybe::missing(&*absent.reason),
            (Ok(_), None) => return Maybe::missing("no_sensor"),
        };
        sensor.begin(clock);
        let t0_ns = clock.now_ns();
        clock.sleep_until_ns(t0_ns + duration_ns);
        let t1_ns = clock.now_ns();
        sensor.end();
        let samples = sensor.collect(clock, (t0_ns, t1_ns));
        let idle = mean_power(info, &samples, t0_ns, t1_ns);
        let parts = (0..IDLE_PARTS).map(|part| {
            let edge_ns = |part: u64| t0_ns + (t1_ns - t0_ns) * part / IDLE_PARTS;
            mean_power(info, &samples, edge_ns(part), edge_ns(part + 1)).map(|(power_w, _)| power_w)
        });
        let parts_w: Maybe<Vec<f64>> = parts.collect::<Result<_, _>>().into();
        let duration_ns = t1_ns - t0_ns;
        idle.map(|(power_w, uncertainty_w)| IdlePower { power_w, uncertainty_w, duration_ns, parts_w }).into()
    }

    /// What the record says of the sensor.
    pub fn record(&self) -> Meter {
        let missing = || Maybe::missing(self.absence().map_or("no_sensor", |absent| &absent.reason));
        let Some(info) = &self.info else {
            return Meter {
                source: missing(),
                scope: missing(),
                devices: Maybe::missing("no_sensor"),
                systematic_share: Maybe::missing("no_sensor"),
                trace: Maybe::missing("no_sensor"),
                idle_no_context: self.idle_no_context.clone(),
                idle_context_resident: self.idle_context_resident.clone(),
                idle_after_load: self.idle_after_load.clone(),
            };
        };
        Meter {
            source: Maybe::Value(info.source.to_owned()),
            scope: Maybe::Value(info.scope.to_owned()),
            devices: Maybe::Value(info.devices.clone()),
            systematic_share: info.systematic_share.clone(),
            trace: info.trace.clone(),
            idle_no_context: self.idle_no_context.clone(),
            idle_context_resident: self.idle_context_resident.clone(),
            idle_after_load: self.idle_after_load.clone(),
        }
    }
}

/// Of the first device.
fn conditions_in(samples: &Samples) -> Conditions {
    match samples.series.first() {
        Some(series) if !series.states.is_empty() => conditions(&series.states),
        _ => Conditions::missing("no_sensor"),
    }
}

fn nvml(gpus: &[GpuId], clock: &Clock) -> Result<Box<dyn PowerSensor>, Absent> {
    let sensor = Library::open_default()?.sensor(gpus, clock)?;
    Ok(Box::new(sensor))
}

fn boxed_rapl(rapl: Rapl) -> Box<dyn PowerSensor> {
    Box::new(rapl.sensor())
}

fn boxed_hwmon(hwmon: Hwmon) -> Box<dyn PowerSensor> {
    Box::new(hwmon.sensor())
}
