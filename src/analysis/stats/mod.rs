//! The statistics that a comparison needs: distributions, families of tests, ranks. Plain functions of numbers, each
//! with the source of its formula; tests hold them against published tables. Nothing here knows a record.

mod distributions;
mod families;
mod paired;
mod ranks;
mod special;

pub use distributions::{TQuantiles, binomial_cdf, f_cdf, normal_cdf, normal_quantile, t_cdf, t_quantile};
pub use families::{benjamini_hochberg, holm};
pub use paired::{Change, paired_change};
pub use ranks::{far_from_median, mann_whitney, median, quantile, quantile_ranks};

/// Arithmetic mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Sum of squared deviations from the mean.
pub fn sum_of_squares(values: &[f64]) -> f64 {
    let center = mean(values);
    values.iter().map(|value| (value - center).powi(2)).sum()
}
