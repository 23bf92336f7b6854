//! The seam between the model and the hardware: seven fused operations over ragged batches and paged keys and
//! values. Knows shapes and buffers, not architectures and not requests. Three implementations: `Reference` (plain
//! scalar Rust, the definition of right), `Cpu` (candle's matrix products) and `Cuda` (our kernels).

mod batch;
pub mod check;
pub mod cpu;
pub mod cuda;
pub mod peaks;
mod reference;
pub mod sampling;
mod stack;

pub use batch::{Batch, Sampling, TokenInput};
pub use cpu::{Cpu, CpuDType};
pub use cuda::{Cuda, CudaDType, CudaOptions, Form, Gemm};
pub use reference::Reference;

use crate::record::{Ceilings, CublasLt, KernelResources, Kernels, Maybe};
use crate::weights::HostTensor;
use crate::weights::synthetic::Recipe;

/// Tokens that one page of the KV cache holds, on every backend.
pub const PAGE_SIZE: usize = 16;

/// Shapes that every operation needs, taken from the model's configuration once.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f32,
    /// Angle per position of each rotary pair, radians, `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
}

impl Shape {
    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Bytes of one page of keys and values over all layers, at `element_bytes` per value.
    pub fn page_bytes(&self, element_bytes: usize) -> u64 {
        (2 * self.num_layers * PAGE_SIZE * self.kv_size() * element_bytes) as u64
    }
}

/// What an uploaded tensor will be used for: a backend may lay each out differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightUse {
    /// `[vocab_size, hidden_size]`: rows are looked up, and it may also be the head.
    Embedding,
    /// A gain or a bias, `[n]`.
    Vector,
    /// Parts q, k, v stacked by rows: `[q_size + 2 kv_size, hidden_size]`.
    Qkv,
    /// Parts gate, up stacked by rows: `[2 intermediate_size, hidden_size]`.
    GateUp,
    /// Any other `[out_features, in_features]`.
    Linear,
}

/// Weights of [`Backend::attn_in`].
#[derive(Clone, Debug)]
pub struct AttnIn<W> {
    /// `[hidden_size]`
    pub norm: W,
    /// `[q_size + 2 kv_size, hidden_size]`
    pub qkv: W,
    /// `[q_size + 2 kv_size]`
    pub bias: Option<W>,
    /// Gains of the norms over each head of q and k, `[head_dim]` each.
    pub qk_norm: Option<(W, W)>,
}

/// Weights of [`Backend::mlp_in`].
#[derive(Clone, Debug)]
pub struct MlpIn<W> {
    /// `[hidden_size]`
    pub norm: W,
    /// `[2 intermediate_size, hidden_size]`
    pub gate_up: W,
}

/// Weights of [`Backend::logits`].
#[derive(Clone, Debug)]
pub struct Head<W> {
    /// `[hidden_size]`
    pub norm: W,
    /// `[vocab_size, hidden_size]`
    pub lm_head: W,
}

/// What a buffer of activations holds: a backend may keep each in another type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferUse {
    /// The residual stream, `[tokens, hidden_size]`: sums of all layers, so never rounded below f32.
    Residual,
    /// Operands of products and of attention.
    Activation,
    /// `[samples, vocab_size]`
    Logits,
}

/// Memory a backend holds, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub weights_bytes: u64,
    pub kv_bytes: u64,
    pub activations_bytes: u64,
}

/// What a backend is, for the record. What ran is what this says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// `reference`, `cpu` or `cuda`
    pub name: &'static str,
    /// Type of activations and of products: `f32`, `bf16`, `quantized`, …
    pub compute_dtype: &'static str,
    /// Type of the stored keys and values.
    pub kv_dtype: &'static str,
    pub threads: usize,
    /// Where kernels run.
    pub kernels: Option<KernelInfo>,
    /// The library that computes large products; else why there is none.
    pub cublaslt: Maybe<CublasLt>,
}

