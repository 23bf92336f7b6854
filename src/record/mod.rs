//! The wall: one JSON file of raw facts. Everything before it touches the machine, everything after it is a pure
//! function of such files. Units end every field's name, a value that could not be had is `{"missing": reason}`, and
//! nothing that can be derived (rates, joules per token, prices per token) is stored. FORMAT.md describes every field.

mod ceilings;
mod cell;
mod classes;
mod cost;
mod cublaslt;
pub mod environment;
mod histogram;
mod hold_out;
pub mod identities;
pub mod machine;
mod maybe;
mod redact;
mod store;
mod validate;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use machine::{Interference, Machine};

pub use ceilings::{Bound, BoundBy, Ceiling, Ceilings};
pub use cell::{
    Cell, Check, ClockEvents, Clocks, Cooldown, DeviceEnergy, Drain, Energy, Outcome, RequestRow, Run,
    Steady, Temperature, Thermal, Warmup, WarmupEnd, Window, WindowEnd, Workload,
};
pub use classes::{ClassRow, EnvironmentClass, classes};
pub use cost::{Amount, Converted, CostMode, CostModel, Currency, EnergyPrice, ExchangeRate, Usage};
pub use cublaslt::{Chosen, CublasLt, TunedProduct};
pub use histogram::{Latency, LatencyHistogram, merge as merge_histograms};
pub use hold_out::{HoldOut, hold_out};
pub use maybe::{Maybe, Missing};
pub use redact::{hashed_identity, redacted};
pub use store::{ReadError, Store, check_place, parse, read, write_atomically};
pub use validate::{Violation, canonical_sha256, hex, violations};

/// Name and major version of the format. A file with another major version is refused.
pub const SCHEMA: &str = "tokmeter-record/1";

/// The JSON Schema of the format: the text of `results/schema.json`.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Record);
    let text = serde_json::to_string_pretty(&schema).expect("a schema is plain JSON");
    text + "\n"
}

/// One invocation of `tokmeter run`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// `tokmeter-record/1`
    #[schemars(extend("const" = SCHEMA))]
    pub schema: String,
    /// Why this file must not be used as a measurement (fake engine, emulated device, planted slow-down).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_a_measurement: Option<String>,
    pub tool: Tool,
    pub command: Command,
    /// Start of the invocation, RFC 3339, UTC.
    pub started_at: String,
    /// End of the invocation; missing while it runs and when it was killed.
    pub finished_at: Maybe<String>,
    pub status: Status,
    pub session: Session,
    pub machine: Machine,
    /// Who else was busy just before the first cell.
    pub interference: Interference,
    pub model: Model,
    pub engine: Engine,
    pub meter: Meter,
    pub cost_model: Maybe<CostModel>,
    /// Whether the device computes what it should, on the weights of a real model.
    #[serde(default = "Maybe::<Numerics>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub numerics: Maybe<Numerics>,
    /// What each device can do at most, measured before the first cell.
    #[serde(
        default = "Maybe::<Vec<Ceilings>>::not_recorded",
        skip_serializing_if = "Maybe::is_not_recorded"
    )]
    pub ceilings: Maybe<Vec<Ceilings>>,
    /// In the order they were measured.
    pub cells: Vec<Cell>,
}

/// How far the invocation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Being written; what a killed run leaves behind.
    Running,
    Complete,
    /// Stopped by a signal; the cells here were measured whole.
    Interrupted,
}

/// The program that measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    pub name: String,
    pub version: String,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Command {
    pub argv: Vec<String>,
    /// Name of the suite; missing when cells were given on the command line.
    pub suite: Maybe<String>,
    /// Seed of prompts, arrivals and cell order.
    pub seed: u64,
    /// Measured repetitions of each cell.
    pub repeat: u32,
    /// Shortest window, seconds.
    pub min_seconds: f64,
    /// Longest time that one run of a serving cell may take, drain included, seconds.
    pub max_seconds: f64,
    /// Warm-up of each cell and ramp of each serving run, seconds; the tenfold at most where steadiness is assessed.
    #[serde(default = "Maybe::<f64>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub warmup_seconds: Maybe<f64>,
    /// The warm-up waits until times are flat, and each run's steadiness is assessed.
    #[serde(default = "Maybe::<bool>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub steady: Maybe<bool>,
    #[serde(default = "Maybe::<Thermal>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub thermal: Maybe<Thermal>,
    /// Keys of all cells that were planned, measured or not, in order.
    pub planned_cells: Vec<String>,
    /// Which of them a calibration does not learn from, fixed before anything was measured.
    #[serde(default = "hold_out::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub hold_out: Maybe<HoldOut>,
}

