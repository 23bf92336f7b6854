//! What a million tokens cost, and how that moves with the share of the paid hours in which tokens are made.

use crate::analysis::CellCost;
use crate::record::Maybe;
use crate::report::DASH;
use crate::report::words::reason_in_words;
use crate::units::format_significant;

use super::chart::{Chart, Line, Point, draw};
use super::content::{Block, Figure, LegendEntry, Section, Table};
use super::look::Look;
use super::scale::Axis;
use super::subject::{Subject, has_points, thinned};

/// Lines of a chart.
const MOST_LINES: usize = 8;

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let mut blocks = Vec::new();
    for subject in subjects {
        let Maybe::Value(currency) = &subject.summary.currency else {
            let why = subject.summary.currency.reason().map_or(String::new(), reason_in_words);
            blocks.push(Block::text(format!("{}: no cost; {why}.", subject.title())));
            continue;
        };
        let prices = subject.summary.prices.value().cloned().unwrap_or_default();
        blocks.push(Block::text(format!("{}: {prices}.", subject.title())));
        blocks.extend(chart(subject, currency).map(|chart| Block::Charts { charts: vec![chart] }));
        blocks.push(Block::Table(table(subject, currency)));
    }
    Section { id: "cost", title: "Cost", blocks }
}

fn costs<'a>(subject: &'a Subject<'_>) -> impl Iterator<Item = (&'a str, &'a CellCost)> {
    subject.summary.cells.iter().filter_map(|cell| Some((cell.key.as_str(), cell.cost.value()?)))
}

fn chart(subject: &Subject<'_>, currency: &str) -> Option<Figure> {
    let known = costs(subject).filter(|(_, cost)| cost.per_mtok_output.value().is_some());
    let (cells, note) = thinned(known.collect::<Vec<_>>(), MOST_LINES, "cells are drawn");
    let line = |(index, (key, cost)): (usize, &(&str, &CellCost))| {
        let points = cost.per_mtok_output_at.iter().filter_map(|(share, cost)| {
            let cost = *cost.value()?;
            Some(Point {
                title: format!(
                    "{key}: {} {currency} per Mtok at {:.0} %",
                    format_significant(cost),
                    share * 100.0
                ),
                ..Point::bare(share * 100.0, cost)
            })
        });
        Line::new(Look::new(index, index), points.collect())
    };
    let lines: Vec<Line> = cells.iter().enumerate().map(line).collect();
    if !has_points(&lines) {
        return None;
    }
    let title = format!("Cost of output tokens against utilisation · #{}", subject.number);
    let legend = cells.iter().enumerate().map(|(index, (key, _))| LegendEntry {
        swatch: Look::new(index, index).swatch(),
        text: (*key).to_owned(),
    });
    let legend = legend.collect();
    let chart = Chart {
        id: format!("cost-{}", subject.number),
        title: title.clone(),
        x: Axis::new("share of the paid hours in use (%)").at([30.0, 60.0, 100.0]),
        y: Axis::new(format!("{currency} per million output tokens")),
        lines,
        bands: Vec::new(),
    };
    Some(Figure { title, svg: draw(&chart), legend, note })
}

fn table(subject: &Subject<'_>, currency: &str) -> Table {
    let number =
        |value: &Maybe<f64>| value.value().map_or(DASH.to_owned(), |value| format_significant(*value));
    let row = |(key, cost): (&str, &CellCost)| {
        let [_, (_, at_60), (_, at_30)] = &cost.per_mtok_output_at;
        let amounts = [
            &cost.per_mtok_output,
            &cost.per_mtok_input,
            &cost.per_mtok_total,
            &cost.energy_per_mtok_output,
            at_60,
            at_30,
            &cost.per_busy_device_hour,
        ];
        std::iter::once(key.to_owned()).chain(amounts.map(number)).collect()
    };
    let columns = [
        "cell",
        "output",
        "input",
        "all",
        "energy in output",
        "output at 60 % use",
        "at 30 %",
        "busy device-hour",
    ];
    Table {
        caption: format!("{}: {currency} per million tokens", subject.title()),
        columns: columns.map(str::to_owned).to_vec(),
        rows: costs(subject).map(row).collect(),
        is_text: false,
        is_folded: false,
    }
}
