//! Shares of the device's ceilings, against hand arithmetic for SmolLM2-135M in f32: 30 layers, hidden 576, q 576,
//! k 192, feed-forward 1536, vocabulary 49152, a tied head. A layer's matrices have 576 · 960 + 576 · 576 +
//! 3 · 576 · 1536 = 3 538 944 values, the head 28 311 552; a token's keys and values take 2 · 30 · 192 · 4 = 46 080 B.

#![allow(clippy::unwrap_used)]

#[path = "common/ceiling.rs"]
mod ceiling;
#[path = "common/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use ceiling::ceiling;
use program::{fake_record, tokmeter};
use tempfile::tempdir;
use tokmeter::analysis::{Flag, summarize, utilization};
use tokmeter::record::{Ceilings, Maybe, Record, Window, parse, write_atomically};
use tokmeter::report;

/// The scripted engine's record of one cell of each kind, on a device of a cache of 1 MiB that reads 10 GB/s and
/// multiplies 100 GFLOP/s.
static RECORD: LazyLock<Record> = LazyLock::new(|| {
    let mut record = fake_record(tempdir().unwrap().path());
    record.not_a_measurement = None;
    record.engine.weights_bytes = WEIGHTS_BYTES;
    record.engine.compute_dtype = "f32".to_owned();
    record.engine.kv_dtype = "f32".to_owned();
    record.ceilings = Maybe::Value(vec![Ceilings {
        device: "fake".to_owned(),
        last_level_cache_bytes: Maybe::Value(1 << 20),
        read_bandwidth_bytes_per_s: ceiling(10e9),
        copy_bandwidth_bytes_per_s: ceiling(9e9),
        matmul_flops_per_s: BTreeMap::from([("f32".to_owned(), ceiling(100e9))]),
        ..Ceilings::missing("not_a_gpu")
    }]);
    record
});

const WEIGHTS_BYTES: u64 = 538_060_032;
const PREFILL: usize = 0;
const DECODE: usize = 2;
const GENERATE: usize = 4;
const SERVE: usize = 5;

fn device(record: &mut Record) -> &mut Ceilings {
    match &mut record.ceilings {
        Maybe::Value(devices) => &mut devices[0],
        Maybe::Missing(missing) => panic!("{}", missing.missing),
    }
}

/// Lets every window of the cell take `seconds` for each of its passes.
fn set_pass_seconds(record: &mut Record, cell: usize, seconds: f64) {
    for run in &mut record.cells[cell].runs {
        for window in &mut run.windows {
            window.t1_ns = window.t0_ns + (window.passes as f64 * seconds * 1e9) as u64;
        }
    }
}

fn shares(record: &Record, cell: usize) -> (Maybe<f64>, Maybe<f64>) {
    let found = utilization(record, &record.cells[cell]);
    (found.mbu_share, found.mfu_share)
}

fn assert_shares(cell: usize, key: &str, pass_bytes: f64, pass_flops: f64) {
    let mut record = RECORD.clone();
    assert_eq!(record.cells[cell].key, key);
    set_pass_seconds(&mut record, cell, 2.0);
    let (mbu, mfu) = shares(&record, cell);
    let (mbu, mfu) = (mbu.into_value().unwrap(), mfu.into_value().unwrap());
    assert!((mbu / (pass_bytes / 2.0 / 10e9) - 1.0).abs() < 1e-6, "{key}: {mbu}");
    assert!((mfu / (pass_flops / 2.0 / 100e9) - 1.0).abs() < 1e-6, "{key}: {mfu}");
}

#[test]
fn a_decode_cell_reads_all_weights_and_its_contexts_in_each_step() {
    // 16 steps over contexts of 129 to 144 tokens, 2 184 together; 2 · 134 479 872 flops a token and
    // 4 · 30 · 576 for each position that it attends to.
    let bytes = 16.0 * WEIGHTS_BYTES as f64 + 46_080.0 * 2184.0;
    let flops = 16.0 * 2.0 * 134_479_872.0 + 69_120.0 * 2184.0;
    assert_shares(DECODE, "decode/b1/d128/o16", bytes, flops);
}

#[test]
fn a_prefill_cell_of_one_step_reads_the_weights_once() {
    // The head multiplies the last position only; 128 tokens attend to 1 + 2 + … + 128 = 8 256 positions.
    let flops = 2.0 * (106_168_320.0 * 128.0 + 28_311_552.0) + 69_120.0 * 8256.0;
    assert_shares(PREFILL, "prefill/b1/i128", WEIGHTS_BYTES as f64 + 46_080.0 * 128.0, flops);
}

#[test]
fn a_generate_cell_is_a_prefill_and_one_step_less_than_its_output() {
    // Four sequences; contexts of 32 to 47 tokens, 632 together, of which the prompt's own 32 come from the prefill.
    let bytes = 16.0 * WEIGHTS_BYTES as f64 + 4.0 * 46_080.0 * 632.0;
    let prefill = 2.0 * (106_168_320.0 * 128.0 + 4.0 * 28_311_552.0) + 69_120.0 * 4.0 * 528.0;
    let decode = 4.0 * (15.0 * 2.0 * 134_479_872.0 + 69_120.0 * 600.0);
    assert_shares(GENERATE, "generate/b4/i32/o16", bytes, prefill + decode);
}

