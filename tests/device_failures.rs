//! What a user sees when a CUDA device or its software is not as it should be: one sentence, a hint, an exit code, and
//! never a panic. The stand-in driver plays the failures; README.md lists them.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::stand_in::{Build, stderr, tokmeter};
use serde_json::Value;
use tempfile::TempDir;
use tokmeter::backend::cuda::{embedded_architectures, library};

const MODEL: &str = "models/tiny/llama";

/// A short run that writes its record to `out`.
fn run_to(out: &Path) -> Vec<&str> {
    let cells = ["--batch", "2", "--isl", "16", "--osl", "4", "--min-seconds", "0.05", "--repeat", "1"];
    [&["run", "--device", "cuda:0", "-m", MODEL, "-o", out.to_str().unwrap()], &cells[..]].concat()
}

fn record(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap()
}

/// Scores two tokens: the least that needs the kernels.
fn score(folder: &TempDir, settings: &[(&str, &str)]) -> Option<Output> {
    let prompts = folder.path().join("prompts.jsonl");
    std::fs::write(&prompts, "{\"id\": \"a\", \"token_ids\": [5, 6]}\n").unwrap();
    let prompts = prompts.to_str().unwrap();
    let arguments = ["check", "--device", "cuda:0", "-m", MODEL, "--prompts", prompts, "--greedy", "3"];
    tokmeter(Build::Plain, settings, &arguments)
}

fn assert_refused(output: &Output, expected: &str, hint: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap();
    assert!(text.contains(expected) && last.starts_with("hint: ") && last.contains(hint), "{text}");
    assert!(!text.contains("panicked") && output.stdout.is_empty(), "{text}");
}

