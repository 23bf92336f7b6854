//! Elementwise arithmetic and reductions over f32 slices, written so that the compiler makes vector instructions of
//! them: fixed-size chunks, independent partial sums, no branches, no library calls inside loops.

/// Partial sums of a reduction: four AVX2 registers or eight NEON ones hide the latency of the additions.
const LANES: usize = 32;

/// `Σ a[i] · b[i]`
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sum(&sums) + rest
}

/// Sum of the lanes by halves, the order vector instructions like.
fn sum(lanes: &[f32; LANES]) -> f32 {
    let mut eight = [0f32; 8];
    for lane in 0..8 {
        eight[lane] = (lanes[lane] + lanes[lane + 8]) + (lanes[lane + 16] + lanes[lane + 24]);
    }
    sum8(&eight)
}

pub(super) fn sum8(v: &[f32; 8]) -> f32 {
    ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
}

pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// `out = x / √(mean(x²) + ε) · gain`
pub(super) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
        *out = x * scale * gain;
    }
}

pub(super) fn rms_norm_in_place(x: &mut [f32], gain: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for (x, gain) in x.iter_mut().zip(gain) {
        *x = *x * scale * gain;
    }
}

fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `out = silu(gate) · up`
pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// Rotates the pairs `(vector[i], vector[i + head_dim / 2])` by the angles whose cosines and sines are given.
pub(super) fn rotate(vector: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = vector.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (left, right) = (*a, *b);
        *a = left * cos - right * sin;
        *b = right * cos + left * sin;
    }
}

/// eˣ with a relative error below 2⁻²² (Cephes `expf`), without branches or calls. Arguments are held within ±87, where
/// results are normal numbers; NaN stays NaN.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer that the low mantissa bits then hold.
    const ROUND: f32 = 12_582_912.0;
    const TERMS: [f32; 5] = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = x.clamp(-87.0, 87.0);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let series = TERMS.iter().fold(1.987_569_1e-4, |sum: f32, &term| sum.mul_add(r, term));
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3F80_0000));
    series.mul_add(r * r, r + 1.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tolerance: 2⁻²² relative.
    #[test]
    fn the_exponential_is_accurate_between_its_bounds() {
        for step in -86_900..=86_900 {
            let x = step as f32 * 1e-3;
            let (found, right) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / right - 1.0).abs() < 2f64.powi(-22), "exp({x}) = {found}, not {right}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::NEG_INFINITY) >= 0.0);
        assert!(exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn a_dot_product_counts_every_element_at_every_length() {
        for length in 0..100 {
            let a: Vec<f32> = (0..length).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..length).map(|i| (i % 5) as f32 + 1.0).collect();
            let right: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&a, &b), right, "length {length}"); // small integers: exact in any order
        }
    }
}
