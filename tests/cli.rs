//! The program from outside: what it prints, to where, with which exit code, and what it leaves when it is stopped.

#![allow(clippy::unwrap_used)]

#[path = "common/program.rs"]
mod program;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;

use program::{Finished, start, tiny_model, tokmeter, tokmeter_limited};
use tempfile::tempdir;
use tokmeter::record::{Maybe, Outcome, Record, Status, Steady, WarmupEnd, read, violations};

/// Step times that make round numbers: 10 ms a step, 1 ms for each prompt token, 2 ms for each sequence that decodes.
const SCRIPT: &str = r#"{"base_ns":10000000,"per_prefill_token_ns":1000000,"per_decode_token_ns":2000000,"per_context_token_ps":0}"#;

/// Runs the scripted engine; 2 runs of at least 0.5 s.
fn fake(folder: &Path, args: &[&str]) -> Finished {
    let run = [
        "run",
        "--engine",
        "fake",
        "--fake-script",
        SCRIPT,
        "-r",
        "2",
        "--min-seconds",
        "0.5",
        "-o",
        "r.json",
    ];
    tokmeter(folder, &[&run[..], args].concat())
}

fn assert_prints(args: &[&str], expected: &str) {
    let folder = tempdir().unwrap();
    let done = fake(folder.path(), args);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.stdout == expected, "{args:?} printed\n{}\nexpected\n{expected}", done.stdout);
    assert_eq!(done.stderr, "record: r.json\n");
    assert_eq!(violations(&read(&folder.path().join("r.json")).unwrap()), []);
}

// By hand: 40 prompt tokens take 50 ms, so 10 passes fill 0.5 s and give 400 / 0.5 = 800 tok/s; two prompts take 90 ms,
// 6 passes give 480 / 0.54 = 889. With 6 output tokens the first comes after 50 ms and each other after 12 ms: 5 passes
// of 110 ms, 30 / 0.55 = 54.5 tok/s, and at 2.50 USD an hour 3600 · 54.545 / 2.5 = 78 545 tokens a dollar. Decoding
// alone: 12 ms a token, 83.3 tok/s. A percentile is the upper end of its bucket of the histogram, at most 0.1 % above the
// value, and never above the exact largest one: the median step of 12 ms below is the only one that shows it.

#[test]
fn the_table_is_exact_to_the_byte() {
    assert_prints(
        &["--batch", "1,2", "--isl", "40", "--price-per-gpu-hour", "2.50 USD"],
        "\
smollm2-135m · none · fake on fake
NOT A MEASUREMENT: fake engine: step times come from a script

cell             tok/s      ±  TTFT p50  TTFT p99  TPOT p50  TPOT p99  MBU  MFU  tok/J    tok/USD
prefill/b1/i40  800 in  0.0 %   50.0 ms         –         –         –    –    –      –  1,152,000
prefill/b2/i40  889 in  0.0 %   90.0 ms         –         –         –    –    –      –  1,280,000

· prices: 2.50 USD per device and hour, energy included; 100 % of the paid hours used
– TTFT: p99 needs 299 observations
– TPOT: prefill cells make one token
– MBU: the engine is scripted
– MFU: the engine is scripted
– tok/J: no power sensor
",
    );
}

#[test]
fn markdown_is_exact_to_the_byte() {
    assert_prints(
        &["--batch", "1", "--depth", "40", "--osl", "6", "--format", "markdown"],
        "\
| cell | tok/s | ± | TTFT p50 | TTFT p99 | TPOT p50 | TPOT p99 | MBU | MFU | tok/J | tok/$ |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
| decode/b1/d40/o6 | 83.3 out | 0.0 % | – | – | 12.0 ms | – | – | – | – | – |

- – TTFT: decode cells do not time the prefill
- – TPOT: p99 needs 299 observations
- – MBU: the engine is scripted
- – MFU: the engine is scripted
- – tok/J: no power sensor
- – price: no price given (--price-per-gpu-hour, --cost)
",
    );
}

