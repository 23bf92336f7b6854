//! What the machine is and how busy it is: fills [`crate::record::machine`] from `/proc`, `/sys`, a few files of the
//! distribution and the CUDA driver library. Decides nothing; a value that cannot be read is recorded with a reason.
//!
//! Reason codes: `not_found`, `permission`, `unreadable` (another I/O error), `empty`, `malformed`, `unlimited` (no
//! limit is set), and those that single collectors name.

mod cpu;
mod cpu_check;
mod driver_load;
pub(crate) mod files;
mod gpu;
mod gpu_watch;
mod host;
mod interference;
mod kernel_log;
mod limits;
mod memory;
mod share;
mod software;
#[cfg(test)]
pub(crate) mod tests;

pub use cpu_check::unsupported_cpu;
pub use driver_load::{DriverLoad, driver_load};
pub use gpu_watch::{GpuWatch, Readings};
pub use interference::{observe, warning};
pub use share::CpuSnapshot;

use std::path::{Path, PathBuf};

use crate::backend::cuda::library;
use crate::backend::peaks::HostMemory;
use crate::meter::Absent;
use crate::meter::nvml::Library;
use crate::record::machine::Machine;

/// Where the files that describe the machine are; tests point it at a tree of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// `/`
    pub root: PathBuf,
    /// `/proc`
    pub proc: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
}

impl Roots {
    /// The tree below `root`, with `proc` and `sys` in their usual places.
    pub fn under(root: impl AsRef<Path>) -> Self {
        let root = root.as_ref();
        Roots { root: root.to_path_buf(), proc: root.join("proc"), sys: root.join("sys") }
    }
}

impl Default for Roots {
    fn default() -> Self {
        Roots::under("/")
    }
}

/// What probes of the host's memory must know: cache and available memory, within the control group's limit.
pub fn host_memory(roots: &Roots) -> HostMemory {
    let available = memory::collect(roots).available_bytes;
    let limit = limits::collect(roots).cgroup_memory_bytes.into_value().unwrap_or(u64::MAX);
    HostMemory {
        last_level_cache_bytes: cpu::collect(roots).last_level_cache_bytes,
        available_bytes: available.map(|bytes| bytes.min(limit)),
    }
}

/// Whether the kernel's log can be read: GPU faults and the driver's load stand in it.
///
/// # Errors
/// Reason code.
pub fn kernel_log_access(roots: &Roots) -> Result<(), files::Reason> {
    kernel_log::KernelLog::read(roots).map(drop)
}

/// What the processor calls itself.
pub fn cpu_name(roots: &Roots) -> String {
    cpu::collect(roots).model.into_value().unwrap_or_else(|| "unknown processor".to_owned())
}

/// Describes the machine and this program. Hashes the executable and asks the CUDA driver and NVML for their devices,
/// without computing on one; everything else is a few hundred small files.
pub fn capture(roots: &Roots, nvml: &Result<Library, Absent>) -> Machine {
    let nvml = nvml.as_ref().map_err(|absent| absent.reason.clone());
    let cuda_version = library::driver_version();
    Machine {
        host: host::collect(roots),
        cpu: cpu::collect(roots),
        memory: memory::collect(roots),
        limits: limits::collect(roots),
        load: host::load(roots),
        software: software::collect(roots),
        env: software::environment(|name| std::env::var_os(name)),
        gpu_driver: gpu::driver(roots, cuda_version, nvml.clone()),
        gpus: gpu::devices(library::devices().unwrap_or_default(), nvml),
    }
}
