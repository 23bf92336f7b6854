//! The scheduler against a device that is only bookkeeping. Token ids spell out whose they are and which, so every
//! step shows whether it carries the right token at the right position into the right page.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use tokmeter::backend::{Batch, PAGE_SIZE, Sampling, TokenInput};
use tokmeter::engine::{EngineLimits, Request, Scheduler, StepPlan, SubmitError, TokenEvent, pages_needed};

const MOST_TOKENS: u64 = 1 << 10;
const VOCAB: usize = 1 << 31;

/// The id of the token at `position` of the text that `request` reads and writes.
fn token_of(request: u64, position: usize) -> u32 {
    u32::try_from(request * MOST_TOKENS + position as u64).unwrap()
}

fn owner_of(token: u32) -> (u64, usize) {
    (u64::from(token) / MOST_TOKENS, (u64::from(token) % MOST_TOKENS) as usize)
}

fn request(id: u64, prompt: usize, max_tokens: u32, hold: bool) -> Request {
    let prompt = (0..prompt).map(|position| token_of(id, position)).collect();
    Request { id, prompt, max_tokens, sampling: Sampling::GREEDY, hold }
}

/// What is known from outside about one request in the engine.
struct Live {
    prompt: usize,
    max_tokens: u32,
    hold: bool,
    /// Position of its next token in a step.
    next_position: usize,
    /// Output index of its next event.
    next_index: u32,
    /// All that its steps have shown.
    pages: Vec<u32>,
    finished: bool,
}

impl Live {
    /// The step with its last token is queued.
    fn all_planned(&self) -> bool {
        self.next_position == self.prompt + self.max_tokens as usize - 1
    }
}

/// The scheduler with a device that runs its steps in order and answers up to `depth` of them late.
struct Harness {
    scheduler: Scheduler,
    limits: EngineLimits,
    depth: usize,
    batch: Batch,
    /// Plans and the tokens they will be answered with.
    in_flight: VecDeque<(StepPlan, Vec<u32>)>,
    previous_samples: Vec<u32>,
    /// Request and position whose keys a slot holds, `[pages * PAGE_SIZE]`.
    cache: Vec<Option<(u64, usize)>>,
    live: BTreeMap<u64, Live>,
    /// Submitted and not yet seen in a step, oldest first.
    unseen: VecDeque<u64>,
    next_id: u64,
    /// Tokens that the steps still have to carry, at most: bounds their number.
    owed_tokens: usize,
}

impl Harness {
    fn new(limits: EngineLimits, depth: usize) -> Self {
        Harness {
            scheduler: Scheduler::new(limits, VOCAB),
            limits,
            depth,
            batch: Batch::default(),
            in_flight: VecDeque::new(),
            previous_samples: Vec::new(),
            cache: vec![None; limits.pages * PAGE_SIZE],
            live: BTreeMap::new(),
            unseen: VecDeque::new(),
            next_id: 0,
            owed_tokens: 0,
        }
    }

    fn submit(&mut self, prompt: usize, max_tokens: u32, hold: bool) {
        let id = self.next_id;
        self.next_id += 1;
        let needed = pages_needed(prompt + max_tokens as usize);
        let answer = self.scheduler.submit(request(id, prompt, max_tokens, hold));
        if needed > self.limits.pages {
            assert_eq!(answer, Err(SubmitError::NeverFits { id, needed, total: self.limits.pages }));
            return;
        }
        answer.unwrap();
        let live = Live {
            prompt,
            max_tokens,
            hold,
            next_position: 0,
            next_index: 0,
            pages: Vec::new(),
            finished: false,
        };
        self.live.insert(id, live);
        self.unseen.push_back(id);
        self.owed_tokens += prompt + max_tokens as usize - 1;
    }

    /// As the engine's loop does it. `false` when idle.
    fn step(&mut self) -> bool {
        let plan = self.scheduler.plan(&mut self.batch);
        let queued = plan.is_some();
        match plan {
            Some(plan) => self.run_on_device(plan),
            None => self.check_nothing_could_run(),
        }
        let in_flight = self.in_flight.len();
        if in_flight > self.depth || !queued {
            self.answer_oldest();
        }
        assert_eq!(self.scheduler.unfinished(), self.live.values().filter(|live| !live.finished).count());
        in_flight > 0
    }

    /// A waiting request may be kept out only by held ones.
    fn check_nothing_could_run(&self) {
        assert_eq!(self.batch.num_tokens(), 0);
        let someone_holds = self.live.values().any(|live| live.hold && live.all_planned());
        assert!(self.unseen.is_empty() || someone_holds, "requests wait, and nothing is in their way");
    }

