//! One line per cell with everything that follows from it, for spreadsheets and data frames; lines of several records
//! stand together. RFC 4180 with a header; an empty field is a missing value. Units end the columns' names: `_s`, `_ms`,
//! `_us`, `_w`, `_share` (a fraction of 1).

use serde_json::Value;

use super::windows::{EnergySums, Sums, is_measured};
use super::{About, Exported, Refusal, Source, subject};
use crate::analysis::{CellCost, CellSummary, Quantiles, summarize};
use crate::record::{Cell, Maybe, Record, Workload};

pub(super) const ABOUT: About = About {
    name: "csv",
    made_from: "records",
    consumer: "RFC 4180 with a header: spreadsheets, pandas, DuckDB, one's own planner",
    source: "RFC 4180; the csv module of Python 3",
    settings: &[],
    fields: &[
        ("file, record_sha256", "the record, and its hash over canonical JSON"),
        ("not_a_measurement", "the record's own reason, else empty"),
        ("tool_version, started_at", "tool.version, started_at"),
        ("model, weights, compute_dtype", "model.name, model.weights.format, engine.compute_dtype"),
        ("device, backend, devices", "the driver's or kernel's name, engine.backend, how many the cell used"),
        ("cell, kind", "the cell's key and its first word"),
        ("batch, concurrency, request_rate_per_s", "the cell's load; empty where the kind has none"),
        ("isl_tokens, osl_tokens, depth_tokens", "the cell's lengths, per request"),
        ("runs, measured_s", "runs, and the seconds of all their windows"),
        (
            "input_tokens_per_s, output_tokens_per_s, total_tokens_per_s",
            "tokens over measured_s, all devices",
        ),
        ("spread_ratio", "half the distance between the slowest and the fastest run, over the rate"),
        (
            "ttft_mean_ms, ttft_p50_ms, ttft_p90_ms, ttft_p99_ms",
            "milliseconds, over all requests of all runs",
        ),
        ("itl_mean_ms, itl_p50_ms, itl_p90_ms, itl_p99_ms", "the same of each gap between tokens"),
        ("tpot_mean_ms, tpot_p50_ms, tpot_p90_ms, tpot_p99_ms", "the same, a value per request"),
        ("e2e_mean_ms, e2e_p50_ms, e2e_p90_ms, e2e_p99_ms", "the same, from arrival to last token"),
        ("step_mean_us, step_p50_us", "microseconds of a forward pass"),
        ("power_w, power_tdp_share", "energy over metered time; the same over the devices' published TDP"),
        (
            "joules_per_input_token, joules_per_output_token",
            "all energy over the tokens between the same readings",
        ),
        ("energy_uncertainty_ratio", "what the readings leave open, over the energy"),
        ("mbu_share, mfu_share", "of the ceilings measured in the same run"),
        ("cost_per_mtok_input, cost_per_mtok_output, currency", "the record's cost model; empty without one"),
        ("flags", "remarks on the cell, separated by semicolons"),
    ],
};

pub(super) fn export(sources: &[Source<'_>]) -> Result<Exported, Refusal> {
    let mut text = line(columns().into_iter().map(str::to_owned));
    for source in sources {
        for (summary, cell) in summarize(source.record).cells.iter().zip(&source.record.cells) {
            let fields = fields(source, summary, cell);
            text += &line(fields.into_iter());
        }
    }
    Ok(Exported { text, notes: Vec::new() })
}

/// The header, in the order of [`ABOUT`].
fn columns() -> Vec<&'static str> {
    ABOUT.fields.iter().flat_map(|(names, _)| names.split(", ")).collect()
}

fn line(fields: impl Iterator<Item = String>) -> String {
    let quoted = |field: String| match field.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field,
    };
    fields.map(quoted).collect::<Vec<_>>().join(",") + "\n"
}

/// Names of the remarks on a cell, as in JSON.
pub(super) fn flag_names(summary: &CellSummary) -> Vec<String> {
    let kind = |flag| serde_json::to_value(flag).ok()?.get("kind").and_then(Value::as_str).map(str::to_owned);
    summary.flags.iter().filter_map(kind).collect()
}

