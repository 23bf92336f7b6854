//! `tokmeter compare`: is the candidate worse than the baseline, by how much, how sure, and why. The exit code says it
//! to a program.

mod store;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;
use rayon::prelude::*;

use super::format::Format;
use super::{bad_file, print, remark, usage};
use crate::analysis::compare::{
    self, CellThreshold, Comparison, Declared, GROUPS, Metric, Rules, Sample, Settings, Thresholds, Verdict,
};
use crate::{record, report};

/// Compare two sets of records, such as before and after a driver update: a verdict with an exit code
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The unit is the session: a boot and a driver load. Give several records of several sessions for \
    each side, or sessions measured earlier without any change as --noise.\n\n\
    Examples:\n  \
    tokmeter compare --baseline before-*.json --candidate after-*.json --noise noise-*.json\n  \
    tokmeter compare --baseline a.json --candidate b.json --changing kernel --format markdown\n  \
    tokmeter compare --baseline a*.json --candidate b*.json --out page.html --out ticket.md --out verdict.json\n  \
    tokmeter compare --store /var/lib/tokmeter --baseline before-*.json    keep sessions as the baseline\n  \
    tokmeter compare --store /var/lib/tokmeter --candidate after.json      compare with what is kept\n\n\
    Exit codes: 0 same, pass or improved, 10 regressed, 11 inconclusive, 12 not comparable or confounded, 13 meter \
    changed, 2 usage, 3 broken or foreign file"
)]
pub struct Args {
    /// Records of the state that is known
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present = "store")]
    baseline: Vec<PathBuf>,
    /// Records of the state in question
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present = "store")]
    candidate: Vec<PathBuf>,
    /// Records of sessions between which nothing was changed: they tell how much sessions differ by chance
    #[arg(long, num_args = 1.., value_name = "FILE")]
    noise: Vec<PathBuf>,
    /// Folder of kept sessions, by device, model and suite: with --baseline they are added, with --candidate they are
    /// compared with
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// What is deliberately updated: driver (always), firmware, kernel, cpu, memory, limits, env, tool, power, kernels
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    changing: Vec<String>,
    /// Fields, branches of fields or groups of the environment whose change is let pass
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    allow_env: Vec<String>,
    /// Loss that counts, percent: 2, tokens_per_joule=3 or throughput@CELL=5 [default: throughput=2,
    /// tokens_per_joule=3]
    #[arg(long, value_name = "[METRIC[@CELL]=]PERCENT", value_delimiter = ',', allow_hyphen_values = true)]
    threshold: Vec<String>,
    /// Call it a regression only when the whole 95 % interval is beyond the threshold
    #[arg(long)]
    strict: bool,
    /// Which look at a growing set of sessions this is, 1 to 3: later looks need more evidence
    #[arg(long, value_name = "N", default_value_t = 1)]
    look: u32,
    /// Whether an inconclusive comparison passes (exit code 0) or not (11)
    #[arg(long, value_enum, default_value_t = Inconclusive::Fail)]
    inconclusive: Inconclusive,
    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also write the result here, as the ending says: .json, .md, .html (a page with plots) or .txt; may be given
    /// several times
    #[arg(long, short, value_name = "FILE")]
    out: Vec<PathBuf>,
    /// Also compare records that say they are no measurement
    #[arg(long, hide = true)]
    allow_not_a_measurement: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Inconclusive {
    Pass,
    Fail,
}

/// # Errors
/// When a file is no record, or is one that says it is no measurement, or the command line makes no sense.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let settings = settings(&args)?;
    let places: Vec<(&PathBuf, Format)> =
        args.out.iter().map(|path| Ok((path, Format::of(path)?))).collect::<anyhow::Result<_>>()?;
    let read = |files: &[PathBuf]| read_all(files, args.allow_not_a_measurement);
    let mut candidate = read(&args.candidate)?;
    let (mut baseline, mut noise) = match &args.store {
        None => (read(&args.baseline)?, read(&args.noise)?),
        Some(folder) => {
            refuse_mixture(&args)?;
            if candidate.is_empty() {
                return keep(folder, &args);
            }
            let kept = store::files_for(folder, &candidate)?;
            let (baseline, older) = compare::split_by_age(read(&kept)?);
            (baseline, [older, read(&args.noise)?].concat())
        }
    };
    compare::align([&mut baseline, &mut candidate, &mut noise].into_iter().flatten());
    let result = compare::compare(&baseline, &candidate, &noise, &settings);
    for (path, format) in places {
        record::write_atomically(path, written(&result, format)?.as_bytes())
            .with_context(|| format!("{}: cannot write the comparison", path.display()))?;
        remark(&format!("comparison: {}", path.display()));
    }
    print(&written(&result, args.format)?)?;
    Ok(match (result.verdict, args.inconclusive) {
        (Verdict::Inconclusive, Inconclusive::Pass) => 0,
        (verdict, _) => verdict.exit_code(),
    })
}

