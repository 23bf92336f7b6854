//! Charts: lines and points on two axes, as SVG that reads without colours, without a screen and without a mouse: text
//! stays text, every point has its values as a title, and colours come from the page's style sheet.

use std::fmt::Write as _;

use super::look::Look;
use super::scale::{Axis, Scale};
use super::svg::{Anchor, Svg, escaped};

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 50.0;
/// Width of a character of a label, about.
const CHARACTER: f64 = 7.0;
const TEXT_HEIGHT: f64 = 13.0;
/// Labels of more points than these would hide the chart.
const MOST_LABELS: usize = 40;

/// A chart, before it is drawn.
pub(super) struct Chart {
    /// Unique on the page.
    pub(super) id: String,
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) lines: Vec<Line>,
    /// Stretches of the x axis that are marked.
    pub(super) bands: Vec<(f64, f64)>,
}

/// Points of one look.
pub(super) struct Line {
    pub(super) look: Look,
    pub(super) points: Vec<Point>,
    pub(super) is_joined: bool,
    pub(super) has_markers: bool,
    /// The area around the line: x, and the least and largest y there.
    pub(super) area: Vec<(f64, f64, f64)>,
}

impl Line {
    /// Joined points with markers.
    pub(super) fn new(look: Look, points: Vec<Point>) -> Line {
        Line { look, points, is_joined: true, has_markers: true, area: Vec::new() }
    }
}

pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Half the length of the bar through the point, in y.
    pub(super) half_spread: Option<f64>,
    /// What a reader who points at it is told. Empty: the point is a bend of the line and has no marker.
    pub(super) title: String,
    /// Stands beside it where there is room.
    pub(super) label: String,
}

impl Point {
    pub(super) fn bare(x: f64, y: f64) -> Point {
        Point { x, y, half_spread: None, title: String::new(), label: String::new() }
    }
}

/// The chart as a complete `svg` element.
pub(super) fn draw(chart: &Chart) -> String {
    let points = || chart.lines.iter().flat_map(|line| &line.points);
    let plane = Plane {
        x: Scale::new(&chart.x, points().map(|p| p.x).chain(chart.bands.iter().flat_map(|b| [b.0, b.1]))),
        y: Scale::new(
            &chart.y,
            points()
                .flat_map(|p| {
                    let half = p.half_spread.unwrap_or(0.0);
                    [p.y - half, p.y + half]
                })
                .chain(
                    chart.lines.iter().flat_map(|line| &line.area).flat_map(|(_, low, high)| [*low, *high]),
                ),
        ),
    };
    let mut svg = Svg::default();
    open(&mut svg, chart, &plane);
    for (from, to) in &chart.bands {
        let left = plane.at(*from, plane.y.high());
        let width = plane.at(*to, plane.y.high()).0 - left.0;
        svg.rect("band", left, (width.max(0.5), HEIGHT - TOP - BOTTOM));
    }
    draw_axes(&mut svg, chart, &plane);
    for line in &chart.lines {
        draw_line(&mut svg, line, &plane);
    }
    draw_labels(&mut svg, chart, &plane);
    svg.raw("</svg>");
    svg.finish()
}

/// From values to places.
struct Plane {
    x: Scale,
    y: Scale,
}

impl Plane {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let right = LEFT + self.x.share(x) * (WIDTH - LEFT - RIGHT);
        let down = HEIGHT - BOTTOM - self.y.share(y) * (HEIGHT - TOP - BOTTOM);
        (right, down)
    }
}

fn open(svg: &mut Svg, chart: &Chart, plane: &Plane) {
    let (id, title) = (&chart.id, escaped(&chart.title));
    let marked = chart.lines.iter().filter(|line| line.has_markers).flat_map(|line| &line.points);
    let points = marked.filter(|point| !point.title.is_empty()).count();
    let axis = |axis: &Axis, scale: &Scale| {
        format!("{}{}", axis.label, if scale.is_log() { ", logarithmic" } else { "" })
    };
    let description = escaped(&format!(
        "Upward: {}. To the right: {}. {points} points.",
        axis(&chart.y, &plane.y),
        axis(&chart.x, &plane.x)
    ));
    let mut head = String::new();
    let _ = write!(
        head,
        r#"<svg class="chart" id="{id}" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{title}</title><desc id="{id}-desc">{description}</desc>"#,
    );
    svg.raw(&head);
}

