//! How near a cell came to its device: bytes and flops that its work needs at least, over its time, as shares of the
//! ceilings that the same run measured.
//!
//! `MBU = (weights + keys and values) / time / bandwidth`, `MFU = flops / time / matmul peak`. Weights count as
//! they lie on the device; of an embedding table that is not also the head nothing counts. Activations are left out:
//! caches hold them. The
//! bandwidth is the higher of those of reading and of copying.

use crate::arch::{self, Config};
use crate::record::{Ceilings, Cell, Maybe, Record, Workload};

/// A share above this cannot be: bytes, flops, time or ceiling is wrong. Most likely something disturbed the machine while
/// its ceiling was measured, which says nothing against the cell: it is flagged, and neither the run nor the file fails.
const MOST_SHARE: f64 = 1.02;
/// A cache may hold a working set that is not so many times as large.
const TIMES_CACHE: f64 = 8.0;

/// Shares of the device's ceilings.
#[derive(Clone, Debug, PartialEq)]
pub struct Utilization {
    /// Memory bandwidth utilisation.
    pub mbu_share: Maybe<f64>,
    /// Model flops utilisation.
    pub mfu_share: Maybe<f64>,
}

/// The shares of one cell; where the record does not determine one, why.
pub fn utilization(record: &Record, cell: &Cell) -> Utilization {
    let work = match Work::of(record, cell) {
        Ok(work) => work,
        Err(reason) => {
            return Utilization { mbu_share: Maybe::missing(reason), mfu_share: Maybe::missing(reason) };
        }
    };
    Utilization { mbu_share: mbu(record, cell, &work).into(), mfu_share: mfu(record, cell, &work).into() }
}

/// Whether a share says that something was counted or timed wrongly.
pub fn is_impossible(share: f64) -> bool {
    share > MOST_SHARE
}

/// What all windows of a cell did, as far as their steps are known.
struct Work {
    seconds: f64,
    /// Whole repetitions.
    passes: f64,
    steps: f64,
}

impl Work {
    fn of(record: &Record, cell: &Cell) -> Result<Work, &'static str> {
        if let Maybe::Missing(missing) = &record.ceilings {
            return Err(known_reason(&missing.missing));
        }
        if cell.workload.static_batch().is_none() {
            return Err("requests_cross_the_window");
        }
        if record.model.config.check().is_err() {
            return Err("shapes_not_supported");
        }
        let windows = || cell.runs.iter().flat_map(|run| &run.windows);
        let seconds = windows().map(|window| window.t1_ns.saturating_sub(window.t0_ns) as f64 / 1e9).sum();
        let work = Work {
            seconds,
            passes: windows().map(|window| window.passes as f64).sum(),
            steps: windows().map(|window| window.steps as f64).sum(),
        };
        if work.seconds > 0.0 && work.passes > 0.0 { Ok(work) } else { Err("no_run") }
    }
}

/// Reasons are few, and a foreign one in a file is not passed on.
fn known_reason(reason: &str) -> &'static str {
    match reason {
        "fake_engine" => "fake_engine",
        "not_recorded" => "not_recorded",
        _ => "no_ceilings",
    }
}

fn ceilings<'a>(record: &'a Record, cell: &Cell) -> Result<&'a Ceilings, &'static str> {
    let [device] = cell.devices.as_slice() else { return Err("not_one_device") };
    let all = record.ceilings.value().ok_or("no_ceilings")?;
    all.iter().find(|ceilings| ceilings.device == *device).ok_or("no_ceilings")
}

fn mfu(record: &Record, cell: &Cell, work: &Work) -> Result<f64, String> {
    let peak = positive(ceilings(record, cell)?.matmul_of(&record.engine.compute_dtype))?;
    Ok(work.passes * pass_flops(&record.model.config, &cell.workload) / work.seconds / peak)
}

fn positive(ceiling: Maybe<f64>) -> Result<f64, String> {
    match ceiling {
        Maybe::Value(value) if value > 0.0 => Ok(value),
        Maybe::Value(_) => Err("no_ceilings".to_owned()),
        Maybe::Missing(missing) => Err(missing.missing),
    }
}

