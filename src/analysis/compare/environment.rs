//! The environment gate: every fact of a record that may explain a difference, what a change of it means, and what a
//! user may declare. What a change means stands in the record's table of classes; a fact that a later version adds is
//! suspicious until a row there says otherwise.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sample::{Sample, printable};
use crate::record::{ClassRow, EnvironmentClass, Kernels, Record, classes, hashed_identity};

/// What a change of a fact means for a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Another thing was measured: not comparable.
    Identity,
    /// Might explain a difference by itself: confounded, unless declared or allowed.
    Suspicious,
    /// What a comparison is made for; listed first.
    Expected,
    /// The power sensor: energy cannot be compared.
    Meter,
    /// Moves by itself, or cannot matter; listed in the JSON only.
    Dynamic,
}

use Class::{Dynamic, Expected, Identity, Meter, Suspicious};

impl From<EnvironmentClass> for Class {
    fn from(class: EnvironmentClass) -> Self {
        match class {
            EnvironmentClass::Identity => Identity,
            EnvironmentClass::Suspicious => Suspicious,
            EnvironmentClass::Expected => Expected,
            EnvironmentClass::Meter => Meter,
            // Counters grow; which of them grew too much is said elsewhere.
            EnvironmentClass::Dynamic | EnvironmentClass::Delta => Dynamic,
        }
    }
}

/// What `--changing` can declare, and what it stands for.
pub const GROUPS: [(&str, &str); 10] = [
    ("driver", "the GPU's driver (always expected)"),
    ("firmware", "firmware of board, GPU and CPU"),
    ("kernel", "operating system: kernel, its command line and mitigations, distribution"),
    ("cpu", "CPU settings: governor, boost, SMT, cores online, threads"),
    ("memory", "memory settings: huge pages, swap"),
    ("limits", "limits of the process, container and hypervisor"),
    ("env", "environment variables"),
    ("tool", "tokmeter itself, its build and its libraries"),
    ("power", "power limits, and who shares the device"),
    ("kernels", "how the GPU's kernels were compiled and are launched, and its libraries"),
];

/// The record's table of classes, by places as facts have them: `machine.gpus` appears as `gpu`, reduced to the devices
/// that were used.
static ROWS: LazyLock<Vec<(String, Class, &str)>> = LazyLock::new(|| {
    let row = |(pointer, class, group): &ClassRow| (place_of(pointer), Class::from(*class), *group);
    let of_ptx = PTX_KERNELS.iter().map(|(place, class, group)| ((*place).to_owned(), *class, *group));
    classes().iter().map(row).chain(of_ptx).collect()
});

/// The kernels of records whose kernels the driver compiled, which facts hold in a place of their own: what it makes of
/// them is what is compared.
const PTX_KERNELS: [(&str, Class, &str); 5] = [
    ("engine.ptx_kernels.architecture", Identity, ""),
    ("engine.ptx_kernels.deterministic", Identity, ""),
    ("engine.ptx_kernels.resources", Expected, "driver"),
    ("engine.ptx_kernels.capture_retry", Expected, "driver"),
    ("engine.ptx_kernels", Suspicious, "kernels"),
];

/// The place that a JSON pointer with `*` for list elements names: `gpu.setup.vbios`.
fn place_of(pointer: &str) -> String {
    let place = pointer.trim_start_matches('/').replace("/*", "").replace('/', ".");
    match place.strip_prefix("machine.gpus") {
        Some(rest) => format!("gpu{rest}"),
        None => place,
    }
}

/// One fact of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fact {
    pub(super) path: String,
    pub(super) value: String,
}

/// A fact that is not the same everywhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// Place in the record; `gpu` stands for the used device's entry of `machine.gpus`, `engine.ptx_kernels` for
    /// `engine.kernels` where the driver compiled them.
    pub field: String,
    /// What the change means here, after what was declared and allowed.
    pub class: Class,
    /// What `--changing` calls it; empty when it cannot be declared.
    pub group: String,
    /// Values in the baseline, and in the candidate; several when records of one arm differ.
    pub baseline: Vec<String>,
    pub candidate: Vec<String>,
    /// Named by `--allow-env`: suspicious, and let pass.
    pub allowed: bool,
}

