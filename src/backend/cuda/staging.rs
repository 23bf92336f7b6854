//! One step's integers on their way to the device: all arrays of a [`Batch`] in one pinned buffer and one copy. The
//! places of the arrays depend on the counts alone, so that a captured graph finds them again; what grows with the
//! context (the page lists) comes last.
//!
//! Page 0 of the cache belongs to padding: a batch's pages are shifted by one on their way.

use anyhow::ensure;

use super::context::{Event, Stream};
use super::memory::{DeviceBuffer, Pinned};
use crate::backend::{Batch, PAGE_SIZE, TokenInput};

/// Query rows of one tile of the prefill kernel.
pub(super) const TILE_ROWS: usize = 64;
/// Every array begins at a multiple of so many 32-bit words.
const ALIGNED_WORDS: usize = 4;

/// How long the arrays are, padding included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    pub(super) samples: usize,
    pub(super) tiles: usize,
    pub(super) pages: usize,
    /// Leading sequences that have one token, which is one tile each.
    pub(super) singles: usize,
}

impl Counts {
    /// Of a batch, when its `sequences` are padded to so many with one token each.
    pub(super) fn of(batch: &Batch, padded_sequences: Option<usize>) -> Self {
        let tiles =
            |s: usize| (batch.query_start[s + 1] - batch.query_start[s]).div_ceil(TILE_ROWS as u32) as usize;
        let sequences = batch.num_sequences();
        let padding = padded_sequences.map_or(0, |padded| padded - sequences);
        let singles = (0..sequences).take_while(|&s| batch.query_rows(s).len() == 1).count();
        Counts {
            tokens: batch.num_tokens() + padding,
            sequences: sequences + padding,
            samples: padded_sequences.unwrap_or(batch.sample_rows.len()),
            tiles: (0..sequences).map(tiles).sum::<usize>() + padding,
            pages: batch.pages.len() + padding,
            singles: singles + padding,
        }
    }
}

/// First word of each array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) tokens: usize,
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) query_start: usize,
    pub(super) context_len: usize,
    pub(super) page_start: usize,
    pub(super) sample_rows: usize,
    pub(super) sample_positions: usize,
    pub(super) temperature: usize,
    pub(super) seed_low: usize,
    pub(super) seed_high: usize,
    pub(super) tile_sequence: usize,
    pub(super) tile_first: usize,
    pub(super) pages: usize,
    /// Words of all of them.
    pub(super) words: usize,
}

impl Layout {
    pub(super) fn new(counts: &Counts) -> Self {
        let mut next = 0;
        let mut place = |length: usize| {
            let first = next;
            next = (next + length).next_multiple_of(ALIGNED_WORDS);
            first
        };
        let Counts { tokens, sequences, samples, tiles, pages, .. } = *counts;
        let mut layout = Layout {
            tokens: place(tokens),
            positions: place(tokens),
            slots: place(tokens),
            query_start: place(sequences + 1),
            context_len: place(sequences),
            page_start: place(sequences + 1),
            sample_rows: place(samples),
            sample_positions: place(samples),
            temperature: place(samples),
            seed_low: place(samples),
            seed_high: place(samples),
            tile_sequence: place(tiles),
            tile_first: place(tiles),
            pages: place(pages),
            words: 0,
        };
        layout.words = next;
        layout
    }
}

