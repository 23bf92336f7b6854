//! How long each fused operation takes at a model's shapes, against the bound that the device's ceilings set. Weights
//! are rotated over several copies and keys and values over several layers, so that a cache does not hold what a whole
//! model would stream. Made-up copies differ and are made on the device where it can, since they are many gigabytes
//! together. Knows no command line.

mod weights;

use anyhow::Context as _;
use serde::Serialize;

use super::shape_of;
use crate::arch::{Op, StepTokens};
use crate::backend::peaks::{Kind, Protocol, TIMES_CACHE, Work};
use crate::backend::{Backend, Batch, BufferUse, PAGE_SIZE, Sampling, Shape, StepKey, TokenInput};
use crate::record::{Bound, Ceiling, Ceilings, Maybe};
use crate::weights::Weights;
use weights::{OpWeights, Source};

/// Shortest repetition, ns.
const LEAST_NS: u64 = 20_000_000;
/// Fewest copies that are rotated, whatever their size, and most.
const FEWEST_COPIES: u64 = 4;
const MOST_COPIES: u64 = 1024;
/// Layers of keys and values; each has to be filled.
const MOST_KV_LAYERS: u64 = 64;
/// Tokens whose keys and values are made in one step.
const FILL_TOKENS: usize = 512;
/// Operations in one captured graph at most.
const MOST_CAPTURED: usize = 64;

/// One kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepShape {
    /// One token for each of `batch` sequences that hold `depth` tokens.
    Decode { batch: u32, depth: u32 },
    /// `batch` whole prompts.
    Prefill { batch: u32, isl: u32 },
}

/// As cells are named: `decode/b8/d512`.
impl std::fmt::Display for StepShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StepShape::Decode { batch, depth } => write!(f, "decode/b{batch}/d{depth}"),
            StepShape::Prefill { batch, isl } => write!(f, "prefill/b{batch}/i{isl}"),
        }
    }
}

impl StepShape {
    /// Sequences, tokens that each holds before, and new tokens of each.
    fn sizes(self) -> (usize, usize, usize) {
        match self {
            StepShape::Decode { batch, depth } => (batch as usize, depth as usize, 1),
            StepShape::Prefill { batch, isl } => (batch as usize, 0, isl as usize),
        }
    }

    fn tokens(self) -> StepTokens {
        match self {
            StepShape::Decode { batch, depth } => StepTokens::decode(batch, depth),
            StepShape::Prefill { batch, isl } => StepTokens::prefill(batch, isl),
        }
    }

    /// Longest sequence, tokens.
    pub fn context(self) -> usize {
        let (_, held, new) = self.sizes();
        held + new
    }

    fn batch(self, vocab_size: usize) -> Batch {
        let (sequences, held, new) = self.sizes();
        let mut batch = Batch::default();
        batch.clear();
        for s in 0..sequences {
            let token = |i: usize| TokenInput::Id(((s * 7919 + i * 104_729 + 1) % vocab_size) as u32);
            batch.push((0..new).map(token), held as u32, &self.pages(s), Some(Sampling::GREEDY));
        }
        batch
    }

    fn pages(self, sequence: usize) -> Vec<u32> {
        let each = self.context().div_ceil(PAGE_SIZE);
        (sequence * each..(sequence + 1) * each).map(|page| page as u32).collect()
    }
}

/// One operation of one layer at one shape.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpTime {
    pub step: String,
    pub op: &'static str,
    /// Queued one by one; the unit is nanoseconds.
    pub time_ns: Maybe<Ceiling>,
    /// Replayed from a captured graph.
    pub replayed_ns: Maybe<Ceiling>,
    /// Read and written at least.
    pub bytes: u64,
    pub flops: f64,
    pub bound: Maybe<Bound>,
    /// The bound over the time.
    pub bound_share: Maybe<f64>,
    /// Copies of weights, or layers of keys and values, that were rotated.
    pub copies: u64,
    pub rotated_bytes: u64,
    /// The copies together are below eight times the last-level cache: the bound of the memory may be beaten.
    pub in_cache: bool,
}

