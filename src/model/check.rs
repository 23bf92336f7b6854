//! The whole forward pass of one backend held against another's, usually `Reference`: the same prompts cut into steps
//! in several ways. The reference computes each prompt alone and whole, so that batching, paging and chunking on the
//! candidate are part of what is checked.
//!
//! A logit passes when it is within `ε · (rms + |reference|)`, where ε belongs to the candidate's arithmetic and rms is
//! that of all the reference's logits. A backend in a narrow type is also held against what an ordinary implementation
//! in that type loses, and against itself where it promises the same bits.

use super::{Model, Workspace, shape_of};
use crate::backend::{Backend, Batch, PAGE_SIZE, Sampling, Shape, TokenInput};
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
    /// Largest absolute difference.
    pub max_error: f64,
    /// Largest share of the tolerance that a logit used; above 1 (or not finite) fails.
    pub tolerance_used: f64,
    pub passed: bool,
}

/// Checks every logit after every position of some prompts.
///
/// # Errors
/// When a backend cannot be made, a weight is broken, or a device fails.
pub fn check_forward<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    weights: &dyn Weights,
) -> anyhow::Result<Vec<ForwardCheck>> {
    let prompts = prompts(weights.config().vocab_size);
    let right = Subject::load(reference(shape_of(weights.config()))?, weights)?
        .logits(&prompts, &one_prompt_a_step())?;
    let mut subject = Subject::load(candidate(shape_of(weights.config()))?, weights)?;
    let epsilon = epsilon(subject.backend.info().compute_dtype);
    let check = |(case, steps): (&'static str, Vec<Step>)| {
        let found = subject.logits(&prompts, &steps)?;
        let (max_error, tolerance_used) = distance(&right, &found, epsilon);
        Ok(ForwardCheck::new(case, steps.len(), right.len(), max_error, tolerance_used))
    };
    ways().into_iter().map(check).collect()
}

