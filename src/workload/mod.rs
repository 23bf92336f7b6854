//! What is measured: the five kinds of cell, their names, and the requests each consists of, all fixed by a seed
//! before any clock starts. Knows neither engine nor time.

mod numbers;

pub use numbers::parse_numbers;

use crate::backend::Sampling;
use crate::engine::Request;
use crate::record::Workload;

/// Request number `id` of a cell. Its prompt depends on the seed, the cell and `id` alone.
pub fn request(workload: &Workload, id: u64, seed: u64, vocab_size: usize) -> Request {
    let (prompt_tokens, max_tokens) = workload.lengths();
    let stream = mix(seed ^ mix(fnv1a(workload.key().as_bytes())) ^ mix(id.wrapping_add(1)));
    Request {
        id,
        prompt: (0..u64::from(prompt_tokens))
            .map(|position| below(mix(stream.wrapping_add(position)), vocab_size as u64) as u32)
            .collect(),
        max_tokens,
        sampling: Sampling { temperature: 0.0, seed: stream },
        hold: matches!(workload, Workload::Decode { .. }),
    }
}

/// Times of Poisson arrivals at `rate_per_s`, ns after the start, one per call: seeded exponential gaps.
#[derive(Clone, Debug)]
pub struct PoissonArrivals {
    state: u64,
    mean_gap_ns: f64,
    at_ns: f64,
}

impl PoissonArrivals {
    pub fn new(rate_per_s: f64, seed: u64) -> Self {
        PoissonArrivals { state: mix(seed), mean_gap_ns: 1e9 / rate_per_s, at_ns: 0.0 }
    }
}

impl Iterator for PoissonArrivals {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        // A uniform in (0, 1]: 53 bits, never 0, so that the logarithm is finite.
        let uniform = ((mix(self.state) >> 11) + 1) as f64 / (1u64 << 53) as f64;
        self.at_ns -= uniform.ln() * self.mean_gap_ns;
        Some(self.at_ns as u64)
    }
}

/// Number `index` of a seeded sequence, uniform over all 64-bit numbers.
pub(crate) fn random(seed: u64, index: u64) -> u64 {
    mix(seed ^ mix(index.wrapping_add(1)))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that mixes all bits.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number below `bound` from 64 random bits (Lemire's multiplication; the bias is under 2⁻⁴⁰ here).
fn below(random: u64, bound: u64) -> u64 {
    ((u128::from(random) * u128::from(bound)) >> 64) as u64
}

/// FNV-1a, 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CELL: Workload = Workload::Generate { batch: 2, isl: 64, osl: 8 };

    #[test]
    fn prompts_depend_on_seed_cell_and_request_alone() {
        let one = request(&CELL, 3, 7, 1000);
        assert_eq!(one, request(&CELL, 3, 7, 1000));
        assert_ne!(one.prompt, request(&CELL, 4, 7, 1000).prompt);
        assert_ne!(one.prompt, request(&CELL, 3, 8, 1000).prompt);
        assert!(one.prompt.iter().all(|&token| token < 1000));
        assert_eq!((one.prompt.len(), one.max_tokens), (64, 8));
    }

    #[test]
    fn prompt_tokens_cover_the_vocabulary_evenly() {
        let prompt = request(&Workload::Prefill { batch: 1, isl: 60_000 }, 0, 1, 6).prompt;
        for token in 0..6 {
            let share = prompt.iter().filter(|&&t| t == token).count() as f64 / prompt.len() as f64;
            assert!((share - 1.0 / 6.0).abs() < 0.01, "token {token} has share {share}");
        }
    }

    #[test]
    fn poisson_gaps_are_exponential_with_the_asked_rate() {
        let times: Vec<u64> = PoissonArrivals::new(50.0, 9).take(20_000).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e9).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "mean gap {mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.04, "an exponential's sd equals its mean");
        assert_eq!(times[..5], PoissonArrivals::new(50.0, 9).take(5).collect::<Vec<_>>());
    }
}