impl Difference {
    /// Whether `--allow-env KEY` names this fact: itself, a branch above it, or its group.
    pub(super) fn is_named(&self, key: &str) -> bool {
        is_named(&self.field, &self.group, key)
    }
}

/// What the user declares about the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Declared {
    /// Groups that are deliberately updated.
    pub changing: Vec<String>,
    /// Facts, or branches of them, whose change is let pass.
    pub allow_env: Vec<String>,
}

/// Class and group of a place in the record.
fn row_of(path: &str) -> (Class, &'static str) {
    let plain = without_indices(path);
    let fits =
        |row: &str| plain.strip_prefix(row).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let longest = ROWS.iter().filter(|(row, ..)| fits(row)).max_by_key(|(row, ..)| row.len());
    longest.map_or((Suspicious, ""), |(_, class, group)| (*class, group))
}

fn without_indices(path: &str) -> String {
    let mut plain = String::with_capacity(path.len());
    let mut inside = false;
    for letter in path.chars() {
        match letter {
            '[' => inside = true,
            ']' => inside = false,
            _ if !inside => plain.push(letter),
            _ => {}
        }
    }
    plain
}

/// The device that a record measured: the GPU's UUID (hashed, as redacted copies have it), else the CPU's model.
pub(super) fn subject(record: &Record) -> String {
    let uuid = used_gpus(record).into_iter().find_map(|gpu| hashed_identity(&gpu.uuid).into_value());
    let cpu = || record.machine.cpu.model.value().cloned();
    uuid.or_else(cpu).unwrap_or_else(|| record.engine.device.clone())
}

fn used_gpus(record: &Record) -> Vec<crate::record::machine::Gpu> {
    let used: BTreeSet<&str> = record
        .cells
        .iter()
        .flat_map(|cell| cell.devices.iter().map(String::as_str))
        .chain([record.engine.device.as_str()])
        .collect();
    let is_used = |index: u32| used.contains(format!("cuda:{index}").as_str());
    record.machine.gpus.iter().filter(|gpu| is_used(gpu.index)).cloned().collect()
}

/// All facts of a record, sorted by place.
pub(super) fn facts(record: &Record) -> Vec<Fact> {
    let mut machine = record.machine.clone();
    machine.gpus.clear();
    let mut gpus = used_gpus(record);
    for gpu in &mut gpus {
        gpu.uuid = hashed_identity(&gpu.uuid);
    }
    let mut found = Vec::new();
    let mut add = |path: &str, value: serde_json::Result<Value>| {
        flatten(path, &value.unwrap_or(Value::Null), &mut found);
    };
    add("machine", serde_json::to_value(machine));
    add("gpu", serde_json::to_value(gpus));
    add("tool", serde_json::to_value(&record.tool));
    add("model", serde_json::to_value(&record.model));
    add("engine", engine(record));
    add("meter", serde_json::to_value(&record.meter));
    add("command.seed", serde_json::to_value(record.command.seed));
    add("command.min_seconds", serde_json::to_value(record.command.min_seconds));
    for (path, value) in [
        ("command.steady", serde_json::to_value(&record.command.steady)),
        ("command.warmup_seconds", serde_json::to_value(&record.command.warmup_seconds)),
        ("command.thermal", serde_json::to_value(&record.command.thermal)),
    ] {
        add(path, value);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Whether the driver compiled the kernels.
pub(super) fn is_ptx(record: &Record) -> bool {
    let form = |kernels: &Kernels| kernels.form.value().is_some_and(|form| form == "ptx");
    record.engine.kernels.value().is_some_and(form)
}

/// The engine, with its kernels under the name of their form, so that a side may have records of both.
fn engine(record: &Record) -> serde_json::Result<Value> {
    let mut engine = serde_json::to_value(&record.engine)?;
    if let (true, Value::Object(fields)) = (is_ptx(record), &mut engine)
        && let Some(kernels) = fields.remove("kernels")
    {
        fields.insert("ptx_kernels".to_owned(), kernels);
    }
    Ok(engine)
}

/// Branches of which a record has one: that of its kernels' form.
const FORMS: [&str; 2] = ["engine.kernels", "engine.ptx_kernels"];

/// The branch of a form that `path` lies on.
fn form_branch(path: &str) -> Option<&'static str> {
    FORMS.into_iter().find(|branch| path == *branch || is_below(path, branch))
}

/// Leaves by their place. A missing value, and a list of plain values, is one leaf.
fn flatten(path: &str, value: &Value, found: &mut Vec<Fact>) {
    match value {
        Value::Object(members) if !is_missing(value) => {
            for (name, member) in members {
                flatten(&format!("{path}.{name}"), member, found);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object() && !is_missing(item)) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{path}[{index}]"), item, found);
            }
        }
        Value::Array(items) if items.is_empty() && path == "gpu" => {}
        _ => found.push(Fact { path: path.to_owned(), value: leaf(path, value) }),
    }
}

