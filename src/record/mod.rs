//! The wall: one JSON file of raw facts. Everything before it touches the machine, everything after it is a pure
//! function of such files. Units end every field's name, a value that could not be had is `{"missing": reason}`, and
//! nothing that can be derived (rates, joules per token, prices per token) is stored. FORMAT.md describes every field.

mod ceilings;
mod cell;
mod cost;
mod cublaslt;
mod histogram;
mod hold_out;
pub mod machine;
mod maybe;
mod redact;
mod store;
mod validate;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use machine::{Interference, Machine};

pub use ceilings::{Ceiling, Ceilings};
pub use cell::{
    Cell, Check, ClockEvents, Clocks, Drain, Energy, Outcome, RequestRow, Run, Steady, Temperature, Warmup,
    Window, WindowEnd, Workload,
};
pub use cost::{Amount, Converted, CostMode, CostModel, Currency, EnergyPrice, ExchangeRate, Usage};
pub use cublaslt::{Chosen, CublasLt, TunedProduct};
pub use histogram::{Latency, LatencyHistogram, merge as merge_histograms};
pub use hold_out::{HoldOut, hold_out};
pub use maybe::{Maybe, Missing};
pub use redact::redacted;
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
    /// Decode steps are captured as graphs and replayed.
    pub graphs: bool,
    /// A kernel may start while its predecessor ends.
    pub dependent_launch: bool,
    /// The same output bits whatever else is in the batch (`--deterministic`).
    pub deterministic: bool,
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
    pub source: Maybe<String>,
}
