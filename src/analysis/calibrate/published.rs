//! Others' published serving rows → laws of serving, one for each system, model and way of running it. A row with its
//! concurrency gives the time per output token of a request; rows without give a saturated replica's. Medians over
//! repeated rows. Whatever comes of it is labelled published, and graded C: nobody can look behind a published number.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::file::{Basis, CALIBRATION_SCHEMA, Calibration, Grade, Quantity, Source, Subject};
use super::law::{Law, Points};
use super::load::{Load, Phase};
use super::observe::Fold;
use super::score::{self, Measured};
use super::{LEAST_POINTS, Refusal};
use crate::analysis::nnls::median;
use crate::record::{Maybe, hex};

/// Largest file of rows that is read.
const LARGEST_FILE_BYTES: u64 = 256 << 20;
/// Columns of the plain form.
const COLUMNS: [&str; 12] = [
    "system",
    "gpus",
    "engine",
    "model",
    "precision",
    "parallelism",
    "experts",
    "isl",
    "osl",
    "concurrency",
    "output_tokens_per_s",
    "source",
];

/// What rows must share to be fitted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    pub system: String,
    pub gpus: u32,
    pub engine: String,
    pub model: String,
    pub precision: String,
    pub parallelism: String,
    /// A mixture of experts, which needs a term of its own.
    pub has_experts: bool,
}

impl Group {
    /// `h200/trtllm/Llama-3.1-70B/fp8/tp1`
    pub fn name(&self) -> String {
        let model = self.model.rsplit('/').next().unwrap_or(&self.model);
        format!("{}/{}/{model}/{}/{}", self.system, self.engine, self.precision, self.parallelism)
    }
}

/// One published figure: at a shape, seconds per output token (of each request, or of a saturated replica).
#[derive(Clone, Debug)]
struct Row {
    load: Load,
    seconds: f64,
    source: String,
}

/// All rows of a file.
#[derive(Clone, Debug)]
pub struct Rows {
    file: String,
    sha256: String,
    groups: BTreeMap<Group, Vec<Row>>,
}

/// What came of one group.
#[derive(Clone, Debug)]
pub struct GroupFit {
    pub group: Group,
    pub points: usize,
    pub calibration: Result<Calibration, Refusal>,
}

/// How a file holds its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsForm {
    /// The plain form (its header is documented in PLANNING.md), or aiconfigurator's `silicon_sample.csv`, whose columns
    /// tell it.
    Csv,
    /// InferenceX's `agg_bmk.json`: one row, or a list of them.
    InferenceX,
}

/// # Errors
/// Names the file, the line or row, and the column.
pub fn read_rows(path: &Path, form: RowsForm) -> anyhow::Result<Rows> {
    let read = || {
        let size_bytes = std::fs::metadata(path)?.len();
        if size_bytes > LARGEST_FILE_BYTES {
            bail!("has {size_bytes} bytes, expected at most {LARGEST_FILE_BYTES}");
        }
        let text = std::fs::read_to_string(path)?;
        let sha256 = hex(&<sha2::Sha256 as sha2::Digest>::digest(&text));
        let file = path.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
        let groups = match form {
            RowsForm::Csv => parse(&text)?,
            RowsForm::InferenceX => inferencex_rows(&text)?,
        };
        Ok(Rows { file, sha256, groups })
    };
    read().with_context(|| format!("{}: is no table of serving rows", path.display()))
}

