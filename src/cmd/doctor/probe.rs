//! What power sensors are like (`--sensors`): found out by reading them, and where a device was named under a load that is
//! switched on and off.

use anyhow::Context as _;
use serde::Serialize;

use super::{Asked, Section};
use crate::backend::{Backend, Cpu, CpuDType, Cuda, CudaOptions};
use crate::clock::Clock;
use crate::cmd::device;
use crate::cmd::model::config_of;
use crate::machine::Roots;
use crate::meter::duty::{DutyStep, UnderLoad, probe_under_load, under_load};
use crate::meter::nvml::{GpuId, Library};
use crate::meter::probe::{Probe, probe};
use crate::meter::{Absent, Gauge, PowerSensor as _, Rapl, Reason, Sampled, SensorInfo};
use crate::model::shape_of;
use crate::record::Maybe;
use crate::units::{format_ns, format_significant};
use crate::weights::registry::DEFAULT_MODEL;

/// Counter and integrated power, and a whole and its parts, should agree this well.
const AGREEMENT: f64 = 0.05;
const ADDITIVITY: f64 = 0.001;
/// Power over the time that a load is on should be as straight as this.
const LINEARITY_R2: f64 = 0.999;
/// Reason where a sensor was only read.
const NO_LOAD: &str = "needs_a_load";
const MISTRUST: &str = "do not compare energy from this sensor before this is understood";

/// What is known of one sensor, for files.
#[derive(Debug, Serialize)]
pub(super) struct SensorProbe {
    /// `cuda:0`, `gpu:0` or `package-0`
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_a_measurement: Option<String>,
    source: &'static str,
    scope: &'static str,
    /// Others use the device too.
    shared: Maybe<bool>,
    /// What the device did meanwhile: `read` (its memory, as fast as it can) or `product`.
    load: Maybe<&'static str>,
    update_period_ns: Maybe<u64>,
    /// The largest unit that divides every step of the counter.
    resolution_uj: Maybe<u64>,
    call_median_ns: Maybe<u64>,
    call_p99_ns: Maybe<u64>,
    counter_over_power_ratio: Maybe<f64>,
    additivity_error_ratio: Maybe<f64>,
    average_width_ns: Maybe<u64>,
    /// Period of the load that showed the width.
    width_load_period_ns: Maybe<u64>,
    linearity_r2: Maybe<f64>,
    steps: Maybe<Vec<DutyStep>>,
}

/// The asked device's sensor under load; for `auto` every GPU's, by reading alone.
///
/// # Errors
/// When what the environment switches off makes no sense.
pub(super) fn sensors(
    asked: Asked,
    roots: &Roots,
    step_ns: u64,
) -> anyhow::Result<(Section, Vec<SensorProbe>)> {
    let mut section = Section::new("sensor probe");
    let clock = Clock::monotonic();
    let probes = match asked {
        Asked::Auto => every_gpu(&mut section, &clock),
        Asked::Cpu => cpu(&mut section, roots, &clock, step_ns),
        Asked::Cuda(index) => {
            let options = device::plain_cuda_options()?;
            gpu(&mut section, (index, options), &clock, step_ns)
        }
    };
    probes.iter().for_each(|found| report(&mut section, found));
    Ok((section, probes))
}

fn missing(section: &mut Section, what: &str, absent: &Absent) {
    section.missing(what, absent.to_string(), absent.remedy.as_deref());
}

fn every_gpu(section: &mut Section, clock: &Clock) -> Vec<SensorProbe> {
    let found = Library::open_default().and_then(|library| Ok((library.all()?, library)));
    let (gpus, library) = match found {
        Ok((gpus, library)) => (gpus, library),
        Err(absent) => {
            missing(section, "NVML probe", &absent);
            return Vec::new();
        }
    };
    if gpus.is_empty() {
        section.missing("NVML probe", "the driver shows no GPU", None);
    }
    let mut one = |gpu: &GpuId| match library.gauge(std::slice::from_ref(gpu), clock) {
        Ok((mut gauge, info)) => {
            Some(SensorProbe::of(&info, &probe(&mut gauge, clock, &info, 0), None, None))
        }
        Err(absent) => {
            missing(section, &format!("{} power", gpu.name), &absent);
            None
        }
    };
    gpus.iter().filter_map(&mut one).collect()
}

