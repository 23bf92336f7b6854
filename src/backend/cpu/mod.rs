//! The CPU backend. candle owns dense weights, dequantisation and the large matrix products; activations and pages are
//! plain f32 slices, and attention, norms, rotary embedding and the products of single tokens are ours over rayon.
//!
//! There is one pool of threads, rayon's global one: candle's products run in the pool they are called from, and
//! candle's own pool of spinning threads (for its quantised products) is never started.

mod attention;
mod blocks;
mod peaks;
mod product;
mod vector;
mod weight;

use anyhow::{Context as _, ensure};
use rayon::prelude::*;

use self::attention::LayerKv;
use self::product::product;
pub use self::weight::CpuWeight;
use super::peaks::{Load, Protocol};
use super::sampling::{self, SampleQueue};
use super::{
    AttnIn, Backend, BackendInfo, Batch, BufferUse, Head, Memory, MlpIn, Shape, StepKey, TokenInput,
    WeightUse,
};
use crate::record::{Ceilings, Maybe};
use crate::weights::HostTensor;

/// Rows of an elementwise operation that one thread takes at least.
const TASK_ROWS: usize = 16;

/// What quantised weights become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuDType {
    /// Dequantised when they are uploaded.
    F32,
    /// Kept as the blocks of the file.
    Quantized,
}

/// The cores that this process may use.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// Makes the pool that all CPU work runs in. Must come before the first use of a [`Cpu`]; without it the pool has one
/// thread per core (or `RAYON_NUM_THREADS`).
///
/// # Errors
/// When `threads` is 0 or the pool already exists.
pub fn set_threads(threads: usize) -> anyhow::Result<()> {
    ensure!(threads > 0, "the number of threads is 0, expected at least 1");
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .with_context(|| format!("setting the number of threads to {threads}"))
}

/// The CPU backend.
#[derive(Debug)]
pub struct Cpu {
    shape: Shape,
    dtype: CpuDType,
    memory: Memory,
    samples: SampleQueue,
    scratch: Scratch,
    rotary: Rotary,
}

/// Values that live within one operation; kept to be allocated once.
#[derive(Debug, Default)]
struct Scratch {
    /// `[tokens, hidden_size]`
    normed: Vec<f32>,
    /// Output of a product, `[tokens, rows of the weight]`.
    product: Vec<f32>,
    /// Sums of activations for the offsets of blocks.
    sums: Vec<[f32; 2]>,
}

impl Scratch {
    fn bytes(&self) -> usize {
        (self.normed.capacity() + self.product.capacity()) * size_of::<f32>()
            + self.sums.capacity() * size_of::<[f32; 2]>()
    }
}

/// Cosines and sines of a batch's positions, computed once for all layers.
#[derive(Debug, Default)]
struct Rotary {
    positions: Vec<u32>,
    /// `[tokens, head_dim / 2]`
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Activations, `[rows, columns]`.
#[derive(Debug)]
pub struct CpuBuf(Vec<f32>);

/// Keys and values of all layers.
#[derive(Debug)]
pub struct CpuKv(Vec<LayerKv>);

impl Cpu {
    pub fn new(shape: Shape, dtype: CpuDType) -> Self {
        Cpu {
            shape,
            dtype,
            memory: Memory::default(),
            samples: SampleQueue::default(),
            scratch: Scratch::default(),
            rotary: Rotary::default(),
        }
    }

    /// `scratch.product = x · weightᵀ` for the batch's tokens.
    fn multiply(&mut self, weight: &CpuWeight, x: &[f32], tokens: usize) -> anyhow::Result<()> {
        let Scratch { product: y, sums, .. } = &mut self.scratch;
        product(weight, x, tokens, sums, grow(y, tokens * weight.rows()))
    }

    /// `scratch.product = norm(x) · weightᵀ` for the batch's tokens.
    fn norm_and_multiply(
        &mut self,
        norm: &CpuWeight,
        weight: &CpuWeight,
        x: &[f32],
        tokens: usize,
    ) -> anyhow::Result<()> {
        let Scratch { normed, product: y, sums } = &mut self.scratch;
        let (hidden, eps) = (self.shape.hidden_size, self.shape.rms_norm_eps);
        let normed = grow(normed, tokens * hidden);
        norm.with_vector(|gain| {
            by_row(normed, hidden, |t, out| vector::rms_norm(&x[t * hidden..][..hidden], gain, eps, out));
        })?;
        product(weight, normed, tokens, sums, grow(y, tokens * weight.rows()))
    }

    /// `x += y · weightᵀ`
    fn add_product(
        &mut self,
        weight: &CpuWeight,
        y: &[f32],
        x: &mut [f32],
        tokens: usize,
    ) -> anyhow::Result<()> {
        self.multiply(weight, y, tokens)?;
        let width = weight.rows();
        let product = &self.scratch.product;
        by_row(&mut x[..tokens * width], width, |t, x| vector::add(x, &product[t * width..][..width]));
        Ok(())
    }

