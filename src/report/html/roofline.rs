//! Cells under the roof of their device: the ceilings that the same run measured.

use std::collections::{BTreeMap, BTreeSet};

use crate::analysis::CellSummary;
use crate::analysis::curves::{Roof, RooflinePoint, roof, roofline_point};
use crate::record::{Ceiling, Ceilings, Maybe};
use crate::report::words::reason_in_words;
use crate::report::{DASH, percent};
use crate::units::{format_ns, format_significant};

use super::chart::{Chart, Line, Point, draw};
use super::content::{Block, Figure, LegendEntry, Section, Table};
use super::scale::{Axis, prefixed};
use super::subject::{Subject, models, of_model};

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let mut blocks = vec![Block::text(
        "The roof is what the device could do at most, measured before the first cell of the same run: bytes per second \
         on the slope, flops per second on the flat. A cell stands at its flops per byte and its flops per second; what \
         it lacks to the roof is what could be gained.",
    )];
    let charts: Vec<Figure> = models(subjects)
        .iter()
        .enumerate()
        .filter_map(|(index, model)| chart(subjects, index, model))
        .collect();
    if !charts.is_empty() {
        blocks.push(Block::Charts { charts });
    }
    let absent = absent(subjects);
    if !absent.is_empty() {
        blocks.push(Block::text("Cells without a place on the roofline:"));
        blocks.push(Block::Bullets { items: absent });
    }
    for subject in subjects {
        match &subject.record.ceilings {
            Maybe::Value(ceilings) => {
                blocks.extend(ceilings.iter().map(|device| Block::Table(table(subject, device))));
            }
            Maybe::Missing(missing) => {
                let why = reason_in_words(&missing.missing);
                blocks.push(Block::text(format!("{}: no ceilings; {why}.", subject.title())));
            }
        }
    }
    Section { id: "roofline", title: "Roofline", blocks }
}

