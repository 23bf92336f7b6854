//! The whole forward pass of one backend held against another's, usually `Reference`: the same prompts cut into steps
//! in several ways. The reference computes each prompt alone and whole, so that batching, paging and chunking on the
//! candidate are part of what is checked. What it computes is computed once for all checks, since that is what takes the
//! time.
//!
//! A logit passes when it is within `ε · (rms + |reference|)`, where ε belongs to the candidate's arithmetic and rms is
//! that of all the reference's logits. A backend in a narrow type is also held against what an ordinary implementation
//! in that type loses, and against itself where it promises the same bits.

use super::{Model, Workspace};
use crate::backend::check::{Deviation, Verdict};
use crate::backend::{Backend, Batch, PAGE_SIZE, Sampling, TokenInput};
use crate::weights::Weights;

/// Tokens of each prompt: one, some within a page, and two that cross one.
const PROMPT_TOKENS: [usize; 4] = [1, 5, 19, 23];

/// How much further from f32 than a plain implementation a backend's log-probabilities may be.
const MORE_THAN_PLAIN: f64 = 1.1;

/// One way of cutting the prompts into steps, or of comparing them.
#[derive(Clone, Debug, PartialEq)]
pub struct ForwardCheck {
    /// The way, in words.
    pub case: &'static str,
    pub steps: usize,
    /// Logits that were compared.
    pub logits: usize,
    pub deviation: Deviation,
    /// Where it is largest, in words: the prompt and its token. Nothing where it is no single logit's, or zero.
    pub worst_at: Option<String>,
}

/// Logits of all prompts as the reference computes them, each alone and whole.
pub struct Expected {
    /// `[tokens of all prompts, vocab_size]`
    logits: Vec<f32>,
    vocab_size: usize,
}

impl Expected {
    /// # Errors
    /// When a weight is broken.
    pub fn new<A: Backend>(reference: A, weights: &dyn Weights) -> anyhow::Result<Self> {
        let logits = Subject::load(reference, weights)?.logits(&one_prompt_a_step())?;
        Ok(Expected { logits, vocab_size: weights.config().vocab_size })
    }

    fn log_probabilities(&self) -> Vec<f64> {
        log_probabilities(&self.logits, self.vocab_size)
    }
}

/// Checks every logit after every position of some prompts.
///
/// # Errors
/// When the device fails.
pub fn check_forward<B: Backend>(
    expected: &Expected,
    subject: &mut Subject<B>,
) -> anyhow::Result<Vec<ForwardCheck>> {
    let epsilon = epsilon(subject.backend.info().compute_dtype);
    let right = &expected.logits;
    let check = |(case, steps): (&'static str, Vec<Step>)| {
        let found = subject.logits(&steps)?;
        let deviation = Deviation::measure(right, &found, right.len(), epsilon);
        let worst_at = worst_at(&deviation, expected.vocab_size);
        Ok(ForwardCheck { case, steps: steps.len(), logits: right.len(), deviation, worst_at })
    };
    ways().into_iter().map(check).collect()
}

/// Checks that log-probabilities under teacher forcing are no further from f32 than those of a `plain` implementation
/// in the candidate's type. A tenth more is allowed, on average and in the worst hundredth.
///
/// # Errors
/// When the device fails.
pub fn check_log_probabilities<B: Backend>(
    expected: &Expected,
    plain: &Expected,
    subject: &mut Subject<B>,
) -> anyhow::Result<[ForwardCheck; 2]> {
    let steps = one_prompt_a_step();
    let right = expected.log_probabilities();
    let found = log_probabilities(&subject.logits(&steps)?, expected.vocab_size);
    let (ours, plain) = (Distances::new(&right, &found), Distances::new(&right, &plain.log_probabilities()));
    let check = |case, ours: f64, plain: f64| ForwardCheck {
        case,
        steps: steps.len(),
        logits: right.len(),
        deviation: Deviation::of(0, ours, MORE_THAN_PLAIN * plain),
        worst_at: None,
    };
    Ok([
        check(
            "log-probabilities: mean distance from f32, of a plain implementation's",
            ours.mean,
            plain.mean,
        ),
        check("log-probabilities: 99th percentile, of a plain implementation's", ours.p99, plain.p99),
    ])
}

/// Checks that the bits of a prompt's logits do not depend on what else is in the batch, nor on how it is cut.
///
/// # Errors
/// When the device fails.
pub fn check_invariance<B: Backend>(subject: &mut Subject<B>) -> anyhow::Result<ForwardCheck> {
    let [first, others @ ..] = ways();
    let alone = subject.logits(&first.1)?;
    let mut check = ForwardCheck::same_bits("the same bits in every batch, deterministic");
    for (_, steps) in others {
        check.add_same_bits(&alone, &subject.logits(&steps)?, steps.len(), subject.vocab_size());
    }
    Ok(check)
}

