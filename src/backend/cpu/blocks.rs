//! Rows of quantised blocks: their dot product with f32 activations, and their values.
//!
//! candle owns the block formats; this is the one product that it is not asked for. Its kernels for Q4_1, Q5_0 and
//! Q5_1 have no vector instructions on x86, all of them round activations to 8 bits, so that a prompt and its decoding
//! disagree, and they run on a pool of their own whose idle threads spin against ours. Multiplying the integers by f32
//! activations costs as many instructions as the 8-bit way without VNNI, and loses nothing.
//!
//! All formats are seen as units of 32 values with a scale and an offset for each half: `q · scale + offset`.

use half::f16;

use super::vector::sum8;
use crate::weights::StoredDType;

/// Values of one unit. Rows of every quantised type are whole units.
pub(super) const UNIT: usize = 32;
const HALF: usize = UNIT / 2;

/// 32 neighbouring values: `q[i] · scale[i / 16] + offset[i / 16]`.
struct Unit {
    q: [i8; UNIT],
    scale: [f32; 2],
    offset: [f32; 2],
}

/// Sums of the activations over each half unit, `[columns / 32]`: what the offsets are multiplied by.
pub(super) fn half_sums(x: &[f32], sums: &mut Vec<[f32; 2]>) {
    sums.clear();
    sums.extend(x.as_chunks::<UNIT>().0.iter().map(|unit| {
        let (low, high) = unit.split_at(HALF);
        [low.iter().sum(), high.iter().sum()]
    }));
}

/// What is done with the units of a row. A trait and not a closure: one call per row, all units inlined into it.
trait Visit {
    fn visit(&mut self, index: usize, unit: Unit);
}

struct Dot<'a> {
    x: &'a [[f32; UNIT]],
    sums: &'a [[f32; 2]],
    lanes: [f32; 8],
    offsets: [f32; 2],
}

impl Visit for Dot<'_> {
    #[inline(always)]
    fn visit(&mut self, index: usize, unit: Unit) {
        let (x, sums) = (&self.x[index], &self.sums[index]);
        for half in 0..2 {
            let mut lanes = [0f32; 8];
            for quarter in 0..2 {
                let first = half * HALF + quarter * 8;
                for lane in 0..8 {
                    lanes[lane] = f32::from(unit.q[first + lane]).mul_add(x[first + lane], lanes[lane]);
                }
            }
            for lane in 0..8 {
                self.lanes[lane] = lanes[lane].mul_add(unit.scale[half], self.lanes[lane]);
            }
            self.offsets[half] = unit.offset[half].mul_add(sums[half], self.offsets[half]);
        }
    }
}

struct Dequantize<'a> {
    out: &'a mut [[f32; UNIT]],
}

impl Visit for Dequantize<'_> {
    #[inline(always)]
    fn visit(&mut self, index: usize, unit: Unit) {
        let out = &mut self.out[index];
        for half in 0..2 {
            for i in half * HALF..(half + 1) * HALF {
                out[i] = f32::from(unit.q[i]).mul_add(unit.scale[half], unit.offset[half]);
            }
        }
    }
}

/// `Σ row[i] · x[i]`; `sums` are those of `x` by [`half_sums`].
pub(super) fn dot(dtype: StoredDType, row: &[u8], x: &[f32], sums: &[[f32; 2]]) -> f32 {
    let mut dot = Dot { x: x.as_chunks().0, sums, lanes: [0.0; 8], offsets: [0.0; 2] };
    visit(dtype, row, &mut dot);
    sum8(&dot.lanes) + (dot.offsets[0] + dot.offsets[1])
}

/// The values of one row.
pub(super) fn dequantize(dtype: StoredDType, row: &[u8], out: &mut [f32]) {
    visit(dtype, row, &mut Dequantize { out: out.as_chunks_mut().0 });
}

fn visit(dtype: StoredDType, row: &[u8], visitor: &mut impl Visit) {
    match dtype {
        StoredDType::Q4_0 => each::<18, 1>(row, visitor, q4_0),
        StoredDType::Q4_1 => each::<20, 1>(row, visitor, q4_1),
        StoredDType::Q5_0 => each::<22, 1>(row, visitor, q5_0),
        StoredDType::Q5_1 => each::<24, 1>(row, visitor, q5_1),
        StoredDType::Q8_0 => each::<34, 1>(row, visitor, q8_0),
        StoredDType::Q2K => each::<84, 8>(row, visitor, q2_k),
        StoredDType::Q3K => each::<110, 8>(row, visitor, q3_k),
        StoredDType::Q4K => each::<144, 8>(row, visitor, q4_k),
        StoredDType::Q5K => each::<176, 8>(row, visitor, q5_k),
        StoredDType::Q6K => each::<210, 8>(row, visitor, q6_k),
        StoredDType::F32 | StoredDType::F16 | StoredDType::BF16 => {
            debug_assert!(false, "{} has no blocks", dtype.name());
        }
    }
}

