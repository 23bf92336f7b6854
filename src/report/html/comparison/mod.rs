//! The page of a comparison: the verdict and its reasons first, then the effects as a chart, every number, what changed
//! around them, and why.

mod forest;

use crate::analysis::compare::{
    Arm, Class, Comparison, Decomposition, Metric, Part, Probe, SessionId, Verdict,
};
use crate::record::Maybe;
use crate::report::DASH;
use crate::report::comparison::{
    TITLES, chance, class_words, compared, conditions, forms, headline, interval, kernels, library, notes,
    outputs, probe_value, reasons, row, shortened, sides, signed,
};
use crate::report::words::reason_in_words;

use super::content::{Block, Page, RecordHead, Section, Table};
use super::lay_out;

/// The page of one comparison.
///
/// # Errors
/// When the template does not fit the page, which no comparison can cause.
pub fn page(result: &Comparison) -> anyhow::Result<String> {
    let sections = [
        effects(result),
        cells(result),
        environment(result),
        why(result),
        bullets("left-out", "Left out by rule", &result.exclusions),
        bullets("remarks", "Remarks", &result.remarks),
        definitions(),
    ];
    lay_out(&Page {
        program: "tokmeter compare",
        title: headline(result),
        tone: tone(result.verdict),
        style: include_str!("../style.css"),
        version: env!("CARGO_PKG_VERSION"),
        origin: "the comparison alone; every number is in its JSON",
        warnings: result
            .not_a_measurement
            .iter()
            .map(|reason| format!("NOT A MEASUREMENT: {reason}"))
            .collect(),
        lead: lead(result),
        records: vec![head("Baseline", &result.baseline), head("Candidate", &result.candidate)],
        sections: sections.into_iter().filter(|section| !section.blocks.is_empty()).collect(),
    })
}

/// Class of the title in the style sheet.
fn tone(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Regressed => "worse",
        Verdict::Improved => "better",
        Verdict::Pass | Verdict::Same => "same",
        Verdict::Inconclusive | Verdict::NotComparable | Verdict::MeterChanged => "open",
    }
}

/// Why the verdict is what it is, what to do next, and by which rules.
fn lead(result: &Comparison) -> Vec<String> {
    let mut lines = reasons(result);
    lines.extend(result.next.iter().map(|step| format!("Next: {step}")));
    let rules = sides(result).into_iter().filter(|(title, _)| ["noise", "rules"].contains(title));
    lines.extend(rules.map(|(title, value)| format!("{title}: {value}")));
    lines
}

fn head(name: &str, arm: &Arm) -> RecordHead {
    let sessions: Vec<String> = arm.sessions.iter().map(SessionId::to_string).collect();
    RecordHead {
        // The charts draw the difference of the two, not each.
        swatch: String::new(),
        name: name.to_owned(),
        facts: vec![
            ("sessions", format!("{}: {}", sessions.len(), sessions.join("; "))),
            ("records", format!("{}: {}", arm.files.len(), arm.files.join(", "))),
            ("windows", format!("{:.0} s together", arm.conditions.window_s)),
        ],
    }
}

fn effects(result: &Comparison) -> Section {
    let charts: Vec<_> = Metric::ALL.into_iter().filter_map(|metric| forest::chart(result, metric)).collect();
    let blocks = if charts.is_empty() {
        vec![Block::text("No cell was compared, so there is no effect to draw.")]
    } else {
        vec![
            Block::text(
                "Candidate against baseline, with the two-sided 95 % interval of the difference between sessions. The band \
                 is the change that does not count: a pass needs the interval's lower end within it, a regression an effect \
                 left of it and beyond chance.",
            ),
            Block::Charts { charts },
        ]
    };
    Section { id: "effects", title: "Effects", blocks }
}

