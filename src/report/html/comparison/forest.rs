//! Effects with their intervals, one row for each cell, against the loss that counts. Verdicts differ by colour, by
//! marker and in words.

use std::fmt::Write as _;

use crate::analysis::compare::{Comparand, Comparison, Metric, Numbers, Verdict};
use crate::report::comparison::{compared, interval, signed};

use super::super::content::{Figure, LegendEntry};
use super::super::look::Look;
use super::super::scale::{Axis, Scale};
use super::super::svg::{Anchor, Svg, escaped};

const WIDTH: f64 = 480.0;
const LEFT: f64 = 14.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 6.0;
const BOTTOM: f64 = 48.0;
const ROW: f64 = 38.0;
/// Rows of a chart; the table has all.
const MOST_ROWS: usize = 40;
/// Longest name that fits beside a verdict, characters.
const LONGEST_NAME: usize = 36;
/// Intervals are cut where they are so many times as long as the largest effect or threshold.
const MOST_TIMES: f64 = 3.0;

/// What each verdict looks like: colour and marker.
fn look(verdict: Verdict) -> Look {
    let shape = match verdict {
        Verdict::Same => 0,
        Verdict::Regressed => 1,
        Verdict::Improved => 2,
        Verdict::Inconclusive | Verdict::NotComparable | Verdict::MeterChanged => 3,
        Verdict::Pass => 5,
    };
    Look::new(shape, 0)
}

struct Row<'a> {
    cell: &'a Comparand,
    numbers: &'a Numbers,
}

impl Row<'_> {
    /// Effect, and the interval where there is one, in percent.
    fn percents(&self) -> (f64, Option<[f64; 2]>) {
        let percent = |ratio: f64| ratio * 100.0;
        let range = self.numbers.interval_95_ratio.value();
        (percent(self.numbers.effect_ratio), range.map(|range| range.map(percent)))
    }
}

/// The chart of one metric; none where no cell was compared by it.
pub(super) fn chart(result: &Comparison, metric: Metric) -> Option<Figure> {
    let with_numbers = compared(result).filter(|cell| cell.metric == metric);
    let all: Vec<Row<'_>> = with_numbers
        .filter_map(|cell| cell.numbers.value().map(|numbers| Row { cell, numbers }))
        .filter(|row| row.numbers.effect_ratio.is_finite())
        .collect();
    if all.is_empty() {
        return None;
    }
    let count = all.len();
    let rows = farthest(all);
    let note = match count {
        count if count > rows.len() => {
            format!("Drawn: the {} of {count} that moved most. The table has all.", rows.len())
        }
        _ => String::new(),
    };
    let title = format!("Change of {}", words(metric));
    Some(Figure { svg: draw(&rows, metric, &title), legend: legend(&rows), title, note })
}

fn words(metric: Metric) -> &'static str {
    match metric {
        Metric::Throughput => "tokens per second",
        Metric::TokensPerJoule => "tokens per joule",
    }
}

