//! Energy counters of processor packages (`/sys/class/powercap`): Intel and AMD under the same names. The counters wrap
//! around; the sampler reads them far more often than that happens.

use std::path::{Path, PathBuf};

use super::samples::Reason;
use super::{Absent, Gauge, Quantity, Sampled, SensorInfo, sysfs};
use crate::record::{Maybe, MeteredDevice};

/// The counters are updated about every millisecond.
const AGE_NS: u64 = 2_000_000;
/// Shorter windows hold too few updates.
const SHORTEST_WINDOW_NS: u64 = 1_000_000_000;

/// One package, and the wrap-arounds seen so far.
#[derive(Debug)]
struct Zone {
    name: String,
    counter: PathBuf,
    range_uj: u64,
    /// `None` at the beginning of a window: how often it wrapped around before is not known.
    last_uj: Option<u64>,
    wrapped_uj: u64,
}

/// The packages of this machine.
#[derive(Debug)]
pub struct Rapl {
    zones: Vec<Zone>,
}

impl Rapl {
    /// The packages below `/sys/class/powercap`; sub-zones are part of their package and are not added to it.
    ///
    /// # Errors
    /// `no_powercap`, `permission` with the exact command, or why a zone could not be read.
    pub fn open(powercap: &Path) -> Result<Self, Absent> {
        let is_package = |folder: &PathBuf| {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.matches(':').count() == 1
                && sysfs::text(&folder.join("name")).is_ok_and(|name| name.starts_with("package"))
        };
        let folders: Vec<PathBuf> =
            sysfs::entries(powercap, "intel-rapl:").into_iter().filter(is_package).collect();
        if folders.is_empty() {
            let sentence = format!("no processor package in {}", powercap.display());
            return Err(Absent::new("no_powercap", sentence)
                .with_remedy("sudo modprobe intel_rapl_msr (virtual machines and Arm have none)"));
        }
        let zones = folders.iter().map(|folder| zone(folder)).collect::<Result<Vec<_>, _>>();
        zones.map(|zones| Rapl { zones }).map_err(|(place, reason)| absent(&folders, &place, reason))
    }

    pub fn sensor(self) -> Sampled {
        let device = |zone: &Zone| MeteredDevice {
            device: zone.name.clone(),
            update_period_ns: Maybe::missing("not_measured"),
            power_limit_w: Maybe::missing("not_known"),
            shared: Maybe::missing("not_known"),
        };
        let info = SensorInfo {
            source: "rapl",
            scope: "package",
            quantity: Quantity::FreshCounter { age_ns: AGE_NS },
            devices: self.zones.iter().map(device).collect(),
            systematic_share: Maybe::missing("not_known"),
            shortest_window_ns: SHORTEST_WINDOW_NS,
            idle_floor_w: None,
            trace: Maybe::missing("no_trace"),
        };
        Sampled::new(Box::new(self), info)
    }
}

fn zone(folder: &Path) -> Result<Zone, (PathBuf, &'static str)> {
    let number = |name: &str| sysfs::number(&folder.join(name)).map_err(|reason| (folder.join(name), reason));
    let name = sysfs::text(&folder.join("name")).map_err(|reason| (folder.join("name"), reason))?;
    number("energy_uj")?;
    let range_uj = number("max_energy_range_uj")?;
    Ok(Zone { name, counter: folder.join("energy_uj"), range_uj, last_uj: None, wrapped_uj: 0 })
}

fn absent(folders: &[PathBuf], place: &Path, reason: &'static str) -> Absent {
    let sentence = format!("{}: {}", place.display(), reason.replace('_', " "));
    if reason == "permission" {
        return Absent::new("rapl_permission", sentence).with_remedy(remedy(folders));
    }
    Absent::new(reason, sentence)
}

/// What lets everyone, or this program alone, read the counters of these zones.
pub fn remedy(zones: &[PathBuf]) -> String {
    let counters: Vec<String> =
        zones.iter().map(|zone| zone.join("energy_uj").display().to_string()).collect();
    let program =
        std::env::current_exe().map_or_else(|_| "tokmeter".to_owned(), |path| path.display().to_string());
    format!(
        "sudo chmod a+r {} (until the next boot), or sudo setcap cap_dac_read_search+ep {program}",
        counters.join(" ")
    )
}

impl Gauge for Rapl {
    fn begin(&mut self) {
        self.zones.iter_mut().for_each(|zone| zone.last_uj = None);
    }

    fn counter_uj(&mut self, device: usize) -> Result<u64, Reason> {
        let zone = &mut self.zones[device];
        let now_uj = sysfs::number(&zone.counter)?;
        if let Some(last_uj) = zone.last_uj
            && now_uj < last_uj
        {
            // A counter that was far from its end was set back.
            if last_uj > zone.range_uj || last_uj < zone.range_uj / 2 {
                return Err("counter_reset".to_owned());
            }
            zone.wrapped_uj += zone.range_uj;
        }
        zone.last_uj = Some(now_uj);
        Ok(zone.wrapped_uj + now_uj)
    }

    fn power_w(&mut self, _device: usize) -> Result<f64, Reason> {
        Err("no_power_sensor".to_owned())
    }
}
