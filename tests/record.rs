//! The record's format: its schema, its identities, its hash, and what reading refuses.

#![allow(clippy::unwrap_used)]

#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use program::{fake_record, tiny_model, tokmeter, tokmeter_limited};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::tempdir;
use tokmeter::record::{
    LatencyHistogram, Maybe, Record, Status, canonical_sha256, json_schema, parse, read, violations,
    write_atomically,
};
use tokmeter::{analysis, report};

static RECORD: LazyLock<Record> = LazyLock::new(|| fake_record(tempdir().unwrap().path()));

/// The same with one run of each cell and one request of each run: all fields, few values.
static SMALL: LazyLock<Value> = LazyLock::new(|| {
    let mut record = RECORD.clone();
    record.command.repeat = 1;
    for cell in &mut record.cells {
        cell.runs.truncate(1);
        cell.runs[0].requests.truncate(1);
    }
    serde_json::to_value(record).unwrap()
});

fn schema() -> jsonschema::Validator {
    jsonschema::validator_for(&serde_json::from_str(&json_schema()).unwrap()).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn to_text(value: &Value) -> String {
    serde_json::to_string(value).unwrap()
}

#[test]
fn the_committed_schema_is_the_one_that_the_code_writes() {
    let path = root().join("results/schema.json");
    if std::env::var_os("TOKMETER_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&path, json_schema()).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == json_schema(),
        "run TOKMETER_BLESS=1 cargo test --test record and commit results/schema.json"
    );
}

#[test]
fn real_output_is_valid_by_schema_and_by_identity() {
    let folder = tempdir().unwrap();
    let cpu = folder.path().join("cpu.json");
    let model = tiny_model();
    let suite = folder.path().join("suite.toml");
    let cells = "[[cells]]\nkind='decode'\nbatch=2\ndepth=8\nosl=4\n\
        [[cells]]\nkind='serve-open'\nrequest_rate_per_s=[200.0]\nisl=8\nosl=4\nrequests=8\n\
        [[cells]]\nkind='prefill'\nbatch=2\nisl=8\n";
    let head = "name='test'\ndescription='x'\nrepeat=2\nmin_seconds=0.02\nwarmup_seconds=0\n";
    std::fs::write(&suite, format!("{head}{cells}")).unwrap();
    let args = ["run", "-m", model.to_str().unwrap(), "--suite", suite.to_str().unwrap(), "-o", "cpu.json"];
    let done = tokmeter(folder.path(), &args);
    assert_eq!(done.code, Some(0), "{done:?}");
    let schema = schema();
    let assert_valid = |value: &Value, place: &str| {
        let faults: Vec<String> =
            schema.iter_errors(value).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
        assert!(faults.is_empty(), "{place}: {faults:?}");
        let record = parse(&to_text(value)).unwrap();
        assert_eq!(violations(&record), [], "{place}");
        canonical_sha256(&record).unwrap();
    };
    assert_valid(&serde_json::to_value(&*RECORD).unwrap(), "the scripted engine's record");
    for path in [vec![cpu], committed_records(&root().join("results"))].concat() {
        let value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_valid(&value, &path.display().to_string());
    }
}

/// Every record in the repository: what is neither a schema, nor published anchors, nor a calibration or prediction.
fn committed_records(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.map(|entry| entry.unwrap().path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_other = ["anchors", "calibrations"].contains(&name.as_str()) || name.ends_with("-predictions");
        if path.is_dir() && !is_other {
            found.extend(committed_records(&path));
        } else if name.ends_with(".json") && !name.ends_with("schema.json") {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_record_survives_the_file_unchanged() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("record.json");
    let text = serde_json::to_string_pretty(&*RECORD).unwrap();
    write_atomically(&path, text.as_bytes()).unwrap();
    assert_eq!(read(&path).unwrap(), *RECORD);
}

/// JSON pointers to everything inside `value`, itself included.
fn places(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                places(field, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), out);
            }
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, item)| places(item, &format!("{at}/{index}"), out));
        }
        _ => {}
    }
}

