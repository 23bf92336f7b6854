//! What the model thinks of a text rather than how fast: log-probabilities of the next token after each position,
//! and a greedy continuation. For holding the engine against another one (`check --prompts`).

use anyhow::{Context as _, ensure};

use super::pages::pages_needed;
use crate::backend::{Backend, Batch, Sampling, TokenInput};
use crate::model::{Model, Workspace};

/// Rows of logits that are on the device at once, so that a long text needs no more memory than a short one.
const ROWS: usize = 64;

#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The likeliest next tokens after each position with their natural log-probabilities, likeliest first and the
    /// lower id first on a tie, `[token_ids][top_k]`.
    pub top: Vec<Vec<(u32, f64)>>,
    /// The greedy continuation after the last position.
    pub greedy: Vec<u32>,
}

/// Scores one text alone: `top_k` candidates after each of its positions, then `greedy` further tokens.
///
/// # Errors
/// When the text is empty, too long or outside the vocabulary, when a logit is not a finite number, or when the
/// device fails.
pub fn score<B: Backend>(
    backend: &mut B,
    model: &Model<B>,
    token_ids: &[u32],
    top_k: usize,
    greedy: usize,
) -> anyhow::Result<Score> {
    check(model, token_ids, greedy)?;
    let mut pass = Pass::new(backend, model, token_ids.len() + greedy)?;
    let mut top = Vec::with_capacity(token_ids.len());
    let mut next = 0;
    for chunk in token_ids.chunks(ROWS) {
        let from = top.len();
        next = pass.forward(chunk, from)?;
        let logits = pass.logits(chunk.len())?;
        for (row, logits) in logits.chunks(model.config().vocab_size).enumerate() {
            let ranked = top_log_probabilities(logits, top_k)
                .with_context(|| format!("logits after position {}", from + row))?;
            top.push(ranked);
        }
    }
    let mut continuation = Vec::with_capacity(greedy);
    while continuation.len() < greedy {
        continuation.push(next);
        if continuation.len() < greedy {
            next = pass.forward(&[next], token_ids.len() + continuation.len() - 1)?;
        }
    }
    Ok(Score { top, greedy: continuation })
}

fn check<B: Backend>(model: &Model<B>, token_ids: &[u32], greedy: usize) -> anyhow::Result<()> {
    let (vocab_size, context) = (model.config().vocab_size, model.config().max_position_embeddings);
    ensure!(!token_ids.is_empty(), "the prompt has no tokens, expected at least 1");
    let length = token_ids.len().saturating_add(greedy);
    ensure!(
        length <= context,
        "{} prompt tokens and {greedy} output tokens exceed the model's context of {context} tokens",
        token_ids.len()
    );
    let outside = token_ids.iter().find(|&&token| token as usize >= vocab_size);
    ensure!(
        outside.is_none(),
        "token id {} is outside the vocabulary of {vocab_size}",
        outside.copied().unwrap_or_default()
    );
    Ok(())
}

/// One sequence alone on the device.
struct Pass<'a, B: Backend> {
    backend: &'a mut B,
    model: &'a Model<B>,
    kv: B::Kv,
    workspace: Workspace<B>,
    pages: Vec<u32>,
    batch: Batch,
    sampled: Vec<u32>,
}

impl<'a, B: Backend> Pass<'a, B> {
    fn new(backend: &'a mut B, model: &'a Model<B>, length: usize) -> anyhow::Result<Self> {
        let pages: Vec<u32> = (0..pages_needed(length) as u32).collect();
        let kv = backend.kv_cache(pages.len())?;
        let workspace = Workspace::new(backend, ROWS, ROWS)?;
        Ok(Pass { backend, model, kv, workspace, pages, batch: Batch::default(), sampled: Vec::new() })
    }

    /// Computes `tokens` at the positions from `first_position`, and returns the greedy token after the last.
    fn forward(&mut self, tokens: &[u32], first_position: usize) -> anyhow::Result<u32> {
        self.batch.clear();
        let inputs = tokens.iter().map(|&id| TokenInput::Id(id));
        self.batch.push(inputs, first_position as u32, &self.pages, None);
        // Every position is asked for its logits, not only the last as in generation.
        self.batch.sample_rows.extend(0..tokens.len() as u32);
        self.batch.sampling.resize(tokens.len(), Sampling::GREEDY);
        self.batch.keep_logits = true;
        self.model.forward(self.backend, &self.batch, &mut self.kv, &mut self.workspace)?;
        self.sampled.clear();
        self.backend.sampled(&mut self.sampled)?;
        self.sampled.last().copied().context("the device sampled no token")
    }

    /// Logits of the last forward pass, `[rows, vocab_size]`.
    fn logits(&mut self, rows: usize) -> anyhow::Result<Vec<f32>> {
        self.backend.download(&self.workspace.logits, rows, self.model.config().vocab_size)
    }
}

/// The `top_k` largest of the log-softmax of `logits`, computed in f64.
fn top_log_probabilities(logits: &[f32], top_k: usize) -> anyhow::Result<Vec<(u32, f64)>> {
    let bad = logits.iter().position(|logit| !logit.is_finite());
    if let Some(token) = bad {
        anyhow::bail!("token {token} has logit {}, expected a finite number", logits[token]);
    }
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    // Relative to the largest throughout, so that neither `exp` overflows nor digits are lost to a common offset.
    let relative = |logit: f32| f64::from(logit) - largest;
    let log_sum = logits.iter().map(|&logit| relative(logit).exp()).sum::<f64>().ln();

    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier = |&a: &u32, &b: &u32| {
        let order = logits[b as usize].partial_cmp(&logits[a as usize]);
        order.expect("finite logits compare").then(a.cmp(&b))
    };
    let top_k = top_k.min(ids.len());
    if top_k < ids.len() {
        ids.select_nth_unstable_by(top_k, likelier);
        ids.truncate(top_k);
    }
    ids.sort_unstable_by(likelier);
    Ok(ids.into_iter().map(|id| (id, relative(logits[id as usize]) - log_sum)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_ranked_with_the_lower_id_first_on_a_tie() {
        let ranked = top_log_probabilities(&[1.0, 3.0, 3.0, -2.0], 3).unwrap();
        let total = (1f64.exp() + 2.0 * 3f64.exp() + (-2f64).exp()).ln();
        let expected = [(1, 3.0 - total), (2, 3.0 - total), (0, 1.0 - total)];
        assert_eq!(ranked.len(), 3);
        for ((id, got), (expected_id, want)) in ranked.into_iter().zip(expected) {
            assert_eq!(id, expected_id);
            assert!((got - want).abs() < 1e-14, "token {id}: {got}, expected {want} to 1e-14");
        }
    }

    #[test]
    fn probabilities_sum_to_one_even_where_exp_would_overflow() {
        let logits = [900.0, 901.5, -900.0, 899.0];
        let sum: f64 = top_log_probabilities(&logits, 10).unwrap().iter().map(|(_, log)| log.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-14, "{sum}, expected 1 to 1e-14");
    }

    #[test]
    fn a_logit_that_is_no_number_is_an_error() {
        let error = top_log_probabilities(&[0.0, f32::NAN], 1).unwrap_err();
        assert_eq!(error.to_string(), "token 1 has logit NaN, expected a finite number");
    }
}
