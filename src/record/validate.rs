//! The identities that a record must satisfy whoever made it, and the hash that names its content.

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::identities::{DISAGREEMENT, LIMIT_MARGIN, POWER_AGREEMENT, disagrees, power_from_tokens};
use super::{Cell, Energy, LatencyHistogram, Maybe, Meter, Outcome, Record, RequestRow, Run, Status, Window};

/// One identity that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Where: `cells[3] decode/b1/d128/o16, run 0`.
    pub place: String,
    pub what: String,
}

/// Largest integer that canonical JSON keeps exact: its numbers are 64-bit floating point.
const LARGEST_EXACT: u64 = (1 << 53) - 1;

/// SHA-256 of the record in canonical JSON (RFC 8785), so that whitespace and key order do not matter.
///
/// # Errors
/// When the record holds a number that JSON cannot express, or an integer that canonical JSON would round: two
/// records could then differ and still have one hash.
pub fn canonical_sha256(record: &Record) -> anyhow::Result<String> {
    if let Some(number) = inexact_integer(&serde_json::to_value(record)?) {
        anyhow::bail!(
            "holds the integer {number}, expected at most {LARGEST_EXACT} for an exact canonical form"
        );
    }
    let canonical = serde_json_canonicalizer::to_vec(record)?;
    Ok(hex(&Sha256::digest(canonical)))
}

