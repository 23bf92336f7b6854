//! Host tensors on their way to a CPU backend: parts checked against each other, stacked by rows, dequantised.

use anyhow::{bail, ensure};
use rayon::prelude::*;

use super::WeightUse;
use crate::weights::{HostTensor, dtype};

/// Elements that one task dequantises; keeps temporary memory small and every core busy.
const TASK_ELEMENTS: usize = 1 << 18;

/// Rows and columns of all parts together. Vectors lie end to end in one row.
///
/// # Errors
/// When there are no parts, when matrices differ in width, or when a part has the wrong rank for its use.
pub(super) fn stacked_shape(usage: WeightUse, parts: &[HostTensor<'_>]) -> anyhow::Result<(usize, usize)> {
    let Some(first) = parts.first() else { bail!("no tensors to upload, expected at least one") };
    let rank = if usage == WeightUse::Vector { 1 } else { 2 };
    for part in parts {
        ensure!(
            part.shape.len() == rank,
            "tensor {} has shape {:?}, expected {rank} dimensions",
            part.name,
            part.shape
        );
        ensure!(
            rank == 1 || part.columns() == first.columns(),
            "tensor {} has {} columns, expected {} as in {}",
            part.name,
            part.columns(),
            first.columns(),
            first.name
        );
    }
    Ok(match usage {
        WeightUse::Vector => (1, parts.iter().map(HostTensor::columns).sum()),
        _ => (parts.iter().map(HostTensor::rows).sum(), first.columns()),
    })
}

/// All values of the parts as f32, one after another.
///
/// # Errors
/// When the bytes of a part are not as long as its shape says, or when a value is not finite.
pub(super) fn to_f32(parts: &[HostTensor<'_>]) -> anyhow::Result<Vec<f32>> {
    let elements = parts.iter().map(|part| part.rows() * part.columns()).sum();
    let mut values = vec![0f32; elements];
    let mut rest = values.as_mut_slice();
    for part in parts {
        let (mine, others) = rest.split_at_mut(part.rows() * part.columns());
        dequantize(part, mine)?;
        rest = others;
    }
    Ok(values)
}

fn dequantize(part: &HostTensor<'_>, values: &mut [f32]) -> anyhow::Result<()> {
    let columns = part.columns();
    let row_bytes = part.dtype.bytes_for(&[columns]);
    let expected = part.dtype.bytes_for(&part.shape);
    let Some(row_bytes) = row_bytes.filter(|_| expected == Some(part.bytes.len())) else {
        bail!("tensor {} has {} bytes, expected {expected:?} for its shape", part.name, part.bytes.len());
    };
    if columns == 0 || row_bytes == 0 {
        bail!("tensor {} has shape {:?}, expected no empty dimension", part.name, part.shape);
    }
    let task_rows = (TASK_ELEMENTS / columns).max(1);
    values
        .par_chunks_mut(task_rows * columns)
        .zip(part.bytes.par_chunks(task_rows * row_bytes))
        .enumerate()
        .try_for_each(|(task, (values, bytes))| {
            values.copy_from_slice(&dtype::to_f32(part.dtype, bytes, values.len())?);
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                let index = task * task_rows * columns + index;
                bail!(
                    "tensor {} has a non-finite value at index {index}, expected finite numbers",
                    part.name
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
    use crate::weights::StoredDType;

    fn matrix(name: &str, rows: usize, columns: usize, values: &[f32]) -> HostTensor<'static> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        HostTensor {
            name: name.to_owned(),
            role: TensorRole::Linear,
            dtype: StoredDType::F32,
            shape: vec![rows, columns],
            bytes: Cow::Owned(bytes),
        }
    }

    #[test]
    fn parts_of_different_widths_are_refused_by_name() {
        let parts = [matrix("q", 1, 2, &[1.0; 2]), matrix("k", 1, 3, &[1.0; 3])];
        let error = stacked_shape(WeightUse::Qkv, &parts).unwrap_err().to_string();
        assert_eq!(error, "tensor k has 3 columns, expected 2 as in q");
        assert!(stacked_shape(WeightUse::Qkv, &[]).is_err());
    }

    #[test]
    fn a_value_that_is_not_finite_is_named_with_its_index() {
        let columns = 300;
        let mut values = vec![1.0f32; columns * 2000];
        values[columns * 1999 + 7] = f32::INFINITY;
        let error = to_f32(&[matrix("w", 2000, columns, &values)]).unwrap_err().to_string();
        assert_eq!(error, "tensor w has a non-finite value at index 599707, expected finite numbers");
    }

    #[test]
    fn a_part_whose_bytes_do_not_fill_its_shape_is_refused() {
        let error = to_f32(&[matrix("w", 2, 3, &[1.0; 5])]).unwrap_err().to_string();
        assert!(error.contains("tensor w has 20 bytes, expected Some(24)"), "{error}");
    }

    #[test]
    fn parts_are_stacked_in_order() {
        let parts = [matrix("a", 1, 2, &[1.0, 2.0]), matrix("b", 2, 2, &[3.0, 4.0, 5.0, 6.0])];
        assert_eq!(stacked_shape(WeightUse::Qkv, &parts).unwrap(), (3, 2));
        assert_eq!(to_f32(&parts).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
}
