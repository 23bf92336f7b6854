//! Matrix products: which kernel (or library) computes them, in how many blocks, and the workspace in which blocks that
//! share a tile meet.

use super::context::Properties;
use super::cublaslt::{Large, tuned_rows};
use super::device::CudaOptions;
use super::kernels::{Epilogue, Kernels, STREAM_TOKENS, stream_entry};
use super::launch::{Grid, at, int};
use super::memory::DeviceBuffer;
use super::queue::{Queue, last_of_each};
use crate::backend::Shape;
use crate::record::{CublasLt, Maybe};

/// Most rows of activations that the streaming kernel takes at once.
pub(super) const STREAM_ROWS: usize = STREAM_TOKENS[STREAM_TOKENS.len() - 1];
/// Rows of the weight that one tile of either kernel covers; half as many features with [`Epilogue::Silu`].
const TILE: usize = 128;
const THREADS: u32 = 256;

/// Dynamic shared memory of a streaming block for so many rows of activations.
pub(super) fn stream_shared_bytes(rows: usize) -> u32 {
    4 * (16_384 + 128 * STREAM_TOKENS[stream_entry(rows)] as u32)
}

/// Blocks of the streaming kernel: all that are resident at once, two on a multiprocessor where shared memory is large.
fn stream_blocks(device: &Properties) -> usize {
    let blocks_each = match device.compute_capability {
        (8, 0) | (9, _) | (10, _) => 2,
        _ => 1,
    };
    device.multiprocessors as usize * blocks_each
}

#[derive(Debug)]
pub(super) struct Products {
    blocks: usize,
    /// Bit-identical sums whatever the number of rows: always the streaming kernel, by 64 rows.
    deterministic: bool,
    large: Large,
    /// f32 `[2 blocks, TILE * STREAM_ROWS]`
    workspace: DeviceBuffer<f32>,
    /// i32 `[tiles]`, zero between kernels
    tickets: DeviceBuffer<i32>,
}

/// `y = a · wᵀ` with an epilogue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) epilogue: Epilogue,
    /// f32 (16-bit with silu) `[rows, columns]`
    pub(super) y: u64,
    /// 16-bit `[rows, depth]`
    pub(super) a: u64,
    /// 16-bit `[columns (twice with silu), depth]`
    pub(super) w: u64,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
}

impl Product {
    /// The same for `rows` rows from `first` on.
    fn rows(&self, first: usize, rows: usize) -> Product {
        let y_bytes = if self.epilogue == Epilogue::Silu { 2 } else { 4 };
        Product {
            rows,
            y: self.y + (first * self.columns * y_bytes) as u64,
            a: self.a + (first * self.depth * 2) as u64,
            ..*self
        }
    }

    fn tile_columns(&self) -> usize {
        if self.epilogue == Epilogue::Silu { TILE / 2 } else { TILE }
    }
}

