//! The tables: results of every cell, distances from published figures, flags, and what the columns mean.

use std::collections::BTreeMap;

use crate::report::words::consequence;
use crate::report::{describe, figure_unit, percent_difference, remarks, row, titles};
use crate::units::format_significant;

use super::content::{Block, Section, Table};
use super::subject::Subject;

/// Every cell of every record, with the reasons of the dashes below.
pub(super) fn results(subjects: &[Subject<'_>]) -> Section {
    let mut blocks = Vec::new();
    for subject in subjects {
        blocks.push(Block::Table(Table {
            caption: subject.title(),
            columns: titles(&subject.summary),
            rows: subject.summary.cells.iter().map(|cell| row(&subject.summary, cell)).collect(),
            is_text: false,
            is_folded: subjects.len() > 4,
        }));
        let planned = subject.record.command.planned_cells.len();
        if subject.summary.cells.len() < planned {
            blocks.push(Block::text(format!(
                "{} of {planned} planned cells are in the record.",
                subject.summary.cells.len()
            )));
        }
        let notes = remarks(&subject.summary);
        if !notes.is_empty() {
            blocks.push(Block::Bullets { items: notes });
        }
    }
    Section { id: "results", title: "Results", blocks }
}

/// How far cells lie from published figures.
pub(super) fn anchors(subjects: &[Subject<'_>]) -> Section {
    let mut rows = Vec::new();
    for subject in subjects {
        for cell in &subject.summary.cells {
            rows.extend(cell.anchors.iter().map(|distance| {
                vec![
                    format!("#{} {}", subject.number, cell.key),
                    distance.anchor.clone(),
                    figure_unit(distance.figure).to_owned(),
                    format_significant(distance.published),
                    format_significant(distance.ours),
                    percent_difference(distance),
                ]
            }));
        }
    }
    let blocks = if rows.is_empty() {
        vec![Block::text(
            "No published figure that comes with the program is of the model, precision, GPU and load of a cell here.",
        )]
    } else {
        vec![
            Block::text(
                "Published figures of the same model, precision, GPU and load. They are bands of plausibility, never a pass \
                 or a fail: engines, lengths, clocks and power limits differ.",
            ),
            Block::Table(Table {
                caption: "Distance from published figures".to_owned(),
                columns: ["cell", "source", "figure", "published", "ours", "difference"]
                    .map(str::to_owned)
                    .to_vec(),
                rows,
                is_text: true,
                is_folded: false,
            }),
        ]
    };
    Section { id: "anchors", title: "Published figures", blocks }
}

/// Every flag in words, and what follows from it.
pub(super) fn flags(subjects: &[Subject<'_>]) -> Section {
    let mut rows = Vec::new();
    let mut meanings = BTreeMap::new();
    for subject in subjects {
        for cell in &subject.summary.cells {
            for flag in &cell.flags {
                let name = flag_name(flag);
                rows.push(vec![format!("#{} {}", subject.number, cell.key), describe(flag)]);
                meanings.insert(name.replace('_', " "), consequence(&name));
            }
        }
    }
    if rows.is_empty() {
        return Section { id: "flags", title: "Flags", blocks: vec![Block::text("No cell is flagged.")] };
    }
    let meanings = meanings.into_iter().map(|(name, meaning)| format!("{name}: {meaning}"));
    let blocks = vec![
        Block::Bullets { items: meanings.collect() },
        Block::Table(Table {
            caption: "Flagged cells".to_owned(),
            columns: ["cell", "flag"].map(str::to_owned).to_vec(),
            rows,
            is_text: true,
            is_folded: false,
        }),
    ];
    Section { id: "flags", title: "Flags", blocks }
}

/// As the JSON summary names it.
fn flag_name(flag: &crate::analysis::Flag) -> String {
    let value = serde_json::to_value(flag).unwrap_or_default();
    value["kind"].as_str().unwrap_or_default().to_owned()
}

const DEFINITIONS: [(&str, &str); 14] = [
    (
        "tok/s",
        "tokens visible in the windows ÷ the windows' time; input tokens for prefill, output tokens elsewhere",
    ),
    ("±", "half the distance between the slowest and the fastest run ÷ the rate over all runs"),
    ("TTFT", "time to first token: first token visible − intended arrival"),
    ("ITL", "inter-token latency: each gap between consecutive output tokens of a request"),
    ("TPOT", "time per output token: (last token − first token) ÷ (output tokens − 1), per request"),
    ("E2E", "request latency: last token visible − intended arrival"),
    ("step", "how long a forward pass kept the device busy"),
    (
        "p50, p90, p99",
        "the value that this share of the observations did not exceed; missing below 5, 29 and 299 observations",
    ),
    ("tok/s/user", "1 ÷ mean TPOT of the cell's requests"),
    ("MBU", "(weights + keys and values, in bytes) ÷ time ÷ the bandwidth measured in the same run"),
    ("MFU", "flops ÷ time ÷ the matmul peak measured in the same run"),
    ("flop/byte", "MFU × matmul peak ÷ (MBU × bandwidth)"),
    ("tok/J", "tokens ÷ joules over all windows; gross, idle power included"),
    ("per Mtok", "busy device-hour × devices × 10⁶ ÷ (tokens per second × 3600)"),
];

pub(super) fn definitions() -> Section {
    let table = Table {
        caption: "What the numbers mean; METHODOLOGY.md says more".to_owned(),
        columns: ["name", "definition"].map(str::to_owned).to_vec(),
        rows: DEFINITIONS.map(|(name, meaning)| vec![name.to_owned(), meaning.to_owned()]).to_vec(),
        is_text: true,
        is_folded: false,
    };
    Section { id: "definitions", title: "Definitions", blocks: vec![Block::Table(table)] }
}
