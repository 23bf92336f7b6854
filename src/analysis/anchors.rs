//! Published figures of others, and how far a cell lies from those of the same model, load, precision and GPU. They are
//! bands of plausibility for a reader, never a pass or a fail. One TOML file per source under `results/anchors/`,
//! embedded in the binary; `results/anchors/README.md` describes their fields.

use std::sync::LazyLock;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use super::{Throughput, TokenKind};
use crate::record::{Cell, Maybe, Record, Workload};

const FILES: [(&str, &str); 8] = [
    ("inferencemax-1.toml", include_str!("../../results/anchors/inferencemax-1.toml")),
    ("mistral-rs-0.8.2.toml", include_str!("../../results/anchors/mistral-rs-0.8.2.toml")),
    ("ml-energy-3.0.toml", include_str!("../../results/anchors/ml-energy-3.0.toml")),
    ("mlperf-inference-5.1.toml", include_str!("../../results/anchors/mlperf-inference-5.1.toml")),
    ("mlperf-inference-6.0.toml", include_str!("../../results/anchors/mlperf-inference-6.0.toml")),
    ("tensorrt-llm-0.x.toml", include_str!("../../results/anchors/tensorrt-llm-0.x.toml")),
    ("tensorrt-llm-1.0.toml", include_str!("../../results/anchors/tensorrt-llm-1.0.toml")),
    ("tensorrt-llm-1.x.toml", include_str!("../../results/anchors/tensorrt-llm-1.x.toml")),
];

const SCHEMA: &str = "anchors/1";
/// Watts, joules per token and tokens per second of one row must agree within this.
const AGREEMENT: f64 = 0.02;
/// Beyond this many times, either way, one of the two is likely wrong.
const PLAUSIBLE_TIMES: f64 = 4.0;
/// Words in a GPU's name that make it another product than the one without.
const OTHER_PRODUCTS: [&str; 5] = ["PCIe", "NVL", "MIG", "CNX", "Laptop"];

/// One source and its figures.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorFile {
    pub schema: String,
    pub name: String,
    /// The document, and its version.
    pub source: String,
    /// Date, month or year that the source bears.
    pub published: Option<String>,
    /// When it was read.
    pub read_on: String,
    /// What ran, where a row names no other.
    pub engine: String,
    pub notes: Option<String>,
    pub anchors: Vec<Anchor>,
}

/// One published row; a figure that the source does not give is absent. Rates are of all GPUs together unless named
/// otherwise.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    pub gpu: String,
    pub gpus: Option<u32>,
    pub model: String,
    /// `bf16`, `fp8`, …, or `not stated`
    pub precision: String,
    pub load: Load,
    pub engine: Option<String>,
    /// Who measured, where it is not the source itself.
    pub by: Option<String>,
    pub output_tokens_per_s: Option<f64>,
    pub output_tokens_per_s_per_gpu: Option<f64>,
    pub input_tokens_per_s: Option<f64>,
    pub watts: Option<f64>,
    /// Per output token.
    pub joules_per_token: Option<f64>,
    pub tokens_per_joule: Option<f64>,
    pub power_scope: Option<PowerScope>,
    /// Median.
    pub itl_p50_ms: Option<f64>,
    pub tokens_per_s_per_provisioned_mw: Option<f64>,
}

/// What a power reading includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PowerScope {
    /// All GPUs of the row.
    Gpu,
    /// The whole server, at its plug.
    Wall,
}

/// The load of a published row.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Load {
    /// All requests handed over at once, lengths in tokens.
    Offline {
        isl: u32,
        osl: u32,
    },
    /// At most `batch` conversations at once, of many lengths.
    Chat {
        task: String,
        batch: u32,
    },
    Decode {
        batch: u32,
        depth: u32,
        osl: u32,
    },
    Prefill {
        batch: u32,
        isl: u32,
    },
    MlperfOffline {},
    MlperfServer {},
    MlperfInteractive {},
    /// The most at a promised speed for each user.
    Interactivity {
        lengths: String,
        tokens_per_s_per_user: f64,
    },
}

