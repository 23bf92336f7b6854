//! A fitted law: coefficients, the coefficients without each point, and what they forecast with an interval.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::load::{Load, Phase, Term};
use crate::analysis::nnls::{condition_number, dot, median, nnls, quantile, relative_nnls};

/// Share of intervals that hold the truth.
pub const CONFIDENCE: f64 = 0.90;
/// Beyond the domain box, intervals are so many times as wide.
const WIDER_OUTSIDE: f64 = 2.0;
/// Knots of a mixture of experts that are tried.
const EXPERT_KNOTS: [f64; 5] = [4.0, 8.0, 16.0, 32.0, 64.0];

/// One summand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Coefficient {
    pub term: Term,
    /// Seconds or joules per unit of the term.
    pub value: f64,
    /// Ends of the 90 % jackknife interval.
    pub low: f64,
    pub high: f64,
}

/// A sum of terms, and what is known of its error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Law {
    pub phase: Phase,
    pub coefficients: Vec<Coefficient>,
    /// Place of the hinge, or the experts' scale; absent in a law without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knot: Option<f64>,
    /// Coefficients refitted without one point each, in the order of the points.
    pub without_one: Vec<Vec<f64>>,
    /// Signed relative error of each of those at the point it did not see: forecast over measured, less 1.
    pub errors_without_one: Vec<f64>,
    /// Smallest and largest value of each coordinate that was learnt from.
    pub domain: BTreeMap<String, Range>,
}

/// Smallest and largest value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Range {
    pub min: f64,
    pub max: f64,
}

/// A forecast at one load, in seconds or joules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    pub value: f64,
    /// Ends of the 90 % jackknife+ interval; twice as wide outside the domain.
    pub low: f64,
    pub high: f64,
    pub extrapolated: bool,
}

/// Loads and what was measured at them.
#[derive(Clone, Debug, Default)]
pub(super) struct Points {
    pub(super) loads: Vec<Load>,
    pub(super) values: Vec<f64>,
}

impl Points {
    pub(super) fn push(&mut self, load: Load, value: f64) {
        self.loads.push(load);
        self.values.push(value);
    }

    fn without(&self, index: usize) -> Points {
        let mut rest = self.clone();
        rest.loads.remove(index);
        rest.values.remove(index);
        rest
    }

    fn rows(&self, terms: &[Term], knot: f64) -> Vec<Vec<f64>> {
        self.loads.iter().map(|load| terms.iter().map(|term| term.value(load, knot)).collect()).collect()
    }
}

/// Why there is no law.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub(super) struct NoLaw(pub(super) String);

/// The form of a law before its coefficients are known.
#[derive(Clone, Debug, PartialEq)]
struct Form {
    terms: Vec<Term>,
    knot: f64,
}

impl Form {
    fn fit(&self, points: &Points) -> Vec<f64> {
        relative_nnls(&points.rows(&self.terms, self.knot), &points.values)
    }

    /// Bayesian information criterion on relative residuals, with Huber's loss in place of squares: many points of one
    /// outlier must not buy a knot.
    fn criterion(&self, points: &Points) -> f64 {
        let coefficients = self.fit(points);
        let errors: Vec<f64> = self.errors(points, &coefficients).iter().map(|error| error.abs()).collect();
        let threshold = (3.0 * median(&errors)).max(1e-9);
        let loss: f64 = errors.iter().map(|error| huber_loss(*error, threshold)).sum();
        let count = points.values.len() as f64;
        let parameters = self.terms.len() as f64 + if self.has_knot() { 1.0 } else { 0.0 };
        count * (loss / count).max(1e-18).ln() + parameters * count.ln()
    }

    fn has_knot(&self) -> bool {
        self.terms.iter().any(|term| term.has_knot())
    }

    fn errors(&self, points: &Points, coefficients: &[f64]) -> Vec<f64> {
        let rows = points.rows(&self.terms, self.knot);
        rows.iter().zip(&points.values).map(|(row, value)| dot(row, coefficients) / value - 1.0).collect()
    }
}

fn huber_loss(error: f64, threshold: f64) -> f64 {
    if error <= threshold { error * error } else { threshold * (2.0 * error - threshold) }
}

impl Law {
    /// The law of least relative error through `points`, with a knot where one earns its keep. `experts` gives serving
    /// laws the term of a mixture of experts.
    ///
    /// # Errors
    /// When the points do not determine the coefficients.
    pub(super) fn fit(phase: Phase, points: &Points, experts: bool) -> Result<Law, NoLaw> {
        let form = choose_form(phase, points, experts);
        let rows = points.rows(&form.terms, form.knot);
        let relative: Vec<Vec<f64>> = rows
            .iter()
            .zip(&points.values)
            .map(|(row, value)| row.iter().map(|feature| feature / value).collect())
            .collect();
        let condition = condition_number(&relative);
        if condition > 1e8 {
            return Err(NoLaw(format!(
                "{}: the points cannot tell the terms apart: condition number {condition:.1e}, expected at most 1e8",
                phase.name()
            )));
        }
        Ok(Law::with_form(phase, &form, points))
    }

