//! When the GPU driver was loaded: a session is one boot and one load of the driver.

use std::path::Path;
use std::time::UNIX_EPOCH;

use super::Roots;
use super::files::{Reason, number, read};
use super::kernel_log::KernelLog;
use crate::clock::rfc3339_utc;
use crate::record::Maybe;

/// The time, RFC 3339, and what tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverLoad {
    pub at: Maybe<String>,
    /// `kernel_log`, `module_folder` or `boot`
    pub by: Maybe<String>,
}

/// The kernel's log knows it to the second. Folders of `/sys` and `/proc` get their time when somebody first looks at
/// them after the load, mostly at once. Where neither is to be had, the boot is no later than the load.
pub fn driver_load(roots: &Roots) -> DriverLoad {
    let sources = [
        ("kernel_log", by_log(roots)),
        ("module_folder", by_folder(roots)),
        ("boot", boot_s(roots).map(|seconds| u128::from(seconds) * 1_000_000_000)),
    ];
    let mut reason = "not_found";
    for (by, unix_ns) in sources {
        match unix_ns {
            Ok(unix_ns) => {
                return DriverLoad {
                    at: Maybe::Value(rfc3339_utc(unix_ns)),
                    by: Maybe::Value(by.to_owned()),
                };
            }
            Err(code) => reason = code,
        }
    }
    DriverLoad { at: Maybe::missing(reason), by: Maybe::missing(reason) }
}

fn by_log(roots: &Roots) -> Result<u128, Reason> {
    let loaded_us = KernelLog::read(roots)?.driver_loaded_us().ok_or("not_found")?;
    // The boot's own time is known in whole seconds.
    Ok(u128::from(boot_s(roots)?.saturating_add(loaded_us / 1_000_000)) * 1_000_000_000)
}

fn by_folder(roots: &Roots) -> Result<u128, Reason> {
    let folders = [roots.sys.join("module/nvidia"), roots.proc.join("driver/nvidia")];
    folders.iter().filter_map(|folder| changed_ns(folder)).min().ok_or("not_found")
}

fn changed_ns(folder: &Path) -> Option<u128> {
    let time = folder.metadata().ok()?.modified().ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_nanos())
}

/// Unix seconds.
fn boot_s(roots: &Roots) -> Result<u64, Reason> {
    let text = read(roots.proc.join("stat"))?;
    number(text.lines().find_map(|line| line.strip_prefix("btime ")).ok_or("malformed")?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::tree;
    use super::*;

    const STAT: (&str, &str) = ("proc/stat", "cpu  1 2 3 4\nbtime 1700000000\nprocesses 5\n");
    const LOG: (&str, &str) = ("dev/kmsg", "6,1,60900000,-;NVRM: loading NVIDIA UNIX x86_64  580.95.05\n");

    fn load_of(files: &[(&str, &str)]) -> (Option<String>, Option<String>) {
        let dir = tree(files);
        let folder = dir.path().join("sys/module/nvidia");
        if folder.exists() {
            let at = UNIX_EPOCH + Duration::from_millis(1_700_000_100_250);
            std::fs::File::open(folder).unwrap().set_modified(at).unwrap();
        }
        let load = driver_load(&Roots::under(dir.path()));
        (load.by.into_value(), load.at.into_value())
    }

    fn known(by: &str, at: &str) -> (Option<String>, Option<String>) {
        (Some(by.to_owned()), Some(at.to_owned()))
    }

    /// 1 700 000 000 s is 2023-11-14T22:13:20Z.
    #[test]
    fn the_log_is_preferred_to_the_folder_and_the_folder_to_the_boot() {
        let module = ("sys/module/nvidia/version", "580.95.05");
        assert_eq!(load_of(&[STAT, LOG, module]), known("kernel_log", "2023-11-14T22:14:20.000Z"));
        assert_eq!(load_of(&[STAT, module]), known("module_folder", "2023-11-14T22:15:00.250Z"));
        assert_eq!(load_of(&[STAT]), known("boot", "2023-11-14T22:13:20.000Z"));
        assert_eq!(load_of(&[LOG]), (None, None));
    }
}
