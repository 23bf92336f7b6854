//! Many tests at once: p values adjusted so that each can be held against the level of the whole family.

/// Holm's step-down (Scandinavian Journal of Statistics 6, 1979): the chance of any false rejection stays below the
/// level, whatever depends on what. Adjusted p values in the given order.
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let count = p_values.len();
    let mut adjusted = vec![0.0; count];
    let mut largest = 0.0f64;
    for (rank, index) in ascending(p_values).into_iter().enumerate() {
        largest = largest.max(((count - rank) as f64 * p_values[index]).min(1.0));
        adjusted[index] = largest;
    }
    adjusted
}

/// Benjamini and Hochberg's step-up (Journal of the Royal Statistical Society B 57, 1995): the expected share of false
/// rejections among all. Adjusted p values in the given order.
pub fn benjamini_hochberg(p_values: &[f64]) -> Vec<f64> {
    let count = p_values.len();
    let mut adjusted = vec![0.0; count];
    let mut least = 1.0f64;
    for (rank, index) in ascending(p_values).into_iter().enumerate().rev() {
        least = least.min(count as f64 * p_values[index] / (rank + 1) as f64);
        adjusted[index] = least;
    }
    adjusted
}

fn ascending(p_values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} against {expected}");
        }
    }

    #[test]
    fn holm_gives_what_the_steps_give_by_hand() {
        // 4·0.005, 3·0.01, 2·0.03, 1·0.04 made monotone.
        close(&holm(&[0.01, 0.04, 0.03, 0.005]), &[0.03, 0.06, 0.06, 0.02]);
        close(&holm(&[0.9, 0.8]), &[1.0, 1.0]);
        assert_eq!(holm(&[]), Vec::<f64>::new());
    }

    #[test]
    fn benjamini_and_hochberg_s_own_example_rejects_four() {
        // The fifteen p values of their paper, section 4.1: four are rejected at 0.05, where Bonferroni rejects three.
        let published = [
            0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
            0.6528, 0.7590, 1.0,
        ];
        let adjusted = benjamini_hochberg(&published);
        assert_eq!(adjusted.iter().filter(|p| **p <= 0.05).count(), 4);
        assert_eq!(holm(&published).iter().filter(|p| **p <= 0.05).count(), 3);
        close(&adjusted[3..4], &[15.0 * 0.0095 / 4.0]);
    }

    #[test]
    fn the_order_of_the_tests_does_not_matter() {
        let (one, other) = ([0.2, 0.001, 0.04], [0.04, 0.2, 0.001]);
        for adjust in [holm, benjamini_hochberg] {
            let (a, b) = (adjust(&one), adjust(&other));
            close(&[a[0], a[1], a[2]], &[b[1], b[2], b[0]]);
        }
    }
}