/// How far a cell lies from a published figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// Source, engine, GPU and load.
    pub anchor: String,
    pub figure: Figure,
    pub published: f64,
    pub ours: f64,
    /// `ours / published − 1`
    pub difference_ratio: f64,
}

impl Distance {
    fn new(anchor: &str, figure: Figure, published: f64, ours: f64) -> Self {
        let difference_ratio = ours / published - 1.0;
        Distance { anchor: anchor.to_owned(), figure, published, ours, difference_ratio }
    }

    /// More than `PLAUSIBLE_TIMES` apart: look for a mistake, here or there.
    pub fn is_implausible(&self) -> bool {
        let times = self.ours / self.published;
        !(1.0 / PLAUSIBLE_TIMES..=PLAUSIBLE_TIMES).contains(&times)
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    InputTokensPerS,
    OutputTokensPerS,
    OutputTokensPerSPerGpu,
    JoulesPerToken,
}

static EMBEDDED: LazyLock<Vec<AnchorFile>> = LazyLock::new(|| {
    let parse = |(name, text): (&str, &str)| {
        parse_anchors(text).with_context(|| name.to_owned()).expect("a test reads every embedded file")
    };
    FILES.into_iter().map(parse).collect()
});

/// All sources that come with the program.
pub fn embedded_anchors() -> &'static [AnchorFile] {
    &EMBEDDED
}

/// Anchors from TOML.
///
/// # Errors
/// Names the row and what is wrong in it.
pub fn parse_anchors(text: &str) -> anyhow::Result<AnchorFile> {
    let file: AnchorFile = toml::from_str(text)?;
    ensure!(file.schema == SCHEMA, "schema is '{}', expected '{SCHEMA}'", file.schema);
    ensure!(is_date(&file.read_on), "read_on is '{}', expected a date such as 2026-11-22", file.read_on);
    if let Some(published) = &file.published {
        ensure!(is_date(published), "published is '{published}', expected a date, a month or a year");
    }
    ensure!(!file.anchors.is_empty(), "has no anchors, expected one at least");
    for (index, anchor) in file.anchors.iter().enumerate() {
        anchor.check().with_context(|| format!("anchors[{index}] {} {}", anchor.gpu, anchor.model))?;
    }
    Ok(file)
}

/// `2026`, `2026-11` or `2026-11-22`.
fn is_date(text: &str) -> bool {
    let padded = match text.len() {
        4 => format!("{text}-01-01"),
        7 => format!("{text}-01"),
        _ => text.to_owned(),
    };
    padded.len() == 10 && padded.parse::<jiff::civil::Date>().is_ok()
}