    /// Energy of a phase: the same terms and knot as the time's, fitted to joules.
    pub(super) fn fit_like(time: &Law, points: &Points) -> Law {
        Law::with_form(time.phase, &time.form(), points)
    }

    fn with_form(phase: Phase, form: &Form, points: &Points) -> Law {
        let values = form.fit(points);
        let count = points.values.len();
        let without_one: Vec<Vec<f64>> = (0..count).map(|index| form.fit(&points.without(index))).collect();
        let errors_without_one = without_one
            .iter()
            .enumerate()
            .map(|(index, values)| {
                let row = form.terms.iter().map(|term| term.value(&points.loads[index], form.knot));
                dot(&row.collect::<Vec<_>>(), values) / points.values[index] - 1.0
            })
            .collect();
        let half_widths = half_widths(&without_one, form.terms.len());
        let coefficients = form.terms.iter().zip(values.iter().zip(half_widths));
        Law {
            phase,
            coefficients: coefficients
                .map(|(term, (value, half))| Coefficient {
                    term: *term,
                    value: *value,
                    low: (value - half).max(0.0),
                    high: value + half,
                })
                .collect(),
            knot: form.has_knot().then_some(form.knot),
            without_one,
            errors_without_one,
            domain: domain(&points.loads),
        }
    }

    fn form(&self) -> Form {
        Form { terms: self.terms(), knot: self.knot.unwrap_or(0.0) }
    }

    fn terms(&self) -> Vec<Term> {
        self.coefficients.iter().map(|coefficient| coefficient.term).collect()
    }

    pub fn values(&self) -> Vec<f64> {
        self.coefficients.iter().map(|coefficient| coefficient.value).collect()
    }

    /// Coefficient of a term; 0 where the law has none.
    pub fn coefficient(&self, term: Term) -> f64 {
        self.coefficients.iter().find(|coefficient| coefficient.term == term).map_or(0.0, |found| found.value)
    }

    /// Seconds or joules at a load.
    pub fn at(&self, load: &Load) -> f64 {
        self.with_coefficients(load, &self.values())
    }

    /// The same under other coefficients, in the order of the law's own.
    pub fn with_coefficients(&self, load: &Load, values: &[f64]) -> f64 {
        dot(&self.features(load), values)
    }

    fn features(&self, load: &Load) -> Vec<f64> {
        let knot = self.knot.unwrap_or(0.0);
        self.coefficients.iter().map(|coefficient| coefficient.term.value(load, knot)).collect()
    }

    /// How far a load lies outside the domain: 1 at its edge, 1.25 a quarter beyond it; below 1 inside.
    pub fn reach(&self, load: &Load) -> f64 {
        load.coordinates()
            .iter()
            .filter_map(|(name, value)| {
                let range = self.domain.get(*name)?;
                Some((value / range.max).max(range.min / value.max(f64::MIN_POSITIVE)))
            })
            .fold(0.0, f64::max)
    }

    /// The forecast with its interval, by jackknife+ (Barber and others, *Annals of Statistics* 49, 2021) on relative
    /// errors.
    pub fn forecast(&self, load: &Load) -> Forecast {
        let value = self.at(load);
        let extrapolated = self.reach(load) > 1.0 + 1e-9;
        let features = self.features(load);
        let ends: Vec<(f64, f64)> = self
            .without_one
            .iter()
            .zip(&self.errors_without_one)
            .map(|(values, error)| {
                let forecast = dot(&features, values);
                (forecast * (1.0 - error.abs()), forecast * (1.0 + error.abs()))
            })
            .collect();
        let tail = (1.0 - CONFIDENCE) / 2.0;
        let mut low = quantile(&ends.iter().map(|(low, _)| *low).collect::<Vec<_>>(), tail).min(value);
        let mut high =
            quantile(&ends.iter().map(|(_, high)| *high).collect::<Vec<_>>(), 1.0 - tail).max(value);
        if extrapolated {
            low = (value - WIDER_OUTSIDE * (value - low)).max(0.0);
            high = value + WIDER_OUTSIDE * (high - value);
        }
        Forecast { value, low, high, extrapolated }
    }
}

