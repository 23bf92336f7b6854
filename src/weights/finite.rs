//! Finds values that are not numbers before they poison a run. One pass over the stored bytes at memory speed.

use rayon::prelude::*;

use super::{HostTensor, StoredDType};

/// Blocks that one task looks at.
const CHUNK_BLOCKS: usize = 1 << 14;

/// Index of the first element that is NaN or infinite. Of a quantised block all values are, when its scale is: the
/// integers beside a finite scale cannot overflow.
pub fn first_non_finite(tensor: &HostTensor<'_>) -> Option<usize> {
    let block = match tensor.dtype {
        StoredDType::F32 => first_block::<4>(&tensor.bytes, |raw| f32::from_le_bytes(*raw).is_finite()),
        StoredDType::F16 => first_block::<2>(&tensor.bytes, finite_f16),
        StoredDType::BF16 => {
            first_block::<2>(&tensor.bytes, |raw| u16::from_le_bytes(*raw) & 0x7f80 != 0x7f80)
        }
        StoredDType::Q4_0 => first_block::<18>(&tensor.bytes, |raw| scales_finite(raw, [0])),
        StoredDType::Q4_1 => first_block::<20>(&tensor.bytes, |raw| scales_finite(raw, [0, 2])),
        StoredDType::Q5_0 => first_block::<22>(&tensor.bytes, |raw| scales_finite(raw, [0])),
        StoredDType::Q5_1 => first_block::<24>(&tensor.bytes, |raw| scales_finite(raw, [0, 2])),
        StoredDType::Q8_0 => first_block::<34>(&tensor.bytes, |raw| scales_finite(raw, [0])),
        StoredDType::Q2K => first_block::<84>(&tensor.bytes, |raw| scales_finite(raw, [80, 82])),
        StoredDType::Q3K => first_block::<110>(&tensor.bytes, |raw| scales_finite(raw, [108])),
        StoredDType::Q4K => first_block::<144>(&tensor.bytes, |raw| scales_finite(raw, [0, 2])),
        StoredDType::Q5K => first_block::<176>(&tensor.bytes, |raw| scales_finite(raw, [0, 2])),
        StoredDType::Q6K => first_block::<210>(&tensor.bytes, |raw| scales_finite(raw, [208])),
    };
    block.map(|block| block * tensor.dtype.block_elements())
}

/// Index of the first block of `N` bytes that is not `finite`.
fn first_block<const N: usize>(bytes: &[u8], finite: impl Fn(&[u8; N]) -> bool + Sync) -> Option<usize> {
    let (blocks, _) = bytes.as_chunks::<N>();
    let chunk = blocks
        .par_chunks(CHUNK_BLOCKS)
        // Without an early exit the inner loop is vectorised.
        .position_first(|chunk| !chunk.iter().fold(true, |all, raw| all & finite(raw)))?;
    let first = chunk * CHUNK_BLOCKS;
    blocks[first..].iter().position(|raw| !finite(raw)).map(|within| first + within)
}

fn finite_f16(raw: &[u8; 2]) -> bool {
    u16::from_le_bytes(*raw) & 0x7c00 != 0x7c00
}

/// Whether the f16 values at these byte offsets of a block are finite.
fn scales_finite<const N: usize, const S: usize>(block: &[u8; N], offsets: [usize; S]) -> bool {
    offsets.iter().fold(true, |all, &at| all & finite_f16(&[block[at], block[at + 1]]))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::arch::TensorRole;

    const TYPES: [StoredDType; 13] = [
        StoredDType::F32,
        StoredDType::F16,
        StoredDType::BF16,
        StoredDType::Q4_0,
        StoredDType::Q4_1,
        StoredDType::Q5_0,
        StoredDType::Q5_1,
        StoredDType::Q8_0,
        StoredDType::Q2K,
        StoredDType::Q3K,
        StoredDType::Q4K,
        StoredDType::Q5K,
        StoredDType::Q6K,
    ];

    fn tensor(dtype: StoredDType, blocks: usize, bytes: Vec<u8>) -> HostTensor<'static> {
        let shape = vec![blocks * dtype.block_elements()];
        HostTensor { name: "t".to_owned(), role: TensorRole::Linear, dtype, shape, bytes: Cow::Owned(bytes) }
    }

    /// The same answer the slow way.
    fn by_dequantising(tensor: &HostTensor<'_>) -> Option<usize> {
        tensor.to_f32().unwrap().iter().position(|value| !value.is_finite())
    }

    #[test]
    fn every_byte_of_a_block_is_judged_as_dequantising_judges_it() {
        const BLOCKS: usize = 3;
        for dtype in TYPES {
            let clean = vec![0x11; BLOCKS * dtype.block_bytes()];
            assert_eq!(first_non_finite(&tensor(dtype, BLOCKS, clean.clone())), None, "{}", dtype.name());
            let mut found = 0;
            for at in 0..clean.len() - 1 {
                let mut broken = clean.clone();
                broken[at..at + 2].fill(0xff);
                let broken = tensor(dtype, BLOCKS, broken);
                let expected = by_dequantising(&broken);
                found += usize::from(expected.is_some());
                assert_eq!(first_non_finite(&broken), expected, "{} byte {at}", dtype.name());
            }
            assert!(found >= BLOCKS, "{} was never broken", dtype.name());
        }
    }

    #[test]
    fn the_first_of_several_is_found_across_chunks() {
        let elements = 3 * CHUNK_BLOCKS + 7;
        let mut values = vec![1.0f32; elements];
        values[2 * CHUNK_BLOCKS + 5] = f32::INFINITY;
        values[elements - 1] = f32::NAN;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(first_non_finite(&tensor(StoredDType::F32, elements, bytes)), Some(2 * CHUNK_BLOCKS + 5));
    }
}
