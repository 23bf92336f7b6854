//! Compiled kernels on disk: one file per (source, headers, options, compiler, architecture), written whole or not at
//! all, and checked before it is used. A cache that cannot be read or written costs time, never a run.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

const MAGIC: &[u8] = b"tokmeter-cubin/1\n";
/// A digest in hexadecimal and a line end.
const DIGEST_BYTES: usize = 65;

/// SHA-256 of `parts`, each preceded by its length so that no two lists of parts look alike; in hexadecimal.
pub(super) fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub(super) struct Cubins(PathBuf);

impl Cubins {
    pub(super) fn at(folder: PathBuf) -> Self {
        Cubins(folder)
    }

    fn path(&self, key: &str) -> PathBuf {
        self.0.join(format!("{key}.cubin"))
    }

    /// The image under `key`, if it is there and whole.
    pub(super) fn get(&self, key: &str) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.path(key)).ok()?;
        let rest = bytes.strip_prefix(MAGIC)?;
        let (written, image) = rest.split_at_checked(DIGEST_BYTES)?;
        (written == line(image).as_bytes()).then(|| image.to_vec())
    }

    /// Keeps `image` under `key`, replacing what is there.
    pub(super) fn put(&self, key: &str, image: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.0)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        file.write_all(MAGIC)?;
        file.write_all(line(image).as_bytes())?;
        file.write_all(image)?;
        file.persist(self.path(key))?;
        Ok(())
    }
}

fn line(image: &[u8]) -> String {
    format!("{}\n", digest([image]))
}

/// Where compiled kernels are kept under the cache folder.
pub(super) fn folder(cache: &Path) -> PathBuf {
    cache.join("kernels")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_found_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let cubins = Cubins::at(folder(dir.path()));
        assert_eq!(cubins.get("a"), None);
        cubins.put("a", b"image").unwrap();
        cubins.put("a", b"newer image").unwrap();
        assert_eq!(cubins.get("a").unwrap(), b"newer image");
        assert_eq!(cubins.get("b"), None);
        assert_eq!(std::fs::read_dir(folder(dir.path())).unwrap().count(), 1, "temporary files were left");
    }

    #[test]
    fn a_damaged_entry_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let cubins = Cubins::at(dir.path().to_owned());
        cubins.put("a", b"image of a kernel").unwrap();
        let path = cubins.path("a");
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(cubins.get("a"), None, "cut to {length} bytes");
        }
        for index in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[index] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert_eq!(cubins.get("a"), None, "byte {index} flipped");
        }
    }

    #[test]
    fn the_digest_tells_where_one_part_ends() {
        let of = |parts: &[&str]| digest(parts.iter().map(|part| part.as_bytes()));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["a"]), of(&["a", ""]));
        assert_eq!(of(&["a"]).len(), 64);
    }
}
