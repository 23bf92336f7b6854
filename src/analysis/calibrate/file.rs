//! The calibration file: laws with their errors, what they were learnt from, and how far they may be trusted. Units and
//! every field: PLANNING.md.

use std::path::Path;

use anyhow::{Context as _, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ladder::PowerStep;
use super::law::Law;
use super::load::Phase;
use crate::record::{HoldOut, Maybe};

/// Name and major version of the format. A file with another major version is refused.
pub const CALIBRATION_SCHEMA: &str = "tokmeter-calibration/1";
/// Largest file that is read as a calibration.
const LARGEST_FILE_BYTES: u64 = 64 << 20;

/// The JSON Schema of the format: the text of `results/calibration-schema.json`.
pub fn calibration_schema() -> String {
    let schema = schemars::schema_for!(Calibration);
    let text = serde_json::to_string_pretty(&schema).expect("a schema is plain JSON");
    text + "\n"
}

/// Laws of time and energy for one model on one device under one engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// `tokmeter-calibration/1`
    #[schemars(extend("const" = CALIBRATION_SCHEMA))]
    pub schema: String,
    pub basis: Basis,
    /// Why this file must not be used as a calibration of a real machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_a_measurement: Option<String>,
    /// Version of the program that fitted it.
    pub tool_version: String,
    /// The command line that made it.
    pub command: Vec<String>,
    pub sources: Vec<Source>,
    pub subject: Subject,
    pub hold_out: Maybe<HoldOut>,
    pub laws: Vec<FittedLaw>,
    /// Mean power of one device without a model, W.
    pub idle_w: Maybe<f64>,
    /// Mean power of one device with the weights loaded and no work, W.
    pub ready_w: Maybe<f64>,
    /// From idle over a ramp of loads to what follows the load; empty without a power meter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub power_steps: Vec<PowerStep>,
    pub read_outs: Vec<ReadOut>,
    pub compositions: Vec<Composition>,
    pub grade: Grade,
    /// Sentences a user must know: why the grade is not better, what the fit does not beat, what was left out.
    pub notes: Vec<String>,
}

/// Whose numbers it was fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// Records of this program.
    Measured,
    /// Others' published figures; never better than grade C.
    Published,
}

impl Basis {
    pub fn name(self) -> &'static str {
        match self {
            Basis::Measured => "measured",
            Basis::Published => "published",
        }
    }
}

/// A file that was fitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// File name without its place.
    pub file: String,
    /// Of a record: over its canonical JSON. Of another file: over its bytes.
    pub sha256: String,
    /// Where the figures come from, in the file's own words; for records the time they were started.
    pub origin: String,
}

/// What the laws hold for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Name of the device's sheet (`h100`, `gb200`, …) where it has one, else what the driver or kernel calls it.
    pub device: String,
    /// Devices that hold the model together once.
    pub gpus_per_replica: u32,
    pub model: String,
    /// Type of products: `bf16`, `fp8`, …
    pub precision: String,
    /// `tokmeter/cuda`, `trtllm`, `vllm`, …
    pub engine: String,
    /// How the model is split over its devices, in the source's words.
    pub parallelism: Maybe<String>,
    /// Prompt tokens in one step at most.
    pub chunk_tokens: Maybe<u32>,
    /// Bytes of weights that a step reads.
    pub weights_bytes: Maybe<f64>,
    pub kv_bytes_per_token: Maybe<u64>,
    /// Tokens whose keys and values the engine had room for. The device may hold more.
    pub kv_tokens_held: Maybe<u64>,
}

/// What a law forecasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Seconds.
    Time,
    /// Joules of the devices' boards.
    Energy,
}

impl Quantity {
    pub fn name(self) -> &'static str {
        match self {
            Quantity::Time => "time",
            Quantity::Energy => "energy",
        }
    }
}

/// A law and how it was tested.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FittedLaw {
    pub quantity: Quantity,
    pub law: Law,
    /// Median over the points of the coefficient of variation of their runs.
    pub noise_floor_share: Maybe<f64>,
    /// On points that the law never saw, by fold.
    pub interior: Maybe<ErrorStatistics>,
    pub row: Maybe<ErrorStatistics>,
    pub frontier: Maybe<ErrorStatistics>,
    /// On each point that was learnt from, by the law refitted without it.
    pub leave_one_out: ErrorStatistics,
    pub baselines: Vec<Baseline>,
    /// Points that were learnt from and lie far off the law.
    pub outliers: Vec<Outlier>,
}

/// Relative errors over some points: forecast over measured, less 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ErrorStatistics {
    pub points: u32,
    /// Mean of the absolute errors.
    pub mape_share: f64,
    pub median_share: f64,
    pub p90_share: f64,
    /// Mean of the signed errors.
    pub signed_share: f64,
    pub worst_key: String,
    pub worst_share: f64,
    /// Points within their 90 % interval.
    pub coverage_share: f64,
}