#[test]
fn csv_is_exact_to_the_byte() {
    assert_prints(
        &["--batch", "1", "--isl", "40", "--osl", "6", "--format", "csv", "--price-per-gpu-hour", "2.50 USD"],
        "\
model,device,backend,compute_dtype,cell,runs,tokens,tokens_per_s,spread_ratio,total_tokens_per_s,\
ttft_count,ttft_p50_ns,ttft_p90_ns,ttft_p99_ns,itl_count,itl_p50_ns,itl_p90_ns,itl_p99_ns,\
tpot_count,tpot_p50_ns,tpot_p90_ns,tpot_p99_ns,e2e_count,e2e_p50_ns,e2e_p90_ns,e2e_p99_ns,\
step_count,step_p50_ns,step_p90_ns,step_p99_ns,mbu_share,mfu_share,tokens_per_joule,joules_per_token,power_w,\
energy_uncertainty_ratio,net_tokens_per_joule,tokens_per_money,currency,flags
\"smollm2-135m\",fake,fake,none,generate/b1/i40/o6,2,output,54.54545454545454,0,418.18181818181813,\
10,50000000,,,50,12000000,12000000,,10,12000000,,,10,110000000,,,60,12001279,50000000,,,,,,,,,78545.45454545454,USD,0
",
    );
}

#[test]
fn json_lines_are_exact_to_the_byte() {
    assert_prints(
        &["--batch", "1", "--isl", "40", "--format", "jsonl"],
        concat!(
            r#"{"model":"smollm2-135m","device":"fake","backend":"fake","compute_dtype":"none","#,
            r#""started_at":"2026-01-01T00:00:00.000Z","#,
            r#""not_a_measurement":"fake engine: step times come from a script","#,
            r#""key":"prefill/b1/i40","runs":2,"throughput":{"tokens":"input","tokens_per_s":800.0,"#,
            r#""spread_ratio":0.0,"total_tokens_per_s":820.0},"#,
            r#""ttft":{"count":20,"mean_ns":50000000.0,"p50_ns":50000000.0,"#,
            r#""p90_ns":{"missing":"needs_29_observations"},"p99_ns":{"missing":"needs_299_observations"}},"#,
            r#""itl":{"missing":"one_output_token"},"tpot":{"missing":"one_output_token"},"#,
            r#""e2e":{"count":20,"mean_ns":50000000.0,"p50_ns":50000000.0,"#,
            r#""p90_ns":{"missing":"needs_29_observations"},"p99_ns":{"missing":"needs_299_observations"}},"#,
            r#""step":{"count":20,"mean_ns":50000000.0,"p50_ns":50000000.0,"#,
            r#""p90_ns":{"missing":"needs_29_observations"},"p99_ns":{"missing":"needs_299_observations"}},"#,
            r#""mbu_share":{"missing":"fake_engine"},"mfu_share":{"missing":"fake_engine"},"#,
            r#""tokens_per_joule":{"missing":"no_sensor"},"joules_per_token":{"missing":"no_sensor"},"#,
            r#""power_w":{"missing":"no_sensor"},"energy_uncertainty_ratio":{"missing":"no_sensor"},"#,
            r#""net_tokens_per_joule":{"missing":"no_sensor"},"tokens_per_money":{"missing":"no_price"},"#,
            r#""cost":{"missing":"no_price"},"flags":[]}"#,
            "\n"
        ),
    );
}

#[test]
fn json_is_exact_to_the_byte() {
    let quantiles = |count: u32, ns: &str| {
        format!(
            "{{
        \"count\": {count},
        \"mean_ns\": {ns},
        \"p50_ns\": {ns},
        \"p90_ns\": {{
          \"missing\": \"needs_29_observations\"
        }},
        \"p99_ns\": {{
          \"missing\": \"needs_299_observations\"
        }}
      }}"
        )
    };
    let missing = |reason: &str| format!("{{\n        \"missing\": \"{reason}\"\n      }}");
    let expected = format!(
        "{{
  \"model\": \"smollm2-135m\",
  \"device\": \"fake\",
  \"backend\": \"fake\",
  \"compute_dtype\": \"none\",
  \"synthetic_weights\": false,
  \"currency\": {{
    \"missing\": \"no_price\"
  }},
  \"prices\": {{
    \"missing\": \"no_price\"
  }},
  \"energy_from\": {{
    \"missing\": \"no_sensor\"
  }},
  \"started_at\": \"2026-01-01T00:00:00.000Z\",
  \"not_a_measurement\": \"fake engine: step times come from a script\",
  \"cells\": [
    {{
      \"key\": \"prefill/b1/i40\",
      \"runs\": 2,
      \"throughput\": {{
        \"tokens\": \"input\",
        \"tokens_per_s\": 800.0,
        \"spread_ratio\": 0.0,
        \"total_tokens_per_s\": 820.0
      }},
      \"ttft\": {ttft},
      \"itl\": {one},
      \"tpot\": {one},
      \"e2e\": {ttft},
      \"step\": {ttft},
      \"mbu_share\": {fake},
      \"mfu_share\": {fake},
      \"tokens_per_joule\": {sensor},
      \"joules_per_token\": {sensor},
      \"power_w\": {sensor},
      \"energy_uncertainty_ratio\": {sensor},
      \"net_tokens_per_joule\": {sensor},
      \"tokens_per_money\": {price},
      \"cost\": {price},
      \"flags\": []
    }}
  ]
}}
",
        ttft = quantiles(20, "50000000.0"),
        one = missing("one_output_token"),
        fake = missing("fake_engine"),
        sensor = missing("no_sensor"),
        price = missing("no_price"),
    );
    assert_prints(&["--batch", "1", "--isl", "40", "--format", "json"], &expected);
}

