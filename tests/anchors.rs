//! Distances from published figures: which rows a cell is held against, and what is printed of it.

#![allow(clippy::unwrap_used)]

#[path = "common/made_up.rs"]
mod made_up;
#[path = "common/program.rs"]
mod program;

use std::sync::LazyLock;

use program::fake_record;
use tempfile::tempdir;
use tokmeter::analysis::{CellSummary, Distance, Figure, summarize};
use tokmeter::record::{Maybe, Record, Workload};
use tokmeter::report;

static SCRIPTED: LazyLock<Record> = LazyLock::new(|| fake_record(tempdir().unwrap().path()));

const DECODE: &str = "decode/b8/d128/o16";
const H100: &str = "NVIDIA H100 80GB HBM3";

/// One cell that makes `tokens_per_s` at `watts`, as if on an H100.
fn one_cell(tokens_per_s: f64, watts: f64) -> Record {
    let mut record = made_up::on_gpu(&SCRIPTED, H100);
    record.cells.retain(|cell| cell.key == DECODE);
    for window in record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows) {
        window.t1_ns = window.t0_ns + 10_000_000_000;
        window.tokens_out = (tokens_per_s * 10.0) as u64;
    }
    made_up::set_power(&mut record, watts);
    record
}

fn only_cell(record: &Record) -> CellSummary {
    summarize(record).cells.remove(0)
}

fn figures(record: &Record) -> Vec<(Figure, f64)> {
    only_cell(record).anchors.iter().map(|distance| (distance.figure, distance.published)).collect()
}

#[test]
fn a_cell_of_the_same_batch_model_precision_and_gpu_is_held_against_the_published_row() {
    // Published: 1069.6 tok/s and 0.4548 J/tok. Ours: 1250 tok/s at 500 W, 0.4 J/tok.
    let record = one_cell(1250.0, 500.0);
    let anchors = only_cell(&record).anchors;
    let [rate, joules]: [Distance; 2] = anchors.try_into().unwrap();
    assert_eq!((rate.figure, rate.published, rate.ours), (Figure::OutputTokensPerS, 1069.6, 1250.0));
    assert!((rate.difference_ratio - 0.16866).abs() < 1e-5, "{rate:?}");
    assert_eq!((joules.figure, joules.published), (Figure::JoulesPerToken, 0.4548));
    assert!(
        (joules.ours - 0.4).abs() < 1e-12 && (joules.difference_ratio + 0.12049).abs() < 1e-5,
        "{joules:?}"
    );
    let line = "≈ decode/b8/d128/o16: anchor ML.ENERGY 3.0 (vLLM 0.11.1), H100, bs8, lm-arena-chat, other lengths: \
                0.455 J/tok, ours 0.400, −12 %";
    assert!(report::table(&summarize(&record)).contains(line), "{}", report::table(&summarize(&record)));
    assert!(report::section(&summarize(&record)).contains(line));
    assert!(report::json(&summarize(&record)).unwrap().contains("\"joules_per_token\""));
}

#[test]
fn anything_that_differs_leaves_the_cell_without_an_anchor() {
    let differs = |change: &dyn Fn(&mut Record)| {
        let mut record = one_cell(1250.0, 500.0);
        change(&mut record);
        figures(&record)
    };
    assert_eq!(differs(&|_| ()).len(), 2);
    let gpu = |name: &'static str| {
        move |record: &mut Record| record.machine.gpus[0].name = Maybe::Value(name.to_owned())
    };
    for name in ["NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH100", "Intel Xeon"] {
        assert_eq!(differs(&gpu(name)), [], "{name}");
    }
    assert_eq!(differs(&|record| record.machine.gpus.clear()), []);
    assert_eq!(differs(&|record| record.cells[0].devices = vec!["cpu".to_owned()]), []);
    assert_eq!(differs(&|record| record.cells[0].devices.push("cuda:0".to_owned())), []);
    assert_eq!(differs(&|record| record.engine.compute_dtype = "f16".to_owned()), []);
    assert_eq!(differs(&|record| record.model.name = "llama-3.1-80b".to_owned()), []);
    let other_batch = Workload::Decode { batch: 9, depth: 128, osl: 16 };
    assert_eq!(differs(&|record| record.cells[0].workload = other_batch), []);
}

#[test]
fn joules_are_compared_only_where_the_meter_reads_the_gpu_alone() {
    let with_scope = |scope: Maybe<String>| {
        let mut record = one_cell(1250.0, 500.0);
        record.meter.scope = scope;
        figures(&record)
    };
    let rate = (Figure::OutputTokensPerS, 1069.6);
    for other in ["package", "node", "module"] {
        assert_eq!(with_scope(Maybe::Value(other.to_owned())), [rate], "{other}");
    }
    assert_eq!(with_scope(Maybe::missing("not_recorded")), [rate]);
    assert_eq!(with_scope(Maybe::Value("gpu".to_owned())).len(), 2);
}

#[test]
fn lengths_decide_where_the_source_gives_them() {
    let mut record = one_cell(150.0, 500.0);
    record.model.name = "gemma-4-e4b".to_owned();
    record.cells[0].workload = Workload::Decode { batch: 1, depth: 2048, osl: 64 };
    // mistral.rs and vLLM at depth 2048.
    assert_eq!(figures(&record), [176.7, 162.3].map(|rate| (Figure::OutputTokensPerS, rate)));
    record.cells[0].workload = Workload::Decode { batch: 1, depth: 2047, osl: 64 };
    assert_eq!(figures(&record), []);
    record.cells[0].workload = Workload::Prefill { batch: 1, isl: 4096 };
    let published = [48_237.0, 49_448.0].map(|rate| (Figure::InputTokensPerS, rate));
    record.cells[0].runs.iter_mut().for_each(|run| run.windows[0].tokens_in = 100_000);
    assert_eq!(figures(&record), published);
    assert!(
        only_cell(&record)
            .anchors
            .iter()
            .all(|distance| distance.ours == 10_000.0 && distance.is_implausible())
    );
}

#[test]
fn a_record_of_a_cpu_prints_no_anchor() {
    assert!(summarize(&SCRIPTED).cells.iter().all(|cell| cell.anchors.is_empty()));
    assert!(!report::table(&summarize(&SCRIPTED)).contains("anchor"));
}
