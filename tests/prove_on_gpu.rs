//! `scripts/prove_on_gpu.sh`, which has minutes on a card and must not spend them on finding its own faults: all groups
//! rehearsed on the stand-in driver, and with a program made up for the occasion one that hangs, floods and lies.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::stand_in::{Build, cublaslt, driver};
use common::waived;
use serde_json::Value;
use tempfile::TempDir;

const SCRIPT: &str = "scripts/prove_on_gpu.sh";
const GROUPS: [(&str, u64); 3] = [("contact", 240), ("perf", 270), ("deep", 150)];
/// More than this of the end of the output may be lost to who reads it.
const MOST_CLOSING_BYTES: usize = 10_000;
const MOST_ARCHIVE_BYTES: u64 = 16 << 20;
/// All that the script may take from the machine: neither ncu, nor nvidia-smi, nor compute-sanitizer.
const PROGRAMS: &str = "awk basename bash cat cut dirname env free grep gzip head iconv id ldd ls mkdir mktemp mv nproc \
    rm sed seq sha256sum sleep sort stat tail tar tee timeout tr uname";

/// A place where the script finds what is put there, and leaves its archives.
struct Rehearsal {
    folder: TempDir,
    settings: BTreeMap<String, String>,
}

/// What the script left.
struct Proof {
    code: i32,
    stdout: String,
    out: PathBuf,
}