/// Writes the arrays of `batch` and its padding to `words`.
fn write(batch: &Batch, counts: &Counts, layout: &Layout, words: &mut [u32]) {
    let mut fill = |first: usize, length: usize, values: &mut dyn Iterator<Item = u32>, padding: u32| {
        for word in &mut words[first..first + length] {
            *word = values.next().unwrap_or(padding);
        }
    };
    let Counts { tokens, sequences, samples, tiles, pages, .. } = *counts;
    let token = |token: &TokenInput| match *token {
        TokenInput::Id(id) => id,
        TokenInput::Sampled(row) => !row,
    };
    fill(layout.tokens, tokens, &mut batch.tokens.iter().map(token), 0);
    fill(layout.positions, tokens, &mut batch.positions.iter().copied(), 0);
    fill(layout.slots, tokens, &mut batch.slots.iter().map(|slot| slot + PAGE_SIZE as u32), 0);
    fill(layout.context_len, sequences, &mut batch.context_len.iter().copied(), 1);
    let sampled = || batch.sample_rows.iter().map(|&row| batch.positions[row as usize]);
    fill(layout.sample_rows, samples, &mut batch.sample_rows.iter().copied(), 0);
    fill(layout.sample_positions, samples, &mut sampled(), 0);
    let sampling = || batch.sampling.iter();
    fill(layout.temperature, samples, &mut sampling().map(|sampling| sampling.temperature.to_bits()), 0);
    fill(layout.seed_low, samples, &mut sampling().map(|sampling| sampling.seed as u32), 0);
    fill(layout.seed_high, samples, &mut sampling().map(|sampling| (sampling.seed >> 32) as u32), 0);
    fill(layout.pages, pages, &mut batch.pages.iter().map(|page| page + 1), 0);
    // A padding sequence has one token and one page more than those before it.
    let starts = |starts: &'_ [u32]| starts.last().map_or(0, |last| last + 1);
    fill(
        layout.query_start,
        sequences + 1,
        &mut batch.query_start.iter().copied().chain(starts(&batch.query_start)..),
        0,
    );
    fill(
        layout.page_start,
        sequences + 1,
        &mut batch.page_start.iter().copied().chain(starts(&batch.page_start)..),
        0,
    );
    let of_batch = (0..batch.num_sequences()).flat_map(|s| {
        let rows = batch.query_rows(s).len();
        (0..rows).step_by(TILE_ROWS).map(move |first| (s as u32, first as u32))
    });
    let padded = (batch.num_sequences()..sequences).map(|s| (s as u32, 0));
    let all = || of_batch.clone().chain(padded.clone());
    fill(layout.tile_sequence, tiles, &mut all().map(|(sequence, _)| sequence), 0);
    fill(layout.tile_first, tiles, &mut all().map(|(_, first)| first), 0);
}

/// The staged batch: where its arrays lie on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Staged {
    pub(super) counts: Counts,
    /// Pages that the cache must have, its scratch page not counted.
    pub(super) pages_needed: usize,
    layout: Layout,
    base: u64,
}

impl Staged {
    /// Device address of the array that begins at this word.
    pub(super) fn at(&self, array: impl FnOnce(&Layout) -> usize) -> u64 {
        self.base + (array(&self.layout) * size_of::<u32>()) as u64
    }
}

/// The pinned and the device side. Two pinned buffers: one may still be on its way while the next is written.
#[derive(Debug)]
pub(super) struct Staging {
    device: DeviceBuffer<u32>,
    pinned: [(Pinned, Event); 2],
    next: usize,
}

impl Staging {
    pub(super) fn new(stream: &Stream, words: usize) -> anyhow::Result<Self> {
        let context = stream.context();
        let half = || anyhow::Ok((Pinned::new(context, words * size_of::<u32>())?, Event::new(context)?));
        let device = DeviceBuffer::new(stream, words, "the description of a batch")?;
        Ok(Staging { device, pinned: [half()?, half()?], next: 0 })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.device.bytes()
    }

