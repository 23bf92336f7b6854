//! Measurements beside a prediction: files made of the committed prediction by known factors must come out with those
//! factors, and what is of something else must be said to be.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/made_up.rs"]
mod made_up;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::Command;

use made_up::{on_gpu, set_ceilings};
use program::{Finished, fake_record, tokmeter};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};
use tokmeter::analysis::predicted::{Prediction, parse_prediction};
use tokmeter::record::{Kernels, LatencyHistogram, Maybe, Record, Workload};

const H100: &str = "NVIDIA H100 80GB HBM3";

fn committed() -> PathBuf {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let folders = results.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> =
        folders.filter(|path| path.to_string_lossy().ends_with("-predictions")).collect();
    folders.sort();
    folders.pop().expect("a folder of predictions").join("llama-3.1-8b-bf16.json")
}

fn prediction() -> Prediction {
    parse_prediction(&std::fs::read_to_string(committed()).unwrap()).unwrap()
}

/// A ceiling as `peaks` writes it.
fn ceiling(value: f64, by: &str) -> Value {
    json!({
        "value": value, "median": value, "best": value, "spread_ratio": 0.0, "by": by, "repetitions": 3,
        "work_per_repetition": 1, "working_set_bytes": 1u64 << 30
    })
}

/// What `peaks --ops` would write on an H100 on which every operation takes `factor(step, op)` times as long as predicted,
/// at the assumed ceilings, with cuBLASLt.
fn peaks(factor: impl Fn(&str, &str) -> f64) -> Value {
    let prediction = prediction();
    let device = prediction.devices.iter().find(|device| device.name == "h100-sxm").unwrap();
    let fact = |name: &str| device.facts[name].value;
    let mut times = Vec::new();
    for step in &device.steps {
        if step.step.starts_with("prefill/") && serde_json::to_value(step.products).unwrap() == "own" {
            continue;
        }
        for op in &step.ops {
            let taken = ceiling(op.time_ns * factor(&step.step, &op.op), "own");
            let eager = ceiling(op.time_ns * factor(&step.step, &op.op) * 3.0, "own");
            let is_decode = step.step.starts_with("decode/");
            times.push(json!({
                "step": step.step, "op": op.op, "bytes": op.bytes, "flops": op.flops, "copies": 4,
                "time_ns": if is_decode { eager } else { taken.clone() },
                "replayed_ns": if is_decode { taken } else { json!({"missing": "prefill_is_not_captured"}) },
            }));
        }
    }
    json!({
        "device_name": H100,
        "ceilings": {
            "device": "cuda:0", "last_level_cache_bytes": 50u64 << 20, "duration_ns": 1u64,
            "read_bandwidth_bytes_per_s": ceiling(fact("read_bandwidth_bytes_per_s"), "own"),
            "copy_bandwidth_bytes_per_s": ceiling(fact("read_bandwidth_bytes_per_s") * 0.9, "own"),
            "matmul_flops_per_s": {"bf16": ceiling(fact("matmul_flops_per_s"), "cublaslt")},
            "mma_flops_per_s": {"bf16": ceiling(fact("mma_flops_per_s") * 1.5, "own")},
            "launch_ns": {"missing": "made_up"}, "graph_node_ns": ceiling(fact("graph_node_ns"), "driver"),
            "host_to_device_bytes_per_s": {"missing": "made_up"}, "device_to_host_bytes_per_s": {"missing": "made_up"},
        },
        "methods": [],
        "ops": {
            "model": "llama-3.1-8b", "compute_dtype": "bf16", "weights": "synthetic", "times": times,
            "kernels": serde_json::to_value(kernels()).unwrap(),
        },
    })
}

/// The kernels that were predicted, as a driver would report them.
fn kernels() -> Kernels {
    let prediction = prediction();
    let device = prediction.devices.into_iter().find(|device| device.name == "h100-sxm").unwrap();
    let of = device.steps.into_iter().flat_map(|step| step.ops).flat_map(|op| op.kernels);
    let resources = of
        .filter_map(|kernel| {
            let code = kernel.machine_code.into_value()?;
            let resources = tokmeter::record::KernelResources {
                registers: Maybe::Value(code.registers),
                static_shared_bytes: Maybe::Value(code.static_shared_bytes),
                local_bytes: Maybe::Value(0),
                max_block_threads: Maybe::Value(1024),
                binary_version: Maybe::Value(90),
                ptx_version: Maybe::Value(90),
            };
            Some((kernel.entry, resources))
        })
        .collect();
    Kernels {
        architecture: "sm_90a".to_owned(),
        origins: std::collections::BTreeMap::new(),
        form: Maybe::Value("sass".to_owned()),
        graphs: true,
        dependent_launch: true,
        capture_retry: Maybe::missing("not_needed"),
        deterministic: false,
        resources: Maybe::Value(resources),
    }
}

