//! The engine's loop over a device whose every token depends on its whole context: nothing that batching, paging,
//! chunking and pipelining do may change it.

use proptest::prelude::*;
use tokmeter::backend::Sampling;
use tokmeter::clock::Clock;
use tokmeter::engine::{Engine, EngineLimits, LlmEngine, Request, StepOutput, score};

use crate::common::requests::{Tokens, drain, together};
use crate::hash_backend::{HashBackend, VOCAB, WAIT_NS, direct_continuation, direct_logits, hash};

const ROOMY: EngineLimits = EngineLimits { max_batch: 4, chunk: 32, pages: 64, max_context: 256 };

fn open<const IN_FLIGHT: usize>(limits: EngineLimits) -> LlmEngine<HashBackend<IN_FLIGHT>> {
    let clock = Clock::scripted();
    let (backend, model) = HashBackend::with_model(clock.clone());
    LlmEngine::new(backend, model, limits, clock).unwrap()
}

fn request(id: u64, prompt: usize, max_tokens: u32) -> Request {
    // The beginnings are alike, so that mixing two requests up is not seen before it matters.
    let token = |position: u64| (hash(if position < 5 { 0 } else { id }, position) % VOCAB as u64) as u32;
    let temperature = if id.is_multiple_of(3) { 0.8 } else { 0.0 };
    let sampling = Sampling { temperature, seed: id };
    Request { id, prompt: (0..prompt as u64).map(token).collect(), max_tokens, sampling, hold: false }
}

fn alone(request: &Request) -> Vec<u32> {
    let mut engine = open::<0>(EngineLimits { max_batch: 1, chunk: 256, pages: 16, max_context: 256 });
    engine.submit(request.clone()).unwrap();
    let mut tokens = Tokens::new();
    drain(&mut engine, &mut tokens);
    tokens.remove(&request.id).unwrap()
}

