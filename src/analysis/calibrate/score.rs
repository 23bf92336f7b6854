//! How wrong a law is on points that it never saw, beside the simpler forecasts that it must beat.

use super::file::{Baseline, ErrorStatistics, FittedLaw, Grade, Outlier, Quantity};
use super::law::{Law, Points, constant};
use super::load::Load;
use super::observe::{Fold, Observation};
use crate::analysis::nnls::{median, quantile};
use crate::record::Maybe;

/// A training point so many robust standard deviations off its law is named.
const OUTLIER_SIGMAS: f64 = 5.0;
/// And at least so far.
const LEAST_OUTLIER: f64 = 0.05;

/// A point with what was measured there, in the law's quantity.
#[derive(Clone, Debug)]
pub(super) struct Measured<'a> {
    pub(super) key: &'a str,
    pub(super) load: Load,
    pub(super) fold: Fold,
    pub(super) value: f64,
}

/// What a load takes; none where nothing is said of it.
type Forecast<'a> = Box<dyn Fn(&Load) -> Option<f64> + 'a>;

/// A forecast of a simpler kind.
pub(super) struct Simple<'a> {
    pub(super) name: &'static str,
    pub(super) at: Forecast<'a>,
}

/// The points of one quantity; `None` when some point lacks it.
pub(super) fn measured<'a>(
    observations: &[&'a Observation],
    quantity: Quantity,
) -> Result<Vec<Measured<'a>>, String> {
    observations
        .iter()
        .map(|observation| {
            let value = match (quantity, &observation.joules) {
                (Quantity::Time, _) => observation.seconds,
                (Quantity::Energy, Maybe::Value(joules)) => *joules,
                (Quantity::Energy, Maybe::Missing(missing)) => return Err(missing.missing.clone()),
            };
            let Observation { key, load, fold, .. } = observation;
            Ok(Measured { key, load: *load, fold: *fold, value })
        })
        .collect()
}