/// A sensor, and what it says of itself.
type Found = (Box<dyn Gauge>, SensorInfo);

/// A load by its name, and whether the device is one.
struct Loaded {
    name: &'static str,
    not_a_measurement: Option<String>,
}

fn gpu(
    section: &mut Section,
    (index, options): (u32, CudaOptions),
    clock: &Clock,
    step_ns: u64,
) -> Vec<SensorProbe> {
    let what = format!("cuda:{index} power");
    let Some(id) = device::gpu_id(index) else {
        section.missing(what, "the device has no identity by which NVML could know it", None);
        return Vec::new();
    };
    let opened = Library::open_default().and_then(|library| library.gauge(std::slice::from_ref(&id), clock));
    let sensor: Found = match opened {
        Ok((gauge, info)) => (Box::new(gauge), info),
        Err(absent) => {
            missing(section, &what, &absent);
            return Vec::new();
        }
    };
    let open = || -> anyhow::Result<(Cuda, Loaded)> {
        let cuda = Cuda::new(index, shape_of(&config_of(DEFAULT_MODEL)?), options)?;
        let not_a_measurement = device::not_a_measurement(&cuda);
        Ok((cuda, Loaded { name: "read", not_a_measurement }))
    };
    of_backend(section, &what, sensor, open, clock, step_ns)
}

fn cpu(section: &mut Section, roots: &Roots, clock: &Clock, step_ns: u64) -> Vec<SensorProbe> {
    let powercap = roots.sys.join("class/powercap");
    let opened = Rapl::open(&powercap).and_then(|gauge| Ok((gauge, Rapl::open(&powercap)?.sensor().info())));
    let sensor: Found = match opened {
        Ok((gauge, info)) => (Box::new(gauge), info),
        Err(absent) => {
            missing(section, "cpu power", &absent);
            return Vec::new();
        }
    };
    let open = || -> anyhow::Result<(Cpu, Loaded)> {
        let cpu = Cpu::new(shape_of(&config_of(DEFAULT_MODEL)?), CpuDType::F32);
        Ok((cpu, Loaded { name: "product", not_a_measurement: None }))
    };
    of_backend(section, "cpu power", sensor, open, clock, step_ns)
}

/// The sensor under this backend's load, or a finding that says why not.
fn of_backend<B: Backend>(
    section: &mut Section,
    what: &str,
    sensor: Found,
    open: impl FnOnce() -> anyhow::Result<(B, Loaded)>,
    clock: &Clock,
    step_ns: u64,
) -> Vec<SensorProbe> {
    let info = sensor.1.clone();
    let probed = open().and_then(|(mut backend, loaded)| {
        let (read, worked) = under(&mut backend, sensor, clock, step_ns)?;
        Ok(SensorProbe::of(&info, &read, Some(&worked), Some(loaded)))
    });
    match probed {
        Ok(found) => vec![found],
        Err(error) => {
            section.missing(what, format!("the load failed: {error:#}"), None);
            Vec::new()
        }
    }
}

fn under<B: Backend>(
    backend: &mut B,
    sensor: Found,
    clock: &Clock,
    step_ns: u64,
) -> anyhow::Result<(Probe, UnderLoad)> {
    let (mut sensor, mut found) = (Some(sensor), None);
    backend.lend_load(&mut |load| {
        let (mut gauge, info) = sensor.take().context("the load was lent twice")?;
        let read = probe_under_load(gauge.as_mut(), clock, &info, load)?;
        let worked = under_load(&mut Sampled::new(gauge, info), clock, load, step_ns)?;
        found = Some((read, worked));
        Ok(())
    })?;
    found.context("the backend lends no load")
}