impl Products {
    /// Room for every product of a model of this shape.
    pub(super) fn new(queue: &Queue, shape: &Shape, options: CudaOptions) -> anyhow::Result<Self> {
        let blocks = stream_blocks(queue.stream.context().properties());
        let widest = (shape.q_size() + 2 * shape.kv_size())
            .max(shape.hidden_size)
            .max(2 * shape.intermediate_size)
            .max(shape.vocab_size);
        let what = "matrix products";
        Ok(Products {
            blocks,
            deterministic: options.deterministic,
            large: Large::new(&queue.stream, options)?,
            workspace: DeviceBuffer::new(&queue.stream, 2 * blocks * TILE * STREAM_ROWS, what)?,
            tickets: DeviceBuffer::zeroed(&queue.stream, widest.div_ceil(TILE) + 1, what)?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.workspace.bytes() + self.tickets.bytes() + self.large.bytes()
    }

    /// The library that computes products of many rows; else why our kernels do.
    pub(super) fn record(&self) -> Maybe<CublasLt> {
        self.large.record()
    }

    /// Numbers of rows up to `most`, one for each choice of an algorithm.
    pub(super) fn tuned_numbers(&self, most: usize) -> Vec<usize> {
        match &self.large {
            Large::Library(_) => last_of_each(STREAM_ROWS + 1..=most, tuned_rows),
            Large::Own(_) => Vec::new(),
        }
    }

    /// Which implementation runs `product`, for the record.
    pub(super) fn by(&self, product: &Product) -> &'static str {
        let is_large = product.rows > STREAM_ROWS && !self.deterministic;
        match &self.large {
            Large::Library(_) if is_large => "cublaslt",
            _ => "own",
        }
    }

    pub(super) fn queue(
        &mut self,
        queue: &mut Queue,
        kernels: &Kernels,
        product: Product,
    ) -> anyhow::Result<()> {
        if product.rows > STREAM_ROWS && !self.deterministic {
            return match &mut self.large {
                Large::Library(library) => library.queue(queue, kernels, product),
                Large::Own(_) => self.tiled(queue, kernels, product),
            };
        }
        for first in (0..product.rows).step_by(STREAM_ROWS) {
            self.stream(queue, kernels, product.rows(first, STREAM_ROWS.min(product.rows - first)))?;
        }
        Ok(())
    }

    fn stream(&self, queue: &mut Queue, kernels: &Kernels, product: Product) -> anyhow::Result<()> {
        let grid = Grid {
            blocks: [self.blocks as u32, 1, 1],
            threads: THREADS,
            shared_bytes: stream_shared_bytes(product.rows),
        };
        self.launch(queue, kernels.stream(product.epilogue, product.rows), grid, product)
    }

    fn tiled(&self, queue: &mut Queue, kernels: &Kernels, product: Product) -> anyhow::Result<()> {
        let across = product.columns.div_ceil(product.tile_columns()) as u32;
        let down = product.rows.div_ceil(TILE) as u32;
        let grid = Grid { blocks: [across, down, 1], threads: THREADS, shared_bytes: 0 };
        self.launch(queue, kernels.tiled(product.epilogue), grid, product)
    }

    #[allow(unsafe_code)]
    fn launch(
        &self,
        queue: &mut Queue,
        kernel: &super::module::Kernel,
        grid: Grid,
        product: Product,
    ) -> anyhow::Result<()> {
        let Product { y, a, w, rows, columns, depth, .. } = product;
        let arguments = [
            at(y),
            at(a),
            at(w),
            at(self.workspace.address()),
            at(self.tickets.address()),
            int(rows),
            int(columns),
            int(depth),
        ];
        // SAFETY: the arguments of gemm.cu; the caller checked y, a and w against the shape, and the workspace has room
        // for 64 rows and the tickets for the widest weight.
        unsafe { queue.launch(kernel, grid, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_of_a_stream_follows_its_entry() {
        assert_eq!(stream_shared_bytes(1), 4 * (16_384 + 128 * 8));
        assert_eq!(stream_shared_bytes(8), stream_shared_bytes(1));
        assert_eq!(stream_shared_bytes(9), 4 * (16_384 + 128 * 16));
        assert_eq!(stream_shared_bytes(16), stream_shared_bytes(9));
        assert_eq!(stream_shared_bytes(17), 4 * (16_384 + 128 * 32));
        assert_eq!(stream_shared_bytes(33), 98_304);
        assert_eq!(stream_shared_bytes(64), 98_304);
    }

    #[test]
    fn rows_of_a_product_begin_where_their_operands_do() {
        let product =
            Product { epilogue: Epilogue::Silu, y: 1000, a: 2000, w: 5, rows: 130, columns: 10, depth: 7 };
        let part = product.rows(64, 3);
        assert_eq!((part.y, part.a, part.w, part.rows), (1000 + 64 * 10 * 2, 2000 + 64 * 7 * 2, 5, 3));
        let stored = Product { epilogue: Epilogue::Store, ..product }.rows(2, 1);
        assert_eq!(stored.y, 1000 + 2 * 10 * 4);
    }
}
