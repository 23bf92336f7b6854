//! The stream of one backend, and what a step does with it: queue at once, rehearse (note the launches, queue none)
//! or capture. Notes make replaying safe: a graph is launched only when the step would launch exactly the kernels,
//! grids, addresses and numbers that were captured. Decides which launches may overlap what was queued before them.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::context::Stream;
use super::launch::{Argument, Grid, launch};
use super::module::{Graph, Kernel};

/// Stands in notes where a launch has its kernel's address.
const LIBRARY: u64 = 0;

/// How launches are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Queue,
    Rehearse,
    /// `overlap`: with dependent launch.
    Capture {
        overlap: bool,
    },
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) stream: Arc<Stream>,
    pub(super) mode: Mode,
    /// Kernels may start while what was queued before them ends.
    pub(super) dependent_launch: bool,
    /// The launches of the step being rehearsed or captured, as words.
    notes: Vec<u64>,
    /// By number of sequences.
    graphs: HashMap<usize, (Vec<u64>, Graph)>,
}

impl Queue {
    pub(super) fn new(stream: Stream, dependent_launch: bool) -> Self {
        Queue {
            stream: Arc::new(stream),
            mode: Mode::Queue,
            dependent_launch,
            notes: Vec::new(),
            graphs: HashMap::new(),
        }
    }

    /// Whether the next launch may overlap what was queued before it. In a capture nothing comes before the first one:
    /// drivers have refused the attribute there.
    fn overlaps(&self) -> bool {
        match self.mode {
            Mode::Capture { overlap } => overlap && !self.notes.is_empty(),
            Mode::Queue | Mode::Rehearse => self.dependent_launch,
        }
    }

    /// Launches, or only notes, `kernel`.
    ///
    /// # Safety
    /// As for [`launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch(
        &mut self,
        kernel: &Kernel,
        grid: Grid,
        arguments: &[Argument],
    ) -> anyhow::Result<()> {
        let overlap = self.overlaps();
        if self.mode != Mode::Queue {
            let [x, y, z] = grid.blocks.map(u64::from);
            let shape = [x, y, z, u64::from(grid.threads) << 32 | u64::from(grid.shared_bytes)];
            self.notes.push(kernel.function() as u64);
            self.notes.extend(shape);
            self.notes.extend(arguments.iter().map(|argument| argument.0));
        }
        if self.mode != Mode::Rehearse {
            // SAFETY: the caller's promise.
            unsafe { launch(&self.stream, kernel, grid, arguments, overlap) }?;
        }
        Ok(())
    }

    /// Queues, or only notes, work of a library: `note` holds all that tells it from other work.
    pub(super) fn work(
        &mut self,
        note: &[u64],
        work: impl FnOnce(&Stream) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if self.mode != Mode::Queue {
            self.notes.push(LIBRARY);
            self.notes.extend_from_slice(note);
        }
        if self.mode != Mode::Rehearse { work(&self.stream) } else { Ok(()) }
    }

    /// Starts taking notes.
    pub(super) fn begin(&mut self, mode: Mode) {
        self.notes.clear();
        self.mode = mode;
    }

    /// Launches the graph of `bucket` if it is the one that the notes describe.
    pub(super) fn replay(&self, bucket: usize) -> anyhow::Result<bool> {
        match self.graphs.get(&bucket) {
            Some((notes, graph)) if *notes == self.notes => {
                graph.launch(&self.stream)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Forgets all graphs.
    pub(super) fn forget(&mut self) -> anyhow::Result<()> {
        if !self.graphs.is_empty() {
            // One of them may still be running.
            self.stream.synchronize()?;
            self.graphs.clear();
        }
        Ok(())
    }

    /// Keeps `graph`, which was captured with the notes just taken, and launches it.
    pub(super) fn keep(&mut self, bucket: usize, graph: Graph) -> anyhow::Result<()> {
        if self.graphs.contains_key(&bucket) {
            // The one that is replaced may still be running.
            self.stream.synchronize()?;
        }
        graph.launch(&self.stream)?;
        self.graphs.insert(bucket, (self.notes.clone(), graph));
        Ok(())
    }
}

/// The number of sequences that a decode step of `sequences` is padded to, so that few graphs serve all batches.
pub(super) fn bucket(sequences: usize) -> usize {
    match sequences {
        0..=2 => sequences,
        3..=4 => 4,
        5..=32 => sequences.next_multiple_of(8),
        33..=64 => sequences.next_multiple_of(16),
        65..=256 => sequences.next_multiple_of(32),
        _ => sequences.next_multiple_of(64),
    }
}

/// Of all `sizes` that are treated alike, the last.
pub(super) fn last_of_each(sizes: RangeInclusive<usize>, treated_as: impl Fn(usize) -> usize) -> Vec<usize> {
    let end = *sizes.end();
    sizes.filter(|&size| size == end || treated_as(size + 1) != treated_as(size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_sizes_treated_alike_the_last_stands_for_all() {
        assert_eq!(last_of_each(1..=20, bucket), [1, 2, 4, 8, 16, 20]);
        assert_eq!(last_of_each(RangeInclusive::new(1, 0), bucket), [0; 0]);
    }

    #[test]
    fn buckets_are_few_and_waste_little() {
        let all: std::collections::BTreeSet<usize> = (1..=512).map(bucket).collect();
        let expected = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512];
        assert_eq!(all.into_iter().collect::<Vec<_>>(), expected);
        for sequences in 1..=512 {
            let padded = bucket(sequences);
            assert!(padded >= sequences && bucket(padded) == padded);
            assert!(padded - sequences < 8.max(sequences / 2), "{sequences} became {padded}");
        }
    }
}