impl SensorProbe {
    fn of(info: &SensorInfo, read: &Probe, worked: Option<&UnderLoad>, loaded: Option<Loaded>) -> Self {
        let call = |pick: fn(&(u64, u64)) -> u64| read.call_ns.as_ref().map(pick).map_err(Reason::clone);
        let width = match worked {
            Some(worked) => worked.average_width.clone(),
            None => Err(NO_LOAD.to_owned()),
        };
        let (load, not_a_measurement) = match loaded {
            Some(loaded) => (Maybe::Value(loaded.name), loaded.not_a_measurement),
            None => (Maybe::missing("not_asked"), None),
        };
        SensorProbe {
            device: info.devices[0].device.clone(),
            not_a_measurement,
            source: info.source,
            scope: info.scope,
            shared: info.devices[0].shared.clone(),
            load,
            update_period_ns: read.update_period_ns.clone().into(),
            resolution_uj: read.resolution_uj.clone().into(),
            call_median_ns: call(|(median, _)| *median).into(),
            call_p99_ns: call(|(_, late)| *late).into(),
            counter_over_power_ratio: read.counter_over_power.clone().into(),
            additivity_error_ratio: read.additivity_error.clone().into(),
            average_width_ns: width.as_ref().map(|width| width.width_ns).map_err(Reason::clone).into(),
            width_load_period_ns: width.map(|width| width.load_period_ns).into(),
            linearity_r2: worked
                .map_or_else(|| Err(NO_LOAD.to_owned()), |worked| worked.linearity_r2.clone())
                .into(),
            steps: worked.map_or_else(|| Err(NO_LOAD.to_owned()), |worked| worked.steps.clone()).into(),
        }
    }
}

fn report(section: &mut Section, found: &SensorProbe) {
    let named = |what: &str| format!("{} {what}", found.device);
    if let Some(why) = &found.not_a_measurement {
        section.warn(
            named("probe"),
            format!("NOT A MEASUREMENT: {why}"),
            "probe the sensor of a real device",
        );
    }
    section.ok(named("source"), format!("{}, scope {}", found.source, found.scope));
    if found.shared.value() == Some(&true) {
        let remedy = "end the other processes on it, or turn partitioning off";
        section.warn(named("sharing"), "others use it too: its energy is not ours alone", remedy);
    }
    let fine = |text: String| (text, true);
    let mut say = |what: &str, value: Maybe<(String, bool)>| match value {
        Maybe::Value((text, true)) => section.ok(named(what), text),
        Maybe::Value((text, false)) => section.warn(named(what), text, MISTRUST),
        Maybe::Missing(missing) => {
            let remedy = (missing.missing == NO_LOAD).then_some(
                "name the device: doctor --sensors --device cuda:0 puts it under load for minutes",
            );
            section.missing(named(what), missing.missing.replace('_', " "), remedy);
        }
    };
    let time = |ns: &Maybe<u64>| ns.as_ref().map(|ns| fine(format_ns(*ns as f64)));
    say("counter period", time(&found.update_period_ns));
    let unit = |uj: &u64| fine(format!("{} mJ or a part of it", format_significant(*uj as f64 / 1e3)));
    say("counter unit", found.resolution_uj.as_ref().map(unit));
    let late_ns = found.call_p99_ns.value().copied().unwrap_or(0) as f64;
    let calls = |ns: &u64| fine(format!("{} median, {} p99", format_ns(*ns as f64), format_ns(late_ns)));
    say("call", found.call_median_ns.as_ref().map(calls));
    let agree = |ratio: &f64| {
        (format!("counter is {ratio:.4} of integrated power"), (ratio - 1.0).abs() <= AGREEMENT)
    };
    say("counter against power", found.counter_over_power_ratio.as_ref().map(agree));
    let adds_up = |error: &f64| {
        (format!("halves and whole differ by {:.3} %", error * 100.0), error.abs() <= ADDITIVITY)
    };
    say("energy adds up", found.additivity_error_ratio.as_ref().map(adds_up));
    say("width of the power average", time(&found.average_width_ns));
    let straight = |r2: &f64| (format!("R² {r2:.5} over shares of the load"), *r2 > LINEARITY_R2);
    say("energy in proportion to work", found.linearity_r2.as_ref().map(straight));
}
