//! Causal attention over pages of keys and values, one page at a time with a running maximum and sum. Work is split by
//! (some query tokens of a sequence × key/value head), so that a page that is in the cache serves many queries.

use rayon::prelude::*;

use super::vector;
use crate::backend::{Batch, PAGE_SIZE, Shape};

/// Query tokens that share the reading of a page.
const TILE_TOKENS: usize = 16;

/// Multiplications that are worth waking another thread for.
const TASK_PRODUCTS: usize = 1 << 16;

/// Keys and values of one layer. A page holds the keys of each head as `[head_dim, PAGE_SIZE]`, so that scores of a
/// whole page are computed side by side, and its values as `[PAGE_SIZE, head_dim]`.
#[derive(Debug)]
pub(super) struct LayerKv {
    /// `[pages, num_kv_heads, head_dim, PAGE_SIZE]`
    keys: Vec<f32>,
    /// `[pages, num_kv_heads, PAGE_SIZE, head_dim]`
    values: Vec<f32>,
    kv_heads: usize,
    head_dim: usize,
}

impl LayerKv {
    /// Pages that hold NaN, so that reading what was never written shows.
    pub(super) fn new(pages: usize, shape: &Shape) -> Self {
        let elements = pages * PAGE_SIZE * shape.kv_size();
        LayerKv {
            keys: vec![f32::NAN; elements],
            values: vec![f32::NAN; elements],
            kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
        }
    }

    /// Writes one token's key and value, `[kv_size]` each.
    pub(super) fn write(&mut self, slot: u32, key: &[f32], value: &[f32]) {
        let (page, offset) = (slot as usize / PAGE_SIZE, slot as usize % PAGE_SIZE);
        let head_dim = self.head_dim;
        for head in 0..self.kv_heads {
            let start = self.start(page, head);
            debug_assert!(start < self.keys.len(), "slot {slot} is beyond the last page");
            let columns = head * head_dim..(head + 1) * head_dim;
            let keys = self.keys[start + offset..].iter_mut().step_by(PAGE_SIZE);
            keys.zip(&key[columns.clone()]).for_each(|(to, from)| *to = *from);
            self.values[start + offset * head_dim..][..head_dim].copy_from_slice(&value[columns]);
        }
    }

    /// Where the keys (or values) of a head in a page begin.
    fn start(&self, page: usize, head: usize) -> usize {
        (page * self.kv_heads + head) * PAGE_SIZE * self.head_dim
    }

    /// `[head_dim, PAGE_SIZE]`
    fn keys(&self, page: u32, head: usize) -> &[f32] {
        &self.keys[self.start(page as usize, head)..][..PAGE_SIZE * self.head_dim]
    }

    /// `[PAGE_SIZE, head_dim]`
    fn values(&self, page: u32, head: usize) -> &[f32] {
        &self.values[self.start(page as usize, head)..][..PAGE_SIZE * self.head_dim]
    }
}

/// Some neighbouring query tokens of one sequence, and the query heads that share one key/value head.
struct Tile<'a> {
    sequence: usize,
    first_row: usize,
    kv_head: usize,
    /// For each token `[group, head_dim]`.
    outs: Vec<&'a mut [f32]>,
}

/// `q` and `out` are `[tokens, q_size]`.
pub(super) fn attention(shape: &Shape, batch: &Batch, q: &[f32], kv: &LayerKv, out: &mut [f32]) {
    let mut tiles = tiles(shape, batch, out);
    let context: u64 = batch.positions.iter().map(|&position| u64::from(position) + 1).sum();
    let products_per_tile = context as usize * 2 * shape.q_size() / tiles.len().max(1) + 1;
    let tiles = tiles.par_iter_mut().with_min_len(TASK_PRODUCTS.div_ceil(products_per_tile));
    tiles.for_each(|tile| attend(shape, batch, q, kv, tile));
}

fn tiles<'a>(shape: &Shape, batch: &Batch, out: &'a mut [f32]) -> Vec<Tile<'a>> {
    let width = shape.q_size() / shape.num_kv_heads;
    let mut rows = out.chunks_exact_mut(shape.q_size());
    let mut tiles = Vec::with_capacity(batch.num_sequences() * shape.num_kv_heads);
    for sequence in 0..batch.num_sequences() {
        for first_row in batch.query_rows(sequence).step_by(TILE_TOKENS) {
            let first_tile = tiles.len();
            let tokens = TILE_TOKENS.min(batch.query_rows(sequence).end - first_row);
            tiles.extend((0..shape.num_kv_heads).map(|kv_head| Tile {
                sequence,
                first_row,
                kv_head,
                outs: Vec::with_capacity(tokens),
            }));
            for row in rows.by_ref().take(tokens) {
                for (tile, out) in tiles[first_tile..].iter_mut().zip(row.chunks_exact_mut(width)) {
                    tile.outs.push(out);
                }
            }
        }
    }
    tiles
}