/// Fields that older files lack: read as not recorded, and left out again when such a file is copied. Numbers of
/// elements are left out.
const YOUNGER: [&str; 23] = [
    "/command/hold_out",
    "/cells//gpus",
    "/machine/gpu_driver/branch",
    "/machine/gpu_driver/library",
    "/machine/gpu_driver/nvml_version",
    "/session/driver_loaded_by",
    "/cells//runs//cooldown",
    "/command/thermal",
    "/cells//warmup/ended",
    "/cells//runs//ramp/ended",
    "/command/steady",
    "/command/warmup_seconds",
    "/ceilings",
    "/engine/cublaslt",
    "/engine/kernels",
    "/numerics",
    "/meter/scope",
    "/meter/devices",
    "/meter/systematic_share",
    "/meter/trace",
    "/meter/idle_no_context",
    "/meter/idle_context_resident",
    "/meter/idle_after_load",
];

fn is_younger(at: &str) -> bool {
    let pattern: Vec<&str> =
        at.split('/').map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit())).collect();
    YOUNGER.contains(&pattern.join("/").as_str())
}

#[test]
fn every_younger_field_is_in_a_record_of_this_version() {
    let mut all = Vec::new();
    places(&SMALL, "", &mut all);
    let found: std::collections::BTreeSet<String> = all
        .iter()
        .filter(|at| is_younger(at))
        .map(|at| at.replace(|c: char| c.is_ascii_digit(), ""))
        .collect();
    assert_eq!(found, YOUNGER.iter().map(|at| (*at).to_owned()).collect());
}

#[test]
fn a_file_that_lacks_a_younger_field_is_read_and_keeps_its_hash() {
    let mut older = SMALL.clone();
    let mut all = Vec::new();
    places(&SMALL, "", &mut all);
    for at in all.iter().filter(|at| is_younger(at)) {
        let (parent, name) = at.rsplit_once('/').unwrap();
        older.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name).unwrap();
    }
    assert!(schema().is_valid(&older));
    let read = parse(&to_text(&older)).unwrap();
    assert_eq!(read.engine.cublaslt.reason(), Some("not_recorded"));
    assert_eq!(serde_json::to_value(&read).unwrap(), older, "the file would get another hash");
}

#[test]
fn schema_and_reader_refuse_every_field_removed_added_or_of_another_type() {
    let schema = schema();
    let mut all = Vec::new();
    places(&SMALL, "", &mut all);
    assert!(schema.is_valid(&SMALL) && parse(&to_text(&SMALL)).is_ok());
    let refused = |value: &Value, what: &str| {
        assert!(!schema.is_valid(value), "the schema accepts {what}");
        assert!(parse(&to_text(value)).is_err(), "the reader accepts {what}");
    };
    let free = ["env", "stored_bytes", "libraries", "mitigations"];
    for at in &all {
        let mut wrong = SMALL.clone();
        *wrong.pointer_mut(at).unwrap() = json!([[]]);
        refused(&wrong, &format!("a list of lists at {at}"));
        let mut more = SMALL.clone();
        if let Some(fields) = more.pointer_mut(at).and_then(Value::as_object_mut) {
            fields.insert("foreign".to_owned(), json!({"x": 1}));
            refused(&more, &format!("a foreign field in {at}"));
        }
        let (parent, name) = at.rsplit_once('/').unwrap_or_default();
        let optional =
            name == "not_a_measurement" || is_younger(at) || free.iter().any(|map| parent.ends_with(map));
        let mut less = SMALL.clone();
        if let Some(fields) = less.pointer_mut(parent).and_then(Value::as_object_mut)
            && !at.is_empty()
            && !optional
        {
            fields.remove(name);
            refused(&less, &format!("no field {at}"));
        }
    }
    // Not one sample but every field was tried.
    assert!(all.len() > 500, "{}", all.len());
}

#[test]
fn what_is_no_record_is_refused_with_a_reason() {
    let text = to_text(&SMALL);
    let newer = text.replacen("tokmeter-record/1", "tokmeter-record/2", 1);
    let cases = [
        (String::new(), "is no JSON"),
        (text[..text.len() / 2].to_owned(), "is no JSON"),
        (format!("{text}{text}"), "is no JSON"),
        (format!("{}{}", "[".repeat(1 << 20), "]".repeat(1 << 20)), "is no JSON: recursion limit"),
        (text.replacen("\"min_seconds\":0.3", "\"min_seconds\":NaN", 1), "is no JSON"),
        (text.replacen("\"min_seconds\":0.3", "\"min_seconds\":1e999", 1), "is no JSON"),
        (text.replacen("\"seed\":0", "\"seed\":-1", 1), "invalid value"),
        (text.replacen("\"seed\":0", "\"seed\":18446744073709551616", 1), "invalid"),
        (newer, "has schema tokmeter-record/2, expected tokmeter-record/1; it was made by another version"),
        ("{\"schema\": \"nvbandwidth\"}".to_owned(), "has schema nvbandwidth, expected tokmeter-record/1"),
        ("null".to_owned(), "has no field schema"),
        ("{\"schema\": 1}".to_owned(), "has no field schema"),
    ];
    for (text, expected) in cases {
        assert!(text != to_text(&SMALL), "the case {expected:?} changes nothing");
        let reason = parse(&text).expect_err(expected);
        assert!(reason.contains(expected), "{reason} does not say {expected}");
        assert!(!reason.contains('\n') && reason.len() < 300, "{reason}");
    }
    let folder = tempdir().unwrap();
    let path = folder.path().join("latin1.json");
    std::fs::write(&path, b"{\"schema\": \"\xe9\"}").unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("latin1.json: cannot be read as text"), "{error}");
}

