//! Running code of this crate, and the program itself, on the emulated device: `tests/emulated_gpu` built by g++ to a
//! stand-in driver, and a stand-in cuBLASLt beside it.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::common;

/// The folder with the stand-in `libcuda.so.1`, built once; none without g++.
pub fn driver() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(build_driver).as_deref()
}

fn build_driver() -> Option<PathBuf> {
    if Command::new("g++").arg("--version").output().is_err() {
        common::waived("g++ is missing, which compiles the stand-in CUDA driver");
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated_gpu");
    let flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DCUDA_EMU"];
    let folders = ["-I", "tests/emulated_gpu", "-I", "kernels"];
    build(&folder.join("libcuda.so.1"), "tests/emulated_gpu/driver.cpp", &[&flags[..], &folders].concat());
    // In a folder of its own, so that only who names it finds it.
    let flags = ["-std=c++20", "-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"];
    let (name, library) = ("-Wl,-soname,libcublasLt.so.13", cublaslt_of(&folder).join("libcublasLt.so.13"));
    build(&library, "tests/emulated_gpu/cublaslt.cpp", &[&flags[..], &[name]].concat());
    Some(folder)
}

fn cublaslt_of(folder: &Path) -> PathBuf {
    folder.join("cublaslt")
}

/// The folder with the stand-in `libcublasLt.so.13`.
pub fn cublaslt() -> Option<String> {
    driver().map(|folder| cublaslt_of(folder).to_str().unwrap().to_owned())
}

/// Compiles `source` to the shared library `made`, unless it is newer than all that it is made of.
fn build(made: &Path, source: &str, options: &[&str]) {
    if is_newer(made, &["tests/emulated_gpu", "kernels"]) {
        return;
    }
    std::fs::create_dir_all(made.parent().unwrap()).unwrap();
    let unfinished = made.with_file_name(format!("{}.so", std::process::id()));
    let mut compiler = Command::new("g++");
    compiler.args(options).args(["-shared", "-fPIC", source, "-o"]).arg(&unfinished).arg("-ldl");
    assert!(compiler.status().unwrap().success(), "{source} does not compile");
    std::fs::rename(&unfinished, made).unwrap();
}

/// Whether `file` was made after everything in `folders`.
fn is_newer(file: &Path, folders: &[&str]) -> bool {
    let changed = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified());
    let Ok(made) = changed(file) else { return false };
    let sources = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    sources.map(|entry| changed(&entry.unwrap().path()).unwrap()).all(|time| time < made)
}

/// Runs the ignored test `name` of this program where the loader finds the stand-in driver.
pub fn on_the_device(name: &str, settings: &[(&str, &str)]) {
    let Some(folder) = driver() else { return };
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{settings:?}\n{stdout}\n{stderr}");
    print!("{stdout}");
}

/// The program itself on the stand-in driver.
pub fn tokmeter(settings: &[(&str, &str)], arguments: &[&str]) -> Option<Output> {
    let folder = driver()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokmeter"));
    command.args(arguments).env("LD_LIBRARY_PATH", folder).envs(settings.iter().copied());
    Some(command.output().unwrap())
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
