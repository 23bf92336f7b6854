//! Records and calibrations in the formats that planners, dashboards and digital twins already read: one file per format,
//! each opening with its consumer, that consumer's version, and the unit of each field. What was not measured is left out
//! or named as such, never made up. Pure functions of files; EXPORT.md is the table of it all.

mod aic_system;
mod csv;
mod dps_device;
mod dynamo_fpm;
mod dynamo_profile;
mod fleet_sim;
mod inferencex;
mod mlperf_power;
mod prometheus;
mod simready_rack;
mod subject;
mod windows;

use std::collections::BTreeMap;

use crate::analysis::calibrate::Calibration;
use crate::record::{Record, canonical_sha256};

/// What an export is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Prometheus,
    Csv,
    DynamoFpm,
    DynamoProfile,
    InferenceX,
    MlperfPower,
    AicSystem,
    FleetSim,
    DpsDevice,
    SimreadyRack,
}

/// Who reads a format, and where its fields come from.
#[derive(Clone, Copy, Debug)]
pub struct About {
    pub name: &'static str,
    /// Kinds and numbers of files that it is made from.
    pub made_from: &'static str,
    /// What the export is, with the program that reads it.
    pub consumer: &'static str,
    /// Version or commit of the consumer that was looked at, and where.
    pub source: &'static str,
    /// Facts that no benchmark measures, given with `--set`.
    pub settings: &'static [Setting],
    /// Field with its unit, and what it is derived from.
    pub fields: &'static [(&'static str, &'static str)],
}

/// A fact that the user gives.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub key: &'static str,
    pub meaning: &'static str,
}

/// One of the files that an export is made from.
#[derive(Clone, Debug)]
pub struct Given {
    /// Name without its place.
    pub file: String,
    pub content: Content,
}

#[derive(Clone, Debug)]
pub enum Content {
    Record(Box<Record>),
    Calibration(Box<Calibration>),
}

/// Facts by key.
pub type Settings = BTreeMap<String, String>;

/// The file, and sentences about what it lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    pub text: String,
    pub notes: Vec<String>,
}

/// Why nothing was exported: a sentence, and on a further line a hint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

impl Format {
    pub const ALL: [Format; 10] = [
        Format::Prometheus,
        Format::Csv,
        Format::DynamoFpm,
        Format::DynamoProfile,
        Format::InferenceX,
        Format::MlperfPower,
        Format::AicSystem,
        Format::FleetSim,
        Format::DpsDevice,
        Format::SimreadyRack,
    ];

    pub fn about(self) -> &'static About {
        match self {
            Format::Prometheus => &prometheus::ABOUT,
            Format::Csv => &csv::ABOUT,
            Format::DynamoFpm => &dynamo_fpm::ABOUT,
            Format::DynamoProfile => &dynamo_profile::ABOUT,
            Format::InferenceX => &inferencex::ABOUT,
            Format::MlperfPower => &mlperf_power::ABOUT,
            Format::AicSystem => &aic_system::ABOUT,
            Format::FleetSim => &fleet_sim::ABOUT,
            Format::DpsDevice => &dps_device::ABOUT,
            Format::SimreadyRack => &simready_rack::ABOUT,
        }
    }

    /// The format of this name.
    pub fn named(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.about().name == name)
    }
}

/// The files as `format`.
///
/// # Errors
/// When the files are not of the kinds that the format is made from, or lack what it needs.
pub fn export(format: Format, given: &[Given], settings: &Settings) -> Result<Exported, Refusal> {
    let about = format.about();
    match format {
        Format::Prometheus => prometheus::export(&records(about, given)?),
        Format::Csv => csv::export(&records(about, given)?),
        Format::DynamoFpm => dynamo_fpm::export(&records_of_one_subject(about, given)?),
        Format::DynamoProfile => dynamo_profile::export(&records_of_one_subject(about, given)?),
        Format::InferenceX => inferencex::export(&records(about, given)?),
        Format::MlperfPower => mlperf_power::export(&one_record(about, given)?, settings),
        Format::AicSystem => aic_system::export(&one_record(about, given)?),
        Format::FleetSim => fleet_sim::export(given, settings),
        Format::DpsDevice => dps_device::export(&one_record(about, given)?),
        Format::SimreadyRack => simready_rack::export(&one_record(about, given)?, settings),
    }
}

/// A record, the name of its file, and its hash over its canonical JSON.
#[derive(Clone, Debug)]
struct Source<'a> {
    file: &'a str,
    record: &'a Record,
    sha256: String,
}

impl<'a> Source<'a> {
    fn of(file: &'a str, record: &'a Record) -> Result<Self, Refusal> {
        let sha256 = canonical_sha256(record)
            .map_err(|error| Refusal(format!("{file}: has no canonical form: {error:#}")))?;
        Ok(Source { file, record, sha256 })
    }

    /// The hash's first digits: enough to tell records apart.
    fn id(&self) -> &str {
        &self.sha256[..12]
    }

    /// Begins a refusal of this record.
    fn refuse(&self, what: impl std::fmt::Display) -> Refusal {
        Refusal(format!("{}: {what}", self.file))
    }
}

fn records<'a>(about: &About, given: &'a [Given]) -> Result<Vec<Source<'a>>, Refusal> {
    let mut sources: Vec<Source<'a>> = Vec::new();
    for Given { file, content } in given {
        let Content::Record(record) = content else {
            return Err(Refusal(format!(
                "{file}: is a calibration, and {} is made from {}\nhint: give the records that it was fitted to",
                about.name, about.made_from
            )));
        };
        let source = Source::of(file, record)?;
        if let Some(twin) = sources.iter().find(|other| other.sha256 == source.sha256) {
            return Err(source.refuse(format!("is the same record as {}\nhint: give it once", twin.file)));
        }
        sources.push(source);
    }
    Ok(sources)
}

fn one_record<'a>(about: &About, given: &'a [Given]) -> Result<Source<'a>, Refusal> {
    let mut sources = records(about, given)?;
    match (sources.pop(), sources.len()) {
        (Some(source), 0) => Ok(source),
        (_, rest) => Err(Refusal(format!(
            "{} is made from one record, got {}\nhint: export each of them to a file of its own",
            about.name,
            rest + 1
        ))),
    }
}

/// Records whose points go into one file: they must be of the same thing.
fn records_of_one_subject<'a>(about: &About, given: &'a [Given]) -> Result<Vec<Source<'a>>, Refusal> {
    let sources = records(about, given)?;
    for other in sources.iter().skip(1) {
        let (first, name) = (&sources[0], about.name);
        if let Some((what, one, another)) = subject::differing(first.record, other.record) {
            return Err(other.refuse(format!(
                "has {what} {another}, expected {one} as in {}: {name} puts all points into one file\n\
                 hint: export each of them to a file of its own",
                first.file
            )));
        }
    }
    Ok(sources)
}

fn as_json(value: &impl serde::Serialize) -> Result<String, Refusal> {
    match serde_json::to_string_pretty(value) {
        Ok(text) => Ok(text + "\n"),
        Err(error) => Err(Refusal(format!("a number cannot be written as JSON: {error}"))),
    }
}
