//! Dynamo's `ForwardPassMetrics`, version 1, as JSON lines: one for each run of a decode cell, and of a prefill cell whose
//! prompts fit one step. Times are seconds. A line is a mean over the run's identical steps, where Dynamo's own engines
//! report every step; Dynamo has no field for energy.

use serde::Serialize;

use super::windows::{Sums, measured};
use super::{About, Exported, Refusal, Source};
use crate::record::{Cell, Record, Workload};

/// What `ForwardPassMetrics.version` must be.
const VERSION: u32 = 1;
/// Observations that the consumers' regressions want of a phase at least.
const FEWEST: usize = 5;

pub(super) const ABOUT: About = About {
    name: "dynamo-fpm",
    made_from: "records with decode or prefill cells, all of one model and device",
    consumer: "ForwardPassMetrics v1, JSON lines: Dynamo's planner and AIConfigurator's forward-pass model",
    source: "Python package ai-dynamo 1.6.1, dynamo/common/forward_pass_metrics.py; Python package aiconfigurator-core 0.12.0, \
             RustForwardPassPerfModel",
    settings: &[],
    fields: &[
        ("version", "1"),
        ("worker_id", "tokmeter- and the first 12 digits of the record's hash"),
        ("dp_rank", "0: one replica"),
        ("counter_id", "lines of this file, from 0"),
        ("wall_time", "s: the run's windows over their steps, a mean"),
        ("scheduled_requests.num_prefill_requests", "the prefill cell's batch; else 0"),
        ("scheduled_requests.sum_prefill_tokens", "batch · isl"),
        ("scheduled_requests.var_prefill_length", "0: all prompts are of one length"),
        ("scheduled_requests.sum_prefill_kv_tokens", "0: whole prompts in one step"),
        ("scheduled_requests.num_decode_requests", "the decode cell's batch; else 0"),
        (
            "scheduled_requests.sum_decode_kv_tokens",
            "batch · (depth + (osl + 1) / 2), the mean over the steps, rounded",
        ),
        ("scheduled_requests.var_decode_kv_tokens", "0: all contexts are of one length"),
        ("queued_requests", "all 0: static cells queue nothing"),
    ],
};

#[derive(Serialize)]
struct ForwardPass {
    version: u32,
    worker_id: String,
    dp_rank: u32,
    counter_id: usize,
    wall_time: f64,
    scheduled_requests: Scheduled,
    queued_requests: Queued,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Scheduled {
    num_prefill_requests: u64,
    sum_prefill_tokens: u64,
    var_prefill_length: f64,
    sum_prefill_kv_tokens: u64,
    num_decode_requests: u64,
    sum_decode_kv_tokens: u64,
    var_decode_kv_tokens: f64,
}

#[derive(Default, Serialize)]
struct Queued {
    num_prefill_requests: u64,
    sum_prefill_tokens: u64,
    var_prefill_length: f64,
    num_decode_requests: u64,
    sum_decode_kv_tokens: u64,
    var_decode_kv_tokens: f64,
}

pub(super) fn export(sources: &[Source<'_>]) -> Result<Exported, Refusal> {
    let mut passes: Vec<ForwardPass> = Vec::new();
    let mut notes = Vec::new();
    for source in sources {
        for cell in measured(source.record) {
            let Some(scheduled) = scheduled(source.record, cell) else {
                if matches!(cell.workload, Workload::Prefill { .. }) {
                    notes.push(format!(
                        "{} of {} is left out: its prompts took several steps, which differ",
                        cell.key, source.file
                    ));
                }
                continue;
            };
            for wall_time in cell.runs.iter().filter_map(|run| Sums::of([run])?.step_s()) {
                passes.push(ForwardPass {
                    version: VERSION,
                    worker_id: format!("tokmeter-{}", source.id()),
                    dp_rank: 0,
                    counter_id: passes.len(),
                    wall_time,
                    scheduled_requests: scheduled,
                    queued_requests: Queued::default(),
                });
            }
        }
    }
    if passes.is_empty() {
        return Err(Refusal(
            "no forward pass: dynamo-fpm needs decode cells, or prefill cells whose prompts fit one step\n\
             hint: tokmeter run --suite calibration measures them"
                .to_owned(),
        ));
    }
    notes.extend(too_few(&passes));
    let lines: Result<Vec<String>, Refusal> = passes.iter().map(line).collect();
    Ok(Exported { text: lines?.concat(), notes })
}

fn line(pass: &ForwardPass) -> Result<String, Refusal> {
    match serde_json::to_string(pass) {
        Ok(text) => Ok(text + "\n"),
        Err(error) => Err(Refusal(format!("a number cannot be written as JSON: {error}"))),
    }
}

/// What each step of a cell computes; `None` where its steps differ or the cell is of another kind.
fn scheduled(record: &Record, cell: &Cell) -> Option<Scheduled> {
    match cell.workload {
        Workload::Decode { batch, depth, osl } => {
            let context = f64::from(depth) + (f64::from(osl) + 1.0) / 2.0;
            Some(Scheduled {
                num_decode_requests: u64::from(batch),
                sum_decode_kv_tokens: (f64::from(batch) * context).round() as u64,
                ..Scheduled::default()
            })
        }
        Workload::Prefill { batch, isl } => {
            let tokens = u64::from(batch) * u64::from(isl);
            let sums = Sums::of(&cell.runs)?;
            let is_one_step = sums.steps == sums.passes && tokens <= u64::from(record.engine.chunk_tokens);
            is_one_step.then_some(Scheduled {
                num_prefill_requests: u64::from(batch),
                sum_prefill_tokens: tokens,
                ..Scheduled::default()
            })
        }
        _ => None,
    }
}

/// Phases that have too few lines for a regression.
fn too_few(passes: &[ForwardPass]) -> Vec<String> {
    let is_decode = |pass: &&ForwardPass| pass.scheduled_requests.num_decode_requests > 0;
    let decode = passes.iter().filter(is_decode).count();
    [("decode", decode), ("prefill", passes.len() - decode)]
        .into_iter()
        .filter(|(_, count)| *count < FEWEST)
        .map(|(phase, count)| {
            format!("{phase}: {count} lines, and the planner fits nothing to fewer than {FEWEST}")
        })
        .collect()
}