/// Passes of 12 ms and a warm-up of 0.12 s, which is flat at once; from step 30 on, within the first of two windows of
/// 42 passes, each step takes 5 % longer.
#[test]
fn a_run_that_slows_down_is_kept_and_flagged_in_words() {
    let folder = tempdir().unwrap();
    let suite = "name='own'\ndescription='d'\nrepeat=2\nmin_seconds=0.5\nwarmup_seconds=0.12\nsteady=true\n\
        [[cells]]\nkind='decode'\nbatch=1\ndepth=40\nosl=1\n";
    std::fs::write(folder.path().join("own.toml"), suite).unwrap();
    let script = SCRIPT.replace('}', r#","shift":1.05,"shift_at_step":30}"#);
    let run = ["run", "--engine", "fake", "--suite", "own.toml", "--fake-script", &script, "-o", "r.json"];
    let done = tokmeter(folder.path(), &run);
    assert_eq!(done.code, Some(0), "{done:?}");
    let flag =
        "! decode/b1/d40/o1: not steady in 1 run: slowing down, the window ends slower than it began\n";
    assert!(done.stdout.contains(flag), "{}", done.stdout);
    let record = read(&folder.path().join("r.json")).unwrap();
    assert_eq!(violations(&record), []);
    assert_eq!(record.command.warmup_seconds, Maybe::Value(0.12));
    assert_eq!(record.command.steady, Maybe::Value(true));
    let cell = &record.cells[0];
    assert_eq!(cell.warmup.value().unwrap().ended, Maybe::Value(WarmupEnd::Flat));
    assert_eq!([cell.runs[0].steady, cell.runs[1].steady], [Steady::Slowdown, Steady::Steady]);
    let markdown = tokmeter(folder.path(), &["report", "r.json", "--allow-not-a-measurement"]);
    assert!(markdown.stdout.contains(flag), "{}", markdown.stdout);
}

#[test]
fn cooling_down_without_a_temperature_is_refused_before_anything_is_measured() {
    let folder = tempdir().unwrap();
    let done = fake(folder.path(), &["--batch", "1", "--isl", "40", "--thermal", "cooldown"]);
    assert_eq!(done.code, Some(2), "{done:?}");
    let error = "error: --thermal cooldown: the temperature cannot be read (no_sensor), expected a sensor that shows it\n\
        hint: ";
    assert!(done.stderr.starts_with(error), "{}", done.stderr);
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "no file is written");
}