fn arrivals() -> impl Strategy<Value = Vec<(usize, Request)>> {
    prop::collection::vec((0..6usize, 1..90usize, 1..25u32), 1..12).prop_map(|sizes| {
        let arrival = |(id, (gap, prompt, max_tokens))| (gap, request(id as u64, prompt, max_tokens));
        sizes.into_iter().enumerate().map(arrival).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn batching_paging_chunking_and_pipelining_never_change_a_token(
        max_batch in 1..7usize,
        chunk in 1..100usize,
        pages in 8..40usize,
        requests in arrivals(),
    ) {
        let limits = EngineLimits { max_batch, chunk, pages, max_context: 256 };
        let expected: Tokens = requests.iter().map(|(_, request)| (request.id, alone(request))).collect();
        prop_assert_eq!(&together(&mut open::<0>(limits), &requests), &expected);
        prop_assert_eq!(&together(&mut open::<1>(limits), &requests), &expected);
    }
}

#[test]
fn one_request_alone_gives_what_a_forward_pass_per_token_gives() {
    for (id, prompt, max_tokens) in [(0, 1, 1), (1, 16, 17), (2, 33, 30), (3, 100, 20)] {
        let request = request(id, prompt, max_tokens);
        let expected = direct_continuation(&request.prompt, max_tokens, request.sampling);
        assert_eq!(alone(&request), expected, "request {id}");
    }
}

fn a_held_request_decodes_the_same_tokens_again<const IN_FLIGHT: usize>() {
    let mut engine = open::<IN_FLIGHT>(ROOMY);
    let held = Request { hold: true, ..request(1, 30, 20) };
    let expected = alone(&held);
    engine.submit(held).unwrap();
    let mut tokens = Tokens::new();
    drain(&mut engine, &mut tokens);
    assert_eq!(tokens[&1], expected);
    for round in 0..3 {
        engine.rewind(1);
        engine.submit(request(10 + round, 40, 5)).unwrap();
        tokens = Tokens::from([(1, expected[..1].to_vec())]);
        drain(&mut engine, &mut tokens);
        assert_eq!(tokens[&1], expected, "round {round}");
    }
    engine.release(1);
    engine.submit(request(1, 200, 50)).unwrap();
    tokens.clear();
    drain(&mut engine, &mut tokens);
    assert_eq!(tokens[&1], alone(&request(1, 200, 50)));
}

#[test]
fn a_rewound_request_decodes_the_same_tokens_again() {
    a_held_request_decodes_the_same_tokens_again::<0>();
    a_held_request_decodes_the_same_tokens_again::<1>();
}

#[test]
fn a_reset_in_the_middle_leaves_nothing_behind() {
    let mut engine = open::<1>(ROOMY);
    for id in 0..6 {
        engine.submit(request(id, 50, 20)).unwrap();
    }
    let mut output = StepOutput::default();
    for _ in 0..9 {
        assert!(engine.step(&mut output).unwrap());
    }
    engine.reset().unwrap();
    assert_eq!(engine.unfinished(), 0);
    assert!(!engine.step(&mut output).unwrap() && output.events.is_empty());

    let mut tokens = Tokens::new();
    engine.submit(request(2, 60, 20)).unwrap();
    drain(&mut engine, &mut tokens);
    assert_eq!(tokens, Tokens::from([(2, alone(&request(2, 60, 20)))]));
}

#[test]
fn a_step_is_stamped_once_its_tokens_are_visible() {
    let mut engine = open::<1>(ROOMY);
    engine.submit(request(1, 40, 3)).unwrap();
    let mut steps = Vec::new();
    let mut output = StepOutput::default();
    while engine.step(&mut output).unwrap() {
        let indices = output.events.iter().map(|event| event.index).collect::<Vec<_>>();
        steps.push((output.is_empty(), output.prefill_tokens, output.started_ns, output.visible_ns, indices));
    }
    let wait = WAIT_NS;
    assert_eq!(
        steps,
        [
            (true, 0, 0, 0, vec![]),
            (false, 32, 0, wait, vec![]),
            (false, 8, 0, 2 * wait, vec![0]),
            (false, 0, wait, 3 * wait, vec![1]),
            (false, 0, 2 * wait, 4 * wait, vec![2]),
        ]
    );
}

#[test]
fn a_device_that_loses_a_token_is_an_error() {
    let clock = Clock::scripted();
    let (mut backend, model) = HashBackend::<0>::with_model(clock.clone());
    backend.loses_a_sample = true;
    let mut engine = LlmEngine::new(backend, model, ROOMY, clock).unwrap();
    engine.submit(request(1, 4, 3)).unwrap();
    let error = engine.step(&mut StepOutput::default()).unwrap_err();
    assert_eq!(error.to_string(), "the device sampled 0 tokens, expected 1");
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let refuse = |limits| {
        let (backend, model) = HashBackend::<0>::with_model(Clock::scripted());
        LlmEngine::new(backend, model, limits, Clock::scripted()).err().unwrap().to_string()
    };
    assert_eq!(refuse(EngineLimits { chunk: 0, ..ROOMY }), "the chunk is 0, expected 1 to 1048576");
    assert_eq!(
        refuse(EngineLimits { max_context: 513, ..ROOMY }),
        "the context is 513 tokens, expected at most the model's 512"
    );
}

#[test]
fn a_loaded_model_can_be_given_other_limits() {
    let mut engine = open::<1>(ROOMY);
    engine.submit(request(1, 40, 30)).unwrap();
    engine.step(&mut StepOutput::default()).unwrap();
    let (backend, model) = engine.into_parts().unwrap();
    let limits = EngineLimits { max_batch: 2, ..ROOMY };
    let mut engine = LlmEngine::new(backend, model, limits, Clock::scripted()).unwrap();
    assert_eq!(engine.info().limits, limits);
    engine.submit(request(1, 40, 30)).unwrap();
    let mut tokens = Tokens::new();
    drain(&mut engine, &mut tokens);
    assert_eq!(tokens[&1], alone(&request(1, 40, 30)));
}

#[test]
fn scores_are_the_log_softmax_after_every_position_and_continue_greedily() {
    let prompt = request(1, 150, 1).prompt;
    let (mut backend, model) = HashBackend::<1>::with_model(Clock::scripted());
    let scored = score(&mut backend, &model, &prompt, 5, 12).unwrap();
    assert_eq!(scored.greedy, direct_continuation(&prompt, 12, Sampling::GREEDY));
    assert_eq!(scored.top.len(), prompt.len());
    for (position, (top, logits)) in scored.top.iter().zip(direct_logits(&prompt)).enumerate() {
        let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        let mut expected: Vec<_> =
            logits.iter().enumerate().map(|(id, &logit)| (id as u32, f64::from(logit) - total)).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        assert_eq!(top.len(), 5);
        for (&(id, log), (expected_id, expected_log)) in top.iter().zip(expected) {
            assert_eq!(id, expected_id, "after position {position}");
            assert!((log - expected_log).abs() < 1e-12, "{log}, expected {expected_log} to 1e-12");
        }
    }
}

#[test]
fn a_text_that_cannot_be_scored_is_refused() {
    let (mut backend, model) = HashBackend::<0>::with_model(Clock::scripted());
    let mut refuse =
        |ids: &[u32], greedy| score(&mut backend, &model, ids, 1, greedy).unwrap_err().to_string();
    assert_eq!(refuse(&[], 0), "the prompt has no tokens, expected at least 1");
    assert_eq!(refuse(&[5, 97], 0), "token id 97 is outside the vocabulary of 97");
    assert_eq!(
        refuse(&[1; 500], 13),
        "500 prompt tokens and 13 output tokens exceed the model's context of 512 tokens"
    );
}
