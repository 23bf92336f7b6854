//! Running the program as its users do.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokmeter::record::{Record, read};

pub const BINARY: &str = env!("CARGO_BIN_EXE_tokmeter");
/// Longest time that a refusal may take, and more than any short run needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the program in `folder`.
pub fn tokmeter(folder: &Path, args: &[&str]) -> Finished {
    run(BINARY, args, folder, PATIENCE)
}

/// Runs the program under limits that `sh` sets first, such as `ulimit -v 4194304`.
pub fn tokmeter_limited(folder: &Path, limits: &str, args: &[&str], patience: Duration) -> Finished {
    let script = format!("{limits}; exec \"$0\" \"$@\"");
    run("sh", &[&["-c", &script, BINARY], args].concat(), folder, patience)
}

fn run(program: &str, args: &[&str], folder: &Path, patience: Duration) -> Finished {
    let output =
        assert_cmd::Command::new(program).args(args).current_dir(folder).timeout(patience).output().unwrap();
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Starts the program with both outputs piped.
pub fn start(folder: &Path, args: &[&str]) -> Child {
    Command::new(BINARY)
        .args(args)
        .current_dir(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A model of 64 hidden dimensions with known output, as a folder.
pub fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny/llama")
}

/// A record of every kind of cell, made by the scripted engine.
pub fn fake_record(folder: &Path) -> Record {
    let path = folder.join("fake.json");
    let args = ["run", "--engine", "fake", "--offline", "-r", "2", "--min-seconds", "0.3"];
    let done = tokmeter(folder, &[&args[..], &["--suite", "quick", "-o", path.to_str().unwrap()]].concat());
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    read(&path).unwrap()
}