impl Anchor {
    fn figures(&self) -> [(&'static str, Option<f64>); 8] {
        [
            ("output_tokens_per_s", self.output_tokens_per_s),
            ("output_tokens_per_s_per_gpu", self.output_tokens_per_s_per_gpu),
            ("input_tokens_per_s", self.input_tokens_per_s),
            ("watts", self.watts),
            ("joules_per_token", self.joules_per_token),
            ("tokens_per_joule", self.tokens_per_joule),
            ("itl_p50_ms", self.itl_p50_ms),
            ("tokens_per_s_per_provisioned_mw", self.tokens_per_s_per_provisioned_mw),
        ]
    }

    fn check(&self) -> anyhow::Result<()> {
        for (name, text) in [("gpu", &self.gpu), ("model", &self.model), ("precision", &self.precision)] {
            ensure!(!text.trim().is_empty(), "{name} is empty");
        }
        ensure!(self.gpus != Some(0), "gpus is 0, expected one at least");
        let given: Vec<(&str, f64)> =
            self.figures().into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        ensure!(!given.is_empty(), "has no figure");
        for (name, value) in given {
            ensure!(value.is_finite() && value > 0.0, "{name} is {value}, expected a positive number");
        }
        let is_energy = self.watts.or(self.joules_per_token).or(self.tokens_per_joule).is_some();
        ensure!(
            is_energy == self.power_scope.is_some(),
            "power_scope stands with watts and joules, and only there"
        );
        if let (Some(watts), Some(joules), Some(rate)) =
            (self.watts, self.joules_per_token, self.output_tokens_per_s)
        {
            agree("watts", watts, "joules_per_token × output_tokens_per_s", joules * rate)?;
        }
        if let (Some(tokens), Some(joules)) = (self.tokens_per_joule, self.joules_per_token) {
            agree("tokens_per_joule", tokens, "1 / joules_per_token", 1.0 / joules)?;
        }
        Ok(())
    }

    /// Whether this row is of the cell's model, precision, GPUs and load.
    fn is_of(&self, record: &Record, cell: &Cell) -> bool {
        self.precision == record.engine.compute_dtype
            && self.gpus.is_some_and(|gpus| gpus as usize == cell.devices.len())
            && words(&self.model).is_within(&words(&record.model.name))
            && cell.devices.iter().all(|device| is_gpu(record, device, &self.gpu))
            && self.load.is_of(&cell.workload)
    }
}

fn agree(name: &str, value: f64, other_name: &str, other: f64) -> anyhow::Result<()> {
    let apart = value / other - 1.0;
    ensure!(
        apart.abs() <= AGREEMENT,
        "{name} is {value}, expected {other_name} = {other:.4} within {:.0} %",
        AGREEMENT * 100.0
    );
    Ok(())
}

impl Load {
    fn is_of(&self, workload: &Workload) -> bool {
        match (self, workload) {
            (Load::Offline { isl, osl }, Workload::Generate { isl: i, osl: o, .. })
            | (Load::Offline { isl, osl }, Workload::ServeClosed { isl: i, osl: o, .. }) => {
                isl == i && osl == o
            }
            (Load::Chat { batch, .. }, Workload::ServeClosed { concurrency, .. }) => batch == concurrency,
            (Load::Chat { batch, .. }, Workload::Decode { batch: b, .. }) => batch == b,
            (Load::Decode { batch, depth, .. }, Workload::Decode { batch: b, depth: d, .. }) => {
                batch == b && depth == d
            }
            (Load::Prefill { batch, isl }, Workload::Prefill { batch: b, isl: i }) => batch == b && isl == i,
            _ => false,
        }
    }

    fn describe(&self) -> String {
        match self {
            Load::Offline { isl, osl } => format!("ISL {isl}, OSL {osl}, all at once"),
            Load::Chat { task, batch } => format!("bs{batch}, {task}, other lengths"),
            Load::Decode { batch, depth, osl } => format!("bs{batch}, depth {depth}, OSL {osl}"),
            Load::Prefill { batch, isl } => format!("bs{batch}, ISL {isl}"),
            Load::MlperfOffline {} => "offline".to_owned(),
            Load::MlperfServer {} => "server".to_owned(),
            Load::MlperfInteractive {} => "interactive".to_owned(),
            Load::Interactivity { lengths, tokens_per_s_per_user } => {
                format!("{lengths} at {tokens_per_s_per_user} tok/s/user")
            }
        }
    }
}

/// A name as its words, so that `B200` is not found in `GB200`, nor `3-8b` in `0.3-8b`.
struct Words(Vec<String>);

fn words(name: &str) -> Words {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    Words(words.map(str::to_ascii_lowercase).collect())
}

impl Words {
    /// All of them, in order and side by side.
    fn is_within(&self, other: &Words) -> bool {
        !self.0.is_empty() && other.0.windows(self.0.len()).any(|part| part == self.0)
    }

