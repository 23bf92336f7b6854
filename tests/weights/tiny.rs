//! A tiny model of each architecture, as values under both formats' names.

use std::path::Path;

use serde_json::{Value, json};

use crate::files::{GGUF_F32, GgufFile, GgufTensor, Meta, Tensor, safetensors};

pub(crate) const HIDDEN: usize = 64;
pub(crate) const FFN: usize = 96;
pub(crate) const LAYERS: usize = 2;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 16;
pub(crate) const VOCAB: usize = 40;

pub(crate) struct Tiny {
    /// `llama`, `qwen2` or `qwen3`
    pub(crate) family: &'static str,
    pub(crate) config: Value,
    pub(crate) weights: Vec<Weight>,
}

pub(crate) struct Weight {
    pub(crate) hf: String,
    pub(crate) gguf: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

impl Tiny {
    pub(crate) fn llama() -> Self {
        Tiny::new("llama", "LlamaForCausalLM")
    }

    pub(crate) fn new(family: &'static str, architecture: &str) -> Self {
        let tied = family == "qwen2";
        let config = json!({
            "architectures": [architecture], "hidden_size": HIDDEN, "intermediate_size": FFN,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 256, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": null, "tie_word_embeddings": tied,
        });
        Tiny { family, config, weights: weights(family, tied) }
    }

    pub(crate) fn gguf(&self) -> GgufFile {
        let mut file = GgufFile {
            magic: *b"GGUF",
            version: 3,
            metadata: self.metadata(),
            tensors: Vec::new(),
            tensor_count: None,
            metadata_count: None,
            alignment: 32,
        };
        for weight in &self.weights {
            let heads = match weight.gguf.rsplit('.').nth(1) {
                Some("attn_q") if self.family == "llama" => HEADS,
                Some("attn_k") if self.family == "llama" => KV_HEADS,
                _ => 0,
            };
            let values = if heads > 0 { interleaved(&weight.values, heads) } else { weight.values.clone() };
            file.tensors.push(GgufTensor {
                name: weight.gguf.clone().into_bytes(),
                ne: weight.shape.iter().rev().map(|&size| size as u64).collect(),
                kind: GGUF_F32,
                data: f32_bytes(&values),
                offset: None,
            });
        }
        file
    }

