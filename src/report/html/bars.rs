//! Bars that lie, one under the other, each with its name above it so that a narrow screen has room for both: values from
//! zero with their intervals, and tornados, whose bars go to either side of one value.

use std::fmt::Write as _;

use super::scale::{Axis, Scale};
use super::svg::{Anchor, Svg, escaped};

const WIDTH: f64 = 480.0;
const LEFT: f64 = 10.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 4.0;
const BOTTOM: f64 = 46.0;
/// Height of a row, its name included.
const ROW: f64 = 40.0;
/// Of a bar, and how far it lies below the top of its row.
const BAR: f64 = 14.0;
const BELOW_NAME: f64 = 19.0;

/// A chart of bars, before it is drawn.
pub(super) struct Bars {
    /// Unique on the page.
    pub(super) id: String,
    pub(super) title: String,
    pub(super) axis: Axis,
    pub(super) bars: Vec<Bar>,
    /// Where a tornado's bars begin.
    pub(super) base: Option<f64>,
}

pub(super) struct Bar {
    pub(super) name: String,
    /// Stands at the right end of the name's line.
    pub(super) value: String,
    pub(super) parts: Vec<Part>,
    /// 5th and 95th percentile.
    pub(super) interval: Option<(f64, f64)>,
    /// What a reader who points at it is told.
    pub(super) title: String,
}

/// One stretch of a bar. A hollow one differs from a filled one without colours too.
pub(super) struct Part {
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) is_hollow: bool,
}

/// The chart as a complete `svg` element.
pub(super) fn draw(bars: &Bars) -> String {
    let ends = bars.bars.iter().flat_map(|bar| {
        let parts = bar.parts.iter().flat_map(|part| [part.from, part.to]);
        parts.chain(bar.interval.into_iter().flat_map(|(low, high)| [low, high]))
    });
    let axis = Axis { is_linear: true, ..bars.axis.clone() };
    let scale = Scale::new(&axis, ends.chain(bars.base));
    let height = TOP + ROW * bars.bars.len() as f64 + BOTTOM;
    let mut svg = Svg::default();
    open(&mut svg, bars, height);
    draw_axis(&mut svg, bars, &scale, height);
    if let Some(base) = bars.base {
        let x = place(&scale, base);
        svg.line("base", (x, TOP), (x, height - BOTTOM));
    }
    for (index, bar) in bars.bars.iter().enumerate() {
        draw_bar(&mut svg, bar, TOP + ROW * index as f64, &scale);
    }
    svg.raw("</svg>");
    svg.finish()
}

fn place(scale: &Scale, value: f64) -> f64 {
    LEFT + scale.share(value) * (WIDTH - LEFT - RIGHT)
}

fn open(svg: &mut Svg, bars: &Bars, height: f64) {
    let (id, title) = (&bars.id, escaped(&bars.title));
    let described = bars.bars.iter().map(|bar| format!("{}: {}.", bar.name, bar.value));
    let description =
        format!("To the right: {}. {}", bars.axis.label, described.collect::<Vec<_>>().join(" "));
    let mut head = String::new();
    let _ = write!(
        head,
        r#"<svg class="chart" id="{id}" role="img" viewBox="0 0 {WIDTH} {height}" aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{title}</title><desc id="{id}-desc">{}</desc>"#,
        escaped(&description)
    );
    svg.raw(&head);
}

fn draw_axis(svg: &mut Svg, bars: &Bars, scale: &Scale, height: f64) {
    let bottom = height - BOTTOM;
    for (value, text) in scale.ticks(0.1) {
        let x = place(scale, value);
        svg.line("grid", (x, TOP), (x, bottom));
        svg.text("", (x, bottom + 16.0), Anchor::Middle, text);
    }
    svg.line("axis", (LEFT, bottom), (WIDTH - RIGHT, bottom));
    svg.text("", ((LEFT + WIDTH - RIGHT) / 2.0, height - 8.0), Anchor::Middle, &bars.axis.label);
}

fn draw_bar(svg: &mut Svg, bar: &Bar, top: f64, scale: &Scale) {
    svg.text("label", (LEFT, top + 14.0), Anchor::Start, &bar.name);
    svg.text("label", (WIDTH - RIGHT, top + 14.0), Anchor::End, &bar.value);
    let end = bar.parts.last().map_or(0.0, |part| part.to);
    svg.raw(&format!(r#"<g class="c0"><g class="point" data-x="{end}" data-y="{}">"#, escaped(&bar.name)));
    svg.raw(&format!("<title>{}</title>", escaped(&bar.title)));
    for part in &bar.parts {
        let (a, b) = (place(scale, part.from), place(scale, part.to));
        let class = if part.is_hollow { "hollow" } else { "bar" };
        svg.rect(class, (a.min(b), top + BELOW_NAME), ((b - a).abs().max(0.5), BAR));
    }
    if let Some((low, high)) = bar.interval {
        let (low, high, middle) = (place(scale, low), place(scale, high), top + BELOW_NAME + BAR / 2.0);
        svg.line("whisker", (low, middle), (high, middle));
        for x in [low, high] {
            svg.line("whisker", (x, middle - 5.0), (x, middle + 5.0));
        }
    }
    svg.raw("</g></g>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_begins_at_zero_and_its_whisker_lies_at_the_percentiles() {
        let part = Part { from: 0.0, to: 50.0, is_hollow: false };
        let bar = Bar {
            name: "a < b".to_owned(),
            value: "50".to_owned(),
            parts: vec![part],
            interval: Some((25.0, 100.0)),
            title: "t".to_owned(),
        };
        let bars = Bars {
            id: "x".to_owned(),
            title: "t".to_owned(),
            axis: Axis::new("y"),
            bars: vec![bar],
            base: None,
        };
        let svg = draw(&bars);
        // 450 units for 100: the bar is 225 wide, the whisker goes from 10 + 112.5 to 10 + 450.
        assert!(
            svg.contains(r#"<rect class="bar" x="10.0" y="23.0" width="225.0" height="14.0"/>"#),
            "{svg}"
        );
        assert!(
            svg.contains(r#"<line class="whisker" x1="122.5" y1="30.0" x2="460.0" y2="30.0"/>"#),
            "{svg}"
        );
        assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
    }
}
