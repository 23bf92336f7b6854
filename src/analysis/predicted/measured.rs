//! What files say of a device's steps and operations, in one form: the file that `peaks --ops --out` writes, or a record.

use serde::Deserialize;

use super::file::Products;
use crate::analysis::{CellSummary, Quantiles, summarize};
use crate::record::{Ceiling, Ceilings, Kernels, Maybe, Record, Workload};

/// A file, as far as it can be laid beside a prediction.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Where it was read.
    pub file: String,
    pub not_a_measurement: Option<String>,
    pub device_name: Maybe<String>,
    pub model: String,
    pub compute_dtype: String,
    pub kernels: Maybe<Kernels>,
    /// What computed products of more than 64 rows.
    pub products: Maybe<Products>,
    pub ceilings: Maybe<Ceilings>,
    pub times: Vec<MeasuredTime>,
    /// What in the file no step is predicted for, and why.
    pub left_out: Vec<String>,
}

/// How long one operation, or a whole step, took.
#[derive(Clone, Debug)]
pub struct MeasuredTime {
    pub step: String,
    /// Name of the operation; none: the whole step.
    pub op: Option<String>,
    pub time_ns: Maybe<f64>,
    /// What the operation reads and writes at least, where the file says it.
    pub bytes: Option<u64>,
    /// How it differs from what is predicted.
    pub remark: Option<String>,
}

/// The part of the file of `tokmeter peaks` that is needed here.
#[derive(Deserialize)]
struct Peaks {
    device_name: String,
    #[serde(default)]
    not_a_measurement: Option<String>,
    ceilings: Ceilings,
    #[serde(default)]
    ops: Option<Ops>,
}

#[derive(Deserialize)]
struct Ops {
    model: String,
    compute_dtype: String,
    #[serde(default)]
    kernels: Option<Kernels>,
    times: Vec<OpTime>,
}

#[derive(Deserialize)]
struct OpTime {
    step: String,
    op: String,
    time_ns: Maybe<Ceiling>,
    replayed_ns: Maybe<Ceiling>,
    bytes: u64,
}

/// Whether the text is what `tokmeter peaks` writes, which names no schema.
pub fn is_peaks(text: &str) -> bool {
    #[derive(Deserialize)]
    struct Marks {
        #[serde(rename = "device_name")]
        _device_name: String,
        #[serde(rename = "ceilings")]
        _ceilings: serde::de::IgnoredAny,
        #[serde(rename = "methods")]
        _methods: serde::de::IgnoredAny,
    }
    serde_json::from_str::<Marks>(text).is_ok()
}

/// # Errors
/// One sentence: the text is no file of `peaks --ops`.
pub fn parse_peaks(file: String, text: &str) -> Result<Measured, String> {
    let peaks: Peaks = serde_json::from_str(text).map_err(|error| format!("is no file of peaks: {error}"))?;
    let ops = peaks.ops.ok_or("has no operations, expected what peaks --ops --out writes")?;
    let by = peaks.ceilings.matmul_flops_per_s.get(&ops.compute_dtype);
    let products = match by {
        Some(Maybe::Value(ceiling)) if ceiling.by == "cublaslt" => Maybe::Value(Products::Cublaslt),
        Some(Maybe::Value(_)) => Maybe::Value(Products::Own),
        Some(Maybe::Missing(missing)) => Maybe::Missing(missing.clone()),
        None => Maybe::missing("no_ceiling_of_this_type"),
    };
    Ok(Measured {
        file,
        not_a_measurement: peaks.not_a_measurement,
        device_name: Maybe::Value(peaks.device_name),
        model: ops.model,
        compute_dtype: ops.compute_dtype,
        kernels: ops.kernels.map_or_else(|| Maybe::missing("not_recorded"), Maybe::Value),
        products,
        ceilings: Maybe::Value(peaks.ceilings),
        times: ops.times.into_iter().map(time_of).collect(),
        left_out: Vec::new(),
    })
}

/// Decode steps are predicted as they are replayed, prompts as they are queued.
fn time_of(time: OpTime) -> MeasuredTime {
    let taken = if time.step.starts_with("decode/") { time.replayed_ns } else { time.time_ns };
    MeasuredTime {
        step: time.step,
        op: Some(time.op),
        time_ns: taken.map(|ceiling| ceiling.value),
        bytes: Some(time.bytes),
        remark: None,
    }
}

/// The decode and prefill cells of a record.
pub fn of_record(file: String, record: &Record) -> Measured {
    let engine = &record.engine;
    let gpu = record.machine.gpus.iter().find(|gpu| format!("cuda:{}", gpu.index) == engine.device);
    let ceilings = match &record.ceilings {
        Maybe::Value(all) => all
            .iter()
            .find(|ceilings| ceilings.device == engine.device)
            .map_or_else(|| Maybe::missing("no_ceilings"), |ceilings| Maybe::Value(ceilings.clone())),
        Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
    };
    let mut measured = Measured {
        file,
        not_a_measurement: record.not_a_measurement.clone(),
        device_name: gpu.map_or_else(|| Maybe::Value(engine.device.clone()), |gpu| gpu.name.clone()),
        model: record.model.name.clone(),
        compute_dtype: engine.compute_dtype.clone(),
        kernels: engine.kernels.clone(),
        products: match &engine.cublaslt {
            Maybe::Value(_) => Maybe::Value(Products::Cublaslt),
            Maybe::Missing(missing) if missing.missing == "not_recorded" => Maybe::missing("not_recorded"),
            Maybe::Missing(_) => Maybe::Value(Products::Own),
        },
        ceilings,
        times: Vec::new(),
        left_out: Vec::new(),
    };
    let summary = summarize(record);
    for (cell, summary) in record.cells.iter().zip(&summary.cells) {
        match step_of(&cell.workload, summary, engine.chunk_tokens) {
            Ok(time) => measured.times.push(time),
            Err(reason) => measured.left_out.push(format!("{}: {reason}", cell.key)),
        }
    }
    measured
}

fn step_of(workload: &Workload, summary: &CellSummary, chunk_tokens: u32) -> Result<MeasuredTime, String> {
    let median = |quantiles: &Maybe<Quantiles>| match quantiles {
        Maybe::Value(quantiles) => quantiles.p50_ns.clone(),
        Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
    };
    let whole = |step: String, time_ns: Maybe<f64>, remark: Option<String>| MeasuredTime {
        step,
        op: None,
        time_ns,
        bytes: None,
        remark,
    };
    match *workload {
        Workload::Decode { batch, depth, osl } => {
            let grows = (osl > 1).then(|| {
                let (first, last) = (u64::from(depth) + 1, u64::from(depth) + u64::from(osl));
                format!("its context grows from {first} to {last} tokens, predicted at {first}")
            });
            Ok(whole(format!("decode/b{batch}/d{depth}"), median(&summary.step), grows))
        }
        Workload::Prefill { batch, isl } if u64::from(batch) * u64::from(isl) > u64::from(chunk_tokens) => {
            Err(format!("its prompts take several steps of {chunk_tokens} tokens, predicted in one"))
        }
        Workload::Prefill { batch, isl } => {
            Ok(whole(format!("prefill/b{batch}/i{isl}"), median(&summary.step), None))
        }
        _ => Err("steps of such a load are mixed, and none is predicted".to_owned()),
    }
}