fn written(result: &Comparison, format: Format) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table => report::comparison_table(result),
        Format::Json => report::comparison_json(result)?,
        Format::Markdown => report::comparison_markdown(result),
        Format::Html => report::comparison_page(result)?,
    })
}

fn refuse_mixture(args: &Args) -> anyhow::Result<()> {
    match (args.baseline.is_empty(), args.candidate.is_empty()) {
        (true, true) => {
            Err(usage("--store needs --baseline, to keep records, or --candidate, to compare with them"))
        }
        (false, false) => {
            let hint = "hint: compare the two without --store, or keep the baseline first";
            Err(usage(format!("--store takes --baseline or --candidate, got both\n{hint}")))
        }
        (false, true) if !args.out.is_empty() => {
            Err(usage("--out is for a comparison, and --store with --baseline only keeps records"))
        }
        _ => Ok(()),
    }
}

fn keep(folder: &Path, args: &Args) -> anyhow::Result<u8> {
    for path in &args.baseline {
        let record = record::read(path)?;
        let sample = sample(path, record.clone(), args.allow_not_a_measurement)?;
        let place = store::keep(folder, &record, &sample)?;
        remark(&format!("kept: {}", place.display()));
    }
    Ok(0)
}

/// Reads many records at once; each is reduced to what a comparison needs before the next is read.
fn read_all(files: &[PathBuf], allow_not_a_measurement: bool) -> anyhow::Result<Vec<Sample>> {
    files.par_iter().map(|path| sample(path, record::read(path)?, allow_not_a_measurement)).collect()
}

fn sample(path: &Path, record: record::Record, allow_not_a_measurement: bool) -> anyhow::Result<Sample> {
    let name = path.display().to_string();
    Sample::of(record, &name, allow_not_a_measurement)
        .map_err(|reason| bad_file(anyhow::anyhow!("{name}: {reason}")))
}

fn settings(args: &Args) -> anyhow::Result<Settings> {
    let alpha = Rules::level_at_look(args.look)
        .ok_or_else(|| usage(format!("--look is {}, expected 1 to 3", args.look)))?;
    for changing in &args.changing {
        if !GROUPS.iter().any(|(name, _)| name == changing) {
            let names: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
            return Err(usage(format!("--changing is '{changing}', expected {}", names.join(", "))));
        }
    }
    Ok(Settings {
        rules: Rules { alpha, strict: args.strict },
        look: args.look,
        thresholds: thresholds(&args.threshold).map_err(usage)?,
        declared: Declared { changing: args.changing.clone(), allow_env: args.allow_env.clone() },
    })
}

fn thresholds(given: &[String]) -> Result<Thresholds, String> {
    let mut thresholds = Thresholds::default();
    for text in given {
        let (place, percent) = text.split_once('=').unwrap_or(("", text));
        let ratio = percent
            .trim()
            .parse::<f64>()
            .ok()
            .filter(|percent| (0.01..=50.0).contains(percent))
            .map(|percent| percent / 100.0)
            .ok_or_else(|| format!("--threshold is '{text}', expected a percentage from 0.01 to 50"))?;
        let (name, cell) = place.split_once('@').unwrap_or((place, ""));
        let metrics: Vec<Metric> =
            Metric::ALL.into_iter().filter(|metric| name.is_empty() || metric.name() == name).collect();
        if metrics.is_empty() {
            return Err(format!(
                "--threshold is '{text}', expected the metric throughput or tokens_per_joule"
            ));
        }
        for metric in metrics {
            match (cell, metric) {
                ("", Metric::Throughput) => thresholds.throughput_ratio = ratio,
                ("", Metric::TokensPerJoule) => thresholds.tokens_per_joule_ratio = ratio,
                (cell, metric) => {
                    thresholds.cells.push(CellThreshold { metric, cell: cell.to_owned(), ratio });
                }
            }
        }
    }
    Ok(thresholds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_given_for_all_for_a_metric_or_for_a_cell() {
        let given =
            |words: &[&str]| thresholds(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let found = given(&["1.5", "tokens_per_joule=4", "throughput@decode/b1/d8/o8=7"]).unwrap();
        assert_eq!((found.throughput_ratio, found.tokens_per_joule_ratio), (0.015, 0.04));
        assert_eq!(found.of(Metric::Throughput, "decode/b1/d8/o8"), 0.07);
        assert_eq!(found.of(Metric::TokensPerJoule, "decode/b1/d8/o8"), 0.04);
        for bad in ["", "0", "-1", "51", "NaN", "speed=2", "throughput=two", "throughput@x="] {
            assert!(given(&[bad]).unwrap_err().starts_with(&format!("--threshold is '{bad}'")), "{bad}");
        }
    }
}
