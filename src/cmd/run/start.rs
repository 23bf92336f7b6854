//! Builds the engine that the choices name, with just the memory that its largest cell needs.

use std::sync::atomic::{AtomicBool, Ordering};

use super::choices::{Choices, Subject};
use super::model::{self, Opened};
use super::view::View;
use crate::arch::Config;
use crate::backend::cuda::is_device_error;
use crate::backend::peaks::Protocol;
use crate::backend::{Backend, Cpu, Cuda, Shape};
use crate::clock::Clock;
use crate::cmd::device::{self, Target};
use crate::cmd::model::{config_of, name_of};
use crate::cmd::{Interrupted, bad_file, usage};
use crate::engine::{
    Engine, EngineLimits, FakeEngine, FakeScript, LlmEngine, check_batch_fits, pages_for, pages_needed,
};
use crate::machine::{Roots, host_memory};
use crate::model::{Model, shape_of};
use crate::record::{Ceilings, Maybe, WeightsRecord, WeightsSource, Workload};

/// Time for each probe of the device, ns.
const PROBE_NS: u64 = 150_000_000;
/// No repetition of a probe begins later, ns.
const PROBES_NS: u64 = 2_500_000_000;
/// Sequences that an open loop may have in the engine at once.
const OPEN_LOOP_BATCH: usize = 64;

/// An engine ready to measure, and what it was made of.
pub(super) struct Started {
    pub(super) engine: Box<dyn Engine>,
    pub(super) clock: Clock,
    pub(super) model_name: String,
    pub(super) config: Config,
    pub(super) weights: WeightsRecord,
    pub(super) load_ns: u64,
    pub(super) ceilings: Maybe<Vec<Ceilings>>,
    /// Why the record is none of this machine's speed.
    pub(super) not_a_measurement: Option<String>,
}

/// # Errors
/// When the model cannot be had or a cell does not fit it; nothing was measured then.
pub(super) fn start(choices: &Choices, stop: &AtomicBool, view: &View) -> anyhow::Result<Started> {
    match choices.subject {
        Subject::Script(ref script) => start_fake(choices, script),
        Subject::Model(Target::Cpu(dtype)) => {
            start_llm(choices, stop, view, |shape| Ok(Cpu::new(shape, dtype)), |_| None)
        }
        Subject::Model(Target::Cuda { index, options }) => start_llm(
            choices,
            stop,
            view,
            |shape| Cuda::new(index, shape, options),
            device::not_a_measurement,
        ),
    }
}

fn start_fake(choices: &Choices, script: &FakeScript) -> anyhow::Result<Started> {
    let config = config_of(&choices.model)?;
    let clock = Clock::scripted();
    let limits = limits(choices, &config, None)?;
    let engine = FakeEngine::new(script.clone(), limits, config.vocab_size, clock.clone()).map_err(usage)?;
    Ok(Started {
        engine: Box::new(engine),
        clock,
        model_name: name_of(&choices.model),
        config,
        weights: WeightsRecord {
            source: WeightsSource::Synthetic { seed: 0 },
            format: "none".to_owned(),
            stored_bytes: Default::default(),
            files: Vec::new(),
        },
        load_ns: 0,
        ceilings: Maybe::missing("fake_engine"),
        not_a_measurement: Some("fake engine: step times come from a script".to_owned()),
    })
}

fn start_llm<B: Backend + 'static>(
    choices: &Choices,
    stop: &AtomicBool,
    view: &View,
    make: impl FnOnce(Shape) -> anyhow::Result<B>,
    not_a_measurement: impl FnOnce(&B) -> Option<String>,
) -> anyhow::Result<Started> {
    device::start_threads(choices.threads)?;
    let clock = Clock::monotonic();
    let Opened { name, weights, record } = model::open_model(choices, view)?;
    let begin_ns = clock.now_ns();
    let config = weights.config().clone();
    let mut backend = make(shape_of(&config))?;
    let not_a_measurement = not_a_measurement(&backend);
    let limits = limits(choices, &config, Some(backend.page_bytes()))?;
    let bar = view.bytes("loading weights", record.stored_bytes.values().sum());
    let model = Model::load(&mut backend, weights.as_ref(), &mut |bytes| bar.inc(bytes))
        .map_err(|error| if is_device_error(&error) { error } else { bad_file(error) })?;
    bar.finish_and_clear();
    drop(weights);
    let load_ns = clock.now_ns() - begin_ns;
    let ceilings = ceilings(&mut backend, &clock, choices.subject.to_string())?;
    if stop.load(Ordering::Relaxed) {
        return Err(Interrupted.into());
    }
    let begin_ns = clock.now_ns();
    let engine = Box::new(LlmEngine::new(backend, model, limits, clock.clone())?);
    let load_ns = load_ns + (clock.now_ns() - begin_ns);
    let ceilings = Maybe::Value(vec![ceilings]);
    Ok(Started {
        engine,
        clock,
        model_name: name,
        config,
        weights: record,
        load_ns,
        ceilings,
        not_a_measurement,
    })
}

/// What the device can do at most, while the memory of keys and values is still free.
fn ceilings<B: Backend>(backend: &mut B, clock: &Clock, device: String) -> anyhow::Result<Ceilings> {
    let protocol = Protocol {
        clock: clock.clone(),
        probe_ns: PROBE_NS,
        deadline_ns: clock.now_ns() + PROBES_NS,
        host: host_memory(&Roots::default()),
        arithmetic_only: false,
    };
    Ok(Ceilings { device, ..backend.ceilings(&protocol)? })
}

/// What the engine must hold for every cell. `page_bytes` is given where `--kv-memory` can bound it.
fn limits(choices: &Choices, config: &Config, page_bytes: Option<u64>) -> anyhow::Result<EngineLimits> {
    let (mut max_batch, mut max_context, mut pages) = (1, 1, 1);
    for cell in &choices.cells {
        let (prompt, output) = cell.lengths();
        let tokens = prompt as usize + output as usize;
        if tokens > config.max_position_embeddings {
            return Err(usage(format!(
                "cell {}: {prompt} prompt tokens and {output} output tokens exceed the model's context of {} tokens",
                cell.key(),
                config.max_position_embeddings
            )));
        }
        let batch = sequences(cell);
        max_batch = max_batch.max(batch);
        max_context = max_context.max(tokens);
        pages = pages.max(batch * pages_needed(tokens));
    }
    let mut limits = EngineLimits { max_batch, chunk: choices.chunk, pages, max_context };
    if let (Some(memory_bytes), Some(page_bytes)) = (choices.kv_memory_bytes, page_bytes) {
        limits.pages =
            pages_for(memory_bytes, page_bytes).map_err(|error| usage(format!("--kv-memory: {error}")))?;
        for cell in choices.cells.iter().filter(|cell| cell.static_batch().is_some()) {
            let (prompt, output) = cell.lengths();
            check_batch_fits(limits.pages, page_bytes, sequences(cell), (prompt + output) as usize)
                .map_err(|error| usage(format!("cell {}: --kv-memory: {error}", cell.key())))?;
        }
    }
    Ok(limits)
}

fn sequences(cell: &Workload) -> usize {
    match *cell {
        Workload::ServeClosed { concurrency, .. } => concurrency as usize,
        Workload::ServeOpen { .. } => OPEN_LOOP_BATCH,
        _ => cell.static_batch().unwrap_or(1) as usize,
    }
}
