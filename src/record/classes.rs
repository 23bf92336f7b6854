//! For every part of a record that describes the surroundings, what a difference in it means. The only such table:
//! `compare` judges by it, and a reader of records may. What a difference leads to is decided there, not here.

/// What a difference between two records means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EnvironmentClass {
    /// Which machine it is: two records that differ here are of different things.
    Identity,
    /// Changes when a driver, firmware or kernel is updated: expected when that is what is examined.
    Expected,
    /// Could explain a difference in speed by itself.
    Suspicious,
    /// The power sensor: energies of different sensors cannot be compared.
    Meter,
    /// Changes all the time, or cannot matter; says what a window was like.
    Dynamic,
    /// A counter: what counts is its growth over a cell.
    Delta,
}

use EnvironmentClass::{Delta, Dynamic, Expected, Identity, Meter, Suspicious};

/// A place, its class, and what `compare --changing` calls it; an empty name cannot be declared.
pub type ClassRow = (&'static str, EnvironmentClass, &'static str);

/// JSON pointers into a record, `*` for every element, most of them whole branches.
const CLASSES: &[ClassRow] = &[
    ("/session/boot_id", Dynamic, ""),
    ("/session/driver_loaded_at", Dynamic, ""),
    ("/session/driver_loaded_by", Dynamic, ""),
    ("/machine/gpus/*/name", Identity, ""),
    ("/machine/gpus/*/uuid", Identity, ""),
    ("/machine/gpus/*/compute_capability", Identity, ""),
    // What the driver leaves to programs.
    ("/machine/gpus/*/memory_bytes", Expected, "driver"),
    ("/machine/gpus/*/index", Dynamic, ""),
    ("/machine/gpus/*/setup/gsp_firmware", Expected, "driver"),
    ("/machine/gpus/*/setup/vbios", Suspicious, "firmware"),
    ("/machine/gpus/*/setup", Suspicious, "power"),
    ("/machine/gpus/*", Suspicious, ""),
    ("/machine/gpu_driver", Expected, "driver"),
    ("/machine/host/os", Identity, ""),
    ("/machine/host/architecture", Identity, ""),
    ("/machine/host/board_vendor", Identity, ""),
    ("/machine/host/board_product", Identity, ""),
    ("/machine/host/firmware_version", Suspicious, "firmware"),
    ("/machine/host/container", Suspicious, "limits"),
    ("/machine/host/hypervisor", Suspicious, "limits"),
    ("/machine/host/hostname", Dynamic, ""),
    ("/machine/host/boot_id", Dynamic, ""),
    ("/machine/host/uptime_s", Dynamic, ""),
    ("/machine/host", Suspicious, "kernel"),
    ("/machine/cpu/model", Identity, ""),
    ("/machine/cpu/vendor", Identity, ""),
    ("/machine/cpu/sockets", Identity, ""),
    ("/machine/cpu/caches", Identity, ""),
    ("/machine/cpu/last_level_cache_bytes", Identity, ""),
    ("/machine/cpu/microcode", Suspicious, "firmware"),
    ("/machine/cpu/mitigations", Suspicious, "kernel"),
    ("/machine/cpu", Suspicious, "cpu"),
    // A kernel keeps a little more or less for itself at each boot.
    ("/machine/memory/total_bytes", Dynamic, ""),
    ("/machine/memory/available_bytes", Dynamic, ""),
    ("/machine/memory/swap_used_bytes", Dynamic, ""),
    ("/machine/memory", Suspicious, "memory"),
    ("/machine/limits", Suspicious, "limits"),
    ("/machine/load", Dynamic, ""),
    // The same sources and compiler in another folder give another file.
    ("/machine/software/binary_sha256", Suspicious, "tool"),
    ("/machine/software", Identity, "tool"),
    // What they switch off stands beside the kernels, too.
    ("/machine/env/TOKMETER_CUDA_GRAPHS", Suspicious, "kernels"),
    ("/machine/env/TOKMETER_CUDA_PDL", Suspicious, "kernels"),
    ("/machine/env", Suspicious, "env"),
    ("/machine", Suspicious, ""),
    ("/tool", Identity, "tool"),
    // What a file is called.
    ("/model/name", Dynamic, ""),
    ("/model/weights/files/*/name", Dynamic, ""),
    ("/model", Identity, ""),
    ("/engine/device", Suspicious, ""),
    ("/engine/threads", Suspicious, "cpu"),
    ("/engine/max_batch", Suspicious, ""),
    // Made as large as the cells, or as the free memory.
    ("/engine/kv_pages", Dynamic, ""),
    ("/engine/kv_bytes", Dynamic, ""),
    ("/engine/max_context_tokens", Dynamic, ""),
    ("/engine/activations_bytes", Dynamic, ""),
    ("/engine/clock_overhead_ns", Dynamic, ""),
    ("/engine/load_ns", Dynamic, ""),
    ("/engine/kernels/architecture", Identity, ""),
    ("/engine/kernels/deterministic", Identity, ""),
    // What the driver forced.
    ("/engine/kernels/capture_retry", Expected, "driver"),
    ("/engine/kernels", Suspicious, "kernels"),
    // Which algorithms a library takes, and how long it took to choose, is its own affair.
    ("/engine/cublaslt/products", Dynamic, ""),
    ("/engine/cublaslt/tuning_ns", Dynamic, ""),
    ("/engine/cublaslt", Suspicious, "kernels"),
    ("/engine/name", Identity, ""),
    ("/engine/backend", Identity, ""),
    ("/engine/compute_dtype", Identity, ""),
    ("/engine/kv_dtype", Identity, ""),
    ("/engine/chunk_tokens", Identity, ""),
    ("/engine/page_size_tokens", Identity, ""),
    ("/engine/stop_tokens_ignored", Identity, ""),
    ("/engine/sampling", Identity, ""),
    ("/engine", Suspicious, ""),
    // What the sensor read or was found to do; its limit of power is the machine's.
    ("/meter/idle_no_context", Dynamic, ""),
    ("/meter/idle_context_resident", Dynamic, ""),
    ("/meter/idle_after_load", Dynamic, ""),
    ("/meter/systematic_share", Dynamic, ""),
    ("/meter/devices/*/update_period_ns", Dynamic, ""),
    ("/meter/devices/*/power_limit_w", Suspicious, "power"),
    ("/meter/devices/*/shared", Suspicious, "power"),
    ("/meter/trace", Dynamic, ""),
    ("/meter", Meter, ""),
    ("/command/seed", Identity, ""),
    ("/command/min_seconds", Suspicious, ""),
    ("/command/steady", Suspicious, ""),
    ("/command/warmup_seconds", Suspicious, ""),
    // A cooled device is another one than a hot one.
    ("/command/thermal", Identity, ""),
    ("/cells/*/gpus/*/*/processes", Suspicious, ""),
    ("/cells/*/gpus/*/*/pcie_generation", Suspicious, ""),
    ("/cells/*/gpus/*/*/pcie_width", Suspicious, ""),
    ("/cells/*/gpus/*/*/nvlinks_active", Suspicious, ""),
    ("/cells/*/gpus/*/*/clocks", Dynamic, ""),
    ("/cells/*/gpus/*/*/performance_state", Dynamic, ""),
    ("/cells/*/gpus/*/*/clock_reasons_mask", Dynamic, ""),
    ("/cells/*/gpus/*/*/clock_events", Delta, ""),
    ("/cells/*/gpus/*/*/ecc", Delta, ""),
    ("/cells/*/gpus/*/*/pages", Delta, ""),
    ("/cells/*/gpus/*/*/pcie_replays", Delta, ""),
    ("/cells/*/gpus/*/*/nvlink_errors", Delta, ""),
    ("/cells/*/gpus/*/*/xids", Delta, ""),
    ("/cells/*/runs/*/windows/*/clocks", Dynamic, ""),
    ("/cells/*/runs/*/windows/*/clock_events", Delta, ""),
];

/// Every place that describes the surroundings, as a JSON pointer with `*` for any element. A place that is not listed
/// itself has the class of the longest listed place that contains it; without one it is suspicious.
pub fn classes() -> &'static [ClassRow] {
    CLASSES
}
