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
//! | `o_proj`, `down_proj` | 0 | f32(√(3 / (columns · 2 · layers))) in f64 | the residual stream stays near 1 at any depth |
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
}
