//! Named lists of cells, as TOML: those of `suites/`, which the binary carries, or a file of the user's own.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use sha2::Digest as _;

use crate::record::Workload;
use crate::workload::parse_numbers;

/// Suites in the binary: name and text.
const BUILT_IN: [(&str, &str); 9] = [
    ("quick", include_str!("../../suites/quick.toml")),
    ("gpu-quick", include_str!("../../suites/gpu-quick.toml")),
    ("standard", include_str!("../../suites/standard.toml")),
    ("gpu-standard", include_str!("../../suites/gpu-standard.toml")),
    ("decode", include_str!("../../suites/decode.toml")),
    ("prefill", include_str!("../../suites/prefill.toml")),
    ("driver", include_str!("../../suites/driver.toml")),
    ("calibration", include_str!("../../suites/calibration.toml")),
    ("calibration-small", include_str!("../../suites/calibration-small.toml")),
];

/// The suite of a bare `run` on a CPU.
pub const DEFAULT_SUITE: &str = "quick";
/// The suite of a bare `run` on a GPU.
pub const DEFAULT_GPU_SUITE: &str = "gpu-quick";

/// Most cells that one suite may expand to.
const MOST_CELLS: usize = 1000;

/// Longest time for which power is watched without work.
pub const LONGEST_IDLE_SECONDS: f64 = 3600.0;

/// Largest suite file that is read.
const LARGEST_FILE_BYTES: u64 = 1 << 20;

/// What is measured, and how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Suite {
    pub name: String,
    pub description: String,
    pub repeat: u32,
    pub min_seconds: f64,
    pub warmup_seconds: f64,
    /// Warm up until times are flat, and assess each run.
    pub steady: bool,
    /// How long power is watched without work, before, between and after; 0 for not at all.
    pub idle_seconds: f64,
    pub cells: Vec<Workload>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SuiteFile {
    name: String,
    description: String,
    #[serde(default = "default_repeat")]
    repeat: u32,
    min_seconds: f64,
    warmup_seconds: f64,
    #[serde(default)]
    steady: bool,
    #[serde(default)]
    idle_seconds: f64,
    /// Measure the cells in an order that has nothing to do with their sizes.
    #[serde(default)]
    shuffled: bool,
    /// A cell to come back to.
    anchor: Option<Anchor>,
    cells: Vec<CellLine>,
}

/// One cell that is measured again after every `every` others, so that drift shows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Anchor {
    every: usize,
    cell: CellLine,
}

fn default_repeat() -> u32 {
    3
}

/// One line of a suite: a kind and lists of sizes, whose product gives the cells.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CellLine {
    kind: String,
    batch: Option<Numbers>,
    isl: Option<Numbers>,
    osl: Option<Numbers>,
    depth: Option<Numbers>,
    concurrency: Option<Numbers>,
    request_rate_per_s: Option<Vec<f64>>,
    requests: Option<u32>,
}

/// `8`, or `"1..64*2"`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Numbers {
    One(u32),
    List(Vec<u32>),
    Text(String),
}

/// Sizes to take the product of. Empty lists where a kind has no such size.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    pub batch: Vec<u32>,
    pub isl: Vec<u32>,
    pub osl: Vec<u32>,
    pub depth: Vec<u32>,
    pub concurrency: Vec<u32>,
    pub request_rate_per_s: Vec<f64>,
    /// Requests that a serving cell measures at least.
    pub requests: u32,
}

/// The five kinds of cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Prefill,
    Decode,
    Generate,
    ServeClosed,
    ServeOpen,
}

/// Names of the suites in the binary.
pub fn built_in_names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

/// Whether a suite of this name would be read from a file.
pub fn is_file(name_or_path: &str) -> bool {
    !built_in_names().any(|name| name == name_or_path) && Path::new(name_or_path).exists()
}

/// The suite of this name, or the one in this file.
///
/// # Errors
/// When there is neither, or the text is no valid suite; names the file and the cell.
pub fn load(name_or_path: &str) -> anyhow::Result<Suite> {
    if let Some((name, text)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_path) {
        return parse(text).with_context(|| format!("suite {name}"));
    }
    let path = Path::new(name_or_path);
    if !path.exists() {
        let names: Vec<&str> = built_in_names().collect();
        bail!("there is no suite '{name_or_path}', expected {} or a file", names.join(", "));
    }
    let size_bytes = std::fs::metadata(path).with_context(|| name_or_path.to_owned())?.len();
    if size_bytes > LARGEST_FILE_BYTES {
        bail!("{name_or_path}: has {size_bytes} bytes, expected a suite of at most {LARGEST_FILE_BYTES}");
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("{name_or_path}: cannot be read"))?;
    parse(&text).with_context(|| name_or_path.to_owned())
}

