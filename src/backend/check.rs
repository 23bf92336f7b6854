//! Every operation of one backend held against another's, usually [`super::Reference`], at many shapes with random
//! data. What must not be read (rows beyond the batch, slots beyond the context, pages of others) holds NaN.
//!
//! A value passes when it is within `ε · (rms + |reference|)`, where ε belongs to the candidate's arithmetic and rms is
//! that of the value's row in the reference: sums of many terms cancel, so an error relative to the value alone means
//! little.

use std::borrow::Cow;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};

use super::{
    AttnIn, Backend, Batch, BufferUse, Head, MlpIn, PAGE_SIZE, Sampling, Shape, TokenInput, WeightUse,
    sampling,
};
use crate::arch::TensorRole;
use crate::weights::{HostTensor, StoredDType};

/// One operation at one shape and batch.
#[derive(Clone, Debug, PartialEq)]
pub struct OpCheck {
    pub op: &'static str,
    /// Shape and batch in words.
    pub case: String,
    /// Largest absolute difference.
    pub max_error: f64,
    /// Largest share of the tolerance that a value used; above 1 (or not finite) fails.
    pub tolerance_used: f64,
    pub passed: bool,
}

/// Checks every operation at every shape that the candidate `supports`. Matrices are stored as `stored` wherever their
/// rows are whole blocks of it, and both backends are given the same bytes.
///
/// # Errors
/// When a backend cannot be made or an operation fails.
pub fn check_ops<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    stored: StoredDType,
    supports: impl Fn(&Shape) -> bool,
) -> anyhow::Result<Vec<OpCheck>> {
    let mut checks = Vec::new();
    let shapes = shapes().into_iter().enumerate().filter(|(_, (_, shape))| supports(shape));
    for (seed, (shape_name, shape)) in shapes {
        for (batch_name, sequences) in batches() {
            let mut rig = Rig {
                a: reference(shape.clone())?,
                b: candidate(shape.clone())?,
                shape: shape.clone(),
                stored,
                case: format!("{shape_name}, {batch_name}"),
                random: Random(seed as u64 + 1),
                checks: &mut checks,
            };
            let setup = Setup::new(&sequences, &mut rig.random);
            rig.embed(&setup)?;
            let mut kv = rig.poisoned_cache(&setup)?;
            for variant in [Variant::Plain, Variant::Bias, Variant::QkNorm] {
                rig.attn_in_and_attention(&setup, variant, &mut kv)?;
            }
            rig.attn_out(&setup)?;
            rig.mlp_in(&setup)?;
            rig.mlp_out(&setup)?;
            rig.logits(&setup)?;
        }
    }
    Ok(checks)
}

/// What the candidate's arithmetic may lose in one operation.
fn epsilon(compute_dtype: &str, op: &str) -> f64 {
    let narrow = match op {
        // Keys and values that `attn_in` has rounded, and weights: errors of scores are exponentiated, and where the
        // values cancel they stay.
        "attention" => 2.0,
        _ => 1.0,
    };
    match compute_dtype {
        // Sums of up to some thousand products in another order; blocks are multiplied by unrounded activations.
        "f32" | "quantized" => 1e-5,
        // Three more bits of mantissa than bf16.
        "f16" => narrow / 256.0,
        // Eight bits of mantissa, sums in f32: each operand and each result is off by up to 2⁻⁹ of itself, and the
        // largest of some 10⁵ sums of such errors is looked at.
        _ => narrow / 32.0,
    }
}