/// Checks that two ways of running a backend give the same bits: each decodes the prompts token by token, twice over.
///
/// # Errors
/// When a device fails.
pub fn check_same_bits<B: Backend>(
    case: &'static str,
    one: &mut Subject<B>,
    other: &mut Subject<B>,
) -> anyhow::Result<ForwardCheck> {
    let steps = token_by_token();
    let mut check = ForwardCheck::same_bits(case);
    let subjects = [one, other];
    let right = subjects[0].logits(&steps)?;
    for index in [1, 0, 1] {
        let found = subjects[index].logits(&steps)?;
        check.add_same_bits(&right, &found, steps.len(), subjects[index].vocab_size());
    }
    Ok(check)
}

impl ForwardCheck {
    pub fn passed(&self) -> bool {
        self.deviation.verdict() == Verdict::Ok
    }

    fn same_bits(case: &'static str) -> Self {
        ForwardCheck { case, steps: 0, logits: 0, deviation: Deviation::NONE, worst_at: None }
    }

    /// Adds a comparison with no tolerance.
    fn add_same_bits(&mut self, right: &[f32], found: &[f32], steps: usize, vocab_size: usize) {
        let same = right.iter().map(|value| value.to_bits()).eq(found.iter().map(|value| value.to_bits()));
        let deviation = if same { Deviation::NONE } else { Deviation::difference(right, found) };
        if self.worst_at.is_none() {
            self.worst_at = worst_at(&deviation, vocab_size);
        }
        self.deviation = self.deviation.or(deviation);
        self.steps += steps;
        self.logits += found.len();
    }
}

/// `prompt 4, token 17`: where the largest deviation is.
fn worst_at(deviation: &Deviation, vocab_size: usize) -> Option<String> {
    let mut token = deviation.index / vocab_size;
    if deviation.tolerance_used == 0.0 {
        return None;
    }
    for (prompt, tokens) in (1..).zip(PROMPT_TOKENS) {
        if token < tokens {
            return Some(format!("prompt {prompt}, token {}", token + 1));
        }
        token -= tokens;
    }
    None
}

/// How far log-probabilities are from the right ones, nat.
struct Distances {
    mean: f64,
    p99: f64,
}

impl Distances {
    fn new(right: &[f64], found: &[f64]) -> Self {
        let mut errors: Vec<f64> = right.iter().zip(found).map(|(a, b)| (a - b).abs()).collect();
        errors.sort_by(f64::total_cmp);
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        // A NaN sorts last; the mean shows it.
        Distances { mean, p99: errors[(errors.len() - 1) * 99 / 100] }
    }
}

/// What the candidate's arithmetic may lose in a whole pass.
pub fn epsilon(compute_dtype: &str) -> f64 {
    match compute_dtype {
        // Sums in another order, layer upon layer.
        "f32" | "quantized" => 1e-4,
        // Eight bits of mantissa in weights and activations.
        _ => 5e-2,
    }
}

