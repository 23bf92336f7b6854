//! Least squares with coefficients of at least zero, for a handful of columns: the exact active-set method of Lawson and
//! Hanson (*Solving Least Squares Problems*, 1974, chapter 23) over Householder QR. Columns are scaled to length one, so
//! that seconds and token counts meet on equal terms. Sequential and deterministic: the same bits for the same rows.

/// A column that adds less than this to what the others span counts as spanned by them.
const DEPENDENT: f64 = 1e-11;
/// A gradient below this share of the target is zero.
const FLAT: f64 = 1e-12;
/// Rounds of Huber's reweighting.
const HUBER_ROUNDS: usize = 3;
/// Huber's threshold in robust standard deviations: 95 % efficiency on normal errors.
const HUBER_THRESHOLD: f64 = 1.345;
/// Median absolute deviation of a normal distribution to its standard deviation.
const MAD_TO_SIGMA: f64 = 1.4826;
/// Residuals below this are rounding.
const LEAST_RESIDUAL: f64 = 1e-9;

/// Coefficients x ≥ 0 that minimise |rows · x − targets|². `rows` is `[points][features]`, one target per row.
pub fn nnls(rows: &[Vec<f64>], targets: &[f64]) -> Vec<f64> {
    let features = rows.first().map_or(0, Vec::len);
    let scales = column_lengths(rows, features);
    let scaled = divide_columns(rows, &scales);
    let target_length = targets.iter().map(|target| target * target).sum::<f64>().sqrt();
    let mut x = vec![0.0; features];
    let mut passive = vec![false; features];
    // Each round adds the feature that helps most; the bound only guards against cycling by rounding.
    for _ in 0..3 * features {
        let gradient = gradient(&scaled, targets, &x);
        let best = (0..features)
            .filter(|column| !passive[*column] && gradient[*column] > FLAT * target_length)
            .max_by(|a, b| gradient[*a].total_cmp(&gradient[*b]));
        let Some(best) = best else { break };
        passive[best] = true;
        settle(&scaled, targets, &mut passive, &mut x);
        if !passive[best] {
            break;
        }
    }
    x.iter().zip(&scales).map(|(value, scale)| if *scale > 0.0 { value / scale } else { 0.0 }).collect()
}

/// Moves `x` to the least squares of its passive columns, letting go of those that would become negative.
fn settle(rows: &[Vec<f64>], targets: &[f64], passive: &mut [bool], x: &mut [f64]) {
    loop {
        let columns: Vec<usize> = (0..x.len()).filter(|column| passive[*column]).collect();
        let solution = least_squares(rows, targets, &columns);
        let step = columns
            .iter()
            .zip(&solution)
            .filter(|(_, value)| **value <= 0.0)
            .map(|(column, value)| x[*column] / (x[*column] - value).max(f64::MIN_POSITIVE))
            .fold(f64::INFINITY, f64::min);
        if step == f64::INFINITY {
            columns.iter().zip(&solution).for_each(|(column, value)| x[*column] = *value);
            return;
        }
        for (column, value) in columns.iter().zip(&solution) {
            x[*column] += step.min(1.0) * (value - x[*column]);
            if x[*column] <= 0.0 || (*value <= 0.0 && x[*column] < LEAST_RESIDUAL * value.abs()) {
                x[*column] = 0.0;
                passive[*column] = false;
            }
        }
        // The column that set the step is at zero but for rounding.
        if let Some(at) = columns.iter().zip(&solution).find_map(|(column, value)| {
            (*value <= 0.0 && passive[*column] && x[*column] <= LEAST_RESIDUAL).then_some(*column)
        }) {
            x[at] = 0.0;
            passive[at] = false;
        }
    }
}

/// Unconstrained least squares over some columns, by Householder reflections; a dependent column gets zero.
fn least_squares(rows: &[Vec<f64>], targets: &[f64], columns: &[usize]) -> Vec<f64> {
    let mut a: Vec<Vec<f64>> =
        columns.iter().map(|column| rows.iter().map(|row| row[*column]).collect()).collect();
    let mut b = targets.to_vec();
    let mut used: Vec<usize> = Vec::new();
    for column in 0..a.len() {
        let pivot = used.len();
        if pivot >= b.len() {
            break;
        }
        let tail: f64 = a[column][pivot..].iter().map(|value| value * value).sum::<f64>().sqrt();
        if tail <= DEPENDENT {
            continue;
        }
        let mut reflector = a[column][pivot..].to_vec();
        reflector[0] += if reflector[0] >= 0.0 { tail } else { -tail };
        let length: f64 = reflector.iter().map(|value| value * value).sum();
        for other in a[column..].iter_mut().chain([&mut b]) {
            let share = 2.0 * dot(&reflector, &other[pivot..]) / length;
            other[pivot..].iter_mut().zip(&reflector).for_each(|(value, part)| *value -= share * part);
        }
        used.push(column);
    }
    let mut x = vec![0.0; columns.len()];
    for (row, column) in used.iter().enumerate().rev() {
        let known: f64 = used[row + 1..].iter().map(|later| a[*later][row] * x[*later]).sum();
        x[*column] = (b[row] - known) / a[*column][row];
    }
    x
}

