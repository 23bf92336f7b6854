//! The folder of kernels compiled beforehand: a build embeds it whole and of the present source, or not at all. The
//! build script's own file is included, and made-up kernels stand for the real ones.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::stand_in::{self, Build};
use common::waived;
use tempfile::{TempDir, tempdir};
use tokmeter::backend::cuda::embedded_architectures;

#[path = "../build/prebuilt.rs"]
mod prebuilt;

use prebuilt::{images, pack, unpack};

const HINT: &str = "\nhint: scripts/prebuild_kernels.py --arch ";

/// Kernels `gemm` and `norm`, compiled for sm_80 and sm_90a by the names of the script that compiles them.
struct Kernels {
    root: TempDir,
}

impl Kernels {
    fn new() -> Self {
        let kernels = Kernels { root: tempdir().unwrap() };
        for (name, text) in
            [("gemm.cu", "products"), ("norm.cu", "norms"), ("common.cuh", "both"), ("ptx.cuh", "")]
        {
            kernels.write(name, text);
        }
        fs::create_dir_all(kernels.prebuilt()).unwrap();
        kernels
    }

    fn compiled() -> Self {
        let kernels = Kernels::new();
        for name in kernels.names("sm_80,sm_90a") {
            fs::write(kernels.prebuilt().join(name), machine_code()).unwrap();
        }
        kernels
    }

    fn folder(&self) -> PathBuf {
        self.root.path().join("kernels")
    }

    fn prebuilt(&self) -> PathBuf {
        self.folder().join("prebuilt")
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.folder()).unwrap();
        fs::write(self.folder().join(name), text).unwrap();
    }

    /// File names as a copy of the script beside these kernels gives them.
    fn names(&self, architectures: &str) -> Vec<String> {
        let scripts = self.root.path().join("scripts");
        fs::create_dir_all(&scripts).unwrap();
        for script in ["nvrtc.py", "prebuild_kernels.py"] {
            fs::copy(Path::new("scripts").join(script), scripts.join(script)).unwrap();
        }
        let script = scripts.join("prebuild_kernels.py");
        let output = Command::new("python3").arg(script).args(["--names", "--arch", architectures]).output();
        let output = output.expect("python3, which the tests need");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    fn file(&self, beginning: &str) -> PathBuf {
        let files = fs::read_dir(self.prebuilt()).unwrap().map(|entry| entry.unwrap().path());
        let named = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(beginning);
        files.into_iter().find(named).unwrap()
    }

    fn refusal(&self) -> String {
        images(&self.folder()).expect_err("the folder is not in order")
    }
}

/// An ELF file of two sections' headers, and nothing else.
fn machine_code() -> Vec<u8> {
    let mut bytes = vec![0; 64 + 2 * 64];
    bytes[..4].copy_from_slice(b"\x7fELF");
    // Sections begin after the header of the file, 64 bytes each.
    bytes[40] = 64;
    bytes[58] = 64;
    bytes[60] = 2;
    bytes
}

#[test]
fn a_folder_of_the_present_source_is_embedded_whole() {
    let kernels = Kernels::compiled();
    let found = images(&kernels.folder()).unwrap();
    let name = |at: usize| (found[at].kernel.as_str(), found[at].architecture.as_str());
    assert_eq!(found.len(), 4);
    assert_eq!(
        [0, 1, 2, 3].map(name),
        [("gemm", "sm_80"), ("gemm", "sm_90a"), ("norm", "sm_80"), ("norm", "sm_90a")]
    );
    for image in found {
        assert_eq!(image.path, kernels.prebuilt().join(image.name() + ".cubin"));
        assert_eq!(unpack(&pack(&image.read().unwrap()).unwrap()).unwrap(), machine_code());
    }
}

