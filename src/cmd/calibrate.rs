//! `tokmeter calibrate`: records → laws of time and energy, with their errors on points set aside before measuring.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;

use super::{FAILED, bad_file, print, remark, usage};
use crate::analysis::calibrate::{
    Calibration, Given, GroupFit, Refusal, RowsForm, calibrate, fit_groups, read_rows,
};
use crate::record::{check_place, read, write_atomically};
use crate::{analysis, report};

/// Fit planning laws to records, and say how wrong they are on points they never saw
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Records of the suite calibration are made for this. The hold-out is in them: it was fixed before \
    anything was measured.\n\n\
    Examples:\n  \
    tokmeter run --device cuda:0 --suite calibration -o r.json\n  \
    tokmeter calibrate r.json --out calibration.json\n  \
    tokmeter calibrate --from csv rows.csv                        one line for each published group\n  \
    tokmeter calibrate --from csv rows.csv --group h200/ --out h200.json\n  \
    tokmeter calibrate --from inferencex agg_bmk.json\n\n\
    Exit codes: 0 fitted, 1 refused, 2 usage, 3 a file is unreadable or of another format"
)]
pub struct Args {
    /// Record files, or with --from csv or inferencex one file of published serving rows
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What the files are: records, or published rows (csv: the plain form of PLANNING.md, or
    /// aiconfigurator's silicon sample; inferencex: its agg_bmk.json)
    #[arg(long, value_enum, default_value_t = From::Records)]
    from: From,
    /// Of published rows: the one group whose name begins so
    #[arg(long, value_name = "TEXT")]
    group: Option<String>,
    /// Write the calibration here
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also take records that say they are no measurement
    #[arg(long)]
    allow_not_a_measurement: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum From {
    Records,
    Csv,
    #[value(name = "inferencex")]
    InferenceX,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// # Errors
/// When a file is unreadable or the command line does not fit. A refusal is printed and changes the exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    if let Some(out) = &args.out {
        check_place(out)?;
    }
    let command = command_line();
    match args.from {
        From::Records => {
            if args.group.is_some() {
                return Err(usage("--group names a group of published rows, expected --from csv with it"));
            }
            let given = args
                .files
                .iter()
                .map(|path| read_record(path, args.allow_not_a_measurement))
                .collect::<anyhow::Result<Vec<_>>>()?;
            conclude(calibrate(&given, command), &args)
        }
        From::Csv => from_rows(&args, RowsForm::Csv, "csv", &command),
        From::InferenceX => from_rows(&args, RowsForm::InferenceX, "inferencex", &command),
    }
}

fn from_rows(args: &Args, form: RowsForm, name: &str, command: &[String]) -> anyhow::Result<u8> {
    let [file] = args.files.as_slice() else {
        return Err(usage(format!("--from {name} takes one file, got {}", args.files.len())));
    };
    published(fit_groups(&read_rows(file, form).map_err(bad_file)?, command), args)
}

/// The program's arguments, with files by their names: where they lay is nobody's business.
fn command_line() -> Vec<String> {
    let name = |word: &std::ffi::OsString| {
        let path = Path::new(word);
        let is_file = path.components().count() > 1 && !word.to_string_lossy().starts_with('-');
        let shown = if is_file { path.file_name().unwrap_or(word) } else { word };
        shown.to_string_lossy().into_owned()
    };
    let words: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    let is_group = |index: usize| index > 0 && words[index - 1] == "--group";
    let shown = words.iter().enumerate().map(|(index, word)| match is_group(index) {
        true => word.to_string_lossy().into_owned(),
        false => name(word),
    });
    std::iter::once("tokmeter".to_owned()).chain(shown).collect()
}

fn read_record(path: &Path, allow_not_a_measurement: bool) -> anyhow::Result<Given> {
    let record = read(path)?;
    if !allow_not_a_measurement {
        analysis::refuse_unmeasured(record.not_a_measurement.as_deref())
            .map_err(|reason| bad_file(anyhow::anyhow!("{}: {reason}", path.display())))?;
    }
    let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok(Given { file, record })
}

/// All groups in a table, or one as a calibration.
fn published(fits: Vec<GroupFit>, args: &Args) -> anyhow::Result<u8> {
    let Some(part) = &args.group else {
        if args.out.is_some() || args.format == Format::Json {
            return Err(usage(
                "a calibration is of one group, expected --group with --out and --format json",
            ));
        }
        print(&report::groups(&fits))?;
        let is_fitted = fits.iter().any(|fit| fit.calibration.is_ok());
        return Ok(if is_fitted { 0 } else { FAILED });
    };
    let names: Vec<String> = fits.iter().map(|fit| fit.group.name()).collect();
    let mut chosen: Vec<GroupFit> =
        fits.into_iter().filter(|fit| fit.group.name().starts_with(part.as_str())).collect();
    match (chosen.pop(), chosen.is_empty()) {
        (Some(fit), true) => conclude(fit.calibration, args),
        (None, _) => Err(usage(format!(
            "--group {part}: no group's name begins so\nhint: they are {}",
            names.join(", ")
        ))),
        (Some(fit), false) => Err(usage(format!(
            "--group {part}: the names of {} groups begin so, expected one: {}",
            chosen.len() + 1,
            chosen.iter().chain([&fit]).map(|fit| fit.group.name()).collect::<Vec<_>>().join(", ")
        ))),
    }
}

fn conclude(fitted: Result<Calibration, Refusal>, args: &Args) -> anyhow::Result<u8> {
    let calibration = match fitted {
        Ok(calibration) => calibration,
        Err(Refusal(reasons)) => {
            reasons.iter().for_each(|reason| remark(&format!("refused: {reason}")));
            return Ok(FAILED);
        }
    };
    let json = serde_json::to_string_pretty(&calibration)? + "\n";
    match args.format {
        Format::Table => print(&report::calibration(&calibration))?,
        Format::Json => print(&json)?,
    }
    if let Some(out) = &args.out {
        write_atomically(out, json.as_bytes())
            .with_context(|| format!("{}: cannot write the calibration", out.display()))?;
        remark(&format!("calibration: {}", out.display()));
    }
    Ok(0)
}
