//! Records as Markdown, for a repository or a ticket.

use super::{DASH, notes, row, titles};
use crate::analysis::{Summary, summarize};
use crate::record::{Maybe, Record};
use crate::units::format_bytes;

/// Several records as one document.
pub fn document(records: &[Record]) -> String {
    let mut text = String::from("# tokmeter report\n");
    for record in records {
        text.push_str(&format!("\n{}", described(record)));
    }
    text
}

/// One record: what was measured, on what, how, and the table.
fn described(record: &Record) -> String {
    let summary = summarize(record);
    let mut text = format!("## {} on {}\n\n", record.model.name, record.engine.device);
    for (title, value) in facts(record) {
        text.push_str(&format!("- **{title}**: {value}\n"));
    }
    text.push('\n');
    text.push_str(&section(&summary));
    text
}

fn facts(record: &Record) -> Vec<(&'static str, String)> {
    let weights = &record.model.weights;
    let stored: Vec<String> = weights
        .stored_bytes
        .iter()
        .map(|(dtype, bytes)| format!("{} {dtype}", format_bytes(*bytes)))
        .collect();
    let mut facts = vec![
        ("started", record.started_at.clone()),
        ("command", format!("`{}`", record.command.argv.join(" ").replace('`', "'"))),
        ("machine", machine(record)),
        (
            "engine",
            format!(
                "{} {} · {} backend, {} threads, computes in {}, KV in {}",
                record.tool.name,
                record.tool.version,
                record.engine.backend,
                record.engine.threads,
                record.engine.compute_dtype,
                record.engine.kv_dtype
            ),
        ),
        ("weights", format!("{} ({})", weights.format, stored.join(", "))),
        (
            "runs",
            format!(
                "{} per cell, windows of at least {} s",
                record.command.repeat, record.command.min_seconds
            ),
        ),
    ];
    if let Some(reason) = &record.not_a_measurement {
        facts.insert(0, ("NOT A MEASUREMENT", reason.clone()));
    }
    facts
}

fn machine(record: &Record) -> String {
    let cpu = &record.machine.cpu;
    let text = |value: &Maybe<String>| value.value().cloned().unwrap_or_else(|| "unknown".to_owned());
    let logical = cpu.logical_cpus.value().map_or("?".to_owned(), ToString::to_string);
    format!("{}, {logical} CPUs, Linux {}", text(&cpu.model), text(&record.machine.host.kernel))
}

/// The table and its notes.
pub fn section(summary: &Summary) -> String {
    let titles = titles(summary);
    let mut text = format!("| {} |\n|---|{}\n", titles.join(" | "), "--:|".repeat(titles.len() - 1));
    for cell in &summary.cells {
        text.push_str(&format!("| {} |\n", row(summary, cell).join(" | ")));
    }
    text.push_str(&costs(summary));
    let notes = notes(summary);
    if !notes.is_empty() {
        text.push('\n');
    }
    for note in notes {
        text.push_str(&format!("- {note}\n"));
    }
    text
}

/// What a million tokens cost, where there is a price.
fn costs(summary: &Summary) -> String {
    let Some(currency) = summary.currency.value() else { return String::new() };
    let number = |value: &Maybe<f64>| value.value().map_or(DASH.to_owned(), |value| format!("{value:.4}"));
    let mut text = format!(
        "\n| {currency} per Mtok | output | input | all | energy in output | output at 60 % use | at 30 % |\n\
         |---|--:|--:|--:|--:|--:|--:|\n"
    );
    for cell in &summary.cells {
        let Some(cost) = cell.cost.value() else { continue };
        let [_, (_, at_60), (_, at_30)] = &cost.per_mtok_output_at;
        let amounts = [
            &cost.per_mtok_output,
            &cost.per_mtok_input,
            &cost.per_mtok_total,
            &cost.energy_per_mtok_output,
            at_60,
            at_30,
        ];
        text.push_str(&format!("| {} | {} |\n", cell.key, amounts.map(number).join(" | ")));
    }
    text
}
