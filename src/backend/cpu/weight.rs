//! Weights on the CPU: dense f32 in a candle tensor, or quantised blocks as the file holds them.

use std::sync::Arc;

use anyhow::{bail, ensure};
use candle_core::{Device, Storage, Tensor};
use rayon::prelude::*;

use super::{CpuDType, blocks};
use crate::backend::{WeightUse, stack};
use crate::weights::{HostTensor, StoredDType};

/// Rows of a weight that are stored alike.
#[derive(Debug)]
pub(super) enum Part {
    /// `[rows, columns]`
    Dense(Tensor),
    Blocks(Blocks),
}

/// Quantised rows, one after another.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) dtype: StoredDType,
    pub(super) row_bytes: usize,
    bytes: Vec<u8>,
}

impl Blocks {
    pub(super) fn row(&self, index: usize) -> &[u8] {
        &self.bytes[index * self.row_bytes..][..self.row_bytes]
    }

    fn rows(&self) -> usize {
        self.bytes.len() / self.row_bytes
    }
}

/// A weight; clones share memory.
#[derive(Clone, Debug)]
pub struct CpuWeight(Arc<Stack>);

#[derive(Debug)]
struct Stack {
    rows: usize,
    columns: usize,
    /// From the first row down.
    parts: Vec<Part>,
    bytes: u64,
}

impl CpuWeight {
    /// # Errors
    /// Names the tensor that is misshapen or holds a value that is not finite.
    pub(super) fn new(usage: WeightUse, parts: &[HostTensor<'_>], dtype: CpuDType) -> anyhow::Result<Self> {
        let (rows, columns) = stack::stacked_shape(usage, parts)?;
        let keep = |part: &HostTensor<'_>| dtype == CpuDType::Quantized && part.dtype.is_quantized();
        let runs = match usage {
            WeightUse::Vector => vec![parts],
            _ => parts.chunk_by(|a, b| keep(a) == keep(b) && (!keep(a) || a.dtype == b.dtype)).collect(),
        };
        let mut bytes = 0;
        let mut stacked = Vec::with_capacity(runs.len());
        for run in runs {
            if usage != WeightUse::Vector && keep(&run[0]) {
                let blocks = stack_blocks(run)?;
                bytes += blocks.bytes.len() as u64;
                stacked.push(Part::Blocks(blocks));
            } else {
                let values = stack::to_f32(run)?;
                bytes += size_of_val(values.as_slice()) as u64;
                stacked.push(Part::Dense(Tensor::from_vec(values, ((), columns), &Device::Cpu)?));
            }
        }
        Ok(CpuWeight(Arc::new(Stack { rows, columns, parts: stacked, bytes })))
    }

    pub(super) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.0.columns
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// The parts from the first row down, each with its number of rows.
    pub(super) fn parts(&self) -> impl Iterator<Item = (usize, &Part)> {
        self.0.parts.iter().map(|part| match part {
            Part::Dense(tensor) => (tensor.dims()[0], part),
            Part::Blocks(blocks) => (blocks.rows(), part),
        })
    }

    /// Calls `read` with the values of a vector, `[columns]`.
    pub(super) fn with_vector<T>(&self, read: impl FnOnce(&[f32]) -> T) -> anyhow::Result<T> {
        match self.0.parts.as_slice() {
            [Part::Dense(tensor)] if self.0.rows == 1 => with_values(tensor, read),
            _ => bail!("a weight of {} rows was given where a vector is expected", self.0.rows),
        }
    }

    /// Copies one row, dequantised, to `out`.
    pub(super) fn look_up(&self, row: usize, out: &mut [f32]) -> anyhow::Result<()> {
        ensure!(row < self.0.rows, "token id {row} is outside the embedding table of {} rows", self.0.rows);
        let mut first = 0;
        for (rows, part) in self.parts() {
            if row < first + rows {
                return part.copy_row(row - first, out);
            }
            first += rows;
        }
        Ok(())
    }
}

impl Part {
    fn copy_row(&self, row: usize, out: &mut [f32]) -> anyhow::Result<()> {
        match self {
            Part::Dense(tensor) => with_values(tensor, |values| {
                out.copy_from_slice(&values[row * out.len()..][..out.len()]);
            }),
            Part::Blocks(blocks) => {
                blocks::dequantize(blocks.dtype, blocks.row(row), out);
                Ok(())
            }
        }
    }
}

/// Calls `read` with the values of a contiguous f32 tensor, in place.
pub(super) fn with_values<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> anyhow::Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => Ok(read(&cpu.as_slice::<f32>()?[start..end])),
        _ => bail!("a tensor of shape {:?} is not contiguous f32 in host memory", tensor.shape()),
    }
}

/// Copies parts of one quantised type, refusing scales that are not finite.
fn stack_blocks(parts: &[HostTensor<'_>]) -> anyhow::Result<Blocks> {
    let (dtype, columns) = (parts[0].dtype, parts[0].columns());
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.bytes.len()).sum());
    let mut row_bytes = 0;
    for part in parts {
        let expected = dtype.bytes_for(&part.shape);
        ensure!(
            expected == Some(part.bytes.len()) && !part.bytes.is_empty(),
            "tensor {} has {} bytes, expected {expected:?} for its shape",
            part.name,
            part.bytes.len()
        );
        row_bytes = part.bytes.len() / part.rows();
        check_finite(part, columns, row_bytes)?;
        bytes.extend_from_slice(&part.bytes);
    }
    Ok(Blocks { dtype, row_bytes, bytes })
}

fn check_finite(part: &HostTensor<'_>, columns: usize, row_bytes: usize) -> anyhow::Result<()> {
    let rows = part.bytes.par_chunks(row_bytes).enumerate();
    rows.try_for_each_init(
        || vec![0f32; columns],
        |values, (row, bytes)| {
            blocks::dequantize(part.dtype, bytes, values);
            if let Some(column) = values.iter().position(|value| !value.is_finite()) {
                let index = row * columns + column;
                bail!(
                    "tensor {} has a non-finite value at index {index}, expected finite numbers",
                    part.name
                );
            }
            Ok(())
        },
    )
}