/// Softmax over the pages seen so far: the largest score, and the sum of `exp(score - largest)`.
#[derive(Clone, Copy)]
struct Running {
    largest: f32,
    sum: f32,
}

fn attend(shape: &Shape, batch: &Batch, q: &[f32], kv: &LayerKv, tile: &mut Tile<'_>) {
    let (head_dim, q_size) = (shape.head_dim, shape.q_size());
    let scale = 1.0 / (head_dim as f32).sqrt();
    let group = shape.num_heads / shape.num_kv_heads;
    let mut running = vec![Running { largest: f32::NEG_INFINITY, sum: 0.0 }; tile.outs.len() * group];
    tile.outs.iter_mut().for_each(|out| out.fill(0.0));
    for (index, &page) in batch.sequence_pages(tile.sequence).iter().enumerate() {
        let (keys, values) = (kv.keys(page, tile.kv_head), kv.values(page, tile.kv_head));
        for (t, out) in tile.outs.iter_mut().enumerate() {
            let row = tile.first_row + t;
            let context = batch.positions[row] as usize + 1;
            let visible = context.saturating_sub(index * PAGE_SIZE).min(PAGE_SIZE);
            if visible == 0 {
                continue;
            }
            let queries = &q[row * q_size + tile.kv_head * group * head_dim..][..group * head_dim];
            let heads = queries.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
            for ((query, out), running) in heads.zip(&mut running[t * group..]) {
                let mut weights = page_scores(query, keys, scale);
                running.absorb(&mut weights, visible, out);
                mix(&weights[..visible], values, out);
            }
        }
    }
    for (out, running) in tile.outs.iter_mut().flat_map(|out| out.chunks_exact_mut(head_dim)).zip(&running) {
        let norm = 1.0 / running.sum;
        out.iter_mut().for_each(|value| *value *= norm);
    }
}

/// `query · key · scale` for every slot of a page. Slots that hold no key give anything.
fn page_scores(query: &[f32], keys: &[f32], scale: f32) -> [f32; PAGE_SIZE] {
    // Two sets of sums: neighbouring dimensions do not wait for each other.
    let mut sums = [[0f32; PAGE_SIZE]; 2];
    let (pairs, last) = keys.as_chunks::<PAGE_SIZE>().0.as_chunks::<2>();
    debug_assert!(last.is_empty(), "head_dim is even");
    for (query, keys) in query.as_chunks::<2>().0.iter().zip(pairs) {
        for half in 0..2 {
            for slot in 0..PAGE_SIZE {
                sums[half][slot] = query[half].mul_add(keys[half][slot], sums[half][slot]);
            }
        }
    }
    std::array::from_fn(|slot| (sums[0][slot] + sums[1][slot]) * scale)
}

impl Running {
    /// Turns the scores of the first `visible` slots into weights relative to the running maximum, and brings what is
    /// already in `out` to the same maximum.
    fn absorb(&mut self, scores: &mut [f32; PAGE_SIZE], visible: usize, out: &mut [f32]) {
        scores[visible..].fill(f32::NEG_INFINITY);
        // A NaN must not be lost here: `max` would drop it, and a broken key would go unseen.
        let largest = scores.iter().fold(self.largest, |a, &b| if b > a || b.is_nan() { b } else { a });
        if largest != self.largest {
            let shrink = vector::exp(self.largest - largest);
            self.sum *= shrink;
            out.iter_mut().for_each(|value| *value *= shrink);
            self.largest = largest;
        }
        for score in scores.iter_mut() {
            *score = vector::exp(*score - largest);
        }
        scores[visible..].fill(0.0);
        self.sum += scores.iter().sum::<f32>();
    }
}

/// `out += Σ weights[slot] · values[slot]`; reads no slot beyond the weights.
fn mix(weights: &[f32], values: &[f32], out: &mut [f32]) {
    let head_dim = out.len();
    let (fours, rest) = weights.as_chunks::<4>();
    let mut rows = values.chunks_exact(head_dim);
    for weights in fours {
        let [Some(a), Some(b), Some(c), Some(d)] = [rows.next(), rows.next(), rows.next(), rows.next()]
        else {
            return;
        };
        for (((out, a), b), (c, d)) in out.iter_mut().zip(a).zip(b).zip(c.iter().zip(d)) {
            let first = weights[0].mul_add(*a, weights[1] * b);
            *out += weights[2].mul_add(*c, weights[3].mul_add(*d, first));
        }
    }
    for (weight, row) in rest.iter().zip(rows) {
        for (out, value) in out.iter_mut().zip(row) {
            *out = weight.mul_add(*value, *out);
        }
    }
}
