//! The library that computed the large products of a run, and the algorithm of each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Maybe;

/// cuBLASLt, as it was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CublasLt {
    /// As the library gives it: `13.1.0`.
    pub version: String,
    /// Fewest rows of activations whose products it computes; our own kernels compute those of fewer.
    pub least_rows: u32,
    /// Workspace that an algorithm may use.
    pub workspace_limit_bytes: u64,
    /// Time spent choosing algorithms so far, within measured windows or outside of them.
    pub tuning_ns: u64,
    /// Products that came up so far, by epilogue, columns, depth and rows.
    pub products: Vec<TunedProduct>,
}

/// One product `[rows, depth] · [columns, depth]ᵀ` and how it is computed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TunedProduct {
    /// Rows that the algorithm was chosen for; it runs for somewhat fewer, too.
    pub rows: u32,
    /// Rows of the weight; gate and up together with `silu`.
    pub columns: u32,
    pub depth: u32,
    /// Type of both operands: `bf16` or `f16`.
    pub dtype: String,
    /// `store_f32`, `residual`, or `silu`, which a kernel of ours computes from a 16-bit product.
    pub epilogue: String,
    /// The library's number for the algorithm, and for its tile and stages.
    pub algorithm_id: u32,
    pub tile_id: u32,
    pub stages_id: u32,
    /// Parts that the depth is split into.
    pub split_k: u32,
    /// Workspace that the algorithm uses for so many rows.
    pub workspace_bytes: u64,
    pub chosen: Chosen,
    /// Algorithms that were timed.
    pub timed_algorithms: u32,
    /// The chosen algorithm's fastest launch while it was timed.
    pub best_ns: Maybe<u64>,
}

/// How an algorithm was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Chosen {
    /// The fastest of the library's guesses on this device, timed by this process.
    Tuned,
    /// Timed by an earlier process on such a device; accepted by the library and run once more.
    Cache,
    /// The library's first guess, untimed, since there was no memory to time it.
    Heuristic,
}