/// The same record at another price: nothing measured changes, and the arithmetic is that of a slip of paper.
#[test]
fn another_price_changes_no_measured_value() {
    let folder = tempdir().unwrap();
    let costs = concat!(env!("CARGO_MANIFEST_DIR"), "/costs/owned-8-gpu-server.toml");
    fake(folder.path(), &["--batch", "1", "--depth", "40", "--osl", "6", "--price-per-gpu-hour", "3.00 EUR"]);
    let record = read(&folder.path().join("r.json")).unwrap();
    let report = |args: &[&str]| {
        let args = [&["report", "r.json", "--allow-not-a-measurement"], args].concat();
        tokmeter(folder.path(), &args)
    };
    // 83.33 tok/s are 0.3 Mtok an hour, 10 EUR each.
    let own = report(&[]);
    let row = "| decode/b1/d40/o6 | 10.0000 | – | 10.0000 | – | 16.6667 | 33.3333 |";
    assert!(own.stdout.contains(row), "{}", own.stdout);
    let other = report(&["--price-per-gpu-hour", "6.00 EUR"]);
    let row = "| decode/b1/d40/o6 | 20.0000 | – | 20.0000 | – | 33.3333 | 66.6667 |";
    assert!(other.stdout.contains(row), "{}", other.stdout);
    // Power was not measured, so what an owned device costs is not known.
    let owned = report(&["--cost", costs, "--currency", "EUR"]);
    assert!(owned.stdout.contains("| decode/b1/d40/o6 | – | – | – | – | – | – |"), "{}", owned.stdout);
    assert!(owned.stdout.contains("converted from USD at 0.92 (2026-11-22), AN EXAMPLE"), "{}", owned.stdout);
    assert_eq!(report(&["--cost", costs, "--currency", "JPY"]).code, Some(2));
    assert_eq!(report(&["--cost", "r.json"]).code, Some(3));
    assert_eq!(read(&folder.path().join("r.json")).unwrap(), record);
}

#[test]
fn the_same_command_makes_the_same_record_but_for_the_machine() {
    let folder = tempdir().unwrap();
    let mut records: Vec<Record> = (0..2)
        .map(|_| {
            fake(folder.path(), &["--concurrency", "3", "--isl", "16", "--osl", "8"]);
            read(&folder.path().join("r.json")).unwrap()
        })
        .collect();
    // Load, free memory and uptime move by themselves.
    records[0].machine = records[1].machine.clone();
    assert_eq!(records[0], records[1]);
}

#[test]
fn every_verb_has_help_with_examples() {
    let folder = tempdir().unwrap();
    let help = tokmeter(folder.path(), &["--help"]);
    assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""));
    let verbs: Vec<&str> = help
        .stdout
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        // A verb stands two columns in; a description that goes on in the next line stands further right.
        .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert!(
        ["run", "check", "peaks", "compare", "doctor", "models", "validate", "report"]
            .iter()
            .all(|verb| verbs.contains(verb)),
        "{verbs:?}"
    );
    for verb in verbs {
        for flag in ["--help", "-h"] {
            let help = tokmeter(folder.path(), &[verb, flag]);
            assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""), "{verb} {flag}");
            assert!(
                help.stdout.contains("Examples:") && help.stdout.contains(&format!("tokmeter {verb}")),
                "{verb}"
            );
        }
    }
}

#[test]
fn the_version_names_commit_target_and_kernels() {
    let folder = tempdir().unwrap();
    let said = |flag: &str| tokmeter(folder.path(), &[flag]).stdout;
    let long = said("--version");
    let lines: Vec<&str> = long.lines().collect();
    assert_eq!(lines[0], format!("tokmeter {}", env!("CARGO_PKG_VERSION")));
    let value = |key: &str| {
        lines.iter().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("no {key} in\n{long}"))
    };
    // Git says which commit this is; a copy of the source outside a checkout says that it is unknown.
    let head = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let head = head.ok().filter(|head| head.status.success()).map(|head| String::from_utf8(head.stdout));
    let commit = value("commit: ");
    match head {
        Some(head) => assert_eq!(commit.trim_end_matches("-dirty"), head.unwrap().trim()),
        None => assert!(commit.starts_with("unknown: "), "{commit}"),
    }
    let short = if commit.contains(' ') { commit } else { &commit.replace(&commit[12..40], "") };
    assert_eq!(said("-V"), format!("tokmeter {} ({short})\n", env!("CARGO_PKG_VERSION")));
    assert!(value("target: ").starts_with(std::env::consts::ARCH), "{long}");
    assert!(!value("features: ").is_empty());
    // The folder that the build embeds, as scripts/prebuild_kernels.py names its files.
    let images = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/prebuilt"));
    let names = images.into_iter().flatten().map(|image| image.unwrap().file_name().into_string().unwrap());
    let architectures: BTreeSet<String> =
        names.map(|name| name.split('.').nth(1).unwrap().to_owned()).collect();
    let listed: BTreeSet<String> =
        value("kernels: ").split(", ").filter(|name| *name != "none").map(str::to_owned).collect();
    assert_eq!(listed, architectures);
}

