//! Every operation of one backend held against another's, usually [`super::Reference`], at many shapes with random
//! data. What must not be read (rows beyond the batch, slots beyond the context, pages of others) holds NaN.
//!
//! A value passes when it is within `ε · (rms + |reference|)`, where ε belongs to the candidate's arithmetic and rms is
//! that of the value's row in the reference: sums of many terms cancel, so an error relative to the value alone means
//! little.
//!
//! A case has the same data whether it runs alone or among all: its numbers are made from its name.

use std::borrow::Cow;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use serde::Serialize;

use super::{
    AttnIn, Backend, Batch, BufferUse, Head, MlpIn, PAGE_SIZE, Sampling, Shape, TokenInput, WeightUse,
    sampling,
};
use crate::arch::{Op, TensorRole};
use crate::weights::{HostTensor, StoredDType};

/// So many times the tolerance may be rounding. The largest of many errors moves by less than a factor of two when sums
/// are taken in another order; a value that is simply wrong is off by about its own size, which is 20 times the widest
/// tolerance (of a forward pass in bf16) and more of every other.
pub const MOST_BY_ROUNDING: f64 = 4.0;

/// How a comparison is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// Beyond the tolerance, and no further than more rounding than usual may go.
    OverTolerance,
    /// Further than any rounding, not finite, or other bits where they must be the same.
    Wrong,
}

/// How far the values of one comparison are from the right ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deviation {
    /// Largest absolute difference; NaN where a value is none.
    pub max_error: f64,
    /// The value that used the largest share of its tolerance.
    pub index: usize,
    /// Its difference, and what that was allowed to be.
    pub worst_error: f64,
    pub tolerance: f64,
    /// Their ratio; above 1 (or not finite) fails.
    pub tolerance_used: f64,
}

impl Deviation {
    pub const NONE: Deviation =
        Deviation { max_error: 0.0, index: 0, worst_error: 0.0, tolerance: 0.0, tolerance_used: 0.0 };

    /// Of values in rows of `columns`, each within `epsilon · (rms of its row + |value|)`.
    pub fn measure(right: &[f32], found: &[f32], columns: usize, epsilon: f64) -> Self {
        let mut worst = Self::NONE;
        for (row, (right, found)) in right.chunks(columns).zip(found.chunks(columns)).enumerate() {
            let rms = rms(right);
            for (column, (&right, &found)) in right.iter().zip(found).enumerate() {
                let error = (f64::from(right) - f64::from(found)).abs();
                let tolerance = epsilon * (rms + f64::from(right).abs());
                worst = worst.or(Self::of(row * columns + column, error, tolerance));
            }
        }
        worst
    }

    /// Of one value.
    pub fn of(index: usize, error: f64, tolerance: f64) -> Self {
        let tolerance_used = if error == 0.0 { 0.0 } else { error / tolerance };
        Deviation { max_error: error, index, worst_error: error, tolerance, tolerance_used }
    }

    /// Of what must be the same and is not.
    pub fn difference(right: &[f32], found: &[f32]) -> Self {
        Deviation { tolerance_used: f64::INFINITY, ..Self::measure(right, found, right.len().max(1), 0.0) }
    }

    /// The larger of both, where no number is larger than NaN.
    pub fn or(self, other: Self) -> Self {
        let is_larger = |a: f64, b: f64| a > b || (a.is_nan() && !b.is_nan());
        let max_error =
            if is_larger(other.max_error, self.max_error) { other.max_error } else { self.max_error };
        let worst = if is_larger(other.tolerance_used, self.tolerance_used) { other } else { self };
        Deviation { max_error, ..worst }
    }

    pub fn verdict(&self) -> Verdict {
        match self.tolerance_used {
            used if used <= 1.0 => Verdict::Ok,
            used if used <= MOST_BY_ROUNDING => Verdict::OverTolerance,
            _ => Verdict::Wrong,
        }
    }
}

/// One case and what was found.
#[derive(Clone, Debug, PartialEq)]
pub struct OpCheck {
    pub op: &'static str,
    /// Shape, batch and part in words.
    pub case: String,
    pub deviation: Deviation,
}

