//! NVIDIA GPUs through NVML, the library that comes with the driver. The energy counter comes first; without it power is
//! integrated, and on superchips whose GPU alone gives no power the whole module's. The library is loaded when it is
//! asked for and stays loaded.

mod environment;
mod fields;
mod raw;

use std::ffi::OsStr;
use std::path::Path;

use nvml_wrapper::enum_wrappers::device::{Clock as ClockKind, TemperatureSensor};
use nvml_wrapper::{Device, Nvml};

pub use environment::Described;
pub use fields::{Field, Numbering};
use raw::Scope;

use super::sampler::measure_period;
use super::samples::{Reason, State};
use super::{Absent, Gauge, Quantity, Sampled, SensorInfo};
use crate::backend::cuda::library;
use crate::clock::Clock;
use crate::record::{Maybe, MeteredDevice};

/// Names the library's file; for tests, and for drivers in unusual places.
pub const LIBRARY_VARIABLE: &str = "TOKMETER_NVML";
/// A sensor's gain is off by about this much, differently for each board (Yang et al., SC'24).
const SYSTEMATIC_SHARE: f64 = 0.05;
const SHORTEST_WINDOW_NS: u64 = 10_000_000_000;
/// Temperatures that a working GPU can have, °C.
const POSSIBLE_C: std::ops::RangeInclusive<i32> = -40..=150;

/// GPUs that are read, in the order that was asked for.
pub struct NvmlGauge {
    gpus: Vec<Gpu>,
}

struct Gpu {
    device: Device<'static>,
    numbering: Numbering,
    /// What the power field is asked for; `None` where it gives nothing.
    scope: Option<Scope>,
}

/// A GPU by the name that records use and its UUID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuId {
    /// `cuda:0`
    pub name: String,
    /// `GPU-…`
    pub uuid: String,
}

/// The library, opened once.
pub struct Library {
    nvml: &'static Nvml,
    pub driver_version: Result<String, Reason>,
}

impl Library {
    /// The library that [`LIBRARY_VARIABLE`] names, else the driver's own where it is found.
    ///
    /// # Errors
    /// `no_nvml`, `driver_not_loaded`, `no_permission`, … with the remedy.
    pub fn open_default() -> Result<Self, Absent> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        if let Some(path) = variable(LIBRARY_VARIABLE) {
            return Self::open(&path);
        }
        let found = library::search(Path::new("/"), &variable);
        let file =
            found.iter().find(|file| file.library == "libnvidia-ml.so").map(|file| file.path.as_os_str());
        Self::open(file.unwrap_or_else(|| OsStr::new("libnvidia-ml.so.1")))
    }

    /// The library at this path.
    ///
    /// # Errors
    /// As [`Library::open_default`].
    pub fn open(path: &OsStr) -> Result<Self, Absent> {
        let nvml = Nvml::builder().lib_path(path).init().map_err(|error| {
            let reason = raw::reason(&error);
            let absent = Absent::new(&reason, format!("NVML ({}): {error}", path.display()));
            match remedy(&reason) {
                Some(remedy) => absent.with_remedy(remedy),
                None => absent,
            }
        })?;
        let driver_version = nvml.sys_driver_version().map_err(|error| raw::reason(&error));
        // Devices borrow the library for the rest of the program.
        Ok(Library { nvml: Box::leak(Box::new(nvml)), driver_version })
    }

    fn numbering(&self) -> Numbering {
        self.driver_version.as_deref().map_or(Numbering::Unknown, Numbering::of)
    }

    /// All GPUs that the library shows, as `gpu:N`.
    ///
    /// # Errors
    /// The library's own.
    pub fn all(&self) -> Result<Vec<GpuId>, Absent> {
        let count =
            self.nvml.device_count().map_err(|error| absent("the number of GPUs", &raw::reason(&error)))?;
        let gpu = |index: u32| {
            let uuid = self.nvml.device_by_index(index).and_then(|device| device.uuid());
            let uuid = uuid.map_err(|error| absent(&format!("gpu:{index}"), &raw::reason(&error)))?;
            Ok(GpuId { name: format!("gpu:{index}"), uuid })
        };
        (0..count).map(gpu).collect()
    }

    /// A sensor over these GPUs, read in the same thread over the same time. Takes a second for each, to see how often
    /// its counter is updated.
    ///
    /// # Errors
    /// When one of them gives neither energy nor power, or all of them do not give the same kind.
    pub fn sensor(&self, gpus: &[GpuId], clock: &Clock) -> Result<Sampled, Absent> {
        let (gauge, info) = self.gauge(gpus, clock)?;
        Ok(Sampled::new(Box::new(gauge), info))
    }

    /// The same without a thread.
    ///
    /// # Errors
    /// As [`Library::sensor`].
    pub fn gauge(&self, gpus: &[GpuId], clock: &Clock) -> Result<(NvmlGauge, SensorInfo), Absent> {
        let gpu = |id: &GpuId| {
            let device = self.nvml.device_by_uuid(id.uuid.as_str());
            let device = device.map_err(|error| absent(&id.name, &raw::reason(&error)))?;
            let mut gpu = Gpu { device, numbering: self.numbering(), scope: None };
            gpu.scope = [Scope::Gpu, Scope::Module].into_iter().find(|scope| gpu.power_mw(*scope).is_ok());
            Ok(gpu)
        };
        let gpus_found = gpus.iter().map(gpu).collect::<Result<Vec<Gpu>, Absent>>()?;
        let mut gauge = NvmlGauge { gpus: gpus_found };
        let kind = gauge.kind(gpus)?;
        let devices =
            gpus.iter().enumerate().map(|(index, id)| gauge.describe(index, id, kind, clock)).collect();
        gauge.keep_scope(kind);
        let info = SensorInfo {
            source: kind.source(),
            scope: kind.scope(),
            quantity: kind.quantity(),
            devices,
            systematic_share: Maybe::Value(SYSTEMATIC_SHARE),
            shortest_window_ns: SHORTEST_WINDOW_NS,
            idle_floor_w: None,
            trace: Maybe::missing("no_trace"),
        };
        Ok((gauge, info))
    }
}

