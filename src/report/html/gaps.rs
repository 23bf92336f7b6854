//! Every value that the cells lack and why: raw ones from the record, and those that follow from them.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde_json::Value;

use crate::analysis::CellSummary;
use crate::analysis::curves::{roofline_point, tokens_per_s_per_user};
use crate::record::{Cell, Maybe};
use crate::report::words::reason_in_words;

use super::content::{Block, Section, Table};
use super::environment::{missing, readable_name};
use super::subject::Subject;

/// Keys of cells that are listed; of more, the number is said.
const MOST_KEYS: usize = 6;

/// What is missing, and the code of the reason.
type Gap = (String, String);

/// The cells that lack it.
type Gaps = BTreeMap<Gap, BTreeSet<String>>;

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let (mut raw, mut derived) = (Gaps::new(), Gaps::new());
    for (key, in_cell, of_cell) in subjects.par_iter().flat_map_iter(of_subject).collect::<Vec<_>>() {
        for gap in in_cell {
            raw.entry(gap).or_default().insert(key.clone());
        }
        for gap in of_cell {
            derived.entry(gap).or_default().insert(key.clone());
        }
    }
    let all: usize = subjects.iter().map(|subject| subject.record.cells.len()).sum();
    let blocks = vec![
        Block::text(
            "A value that could not be had is missing with a reason: never zero, never an estimate. Those of the \
             environment stand with its fields.",
        ),
        table("Values that follow from the record", derived, all),
        table("Values of the cells, as the record has them", raw, all),
    ];
    Section { id: "missing", title: "Missing values", blocks }
}

/// The raw and the derived gaps of each cell.
fn of_subject(subject: &Subject<'_>) -> Vec<(String, BTreeSet<Gap>, Vec<Gap>)> {
    let of_cell = |(cell, summary): (&Cell, &CellSummary)| {
        (format!("#{} {}", subject.number, cell.key), raw_gaps(cell), derived_gaps(subject, summary))
    };
    subject.cells().map(of_cell).collect()
}

fn table(caption: &str, gaps: Gaps, all: usize) -> Block {
    if gaps.is_empty() {
        return Block::text(format!("{caption}: none is missing."));
    }
    let row = |((name, reason), keys): (Gap, BTreeSet<String>)| {
        vec![name, reason_in_words(&reason), listed(&keys, all)]
    };
    Block::Table(Table {
        caption: caption.to_owned(),
        columns: ["value", "why it is missing", "cells"].map(str::to_owned).to_vec(),
        rows: gaps.into_iter().map(row).collect(),
        is_text: true,
        is_folded: false,
    })
}

fn listed(keys: &BTreeSet<String>, all: usize) -> String {
    match keys.len() {
        count if count == all && all > 1 => format!("all {all}"),
        count if count > MOST_KEYS => format!("{count} of {all}"),
        _ => keys.iter().cloned().collect::<Vec<_>>().join(", "),
    }
}

/// Each missing field of a cell once, by its path without indices, and its reason.
fn raw_gaps(cell: &Cell) -> BTreeSet<Gap> {
    let mut gaps = BTreeSet::new();
    let mut cell = cell.clone();
    // Rows lack a time only where a request was not finished, which `unfinished` says; there may be very many.
    cell.runs.iter_mut().for_each(|run| run.requests.clear());
    collect("", &serde_json::to_value(cell).unwrap_or_default(), &mut gaps);
    gaps
}

fn collect(path: &str, value: &Value, gaps: &mut BTreeSet<Gap>) {
    match value {
        Value::Object(fields) => match missing(fields) {
            Some(reason) => {
                gaps.insert((readable_name(path), reason.to_owned()));
            }
            None => {
                for (name, value) in fields {
                    let name = if path.is_empty() { name.clone() } else { format!("{path} · {name}") };
                    collect(&name, value, gaps);
                }
            }
        },
        Value::Array(items) => items.iter().for_each(|item| collect(path, item, gaps)),
        _ => {}
    }
}

fn derived_gaps(subject: &Subject<'_>, summary: &CellSummary) -> Vec<Gap> {
    let mut gaps = Vec::new();
    let mut note = |name: &str, reason: Option<&str>| {
        gaps.extend(reason.map(|reason| (name.to_owned(), reason.to_owned())));
    };
    note("tok/s", summary.throughput.reason());
    note("±", summary.throughput.value().and_then(|rate| rate.spread_ratio.reason()));
    let latencies = [
        ("TTFT", &summary.ttft),
        ("ITL", &summary.itl),
        ("TPOT", &summary.tpot),
        ("E2E", &summary.e2e),
        ("step", &summary.step),
    ];
    for (name, quantiles) in latencies {
        note(name, quantiles.reason());
        if let Maybe::Value(quantiles) = quantiles {
            for (part, value) in
                [("p50", &quantiles.p50_ns), ("p90", &quantiles.p90_ns), ("p99", &quantiles.p99_ns)]
            {
                note(&format!("{name} {part}"), value.reason());
            }
        }
    }
    note("tok/s/user", tokens_per_s_per_user(summary).reason());
    note("MBU", summary.mbu_share.reason());
    note("MFU", summary.mfu_share.reason());
    note("place on the roofline", roofline_point(subject.record, summary).reason());
    note("tok/J", summary.energy.tokens_per_joule.reason());
    note("tok/J net of idle", summary.energy.net_tokens_per_joule.reason());
    note("tokens per unit of money", summary.tokens_per_money.reason());
    if let Maybe::Value(cost) = &summary.cost {
        note("cost of output tokens", cost.per_mtok_output.reason());
        note("cost of input tokens", cost.per_mtok_input.reason());
        note("cost of all tokens", cost.per_mtok_total.reason());
        note("cost of energy in output tokens", cost.energy_per_mtok_output.reason());
        note("cost of output tokens at 60 % use", cost.per_mtok_output_at[1].1.reason());
        note("cost of output tokens at 30 % use", cost.per_mtok_output_at[2].1.reason());
    }
    gaps
}
