//! Runs the cases of one shape and batch on two backends: the data they are given, the operations in their order, and the
//! comparison of what came of them.

use std::borrow::Cow;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};

use super::cases::{Case, Part, Variant};
use super::deviation::Deviation;
use super::{OpCheck, epsilon};
use crate::arch::TensorRole;
use crate::backend::{
    AttnIn, Backend, Batch, BufferUse, Head, MlpIn, PAGE_SIZE, Sampling, Shape, TokenInput, WeightUse,
    sampling,
};
use crate::weights::{HostTensor, StoredDType};

/// A small generator for test data; not the one of synthetic weights.
pub(super) struct Random(pub(super) u64);

impl Random {
    /// FNV-1a of a text: other texts give other values.
    fn named(text: &str) -> Self {
        let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
        Random(text.bytes().fold(0xCBF2_9CE4_8422_2325, hash))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) ^ (self.0 >> 11 & 0xFFFF)
    }

    /// Even in `±bound`.
    fn values(&mut self, count: usize, bound: f32) -> Vec<f32> {
        (0..count).map(|_| ((self.next() & 0xFF_FFFF) as f32 / 8_388_608.0 - 1.0) * bound).collect()
    }
}

/// A batch, the batch that must run before it to fill the cache, and one that touches every slot.
struct Setup {
    pages: usize,
    batch: Batch,
    history: Batch,
    poison: Batch,
}

impl Setup {
    fn new(sequences: &[(usize, usize)], random: &mut Random) -> Self {
        let needed = |(cached, new): (usize, usize)| (cached + new).div_ceil(PAGE_SIZE);
        let pages = sequences.iter().map(|&sequence| needed(sequence)).sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..pages as u32).collect();
        for last in (1..pages).rev() {
            free.swap(last, random.next() as usize % (last + 1));
        }
        let mut poison = Batch::default();
        poison.clear();
        poison.push((0..pages * PAGE_SIZE).map(|_| TokenInput::Id(0)), 0, &free, None);
        let (mut batch, mut history) = (Batch::default(), Batch::default());
        batch.clear();
        history.clear();
        for (index, &(cached, new)) in sequences.iter().enumerate() {
            let own = free.split_off(free.len() - needed((cached, new)));
            if cached > 0 {
                history.push((0..cached).map(|_| TokenInput::Id(0)), 0, &own, None);
            }
            let temperature = [0.0, 0.8][index % 2];
            let sampling = (index % 3 < 2).then_some(Sampling { temperature, seed: index as u64 });
            batch.push((0..new).map(|_| TokenInput::Id(0)), cached as u32, &own, sampling);
        }
        batch.keep_logits = true;
        Setup { pages, batch, history, poison }
    }
}

/// Weights of [`Backend::attn_in`] on backend `B`.
type AttnInOf<B> = AttnIn<<B as Backend>::Weight>;

/// The same thing on both backends.
struct Both<X, Y> {
    a: X,
    b: Y,
}

type Weights<A, B> = Both<<A as Backend>::Weight, <B as Backend>::Weight>;
type Bufs<A, B> = Both<<A as Backend>::Buf, <B as Backend>::Buf>;
type Caches<A, B> = Both<<A as Backend>::Kv, <B as Backend>::Kv>;

/// Both backends at one shape for one batch, and what was found so far.
pub(super) struct Rig<'a, A: Backend, B: Backend> {
    pub(super) a: A,
    pub(super) b: B,
    pub(super) shape: Shape,
    pub(super) stored: StoredDType,
    /// Those of this shape and batch that are wanted.
    pub(super) cases: &'a [Case],
    pub(super) random: Random,
    pub(super) checks: &'a mut Vec<OpCheck>,
}

