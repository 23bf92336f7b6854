//! Chooses the algorithm for a product: the one that was kept on disk, if the library still accepts it, else the
//! fastest of the library's guesses, measured on this device with random activations and the weight itself.

use std::sync::Arc;

use super::library::{Addresses, Candidate, Handle, Numbers, Problem};
use super::shape::ProductShape;
use super::stored::Stored;
use crate::backend::CudaDType;
use crate::backend::cuda::context::{Event, Stream};
use crate::backend::cuda::error::{CudaError, OutOfMemory};
use crate::backend::cuda::memory::{DeviceBuffer, Pinned};
use crate::record::Chosen;

/// Guesses that the library is asked for.
const CANDIDATES: usize = 16;
/// Timed launches of each, after one that warms up; the fastest counts.
const LAUNCHES: usize = 4;
/// Random values that activations repeat.
const RANDOM_VALUES: usize = 1 << 18;

/// The algorithm that a product runs with, and how it was chosen.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) problem: Problem,
    pub(super) candidate: Candidate,
    pub(super) numbers: Numbers,
    pub(super) chosen: Chosen,
    /// Algorithms that were timed.
    pub(super) timed: u32,
    /// The fastest launch; none without room for the operands of a trial.
    pub(super) best_ns: Option<u64>,
    /// Rows that the problem is set to, which the algorithm is known to take.
    pub(super) rows: usize,
}

/// What tuning needs of the backend.
pub(super) struct Tuner<'a> {
    pub(super) handle: &'a Handle,
    pub(super) stream: &'a Stream,
    pub(super) dtype: CudaDType,
    pub(super) workspace: &'a DeviceBuffer<u8>,
    pub(super) stored: &'a Stored,
}

impl Tuner<'_> {
    /// `w` is the address of the weight.
    ///
    /// # Errors
    /// When no algorithm can do the product, or the device fails.
    pub(super) fn choose(&self, shape: &ProductShape, w: u64) -> anyhow::Result<Choice> {
        let problem = Problem::new(shape, self.dtype)?;
        let trial = match Trial::new(self, shape, w) {
            Ok(trial) => Some(trial),
            // A device filled to the brim must not fail for want of a measurement: the library's first guess has to do.
            Err(error) if error.is::<OutOfMemory>() => None,
            Err(error) => return Err(error),
        };
        let (chosen, timed, (candidate, best_ns)) = match self.kept(shape, &problem, trial.as_ref())? {
            Some(kept) => (Chosen::Cache, u32::from(trial.is_some()), kept),
            None => self.fastest(shape, &problem, trial.as_ref())?,
        };
        let numbers = candidate.algorithm.numbers()?;
        Ok(Choice { problem, candidate, numbers, chosen, timed, best_ns, rows: shape.rows })
    }

    /// The algorithm on disk, if the library accepts it and it runs.
    fn kept(
        &self,
        shape: &ProductShape,
        problem: &Problem,
        trial: Option<&Trial<'_>>,
    ) -> anyhow::Result<Option<(Candidate, Option<u64>)>> {
        let Some(candidate) = self.stored.get(shape).and_then(|kept| self.checked(problem, kept)) else {
            return Ok(None);
        };
        let Some(trial) = trial else { return Ok(Some((candidate, None))) };
        // Running it also loads its kernels, which a capture might not allow.
        Ok(trial.fastest_ns(problem, &candidate)?.ok().map(|ns| (candidate, Some(ns))))
    }

    /// The fastest of the library's guesses; its first where there is no trial.
    fn fastest(
        &self,
        shape: &ProductShape,
        problem: &Problem,
        trial: Option<&Trial<'_>>,
    ) -> anyhow::Result<(Chosen, u32, (Candidate, Option<u64>))> {
        let guesses = self.handle.candidates(problem, CANDIDATES, self.workspace.len())?;
        let mut candidates =
            guesses.into_iter().filter_map(|guess| self.checked(problem, guess.algorithm)).peekable();
        let Some(&first) = candidates.peek() else { return Err(none_can(shape, "it offers none")) };
        let Some(trial) = trial else { return Ok((Chosen::Heuristic, 0, (first, None))) };
        let (mut best, mut timed, mut refusal) = (None, 0, None);
        for candidate in candidates {
            match trial.fastest_ns(problem, &candidate)? {
                Ok(ns) => {
                    timed += 1;
                    if best.is_none_or(|(_, least_ns)| ns < least_ns) {
                        best = Some((candidate, ns));
                    }
                }
                Err(error) => refusal = Some(error.to_string()),
            }
        }
        let Some((candidate, ns)) = best else {
            return Err(none_can(shape, &refusal.unwrap_or_default()));
        };
        self.stored.put(shape, candidate.algorithm);
        Ok((Chosen::Tuned, timed, (candidate, Some(ns))))
    }

    fn checked(&self, problem: &Problem, algorithm: super::library::Algorithm) -> Option<Candidate> {
        self.handle.check(problem, algorithm, self.workspace.len())
    }
}