/// Where the contradiction is found, what is said, and how it is planted.
type Contradiction = (&'static str, &'static str, fn(&mut Record));

const DECODE: usize = 2;
const GENERATE: usize = 4;

fn histogram(of: &mut Maybe<LatencyHistogram>) -> &mut LatencyHistogram {
    match of {
        Maybe::Value(histogram) => histogram,
        Maybe::Missing(missing) => panic!("{}", missing.missing),
    }
}

fn moved(time_ns: &Maybe<u64>, by_ns: i64) -> u64 {
    time_ns.value().unwrap().strict_add_signed(by_ns)
}

const CONTRADICTIONS: [Contradiction; 24] = [
    ("cells[0] x", "key is x, expected prefill/b1/i128", |record| {
        record.cells[0].key = "x".to_owned();
        record.command.planned_cells[0] = "x".to_owned();
    }),
    ("cells", "expected the first of command.planned_cells", |record| {
        record.command.planned_cells.swap(0, 1)
    }),
    ("status", "complete with 5 cells, expected 6", |record| drop(record.cells.pop())),
    ("finished_at", "does not fit status Complete", |record| record.finished_at = Maybe::missing("running")),
    ("finished_at", "does not fit status Running", |record| record.status = Status::Running),
    ("cells[0] prefill", "measured with 1 runs, expected 2", |record| drop(record.cells[0].runs.pop())),
    ("run 1", "index is 7, expected 1", |record| record.cells[0].runs[1].index = 7),
    ("run 0", "expected later than its start", |record| {
        let window = &mut record.cells[0].runs[0].windows[0];
        window.t1_ns = window.t0_ns;
    }),
    ("run 0", "window counts", |record| record.cells[0].runs[0].windows[0].tokens_in += 1),
    ("run 0", "window counts", |record| record.cells[DECODE].runs[0].windows[0].tokens_out -= 1),
    ("run 0", "window completed", |record| record.cells[0].runs[0].windows[0].requests_completed += 1),
    ("run 0", "expected the windows'", |record| record.cells[0].runs[0].windows[0].steps += 1),
    ("run 0", "request 0 has 129 input", |record| record.cells[DECODE].runs[0].requests[0].isl_tokens += 1),
    ("run 0", "and 15 output tokens, expected", |record| {
        record.cells[DECODE].runs[0].requests[0].osl_tokens -= 1
    }),
    ("run 0", "and 16 output tokens, expected", |record| {
        record.cells[DECODE].runs[0].requests[0].complete = false
    }),
    ("run 0", "its times are not in order", |record| {
        record.cells[DECODE].runs[0].requests[0].arrival_ns += 1
    }),
    ("run 0", "its times are not in order", |record| {
        let row = &mut record.cells[DECODE].runs[0].requests[0];
        row.submitted_ns = moved(&row.first_token_ns, 0);
    }),
    ("run 0", "its times are not in order", |record| {
        let row = &mut record.cells[DECODE].runs[0].requests[0];
        row.last_token_ns = Maybe::Value(moved(&row.first_token_ns, -1));
    }),
    ("run 0", "its times are not in order", |record| {
        record.cells[DECODE].runs[0].requests[0].first_token_ns = Maybe::missing("no_token");
    }),
    ("run 0", "latency.ttft does not follow", |record| {
        histogram(&mut record.cells[GENERATE].runs[0].latency.ttft).sum_ns += 1;
    }),
    ("run 0", "latency.e2e does not follow", |record| {
        histogram(&mut record.cells[GENERATE].runs[0].latency.e2e).min_ns -= 1;
    }),
    ("run 0", "latency.itl: histogram holds", |record| {
        histogram(&mut record.cells[GENERATE].runs[0].latency.itl).count += 1;
    }),
    ("run 0", "latency.itl: count, min_ns and max_ns do not fit", |record| {
        let histogram = histogram(&mut record.cells[GENERATE].runs[0].latency.itl);
        histogram.min_ns = histogram.max_ns + 1;
    }),
    ("run 0", "check stamps_never_go_back failed: seen", |record| {
        let check = &mut record.cells[0].runs[0].checks[0];
        (check.ok, check.detail) = (false, "seen".to_owned());
    }),
];

