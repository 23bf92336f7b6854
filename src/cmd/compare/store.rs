//! Kept sessions: `DIR/<device>/<model>/<suite>/<start>-<hash>.json`. Those of the newest environment are the baseline,
//! older ones tell how much sessions differ by chance. Keeping a record twice keeps it once.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::analysis::compare::Sample;
use crate::cmd::{bad_file, usage};
use crate::record::{self, Record};

/// Digits of the content's hash in a file name.
const HASH_DIGITS: usize = 16;
/// Longest name of a folder, characters.
const LONGEST_NAME: usize = 80;

/// Writes `record` to its place and returns it.
///
/// # Errors
/// When the folder cannot be written.
pub(super) fn keep(folder: &Path, record: &Record, sample: &Sample) -> anyhow::Result<PathBuf> {
    let sha256 = record::canonical_sha256(record)
        .map_err(|error| bad_file(anyhow::anyhow!("{}: {error:#}", sample.name)))?;
    let start: String = sample.started_at.chars().filter(char::is_ascii_digit).collect();
    let folder = place(folder, sample);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("{}: cannot make the folder", folder.display()))?;
    let path = folder.join(format!("{start}-{}.json", &sha256[..HASH_DIGITS]));
    let text = serde_json::to_string_pretty(record)? + "\n";
    record::write_atomically(&path, text.as_bytes())
        .with_context(|| format!("{}: cannot keep the record", path.display()))?;
    Ok(path)
}

/// Files of the sessions that fit all candidates.
///
/// # Errors
/// When the candidates belong to several places, or nothing is kept for them.
pub(super) fn files_for(folder: &Path, candidates: &[Sample]) -> anyhow::Result<Vec<PathBuf>> {
    let places: Vec<PathBuf> = candidates.iter().map(|sample| place(folder, sample)).collect();
    let first = places.first().context("no candidate")?;
    if let Some((index, other)) = places.iter().enumerate().find(|(_, place)| *place != first) {
        return Err(usage(format!(
            "{} belongs to {}, expected all candidates in {}",
            candidates[index].name,
            other.display(),
            first.display()
        )));
    }
    let mut files: Vec<PathBuf> = match std::fs::read_dir(first) {
        Ok(entries) => entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect(),
        Err(_) => Vec::new(),
    };
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    if files.is_empty() {
        let hint = "hint: keep the sessions before the change there: compare --store DIR --baseline FILE…";
        let place = first.display();
        return Err(bad_file(anyhow::anyhow!(
            "{place}: holds no session for {}\n{hint}",
            candidates[0].name
        )));
    }
    Ok(files)
}

fn place(folder: &Path, sample: &Sample) -> PathBuf {
    let suite = sample.suite.value().map_or("no-suite", String::as_str);
    [sample.subject.as_str(), sample.model.as_str(), suite]
        .iter()
        .fold(folder.to_owned(), |path, part| path.join(name(part)))
}

/// A folder's name: letters, digits, dots and hyphens, never only dots.
fn name(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .take(LONGEST_NAME)
        .collect();
    let trimmed = plain.trim_matches(['.', '-']);
    if trimmed.is_empty() { "unnamed".to_owned() } else { trimmed.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_its_folder() {
        for (text, expected) in [
            ("sha256:c776", "sha256-c776"),
            ("Intel(R) Xeon(R) Processor", "Intel-R--Xeon-R--Processor"),
            ("../../etc", "etc"),
            ("..", "unnamed"),
            ("", "unnamed"),
            ("llama-3.1-8b", "llama-3.1-8b"),
        ] {
            assert_eq!(name(text), expected);
        }
    }
}
