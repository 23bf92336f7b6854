//! From files (or a seed) to named host tensors in one canonical form: Hugging Face names, row-major
//! `[out_features, in_features]`, rotary pairs half a head apart. Knows no device. The path:
//! `fetch` finds the files → `gguf`/`safetensors`/`synthetic` open them → [`Weights`] hands out tensors.

mod catalog;
pub mod dtype;
pub mod fetch;
mod finite;
pub mod gguf;
mod hash;
pub mod hf_config;
mod mapped;
mod open;
pub mod registry;
pub mod safetensors;
pub mod slice;
pub mod synthetic;
pub mod tokenizer;
pub mod vocab;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::arch::{Config, TensorRole};
pub use dtype::StoredDType;
pub use finite::first_non_finite;
pub use hash::{sha256_file, sha256_files};
pub use open::open;
use synthetic::Recipe;

/// One tensor as it is stored, borrowed from a memory map or owned when it had to be made or reordered.
#[derive(Clone, Debug)]
pub struct HostTensor<'a> {
    /// Canonical name, for errors.
    pub name: String,
    pub role: TensorRole,
    pub dtype: StoredDType,
    /// Row-major, slowest first: `[rows, columns]` or `[columns]`.
    pub shape: Vec<usize>,
    /// `dtype.bytes_for(shape)` bytes, little-endian, rows contiguous.
    pub bytes: Cow<'a, [u8]>,
}

impl HostTensor<'_> {
    /// Rows of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        if self.shape.len() == 2 { self.shape[0] } else { 1 }
    }

    /// Elements of one row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// All values as f32, `[rows * columns]`.
    ///
    /// # Errors
    /// When the bytes do not hold whole blocks of the type.
    pub fn to_f32(&self) -> anyhow::Result<Vec<f32>> {
        dtype::to_f32(self.dtype, &self.bytes, self.rows() * self.columns())
            .map_err(|error| error.context(format!("tensor {}", self.name)))
    }
}

/// An opened model: its configuration, and its tensors on demand. Implemented by the file formats and by synthetic
/// weights; which one it was is in [`WeightsInfo`].
pub trait Weights: Send + Sync {
    fn config(&self) -> &Config;

    fn info(&self) -> &WeightsInfo;

    /// The tensor of this canonical name (see [`crate::arch::tensors`]), checked against the configuration's shape.
    ///
    /// # Errors
    /// Names the file, the tensor, what was expected and what was found.
    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>>;

    /// How to make this tensor's f32 values instead of bringing them, where they are made up; a device that can do so
    /// needs no copy.
    fn recipe(&self, _name: &str) -> Option<Recipe> {
        None
    }

    /// The file that holds this tensor, for errors; `None` when it is made up.
    fn file_of(&self, _name: &str) -> Option<&Path> {
        self.info().files.first().map(PathBuf::as_path)
    }
}

/// Where weights came from, for the record.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightsInfo {
    /// `gguf`, `safetensors` or `synthetic`
    pub format: &'static str,
    /// Files in the order of their names; empty for synthetic weights.
    pub files: Vec<std::path::PathBuf>,
    /// Seed of synthetic weights.
    pub synthetic_seed: Option<u64>,
    /// Stored type → bytes held in that type, for all tensors the model uses.
    pub stored_bytes: std::collections::BTreeMap<String, u64>,
}
