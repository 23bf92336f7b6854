//! Latencies: percentile plots from the stored histograms, and the percentiles of every cell.

use crate::analysis::curves::{CellKind, PercentilePoint, Place, percentiles};
use crate::analysis::{CellSummary, Quantiles};
use crate::record::{Cell, Latency, LatencyHistogram, Maybe};
use crate::report::DASH;
use crate::units::format_ns;

use super::chart::{Chart, Line, Point, draw};
use super::content::{Block, Figure, Section, Table};
use super::look::Look;
use super::scale::{Axis, time_unit};
use super::subject::{Selection, Subject, models, of_model};

/// A latency that is drawn.
struct Metric {
    id: &'static str,
    name: &'static str,
    histogram: fn(&Latency) -> &Maybe<LatencyHistogram>,
}

const METRICS: [Metric; 4] = [
    Metric { id: "ttft", name: "TTFT", histogram: |latency| &latency.ttft },
    Metric { id: "itl", name: "ITL", histogram: |latency| &latency.itl },
    Metric { id: "tpot", name: "TPOT", histogram: |latency| &latency.tpot },
    Metric { id: "e2e", name: "E2E", histogram: |latency| &latency.e2e },
];

/// Fewer observations are no distribution.
const FEWEST: u64 = 5;

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let mut charts = Vec::new();
    for (index, model) in models(subjects).iter().enumerate() {
        for kind in CellKind::ALL {
            // A prompt's E2E is its TTFT.
            let metrics = METRICS.iter().filter(|metric| kind != CellKind::Prefill || metric.id != "e2e");
            charts.extend(metrics.filter_map(|metric| chart(subjects, metric, (index, model), kind)));
        }
    }
    let mut blocks = vec![Block::text(
        "Each line reads: this share of the observations took at most so long. Lines are merged over all runs from the \
         histograms in the record (values within 0.1 %) and end at the last percentile that the number of observations \
         bounds from above with 95 % confidence.",
    )];
    if charts.is_empty() {
        blocks.push(Block::text(
            "No cell has five observations of any latency, so there is no distribution to draw.",
        ));
    } else {
        blocks.push(Block::Charts { charts });
    }
    blocks.extend(subjects.iter().map(|subject| Block::Table(table(subject, subjects.len()))));
    Section { id: "latency", title: "Latency", blocks }
}

fn chart(
    subjects: &[Subject<'_>],
    metric: &Metric,
    (index, model): (usize, &str),
    kind: CellKind,
) -> Option<Figure> {
    let is_drawn =
        |cell: &&Cell| Place::of(&cell.workload).kind == kind && observations(cell, metric) >= FEWEST;
    let here = subjects.iter().filter(|subject| subject.record.model.name == model);
    let here: Vec<&Subject<'_>> =
        here.filter(|subject| subject.record.cells.iter().any(|c| is_drawn(&c))).collect();
    let mut keys: Vec<String> = Vec::new();
    for cell in here.iter().flat_map(|subject| &subject.record.cells).filter(is_drawn) {
        if !keys.contains(&cell.key) {
            keys.push(cell.key.clone());
        }
    }
    let selection = Selection::new(here, keys);
    let mut drawn = Vec::new();
    for subject in &selection.subjects {
        for (order, key) in selection.names.iter().enumerate() {
            for cell in subject.record.cells.iter().filter(is_drawn).filter(|cell| cell.key == *key) {
                let runs = cell.runs.iter().map(|run| (metric.histogram)(&run.latency));
                if let Maybe::Value(points) = percentiles(runs) {
                    let name = format!("#{} {key}", subject.number);
                    drawn.push((selection.look(subject, order), name, points));
                }
            }
        }
    }
    let largest_ns = drawn.iter().flat_map(|(_, _, points)| points).map(|point| point.ns).fold(0.0, f64::max);
    if largest_ns <= 0.0 {
        return None;
    }
    let (factor, unit) = time_unit(largest_ns);
    let title = format!("{} · {}{}", kind.name(), metric.name, of_model(subjects, model));
    let chart = Chart {
        id: format!("latency-{}-{}-{index}", kind.name(), metric.id),
        title: title.clone(),
        x: percentile_axis(),
        y: Axis::new(format!("{} ({unit})", metric.name)),
        lines: drawn.iter().map(|(look, text, points)| line(*look, text, points, factor)).collect(),
        bands: Vec::new(),
    };
    Some(Figure { title, svg: draw(&chart), legend: selection.legend(), note: selection.note })
}

fn observations(cell: &Cell, metric: &Metric) -> u64 {
    let histograms = cell.runs.iter().filter_map(|run| (metric.histogram)(&run.latency).value());
    histograms.fold(0, |sum, histogram| sum.saturating_add(histogram.count))
}

/// How far right a percentile stands: each 9 as far as the one before.
fn nines(share: f64) -> f64 {
    -(1.0 - share).max(1e-12).log10()
}

fn percentile_axis() -> Axis {
    let ticks = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999];
    let ticks = ticks.map(|percent: f64| (nines(percent / 100.0), format!("{percent} %")));
    Axis { ticks: Some(ticks.to_vec()), is_linear: true, ..Axis::new("percentile (share of observations)") }
}

fn line(look: Look, name: &str, points: &[PercentilePoint], factor: f64) -> Line {
    let last = points.len().saturating_sub(1);
    let shown = [0.5, 0.9, 0.99, 0.999];
    let mut line = Line::new(look, Vec::new());
    for (index, point) in points.iter().enumerate() {
        let next = points.get(index + 1).map_or(1.0, |next| next.share);
        // Markers at the usual percentiles and at the end: more of them would hide the line.
        let is_marked = index == last || shown.iter().any(|share| (point.share..next).contains(share));
        let title = format!("{name}: {} at {:.2} %", format_ns(point.ns), point.share * 100.0);
        line.points.push(Point {
            title: if is_marked { title } else { String::new() },
            ..Point::bare(nines(point.share), point.ns / factor)
        });
    }
    line
}

type PickQuantiles = fn(&CellSummary) -> &Maybe<Quantiles>;

fn table(subject: &Subject<'_>, records: usize) -> Table {
    let latencies: [(&str, PickQuantiles); 5] = [
        ("TTFT", |cell| &cell.ttft),
        ("ITL", |cell| &cell.itl),
        ("TPOT", |cell| &cell.tpot),
        ("E2E", |cell| &cell.e2e),
        ("step", |cell| &cell.step),
    ];
    let mut columns = vec!["cell".to_owned()];
    for (name, _) in latencies {
        columns.extend(["n", "p50", "p90", "p99"].map(|part| format!("{name} {part}")));
    }
    let row = |cell: &CellSummary| {
        let mut row = vec![cell.key.clone()];
        for (_, pick) in latencies {
            row.extend(quantiles(pick(cell)));
        }
        row
    };
    Table {
        caption: format!("{}: percentiles of all cells", subject.title()),
        columns,
        rows: subject.summary.cells.iter().map(row).collect(),
        is_text: false,
        is_folded: records > 2,
    }
}

fn quantiles(quantiles: &Maybe<Quantiles>) -> [String; 4] {
    let Some(quantiles) = quantiles.value() else { return [DASH; 4].map(str::to_owned) };
    let time = |value: &Maybe<f64>| value.value().map_or(DASH.to_owned(), |ns| format_ns(*ns));
    [quantiles.count.to_string(), time(&quantiles.p50_ns), time(&quantiles.p90_ns), time(&quantiles.p99_ns)]
}