    fn has(&self, word: &str) -> bool {
        self.0.contains(&word.to_ascii_lowercase())
    }
}

/// Whether `device` (`cuda:0`) of the record is such a GPU. A CPU never is.
fn is_gpu(record: &Record, device: &str, gpu: &str) -> bool {
    let index = device.strip_prefix("cuda:").and_then(|index| index.parse::<u32>().ok());
    let found = record.machine.gpus.iter().find(|found| Some(found.index) == index);
    let Some(name) = found.and_then(|found| found.name.value()) else { return false };
    let (wanted, name) = (words(gpu), words(name));
    wanted.is_within(&name) && OTHER_PRODUCTS.iter().all(|word| wanted.has(word) == name.has(word))
}

/// The distances of one cell, given its rate and the joules of its tokens.
pub(super) fn distances(
    record: &Record,
    cell: &Cell,
    throughput: &Maybe<Throughput>,
    joules_per_token: &Maybe<f64>,
) -> Vec<Distance> {
    let Maybe::Value(throughput) = throughput else { return Vec::new() };
    let mut found = Vec::new();
    for file in embedded_anchors() {
        for anchor in file.anchors.iter().filter(|anchor| anchor.is_of(record, cell)) {
            let engine = anchor.engine.as_ref().unwrap_or(&file.engine);
            let name = format!("{} ({engine}), {}, {}", file.name, anchor.gpu, anchor.load.describe());
            let pairs = compared(anchor, cell, throughput, of_gpus_alone(record, joules_per_token));
            found.extend(
                pairs
                    .into_iter()
                    .map(|(figure, published, ours)| Distance::new(&name, figure, published, ours)),
            );
        }
    }
    found
}

/// Published and own value of every figure that both have.
fn compared(
    anchor: &Anchor,
    cell: &Cell,
    throughput: &Throughput,
    joules_per_token: Option<f64>,
) -> Vec<(Figure, f64, f64)> {
    let rate = throughput.tokens_per_s;
    let per_gpu = rate / cell.devices.len().max(1) as f64;
    let of_gpus = anchor.power_scope == Some(PowerScope::Gpu);
    let joules = joules_per_token.filter(|_| of_gpus && throughput.tokens == TokenKind::Output);
    let rates = match throughput.tokens {
        TokenKind::Input => vec![(Figure::InputTokensPerS, anchor.input_tokens_per_s, Some(rate))],
        TokenKind::Output => vec![
            (Figure::OutputTokensPerS, anchor.output_tokens_per_s, Some(rate)),
            (Figure::OutputTokensPerSPerGpu, anchor.output_tokens_per_s_per_gpu, Some(per_gpu)),
            (Figure::JoulesPerToken, anchor.joules_per_token, joules),
        ],
    };
    rates.into_iter().filter_map(|(figure, published, ours)| Some((figure, published?, ours?))).collect()
}

/// Joules of a token where the meter reads the GPUs and nothing else, as the published joules do.
fn of_gpus_alone(record: &Record, joules_per_token: &Maybe<f64>) -> Option<f64> {
    let reads_gpus = record.meter.scope.value().is_some_and(|scope| scope == "gpu");
    joules_per_token.value().filter(|_| reads_gpus).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_file_is_valid_and_embedded() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("results/anchors");
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut names: Vec<String> = entries
            .filter(|path| path.extension().is_some_and(|ending| ending == "toml"))
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        assert_eq!(names, FILES.map(|(name, _)| name.to_owned()));
        for (name, text) in FILES {
            parse_anchors(text).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        }
        assert_eq!(embedded_anchors().len(), FILES.len());
    }

