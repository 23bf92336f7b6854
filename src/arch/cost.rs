//! Bytes and flops of a model's work, counted from its shapes alone.

use super::{Config, TensorRole, tensors};

/// Elements of all tensors (a tied head counts once).
pub fn parameters(config: &Config) -> u64 {
    tensors(config).iter().map(|spec| spec.elements() as u64).sum()
}

/// Elements of the matrices that multiply every token: all linear layers and the head, not the embedding lookup.
pub fn matmul_parameters(config: &Config) -> u64 {
    let linear: u64 = tensors(config)
        .iter()
        .filter(|spec| spec.role == TensorRole::Linear)
        .map(|spec| spec.elements() as u64)
        .sum();
    let tied_head = if config.tie_word_embeddings { config.vocab_size * config.hidden_size } else { 0 };
    linear + tied_head as u64
}

/// Bytes that one token adds to the KV cache over all layers, at `element_bytes` per value.
pub fn kv_bytes_per_token(config: &Config, element_bytes: usize) -> u64 {
    (2 * config.num_hidden_layers * config.kv_size() * element_bytes) as u64
}

/// Flops of attention for `queries` tokens that each look at `context` positions on average.
fn attention_flops(config: &Config, queries: f64, context: f64) -> f64 {
    4.0 * queries * context * (config.num_hidden_layers * config.q_size()) as f64
}

/// Flops of one decode step: `batch` tokens, each attending to `context` positions (itself included).
pub fn decode_step_flops(config: &Config, batch: usize, context: usize) -> f64 {
    2.0 * matmul_parameters(config) as f64 * batch as f64
        + attention_flops(config, batch as f64, context as f64)
}

/// Flops of prefilling `batch` prompts of `isl` tokens: causal attention, the head for the last position only.
pub fn prefill_flops(config: &Config, batch: usize, isl: usize) -> f64 {
    let head = (config.vocab_size * config.hidden_size) as f64;
    let per_token = matmul_parameters(config) as f64 - head;
    let tokens = (batch * isl) as f64;
    2.0 * (per_token * tokens + head * batch as f64)
        + attention_flops(config, tokens, (isl as f64 + 1.0) / 2.0)
}
