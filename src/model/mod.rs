//! The forward pass of the dense decoder family, written once over [`Backend`]'s operations, and the loading of its
//! weights. Knows architectures, not devices and not requests.

pub mod check;
pub mod op_times;

use anyhow::{Context as _, bail};

use crate::arch::{Config, layer_prefix};
use crate::backend::{AttnIn, Backend, Batch, BufferUse, Head, MlpIn, Shape, StepKey, WeightUse};
use crate::weights::{HostTensor, Weights, first_non_finite};

/// The shapes a backend needs, from a model's configuration.
pub fn shape_of(config: &Config) -> Shape {
    Shape {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_layers: config.num_hidden_layers,
        num_heads: config.num_attention_heads,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        vocab_size: config.vocab_size,
        rms_norm_eps: config.rms_norm_eps as f32,
        inv_freq: config.rope.inv_freq(config.head_dim),
    }
}

struct Layer<B: Backend> {
    attn_in: AttnIn<B::Weight>,
    o_proj: B::Weight,
    mlp_in: MlpIn<B::Weight>,
    down_proj: B::Weight,
}

/// A model whose weights are on the device.
pub struct Model<B: Backend> {
    config: Config,
    embed_tokens: B::Weight,
    layers: Vec<Layer<B>>,
    head: Head<B::Weight>,
}

/// Activations of one step, for up to `max_tokens` tokens and `max_samples` sampled rows.
pub struct Workspace<B: Backend> {
    /// Residual stream, `[tokens, hidden_size]`
    x: B::Buf,
    /// `[tokens, q_size]`
    q: B::Buf,
    /// `[tokens, q_size]`
    attended: B::Buf,
    /// `[tokens, intermediate_size]`
    activated: B::Buf,
    /// `[samples, vocab_size]`
    pub logits: B::Buf,
}

impl<B: Backend> Workspace<B> {
    /// # Errors
    /// When the device has no room for it.
    pub fn new(backend: &mut B, max_tokens: usize, max_samples: usize) -> anyhow::Result<Self> {
        let shape = backend.shape().clone();
        Ok(Workspace {
            x: backend.buffer(BufferUse::Residual, max_tokens, shape.hidden_size)?,
            q: backend.buffer(BufferUse::Activation, max_tokens, shape.q_size())?,
            attended: backend.buffer(BufferUse::Activation, max_tokens, shape.q_size())?,
            activated: backend.buffer(BufferUse::Activation, max_tokens, shape.intermediate_size)?,
            logits: backend.buffer(BufferUse::Logits, max_samples, shape.vocab_size)?,
        })
    }
}

impl<B: Backend> Model<B> {
    /// Brings every tensor to the device; `progress` is told the bytes of each as stored.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen, not finite or does not fit.
    pub fn load(
        backend: &mut B,
        weights: &dyn Weights,
        progress: &mut dyn FnMut(u64),
    ) -> anyhow::Result<Self> {
        let config = weights.config().clone();
        let mut loader = Loader { backend, weights, progress };
        let embed_tokens = loader.one(WeightUse::Embedding, "model.embed_tokens.weight")?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| loader.layer(&config, &layer_prefix(layer)))
            .collect::<anyhow::Result<_>>()?;
        let lm_head = match config.tie_word_embeddings {
            true => embed_tokens.clone(),
            false => loader.one(WeightUse::Linear, "lm_head.weight")?,
        };
        let head = Head { norm: loader.one(WeightUse::Vector, "model.norm.weight")?, lm_head };
        Ok(Model { config, embed_tokens, layers, head })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Queues one forward pass over `batch`: its K and V go to `kv`, its samples to [`Backend::sampled`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &self,
        backend: &mut B,
        batch: &Batch,
        kv: &mut B::Kv,
        workspace: &mut Workspace<B>,
    ) -> anyhow::Result<()> {
        let key = StepKey {
            tokens: batch.num_tokens(),
            sequences: batch.num_sequences(),
            decode_only: batch.num_tokens() == batch.num_sequences(),
        };
        let Workspace { x, q, attended, activated, logits } = workspace;
        backend.step(key, &mut |backend| {
            backend.embed(batch, &self.embed_tokens, x)?;
            for (index, layer) in self.layers.iter().enumerate() {
                backend.attn_in(batch, index, &layer.attn_in, x, kv, q)?;
                backend.attention(batch, index, q, kv, attended)?;
                backend.attn_out(batch, &layer.o_proj, attended, x)?;
                backend.mlp_in(batch, &layer.mlp_in, x, activated)?;
                backend.mlp_out(batch, &layer.down_proj, activated, x)?;
            }
            backend.logits(batch, &self.head, x, logits)
        })
    }
}