/// Flops of one pass: every token once, whatever the steps.
fn pass_flops(config: &Config, workload: &Workload) -> f64 {
    // Flops of a decode step grow evenly with the context, so the mean of the first and the last is that of all.
    let decode = |batch: u32, depth: u32, steps: u32| {
        let at = |context: u32| arch::decode_step_flops(config, batch as usize, context as usize);
        let (first, last) = (depth.saturating_add(1), depth.saturating_add(steps));
        f64::from(steps) * (at(first) + at(last)) / 2.0
    };
    let prefill = |batch: u32, isl: u32| arch::prefill_flops(config, batch as usize, isl as usize);
    match *workload {
        Workload::Prefill { batch, isl } => prefill(batch, isl),
        Workload::Decode { batch, depth, osl } => decode(batch, depth, osl),
        Workload::Generate { batch, isl, osl } => {
            prefill(batch, isl) + decode(batch, isl, osl.saturating_sub(1))
        }
        Workload::ServeClosed { .. } | Workload::ServeOpen { .. } => 0.0,
    }
}

fn mbu(record: &Record, cell: &Cell, work: &Work) -> Result<f64, String> {
    let ceilings = ceilings(record, cell)?;
    let bandwidth = positive(ceilings.bandwidth_bytes_per_s())?;
    let Maybe::Value(cache_bytes) = ceilings.last_level_cache_bytes else {
        return Err("cache_size_unknown".to_owned());
    };
    let pass = PassBytes::of(record, &cell.workload, work)?;
    if pass.working_set < TIMES_CACHE * cache_bytes as f64 {
        return Err("cache_resident".to_owned());
    }
    Ok(work.passes * pass.moved / work.seconds / bandwidth)
}

/// Bytes of one pass.
struct PassBytes {
    moved: f64,
    /// What the largest step reads.
    working_set: f64,
}

impl PassBytes {
    fn of(record: &Record, workload: &Workload, work: &Work) -> Result<PassBytes, &'static str> {
        let weights = read_weights_bytes(record)?;
        let kv_bytes = kv_value_bytes(&record.engine.kv_dtype).ok_or("kv_dtype_unknown")?;
        let per_token = arch::kv_bytes_per_token(&record.model.config, kv_bytes) as f64;
        // Steps that each carry the whole batch; each reads all weights once and the keys and values of its contexts.
        let (batch, contexts) = match *workload {
            Workload::Prefill { batch, isl } => (batch, Contexts::of(isl, 1)),
            Workload::Decode { batch, depth, osl } => (batch, Contexts::of(depth.saturating_add(1), osl)),
            Workload::Generate { batch, isl, osl } => (batch, Contexts::of(isl, osl)),
            Workload::ServeClosed { .. } | Workload::ServeOpen { .. } => {
                return Err("requests_cross_the_window");
            }
        };
        if work.steps != work.passes * contexts.steps {
            return Err("prompts_took_several_steps");
        }
        let kv = f64::from(batch) * per_token;
        Ok(PassBytes {
            moved: contexts.steps * weights + kv * contexts.sum,
            working_set: weights + kv * contexts.largest,
        })
    }
}

/// The contexts of consecutive steps, which grow by one token each.
struct Contexts {
    steps: f64,
    sum: f64,
    largest: f64,
}

impl Contexts {
    fn of(first: u32, steps: u32) -> Self {
        let (first, steps) = (f64::from(first), f64::from(steps));
        let largest = first + steps - 1.0;
        Contexts { steps, sum: steps * (first + largest) / 2.0, largest }
    }
}

/// Bytes of one value of a key or value.
pub(super) fn kv_value_bytes(kv_dtype: &str) -> Option<usize> {
    match kv_dtype {
        "f32" => Some(4),
        "bf16" | "f16" => Some(2),
        _ => None,
    }
}

/// Bytes of weights that a step with the whole batch reads, as they lie on the device.
pub(super) fn read_weights_bytes(record: &Record) -> Result<f64, &'static str> {
    let (engine, config) = (&record.engine, &record.model.config);
    let all = engine.weights_bytes as f64;
    if config.tie_word_embeddings {
        return Ok(all);
    }
    let value_bytes = match engine.compute_dtype.as_str() {
        "f32" => 4.0,
        "bf16" | "f16" => 2.0,
        // Blocks of different tensors differ in size, and the record holds only their sum.
        _ => return Err("embedding_bytes_unknown"),
    };
    Ok((all - (config.vocab_size * config.hidden_size) as f64 * value_bytes).max(0.0))
}
