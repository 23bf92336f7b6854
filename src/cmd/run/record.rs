//! Puts the record together around the measured cells.

use super::choices::{Choices, Subject};
use super::start::Started;
use crate::arch;
use crate::backend::PAGE_SIZE;
use crate::clock::{Clock, rfc3339_utc};
use crate::cmd::device::Target;
use crate::cmd::remark;
use crate::machine::{self, DriverLoad, Roots};
use crate::meter::nvml::Library;
use crate::meter::{Absent, PowerMeter};
use crate::record::machine::Machine;
use crate::record::{
    Command, Engine, Kernels, Maybe, Model, Record, SCHEMA, Session, Status, Tool, hold_out,
};

/// How long the machine is watched before the first cell.
const OBSERVED_NS: u64 = 400_000_000;

/// The record before the first cell.
pub(super) fn open(
    choices: &Choices,
    started: &Started,
    meter: &PowerMeter,
    nvml: &Result<Library, Absent>,
) -> Record {
    let roots = Roots::default();
    let machine = machine::capture(&roots, nvml);
    let interference = machine::observe(&roots, &started.clock, OBSERVED_NS);
    if let Some(sentence) = machine::warning(&interference) {
        remark(&format!("warning: {sentence}"));
    }
    Record {
        schema: SCHEMA.to_owned(),
        not_a_measurement: started.not_a_measurement.clone().or_else(|| replayed(meter)),
        tool: Tool { name: env!("CARGO_PKG_NAME").to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() },
        command: command(choices),
        started_at: rfc3339_utc(started.clock.unix_ns()),
        finished_at: Maybe::missing("running"),
        status: Status::Running,
        session: session(choices, &machine, &roots),
        machine,
        interference,
        model: Model {
            name: started.model_name.clone(),
            parameters: arch::parameters(&started.config),
            config: started.config.clone(),
            weights: started.weights.clone(),
        },
        engine: engine(choices, started),
        meter: meter.record(),
        cost_model: given(choices.cost_model.clone(), "no_price"),
        numerics: started.numerics.clone(),
        ceilings: started.ceilings.clone(),
        cells: Vec::new(),
    }
}

/// Only work on a GPU depends on its driver.
fn session(choices: &Choices, machine: &Machine, roots: &Roots) -> Session {
    let on_gpu = matches!(choices.subject, Subject::Model(Target::Cuda { .. }));
    let no_gpu = || Maybe::missing("no_gpu_in_use");
    let none = DriverLoad { at: no_gpu(), by: no_gpu() };
    let load = if on_gpu { machine::driver_load(roots) } else { none };
    Session {
        boot_id: machine.host.boot_id.clone(),
        driver_loaded_at: load.at,
        driver_loaded_by: load.by,
        label: given(choices.session.clone(), "not_given"),
    }
}

/// Brings what the engine says of itself up to date: it makes room, tunes products and captures graphs when they first
/// come up.
pub(super) fn update_engine(record: &mut Record, started: &Started) {
    let info = started.engine.info();
    record.engine.kernels = given(info.backend.kernels.map(Kernels::from), "no_gpu");
    record.engine.cublaslt = info.backend.cublaslt;
    record.engine.activations_bytes = info.memory.activations_bytes;
}

/// Energy from a trace that was played is nobody's.
fn replayed(meter: &PowerMeter) -> Option<String> {
    meter.is_replay().then(|| "power was replayed from a file".to_owned())
}

/// Marks the end. An interrupted record stays interrupted.
pub(super) fn close(record: &mut Record, clock: &Clock) {
    record.finished_at = Maybe::Value(rfc3339_utc(clock.unix_ns()));
    if record.status == Status::Running {
        record.status = Status::Complete;
    }
}

fn given<T>(value: Option<T>, reason: &str) -> Maybe<T> {
    value.map_or_else(|| Maybe::missing(reason), Maybe::Value)
}

fn command(choices: &Choices) -> Command {
    let seconds = |ns: u64| ns as f64 / 1e9;
    Command {
        argv: std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
        suite: given(choices.suite.clone(), "cells_on_command_line"),
        seed: choices.protocol.seed,
        repeat: choices.protocol.repeat,
        min_seconds: seconds(choices.protocol.min_window_ns),
        max_seconds: seconds(choices.protocol.max_window_ns),
        warmup_seconds: Maybe::Value(seconds(choices.protocol.warmup_ns)),
        steady: Maybe::Value(choices.protocol.steady),
        thermal: Maybe::Value(choices.thermal),
        planned_cells: choices.cells.iter().map(|cell| cell.key()).collect(),
        hold_out: Maybe::Value(hold_out(&choices.cells)),
    }
}

fn engine(choices: &Choices, started: &Started) -> Engine {
    let info = started.engine.info();
    Engine {
        name: info.name.to_owned(),
        backend: info.backend.name.to_owned(),
        device: choices.subject.to_string(),
        compute_dtype: info.backend.compute_dtype.to_owned(),
        kv_dtype: info.backend.kv_dtype.to_owned(),
        cublaslt: info.backend.cublaslt,
        threads: info.backend.threads as u32,
        max_batch: info.limits.max_batch as u32,
        chunk_tokens: info.limits.chunk as u32,
        page_size_tokens: PAGE_SIZE as u32,
        kv_pages: info.limits.pages as u32,
        max_context_tokens: info.limits.max_context as u32,
        weights_bytes: info.memory.weights_bytes,
        kv_bytes: info.memory.kv_bytes,
        activations_bytes: info.memory.activations_bytes,
        stop_tokens_ignored: true,
        sampling: "greedy".to_owned(),
        clock_overhead_ns: started.clock.overhead_ns(),
        load_ns: started.load_ns,
        kernels: given(info.backend.kernels.map(Kernels::from), "no_gpu"),
    }
}
