//! Summaries as people and programs read them. Computes nothing: what is printed stands in [`crate::analysis`].

mod calibration;
mod comparison;
mod data;
mod html;
mod markdown;
mod plan;
mod plan_markdown;
mod predicted;
mod table;
mod words;

pub use calibration::{calibration, groups};
pub use comparison::{comparison_json, comparison_markdown, comparison_table};
pub use data::{csv, json, json_list, jsonl};
pub use html::{comparison_page, page, plan_page, predicted_page};
pub use markdown::{document, section};
pub use plan::{findings, plan};
pub use plan_markdown::plan_markdown;
pub use predicted::{predicted_json, predicted_markdown};
pub use table::table;

use std::collections::BTreeSet;

use crate::analysis::{CellSummary, Distance, Figure, Flag, Quantiles, Summary, TokenKind};
use crate::record::{Maybe, Steady};
use crate::units::{format_ns, format_significant};

/// Stands where a number could not be had; the line under the table says why.
const DASH: &str = "–";

/// Column titles of the table and of the Markdown report.
fn titles(summary: &Summary) -> Vec<String> {
    let money = summary.currency.value().map_or("tok/$".to_owned(), |code| format!("tok/{code}"));
    let joules: &[&str] = if has_energy(summary) { &["tok/J", "J/tok", "W"] } else { &["tok/J"] };
    ["cell", "tok/s", "±", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "MBU", "MFU"]
        .iter()
        .chain(joules)
        .map(|title| (*title).to_owned())
        .chain([money])
        .collect()
}

/// Some cell has energy: without any, one column of dashes says so.
fn has_energy(summary: &Summary) -> bool {
    summary.cells.iter().any(|cell| cell.energy.power_w.value().is_some())
}

/// One cell as texts under [`titles`].
fn row(summary: &Summary, cell: &CellSummary) -> Vec<String> {
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
    let mut row = vec![
        if cell.flags.is_empty() { cell.key.clone() } else { format!("{} !", cell.key) },
        tokens,
        spread,
        quantile(&cell.ttft, |quantiles| &quantiles.p50_ns),
        quantile(&cell.ttft, |quantiles| &quantiles.p99_ns),
        quantile(&cell.tpot, |quantiles| &quantiles.p50_ns),
        quantile(&cell.tpot, |quantiles| &quantiles.p99_ns),
        percent(&cell.mbu_share),
        percent(&cell.mfu_share),
        number(&cell.energy.tokens_per_joule),
    ];
    if has_energy(summary) {
        row.extend([number(&cell.energy.joules_per_token), number(&cell.energy.power_w)]);
    }
    row.push(number(&cell.tokens_per_money));
    row
}

fn percent(share: &Maybe<f64>) -> String {
    share.value().map_or(DASH.to_owned(), |share| format!("{:.1} %", share * 100.0))
}

/// What stands under a table, one line each: remarks, published figures, flags.
fn notes(summary: &Summary) -> Vec<String> {
    let mut notes = remarks(summary);
    for cell in &summary.cells {
        notes.extend(cell.anchors.iter().map(|distance| format!("≈ {}: {}", cell.key, against(distance))));
    }
    for cell in &summary.cells {
        notes.extend(cell.flags.iter().map(|flag| format!("! {}: {}", cell.key, describe(flag))));
    }
    notes
}