    fn run_on_device(&mut self, plan: StepPlan) {
        self.check_limits(&plan);
        let mut pages_in_step = vec![false; self.limits.pages];
        let mut prefill_tokens = 0;
        for sequence in 0..self.batch.num_sequences() {
            for &page in self.batch.sequence_pages(sequence) {
                assert!(!std::mem::replace(&mut pages_in_step[page as usize], true), "page {page} is shared");
            }
            prefill_tokens += self.run_sequence(sequence);
        }
        assert_eq!(plan.prefill_tokens, prefill_tokens);
        assert_eq!(plan.decode_tokens, self.batch.num_tokens() as u32 - prefill_tokens);

        let last_token = |row: &u32| self.owner_of_row(*row as usize);
        let asked: Vec<_> = self.batch.sample_rows.iter().map(last_token).collect();
        let samples: Vec<u32> = asked.iter().map(|&(id, position)| token_of(id, position + 1)).collect();
        let planned: Vec<_> = plan.samples().collect();
        let expected =
            asked.iter().map(|&(id, position)| (id, (position + 1 - self.live[&id].prompt) as u32));
        assert_eq!(planned, expected.collect::<Vec<_>>());
        self.previous_samples.clone_from(&samples);
        self.in_flight.push_back((plan, samples));
    }

    fn check_limits(&mut self, plan: &StepPlan) {
        let (batch, limits) = (&self.batch, &self.limits);
        assert!(batch.num_sequences() <= limits.max_batch);
        assert!(plan.prefill_tokens as usize <= limits.chunk);
        assert!(batch.num_tokens() <= limits.max_step_tokens());
        assert!(batch.sample_rows.is_sorted_by(|a, b| a < b));
        assert_eq!(batch.sampling.len(), batch.sample_rows.len());
        let context: u64 = batch.context_len.iter().map(|&tokens| u64::from(tokens)).sum();
        assert_eq!(plan.context_tokens, context);
        assert!(batch.num_tokens() > 0, "a step without work");
        self.owed_tokens =
            self.owed_tokens.checked_sub(batch.num_tokens()).expect("more work than was asked for");
    }

    fn owner_of_row(&self, row: usize) -> (u64, usize) {
        match self.batch.tokens[row] {
            TokenInput::Id(id) => owner_of(id),
            TokenInput::Sampled(index) => {
                assert!(!self.in_flight.is_empty(), "the host already knows this token");
                owner_of(self.previous_samples[index as usize])
            }
        }
    }

    /// Writes the sequence's keys and reads its whole context back. Returns its prompt tokens in this step.
    fn run_sequence(&mut self, sequence: usize) -> u32 {
        let rows = self.batch.query_rows(sequence);
        let (id, _) = self.owner_of_row(rows.start);
        if self.live[&id].next_position == 0 && self.live[&id].pages.is_empty() {
            assert_eq!(self.unseen.pop_front(), Some(id), "admitted out of order");
        }
        let pages = self.batch.sequence_pages(sequence).to_vec();
        self.check_pages_are_its_own(id, &pages);
        let mut prefill_tokens = 0;
        for row in rows.clone() {
            let position = self.live[&id].next_position;
            assert_eq!(self.owner_of_row(row), (id, position), "the wrong token");
            assert_eq!(self.batch.positions[row] as usize, position);
            let slot = self.batch.slots[row] as usize;
            assert_eq!(slot, pages[position / PAGE_SIZE] as usize * PAGE_SIZE + position % PAGE_SIZE);
            self.cache[slot] = Some((id, position));
            let live = self.live.get_mut(&id).unwrap();
            live.next_position += 1;
            prefill_tokens += u32::from(position < live.prompt);
        }
        let live = self.live.get_mut(&id).unwrap();
        assert_eq!(self.batch.context_len[sequence] as usize, live.next_position);
        for position in 0..live.next_position {
            let slot = pages[position / PAGE_SIZE] as usize * PAGE_SIZE + position % PAGE_SIZE;
            assert_eq!(self.cache[slot], Some((id, position)), "a key was overwritten");
        }
        assert!(
            prefill_tokens == 0 || rows.len() as u32 == prefill_tokens,
            "a prompt and a decode token in one"
        );
        let asks = self.batch.sample_rows.contains(&(rows.end as u32 - 1));
        assert_eq!(asks, live.next_position >= live.prompt, "a token is asked for from the prompt's end on");
        if pages.len() > live.pages.len() {
            live.pages = pages;
        }
        prefill_tokens
    }

