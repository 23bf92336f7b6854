//! One configuration for the whole dense decoder family, and the checks that make it trustworthy.

use serde::{Deserialize, Serialize};

/// Which checkpoint family: decides biases and norms, nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama 2, 3, 3.1, 3.2, 3.3 and SmolLM2.
    Llama,
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 dense: RMSNorm over each head of q and k.
    Qwen3,
}

impl Architecture {
    pub fn has_qkv_bias(self) -> bool {
        self == Architecture::Qwen2
    }

    pub fn has_qk_norm(self) -> bool {
        self == Architecture::Qwen3
    }
}

/// How positions beyond the trained length are treated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1's rule: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: u32,
    },
    /// Each frequency divided by its own factor (GGUF's `rope_freqs.weight`), `[head_dim / 2]`.
    Factors {
        factors: Vec<f32>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// A dense decoder's shape under the names of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    pub tie_word_embeddings: bool,
}

/// A configuration that cannot be run; the sentence names the field, what is needed and what was found.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

impl Config {
    /// Width of all query heads together, elements.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together, elements.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Refuses shapes that the forward pass has no meaning for, or that no machine could hold.
    pub fn check(&self) -> Result<(), ConfigError> {
        let bounds: [(&str, usize, usize); 8] = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_hidden_layers, 4096),
            ("num_attention_heads", self.num_attention_heads, 4096),
            ("num_key_value_heads", self.num_key_value_heads, 4096),
            ("head_dim", self.head_dim, 4096),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 28),
        ];
        for (name, value, largest) in bounds {
            if value == 0 || value > largest {
                return Err(ConfigError(format!("{name} is {value}, expected 1 to {largest}")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(ConfigError(format!(
                "num_attention_heads is {}, expected a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError(format!("head_dim is {}, expected an even number", self.head_dim)));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(ConfigError(format!(
                "rms_norm_eps is {}, expected a number between 0 and 1",
                self.rms_norm_eps
            )));
        }
        self.rope.check(self.head_dim)
    }
}

impl Rope {
    fn check(&self, head_dim: usize) -> Result<(), ConfigError> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(ConfigError(format!("rope_theta is {}, expected a positive number", self.theta)));
        }
        let positive = |name: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            Err(ConfigError(format!("rope scaling {name} is {value}, expected a positive number")))
        };
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("original_max_position_embeddings", f64::from(*original_max_position_embeddings))?;
                positive("high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)
            }
            RopeScaling::Factors { factors } if factors.len() != head_dim / 2 => Err(ConfigError(format!(
                "rope_freqs has {} factors, expected head_dim / 2 = {}",
                factors.len(),
                head_dim / 2
            ))),
            RopeScaling::Factors { factors } => {
                factors.iter().try_for_each(|factor| positive("factor", f64::from(*factor)))
            }
        }
    }

    /// Angle per position of each rotated pair, radians, `[head_dim / 2]`. Computed in f64, rounded once.
    ///
    /// Llama 3.1's ramp is the one of its reference implementation (`apply_scaling`): wavelengths above
    /// `original / low_freq_factor` are divided by `factor`, those below `original / high_freq_factor` are kept.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let plain = self.theta.powf(-((2 * pair) as f64) / head_dim as f64);
                self.scale(plain, pair) as f32
            })
            .collect()
    }

    fn scale(&self, plain: f64, pair: usize) -> f64 {
        match &self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain / factor,
            RopeScaling::Factors { factors } => plain / f64::from(factors[pair]),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = f64::from(*original_max_position_embeddings);
                let wavelength = std::f64::consts::TAU / plain;
                let kept = ((original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor))
                    .clamp(0.0, 1.0);
                plain * (kept + (1.0 - kept) / factor)
            }
        }
    }
}