/// Those that a law learns from.
pub(super) fn training(points: &[Measured<'_>]) -> Points {
    let mut training = Points::default();
    for point in points.iter().filter(|point| point.fold == Fold::Training) {
        training.push(point.load, point.value);
    }
    training
}

/// Everything that is known of a law's errors.
pub(super) fn score(
    quantity: Quantity,
    law: Law,
    points: &[Measured<'_>],
    noise_floor_share: Maybe<f64>,
    rooflines: Vec<Simple<'_>>,
) -> FittedLaw {
    let learnt = training(points);
    let level = constant(&learnt);
    let mut simple = vec![Simple { name: "constant", at: Box::new(move |_| Some(level)) }];
    simple.extend(rooflines);
    simple.push(Simple { name: "interpolation", at: Box::new(|load| interpolate(&learnt, load)) });
    let fold =
        |fold: Fold| -> Vec<&Measured<'_>> { points.iter().filter(|point| point.fold == fold).collect() };
    let folds = [Fold::Interior, Fold::Row, Fold::Frontier].map(fold);
    let baselines = simple
        .iter()
        .map(|simple| Baseline {
            name: simple.name.to_owned(),
            interior_mape_share: baseline_error(simple, &folds[0]),
            row_mape_share: baseline_error(simple, &folds[1]),
            frontier_mape_share: baseline_error(simple, &folds[2]),
        })
        .collect();
    let [interior, row, frontier] = folds.each_ref().map(|points| fold_error(&law, points));
    FittedLaw {
        quantity,
        noise_floor_share,
        interior,
        row,
        frontier,
        leave_one_out: leave_one_out(&law, points),
        baselines,
        outliers: outliers(&law, points),
        law,
    }
}

fn fold_error(law: &Law, points: &[&Measured<'_>]) -> Maybe<ErrorStatistics> {
    let errors: Vec<(&str, f64, bool)> = points
        .iter()
        .map(|point| {
            let forecast = law.forecast(&point.load);
            let is_within = (forecast.low..=forecast.high).contains(&point.value);
            (point.key, forecast.value / point.value - 1.0, is_within)
        })
        .collect();
    statistics(&errors).map_or(Maybe::missing("nothing_held_out"), Maybe::Value)
}

/// Errors at each training point of the law without it; a point is covered when its error is within the 90 % quantile of
/// the others'.
fn leave_one_out(law: &Law, points: &[Measured<'_>]) -> ErrorStatistics {
    let keys = points.iter().filter(|point| point.fold == Fold::Training).map(|point| point.key);
    let all = &law.errors_without_one;
    let errors: Vec<(&str, f64, bool)> = keys
        .zip(all)
        .enumerate()
        .map(|(index, (key, error))| {
            let others: Vec<f64> = all
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
                .map(|(_, error)| error.abs())
                .collect();
            (key, *error, error.abs() <= quantile(&others, super::law::CONFIDENCE))
        })
        .collect();
    statistics(&errors).expect("a law was fitted to some points")
}

fn statistics(errors: &[(&str, f64, bool)]) -> Option<ErrorStatistics> {
    let worst = errors.iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))?;
    let absolute: Vec<f64> = errors.iter().map(|(_, error, _)| error.abs()).collect();
    let count = errors.len() as f64;
    Some(ErrorStatistics {
        points: errors.len() as u32,
        mape_share: absolute.iter().sum::<f64>() / count,
        median_share: median(&absolute),
        p90_share: quantile(&absolute, 0.9),
        signed_share: errors.iter().map(|(_, error, _)| error).sum::<f64>() / count,
        worst_key: worst.0.to_owned(),
        worst_share: worst.1,
        coverage_share: errors.iter().filter(|(_, _, is_within)| *is_within).count() as f64 / count,
    })
}

fn baseline_error(simple: &Simple<'_>, points: &[&Measured<'_>]) -> Maybe<f64> {
    if points.is_empty() {
        return Maybe::missing("nothing_held_out");
    }
    let errors: Option<Vec<f64>> =
        points.iter().map(|point| Some(((simple.at)(&point.load)? / point.value - 1.0).abs())).collect();
    match errors {
        Some(errors) => Maybe::Value(errors.iter().sum::<f64>() / errors.len() as f64),
        None => Maybe::missing("has_no_forecast"),
    }
}

fn outliers(law: &Law, points: &[Measured<'_>]) -> Vec<Outlier> {
    let of_law = |point: &Measured<'_>| point.value / law.at(&point.load);
    let learnt = || points.iter().filter(|point| point.fold == Fold::Training);
    let distances: Vec<f64> = learnt().map(|point| (of_law(point) - 1.0).abs()).collect();
    let limit = (OUTLIER_SIGMAS * 1.4826 * median(&distances)).max(LEAST_OUTLIER);
    learnt()
        .filter(|point| (of_law(point) - 1.0).abs() > limit)
        .map(|point| Outlier { key: point.key.to_owned(), ratio: of_law(point) })
        .collect()
}

/// Along the growing axis within the same row where points stand on either side; else across rows at the same size; else
/// along the row's last two points.
fn interpolate(points: &Points, load: &Load) -> Option<f64> {
    let (size, row) = load.grid();
    let all = || points.loads.iter().zip(&points.values).map(|(load, value)| (load.grid(), *value));
    let along: Vec<(f64, f64)> =
        all().filter(|((_, other), _)| *other == row).map(|((size, _), value)| (size, value)).collect();
    let across: Vec<(f64, f64)> = all()
        .filter(|((other, grid_row), _)| *other == size && grid_row[1] == row[1])
        .map(|((_, row), value)| (row[0], value))
        .collect();
    between(&along, size).or_else(|| between(&across, row[0])).or_else(|| beyond(&along, size))
}

fn between(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let below = points.iter().filter(|point| point.0 <= x).max_by(|a, b| a.0.total_cmp(&b.0))?;
    let above = points.iter().filter(|point| point.0 >= x).min_by(|a, b| a.0.total_cmp(&b.0))?;
    if above.0 == below.0 {
        return Some(below.1);
    }
    Some(below.1 + (above.1 - below.1) * (x - below.0) / (above.0 - below.0))
}

fn beyond(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let [.., (x0, y0), (x1, y1)] = sorted.as_slice() else { return None };
    Some(y1 + (y1 - y0) * (x - x1) / (x1 - x0))
}

/// The grade of one law, with the reason why it is not A.
pub(super) fn grade(fitted: &FittedLaw) -> (Grade, Option<String>) {
    let what = format!("{} {}", fitted.law.phase.name(), fitted.quantity.name());
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let mut worst = (Grade::A, None);
    let mut lower = |grade: Grade, why: String| {
        if grade > worst.0 {
            worst = (grade, Some(why));
        }
    };
    match &fitted.interior {
        Maybe::Missing(_) => lower(Grade::C, format!("{what}: no interior points were held out")),
        Maybe::Value(errors) => {
            let (mape, p90) = (errors.mape_share, errors.p90_share);
            let tail_counts = fitted.quantity == Quantity::Time;
            if mape > 0.10 {
                lower(Grade::C, format!("{what}: interior MAPE {}, B needs 10 %", percent(mape)));
            } else if mape > 0.05 {
                lower(Grade::B, format!("{what}: interior MAPE {}, A needs 5 %", percent(mape)));
            } else if tail_counts && p90 > 0.12 {
                lower(Grade::B, format!("{what}: interior p90 {}, A needs 12 %", percent(p90)));
            }
        }
    }
    if fitted.quantity == Quantity::Time {
        match &fitted.frontier {
            Maybe::Missing(_) => lower(Grade::C, format!("{what}: no frontier was held out")),
            Maybe::Value(errors) if errors.mape_share > 0.20 => {
                lower(
                    Grade::C,
                    format!("{what}: frontier MAPE {}, B needs 20 %", percent(errors.mape_share)),
                );
            }
            Maybe::Value(errors) if errors.mape_share > 0.10 => {
                lower(
                    Grade::B,
                    format!("{what}: frontier MAPE {}, A needs 10 %", percent(errors.mape_share)),
                );
            }
            Maybe::Value(_) => {}
        }
    }
    worst
}

/// Where a simpler forecast does better: interpolation within the grid, a roofline beyond it.
pub(super) fn beaten_by(fitted: &FittedLaw) -> Vec<String> {
    let what = format!("{} {}", fitted.law.phase.name(), fitted.quantity.name());
    let mut sentences = Vec::new();
    let mut hold = |fold: &str, own: &Maybe<ErrorStatistics>, name: &str, other: &Maybe<f64>| {
        let (Maybe::Value(own), Maybe::Value(other)) = (own, other) else { return };
        if *other < own.mape_share {
            sentences.push(format!(
                "{what}: {} is better on the {fold} fold, {:.1} % against {:.1} %",
                name.replace('_', " "),
                other * 100.0,
                own.mape_share * 100.0
            ));
        }
    };
    for baseline in &fitted.baselines {
        match baseline.name.as_str() {
            "interpolation" => {
                hold("interior", &fitted.interior, &baseline.name, &baseline.interior_mape_share);
            }
            _ => hold("frontier", &fitted.frontier, &baseline.name, &baseline.frontier_mape_share),
        }
    }
    sentences
}