fn parse(text: &str) -> anyhow::Result<BTreeMap<Group, Vec<Row>>> {
    let mut lines =
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let (_, header) = lines.next().context("it is empty")?;
    let header = fields(header);
    let is_silicon = header.iter().any(|name| name == "silicon_tpot_ms");
    let missing = COLUMNS.iter().find(|column| !header.iter().any(|name| name == *column));
    if let Some(column) = missing.filter(|_| !is_silicon) {
        bail!("it has no column {column}, expected {}", COLUMNS.join(","));
    }
    let mut groups: BTreeMap<Group, Vec<Row>> = BTreeMap::new();
    for (number, line) in lines {
        let values = fields(line);
        if values.len() != header.len() {
            bail!("line {} has {} fields, expected {}", number + 1, values.len(), header.len());
        }
        let fields = Fields { header: &header, values: &values };
        let row = if is_silicon { silicon_row(&fields) } else { plain_row(&fields).map(Some) };
        if let Some((group, row)) = row.with_context(|| format!("line {}", number + 1))? {
            groups.entry(group).or_default().push(row);
        }
    }
    Ok(groups)
}

/// One line of a CSV file; quotes protect commas, doubled quotes stand for one.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        let field = fields.last_mut().expect("there is a field");
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

struct Fields<'a> {
    header: &'a [String],
    values: &'a [String],
}

impl Fields<'_> {
    fn text(&self, column: &str) -> &str {
        let index = self.header.iter().position(|name| name == column);
        index.map_or("", |index| self.values[index].trim())
    }

    fn number(&self, column: &str) -> anyhow::Result<f64> {
        let text = self.text(column);
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
            _ => bail!("{column} is '{text}', expected a number above 0"),
        }
    }
}

fn plain_row(fields: &Fields<'_>) -> anyhow::Result<(Group, Row)> {
    let (isl, osl) = (fields.number("isl")?, fields.number("osl")?);
    let tokens_per_s = fields.number("output_tokens_per_s")?;
    let (load, seconds) = match fields.text("concurrency") {
        "" => (Load::Saturated { isl, osl }, 1.0 / tokens_per_s),
        _ => {
            let concurrency = fields.number("concurrency")?;
            (Load::Serving { concurrency, isl, osl }, concurrency / tokens_per_s)
        }
    };
    let group = Group {
        system: fields.text("system").to_owned(),
        gpus: fields.number("gpus")? as u32,
        engine: fields.text("engine").to_owned(),
        model: fields.text("model").to_owned(),
        precision: fields.text("precision").to_owned(),
        parallelism: fields.text("parallelism").to_owned(),
        has_experts: match fields.text("experts") {
            "yes" => true,
            "no" => false,
            other => bail!("experts is '{other}', expected yes or no"),
        },
    };
    Ok((group, Row { load, seconds, source: fields.text("source").to_owned() }))
}

/// A row of aiconfigurator's silicon sample. Rows of disaggregated serving, and those without a concurrency, are not taken.
fn silicon_row(fields: &Fields<'_>) -> anyhow::Result<Option<(Group, Row)>> {
    let origin = fields.text("silicon_data_source");
    let concurrency = origin.split("silicon_concurrency=").nth(1).and_then(|rest| rest.split(';').next());
    let Some(concurrency) = concurrency.and_then(|text| text.trim().parse::<f64>().ok()) else {
        return Ok(None);
    };
    if fields.text("mode") != "agg" || concurrency <= 0.0 {
        return Ok(None);
    }
    let width = |column: &str| fields.text(column).parse::<u32>().unwrap_or(0).max(1);
    let (tp, pp, dp) = (width("tp_size"), width("pp_size"), width("attention_dp_size"));
    let load = Load::Serving { concurrency, isl: fields.number("isl")?, osl: fields.number("osl")? };
    let measured = origin.split("measured=").nth(1).and_then(|rest| rest.split([';', 'T']).next());
    let model = fields.text("model_path").to_owned();
    let group = Group {
        system: fields.text("system").trim_end_matches("_sxm").to_owned(),
        gpus: tp.saturating_mul(pp).saturating_mul(dp),
        engine: fields.text("backend").to_owned(),
        precision: match fields.text("precision") {
            "" => "bf16".to_owned(),
            precision => precision.to_owned(),
        },
        parallelism: ["tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"]
            .map(|column| {
                format!(
                    "{}{}",
                    column.trim_end_matches("_size").replace("attention_", ""),
                    fields.text(column)
                )
            })
            .join("-"),
        has_experts: !is_dense(&model),
        model,
    };
    let source =
        format!("aiconfigurator silicon sample, measured {}", measured.unwrap_or("at an unknown date"));
    Ok(Some((group, Row { load, seconds: fields.number("silicon_tpot_ms")? / 1e3, source })))
}

