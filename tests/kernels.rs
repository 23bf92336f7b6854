//! The CUDA kernels on the emulated device: each program of `tests/emulated_gpu` is built with g++ and run in several
//! thread orders, as it is and under the address sanitizer. What a planted bug does to them: scripts/mutate_kernels.py.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Forward, reverse and two seeds that shuffle.
const ORDERS: [&str; 4] = ["forward", "reverse", "7", "12"];

/// Builds one program and runs it; its output on failure.
fn pass(program: &str, sanitizer: bool) -> Result<(), String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let suffix = if sanitizer { "-asan" } else { "" };
    let binary = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{program}{suffix}"));
    let mut compile = Command::new("g++");
    compile.args([
        "-std=c++20",
        "-O1",
        "-g1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-w",
        "-DCUDA_EMU",
    ]);
    compile.args(sanitizer.then_some("-fsanitize=address"));
    compile.arg("-I").arg(folder.join("tests/emulated_gpu")).arg("-I").arg(folder.join("kernels"));
    compile.arg(folder.join(format!("tests/emulated_gpu/{program}.cpp"))).arg("-o").arg(&binary);
    succeeded(&compile.output().map_err(|error| error.to_string())?)?;
    // Two orders are enough to see an access out of bounds.
    let orders = if sanitizer { &ORDERS[1..3] } else { &ORDERS[..] };
    succeeded(&Command::new(&binary).args(orders).output().map_err(|error| error.to_string())?)
}

fn succeeded(output: &Output) -> Result<(), String> {
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    output.status.success().then_some(()).ok_or_else(|| said(&output.stdout) + &said(&output.stderr))
}

fn must_pass(program: &str) {
    if Command::new("g++").arg("--version").output().is_err() {
        return common::waived("g++ is not installed");
    }
    std::thread::scope(|scope| {
        for sanitizer in [false, true] {
            scope.spawn(move || {
                let said = pass(program, sanitizer).err();
                assert!(said.is_none(), "{program} (address sanitizer: {sanitizer}):\n{}", said.unwrap());
            });
        }
    });
}

#[test]
fn the_emulation_refuses_what_a_device_would_not_forgive() {
    must_pass("test_model");
}

#[test]
fn the_stand_in_driver_is_as_late_as_a_driver_may_be() {
    must_pass("test_driver");
}

#[test]
fn embedding_norm_rope_sampling_and_synthetic_weights_are_those_of_plain_code() {
    must_pass("test_simple");
}

#[test]
fn products_are_those_of_double_precision_at_odd_shapes() {
    must_pass("test_gemm");
}

#[test]
fn attention_is_that_of_double_precision_over_ragged_paged_contexts() {
    must_pass("test_attention");
}
