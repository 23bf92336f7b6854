//! A planning site, as TOML: power, fleet, demand and money, every figure with its source, date and confidence, and beside
//! it what other sources say. Nothing here is computed.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::analysis::devices;
use crate::record::{Amount, CostMode, Currency, ExchangeRate};

/// Name and major version of the format.
pub const SITE_SCHEMA: &str = "tokmeter-site/1";
/// Largest site file that is read.
const LARGEST_FILE_BYTES: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    pub schema: String,
    pub id: String,
    pub name: String,
    /// Date at which the file was true.
    pub as_of: String,
    /// Planned, under construction, …, in the words of the sources.
    pub status: String,
    /// Calibration that fits by default, a path beside the repository's root.
    pub calibration: Option<String>,
    pub power: Power,
    pub fleet: Fleet,
    pub demand: Demand,
    pub money: Money,
    /// The calibration is of another device, and this is what is assumed of the difference.
    pub device_transfer: Option<DeviceTransfer>,
    /// What announcements say, word for word; `plan --lint` holds them against physics.
    #[serde(default)]
    pub claims: Vec<Claim>,
}

/// How far a figure may be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// The owner, the maker or the regulator says so.
    Primary,
    /// Press.
    Secondary,
    /// Follows from others by arithmetic.
    Computed,
    /// Chosen to be able to go on.
    Assumed,
}

/// A number, where it is from, and within what it may lie.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    pub value: f64,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub source: String,
    pub as_of: Option<String>,
    pub confidence: Confidence,
    pub note: Option<String>,
    /// What other sources say.
    #[serde(default)]
    pub others: Vec<OtherValue>,
}

/// The same figure from another source.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OtherValue {
    pub value: f64,
    pub source: String,
    pub as_of: Option<String>,
    pub note: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Power {
    /// Megawatts.
    pub contract_mw: Figure,
    pub capacity_kind: CapacityKind,
    /// Energy of the site over energy of its machines.
    pub pue: Figure,
    #[serde(default)]
    pub ramp: Vec<RampStep>,
}

/// What the contract's megawatts count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapacityKind {
    /// The whole site.
    Facility,
    /// The machines alone.
    It,
}

/// Power that is there from a date on.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RampStep {
    pub date: String,
    pub mw: f64,
    pub source: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Name of the device's sheet: `gb300`.
    pub device: String,
    /// Absent: as many as the power feeds.
    pub count: Option<Figure>,
    /// What is counted.
    pub unit: Unit,
    /// Absent: the sheet's all-in power.
    pub provisioned_w_per_gpu: Option<Figure>,
    /// Host, network and switches beside each board, W; absent: the sheet's all-in power less its board limit.
    pub overhead_w_per_gpu: Option<Figure>,
    /// What of the overhead stands outside the node, W: switches and optics. Absent: node and network are one boundary.
    pub network_w_per_gpu: Option<Figure>,
    /// A GPU's share of its node without work, W; absent: the sheet's.
    pub idle_w_per_gpu: Option<Figure>,
    /// Share of the time that a machine can work. No source gives one, so every site must state its own.
    pub availability: Figure,
}

/// Announcements count in all of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    Die,
    Gpu,
    Superchip,
    Rack,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demand {
    /// Share of the available time in which there is work.
    pub utilization: Figure,
    pub slo: Option<Slo>,
    pub mix: Vec<Shape>,
}

/// What a user is promised.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// Time per output token at most, ms.
    pub tpot_ms: Option<f64>,
    /// Time to the first token at most, ms, without queueing.
    pub ttft_ms: Option<f64>,
}

/// One kind of request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub name: String,
    pub isl: u32,
    pub osl: u32,
    /// Of the requests; all shares make 1.
    pub share: f64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Money {
    /// Of all results, and of the electricity's price.
    pub currency: Currency,
    /// Of the cost's amounts; converted by [`Money::fx`].
    pub cost_currency: Currency,
    /// What a device costs, as in a cost model.
    pub cost: CostMode,
    pub cost_source: String,
    pub cost_as_of: String,
    /// The fixed cost may be so many times as high.
    pub cost_factor: Option<Span>,
    /// Units of [`Money::currency`] per MWh.
    pub electricity_per_mwh: Figure,
    #[serde(default)]
    pub fx: BTreeMap<Currency, ExchangeRate>,
    /// What a million output tokens are sold for.
    pub price_per_mtok: Option<Amount>,
}

/// From, to.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    pub min: f64,
    pub max: f64,
}

/// What is assumed of a device that was not measured.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceTransfer {
    pub from: String,
    pub to: String,
    /// Tokens per second of the new device over the old.
    pub throughput_ratio: f64,
    /// Half the width of what it may be, as a share.
    pub uncertainty_share: f64,
    pub basis: String,
}

