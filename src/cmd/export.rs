//! `tokmeter export`: records and calibrations in the formats of planners, dashboards and digital twins.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::{FAILED, bad_file, print, remark, usage};
use crate::analysis;
use crate::analysis::calibrate::{CALIBRATION_SCHEMA, read_calibration};
use crate::export::{Content, Exported, Format, Given, Settings, export};
use crate::record::{self, check_place, write_atomically};

/// Write records or calibrations in a planner's own format
#[derive(Debug, clap::Args)]
#[command(after_help = after_help(), after_long_help = after_long_help())]
pub struct Args {
    /// What to write
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    to: Format,
    /// Record files, and for some formats a calibration
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write here instead of stdout
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// A fact that no benchmark measures; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Also take files that say they are no measurement
    #[arg(long)]
    allow_not_a_measurement: bool,
}

const EXAMPLES: &str = "Examples:\n  \
    tokmeter export --to csv results/*/*.json --out cells.csv\n  \
    tokmeter export --to prometheus record.json --out /var/lib/node_exporter/tokmeter.prom\n  \
    tokmeter export --to dynamo-profile record.json --out profile.json    then kubectl apply -f profile.json\n  \
    tokmeter export --to aic-system record.json                           a YAML patch on stdout\n  \
    tokmeter export --to fleet-sim calibration.json record.json --set cost_per_hr=2.50\n  \
    tokmeter export --to mlperf-power record.json --set cooling=air --out system_power.json\n\n\
    What was not measured is left out, and said on stderr.\n\
    Exit codes: 0 written, 1 refused (the files lack what the format needs), 2 usage, 3 a file is unreadable or of another \
    format";

fn format_parser() -> impl TypedValueParser<Value = Format> {
    PossibleValuesParser::new(Format::ALL.map(|format| format.about().name))
        .try_map(|name| Format::named(&name).ok_or("no such format"))
}

fn after_help() -> String {
    let mut text = "Formats:\n".to_owned();
    for about in Format::ALL.map(Format::about) {
        let _ = writeln!(text, "  {:<15} {}", about.name, about.consumer);
    }
    text + "\n--help says what each is made from, field by field.\n\n" + EXAMPLES
}

fn after_long_help() -> String {
    let mut text = "Formats:\n".to_owned();
    for about in Format::ALL.map(Format::about) {
        let _ = writeln!(text, "\n{}: {}", about.name, about.consumer);
        let _ = writeln!(text, "  source     {}", about.source);
        let _ = writeln!(text, "  made from  {}", about.made_from);
        for setting in about.settings {
            let _ = writeln!(text, "  --set {}=…  {}", setting.key, setting.meaning);
        }
        for (field, origin) in about.fields {
            let _ = writeln!(text, "    {field}: {origin}");
        }
    }
    text + "\n" + EXAMPLES
}

/// # Errors
/// When a file is unreadable or of another kind, or the command line does not fit. A refusal is printed and changes the
/// exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let settings = settings(args.to, &args.settings)?;
    if let Some(out) = &args.out {
        check_place(out)?;
    }
    let given: Vec<Given> = args
        .files
        .iter()
        .map(|path| read(path, args.allow_not_a_measurement))
        .collect::<anyhow::Result<_>>()?;
    let Exported { text, notes } = match export(args.to, &given, &settings) {
        Ok(exported) => exported,
        Err(refusal) => {
            remark(&format!("refused: {refusal}"));
            return Ok(FAILED);
        }
    };
    match &args.out {
        None => print(&text)?,
        Some(path) => {
            write_atomically(path, text.as_bytes())
                .with_context(|| format!("{}: cannot write the export", path.display()))?;
            remark(&format!("export: {}", path.display()));
        }
    }
    notes.iter().for_each(|note| remark(&format!("note: {note}")));
    Ok(0)
}

/// The facts of `--set`, each one that the format knows.
fn settings(format: Format, given: &[String]) -> anyhow::Result<Settings> {
    let about = format.about();
    let mut settings = Settings::new();
    for text in given {
        let Some((key, value)) =
            text.split_once('=').filter(|(key, value)| !key.is_empty() && !value.is_empty())
        else {
            return Err(usage(format!("--set {text}: expected KEY=VALUE")));
        };
        if !about.settings.iter().any(|setting| setting.key == key) {
            let known: Vec<&str> = about.settings.iter().map(|setting| setting.key).collect();
            return Err(usage(match known.is_empty() {
                true => format!("--set {key}: {} takes no settings", about.name),
                false => {
                    format!("--set {key}: {} knows no such key, expected {}", about.name, known.join(" or "))
                }
            }));
        }
        if settings.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(usage(format!("--set {key} is given twice")));
        }
    }
    Ok(settings)
}

/// Only what tells the kinds of file apart; the rest is read by the kind's own reader.
#[derive(serde::Deserialize)]
struct Head {
    schema: String,
}

fn read(path: &Path, allow_not_a_measurement: bool) -> anyhow::Result<Given> {
    let refuse = |reason: String| bad_file(anyhow::anyhow!("{}: {reason}", path.display()));
    let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let (content, not_a_measurement) = if is_calibration(path) {
        let calibration = read_calibration(path).map_err(bad_file)?;
        let reason = analysis::refuse_unmeasured(calibration.not_a_measurement.as_deref()).err();
        (Content::Calibration(Box::new(calibration)), reason)
    } else {
        let record = record::read(path)?;
        let reason = analysis::refuse_unmeasured(record.not_a_measurement.as_deref()).err();
        (Content::Record(Box::new(record)), reason)
    };
    match not_a_measurement.filter(|_| !allow_not_a_measurement) {
        Some(reason) => Err(refuse(reason)),
        None => Ok(Given { file, content }),
    }
}

/// Whether the file says so of itself; what cannot be read is left to the reader of records, which says why.
fn is_calibration(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let head: Result<Head, _> = serde_json::from_reader(BufReader::new(file));
    let family = CALIBRATION_SCHEMA.split('/').next().unwrap_or(CALIBRATION_SCHEMA);
    head.is_ok_and(|head| head.schema.split('/').next() == Some(family))
}
