//! The ceilings of the CPU: memory that all threads stream through, and a square product through candle.

use std::borrow::Cow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, ensure};

use super::{CpuDType, CpuWeight, product};
use crate::arch::TensorRole;
use crate::backend::WeightUse;
use crate::backend::peaks::{Kind, Load, Protocol, TOO_LITTLE, Timed, Work};
use crate::record::{Ceiling, Ceilings, Maybe};
use crate::weights::{HostTensor, StoredDType};

/// Shortest repetition, ns: waking the threads takes some microseconds.
const LEAST_NS: u64 = 20_000_000;
/// Sides of the product that are tried; each is eight times the work of the one before.
const SIDES: [usize; 5] = [512, 1024, 2048, 4096, 8192];
/// Words of random data before they repeat.
const BLOCK_WORDS: usize = 1 << 16;
const NOT_A_GPU: &str = "not_a_gpu";

/// Measures them. Runs in rayon's global pool.
///
/// # Errors
/// When a product fails.
pub(super) fn ceilings(protocol: &Protocol) -> anyhow::Result<Ceilings> {
    let begin_ns = protocol.clock.now_ns();
    let mut found = Ceilings::missing(NOT_A_GPU);
    found.last_level_cache_bytes = protocol.host.last_level_cache_bytes.clone();
    found.matmul_flops_per_s.insert("f32".to_owned(), square_product(protocol)?);
    if !protocol.arithmetic_only {
        (found.read_bandwidth_bytes_per_s, found.copy_bandwidth_bytes_per_s) = bandwidths(protocol)?;
    }
    found.duration_ns = protocol.clock.now_ns() - begin_ns;
    Ok(found)
}

/// Random words, a part for each thread, which that thread touches first so that it lies near it.
struct Parts(Vec<Mutex<Vec<u64>>>);

impl Parts {
    /// None when the memory cannot be had.
    fn new(bytes: u64) -> Option<Self> {
        let words = (bytes as usize / size_of::<u64>()).div_ceil(rayon::current_num_threads());
        // Both halves hold the same blocks.
        let words = words.next_multiple_of(2 * BLOCK_WORDS);
        let parts: Vec<Option<Vec<u64>>> = rayon::broadcast(|thread| random(words, thread.index() as u64));
        Some(Parts(parts.into_iter().map(|part| part.map(Mutex::new)).collect::<Option<_>>()?))
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|part| size_of_val(lock(part).as_slice()) as u64).sum()
    }

    /// Compares the halves of each part: reads every word, as fast as the system's memcmp does in any build.
    fn halves_are_equal(&self) -> bool {
        let equal = rayon::broadcast(|thread| {
            let part = lock(&self.0[thread.index()]);
            let (first, second) = part.split_at(part.len() / 2);
            first == second
        });
        equal.into_iter().all(|equal| equal)
    }

    /// Copies the first half of each part over its second.
    fn copy(&self) {
        rayon::broadcast(|thread| {
            let mut part = lock(&self.0[thread.index()]);
            let half = part.len() / 2;
            let (from, to) = part.split_at_mut(half);
            to.copy_from_slice(from);
        });
    }
}

fn lock(part: &Mutex<Vec<u64>>) -> MutexGuard<'_, Vec<u64>> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SplitMix64 from `seed` on, a block of it again and again: making all words anew would take longer than reading them.
fn random(words: usize, seed: u64) -> Option<Vec<u64>> {
    let word = |i: u64| {
        let z = (seed << 40 | i).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z ^ (z >> 27)
    };
    let block: Vec<u64> = (0..words.min(BLOCK_WORDS) as u64).map(word).collect();
    let mut values = Vec::new();
    values.try_reserve_exact(words).ok()?;
    while values.len() < words {
        values.extend_from_slice(&block[..block.len().min(words - values.len())]);
    }
    Some(values)
}

type Bandwidths = (Maybe<Ceiling>, Maybe<Ceiling>);

fn bandwidths(protocol: &Protocol) -> anyhow::Result<Bandwidths> {
    let missing = |reason: &str| Ok((Maybe::missing(reason), Maybe::missing(reason)));
    let bytes = match protocol.host_buffer_bytes() {
        Ok(bytes) => bytes,
        Err(reason) => return missing(&reason),
    };
    let Some(parts) = Parts::new(bytes) else { return missing(TOO_LITTLE) };
    let work = |by| Work { by, per_unit: parts.bytes(), working_set_bytes: parts.bytes() };
    let read = protocol.time(LEAST_NS, |count| {
        let equal = (0..count).all(|_| parts.halves_are_equal());
        ensure!(equal, "memory does not hold what was written to it: two equal buffers differ");
        Ok(())
    })?;
    let copy = protocol.time(LEAST_NS, |count| {
        (0..count).for_each(|_| parts.copy());
        Ok(())
    })?;
    // A copy reads a half and writes the other: as many bytes as are read by reading all.
    Ok((read.ceiling(Kind::Rate, work("memcmp")), copy.ceiling(Kind::Rate, work("memcpy"))))
}

