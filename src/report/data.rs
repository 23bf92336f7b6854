//! Summaries for programs: JSON, one JSON line per cell, CSV.

use serde::Serialize;

use crate::analysis::{CellSummary, Quantiles, Summary, summarize};
use crate::record::{Maybe, Record};

/// # Errors
/// When a number cannot be written as JSON.
pub fn json(summary: &Summary) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(summary)? + "\n")
}

/// The summaries of several records, in their order.
///
/// # Errors
/// When a number cannot be written as JSON.
pub fn json_list(records: &[Record]) -> serde_json::Result<String> {
    let summaries: Vec<Summary> = records.iter().map(summarize).collect();
    Ok(serde_json::to_string_pretty(&summaries)? + "\n")
}

/// A cell with what it belongs to, so that lines of several records can be put together.
#[derive(Serialize)]
struct Line<'a> {
    model: &'a str,
    device: &'a str,
    backend: &'a str,
    compute_dtype: &'a str,
    started_at: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_a_measurement: &'a Option<String>,
    #[serde(flatten)]
    cell: &'a CellSummary,
}

/// # Errors
/// When a number cannot be written as JSON.
pub fn jsonl(summary: &Summary) -> serde_json::Result<String> {
    let mut text = String::new();
    for cell in &summary.cells {
        let line = Line {
            model: &summary.model,
            device: &summary.device,
            backend: &summary.backend,
            compute_dtype: &summary.compute_dtype,
            started_at: &summary.started_at,
            not_a_measurement: &summary.not_a_measurement,
            cell,
        };
        text.push_str(&serde_json::to_string(&line)?);
        text.push('\n');
    }
    Ok(text)
}

/// One line per cell; an empty field is a missing value. Fields hold no commas or quotes except the model's name,
/// which is quoted.
pub fn csv(summary: &Summary) -> String {
    let latencies = ["ttft", "itl", "tpot", "e2e", "step"];
    let mut titles: Vec<String> = [
        "model",
        "device",
        "backend",
        "compute_dtype",
        "cell",
        "runs",
        "tokens",
        "tokens_per_s",
        "spread_ratio",
        "total_tokens_per_s",
    ]
    .map(str::to_owned)
    .to_vec();
    for latency in latencies {
        titles.extend(["count", "p50_ns", "p90_ns", "p99_ns"].map(|part| format!("{latency}_{part}")));
    }
    titles.extend(
        [
            "mbu_share",
            "mfu_share",
            "tokens_per_joule",
            "joules_per_token",
            "power_w",
            "energy_uncertainty_ratio",
            "net_tokens_per_joule",
            "tokens_per_money",
            "currency",
            "flags",
        ]
        .map(str::to_owned),
    );
    let mut text = titles.join(",") + "\n";
    for cell in &summary.cells {
        text.push_str(&csv_fields(summary, cell).join(","));
        text.push('\n');
    }
    text
}

fn csv_fields(summary: &Summary, cell: &CellSummary) -> Vec<String> {
    let rate = cell.throughput.value();
    let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    let tokens = rate.map_or("", |rate| match rate.tokens {
        crate::analysis::TokenKind::Input => "input",
        crate::analysis::TokenKind::Output => "output",
    });
    let mut fields = vec![
        format!("\"{}\"", summary.model.replace('"', "\"\"")),
        summary.device.clone(),
        summary.backend.clone(),
        summary.compute_dtype.clone(),
        cell.key.clone(),
        cell.runs.to_string(),
        tokens.to_owned(),
        number(rate.map(|rate| rate.tokens_per_s)),
        number(rate.and_then(|rate| rate.spread_ratio.value().copied())),
        number(rate.map(|rate| rate.total_tokens_per_s)),
    ];
    for quantiles in [&cell.ttft, &cell.itl, &cell.tpot, &cell.e2e, &cell.step] {
        fields.extend(quantile_fields(quantiles));
    }
    fields.push(number(cell.mbu_share.value().copied()));
    fields.push(number(cell.mfu_share.value().copied()));
    let energy = &cell.energy;
    for value in [
        &energy.tokens_per_joule,
        &energy.joules_per_token,
        &energy.power_w,
        &energy.energy_uncertainty_ratio,
        &energy.net_tokens_per_joule,
    ] {
        fields.push(number(value.value().copied()));
    }
    fields.push(number(cell.tokens_per_money.value().copied()));
    fields.push(summary.currency.value().cloned().unwrap_or_default());
    fields.push(cell.flags.len().to_string());
    fields
}

fn quantile_fields(quantiles: &Maybe<Quantiles>) -> [String; 4] {
    let Some(quantiles) = quantiles.value() else { return Default::default() };
    let number = |value: &Maybe<f64>| value.value().map_or(String::new(), f64::to_string);
    [
        quantiles.count.to_string(),
        number(&quantiles.p50_ns),
        number(&quantiles.p90_ns),
        number(&quantiles.p99_ns),
    ]
}