#[test]
fn a_dry_run_prints_the_plan_and_does_nothing() {
    let folder = tempdir().unwrap();
    let args = [
        "run",
        "--dry-run",
        "--device=cpu",
        "--batch",
        "1,8",
        "--depth",
        "128",
        "-r",
        "4",
        "--min-seconds",
        "2",
    ];
    let done = tokmeter(folder.path(), &args);
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    for line in [
        "model    smollm2-135m",
        "runs     4 per cell, windows of at least 2 s",
        "decode/b1/d128/o32",
        "decode/b8/d128/o32",
    ] {
        assert!(done.stdout.lines().any(|own| own == line), "no line {line:?} in {}", done.stdout);
    }
    // 2 cells of 4 windows of 2 s and 0.3 s of warm-up.
    assert!(done.stdout.contains("2 cells, at least 17 s"), "{}", done.stdout);
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "no file is written");
}

#[test]
fn a_failed_cell_keeps_the_others_and_exits_with_1() {
    let folder = tempdir().unwrap();
    let model = tiny_model();
    // One page of KV memory: a request of 8 + 4 tokens fits, one of 8 + 24 does not.
    let args = ["run", "-m", model.to_str().unwrap(), "--concurrency", "1", "--isl", "8", "--osl", "4,24"];
    let more = ["--kv-memory", "8KiB", "--requests", "2", "-r", "1", "--min-seconds", "0", "-o", "r.json"];
    let done = tokmeter(folder.path(), &[&args[..], &more].concat());
    assert_eq!(done.code, Some(1), "{done:?}");
    let record = read(&folder.path().join("r.json")).unwrap();
    assert_eq!(record.status, Status::Complete);
    assert_eq!(record.cells[0].outcome, Outcome::Measured);
    assert!(matches!(record.cells[1].outcome, Outcome::Failed { .. }), "{:?}", record.cells[1].outcome);
    assert!(
        done.stdout.contains("serve-closed/c1/i8/o24/n2 !") && done.stdout.contains("failed: "),
        "{done:?}"
    );
}

#[test]
fn data_goes_to_stdout_and_everything_else_to_stderr() {
    let folder = tempdir().unwrap();
    let model = tiny_model();
    let args = [
        "run",
        "-m",
        model.to_str().unwrap(),
        "--isl",
        "8",
        "-r",
        "1",
        "--min-seconds",
        "0",
        "--format",
        "jsonl",
    ];
    let done = tokmeter(folder.path(), &args);
    assert_eq!(done.code, Some(0), "{done:?}");
    let lines: Vec<serde_json::Value> =
        done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["key"], "prefill/b1/i8");
    // Without --out the record is named after device and time, and stderr says where it is.
    // A warning that the machine is not quiet may come before.
    let name = done.stderr.lines().find_map(|line| line.strip_prefix("record: ")).expect(&done.stderr);
    assert!(name.starts_with("tokmeter-cpu-20") && name.ends_with("Z.json"), "{name}");
    assert_eq!(read(&folder.path().join(name)).unwrap().cells.len(), 1);
}

