//! GGUF v2 and v3 files, memory-mapped: tensors under canonical names, the configuration and the vocabulary from the
//! metadata. `header` parses without trust, `config` and `names` translate. Makes no tokenizer and converts no values.

mod config;
mod cursor;
mod header;
mod names;
mod rows;
mod value;

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context as _, bail};

use super::catalog::{Catalog, Stored};
use super::mapped::MappedFile;
use super::vocab::GgufVocab;
use super::{HostTensor, Weights, WeightsInfo};
use crate::arch::{Architecture, Config, TensorSpec};
use header::Header;
use value::Value;

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    config: Config,
    info: WeightsInfo,
    catalog: Catalog,
}

impl Gguf {
    /// Maps the file and checks its header, its configuration and every tensor's place and shape. Reads no weights.
    ///
    /// # Errors
    /// Names the file, what is wrong in it and what was expected.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = MappedFile::open(path)?;
        let (config, catalog) = inspect(file.bytes()).with_context(|| path.display().to_string())?;
        let info = WeightsInfo {
            format: "gguf",
            files: vec![path.to_owned()],
            synthetic_seed: None,
            stored_bytes: catalog.stored_bytes.clone(),
        };
        Ok(Gguf { file, config, info, catalog })
    }

    /// The tokenizer's tables.
    ///
    /// # Errors
    /// Names the file and the key that is missing or malformed.
    pub fn vocab(&self) -> anyhow::Result<GgufVocab> {
        Header::parse(self.file.bytes())
            .and_then(|header| read_vocab(&header))
            .with_context(|| self.file.path.display().to_string())
    }

    fn bytes_of(&self, name: &str, stored: &Stored) -> Cow<'_, [u8]> {
        let bytes = &self.file.bytes()[stored.range.clone()];
        let heads = match self.config.architecture {
            Architecture::Llama if name.ends_with("q_proj.weight") => self.config.num_attention_heads,
            Architecture::Llama if name.ends_with("k_proj.weight") => self.config.num_key_value_heads,
            _ => return Cow::Borrowed(bytes),
        };
        Cow::Owned(rows::separate_halves(bytes, heads, self.config.head_dim))
    }
}

impl Weights for Gguf {
    fn config(&self) -> &Config {
        &self.config
    }

    fn info(&self) -> &WeightsInfo {
        &self.info
    }

    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>> {
        let entry = self.catalog.get(name).with_context(|| self.file.path.display().to_string())?;
        Ok(entry.host_tensor(name, self.bytes_of(name, &entry.stored)))
    }
}

fn inspect(bytes: &[u8]) -> anyhow::Result<(Config, Catalog)> {
    let header = Header::parse(bytes)?;
    let config = config::config(&header)?;
    let mut used = HashSet::from([names::ROPE_FREQS.to_owned()]);
    let catalog = Catalog::build(&config, |spec| {
        let (name, stored) = find(&header, spec)?;
        used.insert(name);
        Ok(stored)
    })?;
    // A tensor that nothing asks for (a bias, an adapter) would be left out of the forward pass in silence.
    if let Some(name) = header.tensors.keys().filter(|name| !used.contains(**name)).min() {
        bail!(
            "tensor {name} has no place in a {:?} model, expected only tensors that it uses",
            config.architecture
        );
    }
    Ok((config, catalog))
}

fn find(header: &Header<'_>, spec: &TensorSpec) -> anyhow::Result<(String, Stored)> {
    let name = names::gguf_name(&spec.name).with_context(|| format!("GGUF has no name for {}", spec.name))?;
    let info = header.tensors.get(name.as_str()).with_context(|| {
        format!("tensor {name} ({}) is missing, expected it with shape {:?}", spec.name, spec.shape)
    })?;
    let stored = Stored { file: 0, dtype: info.dtype, shape: info.shape.clone(), range: info.range.clone() };
    Ok((name, stored))
}

fn read_vocab(header: &Header<'_>) -> anyhow::Result<GgufVocab> {
    let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");
    let strings = |suffix: &str| -> anyhow::Result<Option<Vec<String>>> {
        let Some(value) = header.metadata.get(key(suffix).as_str()) else { return Ok(None) };
        value.array().and_then(|array| array.strings()).with_context(|| key(suffix)).map(Some)
    };
    let tokens = strings("tokens")?.context("tokenizer.ggml.tokens is missing")?;
    let id = |suffix: &str| token_id(header, &key(suffix), tokens.len());
    Ok(GgufVocab {
        model: header.text(&key("model"))?.context("tokenizer.ggml.model is missing")?.to_owned(),
        pre: header.text(&key("pre"))?.map(str::to_owned),
        token_types: token_types(header, tokens.len())?,
        merges: strings("merges")?.unwrap_or_default(),
        bos_token_id: id("bos_token_id")?,
        eos_token_id: id("eos_token_id")?,
        unknown_token_id: id("unknown_token_id")?,
        add_bos_token: header.boolean(&key("add_bos_token"))?,
        tokens,
    })
}

fn token_id(header: &Header<'_>, key: &str, tokens: usize) -> anyhow::Result<Option<u32>> {
    let id = header.unsigned(key)?;
    if let Some(id) = id.filter(|&id| id >= tokens as u64) {
        bail!("{key} is {id}, expected less than the {tokens} tokens of the vocabulary");
    }
    Ok(id.map(|id| id as u32))
}

/// Every token is normal where the file does not say.
fn token_types(header: &Header<'_>, tokens: usize) -> anyhow::Result<Vec<i32>> {
    const NORMAL: i32 = 1;
    let Some(value) = header.metadata.get("tokenizer.ggml.token_type") else {
        return Ok(vec![NORMAL; tokens]);
    };
    let types = Value::array(value).and_then(|array| array.i32s()).context("tokenizer.ggml.token_type")?;
    if types.len() != tokens {
        bail!(
            "tokenizer.ggml.token_type has {} entries, expected one for each of {tokens} tokens",
            types.len()
        );
    }
    Ok(types)
}