/// A sentence of an announcement with its numbers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Claim {
    /// So many units on so much power.
    Fleet { text: String, source: String, device: String, count: f64, unit: Unit, power_mw: f64 },
    /// Bandwidth of one rack's fabric, in `TB/s` or `Tbit/s`.
    Fabric { text: String, source: String, device: String, value: f64, unit: String },
    /// Millions for so much power. `scope`: `shell`, `shell_and_mep` or `full`.
    Capex { text: String, source: String, millions: f64, currency: Currency, scope: String, power_mw: f64 },
}

impl Figure {
    /// From, to: a figure without a range is its own.
    pub fn span(&self) -> Span {
        Span { min: self.min.unwrap_or(self.value), max: self.max.unwrap_or(self.value) }
    }
}

impl Site {
    /// Every figure of the site by its key, in the order of the file's tables.
    pub fn figures(&self) -> Vec<(&'static str, &Figure)> {
        let fleet = &self.fleet;
        let mut figures =
            vec![("power.contract_mw", &self.power.contract_mw), ("power.pue", &self.power.pue)];
        let optional = [
            ("fleet.count", &fleet.count),
            ("fleet.provisioned_w_per_gpu", &fleet.provisioned_w_per_gpu),
            ("fleet.overhead_w_per_gpu", &fleet.overhead_w_per_gpu),
            ("fleet.network_w_per_gpu", &fleet.network_w_per_gpu),
            ("fleet.idle_w_per_gpu", &fleet.idle_w_per_gpu),
        ];
        figures.extend(optional.into_iter().filter_map(|(key, figure)| Some((key, figure.as_ref()?))));
        figures.extend([
            ("fleet.availability", &fleet.availability),
            ("demand.utilization", &self.demand.utilization),
            ("money.electricity_per_mwh", &self.money.electricity_per_mwh),
        ]);
        figures
    }
}

impl Confidence {
    pub fn name(self) -> &'static str {
        match self {
            Confidence::Primary => "primary",
            Confidence::Secondary => "secondary",
            Confidence::Computed => "computed",
            Confidence::Assumed => "assumed",
        }
    }
}

/// Reads a site, with `--set key=value` applied to its text first.
///
/// # Errors
/// Names the file and the key.
pub fn read_site(path: &Path, settings: &[String]) -> anyhow::Result<Site> {
    let read = || {
        let size_bytes = std::fs::metadata(path)?.len();
        if size_bytes > LARGEST_FILE_BYTES {
            bail!("it has {size_bytes} bytes, expected a small TOML file");
        }
        parse_site(&std::fs::read_to_string(path)?, settings)
    };
    read().with_context(|| format!("{}: is no site", path.display()))
}

/// # Errors
/// Names the key, and the one that was probably meant.
pub fn parse_site(text: &str, settings: &[String]) -> anyhow::Result<Site> {
    let mut table: toml::Table = toml::from_str(text).map_err(|error| explained(&error, Some(text)))?;
    for setting in settings {
        set(&mut table, setting)?;
    }
    let site: Site = match settings.is_empty() {
        true => toml::from_str(text).map_err(|error| explained(&error, Some(text)))?,
        false => table.try_into().map_err(|error| explained(&error, None))?,
    };
    site.check()?;
    Ok(site)
}

/// TOML's message in one line, with the line's number and the key that was probably meant.
fn explained(error: &toml::de::Error, text: Option<&str>) -> anyhow::Error {
    let message = error.message().lines().next().unwrap_or("").to_owned();
    let place = match (error.span(), text) {
        (Some(span), Some(text)) => format!(" (line {})", text[..span.start].lines().count().max(1)),
        _ => String::new(),
    };
    let mut names = message.split('`').skip(1).step_by(2);
    let meant = names.next().and_then(|unknown| {
        let near = |name: &&str| strsim::damerau_levenshtein(unknown, name) <= 1 + unknown.len() / 4;
        names.filter(near).min_by_key(|name| strsim::damerau_levenshtein(unknown, name))
    });
    match meant.filter(|_| message.starts_with("unknown field")) {
        Some(name) => anyhow::anyhow!("{message}{place}\nhint: {name} was probably meant"),
        None => anyhow::anyhow!("{message}{place}"),
    }
}

/// `demand.utilization=0.8`: replaces a value that the file has. A figure becomes that number, without a range.
fn set(table: &mut toml::Table, setting: &str) -> anyhow::Result<()> {
    let (key, text) = setting.split_once('=').with_context(|| {
        format!("--set is '{setting}', expected key=value such as demand.utilization=0.8")
    })?;
    let parts: Vec<&str> = key.split('.').collect();
    let (last, path) = parts.split_last().expect("a split has a part");
    let mut here = table;
    for part in path {
        here = match here.get_mut(*part) {
            Some(toml::Value::Table(inner)) => inner,
            _ => bail!("--set {key}: the site has no table {part}"),
        };
    }
    let value =
        format!("value = {text}").parse::<toml::Table>().ok().and_then(|mut table| table.remove("value"));
    let value = value.unwrap_or_else(|| toml::Value::String(text.to_owned()));
    match here.get_mut(*last) {
        Some(toml::Value::Table(figure)) if figure.contains_key("value") => {
            figure.retain(|name, _| name == "note");
            figure.insert("value".to_owned(), value);
            figure.insert("source".to_owned(), "--set".into());
            figure.insert("confidence".to_owned(), "assumed".into());
        }
        Some(old) => *old = value,
        None => bail!("--set {key}: the site has no {last}; give a key that stands in the file"),
    }
    Ok(())
}