impl OpCheck {
    pub fn passed(&self) -> bool {
        self.deviation.verdict() == Verdict::Ok
    }
}

/// One comparison of an operation's results: at which shape, for which batch, and which part of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its place among [`shapes`] and [`batches`].
    place: [usize; 2],
    pub shape: &'static str,
    pub batch: &'static str,
    part: Part,
}

impl Case {
    pub fn op(&self) -> Op {
        self.part.op()
    }

    /// What of the operation, where it has several parts; else empty.
    pub fn part(&self) -> &'static str {
        self.part.name()
    }

    /// No text is found in another one of the same operation.
    pub fn text(&self) -> String {
        let words = [self.shape, self.batch, self.part()];
        words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(", ")
    }
}

/// What is compared at one shape and batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Rows of the table by ids from the host, and by those that the device has just sampled.
    Ids,
    SampledIds,
    /// `q` of the tokens that the batch finds in the cache, and of its own.
    Cached(Variant),
    New(Variant),
    Attended(Variant),
    AttnOut,
    MlpIn,
    MlpOut,
    Logits,
    Samples,
}

impl Part {
    fn op(self) -> Op {
        match self {
            Part::Ids | Part::SampledIds => Op::Embed,
            Part::Cached(_) | Part::New(_) => Op::AttnIn,
            Part::Attended(_) => Op::Attention,
            Part::AttnOut => Op::AttnOut,
            Part::MlpIn => Op::MlpIn,
            Part::MlpOut => Op::MlpOut,
            Part::Logits | Part::Samples => Op::Logits,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Part::Ids => "ids",
            Part::SampledIds => "sampled ids",
            Part::Cached(Variant::Plain) => "plain, cached",
            Part::Cached(Variant::Bias) => "bias, cached",
            Part::Cached(Variant::QkNorm) => "QK-norm, cached",
            Part::New(Variant::Plain) => "plain, new",
            Part::New(Variant::Bias) => "bias, new",
            Part::New(Variant::QkNorm) => "QK-norm, new",
            Part::Attended(Variant::Plain) => "plain",
            Part::Attended(Variant::Bias) => "bias",
            Part::Attended(Variant::QkNorm) => "QK-norm",
            Part::AttnOut | Part::MlpIn | Part::MlpOut => "",
            Part::Logits => "values",
            Part::Samples => "samples",
        }
    }

    /// All parts in the order in which they are computed.
    fn all() -> impl Iterator<Item = Part> {
        let attention = |variant| [Part::Cached(variant), Part::New(variant), Part::Attended(variant)];
        let last = [Part::AttnOut, Part::MlpIn, Part::MlpOut, Part::Logits, Part::Samples, Part::SampledIds];
        [Part::Ids].into_iter().chain(Variant::ALL.into_iter().flat_map(attention)).chain(last)
    }
}

/// Every case of every operation at the shapes that the candidate `supports`.
pub fn cases(supports: impl Fn(&Shape) -> bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for (s, (shape, _)) in shapes().into_iter().enumerate().filter(|(_, (_, shape))| supports(shape)) {
        for (b, (batch, sequences)) in batches().into_iter().enumerate() {
            let has_cached = sequences.iter().any(|&(cached, _)| cached > 0);
            let parts = Part::all().filter(|part| has_cached || !matches!(part, Part::Cached(_)));
            cases.extend(parts.map(|part| Case { place: [s, b], shape, batch, part }));
        }
    }
    cases
}

/// Checks every operation at every shape that the candidate `supports`; see [`check_cases`].
///
/// # Errors
/// When a backend cannot be made or an operation fails.
pub fn check_ops<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    stored: StoredDType,
    supports: impl Fn(&Shape) -> bool,
) -> anyhow::Result<Vec<OpCheck>> {
    check_cases(reference, candidate, stored, &cases(supports))
}

