//! `tokmeter report`: records, a comparison of records, or measurements beside a prediction, as something to read.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::format;
use super::price::PriceArgs;
use crate::analysis::compare::{self, Comparison};
use crate::analysis::predicted::{self, Measured};
use crate::cmd::{bad_file, print, remark, usage};
use crate::record::{self, Maybe, Record};
use crate::{analysis, report};

/// Turn records, or a comparison, into a Markdown document, into one self-contained HTML page with plots, or into JSON
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tokmeter report tokmeter-cpu-20261122T101112Z.json\n  \
    tokmeter report results/*/*.json --out report.md\n  \
    tokmeter report before.json after.json --out page.html\n  tokmeter report record.json --format json\n  \
    tokmeter report comparison.json --out page.html\n  tokmeter report record.json --cost costs/rental-h100.toml\n  \
    tokmeter report ops.json record.json --predicted results/2026-11-27-predictions/llama-3.1-8b-bf16.json")]
pub struct Args {
    /// Record files, or one file that `compare --format json` wrote; with --predicted also what `peaks --ops --out` wrote
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write here instead of stdout; the ending .html makes it a page, .json JSON, any other Markdown
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Whatever the ending
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Lay the files beside this prediction instead: times of steps and operations, and how far they are from it
    #[arg(long, value_name = "PREDICTION")]
    predicted: Option<PathBuf>,
    #[command(flatten)]
    price: PriceArgs,
    /// Also report what says that it is no measurement
    #[arg(long)]
    allow_not_a_measurement: bool,
}

/// What a report is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Markdown,
    Html,
    /// What follows from each record, a list of what `run --format json` prints
    Json,
}

impl Format {
    /// By the ending of the file.
    fn of(path: Option<&Path>) -> Format {
        match path.and_then(format::Format::by_ending) {
            Some(format::Format::Html) => Format::Html,
            Some(format::Format::Json) => Format::Json,
            _ => Format::Markdown,
        }
    }
}

/// # Errors
/// When a file is no record, or is one that says it is no measurement.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let price = args.price.settle()?;
    let format = args.format.unwrap_or_else(|| Format::of(args.out.as_deref()));
    if let Some(path) = &args.predicted {
        if price.is_some() {
            return Err(usage("a price is for records; a prediction has no prices"));
        }
        return beside_prediction(&args, path, format);
    }
    if let Some(comparison) = comparison(&args)? {
        if price.is_some() {
            return Err(usage("a price is for records; a comparison has no prices"));
        }
        let text = match format {
            Format::Markdown => report::comparison_markdown(&comparison),
            Format::Html => report::comparison_page(&comparison)?,
            Format::Json => report::comparison_json(&comparison)?,
        };
        return write(&args, &text);
    }
    let mut records: Vec<Record> = args
        .files
        .iter()
        .map(|path| read(path, args.allow_not_a_measurement))
        .collect::<anyhow::Result<_>>()?;
    if let Some(model) = price {
        records.iter_mut().for_each(|record| record.cost_model = Maybe::Value(model.clone()));
    }
    let text = match format {
        Format::Markdown => report::document(&records),
        Format::Html => report::page(&records)?,
        Format::Json => report::json_list(&records)?,
    };
    write(&args, &text)
}

fn write(args: &Args, text: &str) -> anyhow::Result<u8> {
    match &args.out {
        None => print(text)?,
        Some(path) => {
            record::write_atomically(path, text.as_bytes())
                .with_context(|| format!("{}: cannot write the report", path.display()))?;
            remark(&format!("report: {}", path.display()));
        }
    }
    Ok(0)
}

/// The files beside a prediction.
fn beside_prediction(args: &Args, path: &Path, format: Format) -> anyhow::Result<u8> {
    let prediction =
        predicted::parse_prediction(&read_text(path)?).map_err(|reason| of_file(path, &reason))?;
    let measured: Vec<Measured> = args
        .files
        .iter()
        .map(|path| measured(path, args.allow_not_a_measurement))
        .collect::<anyhow::Result<_>>()?;
    let beside = predicted::beside(&prediction, &measured);
    let text = match format {
        Format::Markdown => report::predicted_markdown(&beside),
        Format::Html => report::predicted_page(&beside)?,
        Format::Json => report::predicted_json(&beside)?,
    };
    write(args, &text)
}

/// A record, or the file of `peaks --ops`.
fn measured(path: &Path, allow_not_a_measurement: bool) -> anyhow::Result<Measured> {
    let name = path.display().to_string();
    let text = read_text(path)?;
    if !predicted::is_peaks(&text) {
        return Ok(predicted::of_record(name, &read(path, allow_not_a_measurement)?));
    }
    let peaks = predicted::parse_peaks(name, &text).map_err(|reason| of_file(path, &reason))?;
    refuse_unmeasured(path, peaks.not_a_measurement.as_deref(), allow_not_a_measurement)?;
    Ok(peaks)
}

fn refuse_unmeasured(path: &Path, reason: Option<&str>, allow: bool) -> anyhow::Result<()> {
    if allow {
        return Ok(());
    }
    analysis::refuse_unmeasured(reason).map_err(|reason| of_file(path, &reason))
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).map_err(|error| of_file(path, &format!("cannot be read: {error}")))
}

fn of_file(path: &Path, reason: &str) -> anyhow::Error {
    bad_file(anyhow::anyhow!("{}: {reason}", path.display()))
}

/// What a file of ours says first.
#[derive(serde::Deserialize)]
struct Head {
    schema: String,
}

/// The comparison that the only file holds, if it is one.
fn comparison(args: &Args) -> anyhow::Result<Option<Comparison>> {
    let [path] = args.files.as_slice() else { return Ok(None) };
    // Whatever is wrong with another file, reading it as a record says it better.
    let Ok(file) = File::open(path) else { return Ok(None) };
    let head: Result<Head, _> = serde_json::from_reader(BufReader::new(file));
    if !head.is_ok_and(|head| head.schema.starts_with("tokmeter-comparison/")) {
        return Ok(None);
    }
    let comparison = compare::parse(&read_text(path)?).map_err(|reason| of_file(path, &reason))?;
    refuse_unmeasured(path, comparison.not_a_measurement.as_deref(), args.allow_not_a_measurement)?;
    Ok(Some(comparison))
}

fn read(path: &Path, allow_not_a_measurement: bool) -> anyhow::Result<Record> {
    let record = record::read(path)?;
    refuse_unmeasured(path, record.not_a_measurement.as_deref(), allow_not_a_measurement)?;
    Ok(record)
}
