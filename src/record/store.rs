//! Reading and writing records. A write replaces the whole file or leaves the earlier one: a temporary file in the
//! same folder, flushed to the disk, then renamed.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Record, SCHEMA};

/// Largest file that is read as a record.
const LARGEST_RECORD_BYTES: u64 = 1 << 30;

/// Where the record of a running invocation is kept.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
}

impl Store {
    /// Claims `path` by writing `record` there, so that an unwritable place is known before anything is measured.
    ///
    /// # Errors
    /// Names the path and the cause.
    pub fn create(path: PathBuf, record: &Record) -> anyhow::Result<Self> {
        let store = Store { path };
        store.save(record)?;
        Ok(store)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the file by `record`. On failure the file keeps its earlier content.
    ///
    /// # Errors
    /// Names the path and the cause.
    pub fn save(&self, record: &Record) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(record)?;
        text.push('\n');
        write_atomically(&self.path, text.as_bytes())
            .map_err(|error| anyhow::anyhow!("{}: cannot write the record: {error}", self.path.display()))
    }
}

/// Writes `bytes` to `path` as a whole or not at all.
///
/// # Errors
/// The file system's own error; nothing is left behind then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut temporary = tempfile::Builder::new().prefix(".tokmeter-").suffix(".tmp").tempfile_in(folder)?;
    temporary.write_all(bytes)?;
    temporary.as_file().sync_all()?;
    set_usual_permissions(temporary.as_file())?;
    temporary.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Temporary files are private; a record is as readable as any other file the user makes.
#[cfg(unix)]
fn set_usual_permissions(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_usual_permissions(_file: &File) -> std::io::Result<()> {
    Ok(())
}

/// Why a file was not accepted as a record. Every verb exits with 3 then.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct ReadError {
    pub path: PathBuf,
    pub reason: String,
}

/// Reads a record of this format's major version.
///
/// # Errors
/// When the file cannot be read, is no JSON, another format or version, or does not have the record's fields.
pub fn read(path: &Path) -> Result<Record, ReadError> {
    let refuse = |reason: String| ReadError { path: path.to_owned(), reason };
    let text = read_text(path).map_err(&refuse)?;
    parse(&text).map_err(&refuse)
}

fn read_text(path: &Path) -> Result<String, String> {
    let file = File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
    let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
    if metadata.is_dir() {
        return Err("is a folder, expected a record file".to_owned());
    }
    let mut text = String::new();
    file.take(LARGEST_RECORD_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot be read as text: {error}"))?;
    if text.len() as u64 > LARGEST_RECORD_BYTES {
        return Err(format!("is larger than {LARGEST_RECORD_BYTES} bytes, the most a record may have"));
    }
    Ok(text)
}

/// The record in `text`. The version is looked at first, so that a newer file is named as such and not by the first
/// field it has more.
///
/// # Errors
/// Says what was expected and what was found.
pub fn parse(text: &str) -> Result<Record, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is no JSON: {error}"))?;
    match value.get("schema").and_then(Value::as_str) {
        Some(SCHEMA) => {}
        Some(other) if other.starts_with("tokmeter-record/") => {
            return Err(format!(
                "has schema {other}, expected {SCHEMA}; it was made by another version of tokmeter"
            ));
        }
        Some(other) => return Err(format!("has schema {other:.60}, expected {SCHEMA}")),
        None => return Err(format!("has no field schema, expected {SCHEMA}")),
    }
    // Parsed from the text again, because only then does an error know its line and column.
    serde_json::from_str(text).map_err(|error| format!("is no valid {SCHEMA}: {error}"))
}
