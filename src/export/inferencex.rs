//! Rows of InferenceX's `agg_bmk.json`, one for each closed-loop cell on a GPU. Latencies are seconds, `tput_per_gpu`
//! counts prompt and output tokens together, energies are joules of the GPU boards. Container image, recipe fingerprint
//! and InferenceX's own short name of the model are not ours to give and are left out.

use serde_json::{Map, Value, json};

use super::windows::{EnergySums, Sums, measured_with_summary};
use super::{About, Exported, Refusal, Source, as_json, subject};
use crate::analysis::{CellSummary, Quantiles, summarize};
use crate::record::{Cell, Maybe, Record, Workload};

/// Version of the meaning of power fields: all joules are of the whole deployment.
const POWER_METRIC_SCHEMA_VERSION: u32 = 2;

pub(super) const ABOUT: About = About {
    name: "inferencex",
    made_from: "records with serve-closed cells on a GPU",
    consumer: "rows of agg_bmk.json (single node): InferenceX, InferenceX-app's ingest",
    source: "github SemiAnalysisAI/InferenceX at 843c6254, utils/process_result.py, utils/aggregate_power.py; \
             SemiAnalysisAI/InferenceX-app, packages/db/src/etl/benchmark-mapper.ts at 00f37ac0",
    settings: &[],
    fields: &[
        ("hw", "the spec sheet's name (h100, gb200, …); else what the driver says, and a note"),
        ("conc", "the cell's concurrency"),
        ("model", "model.name"),
        ("framework", "tokmeter: our engine, no other's"),
        ("precision", "engine.compute_dtype; f16 as fp16, f32 as fp32"),
        ("spec_decoding, disagg, is_multinode", "none, false, false"),
        ("isl, osl", "the cell's lengths"),
        ("tp, pp, dcp_size, pcp_size, ep, dp_attention", "the cell's devices, 1, 1, 1, 1, \"false\""),
        ("tput_per_gpu", "input and output tokens per second and GPU"),
        ("input_tput_per_gpu, output_tput_per_gpu", "tokens per second and GPU"),
        ("mean_ttft, median_ttft, p90_ttft, p99_ttft", "s; the same for tpot, itl and e2el"),
        ("mean_intvty, median_intvty, p90_intvty, p99_intvty", "1 / the TPOT of the same name"),
        ("power_metric_schema_version", "2, where there is an energy reading"),
        (
            "power_valid",
            "1 when every window has NVML energy of the GPU boards alone and no doubt; else 0 and no energy fields",
        ),
        ("power_invalid_reasons", "why it is 0"),
        ("avg_power_w, avg_total_gpu_power_w", "W per GPU, and of all the cell's GPUs"),
        ("total_gpu_energy_j", "J: that power over the windows' whole time"),
        ("joules_per_successful_query", "total_gpu_energy_j over the requests that finished in the windows"),
        (
            "joules_per_input_token, joules_per_output_token, joules_per_total_token",
            "all energy over the tokens between the same readings",
        ),
    ],
};

