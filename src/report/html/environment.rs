//! Everything in the records that is not a cell, field by field, from their JSON: a field that the format gains appears
//! here by itself. Where records differ, each value says whose it is.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::record::Record;
use crate::report::words::reason_in_words;
use crate::units::{format_bytes, format_ns, format_significant};

use super::content::{Block, Fact, FactGroup, Section};
use super::scale::prefixed;
use super::subject::Subject;

/// Parts of a record, in the order of the page. `model` comes with its configuration.
const PARTS: [(&str, &str); 17] = [
    ("command", "Command"),
    ("session", "Session"),
    ("machine/gpu_driver", "GPU driver"),
    ("machine/gpus", "GPUs"),
    ("machine/host", "Host"),
    ("machine/cpu", "CPU"),
    ("machine/memory", "Memory"),
    ("machine/limits", "Limits"),
    ("machine/load", "Load before the start"),
    ("machine/env", "Environment variables"),
    ("interference", "Other programs before the start"),
    ("machine/software", "Software"),
    ("model", "Model and weights"),
    ("engine", "Engine, kernels and cuBLASLt"),
    ("meter", "Power meter"),
    ("numerics", "Numerics"),
    ("cost_model", "Cost model"),
];
/// Shown elsewhere on the page, or no fact about the environment.
const ELSEWHERE: [&str; 4] = ["cells", "ceilings", "schema", "not_a_measurement"];

pub(super) fn section(subjects: &[Subject<'_>]) -> Section {
    let values: Vec<Value> = subjects.iter().map(|subject| without_cells(subject.record)).collect();
    let mut groups: Vec<FactGroup> = PARTS
        .iter()
        .map(|(path, title)| {
            let parts = values.iter().map(|value| value.pointer(&format!("/{path}")));
            FactGroup { title: (*title).to_owned(), facts: facts(parts) }
        })
        .collect();
    let rest: Vec<Value> = values.iter().map(rest).collect();
    groups.push(FactGroup { title: "Record".to_owned(), facts: facts(rest.iter().map(Some)) });
    groups.retain(|group| !group.facts.is_empty());
    let text = if subjects.len() > 1 {
        "Where records differ, the numbers after a value say whose it is."
    } else {
        "As found before the first cell."
    };
    Section {
        id: "environment",
        title: "Environment",
        blocks: vec![Block::text(text), Block::Facts { groups }],
    }
}

fn without_cells(record: &Record) -> Value {
    let record = Record { cells: Vec::new(), ..record.clone() };
    serde_json::to_value(record).unwrap_or_default()
}

/// What no part above holds.
fn rest(record: &Value) -> Value {
    let mut rest = record.clone();
    for (path, _) in PARTS {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = if parent.is_empty() { String::new() } else { format!("/{parent}") };
        if let Some(Value::Object(fields)) = rest.pointer_mut(&parent) {
            fields.remove(name);
        }
    }
    if let Value::Object(fields) = &mut rest {
        fields.retain(|name, _| !ELSEWHERE.contains(&name.as_str()));
    }
    rest
}

/// The fields of one part over all records, in the order of their names.
fn facts<'a>(parts: impl Iterator<Item = Option<&'a Value>>) -> Vec<Fact> {
    let mut values: BTreeMap<String, Vec<(String, Vec<usize>)>> = BTreeMap::new();
    let mut records = 0;
    for part in parts {
        records += 1;
        let mut found = Vec::new();
        if let Some(part) = part {
            flatten("", part, &mut found);
        }
        for (name, text) in found {
            let known = values.entry(name).or_default();
            match known.iter_mut().find(|(value, _)| *value == text) {
                Some((_, numbers)) => numbers.push(records),
                None => known.push((text, vec![records])),
            }
        }
    }
    let fact = |(name, values): (String, Vec<(String, Vec<usize>)>)| {
        let is_common = values.len() == 1 && values[0].1.len() == records;
        let values = values
            .into_iter()
            .map(|(value, numbers)| (value, if is_common { String::new() } else { listed(&numbers) }));
        Fact { name, values: values.collect() }
    };
    values.into_iter().map(fact).collect()
}

/// `#1, #3`
fn listed(numbers: &[usize]) -> String {
    numbers.iter().map(|number| format!("#{number}")).collect::<Vec<_>>().join(", ")
}

