//! Small files of `/proc` and `/sys`: reads them with a bound and turns every failure into a reason code.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Why a value is missing, as it stands in the record.
pub(crate) type Reason = &'static str;

/// Longest file that is read, bytes; the rest is ignored.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Highest CPU number that a list may name, so that a malformed list cannot grow without bound.
const MAX_CPU: u32 = 65_535;

/// The text of a file without surrounding white space and NULs.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<String, Reason> {
    read_start(path, MAX_FILE_BYTES)
}

/// The first `max_bytes` of a file.
pub(crate) fn read_start(path: impl AsRef<Path>, max_bytes: u64) -> Result<String, Reason> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| reason(error.kind()))?;
    file.take(max_bytes).read_to_end(&mut bytes).map_err(|error| reason(error.kind()))?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    if text.is_empty() { Err("empty") } else { Ok(text.to_owned()) }
}

/// The one number or word that a file holds.
pub(crate) fn parse<T: FromStr>(path: impl AsRef<Path>) -> Result<T, Reason> {
    number(&read(path)?)
}

pub(crate) fn number<T: FromStr>(text: &str) -> Result<T, Reason> {
    text.trim().parse().map_err(|_| "malformed")
}

/// The reason code of an I/O error.
pub(crate) fn reason(kind: ErrorKind) -> Reason {
    match kind {
        ErrorKind::NotFound | ErrorKind::NotADirectory => "not_found",
        ErrorKind::PermissionDenied => "permission",
        _ => "unreadable",
    }
}

/// The value after `key` and a colon, in a file of `key : value` lines.
pub(crate) fn field<'a>(text: &'a str, key: &str) -> Result<&'a str, Reason> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim())
        .filter(|value| !value.is_empty())
        .ok_or("not_found")
}

/// The numbers in a list such as `0-3,8`.
pub(crate) fn cpu_list(text: &str) -> Result<Vec<u32>, Reason> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number::<u32>(first)?, number::<u32>(last)?);
        if first > last || last > MAX_CPU || cpus.len() > MAX_CPU as usize {
            return Err("malformed");
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

/// Entries of a directory whose names are `prefix` and a number, in the order of that number.
pub(crate) fn numbered(directory: &Path, prefix: &str) -> Result<Vec<PathBuf>, Reason> {
    let entries = std::fs::read_dir(directory).map_err(|error| reason(error.kind()))?;
    let mut found: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The distinct values, sorted and comma-separated: one word where all agree.
pub(crate) fn distinct(values: impl IntoIterator<Item = String>) -> Option<String> {
    let distinct: std::collections::BTreeSet<String> = values.into_iter().collect();
    (!distinct.is_empty()).then(|| distinct.into_iter().collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_list_is_read_with_its_ranges() {
        assert_eq!(cpu_list("0-3,8\n"), Ok(vec![0, 1, 2, 3, 8]));
        assert_eq!(cpu_list("5"), Ok(vec![5]));
        for text in ["", "a", "3-1", "0-4294967295", "1,,2", "-1", "0-99999"] {
            assert_eq!(cpu_list(text), Err("malformed"), "{text}");
        }
        let long = vec!["0-65535"; 1000].join(",");
        assert_eq!(cpu_list(&long), Err("malformed"));
    }

    #[test]
    fn each_failure_has_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, " \n\0").unwrap();
        assert_eq!(read(dir.path().join("none")), Err("not_found"));
        assert_eq!(read(file.join("below a file")), Err("not_found"));
        assert_eq!(read(dir.path()), Err("unreadable"));
        assert_eq!(read(&file), Err("empty"));
        assert_eq!(reason(ErrorKind::PermissionDenied), "permission");
    }

    #[test]
    fn a_file_without_permission_says_so() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("energy_uj");
        std::fs::write(&file, "5").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).unwrap();
        // The superuser reads it all the same.
        assert!(matches!(read(&file).as_deref(), Err(&"permission") | Ok("5")));
    }

    #[test]
    fn bytes_that_are_not_text_do_not_stop_a_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"\xff\xfe12").unwrap();
        assert!(read(&file).unwrap().ends_with("12"));
        assert_eq!(parse::<u64>(&file), Err("malformed"));
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "model\t\t: 207\nmodel name\t: Some CPU: fast\nempty :\n";
        assert_eq!(field(text, "model name"), Ok("Some CPU: fast"));
        assert_eq!(field(text, "model"), Ok("207"));
        assert_eq!(field(text, "empty"), Err("not_found"));
        assert_eq!(field(text, "name"), Err("not_found"));
    }
}