fn gradient(rows: &[Vec<f64>], targets: &[f64], x: &[f64]) -> Vec<f64> {
    let mut gradient = vec![0.0; x.len()];
    for (row, target) in rows.iter().zip(targets) {
        let residual = target - dot(row, x);
        gradient.iter_mut().zip(row).for_each(|(sum, value)| *sum += value * residual);
    }
    gradient
}

/// Sum of products.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn column_lengths(rows: &[Vec<f64>], features: usize) -> Vec<f64> {
    (0..features).map(|column| rows.iter().map(|row| row[column] * row[column]).sum::<f64>().sqrt()).collect()
}

fn divide_columns(rows: &[Vec<f64>], scales: &[f64]) -> Vec<Vec<f64>> {
    let divide = |(value, scale): (&f64, &f64)| if *scale > 0.0 { value / scale } else { 0.0 };
    rows.iter().map(|row| row.iter().zip(scales).map(divide).collect()).collect()
}

/// [`nnls`] on relative errors: every row and its positive target are divided by the target, so that a point of a
/// millisecond counts as much as one of a second. Three rounds of Huber's weights follow, so that one point that was
/// measured while the device was throttled does not bend the rest.
pub fn relative_nnls(rows: &[Vec<f64>], targets: &[f64]) -> Vec<f64> {
    let relative: Vec<Vec<f64>> = rows
        .iter()
        .zip(targets)
        .map(|(row, target)| row.iter().map(|value| value / target).collect())
        .collect();
    let ones = vec![1.0; targets.len()];
    let mut x = nnls(&relative, &ones);
    for _ in 0..HUBER_ROUNDS {
        let roots: Vec<f64> = huber_weights(&relative, &x).iter().map(|weight| weight.sqrt()).collect();
        let weighted: Vec<Vec<f64>> = relative
            .iter()
            .zip(&roots)
            .map(|(row, root)| row.iter().map(|value| value * root).collect())
            .collect();
        x = nnls(&weighted, &roots);
    }
    x
}

/// 1 within the threshold, falling as 1 / residual beyond it.
pub(super) fn huber_weights(relative: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    let residuals: Vec<f64> = relative.iter().map(|row| (1.0 - dot(row, x)).abs()).collect();
    let threshold = (HUBER_THRESHOLD * MAD_TO_SIGMA * median(&residuals)).max(LEAST_RESIDUAL);
    residuals.iter().map(|residual| if *residual <= threshold { 1.0 } else { threshold / residual }).collect()
}

/// Largest over smallest singular value after scaling columns to length one, by one-sided Jacobi rotations. Infinite
/// when a column is zero or spanned by others.
pub fn condition_number(rows: &[Vec<f64>]) -> f64 {
    let features = rows.first().map_or(0, Vec::len);
    let scaled = divide_columns(rows, &column_lengths(rows, features));
    let mut columns: Vec<Vec<f64>> =
        (0..features).map(|column| scaled.iter().map(|row| row[column]).collect()).collect();
    for _ in 0..60 {
        let mut turned = false;
        for left in 0..features {
            for right in left + 1..features {
                turned |= rotate(&mut columns, left, right);
            }
        }
        if !turned {
            break;
        }
    }
    let lengths: Vec<f64> = columns.iter().map(|column| dot(column, column).sqrt()).collect();
    let largest = lengths.iter().copied().fold(0.0, f64::max);
    let smallest = lengths.iter().copied().fold(f64::INFINITY, f64::min);
    if smallest > 0.0 { largest / smallest } else { f64::INFINITY }
}

/// Makes two columns orthogonal; false when they are already.
fn rotate(columns: &mut [Vec<f64>], left: usize, right: usize) -> bool {
    let (a, b) = (dot(&columns[left], &columns[left]), dot(&columns[right], &columns[right]));
    let c = dot(&columns[left], &columns[right]);
    if c.abs() <= 1e-15 * (a * b).sqrt() {
        return false;
    }
    let zeta = (b - a) / (2.0 * c);
    let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
    let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
    let sine = cosine * tangent;
    for row in 0..columns[left].len() {
        let (x, y) = (columns[left][row], columns[right][row]);
        columns[left][row] = cosine * x - sine * y;
        columns[right][row] = sine * x + cosine * y;
    }
    true
}

