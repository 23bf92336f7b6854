//! The draws behind a plan's intervals: every law from its uncertainty and every ranged figure from its range, each draw put
//! through the same arithmetic as the figures themselves. One seed gives one set of draws.

use std::collections::BTreeMap;

use serde::Serialize;

use super::PlanOptions;
use super::frame::{Estimate, Frame};
use super::outcome::{LoadPoint, Outcome};
use super::service::DrawnLaws;
use crate::analysis::rng::Rng;
use crate::record::Maybe;

/// 5th, 50th and 95th percentile of the draws.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    pub p05: f64,
    pub p50: f64,
    pub p95: f64,
}

/// Name of an output → its interval.
pub type Intervals = BTreeMap<&'static str, Interval>;

/// What the draws say of each output.
pub(super) struct Spread {
    pub(super) intervals: Intervals,
    /// Of each point of the load curve.
    pub(super) load: Vec<Intervals>,
    /// Output tokens per day of each step of the site's ramp.
    pub(super) ramp: Vec<Interval>,
    /// Laws by which 5 % and 95 % of the draws are slower.
    pub(super) slow: DrawnLaws,
    pub(super) fast: DrawnLaws,
}

/// All draws. Laws are drawn `wider` times as far out as they were found to err.
pub(super) fn spread(frame: &Frame<'_>, estimate: &Estimate, options: &PlanOptions, wider: f64) -> Spread {
    let mut rng = Rng::new(options.seed);
    let mut headlines = Values::default();
    let mut load: Vec<Values> = Vec::new();
    let mut ramp: Vec<Vec<f64>> = Vec::new();
    let mut drawn_laws = Vec::new();
    for _ in 0..options.draws {
        let laws = frame.service.draw(&mut rng, wider);
        let drawn = frame.draw(estimate, &mut rng);
        let outcome = frame.outcome(&drawn, &laws);
        headlines.add(headline(&outcome));
        let points = frame.load_curve(&drawn, &outcome);
        load.resize_with(points.len(), Values::default);
        load.iter_mut().zip(&points).for_each(|(values, point)| values.add(costs(point)));
        let steps = frame.ramp_tokens_per_day(&drawn, &outcome);
        ramp.resize_with(steps.len(), Vec::new);
        ramp.iter_mut().zip(steps).for_each(|(values, tokens)| values.push(tokens));
        drawn_laws.push((frame.replica_seconds(&laws), laws));
    }
    drawn_laws.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let at = |share: f64| {
        let place = (share * drawn_laws.len().saturating_sub(1) as f64).round() as usize;
        drawn_laws.get(place).map_or_else(|| frame.service.best(), |(_, laws)| laws.clone())
    };
    Spread {
        intervals: headlines.intervals(),
        load: load.into_iter().map(Values::intervals).collect(),
        ramp: ramp.into_iter().map(interval).collect(),
        slow: at(0.05),
        fast: at(0.95),
    }
}

/// Drawn values by the name of their output.
#[derive(Default)]
struct Values(BTreeMap<&'static str, Vec<f64>>);

impl Values {
    fn add(&mut self, values: impl IntoIterator<Item = (&'static str, Option<f64>)>) {
        for (name, value) in values {
            if let Some(value) = value {
                self.0.entry(name).or_default().push(value);
            }
        }
    }

    fn intervals(self) -> Intervals {
        self.0.into_iter().map(|(name, values)| (name, interval(values))).collect()
    }
}

/// Percentiles by linear interpolation between order statistics.
fn interval(mut values: Vec<f64>) -> Interval {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let at = |share: f64| {
        let place = share * last as f64;
        let (low, part) = (place.floor() as usize, place.fract());
        let value = |index: usize| values.get(index.min(last)).copied().unwrap_or(f64::NAN);
        value(low) + part * (value(low + 1) - value(low))
    };
    Interval { p05: at(0.05), p50: at(0.5), p95: at(0.95) }
}

/// The outputs that get an interval.
fn headline(outcome: &Outcome) -> [(&'static str, Option<f64>); 12] {
    let known = |value: &Maybe<f64>| value.value().copied();
    [
        ("gpus", Some(outcome.gpus)),
        ("output_tokens_per_s_per_gpu", Some(outcome.output_tokens_per_s_per_gpu)),
        ("output_tokens_per_day", Some(outcome.output_tokens_per_day)),
        ("output_tokens_per_s_per_board_mw", known(&outcome.output_tokens_per_s_per_board_mw)),
        ("output_tokens_per_s_per_node_mw", known(&outcome.output_tokens_per_s_per_node_mw)),
        ("output_tokens_per_s_per_it_mw", Some(outcome.output_tokens_per_s_per_it_mw)),
        ("output_tokens_per_s_per_facility_mw", Some(outcome.output_tokens_per_s_per_facility_mw)),
        ("facility_j_per_output_token", Some(outcome.facility_j_per_output_token)),
        ("facility_mw", Some(outcome.facility_mw)),
        ("cost_per_mtok_output", known(&outcome.cost_per_mtok_output)),
        ("cash_cost_per_mtok_output", known(&outcome.cash_cost_per_mtok_output)),
        ("marginal_cost_per_mtok_output", known(&outcome.marginal_cost_per_mtok_output)),
    ]
}

fn costs(point: &LoadPoint) -> [(&'static str, Option<f64>); 3] {
    let known = |value: &Maybe<f64>| value.value().copied();
    [
        ("cost_per_mtok_output", known(&point.cost_per_mtok_output)),
        ("cash_cost_per_mtok_output", known(&point.cash_cost_per_mtok_output)),
        ("marginal_cost_per_mtok_output", known(&point.marginal_cost_per_mtok_output)),
    ]
}