impl Rehearsal {
    /// None without python3.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("bin")).unwrap();
        let rehearsal = Rehearsal { folder, settings: BTreeMap::new() };
        for name in PROGRAMS.split_whitespace() {
            if let Some(program) = on_path(name) {
                symlink(program, rehearsal.bin(name)).unwrap();
            }
        }
        let Some(python) = python() else {
            waived("python3 is missing, which reads reports for scripts/prove_on_gpu.sh");
            return None;
        };
        // Without what is installed beside it, such as torch.
        rehearsal.put("python3", &format!("exec {python} -S -E \"$@\""));
        Some(rehearsal)
    }

    fn bin(&self, name: &str) -> PathBuf {
        self.folder.path().join("bin").join(name)
    }

    /// A program of this name, in the shell's language.
    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.bin(name);
        std::fs::write(&path, format!("#!/bin/bash\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn set(mut self, name: &str, value: impl ToString) -> Self {
        self.settings.insert(name.to_owned(), value.to_string());
        self
    }

    /// The program itself on this build of the driver, sizes that take a moment, and patience; none without g++. A check
    /// of everything takes longer than all else together: what is checked is one operation in one case.
    fn on_the_stand_in(self, build: Build) -> Option<Self> {
        let library = driver(build)?;
        let one_case = "[[ \"$1\" != check || \"$*\" == *--op* ]] || set -- \"$@\" --op attention --case 'GQA 3, prompt of 45'";
        let program =
            self.put("tokmeter", &format!("{one_case}\nexec {} \"$@\"", env!("CARGO_BIN_EXE_tokmeter")));
        let tiny = "models/tiny/llama";
        let set = self.set("TOKMETER", program.display()).set("LD_LIBRARY_PATH", library.display());
        let set = set.set("TOKMETER_CUDA_LIBS", cublaslt()?);
        let set = set.set("MODEL", tiny).set("PROOF_SMALL_MODEL", tiny).set("PROOF_BATCH", "1,3");
        let set = set.set("PROOF_DEPTH", 8).set("PROOF_OSL", 2).set("PROOF_ISL", "16,32");
        Some(set.set("PROOF_WINDOW_SCALE", 0.01).set("PROOF_LIMIT_SCALE", 20))
    }

    fn run(&self, groups: &[&str]) -> Proof {
        let out = self.folder.path().join("out");
        let mut command = Command::new(on_path("bash").unwrap());
        command.arg(SCRIPT).arg(&out).args(groups);
        command.env_clear().env("PATH", self.folder.path().join("bin")).env("TMPDIR", self.folder.path());
        command.env("HOME", self.folder.path()).envs(&self.settings);
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(stderr, "", "the script itself is at fault");
        Proof { code: output.status.code().unwrap(), stdout: String::from_utf8(output.stdout).unwrap(), out }
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// The interpreter itself: what PATH holds may be a script that looks for it.
fn python() -> Option<String> {
    let output = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

impl Proof {
    /// (group, step) → (exit code, words) of the table, and in its order the names.
    fn table(&self) -> (Vec<String>, BTreeMap<String, (String, String)>) {
        let (phase, closing) = self.stdout.split_once("== results\n").unwrap();
        assert!(closing.len() < MOST_CLOSING_BYTES, "{} bytes", closing.len());
        let (_, table) = closing.split_once("\n== steps: ").unwrap();
        let lines: Vec<&str> = table.lines().skip(1).collect();
        let rows: Vec<&str> = lines.iter().copied().filter(|line| line.contains(" s  ")).collect();
        assert_eq!(rows, phase.lines().filter(|line| line.contains(" s  ")).collect::<Vec<_>>());
        let mut table = BTreeMap::new();
        let mut names = Vec::new();
        for row in rows {
            let (left, words) = row.split_once(" s  ").unwrap();
            let [group, step, code, _] = left.split_whitespace().collect::<Vec<_>>()[..] else {
                panic!("{row}")
            };
            names.push(format!("{group} {step}"));
            table.insert(format!("{group} {step}"), (code.to_owned(), words.to_owned()));
        }
        (names, table)
    }

    /// Names and contents of a group's archive.
    fn archive(&self, group: &str) -> BTreeMap<String, Vec<u8>> {
        let path = self.out.join(format!("proof-{group}.tar.gz"));
        assert!(std::fs::metadata(&path).unwrap().len() <= MOST_ARCHIVE_BYTES);
        let unpacked = tempfile::tempdir().unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-xzf").arg(&path).arg("-C").arg(unpacked.path());
        assert!(tar.status().unwrap().success());
        let files = std::fs::read_dir(unpacked.path()).unwrap().map(|entry| entry.unwrap().path());
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        files.map(|path| (name(&path), std::fs::read(&path).unwrap())).collect()
    }
}

/// What `--limits` says: for each group and fate of the check ("contact, check held") its steps with their seconds.
fn limits() -> BTreeMap<String, Vec<(String, u64)>> {
    let output = Command::new("bash").args([SCRIPT, "--limits"]).output().unwrap();
    assert!(output.status.success());
    let mut groups = BTreeMap::new();
    let mut steps = Vec::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        match line.split_once(": ") {
            Some((group, _)) => {
                groups.insert(group.to_owned(), std::mem::take(&mut steps));
            }
            None => {
                let (name, seconds) = line.rsplit_once(' ').unwrap();
                steps.push((name.to_owned(), seconds.parse().unwrap()));
            }
        }
    }
    groups
}

fn names(steps: &[(String, u64)]) -> Vec<String> {
    steps.iter().map(|(name, _)| name.clone()).collect()
}

#[test]
fn the_steps_of_each_group_keep_its_limit_whether_the_check_holds_or_not() {
    let limits = limits();
    let fates: Vec<&str> = limits.keys().map(String::as_str).collect();
    assert_eq!(
        fates,
        ["contact, check failed", "contact, check held", "deep, check held", "perf, check held"]
    );
    for (group, most) in GROUPS {
        for (fate, steps) in limits.iter().filter(|(fate, _)| fate.starts_with(group)) {
            let sum: u64 = steps.iter().map(|(_, seconds)| seconds).sum();
            assert!(sum <= most && steps.len() > 4, "{fate}: {sum} of {most} s");
        }
    }
}

#[test]
fn every_group_runs_from_end_to_end_on_the_stand_in_driver() {
    let Some(rehearsal) = Rehearsal::new() else { return };
    let Some(rehearsal) = rehearsal.on_the_stand_in(Build::Plain) else { return };
    let readings = "while :; do echo '2026/01/01, 1980 MHz, 2619 MHz, 612.50 W, 55, 0x0'; sleep 0.1; done";
    rehearsal.put("nvidia-smi", &format!("[ $# -gt 0 ] || exit 0\n{readings}"));
    rehearsal.put("compute-sanitizer", "echo '========= Error: Device not supported'; exit 1");
    let proof = rehearsal.run(&["contact", "perf", "deep"]);
    let (steps, table) = proof.table();
    let limits = limits();
    let planned = GROUPS.iter().flat_map(|(group, _)| names(&limits[&format!("{group}, check held")]));
    assert_eq!(steps, planned.collect::<Vec<_>>());
    let skipped = [
        ("perf torch", "-", "skipped: the python3 on PATH has no torch"),
        ("deep ncu", "-", "skipped: there is no ncu"),
        ("deep memcheck", "1", "skipped: ========= Error: Device not supported"),
        ("deep racecheck", "1", "skipped: ========= Error: Device not supported"),
        ("deep same-twice", "3", "skipped: error: "),
    ];
    for (step, (code, words)) in &table {
        if step == "deep driver-jit" && words.contains("is in no binary") {
            continue; // there is no kernel compiler here
        }
        match skipped.iter().find(|(name, ..)| name == step) {
            Some((_, expected, start)) => {
                assert!(code == expected && words.starts_with(start), "{step}: {words}")
            }
            None => assert_eq!((code.as_str(), words.as_str()), ("0", "ok"), "{step}\n{}", proof.stdout),
        }
    }
    assert_eq!(proof.code, 0);
    assert!(proof.stdout.contains("at most 612 W, SM clock 1980 to 1980 MHz"), "{}", proof.stdout);
    assert!(proof.stdout.contains("\n-- perf decode\n"), "{}", proof.stdout);

    let json = |files: &BTreeMap<String, Vec<u8>>, name: &str| -> Value {
        serde_json::from_slice(&files[name]).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let contact = proof.archive("contact");
    for check in
        ["check-own.json", "check-cublaslt.json", "check-model.json", "check-f16.json", "check-det.json"]
    {
        assert_eq!(json(&contact, check)["passed"], true, "{check}");
    }
    assert!(json(&contact, "peaks.json")["ceilings"]["read_bandwidth_bytes_per_s"].is_object());
    let perf = proof.archive("perf");
    let keys = |record: &Value| -> Vec<String> {
        record["cells"]
            .as_array()
            .unwrap()
            .iter()
            .map(|cell| cell["key"].as_str().unwrap().to_owned())
            .collect()
    };
    let decoded = ["decode/b1/d8/o2", "decode/b3/d8/o2"];
    assert_eq!(keys(&json(&perf, "decode.json")), decoded);
    assert_eq!(keys(&json(&perf, "again.json")), decoded);
    assert_eq!(keys(&json(&perf, "prefill.json")), ["prefill/b1/i16", "prefill/b1/i32"]);
    assert_eq!(json(&perf, "ops.json")["ops"]["times"].as_array().unwrap().len(), 2 * 7);
    let deep = proof.archive("deep");
    assert_eq!(json(&deep, "same-b2.json")["session"]["label"], "b2");
    for (files, group) in [(&contact, "contact"), (&perf, "perf"), (&deep, "deep")] {
        assert!(!files["clocks.csv"].is_empty() && !files["steps.txt"].is_empty(), "{group}");
        for step in steps.iter().filter_map(|step| step.strip_prefix(&format!("{group} "))) {
            let ran = table[&format!("{group} {step}")].0 != "-";
            assert_eq!(files.contains_key(&format!("{step}.log")), ran, "{step}");
        }
    }
}

#[test]
fn a_check_that_fails_is_narrowed_down_and_nothing_is_timed() {
    let Some(rehearsal) = Rehearsal::new() else { return };
    let Some(rehearsal) = rehearsal.on_the_stand_in(Build::WrongAttention) else { return };
    let called = rehearsal.folder.path().join("sanitizer-calls");
    let pass_through = format!("echo \"$*\" >> {}; shift 4; exec \"$@\"", called.display());
    rehearsal.put("compute-sanitizer", &pass_through);
    let proof = rehearsal.run(&["contact", "perf"]);
    let (steps, table) = proof.table();
    assert_eq!(proof.code, 1);
    assert_eq!(steps, [names(&limits()["contact, check failed"]), vec!["perf -".to_owned()]].concat());
    assert_eq!(table["perf -"], ("-".to_owned(), "skipped: what computes wrong is not timed".to_owned()));
    assert_eq!(table["contact doctor"].1, "ok");
    for step in ["check-own", "no-overlap", "no-graphs", "one-by-one"] {
        let (code, words) = &table[&format!("contact {step}")];
        assert!(code == "1" && words.starts_with("FAILED attention: "), "{step}: {code} {words}");
    }
    let report: Value = serde_json::from_slice(&proof.archive("contact")["check-own.json"]).unwrap();
    let ops = report["ops"].as_array().unwrap();
    let attention = ops.iter().find(|op| op["op"] == "attention").unwrap();
    let asked = format!("--op attention --case {}", attention["failed"][0]["case"].as_str().unwrap());
    let calls = std::fs::read_to_string(called).unwrap();
    let calls: Vec<&str> = calls.lines().collect();
    for (call, tool) in calls.iter().zip(["memcheck", "racecheck"]) {
        assert!(call.contains(&format!("--tool {tool} ")) && call.ends_with(&asked), "{call}");
    }
    assert_eq!(calls.len(), 2);
    assert!(!proof.out.join("proof-perf.tar.gz").exists());
}

/// A program that hangs at one verb, floods a log with what no archive makes smaller at another, and talks a lot.
const TROUBLE: &str = r#"
echo "$1" >> "$CALLS"
case $1 in
    doctor) sleep 600 & echo $! > "$SLEEPER"; wait ;;
    peaks) head -c 20000000 /dev/urandom ;;
    check) echo '{"ops": [], "forward": [], "passed": true}'; exit ;;