    #[test]
    fn figures_are_those_of_the_sources() {
        let find = |file: &str, gpu: &str, model: &str, load: Load| {
            let file = embedded_anchors().iter().find(|found| found.name == file).unwrap();
            let is_it = |anchor: &&Anchor| anchor.gpu == gpu && anchor.model == model && anchor.load == load;
            file.anchors.iter().find(is_it).unwrap().clone()
        };
        let chat = |batch| Load::Chat { task: "lm-arena-chat".to_owned(), batch };
        let h100 = find("ML.ENERGY 3.0", "H100", "llama-3.1-8b", chat(8));
        assert_eq!((h100.joules_per_token, h100.watts), (Some(0.4548), Some(486.0)));
        let h200 = find("TensorRT-LLM 1.0", "H200", "llama-3.3-70b", Load::Offline { isl: 2048, osl: 2048 });
        assert_eq!(h200.output_tokens_per_s, Some(2003.0));
        let per_gpu =
            find("TensorRT-LLM after 1.0", "H100", "gpt-oss-120b", Load::Offline { isl: 1024, osl: 32768 });
        assert_eq!((per_gpu.gpus, per_gpu.output_tokens_per_s_per_gpu), (Some(4), Some(1177.0)));
        let wall = find("MLPerf Inference 5.1", "B200", "llama-3.1-8b", Load::MlperfOffline {});
        assert_eq!((wall.watts, wall.power_scope), (Some(9436.05), Some(PowerScope::Wall)));
    }

    #[test]
    fn a_wrong_row_is_refused_with_its_field() {
        let file = |row: &str| {
            let head =
                "schema = 'anchors/1'\nname = 'n'\nsource = 's'\nread_on = '2026-11-22'\nengine = 'e'\n";
            let base = "gpu = 'H100', gpus = 1, model = 'm', precision = 'bf16'";
            parse_anchors(&format!("{head}anchors = [ {{ {base}, {row} }} ]"))
        };
        let load = "load = { kind = 'prefill', batch = 1, isl = 8 }";
        assert!(file(&format!("{load}, input_tokens_per_s = 5")).is_ok());
        let energy = "power_scope = 'gpu', output_tokens_per_s = 1000, joules_per_token = 0.5";
        assert!(file(&format!("{load}, {energy}, watts = 509")).is_ok());
        let cases = [
            (load.to_owned(), "has no figure"),
            (format!("{load}, input_tokens_per_s = -5"), "input_tokens_per_s is -5"),
            (format!("{load}, input_tokens_per_s = nan"), "input_tokens_per_s is NaN"),
            (format!("{load}, {energy}, watts = 511"), "watts is 511"),
            (format!("{load}, watts = 500"), "power_scope"),
            (
                format!("{load}, power_scope = 'gpu', joules_per_token = 0.5, tokens_per_joule = 2.1"),
                "tokens_per_joule",
            ),
            (format!("{load}, input_tokens_per_second = 5"), "unknown field"),
            ("load = { kind = 'decode', batch = 1 }, output_tokens_per_s = 1".to_owned(), "missing field"),
        ];
        for (row, expected) in cases {
            let error = format!("{:#}", file(&row).expect_err(expected));
            assert!(error.contains(expected), "{error}, expected {expected}");
        }
        let dated = |date: &str| {
            parse_anchors(&format!(
                "schema = 'anchors/1'\nname = 'n'\nsource = 's'\nread_on = '{date}'\nengine = 'e'\nanchors = [ {{ gpu = 'G', \
                 model = 'm', precision = 'p', {load}, input_tokens_per_s = 5 }} ]"
            ))
        };
        assert!(dated("2026").is_ok() && dated("2026-02").is_ok());
        for date in ["2026-13-01", "yesterday", "2026-02-30", ""] {
            assert!(format!("{:#}", dated(date).unwrap_err()).contains("read_on is"), "{date}");
        }
    }

    #[test]
    fn names_match_by_whole_words() {
        let within = |part: &str, whole: &str| words(part).is_within(&words(whole));
        assert!(
            within("H100", "NVIDIA H100 80GB HBM3")
                && within("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell")
        );
        assert!(within("llama-3.1-8b", "Meta-Llama-3.1-8B-Instruct"));
        assert!(
            !within("B200", "NVIDIA GB200") && !within("llama-3.1-8b", "llama-3.1-80b") && !within("", "x")
        );
    }
}
