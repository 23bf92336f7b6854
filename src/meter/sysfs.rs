//! Small files of `/sys` with one value each, and why one could not be read.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The text of a file without surrounding white space.
pub(super) fn text(path: &Path) -> Result<String, &'static str> {
    match fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Err("empty"),
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => Err(reason(error.kind())),
    }
}

/// The one whole number in a file.
pub(super) fn number(path: &Path) -> Result<u64, &'static str> {
    text(path)?.parse().map_err(|_| "malformed")
}

fn reason(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound | ErrorKind::NotADirectory => "not_found",
        ErrorKind::PermissionDenied => "permission",
        _ => "unreadable",
    }
}

/// Entries of a folder whose names begin so, in the order of their names.
pub(super) fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut entries: Vec<PathBuf> = names
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    entries
}
