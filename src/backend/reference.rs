//! The definition of right: every operation as plain scalar Rust over f32 values, one thread, no blocking, sums in
//! f64. Nothing here is fast and nothing may become so at the price of being obvious. New buffers and pages hold NaN,
//! so that reading what was never written shows.

use std::sync::Arc;

use anyhow::ensure;

use super::sampling::{self, SampleQueue};
use super::{
    AttnIn, Backend, BackendInfo, Batch, BufferUse, Head, Memory, MlpIn, PAGE_SIZE, Shape, TokenInput,
    WeightUse, stack,
};
use crate::record::Maybe;
use crate::weights::HostTensor;

/// Row-major values with a fixed row length.
#[derive(Debug)]
pub struct Matrix {
    columns: usize,
    /// `[rows, columns]`
    values: Vec<f32>,
}

impl Matrix {
    fn poisoned(rows: usize, columns: usize) -> Self {
        Matrix { columns, values: vec![f32::NAN; rows * columns] }
    }

    fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.columns..][..self.columns]
    }

    fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.values[index * self.columns..][..self.columns]
    }

    fn rows(&self) -> usize {
        self.values.len() / self.columns
    }
}

/// Keys and values of one layer, `[slots, kv_size]` each.
#[derive(Debug)]
struct LayerKv {
    keys: Matrix,
    values: Matrix,
}

/// Keys and values of all layers.
#[derive(Debug)]
pub struct ReferenceKv {
    layers: Vec<LayerKv>,
}

/// The reference backend.
#[derive(Debug)]
pub struct Reference {
    shape: Shape,
    /// Applied to every value that is kept: weights, activations, keys and values, the residual stream, logits.
    round: fn(f32) -> f32,
    memory: Memory,
    samples: SampleQueue,
}

impl Reference {
    pub fn new(shape: Shape) -> Self {
        Self::rounding(shape, |value| value)
    }

    /// What an ordinary implementation in a narrower type computes: sums are exact, everything kept is rounded by
    /// `round`. The yardstick for backends in that type.
    pub fn rounding(shape: Shape, round: fn(f32) -> f32) -> Self {
        Reference { shape, round, memory: Memory::default(), samples: SampleQueue::default() }
    }

    fn keep(&self, values: &mut [f32]) {
        values.iter_mut().for_each(|value| *value = (self.round)(*value));
    }

    /// `x += y · weightᵀ` for the batch's tokens.
    fn add_product(&self, batch: &Batch, weight: &Matrix, y: &Matrix, x: &mut Matrix) {
        for t in 0..batch.num_tokens() {
            add(x.row_mut(t), &product(weight, y.row(t)));
            self.keep(x.row_mut(t));
        }
    }
}

impl Backend for Reference {
    type Weight = Arc<Matrix>;
    type Buf = Matrix;
    type Kv = ReferenceKv;

    const STEPS_IN_FLIGHT: usize = 0;

