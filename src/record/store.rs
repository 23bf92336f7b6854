//! Reading and writing records. A write replaces the whole file or leaves the earlier one: a temporary file in the
//! same folder, flushed to the disk, then renamed.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use tempfile::NamedTempFile;

use super::{Record, Run, SCHEMA};

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
        write_atomically(&self.path, text.as_bytes()).map_err(|error| unwritable(&self.path, &error))
    }
}

/// Whether a record could be written to `path`, found out by writing nothing there: before a model is loaded for
/// minutes, and long before anything is measured.
///
/// # Errors
/// Names the path and the cause.
pub fn check_place(path: &Path) -> anyhow::Result<()> {
    let checked = real_target(path).and_then(|target| temporary_beside(&target));
    checked.map(drop).map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow::anyhow!("{}: cannot write the record: {error}", path.display())
}

/// Writes `bytes` to `path` as a whole or not at all. A symbolic link is followed, not replaced.
///
/// # Errors
/// The file system's own error, or that `path` is no regular file; nothing is left behind then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let target = real_target(path)?;
    let mut temporary = temporary_beside(&target)?;
    temporary.write_all(bytes).map_err(without_path)?;
    temporary.as_file().sync_all()?;
    set_usual_permissions(temporary.as_file())?;
    temporary.persist(target).map_err(|error| error.error)?;
    Ok(())
}

/// The file to replace. A rename would replace a device such as /dev/null by a file, so only regular files pass.
fn real_target(path: &Path) -> io::Result<PathBuf> {
    match path.metadata() {
        Ok(metadata) if metadata.is_file() => path.canonicalize(),
        Ok(metadata) => {
            let kind = if metadata.is_dir() { "a folder" } else { "no regular file" };
            Err(io::Error::other(format!("it is {kind}, expected a file or a new name")))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        Err(error) => Err(error),
    }
}

fn temporary_beside(target: &Path) -> io::Result<NamedTempFile> {
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    tempfile::Builder::new().prefix(".tokmeter-").suffix(".tmp").tempfile_in(folder).map_err(without_path)
}

/// The system's error alone: tempfile adds its random name, which tells a reader nothing.
fn without_path(error: io::Error) -> io::Error {
    match error.to_string().split_once(" at path ") {
        Some((system, _)) => io::Error::new(error.kind(), system.to_owned()),
        None => error,
    }
}

/// Temporary files are private; a record is as readable as any other file the user makes.
#[cfg(unix)]
fn set_usual_permissions(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_usual_permissions(_file: &File) -> io::Result<()> {
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
    match schema_of(text)?.as_str() {
        Some(SCHEMA) => {}
        Some(other) if other.starts_with("tokmeter-record/") => {
            return Err(format!(
                "has schema {other}, expected {SCHEMA}; it was made by another version of tokmeter"
            ));
        }
        Some(other) => return Err(format!("has schema {other:.60}, expected {SCHEMA}")),
        None => return Err(format!("has no field schema, expected {SCHEMA}")),
    }
    let invalid = |error: serde_json::Error| match error.is_data() {
        true => format!("is no valid {SCHEMA}: {error}"),
        false => no_json(&error),
    };
    let mut record: Record = serde_json::from_str(text).map_err(invalid)?;
    let outline: Outline = serde_json::from_str(text).map_err(invalid)?;
    let known = outline_of(&mut record).map_err(invalid)?;
    match foreign_field(&outline.into_value(), &known) {
        None => Ok(record),
        Some(name) => Err(format!("is no valid {SCHEMA}: unknown field `{name:.60}`")),
    }
}

fn no_json(error: &serde_json::Error) -> String {
    format!("is no JSON: {error}")
}

/// The field that decides how the rest is read, whatever it holds; null where there is none.
fn schema_of(text: &str) -> Result<Value, String> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        schema: Value,
    }
    // Serde takes a list for a structure, too; what is no object may be no JSON either.
    let schema = match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text).map(|Head { schema }| schema),
        false => serde_json::from_str::<Value>(text).map(|_| Value::Null),
    };
    schema.map_err(|error| no_json(&error))
}

/// A record as it was given, without its runs: they are nearly all of a file, and hold no variants, beside which alone
/// serde lets unknown fields pass.
#[derive(Deserialize)]
struct Outline {
    cells: Vec<CellOutline>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
struct CellOutline {
    #[serde(rename = "runs")]
    _runs: IgnoredAny,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl Outline {
    fn into_value(mut self) -> Value {
        let cells = self.cells.into_iter().map(|cell| Value::Object(cell.rest)).collect();
        self.rest.insert("cells".to_owned(), Value::Array(cells));
        Value::Object(self.rest)
    }
}

/// The same of a record that was read. The runs are put aside meanwhile.
fn outline_of(record: &mut Record) -> serde_json::Result<Value> {
    let runs: Vec<Vec<Run>> = record.cells.iter_mut().map(|cell| std::mem::take(&mut cell.runs)).collect();
    let outline = serde_json::to_value(&*record);
    for (cell, runs) in record.cells.iter_mut().zip(runs) {
        cell.runs = runs;
    }
    outline
}

/// A field of `given` that `known`, the same record written again, does not have. Serde itself lets unknown fields
/// pass beside the `kind` of a variant without fields.
fn foreign_field<'a>(given: &'a Value, known: &Value) -> Option<&'a str> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            given.iter().find_map(|(name, value)| match known.get(name) {
                Some(known) => foreign_field(value, known),
                // An optional field that was written as null.
                None => (!value.is_null()).then_some(name.as_str()),
            })
        }
        (Value::Array(given), Value::Array(known)) => {
            given.iter().zip(known).find_map(|(given, known)| foreign_field(given, known))
        }
        _ => None,
    }
}
