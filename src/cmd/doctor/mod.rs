//! `doctor`: what is here, what is missing, and the exact remedy. Looks and reports, and changes nothing. Only what is
//! asked for by name keeps the device busy: a sensor under load, and what reading it takes from the speed.

mod device;
mod effect;
mod environment;
mod host;
mod probe;
mod sensor;

use std::ffi::OsString;
use std::str::FromStr;

use clap::ValueEnum;
use serde::Serialize;

use effect::{Effect, Wanted};
use probe::SensorProbe;

use super::usage;
use crate::backend::cuda::library;
use crate::clock::Clock;
use crate::machine::{self, Roots};
use crate::meter::Choice;
use crate::meter::nvml::Library;
use crate::weights::registry::DEFAULT_MODEL;

/// Name and major version of the JSON form.
const SCHEMA: &str = "tokmeter-doctor/1";

/// How long other processes are watched.
const OBSERVE_NS: u64 = 300_000_000;
/// How long each share of the load lasts, and each window with or without the sensor read, where nothing else is asked
/// for, seconds.
const STEP_S: f64 = 4.0;
const WINDOW_S: f64 = 1.0;

/// What is here: devices, drivers, libraries, sensors, permissions; what could not be read, and the exact remedy
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tokmeter doctor\n  tokmeter doctor --device cuda:0 --format json\n  \
    tokmeter doctor --sensors\n  tokmeter doctor --sensors --device cuda:0 --format json > sensor.json\n  \
    tokmeter doctor --sampler-effect --device cuda:0 --pairs 40\n\n\
    Exit codes: 0 the device can run, 1 it cannot")]
pub struct Args {
    /// The device that is meant to run: auto, cpu or cuda:N
    #[arg(long, value_name = "auto|cpu|cuda:N", default_value = "auto")]
    device: Asked,
    /// Say how power sensors behave: every GPU's by reading it for some seconds; with --device cuda:N or cpu that device's
    /// under a load that is switched on and off, for a minute or two
    #[arg(long)]
    sensors: bool,
    /// Measure what reading the power sensor takes from decode steps: windows with and without it, in random order
    #[arg(long)]
    sampler_effect: bool,
    /// Pairs of windows
    #[arg(long, value_name = "N", default_value_t = 20, requires = "sampler_effect",
        value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pairs: u32,
    /// Time of each window, and of each share of the load that --sensors tries [default: 1, and 4]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// The sensor that is read: auto, nvml, rapl, hwmon, replay:FILE, csv:FILE
    #[arg(long, value_name = "SENSOR", default_value = "auto", requires = "sampler_effect")]
    power: Choice,
    /// Shapes of the model whose steps are timed; its weights are made up
    #[arg(long, short, value_name = "NAME|PATH", default_value = DEFAULT_MODEL, requires = "sampler_effect")]
    model: String,
    /// Draws the order of each pair
    #[arg(long, value_name = "N", default_value_t = 1, requires = "sampler_effect")]
    seed: u64,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// The device that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Auto,
    Cpu,
    Cuda(u32),
}

impl FromStr for Asked {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = || text.strip_prefix("cuda:")?.parse().ok();
        match text {
            "auto" => Ok(Asked::Auto),
            "cpu" => Ok(Asked::Cpu),
            _ => index().map(Asked::Cuda).ok_or_else(|| "expected auto, cpu or cuda:N".to_owned()),
        }
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Asked::Auto => write!(f, "auto"),
            Asked::Cpu => write!(f, "cpu"),
            Asked::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warn,
    Missing,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Missing => "missing",
        }
    }
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    section: &'static str,
    status: Status,
    what: String,
    value: String,
    remedy: Option<String>,
}

#[derive(Debug, Serialize)]
struct Findings {
    schema: &'static str,
    /// The device that was asked for can run.
    can_run: bool,
    findings: Vec<Finding>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sensor_probes: Vec<SensorProbe>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sampler_effect: Option<Effect>,
}

/// Collects the findings of one section.
struct Section {
    name: &'static str,
    findings: Vec<Finding>,
}

impl Section {
    fn new(name: &'static str) -> Self {
        Section { name, findings: Vec::new() }
    }

    fn ok(&mut self, what: impl Into<String>, value: impl Into<String>) {
        self.add(Status::Ok, what.into(), value.into(), None);
    }

    fn warn(&mut self, what: impl Into<String>, value: impl Into<String>, remedy: impl Into<String>) {
        self.add(Status::Warn, what.into(), value.into(), Some(remedy.into()));
    }

    fn missing(&mut self, what: impl Into<String>, value: impl Into<String>, remedy: Option<&str>) {
        self.add(Status::Missing, what.into(), value.into(), remedy.map(str::to_owned));
    }

    fn add(&mut self, status: Status, what: String, value: String, remedy: Option<String>) {
        self.findings.push(Finding { section: self.name, status, what, value, remedy });
    }
}

