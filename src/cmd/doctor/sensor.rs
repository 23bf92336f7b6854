//! Findings about power sensors, and about the folder that models are kept in.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::Section;
use crate::backend::cuda::library::Found;
use crate::machine::Roots;
use crate::machine::files::{self, Reason};
use crate::meter::nvml::Library;
use crate::meter::rapl_remedy;
use crate::units::format_bytes;
use crate::weights::fetch;

/// Less than this leaves no room for the default model and a second one.
const LITTLE_DISK_BYTES: u64 = 1 << 30;

pub(super) fn power(roots: &Roots, libraries: &[Found]) -> Section {
    let mut section = Section::new("sensors");
    rapl(&mut section, &roots.sys.join("class/powercap"));
    hwmon(&mut section, &roots.sys.join("class/hwmon"));
    match libraries.iter().find(|file| file.library == "libnvidia-ml.so") {
        Some(file) => nvml(&mut section, &file.path),
        None => section.missing(
            "NVML (GPU power)",
            "libnvidia-ml.so.1 not found",
            Some("install the NVIDIA driver; in a container, start it with --gpus all"),
        ),
    }
    section
}

/// The library may be there and still not talk to its driver.
fn nvml(section: &mut Section, path: &Path) {
    match Library::open(path.as_os_str()) {
        Ok(library) => {
            let driver = library.driver_version.unwrap_or_else(|reason| reason.replace('_', " "));
            section.ok("NVML (GPU power)", format!("{}, driver {driver}", path.display()));
        }
        Err(absent) => {
            section.missing("NVML (GPU power)", absent.to_string(), absent.remedy.as_deref());
        }
    }
}

/// Energy counters of the processor packages; readable only by root unless an administrator says otherwise.
fn rapl(section: &mut Section, powercap: &Path) {
    let zones = zones(powercap);
    let counter = |zone: &PathBuf| files::parse::<u64>(zone.join("energy_uj"));
    let name = |zone: &PathBuf| files::read(zone.join("name")).unwrap_or_else(|_| "unnamed".to_owned());
    let names = zones.iter().map(name).collect::<Vec<_>>().join(", ");
    match zones.iter().map(counter).collect::<Result<Vec<u64>, Reason>>() {
        Ok(_) if zones.is_empty() => section.missing(
            "RAPL (CPU energy)",
            "no powercap zone",
            Some("sudo modprobe intel_rapl_msr (virtual machines and Arm have none)"),
        ),
        Ok(_) => section.ok("RAPL (CPU energy)", format!("readable: {names}")),
        Err("permission") => {
            section.warn("RAPL (CPU energy)", format!("not readable: {names}"), rapl_remedy(&zones))
        }
        Err(reason) => {
            section.missing("RAPL (CPU energy)", format!("{names}: {}", reason.replace('_', " ")), None)
        }
    }
}

/// The packages and their memory; Intel's and AMD's zones have the same names.
fn zones(powercap: &Path) -> Vec<PathBuf> {
    let mut zones: Vec<PathBuf> = std::fs::read_dir(powercap)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("intel-rapl:"))
        .map(|entry| entry.path())
        .collect();
    zones.sort();
    zones
}

fn hwmon(section: &mut Section, class: &Path) {
    let mut sensors = Vec::new();
    for device in files::numbered(class, "hwmon").unwrap_or_default() {
        let has_power = (1..=8).any(|channel| {
            ["input", "average"].iter().any(|kind| device.join(format!("power{channel}_{kind}")).exists())
        });
        if has_power {
            sensors.push(files::read(device.join("name")).unwrap_or_else(|_| "unnamed".to_owned()));
        }
    }
    if sensors.is_empty() {
        section.missing("hwmon (board power)", "no sensor of power", None);
    } else {
        section.ok("hwmon (board power)", sensors.join(", "));
    }
}

pub(super) fn models(variable: &dyn Fn(&str) -> Option<OsString>) -> Section {
    let mut section = Section::new("models");
    let Ok(folder) = fetch::cache_folder(variable) else {
        section.missing("cache folder", "HOME is not set", Some("set TOKMETER_CACHE to a folder"));
        return section;
    };
    let state = if folder.is_dir() { "" } else { " (made by the first download)" };
    section.ok("cache folder", format!("{}{state}", folder.display()));
    // The folder's disk is that of the nearest folder that exists.
    match folder.ancestors().find_map(|folder| rustix::fs::statvfs(folder).ok()) {
        Some(disk) => free_disk(&mut section, disk.f_bavail.saturating_mul(disk.f_frsize)),
        None => section.missing("free disk space", "this system does not tell", None),
    }
    section
}

fn free_disk(section: &mut Section, free_bytes: u64) {
    if free_bytes < LITTLE_DISK_BYTES {
        let remedy = "free some, or set TOKMETER_CACHE to a folder on another disk";
        section.warn("free disk space", format_bytes(free_bytes), remedy);
    } else {
        section.ok("free disk space", format_bytes(free_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn sensors_of(files: &[(&str, &str)]) -> Section {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        power(&Roots::under(dir.path()), &[])
    }

    #[test]
    fn a_machine_without_sensors_has_three_missing_ones() {
        let section = sensors_of(&[]);
        assert_eq!(section.findings.len(), 3);
        assert!(section.findings.iter().all(|finding| finding.status == Status::Missing));
    }

    #[test]
    fn readable_zones_and_power_sensors_are_named() {
        let section = sensors_of(&[
            ("sys/class/powercap/intel-rapl:0/name", "package-0\n"),
            ("sys/class/powercap/intel-rapl:0/energy_uj", "12345\n"),
            ("sys/class/powercap/intel-rapl/enabled", "1"),
            ("sys/class/hwmon/hwmon0/name", "coretemp"),
            ("sys/class/hwmon/hwmon1/name", "grace_module"),
            ("sys/class/hwmon/hwmon1/power1_average", "1"),
        ]);
        assert_eq!(
            (section.findings[0].status, section.findings[0].value.as_str()),
            (Status::Ok, "readable: package-0")
        );
        assert_eq!(
            (section.findings[1].status, section.findings[1].value.as_str()),
            (Status::Ok, "grace_module")
        );
    }

    #[test]
    fn a_zone_without_permission_comes_with_the_exact_commands() {
        let remedy = rapl_remedy(&[
            "/sys/class/powercap/intel-rapl:0".into(),
            "/sys/class/powercap/intel-rapl:1".into(),
        ]);
        let expected = "sudo chmod a+r /sys/class/powercap/intel-rapl:0/energy_uj \
            /sys/class/powercap/intel-rapl:1/energy_uj (until the next boot), or sudo setcap cap_dac_read_search+ep /";
        assert!(remedy.starts_with(expected), "{remedy}");
    }

    #[test]
    fn a_broken_counter_is_not_a_sensor() {
        let section = sensors_of(&[
            ("sys/class/powercap/intel-rapl:0/name", "package-0"),
            ("sys/class/powercap/intel-rapl:0/energy_uj", "lots"),
        ]);
        assert_eq!(section.findings[0].status, Status::Missing);
        assert_eq!(section.findings[0].value, "package-0: malformed");
    }

    #[test]
    fn little_disk_space_is_a_warning() {
        let mut section = Section::new("models");
        free_disk(&mut section, 1000);
        free_disk(&mut section, 5 << 30);
        assert_eq!(
            section.findings.iter().map(|finding| finding.status).collect::<Vec<_>>(),
            [Status::Warn, Status::Ok]
        );
    }
}
