//! Values of quantised blocks, element by element, against the formats' definitions written out here.

use tempfile::tempdir;
use tokmeter::weights::{StoredDType, Weights, first_non_finite, open};

use crate::files::GgufTensor;
use crate::tiny::{FFN, HEAD_DIM, HEADS, HIDDEN, Tiny};

/// A type, its number in GGUF, its block, and the value of one element of one block.
struct Format {
    dtype: StoredDType,
    kind: u32,
    elements: usize,
    bytes: usize,
    /// Where its f16 scales lie.
    scales: &'static [usize],
    value: fn(&[u8], usize) -> f32,
}

const FORMATS: [Format; 8] = [
    Format { dtype: StoredDType::Q4_0, kind: 2, elements: 32, bytes: 18, scales: &[0], value: q4_0 },
    Format { dtype: StoredDType::Q4_1, kind: 3, elements: 32, bytes: 20, scales: &[0, 2], value: q4_1 },
    Format { dtype: StoredDType::Q5_0, kind: 6, elements: 32, bytes: 22, scales: &[0], value: q5_0 },
    Format { dtype: StoredDType::Q5_1, kind: 7, elements: 32, bytes: 24, scales: &[0, 2], value: q5_1 },
    Format { dtype: StoredDType::Q8_0, kind: 8, elements: 32, bytes: 34, scales: &[0], value: q8_0 },
    Format { dtype: StoredDType::F16, kind: 1, elements: 1, bytes: 2, scales: &[0], value: f16_value },
    Format { dtype: StoredDType::Q4K, kind: 12, elements: 256, bytes: 144, scales: &[0, 2], value: q4_k },
    Format { dtype: StoredDType::Q6K, kind: 14, elements: 256, bytes: 210, scales: &[208], value: q6_k },
];

fn f16(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn f16_value(block: &[u8], _: usize) -> f32 {
    f16(block, 0)
}

/// The first 16 elements are low nibbles, the others high ones.
fn nibble(packed: &[u8], element: usize) -> u8 {
    (packed[element % 16] >> (element / 16 * 4)) & 15
}

/// A nibble with its fifth bit from a little-endian mask.
fn five_bits(high: &[u8], packed: &[u8], element: usize) -> f32 {
    f32::from(nibble(packed, element) | (((high[element / 8] >> (element % 8)) & 1) << 4))
}

fn q4_0(block: &[u8], element: usize) -> f32 {
    f16(block, 0) * (f32::from(nibble(&block[2..], element)) - 8.0)
}

fn q4_1(block: &[u8], element: usize) -> f32 {
    f16(block, 0) * f32::from(nibble(&block[4..], element)) + f16(block, 2)
}

fn q5_0(block: &[u8], element: usize) -> f32 {
    f16(block, 0) * (five_bits(&block[2..6], &block[6..], element) - 16.0)
}

fn q5_1(block: &[u8], element: usize) -> f32 {
    f16(block, 0) * five_bits(&block[4..8], &block[8..], element) + f16(block, 2)
}

fn q8_0(block: &[u8], element: usize) -> f32 {
    f16(block, 0) * f32::from(block[2 + element] as i8)
}

/// Eight groups of 32, each with a scale and a minimum of 6 bits.
fn q4_k(block: &[u8], element: usize) -> f32 {
    let (group, within) = (element / 32, element % 32);
    let packed = &block[4..16];
    let (scale, minimum) = match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => (
            (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4),
            (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4),
        ),
    };
    let quant = (block[16 + group / 2 * 32 + within] >> (group % 2 * 4)) & 15;
    f16(block, 0) * f32::from(scale) * f32::from(quant) - f16(block, 2) * f32::from(minimum)
}