impl Site {
    /// Refuses what no site can be.
    fn check(&self) -> anyhow::Result<()> {
        if self.schema != SITE_SCHEMA {
            bail!("schema is '{}', expected '{SITE_SCHEMA}'", self.schema);
        }
        let fleet = &self.fleet;
        check_device("fleet.device", &fleet.device)?;
        let optional = |name, figure: &Option<Figure>, low, high| match figure {
            Some(figure) => check_figure(name, figure, low, high),
            None => Ok(()),
        };
        check_figure("power.contract_mw", &self.power.contract_mw, 1e-3, 1e5)?;
        check_figure("power.pue", &self.power.pue, 1.0, 3.0)?;
        optional("fleet.count", &fleet.count, 1.0, 1e9)?;
        optional("fleet.provisioned_w_per_gpu", &fleet.provisioned_w_per_gpu, 10.0, 2e4)?;
        optional("fleet.overhead_w_per_gpu", &fleet.overhead_w_per_gpu, 0.0, 2e4)?;
        optional("fleet.network_w_per_gpu", &fleet.network_w_per_gpu, 0.0, 2e4)?;
        optional("fleet.idle_w_per_gpu", &fleet.idle_w_per_gpu, 0.0, 2e4)?;
        check_figure("fleet.availability", &fleet.availability, 0.01, 1.0)?;
        check_figure("demand.utilization", &self.demand.utilization, 0.01, 1.0)?;
        check_figure("money.electricity_per_mwh", &self.money.electricity_per_mwh, 0.0, 1e6)?;
        for (index, step) in self.power.ramp.iter().enumerate() {
            between(&format!("power.ramp[{index}].mw"), step.mw, 1e-3, 1e5)?;
        }
        if let Some(span) = self.money.cost_factor {
            between("money.cost_factor.min", span.min, 0.01, 1.0)?;
            between("money.cost_factor.max", span.max, 1.0, 100.0)?;
        }
        if let Some(transfer) = &self.device_transfer {
            check_device("device_transfer.from", &transfer.from)?;
            check_device("device_transfer.to", &transfer.to)?;
            between("device_transfer.throughput_ratio", transfer.throughput_ratio, 0.01, 100.0)?;
            between("device_transfer.uncertainty_share", transfer.uncertainty_share, 0.0, 0.9)?;
        }
        self.check_demand()
    }

    fn check_demand(&self) -> anyhow::Result<()> {
        let mix = &self.demand.mix;
        let sum: f64 = mix.iter().map(|shape| shape.share).sum();
        if mix.is_empty() || (sum - 1.0).abs() > 1e-6 {
            bail!("demand.mix has shares that make {sum}, expected 1");
        }
        for shape in mix {
            let name = &shape.name;
            between(&format!("demand.mix {name}: share"), shape.share, 0.0, 1.0)?;
            between(&format!("demand.mix {name}: isl"), f64::from(shape.isl), 1.0, 1e8)?;
            between(&format!("demand.mix {name}: osl"), f64::from(shape.osl), 2.0, 1e8)?;
        }
        for limit in self.demand.slo.iter().flat_map(|slo| [slo.tpot_ms, slo.ttft_ms]).flatten() {
            between("demand.slo", limit, 0.01, 1e7)?;
        }
        Ok(())
    }
}

fn check_device(key: &str, name: &str) -> anyhow::Result<()> {
    if devices::device_sheet(name).is_none() {
        let known: Vec<&str> = devices::device_names().collect();
        bail!("{key} is '{name}', expected one of {}", known.join(", "));
    }
    Ok(())
}

fn check_figure(key: &str, figure: &Figure, low: f64, high: f64) -> anyhow::Result<()> {
    between(key, figure.value, low, high)?;
    let Span { min, max } = figure.span();
    between(&format!("{key}.min"), min, low, high)?;
    between(&format!("{key}.max"), max, low, high)?;
    if !(min <= figure.value && figure.value <= max) {
        bail!("{key} is {}, outside its own range of {min} to {max}", figure.value);
    }
    Ok(())
}

fn between(key: &str, value: f64, low: f64, high: f64) -> anyhow::Result<()> {
    if !(low..=high).contains(&value) {
        bail!("{key} is {value}, expected {low} to {high}");
    }
    Ok(())
}
