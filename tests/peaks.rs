//! `tokmeter peaks`: on the CPU the real thing, on the stand-in driver (`tests/emulated_gpu`) the whole path of a CUDA
//! device with tiny sizes, which its small L2 cache brings about.

#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Command, Output};

use common::stand_in::{Build, tokmeter};
use serde_json::Value;
use tempfile::tempdir;

const TINY: &str = "models/tiny/qwen3";
const OPS: [&str; 7] = ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"];

fn on_cpu(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tokmeter")).args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A ceiling whose numbers fit each other and the time that all measuring took.
fn assert_sane(name: &str, ceiling: &Value, is_rate: bool, duration_ns: f64) {
    let number = |field: &str| ceiling[field].as_f64().unwrap_or_else(|| panic!("{name}: {ceiling}"));
    let (value, best, repetitions) = (number("value"), number("best"), number("repetitions"));
    assert!(value > 0.0 && repetitions >= 3.0, "{name}: {ceiling}");
    // Work done at the best rate takes no longer than all measuring did.
    let work = repetitions * number("work_per_repetition");
    let least_ns = if is_rate { work / best * 1e9 } else { work * best };
    assert!(least_ns <= duration_ns, "{name}: {ceiling}, {duration_ns} ns");
    assert!(if is_rate { best >= value } else { best <= value }, "{name}: {ceiling}");
    assert!(number("spread_ratio") >= 0.0 && !ceiling["by"].as_str().unwrap().is_empty());
}

fn assert_all_sane(ceilings: &Value, names: &[&str], dtypes: &[&str]) {
    let duration_ns = ceilings["duration_ns"].as_f64().unwrap();
    for name in names {
        assert_sane(name, &ceilings[name], !name.ends_with("_ns"), duration_ns);
    }
    let found: Vec<&String> = ceilings["matmul_flops_per_s"].as_object().unwrap().keys().collect();
    assert_eq!(found, dtypes);
    for dtype in dtypes {
        assert_sane(dtype, &ceilings["matmul_flops_per_s"][dtype], true, duration_ns);
    }
}

fn assert_ops(peaks: &Value, steps: &[&str]) {
    let times = peaks["ops"]["times"].as_array().unwrap();
    assert_eq!(times.len(), 7 * steps.len());
    for (time, (step, op)) in times.iter().zip(steps.iter().flat_map(|step| OPS.map(|op| (*step, op)))) {
        assert_eq!((time["step"].as_str(), time["op"].as_str()), (Some(step), Some(op)));
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{time}"));
        let (time_ns, bound_ns) = (number(&time["time_ns"]["value"]), number(&time["bound"]["bound_ns"]));
        assert!(time_ns > 0.0 && bound_ns > 0.0 && number(&time["bytes"]) > 0.0, "{time}");
        assert!((number(&time["bound_share"]) * time_ns / bound_ns - 1.0).abs() < 1e-9, "{time}");
        assert!(number(&time["copies"]) >= 4.0, "{time}");
        assert_eq!(op == "embed", number(&time["flops"]) == 0.0);
    }
}

const BANDWIDTHS: [&str; 2] = ["read_bandwidth_bytes_per_s", "copy_bandwidth_bytes_per_s"];

#[test]
fn the_cpu_has_bandwidth_and_a_product_and_says_why_not_the_rest() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("peaks.json");
    let file = out.to_str().unwrap();
    let arguments =
        ["peaks", "--device", "cpu", "--seconds", "0.05", "--format", "json", "--out", file, "--ops"];
    let model = ["-m", TINY, "--batch", "2", "--depth", "20", "--isl", "9"];
    let output = on_cpu(&[&arguments[..], &model].concat());
    let peaks = json(&output);
    assert_eq!(std::fs::read(&out).unwrap(), output.stdout);
    let ceilings = &peaks["ceilings"];
    assert_eq!(ceilings["device"], "cpu");
    assert!(peaks.get("not_a_measurement").is_none());
    match ceilings["last_level_cache_bytes"].as_u64() {
        // Eight times the cache, unless that does not fit.
        Some(cache) if ceilings[BANDWIDTHS[0]]["missing"] != "memory_too_small" => {
            assert_all_sane(ceilings, &BANDWIDTHS, &["f32"]);
            assert!(ceilings[BANDWIDTHS[0]]["working_set_bytes"].as_u64().unwrap() >= 8 * cache);
            assert_ops(&peaks, &["decode/b2/d20", "prefill/b2/i9"]);
        }
        _ => assert_all_sane(ceilings, &[], &["f32"]),
    }
    for name in ["launch_ns", "graph_node_ns", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s"] {
        assert_eq!(ceilings[name]["missing"], "not_a_gpu");
    }
    assert!(peaks["methods"].as_array().unwrap().iter().all(|method| method["method"].is_string()));
}

