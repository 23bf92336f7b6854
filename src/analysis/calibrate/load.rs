//! What a step or a service is asked to do, and the physical quantities that its time and energy are sums of.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One point at which a law is fitted or asked. Real numbers, because forecasts stand between integers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// One decode step: sequences, and the tokens they hold, all together.
    Decode { batch: f64, kv_tokens: f64 },
    /// `batch` whole prompts of `isl` tokens, computed in steps of at most `chunk` tokens.
    Prefill { batch: f64, isl: f64, chunk: f64 },
    /// `concurrency` requests of these lengths always in a replica; the law gives the time per output token of each.
    Serving { concurrency: f64, isl: f64, osl: f64 },
    /// As many requests as the replica likes; the law gives its time per output token, all requests together.
    Saturated { isl: f64, osl: f64 },
}

/// One summand's quantity. Its coefficient is in seconds or joules per unit of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// 1: what a decode step or a token in service costs whatever it holds. Reading the weights is the most of it.
    Constant,
    /// Sequences of a decode step.
    Batch,
    /// Sequences beyond the knot, past which arithmetic and not memory sets the pace.
    BatchBeyondKnot,
    /// Tokens whose keys and values a decode step reads.
    KvTokens,
    /// Steps that the prompts take.
    Steps,
    /// Prompt tokens.
    NewTokens,
    /// Prompt tokens of each step beyond the knot.
    NewTokensBeyondKnot,
    /// Pairs of a prompt token and a position it attends to.
    AttendedPairs,
    /// Requests in service.
    Concurrency,
    /// Tokens that they hold in the middle of their output: concurrency · (isl + osl / 2).
    HeldTokens,
    /// Prompt tokens that are computed while one output token is made: concurrency · isl / osl.
    PromptTokensBetween,
    /// Share of a mixture's experts that is busy: 1 − exp(−concurrency / knot).
    BusyExperts,
    /// Tokens that one request holds in the middle of its output: isl + osl / 2.
    Context,
    /// Prompt tokens for each output token: isl / osl.
    PromptPerOutput,
}

impl Term {
    /// The quantity at a load; `knot` only matters to terms that have one. Terms of another kind of load are 0.
    pub fn value(self, load: &Load, knot: f64) -> f64 {
        match (*load, self) {
            (_, Term::Constant) => 1.0,
            (Load::Decode { batch, .. }, Term::Batch) => batch,
            (Load::Decode { batch, .. }, Term::BatchBeyondKnot) => (batch - knot).max(0.0),
            (Load::Decode { kv_tokens, .. }, Term::KvTokens) => kv_tokens,
            (Load::Prefill { batch, isl, chunk }, Term::Steps) => (batch * isl / chunk).ceil(),
            (Load::Prefill { batch, isl, .. }, Term::NewTokens) => batch * isl,
            (Load::Prefill { batch, isl, chunk }, Term::NewTokensBeyondKnot) => {
                let whole_steps = (batch * isl / chunk).floor();
                let rest = batch * isl - whole_steps * chunk;
                whole_steps * (chunk - knot).max(0.0) + (rest - knot).max(0.0)
            }
            (Load::Prefill { batch, isl, .. }, Term::AttendedPairs) => batch * isl * (isl + 1.0) / 2.0,
            (Load::Serving { concurrency, .. }, Term::Concurrency) => concurrency,
            (Load::Serving { concurrency, isl, osl }, Term::HeldTokens) => concurrency * (isl + osl / 2.0),
            (Load::Serving { concurrency, isl, osl }, Term::PromptTokensBetween) => concurrency * isl / osl,
            (Load::Serving { concurrency, .. }, Term::BusyExperts) => 1.0 - (-concurrency / knot).exp(),
            (Load::Saturated { isl, osl }, Term::Context) => isl + osl / 2.0,
            (Load::Saturated { isl, osl }, Term::PromptPerOutput) => isl / osl,
            _ => 0.0,
        }
    }

    pub fn has_knot(self) -> bool {
        matches!(self, Term::BatchBeyondKnot | Term::NewTokensBeyondKnot | Term::BusyExperts)
    }

    /// As in the file.
    pub fn name(self) -> &'static str {
        match self {
            Term::Constant => "constant",
            Term::Batch => "batch",
            Term::BatchBeyondKnot => "batch_beyond_knot",
            Term::KvTokens => "kv_tokens",
            Term::Steps => "steps",
            Term::NewTokens => "new_tokens",
            Term::NewTokensBeyondKnot => "new_tokens_beyond_knot",
            Term::AttendedPairs => "attended_pairs",
            Term::Concurrency => "concurrency",
            Term::HeldTokens => "held_tokens",
            Term::PromptTokensBetween => "prompt_tokens_between",
            Term::BusyExperts => "busy_experts",
            Term::Context => "context",
            Term::PromptPerOutput => "prompt_per_output",
        }
    }
}