fn cells(result: &Comparison) -> Section {
    let mut blocks = Vec::new();
    if !result.cells.is_empty() {
        let titles = [&TITLES[..], &["sessions"]].concat();
        let with_sessions = |cell| {
            let mut fields = row(cell);
            let counts = &cell.sessions;
            fields.push(format!("{} / {} / {}", counts.baseline, counts.candidate, counts.noise));
            fields
        };
        let rows = compared(result).map(with_sessions).collect();
        blocks.push(Block::Table(number_table("Every cell and metric", &titles, rows)));
        blocks.push(Block::Bullets { items: notes(result) });
    }
    Section { id: "cells", title: "Cells", blocks }
}

/// What changed around the measurement, the expected first; what moves by itself in a table of its own.
fn environment(result: &Comparison) -> Section {
    let rows = |is_moving: bool| -> Vec<Vec<String>> {
        let lines = result.environment.iter().filter(|line| (line.class == Class::Dynamic) == is_moving);
        lines
            .map(|line| {
                vec![
                    class_words(line).to_owned(),
                    line.field.clone(),
                    line.group.clone(),
                    shortened(&line.baseline),
                    shortened(&line.candidate),
                ]
            })
            .collect()
    };
    let titles = ["class", "field", "group", "baseline", "candidate"];
    let (fixed, moving) = (rows(false), rows(true));
    let mut blocks = Vec::new();
    if fixed.is_empty() {
        blocks.push(Block::text("Nothing changed but what moves by itself."));
    } else {
        blocks.push(Block::text(
            "ANOTHER thing is not comparable; SUSPICIOUS changes confound unless declared or allowed; METER means that \
             energies do not compare; expected changes are what the comparison is made for.",
        ));
        blocks.push(Block::Table(text_table("What changed", &titles, fixed)));
    }
    if !moving.is_empty() {
        blocks.push(Block::Table(Table {
            is_folded: true,
            ..text_table("What moves by itself", &titles, moving)
        }));
    }
    Section { id: "environment", title: "Environment", blocks }
}

fn why(result: &Comparison) -> Section {
    let mut blocks = Vec::new();
    if result.cells.is_empty() {
        return Section { id: "why", title: "Why", blocks };
    }
    blocks.push(Block::Table(number_table(
        "Cells by layer",
        &["layer", "cells", "regressed", "improved", "change together"],
        layers(result),
    )));
    if !result.why.probes.is_empty() {
        blocks.push(Block::Table(text_table(
            "The device itself: what it can do at most, and its power",
            &["layer", "measured", "baseline", "candidate", "change", "95 % interval", "more is"],
            result.why.probes.iter().map(probe_row).collect(),
        )));
    }
    blocks.push(Block::Table(number_table(
        "tokens/s = clock × tokens per cycle; tokens/J = tokens/s ÷ power",
        &["cell", "tok/s", "clock", "tokens per cycle", "tok/J", "power"],
        result.why.decompositions.iter().map(decomposition_row).collect(),
    )));
    blocks.extend(missing_parts(result));
    for (title, items) in [
        ("JIT against SASS", forms(result)),
        ("Library algorithms", library(result)),
        ("Kernels", kernels(result)),
        ("Output tokens", outputs(result)),
        ("During the windows", conditions(&result.baseline, &result.candidate)),
    ] {
        if !items.is_empty() {
            blocks.push(Block::Heading { text: title.to_owned() });
            blocks.push(Block::Bullets { items });
        }
    }
    blocks.push(latencies(result));
    Section { id: "why", title: "Why", blocks }
}

fn layers(result: &Comparison) -> Vec<Vec<String>> {
    let measured = result.why.layers.iter().filter(|layer| layer.cells > 0);
    measured
        .map(|layer| {
            vec![
                layer.layer.clone(),
                layer.cells.to_string(),
                layer.regressed.to_string(),
                layer.improved.to_string(),
                layer.effect_ratio.value().map_or(DASH.to_owned(), |ratio| signed(*ratio)),
            ]
        })
        .collect()
}