    /// Bias, norms over heads and rotary embedding, in place on `scratch.product`.
    fn finish_qkv(&mut self, weights: &AttnIn<CpuWeight>, tokens: usize) -> anyhow::Result<()> {
        let Shape { head_dim, num_heads, rms_norm_eps: eps, .. } = self.shape;
        let rotated_size = self.shape.q_size() + self.shape.kv_size();
        let width = weights.qkv.rows();
        let rows = &mut self.scratch.product[..tokens * width];
        if let Some(bias) = &weights.bias {
            bias.with_vector(|bias| by_row(rows, width, |_, row| vector::add(row, bias)))?;
        }
        if let Some((q_norm, k_norm)) = &weights.qk_norm {
            q_norm.with_vector(|q_gain| {
                k_norm.with_vector(|k_gain| {
                    by_row(rows, width, |_, row| {
                        for (head, vector) in row[..rotated_size].chunks_exact_mut(head_dim).enumerate() {
                            let gain = if head < num_heads { q_gain } else { k_gain };
                            vector::rms_norm_in_place(vector, gain, eps);
                        }
                    });
                })
            })??;
        }
        let (pairs, Rotary { cos, sin, .. }) = (head_dim / 2, &self.rotary);
        by_row(rows, width, |t, row| {
            let angles = t * pairs..(t + 1) * pairs;
            for vector in row[..rotated_size].chunks_exact_mut(head_dim) {
                vector::rotate(vector, &cos[angles.clone()], &sin[angles.clone()]);
            }
        });
        Ok(())
    }
}

impl Rotary {
    fn prepare(&mut self, positions: &[u32], inv_freq: &[f32]) {
        if self.positions == positions {
            return;
        }
        self.positions.clear();
        self.positions.extend_from_slice(positions);
        let pairs = inv_freq.len();
        let (cos, sin) =
            (grow(&mut self.cos, positions.len() * pairs), grow(&mut self.sin, positions.len() * pairs));
        for ((cos, sin), &position) in
            cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs)).zip(positions)
        {
            for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let (s, c) = (f64::from(position) * f64::from(frequency)).sin_cos();
                (*cos, *sin) = (c as f32, s as f32);
            }
        }
    }
}

/// The first `length` elements, made if they are not there.
fn grow(values: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if values.len() < length {
        values.resize(length, 0.0);
    }
    &mut values[..length]
}

/// Calls `work` for each row of `columns` values, in parallel where there are many.
fn by_row(values: &mut [f32], columns: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = values.par_chunks_exact_mut(columns).with_min_len(TASK_ROWS).enumerate();
    rows.for_each(|(row, values)| work(row, values));
}

impl Backend for Cpu {
    type Weight = CpuWeight;
    type Buf = CpuBuf;
    type Kv = CpuKv;

    const STEPS_IN_FLIGHT: usize = 0;