pub(super) fn export(sources: &[Source<'_>]) -> Result<Exported, Refusal> {
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for source in sources {
        let record = source.record;
        let Some(hw) = hardware(record) else {
            return Err(source.refuse(format!(
                "ran on {}, and InferenceX compares GPUs\nhint: tokmeter run --device cuda:0",
                record.engine.device
            )));
        };
        if subject::sheet(record).is_none() {
            notes.push(format!("{}: InferenceX-app may not know the hardware {hw}", source.file));
        }
        let summary = summarize(record);
        for (cell, summary) in measured_with_summary(record, &summary) {
            if let Workload::ServeClosed { concurrency, isl, osl, .. } = cell.workload {
                rows.push(row(record, cell, summary, &hw, (concurrency, isl, osl)));
            }
        }
    }
    if rows.is_empty() {
        return Err(Refusal(
            "no serve-closed cell: inferencex is made from closed loops\n\
             hint: tokmeter run --concurrency 4,16 --isl 1024 --osl 1024"
                .to_owned(),
        ));
    }
    notes.push(
        "image, recipe_fingerprint and infmax_model_prefix are left out: add the names that InferenceX has for them"
            .to_owned(),
    );
    Ok(Exported { text: as_json(&rows)?, notes })
}

/// InferenceX's key where the GPU has a spec sheet, else the driver's name.
fn hardware(record: &Record) -> Option<String> {
    let name = subject::gpu_name(record)?;
    Some(
        subject::sheet(record)
            .map_or_else(|| name.to_lowercase().replace(' ', "_"), |(key, _)| key.to_owned()),
    )
}

fn precision(compute_dtype: &str) -> &str {
    match compute_dtype {
        "f16" => "fp16",
        "f32" => "fp32",
        other => other,
    }
}

fn row(
    record: &Record,
    cell: &Cell,
    summary: &CellSummary,
    hw: &str,
    (conc, isl, osl): (u32, u32, u32),
) -> Map<String, Value> {
    let mut row = Map::new();
    let mut put = |name: &str, value: Value| {
        row.insert(name.to_owned(), value);
    };
    let gpus = cell.devices.len().max(1);
    put("hw", json!(hw));
    put("conc", json!(conc));
    put("model", json!(record.model.name));
    put("framework", json!("tokmeter"));
    put("precision", json!(precision(&record.engine.compute_dtype)));
    put("spec_decoding", json!("none"));
    put("disagg", json!(false));
    put("is_multinode", json!(false));
    put("isl", json!(isl));
    put("osl", json!(osl));
    put("tp", json!(gpus));
    for name in ["pp", "dcp_size", "pcp_size", "ep"] {
        put(name, json!(1));
    }
    put("dp_attention", json!("false"));
    if let Some(sums) = Sums::of(&cell.runs) {
        let per_gpu = |tokens: f64| json!(tokens / sums.seconds / gpus as f64);
        put("tput_per_gpu", per_gpu(sums.tokens_in + sums.tokens_out));
        put("output_tput_per_gpu", per_gpu(sums.tokens_out));
        put("input_tput_per_gpu", per_gpu(sums.tokens_in));
    }
    for (name, quantiles) in
        [("ttft", &summary.ttft), ("tpot", &summary.tpot), ("itl", &summary.itl), ("e2el", &summary.e2e)]
    {
        for (statistic, seconds) in statistics_s(quantiles) {
            put(&format!("{statistic}_{name}"), json!(seconds));
            if name == "tpot" && seconds > 0.0 {
                put(&format!("{statistic}_intvty"), json!(1.0 / seconds));
            }
        }
    }
    power(record, cell).into_iter().for_each(|(name, value)| put(name, value));
    row
}

fn statistics_s(quantiles: &Maybe<Quantiles>) -> Vec<(&'static str, f64)> {
    let Some(found) = quantiles.value() else { return Vec::new() };
    let known = |name, value: &Maybe<f64>| value.value().map(|ns| (name, ns / 1e9));
    std::iter::once(("mean", found.mean_ns / 1e9))
        .chain(known("median", &found.p50_ns))
        .chain(known("p90", &found.p90_ns))
        .chain(known("p99", &found.p99_ns))
        .collect()
}

/// Power fields; none without a reading, and only the verdict where the reading is in doubt.
fn power(record: &Record, cell: &Cell) -> Vec<(&'static str, Value)> {
    let Ok(energy) = EnergySums::of(cell) else { return Vec::new() };
    let Some(sums) = Sums::of(&cell.runs) else { return Vec::new() };
    let mut fields = vec![("power_metric_schema_version", json!(POWER_METRIC_SCHEMA_VERSION))];
    let reasons = invalid_reasons(record, &energy);
    fields.push(("power_valid", json!(u8::from(reasons.is_empty()))));
    if !reasons.is_empty() {
        fields.push(("power_invalid_reasons", json!(reasons)));
        return fields;
    }
    let total_energy_j = energy.power_w() * sums.seconds;
    fields.push(("avg_power_w", json!(energy.power_w() / cell.devices.len().max(1) as f64)));
    fields.push(("avg_total_gpu_power_w", json!(energy.power_w())));
    fields.push(("total_gpu_energy_j", json!(total_energy_j)));
    for (name, joules, count) in [
        ("joules_per_successful_query", total_energy_j, sums.requests_completed),
        ("joules_per_input_token", energy.joules, energy.tokens_in),
        ("joules_per_output_token", energy.joules, energy.tokens_out),
        ("joules_per_total_token", energy.joules, energy.tokens_in + energy.tokens_out),
    ] {
        if count > 0.0 {
            fields.push((name, json!(joules / count)));
        }
    }
    fields
}

/// InferenceX takes GPU-board energy only, and withholds it all where there is any doubt.
fn invalid_reasons(record: &Record, energy: &EnergySums) -> Vec<String> {
    let mut reasons: Vec<String> = energy.doubts.iter().cloned().collect();
    if record
        .meter
        .source
        .value()
        .is_none_or(|source| !source.starts_with("nvml_") || source == "nvml_module")
    {
        reasons.push("not_read_by_nvml".to_owned());
    }
    if record.meter.scope.value().is_none_or(|scope| scope != "gpu") {
        reasons.push("scope_is_not_the_gpu_board".to_owned());
    }
    reasons
}