/// Walks the weight names and uploads what it meets.
struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    weights: &'a dyn Weights,
    progress: &'a mut dyn FnMut(u64),
}

impl<B: Backend> Loader<'_, B> {
    fn one(&mut self, usage: WeightUse, name: &str) -> anyhow::Result<B::Weight> {
        self.stacked(usage, &[name.to_owned()])
    }

    fn stacked(&mut self, usage: WeightUse, names: &[String]) -> anyhow::Result<B::Weight> {
        if let Some(weight) = self.generated(usage, names)? {
            return Ok(weight);
        }
        let parts: Vec<HostTensor<'_>> =
            names.iter().map(|name| self.weights.tensor(name)).collect::<anyhow::Result<_>>()?;
        if !B::CHECKS_VALUES {
            parts.iter().try_for_each(|part| self.refuse_non_finite(part))?;
        }
        let weight =
            self.backend.upload(usage, &parts).with_context(|| match self.weights.file_of(&names[0]) {
                Some(file) => format!("{}: uploading {}", file.display(), names.join(", ")),
                None => format!("uploading {}", names.join(", ")),
            })?;
        (self.progress)(parts.iter().map(|part| part.bytes.len() as u64).sum());
        Ok(weight)
    }

    /// Made-up values, where the device makes them itself.
    fn generated(&mut self, usage: WeightUse, names: &[String]) -> anyhow::Result<Option<B::Weight>> {
        let Some(parts) = names.iter().map(|name| self.weights.recipe(name)).collect::<Option<Vec<_>>>()
        else {
            return Ok(None);
        };
        let weight =
            self.backend.generate(usage, &parts).with_context(|| format!("making {}", names.join(", ")))?;
        if weight.is_some() {
            let elements: usize = parts.iter().map(|part| part.shape.iter().product::<usize>()).sum();
            (self.progress)((elements * size_of::<f32>()) as u64);
        }
        Ok(weight)
    }

    /// One value that is no number makes every later one so, and its speed means nothing.
    fn refuse_non_finite(&self, tensor: &HostTensor<'_>) -> anyhow::Result<()> {
        let Some(index) = first_non_finite(tensor) else { return Ok(()) };
        let file = self.weights.file_of(&tensor.name).map(|file| format!("{}: ", file.display()));
        bail!(
            "{}tensor {} has a value that is NaN or infinite at index {index}, expected finite numbers",
            file.unwrap_or_default(),
            tensor.name
        )
    }

    fn layer(&mut self, config: &Config, prefix: &str) -> anyhow::Result<Layer<B>> {
        let qkv = |kind: &str| ["q", "k", "v"].map(|part| format!("{prefix}.self_attn.{part}_proj.{kind}"));
        let gate_up = ["gate", "up"].map(|part| format!("{prefix}.mlp.{part}_proj.weight"));
        let bias = match config.architecture.has_qkv_bias() {
            true => Some(self.stacked(WeightUse::Vector, &qkv("bias"))?),
            false => None,
        };
        let qk_norm = match config.architecture.has_qk_norm() {
            true => Some((
                self.one(WeightUse::Vector, &format!("{prefix}.self_attn.q_norm.weight"))?,
                self.one(WeightUse::Vector, &format!("{prefix}.self_attn.k_norm.weight"))?,
            )),
            false => None,
        };
        Ok(Layer {
            attn_in: AttnIn {
                norm: self.one(WeightUse::Vector, &format!("{prefix}.input_layernorm.weight"))?,
                qkv: self.stacked(WeightUse::Qkv, &qkv("weight"))?,
                bias,
                qk_norm,
            },
            o_proj: self.one(WeightUse::Linear, &format!("{prefix}.self_attn.o_proj.weight"))?,
            mlp_in: MlpIn {
                norm: self.one(WeightUse::Vector, &format!("{prefix}.post_attention_layernorm.weight"))?,
                gate_up: self.stacked(WeightUse::GateUp, &gate_up)?,
            },
            down_proj: self.one(WeightUse::Linear, &format!("{prefix}.mlp.down_proj.weight"))?,
        })
    }
}
