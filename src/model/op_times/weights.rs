//! The weights of one operation, put on a device as often as they are to be rotated: made there where they are made up and
//! the device can, else uploaded.

use std::borrow::Cow;

use anyhow::Context as _;

use crate::arch::{Config, Op, layer_prefix};
use crate::backend::{AttnIn, Backend, Head, MlpIn, WeightUse};
use crate::weights::{HostTensor, Weights};

/// The weights of one operation, once.
pub(super) enum OpWeights<W> {
    Embed(W),
    AttnIn(AttnIn<W>),
    Attention,
    AttnOut(W),
    MlpIn(MlpIn<W>),
    MlpOut(W),
    Logits(Head<W>),
}

/// The weights of one operation, which can be put on a device many times: those of the first layer.
pub(super) struct Source<'a> {
    weights: &'a dyn Weights,
    op: Op,
    /// As [`OpWeights`] has them: the norm first, then the matrix, then what only some architectures have.
    parts: Vec<Part<'a>>,
}

/// Tensors that are stacked into one weight.
struct Part<'a> {
    usage: WeightUse,
    names: Vec<Cow<'static, str>>,
    /// On the host, once the device could not make them.
    tensors: Vec<HostTensor<'a>>,
}

impl<'a> Part<'a> {
    fn put<B: Backend>(
        &mut self,
        weights: &'a dyn Weights,
        backend: &mut B,
        copy: u64,
    ) -> anyhow::Result<B::Weight> {
        let recipe = |name| weights.recipe(name).map(|recipe| recipe.for_copy(copy));
        if let Some(recipes) = self.names.iter().map(|name| recipe(name)).collect::<Option<Vec<_>>>()
            && let Some(made) = backend.generate(self.usage, &recipes)?
        {
            return Ok(made);
        }
        if self.tensors.is_empty() {
            let tensors = self.names.iter().map(|name| weights.tensor(name));
            self.tensors = tensors.collect::<anyhow::Result<_>>()?;
        }
        backend.upload(self.usage, &self.tensors)
    }
}

impl<'a> Source<'a> {
    pub(super) fn of(weights: &'a dyn Weights, op: Op) -> Self {
        let part = |(usage, names)| Part { usage, names, tensors: Vec::new() };
        Source { weights, op, parts: names(weights.config(), op).into_iter().map(part).collect() }
    }

    /// Puts one more copy on the device. Each of made-up values has its own.
    pub(super) fn put<B: Backend>(
        &mut self,
        backend: &mut B,
        copy: u64,
    ) -> anyhow::Result<OpWeights<B::Weight>> {
        let weights = self.weights;
        let put: Vec<B::Weight> = self
            .parts
            .iter_mut()
            .map(|part| part.put(weights, backend, copy))
            .collect::<anyhow::Result<_>>()?;
        let mut rest = put.into_iter();
        let mut next = || rest.next().with_context(|| format!("{} has too few weights", self.op.name()));
        Ok(match self.op {
            Op::Attention => OpWeights::Attention,
            Op::Embed => OpWeights::Embed(next()?),
            Op::AttnOut => OpWeights::AttnOut(next()?),
            Op::MlpOut => OpWeights::MlpOut(next()?),
            Op::MlpIn => OpWeights::MlpIn(MlpIn { norm: next()?, gate_up: next()? }),
            Op::Logits => OpWeights::Logits(Head { norm: next()?, lm_head: next()? }),
            Op::AttnIn => {
                let (norm, qkv) = (next()?, next()?);
                let more: Vec<B::Weight> = rest.collect();
                match more.as_slice() {
                    [q_norm, k_norm] => {
                        let qk_norm = Some((q_norm.clone(), k_norm.clone()));
                        OpWeights::AttnIn(AttnIn { norm, qkv, bias: None, qk_norm })
                    }
                    more => {
                        let bias = more.first().cloned();
                        OpWeights::AttnIn(AttnIn { norm, qkv, bias, qk_norm: None })
                    }
                }
            }
        })
    }
}

type Names = Vec<(WeightUse, Vec<Cow<'static, str>>)>;

fn names(config: &Config, op: Op) -> Names {
    let layer = |suffix: &str| Cow::Owned(format!("{}.{suffix}", layer_prefix(0)));
    let one = |usage, name| vec![(usage, vec![name])];
    let embedding = || Cow::Borrowed("model.embed_tokens.weight");
    let qkv =
        |kind: &str| ["q", "k", "v"].map(|part| layer(&format!("self_attn.{part}_proj.{kind}"))).to_vec();
    match op {
        Op::Attention => Vec::new(),
        Op::Embed => one(WeightUse::Embedding, embedding()),
        Op::AttnOut => one(WeightUse::Linear, layer("self_attn.o_proj.weight")),
        Op::MlpOut => one(WeightUse::Linear, layer("mlp.down_proj.weight")),
        Op::MlpIn => vec![
            (WeightUse::Vector, vec![layer("post_attention_layernorm.weight")]),
            (WeightUse::GateUp, vec![layer("mlp.gate_proj.weight"), layer("mlp.up_proj.weight")]),
        ],
        Op::Logits if config.tie_word_embeddings => vec![
            (WeightUse::Vector, vec![Cow::Borrowed("model.norm.weight")]),
            (WeightUse::Embedding, vec![embedding()]),
        ],
        Op::Logits => vec![
            (WeightUse::Vector, vec![Cow::Borrowed("model.norm.weight")]),
            (WeightUse::Linear, vec![Cow::Borrowed("lm_head.weight")]),
        ],
        Op::AttnIn => {
            let mut names = vec![
                (WeightUse::Vector, vec![layer("input_layernorm.weight")]),
                (WeightUse::Qkv, qkv("weight")),
            ];
            if config.architecture.has_qkv_bias() {
                names.push((WeightUse::Vector, qkv("bias")));
            }
            if config.architecture.has_qk_norm() {
                for part in ["q", "k"] {
                    names.push((WeightUse::Vector, vec![layer(&format!("self_attn.{part}_norm.weight"))]));
                }
            }
            names
        }
    }
}
