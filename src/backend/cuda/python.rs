//! Where the `python3` on PATH keeps its packages. It is asked at most once for a process, under a time limit, and nothing
//! of its answer is believed but the names of folders that exist.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use super::library::Variable;

/// An interpreter on a cold network disk takes seconds to start.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of an answer, bytes that are read and folders that are believed at most.
const MOST_BYTES: u64 = 64 << 10;
const MOST_FOLDERS: usize = 64;
const QUESTION: &str = "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\\n')";

/// Answers by program.
static ANSWERS: Mutex<Option<HashMap<PathBuf, Vec<PathBuf>>>> = Mutex::new(None);

/// The folders of packages that the first `python3` on PATH names; none without one, or when it says nothing sensible.
pub(super) fn sites(variable: Variable<'_>) -> Vec<PathBuf> {
    let Some(program) = program(&variable("PATH").unwrap_or_default()) else { return Vec::new() };
    let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
    let answers = answers.get_or_insert_default();
    answers.entry(program).or_insert_with_key(|program| ask(program, PATIENCE)).clone()
}

/// As a shell finds it, but for folders that depend on where this process is.
fn program(path: &OsStr) -> Option<PathBuf> {
    let is_program = |path: &PathBuf| {
        path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let folders = std::env::split_paths(path).filter(|folder| folder.is_absolute());
    folders.map(|folder| folder.join("python3")).find(is_program)
}

fn ask(program: &Path, patience: Duration) -> Vec<PathBuf> {
    // -I: modules of the working folder and of PYTHONPATH have no say.
    let mut command = Command::new(program);
    command.args(["-I", "-c", QUESTION]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let Ok(mut child) = command.process_group(0).spawn() else { return Vec::new() };
    let answer = answer(&mut child, patience);
    end(&mut child);
    folders(&answer.unwrap_or_default())
}

/// Ends the child, which has answered or had its time, and all that it started.
fn end(child: &mut Child) {
    // Not waited for before: its number is nobody else's.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.wait();
}

/// What the child says before it ends or `patience` does.
fn answer(child: &mut Child, patience: Duration) -> Option<Vec<u8>> {
    let stdout = child.stdout.take()?;
    let (sender, receiver) = mpsc::channel();
    // Not joined: it ends with the child's output.
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.take(MOST_BYTES).read_to_end(&mut bytes);
        sender.send(read.map(|_| bytes))
    });
    receiver.recv_timeout(patience).ok()?.ok()
}

/// Lines that name a folder.
fn folders(answer: &[u8]) -> Vec<PathBuf> {
    let text = String::from_utf8_lossy(answer);
    let folders = text.lines().map(PathBuf::from).filter(|path| path.is_absolute() && path.is_dir());
    folders.take(MOST_FOLDERS).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A `python3` that runs these lines of shell instead, in a folder of its own below `root`.
    pub(in crate::backend::cuda) fn script(root: &Path, lines: &str) -> PathBuf {
        let folder = root.join("bin");
        std::fs::create_dir_all(&folder).unwrap();
        let program = folder.join("python3");
        // Written under another name: nothing else may have it open for writing when it is started.
        let draft = folder.join("draft");
        std::fs::write(&draft, format!("#!/bin/sh\n{lines}\n")).unwrap();
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(draft, &program).unwrap();
        program
    }

    #[test]
    fn of_an_answer_only_folders_that_exist_are_believed() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a b"), dir.path().join("c"));
        std::fs::create_dir_all(&first).unwrap();
        std::fs::create_dir_all(&second).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let lines = format!(
            "echo 'Traceback: no'; echo {0}/absent; echo {0}/file; echo '{1}'; echo src; printf '\\377\\n'; echo {2}",
            dir.path().display(),
            first.display(),
            second.display()
        );
        assert_eq!(ask(&script(dir.path(), &lines), PATIENCE), [first, second]);
    }

    #[test]
    fn a_program_that_fails_floods_or_hangs_is_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let nothing: [PathBuf; 0] = [];
        assert_eq!(ask(&dir.path().join("absent"), PATIENCE), nothing);
        assert_eq!(ask(&script(dir.path(), "exit 3"), PATIENCE), nothing);
        assert_eq!(ask(&script(dir.path(), "while :; do echo junk; done"), PATIENCE), nothing);
        // Far longer than a test runs: waiting for it would be noticed.
        let short = Duration::from_millis(100);
        assert_eq!(ask(&script(dir.path(), "exec sleep 3600"), short), nothing);
        let held_open = format!("sleep 3600 & echo {}", dir.path().display());
        assert_eq!(ask(&script(dir.path(), &held_open), short), nothing);
    }

    #[test]
    fn the_first_python3_on_path_that_can_be_started_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let found = script(dir.path(), "exit 0");
        let (folder, other) = (found.parent().unwrap(), dir.path().join("other"));
        std::fs::create_dir_all(&other).unwrap();
        std::fs::write(other.join("python3"), "not executable").unwrap();
        let path = std::env::join_paths([Path::new(""), Path::new("bin"), &other, folder]).unwrap();
        assert_eq!(program(&path), Some(found));
        assert_eq!(program(OsStr::new("")), None);
    }

    #[test]
    fn a_real_python3_names_its_own_folders() {
        let variable = |name: &str| std::env::var_os(name);
        if program(&variable("PATH").unwrap_or_default()).is_none() {
            return;
        }
        let found = sites(&variable);
        assert!(found.iter().all(|folder| folder.is_dir()), "{found:?}");
        assert!(
            found.iter().any(|folder| folder.ends_with("site-packages") || folder.ends_with("dist-packages"))
        );
    }
}
