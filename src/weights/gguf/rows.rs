//! The order of Q and K rows in GGUF files of architecture `llama`.

use rayon::prelude::*;

/// Undoes the converter's reordering: it makes the two rows of a rotated pair neighbours, where the canonical form has
/// them half a head apart. `bytes` are `heads * head_dim` rows of equal length; whole rows move, so blocks stay whole.
pub(super) fn separate_halves(bytes: &[u8], heads: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / (heads * head_dim);
    let mut out = vec![0; bytes.len()];
    out.par_chunks_mut(row_bytes).enumerate().for_each(|(row, destination)| {
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        let source = (head * head_dim + 2 * pair + half) * row_bytes;
        destination.copy_from_slice(&bytes[source..source + row_bytes]);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_each_head_move_half_a_head_apart() {
        // Two heads of four rows, one byte each: pairs (0, 2) and (1, 3) were interleaved.
        assert_eq!(separate_halves(&[0, 2, 1, 3, 10, 12, 11, 13], 2, 4), [0, 1, 2, 3, 10, 11, 12, 13]);
    }
}
