//! The cache folder: what is in it, what of it is proven, and how a file gets in. A file appears under its name only
//! whole, checked and flushed; beside it a small note holds size, time and sha256, so that it is hashed once.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::RemoteFile;

/// Holds a [`Workspace`] per fetch under way, and what killed ones left.
const INCOMING: &str = ".incoming";
const LOCK: &str = "lock";
const PIECE_BYTES: usize = 256 << 10;

/// Called with the bytes done so far after each piece; an error stops the work.
pub(crate) type Tick<'a> = &'a mut dyn FnMut(u64) -> anyhow::Result<()>;

/// `$TOKMETER_CACHE`, else `$XDG_CACHE_HOME/tokmeter` (only if absolute, as its specification demands), else
/// `~/.cache/tokmeter`.
pub(crate) fn folder(variable: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<PathBuf> {
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(own) = path("TOKMETER_CACHE") {
        return Ok(own);
    }
    if let Some(xdg) = path("XDG_CACHE_HOME").filter(|xdg| xdg.is_absolute()) {
        return Ok(xdg.join("tokmeter"));
    }
    let home =
        path("HOME").context("no cache folder: HOME is not set\nhint: set TOKMETER_CACHE to a folder")?;
    Ok(home.join(".cache/tokmeter"))
}

/// What is known of a file in the cache.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Absent,
    /// There and proven; the sha256.
    Good(String),
    /// There but not what was asked for, and why.
    Bad(String),
}

/// What was found when a file was last hashed. Holds as long as its size and time stay.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    bytes: u64,
    modified_ns: u64,
    sha256: String,
}

fn note_path(file: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(file.file_name().unwrap_or_default());
    name.push(".verified.json");
    file.with_file_name(name)
}

fn read_note(file: &Path) -> Option<Note> {
    serde_json::from_slice(&fs::read(note_path(file)).ok()?).ok()
}

/// Best effort: without a note (a read-only cache) the file is hashed again next time.
fn write_note(file: &Path, note: &Note) {
    if let Ok(text) = serde_json::to_vec(note) {
        let _ = fs::write(note_path(file), text);
    }
}

fn modified_ns(metadata: &fs::Metadata) -> u64 {
    let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// Looks at a file and proves it, by its note if that still holds and `rehash` does not ask for more.
///
/// # Errors
/// Only those of `tick`.
pub(crate) fn presence(
    path: &Path,
    wanted: &RemoteFile,
    rehash: bool,
    tick: Tick<'_>,
) -> anyhow::Result<Presence> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Presence::Absent),
        Err(error) => return Ok(Presence::Bad(format!("{}: {error}", path.display()))),
    };
    let bytes = metadata.len();
    if let Some(expected) = wanted.bytes.filter(|expected| *expected != bytes) {
        return Ok(Presence::Bad(format!("{} has {bytes} bytes, expected {expected}", path.display())));
    }
    let modified_ns = modified_ns(&metadata);
    let note = read_note(path);
    let expected = wanted.sha256.clone().or(note.as_ref().map(|note| note.sha256.clone()));
    if let Some(note) = note.filter(|note| !rehash && (note.bytes, note.modified_ns) == (bytes, modified_ns))
    {
        return Ok(judge(path, note.sha256, expected));
    }
    let sha256 = match File::open(path) {
        Ok(file) => hash(file, path, tick)?,
        Err(error) => return Ok(Presence::Bad(format!("{}: {error}", path.display()))),
    };
    let verdict = judge(path, sha256.clone(), expected);
    if matches!(verdict, Presence::Good(_)) {
        write_note(path, &Note { bytes, modified_ns, sha256 });
    }
    Ok(verdict)
}

fn judge(path: &Path, sha256: String, expected: Option<String>) -> Presence {
    match expected {
        Some(expected) if expected != sha256 => {
            Presence::Bad(format!("{} has sha256 {sha256}, expected {expected}", path.display()))
        }
        _ => Presence::Good(sha256),
    }
}

