//! The engine that runs a model: turns the scheduler's plans into forward passes on a [`Backend`], keeps up to
//! [`Backend::STEPS_IN_FLIGHT`] of them unanswered, and stamps each step's tokens when the host can see them.

use std::collections::VecDeque;

use anyhow::{Context as _, ensure};

use super::pages::pages_for;
use super::scheduler::{Scheduler, StepPlan};
use super::{Engine, EngineInfo, EngineLimits, Request, StepOutput, SubmitError};
use crate::backend::{Backend, Batch, FirstSteps};
use crate::clock::Clock;
use crate::model::{Model, Workspace};
use crate::units::format_bytes;

/// Part of a device's free memory that keys and values may take; operations need some for themselves.
const KV_SHARE: f64 = 0.9;

/// A step that is queued on the device and whose tokens were not taken yet.
struct InFlight {
    plan: StepPlan,
    started_ns: u64,
}

pub struct LlmEngine<B: Backend> {
    backend: B,
    model: Model<B>,
    kv: B::Kv,
    workspace: Workspace<B>,
    scheduler: Scheduler,
    clock: Clock,
    /// Oldest first.
    in_flight: VecDeque<InFlight>,
    /// The step being queued; reused.
    batch: Batch,
    /// Tokens of the step being collected; reused.
    tokens: Vec<u32>,
}

impl<B: Backend> LlmEngine<B> {
    /// Takes the memory for `limits` on the device. Where fewer pages than those fit beside the activations, the cache
    /// has as many as do: [`Engine::info`] tells.
    ///
    /// # Errors
    /// When a limit makes no sense or the device has no room.
    pub fn new(mut backend: B, model: Model<B>, limits: EngineLimits, clock: Clock) -> anyhow::Result<Self> {
        limits.check()?;
        let (context, most) = (limits.max_context, model.config().max_position_embeddings);
        ensure!(context <= most, "the context is {context} tokens, expected at most the model's {most}");
        let workspace = Workspace::new(&mut backend, limits.max_step_tokens(), limits.max_batch)?;
        let limits = EngineLimits { pages: limits.pages.min(fitting_pages(&backend)?), ..limits };
        let kv = backend.kv_cache(limits.pages)?;
        let scheduler = Scheduler::new(limits, model.config().vocab_size);
        Ok(LlmEngine {
            backend,
            model,
            kv,
            workspace,
            scheduler,
            clock,
            in_flight: VecDeque::with_capacity(B::STEPS_IN_FLIGHT + 1),
            batch: Batch::default(),
            tokens: Vec::with_capacity(limits.max_batch),
        })
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// Drops every request, frees the cache and gives the loaded model back, for an engine with other limits.
    ///
    /// # Errors
    /// When the device fails.
    pub fn into_parts(mut self) -> anyhow::Result<(B, Model<B>)> {
        self.reset()?;
        Ok((self.backend, self.model))
    }

    /// Plans a step and hands it to the device. `false` when there is no work.
    fn queue(&mut self) -> anyhow::Result<bool> {
        let Some(plan) = self.scheduler.plan(&mut self.batch) else { return Ok(false) };
        let started_ns = self.clock.now_ns();
        self.model.forward(&mut self.backend, &self.batch, &mut self.kv, &mut self.workspace)?;
        self.in_flight.push_back(InFlight { plan, started_ns });
        Ok(true)
    }

    /// Waits for the oldest step in flight and reports it. One stamp for all its tokens, taken before anything else
    /// is done with them.
    fn collect(&mut self, output: &mut StepOutput) -> anyhow::Result<()> {
        let Some(InFlight { plan, started_ns }) = self.in_flight.pop_front() else { return Ok(()) };
        self.tokens.clear();
        self.backend.sampled(&mut self.tokens)?;
        output.visible_ns = self.clock.now_ns();
        output.started_ns = started_ns;
        output.prefill_tokens = plan.prefill_tokens;
        output.decode_tokens = plan.decode_tokens;
        let (got, expected) = (self.tokens.len(), plan.samples().len());
        ensure!(got == expected, "the device sampled {got} tokens, expected {expected}");
        self.scheduler.apply(plan, &self.tokens, &mut output.events);
        Ok(())
    }
}

/// Pages that the device has room for.
fn fitting_pages(backend: &impl Backend) -> anyhow::Result<usize> {
    let Some(free_bytes) = backend.free_bytes()? else { return Ok(usize::MAX) };
    pages_for((free_bytes as f64 * KV_SHARE) as u64, backend.page_bytes())
        .with_context(|| format!("{} are free beside the model", format_bytes(free_bytes)))
}

impl<B: Backend> Engine for LlmEngine<B> {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: "llm",
            backend: self.backend.info(),
            limits: self.scheduler.limits(),
            vocab_size: self.scheduler.vocab_size(),
            memory: self.backend.memory(),
        }
    }

    fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        self.scheduler.submit(request)
    }

    fn step(&mut self, output: &mut StepOutput) -> anyhow::Result<bool> {
        output.clear();
        let queued = self.queue()?;
        let in_flight = self.in_flight.len();
        let device_is_full = in_flight > B::STEPS_IN_FLIGHT;
        if device_is_full || !queued {
            self.collect(output)?;
        }
        Ok(in_flight > 0)
    }

    fn first_steps(&self) -> FirstSteps {
        let limits = self.scheduler.limits();
        self.backend.first_steps(limits.chunk, limits.max_batch)
    }

    fn unfinished(&self) -> usize {
        self.scheduler.unfinished()
    }

    fn rewind(&mut self, request: u64) {
        self.scheduler.rewind(request);
    }

    fn release(&mut self, request: u64) {
        self.scheduler.release(request);
    }

    fn reset(&mut self) -> anyhow::Result<()> {
        while !self.in_flight.is_empty() {
            self.collect(&mut StepOutput::default())?;
        }
        self.scheduler.reset();
        Ok(())
    }
}
