//! The table that `run` prints.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use super::{notes, row, titles};
use crate::analysis::Summary;

/// A summary as plain text: heading, one line per cell, notes.
pub fn table(summary: &Summary) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles(summary));
    for cell in &summary.cells {
        table.add_row(row(summary, cell));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{}\n\n{}\n", heading(summary), trimmed(&table.to_string()));
    let notes = notes(summary);
    if !notes.is_empty() {
        text.push('\n');
    }
    for note in notes {
        text.push_str(&note);
        text.push('\n');
    }
    text
}

/// Model, types and device in one line, and loudly what is not a measurement of a real model.
pub(super) fn heading(summary: &Summary) -> String {
    let mut text =
        format!("{} · {} · {} on {}", summary.model, summary.compute_dtype, summary.backend, summary.device);
    if summary.synthetic_weights {
        text.push_str("\nSYNTHETIC WEIGHTS: true shapes, made-up values");
    }
    if let Some(reason) = &summary.not_a_measurement {
        text.push_str(&format!("\nNOT A MEASUREMENT: {reason}"));
    }
    text
}

pub(super) fn trimmed(text: &str) -> String {
    text.lines()
        .map(|line| line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end()))
        .collect::<Vec<_>>()
        .join("\n")
}
