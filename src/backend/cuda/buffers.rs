//! What the model holds on the device: weights, activations, and the pages of keys and values. Each knows its type and
//! its size, and gives out an address only for what it can hold.

use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};

use super::context::Stream;
use super::memory::DeviceBuffer;
use crate::backend::{PAGE_SIZE, Shape};

/// Values in f32, or as 16 bits.
#[derive(Debug)]
pub(super) enum Values {
    Full(DeviceBuffer<f32>),
    Half(DeviceBuffer<u16>),
}

impl Values {
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Values::Full(values) => values.bytes(),
            Values::Half(values) => values.bytes(),
        }
    }

    fn full(&self, elements: usize) -> anyhow::Result<u64> {
        match self {
            Values::Full(values) if values.len() >= elements => Ok(values.address()),
            Values::Full(values) => bail!("{} f32 values on the device, expected {elements}", values.len()),
            Values::Half(_) => bail!("16-bit values on the device, expected f32"),
        }
    }

    fn half(&self, elements: usize) -> anyhow::Result<u64> {
        match self {
            Values::Half(values) if values.len() >= elements => Ok(values.address()),
            Values::Half(values) => {
                bail!("{} 16-bit values on the device, expected {elements}", values.len())
            }
            Values::Full(_) => bail!("f32 values on the device, expected 16-bit ones"),
        }
    }
}

/// A matrix `[rows, columns]` as 16 bits, or a vector in f32.
#[derive(Clone, Debug)]
pub struct CudaWeight {
    pub(super) values: Arc<Values>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl CudaWeight {
    /// Address of a matrix of exactly this shape.
    pub(super) fn matrix(&self, rows: usize, columns: usize) -> anyhow::Result<u64> {
        ensure!(
            (self.rows, self.columns) == (rows, columns),
            "a weight is [{}, {}], expected [{rows}, {columns}]",
            self.rows,
            self.columns
        );
        self.values.half(rows * columns)
    }

    /// Address of a vector of exactly this length.
    pub(super) fn vector(&self, length: usize) -> anyhow::Result<u64> {
        ensure!(self.columns == length, "a vector has {} values, expected {length}", self.columns);
        self.values.full(length)
    }
}

/// Activations, `[rows, columns]`.
#[derive(Debug)]
pub struct CudaBuf(pub(super) Values);

impl CudaBuf {
    pub(super) fn full(&self, rows: usize, columns: usize) -> anyhow::Result<u64> {
        self.0.full(rows * columns).with_context(|| format!("a buffer of {rows} rows of {columns}"))
    }

    pub(super) fn half(&self, rows: usize, columns: usize) -> anyhow::Result<u64> {
        self.0.half(rows * columns).with_context(|| format!("a buffer of {rows} rows of {columns}"))
    }
}

/// Keys and values of all layers, 16-bit `[layers, 2, pages + 1, kv_heads, PAGE_SIZE, head_dim]`. Page 0 belongs to
/// padding sequences.
#[derive(Debug)]
pub struct CudaKv {
    pub(super) values: DeviceBuffer<u16>,
    pages: usize,
    /// Elements of one layer's keys, or of its values.
    half_layer: usize,
}

impl CudaKv {
    pub(super) fn new(stream: &Stream, shape: &Shape, pages: usize) -> anyhow::Result<Self> {
        let most = i32::MAX as usize / PAGE_SIZE - 1;
        ensure!(pages <= most, "{pages} KV pages, expected at most {most}");
        let half_layer = (pages + 1) * PAGE_SIZE * shape.kv_size();
        let what = format!("the KV cache of {} tokens", pages * PAGE_SIZE);
        let values = DeviceBuffer::new(stream, 2 * shape.num_layers * half_layer, &what)?;
        Ok(CudaKv { values, pages, half_layer })
    }

    /// Addresses of a layer's keys and values, for a batch that touches the first `pages` pages.
    pub(super) fn layer(&self, layer: usize, pages: usize) -> anyhow::Result<(u64, u64)> {
        ensure!(pages <= self.pages, "the batch needs page {pages}, and the KV cache has {}", self.pages);
        let keys = self.values.address() + (2 * layer * self.half_layer * size_of::<u16>()) as u64;
        Ok((keys, keys + (self.half_layer * size_of::<u16>()) as u64))
    }
}