fn is_missing(value: &Value) -> bool {
    value.as_object().is_some_and(|members| members.len() == 1 && members.contains_key("missing"))
}

fn leaf(path: &str, value: &Value) -> String {
    match value {
        Value::Object(members) => {
            format!("missing: {}", members.get("missing").and_then(Value::as_str).unwrap_or("unknown"))
        }
        // Kernels that were compiled once come from the cache afterwards.
        Value::String(text)
            if form_branch(path).is_some() && path.contains(".origins.") && text == "cache" =>
        {
            "compiled".to_owned()
        }
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

/// A fact that the program which wrote the file did not know of.
const NOT_RECORDED: &str = "missing: not_recorded";
/// What is neither there nor missing: a variable that is not set, a file fewer.
const ABSENT: &str = "absent";

/// Every fact that is not one and the same over both arms: expected changes first, then by class and place.
pub(super) fn differences(
    baseline: &[&Sample],
    candidate: &[&Sample],
    declared: &Declared,
) -> Vec<Difference> {
    let all = baseline.iter().chain(candidate);
    let paths: BTreeSet<&str> = all.flat_map(|sample| &sample.facts).map(|fact| fact.path.as_str()).collect();
    let mut found: Vec<Difference> = paths
        .into_iter()
        .filter_map(|path| difference(path, values(baseline, path), values(candidate, path), declared))
        .collect();
    found.sort_by_key(|line| (rank(line.class), line.field.clone()));
    found
}

fn rank(class: Class) -> u8 {
    match class {
        Expected => 0,
        Identity => 1,
        Suspicious => 2,
        Meter => 3,
        Dynamic => 4,
    }
}

/// What stands at one place in the records of one arm.
fn values<'a>(arm: &[&'a Sample], path: &str) -> BTreeSet<&'a str> {
    arm.iter().filter_map(|sample| value(&sample.facts, path)).collect()
}

/// Branches whose entries come and go; any other field is absent only where a version did not know it.
const LISTS: [&str; 6] = [
    "machine.env",
    "machine.cpu.mitigations",
    "machine.software.libraries",
    "model.weights.stored_bytes",
    "engine.kernels.origins",
    "engine.ptx_kernels.origins",
];

fn is_listed(path: &str) -> bool {
    path.contains('[') || LISTS.iter().any(|list| is_below(path, list))
}

/// The fact at `path`; where a whole branch is missing, its reason; none where `path` is a branch here.
fn value<'a>(facts: &'a [Fact], path: &str) -> Option<&'a str> {
    let at = |place: &str| facts.binary_search_by(|fact| fact.path.as_str().cmp(place));
    match at(path) {
        Ok(index) => return Some(&facts[index].value),
        Err(index) if facts.get(index).is_some_and(|next| is_below(&next.path, path)) => return None,
        Err(_) => {}
    }
    // Kernels of the other form say nothing about these.
    if form_branch(path).is_some_and(|branch| !facts.iter().any(|fact| fact.path.starts_with(branch))) {
        return None;
    }
    let above = path.rmatch_indices(['.', '[']).map(|(end, _)| &path[..end]);
    let missing = above.filter_map(|place| at(place).ok()).next();
    let absent = if is_listed(path) { ABSENT } else { NOT_RECORDED };
    Some(missing.map_or(absent, |index| facts[index].value.as_str()))
}