fn none_can(shape: &ProductShape, why: &str) -> anyhow::Error {
    anyhow::anyhow!("cuBLASLt has no algorithm for the product of {shape}: {why}\nhint: use --gemm own")
}

/// Operands of one product, of its true sizes: random activations, the weight itself, room for the result.
struct Trial<'a> {
    tuner: &'a Tuner<'a>,
    at: Addresses,
    marks: Vec<(Event, Event)>,
    _a: DeviceBuffer<u16>,
    _y: DeviceBuffer<u8>,
    /// The copies from it are waited for when it is dropped.
    _random: Pinned,
}

impl<'a> Trial<'a> {
    fn new(tuner: &'a Tuner<'a>, shape: &ProductShape, w: u64) -> anyhow::Result<Self> {
        let (stream, context) = (tuner.stream, tuner.stream.context());
        let what = "tuning of matrix products";
        let a = DeviceBuffer::<u16>::new(stream, shape.rows * shape.depth, what)?;
        let y = DeviceBuffer::<u8>::zeroed(stream, shape.output_bytes(), what)?;
        let block = RANDOM_VALUES.min(a.len());
        let mut random = Pinned::new(context, block * size_of::<u16>())?;
        fill_randomly(&mut random.as_mut_slice::<u16>()[..block], tuner.dtype);
        a.copy_from(stream, 0, &random, block)?;
        a.repeat(stream, block)?;
        let mark = || Event::timed(&Arc::clone(context));
        let marks = (0..LAUNCHES).map(|_| Ok((mark()?, mark()?))).collect::<Result<_, CudaError>>()?;
        let at = Addresses {
            y: y.address(),
            a: a.address(),
            w,
            workspace: tuner.workspace.address(),
            workspace_bytes: tuner.workspace.len(),
        };
        Ok(Trial { tuner, at, marks, _a: a, _y: y, _random: random })
    }

    /// The fastest launch of `candidate`; the inner error when the library refuses it.
    fn fastest_ns(&self, problem: &Problem, candidate: &Candidate) -> anyhow::Result<Result<u64, CudaError>> {
        let stream = self.tuner.stream;
        if let Err(refusal) = self.launch(problem, candidate) {
            return Ok(Err(refusal));
        }
        for (begin, end) in &self.marks {
            begin.record(stream)?;
            if let Err(refusal) = self.launch(problem, candidate) {
                return Ok(Err(refusal));
            }
            end.record(stream)?;
        }
        stream.synchronize()?;
        let times = self.marks.iter().map(|(begin, end)| end.ns_since(begin));
        Ok(Ok(times.collect::<Result<Vec<u64>, CudaError>>()?.into_iter().min().unwrap_or(u64::MAX)))
    }

    #[allow(unsafe_code)]
    fn launch(&self, problem: &Problem, candidate: &Candidate) -> Result<(), CudaError> {
        let Tuner { handle, stream, .. } = self.tuner;
        // SAFETY: the operands are of the problem's sizes and live as long as this trial, which waits before they are
        // freed; the weight is the caller's.
        unsafe { handle.multiply(problem, candidate.algorithm, self.at, stream) }
    }
}

/// Even in ±1, as normed activations are: a product of zeros or of few different values draws less power and runs
/// faster than a real one.
fn fill_randomly(values: &mut [u16], dtype: CudaDType) {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for value in values {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *value = dtype.bits((state >> 40) as f32 / 8_388_608.0 - 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_activations_are_spread_over_plus_and_minus_one() {
        let mut values = vec![0u16; 10_000];
        for dtype in [CudaDType::Bf16, CudaDType::F16] {
            fill_randomly(&mut values, dtype);
            let values: Vec<f32> = values.iter().map(|&bits| dtype.value(bits)).collect();
            assert!(values.iter().all(|value| (-1.0..=1.0).contains(value)));
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let square = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
            assert!(mean.abs() < 0.02 && (square - 1.0 / 3.0).abs() < 0.02, "{mean} {square}");
        }
    }
}
