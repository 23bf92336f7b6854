//! `tokmeter plan`: a site and a calibration → tokens, megawatts and money with intervals; and the lint of site files.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::format::Format;
use super::{FAILED, bad_file, print, remark, usage};
use crate::analysis::calibrate::read_calibration;
use crate::analysis::plan::{DRAWS, Level, PlanOptions, lint, plan, read_site};
use crate::record::{Amount, check_place, write_atomically};
use crate::report;

/// Forecast a site's tokens, power and cost from a calibration, with intervals
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    tokmeter plan --site sites/nvl72-gb200.toml\n  \
    tokmeter plan --site sites/nvl72-gb200.toml --calibration calibration.json --explain\n  \
    tokmeter plan --site sites/gw-reference.toml --set demand.utilization=0.9 --set power.pue=1.1\n  \
    tokmeter plan --site sites/campus-ia-fouju.toml --out page.html --out plan.json\n  \
    tokmeter plan --lint sites/*.toml\n\n\
    Without --calibration the one that the site names is taken, from results/calibrations beside the site's folder.\n\
    Exit codes: 0 done, 1 refused, or the lint found an error; 2 usage, 3 a file is unreadable or makes no sense")]
pub struct Args {
    /// Site file
    #[arg(long, value_name = "FILE", required_unless_present = "lint")]
    site: Option<PathBuf>,
    /// Calibration file [default: the one that the site names]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Replace a value of the site; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// What a million output tokens are sold for, in the site's currency: gives the break-even utilisation
    #[arg(long, value_name = "AMOUNT")]
    price_per_mtok: Option<String>,
    /// Print every formula with its numbers
    #[arg(long)]
    explain: bool,
    /// Go on further beyond the calibration's domain than 1.25 times
    #[arg(long)]
    allow_extrapolation: bool,
    /// Take a calibration that says it is no measurement
    #[arg(long)]
    allow_not_a_measurement: bool,
    /// Draws behind the intervals
    #[arg(long, value_name = "N", default_value_t = DRAWS, value_parser = clap::value_parser!(u32).range(20..=1_000_000))]
    draws: u32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How the plan is printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also write the plan here, as the ending says: .json, .md, .html (a page with plots) or .txt; may be given several
    /// times
    #[arg(long, short, value_name = "FILE")]
    out: Vec<PathBuf>,
    /// Look for wrong units and broken physics in site files, forecast nothing
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["site", "calibration", "out"])]
    lint: Option<Vec<PathBuf>>,
}

/// # Errors
/// When a file is unreadable or makes no sense. A refusal is printed and changes the exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    if let Some(files) = &args.lint {
        return lint_all(files, &args.settings);
    }
    let path = args.site.as_deref().ok_or_else(|| usage("--site is missing"))?;
    let places: Vec<(&PathBuf, Format)> =
        args.out.iter().map(|out| Ok((out, Format::of(out)?))).collect::<anyhow::Result<_>>()?;
    args.out.iter().try_for_each(|out| check_place(out))?;
    let mut site = read_site(path, &args.settings).map_err(|error| {
        if format!("{error:#}").contains("--set") { usage(format!("{error:#}")) } else { bad_file(error) }
    })?;
    if let Some(price) = args.price_per_mtok {
        let price = Amount::try_from(price).map_err(|why| usage(format!("--price-per-mtok: {why}")))?;
        site.money.price_per_mtok = Some(price);
    }
    let calibration = match (&args.calibration, &site.calibration) {
        (Some(file), _) => read_calibration(file).map_err(bad_file)?,
        (None, Some(name)) => read_calibration(&beside(path, name)).map_err(bad_file)?,
        (None, None) => return Err(usage("the site names no calibration, expected --calibration FILE")),
    };
    if let Some(reason) = calibration.not_a_measurement.as_ref().filter(|_| !args.allow_not_a_measurement) {
        return Err(bad_file(anyhow::anyhow!("the calibration is not a measurement: {reason}")));
    }
    let options =
        PlanOptions { draws: args.draws, seed: args.seed, allow_extrapolation: args.allow_extrapolation };
    let plan = match plan(&site, &calibration, &options) {
        Ok(plan) => plan,
        Err(refusal) => {
            remark(&format!("refused: {refusal}"));
            return Ok(FAILED);
        }
    };
    let text = |format: Format| -> anyhow::Result<String> {
        Ok(match format {
            Format::Table => report::plan(&plan, args.explain),
            Format::Json => serde_json::to_string_pretty(&plan)? + "\n",
            Format::Markdown => report::plan_markdown(&plan, &site),
            Format::Html => report::plan_page(&plan, &site)?,
        })
    };
    print(&text(args.format)?)?;
    for (out, format) in places {
        write_atomically(out, text(format)?.as_bytes())
            .with_context(|| format!("{}: cannot write the plan", out.display()))?;
        remark(&format!("plan: {}", out.display()));
    }
    Ok(0)
}

/// A site names its calibration as seen from the folder above its own.
fn beside(site: &Path, name: &str) -> PathBuf {
    let folder = site.parent().unwrap_or(Path::new("."));
    folder.join("..").join(name)
}

fn lint_all(files: &[PathBuf], settings: &[String]) -> anyhow::Result<u8> {
    let mut code = 0;
    for file in files {
        let site = read_site(file, settings).map_err(bad_file)?;
        let found = lint(&site);
        print(&report::findings(&site.id, &found))?;
        if found.iter().any(|finding| finding.level == Level::Error) {
            code = FAILED;
        }
    }
    Ok(code)
}