fn shapes() -> Vec<(&'static str, Shape)> {
    // heads, key/value heads, head_dim, hidden_size, intermediate_size, vocab_size
    [
        ("odd sizes", 2, 2, 10, 37, 51, 67),
        ("GQA 3", 6, 2, 64, 192, 320, 509),
        ("GQA 4", 8, 2, 32, 256, 512, 300),
        ("GQA 7, head_dim 128", 7, 1, 128, 256, 512, 130),
        ("GQA 8", 8, 1, 16, 96, 64, 1000),
        ("head_dim 96", 2, 2, 96, 72, 104, 513),
        ("GQA 16, head_dim 256", 16, 1, 256, 64, 40, 77),
    ]
    .map(|(name, num_heads, num_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size)| {
        let inv_freq = (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let shape = Shape {
            hidden_size,
            intermediate_size,
            num_layers: 2,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            rms_norm_eps: 1e-5,
            inv_freq,
        };
        (name, shape)
    })
    .into()
}

/// Sequences as (tokens already in the cache, new tokens).
fn batches() -> Vec<(&'static str, Vec<(usize, usize)>)> {
    vec![
        ("one token, context 1", vec![(0, 1)]),
        ("decode around a page's end", vec![(14, 1), (15, 1), (16, 1), (0, 1), (99, 1)]),
        ("decode of 19 sequences", (0..19).map(|s| (s * 3, 1)).collect()),
        ("prompt of 45", vec![(0, 45)]),
        ("prompts across tiles", vec![(0, 65), (3, 130)]),
        ("decodes before a prompt and a chunk", vec![(40, 1), (0, 1), (17, 1), (0, 70), (9, 20), (5, 1)]),
        ("prompts, a chunk and decodes", vec![(0, 7), (21, 18), (40, 1), (0, 16), (31, 2), (5, 1)]),
    ]
}

/// A small generator for test data; not the one of synthetic weights.
struct Random(u64);

impl Random {
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

#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Plain,
    Bias,
    QkNorm,
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

/// Both backends at one shape, and what was found so far.
struct Rig<'a, A: Backend, B: Backend> {
    a: A,
    b: B,
    shape: Shape,
    stored: StoredDType,
    case: String,
    random: Random,
    checks: &'a mut Vec<OpCheck>,
}

impl<A: Backend, B: Backend> Rig<'_, A, B> {
    fn embed(&mut self, setup: &Setup) -> anyhow::Result<()> {
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
        self.compare("embed", "", &x, batch.num_tokens(), hidden_size)
    }

    /// Keys and values whose every slot in the layer that is looked at holds NaN.
    fn poisoned_cache(&mut self, setup: &Setup) -> anyhow::Result<Caches<A, B>> {
        let (tokens, hidden) = (setup.poison.num_tokens(), self.shape.hidden_size);
        let weights = self.attn_in_weights(Variant::Plain)?;
        let mut kv = Both { a: self.a.kv_cache(setup.pages)?, b: self.b.kv_cache(setup.pages)? };
        let x = self.buffer(BufferUse::Residual, tokens, hidden, &vec![f32::NAN; tokens * hidden])?;
        let mut q = self.buffer(BufferUse::Activation, tokens, self.shape.q_size(), &[])?;
        let layer = self.shape.num_layers - 1;
        self.a.attn_in(&setup.poison, layer, &weights.a, &x.a, &mut kv.a, &mut q.a)?;
        self.b.attn_in(&setup.poison, layer, &weights.b, &x.b, &mut kv.b, &mut q.b)?;
        Ok(kv)
    }

    /// `attn_in` is seen in `q`, and in the keys and values through attention: over a context of one token attention
    /// gives back its value.
    fn attn_in_and_attention(
        &mut self,
        setup: &Setup,
        variant: Variant,
        kv: &mut Caches<A, B>,
    ) -> anyhow::Result<()> {
        let (hidden, q_size) = (self.shape.hidden_size, self.shape.q_size());
        let weights = self.attn_in_weights(variant)?;
        let note = match variant {
            Variant::Plain => "",
            Variant::Bias => ", bias",
            Variant::QkNorm => ", QK-norm",
        };
        let layer = self.shape.num_layers - 1;
        for batch in [&setup.history, &setup.batch] {
            let tokens = batch.num_tokens();
            let values = self.random.values(tokens * hidden, 2.0);
            let x = self.buffer(BufferUse::Residual, tokens, hidden, &values)?;
            let mut q = self.buffer(BufferUse::Activation, tokens, q_size, &[])?;
            self.a.attn_in(batch, layer, &weights.a, &x.a, &mut kv.a, &mut q.a)?;
            self.b.attn_in(batch, layer, &weights.b, &x.b, &mut kv.b, &mut q.b)?;
            if tokens > 0 {
                self.compare("attn_in", note, &q, tokens, q_size)?;
            }
        }
        let tokens = setup.batch.num_tokens();
        let values = self.random.values(tokens * q_size, 2.0);
        let q = self.buffer(BufferUse::Activation, tokens, q_size, &values)?;
        let mut out = self.buffer(BufferUse::Activation, tokens, q_size, &[])?;
        self.a.attention(&setup.batch, layer, &q.a, &kv.a, &mut out.a)?;
        self.b.attention(&setup.batch, layer, &q.b, &kv.b, &mut out.b)?;
        self.compare("attention", note, &out, tokens, q_size)
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
        let (tokens, hidden, q_size) =
            (setup.batch.num_tokens(), self.shape.hidden_size, self.shape.q_size());
        let (o_proj, attended, mut x) = self.residual_operands(tokens, q_size)?;
        self.a.attn_out(&setup.batch, &o_proj.a, &attended.a, &mut x.a)?;
        self.b.attn_out(&setup.batch, &o_proj.b, &attended.b, &mut x.b)?;
        self.compare("attn_out", "", &x, tokens, hidden)
    }

    fn mlp_in(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let Shape { hidden_size, intermediate_size, .. } = self.shape;
        let tokens = setup.batch.num_tokens();
        let norm = self.vector(hidden_size)?;
        let gate_up = self.matrices(WeightUse::GateUp, &[intermediate_size; 2], hidden_size)?;
        let values = self.random.values(tokens * hidden_size, 2.0);
        let x = self.buffer(BufferUse::Residual, tokens, hidden_size, &values)?;
        let mut out = self.buffer(BufferUse::Activation, tokens, intermediate_size, &[])?;
        self.a.mlp_in(&setup.batch, &MlpIn { norm: norm.a, gate_up: gate_up.a }, &x.a, &mut out.a)?;
        self.b.mlp_in(&setup.batch, &MlpIn { norm: norm.b, gate_up: gate_up.b }, &x.b, &mut out.b)?;
        self.compare("mlp_in", "", &out, tokens, intermediate_size)
    }

    fn mlp_out(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let (tokens, hidden) = (setup.batch.num_tokens(), self.shape.hidden_size);
        let (down_proj, activated, mut x) = self.residual_operands(tokens, self.shape.intermediate_size)?;
        self.a.mlp_out(&setup.batch, &down_proj.a, &activated.a, &mut x.a)?;
        self.b.mlp_out(&setup.batch, &down_proj.b, &activated.b, &mut x.b)?;
        self.compare("mlp_out", "", &x, tokens, hidden)
    }

    /// Logits, then the tokens: they must be what the candidate's own logits give, bit for bit; then the lookup of
    /// these tokens by the next step.
    fn logits(&mut self, setup: &Setup) -> anyhow::Result<()> {
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
        self.compare("logits", "", &logits, samples, vocab_size)?;
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
        self.record_equal("logits", ", samples", found == right);
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
        self.record_equal("embed", ", sampled tokens", found == right);
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

    fn compare(
        &mut self,
        op: &'static str,
        note: &str,
        bufs: &Bufs<A, B>,
        rows: usize,
        columns: usize,
    ) -> anyhow::Result<()> {
        let right = self.a.download(&bufs.a, rows, columns)?;
        let found = self.b.download(&bufs.b, rows, columns)?;
        let epsilon = epsilon(self.b.info().compute_dtype, op);
        let (mut max_error, mut used) = (0f64, 0f64);
        for (right, found) in right.chunks(columns).zip(found.chunks(columns)) {
            let rms = rms(right);
            for (&right, &found) in right.iter().zip(found) {
                let error = (f64::from(right) - f64::from(found)).abs();
                let share = error / (epsilon * (rms + f64::from(right).abs()));
                // `max` would drop a NaN.
                max_error = if error > max_error || error.is_nan() { error } else { max_error };
                used = if share > used || share.is_nan() { share } else { used };
            }
        }
        self.record(op, note, max_error, used);
        Ok(())
    }

    /// A comparison with no tolerance.
    fn record_equal(&mut self, op: &'static str, note: &str, equal: bool) {
        let (max_error, used) = if equal { (0.0, 0.0) } else { (f64::NAN, f64::INFINITY) };
        self.record(op, note, max_error, used);
    }

    fn record(&mut self, op: &'static str, note: &str, max_error: f64, tolerance_used: f64) {
        let case = format!("{}{note}", self.case);
        let passed = tolerance_used <= 1.0;
        self.checks.push(OpCheck { op, case, max_error, tolerance_used, passed });
    }
}

fn rms(values: &[f32]) -> f64 {
    let squares = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    (squares / values.len() as f64).sqrt()
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
