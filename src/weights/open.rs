//! Which reader a path wants: a file by its extension, a folder by what lies in it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::Weights;
use super::gguf::Gguf;
use super::safetensors::{INDEX_FILE, SafetensorsModel, WHOLE_FILE};

/// Opens a `.gguf` file, a `.safetensors` file with `config.json` beside it, or a folder that holds one model.
///
/// # Errors
/// Names the path and what was expected there, or passes on what the reader found.
pub fn open(path: &Path) -> anyhow::Result<Box<dyn Weights>> {
    let metadata = path.metadata().with_context(|| format!("{}: cannot be opened", path.display()))?;
    if metadata.is_dir() {
        return open_folder(path);
    }
    match extension(path) {
        Some("gguf") => Ok(Box::new(Gguf::open(path)?)),
        Some("safetensors") => Ok(Box::new(SafetensorsModel::open_file(path)?)),
        _ => bail!(
            "{}: is not a model by its name, expected a .gguf or .safetensors file or a folder",
            path.display()
        ),
    }
}

/// Safetensors come first, as they do for Hugging Face's own loader.
fn open_folder(folder: &Path) -> anyhow::Result<Box<dyn Weights>> {
    let index = folder.join(INDEX_FILE);
    let whole = folder.join(WHOLE_FILE);
    if whole.exists() {
        return Ok(Box::new(SafetensorsModel::open_file(&whole)?));
    }
    if index.exists() {
        return Ok(Box::new(SafetensorsModel::open_index(&index)?));
    }
    match &models_in(folder)?[..] {
        [one] => open(one),
        [] => bail!(
            "{}: holds no model, expected {WHOLE_FILE}, {INDEX_FILE} or one .gguf file",
            folder.display()
        ),
        several => bail!(
            "{}: holds {} model files, expected {WHOLE_FILE}, {INDEX_FILE} or one .gguf file\n\
             hint: name one file instead of its folder",
            folder.display(),
            several.len()
        ),
    }
}

/// Files of the folder that could be models, by extension.
fn models_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable = || format!("{}: cannot be read", folder.display());
    let mut found = Vec::new();
    for entry in folder.read_dir().with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        if matches!(extension(&path), Some("gguf" | "safetensors")) && path.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

fn extension(path: &Path) -> Option<&str> {
    path.extension().and_then(|extension| extension.to_str())
}
