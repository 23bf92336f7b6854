//! From a row of logits to a token, the same on every backend, and the queue of samples not yet taken.
//!
//! Greedy takes the largest logit. At a temperature `T > 0` it is Gumbel-max: the largest `logit / T + gumbel`, where
//! the noise depends on (seed, position, id) alone, never on the batch. Both take the lowest id on a tie. Every step
//! below is integer arithmetic or one correctly rounded f32 operation (`fma` where `mul_add` stands), so that a kernel
//! that repeats the steps in this order gets the same bits.

use std::collections::VecDeque;

use anyhow::{Context as _, bail};

use super::Sampling;

/// 2⁶⁴ divided by the golden ratio, odd: the increment of SplitMix64.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's finaliser.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// What the draws of one position are made from.
fn position_key(seed: u64, position: u32) -> u64 {
    mix(mix(seed.wrapping_add(GOLDEN)) ^ u64::from(position))
}

/// Strictly between 0 and 1, exact in f32: `(2 b + 1) / 2²⁴` for the 23 highest bits `b` of the hash.
fn uniform(key: u64, id: u32) -> f32 {
    let bits = mix(key.wrapping_add(GOLDEN.wrapping_mul(u64::from(id) + 1))) >> 41;
    (2 * bits + 1) as f32 * (1.0 / 16_777_216.0)
}

/// Natural logarithm of a positive normal number (Cephes `logf`), relative error below 2⁻²².
fn ln(x: f32) -> f32 {
    // x = m · 2ᵉ with m in [√½, √2): the addend carries into the exponent when the mantissa is above √2.
    let shifted = x.to_bits().wrapping_add(0x3F80_0000 - 0x3F35_04F3);
    let exponent = ((shifted >> 23) as i32 - 127) as f32;
    let f = f32::from_bits((shifted & 0x007F_FFFF) + 0x3F35_04F3) - 1.0;
    const TERMS: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    let square = f * f;
    let series = TERMS[1..].iter().fold(TERMS[0], |sum, &term| sum.mul_add(f, term));
    let tail = exponent.mul_add(-2.121_944_4e-4, series * (f * square));
    exponent.mul_add(0.693_359_4, f + square.mul_add(-0.5, tail))
}

/// The noise added to the logit of `id`.
fn gumbel(key: u64, id: u32) -> f32 {
    -ln(-ln(uniform(key, id)))
}

/// The token chosen from `logits`, `[vocab_size]`, for the token after `position`.
///
/// # Errors
/// When a logit is NaN, with its id.
pub fn choose(logits: &[f32], sampling: Sampling, position: u32) -> anyhow::Result<u32> {
    if sampling.temperature > 0.0 {
        let key = position_key(sampling.seed, position);
        let noisy: Vec<f32> =
            (0u32..).zip(logits).map(|(id, &logit)| logit / sampling.temperature + gumbel(key, id)).collect();
        return arg_max(&noisy);
    }
    arg_max(logits)
}

/// Index of the largest value, the lowest on a tie.
fn arg_max(values: &[f32]) -> anyhow::Result<u32> {
    const LANES: usize = 32;
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut nans = [false; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            nans[lane] |= chunk[lane].is_nan();
            largest[lane] = largest[lane].max(chunk[lane]);
        }
    }
    if nans.contains(&true) || rest.iter().any(|value| value.is_nan()) {
        let id = values.iter().position(|value| value.is_nan()).unwrap_or_default();
        bail!("the logit of token id {id} is not a number, expected a finite value");
    }
    let largest = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let id =
        values.iter().position(|&value| value == largest).context("there are no logits to sample from")?;
    Ok(id as u32)
}

/// Samples of the last step, which the next step may read, and those the engine has not taken yet.
#[derive(Debug, Default)]
pub(super) struct SampleQueue {
    last: Vec<u32>,
    waiting: VecDeque<Vec<u32>>,
    spare: Vec<Vec<u32>>,
}

impl SampleQueue {
    /// One step's samples, in the order of its sample rows.
    pub(super) fn push(&mut self, samples: impl IntoIterator<Item = u32>) {
        let mut step = self.spare.pop().unwrap_or_default();
        step.clear();
        step.extend(samples);
        self.last.clone_from(&step);
        self.waiting.push_back(step);
    }

    /// The sample of this row of the previous step.
    pub(super) fn previous(&self, row: u32) -> anyhow::Result<u32> {
        self.last.get(row as usize).copied().with_context(|| {
            format!("the previous step sampled {} rows, expected at least {}", self.last.len(), row + 1)
        })
    }