#[test]
fn each_planted_contradiction_is_found_and_nothing_else() {
    assert_eq!(violations(&RECORD), []);
    for (place, what, plant) in CONTRADICTIONS {
        let mut record = RECORD.clone();
        plant(&mut record);
        let found = violations(&record);
        assert_eq!(found.len(), 1, "{what}: {found:?}");
        assert!(found[0].place.contains(place) && found[0].what.contains(what), "{what}: {found:?}");
    }
}

#[test]
fn validate_names_the_contradiction_and_exits_with_3() {
    let folder = tempdir().unwrap();
    let mut record = RECORD.clone();
    record.cells[0].runs[0].windows[0].tokens_in += 1;
    write_atomically(
        &folder.path().join("good.json"),
        to_text(&serde_json::to_value(&*RECORD).unwrap()).as_bytes(),
    )
    .unwrap();
    write_atomically(
        &folder.path().join("bad.json"),
        to_text(&serde_json::to_value(&record).unwrap()).as_bytes(),
    )
    .unwrap();
    let done = tokmeter(folder.path(), &["validate", "bad.json", "good.json"]);
    assert_eq!(done.code, Some(3));
    assert!(
        done.stderr.starts_with("error: bad.json: cells[0] prefill/b1/i128, run 0: window counts"),
        "{done:?}"
    );
    assert_eq!(done.stdout, format!("{}  good.json\n", canonical_sha256(&RECORD).unwrap()));
}

/// Every object's fields in the opposite order.
fn reversed(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let inner: Vec<String> = fields
                .iter()
                .rev()
                .map(|(name, field)| format!("{}: {}", json!(name), reversed(field)))
                .collect();
            format!("{{\n{}\n}}", inner.join(" ,\n\t"))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(reversed).collect::<Vec<_>>().join(" , ")),
        other => other.to_string(),
    }
}

#[test]
fn the_hash_is_that_of_the_content_alone() {
    let sha256 = canonical_sha256(&RECORD).unwrap();
    let value = serde_json::to_value(&*RECORD).unwrap();
    let shuffled = reversed(&value);
    assert_ne!(shuffled, to_text(&value));
    assert_eq!(canonical_sha256(&parse(&shuffled).unwrap()).unwrap(), sha256);
    // By another implementation: RFC 8785 of plain integers and ASCII text is compact JSON with sorted keys.
    assert_eq!(sha256.len(), 64);
}

#[test]
fn the_hash_changes_with_any_value() {
    let sha256 = canonical_sha256(&parse(&to_text(&SMALL)).unwrap()).unwrap();
    let mut all = Vec::new();
    places(&SMALL, "", &mut all);
    let mut changed = 0;
    for at in all {
        let mut value = SMALL.clone();
        match value.pointer_mut(&at).unwrap() {
            Value::Number(number) if number.is_u64() => *number = (number.as_u64().unwrap() ^ 1).into(),
            Value::Number(number) => {
                *number = serde_json::Number::from_f64(number.as_f64().unwrap() + 0.25).unwrap();
            }
            Value::String(text) => text.push('x'),
            Value::Bool(flag) => *flag = !*flag,
            _ => continue,
        }
        // Names from closed sets no longer parse, which is as good.
        let Ok(record) = parse(&to_text(&value)) else { continue };
        assert_ne!(canonical_sha256(&record).unwrap(), sha256, "{at}");
        changed += 1;
    }
    assert!(changed > 200, "{changed}");
}

#[test]
fn an_integer_that_canonical_json_would_round_has_no_hash() {
    let mut record = RECORD.clone();
    record.command.seed = (1 << 53) - 1;
    canonical_sha256(&record).unwrap();
    record.command.seed = 1 << 53;
    let error = canonical_sha256(&record).unwrap_err().to_string();
    assert!(error.contains("9007199254740992"), "{error}");
}

