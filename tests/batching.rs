//! The engine over the real CPU backend: batching, paging, chunking and the order of arrival never change what a
//! request gets. Greedy tokens are compared with the reference's, one request at a time, one token at a time.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::OnceLock;

use common::requests::{Tokens, together};
use common::tiny;
use proptest::prelude::*;
use tokmeter::backend::{Backend, Batch, Cpu, CpuDType, Reference, Sampling, TokenInput};
use tokmeter::clock::Clock;
use tokmeter::engine::{EngineLimits, LlmEngine, Request, pages_needed};
use tokmeter::model::{Model, Workspace};

const MODELS: [&str; 3] = ["llama", "qwen2", "qwen3"];
/// Golden prompts, cut at these lengths.
const LENGTHS: [usize; 14] = [1, 2, 3, 5, 7, 12, 15, 16, 17, 24, 31, 33, 48, 64];
const OUTPUT_TOKENS: usize = 16;
/// Least distance between the best and the second logit for a case to count: sums in another order move logits by
/// about 1e-6, and must not decide.
const LEAST_GAP: f32 = 1e-4;

/// A prompt with its greedy continuation by the reference.
struct Case {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

/// The cases of each of [`MODELS`].
fn cases() -> &'static [Vec<Case>] {
    static CASES: OnceLock<Vec<Vec<Case>>> = OnceLock::new();
    CASES.get_or_init(|| MODELS.iter().map(|model| cases_of(model)).collect())
}

fn cases_of(name: &str) -> Vec<Case> {
    let (mut backend, model) = tiny::load(name, Reference::new);
    let longest = &tiny::prompts(name)[4].token_ids;
    let cut = LENGTHS.iter().map(|&length| longest[..length].to_vec());
    let cases: Vec<Case> = cut.filter_map(|prompt| greedy(&mut backend, &model, prompt)).collect();
    assert!(cases.len() >= 10, "{name}: only {} of {} cases are clear", cases.len(), LENGTHS.len());
    cases
}

/// None where a choice was too close.
fn greedy(backend: &mut Reference, model: &Model<Reference>, prompt: Vec<u32>) -> Option<Case> {
    let pages: Vec<u32> = (0..pages_needed(prompt.len() + OUTPUT_TOKENS) as u32).collect();
    let mut kv = backend.kv_cache(pages.len()).unwrap();
    let mut workspace = Workspace::new(backend, prompt.len(), 1).unwrap();
    let (mut batch, mut tokens) = (Batch::default(), Vec::new());
    let (mut input, mut position) = (prompt.clone(), 0);
    while tokens.len() < OUTPUT_TOKENS {
        batch.clear();
        batch.push(input.iter().map(|&id| TokenInput::Id(id)), position, &pages, Some(Sampling::GREEDY));
        batch.keep_logits = true;
        model.forward(backend, &batch, &mut kv, &mut workspace).unwrap();
        backend.sampled(&mut tokens).unwrap();
        let mut logits = backend.download(&workspace.logits, 1, model.config().vocab_size).unwrap();
        logits.sort_by(|a, b| b.total_cmp(a));
        if logits[0] - logits[1] <= LEAST_GAP {
            return None;
        }
        position += input.len() as u32;
        input = vec![tokens[tokens.len() - 1]];
    }
    Some(Case { prompt, tokens })
}

fn open(model: usize, limits: EngineLimits) -> LlmEngine<Cpu> {
    let (backend, model) = tiny::load(MODELS[model], |shape| Cpu::new(shape, CpuDType::F32));
    LlmEngine::new(backend, model, limits, Clock::monotonic()).unwrap()
}

/// Case `case` (counted around) as a request, and the tokens it must get.
fn request(model: usize, id: u64, case: usize, max_tokens: usize) -> (Request, Vec<u32>) {
    let cases = &cases()[model];
    let Case { prompt, tokens } = &cases[case % cases.len()];
    let sampling = Sampling::GREEDY;
    let request =
        Request { id, prompt: prompt.clone(), max_tokens: max_tokens as u32, sampling, hold: false };
    (request, tokens[..max_tokens].to_vec())
}

#[test]
fn one_request_at_a_time_gets_the_references_tokens() {
    let limits = EngineLimits { max_batch: 1, chunk: 64, pages: 5, max_context: 80 };
    for (model, name) in MODELS.iter().enumerate() {
        let mut engine = open(model, limits);
        for case in 0..cases()[model].len() {
            let (request, expected) = request(model, 1, case, OUTPUT_TOKENS);
            let tokens = together(&mut engine, &[(0, request)]);
            assert_eq!(tokens[&1], expected, "{name}, case {case}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn batching_paging_chunking_and_arrival_never_change_a_token(
        model in 0..MODELS.len(),
        max_batch in 1..9usize,
        chunk in 1..80usize,
        pages in 5..40usize,
        arrivals in prop::collection::vec((0..5usize, 0..LENGTHS.len(), 1..=OUTPUT_TOKENS), 1..12),
    ) {
        let mut engine = open(model, EngineLimits { max_batch, chunk, pages, max_context: 80 });
        let (mut requests, mut expected) = (Vec::new(), Tokens::new());
        for (id, (gap, case, max_tokens)) in (0..).zip(arrivals) {
            let (request, tokens) = request(model, id, case, max_tokens);
            requests.push((gap, request));
            expected.insert(id, tokens);
        }
        prop_assert_eq!(together(&mut engine, &requests), expected);
    }
}