#[test]
fn what_the_record_does_not_determine_is_missing_with_its_reason() {
    let reasons = |record: &Record, cell: usize| {
        let (mbu, mfu) = shares(record, cell);
        (mbu.reason().unwrap_or("a value").to_owned(), mfu.reason().unwrap_or("a value").to_owned())
    };
    let assert_reasons = |cell: usize, mbu: &str, mfu: &str, change: &dyn Fn(&mut Record)| {
        let mut record = RECORD.clone();
        change(&mut record);
        assert_eq!(reasons(&record, cell), (mbu.to_owned(), mfu.to_owned()));
    };
    assert_reasons(SERVE, "requests_cross_the_window", "requests_cross_the_window", &|_| ());
    assert_reasons(DECODE, "cache_resident", "a value", &|record| {
        device(record).last_level_cache_bytes = Maybe::Value(WEIGHTS_BYTES / 8 + (1 << 20));
    });
    assert_reasons(DECODE, "cache_size_unknown", "a value", &|record| {
        device(record).last_level_cache_bytes = Maybe::missing("not_found");
    });
    assert_reasons(DECODE, "memory_too_small", "a value", &|record| {
        device(record).read_bandwidth_bytes_per_s = Maybe::missing("memory_too_small");
    });
    assert_reasons(DECODE, "a value", "no_ceiling_of_this_type", &|record| {
        device(record).matmul_flops_per_s.clear();
    });
    assert_reasons(PREFILL, "prompts_took_several_steps", "a value", &|record| {
        let window: &mut Window = &mut record.cells[PREFILL].runs[0].windows[0];
        window.steps *= 2;
    });
    assert_reasons(DECODE, "embedding_bytes_unknown", "a value", &|record| {
        record.model.config.tie_word_embeddings = false;
        record.engine.compute_dtype = "quantized".to_owned();
    });
    assert_reasons(DECODE, "fake_engine", "fake_engine", &|record| {
        record.ceilings = Maybe::missing("fake_engine");
    });
    assert_reasons(DECODE, "no_ceilings", "no_ceilings", &|record| device(record).device = "cpu".to_owned());
}

#[test]
fn an_embedding_that_is_not_the_head_is_not_read() {
    let mut record = RECORD.clone();
    set_pass_seconds(&mut record, DECODE, 2.0);
    let tied = shares(&record, DECODE).0.into_value().unwrap();
    record.model.config.tie_word_embeddings = false;
    record.engine.weights_bytes += 28_311_552 * 4;
    let untied = shares(&record, DECODE).0.into_value().unwrap();
    assert!((tied / untied - 1.0).abs() < 1e-12, "{tied} {untied}");
}

#[test]
fn a_cell_above_its_ceiling_is_marked_and_the_file_stands() {
    let mut record = RECORD.clone();
    let pass_bytes = 16.0 * WEIGHTS_BYTES as f64 + 46_080.0 * 2184.0;
    set_pass_seconds(&mut record, DECODE, pass_bytes / 10e9 / 1.01);
    for cell in [PREFILL, 1, 3, GENERATE] {
        set_pass_seconds(&mut record, cell, 100.0);
    }
    let marked = |record: &Record| -> Vec<usize> {
        let cells = summarize(record).cells.into_iter().enumerate();
        let is_above = |flag: &Flag| matches!(flag, Flag::AboveCeiling { .. });
        cells.filter(|(_, cell)| cell.flags.iter().any(is_above)).map(|(index, _)| index).collect()
    };
    assert_eq!(marked(&record), [0; 0]);
    set_pass_seconds(&mut record, DECODE, pass_bytes / 10e9 / 1.03);
    assert_eq!(marked(&record), [DECODE]);
    let summary = summarize(&record);
    assert!(report::table(&summary).contains("above the device's own ceiling (MBU 103.0 %"));
    // A disturbed ceiling is a doubt about the ceiling, not about what was measured.
    let folder = tempdir().unwrap();
    let text = serde_json::to_string(&record).unwrap();
    write_atomically(&folder.path().join("fast.json"), text.as_bytes()).unwrap();
    let done = tokmeter(folder.path(), &["validate", "fast.json"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
}

#[test]
fn a_record_without_ceilings_is_read_and_says_so() {
    let mut value = serde_json::to_value(&*RECORD).unwrap();
    value.as_object_mut().unwrap().remove("ceilings").unwrap();
    let record = parse(&value.to_string()).unwrap();
    assert_eq!(shares(&record, DECODE).0.reason(), Some("not_recorded"));
    // Every field of a ceiling is needed and no other is taken.
    let value = serde_json::to_value(&*RECORD).unwrap();
    let mut names: Vec<String> = vec![];
    for (place, object) in [
        ("/ceilings/0", &value["ceilings"][0]),
        ("/ceilings/0/read_bandwidth_bytes_per_s", &value["ceilings"][0]["read_bandwidth_bytes_per_s"]),
    ] {
        for name in object.as_object().unwrap().keys() {
            let mut less = value.clone();
            less.pointer_mut(place).unwrap().as_object_mut().unwrap().remove(name);
            assert!(parse(&less.to_string()).is_err(), "{place}/{name}");
            names.push(name.clone());
        }
        let mut more = value.clone();
        more.pointer_mut(place).unwrap().as_object_mut().unwrap().insert("foreign".to_owned(), 1.into());
        assert!(parse(&more.to_string()).is_err(), "{place}");
    }
    assert_eq!(names.len(), 11 + 8);
}