fn hash(mut file: File, path: &Path, tick: Tick<'_>) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut done_bytes = 0;
    loop {
        let read = file.read(&mut piece).with_context(|| path.display().to_string())?;
        if read == 0 {
            return Ok(hex(hasher));
        }
        hasher.update(&piece[..read]);
        done_bytes += read as u64;
        tick(done_bytes)?;
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A folder inside the cache (so that a rename out of it is atomic) for one fetch; removed with its contents when
/// dropped. Its lock is held as long as the process lives, which tells a fetch under way from a killed one.
pub(crate) struct Workspace {
    folder: tempfile::TempDir,
    _lock: File,
}

impl Workspace {
    pub(crate) fn open(cache: &Path) -> anyhow::Result<Self> {
        let incoming = cache.join(INCOMING);
        fs::create_dir_all(&incoming).with_context(|| {
            format!(
                "cannot create {}\nhint: set TOKMETER_CACHE to a folder you may write to",
                incoming.display()
            )
        })?;
        sweep(&incoming);
        // Another process's sweep may take the folder in the moment before it is locked: then make a new one.
        for _ in 0..8 {
            let folder = tempfile::Builder::new()
                .tempdir_in(&incoming)
                .with_context(|| format!("cannot create a folder in {}", incoming.display()))?;
            let path = folder.path().join(LOCK);
            let Ok(lock) = File::create(&path) else { continue };
            // A file system without locks still works, but is not swept.
            let _ = lock.lock();
            if path.exists() {
                return Ok(Self { folder, _lock: lock });
            }
        }
        bail!("cannot keep a folder in {}", incoming.display())
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Removes what killed fetches left: folders whose lock nobody holds.
fn sweep(incoming: &Path) {
    let Ok(entries) = fs::read_dir(incoming) else { return };
    for folder in entries.flatten().map(|entry| entry.path()) {
        match File::options().write(true).open(folder.join(LOCK)) {
            Ok(lock) if lock.try_lock().is_ok() => {
                let _ = fs::remove_dir_all(&folder);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let _ = fs::remove_dir(&folder); // only if it is empty
            }
            _ => {}
        }
    }
}

/// A file on its way into the cache, hashed while it is written.
pub(crate) struct Incoming {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    bytes: u64,
}

impl Incoming {
    pub(crate) fn create(workspace: &Workspace) -> anyhow::Result<Self> {
        let path = workspace.path().join("file");
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        Ok(Self { file, path, hasher: Sha256::new(), bytes: 0 })
    }

    /// Takes everything `from` gives, but no more than `most_bytes`.
    pub(crate) fn receive(
        &mut self,
        from: &mut dyn Read,
        most_bytes: u64,
        tick: Tick<'_>,
    ) -> anyhow::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let read = match from.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("broke off after {} bytes", self.bytes));
                }
            };
            self.bytes += read as u64;
            ensure!(self.bytes <= most_bytes, "sends more than the {most_bytes} bytes it should have");
            self.hasher.update(&piece[..read]);
            self.file.write_all(&piece[..read]).with_context(|| self.path.display().to_string())?;
            tick(self.bytes)?;
        }
    }

    /// Checks what came, flushes it and gives it its name. A file already there is replaced.
    pub(crate) fn commit(self, target: &Path, wanted: &RemoteFile) -> anyhow::Result<()> {
        if let Some(expected) = wanted.bytes {
            ensure!(self.bytes == expected, "sent {} bytes, expected {expected}", self.bytes);
        }
        let sha256 = hex(self.hasher);
        if let Some(expected) = &wanted.sha256 {
            ensure!(sha256 == *expected, "sent a file with sha256 {sha256}, expected {expected}");
        }
        self.file.sync_all().with_context(|| self.path.display().to_string())?;
        let folder = target.parent().unwrap_or(target);
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        fs::rename(&self.path, target).with_context(|| target.display().to_string())?;
        // The name survives a power cut only when the folder is flushed too.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        if let Ok(metadata) = fs::metadata(target) {
            write_note(target, &Note { bytes: self.bytes, modified_ns: modified_ns(&metadata), sha256 });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_tick(_: u64) -> anyhow::Result<()> {
        Ok(())
    }

    fn wanted(bytes: Option<u64>, sha256: Option<&str>) -> RemoteFile {
        RemoteFile { path: "x".into(), bytes, sha256: sha256.map(str::to_owned) }
    }

    fn folder_with(set: &[(&str, &str)]) -> anyhow::Result<PathBuf> {
        folder(|name| set.iter().find(|(own, _)| *own == name).map(|(_, value)| OsString::from(value)))
    }

    #[test]
    fn the_cache_folder_follows_the_variables_in_order() {
        let all = [("TOKMETER_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(folder_with(&all).unwrap(), Path::new("/a"));
        assert_eq!(folder_with(&all[1..]).unwrap(), Path::new("/b/tokmeter"));
        assert_eq!(folder_with(&all[2..]).unwrap(), Path::new("/c/.cache/tokmeter"));
        let relative = [("TOKMETER_CACHE", ""), ("XDG_CACHE_HOME", "b"), ("HOME", "/c")];
        assert_eq!(folder_with(&relative).unwrap(), Path::new("/c/.cache/tokmeter"));
        assert!(folder_with(&[]).unwrap_err().to_string().starts_with("no cache folder: HOME is not set"));
    }

    #[test]
    fn a_file_is_hashed_once_and_again_when_it_changed_or_is_asked_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let hashed = |rehash| {
            let mut pieces = 0;
            let found = presence(&path, &wanted(Some(3), Some(abc)), rehash, &mut |_| {
                pieces += 1;
                Ok(())
            });
            (found.unwrap(), pieces)
        };
        assert_eq!(hashed(false), (Presence::Good(abc.into()), 1));
        assert_eq!(hashed(false), (Presence::Good(abc.into()), 0));
        assert_eq!(hashed(true), (Presence::Good(abc.into()), 1));
        fs::write(&path, "abd").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(UNIX_EPOCH).unwrap();
        let (found, pieces) = hashed(false);
        assert!(matches!(&found, Presence::Bad(why) if why.contains(", expected ba7816bf")), "{found:?}");
        assert_eq!(pieces, 1);
    }

    #[test]
    fn a_file_of_unknown_hash_is_held_to_the_hash_it_had_at_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "abc").unwrap();
        let look = |rehash| presence(&path, &wanted(None, None), rehash, &mut no_tick).unwrap();
        assert!(matches!(look(false), Presence::Good(_)));
        fs::write(&path, "abd").unwrap();
        assert!(matches!(look(true), Presence::Bad(_)));
    }

    #[test]
    fn a_wrong_size_is_noticed_without_hashing_and_absence_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let never = &mut |_| panic!("hashed");
        assert_eq!(presence(&path, &wanted(Some(3), None), true, never).unwrap(), Presence::Absent);
        fs::write(&path, "abcd").unwrap();
        let found = presence(&path, &wanted(Some(3), None), true, never).unwrap();
        assert_eq!(found, Presence::Bad(format!("{} has 4 bytes, expected 3", path.display())));
    }

    #[test]
    fn leftovers_of_a_killed_fetch_are_swept_and_a_live_one_is_not() {
        let cache = tempfile::tempdir().unwrap();
        let live = Workspace::open(cache.path()).unwrap();
        let dead = cache.path().join(INCOMING).join("dead");
        fs::create_dir_all(dead.join("tmp")).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        fs::write(dead.join("tmp/half.whl"), "half").unwrap();
        let next = Workspace::open(cache.path()).unwrap();
        assert!(!dead.exists());
        assert!(live.path().join(LOCK).exists() && next.path().join(LOCK).exists());
        let path = live.path().to_owned();
        drop(live);
        assert!(!path.exists());
    }

    #[test]
    fn more_bytes_than_announced_are_not_taken() {
        let cache = tempfile::tempdir().unwrap();
        let workspace = Workspace::open(cache.path()).unwrap();
        let mut incoming = Incoming::create(&workspace).unwrap();
        let error = incoming.receive(&mut std::io::repeat(0), 10, &mut no_tick).unwrap_err();
        assert_eq!(error.to_string(), "sends more than the 10 bytes it should have");
    }
}