fn written(folder: &TempDir, name: &str, value: &Value) {
    std::fs::write(folder.path().join(name), serde_json::to_string(value).unwrap()).unwrap();
}

fn report(folder: &TempDir, more: &[&str]) -> Finished {
    let prediction = committed();
    let arguments = [&["report", "--predicted", prediction.to_str().unwrap()], more].concat();
    tokmeter(folder.path(), &arguments)
}

/// The JSON of one file beside the prediction.
fn side_of(value: &Value) -> Value {
    let folder = tempdir().unwrap();
    written(&folder, "ops.json", value);
    let done = report(&folder, &["ops.json", "--format", "json"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    serde_json::from_str::<Value>(&done.stdout).unwrap()["sides"][0].clone()
}

fn row<'a>(side: &'a Value, step: &str, what: &str) -> &'a Value {
    let rows = side["rows"].as_array().unwrap();
    rows.iter().find(|row| row["step"] == step && row["what"] == what).unwrap_or_else(|| panic!("{side}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn factors_come_out_as_they_were_put_in_and_those_beyond_the_tolerance_are_misses() {
    let factors =
        [("attn_in", 1.0), ("attention", 1.6), ("attn_out", 1.14), ("mlp_in", 1.16), ("mlp_out", 0.8)];
    let of = |op: &str| factors.iter().find(|(name, _)| *name == op).map_or(0.9, |(_, factor)| *factor);
    let side = side_of(&peaks(|_, op| of(op)));
    assert_eq!(side["not_comparable"], json!([]));
    assert_eq!(side["predicted_device"], "h100-sxm");
    let rows = side["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 7 * 5, "four decode steps and one prompt");
    for row in rows {
        let factor = of(row["what"].as_str().unwrap());
        assert!((number(&row["ratio"]) - factor).abs() < 1e-9, "{row}");
        assert_eq!(row["is_miss"], (factor - 1.0).abs() > 0.15, "{row}");
        // At the same ceilings the share falls as the time grows; the file rounds times to a tenth of a nanosecond.
        let shares = number(&row["measured_share"]) * factor / number(&row["predicted_share"]);
        assert!((shares - 1.0).abs() < 0.02, "{row}");
    }
}

#[test]
fn ceilings_that_were_assumed_stand_beside_those_that_were_measured() {
    let side = side_of(&peaks(|_, _| 1.0));
    let ceilings = side["ceilings"].as_array().unwrap();
    let found: Vec<(&str, f64, bool)> = ceilings
        .iter()
        .map(|row| (row["what"].as_str().unwrap(), number(&row["ratio"]), row["is_miss"].as_bool().unwrap()))
        .collect();
    let expected = [
        ("read_bandwidth_bytes_per_s", 1.0, false),
        ("matmul_flops_per_s", 1.0, false),
        ("mma_flops_per_s", 1.5, true),
        ("graph_node_ns", 1.0, false),
    ];
    assert_eq!(found, expected);
}

#[test]
fn files_of_something_else_are_not_compared_and_say_why() {
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 6] = [
        ("another device: NVIDIA A100-SXM4-80GB", |file| {
            file["device_name"] = json!("NVIDIA A100-SXM4-80GB")
        }),
        ("another model: qwen3-8b", |file| file["ops"]["model"] = json!("qwen3-8b")),
        ("another type: f16", |file| file["ops"]["compute_dtype"] = json!("f16")),
        ("rope_kv_bf16 has 99 registers", |file| {
            file["ops"]["kernels"]["resources"]["rope_kv_bf16"]["registers"] = json!(99);
        }),
        ("there is no rope_kv_bf16", |file| {
            file["ops"]["kernels"]["resources"].as_object_mut().unwrap().remove("rope_kv_bf16");
        }),
        ("--deterministic", |file| file["ops"]["kernels"]["deterministic"] = json!(true)),
    ];
    for (reason, change) in changes {
        let mut file = peaks(|_, _| 1.0);
        change(&mut file);
        let side = side_of(&file);
        let reasons = side["not_comparable"].to_string();
        assert!(reasons.contains(reason), "{reasons}, expected {reason}");
        assert_eq!(side["rows"], json!([]), "{reason}");
    }
}

#[test]
fn nothing_without_a_counterpart_is_dropped_in_silence() {
    let mut file = peaks(|_, _| 1.0);
    let times = file["ops"]["times"].as_array_mut().unwrap();
    times.retain(|time| time["step"] != "decode/b32/d1024");
    times[0]["step"] = json!("decode/b3/d77");
    times[1]["bytes"] = json!(1);
    times[2]["replayed_ns"] = json!({"missing": "not_captured"});
    let side = side_of(&file);
    let left_out = side["left_out"].to_string();
    for expected in [
        "decode/b3/d77 embed: no such step is predicted",
        "decode/b1/d1024 attn_in: it moves 1 bytes at least",
        "decode/b32/d1024: predicted, not in the file",
    ] {
        assert!(left_out.contains(expected), "{left_out}, expected {expected}");
    }
    let attention = row(&side, "decode/b1/d1024", "attention");
    assert_eq!(attention["measured"], json!({"missing": "not_captured"}));
    assert_eq!(attention["is_miss"], false);
}

#[test]
fn a_prompt_is_compared_with_what_computed_its_products() {
    let mut file = peaks(|_, _| 1.0);
    file["ceilings"]["matmul_flops_per_s"]["bf16"]["by"] = json!("own");
    let side = side_of(&file);
    let own = row(&side, "prefill/b1/i2048", "mlp_in");
    assert!(number(&own["ratio"]) < 0.7, "the library's time beside our own kernels' prediction: {own}");
    assert!((number(&row(&side, "decode/b1/d1024", "mlp_in")["ratio"]) - 1.0).abs() < 1e-9);
}

/// A record whose decode cell takes `factor` times as long a step as predicted.
fn record_of(folder: &Path, factor: f64) -> Record {
    let mut record = on_gpu(&fake_record(folder), H100);
    let prediction = prediction();
    let device = prediction.devices.iter().find(|device| device.name == "h100-sxm").unwrap();
    let fact = |name: &str| device.facts[name].value;
    set_ceilings(&mut record, fact("read_bandwidth_bytes_per_s"), fact("matmul_flops_per_s"));
    record.engine.kernels = Maybe::Value(kernels());
    let step = device.steps.iter().find(|step| step.step == "decode/b8/d1024").unwrap();
    let taken = (step.time_ns * factor) as u64;
    let cell = &mut record.cells[0];
    cell.workload = Workload::Decode { batch: 8, depth: 1024, osl: 64 };
    cell.key = cell.workload.key();
    for run in &mut cell.runs {
        run.latency.step =
            LatencyHistogram::of([taken; 20]).map_or_else(|| Maybe::missing("made_up"), Maybe::Value);
    }
    record
}

#[test]
fn a_record_s_steps_are_laid_beside_whole_predicted_steps() {
    let folder = tempdir().unwrap();
    let record = record_of(folder.path(), 1.25);
    written(&folder, "record.json", &serde_json::to_value(&record).unwrap());
    let done = report(&folder, &["record.json", "--format", "json"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let side = serde_json::from_str::<Value>(&done.stdout).unwrap()["sides"][0].clone();
    assert_eq!(side["not_comparable"], json!([]), "{side}");
    let step = row(&side, "decode/b8/d1024", "step");
    // The histogram keeps three significant digits.
    assert!((number(&step["ratio"]) - 1.25).abs() < 0.002, "{step}");
    assert_eq!(step["is_miss"], true);
    assert!(side["remarks"].to_string().contains("its context grows from 1025 to 1088 tokens"), "{side}");
    assert!(side["left_out"].to_string().contains("serve-"), "{side}");
}

#[test]
fn markdown_and_page_mark_the_misses_and_name_what_is_not_comparable() {
    let folder = tempdir().unwrap();
    written(&folder, "ops.json", &peaks(|_, op| if op == "mlp_out" { 1.3 } else { 1.0 }));
    let mut other = peaks(|_, _| 1.0);
    other["ops"]["model"] = json!("qwen3-8b");
    written(&folder, "other.json", &other);
    let done = report(&folder, &["ops.json", "other.json"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stdout.starts_with("# Measured beside predicted"), "{}", done.stdout);
    let missed: Vec<&str> = done.stdout.lines().filter(|line| line.ends_with("| MISS |")).collect();
    assert_eq!(missed.len(), 5 + 1, "five steps and the rate of mma: {missed:#?}");
    assert!(missed.iter().filter(|line| line.contains("mlp_out")).count() == 5);
    assert!(done.stdout.contains("5 of 35 are more than 15 % from the prediction."));
    assert!(done.stdout.contains("NOT COMPARABLE: another model: qwen3-8b, predicted for llama-3.1-8b."));
    let done = report(&folder, &["ops.json", "--out", "page.html"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let page = std::fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert_eq!(page.matches(">MISS<").count(), 6);
}

#[test]
fn what_is_no_prediction_or_no_measurement_is_refused_in_one_sentence() {
    let folder = tempdir().unwrap();
    written(&folder, "ops.json", &peaks(|_, _| 1.0));
    written(&folder, "later.json", &json!({"schema": "tokmeter-prediction/2"}));
    written(&folder, "broken.json", &json!({"schema": "tokmeter-prediction/1"}));
    written(&folder, "bare.json", &json!({"x": 1}));
    let mut ceilings_only = peaks(|_, _| 1.0);
    ceilings_only.as_object_mut().unwrap().remove("ops");
    written(&folder, "ceilings.json", &ceilings_only);
    let mut emulated = peaks(|_, _| 1.0);
    emulated["not_a_measurement"] = json!("emulated device");
    written(&folder, "emulated.json", &emulated);
    let good = committed();
    let good = good.to_str().unwrap();
    for (prediction, file, expected) in [
        ("later.json", "ops.json", "its schema is tokmeter-prediction/2, expected tokmeter-prediction/1"),
        ("broken.json", "ops.json", "is a broken prediction: missing field"),
        ("bare.json", "ops.json", "is no prediction: missing field `schema`"),
        ("absent.json", "ops.json", "absent.json: cannot be read"),
        (good, "ceilings.json", "has no operations, expected what peaks --ops --out writes"),
        (good, "emulated.json", "is not a measurement: emulated device"),
        (good, good, "llama-3.1-8b-bf16.json"),
    ] {
        let done = tokmeter(folder.path(), &["report", "--predicted", prediction, file]);
        assert_eq!(done.code, Some(3), "{prediction} {file}: {done:?}");
        assert!(done.stderr.contains(expected), "{}", done.stderr);
        assert!(done.stdout.is_empty());
    }
    let priced = report(&folder, &["ops.json", "--price-per-gpu-hour", "2.00 EUR"]);
    assert_eq!(priced.code, Some(2), "{}", priced.stderr);
}

#[test]
fn the_script_says_whether_a_prediction_is_of_these_kernels() {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let folder = tempdir().unwrap();
    let check = |path: &Path| {
        let mut command = Command::new("python3");
        command.args(["predict_kernels.py", "--check"]).arg(path).current_dir(&scripts);
        command.env("PYTHONDONTWRITEBYTECODE", "1").output()
    };
    let has_python = Command::new("python3")
        .args(["-c", "import sys; sys.exit(sys.version_info < (3, 11))"])
        .status()
        .is_ok_and(|status| status.success());
    if !has_python {
        return common::waived("python3 of 3.11 or later is missing");
    }
    // A committed prediction may be of earlier kernels, and stays what it was.
    let of_committed = check(&committed()).unwrap();
    assert!(matches!(of_committed.status.code(), Some(0 | 1)), "{of_committed:?}");
    let mut other: Value = serde_json::from_str(&std::fs::read_to_string(committed()).unwrap()).unwrap();
    other["kernels"]["gemm"] = json!("0");
    written(&folder, "other.json", &other);
    let of_other = check(&folder.path().join("other.json")).unwrap();
    assert_eq!(of_other.status.code(), Some(1), "{of_other:?}");
    assert!(String::from_utf8_lossy(&of_other.stdout).contains("gemm"), "{of_other:?}");
}