    fn check_pages_are_its_own(&self, id: u64, pages: &[u32]) {
        let moved = self.live[&id].pages.iter().zip(pages).any(|(before, now)| before != now);
        assert!(!moved, "a sequence's pages moved");
        for (other, live) in &self.live {
            // Once its last step is queued, a request that is not held has given its pages back.
            let owns = live.hold || !live.all_planned();
            if *other != id && owns {
                assert!(
                    live.pages.iter().all(|page| !pages.contains(page)),
                    "{id} shares a page with {other}"
                );
            }
        }
    }

    fn answer_oldest(&mut self) {
        let Some((plan, tokens)) = self.in_flight.pop_front() else { return };
        let mut events = Vec::new();
        self.scheduler.apply(plan, &tokens, &mut events);
        assert_eq!(events.len(), tokens.len());
        for TokenEvent { request, index, token, last } in events {
            let live = self.live.get_mut(&request).expect("an event of a finished request");
            assert_eq!(index, live.next_index);
            assert_eq!(token, token_of(request, live.prompt + index as usize));
            assert_eq!(last, index + 1 == live.max_tokens);
            live.next_index += 1;
            live.finished = last;
            if last && !live.hold {
                self.live.remove(&request);
            }
        }
    }

    /// The `n`-th held and finished request, counted around.
    fn held(&self, n: usize) -> Option<u64> {
        let held: Vec<u64> = self.live.iter().filter(|(_, live)| live.finished).map(|(&id, _)| id).collect();
        (!held.is_empty()).then(|| held[n % held.len()])
    }

    fn rewind(&mut self, id: u64) {
        self.scheduler.rewind(id);
        let live = self.live.get_mut(&id).unwrap();
        live.next_index = 1;
        live.next_position = live.prompt;
        live.finished = live.max_tokens == 1;
        self.owed_tokens += live.max_tokens as usize - 1;
    }

    fn release(&mut self, id: u64) {
        let free = self.scheduler.free_pages();
        self.scheduler.release(id);
        let live = self.live.remove(&id).unwrap();
        let length = live.prompt + live.max_tokens as usize;
        assert_eq!(self.scheduler.free_pages(), free + pages_needed(length));
    }

    fn reset(&mut self) {
        while !self.in_flight.is_empty() {
            self.answer_oldest();
        }
        self.scheduler.reset();
        self.live.clear();
        self.unseen.clear();
        self.owed_tokens = 0;
        assert_eq!(self.scheduler.free_pages(), self.limits.pages);
    }

    /// Steps until nothing is left, releasing whatever is held. Bounded: each step works off owed tokens.
    fn drain(&mut self) {
        loop {
            while self.step() {}
            match self.held(0) {
                Some(id) => self.release(id),
                None => break,
            }
        }
        assert!(self.live.is_empty(), "requests starved");
        assert_eq!(self.owed_tokens, 0);
        assert_eq!(self.scheduler.unfinished(), 0);
        assert_eq!(self.scheduler.free_pages(), self.limits.pages, "pages leaked");
    }
}

#[derive(Clone, Debug)]
enum Action {
    Submit { prompt: usize, max_tokens: u32, hold: bool },
    Step,
    Rewind(usize),
    Release(usize),
    Reset,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => (1..90usize, 1..40u32, prop::bool::weighted(0.3))
            .prop_map(|(prompt, max_tokens, hold)| Action::Submit { prompt, max_tokens, hold }),
        20 => Just(Action::Step),
        3 => any::<usize>().prop_map(Action::Rewind),
        2 => any::<usize>().prop_map(Action::Release),
        1 => prop::bool::weighted(0.2).prop_map(|reset| if reset { Action::Reset } else { Action::Step }),
    ]
}

