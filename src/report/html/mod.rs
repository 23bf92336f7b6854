//! One self-contained HTML page from records, a comparison of records, a prediction or a plan: no script, no request, light and dark,
//! readable on paper. Sections are computed as data ([`content`]), charts as SVG ([`chart`]); the template `page.html`
//! alone lays them out, and escapes whatever comes from a file.

mod bars;
mod chart;
mod comparison;
mod content;
mod cost;
mod environment;
mod gaps;
mod latency;
mod look;
mod plan;
mod predicted;
mod results;
mod roofline;
mod scale;
mod subject;
mod svg;
mod throughput;
mod timeline;
mod tradeoff;

use anyhow::Context as _;
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use rayon::prelude::*;

use crate::record::{Maybe, Record, Status, canonical_sha256};

pub use comparison::page as comparison_page;

use content::{Page, RecordHead};
use subject::{Subject, models};
use svg::printable;

pub use plan::plan_page;
pub use predicted::page as predicted_page;

const TEMPLATE: &str = "page.html";

/// The page of one or several records.
///
/// # Errors
/// When the template does not fit the page, which no record can cause.
pub fn page(records: &[Record]) -> anyhow::Result<String> {
    let subjects = Subject::all(records);
    let page = Page {
        program: "tokmeter report",
        title: title(&subjects),
        tone: "",
        style: include_str!("style.css"),
        version: env!("CARGO_PKG_VERSION"),
        origin: "the records above alone; every number is in them or follows from them by METHODOLOGY.md",
        lead: Vec::new(),
        warnings: subjects.iter().flat_map(warnings).collect(),
        records: subjects.par_iter().map(head).collect(),
        sections: vec![
            results::results(&subjects),
            throughput::section(&subjects),
            tradeoff::section(&subjects),
            latency::section(&subjects),
            roofline::section(&subjects),
            results::anchors(&subjects),
            timeline::section(&subjects),
            cost::section(&subjects),
            results::flags(&subjects),
            gaps::section(&subjects),
            environment::section(&subjects),
            results::definitions(),
        ],
    };
    lay_out(&page)
}

/// The page through the template, which escapes every text that is not marked as finished markup.
fn lay_out(page: &Page) -> anyhow::Result<String> {
    rendered(page).context("the page cannot be laid out")
}

fn rendered(page: &Page) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_template(TEMPLATE, include_str!("page.html"))?;
    let text = environment.get_template(TEMPLATE)?.render(Serde(page))?;
    Ok(printable(&text))
}

fn title(subjects: &[Subject<'_>]) -> String {
    let models = models(subjects).join(", ");
    match subjects {
        [subject] => format!("{models} on {}", subject.name),
        _ => format!("{models} · {} records", subjects.len()),
    }
}

/// What must be known before any number is read.
fn warnings(subject: &Subject<'_>) -> Vec<String> {
    let (record, mut warnings) = (subject.record, Vec::new());
    if let Some(reason) = &record.not_a_measurement {
        warnings.push(format!("NOT A MEASUREMENT: {reason}"));
    }
    if subject.summary.synthetic_weights {
        warnings.push("SYNTHETIC WEIGHTS: true shapes, made-up values".to_owned());
    }
    match record.status {
        Status::Complete => {}
        Status::Running => warnings.push("the invocation had not ended, or was killed".to_owned()),
        Status::Interrupted => warnings.push("the invocation was stopped by a signal".to_owned()),
    }
    if record.numerics.value().is_some_and(|numerics| !numerics.ok) {
        warnings.push("the device computes something else than the CPU: see Numerics".to_owned());
    }
    warnings.into_iter().map(|warning| format!("#{}: {warning}", subject.number)).collect()
}

fn head(subject: &Subject<'_>) -> RecordHead {
    let record = subject.record;
    let measured = record.cells.iter().filter(|cell| !cell.runs.is_empty()).count();
    let facts = vec![
        ("model", record.model.name.clone()),
        (
            "engine",
            format!(
                "{} {}, {} backend, computes in {}",
                record.tool.name, record.tool.version, record.engine.backend, record.engine.compute_dtype
            ),
        ),
        ("started", record.started_at.clone()),
        (
            "measured",
            format!(
                "{measured} of {} cells, {} runs each, windows of at least {} s",
                record.command.planned_cells.len(),
                record.command.repeat,
                record.command.min_seconds
            ),
        ),
        ("power meter", meter(record)),
        ("command", record.command.argv.join(" ")),
        ("SHA-256", canonical_sha256(record).unwrap_or_else(|why| format!("none: the record {why}"))),
    ];
    RecordHead { swatch: subject.look().swatch(), name: subject.title(), facts }
}

fn meter(record: &Record) -> String {
    match &record.meter.source {
        Maybe::Value(source) => source.clone(),
        Maybe::Missing(missing) => format!("none ({})", super::words::reason_in_words(&missing.missing)),
    }
}
