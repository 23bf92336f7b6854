//! Every value that the cells lack and why: raw ones from the record, and those that follow from them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::analysis::curves::{roofline_point, tokens_per_s_per_user};
use crate::analysis::{CellSummary, Quantiles};
use crate::record::{Cell, Maybe};
use crate::report::words::reason_in_words;

use super::content::{Block, Section, Table};
use super::environment::{missing, readable_name};
use super::subject::Subject;

/// Keys of cells that are listed; of more, the number is said.
const MOST_KEYS: usize = 6;

/// What is missing and why → the cells that lack it.
type Gaps = BTreeMap<(String, String), BTreeSet<String>>;

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let (mut raw, mut derived) = (Gaps::new(), Gaps::new());
    for subject in subjects {
        for (cell, summary) in subject.cells() {
            let key = format!("#{} {}", subject.number, cell.key);
            for (name, reason) in raw_gaps(cell) {
                raw.entry((name, reason)).or_default().insert(key.clone());
            }
            for (name, reason) in derived_gaps(subject, cell, summary) {
                derived.entry((name.to_owned(), reason)).or_default().insert(key.clone());
            }
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

fn table(caption: &str, gaps: Gaps, all: usize) -> Block {
    if gaps.is_empty() {
        return Block::text(format!("{caption}: none is missing."));
    }
    let row = |((name, reason), keys): ((String, String), BTreeSet<String>)| {
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
fn raw_gaps(cell: &Cell) -> BTreeSet<(String, String)> {
    let mut gaps = BTreeSet::new();
    let mut cell = cell.clone();
    // Rows lack a time only where a request was not finished, which `unfinished` says; there may be very many.
    cell.runs.iter_mut().for_each(|run| run.requests.clear());
    collect("", &serde_json::to_value(cell).unwrap_or_default(), &mut gaps);
    gaps
}

fn collect(path: &str, value: &Value, gaps: &mut BTreeSet<(String, String)>) {
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

fn derived_gaps(subject: &Subject<'_>, cell: &Cell, summary: &CellSummary) -> Vec<(&'static str, String)> {
    let mut gaps = Vec::new();
    let mut note = |name: &'static str, reason: Option<&str>| {
        gaps.extend(reason.map(|reason| (name, reason.to_owned())));
    };
    note("tok/s", summary.throughput.reason());
    note("±", summary.throughput.value().and_then(|rate| rate.spread_ratio.reason()));
    let latencies: [(&str, [&'static str; 3], &Maybe<Quantiles>); 5] = [
        ("TTFT", ["TTFT p50", "TTFT p90", "TTFT p99"], &summary.ttft),
        ("ITL", ["ITL p50", "ITL p90", "ITL p99"], &summary.itl),
        ("TPOT", ["TPOT p50", "TPOT p90", "TPOT p99"], &summary.tpot),
        ("E2E", ["E2E p50", "E2E p90", "E2E p99"], &summary.e2e),
        ("step", ["step p50", "step p90", "step p99"], &summary.step),
    ];
    for (name, [p50, p90, p99], quantiles) in latencies {
        note(name, quantiles.reason());
        if let Maybe::Value(quantiles) = quantiles {
            note(p50, quantiles.p50_ns.reason());
            note(p90, quantiles.p90_ns.reason());
            note(p99, quantiles.p99_ns.reason());
        }
    }
    note("tok/s/user", tokens_per_s_per_user(summary).reason());
    note("MBU", summary.mbu_share.reason());
    note("MFU", summary.mfu_share.reason());
    note("place on the roofline", roofline_point(subject.record, cell).reason());
    note("tok/J", summary.energy.tokens_per_joule.reason());
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
