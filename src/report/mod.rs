//! Summaries as people and programs read them. Computes nothing: what is printed stands in [`crate::analysis`].

mod calibration;
mod data;
mod markdown;
mod plan;
mod table;

pub use calibration::{calibration, groups};
pub use data::{csv, json, jsonl};
pub use markdown::{document, section};
pub use plan::{findings, plan};
pub use table::table;

use std::collections::BTreeSet;

use crate::analysis::{CellSummary, Flag, Quantiles, Summary, TokenKind};
use crate::record::Maybe;
use crate::units::{format_ns, format_significant};

/// Stands where a number could not be had; the line under the table says why.
const DASH: &str = "–";

/// Column titles of the table and of the Markdown report.
fn titles(currency: &Maybe<String>) -> Vec<String> {
    let money = currency.value().map_or("tok/$".to_owned(), |code| format!("tok/{code}"));
    ["cell", "tok/s", "±", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "MBU", "MFU", "tok/J"]
        .into_iter()
        .map(str::to_owned)
        .chain([money])
        .collect()
}

/// One cell as texts under [`titles`].
fn row(cell: &CellSummary) -> Vec<String> {
    let rate = cell.throughput.value();
    let tokens = rate.map_or(DASH.to_owned(), |rate| {
        let kind = match rate.tokens {
            TokenKind::Input => "in",
            TokenKind::Output => "out",
        };
        format!("{} {kind}", format_significant(rate.tokens_per_s))
    });
    let spread = rate
        .and_then(|rate| rate.spread_ratio.value())
        .map_or(DASH.to_owned(), |ratio| format!("{:.1} %", ratio * 100.0));
    let quantile = |quantiles: &Maybe<Quantiles>, pick: fn(&Quantiles) -> &Maybe<f64>| {
        let value = quantiles.value().and_then(|quantiles| pick(quantiles).value().copied());
        value.map_or(DASH.to_owned(), format_ns)
    };
    let number =
        |value: &Maybe<f64>| value.value().map_or(DASH.to_owned(), |value| format_significant(*value));
    vec![
        if cell.flags.is_empty() { cell.key.clone() } else { format!("{} !", cell.key) },
        tokens,
        spread,
        quantile(&cell.ttft, |quantiles| &quantiles.p50_ns),
        quantile(&cell.ttft, |quantiles| &quantiles.p99_ns),
        quantile(&cell.tpot, |quantiles| &quantiles.p50_ns),
        quantile(&cell.tpot, |quantiles| &quantiles.p99_ns),
        percent(&cell.mbu_share),
        percent(&cell.mfu_share),
        number(&cell.tokens_per_joule),
        number(&cell.tokens_per_money),
    ]
}

fn percent(share: &Maybe<f64>) -> String {
    share.value().map_or(DASH.to_owned(), |share| format!("{:.1} %", share * 100.0))
}

/// Why there are dashes, what the prices are, and what is flagged: one line each.
fn notes(summary: &Summary) -> Vec<String> {
    let cells = &summary.cells;
    let mut notes: Vec<String> =
        summary.prices.value().map(|prices| format!("· prices: {prices}")).into_iter().collect();
    let reason_of = |value: &Maybe<f64>| match value {
        Maybe::Missing(missing) => Some(missing.missing.clone()),
        Maybe::Value(_) => None,
    };
    let latencies = |pick: fn(&CellSummary) -> &Maybe<Quantiles>| -> Vec<String> {
        cells
            .iter()
            .flat_map(|cell| match pick(cell) {
                Maybe::Missing(missing) => vec![missing.missing.clone()],
                Maybe::Value(quantiles) => {
                    [&quantiles.p50_ns, &quantiles.p99_ns].into_iter().filter_map(reason_of).collect()
                }
            })
            .collect()
    };
    for (what, reasons) in [
        ("TTFT", latencies(|cell| &cell.ttft)),
        ("TPOT", latencies(|cell| &cell.tpot)),
        ("MBU", cells.iter().filter_map(|cell| reason_of(&cell.mbu_share)).collect()),
        ("MFU", cells.iter().filter_map(|cell| reason_of(&cell.mfu_share)).collect()),
        ("tok/J", cells.iter().filter_map(|cell| reason_of(&cell.tokens_per_joule)).collect()),
        ("price", cells.iter().filter_map(|cell| reason_of(&cell.tokens_per_money)).collect()),
    ] {
        let reasons: BTreeSet<String> = reasons.iter().map(|reason| explain(reason)).collect();
        if !reasons.is_empty() {
            let words: Vec<String> = reasons.into_iter().collect();
            notes.push(format!("{DASH} {what}: {}", words.join("; ")));
        }
    }
    for cell in cells {
        notes.extend(cell.flags.iter().map(|flag| format!("! {}: {}", cell.key, describe(flag))));
    }
    notes
}

/// Reason codes in words; a code without words is shown as it is.
fn explain(reason: &str) -> String {
    match reason {
        "no_sensor" => "no power sensor".to_owned(),
        "no_price" => "no price given (--price-per-gpu-hour, --cost)".to_owned(),
        "prefill_not_timed" => "decode cells do not time the prefill".to_owned(),
        "one_output_token" => "prefill cells make one token".to_owned(),
        "fake_engine" => "the engine is scripted".to_owned(),
        "cache_resident" => "the working set is below 8 × the last-level cache".to_owned(),
        "memory_too_small" => "too little free memory for the probe of its bandwidth".to_owned(),
        "requests_cross_the_window" => "requests of serving cells cross the window's edges".to_owned(),
        "not_recorded" => "the record is of a version that did not measure it".to_owned(),
        "no_run" => "not measured".to_owned(),
        "needs_5_observations" => "p50 needs 5 observations".to_owned(),
        "needs_299_observations" => "p99 needs 299 observations".to_owned(),
        other => other.replace('_', " "),
    }
}

fn describe(flag: &Flag) -> String {
    match flag {
        Flag::Failed { error } => format!("failed: {error}"),
        Flag::Skipped { why } => format!("skipped: {why}"),
        Flag::Interrupted => "interrupted; the runs before are kept".to_owned(),
        Flag::NotQuiet { foreign_share, steal_share } => format!(
            "not quiet: other processes took up to {:.1} % of the cores, the hypervisor {:.1} %",
            foreign_share * 100.0,
            steal_share * 100.0
        ),
        Flag::Unsustainable => "unsustainable: requests arrived faster than they were served".to_owned(),
        Flag::Unfinished { requests } => format!("{requests} requests were not finished within the drain"),
        Flag::AboveCeiling { mbu_share, mfu_share } => format!(
            "above the device's own ceiling (MBU {}, MFU {}): the ceiling or the count is wrong",
            percent(mbu_share),
            percent(mfu_share)
        ),
        Flag::CheckFailed { check, detail } => format!("check {check} failed: {detail}"),
    }
}
