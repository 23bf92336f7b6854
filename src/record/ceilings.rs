//! What the devices of a run can do at most, measured by the run itself: what utilisations are shares of.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Maybe;

/// The ceilings of one device. Bandwidths count bytes that were read, and in a copy also those that were written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ceilings {
    /// `cpu`, `cuda:0`, …
    pub device: String,
    /// The largest cache, all instances together, bytes.
    pub last_level_cache_bytes: Maybe<u64>,
    /// All measuring together, preparation included, ns.
    pub duration_ns: u64,
    pub read_bandwidth_bytes_per_s: Maybe<Ceiling>,
    pub copy_bandwidth_bytes_per_s: Maybe<Ceiling>,
    /// Type of the operands → a large square product, sums in f32.
    pub matmul_flops_per_s: BTreeMap<String, Maybe<Ceiling>>,
    /// Type of the operands → tensor-core instructions on registers, without any memory.
    pub mma_flops_per_s: BTreeMap<String, Maybe<Ceiling>>,
    /// One launch among many of a kernel that does nothing.
    pub launch_ns: Maybe<Ceiling>,
    /// One such kernel within a graph.
    pub graph_node_ns: Maybe<Ceiling>,
    /// From pinned host memory.
    pub host_to_device_bytes_per_s: Maybe<Ceiling>,
    /// To pinned host memory.
    pub device_to_host_bytes_per_s: Maybe<Ceiling>,
}

impl Ceilings {
    /// None of them, all for one reason.
    pub fn missing(reason: &str) -> Self {
        Ceilings {
            device: String::new(),
            last_level_cache_bytes: Maybe::missing(reason),
            duration_ns: 0,
            read_bandwidth_bytes_per_s: Maybe::missing(reason),
            copy_bandwidth_bytes_per_s: Maybe::missing(reason),
            matmul_flops_per_s: BTreeMap::new(),
            mma_flops_per_s: BTreeMap::new(),
            launch_ns: Maybe::missing(reason),
            graph_node_ns: Maybe::missing(reason),
            host_to_device_bytes_per_s: Maybe::missing(reason),
            device_to_host_bytes_per_s: Maybe::missing(reason),
        }
    }
}

impl Ceilings {
    /// The higher of the two bandwidths: what no stream of bytes can exceed.
    pub fn bandwidth_bytes_per_s(&self) -> Maybe<f64> {
        let both = self.read_bandwidth_bytes_per_s.as_ref().zip(self.copy_bandwidth_bytes_per_s.as_ref());
        both.map(|(read, copy)| read.value.max(copy.value))
    }

    /// `max(bytes / bandwidth, flops / matmul peak)`
    pub fn bound(&self, bytes: u64, flops: f64, compute_dtype: &str) -> Maybe<Bound> {
        self.bandwidth_bytes_per_s().zip(self.matmul_of(compute_dtype)).map(|(bandwidth, matmul)| {
            let (memory_ns, matmul_ns) = (bytes as f64 / bandwidth * 1e9, flops / matmul * 1e9);
            let by = if memory_ns >= matmul_ns { BoundBy::Memory } else { BoundBy::Matmul };
            Bound { bound_ns: memory_ns.max(matmul_ns), by }
        })
    }

    /// The product's peak in the type that a backend computes in; quantised blocks are multiplied as f32.
    pub fn matmul_of(&self, compute_dtype: &str) -> Maybe<f64> {
        let dtype = if compute_dtype == "quantized" { "f32" } else { compute_dtype };
        match self.matmul_flops_per_s.get(dtype) {
            Some(ceiling) => ceiling.as_ref().map(|ceiling| ceiling.value),
            None => Maybe::missing("no_ceiling_of_this_type"),
        }
    }
}

/// Which side of the roofline work is under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BoundBy {
    Memory,
    Matmul,
}

/// The least time that work can take on a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bound {
    pub bound_ns: f64,
    pub by: BoundBy,
}

/// One ceiling, in the unit of the field that holds it. `value`, `median` and `best` differ by the machine's unrest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ceiling {
    /// The best that was sustained: over three repetitions in a row.
    pub value: f64,
    /// Over the repetitions one by one.
    pub median: f64,
    /// The best single repetition.
    pub best: f64,
    /// Half the distance between the worst and the best repetition, over the median.
    pub spread_ratio: f64,
    /// What did the work: `own` kernels, `candle`, `driver`, …
    pub by: String,
    pub repetitions: u32,
    /// Bytes, flops or launches of one repetition, after the field's unit.
    pub work_per_repetition: u64,
    /// Memory that a repetition goes through; 0 where none matters.
    pub working_set_bytes: u64,
}
