//! Synthetic weights: a counter-based hash gives each value from (seed, tensor name, index), so that every backend can
//! make the same bits in any order, without a file. Never zero, and at the scale of trained weights.
//!
//! # The values, exactly
//! All integers are unsigned 64-bit and wrap; all floats are IEEE f32, rounded to nearest even after each operation,
//! never fused.
//!
//! ```text
//! mix(z)     = z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^ z >> 31
//! fnv1a(s)   = h = 0xCBF29CE484222325; for each byte of s: h = (h ^ byte) * 0x100000001B3
//! key        = fnv1a(canonical tensor name) ^ mix(seed + 0x9E3779B97F4A7C15)
//! bits(i)    = mix(key + (i + 1) * 0x9E3779B97F4A7C15) >> 40           i = row * columns + column; 24 bits
//! unit(i)    = f32(2 * bits(i) + 1 - 2^24) * 2^-24                     exact, odd multiples of 2^-24 in (-1, 1)
//! value(i)   = center + scale * unit(i)                                one multiplication, then one addition
//! ```
//!
//! `unit` is uniform with mean 0 and standard deviation 1/√3, and never 0. `center` and `scale` follow from the role:
//!
//! | role | center | scale | standard deviation |
//! |---|---|---|---|
//! | norm | 1 | 0.1 | 0.058 |
//! | bias | 0 | 0.1 | 0.058 |
//! | embedding, linear | 0 | f32(√(3 / columns)) in f64 | 1 / √columns: a product keeps the rms of its input |
//! | `o_proj`, `down_proj` | 0 | f32(√(3 / (columns · 2 · layers))) in f64 | the residual stream keeps an rms below 1 at any depth |
//!
//! Stored as bf16, a value is rounded once more, to nearest even.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use rayon::prelude::*;

use super::{HostTensor, StoredDType, Weights, WeightsInfo};
use crate::arch::{Config, TensorRole, TensorSpec, tensors};

/// 2^64 divided by the golden ratio, odd: the step of the counter.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// Values that one task makes.
const CHUNK_ELEMENTS: usize = 1 << 16;

/// What synthetic values may be stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyntheticDType {
    F32,
    BF16,
}

impl SyntheticDType {
    fn stored(self) -> StoredDType {
        match self {
            SyntheticDType::F32 => StoredDType::F32,
            SyntheticDType::BF16 => StoredDType::BF16,
        }
    }
}

/// The parameters of one tensor's values: all that a kernel needs to make them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generator {
    pub key: u64,
    pub center: f32,
    pub scale: f32,
}

/// A made-up tensor that nobody has made yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Canonical name, for errors.
    pub name: String,
    /// Row-major, slowest first: `[rows, columns]` or `[columns]`.
    pub shape: Vec<usize>,
    pub generator: Generator,
}

impl Recipe {
    /// The same tensor with other values for every copy; copy 0 is the tensor itself.
    #[must_use]
    pub fn for_copy(mut self, copy: u64) -> Self {
        self.generator.key ^= mix(copy);
        self
    }
}

impl Generator {
    pub fn new(config: &Config, seed: u64, spec: &TensorSpec) -> Self {
        let (center, scale) = match spec.role {
            TensorRole::Norm => (1.0, 0.1),
            TensorRole::Bias => (0.0, 0.1),
            TensorRole::Embedding | TensorRole::Linear => (0.0, matrix_scale(config, spec)),
        };
        Generator { key: fnv1a(&spec.name) ^ mix(seed.wrapping_add(STEP)), center, scale }
    }

    /// The value at row-major index `index`.
    pub fn value(&self, index: u64) -> f32 {
        let counter = index.wrapping_add(1).wrapping_mul(STEP);
        let bits = (mix(self.key.wrapping_add(counter)) >> 40) as i32;
        let unit = (2 * bits + 1 - (1 << 24)) as f32 * (1.0 / (1 << 24) as f32);
        self.center + self.scale * unit
    }

    /// Fills `out` with the values from index 0 on, `N` bytes each.
    fn fill<const N: usize>(&self, out: &mut [u8], encode: impl Fn(f32) -> [u8; N] + Sync) {
        let (slots, _) = out.as_chunks_mut::<N>();
        slots.par_chunks_mut(CHUNK_ELEMENTS).enumerate().for_each(|(chunk, slots)| {
            let first = (chunk * CHUNK_ELEMENTS) as u64;
            for (index, slot) in (first..).zip(slots) {
                *slot = encode(self.value(index));
            }
        });
    }
}