/// Fields below `value` as names and texts.
fn flatten(name: &str, value: &Value, out: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => match missing(fields) {
            Some(reason) => out.push((readable_name(name), format!("– ({})", reason_in_words(reason)))),
            None => {
                for (field, value) in fields {
                    flatten(&join(name, field), value, out);
                }
            }
        },
        // A part that is a list, the GPUs: field by field, so that a difference shows where it is.
        Value::Array(items) if name.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                flatten(&index.to_string(), item, out);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, item) in items.iter().enumerate() {
                let mut fields = Vec::new();
                flatten("", item, &mut fields);
                let texts: Vec<String> =
                    fields.into_iter().map(|(name, text)| format!("{name}: {text}")).collect();
                out.push((
                    format!("{} {}", readable_name(name), index + 1).trim().to_owned(),
                    texts.join(" · "),
                ));
            }
        }
        Value::Array(items) => {
            let texts: Vec<String> = items.iter().map(|item| scalar("", item)).collect();
            out.push((
                readable_name(name),
                if texts.is_empty() { "none".to_owned() } else { texts.join(", ") },
            ));
        }
        _ => out.push((readable_name(name), scalar(name, value))),
    }
}

fn join(name: &str, field: &str) -> String {
    if name.is_empty() { field.to_owned() } else { format!("{name} · {field}") }
}

/// The reason in `{"missing": reason}`.
pub(super) fn missing(fields: &Map<String, Value>) -> Option<&str> {
    (fields.len() == 1).then(|| fields.get("missing")?.as_str()).flatten()
}

/// The end of a field's name, and how its values are written.
type Unit = (&'static str, fn(f64) -> String);

/// Units that end a field's name, longest first, and how such numbers read.
const UNITS: [Unit; 12] = [
    ("_bytes_per_s", |value| format!("{} GB/s", format_significant(value / 1e9))),
    ("_flops_per_s", |value| {
        let (factor, prefix) = prefixed(value);
        format!("{} {prefix}FLOP/s", format_significant(value / factor))
    }),
    ("_bytes", |value| format_bytes(value as u64)),
    ("_share", |value| format!("{} %", format_significant(value * 100.0))),
    ("_ratio", |value| format!("{} %", format_significant(value * 100.0))),
    ("_mhz", |value| format!("{value} MHz")),
    ("_ns", format_ns),
    ("_nat", |value| format!("{value:e} nat")),
    ("_seconds", |value| format!("{value} s")),
    ("_s", |value| format!("{value} s")),
    ("_w", |value| format!("{value} W")),
    ("_c", |value| format!("{value} °C")),
];

fn unit_of(name: &str) -> Option<&'static Unit> {
    UNITS.iter().find(|(ending, _)| name.ends_with(ending))
}

/// A field's name as people read it; its unit stands with the value.
pub(super) fn readable_name(name: &str) -> String {
    let bare = unit_of(name).map_or(name, |(ending, _)| name.strip_suffix(ending).unwrap_or(name));
    bare.replace('_', " ")
}

fn scalar(name: &str, value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "(empty)".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(number) => match (unit_of(name), number.as_f64()) {
            (Some((_, format)), Some(value)) => format(value),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_read_with_their_units_and_reasons() {
        let part = serde_json::json!({
            "weights_bytes": 538_060_032, "load_ns": 501_687_449, "ok": true, "name": "x",
            "governor": {"missing": "no_frequency_policy"},
            "gpus": [{"index": 0, "memory_bytes": 1024}], "features": [], "foreign_share": 0.015,
        });
        let found = facts([Some(&part)].into_iter());
        let text: Vec<String> =
            found.iter().map(|fact| format!("{}={}", fact.name, fact.values[0].0)).collect();
        let expected = [
            "features=none",
            "foreign=1.50 %",
            "governor=– (the kernel governs no clock here, as in most virtual machines)",
            "gpus 1=index: 0 · memory: 1.00 KiB",
            "load=502 ms",
            "name=x",
            "ok=yes",
            "weights=513 MiB",
        ];
        assert_eq!(text, expected);
        assert!(found.iter().all(|fact| fact.values[0].1.is_empty()));
    }

    #[test]
    fn a_part_that_is_a_list_reads_field_by_field() {
        let gpus =
            serde_json::json!([{"index": 0, "memory_bytes": 1024}, {"index": 1, "memory_bytes": 2048}]);
        let names: Vec<String> = facts([Some(&gpus)].into_iter()).into_iter().map(|fact| fact.name).collect();
        assert_eq!(names, ["0 · index", "0 · memory", "1 · index", "1 · memory"]);
    }

    #[test]
    fn different_values_say_whose_they_are() {
        let parts = [
            serde_json::json!({"a": 1, "b": 2}),
            serde_json::json!({"a": 1}),
            serde_json::json!({"a": 3, "b": 2}),
        ];
        let values =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(v, n)| (v.to_string(), n.to_string())).collect();
        assert_eq!(
            facts(parts.iter().map(Some)),
            [
                Fact { name: "a".to_owned(), values: values(&[("1", "#1, #2"), ("3", "#3")]) },
                Fact { name: "b".to_owned(), values: values(&[("2", "#1, #3")]) },
            ]
        );
    }
}