/// Token ids spread over the vocabulary.
fn prompts(vocab_size: usize) -> Vec<Vec<u32>> {
    let token = |prompt: usize, position: usize| {
        let mixed = ((prompt * 1000 + position) as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((mixed >> 32) % vocab_size as u64) as u32
    };
    let prompt = |(index, &length): (usize, &usize)| (0..length).map(|at| token(index, at)).collect();
    PROMPT_TOKENS.iter().enumerate().map(prompt).collect()
}

/// Parts of one step: which prompt, and how many of its next tokens.
type Step = Vec<(usize, usize)>;

/// Ways of cutting the prompts, each with a name; in the first each prompt is alone and whole.
fn ways() -> [(&'static str, Vec<Step>); 4] {
    [
        ("each prompt in one step", one_prompt_a_step()),
        ("all prompts in one step", cut(|_, _| usize::MAX)),
        ("token by token, all prompts together", token_by_token()),
        ("uneven chunks beside single tokens", cut(|prompt, step| 1 + (prompt * 5 + step * 3) % 7)),
    ]
}

fn token_by_token() -> Vec<Step> {
    cut(|_, _| 1)
}

fn one_prompt_a_step() -> Vec<Step> {
    PROMPT_TOKENS.iter().enumerate().map(|prompt| vec![(prompt.0, *prompt.1)]).collect()
}

/// Steps over all prompts that are not through; `piece` says how many tokens of a prompt a step takes.
fn cut(piece: impl Fn(usize, usize) -> usize) -> Vec<Step> {
    let mut left = PROMPT_TOKENS;
    let mut steps = Vec::new();
    while left.iter().any(|&tokens| tokens > 0) {
        let mut step = Step::new();
        for (prompt, left) in left.iter_mut().enumerate().filter(|(_, left)| **left > 0) {
            let tokens = piece(prompt, steps.len()).min(*left);
            *left -= tokens;
            step.push((prompt, tokens));
        }
        steps.push(step);
    }
    steps
}

/// A model on one device.
pub struct Subject<B: Backend> {
    backend: B,
    model: Model<B>,
}

impl<B: Backend> Subject<B> {
    /// # Errors
    /// When a weight is broken or does not fit, or the device fails.
    pub fn load(mut backend: B, weights: &dyn Weights) -> anyhow::Result<Self> {
        let model = Model::load(&mut backend, weights, &mut |_| {})?;
        Ok(Subject { backend, model })
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    /// Logits after every position, prompt after prompt, `[tokens of all prompts, vocab_size]`.
    fn logits(&mut self, steps: &[Step]) -> anyhow::Result<Vec<f32>> {
        let vocab_size = self.vocab_size();
        let prompts = prompts(vocab_size);
        let tokens = PROMPT_TOKENS.iter().sum();
        let pages = interleaved_pages();
        let mut kv = self.backend.kv_cache(pages.iter().map(Vec::len).sum())?;
        let mut workspace = Workspace::new(&mut self.backend, tokens, tokens)?;
        let mut logits: Vec<Vec<f32>> = vec![Vec::new(); prompts.len()];
        for step in steps {
            let mut batch = Batch::default();
            batch.clear();
            for &(prompt, count) in step {
                let from = logits[prompt].len() / vocab_size;
                let ids = prompts[prompt][from..from + count].iter().map(|&id| TokenInput::Id(id));
                batch.push(ids, from as u32, &pages[prompt], None);
            }
            ask_for_every_row(&mut batch);
            self.model.forward(&mut self.backend, &batch, &mut kv, &mut workspace)?;
            self.backend.sampled(&mut Vec::new())?;
            let rows = self.backend.download(&workspace.logits, batch.num_tokens(), vocab_size)?;
            for (s, &(prompt, _)) in step.iter().enumerate() {
                let own = batch.query_rows(s);
                logits[prompt].extend_from_slice(&rows[own.start * vocab_size..own.end * vocab_size]);
            }
        }
        Ok(logits.concat())
    }
}

/// Natural log-probabilities of the whole vocabulary, from rows of logits.
fn log_probabilities(logits: &[f32], vocab_size: usize) -> Vec<f64> {
    logits.chunks(vocab_size).flat_map(log_softmax).collect()
}

/// Computed in f64.
fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f64> + '_ {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - f64::from(largest)).exp()).sum();
    let log_sum = f64::from(largest) + sum.ln();
    logits.iter().map(move |&logit| f64::from(logit) - log_sum)
}

fn ask_for_every_row(batch: &mut Batch) {
    batch.sample_rows.extend(0..batch.num_tokens() as u32);
    batch.sampling.resize(batch.num_tokens(), Sampling::GREEDY);
    batch.keep_logits = true;
}

/// Pages of each prompt, those of others between them and the order reversed.
fn interleaved_pages() -> [Vec<u32>; PROMPT_TOKENS.len()] {
    let needed = PROMPT_TOKENS.map(|tokens| tokens.div_ceil(PAGE_SIZE));
    let mut next = needed.iter().sum::<usize>() as u32;
    let mut pages = [const { Vec::new() }; PROMPT_TOKENS.len()];
    for _ in 0..needed.into_iter().max().unwrap_or(0) {
        for (pages, _) in pages.iter_mut().zip(needed).filter(|(pages, needed)| pages.len() < *needed) {
            next -= 1;
            pages.push(next);
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Cpu, CpuDType, Reference, Shape};
    use crate::model::shape_of;
    use crate::weights::open;

    fn tiny() -> Box<dyn Weights> {
        open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny/qwen3").as_ref()).unwrap()
    }

    #[test]
    fn every_way_computes_every_token_once() {
        for steps in [one_prompt_a_step(), cut(|_, _| usize::MAX), cut(|_, _| 1), cut(|p, s| 1 + (p + s) % 3)]
        {
            let mut tokens = [0; PROMPT_TOKENS.len()];
            steps.iter().flatten().for_each(|&(prompt, count)| tokens[prompt] += count);
            assert_eq!(tokens, PROMPT_TOKENS);
        }
        let mut pages = interleaved_pages().concat();
        assert_eq!(pages, [5, 4, 3, 1, 2, 0]);
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 6, "no page has two owners");
    }

    fn shape() -> Shape {
        shape_of(tiny().config())
    }

    fn expected(reference: Reference) -> Expected {
        Expected::new(reference, tiny().as_ref()).unwrap()
    }

    fn subject<B: Backend>(backend: B) -> Subject<B> {
        Subject::load(backend, tiny().as_ref()).unwrap()
    }

    #[test]
    fn the_cpu_agrees_with_the_reference_however_the_prompts_are_cut() {
        let mut cpu = subject(Cpu::new(shape(), CpuDType::F32));
        for check in check_forward(&expected(Reference::new(shape())), &mut cpu).unwrap() {
            assert!(check.passed(), "{check:?}");
            assert_eq!(check.logits, 48 * 320);
        }
    }

    #[test]
    fn a_backend_that_rotates_otherwise_fails_wherever_position_matters() {
        let mut bent = shape();
        bent.inv_freq.iter_mut().for_each(|frequency| *frequency *= 1.01);
        let mut bent = subject(Cpu::new(bent, CpuDType::F32));
        let checks = check_forward(&expected(Reference::new(shape())), &mut bent).unwrap();
        for check in checks {
            assert_eq!(check.deviation.verdict(), Verdict::Wrong, "{check:?}");
            // The first prompt has one token, at position 0, which is not rotated.
            assert!(!check.worst_at.as_ref().unwrap().starts_with("prompt 1"), "{check:?}");
        }
    }

    fn bf16(value: f32) -> f32 {
        half::bf16::from_f32(value).to_f32()
    }

    #[test]
    fn a_narrow_type_is_held_against_what_a_plain_implementation_loses() {
        let rounding = || Reference::rounding(shape(), bf16);
        let coarse = |value: f32| f32::from_bits(value.to_bits() & 0xFFF8_0000);
        let (right, plain) = (expected(Reference::new(shape())), expected(rounding()));
        let check = |candidate| check_log_probabilities(&right, &plain, &mut subject(candidate)).unwrap();
        for found in check(rounding()) {
            assert!(found.passed() && (found.deviation.tolerance_used - 1.0 / 1.1).abs() < 1e-9, "{found:?}");
        }
        let exact = check(Reference::new(shape()));
        assert!(exact.iter().all(|found| found.passed() && found.deviation.max_error == 0.0), "{exact:?}");
        let coarser = check(Reference::rounding(shape(), coarse));
        assert!(coarser.iter().all(|found| !found.passed()), "{coarser:?}");
    }

    #[test]
    fn the_reference_has_the_same_bits_in_every_batch_and_a_bent_one_differs() {
        let reference = || subject(Reference::new(shape()));
        let same = check_invariance(&mut reference()).unwrap();
        assert!(same.passed() && same.logits == 3 * 48 * 320 && same.worst_at.is_none(), "{same:?}");
        assert!(check_same_bits("twice", &mut reference(), &mut reference()).unwrap().passed());
        let mut rounding = subject(Reference::rounding(shape(), bf16));
        let differs = check_same_bits("rounded", &mut reference(), &mut rounding).unwrap();
        assert_eq!((differs.deviation.verdict(), differs.passed()), (Verdict::Wrong, false), "{differs:?}");
        assert!(differs.deviation.max_error > 0.0 && differs.worst_at.is_some(), "{differs:?}");
    }

    #[test]
    fn the_place_of_the_worst_logit_is_named_by_prompt_and_token() {
        let at = |token: usize, used| {
            let deviation = Deviation { index: token * 320 + 319, tolerance_used: used, ..Deviation::NONE };
            worst_at(&deviation, 320)
        };
        let named = |text: &str| Some(text.to_owned());
        assert_eq!(at(0, 0.5), named("prompt 1, token 1"));
        assert_eq!(at(5, 0.5), named("prompt 2, token 5"));
        assert_eq!(at(47, f64::NAN), named("prompt 4, token 23"));
        assert_eq!((at(48, 0.5), at(0, 0.0)), (None, None));
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let sum: f64 = log_softmax(&[100.0, 101.0, -3.0]).map(f64::exp).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        let by_hand = log_softmax(&[0.0, 0.0]).next().unwrap();
        assert!((by_hand + std::f64::consts::LN_2).abs() < 1e-15);
    }
}
