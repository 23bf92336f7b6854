//! Tokens per second of a device against tokens per second of a user: what batching trades.

use crate::analysis::curves::{CellKind, frontier, tokens_per_s_per_user};
use crate::units::format_significant;

use super::chart::{Chart, Line, Point, draw};
use super::content::{Block, Figure, Section};
use super::scale::{Axis, tick_text};
use super::subject::{Along, Group, Subject, groups, has_points, models, of_model};

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let mut charts = Vec::new();
    for (index, model) in models(subjects).iter().enumerate() {
        let kinds = CellKind::ALL.into_iter().filter(|kind| *kind != CellKind::Prefill);
        charts.extend(kinds.filter_map(|kind| chart(subjects, (index, model), kind)));
    }
    let text = "To the right, what one user sees: the inverse of the mean time per output token. Upward, output tokens per \
                second of one device. The line joins the cells that no other cell of the same record and lengths exceeds \
                in both; numbers are the batch (b), the concurrency (c) or the requests per second (r).";
    let mut blocks = vec![Block::text(text)];
    blocks.push(if charts.is_empty() {
        Block::text("No cell has both a throughput of output tokens and a time per output token.")
    } else {
        Block::Charts { charts }
    });
    Section { id: "tradeoff", title: "Speed for all against speed for each", blocks }
}

fn chart(subjects: &[Subject<'_>], (index, model): (usize, &str), kind: CellKind) -> Option<Figure> {
    let (selection, groups) = groups(subjects, model, kind, Along::Load);
    let lines: Vec<Line> = groups.iter().flat_map(|group| lines(group, kind)).collect();
    if !has_points(&lines) {
        return None;
    }
    let title = format!("{} · tokens/s against tokens/s/user{}", kind.name(), of_model(subjects, model));
    let chart = Chart {
        id: format!("tradeoff-{}-{index}", kind.name()),
        title: title.clone(),
        x: Axis { is_padded: true, ..Axis::new("output tokens per second and user") },
        y: Axis::new("output tokens per second and device"),
        lines,
        bands: Vec::new(),
    };
    Some(Figure { title, svg: draw(&chart), legend: selection.legend(), note: selection.note })
}

/// The frontier, joined; what lies below it, not.
fn lines(group: &Group<'_>, kind: CellKind) -> [Line; 2] {
    let letter = match kind {
        CellKind::ServeClosed => "c",
        CellKind::ServeOpen => "r",
        _ => "b",
    };
    let mut points: Vec<Option<Point>> = Vec::new();
    for (place, cell, summary) in &group.cells {
        let (Some(rate), Some(user)) =
            (summary.throughput.value(), tokens_per_s_per_user(summary).into_value())
        else {
            continue;
        };
        let device = rate.tokens_per_s / cell.devices.len().max(1) as f64;
        points.push(Some(Point {
            title: format!(
                "#{} {}: {} tok/s and device, {} tok/s and user",
                group.subject.number,
                summary.key,
                format_significant(device),
                format_significant(user)
            ),
            label: format!("{letter}{}", tick_text(place.load)),
            ..Point::bare(user, device)
        }));
    }
    let places: Vec<(f64, f64)> = points.iter().flatten().map(|point| (point.x, point.y)).collect();
    let on = frontier(&places).into_iter().filter_map(|index| points[index].take()).collect();
    let below = points.into_iter().flatten().collect();
    [Line::new(group.look, on), Line { is_joined: false, ..Line::new(group.look, below) }]
}