    fn metadata(&self) -> Vec<(Vec<u8>, Meta)> {
        let model = |suffix: &str| format!("{}.{suffix}", self.family).into_bytes();
        let tokens = (0..VOCAB).map(|id| format!("t{id}")).collect();
        vec![
            (b"general.architecture".to_vec(), Meta::Text(self.family)),
            (b"general.alignment".to_vec(), Meta::U32(32)),
            (model("block_count"), Meta::U32(LAYERS as u32)),
            (model("context_length"), Meta::U32(256)),
            (model("embedding_length"), Meta::U32(HIDDEN as u32)),
            (model("feed_forward_length"), Meta::U32(FFN as u32)),
            (model("attention.head_count"), Meta::U32(HEADS as u32)),
            (model("attention.head_count_kv"), Meta::U64(KV_HEADS as u64)),
            (model("attention.key_length"), Meta::U32(HEAD_DIM as u32)),
            (model("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5)),
            (model("rope.freq_base"), Meta::F32(500_000.0)),
            (model("rope.dimension_count"), Meta::U32(HEAD_DIM as u32)),
            (model("vocab_size"), Meta::U32(VOCAB as u32)),
            (b"tokenizer.ggml.model".to_vec(), Meta::Text("gpt2")),
            (b"tokenizer.ggml.pre".to_vec(), Meta::Text("smollm")),
            (b"tokenizer.ggml.tokens".to_vec(), Meta::Texts(tokens)),
            (b"tokenizer.ggml.token_type".to_vec(), Meta::I32s(vec![1; VOCAB])),
            (b"tokenizer.ggml.merges".to_vec(), Meta::Texts(vec!["t 1".to_owned(), "t 2".to_owned()])),
            (b"tokenizer.ggml.bos_token_id".to_vec(), Meta::U32(1)),
            (b"tokenizer.ggml.add_bos_token".to_vec(), Meta::Bool(false)),
        ]
    }

    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let tensor = |weight: &Weight| Tensor {
            name: weight.hf.clone(),
            dtype: "F32",
            shape: weight.shape.clone(),
            data: f32_bytes(&weight.values),
        };
        self.weights.iter().map(tensor).collect()
    }

    /// `config.json` and `model.safetensors` in `folder`.
    pub(crate) fn save_safetensors(&self, folder: &Path) {
        self.save_config(folder);
        std::fs::write(folder.join("model.safetensors"), safetensors(&self.tensors())).unwrap();
    }

    pub(crate) fn save_config(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
    }
}

pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The converter's order of rows: `reshape(heads, 2, head_dim / 2, columns).swapaxes(1, 2)`.
fn interleaved(values: &[f32], heads: usize) -> Vec<f32> {
    let columns = values.len() / (heads * HEAD_DIM);
    let row = |head: usize, half: usize, pair: usize| {
        let first = (head * HEAD_DIM + half * HEAD_DIM / 2 + pair) * columns;
        &values[first..first + columns]
    };
    let mut out = Vec::new();
    for head in 0..heads {
        for pair in 0..HEAD_DIM / 2 {
            out.extend([row(head, 0, pair), row(head, 1, pair)].concat());
        }
    }
    out
}

fn weights(family: &str, tied: bool) -> Vec<Weight> {
    let mut out = Vec::new();
    let mut push = |hf: String, gguf: String, shape: &[usize]| {
        let values = noise(out.len() as u64, shape.iter().product());
        out.push(Weight { hf, gguf, shape: shape.to_vec(), values });
    };
    push("model.embed_tokens.weight".into(), "token_embd.weight".into(), &[VOCAB, HIDDEN]);
    for layer in 0..LAYERS {
        let mut both = |hf: &str, gguf: &str, shape: &[usize]| {
            push(format!("model.layers.{layer}.{hf}"), format!("blk.{layer}.{gguf}"), shape);
        };
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        both("input_layernorm.weight", "attn_norm.weight", &[HIDDEN]);
        both("self_attn.q_proj.weight", "attn_q.weight", &[q, HIDDEN]);
        both("self_attn.k_proj.weight", "attn_k.weight", &[kv, HIDDEN]);
        both("self_attn.v_proj.weight", "attn_v.weight", &[kv, HIDDEN]);
        both("self_attn.o_proj.weight", "attn_output.weight", &[HIDDEN, q]);
        both("post_attention_layernorm.weight", "ffn_norm.weight", &[HIDDEN]);
        both("mlp.gate_proj.weight", "ffn_gate.weight", &[FFN, HIDDEN]);
        both("mlp.up_proj.weight", "ffn_up.weight", &[FFN, HIDDEN]);
        both("mlp.down_proj.weight", "ffn_down.weight", &[HIDDEN, FFN]);
        if family == "qwen2" {
            both("self_attn.q_proj.bias", "attn_q.bias", &[q]);
            both("self_attn.k_proj.bias", "attn_k.bias", &[kv]);
            both("self_attn.v_proj.bias", "attn_v.bias", &[kv]);
        }
        if family == "qwen3" {
            both("self_attn.q_norm.weight", "attn_q_norm.weight", &[HEAD_DIM]);
            both("self_attn.k_norm.weight", "attn_k_norm.weight", &[HEAD_DIM]);
        }
    }
    push("model.norm.weight".into(), "output_norm.weight".into(), &[HIDDEN]);
    if !tied {
        push("lm_head.weight".into(), "output.weight".into(), &[VOCAB, HIDDEN]);
    }
    out
}

/// Values that bf16 holds exactly, different in every place that matters.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 56) as f32 - 127.5) / 128.0
    };
    (0..count).map(|_| next()).collect()
}