fn is_below(path: &str, branch: &str) -> bool {
    path.strip_prefix(branch).is_some_and(|rest| rest.starts_with(['.', '[']))
}

fn difference(
    path: &str,
    baseline: BTreeSet<&str>,
    candidate: BTreeSet<&str>,
    declared: &Declared,
) -> Option<Difference> {
    let all: BTreeSet<&str> = baseline.union(&candidate).copied().collect();
    if all.len() < 2 {
        return None;
    }
    let (own, group) = row_of(path);
    let is_declared = declared.changing.iter().any(|changing| changing == group);
    let is_mixed = baseline.len() > 1 || candidate.len() > 1;
    let class = match own {
        // A version that did not look cannot be told from one that would have seen the same.
        _ if all.len() == 2 && all.contains(NOT_RECORDED) => Dynamic,
        Identity | Suspicious if is_declared && !is_mixed => Expected,
        // An arm that is itself of two drivers is no arm.
        Expected if is_mixed => Suspicious,
        other => other,
    };
    let texts = |values: BTreeSet<&str>| values.into_iter().map(str::to_owned).collect();
    Some(Difference {
        field: path.to_owned(),
        class,
        group: group.to_owned(),
        baseline: texts(baseline),
        candidate: texts(candidate),
        allowed: class == Suspicious && declared.allow_env.iter().any(|key| is_named(path, group, key)),
    })
}

fn is_named(path: &str, group: &str, key: &str) -> bool {
    let plain = without_indices(path);
    let names = |place: &str| place == key || is_below(place, key);
    names(path) || names(&plain) || (!group.is_empty() && key == group)
}

/// Facts that separate batches of sessions: all but those that move by themselves, and the kernels, of which a session
/// may have both forms.
pub(super) fn batch_key(sample: &Sample) -> Vec<(&str, &str)> {
    let fixed = sample
        .facts
        .iter()
        .filter(|fact| row_of(&fact.path).0 != Dynamic && form_branch(&fact.path).is_none());
    fixed.map(|fact| (fact.path.as_str(), fact.value.as_str())).collect()
}

/// The first identity in which two records differ.
pub(super) fn foreign_identity(sample: &Sample, reference: &Sample, declared: &Declared) -> Option<String> {
    let first = |values: &[String]| values.first().map_or(ABSENT, String::as_str).to_owned();
    differences(&[reference], &[sample], declared).into_iter().find(|line| line.class == Identity).map(
        |line| {
            let (here, there) = (first(&line.candidate), first(&line.baseline));
            format!("{} is {here}, in the baseline {there}", line.field)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_row_decides_and_an_unknown_fact_is_suspicious() {
        assert_eq!(row_of("gpu[0].uuid"), (Identity, ""));
        assert_eq!(row_of("gpu[0].power_limit_w"), (Suspicious, ""));
        assert_eq!(row_of("machine.gpu_driver.version"), (Expected, "driver"));
        assert_eq!(row_of("machine.cpu.mitigations.spectre_v2"), (Suspicious, "kernel"));
        assert_eq!(row_of("machine.cpu.governor"), (Suspicious, "cpu"));
        assert_eq!(row_of("machine.new_branch.value"), (Suspicious, ""));
        assert_eq!(row_of("model.weights.files[1].name"), (Dynamic, ""));
        assert_eq!(row_of("meter.devices[0].power_limit_w"), (Suspicious, "power"));
        assert_eq!(row_of("meter.idle_no_context.power_w"), (Dynamic, ""));
        assert_eq!(row_of("engine.cublaslt.products[3].algorithm_id"), (Dynamic, ""));
        assert_eq!(row_of("modelling"), (Suspicious, ""));
    }

    #[test]
    fn every_group_of_a_row_can_be_declared() {
        for (path, _, group) in ROWS.iter() {
            assert!(group.is_empty() || GROUPS.iter().any(|(name, _)| name == group), "{path}: {group}");
        }
        for (name, _) in GROUPS {
            assert!(ROWS.iter().any(|(_, _, group)| *group == name), "{name} stands for nothing");
        }
    }
}
