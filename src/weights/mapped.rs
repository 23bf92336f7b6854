//! Read-only memory maps of weight files, and bounded reading of the small text files beside them.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use memmap2::Mmap;

/// A file whose bytes are paged in as they are read.
#[derive(Debug)]
pub(super) struct MappedFile {
    pub(super) path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// # Errors
    /// Names the path when it is not a regular file or cannot be read.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let map = map(path).with_context(|| path.display().to_string())?;
        Ok(MappedFile { path: path.to_owned(), map })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

fn map(path: &Path) -> anyhow::Result<Mmap> {
    let file = open_regular(path)?;
    // SAFETY: the map is read-only and private to this process. Another process that shortens the file while it is
    // open would end ours with a bus error, as with any program that maps its weights; it cannot make it write.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) };
    let map = map.context("cannot be mapped")?;
    // Weights are read once, from one end to the other: the kernel may read ahead. It may also refuse.
    #[cfg(unix)]
    let _ = map.advise(memmap2::Advice::Sequential);
    Ok(map)
}

/// Opens a regular file only: a pipe would block and a folder has no bytes.
fn open_regular(path: &Path) -> anyhow::Result<File> {
    let metadata = path.metadata().context("cannot be opened")?;
    if !metadata.is_file() {
        bail!("is not a regular file");
    }
    File::open(path).context("cannot be opened")
}

/// The text of a file of at most `limit_bytes`.
///
/// # Errors
/// Names the path when the file is missing, larger or not UTF-8.
pub(super) fn read_text(path: &Path, limit_bytes: u64) -> anyhow::Result<String> {
    let read = || {
        let length = open_regular(path)?.metadata()?.len();
        if length > limit_bytes {
            bail!("has {length} bytes, expected at most {limit_bytes}");
        }
        std::fs::read_to_string(path).context("cannot be read")
    };
    read().with_context(|| path.display().to_string())
}