/// # Errors
/// Says which field or cell is wrong and what was expected.
pub fn parse(text: &str) -> anyhow::Result<Suite> {
    let file: SuiteFile = toml::from_str(text).map_err(|error| anyhow::anyhow!(one_line(&error)))?;
    check_protocol(file.repeat, file.min_seconds, file.warmup_seconds)?;
    if !(0.0..=LONGEST_IDLE_SECONDS).contains(&file.idle_seconds) {
        bail!("idle_seconds is {}, expected 0 to {LONGEST_IDLE_SECONDS}", file.idle_seconds);
    }
    let mut cells = Vec::new();
    for (index, line) in file.cells.iter().enumerate() {
        let place = || format!("cells[{index}]");
        let kind = kind_named(&line.kind).with_context(place)?;
        cells.extend(expand(kind, &line.sizes().with_context(place)?).with_context(place)?);
        if cells.len() > MOST_CELLS {
            bail!("expands to more than {MOST_CELLS} cells");
        }
    }
    if cells.is_empty() {
        bail!("has no cells, expected at least one [[cells]]");
    }
    if file.shuffled {
        cells.sort_by_cached_key(shuffling_hash);
    }
    if let Some(anchor) = &file.anchor {
        cells = with_anchor(cells, anchor).context("anchor")?;
    }
    Ok(Suite {
        name: file.name,
        description: file.description,
        repeat: file.repeat,
        min_seconds: file.min_seconds,
        warmup_seconds: file.warmup_seconds,
        steady: file.steady,
        idle_seconds: file.idle_seconds,
        cells,
    })
}

/// A place in the order that neither size nor seed decides.
fn shuffling_hash(cell: &Workload) -> [u8; 32] {
    sha2::Sha256::digest(format!("tokmeter-order/1\n{}", cell.key())).into()
}

/// The anchor first, last, and after every `every` cells between.
fn with_anchor(cells: Vec<Workload>, anchor: &Anchor) -> anyhow::Result<Vec<Workload>> {
    if anchor.every == 0 {
        bail!("every is 0, expected the number of cells between two visits");
    }
    let expanded = expand(kind_named(&anchor.cell.kind)?, &anchor.cell.sizes()?)?;
    let [cell] = expanded.as_slice() else { bail!("expands to {} cells, expected one", expanded.len()) };
    let others: Vec<Workload> = cells.into_iter().filter(|other| other != cell).collect();
    let stretches = others.chunks(anchor.every).flat_map(|stretch| [&[*cell], stretch].concat());
    Ok(stretches.chain([*cell]).collect())
}

/// Refuses repetitions and times that no measurement could keep.
///
/// # Errors
/// Names the field.
pub fn check_protocol(repeat: u32, min_seconds: f64, warmup_seconds: f64) -> anyhow::Result<()> {
    if !(1..=10_000).contains(&repeat) {
        bail!("repeat is {repeat}, expected 1 to 10000");
    }
    for (name, seconds) in [("min_seconds", min_seconds), ("warmup_seconds", warmup_seconds)] {
        if !(0.0..=86_400.0).contains(&seconds) {
            bail!("{name} is {seconds}, expected 0 to 86400");
        }
    }
    Ok(())
}

/// TOML's errors draw the line under the fault; one line is enough here.
fn one_line(error: &toml::de::Error) -> String {
    let mut text = String::from("is no valid suite: ");
    text.push_str(error.message().lines().next().unwrap_or(""));
    if let Some(span) = error.span() {
        text.push_str(&format!(" (at byte {})", span.start));
    }
    text
}

fn kind_named(name: &str) -> anyhow::Result<Kind> {
    Ok(match name {
        "prefill" => Kind::Prefill,
        "decode" => Kind::Decode,
        "generate" => Kind::Generate,
        "serve-closed" => Kind::ServeClosed,
        "serve-open" => Kind::ServeOpen,
        _ => bail!("kind is '{name}', expected prefill, decode, generate, serve-closed or serve-open"),
    })
}

impl CellLine {
    fn sizes(&self) -> anyhow::Result<Sizes> {
        Ok(Sizes {
            batch: numbers(&self.batch)?,
            isl: numbers(&self.isl)?,
            osl: numbers(&self.osl)?,
            depth: numbers(&self.depth)?,
            concurrency: numbers(&self.concurrency)?,
            request_rate_per_s: self.request_rate_per_s.clone().unwrap_or_default(),
            requests: self.requests.unwrap_or(0),
        })
    }
}

fn numbers(given: &Option<Numbers>) -> anyhow::Result<Vec<u32>> {
    match given {
        None => Ok(Vec::new()),
        Some(Numbers::One(one)) => Ok(vec![*one]),
        Some(Numbers::List(list)) => Ok(list.clone()),
        Some(Numbers::Text(text)) => parse_numbers(text).map_err(anyhow::Error::msg),
    }
}