#[test]
fn a_report_of_what_is_no_measurement_must_be_asked_for() {
    let folder = tempdir().unwrap();
    fake(folder.path(), &["--isl", "40"]);
    let done = tokmeter(folder.path(), &["report", "r.json"]);
    assert_eq!((done.code, done.stdout.as_str()), (Some(3), ""));
    assert_eq!(
        done.stderr,
        "error: r.json: is not a measurement: fake engine: step times come from a script\n"
    );
    let done = tokmeter(folder.path(), &["report", "r.json", "--allow-not-a-measurement"]);
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    assert!(done.stdout.contains("| prefill/b1/i40 | 800 in |"), "{}", done.stdout);
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_error() {
    let folder = tempdir().unwrap();
    let record = ["run", "--engine", "fake", "--isl", "8", "-r", "1", "--min-seconds", "0", "-o", "r.json"];
    let report = ["report", "r.json", "--allow-not-a-measurement"];
    let compare = ["compare", "--baseline", "r.json", "--candidate", "r.json", "--allow-not-a-measurement"];
    let compare = [&compare[..], &["--inconclusive", "pass"]].concat();
    for args in [
        &record[..],
        &report,
        &compare,
        &["validate", "r.json"],
        &["models"],
        &["--help"],
        &["run", "--help"],
    ] {
        let mut child = start(folder.path(), args);
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
        assert!(!stderr.contains("error") && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
    assert_eq!(read(&folder.path().join("r.json")).unwrap().status, Status::Complete);
}

#[test]
fn a_full_disk_leaves_the_earlier_cells_valid() {
    let folder = tempdir().unwrap();
    // 40 or 80 KiB, after the unit of the shell: the quick suite's record takes more. The signal is ignored, so that
    // the write fails as on a full disk.
    let limits = "trap '' XFSZ; ulimit -f 80";
    let args = ["run", "--engine", "fake", "--suite", "quick", "-o", "r.json"];
    let done = tokmeter_limited(folder.path(), limits, &args, Duration::from_secs(10));
    assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""), "{done:?}");
    assert!(done.stderr.starts_with("error: r.json: cannot write the record: "), "{done:?}");
    assert_eq!(done.stderr.lines().count(), 1, "{done:?}");
    let record = read(&folder.path().join("r.json")).unwrap();
    assert_eq!((record.status, violations(&record)), (Status::Running, vec![]));
    assert!(!record.cells.is_empty() && record.cells.len() < record.command.planned_cells.len());
    assert_eq!(folder.path().read_dir().unwrap().count(), 1, "no temporary file is left");
}

/// A run of the tiny model on the CPU whose cells take a second each.
fn start_long_run(folder: &Path) -> (Child, PathBuf) {
    let model = tiny_model();
    let args = ["run", "-m", model.to_str().unwrap(), "--batch", "1,2,3,4", "--isl", "8", "-r", "1"];
    let child =
        start(folder, &[&args[..], &["--min-seconds", "0.7", "--threads", "1", "-o", "r.json"]].concat());
    (child, folder.join("r.json"))
}

/// Waits until the record shows its first cell.
fn wait_for_a_cell(path: &Path) {
    for _ in 0..1500 {
        if read(path).is_ok_and(|record| !record.cells.is_empty()) {
            return;
        }
        sleep(Duration::from_millis(20));
    }
    panic!("no cell within 30 s");
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn a_signal_saves_what_was_measured_and_exits_with_130() {
    for name in ["-INT", "-TERM"] {
        let folder = tempdir().unwrap();
        let (child, path) = start_long_run(folder.path());
        wait_for_a_cell(&path);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{name}: {output:?}");
        let record = read(&path).unwrap();
        assert_eq!((record.status, violations(&record)), (Status::Interrupted, vec![]), "{name}");
        assert_eq!(record.cells[0].outcome, Outcome::Measured);
        assert_eq!(record.cells[0].runs.len(), 1);
        assert_eq!(record.cells.last().unwrap().outcome, Outcome::Interrupted);
        assert!(record.cells.len() < 5 && record.finished_at.value().is_some());
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert!(
            stdout.contains("prefill/b1/i8") && stdout.contains("interrupted; the runs before are kept"),
            "{stdout}"
        );
    }
}

#[test]
fn a_killed_run_leaves_the_earlier_cells_valid() {
    let folder = tempdir().unwrap();
    let (mut child, path) = start_long_run(folder.path());
    wait_for_a_cell(&path);
    child.kill().unwrap();
    child.wait().unwrap();
    let record = read(&path).unwrap();
    assert_eq!((record.status, violations(&record)), (Status::Running, vec![]));
    assert_eq!(record.cells[0].outcome, Outcome::Measured);
    assert_eq!(record.finished_at.reason(), Some("running"));
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    let folder = tempdir().unwrap();
    let model = tiny_model();
    // One step of 40 800 tokens takes seconds, and a signal alone is heard only after it.
    let args = ["run", "-m", model.to_str().unwrap(), "--batch", "160", "--isl", "255", "--chunk", "40800"];
    let mut child = start(folder.path(), &[&args[..], &["--threads", "1", "-o", "r.json"]].concat());
    let path = folder.path().join("r.json");
    for _ in 0..1500 {
        if path.exists() {
            break;
        }
        sleep(Duration::from_millis(20));
    }
    signal(&child, "-INT");
    sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "the step is not over");
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(output.stdout.is_empty(), "nothing is summed up");
    let record = read(&path).unwrap();
    assert_eq!((record.status, record.cells.len()), (Status::Running, 0));
}
