//! Between f32 and the 16-bit types of the device, in parallel, with a check that nothing overflowed on the way.

use anyhow::bail;
use rayon::prelude::*;

use crate::weights::{HostTensor, StoredDType, dtype};

/// Values that one task converts; whole rows, so that blocks stay whole.
const TASK_ELEMENTS: usize = 1 << 16;

/// Type of weights, activations, keys and values on the device; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CudaDType {
    Bf16,
    F16,
}

impl CudaDType {
    /// In records, and at the end of kernel names.
    pub fn name(self) -> &'static str {
        match self {
            CudaDType::Bf16 => "bf16",
            CudaDType::F16 => "f16",
        }
    }

    /// A value as this type holds it.
    pub fn rounding(self) -> fn(f32) -> f32 {
        match self {
            CudaDType::Bf16 => |value| half::bf16::from_f32(value).to_f32(),
            CudaDType::F16 => |value| half::f16::from_f32(value).to_f32(),
        }
    }

    fn stored(self) -> StoredDType {
        match self {
            CudaDType::Bf16 => StoredDType::BF16,
            CudaDType::F16 => StoredDType::F16,
        }
    }

    /// Rounded to nearest even.
    pub(super) fn bits(self, value: f32) -> u16 {
        match self {
            CudaDType::Bf16 => half::bf16::from_f32(value).to_bits(),
            CudaDType::F16 => half::f16::from_f32(value).to_bits(),
        }
    }

    pub(super) fn value(self, bits: u16) -> f32 {
        match self {
            CudaDType::Bf16 => half::bf16::from_bits(bits).to_f32(),
            CudaDType::F16 => half::f16::from_bits(bits).to_f32(),
        }
    }

    fn is_finite(self, bits: u16) -> bool {
        let exponent = match self {
            CudaDType::Bf16 => 0x7f80,
            CudaDType::F16 => 0x7c00,
        };
        bits & exponent != exponent
    }
}

/// Rows `first_row..` of a matrix as 16-bit values; `out` holds whole rows.
///
/// # Errors
/// When a value is not finite, or is not any more once it is rounded.
pub(super) fn rows_to_bits(
    part: &HostTensor<'_>,
    first_row: usize,
    to: CudaDType,
    out: &mut [u16],
) -> anyhow::Result<()> {
    let columns = part.columns();
    let Some(row_bytes) = part.dtype.bytes_for(&[columns]).filter(|&bytes| bytes > 0) else {
        bail!(
            "tensor {} has rows of {columns} values, expected whole blocks of {}",
            part.name,
            part.dtype.name()
        );
    };
    let task_rows = (TASK_ELEMENTS / columns).max(1);
    let bytes = &part.bytes[first_row * row_bytes..][..out.len() / columns * row_bytes];
    out.par_chunks_mut(task_rows * columns)
        .zip(bytes.par_chunks(task_rows * row_bytes))
        .enumerate()
        .try_for_each(|(task, (out, bytes))| {
            if part.dtype == to.stored() {
                for (out, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = u16::from_le_bytes(*raw);
                }
            } else {
                let values = dtype::to_f32(part.dtype, bytes, out.len())?;
                out.iter_mut().zip(&values).for_each(|(out, &value)| *out = to.bits(value));
            }
            // Without an early exit the loop is vectorised.
            if !out.iter().fold(true, |all, &bits| all & to.is_finite(bits)) {
                let within = out.iter().position(|&bits| !to.is_finite(bits)).unwrap_or(0);
                let index = (first_row + task * task_rows) * columns + within;
                bail!(
                    "tensor {} has a value at index {index} that is no finite {} number",
                    part.name,
                    to.name()
                );
            }
            Ok(())
        })
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::arch::TensorRole;

    fn matrix(dtype: StoredDType, columns: usize, bytes: Vec<u8>) -> HostTensor<'static> {
        let rows = bytes.len() / dtype.bytes_for(&[columns]).unwrap();
        let shape = vec![rows, columns];
        HostTensor { name: "w".to_owned(), role: TensorRole::Linear, dtype, shape, bytes: Cow::Owned(bytes) }
    }

    fn f32_matrix(columns: usize, values: &[f32]) -> HostTensor<'static> {
        matrix(StoredDType::F32, columns, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    #[test]
    fn values_are_rounded_to_nearest_even() {
        let part = f32_matrix(2, &[1.0, 1.003_906_3, 1.011_718_8, -2.5]);
        let mut out = [0u16; 4];
        rows_to_bits(&part, 0, CudaDType::Bf16, &mut out).unwrap();
        assert_eq!(out.map(|bits| CudaDType::Bf16.value(bits)), [1.0, 1.0, 1.015_625, -2.5]);
    }

    #[test]
    fn rows_in_the_middle_are_found() {
        let values: Vec<f32> = (0..200_000).map(|i| (i % 128) as f32).collect();
        let part = f32_matrix(100, &values);
        let mut out = vec![0u16; 1_200 * 100];
        rows_to_bits(&part, 700, CudaDType::F16, &mut out).unwrap();
        for (i, &bits) in out.iter().enumerate() {
            assert_eq!(CudaDType::F16.value(bits), values[70_000 + i]);
        }
    }

    #[test]
    fn the_devices_own_type_is_copied_bit_for_bit() {
        let bits: Vec<u16> = (0..64).map(|i| 0x3f80 + i).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let mut out = [0u16; 64];
        rows_to_bits(&matrix(StoredDType::BF16, 32, bytes), 0, CudaDType::Bf16, &mut out).unwrap();
        assert_eq!(out, bits[..]);
    }

    #[test]
    fn a_value_that_overflows_is_named_with_its_index() {
        let mut values = vec![1.0f32; 300_000];
        values[299_999] = 70_000.0;
        let part = f32_matrix(100, &values);
        let mut out = vec![0u16; 300_000];
        let error = rows_to_bits(&part, 0, CudaDType::F16, &mut out).unwrap_err().to_string();
        assert_eq!(error, "tensor w has a value at index 299999 that is no finite f16 number");
        rows_to_bits(&part, 0, CudaDType::Bf16, &mut out).unwrap();
    }
}
