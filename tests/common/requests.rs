//! Requests through an engine, and their tokens.

use std::collections::BTreeMap;

use tokmeter::engine::{Engine, Request, StepOutput};

/// Output tokens of each request.
pub type Tokens = BTreeMap<u64, Vec<u32>>;

/// Steps until idle and files the events, checking their order.
pub fn drain(engine: &mut impl Engine, tokens: &mut Tokens) {
    let mut output = StepOutput::default();
    while engine.step(&mut output).unwrap() {
        file(&output, tokens);
    }
}

fn file(output: &StepOutput, tokens: &mut Tokens) {
    for event in &output.events {
        let so_far = tokens.entry(event.request).or_default();
        assert_eq!(event.index as usize, so_far.len());
        so_far.push(event.token);
    }
}

/// Requests that arrive a number of steps after the one before.
pub fn together(engine: &mut impl Engine, requests: &[(usize, Request)]) -> Tokens {
    let (mut tokens, mut output) = (Tokens::new(), StepOutput::default());
    for (gap, request) in requests {
        for _ in 0..*gap {
            engine.step(&mut output).unwrap();
            file(&output, &mut tokens);
        }
        engine.submit(request.clone()).unwrap();
    }
    drain(engine, &mut tokens);
    assert_eq!(engine.unfinished(), 0);
    tokens
}
