//! The loop that admits requests and makes tokens: continuous batching over paged keys and values, chunked prefill.
//! `pages`, `sequence` and `scheduler` hold only integers; `llm` turns their plans into forward passes; `fake` runs
//! the same scheduler on a scripted clock; `score` gives log-probabilities instead of speed. Knows nothing of
//! workloads, windows or meters.

mod fake;
mod llm;
mod pages;
mod scheduler;
mod score;
mod sequence;

use anyhow::ensure;

use crate::backend::{BackendInfo, FirstSteps, Memory, PAGE_SIZE, Sampling};
pub use fake::{FakeEngine, FakeScript};
pub use llm::LlmEngine;
pub use pages::{PageList, Pages, check_batch_fits, pages_for, pages_needed};
pub use scheduler::{Scheduler, StepPlan};
pub use score::{Score, score};

/// What is asked of the engine. Stop tokens are ignored: exactly `max_tokens` are produced.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The caller's own number; events carry it.
    pub id: u64,
    /// At least one token id.
    pub prompt: Vec<u32>,
    /// Output tokens to produce, at least 1.
    pub max_tokens: u32,
    pub sampling: Sampling,
    /// Keep the sequence's pages when it is finished, so that [`Engine::rewind`] can decode it again.
    pub hold: bool,
}

/// One output token that became visible to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    pub request: u64,
    /// Output index, from 0.
    pub index: u32,
    pub token: u32,
    /// This was the request's last token.
    pub last: bool,
}

/// What one call of [`Engine::step`] finished: all of one step, or nothing (see [`StepOutput::is_empty`]). Reused
/// between calls.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// When the step's work was handed to the device, ns of the engine's clock.
    pub started_ns: u64,
    /// When its token ids were visible to the host, ns of the engine's clock.
    pub visible_ns: u64,
    /// Prompt tokens that the step computed.
    pub prefill_tokens: u32,
    /// Sequences that the step carried one decode token for.
    pub decode_tokens: u32,
    /// In the order of the step's sequences. Each became visible at `visible_ns`. None for a step that ends within a
    /// prompt.
    pub events: Vec<TokenEvent>,
}

impl StepOutput {
    /// No step was finished: the one just queued is still on the device.
    pub fn is_empty(&self) -> bool {
        self.prefill_tokens == 0 && self.decode_tokens == 0
    }

    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        *self = StepOutput { events: std::mem::take(&mut self.events), ..StepOutput::default() };
        self.events.clear();
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("request {id}: the prompt has no tokens, expected at least 1")]
    EmptyPrompt { id: u64 },
    #[error("request {id}: max_tokens is 0, expected at least 1")]
    NoOutput { id: u64 },
    #[error(
        "request {id}: {prompt} prompt tokens and {output} output tokens exceed the model's context of {context} tokens"
    )]
    ContextOverflow { id: u64, prompt: usize, output: u32, context: usize },
    #[error(
        "request {id}: needs {needed} KV pages, but the cache has only {total}, for {} tokens",
        total * PAGE_SIZE
    )]
    NeverFits { id: u64, needed: usize, total: usize },
    #[error("request {id}: token id {token} is outside the vocabulary of {vocab_size}")]
    TokenOutsideVocabulary { id: u64, token: u32, vocab_size: usize },
    #[error("request {id}: another request with this id is in the engine")]
    DuplicateId { id: u64 },
}

/// Limits of the engine, fixed before it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Sequences in one step at most.
    pub max_batch: usize,
    /// Prompt tokens computed in one step at most (`--chunk`).
    pub chunk: usize,
    /// KV pages, each of [`crate::backend::PAGE_SIZE`] tokens.
    pub pages: usize,
    /// Longest sequence, prompt and output together.
    pub max_context: usize,
}

impl EngineLimits {
    /// Slots are counted in 32 bits.
    pub const MOST_PAGES: usize = u32::MAX as usize / PAGE_SIZE;

    /// # Errors
    /// Names the limit that is zero or beyond what any device is given.
    pub fn check(&self) -> anyhow::Result<()> {
        let bounds = [
            ("batch", self.max_batch, 1 << 16),
            ("chunk", self.chunk, 1 << 20),
            ("number of KV pages", self.pages, Self::MOST_PAGES),
            ("context", self.max_context, 1 << 28),
        ];
        for (name, value, largest) in bounds {
            ensure!((1..=largest).contains(&value), "the {name} is {value}, expected 1 to {largest}");
        }
        Ok(())
    }

    /// Tokens in one step at most: all sequences decode, or all but one do beside a chunk.
    pub fn max_step_tokens(&self) -> usize {
        self.max_batch - 1 + self.chunk
    }
}

/// What the engine is, for the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// `llm` or `fake`
    pub name: &'static str,
    pub backend: BackendInfo,
    pub limits: EngineLimits,
    pub vocab_size: usize,
    pub memory: Memory,
}

/// Makes tokens. Asynchronous: a step may return the tokens of an earlier one.
pub trait Engine {
    fn info(&self) -> EngineInfo;

    /// Queues a request. It is admitted, in order of submission, once its whole length has pages.
    ///
    /// # Errors
    /// When the request could never run. The engine is unchanged then.
    fn submit(&mut self, request: Request) -> Result<(), SubmitError>;

    /// Queues one forward pass if there is work, and reports the oldest finished step in `output`. `false` when
    /// nothing was queued, nothing is in flight and nothing was reported: the engine is idle. (It may still have
    /// requests: held ones, and ones that wait for what those hold.)
    ///
    /// # Errors
    /// When the device fails; the engine cannot go on then.
    fn step(&mut self, output: &mut StepOutput) -> anyhow::Result<bool>;

    /// Steps that a load within the engine's limits may meet and that take longer the first time.
    fn first_steps(&self) -> FirstSteps {
        FirstSteps::default()
    }

    /// Requests submitted (or rewound) whose last event was not reported yet.
    fn unfinished(&self) -> usize;

    /// Puts a finished, held request back to just after its first output token, to decode the rest again over the
    /// same context. Its next event has index 1. A request of one output token has nothing to decode again and stays
    /// finished. Until it is released, a held request keeps its place in the batch as well as its pages.
    ///
    /// # Panics
    /// When no held, finished request has this id.
    fn rewind(&mut self, request: u64);

    /// Frees the pages of a finished, held request.
    ///
    /// # Panics
    /// When no held, finished request has this id.
    fn release(&mut self, request: u64);

    /// Drops every request and frees every page. Steps in flight are waited for and their tokens dropped.
    ///
    /// # Errors
    /// When the device fails.
    fn reset(&mut self) -> anyhow::Result<()>;
}
