//! A look at the device's numerics before its speed is measured: a short text under teacher forcing, on the default
//! model's own weights, against the CPU in f32. Fast wrong answers are no result.

use anyhow::Context as _;

use super::choices::{Choices, Subject};
use super::view::View;
use crate::backend::{Backend, Cpu, CpuDType, Cuda, CudaDType};
use crate::cmd::device::Target;
use crate::cmd::model::{locate, tokenizer_of};
use crate::cmd::remark;
use crate::engine::score;
use crate::model::{Model, shape_of};
use crate::record::{Maybe, Numerics};
use crate::weights::registry::DEFAULT_MODEL;
use crate::weights::{Weights, open};

/// The text; its 40 tokens take the CPU well under a second.
const TEXT: &str = "A megawatt of accelerators serves so many tokens a second, and each of them costs what the power, \
                    the buildings and the machines cost. Whoever plans for one must measure both at once.";
/// Mean distance of a plain bf16 implementation (sums exact, everything kept rounded) on this text, nat.
const PLAIN_BF16_NAT: f64 = 0.106;
/// The same in f16, which has three more bits of mantissa.
const PLAIN_F16_NAT: f64 = 0.0084;
/// How much further than a plain implementation a device may be.
const MORE_THAN_PLAIN: f64 = 1.5;

/// Looks where the choices ask for it. A model that cannot be had is a reason, not an error.
///
/// # Errors
/// When the device cannot compute.
pub(super) fn look(choices: &Choices, view: &View) -> anyhow::Result<Maybe<Numerics>> {
    let Subject::Model(target @ Target::Cuda { index, options }) = choices.subject else {
        return Ok(Maybe::missing("not_a_gpu"));
    };
    if !choices.check_numerics {
        return Ok(Maybe::missing("model_was_named"));
    }
    let weights =
        match locate(DEFAULT_MODEL, choices.offline, view.fetch_progress()).and_then(|path| open(&path)) {
            Ok(weights) => weights,
            Err(error) => {
                remark(&format!("warning: numerics of {target} are not looked at: {error:#}"));
                return Ok(Maybe::missing("model_not_available"));
            }
        };
    let token_ids = tokenizer_of(weights.as_ref())?.encode(TEXT, true)?;
    let shape = shape_of(weights.config());
    let right = log_probabilities(Cpu::new(shape.clone(), CpuDType::F32), weights.as_ref(), &token_ids)?;
    let found = log_probabilities(Cuda::new(index, shape, options)?, weights.as_ref(), &token_ids)
        .with_context(|| format!("computing {DEFAULT_MODEL} on {target}"))?;
    let plain_nat = match options.dtype {
        CudaDType::Bf16 => PLAIN_BF16_NAT,
        CudaDType::F16 => PLAIN_F16_NAT,
    };
    let numerics = judged(&right, &found, token_ids.len(), MORE_THAN_PLAIN * plain_nat);
    if !numerics.ok {
        remark(&format!(
            "warning: {target} computes log-probabilities {:.4} nat from f32 on average, expected at most {:.4}\n\
             hint: `tokmeter check --device {target}` says which operation is off",
            numerics.mean_distance_nat, numerics.mean_bound_nat
        ));
    }
    Ok(Maybe::Value(numerics))
}

/// Log-probabilities of the whole vocabulary after each token, by token id.
fn log_probabilities<B: Backend>(
    mut backend: B,
    weights: &dyn Weights,
    token_ids: &[u32],
) -> anyhow::Result<Vec<f64>> {
    let model = Model::load(&mut backend, weights, &mut |_| {})?;
    let vocab_size = weights.config().vocab_size;
    let score = score(&mut backend, &model, token_ids, vocab_size, 0)?;
    let mut all = vec![f64::NAN; token_ids.len() * vocab_size];
    for (row, top) in all.chunks_mut(vocab_size).zip(score.top) {
        for (token, log_probability) in top {
            row[token as usize] = log_probability;
        }
    }
    Ok(all)
}

fn judged(right: &[f64], found: &[f64], tokens: usize, mean_bound_nat: f64) -> Numerics {
    let mut distances: Vec<f64> = right.iter().zip(found).map(|(a, b)| (a - b).abs()).collect();
    distances.sort_by(f64::total_cmp);
    let mean_distance_nat = distances.iter().sum::<f64>() / distances.len() as f64;
    Numerics {
        model: DEFAULT_MODEL.to_owned(),
        tokens: tokens as u32,
        mean_distance_nat,
        p99_distance_nat: distances[(distances.len() - 1) * 99 / 100],
        mean_bound_nat,
        ok: mean_distance_nat <= mean_bound_nat,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::weights::fetch::Silent;

    #[test]
    fn a_distance_is_over_all_values_and_its_bound_is_kept() {
        let right: Vec<f64> = (0..200).map(f64::from).collect();
        let found: Vec<f64> =
            right.iter().map(|value| value + if *value < 190.0 { 0.0 } else { 0.2 }).collect();
        let numerics = judged(&right, &found, 2, 0.01);
        assert!((numerics.mean_distance_nat - 0.01).abs() < 1e-9 && numerics.ok);
        assert!((numerics.p99_distance_nat - 0.2).abs() < 1e-9);
        assert!(!judged(&right, &found, 2, 0.009).ok);
    }

    #[test]
    fn the_bound_is_what_a_plain_implementation_loses() {
        let Ok(path) = locate(DEFAULT_MODEL, true, Box::new(Silent)) else {
            assert!(
                std::env::var_os("TOKMETER_REQUIRE_ALL").is_none(),
                "the default model is not in the cache"
            );
            return;
        };
        let weights = open(&path).unwrap();
        let token_ids = tokenizer_of(weights.as_ref()).unwrap().encode(TEXT, true).unwrap();
        let shape = shape_of(weights.config());
        let right = log_probabilities(Cpu::new(shape.clone(), CpuDType::F32), weights.as_ref(), &token_ids);
        for (dtype, expected) in [(CudaDType::Bf16, PLAIN_BF16_NAT), (CudaDType::F16, PLAIN_F16_NAT)] {
            let plain = Reference::rounding(shape.clone(), dtype.rounding());
            let plain = log_probabilities(plain, weights.as_ref(), &token_ids).unwrap();
            let found = judged(right.as_ref().unwrap(), &plain, token_ids.len(), 1.0).mean_distance_nat;
            assert!(
                (found / expected - 1.0).abs() < 0.1,
                "{dtype:?}: {found} nat on {} tokens",
                token_ids.len()
            );
        }
    }
}