    /// Moves the oldest step's samples to `out`.
    pub(super) fn take(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()> {
        let step = self.waiting.pop_front().context("no step is waiting for its samples to be taken")?;
        out.extend_from_slice(&step);
        self.spare.push(step);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let mut logits = vec![0.5f32; 100];
        assert_eq!(choose(&logits, Sampling::GREEDY, 0).unwrap(), 0);
        (logits[40], logits[70], logits[99]) = (2.0, 2.0, 2.0);
        assert_eq!(choose(&logits, Sampling::GREEDY, 0).unwrap(), 40);
        assert_eq!(choose(&[f32::NEG_INFINITY; 3], Sampling::GREEDY, 0).unwrap(), 0);
    }

    #[test]
    fn a_logit_that_is_not_a_number_is_an_error_that_names_the_id() {
        for sampling in [Sampling::GREEDY, Sampling { temperature: 0.7, seed: 1 }] {
            for id in [0usize, 5, 36] {
                let mut logits = vec![1.0f32; 37];
                logits[id] = f32::NAN;
                let error = choose(&logits, sampling, 3).unwrap_err().to_string();
                assert!(error.contains(&format!("token id {id} ")), "{error}");
            }
        }
    }

    /// Against f64's logarithm over the arguments Gumbel noise needs. Tolerance: 2⁻²² relative.
    #[test]
    fn the_logarithm_is_accurate_over_its_whole_range() {
        let mut arguments: Vec<f32> = (0..24).map(|power| 1.0 / (1u32 << (power + 1)) as f32).collect();
        arguments.extend((0..100_000).map(|step| (step as f32 + 0.5) / 100_000.0));
        arguments.extend((1..1000).map(|step| 1.0 - step as f32 / 16_777_216.0));
        arguments.extend((1..2000).map(|step| step as f32 * 0.01));
        for x in arguments.into_iter().filter(|&x| x != 1.0) {
            let (found, right) = (f64::from(ln(x)), f64::from(x).ln());
            assert!((found - right).abs() <= right.abs() * 2f64.powi(-22), "ln({x}) = {found}, not {right}");
        }
    }

    #[test]
    fn uniform_draws_stay_strictly_inside_the_unit_interval_and_are_even() {
        let key = position_key(7, 11);
        let mut buckets = [0u32; 16];
        for id in 0..160_000 {
            let value = uniform(key, id);
            assert!(value > 0.0 && value < 1.0);
            buckets[(value * 16.0) as usize] += 1;
        }
        // 10 000 expected in each; six standard deviations are 581.
        assert!(buckets.iter().all(|&count| count.abs_diff(10_000) < 581), "{buckets:?}");
    }

    /// Draw frequencies against softmax. Tolerance: six standard deviations of a binomial.
    #[test]
    fn temperature_sampling_follows_the_softmax() {
        let (logits, temperature, draws) = ([1.0f32, 0.0, -1.0, 2.0], 0.8f32, 20_000u32);
        let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = [0u32; 4];
        for position in 0..draws {
            counts[choose(&logits, Sampling { temperature, seed: 3 }, position).unwrap() as usize] += 1;
        }
        for (id, weight) in weights.iter().enumerate() {
            let (share, n) = (weight / total, f64::from(draws));
            let deviation = (n * share * (1.0 - share)).sqrt();
            assert!((f64::from(counts[id]) - n * share).abs() < 6.0 * deviation, "{id}: {counts:?}");
        }
    }

    #[test]
    fn draws_depend_on_seed_position_and_id_and_on_nothing_else() {
        let logits = [0.0f32; 1000];
        let draw = |seed, position| choose(&logits, Sampling { temperature: 1.0, seed }, position).unwrap();
        assert_eq!(draw(5, 9), draw(5, 9));
        let by_position: Vec<u32> = (0..20).map(|position| draw(5, position)).collect();
        let by_seed: Vec<u32> = (0..20).map(|seed| draw(seed, 5)).collect();
        assert!(by_position.windows(2).any(|pair| pair[0] != pair[1]));
        assert_ne!(by_position, by_seed);
        // Neighbouring seeds must not be shifted copies of each other.
        assert_ne!(draw(5, 10), draw(6, 9));
    }

    /// Values fixed once: a kernel that follows the same steps must reproduce them bit for bit.
    #[test]
    fn the_noise_has_known_bits() {
        let key = position_key(42, 7);
        let bits: Vec<u32> = [0u32, 1, 49_151].iter().map(|&id| gumbel(key, id).to_bits()).collect();
        assert_eq!(key, 0xAEBD_B1A5_611C_EE63);
        assert_eq!(bits, [1_065_479_254, 1_082_720_734, 1_059_613_295]); // 1.0150249, 4.281478, 0.65787405
    }

    #[test]
    fn steps_are_taken_in_order_and_the_last_one_stays_readable() {
        let mut queue = SampleQueue::default();
        queue.push([1, 2]);
        queue.push([3]);
        let mut out = Vec::new();
        queue.take(&mut out).unwrap();
        assert_eq!(out, [1, 2]);
        assert_eq!(queue.previous(0).unwrap(), 3);
        assert!(queue.previous(1).is_err());
        queue.take(&mut out).unwrap();
        assert_eq!(out, [1, 2, 3]);
        assert!(queue.take(&mut out).is_err());
    }
}