fn fields(source: &Source<'_>, summary: &CellSummary, cell: &Cell) -> Vec<String> {
    let record = source.record;
    let mut fields = vec![
        source.file.to_owned(),
        source.sha256.clone(),
        record.not_a_measurement.clone().unwrap_or_default(),
        record.tool.version.clone(),
        record.started_at.clone(),
        record.model.name.clone(),
        record.model.weights.format.clone(),
        record.engine.compute_dtype.clone(),
        subject::device_name(record).to_owned(),
        record.engine.backend.clone(),
        cell.devices.len().to_string(),
        cell.key.clone(),
        cell.key.split('/').next().unwrap_or_default().to_owned(),
    ];
    fields.extend(load(&cell.workload));
    fields.push(cell.runs.len().to_string());
    let sums = Sums::of(&cell.runs).filter(|_| is_measured(cell));
    fields.extend(rates(sums.as_ref()));
    fields.push(number(summary.throughput.value().and_then(|rate| rate.spread_ratio.value().copied())));
    for quantiles in [&summary.ttft, &summary.itl, &summary.tpot, &summary.e2e] {
        fields.extend(milliseconds(quantiles));
    }
    fields.extend(microseconds(&summary.step));
    fields.extend(energy(record, cell, summary));
    fields.extend([&summary.mbu_share, &summary.mfu_share].map(|share| number(share.value().copied())));
    fields.extend(cost(record, &summary.cost));
    fields.push(flag_names(summary).join(";"));
    fields
}

fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

fn load(workload: &Workload) -> [String; 6] {
    let (mut batch, mut concurrency, mut rate, mut depth) = (None, None, None, None);
    let (mut isl, mut osl) = (None, None);
    match *workload {
        Workload::Prefill { batch: b, isl: i } => (batch, isl) = (Some(b), Some(i)),
        Workload::Decode { batch: b, depth: d, osl: o } => (batch, depth, osl) = (Some(b), Some(d), Some(o)),
        Workload::Generate { batch: b, isl: i, osl: o } => (batch, isl, osl) = (Some(b), Some(i), Some(o)),
        Workload::ServeClosed { concurrency: c, isl: i, osl: o, .. } => {
            (concurrency, isl, osl) = (Some(c), Some(i), Some(o));
        }
        Workload::ServeOpen { request_rate_per_s, isl: i, osl: o, .. } => {
            (rate, isl, osl) = (Some(request_rate_per_s), Some(i), Some(o));
        }
    }
    let count = |count: Option<u32>| number(count.map(f64::from));
    [count(batch), count(concurrency), number(rate), count(isl), count(osl), count(depth)]
}

fn rates(sums: Option<&Sums>) -> [String; 4] {
    let rate = |tokens: fn(&Sums) -> f64| number(sums.map(|sums| tokens(sums) / sums.seconds));
    [
        number(sums.map(|sums| sums.seconds)),
        rate(|sums| sums.tokens_in),
        rate(|sums| sums.tokens_out),
        rate(|sums| sums.tokens_in + sums.tokens_out),
    ]
}

fn milliseconds(quantiles: &Maybe<Quantiles>) -> [String; 4] {
    let Some(found) = quantiles.value() else { return Default::default() };
    let ms = |ns: Option<f64>| number(ns.map(|ns| ns / 1e6));
    [
        ms(Some(found.mean_ns)),
        ms(found.p50_ns.value().copied()),
        ms(found.p90_ns.value().copied()),
        ms(found.p99_ns.value().copied()),
    ]
}

fn microseconds(step: &Maybe<Quantiles>) -> [String; 2] {
    let Some(found) = step.value() else { return Default::default() };
    [number(Some(found.mean_ns / 1e3)), number(found.p50_ns.value().map(|ns| ns / 1e3))]
}

fn energy(record: &Record, cell: &Cell, summary: &CellSummary) -> [String; 5] {
    let Ok(sums) = EnergySums::of(cell) else { return Default::default() };
    let tdp_w = subject::sheet(record).and_then(|(_, sheet)| sheet.tdp_w);
    let devices = cell.devices.len().max(1) as f64;
    let per = |tokens: f64| number((tokens > 0.0).then(|| sums.joules / tokens));
    [
        number(Some(sums.power_w())),
        number(tdp_w.map(|tdp_w| sums.power_w() / (tdp_w * devices))),
        per(sums.tokens_in),
        per(sums.tokens_out),
        number(summary.energy.energy_uncertainty_ratio.value().copied()),
    ]
}

fn cost(record: &Record, cost: &Maybe<CellCost>) -> [String; 3] {
    let Some(cost) = cost.value() else { return Default::default() };
    let currency = record.cost_model.value().map_or(String::new(), |model| model.currency.to_string());
    let [input, output] =
        [&cost.per_mtok_input, &cost.per_mtok_output].map(|price| number(price.value().copied()));
    [input, output, currency]
}