/// Why cells are not in the chart, each reason once.
fn absent(subjects: &[Subject<'_>]) -> Vec<String> {
    let mut keys = BTreeMap::<String, BTreeSet<&str>>::new();
    for subject in subjects {
        for cell in &subject.summary.cells {
            if let Maybe::Missing(missing) = roofline_point(subject.record, cell) {
                keys.entry(reason_in_words(&missing.missing)).or_default().insert(&cell.key);
            }
        }
    }
    keys.into_iter()
        .map(|(reason, keys)| format!("{reason}: {}", keys.into_iter().collect::<Vec<_>>().join(", ")))
        .collect()
}

/// Cells by key, and where they lie.
type Placed = Vec<(String, RooflinePoint)>;

fn chart(subjects: &[Subject<'_>], index: usize, model: &str) -> Option<Figure> {
    let of_model_here = || subjects.iter().filter(|subject| subject.record.model.name == model);
    let roofed: Vec<(&Subject<'_>, Roof, Placed)> = of_model_here()
        .filter_map(|subject| Some((subject, roof(subject.record).into_value()?, points(subject))))
        .collect();
    let intensities: Vec<f64> = roofed
        .iter()
        .flat_map(|(_, _, points)| points.iter().map(|(_, point)| point.flops_per_byte()))
        .filter(|intensity| intensity.is_finite() && *intensity > 0.0)
        .collect();
    if intensities.is_empty() {
        return None;
    }
    let ridges = || roofed.iter().map(|(_, roof, _)| roof.flops_per_s / roof.bytes_per_s);
    let low = intensities.iter().copied().chain(ridges()).fold(f64::INFINITY, f64::min) / 2.0;
    let high = intensities.iter().copied().chain(ridges()).fold(0.0, f64::max) * 4.0;
    let (factor, prefix) = prefixed(roofed.iter().map(|(_, roof, _)| roof.flops_per_s).fold(0.0, f64::max));
    let mut lines = Vec::new();
    for (subject, roof, points) in &roofed {
        let look = subject.look();
        let ridge = roof.flops_per_s / roof.bytes_per_s;
        let under = |x: f64| Point::bare(x, (x * roof.bytes_per_s).min(roof.flops_per_s) / factor);
        lines.push(Line {
            has_markers: false,
            ..Line::new(look, vec![under(low), under(ridge), under(high)])
        });
        let cells = points.iter().map(|(key, point)| Point {
            title: format!(
                "#{} {key}: {} flop/byte, {} {prefix}FLOP/s, {} GB/s",
                subject.number,
                format_significant(point.flops_per_byte()),
                format_significant(point.flops_per_s / factor),
                format_significant(point.bytes_per_s / 1e9)
            ),
            label: if subjects.len() == 1 { key.clone() } else { String::new() },
            ..Point::bare(point.flops_per_byte(), point.flops_per_s / factor)
        });
        lines.push(Line { is_joined: false, ..Line::new(look, cells.collect()) });
    }
    let title = format!("Roofline{}", of_model(subjects, model));
    let chart = Chart {
        id: format!("roofline-{index}"),
        title: title.clone(),
        x: Axis::new("arithmetic intensity (flop/byte)"),
        y: Axis::new(format!("{prefix}FLOP/s")),
        lines,
        bands: Vec::new(),
    };
    let legend = roofed.iter().map(|(subject, roof, _)| LegendEntry {
        swatch: subject.look().swatch(),
        text: format!(
            "{}: {} GB/s, {} {prefix}FLOP/s",
            subject.title(),
            format_significant(roof.bytes_per_s / 1e9),
            format_significant(roof.flops_per_s / factor)
        ),
    });
    Some(Figure { title, svg: draw(&chart), legend: legend.collect(), note: String::new() })
}

fn points(subject: &Subject<'_>) -> Vec<(String, RooflinePoint)> {
    let point =
        |cell: &CellSummary| Some((cell.key.clone(), roofline_point(subject.record, cell).into_value()?));
    subject.summary.cells.iter().filter_map(point).collect()
}

/// All ceilings of one device.
fn table(subject: &Subject<'_>, device: &Ceilings) -> Table {
    let bytes = |value: f64| format!("{} GB/s", format_significant(value / 1e9));
    let flops = |value: f64| {
        let (factor, prefix) = prefixed(value);
        format!("{} {prefix}FLOP/s", format_significant(value / factor))
    };
    let mut rows = vec![
        row("read bandwidth", &device.read_bandwidth_bytes_per_s, &bytes),
        row("copy bandwidth", &device.copy_bandwidth_bytes_per_s, &bytes),
    ];
    for (dtype, ceiling) in &device.matmul_flops_per_s {
        rows.push(row(&format!("matmul {dtype}"), ceiling, &flops));
    }
    for (dtype, ceiling) in &device.mma_flops_per_s {
        rows.push(row(&format!("tensor-core instructions {dtype}"), ceiling, &flops));
    }
    rows.push(row("launch", &device.launch_ns, &format_ns));
    rows.push(row("graph node", &device.graph_node_ns, &format_ns));
    rows.push(row("host to device", &device.host_to_device_bytes_per_s, &bytes));
    rows.push(row("device to host", &device.device_to_host_bytes_per_s, &bytes));
    Table {
        caption: format!("{}: ceilings of {}", subject.title(), device.device),
        columns: ["ceiling", "value", "median", "best", "spread", "by"].map(str::to_owned).to_vec(),
        rows,
        is_text: false,
        is_folded: false,
    }
}

fn row(name: &str, ceiling: &Maybe<Ceiling>, format: &dyn Fn(f64) -> String) -> Vec<String> {
    let mut row = vec![name.to_owned()];
    match ceiling {
        Maybe::Value(ceiling) => row.extend([
            format(ceiling.value),
            format(ceiling.median),
            format(ceiling.best),
            percent(&Maybe::Value(ceiling.spread_ratio)),
            ceiling.by.clone(),
        ]),
        Maybe::Missing(missing) => {
            row.extend([DASH, DASH, DASH, DASH].map(str::to_owned));
            row.push(reason_in_words(&missing.missing));
        }
    }
    row
}