#[test]
fn an_empty_folder_and_none_embed_nothing() {
    let kernels = Kernels::new();
    assert_eq!(images(&kernels.folder()).unwrap(), []);
    fs::remove_dir(kernels.prebuilt()).unwrap();
    assert_eq!(images(&kernels.folder()).unwrap(), []);
}

#[test]
fn one_architecture_is_a_legal_build() {
    let kernels = Kernels::new();
    for name in kernels.names("sm_90a") {
        fs::write(kernels.prebuilt().join(name), machine_code()).unwrap();
    }
    assert_eq!(images(&kernels.folder()).unwrap().len(), 2);
}

#[test]
fn a_kernel_that_changed_fails_the_build_by_name() {
    let kernels = Kernels::compiled();
    let before = kernels.names("sm_80")[0].split('.').nth(2).unwrap()[..12].to_owned();
    kernels.write("gemm.cu", "other products");
    let after = kernels.names("sm_80")[0].split('.').nth(2).unwrap()[..12].to_owned();
    let error = kernels.refusal();
    let expected = format!(
        "gemm for sm_80 in kernels/prebuilt is of another source: gemm.cu or a header changed since, expected key \
         {after}…, found {before}… (and 1 more){HINT}sm_80,sm_90a compiles what changed"
    );
    assert!(error.starts_with(&expected), "{error}");
}

#[test]
fn a_header_that_changed_fails_the_build_for_all_kernels() {
    let kernels = Kernels::compiled();
    kernels.write("ptx.cuh", "more");
    let error = kernels.refusal();
    assert!(error.contains("gemm for sm_80") && error.contains("(and 3 more)"), "{error}");
}

#[test]
fn a_stale_image_beside_the_right_one_fails_the_build() {
    let kernels = Kernels::compiled();
    let old = kernels.prebuilt().join(format!("norm.sm_80.{}.cubin", "0".repeat(64)));
    fs::write(&old, machine_code()).unwrap();
    let error = kernels.refusal();
    assert!(error.contains("norm for sm_80") && error.contains("found 000000000000…\n"), "{error}");
}

#[test]
fn a_kernel_that_is_missing_for_an_architecture_fails_the_build() {
    let kernels = Kernels::compiled();
    fs::remove_file(kernels.file("norm.sm_90a.")).unwrap();
    let error = kernels.refusal();
    assert!(error.starts_with("norm for sm_90a is not in kernels/prebuilt"), "{error}");
    assert!(error.contains(".cubin, found none\n") && error.contains(HINT), "{error}");
    // A source that was added since is missing for every architecture.
    let kernels = Kernels::compiled();
    kernels.write("new.cu", "");
    let error = kernels.refusal();
    assert!(error.starts_with("new for sm_80 is not in") && error.contains("(and 1 more)"), "{error}");
}

#[test]
fn a_kernel_that_is_gone_fails_the_build() {
    let kernels = Kernels::compiled();
    fs::remove_file(kernels.folder().join("norm.cu")).unwrap();
    let error = kernels.refusal();
    assert!(error.contains("is of a kernel that is gone: there is no norm.cu") && error.contains(HINT));
}

#[test]
fn a_stray_file_fails_the_build_and_is_to_be_removed() {
    let kernels = Kernels::compiled();
    let right = kernels.file("gemm.sm_80.");
    for stray in ["notes.txt", "gemm.cubin", "gemm.sm_80.0123.cubin", "gemm.sm_80.tmp"] {
        let path = kernels.prebuilt().join(stray);
        fs::copy(&right, &path).unwrap();
        let error = kernels.refusal();
        assert!(error.starts_with(&format!("{} is no compiled kernel", path.display())), "{error}");
        assert!(error.ends_with("\nhint: remove it"), "{error}");
        fs::remove_file(path).unwrap();
    }
    assert_eq!(images(&kernels.folder()).unwrap().len(), 4);
}

