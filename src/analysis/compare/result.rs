//! The result of a comparison: format `tokmeter-comparison/1`, whose schema is committed as
//! `results/compare-schema.json`. Ratios are changes of the metric: −0.03 is three percent fewer tokens.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::effect::Noise;
use super::environment::{Declared, Difference};
use super::session::SessionId;
use super::verdict::{Rules, Verdict};
use crate::record::Maybe;

/// Name and major version of the format.
pub const SCHEMA: &str = "tokmeter-comparison/1";

/// The JSON Schema of the format: the text of `results/compare-schema.json`.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Comparison);
    serde_json::to_string_pretty(&schema).expect("a schema is plain JSON") + "\n"
}

/// The result that `text` holds.
///
/// # Errors
/// Says what was expected and what was found.
pub fn parse(text: &str) -> Result<Comparison, String> {
    /// The version decides before any field does.
    #[derive(Deserialize)]
    struct Head {
        schema: String,
    }
    let invalid = |error: serde_json::Error| format!("is no valid {SCHEMA}: {error}");
    let head: Head = serde_json::from_str(text).map_err(invalid)?;
    match head.schema.as_str() {
        SCHEMA => serde_json::from_str(text).map_err(invalid),
        other => Err(format!("has schema {other:.60}, expected {SCHEMA}")),
    }
}

/// Baseline against candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Comparison {
    /// `tokmeter-comparison/1`
    #[schemars(extend("const" = SCHEMA))]
    pub schema: String,
    /// Why this must not be used: a record in it is no measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_a_measurement: Option<String>,
    pub verdict: Verdict,
    /// What the cells say whatever the environment; missing when nothing was compared.
    pub verdict_of_the_cells: Maybe<Verdict>,
    /// A suspicious change of the environment, neither declared nor allowed, might explain any difference.
    pub confounded: bool,
    /// Why the verdict is what it is, most important first.
    pub reasons: Vec<String>,
    /// What to do next.
    pub next: Vec<String>,
    pub settings: Settings,
    pub baseline: Arm,
    pub candidate: Arm,
    pub noise: NoiseArm,
    pub environment: Vec<Difference>,
    pub cells: Vec<Comparand>,
    /// Geometric mean of all cells' throughput.
    pub aggregate: Maybe<Comparand>,
    pub why: Why,
    /// Cells and runs that were left out by rule.
    pub exclusions: Vec<String>,
    pub remarks: Vec<String>,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Settings {
    pub rules: Rules,
    /// Which look at a growing set of sessions this is, from 1; sets `rules.alpha`.
    pub look: u32,
    pub thresholds: Thresholds,
    pub declared: Declared,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            rules: Rules::default(),
            look: 1,
            thresholds: Thresholds::default(),
            declared: Declared::default(),
        }
    }
}

/// A metric that decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    Throughput,
    TokensPerJoule,
}

impl Metric {
    pub const ALL: [Metric; 2] = [Metric::Throughput, Metric::TokensPerJoule];

    /// As the command line and the JSON name it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Throughput => "throughput",
            Metric::TokensPerJoule => "tokens_per_joule",
        }
    }

    /// As tables name it.
    pub fn unit(self) -> &'static str {
        match self {
            Metric::Throughput => "tok/s",
            Metric::TokensPerJoule => "tok/J",
        }
    }
}

/// Losses that matter, as shares of the metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Thresholds {
    pub throughput_ratio: f64,
    pub tokens_per_joule_ratio: f64,
    /// Those of single cells.
    pub cells: Vec<CellThreshold>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CellThreshold {
    pub metric: Metric,
    pub cell: String,
    pub ratio: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Thresholds { throughput_ratio: 0.02, tokens_per_joule_ratio: 0.03, cells: Vec::new() }
    }
}

impl Thresholds {
    pub fn of(&self, metric: Metric, cell: &str) -> f64 {
        let own = self.cells.iter().rfind(|threshold| threshold.metric == metric && threshold.cell == cell);
        own.map_or(
            match metric {
                Metric::Throughput => self.throughput_ratio,
                Metric::TokensPerJoule => self.tokens_per_joule_ratio,
            },
            |threshold| threshold.ratio,
        )
    }
}

/// One side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Arm {
    pub files: Vec<String>,
    pub sessions: Vec<SessionId>,
    pub conditions: ConditionMeans,
}

/// What went on during the windows of one side, all cells together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ConditionMeans {
    pub window_s: f64,
    /// Time for which the power cap held the clock down.
    pub power_cap_s: Maybe<f64>,
    /// Time for which heat held the clock down.
    pub thermal_s: Maybe<f64>,
    /// Time for which the power supply's brake held the clock down.
    pub power_brake_s: Maybe<f64>,
    pub temperature_c: Maybe<f64>,
    pub foreign_share: Maybe<f64>,
    pub steal_share: Maybe<f64>,
}

/// Stored sessions between which nothing but chance differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NoiseArm {
    pub files: Vec<String>,
    /// Sessions of each batch of one environment.
    pub batches: Vec<u32>,
}

/// One metric of one cell on both sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Comparand {
    pub cell: String,
    pub metric: Metric,
    pub verdict: Verdict,
    /// Why the verdict is not the one that the numbers alone give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back: Option<HeldBack>,
    /// What a reader must know before using the numbers.
    pub notes: Vec<String>,
    pub sessions: SessionCounts,
    pub numbers: Maybe<Numbers>,
}

