//! Rates against load and against context: tokens per second, tokens per joule.

use std::collections::BTreeSet;

use crate::analysis::CellSummary;
use crate::analysis::curves::{CellKind, Place};
use crate::record::Maybe;
use crate::report::percent;
use crate::report::words::reason_in_words;
use crate::units::format_significant;

use super::chart::{Chart, Line, Point, draw};
use super::content::{Block, Figure, Section};
use super::scale::Axis;
use super::subject::{Along, Group, Subject, groups, has_points, models, of_model};

/// A value of each cell that is drawn over its load and over its context.
struct Metric {
    id: &'static str,
    title: &'static str,
    value: fn(&CellSummary) -> Maybe<f64>,
    /// Half the spread of the runs, as a share of the value.
    spread_ratio: fn(&CellSummary) -> Option<f64>,
    axis: fn(CellKind) -> String,
}

const METRICS: [Metric; 2] = [
    Metric {
        id: "throughput",
        title: "Tokens per second",
        value: |cell| cell.throughput.as_ref().map(|rate| rate.tokens_per_s),
        spread_ratio: |cell| cell.throughput.value().and_then(|rate| rate.spread_ratio.value().copied()),
        axis: |kind| format!("{} tokens per second", counted(kind)),
    },
    Metric {
        id: "energy",
        title: "Tokens per joule",
        value: |cell| cell.energy.tokens_per_joule.clone(),
        spread_ratio: |cell| cell.energy.energy_uncertainty_ratio.value().copied(),
        axis: |kind| format!("{} tokens per joule", counted(kind)),
    },
];

fn counted(kind: CellKind) -> &'static str {
    if kind == CellKind::Prefill { "input" } else { "output" }
}

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let mut blocks = vec![Block::text(
        "Tokens over time, summed over all windows of a cell. Bars reach half the distance between the slowest and the \
         fastest run up and down: a spread within one session, not a confidence interval. Those of joules reach what the sensor's readings \
         leave open, where that is more.",
    )];
    for metric in &METRICS {
        blocks.push(Block::Heading { text: metric.title.to_owned() });
        let charts = charts(subjects, metric);
        blocks.push(if charts.is_empty() { none(subjects, metric) } else { Block::Charts { charts } });
    }
    Section { id: "throughput", title: "Throughput and energy", blocks }
}

/// Why there is no chart.
fn none(subjects: &[Subject<'_>], metric: &Metric) -> Block {
    let cells = subjects.iter().flat_map(|subject| &subject.summary.cells);
    let reasons = cells.filter_map(|cell| (metric.value)(cell).reason().map(reason_in_words));
    let reasons: BTreeSet<String> = reasons.collect();
    let why = if reasons.is_empty() {
        "there is no cell".to_owned()
    } else {
        reasons.into_iter().collect::<Vec<_>>().join("; ")
    };
    Block::text(format!("{}: not known for any cell; {why}.", metric.title))
}

fn charts(subjects: &[Subject<'_>], metric: &Metric) -> Vec<Figure> {
    let mut charts = Vec::new();
    for (index, model) in models(subjects).iter().enumerate() {
        for kind in CellKind::ALL {
            for along in alongs(subjects, model, kind) {
                charts.extend(chart(subjects, metric, (index, model), (kind, along)));
            }
        }
    }
    charts
}

/// The axes along which the cells differ; one value on an axis is a row of a table, not a curve.
fn alongs(subjects: &[Subject<'_>], model: &str, kind: CellKind) -> Vec<Along> {
    let of_model = subjects.iter().filter(|subject| subject.record.model.name == model);
    let places = of_model.flat_map(|subject| &subject.record.cells).map(|cell| Place::of(&cell.workload));
    let places: Vec<Place> = places.filter(|place| place.kind == kind).collect();
    let differs = |value: fn(&Place) -> f64| places.iter().any(|place| value(place) != value(&places[0]));
    match (differs(|place| place.load), differs(|place| f64::from(place.context))) {
        (true, true) => vec![Along::Load, Along::Context],
        (false, true) => vec![Along::Context],
        _ => vec![Along::Load],
    }
}

fn chart(
    subjects: &[Subject<'_>],
    metric: &Metric,
    (index, model): (usize, &str),
    (kind, along): (CellKind, Along),
) -> Option<Figure> {
    let (selection, groups) = groups(subjects, model, kind, along);
    let lines: Vec<Line> = groups.iter().map(|group| line(group, metric, along)).collect();
    let at = || lines.iter().flat_map(|line| line.points.iter().map(|point| point.x));
    if !has_points(&lines) {
        return None;
    }
    let (what, axis) = match (along, kind) {
        (Along::Load, CellKind::ServeClosed) => ("concurrency", "concurrency (requests in the engine)"),
        (Along::Load, CellKind::ServeOpen) => ("request rate", "requests per second"),
        (Along::Load, _) => ("batch", "batch (sequences)"),
        (Along::Context, CellKind::Decode) => ("context", "depth (tokens already held)"),
        (Along::Context, _) => ("prompt length", "ISL (prompt tokens)"),
    };
    let title = format!("{} · {} against {what}{}", kind.name(), metric.title, of_model(subjects, model));
    let legend = selection.legend();
    let chart = Chart {
        id: format!("{}-{}-{}-{index}", metric.id, kind.name(), what.replace(' ', "-")),
        title: title.clone(),
        x: Axis::new(axis).at(at()),
        y: Axis::new((metric.axis)(kind)),
        lines,
        bands: Vec::new(),
    };
    Some(Figure { title, svg: draw(&chart), legend, note: selection.note })
}

fn line(group: &Group<'_>, metric: &Metric, along: Along) -> Line {
    let point = |(place, _, summary): &(Place, &crate::record::Cell, &CellSummary)| {
        let y = (metric.value)(summary).into_value().filter(|value| value.is_finite())?;
        let ratio = (metric.spread_ratio)(summary).filter(|ratio| ratio.is_finite());
        let spread = ratio.map_or(String::new(), |ratio| format!(" ± {}", percent(&Maybe::Value(ratio))));
        Some(Point {
            x: if along == Along::Load { place.load } else { f64::from(place.context) },
            y,
            half_spread: ratio.map(|ratio| ratio * y),
            title: format!(
                "#{} {}: {} {}{spread}",
                group.subject.number,
                summary.key,
                format_significant(y),
                (metric.axis)(place.kind)
            ),
            label: String::new(),
        })
    };
    Line::new(group.look, group.cells.iter().filter_map(point).collect())
}