#[test]
fn a_run_on_the_emulated_device_is_marked_as_no_measurement() {
    for (build, order) in [
        (Build::Plain, "forward"),
        (Build::Plain, "reverse"),
        (Build::Plain, "7"),
        (Build::Plain, "12"),
        (Build::Old, "forward"),
        (Build::Sanitized, "reverse"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("record.json");
        let Some(output) = tokmeter(build, &[("EMU_ORDER", order)], &run_to(&out)) else { return };
        assert!(output.status.success(), "{build:?} {order}: {}", stderr(&output));
        let record = record(&out);
        let reason = record["not_a_measurement"].as_str().unwrap();
        assert!(reason.starts_with("emulated GPU"), "{reason}");
        assert_eq!(record["engine"]["backend"], "cuda");
        assert_eq!(record["engine"]["device"], "cuda:0");
        assert_eq!(record["engine"]["compute_dtype"], "bf16");
        assert_eq!(record["engine"]["kernels"]["origins"]["gemm"], "emulated");
        assert_eq!(record["numerics"]["missing"], "model_was_named");
    }
}

#[test]
fn each_failure_is_one_clear_error() {
    const DRIVER: &str = "install NVIDIA driver 535";
    const CARD: &str = "use --device cpu";
    const IMAGE: &str = "install a driver as new as the kernel compiler";
    for (settings, device, expected, hint) in [
        (&[("EMU_NO_DEVICE", "1")][..], "cuda:0", "CUDA_ERROR_NO_DEVICE", "tokmeter doctor"),
        (
            &[("EMU_DRIVER_VERSION", "12010")],
            "cuda:0",
            "supports CUDA 12.1 only, and 12.2 (driver 535) is needed",
            DRIVER,
        ),
        (
            &[("EMU_COMPUTE_CAPABILITY", "75")],
            "cuda:0",
            "compute capability 7.5, expected at least 8.0",
            CARD,
        ),
        (&[], "cuda:1", "there is no device cuda:1: the driver shows 1", "CUDA_VISIBLE_DEVICES"),
        (&[("EMU_MODULE_ERROR", "209")], "cuda:0", "embed.cu: CUDA_ERROR_NO_BINARY_FOR_GPU", IMAGE),
        (&[("EMU_MODULE_ERROR", "222")], "cuda:0", "embed.cu: CUDA_ERROR_UNSUPPORTED_PTX_VERSION", IMAGE),
        (
            &[("EMU_MEMORY_BYTES", "300000")],
            "cuda:0",
            "out of device memory: matrix products needs ",
            "nvidia-smi",
        ),
        (&[("EMU_MEMORY_BYTES", "700000")], "cuda:0", "out of device memory: the model needs ", "nvidia-smi"),
        (&[("EMU_OTHER_BYTES", "536000000")], "cuda:0", "out of device memory: ", "nvidia-smi"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("record.json");
        let mut arguments = run_to(&out);
        arguments[2] = device;
        let Some(output) = tokmeter(Build::Plain, settings, &arguments) else { return };
        assert_refused(&output, expected, hint);
        assert!(!out.exists(), "{settings:?}");
    }
}

#[test]
fn a_machine_without_a_driver_is_told_what_to_install() {
    if library::is_present() {
        println!("not tested here: this machine has a CUDA driver");
        return;
    }
    for verb in [
        &["run", "--device", "cuda:0", "-m", MODEL, "--batch", "1", "--isl", "8"][..],
        &["check", "--device", "cuda:0", "-m", MODEL],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_tokmeter")).args(verb).output().unwrap();
        assert_refused(&output, "cuda:0 cannot run: no CUDA driver on this machine", "driver 535");
    }
}

#[test]
fn a_device_that_is_lost_leaves_the_record_so_far() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let path = out.to_str().unwrap();
    let cells = ["--batch", "1", "--isl", "8,16", "--min-seconds", "0.05", "--repeat", "1"];
    let arguments = [&["run", "--device", "cuda:0", "-m", MODEL, "-o", path], &cells[..]].concat();
    let Some(output) = tokmeter(Build::Plain, &[("EMU_LOSE_AFTER", "3")], &arguments) else { return };
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = std::fs::read_to_string(&out).unwrap();
    assert!(text.contains("CUDA_ERROR_LAUNCH_FAILED"), "{text}");
    let Some(output) = score(&folder, &[("EMU_LOSE_AFTER", "2")]) else { return };
    assert_refused(&output, "CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)", "dmesg");
}

#[test]
fn a_slice_of_a_card_runs_under_its_own_name() {
    const NAME: &str = "emulated NVIDIA A100-SXM4-40GB MIG 1g.5gb";
    let settings = [("EMU_NAME", NAME), ("EMU_COMPUTE_CAPABILITY", "80"), ("EMU_MULTIPROCESSORS", "14")];
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let Some(output) = tokmeter(Build::Plain, &settings, &run_to(&out)) else { return };
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(record(&out)["machine"]["gpus"][0]["name"], NAME);
    let output = tokmeter(Build::Plain, &settings, &["doctor", "--device", "cuda:0"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains(&format!("{NAME} (a slice of a card), ")), "{text}");
}

/// A device that is given compiled kernels, where no compiler is to be found.
fn without_compiler<'a>(home: &'a TempDir, capability: &'a str) -> Vec<(&'a str, &'a str)> {
    let home = home.path().to_str().unwrap();
    let none = ["TOKMETER_CUDA_LIBS", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"];
    let mut settings =
        vec![("EMU_NAME", "NVIDIA H200"), ("EMU_COMPUTE_CAPABILITY", capability), ("HOME", home)];
    settings.extend(none.map(|name| (name, "")));
    // No python3 either, whose packages would be looked through.
    settings.push(("PATH", ""));
    settings
}

fn system_has_compiler() -> bool {
    library::search(Path::new("/"), &|_| None).iter().any(|file| file.library == "libnvrtc.so")
}

#[test]
fn a_missing_compiler_is_named_by_run_and_by_doctor() {
    if system_has_compiler() {
        println!("not tested here: NVRTC is installed for the whole system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // No binary carries kernels for compute capability 8.7.
    let settings = without_compiler(&folder, "87");
    let Some(output) = score(&folder, &settings) else { return };
    assert_refused(
        &output,
        "the kernel compiler libnvrtc.so was not found",
        "pip install nvidia-cuda-nvrtc, or name its folder in TOKMETER_CUDA_LIBS",
    );
    let output = tokmeter(Build::Plain, &settings, &["doctor", "--device", "cuda:0"]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the kernel compiler libnvrtc.so is missing"), "{text}");
    assert!(text.contains("→ pip install nvidia-cuda-nvrtc, or name its folder"), "{text}");
}

#[test]
fn intermediate_code_needs_the_compiler_wherever_it_runs() {
    if system_has_compiler() {
        println!("not tested here: NVRTC is installed for the whole system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let arguments = [&run_to(&out)[..], &["--jit", "ptx"]].concat();
    let Some(output) = tokmeter(Build::Plain, &without_compiler(&folder, "90"), &arguments) else { return };
    assert_refused(
        &output,
        "intermediate code for the driver to compile (--jit ptx) is in no binary: the kernel compiler libnvrtc.so was not \
         found",
        "pip install nvidia-cuda-nvrtc",
    );
}

#[test]
fn kernels_in_the_binary_need_no_compiler() {
    if system_has_compiler() {
        println!("not tested here: NVRTC is installed for the whole system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let settings = without_compiler(&folder, "90");
    let Some(output) = score(&folder, &settings) else { return };
    let is_embedded = embedded_architectures().contains(&"sm_90a");
    println!("kernels for sm_90a are in the binary: {is_embedded}");
    assert_eq!(output.status.success(), is_embedded, "{}", stderr(&output));
    assert!(!folder.path().join(".cache/tokmeter/kernels").exists(), "nothing is compiled");
    let output = tokmeter(Build::Plain, &settings, &["doctor", "--device", "cuda:0"]).unwrap();
    assert_eq!(output.status.success(), is_embedded);
}

#[test]
fn the_emulated_device_takes_text_and_doctor_asks_for_no_compiler() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = without_compiler(&folder, "90");
    settings[0] = ("EMU_NAME", "emulated GPU (sm_90)");
    let arguments = ["doctor", "--device", "cuda:0", "--format", "json"];
    let Some(output) = tokmeter(Build::Plain, &settings, &arguments) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = answer["findings"].as_array().unwrap();
    let embedded = findings.iter().find(|finding| finding["what"] == "kernels in this binary").unwrap();
    let value = embedded["value"].as_str().unwrap();
    for architecture in embedded_architectures() {
        assert!(value.contains(architecture), "{value}");
    }
    assert_eq!(value.starts_with("none: "), embedded_architectures().is_empty(), "{value}");
    assert!(findings.iter().all(|finding| !finding["what"].as_str().unwrap().starts_with("asked")));
    assert!(score(&folder, &settings).unwrap().status.success());
}

/// The files of kernels that a model needs; those of the ceilings are compiled when ceilings are measured.
fn kernel_files_of_a_model() -> usize {
    let names =
        std::fs::read_dir("kernels").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".cu") && name != "peaks.cu").count()
}

/// The whole way of a device that is no stand-in: NVRTC compiles each file once, the next run finds it on disk.
#[test]
fn kernels_are_compiled_once_for_a_device_that_is_not_emulated() {
    let libraries = std::env::var_os("TOKMETER_CUDA_LIBS");
    let search = library::search(Path::new("/"), &|name| std::env::var_os(name));
    if !search.iter().any(|file| file.library == "libnvrtc.so") {
        return common::waived("NVRTC is missing (TOKMETER_CUDA_LIBS names its folder)");
    }
    println!("TOKMETER_CUDA_LIBS: {libraries:?}");
    let cache = tempfile::tempdir().unwrap();
    let settings = [
        ("EMU_NAME", "NVIDIA Orin"),
        ("EMU_COMPUTE_CAPABILITY", "87"),
        ("TOKMETER_CACHE", cache.path().to_str().unwrap()),
    ];
    let made = || {
        let folder = std::fs::read_dir(cache.path().join("kernels")).unwrap();
        let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
            .into_iter()
            .map(|file| (std::fs::metadata(&file).unwrap().modified().unwrap(), file))
            .collect::<Vec<_>>()
    };
    let Some(output) = score(&cache, &settings) else { return };
    assert!(output.status.success(), "{}", stderr(&output));
    let first = made();
    assert_eq!(first.len(), kernel_files_of_a_model(), "{first:?}");
    std::fs::write(&first[0].1, "damaged").unwrap();
    let damaged = made();
    assert!(score(&cache, &settings).unwrap().status.success());
    let second = made();
    assert_eq!(damaged[1..], second[1..], "what is whole is not compiled again");
    assert!(std::fs::metadata(&second[0].1).unwrap().len() > 1000, "what is damaged is");
}