fn matrix_scale(config: &Config, spec: &TensorSpec) -> f32 {
    let columns = spec.shape.last().copied().unwrap_or(1);
    let into_residual = spec.name.ends_with(".o_proj.weight") || spec.name.ends_with(".down_proj.weight");
    let terms = if into_residual { 2 * config.num_hidden_layers } else { 1 };
    (3.0 / (columns * terms) as f64).sqrt() as f32
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// Nearest bf16, ties to even; synthetic values are finite.
fn bf16_bytes(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    (rounded as u16).to_le_bytes()
}

/// A model of any configuration's true shapes, made from a seed.
#[derive(Debug)]
pub struct Synthetic {
    config: Config,
    info: WeightsInfo,
    seed: u64,
    dtype: SyntheticDType,
    specs: HashMap<String, TensorSpec>,
}

impl Synthetic {
    /// Values are stored as f32 until [`Synthetic::with_dtype`] says otherwise.
    pub fn new(config: Config, seed: u64) -> Self {
        let specs = tensors(&config).into_iter().map(|spec| (spec.name.clone(), spec)).collect();
        let info = WeightsInfo {
            format: "synthetic",
            files: Vec::new(),
            synthetic_seed: Some(seed),
            stored_bytes: BTreeMap::new(),
        };
        Synthetic { config, info, seed, dtype: SyntheticDType::F32, specs }.with_dtype(SyntheticDType::F32)
    }

    pub fn with_dtype(mut self, dtype: SyntheticDType) -> Self {
        let stored = dtype.stored();
        let elements: u64 = self.specs.values().map(|spec| spec.elements() as u64).sum();
        self.info.stored_bytes =
            BTreeMap::from([(stored.name().to_owned(), elements * stored.block_bytes() as u64)]);
        self.dtype = dtype;
        self
    }
}

impl Weights for Synthetic {
    fn config(&self) -> &Config {
        &self.config
    }

    fn info(&self) -> &WeightsInfo {
        &self.info
    }

    /// Makes the tensor now: only one at a time need be in memory.
    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>> {
        let spec = self
            .specs
            .get(name)
            .with_context(|| format!("synthetic weights: tensor {name} is not one of this model's"))?;
        let generator = Generator::new(&self.config, self.seed, spec);
        let dtype = self.dtype.stored();
        let mut bytes = vec![0; spec.elements() * dtype.block_bytes()];
        match self.dtype {
            SyntheticDType::F32 => generator.fill(&mut bytes, f32::to_le_bytes),
            SyntheticDType::BF16 => generator.fill(&mut bytes, bf16_bytes),
        }
        Ok(HostTensor {
            name: name.to_owned(),
            role: spec.role,
            dtype,
            shape: spec.shape.clone(),
            bytes: Cow::Owned(bytes),
        })
    }

    /// Only of f32 values: those stored otherwise are rounded once more.
    fn recipe(&self, name: &str) -> Option<Recipe> {
        let spec = self.specs.get(name).filter(|_| self.dtype == SyntheticDType::F32)?;
        let generator = Generator::new(&self.config, self.seed, spec);
        Some(Recipe { name: name.to_owned(), shape: spec.shape.clone(), generator })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{Architecture, Rope, RopeScaling};

    fn config() -> Config {
        Config {
            architecture: Architecture::Qwen2,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 3000,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-6,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            tie_word_embeddings: true,
        }
    }

    fn values(seed: u64, dtype: SyntheticDType, name: &str) -> Vec<f32> {
        Synthetic::new(config(), seed).with_dtype(dtype).tensor(name).unwrap().to_f32().unwrap()
    }

    /// Bits from a separate program that follows the module's text in arbitrary-precision arithmetic.
    const GOLDEN: [(&str, [u32; 3]); 5] = [
        ("model.layers.0.self_attn.q_proj.weight", [0xbe38c6be, 0xbe1c1d19, 0x3ddce2f2]),
        ("model.layers.1.mlp.down_proj.weight", [0xbd4268b9, 0xbd7afb51, 0xbbf711f3]),
        ("model.norm.weight", [0x3f89d376, 0x3f6dcafe, 0x3f769017]),
        ("model.layers.0.self_attn.k_proj.bias", [0x3da83504, 0xbcd69277, 0x3d334cff]),
        ("model.embed_tokens.weight", [0xbca08002, 0x3d319364, 0x3db91c9b]),
    ];

    #[test]
    fn bits_are_those_of_an_independent_program() {
        for (name, expected) in GOLDEN {
            let values = values(42, SyntheticDType::F32, name);
            assert_eq!([0, 1, 31].map(|index: usize| values[index].to_bits()), expected, "{name}");
        }
    }

    #[test]
    fn bf16_is_the_f32_value_rounded_to_nearest_even() {
        let name = "model.embed_tokens.weight";
        let wide = values(42, SyntheticDType::F32, name);
        let narrow = values(42, SyntheticDType::BF16, name);
        for (wide, narrow) in wide.iter().zip(&narrow) {
            assert_eq!(half::bf16::from_f32(*wide).to_f32(), *narrow);
        }
    }

    #[test]
    fn values_do_not_depend_on_the_number_of_threads() {
        let name = "model.embed_tokens.weight";
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| values(7, SyntheticDType::F32, name))
        };
        let one = on(1);
        assert!(one.len() > 2 * CHUNK_ELEMENTS);
        assert_eq!(one, on(5));
    }

    #[test]
    fn seeds_and_names_give_different_values() {
        let name = "model.layers.0.mlp.gate_proj.weight";
        let first = values(0, SyntheticDType::F32, name);
        let same = |other: &[f32]| first.iter().zip(other).filter(|(a, b)| a == b).count();
        assert!(same(&values(1, SyntheticDType::F32, name)) < 5);
        assert!(same(&values(0, SyntheticDType::F32, "model.layers.0.mlp.up_proj.weight")) < 5);
    }

    #[test]
    fn copies_of_a_tensor_differ_and_the_first_is_the_tensor() {
        let weights = Synthetic::new(config(), 5);
        let name = "model.embed_tokens.weight";
        let copy = |copy| {
            let generator = weights.recipe(name).unwrap().for_copy(copy).generator;
            (0..10_000).map(|index| generator.value(index)).collect::<Vec<f32>>()
        };
        let itself = copy(0);
        assert_eq!(itself, values(5, SyntheticDType::F32, name)[..10_000]);
        for [a, b] in [[0, 1], [1, 2], [2, 1023], [0, 1023]] {
            let (a, b) = (copy(a), copy(b));
            assert!(a.iter().zip(&b).filter(|(a, b)| a == b).count() < 5);
            // Nor is one the other, shifted.
            assert!(!a.windows(3).any(|window| *window == b[..3]));
        }
    }

    #[test]
    fn mean_and_deviation_are_as_documented_and_no_value_is_zero() {
        let columns = |terms: f64| 1.0 / terms.sqrt();
        let cases = [
            ("model.embed_tokens.weight", 0.0, columns(64.0)),
            ("model.layers.0.mlp.gate_proj.weight", 0.0, columns(64.0)),
            ("model.layers.0.self_attn.o_proj.weight", 0.0, columns(64.0 * 4.0)),
            ("model.layers.1.mlp.down_proj.weight", 0.0, columns(96.0 * 4.0)),
        ];
        for (name, mean, deviation) in cases {
            for dtype in [SyntheticDType::F32, SyntheticDType::BF16] {
                let values = values(3, dtype, name);
                assert!(values.iter().all(|value| *value != 0.0), "{name}");
                let count = values.len() as f64;
                let found_mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
                let variance =
                    values.iter().map(|value| (f64::from(*value) - found_mean).powi(2)).sum::<f64>() / count;
                // Five standard errors: of a mean σ/√n, of a uniform's deviation 0.45 σ/√n.
                let error = deviation / count.sqrt();
                assert!((found_mean - mean).abs() < 5.0 * error, "{name}: mean {found_mean}");
                assert!((variance.sqrt() - deviation).abs() < 2.5 * error, "{name}: {}", variance.sqrt());
            }
        }
        for norm in values(3, SyntheticDType::F32, "model.norm.weight") {
            assert!((0.9..1.1).contains(&norm));
        }
    }

    #[test]
    fn every_tensor_has_the_shape_and_bytes_of_its_role() {
        let config = config();
        let weights = Synthetic::new(config.clone(), 1).with_dtype(SyntheticDType::BF16);
        let mut bytes = 0;
        for spec in tensors(&config) {
            let tensor = weights.tensor(&spec.name).unwrap();
            assert_eq!((tensor.shape, tensor.role), (spec.shape, spec.role));
            bytes += tensor.bytes.len() as u64;
        }
        assert_eq!(weights.info().stored_bytes, BTreeMap::from([("bf16".to_owned(), bytes)]));
        assert!(weights.tensor("lm_head.weight").is_err(), "tied embeddings have no head of their own");
    }
}
