//! Power of Grace sockets (`/sys/class/hwmon`): the module, the Grace processor, its cores, its I/O. There is no energy
//! counter, so power is integrated.

use std::path::{Path, PathBuf};

use super::samples::Reason;
use super::{Absent, Gauge, Quantity, Sampled, SensorInfo, sysfs};
use crate::record::{Maybe, MeteredDevice};

/// The sensors average over tens of milliseconds and jump; short windows say little.
const SHORTEST_WINDOW_NS: u64 = 10_000_000_000;
/// From the widest scope to the narrowest: only one kind is read, since each is part of the one before.
const KINDS: [(&str, &str); 2] = [("Module Power Socket", "module"), ("Grace Power Socket", "package")];

/// Sensors of one kind, one for each socket.
#[derive(Debug)]
pub struct Hwmon {
    scope: &'static str,
    sockets: Vec<Socket>,
}

#[derive(Debug)]
struct Socket {
    name: String,
    folder: PathBuf,
}

impl Hwmon {
    /// The widest kind of sensor that is there.
    ///
    /// # Errors
    /// `no_hwmon_power`, or why a sensor could not be read.
    pub fn open(class: &Path) -> Result<Self, Absent> {
        let found: Vec<Socket> =
            sysfs::entries(class, "hwmon").iter().filter_map(|hwmon| socket(hwmon)).collect();
        for (prefix, scope) in KINDS {
            let sockets: Vec<Socket> = found
                .iter()
                .filter(|socket| socket.name.starts_with(prefix))
                .map(|socket| Socket { name: socket.name.clone(), folder: socket.folder.clone() })
                .collect();
            if sockets.is_empty() {
                continue;
            }
            let mut hwmon = Hwmon { scope, sockets };
            for device in 0..hwmon.sockets.len() {
                hwmon.power_w(device).map_err(|reason| {
                    let place = hwmon.sockets[device].folder.join("power1_average");
                    Absent::new(&reason, format!("{}: {}", place.display(), reason.replace('_', " ")))
                })?;
            }
            return Ok(hwmon);
        }
        Err(Absent::new(
            "no_hwmon_power",
            format!("no power sensor of a Grace socket in {}", class.display()),
        ))
    }

    pub fn sensor(self) -> Sampled {
        let device = |socket: &Socket| MeteredDevice {
            device: socket.name.clone(),
            update_period_ns: Maybe::missing("no_counter"),
            power_limit_w: sysfs::number(&socket.folder.join("power1_cap"))
                .map(|cap_uw| cap_uw as f64 / 1e6)
                .into(),
            shared: Maybe::missing("not_known"),
        };
        let info = SensorInfo {
            source: "hwmon",
            scope: self.scope,
            quantity: Quantity::Power,
            devices: self.sockets.iter().map(device).collect(),
            systematic_share: Maybe::missing("not_known"),
            shortest_window_ns: SHORTEST_WINDOW_NS,
            idle_floor_w: None,
            trace: Maybe::missing("no_trace"),
        };
        Sampled::new(Box::new(self), info)
    }
}

/// A sensor that says which socket it belongs to. Its files are in `device` or beside it, as kernels differ.
fn socket(hwmon: &Path) -> Option<Socket> {
    [hwmon.join("device"), hwmon.to_path_buf()].into_iter().find_map(|folder| {
        let name = sysfs::text(&folder.join("power1_oem_info")).ok()?;
        Some(Socket { name, folder })
    })
}

impl Gauge for Hwmon {
    fn counter_uj(&mut self, _device: usize) -> Result<u64, Reason> {
        Err("no_counter".to_owned())
    }

    fn power_w(&mut self, device: usize) -> Result<f64, Reason> {
        let power_uw = sysfs::number(&self.sockets[device].folder.join("power1_average"))?;
        Ok(power_uw as f64 / 1e6)
    }
}
