//! Which comparisons there are: shapes, batches and parts of each operation's results, and how they are named.

use crate::arch::Op;
use crate::backend::Shape;

/// One comparison of an operation's results: at which shape, for which batch, and which part of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its place among [`shapes`] and [`batches`].
    pub(super) place: [usize; 2],
    pub shape: &'static str,
    pub batch: &'static str,
    pub(super) part: Part,
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
pub(super) enum Part {
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
    pub(super) fn op(self) -> Op {
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

    pub(super) fn name(self) -> &'static str {
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    Plain,
    Bias,
    QkNorm,
}

impl Variant {
    pub(super) const ALL: [Variant; 3] = [Variant::Plain, Variant::Bias, Variant::QkNorm];
}

pub(super) fn shapes() -> Vec<(&'static str, Shape)> {
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
pub(super) fn batches() -> Vec<(&'static str, Vec<(usize, usize)>)> {
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
