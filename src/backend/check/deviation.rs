//! How far values are from the right ones, as a share of what they may be off, and what that says.

use serde::Serialize;

/// So many times the tolerance may be rounding. The largest of many errors moves by less than a factor of two when sums
/// are taken in another order; a value that is simply wrong is off by about its own size, which is 20 times the widest
/// tolerance (of a forward pass in bf16) and more of every other.
pub const MOST_BY_ROUNDING: f64 = 4.0;

/// How a comparison is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// Beyond the tolerance, and no further than more rounding than usual may go.
    OverTolerance,
    /// Further than any rounding, not finite, or other bits where they must be the same.
    Wrong,
}

/// How far the values of one comparison are from the right ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deviation {
    /// Largest absolute difference; NaN where a value is none.
    pub max_error: f64,
    /// The value that used the largest share of its tolerance.
    pub index: usize,
    /// Its difference, and what that was allowed to be.
    pub worst_error: f64,
    pub tolerance: f64,
    /// Their ratio; above 1 (or not finite) fails.
    pub tolerance_used: f64,
}

impl Deviation {
    pub const NONE: Deviation =
        Deviation { max_error: 0.0, index: 0, worst_error: 0.0, tolerance: 0.0, tolerance_used: 0.0 };

    /// Of values in rows of `columns`, each within `epsilon · (rms of its row + |value|)`.
    pub fn measure(right: &[f32], found: &[f32], columns: usize, epsilon: f64) -> Self {
        let mut worst = Self::NONE;
        for (row, (right, found)) in right.chunks(columns).zip(found.chunks(columns)).enumerate() {
            let rms = rms(right);
            for (column, (&right, &found)) in right.iter().zip(found).enumerate() {
                let error = (f64::from(right) - f64::from(found)).abs();
                let tolerance = epsilon * (rms + f64::from(right).abs());
                worst = worst.or(Self::of(row * columns + column, error, tolerance));
            }
        }
        worst
    }

    /// Of one value.
    pub fn of(index: usize, error: f64, tolerance: f64) -> Self {
        let tolerance_used = if error == 0.0 { 0.0 } else { error / tolerance };
        Deviation { max_error: error, index, worst_error: error, tolerance, tolerance_used }
    }

    /// Of what must be the same and is not.
    pub fn difference(right: &[f32], found: &[f32]) -> Self {
        Deviation { tolerance_used: f64::INFINITY, ..Self::measure(right, found, right.len().max(1), 0.0) }
    }

    /// The larger of both, where no number is larger than NaN.
    pub fn or(self, other: Self) -> Self {
        let is_larger = |a: f64, b: f64| a > b || (a.is_nan() && !b.is_nan());
        let max_error =
            if is_larger(other.max_error, self.max_error) { other.max_error } else { self.max_error };
        let worst = if is_larger(other.tolerance_used, self.tolerance_used) { other } else { self };
        Deviation { max_error, ..worst }
    }

    pub fn verdict(&self) -> Verdict {
        match self.tolerance_used {
            used if used <= 1.0 => Verdict::Ok,
            used if used <= MOST_BY_ROUNDING => Verdict::OverTolerance,
            _ => Verdict::Wrong,
        }
    }
}

fn rms(values: &[f32]) -> f64 {
    let squares = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    (squares / values.len() as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_be_off_by_a_share_of_itself_and_of_its_row() {
        let two_rows = [[1.0, -1.0], [30.0, 40.0]].concat();
        let found = Deviation::measure(&two_rows, &[1.0, -1.5, 30.0, 40.0], 2, 0.5);
        assert_eq!(found, Deviation::of(1, 0.5, 1.0));
        assert_eq!((found.tolerance_used, found.verdict()), (0.5, Verdict::Ok));
        assert_eq!(Deviation::measure(&two_rows, &two_rows, 2, 0.0), Deviation::NONE);
    }

    #[test]
    fn the_largest_error_need_not_be_the_worst() {
        let found = Deviation::of(3, 2.0, 10.0).or(Deviation::of(7, 1.0, 2.0)).or(Deviation::of(9, 0.1, 1.0));
        assert_eq!((found.max_error, found.index, found.tolerance_used), (2.0, 7, 0.5));
    }

    #[test]
    fn rounding_beyond_the_tolerance_reads_otherwise_than_a_wrong_value() {
        let verdict = |error: f64, tolerance: f64| Deviation::of(0, error, tolerance).verdict();
        assert_eq!(verdict(1.0, 1.0), Verdict::Ok);
        assert_eq!(verdict(1.1, 1.0), Verdict::OverTolerance);
        assert_eq!(verdict(MOST_BY_ROUNDING, 1.0), Verdict::OverTolerance);
        assert_eq!(verdict(MOST_BY_ROUNDING * 1.01, 1.0), Verdict::Wrong);
        assert_eq!((verdict(f64::NAN, 1.0), verdict(f64::INFINITY, 1.0)), (Verdict::Wrong, Verdict::Wrong));
        assert_eq!(Deviation::difference(&[0.0], &[-0.0]).verdict(), Verdict::Wrong);
    }

    #[test]
    fn a_value_that_is_no_number_stays_the_worst() {
        for found in [[f32::NAN, 2.0, 900.0], [900.0, 2.0, f32::NAN]] {
            let found = Deviation::measure(&[1.0, 2.0, 3.0], &found, 3, 1.0);
            assert!(found.max_error.is_nan() && found.tolerance_used.is_nan(), "{found:?}");
            assert_eq!(found.verdict(), Verdict::Wrong);
        }
    }
}
