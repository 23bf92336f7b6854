//! Safetensors files with a Hugging Face `config.json` beside them, memory-mapped: one file, or the shards that
//! `model.safetensors.index.json` lists. Names are canonical already, so nothing is translated.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use ::safetensors::{Dtype, SafeTensors};
use anyhow::{Context as _, anyhow, bail};
use serde::Deserialize;

use super::catalog::{Catalog, Stored};
use super::mapped::{MappedFile, read_text};
use super::{HostTensor, StoredDType, Weights, WeightsInfo, hf_config};
use crate::arch::Config;

pub(super) const WHOLE_FILE: &str = "model.safetensors";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

const CONFIG_FILE: &str = "config.json";
/// A hundred times the header of a large model. Parsed JSON can take over twenty times its text, and a broken file must not
/// take the machine's memory, so this is below the format's own limit of 100 MB.
const MAX_HEADER_BYTES: u64 = 32 << 20;
const MAX_INDEX_BYTES: u64 = 32 << 20;
const MAX_SHARDS: usize = 4096;

/// An opened model in one or more safetensors files.
#[derive(Debug)]
pub struct SafetensorsModel {
    files: Vec<MappedFile>,
    config: Config,
    info: WeightsInfo,
    catalog: Catalog,
}

/// One tensor as its file describes it; the type may be one that no model of ours uses.
struct Found {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// `model.safetensors.index.json`
#[derive(Deserialize)]
struct Index {
    /// Tensor → name of the file in the same folder.
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsModel {
    /// Opens a model that is one file, with `config.json` beside it.
    ///
    /// # Errors
    /// Names the file, what is wrong in it and what was expected.
    pub fn open_file(path: &Path) -> anyhow::Result<Self> {
        let config = hf_config::read(&path.with_file_name(CONFIG_FILE))?;
        let files = vec![MappedFile::open(path)?];
        let found = tensors_of(&files)?;
        Self::assemble(config, files, found, path)
    }

    /// Opens a model whose shards are listed in `path`, with `config.json` beside it.
    ///
    /// # Errors
    /// Names the file, what is wrong in it and what was expected.
    pub fn open_index(path: &Path) -> anyhow::Result<Self> {
        let config = hf_config::read(&path.with_file_name(CONFIG_FILE))?;
        let index = read_index(path)?;
        let shards = shard_paths(path, &index).with_context(|| path.display().to_string())?;
        let files: Vec<MappedFile> =
            shards.iter().map(|shard| MappedFile::open(shard)).collect::<anyhow::Result<_>>()?;
        let found = tensors_of(&files)?;
        check_index(&index, &files, &found).with_context(|| path.display().to_string())?;
        Self::assemble(config, files, found, path)
    }

    /// `opened` is the file or index that errors name.
    fn assemble(
        config: Config,
        files: Vec<MappedFile>,
        found: HashMap<String, Found>,
        opened: &Path,
    ) -> anyhow::Result<Self> {
        let catalog = Catalog::build(&config, |spec| {
            let tensor = found.get(&spec.name).with_context(|| {
                format!("tensor {} is missing, expected it with shape {:?}", spec.name, spec.shape)
            })?;
            stored(tensor).with_context(|| format!("tensor {}", spec.name))
        })
        .with_context(|| opened.display().to_string())?;
        let info = WeightsInfo {
            format: "safetensors",
            files: files.iter().map(|file| file.path.clone()).collect(),
            synthetic_seed: None,
            stored_bytes: catalog.stored_bytes.clone(),
        };
        Ok(SafetensorsModel { files, config, info, catalog })
    }
}

impl Weights for SafetensorsModel {
    fn config(&self) -> &Config {
        &self.config
    }

    fn info(&self) -> &WeightsInfo {
        &self.info
    }

    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>> {
        let entry = self.catalog.get(name).with_context(|| self.files[0].path.display().to_string())?;
        let bytes = &self.files[entry.stored.file].bytes()[entry.stored.range.clone()];
        Ok(entry.host_tensor(name, Cow::Borrowed(bytes)))
    }