/// Why there are dashes, and what the prices are.
fn remarks(summary: &Summary) -> Vec<String> {
    let cells = &summary.cells;
    let mut notes: Vec<String> =
        summary.prices.value().map(|prices| format!("· prices: {prices}")).into_iter().collect();
    if has_energy(summary) {
        let from = summary.energy_from.value().map_or("unknown", String::as_str);
        notes.push(format!("· tok/J, J/tok, W: from {from}; gross, idle power included"));
    }
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
        ("tok/J", cells.iter().filter_map(|cell| reason_of(&cell.energy.tokens_per_joule)).collect()),
        ("price", cells.iter().filter_map(|cell| reason_of(&cell.tokens_per_money)).collect()),
    ] {
        let reasons: BTreeSet<String> = reasons.iter().map(|reason| explain(reason)).collect();
        if !reasons.is_empty() {
            let words: Vec<String> = reasons.into_iter().collect();
            notes.push(format!("{DASH} {what}: {}", words.join("; ")));
        }
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
        "not_asked" => "no power sensor asked for (--power)".to_owned(),
        "no_nvml" => "no NVML library".to_owned(),
        "no_powercap" => "no power sensor of the CPU".to_owned(),
        "rapl_permission" => "no permission to read the CPU's energy (tokmeter doctor says how)".to_owned(),
        "short_window" => "the window is too short for the sensor (--min-seconds 10)".to_owned(),
        "no_run" => "not measured".to_owned(),
        "needs_5_observations" => "p50 needs 5 observations".to_owned(),
        "needs_299_observations" => "p99 needs 299 observations".to_owned(),
        other => other.replace('_', " "),
    }
}

/// A published figure, ours, and the difference.
fn against(distance: &Distance) -> String {
    format!(
        "anchor {}: {} {}, ours {}, {}",
        distance.anchor,
        format_significant(distance.published),
        figure_unit(distance.figure),
        format_significant(distance.ours),
        percent_difference(distance)
    )
}

fn figure_unit(figure: Figure) -> &'static str {
    match figure {
        Figure::InputTokensPerS => "input tok/s",
        Figure::OutputTokensPerS => "output tok/s",
        Figure::OutputTokensPerSPerGpu => "output tok/s per GPU",
        Figure::JoulesPerToken => "J/tok",
    }
}

/// `−12 %`, and a remark where that is hardly possible.
fn percent_difference(distance: &Distance) -> String {
    let percent = format!("{:+.0} %", distance.difference_ratio * 100.0).replace('-', "−");
    let doubt = if distance.is_implausible() { "; more than 4 times apart, look for a mistake" } else { "" };
    format!("{percent}{doubt}")
}

fn class_in_words(class: Steady) -> &'static str {
    match class {
        Steady::Warmup => "still warming up, the window ends faster than it began",
        Steady::Slowdown => "slowing down, the window ends slower than it began",
        Steady::NoSteadyState => "the speed came and went",
        Steady::NotAssessed => "not assessed",
        Steady::Steady => "steady",
        Steady::Unsustainable => "unsustainable",
    }
}

fn cause_in_words(cause: &str) -> &str {
    match cause {
        "power_cap" => "the power limit",
        "heat" => "heat",
        "heat_hardware" => "heat (the hardware's own limit)",
        "hardware_slowdown" => "the hardware",
        "power_brake" => "the power supply's brake",
        other => other,
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
        Flag::NotSteady { runs, classes } => {
            let words: Vec<&str> = classes.iter().map(|class| class_in_words(*class)).collect();
            let runs = if *runs == 1 { "1 run".to_owned() } else { format!("{runs} runs") };
            format!("not steady in {runs}: {}", words.join("; "))
        }
        Flag::Throttled { share, causes } => {
            let causes: Vec<&str> = causes.iter().map(|cause| cause_in_words(cause)).collect();
            let share = share
                .value()
                .map_or(String::new(), |share| format!(" for up to {:.0} % of a window", share * 100.0));
            format!("throttled: clocks were held down{share} by {}", causes.join(", "))
        }
        Flag::Unfinished { requests } => format!("{requests} requests were not finished within the drain"),
        Flag::AboveCeiling { mbu_share, mfu_share } => format!(
            "above the device's own ceiling (MBU {}, MFU {}): the ceiling or the count is wrong",
            percent(mbu_share),
            percent(mfu_share)
        ),
        Flag::EnergyInDoubt { reasons } => {
            let words: Vec<String> = reasons.iter().map(|reason| explain(reason)).collect();
            format!("energy in doubt: {}", words.join("; "))
        }
        Flag::CheckFailed { check, detail } => format!("check {check} failed: {detail}"),
    }
}
