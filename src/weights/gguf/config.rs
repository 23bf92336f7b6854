//! From GGUF metadata to a [`Config`]. A key that would change the result and is not supported is refused by name.

use anyhow::{Context as _, bail};

use super::header::Header;
use super::names;
use crate::arch::{Architecture, Config, Rope, RopeScaling};
use crate::weights::dtype;

/// Keys (after the architecture's prefix) that scale or clamp values somewhere in the forward pass.
const UNSUPPORTED_KEYS: [&str; 6] = [
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
];

/// # Errors
/// Names the key that is missing or has no meaning here.
pub(super) fn config(header: &Header<'_>) -> anyhow::Result<Config> {
    let keys = Keys::new(header)?;
    keys.refuse_other_files()?;
    keys.refuse_variants()?;
    let num_attention_heads = keys.size("attention.head_count")?;
    let hidden_size = keys.size("embedding_length")?;
    let head_dim = keys.head_dim(hidden_size, num_attention_heads)?;
    let config = Config {
        architecture: keys.architecture,
        hidden_size,
        intermediate_size: keys.size("feed_forward_length")?,
        num_hidden_layers: keys.size("block_count")?,
        num_attention_heads,
        num_key_value_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size: keys.vocab_size()?,
        max_position_embeddings: keys.size("context_length")?,
        rms_norm_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .with_context(|| format!("{} is missing", keys.name("attention.layer_norm_rms_epsilon")))?,
        rope: Rope {
            theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
            scaling: keys.scaling(head_dim)?,
        },
        tie_word_embeddings: !header.tensors.contains_key(names::OUTPUT),
    };
    config.check()?;
    Ok(config)
}

/// The keys of one architecture.
struct Keys<'h, 'a> {
    header: &'h Header<'a>,
    architecture: Architecture,
    prefix: &'a str,
}

impl<'h, 'a> Keys<'h, 'a> {
    fn new(header: &'h Header<'a>) -> anyhow::Result<Self> {
        let prefix = header.text("general.architecture")?.context("general.architecture is missing")?;
        let architecture = match prefix {
            // Mistral is written as `llama` too: the same keys and the same order of rows.
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            _ => bail!(
                "general.architecture is \"{}\", which is not supported; expected llama, qwen2 or qwen3",
                prefix.escape_debug()
            ),
        };
        Ok(Keys { header, architecture, prefix })
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn optional_size(&self, key: &str) -> anyhow::Result<Option<usize>> {
        Ok(self.header.unsigned(&self.name(key))?.map(|value| value as usize))
    }

    fn size(&self, key: &str) -> anyhow::Result<usize> {
        self.optional_size(key)?.with_context(|| format!("{} is missing", self.name(key)))
    }

    fn float(&self, key: &str) -> anyhow::Result<Option<f64>> {
        self.header.float(&self.name(key))
    }

    /// Adapters and parts of a split model are GGUF files too.
    fn refuse_other_files(&self) -> anyhow::Result<()> {
        if let Some(kind) = self.header.text("general.type")?
            && kind != "model"
        {
            bail!("general.type is \"{}\", expected model", kind.escape_debug());
        }
        match self.header.unsigned("split.count")?.unwrap_or(0) {
            0 | 1 => Ok(()),
            parts => bail!("is one of {parts} parts of a split model, expected a single file"),
        }
    }

    fn refuse_variants(&self) -> anyhow::Result<()> {
        if let Some(experts @ 1..) = self.optional_size("expert_count")? {
            bail!("{} is {experts}: a mixture of experts is not supported", self.name("expert_count"));
        }
        if self.header.boolean(&self.name("attention.causal"))? == Some(false) {
            bail!("{} is false: attention to later tokens is not supported", self.name("attention.causal"));
        }
        for key in UNSUPPORTED_KEYS {
            if let Some(value) = self.float(key)?
                && value != 0.0
            {
                bail!("{} is {value}, which is not supported", self.name(key));
            }
        }
        self.refuse_sliding_window()
    }

    /// A window at least as long as the context hides nothing.
    fn refuse_sliding_window(&self) -> anyhow::Result<()> {
        let context_length = self.size("context_length")?;
        match self.optional_size("attention.sliding_window")? {
            Some(window) if window > 0 && window < context_length => bail!(
                "{} is {window}, shorter than the context of {context_length}: sliding-window attention is not \
                 supported",
                self.name("attention.sliding_window")
            ),
            _ => Ok(()),
        }
    }

    fn head_dim(&self, hidden_size: usize, heads: usize) -> anyhow::Result<usize> {
        let from_hidden = hidden_size.checked_div(heads).unwrap_or(0);
        let declared = self.optional_size("attention.key_length")?;
        if declared.is_none() && (heads == 0 || !hidden_size.is_multiple_of(heads)) {
            bail!(
                "{} is {hidden_size}, expected a multiple of {} {heads}",
                self.name("embedding_length"),
                self.name("attention.head_count")
            );
        }
        let head_dim = declared.unwrap_or(from_hidden);
        for key in ["attention.value_length", "rope.dimension_count"] {
            let value = self.optional_size(key)?.unwrap_or(head_dim);
            if value != head_dim {
                bail!(
                    "{} is {value}, which is not supported; expected the head's {head_dim}",
                    self.name(key)
                );
            }
        }
        Ok(head_dim)
    }

    fn vocab_size(&self) -> anyhow::Result<usize> {
        let declared = self.optional_size("vocab_size")?;
        let tokens = match self.header.metadata.get("tokenizer.ggml.tokens") {
            Some(value) => Some(value.array().context("tokenizer.ggml.tokens")?.len()),
            None => None,
        };
        match (declared, tokens) {
            (Some(declared), Some(tokens)) if declared != tokens => bail!(
                "the vocabulary does not match: {} is {declared}, but tokenizer.ggml.tokens has {tokens}",
                self.name("vocab_size")
            ),
            _ => declared.or(tokens).with_context(|| {
                format!("{} and tokenizer.ggml.tokens are missing, expected one", self.name("vocab_size"))
            }),
        }
    }

    fn scaling(&self, head_dim: usize) -> anyhow::Result<RopeScaling> {
        let kind = self.header.text(&self.name("rope.scaling.type"))?;
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        let linear = match (kind, factor) {
            (Some("none"), _) => None,
            (None, Some(factor)) if factor == 0.0 || factor == 1.0 => None,
            (Some("linear") | None, factor) => factor,
            (Some(other), _) => bail!(
                "{} is \"{}\", which is not supported; expected none or linear",
                self.name("rope.scaling.type"),
                other.escape_debug()
            ),
        };
        match (linear, self.factors(head_dim)?) {
            (None, None) => Ok(RopeScaling::None),
            (Some(factor), None) => Ok(RopeScaling::Linear { factor }),
            (None, Some(factors)) => Ok(RopeScaling::Factors { factors }),
            (Some(_), Some(_)) => bail!(
                "has both {} and {}, expected one way of scaling",
                self.name("rope.scaling.factor"),
                names::ROPE_FREQS
            ),
        }
    }

    fn factors(&self, head_dim: usize) -> anyhow::Result<Option<Vec<f32>>> {
        let Some(info) = self.header.tensors.get(names::ROPE_FREQS) else { return Ok(None) };
        let expected = [head_dim / 2];
        if info.shape != expected {
            bail!("tensor {} has shape {:?}, expected {expected:?}", names::ROPE_FREQS, info.shape);
        }
        let bytes = &self.header.bytes[info.range.clone()];
        dtype::to_f32(info.dtype, bytes, expected[0]).map(Some)
    }
}
