//! Activations times a weight. Many tokens go through candle's matrix product; few tokens, where reading the weight is
//! nearly all the work, go row by row over the weight on all threads.

use std::ops::Range;

use anyhow::bail;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::weight::{Blocks, CpuWeight, Part, with_values};
use super::{blocks, vector};

/// From this many tokens on, candle's product wins over going row by row.
const GEMM_TOKENS: usize = 9;

/// Values of a quantised weight that are dequantised at a time for candle's product.
const GEMM_ELEMENTS: usize = 1 << 20;

/// Multiplications that are worth waking another thread for.
const TASK_PRODUCTS: usize = 1 << 16;

/// `y = x · weightᵀ` for `tokens` rows: `x` is `[tokens, columns]`, `y` is `[tokens, rows]`. `sums` is scratch.
pub(super) fn product(
    weight: &CpuWeight,
    x: &[f32],
    tokens: usize,
    sums: &mut Vec<[f32; 2]>,
    y: &mut [f32],
) -> anyhow::Result<()> {
    let (stride, k) = (weight.rows(), weight.columns());
    let (x, y) = (&x[..tokens * k], &mut y[..tokens * stride]);
    if tokens == 0 {
        return Ok(());
    }
    if tokens < GEMM_TOKENS && weight.parts().any(|(_, part)| matches!(part, Part::Blocks(_))) {
        blocks::half_sums(x, sums);
    }
    let mut first = 0;
    for (rows, part) in weight.parts() {
        let mut target = Target { y: &mut *y, stride, columns: first..first + rows };
        match part {
            Part::Dense(tensor) if tokens < GEMM_TOKENS => {
                with_values(tensor, |values| dense_rows(values, x, k, &mut target))?;
            }
            Part::Blocks(part) if tokens < GEMM_TOKENS => block_rows(part, x, k, sums, &mut target),
            Part::Dense(tensor) => matrix_product(tensor, &tensor_of(x, k)?, &mut target)?,
            Part::Blocks(part) => block_matrix_product(part, &tensor_of(x, k)?, &mut target)?,
        }
        first += rows;
    }
    Ok(())
}

/// Columns of the output that some rows of a weight fill.
struct Target<'a> {
    /// `[tokens, stride]`
    y: &'a mut [f32],
    stride: usize,
    columns: Range<usize>,
}

impl Target<'_> {
    /// Splits the rows of the weight into ranges that are worked on in parallel. `work` gets the first row of a range
    /// and, for each token, the outputs of the range.
    fn by_row_range(&mut self, k: usize, work: impl Fn(usize, &mut [&mut [f32]]) + Sync) {
        let (rows, tokens) = (self.columns.len(), self.y.len() / self.stride);
        let range = rows.div_ceil(4 * rayon::current_num_threads()).max(TASK_PRODUCTS.div_ceil(k * tokens));
        let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
        tasks.resize_with(rows.div_ceil(range), || Vec::with_capacity(tokens));
        for y in self.y.chunks_exact_mut(self.stride) {
            for (task, outs) in tasks.iter_mut().zip(y[self.columns.clone()].chunks_mut(range)) {
                task.push(outs);
            }
        }
        let tasks = tasks.par_iter_mut().with_max_len(1).enumerate();
        tasks.for_each(|(task, outs)| work(task * range, outs));
    }

    /// Copies in `values`, `[tokens, columns.len()]`.
    fn copy_from(&mut self, values: &[f32]) {
        let columns = self.columns.clone();
        let rows = self.y.par_chunks_exact_mut(self.stride).zip(values.par_chunks_exact(columns.len()));
        rows.with_min_len(16).for_each(|(y, values)| y[columns.clone()].copy_from_slice(values));
    }
}

fn dense_rows(values: &[f32], x: &[f32], k: usize, target: &mut Target<'_>) {
    target.by_row_range(k, |first, outs| {
        let rows = outs[0].len();
        for (i, row) in values[first * k..].chunks_exact(k).take(rows).enumerate() {
            for (out, x) in outs.iter_mut().zip(x.chunks_exact(k)) {
                out[i] = vector::dot(row, x);
            }
        }
    });
}

/// One token takes the product with the blocks as they are; several share each row's dequantised values.
fn block_rows(part: &Blocks, x: &[f32], k: usize, sums: &[[f32; 2]], target: &mut Target<'_>) {
    target.by_row_range(k, |first, outs| {
        if let [out] = outs {
            for (i, out) in out.iter_mut().enumerate() {
                *out = blocks::dot(part.dtype, part.row(first + i), x, sums);
            }
            return;
        }
        let mut row = vec![0f32; k];
        for i in 0..outs[0].len() {
            blocks::dequantize(part.dtype, part.row(first + i), &mut row);
            for (out, x) in outs.iter_mut().zip(x.chunks_exact(k)) {
                out[i] = vector::dot(&row, x);
            }
        }
    });
}

fn tensor_of(x: &[f32], k: usize) -> anyhow::Result<Tensor> {
    Ok(Tensor::from_slice(x, (x.len() / k, k), &Device::Cpu)?)
}

/// candle's product with a dense weight `[rows, k]`.
fn matrix_product(weight: &Tensor, x: &Tensor, target: &mut Target<'_>) -> anyhow::Result<()> {
    let y = x.matmul(&weight.t()?)?;
    with_values(&y, |values| target.copy_from(values))
}

/// candle's product with a quantised weight, some dequantised rows at a time.
fn block_matrix_product(part: &Blocks, x: &Tensor, target: &mut Target<'_>) -> anyhow::Result<()> {
    let [_, k] = *x.dims() else { bail!("activations have shape {:?}, expected 2 dimensions", x.shape()) };
    let (first, last) = (target.columns.start, target.columns.end);
    let step = (GEMM_ELEMENTS / k).max(1);
    for start in (first..last).step_by(step) {
        let columns = start..last.min(start + step);
        let mut values = vec![0f32; columns.len() * k];
        values.par_chunks_exact_mut(k).with_min_len(16).enumerate().for_each(|(row, values)| {
            blocks::dequantize(part.dtype, part.row(start - first + row), values);
        });
        let dense = Tensor::from_vec(values, (columns.len(), k), &Device::Cpu)?;
        matrix_product(&dense, x, &mut Target { y: &mut *target.y, stride: target.stride, columns })?;
    }
    Ok(())
}
