//! GGUF's tensor names. They appear here and nowhere else.

/// Llama 3's frequency factors, `[head_dim / 2]`.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// GGUF's head, absent when it is tied to the embeddings.
pub(super) const OUTPUT: &str = "output.weight";

/// What GGUF calls the tensor of this canonical name.
pub(super) fn gguf_name(canonical: &str) -> Option<String> {
    match canonical {
        "model.embed_tokens.weight" => Some("token_embd.weight".to_owned()),
        "model.norm.weight" => Some("output_norm.weight".to_owned()),
        "lm_head.weight" => Some(OUTPUT.to_owned()),
        _ => layer_name(canonical),
    }
}

fn layer_name(canonical: &str) -> Option<String> {
    let (layer, rest) = canonical.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layers_keep_their_number_and_kind() {
        let cases = [
            ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
            ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight"),
            ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
        ];
        for (canonical, gguf) in cases {
            assert_eq!(gguf_name(canonical).as_deref(), Some(gguf));
        }
        assert_eq!(gguf_name("model.layers.3.mlp.router.weight"), None);
    }
}