/// Why a verdict is INCONCLUSIVE whatever the numbers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HeldBack {
    /// It would pass, but on one side more than a third of the runs were not steady, or had their clocks held down by
    /// heat, the hardware or the power supply.
    UnsettledRuns,
    /// It would have regressed, but a library computes its large products by another algorithm than before: that is
    /// neither the driver's loss nor the device's.
    LibraryAlgorithm,
}

/// Sessions that have this cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SessionCounts {
    pub baseline: u32,
    pub candidate: u32,
    pub noise: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Numbers {
    /// Geometric means over sessions, in tokens/s or tokens/J.
    pub baseline: f64,
    pub candidate: f64,
    /// candidate ÷ baseline − 1
    pub effect_ratio: f64,
    /// Two-sided interval of the effect.
    pub interval_95_ratio: Maybe<[f64; 2]>,
    pub p_worse: Maybe<f64>,
    /// Adjusted for all tests that decide (Holm).
    pub p_worse_holm: Maybe<f64>,
    pub p_better_holm: Maybe<f64>,
    /// Loss that counts.
    pub threshold_ratio: f64,
    /// Standard deviation between sessions, of the logarithm.
    pub sigma: Maybe<f64>,
    pub sigma_source: Noise,
    pub degrees_of_freedom: f64,
    /// Smallest true change found in four of five comparisons like this one, alone and in this family of tests.
    pub detectable_ratio: Maybe<f64>,
    pub detectable_holm_ratio: Maybe<f64>,
    /// Sessions per side from which a change of the threshold's size would be found in four of five.
    pub sessions_needed: Maybe<u32>,
}

/// A change with its 95 % interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Part {
    pub effect_ratio: f64,
    pub interval_95_ratio: Maybe<[f64; 2]>,
}

/// What explains the difference. Nothing here decides, but that a library's other algorithm holds a regression back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Why {
    pub decompositions: Vec<Decomposition>,
    pub layers: Vec<Layer>,
    /// What the device can do at most, and its power, layer by layer.
    pub probes: Vec<Probe>,
    pub library: Library,
    /// Cells that were measured with kernels of both forms.
    pub forms: Vec<FormPair>,
    /// Latencies that moved, at a false discovery rate of 10 %.
    pub latencies: Vec<MovedLatency>,
    /// How many latencies were looked at.
    pub latencies_tested: u32,
    /// Static cells whose output tokens are others than before, each side agreeing with itself. Cells whose large
    /// products a library computes by another algorithm are not among them.
    pub outputs_changed: Vec<String>,
}

/// tokens/s = clock × tokens per cycle, and tokens/J = tokens/s ÷ watts, in logarithms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Decomposition {
    pub cell: String,
    pub throughput: Part,
    pub clock: Maybe<Part>,
    pub tokens_per_cycle: Maybe<Part>,
    pub tokens_per_joule: Maybe<Part>,
    pub power: Maybe<Part>,
}

/// Cells of one kind together; those whose large products a library computes apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Layer {
    pub layer: String,
    /// Compared cells, and those of them that regressed and improved.
    pub cells: u32,
    pub regressed: u32,
    pub improved: u32,
    /// Geometric mean of their throughputs' change; missing when no such cell was compared.
    pub effect_ratio: Maybe<f64>,
}

/// One measured ability of the device, or its power, on both sides: means over sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Probe {
    /// `launch`, `copy`, `memory`, `matmul`, `power` or `idle`
    pub layer: String,
    /// The field of the record that it comes from.
    pub what: String,
    /// `ns`, `bytes/s`, `flop/s` or `W`
    pub unit: String,
    /// More of it is a loss: a time, a power.
    pub is_better_low: bool,
    pub baseline: f64,
    pub candidate: f64,
    /// candidate ÷ baseline − 1
    pub effect_ratio: f64,
    pub interval_95_ratio: Maybe<[f64; 2]>,
}

/// The library that computes large products, and what it does otherwise than before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Library {
    /// Compared cells with products that it computes.
    pub cells: Vec<String>,
    pub algorithms: Vec<AlgorithmChange>,
    /// Cells whose output tokens changed where an algorithm did.
    pub outputs_changed: Vec<String>,
}

/// A product that no session of the candidate computes as any of the baseline did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AlgorithmChange {
    pub rows: u32,
    pub columns: u32,
    pub depth: u32,
    pub dtype: String,
    pub epilogue: String,
    /// All that a side's records name.
    pub baseline: Vec<Algorithm>,
    pub candidate: Vec<Algorithm>,
    /// Compared cells that compute it.
    pub cells: Vec<String>,
}

/// An algorithm by the library's own numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct Algorithm {
    pub algorithm_id: u32,
    pub tile_id: u32,
    pub stages_id: u32,
    pub split_k: u32,
}

/// One workload by kernels that this program compiled to machine code (`sass`), and by kernels that the driver compiled
/// from intermediate code (`ptx`). Where the second alone moves, the driver's compiler did it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FormPair {
    pub cell: String,
    pub sass: Verdict,
    pub sass_effect_ratio: f64,
    pub ptx: Verdict,
    pub ptx_effect_ratio: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MovedLatency {
    pub cell: String,
    pub latency: String,
    /// Positive is slower.
    pub effect_ratio: f64,
    pub p_adjusted: f64,
}