/// Checks these cases, some of [`cases`] in their order, and computes nothing that they do not need. Matrices are stored
/// as `stored` wherever their rows are whole blocks of it, and both backends are given the same bytes.
///
/// # Errors
/// When a backend cannot be made or an operation fails.
pub fn check_cases<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    stored: StoredDType,
    cases: &[Case],
) -> anyhow::Result<Vec<OpCheck>> {
    let mut checks = Vec::new();
    for cases in cases.chunk_by(|a, b| a.place == b.place) {
        let [shape, batch] = cases[0].place;
        let shape = shapes().swap_remove(shape).1;
        let mut rig = Rig {
            a: reference(shape.clone())?,
            b: candidate(shape.clone())?,
            shape,
            stored,
            cases,
            random: Random(0),
            checks: &mut checks,
        };
        rig.run(&batches()[batch].1)?;
    }
    Ok(checks)
}

/// What the candidate's arithmetic may lose in one operation.
fn epsilon(compute_dtype: &str, op: Op) -> f64 {
    let narrow = match op {
        // Keys and values that `attn_in` has rounded, and weights: errors of scores are exponentiated, and where the
        // values cancel they stay.
        Op::Attention => 2.0,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Plain,
    Bias,
    QkNorm,
}

impl Variant {
    const ALL: [Variant; 3] = [Variant::Plain, Variant::Bias, Variant::QkNorm];
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
struct Rig<'a, A: Backend, B: Backend> {
    a: A,
    b: B,
    shape: Shape,
    stored: StoredDType,
    /// Those of this shape and batch that are wanted.
    cases: &'a [Case],
    random: Random,
    checks: &'a mut Vec<OpCheck>,
}

impl<A: Backend, B: Backend> Rig<'_, A, B> {
    fn run(&mut self, sequences: &[(usize, usize)]) -> anyhow::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_be_off_by_a_share_of_itself_and_of_its_row() {
        let two_rows = [[1.0, -1.0], [30.0, 40.0]].concat();
        let found = Deviation::measure(&two_rows, &[1.0, -1.5, 30.0, 40.0], 2, 0.5);
        assert_eq!(found, Deviation::of(1, 0.5, 1.0));
        assert_eq!((found.tolerance_used, found.verdict()), (0.5, Verdict::Ok));
        assert_eq!(Deviation::measure(&two_rows, &two_rows, 2, 0.0), Deviation::NONE);
    }

    #[test]
    fn the_largest_error_need_not_be_the_worst() {
        let found = Deviation::of(3, 2.0, 10.0).or(Deviation::of(7, 1.0, 2.0)).or(Deviation::of(9, 0.1, 1.0));
        assert_eq!((found.max_error, found.index, found.tolerance_used), (2.0, 7, 0.5));
    }

    #[test]
    fn rounding_beyond_the_tolerance_reads_otherwise_than_a_wrong_value() {
        let verdict = |error: f64, tolerance: f64| Deviation::of(0, error, tolerance).verdict();
        assert_eq!(verdict(1.0, 1.0), Verdict::Ok);
        assert_eq!(verdict(1.1, 1.0), Verdict::OverTolerance);
        assert_eq!(verdict(MOST_BY_ROUNDING, 1.0), Verdict::OverTolerance);
        assert_eq!(verdict(MOST_BY_ROUNDING * 1.01, 1.0), Verdict::Wrong);
        assert_eq!((verdict(f64::NAN, 1.0), verdict(f64::INFINITY, 1.0)), (Verdict::Wrong, Verdict::Wrong));
        assert_eq!(Deviation::difference(&[0.0], &[-0.0]).verdict(), Verdict::Wrong);
    }

    #[test]
    fn a_value_that_is_no_number_stays_the_worst() {
        for found in [[f32::NAN, 2.0, 900.0], [900.0, 2.0, f32::NAN]] {
            let found = Deviation::measure(&[1.0, 2.0, 3.0], &found, 3, 1.0);
            assert!(found.max_error.is_nan() && found.tolerance_used.is_nan(), "{found:?}");
            assert_eq!(found.verdict(), Verdict::Wrong);
        }
    }
}
