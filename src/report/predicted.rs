//! Measurements beside a prediction, as Markdown and JSON; the page shares the rows.

use super::DASH;
use super::words::reason_in_words;
use crate::analysis::predicted::{Beside, Row, Side};
use crate::record::Maybe;
use crate::units::{format_ns, format_significant};

pub(super) const TIME_TITLES: [&str; 8] = [
    "step",
    "operation",
    "predicted",
    "measured",
    "measured ÷ predicted",
    "predicted share",
    "measured share",
    "",
];
pub(super) const CEILING_TITLES: [&str; 5] = ["ceiling", "assumed", "measured", "measured ÷ assumed", ""];
pub(super) const RULE: &str = "MISS: more than 15 % from the prediction, so the model behind it is wrong at that operation; where a ceiling misses \
     too, look there first. Shares are of max(bytes ÷ bandwidth, flops ÷ matmul peak): the predicted one at the assumed \
     ceilings, the measured one at the file's own.";

/// # Errors
/// When a number cannot be written as JSON.
pub fn predicted_json(beside: &Beside) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(beside)? + "\n")
}

/// What was measured beside what was predicted, one section a file.
pub fn predicted_markdown(beside: &Beside) -> String {
    let mut text = String::from("# Measured beside predicted\n\n");
    for (name, value) in facts(beside) {
        text.push_str(&format!("- **{name}**: {value}\n"));
    }
    for side in &beside.sides {
        text.push_str(&format!("\n## {}\n\n{}\n", title(side), verdict(side)));
        table(&mut text, &TIME_TITLES, side.rows.iter().map(time_cells));
        table(&mut text, &CEILING_TITLES, side.ceilings.iter().map(ceiling_cells));
        let notes = notes(side);
        if !notes.is_empty() {
            text.push('\n');
        }
        for note in notes {
            text.push_str(&format!("- {note}\n"));
        }
    }
    text.push_str(&format!("\n{RULE}\n"));
    text
}

fn table(text: &mut String, titles: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<String> = rows.map(|cells| format!("| {} |\n", cells.join(" | "))).collect();
    if !rows.is_empty() {
        let line = "--:|".repeat(titles.len() - 1);
        text.push_str(&format!("\n| {} |\n|---|{line}\n{}", titles.join(" | "), rows.concat()));
    }
}

/// What was predicted, of what.
pub(super) fn facts(beside: &Beside) -> Vec<(&'static str, String)> {
    let commit =
        beside.commit.value().map_or("an unknown commit".to_owned(), |commit| format!("commit {commit}"));
    vec![
        ("model", format!("{} in {}", beside.model, beside.compute_dtype)),
        ("kernels", format!("of {commit}, compiled by {}", beside.compiler)),
    ]
}

pub(super) fn title(side: &Side) -> String {
    let name = side.device_name.value().map_or("an unknown device", String::as_str);
    format!("{}: {name}", side.file)
}

/// How many rows missed, or why there are none.
pub(super) fn verdict(side: &Side) -> String {
    if !side.not_comparable.is_empty() {
        return format!("NOT COMPARABLE: {}.", side.not_comparable.join("; "));
    }
    let measured = side.rows.iter().filter(|row| row.measured.value().is_some()).count();
    let misses = side.rows.iter().filter(|row| row.is_miss).count();
    match (measured, misses) {
        (0, _) => "Nothing in the file was predicted.".to_owned(),
        (_, 0) => format!("All {measured} are within 15 % of the prediction."),
        _ => format!("{misses} of {measured} are more than 15 % from the prediction."),
    }
}

pub(super) fn notes(side: &Side) -> Vec<String> {
    let left_out = side.left_out.iter().map(|line| format!("not compared: {line}"));
    let unmeasured = side.not_a_measurement.iter().map(|reason| format!("NOT A MEASUREMENT: {reason}"));
    unmeasured.chain(side.remarks.iter().cloned()).chain(left_out).collect()
}

pub(super) fn time_cells(row: &Row) -> Vec<String> {
    let mut cells = vec![row.step.clone(), row.what.clone(), format_ns(row.predicted)];
    cells.extend([
        or_reason(&row.measured, format_ns),
        or_reason(&row.ratio, ratio_text),
        or_reason(&row.predicted_share, share_text),
        or_reason(&row.measured_share, share_text),
    ]);
    cells.push(miss(row));
    cells
}

pub(super) fn ceiling_cells(row: &Row) -> Vec<String> {
    let unit = |value: f64| match row.what.as_str() {
        "read_bandwidth_bytes_per_s" => format!("{} GB/s", format_significant(value / 1e9)),
        "graph_node_ns" => format_ns(value),
        _ => format!("{} TFLOP/s", format_significant(value / 1e12)),
    };
    let name = match row.what.as_str() {
        "read_bandwidth_bytes_per_s" => "read bandwidth",
        "graph_node_ns" => "graph node",
        "matmul_flops_per_s" => "matmul",
        "mma_flops_per_s" => "tensor-core instructions",
        other => other,
    };
    vec![
        name.to_owned(),
        unit(row.predicted),
        or_reason(&row.measured, unit),
        or_reason(&row.ratio, ratio_text),
        miss(row),
    ]
}

fn miss(row: &Row) -> String {
    if row.is_miss { "MISS".to_owned() } else { String::new() }
}

fn ratio_text(ratio: f64) -> String {
    format!("{ratio:.2}")
}

fn share_text(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn or_reason(value: &Maybe<f64>, text: impl Fn(f64) -> String) -> String {
    match value {
        Maybe::Value(value) => text(*value),
        Maybe::Missing(missing) => format!("{DASH} ({})", reason_in_words(&missing.missing)),
    }
}