/// Hands the visitor every unit of a row of blocks of `BYTES` bytes, each of `UNITS` units.
#[inline(always)]
fn each<const BYTES: usize, const UNITS: usize>(
    row: &[u8],
    visitor: &mut impl Visit,
    decode: impl Fn(&[u8; BYTES], usize) -> Unit,
) {
    for (block, raw) in row.as_chunks::<BYTES>().0.iter().enumerate() {
        for unit in 0..UNITS {
            visitor.visit(block * UNITS + unit, decode(raw, unit));
        }
    }
}

/// Half-precision number at byte `at`.
#[inline(always)]
fn half_at(raw: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([raw[at], raw[at + 1]]).to_f32()
}

/// The low nibbles of 16 bytes, then their high nibbles.
#[inline(always)]
fn nibbles(raw: &[u8]) -> [i8; UNIT] {
    let mut q = [0i8; UNIT];
    for i in 0..HALF {
        q[i] = (raw[i] & 0x0F) as i8;
        q[i + HALF] = (raw[i] >> 4) as i8;
    }
    q
}

/// Adds to each value bit `i` of `high` as its fifth bit.
#[inline(always)]
fn with_fifth_bits(mut q: [i8; UNIT], high: &[u8]) -> [i8; UNIT] {
    for i in 0..UNIT {
        q[i] |= (((high[i / 8] >> (i % 8)) & 1) << 4) as i8;
    }
    q
}

#[inline(always)]
fn q4_0(raw: &[u8; 18], _: usize) -> Unit {
    Unit { q: nibbles(&raw[2..]).map(|q| q - 8), scale: [half_at(raw, 0); 2], offset: [0.0; 2] }
}

#[inline(always)]
fn q4_1(raw: &[u8; 20], _: usize) -> Unit {
    Unit { q: nibbles(&raw[4..]), scale: [half_at(raw, 0); 2], offset: [half_at(raw, 2); 2] }
}

#[inline(always)]
fn q5_0(raw: &[u8; 22], _: usize) -> Unit {
    let q = with_fifth_bits(nibbles(&raw[6..]), &raw[2..6]).map(|q| q - 16);
    Unit { q, scale: [half_at(raw, 0); 2], offset: [0.0; 2] }
}

#[inline(always)]
fn q5_1(raw: &[u8; 24], _: usize) -> Unit {
    let q = with_fifth_bits(nibbles(&raw[8..]), &raw[4..8]);
    Unit { q, scale: [half_at(raw, 0); 2], offset: [half_at(raw, 2); 2] }
}

#[inline(always)]
fn q8_0(raw: &[u8; 34], _: usize) -> Unit {
    let mut q = [0i8; UNIT];
    for i in 0..UNIT {
        q[i] = raw[2 + i] as i8;
    }
    Unit { q, scale: [half_at(raw, 0); 2], offset: [0.0; 2] }
}

/// `scales[16] qs[64] d dmin`: 2 bits, a 4-bit scale and a 4-bit minimum for each 16 values.
#[inline(always)]
fn q2_k(raw: &[u8; 84], unit: usize) -> Unit {
    let (bits, shift) = (&raw[16 + unit / 4 * 32..], unit % 4 * 2);
    let (d, dmin) = (half_at(raw, 80), half_at(raw, 82));
    let scales = [raw[unit * 2], raw[unit * 2 + 1]];
    Unit {
        q: std::array::from_fn(|i| ((bits[i] >> shift) & 3) as i8),
        scale: scales.map(|s| d * f32::from(s & 0x0F)),
        offset: scales.map(|s| -dmin * f32::from(s >> 4)),
    }
}

/// `hmask[32] qs[64] scales[12] d`: 2 bits and a high bit (inverted), a signed 6-bit scale for each 16 values.
#[inline(always)]
fn q3_k(raw: &[u8; 110], unit: usize) -> Unit {
    let (bits, shift) = (&raw[32 + unit / 4 * 32..], unit % 4 * 2);
    let d = half_at(raw, 108);
    let scale = |index: usize| {
        let packed = &raw[96..108];
        let low = if index < 8 { packed[index] & 0x0F } else { packed[index - 8] >> 4 };
        let high = (packed[8 + index % 4] >> (index / 4 * 2)) & 3;
        d * (f32::from(low | (high << 4)) - 32.0)
    };
    Unit {
        q: std::array::from_fn(|i| {
            let high = ((raw[i] >> unit) & 1) << 2;
            (((bits[i] >> shift) & 3) | high) as i8 - 4
        }),
        scale: [scale(unit * 2), scale(unit * 2 + 1)],
        offset: [0.0; 2],
    }
}