/// Halves of 128, in four runs of 32: four low bits, two high bits, a signed scale for every 16.
fn q6_k(block: &[u8], element: usize) -> f32 {
    let (half, run, within) = (element / 128, element % 128 / 32, element % 32);
    let low = (block[half * 64 + run % 2 * 32 + within] >> (run / 2 * 4)) & 15;
    let high = (block[128 + half * 32 + within] >> (2 * run)) & 3;
    let scale = block[192 + half * 8 + run * 2 + within / 16] as i8;
    f16(block, 208) * f32::from(scale) * (f32::from(low | (high << 4)) - 32.0)
}

/// Arbitrary blocks whose scales are ordinary numbers.
fn blocks(format: &Format, elements: usize) -> Vec<u8> {
    let mut state = u64::from(format.kind) + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    let mut bytes: Vec<u8> = (0..elements / format.elements * format.bytes).map(|_| next()).collect();
    for block in bytes.chunks_mut(format.bytes) {
        for &at in format.scales {
            let scale = half::f16::from_f32((f32::from(block[at]) - 100.5) / 512.0);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

fn expected(format: &Format, bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks(format.bytes)
        .flat_map(|block| (0..format.elements).map(|element| (format.value)(block, element)))
        .collect()
}

/// Within one rounding of each other: a product and a sum may be fused in one of the two.
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let tolerance = 1e-6 * expected.abs().max(0.1);
        assert!(
            (found - expected).abs() <= tolerance,
            "{what} element {index}: {found}, expected {expected}"
        );
    }
}

#[test]
fn every_block_format_has_its_defined_values() {
    for format in FORMATS.iter().filter(|format| format.elements < 256) {
        let bytes = blocks(format, HIDDEN * FFN);
        let name = "model.layers.0.mlp.down_proj.weight";
        let opened = with_tensor("blk.0.ffn_down.weight", format, bytes.clone());
        let tensor = opened.tensor(name).unwrap();
        assert_eq!(tensor.dtype, format.dtype);
        assert_eq!(first_non_finite(&tensor), None);
        assert_same(&tensor.to_f32().unwrap(), &expected(format, &bytes), format.dtype.name());
        assert_eq!(opened.info().stored_bytes[format.dtype.name()], bytes.len() as u64);
    }
}

#[test]
fn k_quants_have_their_defined_values() {
    for format in FORMATS.iter().filter(|format| format.elements == 256) {
        let bytes = blocks(format, 1024);
        let found = tokmeter::weights::dtype::to_f32(format.dtype, &bytes, 1024).unwrap();
        assert_same(&found, &expected(format, &bytes), format.dtype.name());
    }
}

#[test]
fn rows_of_q_are_put_in_order_as_whole_rows_of_blocks() {
    for format in FORMATS.iter().filter(|format| format.elements < 256) {
        let bytes = blocks(format, HEADS * HEAD_DIM * HIDDEN);
        let opened = with_tensor("blk.1.attn_q.weight", format, bytes.clone());
        let found = opened.tensor("model.layers.1.self_attn.q_proj.weight").unwrap().to_f32().unwrap();
        let stored = expected(format, &bytes);
        let mut canonical = Vec::new();
        for row in 0..HEADS * HEAD_DIM {
            let (head, half, pair) = (row / HEAD_DIM, row % HEAD_DIM / (HEAD_DIM / 2), row % (HEAD_DIM / 2));
            let source = head * HEAD_DIM + 2 * pair + half;
            canonical.extend(&stored[source * HIDDEN..(source + 1) * HIDDEN]);
        }
        assert_same(&found, &canonical, format.dtype.name());
    }
}

/// The tiny llama with one tensor in this format.
fn with_tensor(name: &str, format: &Format, data: Vec<u8>) -> Box<dyn Weights> {
    let mut file = Tiny::llama().gguf();
    let tensor = file.tensor(name);
    *tensor = GgufTensor { kind: format.kind, data, ..tensor.clone() };
    let folder = tempdir().unwrap();
    open(&file.save(&folder.path().join("m.gguf"))).unwrap()
}