/// Flops of candle's product of two square f32 matrices. The side is doubled while a repetition of it would leave time
/// for ten.
fn square_product(protocol: &Protocol) -> anyhow::Result<Maybe<Ceiling>> {
    let mut found = Maybe::missing("no_time");
    let mut side_ns: Option<u64> = None;
    for side in SIDES {
        if side_ns.is_some_and(|time_ns| time_ns * 8 * 10 > protocol.probe_ns) {
            break;
        }
        let Some(square) = Square::new(side)? else { break };
        let timed = square.time(protocol)?;
        let fastest_ns = timed.times_ns.iter().min().map(|time_ns| time_ns / timed.units);
        let work =
            Work { by: "candle", per_unit: 2 * (side as u64).pow(3), working_set_bytes: square.bytes() };
        let ceiling = timed.ceiling(Kind::Rate, work);
        if ceiling.value().is_some() {
            found = ceiling;
        }
        side_ns = fastest_ns;
        if side_ns.is_none() {
            break;
        }
    }
    Ok(found)
}

/// Side of the product that is lent as a load: some milliseconds on a core.
const LOAD_SIDE: usize = 512;

/// Lends a square product.
///
/// # Errors
/// When there is no memory for it, or a product fails; else those of `user`.
pub(super) fn lend_load(user: &mut dyn FnMut(&mut Load<'_>) -> anyhow::Result<()>) -> anyhow::Result<bool> {
    let square = Square::new(LOAD_SIDE)?.context("the host has no memory for a load")?;
    let (mut sums, mut y) = (Vec::new(), vec![0f32; LOAD_SIDE * LOAD_SIDE]);
    user(&mut || product(&square.weight, &square.x, LOAD_SIDE, &mut sums, &mut y))?;
    Ok(true)
}

/// A square product, ready to run.
struct Square {
    side: usize,
    weight: CpuWeight,
    x: Vec<f32>,
}

impl Square {
    /// None when the memory cannot be had.
    fn new(side: usize) -> anyhow::Result<Option<Self>> {
        let (Some(weight), Some(x)) = (random(side * side / 2, 1), random(side * side / 2, 2)) else {
            return Ok(None);
        };
        let values = |words: &[u64]| words.iter().flat_map(|word| pair(*word)).collect::<Vec<f32>>();
        let bytes = values(&weight).into_iter().flat_map(f32::to_le_bytes).collect();
        let tensor = HostTensor {
            name: "square".to_owned(),
            role: TensorRole::Linear,
            dtype: StoredDType::F32,
            shape: vec![side, side],
            bytes: Cow::Owned(bytes),
        };
        let weight = CpuWeight::new(WeightUse::Linear, &[tensor], CpuDType::F32)?;
        Ok(Some(Square { side, weight, x: values(&x) }))
    }

    fn bytes(&self) -> u64 {
        3 * size_of_val(self.x.as_slice()) as u64
    }

    fn time(&self, protocol: &Protocol) -> anyhow::Result<Timed> {
        let (mut sums, mut y) = (Vec::new(), vec![0f32; self.side * self.side]);
        protocol.time(LEAST_NS, |count| {
            (0..count).try_for_each(|_| product(&self.weight, &self.x, self.side, &mut sums, &mut y))
        })
    }
}

/// Two values in [−1, 1).
fn pair(word: u64) -> [f32; 2] {
    [word as u32, (word >> 32) as u32].map(|bits| (bits as i32) as f32 * (1.0 / (1u64 << 31) as f32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::peaks::HostMemory;
    use crate::clock::Clock;

    #[test]
    fn reading_sees_every_word_and_copying_moves_every_one() {
        let parts = Parts::new(8).unwrap();
        assert_eq!(parts.bytes(), (rayon::current_num_threads() * 2 * BLOCK_WORDS * 8) as u64);
        assert!(lock(&parts.0[0]).iter().all(|word| *word != 0));
        for word in [0, BLOCK_WORDS - 1, BLOCK_WORDS, 2 * BLOCK_WORDS - 1] {
            assert!(parts.halves_are_equal());
            lock(&parts.0[0])[word] ^= 4;
            assert!(!parts.halves_are_equal(), "{word}");
            parts.copy();
        }
    }

    #[test]
    fn ceilings_are_what_bytes_and_flops_over_time_give() {
        let clock = Clock::monotonic();
        let protocol = Protocol {
            deadline_ns: clock.now_ns() + 20_000_000_000,
            clock,
            probe_ns: 1,
            host: HostMemory {
                last_level_cache_bytes: Maybe::Value(1 << 20),
                available_bytes: Maybe::Value(1 << 30),
            },
            arithmetic_only: false,
        };
        let found = ceilings(&protocol).unwrap();
        let read = found.read_bandwidth_bytes_per_s.value().unwrap();
        let copy = found.copy_bandwidth_bytes_per_s.value().unwrap();
        let matmul = found.matmul_flops_per_s["f32"].value().unwrap();
        for (ceiling, least, most) in [(read, 1e8, 1e13), (copy, 1e8, 1e13), (matmul, 1e8, 1e15)] {
            // On a busy machine the mean of three may lie far below their median.
            assert!(ceiling.value <= ceiling.best, "{ceiling:?}");
            assert!((least..most).contains(&ceiling.value), "{ceiling:?}");
            // No more can have been done than the time allows: bandwidth x time = bytes.
            let seconds = f64::from(ceiling.repetitions) * ceiling.work_per_repetition as f64 / ceiling.best;
            assert!(seconds * 1e9 <= found.duration_ns as f64, "{ceiling:?}");
        }
        assert!((8 << 20..16 << 20).contains(&read.working_set_bytes), "{read:?}");
        assert_eq!(copy.work_per_repetition % copy.working_set_bytes, 0);
        assert_eq!(found.launch_ns.reason(), Some("not_a_gpu"));
    }
}