/// Checks that log-probabilities under teacher forcing are no further from f32 than those of a `yardstick`: an
/// ordinary implementation in the candidate's type. A tenth more is allowed, on average and in the worst hundredth.
///
/// # Errors
/// When a backend cannot be made, a weight is broken, or a device fails.
pub fn check_log_probabilities<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    yardstick: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    weights: &dyn Weights,
) -> anyhow::Result<[ForwardCheck; 2]> {
    let shape = || shape_of(weights.config());
    let (prompts, steps) = (prompts(weights.config().vocab_size), one_prompt_a_step());
    let right = Subject::load(reference(shape())?, weights)?.log_probabilities(&prompts, &steps)?;
    let plain = Subject::load(yardstick(shape())?, weights)?.log_probabilities(&prompts, &steps)?;
    let found = Subject::load(candidate(shape())?, weights)?.log_probabilities(&prompts, &steps)?;
    let (ours, plain) = (Distances::new(&right, &found), Distances::new(&right, &plain));
    let check = |case, ours: f64, plain: f64| {
        ForwardCheck::new(case, steps.len(), right.len(), ours, ours / (MORE_THAN_PLAIN * plain))
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
/// When the backend cannot be made, a weight is broken, or the device fails.
pub fn check_invariance<B: Backend>(
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    weights: &dyn Weights,
) -> anyhow::Result<ForwardCheck> {
    let prompts = prompts(weights.config().vocab_size);
    let mut subject = Subject::load(candidate(shape_of(weights.config()))?, weights)?;
    let [first, others @ ..] = ways();
    let alone = subject.logits(&prompts, &first.1)?;
    let mut check = ForwardCheck::new("the same bits in every batch, deterministic", 0, 0, 0.0, 0.0);
    for (_, steps) in others {
        check.add_same_bits(&alone, &subject.logits(&prompts, &steps)?, steps.len());
    }
    Ok(check)
}

/// Checks that two ways of running a backend give the same bits: each decodes the prompts token by token, twice over.
///
/// # Errors
/// When a backend cannot be made, a weight is broken, or a device fails.
pub fn check_same_bits<B: Backend>(
    case: &'static str,
    one: impl Fn(Shape) -> anyhow::Result<B>,
    other: impl Fn(Shape) -> anyhow::Result<B>,
    weights: &dyn Weights,
) -> anyhow::Result<ForwardCheck> {
    let (prompts, steps) = (prompts(weights.config().vocab_size), token_by_token());
    let mut subjects = [
        Subject::load(one(shape_of(weights.config()))?, weights)?,
        Subject::load(other(shape_of(weights.config()))?, weights)?,
    ];
    let mut check = ForwardCheck::new(case, 0, 0, 0.0, 0.0);
    let right = subjects[0].logits(&prompts, &steps)?;
    for index in [1, 0, 1] {
        check.add_same_bits(&right, &subjects[index].logits(&prompts, &steps)?, steps.len());
    }
    Ok(check)
}

impl ForwardCheck {
    fn new(case: &'static str, steps: usize, logits: usize, max_error: f64, tolerance_used: f64) -> Self {
        let passed = tolerance_used <= 1.0;
        ForwardCheck { case, steps, logits, max_error, tolerance_used, passed }
    }

    /// Adds a comparison with no tolerance.
    fn add_same_bits(&mut self, right: &[f32], found: &[f32], steps: usize) {
        let same = right.iter().map(|value| value.to_bits()).eq(found.iter().map(|value| value.to_bits()));
        let error = if same { 0.0 } else { distance(right, found, 1.0).0 };
        let used = if same { 0.0 } else { f64::INFINITY };
        *self = Self::new(
            self.case,
            self.steps + steps,
            self.logits + found.len(),
            self.max_error.max(error),
            self.tolerance_used.max(used),
        );
    }
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
struct Subject<B: Backend> {
    backend: B,
    model: Model<B>,
}

impl<B: Backend> Subject<B> {
    fn load(mut backend: B, weights: &dyn Weights) -> anyhow::Result<Self> {
        let model = Model::load(&mut backend, weights, &mut |_| {})?;
        Ok(Subject { backend, model })
    }

    /// Logits after every position, prompt after prompt, `[tokens of all prompts, vocab_size]`.
    fn logits(&mut self, prompts: &[Vec<u32>], steps: &[Step]) -> anyhow::Result<Vec<f32>> {
        let vocab_size = self.model.config().vocab_size;
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

    /// Natural log-probabilities of the whole vocabulary after every position, as in [`Subject::logits`].
    fn log_probabilities(&mut self, prompts: &[Vec<u32>], steps: &[Step]) -> anyhow::Result<Vec<f64>> {
        let vocab_size = self.model.config().vocab_size;
        Ok(self.logits(prompts, steps)?.chunks(vocab_size).flat_map(log_softmax).collect())
    }
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

/// Largest absolute difference, and largest share of the tolerance used; NaN where a value is none.
fn distance(right: &[f32], found: &[f32], epsilon: f64) -> (f64, f64) {
    let mean_square = right.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / right.len() as f64;
    let rms = mean_square.sqrt();
    // `f64::max` would drop a NaN.
    let larger = |most: f64, value: f64| if value > most || value.is_nan() { value } else { most };
    right.iter().zip(found).fold((0.0, 0.0), |(max_error, used), (&right, &found)| {
        let error = (f64::from(right) - f64::from(found)).abs();
        let tolerance = epsilon * (rms + f64::from(right).abs());
        (larger(max_error, error), larger(used, error / tolerance))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Cpu, CpuDType, Reference};
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

    #[test]
    fn the_cpu_agrees_with_the_reference_however_the_prompts_are_cut() {
        let cpu = |shape| Ok(Cpu::new(shape, CpuDType::F32));
        for check in check_forward(|shape| Ok(Reference::new(shape)), cpu, tiny().as_ref()).unwrap() {
            assert!(check.passed, "{check:?}");
            assert_eq!(check.logits, 48 * 320);
        }
    }

    #[test]
    fn a_backend_that_rotates_otherwise_fails_wherever_position_matters() {
        let bent = |mut shape: Shape| {
            shape.inv_freq.iter_mut().for_each(|frequency| *frequency *= 1.01);
            Ok(Cpu::new(shape, CpuDType::F32))
        };
        let checks = check_forward(|shape| Ok(Reference::new(shape)), bent, tiny().as_ref()).unwrap();
        assert!(checks.iter().all(|check| !check.passed), "{checks:?}");
    }

    fn bf16(value: f32) -> f32 {
        half::bf16::from_f32(value).to_f32()
    }

    #[test]
    fn a_narrow_type_is_held_against_what_a_plain_implementation_loses() {
        let exact = |shape| Ok(Reference::new(shape));
        let rounding = |shape| Ok(Reference::rounding(shape, bf16));
        let coarse = |value: f32| f32::from_bits(value.to_bits() & 0xFFF8_0000);
        let coarser = |shape| Ok(Reference::rounding(shape, coarse));
        let check = |candidate: &dyn Fn(Shape) -> anyhow::Result<Reference>| {
            check_log_probabilities(exact, rounding, candidate, tiny().as_ref()).unwrap()
        };
        for found in check(&rounding) {
            assert!(found.passed && (found.tolerance_used - 1.0 / 1.1).abs() < 1e-9, "{found:?}");
        }
        assert!(check(&exact).iter().all(|found| found.passed && found.max_error == 0.0));
        assert!(check(&coarser).iter().all(|found| !found.passed), "{:?}", check(&coarser));
    }

    #[test]
    fn the_reference_has_the_same_bits_in_every_batch_and_a_bent_one_differs() {
        let reference = |shape| Ok(Reference::new(shape));
        let same = check_invariance(reference, tiny().as_ref()).unwrap();
        assert!(same.passed && same.logits == 3 * 48 * 320, "{same:?}");
        let rounding = |shape| Ok(Reference::rounding(shape, bf16));
        assert!(check_same_bits("twice", reference, reference, tiny().as_ref()).unwrap().passed);
        let differs = check_same_bits("rounded", reference, rounding, tiny().as_ref()).unwrap();
        assert!(!differs.passed && differs.max_error > 0.0, "{differs:?}");
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let sum: f64 = log_softmax(&[100.0, 101.0, -3.0]).map(f64::exp).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        let by_hand = log_softmax(&[0.0, 0.0]).next().unwrap();
        assert!((by_hand + std::f64::consts::LN_2).abs() < 1e-15);
    }

    #[test]
    fn a_logit_that_is_no_number_fails() {
        assert!(distance(&[1.0, 2.0], &[f32::NAN, 2.0], 1.0).1.is_nan());
        assert_eq!(distance(&[1.0, -1.0], &[1.0, -1.5], 0.5), (0.5, 0.5));
    }
}