/// One boot and one driver load: the unit that `compare` counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// The kernel's boot id.
    pub boot_id: Maybe<String>,
    /// When the GPU driver was loaded, RFC 3339, UTC.
    pub driver_loaded_at: Maybe<String>,
    /// What tells that time: `kernel_log`, `module_folder` (the earliest look at it, so not before) or `boot`.
    #[serde(default = "Maybe::<String>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub driver_loaded_by: Maybe<String>,
    /// Declared by the user (`--session`).
    pub label: Maybe<String>,
}

/// The model and the weights that were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub name: String,
    pub config: crate::arch::Config,
    /// Elements of all tensors; a tied head counts once.
    pub parameters: u64,
    pub weights: WeightsRecord,
}

/// Where the weights came from and how they are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightsRecord {
    pub source: WeightsSource,
    /// `gguf`, `safetensors` or `synthetic`
    pub format: String,
    /// Stored type → bytes in that type, over the tensors that the model uses.
    pub stored_bytes: BTreeMap<String, u64>,
    pub files: Vec<FileRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum WeightsSource {
    Checkpoint,
    /// Values from a counter hash; the shapes are the model's own.
    Synthetic {
        seed: u64,
    },
}

/// A file by its name (not its place) and content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    pub name: String,
    pub size_bytes: u64,
    pub sha256: Maybe<String>,
}

/// The engine and backend that ran. What ran is what this says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// `llm` or `fake`
    pub name: String,
    /// `cpu`, `reference`, `cuda` or `fake`
    pub backend: String,
    /// Device the backend ran on: `cpu`, `cuda:0`, …
    pub device: String,
    /// Type of activations and products: `f32`, `quantized`, `bf16`, …
    pub compute_dtype: String,
    pub kv_dtype: String,
    /// The library that computes products of many rows; else why our own kernels do.
    #[serde(default = "Maybe::<CublasLt>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub cublaslt: Maybe<CublasLt>,
    /// CPU threads that compute.
    pub threads: u32,
    /// Sequences in one step at most.
    pub max_batch: u32,
    /// Prompt tokens in one step at most.
    pub chunk_tokens: u32,
    /// Tokens in one KV page.
    pub page_size_tokens: u32,
    pub kv_pages: u32,
    /// Longest sequence that fits, tokens.
    pub max_context_tokens: u32,
    /// What the weights occupy on the device, bytes.
    pub weights_bytes: u64,
    pub kv_bytes: u64,
    pub activations_bytes: u64,
    /// Measured runs never stop at a stop token: every request produces exactly its output length.
    pub stop_tokens_ignored: bool,
    /// How tokens are chosen in measured runs: `greedy`
    pub sampling: String,
    /// Cost of reading the clock once, ns.
    pub clock_overhead_ns: f64,
    /// From opening the weights to a ready engine, ns.
    pub load_ns: u64,
    #[serde(default = "Maybe::<Kernels>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub kernels: Maybe<Kernels>,
}

