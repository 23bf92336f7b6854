//! Which tokens go into the next step: continuous batching with chunked prefill over whole-length page admission.
//! Only integers. Since stop tokens are ignored, every length is known on submission and no decision depends on a
//! token's value: the next step can be planned before the tokens of the last one are seen.
//!
//! Per step: admit waiting requests strictly in order, one decode token for every sequence past its prompt, then up
//! to `chunk` prompt tokens, oldest prompt first. Nothing is preempted, because nothing is admitted that could not
//! be finished.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use super::pages::{Pages, pages_needed};
use super::sequence::Sequence;
use super::{EngineLimits, Request, SubmitError, TokenEvent};
use crate::backend::Batch;

/// Where a request that is in the engine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting,
    Running {
        slot: usize,
    },
    /// Its last step is queued and its pages are given back; its last tokens are on their way.
    Leaving,
    /// Finished, and keeps its slot and pages.
    Held {
        slot: usize,
    },
}

/// Whose token a sample row of a step is.
#[derive(Clone, Copy, Debug)]
struct Sample {
    request: u64,
    slot: usize,
    /// Output index.
    index: u32,
    last: bool,
    hold: bool,
}

/// What a queued step computes, and for whom. Handed back to [`Scheduler::apply`] in the order of planning.
#[derive(Debug, Default)]
pub struct StepPlan {
    /// Prompt tokens in the step.
    pub prefill_tokens: u32,
    /// Sequences with one decode token in the step.
    pub decode_tokens: u32,
    /// Tokens that the step attends to, summed over its sequences.
    pub context_tokens: u64,
    /// One per sample row of the batch, `[samples]`.
    samples: Vec<Sample>,
}

impl StepPlan {
    /// Request and output index of each sampled token, in the order of the batch's sample rows.
    pub fn samples(&self) -> impl ExactSizeIterator<Item = (u64, u32)> + '_ {
        self.samples.iter().map(|sample| (sample.request, sample.index))
    }
}

/// Requests, their sequences and the page pool.
#[derive(Debug)]
pub struct Scheduler {
    limits: EngineLimits,
    vocab_size: usize,
    pages: Pages,
    places: HashMap<u64, Place>,
    /// First come, first served.
    waiting: VecDeque<Request>,
    /// Admitted sequences, at most `max_batch`. A slot stays a sequence's own until its last step is planned, or
    /// until it is released when it is held.
    slots: Vec<Option<Sequence>>,
    free_slots: Vec<usize>,
    /// Slots past their prompt; each takes part in every step.
    decoding: Vec<usize>,
    /// Slots within their prompt, in order of admission.
    prefilling: VecDeque<usize>,
    unfinished: usize,
    /// Plans whose step was applied, kept for their memory.
    spare_plans: Vec<StepPlan>,
}

impl Scheduler {
    pub fn new(limits: EngineLimits, vocab_size: usize) -> Self {
        Scheduler {
            limits,
            vocab_size,
            pages: Pages::new(limits.pages),
            places: HashMap::new(),
            waiting: VecDeque::new(),
            slots: (0..limits.max_batch).map(|_| None).collect(),
            free_slots: (0..limits.max_batch).rev().collect(),
            decoding: Vec::with_capacity(limits.max_batch),
            prefilling: VecDeque::with_capacity(limits.max_batch),
            unfinished: 0,
            spare_plans: Vec::new(),
        }
    }

