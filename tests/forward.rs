//! The forward pass against numpy in float64, on weights of every architecture and format.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::tiny;
use tokmeter::arch::Config;
use tokmeter::backend::{Backend, Batch, Cpu, CpuDType, Reference, Sampling, Shape, TokenInput};
use tokmeter::engine::{pages_needed, score};
use tokmeter::model::check::{Expected, Subject, check_forward};
use tokmeter::model::{Model, Workspace, shape_of};
use tokmeter::weights::{HostTensor, StoredDType, Weights, WeightsInfo};

/// Absolute, for logits (which reach ±9) and for log-probabilities. The reference rounds to f32 between operations:
/// about a millionth of the largest logit.
const REFERENCE_TOLERANCE: f64 = 1e-5;
/// The CPU also sums in f32, in an order that depends on its vectors; these weights are scaled so that layers outweigh
/// the embedding, and errors grow.
const CPU_TOLERANCE: f64 = 5e-5;

fn cpu(shape: Shape) -> Cpu {
    Cpu::new(shape, CpuDType::F32)
}

/// Logits after the last token, from the whole prompt in one step.
fn last_logits<B: Backend>(backend: &mut B, model: &Model<B>, token_ids: &[u32]) -> Vec<f32> {
    let pages: Vec<u32> = (0..pages_needed(token_ids.len()) as u32).collect();
    let mut kv = backend.kv_cache(pages.len()).unwrap();
    let mut workspace = Workspace::new(backend, token_ids.len(), 1).unwrap();
    let mut batch = Batch::default();
    batch.clear();
    batch.push(token_ids.iter().map(|&id| TokenInput::Id(id)), 0, &pages, Some(Sampling::GREEDY));
    batch.keep_logits = true;
    model.forward(backend, &batch, &mut kv, &mut workspace).unwrap();
    backend.sampled(&mut Vec::new()).unwrap();
    backend.download(&workspace.logits, 1, model.config().vocab_size).unwrap()
}

/// Largest distance of the last logits, and of the log-probabilities of every position's five likeliest tokens. The
/// greedy continuations must be the same.
fn distance<B: Backend>(model_name: &str, backend: impl FnOnce(Shape) -> B) -> [f64; 2] {
    let (mut backend, model) = tiny::load(model_name, backend);
    let (mut logits, mut log_probabilities) = (0f64, 0f64);
    for prompt in tiny::prompts(model_name) {
        let last = last_logits(&mut backend, &model, &prompt.token_ids);
        assert_eq!(last.len(), prompt.last_logits.len());
        for (&found, right) in last.iter().zip(prompt.last_logits) {
            assert!(found.is_finite());
            logits = logits.max((f64::from(found) - right).abs());
        }
        let scored = score(&mut backend, &model, &prompt.token_ids, 5, 16).unwrap();
        assert_eq!(scored.greedy, prompt.greedy.token_ids, "{model_name}");
        assert_eq!(scored.top.len(), prompt.top.len());
        for ((found_id, found), (right_id, right)) in
            scored.top.iter().flatten().zip(prompt.top.iter().flatten())
        {
            assert_eq!(found_id, right_id, "{model_name}");
            log_probabilities = log_probabilities.max((found - right).abs());
        }
    }
    println!("{model_name}: logits {logits:.1e}, log-probabilities {log_probabilities:.1e}");
    [logits, log_probabilities]
}

fn assert_close(model_name: &str, distance: [f64; 2], tolerance: f64) {
    assert!(distance.iter().all(|&largest| largest <= tolerance), "{model_name}: {distance:?}");
}

#[test]
fn the_reference_agrees_with_numpy_on_every_architecture_and_format() {
    for model in tiny::MODELS {
        assert_close(model, distance(model, Reference::new), REFERENCE_TOLERANCE);
    }
}

/// A pool of one thread computes one row after another.
#[test]
fn the_reference_has_the_same_bits_on_any_number_of_threads() {
    for name in tiny::MODELS {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut reference, model) = tiny::load(name, Reference::new);
                assert_eq!(reference.info().threads, threads);
                let prompt: Vec<u32> = (0..45).map(|i| i * 7 % 320).collect();
                last_logits(&mut reference, &model, &prompt)
            })
        };
        let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let serial = bits(on(1));
        assert!([2, 3, 8].into_iter().all(|threads| bits(on(threads)) == serial), "{name}");
    }
}

#[test]
fn the_cpu_agrees_with_numpy_on_every_architecture_and_format() {
    for model in tiny::MODELS {
        assert_close(model, distance(model, cpu), CPU_TOLERANCE);
    }
}

/// A model whose matrices are quantised on the way.
struct Quantised {
    whole: Box<dyn Weights>,
    dtype: GgmlDType,
}

impl Weights for Quantised {
    fn config(&self) -> &Config {
        self.whole.config()
    }

    fn info(&self) -> &WeightsInfo {
        self.whole.info()
    }

    fn tensor(&self, name: &str) -> anyhow::Result<HostTensor<'_>> {
        let tensor = self.whole.tensor(name)?;
        if tensor.shape.len() < 2 {
            return Ok(tensor);
        }
        let values = Tensor::from_vec(tensor.to_f32()?, tensor.shape.as_slice(), &Device::Cpu)?;
        let bytes = QTensor::quantize(&values, self.dtype)?.data()?.into_owned();
        let dtype =
            [StoredDType::Q8_0, StoredDType::Q4_1].into_iter().find(|dtype| dtype.ggml() == self.dtype);
        Ok(HostTensor { dtype: dtype.unwrap(), bytes: Cow::Owned(bytes), ..tensor })
    }
}

/// Blocks are multiplied by activations that are not rounded, so the tolerance is that of f32.
#[test]
fn quantised_weights_give_what_the_reference_gives_on_their_dequantised_values() {
    for model in ["llama", "qwen2", "qwen3"] {
        for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_1] {
            let weights = Quantised { whole: tiny::weights(model), dtype };
            let shape = || shape_of(weights.config());
            let expected = Expected::new(Reference::new(shape()), &weights).unwrap();
            let mut kept = Subject::load(Cpu::new(shape(), CpuDType::Quantized), &weights).unwrap();
            for check in check_forward(&expected, &mut kept).unwrap() {
                println!("{model} {dtype:?} {check:?}");
                assert!(check.passed(), "{model} {dtype:?} {check:?}");
            }
        }
    }
}
