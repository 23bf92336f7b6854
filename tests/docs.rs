//! What the documents say of the code is held against the code: the record's fields, the map of the source, the lists
//! of suites and models, the example, and every link between them.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokmeter::analysis::calibrate::Calibration;
use tokmeter::analysis::predicted::Prediction;
use tokmeter::record::{Cell, Record};

/// Folders whose `.md` files are documents.
const FOLDERS: [&str; 9] = [
    ".",
    "models",
    "suites",
    "sites",
    "results",
    "results/anchors",
    "results/calibrations",
    "kernels",
    "tests/goldens",
];

/// Marks of unfinished text.
const FORBIDDEN: [&str; 3] = ["TODO", "FIXME", "lorem"];

#[test]
fn the_format_document_lists_exactly_the_fields_of_every_structure() {
    let described = described_fields(&read("FORMAT.md"));
    let mut faults = Vec::new();
    for (structure, fields) in &schema_fields() {
        match described.get(structure) {
            None => faults.push(format!("FORMAT.md has no section for `{structure}`")),
            Some(listed) => faults.extend(differences(structure, fields, listed)),
        }
    }
    let known = schema_fields();
    faults.extend(
        described
            .keys()
            .filter(|structure| !known.contains_key(*structure))
            .map(|structure| format!("FORMAT.md describes `{structure}`, which no file of ours has")),
    );
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_planning_document_lists_exactly_the_fields_of_a_calibration() {
    let mut known = fields_of("Calibration", &schemars::schema_for!(Calibration).to_value());
    // Described in FORMAT.md, which the planning document points to.
    known.retain(|structure, _| !["HoldOut", "Missing"].contains(&structure.as_str()));
    let described = described_fields(&read("PLANNING.md"));
    assert_eq!(described, known);
}

#[test]
fn the_example_in_the_format_document_is_a_cell_of_this_version() {
    let text = read("FORMAT.md");
    let examples: Vec<&str> = text
        .split("```json\n")
        .skip(1)
        .map(|rest| rest.split("```").next().expect("a split has a first part"))
        .collect();
    assert!(!examples.is_empty(), "FORMAT.md has no example");
    for example in examples {
        let cell: Cell = serde_json::from_str(example).unwrap_or_else(|error| panic!("{error}:\n{example}"));
        assert_eq!(cell.key, cell.workload.key());
        for latency in cell.runs.iter().map(|run| &run.latency) {
            for histogram in [&latency.ttft, &latency.itl, &latency.tpot, &latency.e2e, &latency.step] {
                if let Some(histogram) = histogram.value() {
                    histogram.decode().expect("the example's histograms can be read");
                }
            }
        }
    }
}

#[test]
fn the_map_in_the_readme_names_every_part_of_the_source() {
    let Some(readme) = read_if_there("README.md") else { return };
    let parts: Vec<String> = entries("src")
        .into_iter()
        .filter(|path| path.is_dir() || !["lib", "main"].map(Some).contains(&stem(path)))
        .map(|path| path.display().to_string())
        .collect();
    let absent: Vec<&String> = parts.iter().filter(|part| !readme.contains(&format!("`{part}`"))).collect();
    assert!(absent.is_empty(), "README.md does not name {absent:?}");
    let gone: Vec<&str> = in_backticks(&readme)
        .into_iter()
        .filter(|name| name.starts_with("src/") && !Path::new(name).exists())
        .collect();
    assert!(gone.is_empty(), "README.md names {gone:?}, which do not exist");
}

#[test]
fn every_suite_and_model_is_named_where_a_reader_looks() {
    for folder in ["suites", "models"] {
        let texts: Vec<String> = ["README.md".to_owned(), format!("{folder}/README.md")]
            .iter()
            .filter_map(read_if_there)
            .collect();
        for file in entries(folder).iter().filter(|path| path.extension().is_some_and(|e| e == "toml")) {
            let name = format!("`{}`", stem(file).expect("a file has a name"));
            assert!(texts.iter().any(|text| text.contains(&name)), "{} is not named", file.display());
        }
    }
}

#[test]
fn no_document_is_unfinished() {
    for (path, text) in documents() {
        for word in FORBIDDEN {
            assert!(!text.contains(word), "{} contains {word}", path.display());
        }
    }
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let mut faults = Vec::new();
    for (path, text) in documents() {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            if target.contains("://") {
                continue;
            }
            let linked = match file {
                "" => path.clone(),
                _ => path.with_file_name(file),
            };
            let found = linked.exists() && (anchor.is_empty() || anchors(&linked).contains(anchor));
            if !found {
                faults.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "links that lead nowhere:\n{}", faults.join("\n"));
}

/// Structure → its fields, over everything that a record or a prediction can contain.
fn schema_fields() -> BTreeMap<String, BTreeSet<String>> {
    let mut fields = fields_of("Record", &schemars::schema_for!(Record).to_value());
    fields.extend(fields_of("Prediction", &schemars::schema_for!(Prediction).to_value()));
    fields
}

fn fields_of(name: &str, schema: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let mut structures = BTreeMap::from([(name.to_owned(), own_fields(schema))]);
    let definitions = schema["$defs"].as_object().expect("a file has parts");
    structures.extend(definitions.iter().map(|(name, part)| (name.clone(), own_fields(part))));
    structures.retain(|_, fields| !fields.is_empty());
    structures
}

/// The property names in a part of the schema: of all its variants, but not of other definitions.
fn own_fields(part: &Value) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    match part {
        Value::Object(members) => {
            for (key, member) in members.iter().filter(|(key, _)| *key != "$defs") {
                if let ("properties", Value::Object(properties)) = (key.as_str(), member) {
                    fields.extend(properties.keys().cloned());
                }
                fields.extend(own_fields(member));
            }
        }
        Value::Array(members) => members.iter().for_each(|member| fields.extend(own_fields(member))),
        _ => {}
    }
    fields
}

/// Structure named in a heading → the names in the first column of the tables below it that are headed `field`.
fn described_fields(document: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut described: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut structure, mut in_fields) = (None, false);
    for line in document.lines() {
        let first_cell = line.strip_prefix('|').and_then(|row| row.split('|').next()).map(str::trim);
        match first_cell {
            Some("field") => in_fields = true,
            Some(cell) if in_fields => {
                if let (Some(name), Some(structure)) = (in_backticks(cell).first(), &structure) {
                    described.entry(String::clone(structure)).or_default().insert((*name).to_owned());
                }
            }
            Some(_) => {}
            None => in_fields = false,
        }
        if line.starts_with('#') {
            structure = in_backticks(line).first().map(|name| (*name).to_owned());
        }
    }
    described
}

