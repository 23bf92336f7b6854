//! One step's work as plain integers: which tokens, at which positions, into which slots, and which rows to sample.

use super::PAGE_SIZE;

/// Where a token's id is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenInput {
    /// On the host.
    Id(u32),
    /// On the device: this one of the previous step's samples, counted as in its `sample_rows`.
    Sampled(u32),
}

/// How one row of logits becomes a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the largest logit, the lowest id on a tie.
    pub temperature: f32,
    /// Seed of the request; the draw depends on it and on the position alone, not on the batch.
    pub seed: u64,
}

impl Sampling {
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, seed: 0 };
}

/// A ragged batch: sequence `s` owns the tokens `query_start[s]..query_start[s + 1]`, which are the last ones of its
/// `context_len[s]`. Reused from step to step so that a step allocates nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// `[tokens]`
    pub tokens: Vec<TokenInput>,
    /// Position of each token in its sequence, from 0, `[tokens]`.
    pub positions: Vec<u32>,
    /// Slot in the KV cache that each token's key and value go to, `page * PAGE_SIZE + offset`, `[tokens]`.
    pub slots: Vec<u32>,
    /// First token of each sequence and the end, `[sequences + 1]`.
    pub query_start: Vec<u32>,
    /// Tokens of each sequence whose K and V are in the cache after this step, `[sequences]`.
    pub context_len: Vec<u32>,
    /// Pages of all sequences one after another, `[page_start[sequences]]`.
    pub pages: Vec<u32>,
    /// First page of each sequence in `pages` and the end, `[sequences + 1]`.
    pub page_start: Vec<u32>,
    /// Token rows whose next token is wanted, ascending, `[samples]`.
    pub sample_rows: Vec<u32>,
    /// `[samples]`
    pub sampling: Vec<Sampling>,
    /// Keep the logits of the sample rows for [`super::Backend::download`].
    pub keep_logits: bool,
}

impl Batch {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.query_start.clear();
        self.query_start.push(0);
        self.context_len.clear();
        self.pages.clear();
        self.page_start.clear();
        self.page_start.push(0);
        self.sample_rows.clear();
        self.sampling.clear();
        self.keep_logits = false;
    }

    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    pub fn num_sequences(&self) -> usize {
        self.context_len.len()
    }

    /// Adds a sequence: `tokens` are its positions `first_position..`, `pages` hold at least all of them. With
    /// `sample`, the last of them asks for the next token.
    pub fn push(
        &mut self,
        tokens: impl IntoIterator<Item = TokenInput>,
        first_position: u32,
        pages: &[u32],
        sample: Option<Sampling>,
    ) {
        let mut position = first_position;
        for token in tokens {
            let page = pages[position as usize / PAGE_SIZE];
            self.tokens.push(token);
            self.positions.push(position);
            self.slots.push(page * PAGE_SIZE as u32 + position % PAGE_SIZE as u32);
            position += 1;
        }
        let used_pages = (position as usize).div_ceil(PAGE_SIZE);
        self.query_start.push(self.tokens.len() as u32);
        self.context_len.push(position);
        self.pages.extend_from_slice(&pages[..used_pages]);
        self.page_start.push(self.pages.len() as u32);
        if let Some(sampling) = sample {
            self.sample_rows.push(self.tokens.len() as u32 - 1);
            self.sampling.push(sampling);
        }
    }

    /// Token rows of sequence `s`.
    pub fn query_rows(&self, s: usize) -> std::ops::Range<usize> {
        self.query_start[s] as usize..self.query_start[s + 1] as usize
    }

    /// Pages of sequence `s`.
    pub fn sequence_pages(&self, s: usize) -> &[u32] {
        &self.pages[self.page_start[s] as usize..self.page_start[s + 1] as usize]
    }
}