/// InferenceX's rows of one node that prefills and decodes. Rows of disaggregated serving, of several nodes, and of
/// speculative decoding are other systems and are not taken.
fn inferencex_rows(text: &str) -> anyhow::Result<BTreeMap<Group, Vec<Row>>> {
    let value: Value = serde_json::from_str(text)?;
    let rows = match value {
        Value::Array(rows) => rows,
        row => vec![row],
    };
    let mut groups: BTreeMap<Group, Vec<Row>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        if let Some((group, row)) = inferencex_row(row).with_context(|| format!("row {}", index + 1))? {
            groups.entry(group).or_default().push(row);
        }
    }
    Ok(groups)
}

fn inferencex_row(row: &Value) -> anyhow::Result<Option<(Group, Row)>> {
    let text = |name: &str| match &row[name] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let number = |name: &str| -> anyhow::Result<f64> {
        match text(name).parse::<f64>() {
            Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
            _ => bail!("{name} is '{}', expected a number above 0", text(name)),
        }
    };
    let is_set =
        |name: &str| !matches!(text(name).to_ascii_lowercase().as_str(), "" | "false" | "0" | "none");
    if ["disagg", "is_multinode", "spec_decoding"].into_iter().any(is_set) {
        return Ok(None);
    }
    let width = |name: &str| text(name).parse::<u32>().unwrap_or(0).max(1);
    let gpus = width("tp").saturating_mul(width("pp"));
    let concurrency = number("conc")?;
    let load = Load::Serving { concurrency, isl: number("isl")?, osl: number("osl")? };
    let model = text("model");
    let attention = if is_set("dp_attention") { "-dpa" } else { "" };
    let group = Group {
        system: text("hw"),
        gpus,
        engine: text("framework"),
        precision: text("precision"),
        parallelism: format!("tp{}-pp{}-ep{}{attention}", width("tp"), width("pp"), width("ep")),
        has_experts: !is_dense(&model),
        model,
    };
    if let Some(name) = [&group.system, &group.model].into_iter().position(String::is_empty) {
        bail!("{} is missing, expected a name", ["hw", "model"][name]);
    }
    let seconds = concurrency / (number("output_tput_per_gpu")? * f64::from(gpus));
    Ok(Some((group, Row { load, seconds, source: "InferenceX".to_owned() })))
}

/// Neither sample says which models are dense; of their models these are.
fn is_dense(model: &str) -> bool {
    ["Llama-3", "Qwen3-32B"].iter().any(|name| model.contains(name))
}

/// Fits every group.
pub fn fit_groups(rows: &Rows, command: &[String]) -> Vec<GroupFit> {
    rows.groups
        .iter()
        .map(|(group, all)| {
            let points = medians(all);
            GroupFit {
                group: group.clone(),
                points: points.len(),
                calibration: fit(rows, group, all, command),
            }
        })
        .collect()
}

/// Points of equal load, with the median of their seconds.
fn medians(rows: &[Row]) -> Vec<(String, Load, f64)> {
    let mut points: BTreeMap<String, (Load, Vec<f64>)> = BTreeMap::new();
    for row in rows {
        points.entry(key(&row.load)).or_insert((row.load, Vec::new())).1.push(row.seconds);
    }
    points.into_iter().map(|(key, (load, seconds))| (key, load, median(&seconds))).collect()
}

fn key(load: &Load) -> String {
    let sizes: Vec<String> =
        load.coordinates().iter().map(|(name, value)| format!("{name}={value}")).collect();
    format!("{}/{}", load.phase().name(), sizes.join("/"))
}