fn limits() -> impl Strategy<Value = EngineLimits> {
    (1..9usize, 1..70usize, 3..40usize).prop_map(|(max_batch, chunk, pages)| EngineLimits {
        max_batch,
        chunk,
        pages,
        max_context: 512,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Checked on the way: every step is within the limits, carries the right tokens at contiguous positions into
    /// pages of their own, and finds its context intact; admission is first come, first served; every request gives
    /// exactly its tokens, in order; in the end every page is free.
    #[test]
    fn any_order_of_events_keeps_pages_apart_and_finishes_everything(
        limits in limits(),
        depth in 0..3usize,
        actions in prop::collection::vec(action(), 1..150),
    ) {
        let mut harness = Harness::new(limits, depth);
        for action in actions {
            match action {
                Action::Submit { prompt, max_tokens, hold } => harness.submit(prompt, max_tokens, hold),
                Action::Step => { harness.step(); }
                Action::Rewind(n) => if let Some(id) = harness.held(n) { harness.rewind(id) },
                Action::Release(n) => if let Some(id) = harness.held(n) { harness.release(id) },
                Action::Reset => harness.reset(),
            }
        }
        harness.drain();
    }
}

const LIMITS: EngineLimits = EngineLimits { max_batch: 2, chunk: 16, pages: 8, max_context: 100 };

#[test]
fn a_request_that_could_never_run_is_refused_and_changes_nothing() {
    let mut scheduler = Scheduler::new(EngineLimits { max_context: 200, ..LIMITS }, 50);
    let plain = |prompt: Vec<u32>, max_tokens| Request {
        id: 3,
        prompt,
        max_tokens,
        sampling: Sampling::GREEDY,
        hold: false,
    };
    let mut refuse =
        |prompt, max_tokens| scheduler.submit(plain(prompt, max_tokens)).unwrap_err().to_string();
    assert_eq!(refuse(vec![], 1), "request 3: the prompt has no tokens, expected at least 1");
    assert_eq!(refuse(vec![1], 0), "request 3: max_tokens is 0, expected at least 1");
    assert_eq!(
        refuse(vec![1; 150], 51),
        "request 3: 150 prompt tokens and 51 output tokens exceed the model's context of 200 tokens"
    );
    assert_eq!(
        refuse(vec![1; 120], 9),
        "request 3: needs 9 KV pages, but the cache has only 8, for 128 tokens"
    );
    assert_eq!(refuse(vec![1, 50], 1), "request 3: token id 50 is outside the vocabulary of 50");
    scheduler.submit(plain(vec![1], 1)).unwrap();
    assert_eq!(scheduler.submit(plain(vec![1], 1)), Err(SubmitError::DuplicateId { id: 3 }));
    assert_eq!(scheduler.unfinished(), 1);
}

#[test]
fn an_id_is_taken_until_its_last_token_was_seen() {
    let mut scheduler = Scheduler::new(LIMITS, VOCAB);
    let mut batch = Batch::default();
    scheduler.submit(request(0, 4, 1, false)).unwrap();
    let plan = scheduler.plan(&mut batch).unwrap();
    assert_eq!(scheduler.free_pages(), 8, "its last step is queued");
    assert_eq!(scheduler.submit(request(0, 4, 1, false)), Err(SubmitError::DuplicateId { id: 0 }));
    scheduler.apply(plan, &[1], &mut Vec::new());
    scheduler.submit(request(0, 4, 1, false)).unwrap();
}

#[test]
fn a_small_request_does_not_overtake_a_large_one_that_waits_for_pages() {
    let mut scheduler = Scheduler::new(LIMITS, VOCAB);
    let mut batch = Batch::default();
    scheduler.submit(request(0, 16, 3, false)).unwrap();
    scheduler.submit(request(1, 90, 10, false)).unwrap();
    scheduler.submit(request(2, 1, 1, false)).unwrap();
    let mut first_seen = Vec::new();
    while let Some(plan) = scheduler.plan(&mut batch) {
        let tokens = vec![0; plan.samples().len()];
        first_seen.extend(plan.samples().filter(|&(_, index)| index == 0).map(|(id, _)| id));
        scheduler.apply(plan, &tokens, &mut Vec::new());
    }
    assert_eq!(first_seen, [0, 1, 2]);
}

#[test]
fn decode_goes_first_and_the_rest_of_the_chunk_goes_to_the_oldest_prompt() {
    let mut harness = Harness::new(EngineLimits { max_batch: 3, pages: 100, ..LIMITS }, 1);
    harness.submit(10, 5, false);
    harness.submit(20, 2, false);
    harness.submit(3, 2, false);
    let mut steps = Vec::new();
    while harness.step() {
        let batch = &harness.batch;
        steps.push((0..batch.num_sequences()).map(|s| batch.query_rows(s).len()).collect::<Vec<_>>());
    }
    let expected: [&[usize]; 6] = [&[10, 6], &[1, 14, 2], &[1, 1, 1], &[1, 1], &[1], &[]];
    assert_eq!(steps, expected);
}

#[test]
fn a_rewound_request_gives_all_but_its_first_token_again() {
    let mut harness = Harness::new(LIMITS, 1);
    harness.submit(20, 4, true);
    harness.submit(5, 1, true);
    while harness.step() {}
    for _ in 0..3 {
        harness.rewind(0);
        harness.rewind(1);
        assert_eq!(harness.scheduler.unfinished(), 1, "one output token leaves nothing to decode again");
        let mut steps = 0;
        while harness.step() {
            steps += 1;
        }
        assert_eq!(steps, 4, "three steps, and one call more for the answer");
    }
    harness.drain();
}

#[test]
#[should_panic(expected = "request 0 is not held and finished")]
fn a_running_request_cannot_be_rewound() {
    let mut harness = Harness::new(LIMITS, 0);
    harness.submit(20, 4, true);
    harness.step();
    harness.scheduler.rewind(0);
}