    /// Queues the copy of `batch` to the device. `samples` is the number of the previous step's samples.
    ///
    /// # Errors
    /// When a token refers to a sample that does not exist, or the device fails.
    pub(super) fn stage(
        &mut self,
        stream: &Stream,
        batch: &Batch,
        padded_sequences: Option<usize>,
        samples: usize,
    ) -> anyhow::Result<Staged> {
        for token in &batch.tokens {
            if let TokenInput::Sampled(row) = token {
                ensure!(
                    (*row as usize) < samples,
                    "the previous step sampled {samples} rows, expected at least {}",
                    row + 1
                );
            }
        }
        let counts = Counts::of(batch, padded_sequences);
        let layout = Layout::new(&counts);
        if layout.words > self.device.len() {
            // Addresses change; graphs notice by comparing them.
            stream.synchronize()?;
            *self = Staging::new(stream, layout.words.next_power_of_two())?;
        }
        let (pinned, copied) = &mut self.pinned[self.next];
        self.next ^= 1;
        copied.synchronize()?;
        write(batch, &counts, &layout, pinned.as_mut_slice());
        if layout.words > 0 {
            self.device.copy_from(stream, 0, pinned, layout.words)?;
        }
        copied.record(stream)?;
        let slots = batch.slots.iter().map(|slot| slot / PAGE_SIZE as u32);
        let pages_needed = batch.pages.iter().copied().chain(slots).max().map_or(0, |page| page as usize + 1);
        Ok(Staged { counts, pages_needed, layout, base: self.device.address() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Sampling;

    fn staged(batch: &Batch, padded: Option<usize>) -> (Counts, Layout, Vec<u32>) {
        let counts = Counts::of(batch, padded);
        let layout = Layout::new(&counts);
        let mut words = vec![0xDEAD; layout.words];
        write(batch, &counts, &layout, &mut words);
        (counts, layout, words)
    }

    fn decode_of_two() -> Batch {
        let mut batch = Batch::default();
        batch.clear();
        batch.push([TokenInput::Id(7)], 16, &[3, 5], Some(Sampling { temperature: 0.5, seed: 9 << 32 | 2 }));
        batch.push([TokenInput::Sampled(1)], 2, &[4], Some(Sampling::GREEDY));
        batch
    }

    #[test]
    fn padding_sequences_are_one_token_on_the_scratch_page() {
        let (counts, layout, words) = staged(&decode_of_two(), Some(4));
        assert_eq!(counts, Counts { tokens: 4, sequences: 4, samples: 4, tiles: 4, pages: 5, singles: 4 });
        let array = |first: usize, length: usize| &words[first..first + length];
        assert_eq!(array(layout.tokens, 4), [7, !1, 0, 0]);
        assert_eq!(array(layout.positions, 4), [16, 2, 0, 0]);
        assert_eq!(array(layout.slots, 4), [6 * 16, 5 * 16 + 2, 0, 0]);
        assert_eq!(array(layout.context_len, 4), [17, 3, 1, 1]);
        assert_eq!(array(layout.query_start, 5), [0, 1, 2, 3, 4]);
        assert_eq!(array(layout.page_start, 5), [0, 2, 3, 4, 5]);
        assert_eq!(array(layout.pages, 5), [4, 6, 5, 0, 0]);
        assert_eq!(array(layout.sample_rows, 4), [0, 1, 0, 0]);
        assert_eq!(array(layout.sample_positions, 4), [16, 2, 0, 0]);
        assert_eq!(array(layout.temperature, 4), [0.5f32.to_bits(), 0, 0, 0]);
        assert_eq!(
            (array(layout.seed_low, 4), array(layout.seed_high, 4)),
            (&[2, 0, 0, 0][..], &[9, 0, 0, 0][..])
        );
        assert_eq!(array(layout.tile_sequence, 4), [0, 1, 2, 3]);
        assert_eq!(array(layout.tile_first, 4), [0; 4]);
    }

    #[test]
    fn long_prompts_are_cut_into_tiles() {
        let mut batch = Batch::default();
        batch.clear();
        let pages: Vec<u32> = (0..10).collect();
        batch.push((0..130).map(TokenInput::Id), 0, &pages, None);
        batch.push((0..64).map(TokenInput::Id), 5, &pages, Some(Sampling::GREEDY));
        let (counts, layout, words) = staged(&batch, None);
        assert_eq!(
            counts,
            Counts { tokens: 194, sequences: 2, samples: 1, tiles: 4, pages: 9 + 5, singles: 0 }
        );
        assert_eq!(words[layout.tile_sequence..][..4], [0, 0, 0, 1]);
        assert_eq!(words[layout.tile_first..][..4], [0, 64, 128, 0]);
        assert_eq!(words[layout.sample_rows], 193);
    }

    #[test]
    fn decoding_sequences_before_a_prompt_are_counted() {
        let mut batch = decode_of_two();
        batch.push((0..70).map(TokenInput::Id), 0, &[0, 1, 2, 3, 6], None);
        batch.push([TokenInput::Id(1)], 0, &[7], None);
        let (counts, layout, words) = staged(&batch, None);
        assert_eq!((counts.singles, counts.sequences, counts.tiles), (2, 4, 5));
        assert_eq!(words[layout.tile_sequence + counts.singles..][..3], [2, 2, 3]);
    }

    #[test]
    fn arrays_do_not_overlap_and_lie_where_the_counts_say() {
        let counts = Counts { tokens: 5, sequences: 3, samples: 2, tiles: 7, pages: 11, singles: 0 };
        let layout = Layout::new(&counts);
        let ends = [
            (layout.tokens, 5),
            (layout.positions, 5),
            (layout.slots, 5),
            (layout.query_start, 4),
            (layout.context_len, 3),
            (layout.page_start, 4),
            (layout.sample_rows, 2),
            (layout.sample_positions, 2),
            (layout.temperature, 2),
            (layout.seed_low, 2),
            (layout.seed_high, 2),
            (layout.tile_sequence, 7),
            (layout.tile_first, 7),
            (layout.pages, 11),
        ];
        assert!(
            ends.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0 && pair[1].0 % ALIGNED_WORDS == 0)
        );
        assert_eq!(layout.words, (layout.pages + 11).next_multiple_of(ALIGNED_WORDS));
        // Longer contexts move nothing.
        let longer = Layout::new(&Counts { pages: 500, ..counts });
        assert_eq!(Layout { words: 0, ..longer }, Layout { words: 0, ..layout });
    }
}
