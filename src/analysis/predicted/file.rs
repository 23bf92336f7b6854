//! The file of a prediction, as FORMAT.md describes it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::record::Maybe;

/// Of the files that this version reads.
const SCHEMA: &str = "tokmeter-prediction/1";

/// How long every operation of a model was predicted to take, on several devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// `tokmeter-prediction/1`
    pub schema: String,
    pub model: String,
    pub compute_dtype: String,
    /// Of the kernels that were compiled; ends in `-changed` where files differed from it.
    pub commit: Maybe<String>,
    /// `NVRTC 13.0`
    pub compiler: String,
    /// Kernel file → SHA-256 of its source, headers and options.
    pub kernels: BTreeMap<String, String>,
    /// What holds on every device.
    pub assumptions: BTreeMap<String, Assumption>,
    pub devices: Vec<PredictedDevice>,
}

/// A number that the prediction takes for true.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Assumption {
    pub value: f64,
    pub unit: String,
    pub basis: Basis,
    /// Where it is from, or why it was guessed so.
    pub source: String,
}

/// How well a number is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// Published or measured by somebody.
    Source,
    /// Follows from such numbers.
    Computed,
    /// Published, and not looked up again.
    Recalled,
    Guess,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PredictedDevice {
    /// `h100-sxm`
    pub name: String,
    /// What drivers call it, to the letter.
    pub device_names: Vec<String>,
    /// What the kernels were compiled for: `sm_90a`.
    pub architecture: String,
    /// The device's own assumptions.
    pub facts: BTreeMap<String, Assumption>,
    pub steps: Vec<PredictedStep>,
}

/// What computes products of more than 64 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Products {
    Own,
    Cublaslt,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PredictedStep {
    /// As `peaks --ops` names it: `decode/b8/d1024`.
    pub step: String,
    pub products: Products,
    pub launches: u32,
    /// The whole step, all layers.
    pub time_ns: f64,
    /// The sum of its operations' bounds.
    pub bound_ns: f64,
    /// The bound over the time.
    pub bound_share: f64,
    pub ops: Vec<PredictedOp>,
}

/// One operation of one layer, alone and repeated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PredictedOp {
    pub op: String,
    /// Layers, or 1.
    pub times_in_a_step: u32,
    pub time_ns: f64,
    /// Read and written at least.
    pub bytes: u64,
    pub flops: f64,
    /// At the assumed ceilings.
    pub bound_ns: f64,
    /// `memory` or `matmul`
    pub bound_by: String,
    pub bound_share: f64,
    /// Its launches in their order.
    pub kernels: Vec<PredictedKernel>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PredictedKernel {
    /// Name in the kernel files, or `cublaslt`.
    pub entry: String,
    pub dram_bytes: u64,
    pub l2_bytes: u64,
    /// Resource → time that it alone needs.
    pub terms_ns: BTreeMap<String, f64>,
    /// The largest of them.
    pub limited_by: String,
    /// Round trips and instructions that wait for each other.
    pub chain_ns: f64,
    /// From the kernel before to this one.
    pub gap_ns: f64,
    /// Part of the gap in which weights are already fetched.
    pub hidden_ns: f64,
    pub time_ns: f64,
    pub machine_code: Maybe<MachineCode>,
}

/// What was counted in a kernel's machine code; instructions are those of one warp.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineCode {
    pub registers: u32,
    pub static_shared_bytes: u32,
    pub dynamic_shared_bytes: u32,
    pub spill_bytes: u32,
    /// Blocks: x, y, z.
    pub grid: [u32; 3],
    /// Of a block.
    pub threads: u32,
    /// Blocks that a multiprocessor holds at once.
    pub resident_blocks: u32,
    /// Of the hot loop, in the busiest block.
    pub trips: f64,
    pub instructions_per_trip: f64,
    pub mma_per_trip: f64,
    /// More than a trip has.
    pub instructions_at_a_tiles_end: f64,
    pub tile_ends: f64,
    pub instructions_outside: f64,
    /// All together.
    pub instructions_per_warp: f64,
    pub l2_round_trips: u32,
    pub dram_round_trips: u32,
}

/// What a file of ours says first.
#[derive(Deserialize)]
struct Head {
    schema: String,
}

/// # Errors
/// One sentence: the text is no prediction, or one of another version.
pub fn parse_prediction(text: &str) -> Result<Prediction, String> {
    let head: Head = serde_json::from_str(text).map_err(|error| format!("is no prediction: {error}"))?;
    if head.schema != SCHEMA {
        return Err(format!("its schema is {}, expected {SCHEMA}", head.schema));
    }
    serde_json::from_str(text).map_err(|error| format!("is a broken prediction: {error}"))
}

impl PredictedDevice {
    /// The number of this name.
    pub(super) fn fact(&self, name: &str) -> Option<f64> {
        self.facts.get(name).map(|fact| fact.value)
    }

    /// Registers of a thread of each kernel.
    pub(super) fn registers(&self) -> BTreeMap<&str, u32> {
        let kernels = self.steps.iter().flat_map(|step| &step.ops).flat_map(|op| &op.kernels);
        kernels
            .filter_map(|kernel| Some((kernel.entry.as_str(), kernel.machine_code.value()?.registers)))
            .collect()
    }
}