/// The middle value, or the mean of the two in the middle; 0 of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Quantile by linear interpolation between order statistics; 0 of nothing.
pub(super) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share.clamp(0.0, 1.0) * last as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    sorted[low] + part * (sorted[(low + 1).min(last)] - sorted[low])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every subset of the columns, unconstrained; the best whose solution is nowhere negative.
    fn by_enumeration(rows: &[Vec<f64>], targets: &[f64]) -> f64 {
        let features = rows[0].len();
        let loss = |columns: &[usize], x: &[f64]| -> f64 {
            rows.iter()
                .zip(targets)
                .map(|(row, target)| {
                    let sum: f64 = columns.iter().zip(x).map(|(column, value)| row[*column] * value).sum();
                    (sum - target).powi(2)
                })
                .sum()
        };
        (0..1usize << features)
            .filter_map(|set| {
                let columns: Vec<usize> = (0..features).filter(|column| set >> column & 1 == 1).collect();
                let x = least_squares(rows, targets, &columns);
                x.iter().all(|value| *value >= 0.0).then(|| loss(&columns, &x))
            })
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn no_subset_of_columns_does_better(
            rows in prop::collection::vec(prop::collection::vec(-4.0..4.0f64, 5), 6..14),
            seed in prop::collection::vec(-3.0..3.0f64, 14),
        ) {
            let targets = &seed[..rows.len()];
            let x = nnls(&rows, targets);
            prop_assert!(x.iter().all(|value| *value >= 0.0));
            let found: f64 = rows.iter().zip(targets).map(|(row, target)| (dot(row, &x) - target).powi(2)).sum();
            let best = by_enumeration(&rows, targets);
            prop_assert!(found <= best + 1e-9 * (1.0 + best), "{found} against {best}");
        }
    }

    #[test]
    fn a_coefficient_that_would_be_negative_is_zero_and_the_rest_is_refitted() {
        // y = 2 − x at 0, 1, 2 is best met by the constant 1.
        let rows = [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]].map(Vec::from);
        let x = nnls(&rows, &[2.0, 1.0, 0.0]);
        assert!((x[0] - 1.0).abs() < 1e-12 && x[1] == 0.0, "{x:?}");
    }

    #[test]
    fn columns_of_very_different_size_are_found() {
        let rows: Vec<Vec<f64>> = (1..9).map(|n| vec![1.0, f64::from(n), f64::from(n * n) * 1e6]).collect();
        let truth = [3e-3, 2e-5, 7e-13];
        let targets: Vec<f64> = rows.iter().map(|row| dot(row, &truth)).collect();
        for (found, expected) in relative_nnls(&rows, &targets).iter().zip(truth) {
            assert!((found / expected - 1.0).abs() < 1e-7, "{found} {expected}");
        }
    }

    #[test]
    fn one_throttled_point_does_not_bend_the_rest() {
        let rows: Vec<Vec<f64>> = (1..13).map(|n| vec![1.0, f64::from(n)]).collect();
        let noise = [1.01, 0.99, 1.005, 0.995, 1.0, 1.008, 0.992, 1.004, 0.996, 1.0, 1.01, 0.99];
        let mut targets: Vec<f64> = (1..13).zip(noise).map(|(n, by)| (5.0 + f64::from(n)) * by).collect();
        targets[6] *= 1.8;
        let robust = relative_nnls(&rows, &targets);
        assert!((robust[0] / 5.0 - 1.0).abs() < 0.05 && (robust[1] - 1.0).abs() < 0.05, "{robust:?}");
    }

    #[test]
    fn the_condition_of_known_matrices_is_known() {
        let orthogonal = [[1.0, 0.0], [0.0, 100.0]].map(Vec::from);
        assert!((condition_number(&orthogonal) - 1.0).abs() < 1e-12);
        // Two unit columns at cosine 0.6: singular values √1.6 and √0.4.
        let leaning = [[1.0, 0.6], [0.0, 0.8]].map(Vec::from);
        assert!((condition_number(&leaning) - 2.0).abs() < 1e-12);
        let dependent = [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]].map(Vec::from);
        assert!(condition_number(&dependent) > 1e12);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0, 4.0], 0.5), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.9), 2.8);
        assert_eq!(median(&[]), 0.0);
    }
}
