//! `tokmeter report`: records as something to read.

use std::path::PathBuf;

use anyhow::Context as _;

use super::price::PriceArgs;
use crate::cmd::{bad_file, print, remark};
use crate::record::{self, Maybe, Record};
use crate::{analysis, report};

/// Turn records into a Markdown document
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tokmeter report tokmeter-cpu-20261122T101112Z.json\n  \
    tokmeter report results/*/*.json --out report.md\n  tokmeter report record.json --cost costs/rental-h100.toml")]
pub struct Args {
    /// Record files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write here instead of stdout
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    price: PriceArgs,
    /// Also report records that say they are no measurement
    #[arg(long)]
    allow_not_a_measurement: bool,
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
    let text = report::document(&records);
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

fn read(path: &std::path::Path, allow_not_a_measurement: bool) -> anyhow::Result<Record> {
    let record = record::read(path)?;
    if !allow_not_a_measurement {
        analysis::refuse_unmeasured(&record)
            .map_err(|reason| bad_file(anyhow::anyhow!("{}: {reason}", path.display())))?;
    }
    Ok(record)
}