/// Mean absolute relative error of a simpler forecast, by fold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// `constant`, `measured_roofline`, `spec_sheet_roofline` or `interpolation`
    pub name: String,
    pub interior_mape_share: Maybe<f64>,
    pub row_mape_share: Maybe<f64>,
    pub frontier_mape_share: Maybe<f64>,
}

/// A point far off its law.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Outlier {
    pub key: String,
    /// Measured over forecast.
    pub ratio: f64,
}

/// A coefficient as a physical rate, beside the ceiling that the same machine measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadOut {
    /// `decode_weights_bandwidth`, `decode_kv_bandwidth`, `decode_flops`, `prefill_flops` or `decode_launch_floor`
    pub name: String,
    /// `bytes_per_s`, `flops_per_s` or `s`
    pub unit: String,
    pub value: Maybe<f64>,
    /// Of the measured ceiling.
    pub share: Maybe<f64>,
    /// Whether a share above 1 refutes the fit. It does not where work of another kind hides this one.
    pub binding: bool,
}

/// Prefill and decode laws put together, held against a cell that does both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Composition {
    pub key: String,
    pub measured_output_tokens_per_s: f64,
    pub forecast_output_tokens_per_s: f64,
}

/// How good the hold-out errors are; the worst over all laws. PLANNING.md has the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Grade {
    A,
    B,
    C,
}

impl std::fmt::Display for Grade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Calibration {
    /// The law of a phase and a quantity.
    pub fn law(&self, phase: Phase, quantity: Quantity) -> Option<&Law> {
        let is_it = |fitted: &&FittedLaw| fitted.law.phase == phase && fitted.quantity == quantity;
        self.laws.iter().find(is_it).map(|fitted| &fitted.law)
    }
}

/// Reads a calibration of this format's major version.
///
/// # Errors
/// Names the file and what it is instead.
pub fn read_calibration(path: &Path) -> anyhow::Result<Calibration> {
    let read = || {
        let size_bytes = std::fs::metadata(path)?.len();
        if size_bytes > LARGEST_FILE_BYTES {
            bail!("has {size_bytes} bytes, expected a calibration of at most {LARGEST_FILE_BYTES}");
        }
        parse_calibration(&std::fs::read_to_string(path)?)
    };
    read().with_context(|| format!("{}: is no calibration", path.display()))
}

/// # Errors
/// Says what was expected and what was found.
pub fn parse_calibration(text: &str) -> anyhow::Result<Calibration> {
    let value: serde_json::Value = serde_json::from_str(text).context("it is no JSON")?;
    match value.get("schema").and_then(serde_json::Value::as_str) {
        Some(CALIBRATION_SCHEMA) => {}
        Some(other) if other.starts_with("tokmeter-calibration/") => bail!(
            "it has schema {other}, expected {CALIBRATION_SCHEMA}; it was made by another version of tokmeter"
        ),
        Some(other) if other.starts_with("tokmeter-record/") => bail!(
            "it is a record, expected {CALIBRATION_SCHEMA}\nhint: tokmeter calibrate makes one from records"
        ),
        Some(other) => bail!("it has schema {other:.60}, expected {CALIBRATION_SCHEMA}"),
        None => bail!("it has no field schema, expected {CALIBRATION_SCHEMA}"),
    }
    let calibration: Calibration = serde_json::from_str(text)?;
    calibration.check()?;
    Ok(calibration)
}

impl Calibration {
    /// What the program itself would never write.
    fn check(&self) -> anyhow::Result<()> {
        if self.basis == Basis::Published && self.grade != Grade::C {
            bail!("its basis is published and its grade {}, expected C", self.grade);
        }
        if !(1..=100_000).contains(&self.subject.gpus_per_replica) {
            bail!("subject.gpus_per_replica is {}, expected 1 to 100000", self.subject.gpus_per_replica);
        }
        for (index, fitted) in self.laws.iter().enumerate() {
            check_law(&fitted.law).with_context(|| format!("laws[{index}]"))?;
        }
        if self.laws.is_empty() {
            bail!("it has no laws");
        }
        Ok(())
    }
}

fn check_law(law: &Law) -> anyhow::Result<()> {
    let is_sound = |value: &f64| value.is_finite() && *value >= 0.0;
    let terms = law.coefficients.len();
    if terms == 0 || !law.coefficients.iter().all(|coefficient| is_sound(&coefficient.value)) {
        bail!("a coefficient is negative or no number, or there is none");
    }
    if law.without_one.is_empty() || law.without_one.len() != law.errors_without_one.len() {
        bail!("without_one and errors_without_one differ in length or are empty");
    }
    if !law.without_one.iter().all(|values| values.len() == terms && values.iter().all(is_sound)) {
        bail!("without_one has other than {terms} coefficients of at least 0 in each entry");
    }
    if law.domain.values().any(|range| !(range.min > 0.0 && range.min <= range.max)) {
        bail!("domain has a range that is empty or not positive");
    }
    Ok(())
}