/// How the kernels of a GPU came to be and are launched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kernels {
    /// What they were compiled for: `sm_90a`.
    pub architecture: String,
    /// Kernel file → `prebuilt`, `cache`, `compiled` or `emulated`
    pub origins: BTreeMap<String, String>,
    /// What the driver was given: `sass`, machine code, or `ptx`, intermediate code that it compiles itself.
    #[serde(default = "Maybe::<String>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub form: Maybe<String>,
    /// Decode steps are captured as graphs and replayed.
    pub graphs: bool,
    /// A kernel may start while its predecessor ends; in graphs not where a capture had to be repeated.
    pub dependent_launch: bool,
    /// Why no kernel in a graph starts before its predecessor has ended: CUDA's name of the error with which the driver
    /// refused to capture a step otherwise. It was captured again, as all later ones were.
    #[serde(default = "Maybe::<String>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub capture_retry: Maybe<String>,
    /// The same output bits whatever else is in the batch (`--deterministic`).
    pub deterministic: bool,
    /// Kernel → what the driver gives it on this device.
    #[serde(
        default = "Maybe::<BTreeMap<String, KernelResources>>::not_recorded",
        skip_serializing_if = "Maybe::is_not_recorded"
    )]
    pub resources: Maybe<BTreeMap<String, KernelResources>>,
}

/// What one kernel takes, as the driver reports it. More local bytes after an update are registers that no longer fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelResources {
    /// For each thread.
    pub registers: Maybe<u32>,
    /// For each block, without what a launch asks for.
    pub static_shared_bytes: Maybe<u32>,
    /// For each thread: registers that did not fit, and arrays.
    pub local_bytes: Maybe<u32>,
    /// Threads that a block may have at most.
    pub max_block_threads: Maybe<u32>,
    /// Architecture of the machine code, such as 90.
    pub binary_version: Maybe<u32>,
    /// Architecture of the intermediate code that it was made from.
    pub ptx_version: Maybe<u32>,
}

/// A known text under teacher forcing: the measured device's log-probabilities against the CPU's in f32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Numerics {
    /// The model whose weights were used.
    pub model: String,
    /// Positions of the text.
    pub tokens: u32,
    /// Mean distance over all positions and the whole vocabulary, nat.
    pub mean_distance_nat: f64,
    /// 99th percentile of the distances, nat.
    pub p99_distance_nat: f64,
    /// Largest mean distance that passes, nat.
    pub mean_bound_nat: f64,
    pub ok: bool,
}

/// The power sensor, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Meter {
    /// `nvml_total_energy`, `nvml_power_integrated`, `nvml_module`, `rapl`, `hwmon`, `external` or `replay`
    pub source: Maybe<String>,
    /// What is inside its reading: `gpu`, `module`, `package` or `node`. Different scopes must not be compared.
    #[serde(default = "Maybe::<String>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub scope: Maybe<String>,
    #[serde(
        default = "Maybe::<Vec<MeteredDevice>>::not_recorded",
        skip_serializing_if = "Maybe::is_not_recorded"
    )]
    pub devices: Maybe<Vec<MeteredDevice>>,
    /// Relative error that all readings of one sensor share: its gain.
    #[serde(default = "Maybe::<f64>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub systematic_share: Maybe<f64>,
    /// The file of an external or replayed trace.
    #[serde(default = "Maybe::<FileRecord>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub trace: Maybe<FileRecord>,
    /// Power before this program touched the device.
    #[serde(default = "Maybe::<IdlePower>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub idle_no_context: Maybe<IdlePower>,
    /// Power with the weights resident and nothing running.
    #[serde(default = "Maybe::<IdlePower>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub idle_context_resident: Maybe<IdlePower>,
    /// Power from the end of the last cell on, the weights still resident.
    #[serde(default = "Maybe::<IdlePower>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub idle_after_load: Maybe<IdlePower>,
}

/// One device that the sensor reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MeteredDevice {
    /// `cuda:0`, `package-0`, …
    pub device: String,
    /// The energy counter's update period, measured before the first cell.
    pub update_period_ns: Maybe<u64>,
    /// Power limit in force.
    pub power_limit_w: Maybe<f64>,
    /// Somebody else's work is in the reading: the device is partitioned or has other processes on it.
    pub shared: Maybe<bool>,
}

/// Power of all metered devices together while nothing ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IdlePower {
    pub power_w: f64,
    /// Half-width of the mean.
    pub uncertainty_w: f64,
    pub duration_ns: u64,
    /// Means of equal parts of that time, in their order: whether the power stood still.
    #[serde(default = "Maybe::<Vec<f64>>::not_recorded", skip_serializing_if = "Maybe::is_not_recorded")]
    pub parts_w: Maybe<Vec<f64>>,
}