    fn info(&self) -> BackendInfo {
        let compute_dtype = match self.dtype {
            CpuDType::F32 => "f32",
            CpuDType::Quantized => "quantized",
        };
        BackendInfo {
            name: "cpu",
            compute_dtype,
            kv_dtype: "f32",
            threads: rayon::current_num_threads(),
            kernels: None,
            cublaslt: Maybe::missing("not_cuda"),
        }
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn upload(&mut self, usage: WeightUse, parts: &[HostTensor<'_>]) -> anyhow::Result<CpuWeight> {
        let weight = CpuWeight::new(usage, parts, self.dtype)?;
        self.memory.weights_bytes += weight.bytes();
        Ok(weight)
    }

    fn buffer(&mut self, _usage: BufferUse, rows: usize, columns: usize) -> anyhow::Result<CpuBuf> {
        self.memory.activations_bytes += (rows * columns * size_of::<f32>()) as u64;
        Ok(CpuBuf(vec![f32::NAN; rows * columns]))
    }

    fn kv_cache(&mut self, pages: usize) -> anyhow::Result<CpuKv> {
        self.memory.kv_bytes += pages as u64 * self.page_bytes();
        Ok(CpuKv((0..self.shape.num_layers).map(|_| LayerKv::new(pages, &self.shape)).collect()))
    }

    fn page_bytes(&self) -> u64 {
        self.shape.page_bytes(size_of::<f32>())
    }

    fn memory(&self) -> Memory {
        let mut memory = self.memory;
        memory.activations_bytes += self.scratch.bytes() as u64;
        memory
    }

    fn embed(&mut self, batch: &Batch, table: &CpuWeight, x: &mut CpuBuf) -> anyhow::Result<()> {
        let hidden = table.columns();
        for (&token, x) in batch.tokens.iter().zip(x.0.chunks_exact_mut(hidden)) {
            let id = match token {
                TokenInput::Id(id) => id,
                TokenInput::Sampled(row) => self.samples.previous(row)?,
            };
            table.look_up(id as usize, x)?;
        }
        Ok(())
    }

    fn attn_in(
        &mut self,
        batch: &Batch,
        layer: usize,
        weights: &AttnIn<CpuWeight>,
        x: &CpuBuf,
        kv: &mut CpuKv,
        q: &mut CpuBuf,
    ) -> anyhow::Result<()> {
        let (q_size, kv_size) = (self.shape.q_size(), self.shape.kv_size());
        self.rotary.prepare(&batch.positions, &self.shape.inv_freq);
        self.norm_and_multiply(&weights.norm, &weights.qkv, &x.0, batch.num_tokens())?;
        self.finish_qkv(weights, batch.num_tokens())?;
        let rows = self.scratch.product.chunks_exact(weights.qkv.rows());
        for ((row, q), &slot) in rows.zip(q.0.chunks_exact_mut(q_size)).zip(&batch.slots) {
            q.copy_from_slice(&row[..q_size]);
            kv.0[layer].write(slot, &row[q_size..q_size + kv_size], &row[q_size + kv_size..]);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        batch: &Batch,
        layer: usize,
        q: &CpuBuf,
        kv: &CpuKv,
        out: &mut CpuBuf,
    ) -> anyhow::Result<()> {
        attention::attention(&self.shape, batch, &q.0, &kv.0[layer], &mut out.0);
        Ok(())
    }

    fn attn_out(
        &mut self,
        batch: &Batch,
        o_proj: &CpuWeight,
        attended: &CpuBuf,
        x: &mut CpuBuf,
    ) -> anyhow::Result<()> {
        self.add_product(o_proj, &attended.0, &mut x.0, batch.num_tokens())
    }

    fn mlp_in(
        &mut self,
        batch: &Batch,
        weights: &MlpIn<CpuWeight>,
        x: &CpuBuf,
        out: &mut CpuBuf,
    ) -> anyhow::Result<()> {
        let (tokens, width) = (batch.num_tokens(), self.shape.intermediate_size);
        self.norm_and_multiply(&weights.norm, &weights.gate_up, &x.0, tokens)?;
        let gate_up = &self.scratch.product;
        by_row(&mut out.0[..tokens * width], width, |t, out| {
            let (gate, up) = gate_up[t * 2 * width..][..2 * width].split_at(width);
            vector::silu_mul(gate, up, out);
        });
        Ok(())
    }

    fn mlp_out(
        &mut self,
        batch: &Batch,
        down_proj: &CpuWeight,
        activated: &CpuBuf,
        x: &mut CpuBuf,
    ) -> anyhow::Result<()> {
        self.add_product(down_proj, &activated.0, &mut x.0, batch.num_tokens())
    }

    fn logits(
        &mut self,
        batch: &Batch,
        head: &Head<CpuWeight>,
        x: &CpuBuf,
        logits: &mut CpuBuf,
    ) -> anyhow::Result<()> {
        let (hidden, vocab_size) = (self.shape.hidden_size, self.shape.vocab_size);
        let (eps, samples) = (self.shape.rms_norm_eps, batch.sample_rows.len());
        let Scratch { normed, sums, .. } = &mut self.scratch;
        let normed = grow(normed, samples * hidden);
        head.norm.with_vector(|gain| {
            for (&row, out) in batch.sample_rows.iter().zip(normed.chunks_exact_mut(hidden)) {
                vector::rms_norm(&x.0[row as usize * hidden..][..hidden], gain, eps, out);
            }
        })?;
        product(&head.lm_head, normed, samples, sums, &mut logits.0)?;
        let chosen: Vec<u32> = (0..samples)
            .into_par_iter()
            .map(|s| {
                let position = batch.positions[batch.sample_rows[s] as usize];
                sampling::choose(&logits.0[s * vocab_size..][..vocab_size], batch.sampling[s], position)
            })
            .collect::<anyhow::Result<_>>()?;
        self.samples.push(chosen);
        Ok(())
    }

    /// Runs the whole step in the pool, so that its operations are not handed over one by one.
    fn step(
        &mut self,
        _key: StepKey,
        body: &mut (dyn FnMut(&mut Self) -> anyhow::Result<()> + Send),
    ) -> anyhow::Result<()> {
        rayon::scope(|_| body(self))
    }

    fn sampled(&mut self, out: &mut Vec<u32>) -> anyhow::Result<()> {
        self.samples.take(out)
    }

    fn download(&mut self, buf: &CpuBuf, rows: usize, columns: usize) -> anyhow::Result<Vec<f32>> {
        Ok(buf.0[..rows * columns].to_vec())
    }

    fn fill(&mut self, buf: &mut CpuBuf, values: &[f32]) -> anyhow::Result<()> {
        buf.0[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn ceilings(&mut self, protocol: &Protocol) -> anyhow::Result<Ceilings> {
        peaks::ceilings(protocol)
    }

    fn lend_load(
        &mut self,
        user: &mut dyn FnMut(&mut Load<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        peaks::lend_load(user)
    }
}
