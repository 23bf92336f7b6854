//! A product as the library takes it. Ours are row-major, `y [rows, columns] = a [rows, depth] · w [columns, depth]ᵀ`;
//! cuBLASLt's matrices are column-major, and a row-major matrix is a column-major one transposed. So the library computes
//! `yᵀ = w · aᵀ`: its first operand is `w`, stored as `wᵀ` and therefore transposed back, its second is `aᵀ` as it lies.

use crate::backend::CudaDType;
use crate::backend::cuda::kernels::Epilogue;

/// Rows are tuned in steps of at least so many: the buckets of decode steps up to 256 rows.
const LEAST_STEP: usize = 32;

/// A product for which one algorithm is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ProductShape {
    pub(super) epilogue: Epilogue,
    /// Rows of the weight; with silu gate and up together.
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) rows: usize,
}

/// `512 rows, 6144 columns, depth 4096, store_f32`
impl std::fmt::Display for ProductShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ProductShape { epilogue, columns, depth, rows } = self;
        write!(f, "{rows} rows, {columns} columns, depth {depth}, {}", epilogue.name())
    }
}

impl ProductShape {
    /// What the library keeps its sums as: silu follows in a kernel of ours, which reads 16 bits.
    pub(super) fn output(&self, dtype: CudaDType) -> Value {
        match self.epilogue {
            Epilogue::Store | Epilogue::Residual => Value::F32,
            Epilogue::Silu => Value::Half(dtype),
        }
    }

    pub(super) fn output_bytes(&self) -> usize {
        self.rows * self.columns * if self.epilogue == Epilogue::Silu { 2 } else { 4 }
    }

    /// What of the old output is kept.
    pub(super) fn beta(&self) -> f32 {
        if self.epilogue == Epilogue::Residual { 1.0 } else { 0.0 }
    }

    /// The matrices of the column-major product.
    pub(super) fn operands(&self, dtype: CudaDType) -> Operands {
        let ProductShape { columns, depth, rows, .. } = *self;
        let matrix = |value, rows, columns| Matrix { value, rows, columns, leading: rows };
        Operands {
            first: matrix(Value::Half(dtype), depth, columns),
            second: matrix(Value::Half(dtype), depth, rows),
            result: matrix(self.output(dtype), columns, rows),
        }
    }
}

/// Type of a matrix's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    F32,
    Half(CudaDType),
}

/// A column-major matrix: value `(i, j)` lies at `i + j · leading`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    pub(super) value: Value,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) leading: usize,
}

/// `result = firstᵀ · second`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operands {
    pub(super) first: Matrix,
    pub(super) second: Matrix,
    pub(super) result: Matrix,
}

/// The number of rows that a product of `rows` rows is tuned for: the next multiple of an eighth of the power of two
/// above, and of at least 32. Prompts come in any length; so there are four tunings for each doubling of the rows (26
/// from 65 to 8192), and an algorithm runs on at least four fifths of the rows that it was chosen for (two thirds below
/// 128). Powers of two, the usual chunks, and the buckets of decode steps up to 512 sequences are tuned as they are.
pub(in crate::backend::cuda) fn tuned_rows(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 8).max(LEAST_STEP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::queue::bucket;

    fn shape(epilogue: Epilogue) -> ProductShape {
        ProductShape { epilogue, columns: 5, depth: 3, rows: 4 }
    }

    fn at(values: &[i64], matrix: Matrix, i: usize, j: usize) -> i64 {
        assert!(i < matrix.rows && j < matrix.columns);
        values[i + j * matrix.leading]
    }

    #[test]
    fn the_column_major_product_is_the_row_major_one() {
        let shape = shape(Epilogue::Store);
        let ProductShape { rows, columns, depth, .. } = shape;
        let a: Vec<i64> = (0..rows * depth).map(|i| i as i64 * 7 % 11 - 5).collect();
        let w: Vec<i64> = (0..columns * depth).map(|i| i as i64 * 5 % 13 - 6).collect();
        let Operands { first, second, result } = shape.operands(CudaDType::Bf16);
        let mut y = vec![i64::MAX; rows * columns];
        for i in 0..result.rows {
            for j in 0..result.columns {
                y[i + j * result.leading] =
                    (0..first.rows).map(|k| at(&w, first, k, i) * at(&a, second, k, j)).sum();
            }
        }
        for row in 0..rows {
            for column in 0..columns {
                let expected: i64 = (0..depth).map(|k| a[row * depth + k] * w[column * depth + k]).sum();
                assert_eq!(y[row * columns + column], expected, "row {row}, column {column}");
            }
        }
    }

    #[test]
    fn each_epilogue_keeps_what_it_must() {
        let of = |epilogue| (shape(epilogue).output(CudaDType::F16), shape(epilogue).beta());
        assert_eq!(of(Epilogue::Store), (Value::F32, 0.0));
        assert_eq!(of(Epilogue::Residual), (Value::F32, 1.0));
        assert_eq!(of(Epilogue::Silu), (Value::Half(CudaDType::F16), 0.0));
        assert_eq!(shape(Epilogue::Store).output_bytes(), 4 * 20);
        assert_eq!(shape(Epilogue::Silu).output_bytes(), 2 * 20);
    }

    #[test]
    fn few_numbers_of_rows_are_tuned() {
        let tuned: std::collections::BTreeSet<usize> = (65..=8192).map(tuned_rows).collect();
        assert_eq!(tuned.len(), 26);
        assert_eq!(
            tuned.range(..=512).copied().collect::<Vec<_>>(),
            [96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
        );
        for rows in 65..=8192 {
            let tuned = tuned_rows(rows);
            assert!(tuned >= rows && tuned_rows(tuned) == tuned);
            assert!(rows * 5 > tuned * 4 || tuned - rows < LEAST_STEP, "{rows} runs as {tuned}");
        }
        for sequences in 65..=512 {
            assert_eq!(tuned_rows(bucket(sequences)), bucket(sequences));
        }
    }
}