/// Which law a load belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Time of one decode step.
    Decode,
    /// Time of a batch of prompts.
    Prefill,
    /// Time per output token of one request among `concurrency`.
    Serving,
    /// Time per output token of a replica that is never short of requests.
    Saturated,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Decode => "decode",
            Phase::Prefill => "prefill",
            Phase::Serving => "serving",
            Phase::Saturated => "saturated",
        }
    }

    /// The summands without a knot.
    pub fn terms(self) -> &'static [Term] {
        match self {
            Phase::Decode => &[Term::Constant, Term::Batch, Term::KvTokens],
            Phase::Prefill => &[Term::Steps, Term::NewTokens, Term::AttendedPairs],
            Phase::Serving => {
                &[Term::Constant, Term::Concurrency, Term::HeldTokens, Term::PromptTokensBetween]
            }
            Phase::Saturated => &[Term::Constant, Term::Context, Term::PromptPerOutput],
        }
    }

    /// The summand that a physical law cannot do without.
    pub fn needed(self) -> Option<Term> {
        match self {
            Phase::Decode => Some(Term::Constant),
            Phase::Prefill => Some(Term::NewTokens),
            Phase::Serving | Phase::Saturated => None,
        }
    }

    /// The summand that a knot adds, if the phase can have one.
    pub fn hinge(self) -> Option<Term> {
        match self {
            Phase::Decode => Some(Term::BatchBeyondKnot),
            Phase::Prefill => Some(Term::NewTokensBeyondKnot),
            Phase::Serving => Some(Term::BusyExperts),
            Phase::Saturated => None,
        }
    }
}

impl Load {
    pub fn phase(&self) -> Phase {
        match self {
            Load::Decode { .. } => Phase::Decode,
            Load::Prefill { .. } => Phase::Prefill,
            Load::Serving { .. } => Phase::Serving,
            Load::Saturated { .. } => Phase::Saturated,
        }
    }

    /// Coordinates of the domain box, with their names: the axes that a law must have seen.
    pub fn coordinates(&self) -> Vec<(&'static str, f64)> {
        match *self {
            Load::Decode { batch, kv_tokens } => {
                vec![("batch", batch), ("context_tokens", kv_tokens / batch.max(1.0))]
            }
            Load::Prefill { batch, isl, chunk } => {
                vec![("isl", isl), ("step_tokens", (batch * isl).min(chunk))]
            }
            Load::Serving { concurrency, isl, osl } => {
                vec![("concurrency", concurrency), ("isl", isl), ("osl", osl)]
            }
            Load::Saturated { isl, osl } => vec![("isl", isl), ("osl", osl)],
        }
    }

    /// The axis along which forecasts reach furthest, and the row that a point of the grid stands in.
    pub(super) fn grid(&self) -> (f64, [f64; 2]) {
        match *self {
            Load::Decode { batch, kv_tokens } => (batch, [(kv_tokens / batch.max(1.0)).round(), 0.0]),
            Load::Prefill { batch, isl, .. } => (isl, [batch, 0.0]),
            Load::Serving { concurrency, isl, osl } => (concurrency, [isl, osl]),
            Load::Saturated { isl, osl } => (isl, [osl, 0.0]),
        }
    }

    /// Where a hinge could be.
    pub(super) fn knot_axis(&self) -> f64 {
        match *self {
            Load::Decode { batch, .. } => batch,
            Load::Prefill { batch, isl, chunk } => (batch * isl).min(chunk),
            Load::Serving { concurrency, .. } => concurrency,
            Load::Saturated { .. } => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::StepTokens;

    #[test]
    fn features_are_the_tokens_of_the_step() {
        let step = StepTokens::decode(8, 99);
        let load = Load::Decode { batch: 8.0, kv_tokens: step.contexts as f64 };
        assert_eq!(Term::KvTokens.value(&load, 0.0), 800.0);
        assert_eq!(Term::BatchBeyondKnot.value(&load, 6.0), 2.0);
        let prompts = StepTokens::prefill(3, 100);
        let load = Load::Prefill { batch: 3.0, isl: 100.0, chunk: 128.0 };
        assert_eq!(Term::NewTokens.value(&load, 0.0), prompts.tokens as f64);
        assert_eq!(Term::AttendedPairs.value(&load, 0.0), prompts.attended as f64);
        // 300 tokens in steps of 128, 128 and 44; beyond 100: 28 + 28.
        assert_eq!(Term::Steps.value(&load, 0.0), 3.0);
        assert_eq!(Term::NewTokensBeyondKnot.value(&load, 100.0), 56.0);
    }

    #[test]
    fn a_service_holds_half_its_output_on_average() {
        let load = Load::Serving { concurrency: 4.0, isl: 1000.0, osl: 200.0 };
        let of = |term: Term| term.value(&load, 4.0);
        assert_eq!(of(Term::HeldTokens), 4400.0);
        assert_eq!(of(Term::PromptTokensBetween), 20.0);
        assert!((of(Term::BusyExperts) - 0.632_120_558_828_557_7).abs() < 1e-15);
        assert_eq!(of(Term::KvTokens), 0.0);
    }
}
