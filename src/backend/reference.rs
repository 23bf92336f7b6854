//! The definition of right: every operation as plain scalar Rust over f32 values, sums in f64. Rows of weights and heads
//! of attention are dealt out to all cores, each computed as if it were alone, so that the bits do not depend on how
//! many there are. Nothing here is fast and nothing may become so at the price of being obvious. New buffers and pages
//! hold NaN, so that reading what was never written shows.

use std::sync::Arc;

use anyhow::ensure;
use rayon::prelude::*;

use super::sampling::{self, SampleQueue};
use super::{
    AttnIn, Backend, BackendInfo, Batch, BufferUse, Head, Memory, MlpIn, PAGE_SIZE, Shape, TokenInput,
    WeightUse, stack,
};
use crate::record::Maybe;
use crate::weights::HostTensor;

/// Partial sums of a product of vectors.
const LANES: usize = 16;
/// Values of a weight that one task rounds.
const TASK_ELEMENTS: usize = 1 << 18;

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
        let inputs: Vec<&[f32]> = (0..batch.num_tokens()).map(|t| y.row(t)).collect();
        for (t, product) in products(weight, &inputs).iter().enumerate() {
            add(x.row_mut(t), product);
            self.keep(x.row_mut(t));
        }
    }

    /// RMSNorm of these rows of `x`.
    fn normed(&self, x: &Matrix, rows: impl Iterator<Item = usize>, gain: &Matrix) -> Vec<Vec<f32>> {
        let norm = |row: usize| {
            let mut normed = rms_norm(x.row(row), gain.row(0), self.shape.rms_norm_eps);
            self.keep(&mut normed);
            normed
        };
        rows.map(norm).collect()
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
            threads: rayon::current_num_threads(),
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
        values.par_chunks_mut(TASK_ELEMENTS).for_each(|values| self.keep(values));
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
        let normed = self.normed(x, 0..batch.num_tokens(), &weights.norm);
        for (t, mut qkv) in products(&weights.qkv, &normed).into_iter().enumerate() {
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
        let Shape { num_heads, num_kv_heads, head_dim, .. } = self.shape;
        let group = num_heads / num_kv_heads;
        let LayerKv { keys, values } = &kv.layers[layer];
        let sequences: Vec<usize> =
            (0..batch.num_sequences()).flat_map(|s| batch.query_rows(s).map(move |_| s)).collect();
        let heads = out.values[..batch.num_tokens() * out.columns].par_chunks_mut(head_dim).enumerate();
        heads.for_each(|(index, mixed)| {
            let (t, head) = (index / num_heads, index % num_heads);
            let pages = batch.sequence_pages(sequences[t]);
            let slot =
                |position: usize| pages[position / PAGE_SIZE] as usize * PAGE_SIZE + position % PAGE_SIZE;
            let columns = head / group * head_dim..(head / group + 1) * head_dim;
            let key = |position: usize| &keys.row(slot(position))[columns.clone()];
            let value = |position: usize| &values.row(slot(position))[columns.clone()];
            let query = &q.row(t)[head * head_dim..][..head_dim];
            attend(query, batch.positions[t] as usize + 1, key, value, mixed);
            self.keep(mixed);
        });
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
        let normed = self.normed(x, 0..batch.num_tokens(), &weights.norm);
        for (t, gate_up) in products(&weights.gate_up, &normed).iter().enumerate() {
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
        let normed = self.normed(x, batch.sample_rows.iter().map(|&row| row as usize), &head.norm);
        let mut samples = Vec::with_capacity(batch.sample_rows.len());
        for (s, product) in products(&head.lm_head, &normed).iter().enumerate() {
            logits.row_mut(s).copy_from_slice(product);
            self.keep(logits.row_mut(s));
            let position = batch.positions[batch.sample_rows[s] as usize];
            samples.push(sampling::choose(logits.row(s), batch.sampling[s], position)?);
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

/// `weight · x` for each `x`, `[inputs][rows of weight]`.
fn products(weight: &Matrix, inputs: &[impl AsRef<[f32]> + Sync]) -> Vec<Vec<f32>> {
    let count = inputs.len();
    // `[rows of weight, inputs]`: a row meets every input while it is in the cache, and memory is read once a batch.
    let mut by_row = vec![0f32; weight.rows() * count];
    let rows = by_row.par_chunks_mut(count.max(1)).zip(weight.values.par_chunks(weight.columns));
    rows.for_each(|(products, row)| {
        for (product, x) in products.iter_mut().zip(inputs) {
            *product = dot(row, x.as_ref()) as f32;
        }
    });
    (0..count).map(|input| by_row[input..].iter().step_by(count).copied().collect()).collect()
}

/// The sum of products, each of which is exact in f64. Value `i` goes to partial sum `i % LANES`, and the partial sums
/// are added in their order: a single sum would wait for each addition before it begins the next.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    for (sum, (&a, &b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += f64::from(a) * f64::from(b);
    }
    sums.iter().sum()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_of_vectors_counts_every_value_once_at_any_length() {
        for length in 0..3 * LANES + 2 {
            // Integers below 2²⁴: every sum is exact, whatever its order.
            let a: Vec<f32> = (0..length).map(|i| (i * i + 1) as f32).collect();
            let b: Vec<f32> = (0..length).map(|i| 3.0 - i as f32).collect();
            let expected: i64 = (0..length as i64).map(|i| (i * i + 1) * (3 - i)).sum();
            assert_eq!(dot(&a, &b), expected as f64, "{length}");
        }
        assert!(dot(&[1.0, f32::NAN, 1.0], &[1.0; 3]).is_nan());
    }

    #[test]
    fn products_are_by_input_and_then_by_row() {
        let weight = Matrix { columns: 2, values: vec![1.0, 0.0, 0.0, 1.0, 2.0, 3.0] };
        assert_eq!(
            products(&weight, &[vec![5.0, 7.0], vec![1.0, -1.0]]),
            [[5.0, 7.0, 31.0], [1.0, -1.0, -1.0]]
        );
        assert_eq!(products(&weight, &[] as &[Vec<f32>]), [[0f32; 3]; 0]);
    }
}