    fn file_of(&self, name: &str) -> Option<&Path> {
        Some(&self.files[self.catalog.get(name).ok()?.stored.file].path)
    }
}

fn stored(found: &Found) -> anyhow::Result<Stored> {
    let dtype = match found.dtype {
        Dtype::F32 => StoredDType::F32,
        Dtype::F16 => StoredDType::F16,
        Dtype::BF16 => StoredDType::BF16,
        other => bail!("has type {other:?}, which is not supported; expected F32, F16 or BF16"),
    };
    Ok(Stored { file: found.file, dtype, shape: found.shape.clone(), range: found.range.clone() })
}

/// All tensors of all files; a name may occur once.
fn tensors_of(files: &[MappedFile]) -> anyhow::Result<HashMap<String, Found>> {
    let mut all = HashMap::new();
    for (index, file) in files.iter().enumerate() {
        let named = || file.path.display().to_string();
        for (name, found) in read_header(file.bytes(), index).with_context(named)? {
            if let Some(earlier) = all.get(&name).map(|found: &Found| &files[found.file]) {
                bail!(
                    "{}: tensor {name} occurs in {} too, expected it once",
                    named(),
                    earlier.path.display()
                );
            }
            all.insert(name, found);
        }
    }
    Ok(all)
}

/// Tensors of one file. The format's crate checks that they fill the data exactly, without holes or overlap.
fn read_header(bytes: &[u8], file: usize) -> anyhow::Result<Vec<(String, Found)>> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        bail!("has {} bytes, expected at least the 8 of a safetensors header length", bytes.len());
    };
    let header_bytes = u64::from_le_bytes(*length);
    let limit = MAX_HEADER_BYTES.min(rest.len() as u64);
    if header_bytes > limit {
        bail!("announces a header of {header_bytes} bytes, expected at most {limit}");
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| anyhow!("has no valid safetensors header: {}", one_line(&error)))?;
    let data_start = 8 + header_bytes as usize;
    let found = metadata.tensors().into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        let range = data_start + start..data_start + end;
        (name, Found { file, dtype: info.dtype, shape: info.shape.clone(), range })
    });
    Ok(found.collect())
}

fn read_index(path: &Path) -> anyhow::Result<Index> {
    let text = read_text(path, MAX_INDEX_BYTES)?;
    serde_json::from_str(&text)
        .map_err(|error| anyhow!("{}: is not a safetensors index: {}", path.display(), one_line(&error)))
}

/// A parser's message, which may quote the file at any length, as a part of one sentence.
fn one_line(error: &dyn std::fmt::Display) -> String {
    const MAX_CHARS: usize = 200;
    error.to_string().chars().take(MAX_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The shards' paths: plain file names in the index's own folder, and nothing else.
fn shard_paths(index_path: &Path, index: &Index) -> anyhow::Result<Vec<PathBuf>> {
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if names.is_empty() || names.len() > MAX_SHARDS {
        bail!("lists {} files, expected 1 to {MAX_SHARDS}", names.len());
    }
    for name in &names {
        let mut components = Path::new(name).components();
        let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
        if !plain || name.contains(['/', '\\']) || name.chars().any(char::is_control) {
            bail!("lists the file \"{}\", expected a plain name in its own folder", name.escape_debug());
        }
    }
    Ok(names.into_iter().map(|name| index_path.with_file_name(name)).collect())
}

/// Every tensor that the index lists must be in the file that it names.
fn check_index(index: &Index, files: &[MappedFile], found: &HashMap<String, Found>) -> anyhow::Result<()> {
    for (name, file) in &index.weight_map {
        let holder = found.get(name).and_then(|found| files[found.file].path.file_name());
        if holder != Some(file.as_ref()) {
            bail!("tensor {} is listed in {file}, which does not hold it", name.escape_debug());
        }
    }
    Ok(())
}
