//! Bytes and flops of a model's work, counted from its shapes alone.

use super::{Config, TensorRole, tensors};

/// Elements of all tensors (a tied head counts once).
pub fn parameters(config: &Config) -> u64 {
    tensors(config).iter().map(|spec| spec.elements() as u64).sum()
}

/// Elements of the matrices that multiply every token: all linear layers and the head, not the embedding lookup.
pub fn matmul_parameters(config: &Config) -> u64 {
    let linear_of = |layers: usize| -> u64 {
        let specs = tensors(&Config { num_hidden_layers: layers, ..config.clone() });
        specs.iter().filter(|spec| spec.role == TensorRole::Linear).map(|spec| spec.elements() as u64).sum()
    };
    // Layers are alike, and reports ask this for every cell: naming the tensors of all of them would take most of the time.
    let (around, with_one) = (linear_of(0), linear_of(1));
    let linear = around + (with_one - around) * config.num_hidden_layers as u64;
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

/// The tokens of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTokens {
    pub tokens: u64,
    /// Rows whose next token is wanted.
    pub sampled: u64,
    /// Tokens that the sequences hold after the step, summed over sequences.
    pub contexts: u64,
    /// Positions that the tokens attend to, summed over tokens.
    pub attended: u64,
}

impl StepTokens {
    /// One token for each of `batch` sequences that hold `depth` tokens.
    pub fn decode(batch: u32, depth: u32) -> Self {
        let (batch, context) = (u64::from(batch), u64::from(depth) + 1);
        StepTokens { tokens: batch, sampled: batch, contexts: batch * context, attended: batch * context }
    }

    /// `batch` whole prompts of `isl` tokens.
    pub fn prefill(batch: u32, isl: u32) -> Self {
        let (sampled, isl) = (u64::from(batch), u64::from(isl));
        let tokens = sampled * isl;
        StepTokens { tokens, sampled, contexts: tokens, attended: tokens * (isl + 1) / 2 }
    }
}

/// One of the seven fused operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Embed,
    AttnIn,
    Attention,
    AttnOut,
    MlpIn,
    MlpOut,
    Logits,
}

/// The least that an operation of one layer must move and do; the table in kernels/README.md.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpWork {
    /// Values of weights that are read.
    pub weight_values: u64,
    /// Activations read and written.
    pub activation_values: u64,
    /// Values of keys and values read and written.
    pub kv_values: u64,
    /// Token ids written.
    pub id_bytes: u64,
    pub flops: f64,
}

impl Op {
    pub const ALL: [Op; 7] =
        [Op::Embed, Op::AttnIn, Op::Attention, Op::AttnOut, Op::MlpIn, Op::MlpOut, Op::Logits];

    pub fn name(self) -> &'static str {
        match self {
            Op::Embed => "embed",
            Op::AttnIn => "attn_in",
            Op::Attention => "attention",
            Op::AttnOut => "attn_out",
            Op::MlpIn => "mlp_in",
            Op::MlpOut => "mlp_out",
            Op::Logits => "logits",
        }
    }

    pub fn work(self, config: &Config, step: &StepTokens) -> OpWork {
        let wide = |size: usize| size as u64;
        let (h, f, v) = (wide(config.hidden_size), wide(config.intermediate_size), wide(config.vocab_size));
        let (q, k) = (wide(config.q_size()), wide(config.kv_size()));
        let StepTokens { tokens: t, sampled: r, contexts, attended } = *step;
        let (weights, activations, kv, multiplied) = match self {
            Op::Embed => (t * h, t * h, 0, 0),
            Op::AttnIn => ((q + 2 * k) * h + h, t * (h + q), t * 2 * k, t * h * (q + 2 * k)),
            Op::Attention => (0, 2 * t * q, 2 * k * contexts, 2 * q * attended),
            Op::AttnOut => (h * q, t * (q + 2 * h), 0, t * q * h),
            Op::MlpIn => (2 * f * h + h, t * (h + f), 0, 2 * t * h * f),
            Op::MlpOut => (h * f, t * (f + 2 * h), 0, t * f * h),
            Op::Logits => (v * h + h, r * h, 0, r * h * v),
        };
        OpWork {
            weight_values: weights,
            activation_values: activations,
            kv_values: kv,
            id_bytes: if self == Op::Logits { 4 * r } else { 0 },
            flops: 2.0 * multiplied as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{Architecture, Rope, RopeScaling};

    fn llama_3_1_8b() -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: 128,
            vocab_size: 128_256,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 500_000.0, scaling: RopeScaling::None },
            tie_word_embeddings: false,
        }
    }

    /// Bytes in bf16 and flops of one operation.
    fn bf16(op: Op, step: &StepTokens) -> (f64, f64) {
        let work = op.work(&llama_3_1_8b(), step);
        let values = work.weight_values + work.activation_values + work.kv_values;
        ((2 * values + work.id_bytes) as f64, work.flops)
    }

    #[test]
    fn operations_cost_what_the_kernels_table_says() {
        // kernels/README.md, decode at context 1,024: MB and Gflop at batch 1 and at batch 64.
        let table = [
            (Op::Embed, 0.016, 0.0, 1.0, 0.0),
            (Op::AttnIn, 50.4, 0.050, 51.7, 3.22),
            (Op::Attention, 4.2, 0.017, 269.5, 1.07),
            (Op::AttnOut, 33.6, 0.034, 35.1, 2.15),
            (Op::MlpIn, 234.9, 0.235, 237.2, 15.0),
            (Op::MlpOut, 117.5, 0.117, 120.3, 7.52),
            (Op::Logits, 1050.7, 1.05, 1051.2, 67.2),
        ];
        let near = |found: f64, expected: f64, op: Op| {
            assert!((found - expected).abs() <= 0.05 * expected.max(0.1), "{op:?}: {found}, {expected}");
        };
        for (op, mb_1, gflop_1, mb_64, gflop_64) in table {
            for (batch, mb, gflop) in [(1, mb_1, gflop_1), (64, mb_64, gflop_64)] {
                let (bytes, flops) = bf16(op, &StepTokens::decode(batch, 1023));
                near(bytes / 1e6, mb, op);
                near(flops / 1e9, gflop, op);
            }
        }
        let whole = |op: Op| {
            let layers = if matches!(op, Op::Embed | Op::Logits) { 1.0 } else { 32.0 };
            layers * bf16(op, &StepTokens::decode(1, 1023)).0
        };
        let sum: f64 = Op::ALL.into_iter().map(whole).sum();
        assert!((sum / 1e6 - 15_149.0).abs() < 1.0, "{sum}");
    }

    #[test]
    fn operations_together_have_the_flops_of_the_step() {
        let config = llama_3_1_8b();
        let sum = |step: &StepTokens| -> f64 {
            let layers = |op| if matches!(op, Op::Embed | Op::Logits) { 1.0 } else { 32.0 };
            Op::ALL.into_iter().map(|op| layers(op) * op.work(&config, step).flops).sum()
        };
        let decode = decode_step_flops(&config, 3, 101);
        assert!((sum(&StepTokens::decode(3, 100)) / decode - 1.0).abs() < 1e-12);
        let prefill = prefill_flops(&config, 3, 257);
        assert!((sum(&StepTokens::prefill(3, 257)) / prefill - 1.0).abs() < 1e-12);
    }
}
