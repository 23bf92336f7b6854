//! The tensors a configuration consists of, under Hugging Face's names.

use super::Config;

/// What a tensor is for. Backends lay weights out by it, and synthetic weights take their scale from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// `[vocab_size, hidden_size]`, one row read per token; also the head when embeddings are tied.
    Embedding,
    /// RMSNorm gain, `[hidden_size]` or `[head_dim]`.
    Norm,
    /// `[q_size or kv_size]`
    Bias,
    /// A matrix `[out_features, in_features]` that multiplies activations.
    Linear,
}

/// One tensor: its canonical name, role and row-major shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub role: TensorRole,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// `model.layers.3` for layer 3.
pub fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}")
}

/// Every tensor of the model, in the order of the forward pass.
pub fn tensors(config: &Config) -> Vec<TensorSpec> {
    let mut specs = vec![spec(
        "model.embed_tokens.weight",
        TensorRole::Embedding,
        &[config.vocab_size, config.hidden_size],
    )];
    for layer in 0..config.num_hidden_layers {
        push_layer(config, &layer_prefix(layer), &mut specs);
    }
    specs.push(spec("model.norm.weight", TensorRole::Norm, &[config.hidden_size]));
    if !config.tie_word_embeddings {
        specs.push(spec("lm_head.weight", TensorRole::Linear, &[config.vocab_size, config.hidden_size]));
    }
    specs
}

fn push_layer(config: &Config, prefix: &str, specs: &mut Vec<TensorSpec>) {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.q_size(), config.kv_size());
    let mut push = |suffix: &str, role, shape: &[usize]| {
        specs.push(spec(&format!("{prefix}.{suffix}.weight"), role, shape));
    };
    push("input_layernorm", TensorRole::Norm, &[hidden]);
    push("self_attn.q_proj", TensorRole::Linear, &[q, hidden]);
    push("self_attn.k_proj", TensorRole::Linear, &[kv, hidden]);
    push("self_attn.v_proj", TensorRole::Linear, &[kv, hidden]);
    push("self_attn.o_proj", TensorRole::Linear, &[hidden, q]);
    push("post_attention_layernorm", TensorRole::Norm, &[hidden]);
    push("mlp.gate_proj", TensorRole::Linear, &[ffn, hidden]);
    push("mlp.up_proj", TensorRole::Linear, &[ffn, hidden]);
    push("mlp.down_proj", TensorRole::Linear, &[hidden, ffn]);
    if config.architecture.has_qk_norm() {
        push("self_attn.q_norm", TensorRole::Norm, &[config.head_dim]);
        push("self_attn.k_norm", TensorRole::Norm, &[config.head_dim]);
    }
    if config.architecture.has_qkv_bias() {
        for (part, size) in [("q", q), ("k", kv), ("v", kv)] {
            specs.push(spec(&format!("{prefix}.self_attn.{part}_proj.bias"), TensorRole::Bias, &[size]));
        }
    }
}

fn spec(name: &str, role: TensorRole, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), role, shape: shape.to_vec() }
}