/// What is timed, and how.
pub struct OpTimer<'a, B> {
    /// A backend for a model of the given shape.
    pub make: &'a dyn Fn(Shape) -> anyhow::Result<B>,
    pub weights: &'a dyn Weights,
    pub ceilings: &'a Ceilings,
    pub protocol: &'a Protocol,
    /// Most memory that the copies of one operation may take.
    pub most_bytes: u64,
    /// Decode steps can be captured and replayed.
    pub captures: bool,
}

/// A step on the device: activations, random, and the batch.
struct Rig<B: Backend> {
    batch: Batch,
    x: B::Buf,
    q: B::Buf,
    attended: B::Buf,
    activated: B::Buf,
    logits: B::Buf,
    kv: B::Kv,
}

impl<B: Backend> OpTimer<'_, B> {
    /// Times every operation at every shape.
    ///
    /// # Errors
    /// When a tensor is missing, memory does not suffice for the fewest copies, or the device fails.
    pub fn time_all(&self, shapes: &[StepShape]) -> anyhow::Result<Vec<OpTime>> {
        let mut times = Vec::new();
        for op in Op::ALL {
            for shape in shapes {
                let time = self.time(op, *shape);
                times.push(time.with_context(|| format!("timing {} at {shape}", op.name()))?);
            }
        }
        // By step, as they run in it.
        let place = |time: &OpTime| shapes.iter().position(|shape| shape.to_string() == time.step);
        times.sort_by_key(place);
        Ok(times)
    }

    fn time(&self, op: Op, shape: StepShape) -> anyhow::Result<OpTime> {
        let config = self.weights.config();
        let layers = if op == Op::Attention { self.kv_layers(shape)? } else { 1 };
        let mut backend = (self.make)(Shape { num_layers: layers, ..shape_of(config) })?;
        let mut rig = Rig::new(&mut backend, shape)?;
        let (copies, copy_bytes) = self.copies(&mut backend, op)?;
        if op == Op::Attention {
            self.fill(&mut backend, shape, &mut rig, layers)?;
        }
        let eager = self.run(&mut backend, &mut rig, &copies, layers, false)?;
        let replayed = match (self.captures, shape) {
            (false, _) => Maybe::missing("not_captured"),
            (true, StepShape::Prefill { .. }) => Maybe::missing("prefill_is_not_captured"),
            (true, StepShape::Decode { .. }) => self.run(&mut backend, &mut rig, &copies, layers, true)?,
        };
        let rotated_bytes = match op {
            Op::Embed => {
                copies.len() as u64 * shape.tokens().tokens * (copy_bytes / config.vocab_size as u64)
            }
            Op::Attention => backend.memory().kv_bytes,
            _ => copies.len() as u64 * copy_bytes,
        };
        let work = op.work(config, &shape.tokens());
        let info = backend.info();
        let weight_bytes = match op {
            Op::Embed => rotated_bytes / copies.len() as u64,
            _ => copy_bytes,
        };
        let bytes = weight_bytes
            + work.activation_values * value_bytes(info.compute_dtype)
            + work.kv_values * value_bytes(info.kv_dtype)
            + work.id_bytes;
        let bound = self.ceilings.bound(bytes, work.flops, info.compute_dtype);
        Ok(OpTime {
            step: shape.to_string(),
            op: op.name(),
            bound_share: share(&bound, &eager),
            time_ns: eager,
            replayed_ns: replayed,
            bytes,
            flops: work.flops,
            bound,
            copies: copies.len().max(layers) as u64,
            rotated_bytes,
            in_cache: self
                .ceilings
                .last_level_cache_bytes
                .value()
                .is_some_and(|cache| rotated_bytes < cache.saturating_mul(TIMES_CACHE)),
        })
    }

    /// So many copies of `bytes` that a cache does not matter, within the memory.
    fn wanted(&self, bytes: u64, most: u64) -> u64 {
        let cache = self.ceilings.last_level_cache_bytes.value().copied().unwrap_or(0);
        let bytes = bytes.max(1);
        let wanted = cache.saturating_mul(TIMES_CACHE).div_ceil(bytes).min(self.most_bytes / bytes);
        wanted.clamp(FEWEST_COPIES, most)
    }

    fn kv_layers(&self, shape: StepShape) -> anyhow::Result<usize> {
        let one_layer = Shape { num_layers: 1, ..shape_of(self.weights.config()) };
        let (sequences, ..) = shape.sizes();
        let pages = sequences * shape.context().div_ceil(PAGE_SIZE);
        let bytes = (self.make)(one_layer)?.page_bytes() * pages as u64;
        Ok(self.wanted(bytes, MOST_KV_LAYERS) as usize)
    }

    /// The copies of an operation's weights, and the bytes of one on the device.
    fn copies(&self, backend: &mut B, op: Op) -> anyhow::Result<(Vec<OpWeights<B::Weight>>, u64)> {
        let mut source = Source::of(self.weights, op);
        let before = backend.memory().weights_bytes;
        let mut copies = vec![source.put(backend, 0)?];
        let bytes = backend.memory().weights_bytes - before;
        let wanted = match op {
            Op::Attention => 1,
            // Only some rows are read, which no number of copies makes many.
            Op::Embed => FEWEST_COPIES,
            _ => self.wanted(bytes, MOST_COPIES),
        };
        for copy in 1..wanted {
            copies.push(source.put(backend, copy)?);
        }
        Ok((copies, bytes))
    }

    /// Random keys and values for everything that the sequences hold, in every layer: those of random activations.
    fn fill(&self, backend: &mut B, shape: StepShape, rig: &mut Rig<B>, layers: usize) -> anyhow::Result<()> {
        let weights = Source::of(self.weights, Op::AttnIn).put(backend, 0)?;
        let OpWeights::AttnIn(weights) = weights else { return Ok(()) };
        let (hidden, q_size) = (backend.shape().hidden_size, backend.shape().q_size());
        let mut x = backend.buffer(BufferUse::Residual, FILL_TOKENS, hidden)?;
        let mut q = backend.buffer(BufferUse::Activation, FILL_TOKENS, q_size)?;
        backend.fill(&mut x, &random(FILL_TOKENS * hidden, 3))?;
        let (sequences, held, new) = shape.sizes();
        let mut batch = Batch::default();
        for layer in 0..layers {
            for sequence in 0..sequences {
                for first in (0..held + new).step_by(FILL_TOKENS) {
                    let tokens = FILL_TOKENS.min(held + new - first);
                    batch.clear();
                    let ids = (0..tokens).map(|_| TokenInput::Id(0));
                    batch.push(ids, first as u32, &shape.pages(sequence), None);
                    let (x, kv) = (&mut x, &mut rig.kv);
                    backend.step(key_of(&batch, false), &mut |backend| {
                        // Borrowed uniquely: a buffer may be handed to another thread, but not shared with it.
                        let x = &mut *x;
                        backend.attn_in(&batch, layer, &weights, x, kv, &mut q)
                    })?;
                }
            }
        }
        backend.download(&x, 1, 1).map(drop)
    }

    /// One operation's time, ns.
    fn run(
        &self,
        backend: &mut B,
        rig: &mut Rig<B>,
        copies: &[OpWeights<B::Weight>],
        layers: usize,
        captured: bool,
    ) -> anyhow::Result<Maybe<Ceiling>> {
        let rotation = copies.len().max(layers);
        let (mut next, mut samples) = (0, Vec::new());
        let per_step = if captured { rotation.min(MOST_CAPTURED) } else { 1 };
        let key = key_of(&rig.batch, captured);
        let is_logits = matches!(copies[0], OpWeights::Logits(_));
        let timed = self.protocol.time(LEAST_NS, |units| {
            // A captured step repeats itself to the letter; otherwise each operation takes the next copy.
            let (steps, operations) = if captured { (units, per_step) } else { (1, units as usize) };
            for _ in 0..steps {
                let first = if captured { 0 } else { next };
                backend.step(key, &mut |backend| {
                    (0..operations).try_for_each(|i| {
                        let at = (first + i) % rotation;
                        rig.queue(backend, &copies[at % copies.len()], at % layers)
                    })
                })?;
                next = (first + operations) % rotation;
                let waiting = if captured {
                    1
                } else if is_logits {
                    operations
                } else {
                    0
                };
                for _ in 0..waiting {
                    samples.clear();
                    backend.sampled(&mut samples)?;
                }
            }
            backend.download(&rig.x, 1, 1).map(drop)
        })?;
        let by = backend.info().name;
        Ok(timed.ceiling(Kind::Latency, Work { by, per_unit: per_step as u64, working_set_bytes: 0 }))
    }
}