fn inexact_integer(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64().filter(|integer| *integer > LARGEST_EXACT),
        Value::Array(items) => items.iter().find_map(inexact_integer),
        Value::Object(fields) => fields.values().find_map(inexact_integer),
        _ => None,
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything in `record` that contradicts itself.
pub fn violations(record: &Record) -> Vec<Violation> {
    let mut found = Vec::new();
    check_progress(record, &mut found);
    for (index, cell) in record.cells.iter().enumerate() {
        let place = format!("cells[{index}] {}", cell.key);
        check_cell(record, cell, &place, &mut found);
        for (index, run) in cell.runs.iter().enumerate() {
            let place = format!("{place}, run {index}");
            require(&mut found, &place, run.index as usize == index, || {
                format!("index is {}, expected {index}", run.index)
            });
            check_run(cell, run, &place, &mut found);
            for window in &run.windows {
                check_energy(&record.meter, window, &place, &mut found);
            }
        }
    }
    found
}

/// Cells are measured in the planned order, and how many there are fits the status.
fn check_progress(record: &Record, found: &mut Vec<Violation>) {
    let planned = &record.command.planned_cells;
    let in_order = record.cells.iter().map(|cell| &cell.key).eq(planned.iter().take(record.cells.len()));
    require(found, "cells", in_order, || {
        "expected the first of command.planned_cells, in their order".to_owned()
    });
    let whole = record.status != Status::Complete || record.cells.len() == planned.len();
    require(found, "status", whole, || {
        format!("complete with {} cells, expected {}", record.cells.len(), planned.len())
    });
    let ended = record.finished_at.value().is_some();
    require(found, "finished_at", ended == (record.status != Status::Running), || {
        format!("does not fit status {:?}, expected a time in all but a running record", record.status)
    });
}

fn require(found: &mut Vec<Violation>, place: &str, holds: bool, what: impl FnOnce() -> String) {
    if !holds {
        found.push(Violation { place: place.to_owned(), what: what() });
    }
}

fn check_cell(record: &Record, cell: &Cell, place: &str, found: &mut Vec<Violation>) {
    let key = cell.workload.key();
    require(found, place, cell.key == key, || format!("key is {}, expected {key}", cell.key));
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
    check_latency(run, place, found);
    let steps = run.windows.iter().fold(0u64, |steps, window| steps.saturating_add(window.steps));
    if let Maybe::Value(step) = &run.latency.step {
        require(found, place, step.count == steps, || {
            format!("latency.step holds {} values, expected the windows' {steps} steps", step.count)
        });
    }
    for check in run.checks.iter().filter(|check| !check.ok) {
        require(found, place, false, || format!("check {} failed: {}", check.name, check.detail));
    }
}

/// Count, extremes and sum of what the rows alone determine.
fn check_latency(run: &Run, place: &str, found: &mut Vec<Violation>) {
    let since_arrival =
        |row: &RequestRow, at: &Maybe<u64>| at.value().map(|at| at.saturating_sub(row.arrival_ns));
    let ttft: Vec<u64> =
        run.requests.iter().filter_map(|row| since_arrival(row, &row.first_token_ns)).collect();
    let complete = run.requests.iter().filter(|row| row.complete);
    let e2e: Vec<u64> = complete.filter_map(|row| since_arrival(row, &row.last_token_ns)).collect();
    for (name, histogram, values) in [("ttft", &run.latency.ttft, ttft), ("e2e", &run.latency.e2e, e2e)] {
        let Some(histogram) = histogram.value() else { continue };
        let sum_ns = values.iter().fold(0u64, |sum, value| sum.saturating_add(*value));
        let extremes = (values.iter().min().copied(), values.iter().max().copied());
        let fits = (histogram.count, histogram.sum_ns) == (values.len() as u64, sum_ns)
            && (Some(histogram.min_ns), Some(histogram.max_ns)) == extremes;
        require(found, place, fits, || format!("latency.{name} does not follow from the requests' times"));
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
    let requests = window.passes.saturating_mul(u64::from(batch));
    let expected = (requests.saturating_mul(u64::from(input)), requests.saturating_mul(u64::from(output)));
    require(found, place, (window.tokens_in, window.tokens_out) == expected, || {
        format!(
            "window counts {} input and {} output tokens, expected {} and {} for {} passes",
            window.tokens_in, window.tokens_out, expected.0, expected.1, window.passes
        )
    });
    require(found, place, window.requests_completed == requests, || {
        format!("window completed {} requests, expected {requests}", window.requests_completed)
    });
}

/// Energy lies inside the window, is the sum of its devices' over that time, stays below the power limits, and agrees with
/// the tokens: J/token times tokens/s is W.
fn check_energy(meter: &Meter, window: &Window, place: &str, found: &mut Vec<Violation>) {
    let Maybe::Value(energy) = &window.energy else { return };
    require(found, place, meter.source.value().is_some(), || "energy without a meter".to_owned());
    let inside =
        window.t0_ns <= energy.t_a_ns && energy.t_a_ns < energy.t_b_ns && energy.t_b_ns <= window.t1_ns;
    require(found, place, inside, || {
        format!("energy of {} to {} ns is not inside its window", energy.t_a_ns, energy.t_b_ns)
    });
    let power_w = energy.energy_j / seconds(energy.t_a_ns, energy.t_b_ns);
    let is_positive = power_w.is_finite() && power_w > 0.0 && energy.uncertainty_j >= 0.0;
    require(found, place, is_positive, || format!("energy is {} J, expected more than 0", energy.energy_j));
    let devices_w = power_of_devices(energy);
    require(found, place, agree(devices_w, power_w, POWER_AGREEMENT), || {
        format!("power is {power_w:.3} W, expected its devices' {devices_w:.3} W")
    });
    let is_doubted = energy.doubts.iter().any(|doubt| doubt == DISAGREEMENT);
    require(found, place, is_doubted || !energy.devices.iter().any(disagrees), || {
        format!("counter and power readings differ by more than 5 %, expected the doubt {DISAGREEMENT}")
    });
    if let Some(limit_w) = limit_w(meter) {
        require(found, place, power_w <= LIMIT_MARGIN * limit_w, || {
            format!("power is {power_w:.1} W, expected at most 1.05 of the limit of {limit_w:.1} W")
        });
    }
    if let Maybe::Value(idle) = &meter.idle_no_context {
        let floor_w = idle.power_w - idle.uncertainty_w;
        require(found, place, power_w >= floor_w, || {
            format!("power is {power_w:.1} W, expected at least the idle power of {floor_w:.1} W")
        });
    }
    let rate_per_s = window.tokens_out as f64 / seconds(window.t0_ns, window.t1_ns);
    let tokens_w = power_from_tokens(energy, rate_per_s).unwrap_or(0.0);
    require(found, place, agree(tokens_w, power_w, POWER_AGREEMENT), || {
        format!(
            "joules per token times tokens per second is {tokens_w:.3} W, expected the meter's {power_w:.3} W"
        )
    });
}

fn agree(found: f64, expected: f64, tolerance: f64) -> bool {
    (found / expected - 1.0).abs() <= tolerance
}

/// Sum of the devices' mean powers, each between its own readings.
fn power_of_devices(energy: &Energy) -> f64 {
    energy.devices.iter().map(|device| device.energy_j / seconds(device.t_a_ns, device.t_b_ns)).sum()
}

fn limit_w(meter: &Meter) -> Option<f64> {
    meter.devices.value()?.iter().map(|device| device.power_limit_w.value()).sum()
}

fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e9
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