/// Every combination of the sizes that `kind` has.
///
/// # Errors
/// When a size that the kind needs is absent, one that it does not have is given, or a value is 0 or absurd.
pub fn expand(kind: Kind, sizes: &Sizes) -> anyhow::Result<Vec<Workload>> {
    check_sizes(kind, sizes)?;
    // Before anything is expanded: a thousand values of each size would make 10⁹ cells.
    if combinations(sizes) > MOST_CELLS {
        bail!("expands to more than {MOST_CELLS} cells");
    }
    let mut cells = Vec::new();
    let mut push = |cell: Workload| {
        if !cells.contains(&cell) {
            cells.push(cell);
        }
    };
    match kind {
        Kind::Prefill => pairs(&sizes.batch, &sizes.isl, |batch, isl| push(Workload::Prefill { batch, isl })),
        Kind::Decode => triples(&sizes.batch, &sizes.depth, &sizes.osl, |batch, depth, osl| {
            push(Workload::Decode { batch, depth, osl });
        }),
        Kind::Generate => triples(&sizes.batch, &sizes.isl, &sizes.osl, |batch, isl, osl| {
            push(Workload::Generate { batch, isl, osl });
        }),
        Kind::ServeClosed => triples(&sizes.concurrency, &sizes.isl, &sizes.osl, |concurrency, isl, osl| {
            push(Workload::ServeClosed { concurrency, isl, osl, requests: sizes.requests.max(concurrency) });
        }),
        Kind::ServeOpen => {
            for &request_rate_per_s in &sizes.request_rate_per_s {
                pairs(&sizes.isl, &sizes.osl, |isl, osl| {
                    push(Workload::ServeOpen {
                        request_rate_per_s,
                        isl,
                        osl,
                        requests: sizes.requests.max(1),
                    });
                });
            }
        }
    }
    Ok(cells)
}

/// Cells before duplicates are dropped; a size that the kind does not have counts once.
fn combinations(sizes: &Sizes) -> usize {
    [&sizes.batch, &sizes.isl, &sizes.osl, &sizes.depth, &sizes.concurrency]
        .iter()
        .map(|values| values.len())
        .chain([sizes.request_rate_per_s.len()])
        .fold(1, |product, count| product.saturating_mul(count.max(1)))
}

fn pairs(first: &[u32], second: &[u32], mut each: impl FnMut(u32, u32)) {
    for &a in first {
        for &b in second {
            each(a, b);
        }
    }
}

fn triples(first: &[u32], second: &[u32], third: &[u32], mut each: impl FnMut(u32, u32, u32)) {
    for &a in first {
        pairs(second, third, |b, c| each(a, b, c));
    }
}

fn check_sizes(kind: Kind, sizes: &Sizes) -> anyhow::Result<()> {
    let needs: &[&str] = match kind {
        Kind::Prefill => &["batch", "isl"],
        Kind::Decode => &["batch", "depth", "osl"],
        Kind::Generate => &["batch", "isl", "osl"],
        Kind::ServeClosed => &["concurrency", "isl", "osl"],
        Kind::ServeOpen => &["request_rate_per_s", "isl", "osl"],
    };
    let given: [(&str, &[u32]); 5] = [
        ("batch", &sizes.batch),
        ("isl", &sizes.isl),
        ("osl", &sizes.osl),
        ("depth", &sizes.depth),
        ("concurrency", &sizes.concurrency),
    ];
    for (name, values) in given {
        check_presence(kind, name, needs.contains(&name), !values.is_empty())?;
        if let Some(value) = values.iter().find(|value| **value == 0 || **value > 1 << 24) {
            bail!("{name} is {value}, expected 1 to {}", 1 << 24);
        }
    }
    let rates = &sizes.request_rate_per_s;
    check_presence(kind, "request_rate_per_s", needs.contains(&"request_rate_per_s"), !rates.is_empty())?;
    if let Some(rate) = rates.iter().find(|rate| !(rate.is_finite() && **rate > 0.0 && **rate <= 1e6)) {
        bail!("request_rate_per_s is {rate}, expected more than 0 and at most 1000000");
    }
    Ok(())
}