fn share(bound: &Maybe<Bound>, time_ns: &Maybe<Ceiling>) -> Maybe<f64> {
    bound.as_ref().zip(time_ns.as_ref()).map(|(bound, time_ns)| bound.bound_ns / time_ns.value)
}

fn key_of(batch: &Batch, captured: bool) -> StepKey {
    StepKey { tokens: batch.num_tokens(), sequences: batch.num_sequences(), decode_only: captured }
}

/// Bytes of one activation, or of one key or value.
fn value_bytes(dtype: &str) -> u64 {
    if matches!(dtype, "bf16" | "f16") { 2 } else { 4 }
}

/// `length` values in (−1, 1), never zero.
fn random(length: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as i32 * 2 + 1 - (1 << 24)) as f32 * (1.0 / (1 << 24) as f32)
    };
    (0..length).map(|_| next()).collect()
}

impl<B: Backend> Rig<B> {
    fn new(backend: &mut B, step: StepShape) -> anyhow::Result<Self> {
        let shape = backend.shape().clone();
        let (sequences, _, new) = step.sizes();
        let tokens = sequences * new;
        let mut filled = |usage, columns: usize, seed| -> anyhow::Result<B::Buf> {
            let mut buffer = backend.buffer(usage, tokens, columns)?;
            backend.fill(&mut buffer, &random(tokens * columns, seed))?;
            Ok(buffer)
        };
        Ok(Rig {
            batch: step.batch(shape.vocab_size),
            x: filled(BufferUse::Residual, shape.hidden_size, 11)?,
            q: filled(BufferUse::Activation, shape.q_size(), 12)?,
            attended: filled(BufferUse::Activation, shape.q_size(), 13)?,
            activated: filled(BufferUse::Activation, shape.intermediate_size, 14)?,
            logits: backend.buffer(BufferUse::Logits, sequences, shape.vocab_size)?,
            kv: backend.kv_cache(sequences * step.context().div_ceil(PAGE_SIZE))?,
        })
    }

    fn queue(&mut self, backend: &mut B, weights: &OpWeights<B::Weight>, layer: usize) -> anyhow::Result<()> {
        let Rig { batch, x, q, attended, activated, logits, kv } = self;
        match weights {
            OpWeights::Embed(table) => backend.embed(batch, table, x),
            OpWeights::AttnIn(weights) => backend.attn_in(batch, layer, weights, x, kv, q),
            OpWeights::Attention => backend.attention(batch, layer, q, kv, attended),
            OpWeights::AttnOut(o_proj) => backend.attn_out(batch, o_proj, attended, x),
            OpWeights::MlpIn(weights) => backend.mlp_in(batch, weights, x, activated),
            OpWeights::MlpOut(down_proj) => backend.mlp_out(batch, down_proj, activated, x),
            OpWeights::Logits(head) => backend.logits(batch, head, x, logits),
        }
    }
}