/// The 6-bit scale and minimum of unit `unit`, packed in 12 bytes.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], unit: usize) -> (f32, f32) {
    let (scale, minimum) = if unit < 4 {
        (packed[unit] & 63, packed[unit + 4] & 63)
    } else {
        (
            (packed[unit + 4] & 0x0F) | ((packed[unit - 4] >> 6) << 4),
            (packed[unit + 4] >> 4) | ((packed[unit] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(minimum))
}

/// `d dmin scales[12] qs[128]`: two units share 32 bytes, one in the low nibbles and one in the high.
#[inline(always)]
fn q4_k(raw: &[u8; 144], unit: usize) -> Unit {
    let (bits, shift) = (&raw[16 + unit / 2 * 32..], unit % 2 * 4);
    let (scale, minimum) = scale_and_minimum(&raw[4..16], unit);
    Unit {
        q: std::array::from_fn(|i| ((bits[i] >> shift) & 0x0F) as i8),
        scale: [half_at(raw, 0) * scale; 2],
        offset: [-half_at(raw, 2) * minimum; 2],
    }
}

/// As [`q4_k`] with a fifth bit: `d dmin scales[12] qh[32] qs[128]`.
#[inline(always)]
fn q5_k(raw: &[u8; 176], unit: usize) -> Unit {
    let (high, bits, shift) = (&raw[16..48], &raw[48 + unit / 2 * 32..], unit % 2 * 4);
    let (scale, minimum) = scale_and_minimum(&raw[4..16], unit);
    Unit {
        q: std::array::from_fn(|i| (((bits[i] >> shift) & 0x0F) | (((high[i] >> unit) & 1) << 4)) as i8),
        scale: [half_at(raw, 0) * scale; 2],
        offset: [-half_at(raw, 2) * minimum; 2],
    }
}

/// `ql[128] qh[64] scales[16] d`: 4 low and 2 high bits, a signed 8-bit scale for each 16 values.
#[inline(always)]
fn q6_k(raw: &[u8; 210], unit: usize) -> Unit {
    let (half, quarter) = (unit / 4, unit % 4);
    let (low, low_shift) = (&raw[half * 64 + quarter % 2 * 32..], quarter / 2 * 4);
    let (high, high_shift) = (&raw[128 + half * 32..], quarter * 2);
    let scale = |half: usize| half_at(raw, 208) * f32::from(raw[192 + unit * 2 + half] as i8);
    Unit {
        q: std::array::from_fn(|i| {
            (((low[i] >> low_shift) & 0x0F) | (((high[i] >> high_shift) & 3) << 4)) as i8 - 32
        }),
        scale: [scale(0), scale(1)],
        offset: [0.0; 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::dtype;

    const QUANTIZED: [StoredDType; 10] = [
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

    /// Random bytes whose half-precision fields are made finite by clearing an exponent bit of every byte pair that
    /// may hold one.
    fn random_row(dtype: StoredDType, columns: usize) -> Vec<u8> {
        let mut state = 0x1234_5678_9ABC_DEF0u64 ^ dtype.block_bytes() as u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let mut row: Vec<u8> = (0..dtype.bytes_for(&[columns]).unwrap()).map(|_| next()).collect();
        let fields: &[usize] = match dtype {
            StoredDType::Q4_0 | StoredDType::Q5_0 | StoredDType::Q8_0 => &[0],
            StoredDType::Q2K => &[80, 82],
            StoredDType::Q3K => &[108],
            StoredDType::Q6K => &[208],
            _ => &[0, 2],
        };
        for block in row.chunks_mut(dtype.block_bytes()) {
            for &field in fields {
                block[field + 1] &= 0xBF;
            }
        }
        row
    }

    /// candle rounds between its two steps and we do not. Tolerance: 4 ulp of the largest value of the row.
    #[test]
    fn every_format_dequantises_as_candle_does() {
        for dtype in QUANTIZED {
            let columns = 1024;
            let row = random_row(dtype, columns);
            let right = dtype::to_f32(dtype, &row, columns).unwrap();
            let mut found = vec![f32::NAN; columns];
            dequantize(dtype, &row, &mut found);
            for i in 0..columns {
                let tolerance = 4.0 * f32::EPSILON * right.iter().fold(0f32, |a, b| a.max(b.abs()));
                assert!(
                    (found[i] - right[i]).abs() <= tolerance,
                    "{dtype:?}[{i}]: {} {}",
                    found[i],
                    right[i]
                );
            }
        }
    }

    /// Tolerance: 10⁻⁶ of the sum of absolute products.
    #[test]
    fn the_dot_product_is_that_of_the_dequantised_row() {
        for dtype in QUANTIZED {
            let columns = 768;
            let row = random_row(dtype, columns);
            let x: Vec<f32> = (0..columns).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
            let mut values = vec![0f32; columns];
            dequantize(dtype, &row, &mut values);
            let products: Vec<f64> =
                values.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).collect();
            let (right, scale) =
                (products.iter().sum::<f64>(), products.iter().map(|p| p.abs()).sum::<f64>());
            let mut sums = Vec::new();
            half_sums(&x, &mut sums);
            let found = f64::from(dot(dtype, &row, &x, &sums));
            assert!((found - right).abs() <= 1e-6 * scale, "{dtype:?}: {found} {right}");
        }
    }
}
