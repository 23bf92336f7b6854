//! Builds the engine that the choices name, with just the memory that its largest cell needs.

use std::sync::atomic::{AtomicBool, Ordering};

use super::choices::{Choices, Subject};
use super::model::{self, Opened};
use super::numerics;
use super::view::View;
use crate::arch::{self, Config};
use crate::backend::cuda::is_device_error;
use crate::backend::peaks::Protocol;
use crate::backend::{Backend, Cpu, Cuda, CudaOptions};
use crate::clock::Clock;
use crate::cmd::device::{self, Target};
use crate::cmd::model::{config_of, name_of};
use crate::cmd::{Interrupted, bad_file, usage};
use crate::engine::{
    Engine, EngineLimits, FakeEngine, FakeScript, LlmEngine, check_batch_fits, pages_for, pages_needed,
};
use crate::machine::{Roots, host_memory};
use crate::model::{Model, shape_of};
use crate::record::{Ceilings, Maybe, Numerics, WeightsRecord, WeightsSource, Workload};
use crate::units::format_bytes;
use crate::weights::Weights;

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
    /// Bytes of one page of keys and values; 0 where there are none.
    pub(super) page_bytes: u64,
    pub(super) numerics: Maybe<Numerics>,
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
            start_llm(choices, stop, view, |config| Ok(Cpu::new(shape_of(config), dtype)), |_| None)
        }
        Subject::Model(Target::Cuda { index, options }) => start_llm(
            choices,
            stop,
            view,
            |config| open_cuda(index, options, config),
            device::not_a_measurement,
        ),
    }
}

/// A device on which the model's weights fit.
fn open_cuda(index: u32, options: CudaOptions, config: &Config) -> anyhow::Result<Cuda> {
    let cuda = Cuda::new(index, shape_of(config), options)?;
    cuda.expect_room(arch::parameters(config) * size_of::<u16>() as u64, "the model")?;
    Ok(cuda)
}

fn start_fake(choices: &Choices, script: &FakeScript) -> anyhow::Result<Started> {
    let config = config_of(&choices.model)?;
    let clock = Clock::scripted();
    let limits = limits(choices, &config)?;
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
        page_bytes: 0,
        numerics: Maybe::missing("fake_engine"),
        ceilings: Maybe::missing("fake_engine"),
        not_a_measurement: Some("fake engine: step times come from a script".to_owned()),
    })
}

fn start_llm<B: Backend + 'static>(
    choices: &Choices,
    stop: &AtomicBool,
    view: &View,
    make: impl FnOnce(&Config) -> anyhow::Result<B>,
    not_a_measurement: impl FnOnce(&B) -> Option<String>,
) -> anyhow::Result<Started> {
    device::start_threads(choices.threads)?;
    let clock = Clock::monotonic();
    let numerics = numerics::look(choices, view)?;
    let Opened { name, weights, record } = model::open_model(choices, view)?;
    let config = weights.config().clone();
    let wanted = limits(choices, &config)?;
    let begin_ns = clock.now_ns();
    let (mut backend, model) = load(weights.as_ref(), make(&config)?, view)?;
    drop(weights);
    let loaded_ns = clock.now_ns() - begin_ns;
    if stop.load(Ordering::Relaxed) {
        return Err(Interrupted.into());
    }
    let not_a_measurement = not_a_measurement(&backend);
    let ceilings = Maybe::Value(vec![ceilings(&mut backend, &clock, choices.subject.to_string())?]);
    let begin_ns = clock.now_ns();
    let page_bytes = backend.page_bytes();
    let asked = asked_pages(choices, page_bytes)?;
    let limits = EngineLimits { pages: asked.unwrap_or(wanted.pages), ..wanted };
    let engine = Box::new(LlmEngine::new(backend, model, limits, clock.clone())?);
    expect_asked(asked, engine.as_ref(), page_bytes)?;
    check_given_cells(choices, engine.info().limits, page_bytes)?;
    let load_ns = loaded_ns + (clock.now_ns() - begin_ns);
    Ok(Started {
        engine,
        clock,
        model_name: name,
        config,
        weights: record,
        load_ns,
        page_bytes,
        ceilings,
        numerics,
        not_a_measurement,
    })
}