fn fit(rows: &Rows, group: &Group, all: &[Row], command: &[String]) -> Result<Calibration, Refusal> {
    let points = medians(all);
    let mut laws = Vec::new();
    let mut reasons = Vec::new();
    for phase in [Phase::Serving, Phase::Saturated] {
        let measured: Vec<Measured<'_>> = points
            .iter()
            .filter(|(_, load, _)| load.phase() == phase)
            .map(|(key, load, seconds)| Measured { key, load: *load, fold: Fold::Training, value: *seconds })
            .collect();
        if measured.is_empty() {
            continue;
        }
        if measured.len() < LEAST_POINTS {
            reasons.push(format!(
                "{}: {} points, expected at least {LEAST_POINTS}",
                phase.name(),
                measured.len()
            ));
            continue;
        }
        let training: Points = score::training(&measured);
        match Law::fit(phase, &training, group.has_experts) {
            Ok(law) => laws.push(score::score(
                Quantity::Time,
                law,
                &measured,
                Maybe::missing("published_once"),
                Vec::new(),
            )),
            Err(no_law) => reasons.push(no_law.0),
        }
    }
    if laws.is_empty() {
        return Err(Refusal(reasons));
    }
    let mut notes = vec![
        "fitted to published figures: nothing was held out before they were measured, and the grade is C at best".to_owned(),
        "energy: the figures have none; plans take the provisioned power".to_owned(),
    ];
    notes.extend(reasons);
    Ok(Calibration {
        schema: CALIBRATION_SCHEMA.to_owned(),
        basis: Basis::Published,
        not_a_measurement: None,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        command: command.to_vec(),
        sources: vec![Source { file: rows.file.clone(), sha256: rows.sha256.clone(), origin: origins(all) }],
        subject: Subject {
            device: group.system.clone(),
            gpus_per_replica: group.gpus,
            model: group.model.clone(),
            precision: group.precision.clone(),
            engine: group.engine.clone(),
            parallelism: Maybe::Value(group.parallelism.clone()),
            chunk_tokens: Maybe::missing("not_published"),
            weights_bytes: Maybe::missing("not_published"),
            kv_bytes_per_token: Maybe::missing("not_published"),
            kv_tokens_held: Maybe::missing("not_published"),
        },
        hold_out: Maybe::missing("published_figures"),
        laws,
        idle_w: Maybe::missing("not_published"),
        power_steps: Vec::new(),
        ready_w: Maybe::missing("not_published"),
        read_outs: Vec::new(),
        compositions: Vec::new(),
        grade: Grade::C,
        notes,
    })
}

/// The rows' sources, each once.
fn origins(rows: &[Row]) -> String {
    let sources: std::collections::BTreeSet<&str> = rows.iter().map(|row| row.source.as_str()).collect();
    sources.into_iter().collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_fields_keep_their_commas() {
        assert_eq!(fields(r#"a,"b, ""c""",,d"#), ["a", r#"b, "c""#, "", "d"]);
    }

    #[test]
    fn wrong_rows_are_refused_with_their_line_and_column() {
        let head = COLUMNS.join(",");
        for (text, reason) in [
            ("".to_owned(), "it is empty"),
            ("a,b\n1,2\n".to_owned(), "it has no column system"),
            (format!("{head}\nh100,1\n"), "line 2 has 2 fields"),
            (format!("{head}\nh100,1,e,m,fp8,tp1,no,-5,1,,100,s\n"), "line 2: isl is '-5'"),
            (format!("{head}\nh100,1,e,m,fp8,tp1,maybe,5,1,,100,s\n"), "line 2: experts is 'maybe'"),
            (format!("{head}\nh100,1,e,m,fp8,tp1,no,5,1,,NaN,s\n"), "output_tokens_per_s is 'NaN'"),
        ] {
            let error = format!("{:#}", parse(&text).expect_err(&text));
            assert!(error.contains(reason), "{error}, expected {reason}");
        }
    }
}