fn probe_row(probe: &Probe) -> Vec<String> {
    vec![
        probe.layer.clone(),
        probe.what.clone(),
        probe_value(probe, probe.baseline),
        probe_value(probe, probe.candidate),
        signed(probe.effect_ratio),
        probe.interval_95_ratio.value().map_or(DASH.to_owned(), interval),
        if probe.is_better_low { "worse" } else { "better" }.to_owned(),
    ]
}

fn decomposition_row(parts: &Decomposition) -> Vec<String> {
    let part = |part: &Maybe<Part>| {
        part.value().map_or(DASH.to_owned(), |part| {
            let range = part.interval_95_ratio.value().map(interval);
            range.map_or(signed(part.effect_ratio), |range| format!("{} {range}", signed(part.effect_ratio)))
        })
    };
    vec![
        parts.cell.clone(),
        part(&Maybe::Value(parts.throughput.clone())),
        part(&parts.clock),
        part(&parts.tokens_per_cycle),
        part(&parts.tokens_per_joule),
        part(&parts.power),
    ]
}

/// Why the table above has dashes.
fn missing_parts(result: &Comparison) -> Option<Block> {
    let all = &result.why.decompositions;
    let reasons = [
        ("clock", all.iter().find_map(|parts| parts.clock.reason())),
        ("power", all.iter().find_map(|parts| parts.power.reason())),
    ];
    let items: Vec<String> = reasons
        .into_iter()
        .filter_map(|(what, reason)| Some(format!("{DASH} {what}: {}", reason_in_words(reason?))))
        .collect();
    (!items.is_empty()).then_some(Block::Bullets { items })
}

fn latencies(result: &Comparison) -> Block {
    if result.why.latencies.is_empty() {
        return Block::text(format!(
            "Of {} latencies none moved, at a false discovery rate of 10 %.",
            result.why.latencies_tested
        ));
    }
    let rows = result.why.latencies.iter().map(|moved| {
        vec![moved.cell.clone(), moved.latency.clone(), signed(moved.effect_ratio), chance(moved.p_adjusted)]
    });
    Block::Table(number_table(
        &format!(
            "Latencies that moved, of {} at a false discovery rate of 10 %",
            result.why.latencies_tested
        ),
        &["cell", "latency", "change", "p adjusted"],
        rows.collect(),
    ))
}

fn bullets(id: &'static str, title: &'static str, items: &[String]) -> Section {
    let blocks = if items.is_empty() { Vec::new() } else { vec![Block::Bullets { items: items.to_vec() }] };
    Section { id, title, blocks }
}

/// A table whose columns after the first are numbers.
fn number_table(caption: &str, columns: &[&str], rows: Vec<Vec<String>>) -> Table {
    let columns = columns.iter().map(|title| (*title).to_owned()).collect();
    Table { caption: caption.to_owned(), columns, rows, is_text: false, is_folded: false }
}

fn text_table(caption: &str, columns: &[&str], rows: Vec<Vec<String>>) -> Table {
    Table { is_text: true, ..number_table(caption, columns, rows) }
}

const DEFINITIONS: [(&str, &str); 9] = [
    ("session", "one boot and one driver load; the unit that is counted"),
    ("change", "candidate ÷ baseline − 1, of the geometric means over sessions"),
    ("95 % interval", "two-sided interval of the change"),
    ("p Holm", "chance of a loss this large without any, adjusted for all cells and metrics"),
    ("MDE", "smallest true change that four of five comparisons like this one would find"),
    ("σ", "standard deviation between sessions, of the logarithm"),
    ("δ", "loss that counts"),
    ("needs", "sessions on each side to find a change of δ"),
    ("sessions", "of the baseline, of the candidate, of the noise records"),
];

fn definitions() -> Section {
    let rows = DEFINITIONS.map(|(name, meaning)| vec![name.to_owned(), meaning.to_owned()]).to_vec();
    let table = text_table("What the columns mean; METHODOLOGY.md says more", &["name", "definition"], rows);
    Section { id: "definitions", title: "Definitions", blocks: vec![Block::Table(table)] }
}