/// How the kernels of a GPU came to be and are launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelInfo {
    /// `sm_90a`
    pub architecture: String,
    /// Kernel file and `prebuilt`, `cache`, `compiled` or `emulated`.
    pub origins: Vec<(&'static str, &'static str)>,
    /// `sass` or `ptx`: what the driver was given.
    pub form: &'static str,
    pub graphs: bool,
    pub dependent_launch: bool,
    /// CUDA's name of the error for which steps are captured without dependent launch.
    pub capture_retry: Option<String>,
    pub deterministic: bool,
    /// Kernel and what the driver gives it.
    pub resources: Vec<(String, KernelResources)>,
}

/// As files hold it.
impl From<KernelInfo> for Kernels {
    fn from(info: KernelInfo) -> Self {
        let origins = info.origins.into_iter().map(|(file, origin)| (file.to_owned(), origin.to_owned()));
        Kernels {
            architecture: info.architecture,
            origins: origins.collect(),
            form: Maybe::Value(info.form.to_owned()),
            graphs: info.graphs,
            dependent_launch: info.dependent_launch,
            capture_retry: info.capture_retry.map_or_else(|| Maybe::missing("not_needed"), Maybe::Value),
            deterministic: info.deterministic,
            resources: Maybe::Value(info.resources.into_iter().collect()),
        }
    }
}

/// Identifies a step that a backend may capture once and replay: same key, same sequence of operations and shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepKey {
    pub tokens: usize,
    pub sequences: usize,
    /// Every sequence has exactly one new token.
    pub decode_only: bool,
}

/// Sizes of steps, ascending, at whose first occurrence a backend makes what later ones use again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirstSteps {
    /// Prompt tokens of a step: for so many rows an algorithm is chosen.
    pub prefill_tokens: Vec<usize>,
    /// Sequences of a decode step: for so many a graph is captured.
    pub decode_sequences: Vec<usize>,
}

/// A device that can run the model. Activations are `[rows, columns]` row-major in [`Backend::Buf`]; the residual
/// stream `x` is `[tokens, hidden_size]`.
///
/// Operations are queued in order and may run later; [`Backend::sampled`] waits. Rows of a buffer beyond the batch's
/// tokens hold nothing and are never read.
pub trait Backend {
    /// A weight on the device. Cheap to clone: clones share memory (a tied head is a clone of the embedding).
    type Weight: Clone + Send + Sync;
    /// Activations on the device.
    type Buf: Send;
    /// Keys and values of all layers, in pages of [`PAGE_SIZE`] tokens.
    type Kv: Send;

    /// Steps whose tokens may still be on their way when the next step is queued: 0 where [`Backend::sampled`] has
    /// nothing to wait for.
    const STEPS_IN_FLIGHT: usize;

    /// Whether [`Backend::upload`] itself refuses values that are no finite numbers.
    const CHECKS_VALUES: bool = false;

    fn info(&self) -> BackendInfo;

    fn shape(&self) -> &Shape;