impl<A: Backend, B: Backend> Rig<'_, A, B> {
    pub(super) fn run(&mut self, sequences: &[(usize, usize)]) -> anyhow::Result<()> {
        self.reseed("batch");
        let setup = Setup::new(sequences, &mut self.random);
        if self.wants(&[Part::Ids]) {
            self.embed(&setup)?;
        }
        self.attn_in_and_attention(&setup)?;
        if self.wants(&[Part::AttnOut]) {
            self.attn_out(&setup)?;
        }
        if self.wants(&[Part::MlpIn]) {
            self.mlp_in(&setup)?;
        }
        if self.wants(&[Part::MlpOut]) {
            self.mlp_out(&setup)?;
        }
        if self.wants(&[Part::Logits, Part::Samples, Part::SampledIds]) {
            self.logits(&setup)?;
        }
        Ok(())
    }

    /// Whether one of these parts is.
    fn wants(&self, parts: &[Part]) -> bool {
        self.cases.iter().any(|case| parts.contains(&case.part))
    }

    /// The numbers from here on do not depend on what was computed before.
    fn reseed(&mut self, what: &str) {
        let Case { shape, batch, .. } = self.cases[0];
        self.random = Random::named(&format!("{shape}, {batch}: {what}"));
    }

    fn embed(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.reseed("embed");
        let Shape { hidden_size, vocab_size, .. } = self.shape;
        let table = self.matrices(WeightUse::Embedding, &[vocab_size], hidden_size)?;
        let mut batch = setup.batch.clone();
        let last = batch.num_tokens() - 1;
        for token in &mut batch.tokens {
            *token = TokenInput::Id((self.random.next() % vocab_size as u64) as u32);
        }
        batch.tokens[0] = TokenInput::Id(0);
        batch.tokens[last] = TokenInput::Id(vocab_size as u32 - 1);
        let mut x = self.buffer(BufferUse::Residual, batch.num_tokens(), hidden_size, &[])?;
        self.a.embed(&batch, &table.a, &mut x.a)?;
        self.b.embed(&batch, &table.b, &mut x.b)?;
        self.compare(Part::Ids, &x, batch.num_tokens(), hidden_size)
    }

    /// `attn_in` is seen in `q`, and in the keys and values through attention: over a context of one token attention
    /// gives back its value.
    fn attn_in_and_attention(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let mut kv = None;
        for variant in Variant::ALL {
            let wants_attention = self.wants(&[Part::Attended(variant)]);
            if !wants_attention && !self.wants(&[Part::Cached(variant), Part::New(variant)]) {
                continue;
            }
            let kv = match &mut kv {
                Some(kv) => kv,
                none => none.insert(self.poisoned_cache(setup)?),
            };
            self.attn_in(setup, variant, kv)?;
            if wants_attention {
                self.attention(setup, variant, kv)?;
            }
        }
        Ok(())
    }

    /// Keys and values whose every slot in the layer that is looked at holds NaN, where attention will look at it.
    fn poisoned_cache(&mut self, setup: &Setup) -> anyhow::Result<Caches<A, B>> {
        let mut kv = Both { a: self.a.kv_cache(setup.pages)?, b: self.b.kv_cache(setup.pages)? };
        if !self.wants(&Variant::ALL.map(Part::Attended)) {
            return Ok(kv);
        }
        self.reseed("poison");
        let (tokens, hidden) = (setup.poison.num_tokens(), self.shape.hidden_size);
        let weights = self.attn_in_weights(Variant::Plain)?;
        let x = self.buffer(BufferUse::Residual, tokens, hidden, &vec![f32::NAN; tokens * hidden])?;
        let mut q = self.buffer(BufferUse::Activation, tokens, self.shape.q_size(), &[])?;
        let layer = self.shape.num_layers - 1;
        self.a.attn_in(&setup.poison, layer, &weights.a, &x.a, &mut kv.a, &mut q.a)?;
        self.b.attn_in(&setup.poison, layer, &weights.b, &x.b, &mut kv.b, &mut q.b)?;
        Ok(kv)
    }

    /// The tokens that the batch finds in the cache, then its own.
    fn attn_in(&mut self, setup: &Setup, variant: Variant, kv: &mut Caches<A, B>) -> anyhow::Result<()> {
        let (hidden, q_size) = (self.shape.hidden_size, self.shape.q_size());
        self.reseed(Part::Attended(variant).name());
        let weights = self.attn_in_weights(variant)?;
        let layer = self.shape.num_layers - 1;
        for (part, batch) in [(Part::Cached(variant), &setup.history), (Part::New(variant), &setup.batch)] {
            let tokens = batch.num_tokens();
            if tokens == 0 || !self.wants(&[part, Part::Attended(variant)]) {
                continue;
            }
            self.reseed(part.name());
            let values = self.random.values(tokens * hidden, 2.0);
            let x = self.buffer(BufferUse::Residual, tokens, hidden, &values)?;
            let mut q = self.buffer(BufferUse::Activation, tokens, q_size, &[])?;
            self.a.attn_in(batch, layer, &weights.a, &x.a, &mut kv.a, &mut q.a)?;
            self.b.attn_in(batch, layer, &weights.b, &x.b, &mut kv.b, &mut q.b)?;
            self.compare(part, &q, tokens, q_size)?;
        }
        Ok(())
    }

    fn attention(&mut self, setup: &Setup, variant: Variant, kv: &Caches<A, B>) -> anyhow::Result<()> {
        let (tokens, q_size) = (setup.batch.num_tokens(), self.shape.q_size());
        self.reseed("attention");
        let values = self.random.values(tokens * q_size, 2.0);
        let q = self.buffer(BufferUse::Activation, tokens, q_size, &values)?;
        let mut out = self.buffer(BufferUse::Activation, tokens, q_size, &[])?;
        let layer = self.shape.num_layers - 1;
        self.a.attention(&setup.batch, layer, &q.a, &kv.a, &mut out.a)?;
        self.b.attention(&setup.batch, layer, &q.b, &kv.b, &mut out.b)?;
        self.compare(Part::Attended(variant), &out, tokens, q_size)
    }

    fn attn_in_weights(&mut self, variant: Variant) -> anyhow::Result<Both<AttnInOf<A>, AttnInOf<B>>> {
        let (q, kv, head_dim) = (self.shape.q_size(), self.shape.kv_size(), self.shape.head_dim);
        let norm = self.vector(self.shape.hidden_size)?;
        let qkv = self.matrices(WeightUse::Qkv, &[q, kv, kv], self.shape.hidden_size)?;
        let mut weights = Both {
            a: AttnIn { norm: norm.a, qkv: qkv.a, bias: None, qk_norm: None },
            b: AttnIn { norm: norm.b, qkv: qkv.b, bias: None, qk_norm: None },
        };
        if variant == Variant::Bias {
            let bias = self.vector(q + 2 * kv)?;
            (weights.a.bias, weights.b.bias) = (Some(bias.a), Some(bias.b));
        }
        if variant == Variant::QkNorm {
            let (q, k) = (self.vector(head_dim)?, self.vector(head_dim)?);
            (weights.a.qk_norm, weights.b.qk_norm) = (Some((q.a, k.a)), Some((q.b, k.b)));
        }
        Ok(weights)
    }

    fn attn_out(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.reseed("attn_out");
        let (tokens, hidden, q_size) =
            (setup.batch.num_tokens(), self.shape.hidden_size, self.shape.q_size());
        let (o_proj, attended, mut x) = self.residual_operands(tokens, q_size)?;
        self.a.attn_out(&setup.batch, &o_proj.a, &attended.a, &mut x.a)?;
        self.b.attn_out(&setup.batch, &o_proj.b, &attended.b, &mut x.b)?;
        self.compare(Part::AttnOut, &x, tokens, hidden)
    }

    fn mlp_in(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.reseed("mlp_in");
        let Shape { hidden_size, intermediate_size, .. } = self.shape;
        let tokens = setup.batch.num_tokens();
        let norm = self.vector(hidden_size)?;
        let gate_up = self.matrices(WeightUse::GateUp, &[intermediate_size; 2], hidden_size)?;
        let values = self.random.values(tokens * hidden_size, 2.0);
        let x = self.buffer(BufferUse::Residual, tokens, hidden_size, &values)?;
        let mut out = self.buffer(BufferUse::Activation, tokens, intermediate_size, &[])?;
        self.a.mlp_in(&setup.batch, &MlpIn { norm: norm.a, gate_up: gate_up.a }, &x.a, &mut out.a)?;
        self.b.mlp_in(&setup.batch, &MlpIn { norm: norm.b, gate_up: gate_up.b }, &x.b, &mut out.b)?;
        self.compare(Part::MlpIn, &out, tokens, intermediate_size)
    }

    fn mlp_out(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.reseed("mlp_out");
        let (tokens, hidden) = (setup.batch.num_tokens(), self.shape.hidden_size);
        let (down_proj, activated, mut x) = self.residual_operands(tokens, self.shape.intermediate_size)?;
        self.a.mlp_out(&setup.batch, &down_proj.a, &activated.a, &mut x.a)?;
        self.b.mlp_out(&setup.batch, &down_proj.b, &activated.b, &mut x.b)?;
        self.compare(Part::MlpOut, &x, tokens, hidden)
    }

    /// Logits, then the tokens: they must be what the candidate's own logits give, bit for bit; then the lookup of
    /// these tokens by the next step.
    fn logits(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.reseed("logits");
        let Shape { hidden_size, vocab_size, .. } = self.shape;
        let (batch, samples) = (&setup.batch, setup.batch.sample_rows.len());
        let norm = self.vector(hidden_size)?;
        let lm_head = self.matrices(WeightUse::Embedding, &[vocab_size], hidden_size)?;
        let values = self.random.values(batch.num_tokens() * hidden_size, 2.0);
        let x = self.buffer(BufferUse::Residual, batch.num_tokens(), hidden_size, &values)?;
        let mut logits = self.buffer(BufferUse::Logits, samples, vocab_size, &[])?;
        let head = Head { norm: norm.a, lm_head: lm_head.a };
        self.a.logits(batch, &head, &x.a, &mut logits.a)?;
        let head = Head { norm: norm.b, lm_head: lm_head.b };
        self.b.logits(batch, &head, &x.b, &mut logits.b)?;
        self.compare(Part::Logits, &logits, samples, vocab_size)?;
        let tokens = self.check_samples(batch, &logits)?;
        self.look_up_samples(&tokens, &head.lm_head)
    }

    fn check_samples(&mut self, batch: &Batch, logits: &Bufs<A, B>) -> anyhow::Result<Vec<u32>> {
        let (samples, vocab_size) = (batch.sample_rows.len(), self.shape.vocab_size);
        let mut found = Vec::new();
        self.b.sampled(&mut found)?;
        let values = self.b.download(&logits.b, samples, vocab_size)?;
        let mut right = Vec::new();
        for (s, row) in values.chunks_exact(vocab_size).enumerate() {
            let position = batch.positions[batch.sample_rows[s] as usize];
            right.push(sampling::choose(row, batch.sampling[s], position)?);
        }
        self.record_equal(Part::Samples, found == right);
        Ok(found)
    }

    /// The rows of the previous step's samples, read on the device, against those of the same ids from the host.
    fn look_up_samples(&mut self, tokens: &[u32], table: &B::Weight) -> anyhow::Result<()> {
        let hidden = self.shape.hidden_size;
        let mut look_up = |input: fn(usize, u32) -> TokenInput| {
            let mut batch = Batch::default();
            batch.tokens.extend(tokens.iter().enumerate().rev().map(|(row, &id)| input(row, id)));
            batch.positions.resize(tokens.len(), 0);
            let mut x = self.b.buffer(BufferUse::Residual, tokens.len(), hidden)?;
            self.b.embed(&batch, table, &mut x)?;
            self.b.download(&x, tokens.len(), hidden)
        };
        let right = look_up(|_, id| TokenInput::Id(id))?;
        let found = look_up(|row, _| TokenInput::Sampled(row as u32))?;
        self.record_equal(Part::SampledIds, found == right);
        Ok(())
    }

    /// A projection from `width` to the residual stream, its input and the stream.
    #[allow(clippy::type_complexity)]
    fn residual_operands(
        &mut self,
        tokens: usize,
        width: usize,
    ) -> anyhow::Result<(Weights<A, B>, Bufs<A, B>, Bufs<A, B>)> {
        let hidden = self.shape.hidden_size;
        let weight = self.matrices(WeightUse::Linear, &[hidden], width)?;
        let input = self.random.values(tokens * width, 2.0);
        let residual = self.random.values(tokens * hidden, 2.0);
        let input = self.buffer(BufferUse::Activation, tokens, width, &input)?;
        Ok((weight, input, self.buffer(BufferUse::Residual, tokens, hidden, &residual)?))
    }

    /// A gain or a bias.
    fn vector(&mut self, length: usize) -> anyhow::Result<Weights<A, B>> {
        let values: Vec<f32> = self.random.values(length, 0.5).iter().map(|value| 1.0 + value).collect();
        let tensor = host_tensor(StoredDType::F32, vec![length], &values)?;
        self.upload(WeightUse::Vector, &[tensor])
    }

    /// Parts stacked by rows, at a scale that keeps products near 1.
    fn matrices(
        &mut self,
        usage: WeightUse,
        rows: &[usize],
        columns: usize,
    ) -> anyhow::Result<Weights<A, B>> {
        let whole_blocks = columns.is_multiple_of(self.stored.block_elements());
        let stored = if whole_blocks { self.stored } else { StoredDType::F32 };
        let bound = (3.0 / columns as f32).sqrt();
        let parts = rows
            .iter()
            .map(|&rows| host_tensor(stored, vec![rows, columns], &self.random.values(rows * columns, bound)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.upload(usage, &parts)
    }

    fn upload(&mut self, usage: WeightUse, parts: &[HostTensor<'_>]) -> anyhow::Result<Weights<A, B>> {
        Ok(Both { a: self.a.upload(usage, parts)?, b: self.b.upload(usage, parts)? })
    }

    /// A buffer with `values` in its first rows; the others, and some beyond, hold NaN.
    fn buffer(
        &mut self,
        usage: BufferUse,
        rows: usize,
        columns: usize,
        values: &[f32],
    ) -> anyhow::Result<Bufs<A, B>> {
        let rows = rows + 3;
        let mut filled = vec![f32::NAN; rows * columns];
        filled[..values.len()].copy_from_slice(values);
        let mut bufs =
            Both { a: self.a.buffer(usage, rows, columns)?, b: self.b.buffer(usage, rows, columns)? };
        self.b.fill(&mut bufs.b, &filled)?;
        // Both get what the candidate can hold: rounding the operands is not the operation's fault.
        let held = self.b.download(&bufs.b, rows, columns)?;
        self.a.fill(&mut bufs.a, &held)?;
        Ok(bufs)
    }

    fn compare(&mut self, part: Part, bufs: &Bufs<A, B>, rows: usize, columns: usize) -> anyhow::Result<()> {
        if !self.wants(&[part]) {
            return Ok(());
        }
        let right = self.a.download(&bufs.a, rows, columns)?;
        let found = self.b.download(&bufs.b, rows, columns)?;
        let epsilon = epsilon(self.b.info().compute_dtype, part.op());
        self.record(part, Deviation::measure(&right, &found, columns, epsilon));
        Ok(())
    }

    /// A comparison with no tolerance.
    fn record_equal(&mut self, part: Part, equal: bool) {
        self.record(part, if equal { Deviation::NONE } else { Deviation::difference(&[], &[]) });
    }

    fn record(&mut self, part: Part, deviation: Deviation) {
        let case = self.cases.iter().find(|case| case.part == part).map(Case::text);
        self.checks.extend(case.map(|case| OpCheck { op: part.op().name(), case, deviation }));
    }
}

/// Values stored as `dtype`: rounded, or quantised by candle.
fn host_tensor(dtype: StoredDType, shape: Vec<usize>, values: &[f32]) -> anyhow::Result<HostTensor<'static>> {
    let bytes = match dtype {
        StoredDType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        StoredDType::F16 => {
            values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect()
        }
        StoredDType::BF16 => {
            values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect()
        }
        _ => {
            let tensor = Tensor::from_slice(values, shape.as_slice(), &Device::Cpu)?;
            QTensor::quantize(&tensor, dtype.ggml())?.data()?.into_owned()
        }
    };
    let role = if shape.len() == 1 { TensorRole::Norm } else { TensorRole::Linear };
    Ok(HostTensor { name: "check".to_owned(), role, dtype, shape, bytes: Cow::Owned(bytes) })
}
