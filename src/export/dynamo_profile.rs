//! Dynamo's profiling data as the Kubernetes ConfigMap that its profiler makes: `prefill_raw_data.json` and
//! `decode_raw_data.json`, each a JSON text. Times are milliseconds, throughputs per GPU: of prompt tokens in prefill, of
//! output tokens in decode. The planner starts its regressions from it, the mocker simulates workers by it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::windows::{Sums, measured};
use super::{About, Exported, Refusal, Source, as_json};
use crate::record::{Cell, Run, Workload};

/// Prompt lengths below which Dynamo's profiler saves nothing.
const FEWEST_LENGTHS: usize = 3;
/// Observations that the planner's regressions want at least.
const FEWEST_OBSERVATIONS: usize = 5;

pub(super) const ABOUT: About = About {
    name: "dynamo-profile",
    made_from: "records with decode cells and with prefill cells of batch 1, all of one model and device",
    consumer: "ConfigMap planner-profile-data with prefill_raw_data.json and decode_raw_data.json: Dynamo's SLA planner and mocker",
    source: "Python package ai-dynamo 1.6.1, dynamo/planner/monitoring/perf_metrics.py, dynamo/profiler/utils/dgd_generation.py",
    settings: &[],
    fields: &[
        ("apiVersion, kind, metadata.name", "v1, ConfigMap, planner-profile-data"),
        ("prefill_isl", "tokens: isl of each prefill cell of batch 1"),
        ("prefill_ttft", "ms: windows over passes; the first token is visible at a pass's end"),
        ("prefill_thpt_per_gpu", "prompt tokens per second and GPU: isl over that time"),
        ("x_kv_usage", "batch · context over max_kv_tokens, 0 to 1"),
        ("y_context_length", "tokens: depth + (osl + 1) / 2, the mean over the steps"),
        ("z_itl", "ms: windows over steps"),
        ("z_thpt_per_gpu", "output tokens per second and GPU: batch over that time"),
        (
            "max_kv_tokens",
            "engine.kv_pages · engine.page_size_tokens: what the engine held, maybe not all that fits",
        ),
    ],
};

#[derive(Serialize)]
struct ConfigMap {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'static str,
    metadata: Metadata,
    data: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Metadata {
    name: &'static str,
    annotations: BTreeMap<&'static str, String>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Prefill {
    prefill_isl: Vec<u32>,
    prefill_ttft: Vec<f64>,
    prefill_thpt_per_gpu: Vec<f64>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Decode {
    x_kv_usage: Vec<f64>,
    y_context_length: Vec<f64>,
    z_itl: Vec<f64>,
    z_thpt_per_gpu: Vec<f64>,
    max_kv_tokens: u64,
}

/// Cells by key with all their runs.
type Cells<'a> = BTreeMap<&'a str, (&'a Cell, Vec<&'a Run>)>;

pub(super) fn export(sources: &[Source<'_>]) -> Result<Exported, Refusal> {
    let cells = merged(sources);
    let prefill = prefill(&cells);
    if prefill.prefill_isl.len() < FEWEST_LENGTHS {
        return Err(Refusal(format!(
            "{} prompt lengths at batch 1: dynamo-profile needs at least {FEWEST_LENGTHS}\n\
             hint: tokmeter run --suite calibration measures them",
            prefill.prefill_isl.len()
        )));
    }
    let max_kv_tokens = max_kv_tokens(sources);
    let decode = decode(&cells, max_kv_tokens);
    if decode.z_itl.is_empty() || max_kv_tokens == 0 {
        return Err(Refusal(
            "no decode cell: dynamo-profile needs prefill and decode\n\
             hint: tokmeter run --suite calibration measures both"
                .to_owned(),
        ));
    }
    if let Some(usage) = decode.x_kv_usage.iter().find(|usage| **usage > 1.0) {
        return Err(Refusal(format!(
            "a decode cell used {usage} times the {max_kv_tokens} tokens that the engine held, expected at most once\n\
             hint: tokmeter validate says what else is wrong with the record"
        )));
    }
    let notes = too_few(&[("prefill", prefill.prefill_isl.len()), ("decode", decode.z_itl.len())]);
    let hashes: Vec<&str> = sources.iter().map(|source| source.sha256.as_str()).collect();
    let map = ConfigMap {
        api_version: "v1",
        kind: "ConfigMap",
        metadata: Metadata {
            name: "planner-profile-data",
            annotations: BTreeMap::from([("tokmeter/records-sha256", hashes.join(","))]),
        },
        data: BTreeMap::from([
            ("prefill_raw_data.json", as_json(&prefill)?),
            ("decode_raw_data.json", as_json(&decode)?),
        ]),
    };
    Ok(Exported { text: as_json(&map)?, notes })
}

/// The cells of all records together, so that one that was visited several times is one point.
fn merged<'a>(sources: &'a [Source<'a>]) -> Cells<'a> {
    let mut cells = Cells::new();
    for cell in sources.iter().flat_map(|source| measured(source.record)) {
        cells.entry(cell.key.as_str()).or_insert_with(|| (cell, Vec::new())).1.extend(&cell.runs);
    }
    cells
}

/// The most that an engine of the records held, so that no usage exceeds 1.
fn max_kv_tokens(sources: &[Source<'_>]) -> u64 {
    let held = |source: &Source<'_>| {
        let engine = &source.record.engine;
        u64::from(engine.kv_pages) * u64::from(engine.page_size_tokens)
    };
    sources.iter().map(held).max().unwrap_or(0)
}

fn prefill(cells: &Cells<'_>) -> Prefill {
    let mut points: Vec<(u32, f64, usize)> = cells
        .values()
        .filter_map(|(cell, runs)| match cell.workload {
            Workload::Prefill { batch: 1, isl } => {
                Some((isl, Sums::of(runs.iter().copied())?.pass_s()?, cell.devices.len().max(1)))
            }
            _ => None,
        })
        .collect();
    points.sort_by_key(|(isl, ..)| *isl);
    let mut prefill = Prefill::default();
    for (isl, seconds, gpus) in points {
        prefill.prefill_isl.push(isl);
        prefill.prefill_ttft.push(seconds * 1e3);
        prefill.prefill_thpt_per_gpu.push(f64::from(isl) / seconds / gpus as f64);
    }
    prefill
}

fn decode(cells: &Cells<'_>, max_kv_tokens: u64) -> Decode {
    let mut decode = Decode { max_kv_tokens, ..Decode::default() };
    for (cell, runs) in cells.values() {
        let Workload::Decode { batch, depth, osl } = cell.workload else { continue };
        let Some(seconds) = Sums::of(runs.iter().copied()).and_then(|sums| sums.step_s()) else { continue };
        let context = f64::from(depth) + (f64::from(osl) + 1.0) / 2.0;
        decode.x_kv_usage.push(f64::from(batch) * context / max_kv_tokens as f64);
        decode.y_context_length.push(context);
        decode.z_itl.push(seconds * 1e3);
        decode.z_thpt_per_gpu.push(f64::from(batch) / seconds / cell.devices.len().max(1) as f64);
    }
    decode
}

fn too_few(phases: &[(&str, usize)]) -> Vec<String> {
    phases
        .iter()
        .filter(|(_, count)| *count < FEWEST_OBSERVATIONS)
        .map(|(phase, count)| {
            format!(
                "{phase}: {count} points, and the planner fits nothing to fewer than {FEWEST_OBSERVATIONS}"
            )
        })
        .collect()
}
