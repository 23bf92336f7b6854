//! Records counted again by programs that share no code with ours (`scripts/recount.py`, `scripts/hdr_histogram.py`):
//! committed ones, and new ones of every kind of cell, with and without energy.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/program.rs"]
mod program;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::waived;
use program::{fake_record, tokmeter};
use serde_json::Value;
use tempfile::tempdir;
use tokmeter::record::{LatencyHistogram, Maybe, Record, read};

/// Runs python3 in `scripts/` with this standard input; none where it is missing.
fn python(arguments: &[&str], input: &str) -> Option<Output> {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let mut command = Command::new("python3");
    command.args(arguments).current_dir(scripts).env("PYTHONDONTWRITEBYTECODE", "1");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        waived("python3 is missing, which counts records again");
        return None;
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The record counted again and held against what `tokmeter report` says of it.
fn recounted(record: &Path, summary: &str) -> Option<Output> {
    python(&["recount.py", record.to_str().unwrap(), "--against", "-"], summary)
}

fn summary_of(record: &Path) -> String {
    let args = ["report", record.to_str().unwrap(), "--format", "json", "--allow-not-a-measurement"];
    let done = tokmeter(record.parent().unwrap(), &args);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    done.stdout
}

/// How many numbers agreed.
fn assert_agrees(record: &Path) -> Option<u64> {
    let output = recounted(record, &summary_of(record))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {text}", record.display());
    Some(text.split(' ').next().unwrap().parse().unwrap())
}

fn committed_records() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("results")).unwrap();
    let is_dated = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("20");
    let folders = folders.map(|entry| entry.unwrap().path()).filter(is_dated);
    let files = folders.flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let files = files.map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ending| ending == "json")).collect()
}

#[test]
fn committed_records_counted_again_give_what_the_report_says() {
    let records: Vec<PathBuf> = committed_records().into_iter().filter(|path| read(path).is_ok()).collect();
    assert!(!records.is_empty(), "no committed record");
    for record in records {
        let Some(compared) = assert_agrees(&record) else { return };
        assert!(compared > 20, "{}: only {compared} numbers", record.display());
    }
}

#[test]
fn every_kind_of_cell_counted_again_gives_what_the_report_says() {
    let folder = tempdir().unwrap();
    let record = fake_record(folder.path());
    let Some(compared) = assert_agrees(&folder.path().join("fake.json")) else { return };
    assert!(compared >= 10 * record.cells.len() as u64, "only {compared} numbers");
}

/// 600 open-loop requests at 250 W, so that there is a p99 and there are joules.
fn metered_record(folder: &Path) -> PathBuf {
    let lines: String = (0..20_000).map(|k| format!("{}.{:02},250\n", k / 100, k % 100)).collect();
    std::fs::write(folder.join("power.csv"), format!("t_s,watts\n{lines}")).unwrap();
    let load = ["--request-rate", "50", "--requests", "300", "--isl", "16", "--osl", "4", "-r", "2"];
    let args = ["run", "--device", "cpu", "--engine", "fake", "--power", "replay:power.csv", "-o", "r.json"];
    let done = tokmeter(folder, &[&args[..], &load].concat());
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    folder.join("r.json")
}

#[test]
fn tails_and_joules_counted_again_agree_and_a_wrong_number_is_noticed() {
    let folder = tempdir().unwrap();
    let path = metered_record(folder.path());
    if assert_agrees(&path).is_none() {
        return;
    }
    let sound: Value = serde_json::from_str(&summary_of(&path)).unwrap();
    let places = [
        "/0/cells/0/throughput/tokens_per_s",
        "/0/cells/0/tpot/mean_ns",
        "/0/cells/0/ttft/p99_ns",
        "/0/cells/0/joules_per_token",
        "/0/cells/0/tokens_per_joule",
    ];
    for place in places {
        let mut wrong = sound.clone();
        let number = wrong.pointer_mut(place).unwrap_or_else(|| panic!("{place} is not in the summary"));
        *number = (number.as_f64().unwrap_or_else(|| panic!("{place} is {number}")) * 1.003).into();
        let output = recounted(&path, &wrong.to_string()).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{place}: {text}");
        assert!(text.contains(place.rsplit('/').next().unwrap()), "{place}: {text}");
    }
}

fn histograms(record: &Record) -> Vec<LatencyHistogram> {
    let latencies = record.cells.iter().flat_map(|cell| &cell.runs).map(|run| &run.latency);
    let all = latencies.flat_map(|of| [&of.ttft, &of.itl, &of.tpot, &of.e2e, &of.step]);
    all.filter_map(Maybe::value).cloned().collect()
}

/// Reads base64 from each line and prints its buckets, as pairs of the largest value and the count.
const DECODE: &str = "import sys, json, hdr_histogram\n\
    print(json.dumps([hdr_histogram.decode_base64(line.strip()).buckets for line in sys.stdin]))";

#[test]
fn another_reader_finds_the_same_buckets_in_every_histogram() {
    let folder = tempdir().unwrap();
    let mut all = histograms(&fake_record(folder.path()));
    all.extend(committed_records().iter().filter_map(|path| read(path).ok()).flat_map(|r| histograms(&r)));
    // Values from the least to the greatest that is kept, in long runs of empty counts.
    let spread = [1_000, 1_001, 2_047, 2_048, 1_048_575, 1_048_576, 59_999_999_999, 3_600_000_000_000];
    all.push(LatencyHistogram::of(spread).unwrap());
    let many = (0..300_000u64).map(|k| 5_000_000 + k % 7);
    all.push(LatencyHistogram::of(many).unwrap());
    let lines: String = all.iter().map(|histogram| histogram.data.clone() + "\n").collect();
    let Some(output) = python(&["-c", DECODE], &lines) else { return };
    let found: Vec<Vec<(u64, u64)>> = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(found.len(), all.len());
    for (stored, found) in all.iter().zip(found) {
        let decoded = stored.decode().unwrap();
        let expected: Vec<(u64, u64)> = decoded
            .iter_recorded()
            .map(|step| (decoded.highest_equivalent(step.value_iterated_to()), step.count_at_value()))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(found.iter().map(|(_, count)| count).sum::<u64>(), stored.count);
    }
}
