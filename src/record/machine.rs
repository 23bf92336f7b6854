//! The `machine` block of a record: what the measurement ran on, as it was found at the start, and what else used the
//! CPU meanwhile. Filled by [`crate::machine`]; a value that could not be read says why.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::environment::{GpuSetup, MappedDriver};
use super::maybe::Maybe;

/// Above this share of all cores' time, other processes count as a disturbance.
pub const QUIET_SHARE: f64 = 0.02;

/// The machine, its limits and its software.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    pub host: Host,
    pub cpu: Cpu,
    pub memory: Memory,
    pub limits: Limits,
    pub load: Load,
    pub software: Software,
    /// Environment variables that change how fast things run, by an explicit list of names; only those that are set.
    pub env: BTreeMap<String, String>,
    pub gpu_driver: GpuDriver,
    /// GPUs that the driver shows, in CUDA's order. When empty, `gpu_driver.cuda_version` says why.
    pub gpus: Vec<Gpu>,
}

/// Operating system and chassis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    pub hostname: Maybe<String>,
    /// `linux`
    pub os: String,
    /// `x86_64` or `aarch64`
    pub architecture: String,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: Maybe<String>,
    /// Kernel build, as `uname -v` prints it.
    pub kernel_build: Maybe<String>,
    pub kernel_cmdline: Maybe<String>,
    /// `PRETTY_NAME` of os-release.
    pub distro: Maybe<String>,
    /// `none`, `docker`, `podman`, `kubernetes`, `containerd`, `lxc`, what systemd calls it, or `other` for a process
    /// that cannot see the kernel's threads.
    pub container: Maybe<String>,
    /// `none`, `kvm`, `xen`, `vmware`, `hyperv`, …, or `other` for one that does not give its name.
    pub hypervisor: Maybe<String>,
    pub board_vendor: Maybe<String>,
    pub board_product: Maybe<String>,
    pub firmware_version: Maybe<String>,
    /// Changes with each boot.
    pub boot_id: Maybe<String>,
    pub uptime_s: Maybe<f64>,
}

/// The host's processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    pub model: Maybe<String>,
    pub vendor: Maybe<String>,
    /// Physical cores that are online.
    pub physical_cores: Maybe<u32>,
    /// Logical CPUs that are online.
    pub logical_cpus: Maybe<u32>,
    pub sockets: Maybe<u32>,
    pub numa_nodes: Maybe<u32>,
    /// Two or more hardware threads share a core now.
    pub smt: Maybe<bool>,
    /// Kinds of caches over all online CPUs.
    pub caches: Maybe<Vec<Cache>>,
    /// Bytes of all caches of the highest level together.
    pub last_level_cache_bytes: Maybe<u64>,
    /// Frequency governor; several, comma-separated, when CPUs differ.
    pub governor: Maybe<String>,
    /// Energy-performance preference; several, comma-separated, when CPUs differ.
    pub energy_performance_preference: Maybe<String>,
    /// Clocks above the nominal one are allowed.
    pub boost: Maybe<bool>,
    /// Lowest clock that the frequency policy allows on any CPU.
    pub min_mhz: Maybe<u32>,
    /// Highest clock that the frequency policy allows on any CPU.
    pub max_mhz: Maybe<u32>,
    /// Highest clock of which any CPU is capable.
    pub hardware_max_mhz: Maybe<u32>,
    pub microcode: Maybe<String>,
    /// Instruction sets that matter to matrix arithmetic, in the kernel's spelling.
    pub flags: Maybe<Vec<String>>,
    /// What the kernel does about each processor vulnerability.
    pub mitigations: Maybe<BTreeMap<String, String>>,
}

/// One kind of cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    pub level: u32,
    /// `data`, `instruction` or `unified`
    pub kind: String,
    /// Bytes of one instance.
    pub bytes: u64,
    /// Logical CPUs that share one instance.
    pub shared_by_cpus: u32,
    /// Instances of this kind.
    pub instances: u32,
}

/// The host's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    pub total_bytes: Maybe<u64>,
    /// What new work could take without swapping.
    pub available_bytes: Maybe<u64>,
    pub swap_total_bytes: Maybe<u64>,
    pub swap_used_bytes: Maybe<u64>,
    /// `always`, `madvise` or `never`
    pub transparent_hugepages: Maybe<String>,
    /// Reserved huge pages of the default size.
    pub hugepages: Maybe<u64>,
    pub hugepage_bytes: Maybe<u64>,
}