    /// Brings `parts`, stacked by rows, to the device.
    fn upload(&mut self, usage: WeightUse, parts: &[HostTensor<'_>]) -> anyhow::Result<Self::Weight>;

    /// Makes `parts`, stacked by rows, on the device itself: the same bits as [`Backend::upload`] of their values.
    /// Nothing where the device cannot.
    fn generate(&mut self, usage: WeightUse, parts: &[Recipe]) -> anyhow::Result<Option<Self::Weight>> {
        let _ = (usage, parts);
        Ok(None)
    }

    /// Room for `rows * columns` activations; contents are unspecified.
    fn buffer(&mut self, usage: BufferUse, rows: usize, columns: usize) -> anyhow::Result<Self::Buf>;

    /// Room for `pages` pages of keys and values in every layer.
    fn kv_cache(&mut self, pages: usize) -> anyhow::Result<Self::Kv>;

    /// Bytes of one page of keys and values over all layers.
    fn page_bytes(&self) -> u64;

    fn memory(&self) -> Memory;

    /// Memory of the device that nobody has taken, bytes; nothing where it is the host's.
    fn free_bytes(&self) -> anyhow::Result<Option<u64>> {
        Ok(None)
    }

    /// `x[t] = table[token[t]]`; a [`TokenInput::Sampled`] is read from the previous step's samples on the device.
    fn embed(&mut self, batch: &Batch, table: &Self::Weight, x: &mut Self::Buf) -> anyhow::Result<()>;

    /// RMSNorm, QKV product (+ bias, + norm over heads of q and k), rotary embedding; writes K and V of the batch's
    /// tokens into their slots of `layer` and `q` as `[tokens, q_size]`.
    fn attn_in(
        &mut self,
        batch: &Batch,
        layer: usize,
        weights: &AttnIn<Self::Weight>,
        x: &Self::Buf,
        kv: &mut Self::Kv,
        q: &mut Self::Buf,
    ) -> anyhow::Result<()>;

    /// Causal attention of each token over its sequence's pages: `out` is `[tokens, q_size]`.
    fn attention(
        &mut self,
        batch: &Batch,
        layer: usize,
        q: &Self::Buf,
        kv: &Self::Kv,
        out: &mut Self::Buf,
    ) -> anyhow::Result<()>;

    /// `x += attended · o_projᵀ`
    fn attn_out(
        &mut self,
        batch: &Batch,
        o_proj: &Self::Weight,
        attended: &Self::Buf,
        x: &mut Self::Buf,
    ) -> anyhow::Result<()>;

    /// RMSNorm, gate and up products, `silu(gate) · up`: `out` is `[tokens, intermediate_size]`.
    fn mlp_in(
        &mut self,
        batch: &Batch,
        weights: &MlpIn<Self::Weight>,
        x: &Self::Buf,
        out: &mut Self::Buf,
    ) -> anyhow::Result<()>;

    /// `x += activated · down_projᵀ`
    fn mlp_out(
        &mut self,
        batch: &Batch,
        down_proj: &Self::Weight,
        activated: &Self::Buf,
        x: &mut Self::Buf,
    ) -> anyhow::Result<()>;

    /// Final norm and head for the rows in `batch.sample_rows`, then one token for each of them (arg-max, or
    /// Gumbel-max at a temperature). `logits` is `[sample_rows, vocab_size]` and its content is only promised when
    /// `batch.keep_logits` is set.
    fn logits(
        &mut self,
        batch: &Batch,
        head: &Head<Self::Weight>,
        x: &Self::Buf,
        logits: &mut Self::Buf,
    ) -> anyhow::Result<()>;

    /// Runs `body`, which queues one whole step. A backend may capture it under `key` and replay it later, or run it
    /// on a thread of its own.
    fn step(
        &mut self,
        key: StepKey,
        body: &mut (dyn FnMut(&mut Self) -> anyhow::Result<()> + Send),
    ) -> anyhow::Result<()> {
        let _ = key;
        body(self)
    }

    /// What a step of up to so many tokens or sequences has to make first. Empty where every step is like the last.
    fn first_steps(&self, most_tokens: usize, most_sequences: usize) -> FirstSteps {
        let _ = (most_tokens, most_sequences);
        FirstSteps::default()
    }

    /// Waits for the oldest step whose samples were not taken yet; one token per sample row, appended to `out`.
    fn sampled(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()>;

    /// The first `rows * columns` values of a buffer as f32. Waits for everything queued.
    fn download(&mut self, buf: &Self::Buf, rows: usize, columns: usize) -> anyhow::Result<Vec<f32>>;

    /// Fills the first values of a buffer, for tests of single operations.
    fn fill(&mut self, buf: &mut Self::Buf, values: &[f32]) -> anyhow::Result<()>;

    /// Measures what the device can do at most; the memory that takes is given back. Who calls names the device.
    ///
    /// # Errors
    /// When the device fails. Too little memory is a reason in the result, no error.
    fn ceilings(&mut self, protocol: &peaks::Protocol) -> anyhow::Result<Ceilings> {
        let _ = protocol;
        Ok(Ceilings::missing("no_device"))
    }

    /// Lends `user` a moment of steady work, to be called again and again; the memory that takes is given back.
    /// `false` where the backend has none to lend, and `user` was not called.
    ///
    /// # Errors
    /// When the device fails, or its memory is too full; else those of `user`.
    fn lend_load(
        &mut self,
        user: &mut dyn FnMut(&mut peaks::Load<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        let _ = user;
        Ok(false)
    }
}
