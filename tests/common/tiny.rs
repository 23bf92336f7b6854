//! The tiny models under `models/tiny` and their goldens, which numpy computed in float64 (`models/tiny/make.py`).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokmeter::backend::{Backend, Shape};
use tokmeter::model::{Model, shape_of};
use tokmeter::weights::{Weights, open};

/// Every architecture, and both file formats of the one that has two.
pub const MODELS: [&str; 4] = ["llama", "llama/model.gguf", "qwen2", "qwen3"];

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
pub struct Prompt {
    pub token_ids: Vec<u32>,
    /// After the last token, `[vocab_size]`.
    pub last_logits: Vec<f64>,
    /// Log-probabilities after each position, `[token_ids][5]`.
    pub top: Vec<Vec<(u32, f64)>>,
    pub greedy: Greedy,
}

#[derive(Deserialize)]
pub struct Greedy {
    pub token_ids: Vec<u32>,
}

fn path(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny").join(model)
}

pub fn weights(model: &str) -> Box<dyn Weights> {
    open(&path(model)).unwrap()
}

pub fn prompts(model: &str) -> Vec<Prompt> {
    let folder = model.split('/').next().unwrap();
    let text = std::fs::read_to_string(path(folder).join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    assert_eq!(golden.prompts.len(), 5);
    golden.prompts
}

/// The model on the device that `backend` makes.
pub fn load<B: Backend>(model: &str, backend: impl FnOnce(Shape) -> B) -> (B, Model<B>) {
    let weights = weights(model);
    let mut backend = backend(shape_of(weights.config()));
    let model = Model::load(&mut backend, weights.as_ref(), &mut |_| {}).unwrap();
    (backend, model)
}