fn check_presence(kind: Kind, name: &str, needed: bool, given: bool) -> anyhow::Result<()> {
    match (needed, given) {
        (true, false) => bail!("a {kind:?} cell needs {name}"),
        (false, true) => bail!("a {kind:?} cell has no {name}"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_in_the_binary_is_valid_and_named_as_its_file() {
        for (name, _) in BUILT_IN {
            let suite = load(name).expect(name);
            assert_eq!(suite.name, name);
            assert!(!suite.description.is_empty());
        }
    }

    #[test]
    fn sizes_multiply_and_repeat_no_cell() {
        let sizes = Sizes { batch: vec![1, 4], isl: vec![64, 64, 128], ..Sizes::default() };
        let keys: Vec<String> =
            expand(Kind::Prefill, &sizes).unwrap().iter().map(|cell| cell.key()).collect();
        assert_eq!(keys, ["prefill/b1/i64", "prefill/b1/i128", "prefill/b4/i64", "prefill/b4/i128"]);
    }

    #[test]
    fn the_calibration_suites_come_back_to_their_anchor_in_an_order_without_sizes() {
        for name in ["calibration", "calibration-small"] {
            let suite = load(name).unwrap();
            let anchor = suite.cells[0];
            let visits: Vec<usize> =
                (0..suite.cells.len()).filter(|index| suite.cells[*index] == anchor).collect();
            assert!(
                visits.len() >= 4 && visits.last() == Some(&(suite.cells.len() - 1)),
                "{name} {visits:?}"
            );
            assert!(visits.windows(2).all(|pair| pair[1] - pair[0] <= 11), "{name} {visits:?}");
            let batches: Vec<u32> = suite.cells.iter().filter_map(Workload::static_batch).collect();
            let falls = batches.windows(2).filter(|pair| pair[1] < pair[0]).count();
            assert!(falls > suite.cells.len() / 5, "{name}: {batches:?}");
            assert_eq!(suite.cells, load(name).unwrap().cells);
        }
    }

    /// A law is fitted to 8 points or more (PLANNING.md); what is held out does not count.
    #[test]
    fn calibration_suites_leave_enough_points_to_learn_from() {
        for name in ["calibration", "calibration-small"] {
            let cells: std::collections::BTreeMap<String, Workload> =
                load(name).unwrap().cells.into_iter().map(|cell| (cell.key(), cell)).collect();
            let cells: Vec<Workload> = cells.into_values().collect();
            let split = crate::record::hold_out(&cells);
            let is_left = |cell: &&Workload| {
                ![&split.interior, &split.row, &split.frontier].iter().any(|keys| keys.contains(&cell.key()))
            };
            let left = || cells.iter().filter(is_left);
            let decode = left().filter(|cell| matches!(cell, Workload::Decode { .. })).count();
            let prefill = left().filter(|cell| matches!(cell, Workload::Prefill { .. })).count();
            assert!(decode >= 8 && prefill >= 8, "{name}: {decode} decode and {prefill} prefill points");
        }
    }

    #[test]
    fn a_wrong_suite_is_refused_with_its_place_and_reason() {
        let head = "name='x'\ndescription='y'\nmin_seconds=1\nwarmup_seconds=0\n";
        let cases = [
            ("", "missing field"),
            ("name = [", "suite"),
            (&format!("{head}cells=[]"), "no cells"),
            (&format!("{head}[[cells]]\nkind='train'\nbatch=1"), "cells[0]: kind is 'train'"),
            (&format!("{head}[[cells]]\nkind='prefill'\nbatch=1"), "needs isl"),
            (&format!("{head}[[cells]]\nkind='prefill'\nbatch=1\nisl=8\nosl=4"), "has no osl"),
            (&format!("{head}[[cells]]\nkind='prefill'\nbatch=0\nisl=8"), "batch is 0"),
            (&format!("{head}[[cells]]\nkind='prefill'\nbatch='1..'\nisl=8"), "'1..' is no number"),
            (&format!("{head}[[cells]]\nkind='prefill'\nbatch='1..999'\nisl='1..999'"), "more than 1000"),
            (&format!("{head}[[cells]]\nkind='prefill'\nbatch=1\nisl=8\ncolour=1"), "colour"),
            (
                &format!(
                    "{head}anchor={{every=0,cell={{kind='prefill',batch=1,isl=8}}}}\n[[cells]]\nkind='prefill'\nbatch=1\nisl=9"
                ),
                "anchor: every is 0",
            ),
            (
                &format!(
                    "{head}anchor={{every=5,cell={{kind='prefill',batch=[1,2],isl=8}}}}\n[[cells]]\nkind='prefill'\nbatch=1\nisl=9"
                ),
                "anchor: expands to 2 cells",
            ),
            (
                &format!("{head}[[cells]]\nkind='serve-open'\nisl=8\nosl=8\nrequest_rate_per_s=[nan]"),
                "request_rate_per_s is NaN",
            ),
            (
                &format!("{head}idle_seconds=-1\n[[cells]]\nkind='prefill'\nbatch=1\nisl=9"),
                "idle_seconds is -1",
            ),
            ("name='x'\ndescription='y'\nmin_seconds=nan\nwarmup_seconds=0\ncells=[]", "min_seconds is NaN"),
        ];
        for (text, reason) in cases {
            let error = format!("{:#}", parse(text).expect_err(text));
            assert!(error.contains(reason), "{text}\n gave: {error}\n expected: {reason}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