#[test]
fn a_failed_write_leaves_the_earlier_file_and_nothing_else() {
    let folder = tempdir().unwrap();
    let text = serde_json::to_string(&*RECORD).unwrap();
    std::fs::write(folder.path().join("record.json"), &text).unwrap();
    std::fs::write(folder.path().join("report.md"), "earlier").unwrap();
    // Files of half a KiB or one: the report does not fit, whoever runs this, root too.
    let limits = "trap '' XFSZ; ulimit -f 1";
    let args = ["report", "--allow-not-a-measurement", "record.json", "--out", "report.md"];
    let done = tokmeter_limited(folder.path(), limits, &args, Duration::from_secs(10));
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.stderr.starts_with("error: report.md: cannot write the report: File too large"), "{done:?}");
    assert_eq!(std::fs::read_to_string(folder.path().join("report.md")).unwrap(), "earlier");
    assert_eq!(folder.path().read_dir().unwrap().count(), 2, "no temporary file is left");
    let done = tokmeter(folder.path(), &args);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(
        std::fs::read_to_string(folder.path().join("report.md")).unwrap().starts_with("# tokmeter report")
    );
}

#[cfg(unix)]
#[test]
fn a_link_is_followed_and_a_device_is_not_replaced() {
    let folder = tempdir().unwrap();
    let (target, link) = (folder.path().join("target"), folder.path().join("link"));
    std::fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    write_atomically(&link, b"new").unwrap();
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "new");
    assert!(link.symlink_metadata().unwrap().is_symlink());
    let error = write_atomically(Path::new("/dev/null"), b"x").unwrap_err().to_string();
    assert!(error.contains("no regular file"), "{error}");
}

/// Something that does not belong where it is put.
fn intruder() -> impl Strategy<Value = Value> {
    let numbers = [0u64, 1, 5, 1 << 32, (1 << 53) - 1, i64::MAX as u64, u64::MAX];
    prop_oneof![
        proptest::sample::select(numbers.to_vec()).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(json!({"missing": "x"})),
        Just(json!(null)),
        Just(json!([])),
        Just(json!(true)),
        Just(json!("serve-open")),
        Just(json!("0.0000000000000000000000000001")),
    ]
}

/// Changes one place: mostly a number to another, because the reader accepts that and the code behind it is reached;
/// sometimes a list, or anything to anything.
fn mutate(value: &mut Value, pick: usize, action: u8, intruder: Value) {
    let mut all = Vec::new();
    places(value, "", &mut all);
    let wanted = |at: &String| match action {
        0..=9 => value.pointer(at).is_some_and(Value::is_number),
        10..=12 => value.pointer(at).is_some_and(Value::is_array),
        13 => value.pointer(at).is_some_and(Value::is_string),
        _ => true,
    };
    let fitting: Vec<&String> = all.iter().filter(|at| wanted(at)).collect();
    // Earlier mutations may have left nothing of the kind.
    let Some(at) = fitting.get(pick % fitting.len().max(1)) else { return };
    let extremes = [0, 1, 2, 1 << 20, u64::from(u32::MAX), 1 << 53, i64::MAX as u64, u64::MAX];
    match (value.pointer_mut(at).unwrap(), action) {
        (Value::Number(number), 0..=9) => *number = extremes[pick / 7 % extremes.len()].into(),
        (Value::Array(items), 10) => items.clear(),
        (Value::Array(items), 11) => items.extend(items.clone()),
        (Value::Array(items), 12) => items.reverse(),
        (Value::String(text), 13) => drop(text.pop()),
        (old, _) => *old = intruder,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_mutated_record_makes_a_reader_panic(
        changes in proptest::collection::vec((any::<usize>(), 0u8..16, intruder()), 1..4)
    ) {
        let mut value = SMALL.clone();
        for (pick, action, intruder) in changes {
            mutate(&mut value, pick, action, intruder);
        }
        if let Ok(record) = parse(&to_text(&value)) {
            violations(&record);
            let _ = canonical_sha256(&record);
            let summary = analysis::summarize(&record);
            report::table(&summary);
            report::csv(&summary);
            report::section(&summary);
            report::json(&summary).unwrap();
            report::jsonl(&summary).unwrap();
            report::document(&[record]);
        }
    }
}
