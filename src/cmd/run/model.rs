//! From a model's name or path to opened weights, and what the record says of them.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::choices::Choices;
use super::view::View;
use crate::arch::Config;
use crate::cmd::model::{config_of, locate, name_of};
use crate::cmd::{bad_file, remark};
use crate::record::{FileRecord, Maybe, WeightsRecord, WeightsSource};
use crate::weights::fetch;
use crate::weights::synthetic::Synthetic;
use crate::weights::{Weights, open, sha256_file};

/// Seed of the weights that stand in for a default model that cannot be fetched.
const FALLBACK_SEED: u64 = 0;

/// A model ready to be loaded.
pub(super) struct Opened {
    pub(super) name: String,
    pub(super) weights: Box<dyn Weights>,
    pub(super) record: WeightsRecord,
}

/// # Errors
/// When the model does not exist, cannot be fetched or is broken. Only a default model that cannot be fetched is
/// replaced by synthetic weights, aloud.
pub(super) fn open_model(choices: &Choices, view: &View) -> anyhow::Result<Opened> {
    if let Some(seed) = choices.synthetic_seed {
        return Ok(synthetic(name_of(&choices.model), config_of(&choices.model)?, seed));
    }
    match locate(&choices.model, choices.offline, view.fetch_progress()) {
        Ok(path) => checkpoint(choices, &path, view),
        Err(error) if choices.model_is_explicit || error.is::<fetch::Interrupted>() => Err(error),
        Err(error) => {
            remark(&format!("warning: {error:#}"));
            remark(
                "warning: SYNTHETIC WEIGHTS: the default model could not be had, so values are made up in its true \
                 shapes; speed is comparable, output is meaningless, and the record says so",
            );
            Ok(synthetic(name_of(&choices.model), config_of(&choices.model)?, FALLBACK_SEED))
        }
    }
}

fn checkpoint(choices: &Choices, path: &Path, view: &View) -> anyhow::Result<Opened> {
    let weights = open(path).map_err(bad_file)?;
    let info = weights.info();
    let files = file_records(&info.files, view).map_err(bad_file)?;
    let record = WeightsRecord {
        source: WeightsSource::Checkpoint,
        format: info.format.to_owned(),
        stored_bytes: info.stored_bytes.clone(),
        files,
    };
    Ok(Opened { name: name_of(&choices.model), weights, record })
}

/// Size and hash of each file; several are hashed at once, since one thread is slower than most storage.
fn file_records(files: &[PathBuf], view: &View) -> anyhow::Result<Vec<FileRecord>> {
    let sizes: Vec<u64> = files
        .iter()
        .map(|file| std::fs::metadata(file).map(|metadata| metadata.len()))
        .collect::<std::io::Result<_>>()?;
    let bar = view.bytes("hashing weights", sizes.iter().sum());
    let records = files
        .par_iter()
        .zip(sizes)
        .map(|(file, size_bytes)| {
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            let sha256 = sha256_file(file, &mut |bytes| bar.inc(bytes))?;
            Ok(FileRecord { name, size_bytes, sha256: Maybe::Value(sha256) })
        })
        .collect();
    bar.finish_and_clear();
    records
}

fn synthetic(name: String, config: Config, seed: u64) -> Opened {
    let weights = Synthetic::new(config, seed);
    let record = WeightsRecord {
        source: WeightsSource::Synthetic { seed },
        format: "synthetic".to_owned(),
        stored_bytes: weights.info().stored_bytes.clone(),
        files: Vec::new(),
    };
    Opened { name, weights: Box::new(weights), record }
}
