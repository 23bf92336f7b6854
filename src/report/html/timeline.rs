//! Power, clocks and temperature over the invocation, with the windows marked.

use std::collections::BTreeSet;

use crate::analysis::curves::{WindowReading, window_readings};
use crate::record::Maybe;
use crate::report::words::reason_in_words;
use crate::units::format_significant;

use super::chart::{Chart, Line, Point, draw};
use super::content::{Block, Figure, Section};
use super::scale::Axis;
use super::subject::Subject;

/// Records whose time lines are drawn; each has its own charts, since their clocks have nothing in common.
const MOST_RECORDS: usize = 6;

/// A reading as a line from (s, value) to (s, value).
type Stretch = ((f64, f64), (f64, f64));

/// What the sensor says over a window.
struct Metric {
    id: &'static str,
    title: &'static str,
    axis: &'static str,
    unit: &'static str,
    stretch: fn(&WindowReading) -> Maybe<Stretch>,
}

const METRICS: [Metric; 3] = [
    Metric {
        id: "power",
        title: "Power",
        axis: "mean power (W)",
        unit: "W",
        stretch: |window| {
            window.power.clone().map(|power| ((power.t_a_s, power.mean_w), (power.t_b_s, power.mean_w)))
        },
    },
    Metric {
        id: "clock",
        title: "Clock",
        axis: "mean SM clock (MHz)",
        unit: "MHz",
        stretch: |window| window.sm_mhz.clone().map(|clock| ((window.t0_s, clock), (window.t1_s, clock))),
    },
    Metric {
        id: "temperature",
        title: "Temperature",
        axis: "temperature (°C)",
        unit: "°C",
        stretch: |window| {
            window.temperature_c.clone().map(|(start, end)| ((window.t0_s, start), (window.t1_s, end)))
        },
    },
];

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let mut blocks = vec![Block::text(
        "Shaded: the timed windows. The record keeps one reading a window: the mean power and clock over it, the \
         temperature at both ends. Between windows nothing was recorded.",
    )];
    for subject in subjects.iter().take(MOST_RECORDS) {
        let windows = window_readings(subject.record);
        let charts: Vec<Figure> =
            METRICS.iter().filter_map(|metric| chart(subject, &windows, metric)).collect();
        if !charts.is_empty() {
            blocks.push(Block::Charts { charts });
        }
        blocks.extend(absent(subject, &windows));
    }
    if let Some(more) = subjects.len().checked_sub(MOST_RECORDS).filter(|more| *more > 0) {
        blocks.push(Block::text(format!("Time lines of {more} further records are not drawn.")));
    }
    Section { id: "timeline", title: "Power, clocks and temperature over time", blocks }
}

fn chart(subject: &Subject<'_>, windows: &[WindowReading], metric: &Metric) -> Option<Figure> {
    let look = subject.look();
    let read = windows.iter().filter_map(|window| Some((window, (metric.stretch)(window).into_value()?)));
    let lines: Vec<Line> = read
        .map(|(window, (from, to))| {
            let value = if from.1 == to.1 {
                format_significant(from.1)
            } else {
                format!("{} to {}", format_significant(from.1), format_significant(to.1))
            };
            let title = format!("{} run {}: {value} {}", window.key, window.run + 1, metric.unit);
            let middle = Point { title, ..Point::bare((from.0 + to.0) / 2.0, (from.1 + to.1) / 2.0) };
            Line::new(look, vec![Point::bare(from.0, from.1), middle, Point::bare(to.0, to.1)])
        })
        .collect();
    if lines.is_empty() {
        return None;
    }
    let title = format!("{} over time · #{}", metric.title, subject.number);
    let chart = Chart {
        id: format!("timeline-{}-{}", metric.id, subject.number),
        title: title.clone(),
        x: Axis { is_linear: true, ..Axis::new("time since the start (s)") },
        y: Axis { is_linear: true, ..Axis::new(metric.axis) },
        lines,
        bands: windows.iter().map(|window| (window.t0_s, window.t1_s)).collect(),
    };
    Some(Figure { title, svg: draw(&chart), legend: Vec::new(), note: String::new() })
}

/// What the windows lack, and why.
fn absent(subject: &Subject<'_>, windows: &[WindowReading]) -> Option<Block> {
    let mut items = Vec::new();
    for metric in &METRICS {
        let reasons: Vec<String> = windows
            .iter()
            .filter_map(|window| (metric.stretch)(window).reason().map(reason_in_words))
            .collect();
        let count = reasons.len();
        let reasons: BTreeSet<String> = reasons.into_iter().collect();
        if count > 0 {
            let why = reasons.into_iter().collect::<Vec<_>>().join("; ");
            items.push(format!("{} in {count} of {} windows: {why}", metric.title, windows.len()));
        }
    }
    if windows.is_empty() {
        items.push("there is no window".to_owned());
    }
    let text = format!("{}, missing: {}.", subject.title(), items.join(" · "));
    (!items.is_empty()).then(|| Block::text(text))
}
