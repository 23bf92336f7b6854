//! From the model on the command line to its files, its shapes, its name and its tokenizer. What a verb does when the
//! files cannot be had is its own affair.

use std::path::{Path, PathBuf};

use super::{bad_file, usage};
use crate::arch::Config;
use crate::weights::fetch::{Fetcher, Progress};
use crate::weights::gguf::Gguf;
use crate::weights::tokenizer::Tokenizer;
use crate::weights::{Weights, open, registry};

/// What Hugging Face calls the tokenizer beside safetensors.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// A local path if there is one, else the known model's files, fetched if need be.
///
/// # Errors
/// When the model does not exist or cannot be fetched.
pub(super) fn locate(model: &str, offline: bool, progress: Box<dyn Progress>) -> anyhow::Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let known = registry::find(model).map_err(usage)?;
    Fetcher::from_env(offline, progress)?.locate(&known)
}

/// The shapes of the model, without its weights.
///
/// # Errors
/// When the model does not exist, or its file is broken.
pub(super) fn config_of(model: &str) -> anyhow::Result<Config> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(open(path).map_err(bad_file)?.config().clone());
    }
    Ok(registry::find(model).map_err(usage)?.config)
}

/// The known model's own name, or the file's without its ending.
pub(super) fn name_of(model: &str) -> String {
    if let Ok(known) = registry::find(model) {
        return known.name;
    }
    let path = Path::new(model);
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The tokenizer of an opened checkpoint: the vocabulary inside a GGUF file, or `tokenizer.json` beside safetensors.
///
/// # Errors
/// Names the file that is missing, broken or of a kind that is not read.
pub(super) fn tokenizer_of(weights: &dyn Weights) -> anyhow::Result<Tokenizer> {
    let info = weights.info();
    let Some(file) = info.files.first() else { anyhow::bail!("{} weights have no tokenizer", info.format) };
    if info.format == "gguf" {
        let vocab = Gguf::open(file)?.vocab()?;
        return Tokenizer::from_gguf(&vocab).map_err(|error| error.context(file.display().to_string()));
    }
    Tokenizer::from_file(&file.with_file_name(TOKENIZER_FILE))
}