esac
for line in $(seq 300); do printf '%s %0300d\n' "äöü $line" 0; done
"#;

#[test]
fn a_step_that_hangs_is_killed_and_the_rest_goes_on() {
    let Some(rehearsal) = Rehearsal::new() else { return };
    let program = rehearsal.put("trouble", TROUBLE);
    let [calls, sleeper] = ["calls", "sleeper"].map(|name| rehearsal.folder.path().join(name));
    let rehearsal = rehearsal.set("TOKMETER", program.display()).set("CALLS", calls.display());
    // Three seconds for the one that hangs, six and more for those after it, which take a moment.
    let rehearsal = rehearsal.set("SLEEPER", sleeper.display()).set("PROOF_LIMIT_SCALE", 0.35);
    let proof = rehearsal.run(&["contact"]);
    let (steps, table) = proof.table();
    assert_eq!(proof.code, 1);
    assert_eq!(steps, names(&limits()["contact, check held"]));
    let (code, words) = &table["contact doctor"];
    assert!(code == "124" && words.starts_with("out of time: "), "{code} {words}");
    let sleeper = std::fs::read_to_string(sleeper).unwrap();
    assert!(!Path::new("/proc").join(sleeper.trim()).exists(), "what a step started outlives it");
    let calls = std::fs::read_to_string(calls).unwrap();
    let (_, later) = calls.split_once("doctor\n").unwrap();
    let expected = ["check", "check", "peaks", "run", "run", "check", "check", "check"];
    assert_eq!(later.lines().collect::<Vec<_>>(), expected);
    let files = proof.archive("contact");
    let left_out = String::from_utf8_lossy(&files["left-out.txt"]);
    assert!(left_out.starts_with("peaks.log: 20") && !files.contains_key("peaks.log"), "{left_out}");
    assert!(files.contains_key("prefill.log") && files.contains_key("check-det.json"));
}

#[test]
fn what_cannot_be_run_is_refused_before_anything_is() {
    for (arguments, expected) in [
        (&["out"][..], "scripts/prove_on_gpu.sh OUT GROUP"),
        (&["out", "fast"], "error: there is no group fast\nhint: expected contact perf deep"),
        (&["out", "perf"], "error: /nowhere: there is no such program"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let output = Command::new("bash")
            .arg(SCRIPT)
            .arg(&out)
            .args(&arguments[1..])
            .env("TOKMETER", "/nowhere")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains(expected), "{stderr}");
        assert!(output.stdout.is_empty() && !out.exists());
    }
}