    fn info(&self) -> BackendInfo {
        BackendInfo {
            name: "reference",
            compute_dtype: "f32",
            kv_dtype: "f32",
            threads: 1,
            kernels: None,
            cublaslt: Maybe::missing("not_cuda"),
        }
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn upload(&mut self, usage: WeightUse, parts: &[HostTensor<'_>]) -> anyhow::Result<Arc<Matrix>> {
        let (_, columns) = stack::stacked_shape(usage, parts)?;
        let mut values = stack::to_f32(parts)?;
        self.keep(&mut values);
        self.memory.weights_bytes += size_of_val(values.as_slice()) as u64;
        Ok(Arc::new(Matrix { columns, values }))
    }

    fn buffer(&mut self, _usage: BufferUse, rows: usize, columns: usize) -> anyhow::Result<Matrix> {
        self.memory.activations_bytes += (rows * columns * size_of::<f32>()) as u64;
        Ok(Matrix::poisoned(rows, columns))
    }

    fn kv_cache(&mut self, pages: usize) -> anyhow::Result<ReferenceKv> {
        self.memory.kv_bytes += pages as u64 * self.page_bytes();
        let (slots, width) = (pages * PAGE_SIZE, self.shape.kv_size());
        let layer =
            |_| LayerKv { keys: Matrix::poisoned(slots, width), values: Matrix::poisoned(slots, width) };
        Ok(ReferenceKv { layers: (0..self.shape.num_layers).map(layer).collect() })
    }

    fn page_bytes(&self) -> u64 {
        self.shape.page_bytes(size_of::<f32>())
    }

    fn memory(&self) -> Memory {
        self.memory
    }

    fn embed(&mut self, batch: &Batch, table: &Arc<Matrix>, x: &mut Matrix) -> anyhow::Result<()> {
        for (t, &token) in batch.tokens.iter().enumerate() {
            let id = match token {
                TokenInput::Id(id) => id,
                TokenInput::Sampled(row) => self.samples.previous(row)?,
            };
            let rows = table.rows();
            ensure!((id as usize) < rows, "token id {id} is outside the embedding table of {rows} rows");
            x.row_mut(t).copy_from_slice(table.row(id as usize));
        }
        Ok(())
    }

    fn attn_in(
        &mut self,
        batch: &Batch,
        layer: usize,
        weights: &AttnIn<Arc<Matrix>>,
        x: &Matrix,
        kv: &mut ReferenceKv,
        q: &mut Matrix,
    ) -> anyhow::Result<()> {
        let (head_dim, eps) = (self.shape.head_dim, self.shape.rms_norm_eps);
        let (q_size, kv_size) = (self.shape.q_size(), self.shape.kv_size());
        let LayerKv { keys, values } = &mut kv.layers[layer];
        for t in 0..batch.num_tokens() {
            let mut normed = rms_norm(x.row(t), weights.norm.row(0), eps);
            self.keep(&mut normed);
            let mut qkv = product(&weights.qkv, &normed);
            if let Some(bias) = &weights.bias {
                add(&mut qkv, bias.row(0));
            }
            let (rotated, value) = qkv.split_at_mut(q_size + kv_size);
            for (head, vector) in rotated.chunks_mut(head_dim).enumerate() {
                if let Some((q_norm, k_norm)) = &weights.qk_norm {
                    let gain = if head < self.shape.num_heads { q_norm } else { k_norm };
                    vector.copy_from_slice(&rms_norm(vector, gain.row(0), eps));
                }
                rotate(vector, batch.positions[t], &self.shape.inv_freq);
            }
            self.keep(rotated);
            self.keep(value);
            let slot = batch.slots[t] as usize;
            q.row_mut(t).copy_from_slice(&rotated[..q_size]);
            keys.row_mut(slot).copy_from_slice(&rotated[q_size..]);
            values.row_mut(slot).copy_from_slice(value);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        batch: &Batch,
        layer: usize,
        q: &Matrix,
        kv: &ReferenceKv,
        out: &mut Matrix,
    ) -> anyhow::Result<()> {
        let head_dim = self.shape.head_dim;
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let LayerKv { keys, values } = &kv.layers[layer];
        for s in 0..batch.num_sequences() {
            let pages = batch.sequence_pages(s);
            let slot =
                |position: usize| pages[position / PAGE_SIZE] as usize * PAGE_SIZE + position % PAGE_SIZE;
            for t in batch.query_rows(s) {
                let visible = batch.positions[t] as usize + 1;
                for head in 0..self.shape.num_heads {
                    let columns = head / group * head_dim..(head / group + 1) * head_dim;
                    let key = |position: usize| &keys.row(slot(position))[columns.clone()];
                    let value = |position: usize| &values.row(slot(position))[columns.clone()];
                    let query = &q.row(t)[head * head_dim..][..head_dim];
                    let mixed = &mut out.row_mut(t)[head * head_dim..][..head_dim];
                    attend(query, visible, key, value, mixed);
                    self.keep(mixed);
                }
            }
        }
        Ok(())
    }

    fn attn_out(
        &mut self,
        batch: &Batch,
        o_proj: &Arc<Matrix>,
        attended: &Matrix,
        x: &mut Matrix,
    ) -> anyhow::Result<()> {
        self.add_product(batch, o_proj, attended, x);
        Ok(())
    }

    fn mlp_in(
        &mut self,
        batch: &Batch,
        weights: &MlpIn<Arc<Matrix>>,
        x: &Matrix,
        out: &mut Matrix,
    ) -> anyhow::Result<()> {
        for t in 0..batch.num_tokens() {
            let mut normed = rms_norm(x.row(t), weights.norm.row(0), self.shape.rms_norm_eps);
            self.keep(&mut normed);
            let gate_up = product(&weights.gate_up, &normed);
            let (gate, up) = gate_up.split_at(self.shape.intermediate_size);
            for (out, (&gate, &up)) in out.row_mut(t).iter_mut().zip(gate.iter().zip(up)) {
                *out = gate / (1.0 + (-gate).exp()) * up;
            }
            self.keep(out.row_mut(t));
        }
        Ok(())
    }

    fn mlp_out(
        &mut self,
        batch: &Batch,
        down_proj: &Arc<Matrix>,
        activated: &Matrix,
        x: &mut Matrix,
    ) -> anyhow::Result<()> {
        self.add_product(batch, down_proj, activated, x);
        Ok(())
    }

    fn logits(
        &mut self,
        batch: &Batch,
        head: &Head<Arc<Matrix>>,
        x: &Matrix,
        logits: &mut Matrix,
    ) -> anyhow::Result<()> {
        let mut samples = Vec::with_capacity(batch.sample_rows.len());
        for (s, (&row, &sampling)) in batch.sample_rows.iter().zip(&batch.sampling).enumerate() {
            let mut normed = rms_norm(x.row(row as usize), head.norm.row(0), self.shape.rms_norm_eps);
            self.keep(&mut normed);
            logits.row_mut(s).copy_from_slice(&product(&head.lm_head, &normed));
            self.keep(logits.row_mut(s));
            samples.push(sampling::choose(logits.row(s), sampling, batch.positions[row as usize])?);
        }
        self.samples.push(samples);
        Ok(())
    }

    fn sampled(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()> {
        self.samples.take(out)
    }

    fn download(&mut self, buf: &Matrix, rows: usize, columns: usize) -> anyhow::Result<Vec<f32>> {
        Ok(buf.values[..rows * columns].to_vec())
    }

    fn fill(&mut self, buf: &mut Matrix, values: &[f32]) -> anyhow::Result<()> {
        buf.values[..values.len()].copy_from_slice(values);
        Ok(())
    }
}

/// `x / √(mean(x²) + ε) · gain`
fn rms_norm(x: &[f32], gain: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    x.iter().zip(gain).map(|(&value, &gain)| (f64::from(value) * scale) as f32 * gain).collect()
}

/// `weight · x`, `[rows of weight]`
fn product(weight: &Matrix, x: &[f32]) -> Vec<f32> {
    (0..weight.rows()).map(|row| dot(weight.row(row), x) as f32).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Rotates the pairs `(vector[i], vector[i + head_dim / 2])` by `position · inv_freq[i]`.
fn rotate(vector: &mut [f32], position: u32, inv_freq: &[f32]) {
    let (first, second) = vector.split_at_mut(inv_freq.len());
    for ((a, b), &frequency) in first.iter_mut().zip(second).zip(inv_freq) {
        let (sin, cos) = (f64::from(position) * f64::from(frequency)).sin_cos();
        let (left, right) = (f64::from(*a), f64::from(*b));
        *a = (left * cos - right * sin) as f32;
        *b = (right * cos + left * sin) as f32;
    }
}

/// `softmax(query · keys / √head_dim) · values` over the first `visible` positions.
fn attend<'a>(
    query: &[f32],
    visible: usize,
    key: impl Fn(usize) -> &'a [f32],
    value: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
) {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let scores: Vec<f64> = (0..visible).map(|position| dot(query, key(position)) * scale).collect();
    let largest = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (column, out) in out.iter_mut().enumerate() {
        let sum: f64 =
            (0..visible).map(|position| weights[position] * f64::from(value(position)[column])).sum();
        *out = (sum / total) as f32;
    }
}