/// With a knot if that lowers the criterion. Only knots with two distinct values on either side are tried: a hinge
/// between the last two points fits anything.
fn choose_form(phase: Phase, points: &Points, experts: bool) -> Form {
    let plain = Form { terms: phase.terms().to_vec(), knot: 0.0 };
    let Some(hinge) = phase.hinge() else { return plain };
    let with = |knot: f64| Form { terms: [phase.terms(), &[hinge]].concat(), knot };
    if phase == Phase::Serving {
        return match experts {
            false => plain,
            true => best(EXPERT_KNOTS.map(with).to_vec(), points).unwrap_or(plain),
        };
    }
    let mut axis: Vec<f64> = points.loads.iter().map(Load::knot_axis).collect();
    axis.sort_by(f64::total_cmp);
    axis.dedup();
    // A hinge's value one below and two above: both slopes are then set by two values at least.
    let knots = axis.get(1..axis.len().saturating_sub(2)).unwrap_or_default();
    let between = knots.windows(2).map(|pair| (pair[0] * pair[1]).sqrt());
    let candidates = knots.iter().copied().chain(between).map(with).collect();
    match best(candidates, points) {
        Some(hinged) if hinged.criterion(points) < plain.criterion(points) => hinged,
        _ => plain,
    }
}

fn best(candidates: Vec<Form>, points: &Points) -> Option<Form> {
    candidates.into_iter().min_by(|a, b| a.criterion(points).total_cmp(&b.criterion(points)))
}

/// Half the jackknife interval of each coefficient: t · √((n − 1) / n · Σ (xᵢ − x̄)²).
fn half_widths(without_one: &[Vec<f64>], terms: usize) -> Vec<f64> {
    let count = without_one.len() as f64;
    let freedom = (count - terms as f64).max(1.0);
    (0..terms)
        .map(|term| {
            let mean = without_one.iter().map(|values| values[term]).sum::<f64>() / count;
            let squares: f64 = without_one.iter().map(|values| (values[term] - mean).powi(2)).sum();
            student_t_95(freedom) * ((count - 1.0) / count * squares).sqrt()
        })
        .collect()
}

/// 95 % quantile of Student's t, by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); exact below three
/// degrees of freedom, within 0.5 % from there on.
fn student_t_95(freedom: f64) -> f64 {
    const NORMAL: f64 = 1.644_853_626_951_472_2;
    if freedom < 1.5 {
        return 6.313_751_514_675_04;
    }
    if freedom < 2.5 {
        return 2.919_985_580_353_73;
    }
    let x = NORMAL;
    let (x3, x5, x7) = (x.powi(3), x.powi(5), x.powi(7));
    let g1 = (x3 + x) / 4.0;
    let g2 = (5.0 * x5 + 16.0 * x3 + 3.0 * x) / 96.0;
    let g3 = (3.0 * x7 + 19.0 * x5 + 17.0 * x3 - 15.0 * x) / 384.0;
    x + g1 / freedom + g2 / freedom.powi(2) + g3 / freedom.powi(3)
}

fn domain(loads: &[Load]) -> BTreeMap<String, Range> {
    let mut domain: BTreeMap<String, Range> = BTreeMap::new();
    for (name, value) in loads.iter().flat_map(Load::coordinates) {
        let range = domain.entry(name.to_owned()).or_insert(Range { min: value, max: value });
        *range = Range { min: range.min.min(value), max: range.max.max(value) };
    }
    domain
}

/// The constant of least relative error: what a law must beat to be worth anything.
pub(super) fn constant(points: &Points) -> f64 {
    let rows: Vec<Vec<f64>> = points.values.iter().map(|value| vec![1.0 / value]).collect();
    nnls(&rows, &vec![1.0; rows.len()]).first().copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantiles_of_students_t_are_those_of_the_tables() {
        for (freedom, expected) in [(1.0, 6.314), (2.0, 2.920), (5.0, 2.015), (10.0, 1.812), (30.0, 1.697)] {
            let found = student_t_95(freedom);
            assert!((found / expected - 1.0).abs() < 5e-3, "{freedom}: {found}");
        }
    }

    #[test]
    fn a_forecast_outside_the_domain_says_so_and_is_twice_as_wide() {
        let mut points = Points::default();
        for (index, context) in [100.0, 400.0, 900.0].into_iter().enumerate() {
            for batch in [1.0, 2.0, 4.0, 8.0] {
                let noise = 1.0 + 0.01 * ((index + batch as usize) % 3) as f64;
                let kv_tokens = batch * context;
                points.push(
                    Load::Decode { batch, kv_tokens },
                    (5e-3 + 1e-4 * batch + 1e-7 * kv_tokens) * noise,
                );
            }
        }
        let law = Law::fit(Phase::Decode, &points, false).unwrap();
        let inside = law.forecast(&Load::Decode { batch: 8.0, kv_tokens: 7200.0 });
        assert!(!inside.extrapolated && inside.low < inside.value && inside.value < inside.high);
        let outside = Load::Decode { batch: 10.0, kv_tokens: 9000.0 };
        assert!((law.reach(&outside) - 1.25).abs() < 1e-12);
        let outside = law.forecast(&outside);
        assert!(outside.extrapolated);
        let width = |forecast: Forecast| (forecast.high - forecast.low) / forecast.value;
        assert!(width(outside) > 1.9 * width(inside), "{} {}", width(outside), width(inside));
    }
}
