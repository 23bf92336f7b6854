//! The identities that a record must satisfy whoever made it, and the hash that names its content.

use sha2::{Digest as _, Sha256};

use super::{Cell, LatencyHistogram, Maybe, Outcome, Record, RequestRow, Run, Window};

/// One identity that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Where: `cells[3] decode/b1/d128/o16, run 0`.
    pub place: String,
    pub what: String,
}

/// SHA-256 of the record in canonical JSON (RFC 8785), so that whitespace and key order do not matter.
///
/// # Errors
/// When the record holds a number that JSON cannot express.
pub fn canonical_sha256(record: &Record) -> anyhow::Result<String> {
    let canonical = serde_json_canonicalizer::to_vec(record)?;
    Ok(hex(&Sha256::digest(canonical)))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything in `record` that contradicts itself.
pub fn violations(record: &Record) -> Vec<Violation> {
    let mut found = Vec::new();
    for (index, cell) in record.cells.iter().enumerate() {
        let place = format!("cells[{index}] {}", cell.key);
        check_cell(record, cell, &place, &mut found);
        for run in &cell.runs {
            check_run(cell, run, &format!("{place}, run {}", run.index), &mut found);
        }
    }
    found
}

fn require(found: &mut Vec<Violation>, place: &str, holds: bool, what: impl FnOnce() -> String) {
    if !holds {
        found.push(Violation { place: place.to_owned(), what: what() });
    }
}

fn check_cell(record: &Record, cell: &Cell, place: &str, found: &mut Vec<Violation>) {
    let key = cell.workload.key();
    require(found, place, cell.key == key, || format!("key is {}, expected {key}", cell.key));
    let planned = record.command.planned_cells.contains(&cell.key);
    require(found, place, planned, || "the cell is not among command.planned_cells".to_owned());
    let all_runs = cell.runs.len() == record.command.repeat as usize;
    require(found, place, cell.outcome != Outcome::Measured || all_runs, || {
        format!("measured with {} runs, expected {}", cell.runs.len(), record.command.repeat)
    });
}

fn check_run(cell: &Cell, run: &Run, place: &str, found: &mut Vec<Violation>) {
    for window in &run.windows {
        check_window(cell, window, place, found);
    }
    for row in &run.requests {
        check_row(cell, row, place, found);
    }
    for (name, histogram) in histograms(run) {
        if let Err(reason) = histogram.decode() {
            require(found, place, false, || format!("latency.{name}: {reason}"));
        }
        let ordered = histogram.min_ns <= histogram.max_ns && histogram.count > 0;
        require(found, place, ordered, || format!("latency.{name}: count, min_ns and max_ns do not fit"));
    }
    let steps: u64 = run.windows.iter().map(|window| window.steps).sum();
    if let Maybe::Value(step) = &run.latency.step {
        require(found, place, step.count == steps, || {
            format!("latency.step holds {} values, expected the windows' {steps} steps", step.count)
        });
    }
    for check in run.checks.iter().filter(|check| !check.ok) {
        require(found, place, false, || format!("check {} failed: {}", check.name, check.detail));
    }
}

fn histograms(run: &Run) -> impl Iterator<Item = (&'static str, &LatencyHistogram)> {
    let latency = &run.latency;
    [
        ("ttft", &latency.ttft),
        ("itl", &latency.itl),
        ("tpot", &latency.tpot),
        ("e2e", &latency.e2e),
        ("step", &latency.step),
    ]
    .into_iter()
    .filter_map(|(name, histogram)| histogram.value().map(|histogram| (name, histogram)))
}

fn check_window(cell: &Cell, window: &Window, place: &str, found: &mut Vec<Violation>) {
    require(found, place, window.t1_ns > window.t0_ns, || {
        format!("window ends at {} ns, expected later than its start {} ns", window.t1_ns, window.t0_ns)
    });
    let Some(batch) = cell.workload.static_batch() else { return };
    let (input, output) = cell.workload.counted_tokens();
    let requests = window.passes * u64::from(batch);
    let expected = (requests * u64::from(input), requests * u64::from(output));
    require(found, place, (window.tokens_in, window.tokens_out) == expected, || {
        format!(
            "window counts {} input and {} output tokens, expected {} and {} for {} passes",
            window.tokens_in, window.tokens_out, expected.0, expected.1, window.passes
        )
    });
}

fn check_row(cell: &Cell, row: &RequestRow, place: &str, found: &mut Vec<Violation>) {
    let (isl, osl) = (cell.workload.lengths().0, cell.workload.counted_tokens().1);
    let lengths =
        row.isl_tokens == isl && if row.complete { row.osl_tokens == osl } else { row.osl_tokens < osl };
    require(found, place, lengths, || {
        format!(
            "request {} has {} input and {} output tokens, expected {isl} and {osl}",
            row.id, row.isl_tokens, row.osl_tokens
        )
    });
    let first = row.first_token_ns.value().copied();
    let last = row.last_token_ns.value().copied();
    let ordered = row.arrival_ns <= row.submitted_ns
        && first.is_none_or(|first| row.submitted_ns < first)
        && last.is_none_or(|last| first.is_some_and(|first| first <= last));
    require(found, place, ordered, || format!("request {}: its times are not in order", row.id));
}