#[test]
fn every_ceiling_is_measured_on_the_emulated_device_which_is_no_measurement() {
    let arguments = ["peaks", "--device", "cuda:0", "--seconds", "0.01", "--format", "json"];
    let Some(output) = tokmeter(Build::Plain, &[("EMU_ORDER", "7")], &arguments) else { return };
    let peaks = json(&output);
    assert!(peaks["not_a_measurement"].as_str().unwrap().starts_with("emulated GPU"));
    let ceilings = &peaks["ceilings"];
    let names = ["launch_ns", "graph_node_ns", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s"];
    assert_all_sane(ceilings, &[&BANDWIDTHS[..], &names].concat(), &["bf16", "f16"]);
    for dtype in ["bf16", "f16"] {
        let duration_ns = ceilings["duration_ns"].as_f64().unwrap();
        assert_sane(dtype, &ceilings["mma_flops_per_s"][dtype], true, duration_ns);
        assert_eq!(ceilings["matmul_flops_per_s"][dtype]["by"], "own");
    }
    assert_eq!(ceilings["last_level_cache_bytes"], 16_384);
    assert_eq!(ceilings[BANDWIDTHS[0]]["working_set_bytes"], 64 * 16_384);
}

#[test]
fn operations_are_timed_on_the_emulated_device_one_by_one_and_replayed() {
    let sizes = ["--batch", "3", "--depth", "20", "--isl", "9", "--seconds", "0.001", "--dtype", "f16"];
    let arguments = [&["peaks", "--device", "cuda:0", "--ops", "-m", TINY], &sizes[..]].concat();
    let Some(output) = tokmeter(Build::Plain, &[], &[&arguments[..], &["--format", "json"]].concat()) else {
        return;
    };
    let peaks = json(&output);
    assert_eq!(peaks["ops"]["compute_dtype"], "f16");
    let kernels = &peaks["ops"]["kernels"];
    assert!(kernels["resources"]["embed_f16"]["registers"].as_u64().is_some(), "{kernels}");
    assert_ops(&peaks, &["decode/b3/d20", "prefill/b3/i9"]);
    for time in peaks["ops"]["times"].as_array().unwrap() {
        let is_replayed = time["replayed_ns"]["value"].as_f64().is_some_and(|ns| ns > 0.0);
        assert_eq!(is_replayed, time["step"] == "decode/b3/d20", "{time}");
    }
    let table = text(&tokmeter(Build::Plain, &[], &arguments).unwrap());
    assert!(table.contains("NOT A MEASUREMENT: emulated GPU"), "{table}");
    assert!(table.lines().any(|line| line.contains("decode/b3/d20") && line.contains("mlp_in")), "{table}");
}

#[test]
fn a_run_keeps_the_ceilings_of_its_device_and_shares_of_them() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("record.json");
    let path = out.to_str().unwrap();
    let cells = ["--batch", "2", "--depth", "16", "--osl", "4", "--min-seconds", "0.05", "--repeat", "1"];
    let arguments = [&["run", "--device", "cuda:0", "-m", TINY, "-o", path, "--format", "json"], &cells[..]];
    let Some(output) = tokmeter(Build::Plain, &[], &arguments.concat()) else { return };
    let summary = json(&output);
    let record: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let ceilings = &record["ceilings"][0];
    assert_eq!(ceilings["device"], "cuda:0");
    assert!(ceilings["duration_ns"].as_f64().unwrap() < 20e9);
    assert!(ceilings["launch_ns"]["value"].as_f64().unwrap() > 0.0);
    for name in ["mbu_share", "mfu_share"] {
        let share = summary["cells"][0][name].as_f64().unwrap();
        assert!(share > 0.0 && share <= 1.02, "{name} {share}");
    }
}

#[test]
fn a_device_without_memory_for_a_probe_says_so_and_goes_on() {
    // Enough for the products' workspace, not for 8 MiB of L2 eight times.
    let settings = [("EMU_MEMORY_BYTES", "50000000"), ("EMU_L2_BYTES", "8388608")];
    let arguments =
        ["peaks", "--device", "cuda:0", "--seconds", "0.001", "--dtype", "bf16", "--format", "json"];
    let Some(output) = tokmeter(Build::Plain, &settings, &arguments) else { return };
    let peaks = json(&output);
    for name in BANDWIDTHS.iter().chain(&["host_to_device_bytes_per_s"]) {
        assert_eq!(peaks["ceilings"][name]["missing"], "memory_too_small", "{peaks}");
    }
    assert_eq!(peaks["ceilings"]["matmul_flops_per_s"]["bf16"]["missing"], "memory_too_small");
    assert!(peaks["ceilings"]["mma_flops_per_s"]["bf16"]["value"].as_f64().unwrap() > 0.0);
}

#[test]
fn wrong_requests_are_refused_in_one_sentence() {
    for (arguments, expected) in [
        (&["--seconds", "0"][..], "--seconds is 0, expected more than 0 and at most 3600"),
        (&["--depth", "8"], "--ops"),
        (&["--ops", "--batch", "0"], "--batch is 0, expected 1 to 1048576"),
        (&["--ops", "-m", TINY, "--depth", "4000000"], "--depth is 4000000"),
        (&["--ops", "-m", TINY, "--depth", "1000000"], "decode/b1/d1000000 exceeds the model's context of "),
        (&["--ops", "-m", "no-such-model"], "no-such-model"),
        (&["--dtype", "bf16"], "--dtype bf16 and f16 are computed on cuda only"),
        (&["--out", "Cargo.toml"], "--out Cargo.toml exists already"),
    ] {
        let output = on_cpu(&[&["peaks", "--device", "cpu"], arguments].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{arguments:?} {error}");
        assert!(error.contains(expected), "{arguments:?} {error}");
    }
}
