//! The environment gate: every fact of a record that may explain a difference, what a change of it means, and what a
//! user may declare. A fact that a later version adds is suspicious until a row of [`ROWS`] says otherwise.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sample::{Sample, printable};
use crate::record::{Record, hashed_identity};

/// What a change of a fact means for a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
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

/// Facts by the place in the record, most of them whole branches: the longest that fits decides. `machine.gpus` appears
/// as `gpu`, reduced to the devices that were used.
const ROWS: &[(&str, Class, &str)] = &[
    ("gpu.name", Identity, ""),
    ("gpu.uuid", Identity, ""),
    ("gpu.compute_capability", Identity, ""),
    // What the driver leaves to programs.
    ("gpu.memory_bytes", Expected, "driver"),
    ("gpu.index", Dynamic, ""),
    ("gpu.setup.gsp_firmware", Expected, "driver"),
    ("gpu.setup.vbios", Suspicious, "firmware"),
    ("gpu.setup", Suspicious, "power"),
    ("gpu", Suspicious, ""),
    ("machine.gpu_driver", Expected, "driver"),
    ("machine.host.os", Identity, ""),
    ("machine.host.architecture", Identity, ""),
    ("machine.host.board_vendor", Identity, ""),
    ("machine.host.board_product", Identity, ""),
    ("machine.host.firmware_version", Suspicious, "firmware"),
    ("machine.host.container", Suspicious, "limits"),
    ("machine.host.hypervisor", Suspicious, "limits"),
    ("machine.host.hostname", Dynamic, ""),
    ("machine.host.boot_id", Dynamic, ""),
    ("machine.host.uptime_s", Dynamic, ""),
    ("machine.host", Suspicious, "kernel"),
    ("machine.cpu.model", Identity, ""),
    ("machine.cpu.vendor", Identity, ""),
    ("machine.cpu.sockets", Identity, ""),
    ("machine.cpu.caches", Identity, ""),
    ("machine.cpu.last_level_cache_bytes", Identity, ""),
    ("machine.cpu.microcode", Suspicious, "firmware"),
    ("machine.cpu.mitigations", Suspicious, "kernel"),
    ("machine.cpu", Suspicious, "cpu"),
    // A kernel keeps a little more or less for itself at each boot.
    ("machine.memory.total_bytes", Dynamic, ""),
    ("machine.memory.available_bytes", Dynamic, ""),
    ("machine.memory.swap_used_bytes", Dynamic, ""),
    ("machine.memory", Suspicious, "memory"),
    ("machine.limits", Suspicious, "limits"),
    ("machine.load", Dynamic, ""),
    // The same sources and compiler in another folder give another file.
    ("machine.software.binary_sha256", Suspicious, "tool"),
    ("machine.software", Identity, "tool"),
    ("machine.env", Suspicious, "env"),
    ("machine", Suspicious, ""),
    ("tool", Identity, "tool"),
    // What a file is called.
    ("model.name", Dynamic, ""),
    ("model.weights.files.name", Dynamic, ""),
    ("model", Identity, ""),
    ("engine.device", Suspicious, ""),
    ("engine.threads", Suspicious, "cpu"),
    ("engine.max_batch", Suspicious, ""),
    // Made as large as the cells, or as the free memory.
    ("engine.kv_pages", Dynamic, ""),
    ("engine.kv_bytes", Dynamic, ""),
    ("engine.max_context_tokens", Dynamic, ""),
    ("engine.activations_bytes", Dynamic, ""),
    ("engine.clock_overhead_ns", Dynamic, ""),
    ("engine.load_ns", Dynamic, ""),
    ("engine.kernels.architecture", Identity, ""),
    ("engine.kernels.deterministic", Identity, ""),
    ("engine.kernels", Suspicious, "kernels"),
    // Which algorithms a library takes, and how long it took to choose, is its own affair.
    ("engine.cublaslt.products", Dynamic, ""),
    ("engine.cublaslt.tuning_ns", Dynamic, ""),
    ("engine.cublaslt", Suspicious, "kernels"),
    ("engine.name", Identity, ""),
    ("engine.backend", Identity, ""),
    ("engine.compute_dtype", Identity, ""),
    ("engine.kv_dtype", Identity, ""),
    ("engine.chunk_tokens", Identity, ""),
    ("engine.page_size_tokens", Identity, ""),
    ("engine.stop_tokens_ignored", Identity, ""),
    ("engine.sampling", Identity, ""),
    ("engine", Suspicious, ""),
    // What the sensor read or was found to do; its limit of power is the machine's.
    ("meter.idle_no_context", Dynamic, ""),
    ("meter.idle_context_resident", Dynamic, ""),
    ("meter.idle_after_load", Dynamic, ""),
    ("meter.systematic_share", Dynamic, ""),
    ("meter.devices.update_period_ns", Dynamic, ""),
    ("meter.devices.power_limit_w", Suspicious, "power"),
    ("meter.devices.shared", Suspicious, "power"),
    ("meter.trace", Dynamic, ""),
    ("meter", Meter, ""),
    ("command.seed", Identity, ""),
    ("command.min_seconds", Suspicious, ""),
];

/// One fact of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fact {
    pub(super) path: String,
    pub(super) value: String,
}

/// A fact that is not the same everywhere.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Difference {
    /// Place in the record; `gpu` stands for the used device's entry of `machine.gpus`.
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
    add("engine", serde_json::to_value(&record.engine));
    add("meter", serde_json::to_value(&record.meter));
    add("command.seed", serde_json::to_value(record.command.seed));
    add("command.min_seconds", serde_json::to_value(record.command.min_seconds));
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
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
        Value::String(text) if path.starts_with("engine.kernels.origins.") && text == "cache" => {
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
const LISTS: [&str; 5] = [
    "machine.env",
    "machine.cpu.mitigations",
    "machine.software.libraries",
    "model.weights.stored_bytes",
    "engine.kernels.origins",
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

/// Facts that separate batches of sessions: all but those that move by themselves.
pub(super) fn batch_key(sample: &Sample) -> Vec<(&str, &str)> {
    let fixed = sample.facts.iter().filter(|fact| row_of(&fact.path).0 != Dynamic);
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
        for (path, _, group) in ROWS {
            assert!(group.is_empty() || GROUPS.iter().any(|(name, _)| name == group), "{path}: {group}");
        }
        for (name, _) in GROUPS {
            assert!(ROWS.iter().any(|(_, _, group)| *group == name), "{name} stands for nothing");
        }
    }
}
