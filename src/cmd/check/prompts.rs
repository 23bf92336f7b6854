//! `check --prompts`: scores given texts. Every line of input is settled (parsed, tokenised, held against the model's
//! vocabulary and context) before anything is computed, and the output is written as a whole or not at all.

mod input;

use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use super::Args;
use crate::backend::cuda::is_device_error;
use crate::backend::{Backend, Cpu, Cuda};
use crate::cmd::device::{Target, remark_products};
use crate::cmd::model::{locate, tokenizer_of};
use crate::cmd::progress::{FetchBar, byte_bar, step_bar};
use crate::cmd::{bad_file, print, remark, usage};
use crate::engine::score;
use crate::model::{Model, shape_of};
use crate::record::write_atomically;
use crate::weights::registry::DEFAULT_MODEL;
use crate::weights::tokenizer::Tokenizer;
use crate::weights::{Weights, open};
use input::{Bounds, Prompt};

/// Candidates listed after each position when `--top` is not given.
const DEFAULT_TOP: usize = 8;

/// A line of output.
#[derive(Serialize)]
struct Scored<'a> {
    id: &'a str,
    token_ids: &'a [u32],
    /// `[token id, log-probability]`, likeliest first, `[token_ids][top]`.
    top: Vec<Vec<(u32, f64)>>,
    greedy: Greedy,
}

#[derive(Serialize)]
struct Greedy {
    token_ids: Vec<u32>,
    /// `null` without a tokenizer.
    text: Option<String>,
}

/// # Errors
/// When a line, the model or the place of the output is wrong; nothing is written then.
pub(super) fn score_file(file: &Path, target: Target, args: &Args) -> anyhow::Result<()> {
    if args.top == Some(0) {
        return Err(usage("--top is 0, expected at least 1"));
    }
    check_place(args.out.as_deref())?;
    let lines = input::read(file).map_err(bad_file)?;
    let name = args.model.as_deref().unwrap_or(DEFAULT_MODEL);
    let path = locate(name, args.offline, Box::new(FetchBar::default()))?;
    let weights = open(&path).map_err(bad_file)?;
    let tokenizer = tokenizer(weights.as_ref(), lines.iter().any(|line| line.is_text()))?;
    let bounds = Bounds {
        vocab_size: weights.config().vocab_size,
        context: weights.config().max_position_embeddings,
        greedy: args.greedy.unwrap_or(0),
    };
    let prompts: Vec<Prompt> = lines
        .into_iter()
        .map(|line| line.settle(tokenizer.as_ref(), &bounds))
        .collect::<anyhow::Result<_>>()
        .with_context(|| file.display().to_string())
        .map_err(bad_file)?;
    let shape = shape_of(weights.config());
    let scorer = Scorer { weights: weights.as_ref(), prompts: &prompts, tokenizer: tokenizer.as_ref(), args };
    let text = match target {
        Target::Cuda { index, options } => scorer.score_all(Cuda::new(index, shape, options)?)?,
        Target::Cpu(dtype) => scorer.score_all(Cpu::new(shape, dtype))?,
    };
    match &args.out {
        None => print(&text),
        Some(out) => write_atomically(out, text.as_bytes())
            .with_context(|| format!("{}: cannot write the scores", out.display())),
    }
}

/// A folder that does not exist is better known before the work than after it.
fn check_place(out: Option<&Path>) -> anyhow::Result<()> {
    let folder = out.and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => {
            Err(usage(format!("--out: {} is not a folder", folder.display())))
        }
        _ => Ok(()),
    }
}

/// The model's tokenizer. Without texts to encode one is not needed, and its absence is only remarked on.
fn tokenizer(weights: &dyn Weights, needed: bool) -> anyhow::Result<Option<Tokenizer>> {
    match tokenizer_of(weights) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(error) if needed => Err(bad_file(error.context("a text needs a tokenizer"))),
        Err(error) => {
            remark(&format!("continuations have no text: {error:#}"));
            Ok(None)
        }
    }
}

/// What is scored, and by which model.
struct Scorer<'a> {
    weights: &'a dyn Weights,
    prompts: &'a [Prompt],
    tokenizer: Option<&'a Tokenizer>,
    args: &'a Args,
}

impl Scorer<'_> {
    /// The whole output, one line for each prompt.
    fn score_all<B: Backend>(&self, mut backend: B) -> anyhow::Result<String> {
        remark_products(&backend.info());
        let model = self.load(&mut backend)?;
        let (top, greedy) = (self.args.top.unwrap_or(DEFAULT_TOP), self.args.greedy.unwrap_or(0));
        let bar = step_bar("scoring", self.prompts.len() as u64);
        let mut text = String::new();
        for Prompt { id, token_ids } in self.prompts {
            let scored = score(&mut backend, &model, token_ids, top, greedy)
                .with_context(|| format!("prompt {id:?}"))?;
            let decoded = self.tokenizer.map(|tokenizer| tokenizer.decode(&scored.greedy)).transpose()?;
            let greedy = Greedy { token_ids: scored.greedy, text: decoded };
            text.push_str(&serde_json::to_string(&Scored { id, token_ids, top: scored.top, greedy })?);
            text.push('\n');
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(text)
    }

    fn load<B: Backend>(&self, backend: &mut B) -> anyhow::Result<Model<B>> {
        let bar = byte_bar("loading weights", Some(self.weights.info().stored_bytes.values().sum()));
        let model = Model::load(backend, self.weights, &mut |bytes| bar.inc(bytes))
            .map_err(|error| if is_device_error(&error) { error } else { bad_file(error) })?;
        bar.finish_and_clear();
        Ok(model)
    }
}
