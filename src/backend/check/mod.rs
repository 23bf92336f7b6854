//! Every operation of one backend held against another's, usually [`super::Reference`], at many shapes with random
//! data. What must not be read (rows beyond the batch, slots beyond the context, pages of others) holds NaN.
//!
//! A value passes when it is within `ε · (rms + |reference|)`, where ε belongs to the candidate's arithmetic and rms is
//! that of the value's row in the reference: sums of many terms cancel, so an error relative to the value alone means
//! little.
//!
//! A case has the same data whether it runs alone or among all: its numbers are made from its name.

mod cases;
mod deviation;
mod rig;

use super::{Backend, Shape};
use crate::arch::Op;
use crate::weights::StoredDType;

pub use cases::{Case, cases};
use cases::{batches, shapes};
pub use deviation::{Deviation, MOST_BY_ROUNDING, Verdict};
use rig::{Random, Rig};

/// One case and what was found.
#[derive(Clone, Debug, PartialEq)]
pub struct OpCheck {
    pub op: &'static str,
    /// Shape, batch and part in words.
    pub case: String,
    pub deviation: Deviation,
}

impl OpCheck {
    pub fn passed(&self) -> bool {
        self.deviation.verdict() == Verdict::Ok
    }
}

/// Checks every operation at every shape that the candidate `supports`; see [`check_cases`].
///
/// # Errors
/// When a backend cannot be made or an operation fails.
pub fn check_ops<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    stored: StoredDType,
    supports: impl Fn(&Shape) -> bool,
) -> anyhow::Result<Vec<OpCheck>> {
    check_cases(reference, candidate, stored, &cases(supports))
}

/// Checks these cases, some of [`cases`] in their order, and computes nothing that they do not need. Matrices are stored
/// as `stored` wherever their rows are whole blocks of it, and both backends are given the same bytes.
///
/// # Errors
/// When a backend cannot be made or an operation fails.
pub fn check_cases<A: Backend, B: Backend>(
    reference: impl Fn(Shape) -> anyhow::Result<A>,
    candidate: impl Fn(Shape) -> anyhow::Result<B>,
    stored: StoredDType,
    cases: &[Case],
) -> anyhow::Result<Vec<OpCheck>> {
    let mut checks = Vec::new();
    for cases in cases.chunk_by(|a, b| a.place == b.place) {
        let [shape, batch] = cases[0].place;
        let shape = shapes().swap_remove(shape).1;
        let mut rig = Rig {
            a: reference(shape.clone())?,
            b: candidate(shape.clone())?,
            shape,
            stored,
            cases,
            random: Random(0),
            checks: &mut checks,
        };
        rig.run(&batches()[batch].1)?;
    }
    Ok(checks)
}

/// What the candidate's arithmetic may lose in one operation.
fn epsilon(compute_dtype: &str, op: Op) -> f64 {
    let narrow = match op {
        // Keys and values that `attn_in` has rounded, and weights: errors of scores are exponentiated, and where the
        // values cancel they stay.
        Op::Attention => 2.0,
        _ => 1.0,
    };
    match compute_dtype {
        // Sums of up to some thousand products in another order; blocks are multiplied by unrounded activations.
        "f32" | "quantized" => 1e-5,
        // Three more bits of mantissa than bf16.
        "f16" => narrow / 256.0,
        // Eight bits of mantissa, sums in f32: each operand and each result is off by up to 2⁻⁹ of itself, and the
        // largest of some 10⁵ sums of such errors is looked at.
        _ => narrow / 32.0,
    }
}