fn absent(what: &str, reason: &str) -> Absent {
    let absent = Absent::new(reason, format!("NVML: {what}: {}", reason.replace('_', " ")));
    match remedy(reason) {
        Some(remedy) => absent.with_remedy(remedy),
        None => absent,
    }
}

/// What mends it, where something does.
pub fn remedy(reason: &str) -> Option<&'static str> {
    match reason {
        "no_nvml" => Some("install the NVIDIA driver; in a container, start it with --gpus all"),
        "driver_not_loaded" => Some("sudo modprobe nvidia"),
        "no_permission" => Some("add this user to the group of /dev/nvidiactl, or run as root"),
        "driver_library_mismatch" => {
            Some("reboot: the driver was updated and its kernel module was not loaded anew")
        }
        "not_supported" => Some(
            "ask the administrator: virtual GPUs often hide power; --power csv:FILE takes an external meter",
        ),
        "gpu_is_lost" | "gpu_needs_reset" => Some("sudo nvidia-smi --gpu-reset, or reboot"),
        _ => None,
    }
}

/// What all the GPUs give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Power(Scope),
}

impl Kind {
    fn source(self) -> &'static str {
        match self {
            Kind::Counter => "nvml_total_energy",
            Kind::Power(Scope::Gpu) => "nvml_power_integrated",
            Kind::Power(Scope::Module) => "nvml_module",
        }
    }

    fn scope(self) -> &'static str {
        match self {
            Kind::Counter | Kind::Power(Scope::Gpu) => "gpu",
            Kind::Power(Scope::Module) => "module",
        }
    }

    fn quantity(self) -> Quantity {
        match self {
            Kind::Counter => Quantity::TickingCounter,
            Kind::Power(_) => Quantity::Power,
        }
    }
}

impl Gpu {
    fn energy_uj(&self) -> Result<u64, Reason> {
        let energy_mj = self.device.total_energy_consumption().map_err(|error| raw::reason(&error))?;
        energy_mj.checked_mul(1000).ok_or_else(|| "answer_of_another_type".to_owned())
    }

    fn power_mw(&self, scope: Scope) -> Result<u64, Reason> {
        raw::field(&self.device, self.id(Field::PowerInstant)?, scope)
    }

    fn id(&self, field: Field) -> Result<u32, Reason> {
        self.numbering.id(field).ok_or_else(|| "driver_version_unknown".to_owned())
    }

    fn time_ns(&self, field: Field) -> Result<u64, Reason> {
        raw::field(&self.device, self.id(field)?, Scope::Gpu)
    }

    fn clock_mhz(&self, kind: ClockKind) -> Result<u32, Reason> {
        self.device.clock_info(kind).map_err(|error| raw::reason(&error))
    }