    pub fn limits(&self) -> EngineLimits {
        self.limits
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn unfinished(&self) -> usize {
        self.unfinished
    }

    pub fn free_pages(&self) -> usize {
        self.pages.free_pages()
    }

    /// # Errors
    /// When the request could never run; nothing has changed then.
    pub fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        self.check(&request)?;
        match self.places.entry(request.id) {
            Entry::Occupied(_) => return Err(SubmitError::DuplicateId { id: request.id }),
            Entry::Vacant(place) => place.insert(Place::Waiting),
        };
        self.unfinished += 1;
        self.waiting.push_back(request);
        Ok(())
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let (id, prompt, output) = (request.id, request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt { id });
        }
        if output == 0 {
            return Err(SubmitError::NoOutput { id });
        }
        let context = self.limits.max_context;
        let length = prompt.saturating_add(output as usize);
        if length > context {
            return Err(SubmitError::ContextOverflow { id, prompt, output, context });
        }
        let (needed, total) = (pages_needed(length), self.pages.total());
        if needed > total {
            return Err(SubmitError::NeverFits { id, needed, total });
        }
        let vocab_size = self.vocab_size;
        match request.prompt.iter().find(|&&token| token as usize >= vocab_size) {
            Some(&token) => Err(SubmitError::TokenOutsideVocabulary { id, token, vocab_size }),
            None => Ok(()),
        }
    }

    /// Fills `batch` with the next step, or leaves it empty and returns nothing when there is no work. The step must
    /// be queued before the next one is planned, and sampled tokens are inputs of the very next step, so plans are
    /// neither skipped nor reordered.
    pub fn plan(&mut self, batch: &mut Batch) -> Option<StepPlan> {
        batch.clear();
        self.admit();
        if self.decoding.is_empty() && self.prefilling.is_empty() {
            return None;
        }
        let mut plan = self.spare_plans.pop().unwrap_or_default();
        self.plan_decode(batch, &mut plan);
        self.plan_prefill(batch, &mut plan);
        plan.context_tokens = batch.context_len.iter().map(|&tokens| u64::from(tokens)).sum();
        Some(plan)
    }

    /// Admits from the head of the queue while its whole length has pages. A request that does not fit yet holds up
    /// those behind it: small ones cannot overtake a large one for ever.
    fn admit(&mut self) {
        while let (Some(head), Some(&slot)) = (self.waiting.front(), self.free_slots.last()) {
            let length = head.prompt.len() + head.max_tokens as usize;
            let Some(pages) = self.pages.alloc(pages_needed(length)) else { return };
            let request = self.waiting.pop_front().expect("the queue has a head");
            self.free_slots.pop();
            self.places.insert(request.id, Place::Running { slot });
            self.slots[slot] = Some(Sequence::new(request, pages));
            self.prefilling.push_back(slot);
        }
    }

    fn plan_decode(&mut self, batch: &mut Batch, plan: &mut StepPlan) {
        // Taken out for the loop, because finishing a sequence needs the rest of `self`; its memory is kept.
        let mut decoding = std::mem::take(&mut self.decoding);
        plan.decode_tokens = decoding.len() as u32;
        decoding.retain(|&slot| {
            let sample = plan.samples.len();
            self.sequence(slot).push_decode(batch, sample);
            self.note_sample(slot, plan)
        });
        self.decoding = decoding;
    }

    fn plan_prefill(&mut self, batch: &mut Batch, plan: &mut StepPlan) {
        let mut budget = self.limits.chunk;
        while let Some(&slot) = self.prefilling.front()
            && budget > 0
        {
            let sample = plan.samples.len();
            let sequence = self.sequence(slot);
            let prompt_left = sequence.prompt_left();
            let count = prompt_left.min(budget);
            sequence.push_prefill(batch, count, sample);
            budget -= count;
            if count == prompt_left {
                self.prefilling.pop_front();
                if self.note_sample(slot, plan) {
                    self.decoding.push(slot);
                }
            }
        }
        plan.prefill_tokens = (self.limits.chunk - budget) as u32;
    }

    /// Records that the step samples a token for this sequence. `false` when that is its last.
    fn note_sample(&mut self, slot: usize, plan: &mut StepPlan) -> bool {
        let sequence = self.sequence(slot);
        let (request, hold, last) = (sequence.id(), sequence.hold(), sequence.fully_planned());
        plan.samples.push(Sample { request, slot, index: sequence.next_index() - 1, last, hold });
        if last && !hold {
            self.places.insert(request, Place::Leaving);
            self.vacate(slot);
        }
        !last
    }

    /// Frees a sequence's slot and pages, although the step that uses the pages last may not have run yet. The pages
    /// can go only to a sequence of a later plan, whose step is queued behind that one; the device works off its
    /// queue in order, so nothing is written to them before they were read for the last time.
    fn vacate(&mut self, slot: usize) {
        let sequence = self.slots[slot].take().expect("the slot is occupied");
        self.pages.free(sequence.into_pages());
        self.free_slots.push(slot);
    }

    fn sequence(&mut self, slot: usize) -> &mut Sequence {
        self.slots[slot].as_mut().expect("the slot is occupied")
    }

    /// Takes the tokens of the oldest step that was planned and not applied, one per sample row, and appends their
    /// events.
    pub fn apply(&mut self, mut plan: StepPlan, tokens: &[u32], events: &mut Vec<TokenEvent>) {
        debug_assert_eq!(plan.samples.len(), tokens.len());
        for (sample, &token) in plan.samples.drain(..).zip(tokens) {
            let Sample { request, slot, index, last, hold } = sample;
            events.push(TokenEvent { request, index, token, last });
            // A later plan may have vacated the slot already, and even given it to another request.
            let occupant = self.slots[slot].as_mut().filter(|sequence| sequence.id() == request);
            if let Some(sequence) = occupant {
                sequence.token_known(index, token);
            }
            if last {
                self.finish(request, slot, hold);
            }
        }
        self.spare_plans.push(plan);
    }

    fn finish(&mut self, request: u64, slot: usize, hold: bool) {
        self.unfinished -= 1;
        match hold {
            true => self.places.insert(request, Place::Held { slot }),
            false => self.places.remove(&request),
        };
    }

    /// Puts a finished, held request back to just after its first output token. One that has no further token is
    /// left as it is.
    ///
    /// # Panics
    /// When no held, finished request has this id.
    pub fn rewind(&mut self, request: u64) {
        let slot = self.held_slot(request);
        self.sequence(slot).rewind();
        if !self.sequence(slot).fully_planned() {
            self.places.insert(request, Place::Running { slot });
            self.decoding.push(slot);
            self.unfinished += 1;
        }
    }

    /// Frees the slot and the pages of a finished, held request.
    ///
    /// # Panics
    /// When no held, finished request has this id.
    pub fn release(&mut self, request: u64) {
        let slot = self.held_slot(request);
        self.places.remove(&request);
        self.vacate(slot);
    }

    fn held_slot(&self, request: u64) -> usize {
        match self.places.get(&request) {
            Some(&Place::Held { slot }) => slot,
            place => panic!("request {request} is not held and finished, but {place:?}"),
        }
    }

    /// Drops every request and frees every page. Steps in flight must have been waited for; their plans are void.
    pub fn reset(&mut self) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_some() {
                self.vacate(slot);
            }
        }
        self.places.clear();
        self.waiting.clear();
        self.decoding.clear();
        self.prefilling.clear();
        self.unfinished = 0;
    }
}
