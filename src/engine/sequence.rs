//! One admitted request as integers: how far its keys and values reach, how many output tokens were asked for, and
//! where its next input token is known. Writes itself into a step's [`Batch`]; decides nothing.

use super::Request;
use super::pages::PageList;
use crate::backend::{Batch, TokenInput};

#[derive(Debug)]
pub(super) struct Sequence {
    request: Request,
    pages: PageList,
    /// Tokens whose K and V are in the cache once every queued step has run; also the next position.
    computed: u32,
    /// Output tokens that queued steps sample, those already seen by the host included.
    planned: u32,
    /// Input of the next decode step. Meaningless while the prompt is being computed.
    next: TokenInput,
    /// Output token 0, once the host has seen it: where a rewind starts.
    first_token: Option<u32>,
}

impl Sequence {
    pub(super) fn new(request: Request, pages: PageList) -> Self {
        Sequence { request, pages, computed: 0, planned: 0, next: TokenInput::Sampled(0), first_token: None }
    }

    pub(super) fn id(&self) -> u64 {
        self.request.id
    }

    pub(super) fn hold(&self) -> bool {
        self.request.hold
    }

    /// Output index of the next token to be sampled.
    pub(super) fn next_index(&self) -> u32 {
        self.planned
    }

    /// Prompt tokens that no step has carried yet.
    pub(super) fn prompt_left(&self) -> usize {
        self.request.prompt.len().saturating_sub(self.computed as usize)
    }

    /// Every output token is sampled by a step that is queued.
    pub(super) fn fully_planned(&self) -> bool {
        self.planned == self.request.max_tokens
    }

    pub(super) fn into_pages(self) -> PageList {
        self.pages
    }

    /// Adds the next `count` prompt tokens; the last of the prompt asks for a token, as `sample` of this step.
    pub(super) fn push_prefill(&mut self, batch: &mut Batch, count: usize, sample: usize) {
        let from = self.computed as usize;
        let tokens = self.request.prompt[from..from + count].iter().map(|&id| TokenInput::Id(id));
        let sampling = (self.prompt_left() == count).then_some(self.request.sampling);
        batch.push(tokens, self.computed, self.pages.as_slice(), sampling);
        self.computed += count as u32;
        if sampling.is_some() {
            self.ask_for_token(sample);
        }
    }

    /// Adds the one token after the last, and asks for the following one, as `sample` of this step.
    pub(super) fn push_decode(&mut self, batch: &mut Batch, sample: usize) {
        batch.push([self.next], self.computed, self.pages.as_slice(), Some(self.request.sampling));
        self.computed += 1;
        self.ask_for_token(sample);
    }

    fn ask_for_token(&mut self, sample: usize) {
        self.next = TokenInput::Sampled(sample as u32);
        self.planned += 1;
    }

    /// The host has seen output token `index`. Unless a later step already took it from the device, it is the next
    /// input, and no longer has to be.
    pub(super) fn token_known(&mut self, index: u32, token: u32) {
        if index == 0 {
            self.first_token = Some(token);
        }
        if index + 1 == self.planned {
            self.next = TokenInput::Id(token);
        }
    }

    /// Back to just after output token 0, whose keys and values come next.
    ///
    /// # Panics
    /// When the host has not seen token 0.
    pub(super) fn rewind(&mut self) {
        let first = self.first_token.expect("a finished sequence has seen its first token");
        self.next = TokenInput::Id(first);
        self.computed = self.request.prompt.len() as u32;
        self.planned = 1;
    }
}