#[test]
fn an_image_that_was_cut_off_is_refused() {
    let kernels = Kernels::compiled();
    let path = kernels.file("gemm.sm_80.");
    let whole = machine_code();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = images(&kernels.folder()).unwrap()[0].read().unwrap_err();
        assert!(error.contains("is cut off or no machine code\nhint: "), "{length} bytes: {error}");
    }
}

#[test]
fn the_script_keeps_what_is_of_the_present_source_whole_and_of_the_same_compiler() {
    // By the script's own functions: the compiler is not needed.
    let kernels = Kernels::compiled();
    let names = kernels.names("sm_80");
    let made_by = |release: &str| {
        [machine_code(), format!("Cuda compilation tools, release {release}, V").into_bytes()].concat()
    };
    fs::write(kernels.prebuilt().join(&names[0]), made_by("13.0")).unwrap();
    let kept = |what: &str| {
        let script = "import sys, nvrtc; print(*nvrtc.kept(nvrtc.PREBUILT, sys.argv[1:], '13.0'), sep='\\n')";
        let mut command = Command::new("python3");
        command.args(["-c", script]).args(&names).env("PYTHONPATH", kernels.root.path().join("scripts"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(kept("one of two names its compiler"), names[0]);
    fs::write(kernels.prebuilt().join(&names[1]), made_by("12.9")).unwrap();
    assert_eq!(kept("the other was made by an older compiler"), names[0]);
    fs::write(kernels.prebuilt().join(&names[0]), &made_by("13.0")[..100]).unwrap();
    assert_eq!(kept("and the one is cut off"), "");
}

/// Where the program's file `bytes` holds the packed form of `image`.
fn position(bytes: &[u8], image: &[u8]) -> usize {
    // Its head: a digest and a length, which nothing else has.
    let head = &pack(image).unwrap()[..40];
    bytes.windows(head.len()).position(|window| window == head).expect("the program carries this image")
}

#[test]
fn a_damaged_program_says_so_instead_of_loading_its_kernels() {
    let Some(driver) = stand_in::driver(Build::Plain) else { return };
    if !embedded_architectures().contains(&"sm_90a") {
        return waived("no kernels for sm_90a were compiled before the build: scripts/prebuild_kernels.py");
    }
    let folder = tempdir().unwrap();
    let program = folder.path().join("tokmeter");
    let run = || {
        let mut command = Command::new(&program);
        command.args(["check", "--device", "cuda:0", "-m", "models/tiny/llama", "--prompts"]);
        command.arg(folder.path().join("prompts.jsonl")).args(["--greedy", "3"]);
        // By its name a device that is given compiled kernels; what the stand-in runs are its own.
        command.envs([("EMU_NAME", "NVIDIA H200"), ("EMU_COMPUTE_CAPABILITY", "90")]);
        let output = command.env("LD_LIBRARY_PATH", &driver).output().unwrap();
        (output.status.code(), stand_in::stderr(&output))
    };
    fs::write(folder.path().join("prompts.jsonl"), "{\"id\": \"a\", \"token_ids\": [5, 6]}\n").unwrap();
    fs::copy(env!("CARGO_BIN_EXE_tokmeter"), &program).unwrap();
    let (code, said) = run();
    assert_eq!(code, Some(0), "{said}");

    let embedded = images(Path::new("kernels")).unwrap();
    let image =
        embedded.iter().find(|image| image.kernel == "embed" && image.architecture == "sm_90a").unwrap();
    let mut bytes = fs::read(&program).unwrap();
    let at = position(&bytes, &image.read().unwrap());
    // A byte of the stream, after its head.
    bytes[at + 60] ^= 0x10;
    fs::write(&program, bytes).unwrap();
    let (code, said) = run();
    let expected = format!("the compiled kernels in this binary are damaged: {} is not what", image.name());
    assert!(code == Some(1) && said.contains(&expected) && !said.contains("panicked"), "{code:?}: {said}");
    assert!(said.lines().last().unwrap().starts_with("hint: "), "{said}");
}
