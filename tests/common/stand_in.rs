//! The stand-in CUDA driver (`tests/emulated_gpu`): compiled by g++ together with the kernels, in several builds, and
//! the program run where the loader finds it.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use super::waived;

/// A way of building the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    Plain,
    /// No symbol newer than driver R535, the oldest that is supported.
    Old,
    /// With the address sanitizer, which a program must load first.
    Sanitized,
    /// Attention that does not scale its scores.
    WrongAttention,
}

impl Build {
    fn folder_name(self) -> &'static str {
        match self {
            Build::Plain => "plain",
            Build::Old => "old",
            Build::Sanitized => "sanitized",
            Build::WrongAttention => "wrong_attention",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Build::Plain | Build::WrongAttention => &["-O1"],
            // It runs little: what counts is which symbols there are.
            Build::Old => &["-O0", "-DEMU_OLD_DRIVER"],
            Build::Sanitized => &["-O1", "-g1", "-fsanitize=address"],
        }
    }
}

/// The folder with this build of `libcuda.so.1`, made once; none without g++.
pub fn driver(build: Build) -> Option<PathBuf> {
    // One at a time: tests ask for the same one at once.
    static BUILDING: [Mutex<()>; 4] = [const { Mutex::new(()) }; 4];
    let _alone = BUILDING[build as usize].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if Command::new("g++").arg("--version").output().is_err() {
        waived("g++ is missing, which compiles the stand-in CUDA driver");
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated_gpu").join(build.folder_name());
    std::fs::create_dir_all(&folder).unwrap();
    let library = folder.join("libcuda.so.1");
    if !is_newer(&library, &["tests/emulated_gpu", "kernels"]) {
        compile(build, &folder, &library);
    }
    Some(folder)
}

fn compile(build: Build, folder: &Path, library: &Path) {
    let made = folder.join(format!("{}.so", std::process::id()));
    let mut kernels = PathBuf::from("kernels");
    if build == Build::WrongAttention {
        kernels = folder.join("kernels");
        copy_with_change(
            &kernels,
            "attention.cu",
            "seen ? s[j][v] * scale : MINUS_INFINITY",
            "seen ? s[j][v] : MINUS_INFINITY",
        );
    }
    let output = Command::new("g++")
        .args(["-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DCUDA_EMU"])
        .args(build.flags())
        .args(["-shared", "-fPIC", "-I", "tests/emulated_gpu", "-I"])
        .arg(kernels)
        .args(["tests/emulated_gpu/driver.cpp", "-o"])
        .arg(&made)
        .output()
        .unwrap();
    assert!(output.status.success(), "the stand-in driver: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&made, library).unwrap();
}

/// The folder with the stand-in `libcublasLt.so.13`, which only who names it finds; none without g++.
pub fn cublaslt() -> Option<String> {
    static BUILDING: Mutex<()> = Mutex::new(());
    driver(Build::Plain)?;
    let _alone = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated_gpu/cublaslt");
    std::fs::create_dir_all(&folder).unwrap();
    let library = folder.join("libcublasLt.so.13");
    if !is_newer(&library, &["tests/emulated_gpu"]) {
        let made = folder.join(format!("{}.so", std::process::id()));
        let output = Command::new("g++")
            .args(["-std=c++20", "-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"])
            .args(["-Wl,-soname,libcublasLt.so.13", "-shared", "-fPIC"])
            .args(["tests/emulated_gpu/cublaslt.cpp", "-o"])
            .arg(&made)
            .arg("-ldl")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "the stand-in cuBLASLt: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        std::fs::rename(&made, &library).unwrap();
    }
    Some(folder.to_str().unwrap().to_owned())
}

/// The kernels in `folder`, with one text of one file changed.
fn copy_with_change(folder: &Path, file: &str, find: &str, replace: &str) {
    std::fs::create_dir_all(folder).unwrap();
    for entry in std::fs::read_dir("kernels").unwrap().map(Result::unwrap) {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
    let text = std::fs::read_to_string(folder.join(file)).unwrap();
    assert_eq!(text.matches(find).count(), 1, "{find} in {file}");
    std::fs::write(folder.join(file), text.replace(find, replace)).unwrap();
}

/// Whether `file` was made after every file in `folders`.
fn is_newer(file: &Path, folders: &[&str]) -> bool {
    let changed = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified());
    let Ok(made) = changed(file) else { return false };
    let sources = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let files = sources.map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    files.map(|path| changed(&path).unwrap()).all(|time| time < made)
}

/// Lets `command` find this build of the driver; false without g++.
fn on(command: &mut Command, build: Build) -> bool {
    let Some(folder) = driver(build) else { return false };
    command.env("LD_LIBRARY_PATH", folder);
    if build == Build::Sanitized {
        let name = Command::new("g++").arg("-print-file-name=libasan.so").output().unwrap().stdout;
        command.env("LD_PRELOAD", String::from_utf8(name).unwrap().trim());
        // The emulation switches stacks; what the program keeps to its end is no leak.
        command.env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0");
    }
    true
}

/// Runs the ignored test `name` of this test program where the loader finds the driver; none without g++.
pub fn run_test(name: &str, build: Build, settings: &[(&str, &str)]) -> Option<Output> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).envs(settings.iter().copied());
    on(&mut command, build).then(|| command.output().unwrap())
}

/// The program itself on the driver; none without g++.
pub fn tokmeter(build: Build, settings: &[(&str, &str)], arguments: &[&str]) -> Option<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokmeter"));
    command.args(arguments).envs(settings.iter().copied());
    on(&mut command, build).then(|| command.output().unwrap())
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