fn differences(structure: &str, fields: &BTreeSet<String>, listed: &BTreeSet<String>) -> Vec<String> {
    let missing = fields.difference(listed).map(|field| format!("`{structure}` lacks the field `{field}`"));
    let stale =
        listed.difference(fields).map(|field| format!("`{structure}` has no field `{field}` any more"));
    missing.chain(stale).map(|fault| format!("FORMAT.md: {fault}")).collect()
}

fn documents() -> Vec<(PathBuf, String)> {
    let files = FOLDERS.iter().flat_map(entries);
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .map(|path| (path.clone(), read(&path)))
        .collect()
}

/// What GitHub makes of a document's headings: lower case, punctuation dropped, spaces to hyphens.
fn anchors(document: &Path) -> BTreeSet<String> {
    let anchor = |line: &str| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    read(document).lines().filter(|line| line.starts_with('#')).map(anchor).collect()
}

fn in_backticks(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

fn entries(folder: impl AsRef<Path>) -> Vec<PathBuf> {
    let folder = folder.as_ref();
    let read = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = read.map(|entry| entry.expect("a readable folder").path()).collect();
    paths.sort();
    paths
}

fn stem(path: &Path) -> Option<&str> {
    path.file_stem().and_then(|stem| stem.to_str())
}

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn read_if_there(path: impl AsRef<Path>) -> Option<String> {
    path.as_ref().exists().then(|| read(path))
}