/// As many as a chart holds, those that moved most; in the order of the table.
fn farthest(rows: Vec<Row<'_>>) -> Vec<Row<'_>> {
    let mut sizes: Vec<f64> = rows.iter().map(|row| row.numbers.effect_ratio.abs()).collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    let Some(least) = sizes.get(MOST_ROWS - 1).copied() else { return rows };
    rows.into_iter().filter(|row| row.numbers.effect_ratio.abs() >= least).take(MOST_ROWS).collect()
}

fn legend(rows: &[Row<'_>]) -> Vec<LegendEntry> {
    let mut verdicts: Vec<Verdict> = rows.iter().map(|row| row.cell.verdict).collect();
    verdicts.sort_unstable();
    verdicts.dedup();
    let entry =
        |verdict: Verdict| LegendEntry { swatch: look(verdict).swatch(), text: verdict.words().to_owned() };
    verdicts.into_iter().map(entry).collect()
}

fn scale(rows: &[Row<'_>], label: &str) -> Scale {
    let thresholds = || rows.iter().map(|row| row.numbers.threshold_ratio * 100.0);
    let effects = rows.iter().map(|row| row.percents().0);
    let largest = effects.clone().map(f64::abs).chain(thresholds()).fold(0.0, f64::max);
    let limit = MOST_TIMES * largest;
    let ends = rows.iter().filter_map(|row| row.percents().1).flatten().map(|end| end.clamp(-limit, limit));
    let axis = Axis { is_linear: true, is_padded: true, ..Axis::new(label) };
    Scale::new(&axis, effects.chain(ends).chain(thresholds().flat_map(|percent| [percent, -percent])))
}

fn draw(rows: &[Row<'_>], metric: Metric, title: &str) -> String {
    let label = format!("change of {}, percent; less is worse", words(metric));
    let scale = scale(rows, &label);
    let bottom = TOP + rows.len() as f64 * ROW;
    let height = bottom + BOTTOM;
    let mut svg = Svg::default();
    let (id, name) = (format!("effects-{}", metric.name().replace('_', "-")), escaped(title));
    let described = escaped(&format!(
        "To the right: {label}. {} rows, each with its 95 % interval; the band is the change that does not count.",
        rows.len()
    ));
    svg.raw(&format!(
        r#"<svg class="chart" id="{id}" role="img" viewBox="0 0 {WIDTH} {height}" aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{name}</title><desc id="{id}-desc">{described}</desc>"#
    ));
    for (value, text) in scale.ticks(0.09) {
        let x = place(&scale, value);
        svg.line("grid", (x, TOP), (x, bottom));
        svg.text("", (x, bottom + 16.0), Anchor::Middle, text);
    }
    for (index, row) in rows.iter().enumerate() {
        draw_row(&mut svg, row, &scale, TOP + index as f64 * ROW);
    }
    let zero = place(&scale, 0.0);
    svg.line("axis", (zero, TOP), (zero, bottom));
    svg.text("", (WIDTH / 2.0, height - 10.0), Anchor::Middle, &label);
    svg.raw("</svg>");
    svg.finish()
}

fn place(scale: &Scale, percent: f64) -> f64 {
    LEFT + scale.share(percent) * (WIDTH - LEFT - RIGHT)
}

/// The name and the verdict above, the interval and the effect below.
fn draw_row(svg: &mut Svg, row: &Row<'_>, scale: &Scale, top: f64) {
    let (effect, range) = row.percents();
    let (name_y, y) = (top + 13.0, top + 26.0);
    let threshold = row.numbers.threshold_ratio * 100.0;
    let (from, to) = (place(scale, -threshold), place(scale, threshold));
    svg.rect("band", (from, y - 7.0), (to - from, 14.0));
    let mut group = String::new();
    let _ = write!(
        group,
        r#"<g class="{}"><g class="effect" data-effect="{}""#,
        look(row.cell.verdict).colour_class(),
        row.numbers.effect_ratio
    );
    if let Some([low, high]) = row.numbers.interval_95_ratio.value() {
        let _ = write!(group, r#" data-low="{low}" data-high="{high}""#);
    }
    svg.raw(&format!("{group}><title>{}</title>", escaped(&spoken(row))));
    if let Some([low, high]) = range {
        draw_interval(svg, scale, y, (low, high));
    }
    svg.raw(&look(row.cell.verdict).marker((place(scale, effect), y)));
    svg.raw("</g></g>");
    svg.text("label", (LEFT, name_y), Anchor::Start, &shortened(&row.cell.cell));
    let verdict = format!("{} {}", signed(row.numbers.effect_ratio), row.cell.verdict.words());
    svg.text("label", (WIDTH - RIGHT, name_y), Anchor::End, &verdict);
}

/// An end beyond the frame becomes an arrow.
fn draw_interval(svg: &mut Svg, scale: &Scale, y: f64, (low, high): (f64, f64)) {
    let (left, right) = (LEFT, WIDTH - RIGHT);
    let (from, to) = (place(scale, low).clamp(left, right), place(scale, high).clamp(left, right));
    svg.line("spread", (from, y), (to, y));
    for (x, is_cut, tip) in [(from, place(scale, low) < left, 5.0), (to, place(scale, high) > right, -5.0)] {
        if is_cut {
            svg.line("spread", (x, y), (x + tip, y - 4.0));
            svg.line("spread", (x, y), (x + tip, y + 4.0));
        } else {
            svg.line("spread", (x, y - 4.0), (x, y + 4.0));
        }
    }
}

fn spoken(row: &Row<'_>) -> String {
    let range =
        row.numbers.interval_95_ratio.value().map_or(String::new(), |range| format!(" {}", interval(range)));
    format!(
        "{} {}: {}{range}, {}",
        row.cell.cell,
        row.cell.metric.unit(),
        signed(row.numbers.effect_ratio),
        row.cell.verdict.words()
    )
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(LONGEST_NAME) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}…", &name[..end]),
    }
}