/// Brings the weights to the device.
fn load<B: Backend>(weights: &dyn Weights, mut backend: B, view: &View) -> anyhow::Result<(B, Model<B>)> {
    device::remark_products(&backend.info());
    let bar = view.bytes("loading weights", weights.info().stored_bytes.values().sum());
    let model = Model::load(&mut backend, weights, &mut |bytes| bar.inc(bytes))
        .map_err(|error| if is_device_error(&error) { error } else { bad_file(error) })?;
    bar.finish_and_clear();
    Ok((backend, model))
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

/// Pages that `--kv-memory` asks for.
fn asked_pages(choices: &Choices, page_bytes: u64) -> anyhow::Result<Option<usize>> {
    let pages = choices.kv_memory_bytes.map(|memory_bytes| pages_for(memory_bytes, page_bytes));
    pages.transpose().map_err(|error| usage(format!("--kv-memory: {error}")))
}

/// A memory that was asked for is not made smaller.
fn expect_asked(asked: Option<usize>, engine: &dyn Engine, page_bytes: u64) -> anyhow::Result<()> {
    let pages = engine.info().limits.pages;
    match asked {
        Some(asked) if pages < asked => Err(usage(format!(
            "--kv-memory: the device has room for {}, expected {}\nhint: leave --kv-memory out to take what is free",
            format_bytes(pages as u64 * page_bytes),
            format_bytes(asked as u64 * page_bytes)
        ))),
        _ => Ok(()),
    }
}

/// What the engine must hold for every cell that the model's context holds.
fn limits(choices: &Choices, config: &Config) -> anyhow::Result<EngineLimits> {
    let (mut max_batch, mut max_context, mut pages) = (0, 0, 0);
    let mut obstacle = None;
    for cell in &choices.cells {
        if let Some(why) = beyond_context(cell, config) {
            obstacle = Some(format!("cell {}: {why}", cell.key()));
            continue;
        }
        let batch = sequences(cell);
        max_batch = max_batch.max(batch);
        max_context = max_context.max(tokens(cell));
        pages = pages.max(batch * pages_needed(tokens(cell)));
    }
    match obstacle {
        // Cells that somebody asked for one by one, or a suite of which nothing is left.
        Some(why) if choices.suite.is_none() || max_batch == 0 => Err(usage(why)),
        _ => Ok(EngineLimits { max_batch, chunk: choices.chunk, pages, max_context }),
    }
}

/// Refuses batches given by their sizes that the cache cannot hold; a suite's cells are left out one by one instead.
fn check_given_cells(choices: &Choices, limits: EngineLimits, page_bytes: u64) -> anyhow::Result<()> {
    let given = choices.cells.iter().filter(|_| choices.suite.is_none());
    for cell in given.filter(|cell| cell.static_batch().is_some()) {
        if let Some(why) = beyond_cache(cell, limits, page_bytes) {
            let place = if choices.kv_memory_bytes.is_some() { "--kv-memory: " } else { "" };
            return Err(usage(format!("cell {}: {place}{why}", cell.key())));
        }
    }
    Ok(())
}

impl Started {
    /// Why a suite's cell cannot be measured with this model on this device.
    pub(super) fn obstacle(&self, choices: &Choices, cell: &Workload) -> Option<String> {
        choices.suite.as_ref()?;
        beyond_context(cell, &self.config)
            .or_else(|| beyond_cache(cell, self.engine.info().limits, self.page_bytes))
    }
}

fn beyond_context(cell: &Workload, config: &Config) -> Option<String> {
    let ((prompt, output), most) = (cell.lengths(), config.max_position_embeddings);
    (tokens(cell) > most).then(|| {
        format!(
            "{prompt} prompt tokens and {output} output tokens exceed the model's context of {most} tokens"
        )
    })
}

/// A static batch must be in the cache as a whole; of other cells one request is enough.
fn beyond_cache(cell: &Workload, limits: EngineLimits, page_bytes: u64) -> Option<String> {
    let batch = cell.static_batch().unwrap_or(1) as usize;
    check_batch_fits(limits.pages, page_bytes, batch, tokens(cell)).err().map(|error| error.to_string())
}

fn tokens(cell: &Workload) -> usize {
    let (prompt, output) = cell.lengths();
    prompt as usize + output as usize
}

fn sequences(cell: &Workload) -> usize {
    match *cell {
        Workload::ServeClosed { concurrency, .. } => concurrency as usize,
        Workload::ServeOpen { .. } => OPEN_LOOP_BATCH,
        _ => cell.static_batch().unwrap_or(1) as usize,
    }
}