/// What this process may use. The reason `unlimited` says that no limit is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// CPU bandwidth of the control group, in cores: quota over period, the least on the way to the root.
    pub cgroup_cpu_cores: Maybe<f64>,
    /// CPUs of the control group, as a list such as `0-3,8`.
    pub cgroup_cpuset: Maybe<String>,
    /// Memory of the control group, the least on the way to the root.
    pub cgroup_memory_bytes: Maybe<u64>,
    /// CPUs that the scheduler may put this process on.
    pub affinity_cpus: Maybe<u32>,
    /// `RLIMIT_AS`
    pub address_space_bytes: Maybe<u64>,
    /// `RLIMIT_MEMLOCK`
    pub locked_memory_bytes: Maybe<u64>,
}

/// How busy the machine was at the start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Load {
    pub load_1m: Maybe<f64>,
    pub load_5m: Maybe<f64>,
    /// Threads that ran or wanted to, this one included.
    pub runnable: Maybe<u32>,
}

/// This program, as it was built.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Software {
    pub version: String,
    /// Commit, 40 hexadecimal digits.
    pub git_revision: Maybe<String>,
    /// A tracked file that reaches the binary differed from that commit.
    pub git_dirty: Maybe<bool>,
    /// `rustc --version` of the compiler.
    pub rustc: Maybe<String>,
    /// Target triple.
    pub target: String,
    /// `debug` or `release`
    pub profile: String,
    /// Cargo features that were on.
    pub features: Vec<String>,
    /// Instruction sets that the compiler was allowed to use.
    pub target_features: Vec<String>,
    /// Versions of the libraries that compute: candle-core, cudarc, tokenizers, …
    pub libraries: Maybe<BTreeMap<String, String>>,
    /// SHA-256 of the running executable.
    pub binary_sha256: Maybe<String>,
}

/// The GPU driver: one per machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuDriver {
    /// Version of the kernel module, such as `580.95.05`.
    pub version: Maybe<String>,
    /// Kernel module: `open` or `proprietary`.
    pub kernel_module: Maybe<String>,
    /// Newest CUDA version that the driver library supports, such as `13.0`.
    pub cuda_version: Maybe<String>,
    /// Release branch, such as `r580_00`.
    #[serde(default = "Maybe::<String>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub branch: Maybe<String>,
    /// Version of the management library.
    #[serde(default = "Maybe::<String>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub nvml_version: Maybe<String>,
    /// The `libcuda` that this process uses.
    #[serde(default = "Maybe::<MappedDriver>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub library: Maybe<MappedDriver>,
}

/// One GPU, as far as it is known without computing on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// The N of `cuda:N`.
    pub index: u32,
    pub name: Maybe<String>,
    pub uuid: Maybe<String>,
    pub memory_bytes: Maybe<u64>,
    /// Such as `9.0`.
    pub compute_capability: Maybe<String>,
    /// How it is set up, as NVML shows it.
    #[serde(default = "Maybe::<GpuSetup>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub setup: Maybe<GpuSetup>,
}

/// Where the CPU's time went between two instants. Counted by the kernel in ticks; inside a container the counters are
/// still those of the whole host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuShare {
    /// Time of all cores together, idle time included: the whole that the shares are of.
    pub total_cpu_ns: Maybe<u64>,
    /// User and system time of this process, all threads.
    pub own_cpu_ns: Maybe<u64>,
    /// Share of all cores' time used by other processes and by interrupts.
    pub foreign_share: Maybe<f64>,
    /// Share of all cores' time that the hypervisor gave to others.
    pub steal_share: Maybe<f64>,
    /// Time for which the control group's CPU quota held its threads back, summed over CPUs.
    pub throttled_ns: Maybe<u64>,
    /// Cores that this process can use at once: the smaller of its affinity and its quota.
    pub available_cores: Maybe<f64>,
    /// One tick: no time above is finer, and each may be off by one tick per core.
    pub resolution_ns: u64,
}

/// Which other processes were busy before the measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Interference {
    /// How long was looked.
    pub observed_ns: u64,
    /// Share of all cores' time used by other processes and by interrupts.
    pub foreign_share: Maybe<f64>,
    /// The busiest other programs, the busiest first.
    pub busiest: Vec<BusyProgram>,
}

/// All processes of one name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BusyProgram {
    pub name: String,
    /// How many processes of that name were busy.
    pub processes: u32,
    /// Share of all cores' time.
    pub cpu_share: f64,
}
