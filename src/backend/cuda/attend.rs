//! Attention: the split-KV decode kernel for the leading sequences with one new token, which a scheduler puts first, and
//! the prefill kernel for those behind them.

use super::kernels::Kernels;
use super::launch::{Grid, at, int};
use super::memory::DeviceBuffer;
use super::queue::{self, Queue};
use super::staging::Staged;
use crate::backend::Shape;

/// Blocks that one multiprocessor should have.
const BLOCKS_EACH: usize = 2;
/// Splits beyond which a block of a usual context (1,024 tokens are 64 pages) has warps without a page. More are made
/// only where multiprocessors would have no block.
const USUAL_SPLITS: usize = 16;
/// A split of a short context has nothing to do; more splits than this never help.
const MAX_SPLITS: usize = 32;
const PREFILL_THREADS: u32 = 128;

#[derive(Debug)]
pub(super) struct Attention {
    multiprocessors: usize,
    /// The order of sums must not depend on the batch: only the prefill kernel promises that for one and for many tokens.
    deterministic: bool,
    /// f32 `[sequences, kv_heads, splits, group (head_dim + 2)]`
    partial: DeviceBuffer<f32>,
    /// i32 `[sequences, kv_heads]`, zero between kernels
    tickets: DeviceBuffer<i32>,
}

/// What attention reads and writes, all 16-bit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    /// `[tokens, q_size]`
    pub(super) out: u64,
    /// `[tokens, q_size]`
    pub(super) q: u64,
    /// `[pages, kv_heads, PAGE_SIZE, head_dim]`
    pub(super) keys: u64,
    pub(super) values: u64,
}

impl Attention {
    pub(super) fn new(queue: &Queue, deterministic: bool) -> anyhow::Result<Self> {
        Ok(Attention {
            multiprocessors: queue.stream.context().properties().multiprocessors as usize,
            deterministic,
            partial: DeviceBuffer::new(&queue.stream, 0, "attention")?,
            tickets: DeviceBuffer::new(&queue.stream, 0, "attention")?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.partial.bytes() + self.tickets.bytes()
    }

    pub(super) fn queue(
        &mut self,
        queue: &mut Queue,
        kernels: &Kernels,
        shape: &Shape,
        staged: &Staged,
        operands: Operands,
    ) -> anyhow::Result<()> {
        let singles = if self.deterministic { 0 } else { staged.counts.singles };
        if singles > 0 {
            self.decode(queue, kernels, shape, staged, operands, singles)?;
        }
        prefill(queue, kernels, shape, staged, operands, singles)
    }

    /// Of the first `sequences` sequences.
    #[allow(unsafe_code)]
    fn decode(
        &mut self,
        queue: &mut Queue,
        kernels: &Kernels,
        shape: &Shape,
        staged: &Staged,
        operands: Operands,
        sequences: usize,
    ) -> anyhow::Result<()> {
        let kv_heads = shape.num_kv_heads;
        // By the bucket, so that a padded batch takes the same sums as an unpadded one.
        let padded = queue::bucket(sequences);
        let splits = splits(padded, kv_heads, self.multiprocessors);
        self.reserve(queue, padded * kv_heads, splits * (shape.num_heads / kv_heads) * (shape.head_dim + 2))?;
        let Operands { out, q, keys, values } = operands;
        let arguments = [
            at(out),
            at(q),
            at(keys),
            at(values),
            at(staged.at(|layout| layout.context_len)),
            at(staged.at(|layout| layout.pages)),
            at(staged.at(|layout| layout.page_start)),
            at(self.partial.address()),
            at(self.tickets.address()),
            int(shape.num_heads),
            int(kv_heads),
            int(splits),
        ];
        let grid = Grid {
            blocks: [sequences as u32, kv_heads as u32, splits as u32],
            threads: if shape.head_dim == 256 { 64 } else { 128 },
            shared_bytes: kernels.decode_shared_bytes,
        };
        // SAFETY: the arguments of attention.cu; the caller checked the operands, `reserve` made room for the parts.
        unsafe { queue.launch(&kernels.decode, grid, &arguments) }
    }

    /// Room for `groups` pairs of a sequence and a KV head, each with `part` values. Never grows during a capture: the
    /// rehearsal has made the same room.
    fn reserve(&mut self, queue: &Queue, groups: usize, part: usize) -> anyhow::Result<()> {
        if groups * part > self.partial.len() {
            self.partial = DeviceBuffer::new(&queue.stream, groups * part, "attention")?;
        }
        if groups > self.tickets.len() {
            self.tickets = DeviceBuffer::zeroed(&queue.stream, groups, "attention")?;
        }
        Ok(())
    }
}

/// Parts that a context is cut into: enough blocks for the device, whatever the context is.
fn splits(sequences: usize, kv_heads: usize, multiprocessors: usize) -> usize {
    let groups = sequences * kv_heads;
    let most = (multiprocessors / groups).max(USUAL_SPLITS);
    (BLOCKS_EACH * multiprocessors).div_ceil(groups).min(most).clamp(1, MAX_SPLITS)
}

/// Of all tiles but the first `skipped`.
#[allow(unsafe_code)]
fn prefill(
    queue: &mut Queue,
    kernels: &Kernels,
    shape: &Shape,
    staged: &Staged,
    operands: Operands,
    skipped: usize,
) -> anyhow::Result<()> {
    let tiles = staged.counts.tiles - skipped;
    if tiles == 0 {
        return Ok(());
    }
    let Operands { out, q, keys, values } = operands;
    let arguments = [
        at(out),
        at(q),
        at(keys),
        at(values),
        at(staged.at(|layout| layout.query_start)),
        at(staged.at(|layout| layout.context_len)),
        at(staged.at(|layout| layout.pages)),
        at(staged.at(|layout| layout.page_start)),
        at(staged.at(|layout| layout.tile_sequence + skipped)),
        at(staged.at(|layout| layout.tile_first + skipped)),
        int(shape.num_heads),
        int(shape.num_kv_heads),
    ];
    let grid = Grid {
        blocks: [tiles as u32, shape.num_heads as u32, 1],
        threads: PREFILL_THREADS,
        shared_bytes: kernels.prefill_shared_bytes,
    };
    // SAFETY: the arguments of attention.cu; the caller checked the operands.
    unsafe { queue.launch(&kernels.prefill, grid, &arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_device_and_vanish_when_sequences_do() {
        assert_eq!(splits(1, 8, 132), 16);
        assert_eq!(splits(1, 4, 132), 32);
        assert_eq!(splits(2, 8, 132), 16);
        assert_eq!(splits(8, 8, 132), 5);
        assert_eq!(splits(32, 8, 132), 2);
        assert_eq!(splits(64, 8, 132), 1);
        assert_eq!(splits(1, 1, 2), 4);
    }
}