    fn temperature_c(&self) -> Result<f64, Reason> {
        let withdrawn = || self.device.temperature(TemperatureSensor::Gpu).map(|c| c as i32);
        let temperature_c =
            raw::temperature_c(&self.device).or_else(|_| withdrawn().map_err(|error| raw::reason(&error)))?;
        if POSSIBLE_C.contains(&temperature_c) {
            Ok(f64::from(temperature_c))
        } else {
            Err("implausible".to_owned())
        }
    }

    /// Partitioned, or with a process on it; asked before this one opens the device.
    fn is_shared(&self) -> Result<bool, Reason> {
        // A GPU that knows no partitions has none.
        let is_partitioned = self.device.mig_mode().is_ok_and(|mode| mode.current != 0);
        let processes = self.device.running_compute_processes_count();
        match (is_partitioned, processes) {
            (true, _) => Ok(true),
            (false, Ok(processes)) => Ok(processes > 0),
            (false, Err(error)) => Err(raw::reason(&error)),
        }
    }
}

impl NvmlGauge {
    /// The best that all GPUs give alike.
    fn kind(&self, ids: &[GpuId]) -> Result<Kind, Absent> {
        let mut reason = "not_supported".to_owned();
        let counts = |gpu: &Gpu| gpu.energy_uj();
        match self.gpus.iter().map(counts).collect::<Result<Vec<u64>, Reason>>() {
            Ok(_) if !self.gpus.is_empty() => return Ok(Kind::Counter),
            Ok(_) => reason = "no_gpu".to_owned(),
            Err(code) => reason = if code.is_empty() { reason } else { code },
        }
        for scope in [Scope::Gpu, Scope::Module] {
            if !self.gpus.is_empty() && self.gpus.iter().all(|gpu| gpu.power_mw(scope).is_ok()) {
                return Ok(Kind::Power(scope));
            }
        }
        let names: Vec<&str> = ids.iter().map(|id| id.name.as_str()).collect();
        Err(absent(&format!("energy and power of {}", names.join(", ")), &reason))
    }

    fn describe(&mut self, index: usize, id: &GpuId, kind: Kind, clock: &Clock) -> MeteredDevice {
        let limit_mw = self.gpus[index].device.enforced_power_limit().map_err(|error| raw::reason(&error));
        let shared = self.gpus[index].is_shared();
        let period_ns = match kind {
            Kind::Counter => measure_period(self, clock, index),
            Kind::Power(_) => Err("no_counter".to_owned()),
        };
        // The limit of a GPU says nothing about the module around it.
        let power_limit_w = match kind {
            Kind::Power(Scope::Module) => Err("not_known".to_owned()),
            _ => limit_mw.map(|limit_mw| f64::from(limit_mw) / 1e3),
        };
        MeteredDevice {
            device: id.name.clone(),
            update_period_ns: period_ns.into(),
            power_limit_w: power_limit_w.into(),
            shared: shared.into(),
        }
    }

    /// Power of a wider scope is no witness for a counter of the GPU.
    fn keep_scope(&mut self, kind: Kind) {
        let allowed = if let Kind::Power(scope) = kind { scope } else { Scope::Gpu };
        for gpu in &mut self.gpus {
            gpu.scope = gpu.scope.map(|_| allowed).filter(|scope| gpu.power_mw(*scope).is_ok());
        }
    }
}

impl Gauge for NvmlGauge {
    fn counter_uj(&mut self, device: usize) -> Result<u64, Reason> {
        self.gpus[device].energy_uj()
    }

    fn power_w(&mut self, device: usize) -> Result<f64, Reason> {
        let gpu = &self.gpus[device];
        let scope = gpu.scope.ok_or_else(|| "not_supported".to_owned())?;
        Ok(gpu.power_mw(scope)? as f64 / 1e3)
    }

    fn state(&mut self, device: usize) -> Option<State> {
        let gpu = &self.gpus[device];
        Some(State {
            sm_mhz: gpu.clock_mhz(ClockKind::SM),
            memory_mhz: gpu.clock_mhz(ClockKind::Memory),
            temperature_c: gpu.temperature_c(),
            reasons_mask: raw::clock_reasons(&gpu.device),
            software_power_cap_ns: gpu.time_ns(Field::SoftwarePowerCap),
            software_thermal_ns: gpu.time_ns(Field::SoftwareThermal),
            hardware_thermal_ns: gpu.time_ns(Field::HardwareThermal),
            hardware_power_brake_ns: gpu.time_ns(Field::HardwarePowerBrake),
        })
    }
}