fn draw_axes(svg: &mut Svg, chart: &Chart, plane: &Plane) {
    let (left, bottom) = (LEFT, HEIGHT - BOTTOM);
    for (value, text) in plane.y.ticks(0.045) {
        let y = plane.at(plane.x.low(), value).1;
        svg.line("grid", (left, y), (WIDTH - RIGHT, y));
        svg.text("", (left - 6.0, y + 4.0), Anchor::End, text);
    }
    for (value, text) in plane.x.ticks(0.09) {
        let x = plane.at(value, plane.y.low()).0;
        svg.line("grid", (x, TOP), (x, bottom));
        svg.text("", (x, bottom + 16.0), Anchor::Middle, text);
    }
    svg.line("axis", (left, bottom), (WIDTH - RIGHT, bottom));
    svg.line("axis", (left, TOP), (left, bottom));
    let middle = (left + WIDTH - RIGHT) / 2.0;
    svg.text("", (middle, HEIGHT - 10.0), Anchor::Middle, &chart.x.label);
    svg.upright_text((15.0, (TOP + bottom) / 2.0), &chart.y.label);
}

fn draw_line(svg: &mut Svg, line: &Line, plane: &Plane) {
    let places: Vec<(f64, f64)> = line.points.iter().map(|point| plane.at(point.x, point.y)).collect();
    svg.raw(&format!(r#"<g class="{}">"#, line.look.colour_class()));
    if !line.area.is_empty() {
        let upper = line.area.iter().map(|(x, _, high)| plane.at(*x, *high));
        let lower = line.area.iter().rev().map(|(x, low, _)| plane.at(*x, *low));
        svg.path("area", &upper.chain(lower).collect::<Vec<_>>());
    }
    if line.is_joined {
        svg.path(&line.look.line_class(), &places);
    }
    if line.has_markers {
        for (point, place) in line.points.iter().zip(&places).filter(|(point, _)| !point.title.is_empty()) {
            draw_point(svg, line.look, point, *place, plane);
        }
    }
    svg.raw("</g>");
}

fn draw_point(svg: &mut Svg, look: Look, point: &Point, place: (f64, f64), plane: &Plane) {
    svg.raw(&format!(r#"<g class="point" data-x="{}" data-y="{}">"#, point.x, point.y));
    svg.raw(&format!("<title>{}</title>", escaped(&point.title)));
    if let Some(half) = point.half_spread {
        let (high, low) = (plane.at(point.x, point.y + half).1, plane.at(point.x, point.y - half).1);
        svg.line("spread", (place.0, high), (place.0, low));
        svg.line("spread", (place.0 - 4.0, high), (place.0 + 4.0, high));
        svg.line("spread", (place.0 - 4.0, low), (place.0 + 4.0, low));
    }
    svg.raw(&look.marker(place));
    svg.raw("</g>");
}

/// Left, top, right, bottom.
type Frame = (f64, f64, f64, f64);

fn overlap(a: &Frame, b: &Frame) -> bool {
    a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
}

/// Labels go above, below, right or left of their points, or are left out where all four are taken.
fn draw_labels(svg: &mut Svg, chart: &Chart, plane: &Plane) {
    let labelled =
        || chart.lines.iter().flat_map(|line| &line.points).filter(|point| !point.label.is_empty());
    if labelled().count() > MOST_LABELS {
        return;
    }
    let markers = labelled().map(|point| plane.at(point.x, point.y));
    let mut taken: Vec<Frame> = markers.map(|(x, y)| (x - 5.0, y - 5.0, x + 5.0, y + 5.0)).collect();
    for point in labelled() {
        let (x, y) = plane.at(point.x, point.y);
        let width = point.label.chars().count() as f64 * CHARACTER;
        let candidates = [
            ((x, y - 8.0), Anchor::Middle),
            ((x, y + 17.0), Anchor::Middle),
            ((x + 8.0, y + 4.0), Anchor::Start),
            ((x - 8.0, y + 4.0), Anchor::End),
        ];
        let free = candidates.into_iter().find_map(|(at, anchor)| {
            let left = match anchor {
                Anchor::Start => at.0,
                Anchor::Middle => at.0 - width / 2.0,
                Anchor::End => at.0 - width,
            };
            let frame = (left, at.1 - TEXT_HEIGHT + 2.0, left + width, at.1 + 2.0);
            let is_inside =
                left >= LEFT && left + width <= WIDTH && frame.1 >= 0.0 && frame.3 <= HEIGHT - BOTTOM;
            (is_inside && !taken.iter().any(|other| overlap(&frame, other))).then_some((at, anchor, frame))
        });
        if let Some((at, anchor, frame)) = free {
            svg.text("label", at, anchor, &point.label);
            taken.push(frame);
        }
    }
}
