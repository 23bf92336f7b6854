//! What took time to make, kept on disk: compiled kernels, and the algorithms chosen for matrix products. One file per
//! key, written whole or not at all, and checked before it is used. A cache that cannot be read or written costs time,
//! never a run.

use std::io::Write as _;
use std::path::{Path, PathBuf};

pub(super) use super::prebuilt::digest;
use crate::weights::fetch;

/// Images of kernels, by (source, headers, options, compiler, architecture).
pub(super) const KERNELS: Kind = Kind { folder: "kernels", extension: "cubin", magic: b"tokmeter-cubin/1\n" };
/// Intermediate code of kernels, by the same.
pub(super) const INTERMEDIATE: Kind =
    Kind { folder: "kernels", extension: "ptx", magic: b"tokmeter-ptx/1\n" };
/// Algorithms of cuBLASLt, by (device, driver, library, product).
pub(super) const ALGORITHMS: Kind =
    Kind { folder: "cublaslt", extension: "algorithm", magic: b"tokmeter-cublaslt/1\n" };

/// A digest in hexadecimal and a line end.
const DIGEST_BYTES: usize = 65;

/// What the files of one cache hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// Under this user's cache folder.
    folder: &'static str,
    extension: &'static str,
    /// First bytes of each file; a new number makes old files unknown.
    magic: &'static [u8],
}

/// A folder of files of one kind.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    kind: Kind,
    folder: PathBuf,
}

impl Cache {
    /// In this user's cache folder; none where there is no such folder.
    pub(super) fn of_user(kind: Kind) -> Option<Self> {
        let cache = fetch::cache_folder(|name| std::env::var_os(name)).ok()?;
        Some(Cache::at(kind, &cache))
    }

    /// Under the cache folder `cache`.
    pub(super) fn at(kind: Kind, cache: &Path) -> Self {
        Cache { kind, folder: cache.join(kind.folder) }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.{}", self.kind.extension))
    }

    /// What was kept under `key`, if it is there and whole.
    pub(super) fn get(&self, key: &str) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.path(key)).ok()?;
        let rest = bytes.strip_prefix(self.kind.magic)?;
        let (written, content) = rest.split_at_checked(DIGEST_BYTES)?;
        (written == line(content).as_bytes()).then(|| content.to_vec())
    }

    /// Keeps `content` under `key`, replacing what is there.
    pub(super) fn put(&self, key: &str, content: &[u8]) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(self.kind.magic)?;
        file.write_all(line(content).as_bytes())?;
        file.write_all(content)?;
        file.persist(self.path(key))?;
        Ok(())
    }
}

fn line(content: &[u8]) -> String {
    format!("{}\n", digest([content]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_found_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(KERNELS, dir.path());
        assert_eq!(cache.get("a"), None);
        cache.put("a", b"image").unwrap();
        cache.put("a", b"newer image").unwrap();
        assert_eq!(cache.get("a").unwrap(), b"newer image");
        assert_eq!(cache.get("b"), None);
        assert_eq!(std::fs::read_dir(&cache.folder).unwrap().count(), 1, "temporary files were left");
    }

    #[test]
    fn a_damaged_entry_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(KERNELS, dir.path());
        cache.put("a", b"image of a kernel").unwrap();
        let path = cache.path("a");
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(cache.get("a"), None, "cut to {length} bytes");
        }
        for index in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[index] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.get("a"), None, "byte {index} flipped");
        }
    }

    #[test]
    fn kinds_do_not_see_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let (kernels, algorithms) = (Cache::at(KERNELS, dir.path()), Cache::at(ALGORITHMS, dir.path()));
        kernels.put("a", b"image").unwrap();
        assert_eq!(algorithms.get("a"), None);
        std::fs::create_dir_all(&algorithms.folder).unwrap();
        std::fs::copy(kernels.path("a"), algorithms.path("a")).unwrap();
        assert_eq!(algorithms.get("a"), None, "a file of another kind was taken");
    }

    #[test]
    fn the_digest_tells_where_one_part_ends() {
        let of = |parts: &[&str]| digest(parts.iter().map(|part| part.as_bytes()));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["a"]), of(&["a", ""]));
        assert_eq!(of(&["a"]).len(), 64);
    }
}