/// # Errors
/// When the command line makes no sense, or the sampler's effect cannot be measured.
pub fn run(args: Args) -> anyhow::Result<u8> {
    if let Some(seconds) = args.seconds
        && !(0.1..=3600.0).contains(&seconds)
    {
        return Err(usage(format!("--seconds is {seconds}, expected 0.1 to 3600")));
    }
    let ns = |default_s: f64| (args.seconds.unwrap_or(default_s) * 1e9) as u64;
    let mut findings = look(args.device);
    if args.sensors || args.sampler_effect {
        super::device::start_threads(None)?;
    }
    if args.sensors {
        let (section, probes) = probe::sensors(args.device, &Roots::default(), ns(STEP_S))?;
        findings.findings.extend(section.findings);
        findings.sensor_probes = probes;
    }
    if args.sampler_effect {
        let wanted = Wanted {
            asked: args.device,
            power: args.power,
            model: args.model,
            pairs: args.pairs,
            window_ns: ns(WINDOW_S),
            seed: args.seed,
        };
        let (section, effect) = effect::measure(&wanted)?;
        findings.findings.extend(section.findings);
        findings.sampler_effect = effect;
    }
    let text = match args.format {
        Format::Table => table(&findings),
        Format::Json => serde_json::to_string_pretty(&findings)? + "\n",
    };
    super::print(&text)?;
    Ok(u8::from(!findings.can_run))
}

fn look(asked: Asked) -> Findings {
    let roots = Roots::default();
    let variable = |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let interference = machine::observe(&roots, &Clock::monotonic(), OBSERVE_NS);
    let machine = machine::capture(&roots, &Library::open_default());
    let libraries = library::search_all(&roots.root, &variable);
    let (devices, can_run) = device::look(asked, &machine, &library::devices(), &libraries);
    let sections = [
        host::processor(&machine),
        host::memory(&machine),
        host::surroundings(&machine),
        host::quiet(&machine, &interference),
        devices,
        device::libraries(&libraries),
        environment::look(&machine, &roots),
        sensor::power(&roots, &libraries),
        sensor::models(&variable),
    ];
    Findings::of(can_run, sections.into_iter().flat_map(|section| section.findings).collect())
}

impl Findings {
    fn of(can_run: bool, findings: Vec<Finding>) -> Self {
        Findings { schema: SCHEMA, can_run, findings, sensor_probes: Vec::new(), sampler_effect: None }
    }
}

/// Sections with their findings in columns, and remedies below what they mend.
fn table(findings: &Findings) -> String {
    let width = findings.findings.iter().map(|finding| finding.what.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    let mut section = "";
    for finding in &findings.findings {
        if finding.section != section {
            let gap = if section.is_empty() { "" } else { "\n" };
            section = finding.section;
            text += &format!("{gap}{section}\n");
        }
        let status = finding.status.word();
        text += &format!("  {status:<7}  {:<width$}  {}\n", finding.what, finding.value);
        if let Some(remedy) = &finding.remedy {
            text += &format!("  {:<7}  {:<width$}  → {remedy}\n", "", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_asked_for_by_name() {
        assert_eq!("auto".parse(), Ok(Asked::Auto));
        assert_eq!("cuda:3".parse(), Ok(Asked::Cuda(3)));
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:99999999999", "CPU"] {
            assert!(text.parse::<Asked>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_table_has_columns_and_puts_a_remedy_below_its_finding() {
        let mut cpu = Section::new("cpu");
        cpu.ok("model", "Neoverse-V2");
        cpu.warn("governor", "powersave", "use performance");
        let mut devices = Section::new("devices");
        devices.missing("cuda", "no driver", None);
        let findings = [cpu.findings, devices.findings].concat();
        let expected = "cpu\n  ok       model     Neoverse-V2\n  warn     governor  powersave\n\
            \u{20}                    → use performance\n\ndevices\n  missing  cuda      no driver\n";
        assert_eq!(table(&Findings::of(true, findings)), expected);
    }

    #[test]
    fn this_machine_can_run_on_its_cpu_and_every_finding_says_something() {
        let findings = look(Asked::Cpu);
        assert!(findings.can_run);
        assert!(findings.findings.iter().all(|finding| !finding.value.is_empty()), "{findings:?}");
        let json = serde_json::to_value(&findings).unwrap();
        let rows = json["findings"].as_array().unwrap();
        assert_eq!(rows.len(), findings.findings.len());
        for section in [
            "cpu",
            "memory",
            "surroundings",
            "quiet",
            "devices",
            "libraries",
            "environment",
            "sensors",
            "models",
        ] {
            assert!(rows.iter().any(|row| row["section"] == section), "{section}");
        }
        let text = table(&findings);
        assert!(rows.iter().all(|row| text.contains(row["value"].as_str().unwrap())), "{text}");
    }
}
