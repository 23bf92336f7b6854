//! `tokmeter report`: records as something to read.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::price::PriceArgs;
use crate::cmd::{bad_file, print, remark};
use crate::record::{self, Maybe, Record};
use crate::{analysis, report};

/// Turn records into a Markdown document, into one self-contained HTML page with plots, or into JSON
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tokmeter report tokmeter-cpu-20261122T101112Z.json\n  \
    tokmeter report results/*/*.json --out report.md\n  \
    tokmeter report before.json after.json --out page.html\n  tokmeter report record.json --format json\n  \
    tokmeter report record.json --cost costs/rental-h100.toml")]
pub struct Args {
    /// Record files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write here instead of stdout; the ending .html makes it a page, any other Markdown
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Whatever the ending
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    #[command(flatten)]
    price: PriceArgs,
    /// Also report records that say they are no measurement
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
        let ending = path.and_then(Path::extension).map(std::ffi::OsStr::to_ascii_lowercase);
        match ending {
            Some(ending) if ending == "html" || ending == "htm" => Format::Html,
            _ => Format::Markdown,
        }
    }
}

/// # Errors
/// When a file is no record, or is one that says it is no measurement.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let price = args.price.settle()?;
    let mut records: Vec<Record> = args
        .files
        .iter()
        .map(|path| read(path, args.allow_not_a_measurement))
        .collect::<anyhow::Result<_>>()?;
    if let Some(model) = price {
        records.iter_mut().for_each(|record| record.cost_model = Maybe::Value(model.clone()));
    }
    let text = match args.format.unwrap_or_else(|| Format::of(args.out.as_deref())) {
        Format::Markdown => report::document(&records),
        Format::Html => report::page(&records)?,
        Format::Json => report::json_list(&records)?,
    };
    match &args.out {
        None => print(&text)?,
        Some(path) => {
            record::write_atomically(path, text.as_bytes())
                .with_context(|| format!("{}: cannot write the report", path.display()))?;
            remark(&format!("report: {}", path.display()));
        }
    }
    Ok(0)
}

fn read(path: &Path, allow_not_a_measurement: bool) -> anyhow::Result<Record> {
    let record = record::read(path)?;
    if !allow_not_a_measurement {
        analysis::refuse_unmeasured(&record)
            .map_err(|reason| bad_file(anyhow::anyhow!("{}: {reason}", path.display())))?;
    }
    Ok(record)
}
