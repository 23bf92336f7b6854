//! What the GPU's driver says of a GPU: how it is set up, found once, and what changes while it works, read before and
//! after each cell.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Maybe;

/// How a GPU is set up, as NVML shows it; found before the first cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuSetup {
    pub serial: Maybe<String>,
    pub board_part_number: Maybe<String>,
    /// Such as `00000000:1B:00.0`.
    pub pci_address: Maybe<String>,
    /// Device and vendor, such as `0x233510de`.
    pub pci_device_id: Maybe<String>,
    pub pci_subsystem_id: Maybe<String>,
    pub cuda_cores: Maybe<u32>,
    pub memory_bus_bits: Maybe<u32>,
    /// Version of the firmware of the GPU's system processor.
    pub gsp_firmware: Maybe<String>,
    pub gsp_firmware_enabled: Maybe<bool>,
    pub vbios: Maybe<String>,
    pub inforom_image: Maybe<String>,
    /// Checksum of the configuration that is kept on the board.
    pub inforom_checksum: Maybe<String>,
    pub power_limits: PowerLimits,
    pub max_clocks: GpuClocks,
    pub ecc_enabled: Maybe<bool>,
    /// What ECC will be after the next reset.
    pub ecc_pending: Maybe<bool>,
    pub persistence_mode: Maybe<bool>,
    /// `default`, `exclusive_thread`, `exclusive_process` or `prohibited`
    pub compute_mode: Maybe<String>,
    /// Partitioned into instances.
    pub mig_enabled: Maybe<bool>,
    pub mig_pending: Maybe<bool>,
    /// `none`, `passthrough`, `vgpu`, `host_vgpu` or `host_vsga`
    pub virtualization: Maybe<String>,
    pub confidential_compute: Maybe<bool>,
    pub max_pcie_generation: Maybe<u32>,
    pub max_pcie_width: Maybe<u32>,
    /// NUMA node whose memory is nearest.
    pub numa_node: Maybe<u32>,
}

/// Watts that the board may draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerLimits {
    /// In force: the least of all that apply.
    pub enforced_w: Maybe<f64>,
    /// Asked for by the administrator.
    pub requested_w: Maybe<f64>,
    pub default_w: Maybe<f64>,
    pub min_w: Maybe<f64>,
    pub max_w: Maybe<f64>,
}

/// Clocks of one GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuClocks {
    pub sm_mhz: Maybe<u32>,
    pub memory_mhz: Maybe<u32>,
    pub graphics_mhz: Maybe<u32>,
}

/// One GPU around a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CellGpu {
    /// `cuda:0`
    pub device: String,
    pub before: GpuReading,
    /// Straight after the warm-up, before the first window: clocks and links are still the load's.
    pub warm: Maybe<GpuReading>,
    pub after: GpuReading,
}

/// What changes while a GPU works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuReading {
    pub clocks: GpuClocks,
    /// 0 is the fastest.
    pub performance_state: Maybe<u32>,
    /// Why clocks are held down at this moment: every bit that the driver sets.
    pub clock_reasons_mask: Maybe<u64>,
    /// Time that clocks were held down since the driver was loaded.
    pub clock_events: HeldDown,
    pub ecc: EccErrors,
    pub pages: MemoryRepairs,
    pub pcie_generation: Maybe<u32>,
    pub pcie_width: Maybe<u32>,
    /// Packets that had to be sent again.
    pub pcie_replays: Maybe<u32>,
    pub nvlinks_active: Maybe<u32>,
    /// CRC, replay and recovery errors of all active links together.
    pub nvlink_errors: Maybe<u64>,
    /// Others that have the GPU open, and this program.
    pub processes: Maybe<Vec<GpuProcess>>,
    /// Faults of this GPU in the kernel's log since it was booted, the oldest first.
    pub xids: Maybe<Vec<u32>>,
}

/// Nanoseconds since the driver was loaded, by cause.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeldDown {
    pub software_power_cap_ns: Maybe<u64>,
    pub software_thermal_ns: Maybe<u64>,
    pub hardware_thermal_ns: Maybe<u64>,
    pub hardware_power_brake_ns: Maybe<u64>,
    /// Waiting for other GPUs of a group that keeps its clocks alike.
    pub sync_boost_ns: Maybe<u64>,
}

/// Memory errors: of this driver load, and of the board's life.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EccErrors {
    pub corrected: Maybe<u64>,
    pub uncorrected: Maybe<u64>,
    pub lifetime_corrected: Maybe<u64>,
    pub lifetime_uncorrected: Maybe<u64>,
}

/// Memory that was taken out of use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryRepairs {
    /// Pages, after several corrected errors.
    pub retired_corrected: Maybe<u32>,
    /// Pages, after one uncorrected error.
    pub retired_uncorrected: Maybe<u32>,
    pub retirement_pending: Maybe<bool>,
    pub remapped_rows_corrected: Maybe<u32>,
    pub remapped_rows_uncorrected: Maybe<u32>,
    /// Rows wait for the next reset.
    pub remap_pending: Maybe<bool>,
    /// There were no spare rows left.
    pub remap_failed: Maybe<bool>,
}

/// A process that has the GPU open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuProcess {
    pub pid: u32,
    /// File name of the program, without its folder and arguments.
    pub name: Maybe<String>,
    /// `compute`, `graphics` or `mps`
    pub kind: String,
    /// This program itself, as far as process numbers agree: in a container they may not.
    pub own: bool,
}

/// The driver library that is loaded in this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MappedDriver {
    /// Its file: that of the driver, or of a forward-compatibility package.
    pub path: String,
    /// Version in the file's name, which the kernel module's may differ from.
    pub version: Maybe<String>,
}
