//! SHA-256 of files, so that a record says which weights it measured.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

const BUFFER_BYTES: usize = 1 << 20;

/// SHA-256 of a file in lower-case hex. `progress` is told the bytes of each piece that was read.
///
/// # Errors
/// Names the file that cannot be read.
pub fn sha256_file(path: &Path, progress: &mut dyn FnMut(u64)) -> anyhow::Result<String> {
    let unreadable = || format!("{}: cannot be read", path.display());
    let mut file = File::open(path).with_context(unreadable)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut hasher = Sha256::new();
    loop {
        let read = file.read(&mut buffer).with_context(unreadable)?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
        progress(read as u64);
    }
}

/// File name and SHA-256 of each file, in the given order.
///
/// # Errors
/// Names the file that cannot be read.
pub fn sha256_files(
    paths: &[PathBuf],
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<Vec<(String, String)>> {
    paths
        .iter()
        .map(|path| {
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            Ok((name, sha256_file(path, progress)?))
        })
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standards_own_example_has_its_published_hash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc.bin");
        std::fs::write(&path, "abc").unwrap();
        let mut read = 0;
        let files = sha256_files(&[path], &mut |bytes| read += bytes).unwrap();
        // FIPS 180-2, appendix B.1
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(files, [("abc.bin".to_owned(), expected.to_owned())]);
        assert_eq!(read, 3);
    }

    #[test]
    fn a_file_longer_than_the_buffer_is_hashed_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        std::fs::write(&path, "a".repeat(2 * BUFFER_BYTES + 1)).unwrap();
        let whole = hex(&Sha256::digest("a".repeat(2 * BUFFER_BYTES + 1)));
        assert_eq!(sha256_file(&path, &mut |_| {}).unwrap(), whole);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = sha256_file(Path::new("no/such/file"), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("no/such/file"));
    }
}
