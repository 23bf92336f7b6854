//! Comparing records: what the verdict must not depend on, the environment gate field by field, what is refused, and
//! the whole program on the scripted engine.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use program::{Finished, fake_record, tokmeter, tokmeter_limited};
use serde_json::{Value, json};
use tempfile::tempdir;
use tokmeter::analysis::compare::{
    Class, Comparand, Comparison, Declared, Metric, Sample, Settings, Verdict, compare, json_schema,
};
use tokmeter::record::machine::Gpu;
use tokmeter::record::{
    ClockEvents, Clocks, DeviceEnergy, Energy, Maybe, Outcome, Record, Steady, Window, Workload, read,
    redacted, violations,
};

static TEMPLATE: LazyLock<Record> = LazyLock::new(|| {
    let mut record = fake_record(tempdir().unwrap().path());
    // As if a GPU had measured it, so that its fields are there to change.
    record.machine.env.clear();
    record.machine.gpus = vec![gpu(0, "GPU-aaaa"), gpu(1, "GPU-bbbb")];
    record.machine.gpu_driver.version = Maybe::Value("570.86.15".to_owned());
    record.engine.device = "cuda:0".to_owned();
    record.meter.source = Maybe::Value("nvml_total_energy".to_owned());
    record
});

fn gpu(index: u32, uuid: &str) -> Gpu {
    Gpu {
        index,
        name: Maybe::Value("Test GPU".to_owned()),
        uuid: Maybe::Value(uuid.to_owned()),
        memory_bytes: Maybe::Value(80 << 30),
        compute_capability: Maybe::Value("9.0".to_owned()),
        setup: Maybe::missing("made_up"),
    }
}

/// A session of the template, in a boot of its own, each run `slowness(cell, run)` times as long.
fn session(name: &str, slowness: impl Fn(usize, usize) -> f64) -> Record {
    let mut record = TEMPLATE.clone();
    record.session.boot_id = Maybe::Value(format!("boot of {name}"));
    record.started_at = format!("2026-02-01T00:00:00.{name}Z");
    for (index, cell) in record.cells.iter_mut().enumerate() {
        for (run, of) in cell.runs.iter_mut().enumerate() {
            for window in &mut of.windows {
                let duration_ns = (window.t1_ns - window.t0_ns) as f64 * slowness(index, run);
                window.t1_ns = window.t0_ns + duration_ns.round() as u64;
            }
        }
    }
    record
}

fn sample(record: &Record, name: &str) -> Sample {
    Sample::of(record.clone(), name, true).unwrap()
}

/// Sessions `name0`, `name1`, … that are each `slowness` times as slow, but for a little.
fn arm(name: &str, count: usize, slowness: f64) -> Vec<Sample> {
    (0..count).map(|index| sample(&arm_record(name, index, slowness), &format!("{name}{index}"))).collect()
}

fn arm_record(name: &str, index: usize, slowness: f64) -> Record {
    let jitter = [0.0, 0.002, -0.002, 0.001, -0.001, 0.0015][index % 6];
    session(&format!("{name}{index}"), |cell, run| slowness * (1.0 + jitter + 1e-4 * (cell + run) as f64))
}

fn compared(baseline: &[Sample], candidate: &[Sample]) -> Comparison {
    compare(baseline, candidate, &[], &Settings::default())
}

fn throughput(result: &Comparison) -> Vec<&Comparand> {
    result.cells.iter().filter(|cell| cell.metric == Metric::Throughput).collect()
}

fn effect(cell: &Comparand) -> f64 {
    cell.numbers.value().unwrap().effect_ratio
}

#[test]
fn a_comparison_with_itself_has_no_effect_and_no_regression() {
    for count in [1, 2, 3, 6] {
        let arm = arm("a", count, 1.0);
        let result = compared(&arm, &arm);
        assert!(throughput(&result).iter().all(|cell| effect(cell) == 0.0));
        let expected = if count < 3 { Verdict::Inconclusive } else { Verdict::Same };
        assert_eq!(result.verdict, expected, "{count}: {:?}", result.reasons);
        assert!(result.remarks.iter().any(|remark| remark.contains("is on both sides")));
    }
}

#[test]
fn three_percent_slower_is_found_and_is_the_logarithm_it_should_be() {
    let result = compared(&arm("a", 3, 1.0), &arm("b", 3, 1.03));
    assert_eq!(result.verdict, Verdict::Regressed);
    for cell in throughput(&result) {
        assert!((effect(cell).ln_1p() + 1.03f64.ln()).abs() < 1e-6, "{cell:?}");
        assert_eq!(cell.verdict, Verdict::Regressed);
    }
    assert_eq!(result.aggregate.value().unwrap().verdict, Verdict::Regressed);
    assert!(result.reasons[0].contains("regressed -2.9 %"), "{:?}", result.reasons);
}

#[test]
fn exchanging_the_sides_turns_every_sign() {
    let (one, other) = (arm("a", 3, 1.0), arm("b", 4, 1.04));
    let (forth, back) = (compared(&one, &other), compared(&other, &one));
    assert_eq!((forth.verdict, back.verdict), (Verdict::Regressed, Verdict::Improved));
    for (forth, back) in throughput(&forth).iter().zip(throughput(&back)) {
        let numbers = [forth, back].map(|cell| cell.numbers.value().unwrap().clone());
        assert!((numbers[0].effect_ratio.ln_1p() + numbers[1].effect_ratio.ln_1p()).abs() < 1e-12);
        assert_eq!(numbers[0].p_worse_holm, numbers[1].p_better_holm);
        let ([low, _], [_, high]) = (
            numbers[0].interval_95_ratio.value().copied().unwrap(),
            numbers[1].interval_95_ratio.value().copied().unwrap(),
        );
        assert!((low.ln_1p() + high.ln_1p()).abs() < 1e-12);
    }
}

#[test]
fn the_order_of_records_and_cells_and_the_unit_of_time_do_not_matter() {
    let mut one: Vec<Record> = (0..3).map(|index| arm_record("a", index, 1.0)).collect();
    let mut other: Vec<Record> = (0..4).map(|index| arm_record("b", index, 1.01)).collect();
    let both = |one: &[Record], other: &[Record]| {
        let arm = |records: &[Record]| -> Vec<Sample> {
            records.iter().map(|record| sample(record, &record.started_at)).collect()
        };
        compared(&arm(one), &arm(other))
    };
    let straight = both(&one, &other);
    one.reverse();
    other.rotate_left(2);
    for record in one.iter_mut().chain(&mut other) {
        record.cells.reverse();
        record.command.planned_cells.reverse();
    }
    assert_eq!(both(&one, &other), straight);
    // All times a thousand times as long: as if milliseconds had been seconds.
    for record in one.iter_mut().chain(&mut other) {
        for window in record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows)
        {
            window.t1_ns = window.t0_ns + 1000 * (window.t1_ns - window.t0_ns);
        }
    }
    let scaled = both(&one, &other);
    assert_eq!(scaled.verdict, straight.verdict);
    for (scaled, straight) in throughput(&scaled).iter().zip(throughput(&straight)) {
        assert!((effect(scaled) - effect(straight)).abs() < 1e-12);
        assert_eq!(scaled.verdict, straight.verdict);
    }
}

#[test]
fn a_further_cell_never_turns_a_regression_into_a_pass() {
    let without_last = |mut record: Record, keep: usize| {
        record.cells.truncate(keep);
        record.command.planned_cells.truncate(keep);
        record
    };
    let all = TEMPLATE.cells.len();
    for planted in 0..all {
        // One cell is slower, on the edge of what can be told; the others are not.
        let slow = |index: usize| {
            let base = arm_record("b", index, 1.0);
            let mut record = arm_record("b", index, 1.024);
            for cell in (0..all).filter(|cell| *cell != planted) {
                record.cells[cell] = base.cells[cell].clone();
            }
            record
        };
        let mut regressed = false;
        for keep in 1..=all {
            let arm = |record: &dyn Fn(usize) -> Record| -> Vec<Sample> {
                (0..3).map(|index| sample(&without_last(record(index), keep), "x")).collect()
            };
            let verdict = compared(&arm(&|index| arm_record("a", index, 1.0)), &arm(&slow)).verdict;
            regressed |= verdict == Verdict::Regressed;
            assert!(!regressed || verdict.exit_code() != 0, "cell {planted} of {keep}: {verdict:?}");
        }
        assert!(regressed, "cell {planted}");
    }
}

#[test]
fn a_session_is_a_boot_and_a_driver_load_or_what_was_declared() {
    let mut records: Vec<Record> = (0..4).map(|index| arm_record("a", index, 1.0)).collect();
    let sessions = |records: &[Record]| {
        let arm: Vec<Sample> = records.iter().map(|record| sample(record, "x")).collect();
        compared(&arm, &arm).baseline.sessions.len()
    };
    assert_eq!(sessions(&records), 4);
    // Several processes in one boot are one session.
    records.iter_mut().for_each(|record| record.session.boot_id = Maybe::Value("one".to_owned()));
    assert_eq!(sessions(&records), 1);
    // A driver that was loaded anew makes another one.
    records[0].session.driver_loaded_at = Maybe::Value("2026-02-01T00:00:00Z".to_owned());
    assert_eq!(sessions(&records), 2);
    records[1].session.label = Maybe::Value("cold".to_owned());
    records[2].session.label = Maybe::Value("cold".to_owned());
    assert_eq!(sessions(&records), 3);
    // Without any identity, records cannot be told apart: one session.
    for record in &mut records {
        (record.session.label, record.session.boot_id) =
            (Maybe::missing("not_given"), Maybe::missing("not_found"));
    }
    assert_eq!(sessions(&records), 1);
}

#[test]
fn the_same_record_twice_and_its_redacted_copy_count_once() {
    let records: Vec<Record> = (0..3).map(|index| arm_record("a", index, 1.0)).collect();
    let mut twice: Vec<Sample> = records.iter().map(|record| sample(record, "first")).collect();
    let once = compared(&twice, &arm("b", 3, 1.01));
    twice.push(sample(&records[0], "again"));
    twice.push(sample(&redacted(&records[1]), "redacted"));
    let result = compare(
        &twice,
        &arm("b", 3, 1.01),
        &[],
        &Settings {
            declared: Declared { allow_env: vec!["machine.host".to_owned()], ..Declared::default() },
            ..Settings::default()
        },
    );
    assert_eq!(result.cells, once.cells);
    assert_eq!(result.remarks.iter().filter(|remark| remark.contains("counts once")).count(), 2);
}

#[test]
fn noise_records_lend_their_deviation_to_single_sessions() {
    let noise = arm("n", 6, 1.3);
    let single = |slowness| compare(&arm("a", 1, 1.0), &arm("b", 1, slowness), &noise, &Settings::default());
    assert_eq!((single(1.0).verdict, single(1.05).verdict), (Verdict::Same, Verdict::Regressed));
    assert_eq!(single(1.0).noise.batches, [6]);
    // Without them nothing passes, and only a large loss is called one.
    let alone = |slowness| compared(&arm("a", 1, 1.0), &arm("b", 1, slowness)).verdict;
    assert_eq!(
        [1.0, 1.02, 1.05].map(alone),
        [Verdict::Inconclusive, Verdict::Inconclusive, Verdict::Regressed]
    );
    // Noise of another machine has nothing to say.
    let mut foreign = arm_record("n", 0, 1.0);
    foreign.machine.gpus[0].uuid = Maybe::Value("GPU-cccc".to_owned());
    let result =
        compare(&arm("a", 1, 1.0), &arm("b", 1, 1.0), &[sample(&foreign, "f")], &Settings::default());
    assert!(result.noise.batches.is_empty());
    assert!(
        result.remarks.iter().any(|remark| remark.contains("f is left out: gpu[0].uuid")),
        "{:?}",
        result.remarks
    );
    // Two drivers make two batches: their means may differ.
    let mut other: Vec<Record> = (0..3).map(|index| arm_record("m", index, 2.0)).collect();
    other.iter_mut().for_each(|record| record.machine.gpu_driver.version = Maybe::Value("550.1".to_owned()));
    let both = [noise.clone(), other.iter().map(|record| sample(record, "m")).collect()].concat();
    let result = compare(&arm("a", 1, 1.0), &arm("b", 1, 1.0), &both, &Settings::default());
    assert_eq!(result.verdict, Verdict::Same);
    let mut batches = result.noise.batches;
    batches.sort_unstable();
    assert_eq!(batches, [3, 6]);
}

#[test]
fn equal_values_unequal_arms_and_unequal_runs_are_treated_right() {
    let exact = |name: &str, count: usize, slowness: f64| -> Vec<Sample> {
        (0..count).map(|index| sample(&session(&format!("{name}{index}"), |_, _| slowness), name)).collect()
    };
    assert_eq!(compared(&exact("a", 3, 1.0), &exact("b", 3, 1.0)).verdict, Verdict::Same);
    assert_eq!(compared(&exact("a", 3, 1.0), &exact("b", 3, 1.01)).verdict, Verdict::Same);
    assert_eq!(compared(&exact("a", 2, 1.0), &exact("b", 6, 1.05)).verdict, Verdict::Regressed);
    assert_eq!(compared(&arm("a", 5, 1.0), &arm("b", 2, 1.0)).verdict, Verdict::Same);
    // Two and two have too few degrees of freedom; that is said, with what would help.
    let result = compared(&arm("a", 2, 1.0), &arm("b", 2, 1.2));
    assert_eq!(result.verdict, Verdict::Inconclusive);
    assert!(
        result.cells[0].notes[0].contains("degrees of freedom are 2, expected at least 3"),
        "{:?}",
        result.cells[0].notes
    );
    assert!(result.next[0].contains("--noise"), "{:?}", result.next);
}

#[test]
fn a_vanished_cell_is_never_a_pass() {
    let key = TEMPLATE.cells[2].key.clone();
    let change = |how: &dyn Fn(&mut Record)| -> Comparison {
        let candidate: Vec<Sample> = (0..3)
            .map(|index| {
                let mut record = arm_record("b", index, 1.0);
                how(&mut record);
                sample(&record, "b")
            })
            .collect();
        compared(&arm("a", 3, 1.0), &candidate)
    };
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Record));
    let cases: [Change<'_>; 6] = [
        ("no record has this cell", &|record| {
            record.cells.remove(2);
            record.command.planned_cells.remove(2);
        }),
        ("failed: two  lines", &|record| {
            record.cells[2].outcome = Outcome::Failed { error: "two\n\u{1b}lines".to_owned() };
        }),
        ("failed: out of memory", &|record| {
            record.cells[2].outcome = Outcome::Failed { error: "out of memory".to_owned() };
        }),
        ("was skipped: no room", &|record| {
            record.cells[2].outcome = Outcome::Skipped { why: "no room".to_owned() };
            record.cells[2].runs.clear();
        }),
        ("all its runs were left out", &|record| {
            record.cells[2].runs.iter_mut().for_each(|run| run.steady = Steady::Unsustainable);
        }),
        ("all its runs were left out", &|record| {
            for run in &mut record.cells[2].runs {
                run.checks[0].ok = false;
            }
        }),
    ];
    for (reason, how) in cases {
        let result = change(how);
        assert_eq!((result.verdict, result.verdict.exit_code()), (Verdict::NotComparable, 12), "{reason}");
        let cell = throughput(&result).into_iter().find(|cell| cell.cell == key).unwrap();
        assert_eq!(cell.notes, [format!("gone in the candidate: {reason}")]);
        assert!(result.reasons[0].contains(&key) && result.reasons[0].contains(reason));
    }
    // One that is new is a remark.
    let fewer: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = arm_record("a", index, 1.0);
            record.cells.remove(2);
            record.command.planned_cells.remove(2);
            sample(&record, "a")
        })
        .collect();
    let result = compared(&fewer, &arm("b", 3, 1.0));
    assert_eq!(result.verdict, Verdict::Same);
    assert!(result.remarks.contains(&format!("{key}: tok/s only in the candidate")));
}

#[test]
fn runs_are_left_out_by_rule_and_listed_never_by_their_speed() {
    let mut disturbed = arm_record("b", 0, 1.0);
    disturbed.cells[0].runs[1].windows[0].cpu = Maybe::Value(cpu_share(0.25));
    for window in &mut disturbed.cells[0].runs[1].windows {
        window.t1_ns += 1_000_000_000;
    }
    let mut slow = disturbed.clone();
    slow.cells[0].runs[1].windows[0].cpu = Maybe::Value(cpu_share(0.05));
    let with = |record: &Record| {
        let candidate = [arm("b", 3, 1.0)[1..].to_vec(), vec![sample(record, "b0")]].concat();
        compared(&arm("a", 3, 1.0), &candidate)
    };
    let result = with(&disturbed);
    assert_eq!(result.verdict, Verdict::Same, "{:?}", result.reasons);
    assert_eq!(
        result.exclusions,
        [format!("b0: {}: run 2 of 2: other processes took 25 % of the cores", TEMPLATE.cells[0].key)]
    );
    let result = with(&slow);
    assert!(result.exclusions.is_empty());
    assert_ne!(result.verdict, Verdict::Same);
}

fn cpu_share(foreign: f64) -> tokmeter::record::machine::CpuShare {
    tokmeter::record::machine::CpuShare {
        total_cpu_ns: Maybe::Value(1_000_000_000),
        own_cpu_ns: Maybe::Value(500_000_000),
        foreign_share: Maybe::Value(foreign),
        steal_share: Maybe::Value(0.0),
        throttled_ns: Maybe::Value(0),
        available_cores: Maybe::Value(2.0),
        resolution_ns: 10_000_000,
    }
}

/// Place in the record, another value, the line it gives, what that means, the exit code.
fn mutations() -> Vec<(&'static str, Value, &'static str, Class, u8)> {
    use Class::{Dynamic, Expected, Identity, Suspicious};
    vec![
        ("/machine/gpu_driver/version", json!("580.95.05"), "machine.gpu_driver.version", Expected, 0),
        ("/machine/gpu_driver/kernel_module", json!("open"), "machine.gpu_driver.kernel_module", Expected, 0),
        ("/machine/gpus/0/memory_bytes", json!(1), "gpu[0].memory_bytes", Expected, 0),
        ("/machine/gpus/0/uuid", json!("GPU-cccc"), "gpu[0].uuid", Identity, 12),
        ("/machine/gpus/0/name", json!("Other GPU"), "gpu[0].name", Identity, 12),
        ("/machine/cpu/model", json!("Other CPU"), "machine.cpu.model", Identity, 12),
        ("/machine/host/board_product", json!("Other board"), "machine.host.board_product", Identity, 12),
        ("/model/config/hidden_size", json!(1), "model.config.hidden_size", Identity, 12),
        ("/model/weights/format", json!("gguf"), "model.weights.format", Identity, 12),
        ("/engine/compute_dtype", json!("bf16"), "engine.compute_dtype", Identity, 12),
        ("/engine/chunk_tokens", json!(7), "engine.chunk_tokens", Identity, 12),
        ("/command/seed", json!(7), "command.seed", Identity, 12),
        ("/tool/version", json!("9.9.9"), "tool.version", Identity, 12),
        ("/machine/software/rustc", json!("rustc 9"), "machine.software.rustc", Identity, 12),
        ("/machine/software/binary_sha256", json!("00"), "machine.software.binary_sha256", Suspicious, 12),
        ("/machine/host/kernel", json!("9.9"), "machine.host.kernel", Suspicious, 12),
        ("/machine/host/firmware_version", json!("9"), "machine.host.firmware_version", Suspicious, 12),
        ("/machine/host/container", json!("podman"), "machine.host.container", Suspicious, 12),
        ("/machine/cpu/governor", json!("powersave"), "machine.cpu.governor", Suspicious, 12),
        ("/machine/cpu/smt", json!({"missing": "permission"}), "machine.cpu.smt", Suspicious, 12),
        ("/machine/cpu/microcode", json!("0x999"), "machine.cpu.microcode", Suspicious, 12),
        ("/machine/memory/hugepages", json!(77), "machine.memory.hugepages", Suspicious, 12),
        ("/machine/limits/affinity_cpus", json!(77), "machine.limits.affinity_cpus", Suspicious, 12),
        ("/machine/env", json!({"OMP_NUM_THREADS": "3"}), "machine.env.OMP_NUM_THREADS", Suspicious, 12),
        ("/engine/threads", json!(77), "engine.threads", Suspicious, 12),
        ("/command/min_seconds", json!(77.0), "command.min_seconds", Suspicious, 12),
        ("/command/steady", json!(true), "command.steady", Suspicious, 12),
        ("/command/warmup_seconds", json!(77.0), "command.warmup_seconds", Suspicious, 12),
        ("/command/thermal", json!("cooldown"), "command.thermal", Identity, 12),
        ("/machine/host/hostname", json!("elsewhere"), "machine.host.hostname", Dynamic, 0),
        ("/machine/load/load_1m", json!(77.0), "machine.load.load_1m", Dynamic, 0),
        ("/machine/memory/available_bytes", json!(77), "machine.memory.available_bytes", Dynamic, 0),
        ("/engine/load_ns", json!(77), "engine.load_ns", Dynamic, 0),
        ("/engine/kv_pages", json!(7777), "engine.kv_pages", Dynamic, 0),
        ("/model/name", json!("renamed"), "model.name", Dynamic, 0),
        ("/meter/source", json!("rapl"), "meter.source", Class::Meter, 0),
    ]
}

/// Arms of three sessions, the candidate's with another value in one place.
fn mutated(place: &str, value: &Value, settings: &Settings) -> Comparison {
    let candidate: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = serde_json::to_value(arm_record("b", index, 1.0)).unwrap();
            *record.pointer_mut(place).expect(place) = value.clone();
            sample(&serde_json::from_value(record).unwrap(), "b")
        })
        .collect();
    compare(&arm("a", 3, 1.0), &candidate, &[], settings)
}

#[test]
fn every_single_change_of_the_environment_gives_its_line_class_and_exit_code() {
    assert_eq!(compared(&arm("a", 3, 1.0), &arm("b", 3, 1.0)).verdict.exit_code(), 0);
    for (place, value, field, class, code) in mutations() {
        let result = mutated(place, &value, &Settings::default());
        // The boots differ by nature.
        let lines: Vec<_> =
            result.environment.iter().filter(|line| line.field != "machine.host.boot_id").collect();
        assert_eq!(lines.len(), 1, "{place}: {lines:?}");
        assert_eq!((lines[0].field.as_str(), lines[0].class), (field, class));
        assert_ne!(lines[0].baseline, lines[0].candidate);
        assert_eq!(result.verdict.exit_code(), code, "{place}: {:?}", result.reasons);
        assert_eq!(result.confounded, class == Class::Suspicious);
        if code != 0 {
            assert!(result.reasons[0].contains(field), "{:?}", result.reasons);
        }
    }
}

#[test]
fn a_suspicious_change_passes_when_it_is_declared_or_allowed_and_an_identity_never_by_allowance() {
    let with = |changing: &[&str], allow_env: &[&str]| Settings {
        declared: Declared {
            changing: changing.iter().map(|word| (*word).to_owned()).collect(),
            allow_env: allow_env.iter().map(|word| (*word).to_owned()).collect(),
        },
        ..Settings::default()
    };
    for (place, value, field, class, _) in mutations() {
        let group = {
            let lines = mutated(place, &value, &Settings::default()).environment;
            lines.into_iter().find(|line| line.field == field).unwrap().group
        };
        let allowed = mutated(place, &value, &with(&[], &[field]));
        let by_identity = class == Class::Identity;
        assert_eq!(allowed.verdict.exit_code(), if by_identity { 12 } else { 0 }, "{field}");
        assert!(!allowed.confounded);
        if by_identity {
            assert!(allowed.remarks.iter().any(|remark| remark.contains("an identity cannot be allowed")));
        }
        if !group.is_empty() {
            let declared = mutated(place, &value, &with(&[&group], &[]));
            assert_eq!(
                declared.verdict.exit_code(),
                0,
                "--changing {group} for {field}: {:?}",
                declared.reasons
            );
            let first = &declared.environment[0];
            assert_eq!((first.field.as_str(), first.class), (field, Class::Expected));
        }
    }
    // A branch of facts can be named as well, but not by half a word.
    let kernel = ("/machine/host/kernel", json!("9.9"));
    assert_eq!(mutated(kernel.0, &kernel.1, &with(&[], &["machine.host"])).verdict.exit_code(), 0);
    assert_eq!(mutated(kernel.0, &kernel.1, &with(&[], &["machine.ho"])).verdict.exit_code(), 12);
}

#[test]
fn an_arm_of_two_drivers_is_no_arm() {
    let mut records: Vec<Record> = (0..3).map(|index| arm_record("b", index, 1.0)).collect();
    records[2].machine.gpu_driver.version = Maybe::Value("580.1".to_owned());
    let mixed: Vec<Sample> = records.iter().map(|record| sample(record, "b")).collect();
    let result = compared(&arm("a", 3, 1.0), &mixed);
    assert_eq!((result.verdict, result.confounded), (Verdict::NotComparable, true));
    assert!(result.reasons[0].contains("570.86.15 | 580.1"), "{:?}", result.reasons);
}

#[test]
fn what_an_earlier_version_did_not_record_is_no_difference() {
    let candidate: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = serde_json::to_value(arm_record("b", index, 1.0)).unwrap();
            record["machine"]["cpu"]["governor"] = json!({"missing": "not_recorded"});
            record["engine"]["kernels"] = json!({"missing": "not_recorded"});
            sample(&serde_json::from_value(record).unwrap(), "b")
        })
        .collect();
    let result = compared(&arm("a", 3, 1.0), &candidate);
    assert_eq!(result.verdict, Verdict::Same, "{:?}", result.reasons);
    assert!(
        result
            .environment
            .iter()
            .any(|line| line.field == "machine.cpu.governor" && line.class == Class::Dynamic)
    );
}

#[test]
fn another_gpu_of_the_same_machine_may_change() {
    let result = mutated("/machine/gpus/1/uuid", &json!("GPU-dddd"), &Settings::default());
    assert_eq!(result.verdict, Verdict::Same);
}

#[test]
fn another_model_file_and_another_token_count_are_refused() {
    let file = json!([{"name": "x.gguf", "size_bytes": 5, "sha256": "ab"}]);
    let result = mutated("/model/weights/files", &file, &Settings::default());
    assert_eq!(result.verdict.exit_code(), 12);
    assert!(result.reasons[0].contains("model.weights.files"), "{:?}", result.reasons);
    let longer: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = arm_record("b", index, 1.0);
            let cell = &mut record.cells[2];
            let Workload::Decode { osl, .. } = &mut cell.workload else { panic!("cell 2 decodes") };
            *osl *= 2;
            cell.key = cell.workload.key();
            for run in &mut cell.runs {
                run.requests.clear();
                run.windows.iter_mut().for_each(|window| window.tokens_out *= 2);
            }
            record.command.planned_cells[2].clone_from(&record.cells[2].key);
            sample(&record, "b")
        })
        .collect();
    let result = compared(&arm("a", 3, 1.0), &longer);
    assert_eq!(result.verdict.exit_code(), 12);
    assert!(result.reasons[0].contains("no record has this cell"), "{:?}", result.reasons);
}

#[test]
fn a_device_that_computes_wrong_has_no_speed() {
    let wrong = json!({"model": "m", "tokens": 1, "mean_distance_nat": 1.0, "p99_distance_nat": 1.0, "mean_bound_nat": 0.1, "ok": false});
    let result = mutated("/numerics", &wrong, &Settings::default());
    assert_eq!((result.verdict, result.cells.len()), (Verdict::NotComparable, 0));
    assert!(result.reasons[0].contains("numerics failed"), "{:?}", result.reasons);
}

/// All of a window's energy, with an integral of power that agrees.
fn energy(window: &Window, energy_j: f64) -> Energy {
    Energy {
        t_a_ns: window.t0_ns,
        t_b_ns: window.t1_ns,
        energy_j,
        uncertainty_j: 0.0,
        tokens_in: window.tokens_in as f64,
        tokens_out: window.tokens_out as f64,
        doubts: Vec::new(),
        devices: vec![DeviceEnergy {
            device: "cuda:0".to_owned(),
            t_a_ns: window.t0_ns,
            t_b_ns: window.t1_ns,
            half_width_a_ns: 0,
            half_width_b_ns: 0,
            energy_j,
            readings: 100,
            update_period_ns: Maybe::missing("power_only"),
            integral_j: Maybe::Value(energy_j),
            power_min_w: Maybe::missing("not_read"),
            power_max_w: Maybe::missing("not_read"),
        }],
        sampler_cpu_ns: Maybe::missing("not_read"),
    }
}

/// `record` with energy at `watts`, and clocks of `mhz`.
fn with_sensors(mut record: Record, watts: f64, mhz: f64) -> Record {
    for window in record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows) {
        let duration_s = (window.t1_ns - window.t0_ns) as f64 / 1e9;
        window.energy = Maybe::Value(energy(window, watts * duration_s));
        window.clocks =
            Maybe::Value(Clocks { sm_mean_mhz: mhz, sm_min_mhz: mhz, memory_mhz: Maybe::Value(1000.0) });
        let software_power_cap_ns = if mhz < 1900.0 { window.t1_ns - window.t0_ns } else { 0 };
        window.clock_events = Maybe::Value(ClockEvents {
            software_power_cap_ns: Maybe::Value(software_power_cap_ns),
            software_thermal_ns: Maybe::Value(0),
            hardware_thermal_ns: Maybe::Value(0),
            hardware_power_brake_ns: Maybe::Value(0),
            reasons_mask: Maybe::missing("no_bits"),
        });
    }
    record
}

fn sensed(name: &str, slowness: f64, watts: f64, mhz: f64) -> Vec<Sample> {
    (0..3).map(|index| sample(&with_sensors(arm_record(name, index, slowness), watts, mhz), name)).collect()
}

#[test]
fn a_change_is_split_into_clock_and_work_and_into_speed_and_power() {
    // 5 % slower, all of it by the clock; the power falls by 2 %.
    let result = compared(&sensed("a", 1.0, 700.0, 1980.0), &sensed("b", 1.05, 686.0, 1980.0 / 1.05));
    assert_eq!(result.verdict, Verdict::Regressed);
    assert_eq!(result.why.decompositions.len(), TEMPLATE.cells.len());
    for parts in &result.why.decompositions {
        let ln = |part: &Maybe<tokmeter::analysis::compare::Part>| part.value().unwrap().effect_ratio.ln_1p();
        let whole = parts.throughput.effect_ratio.ln_1p();
        assert!((whole - ln(&parts.clock) - ln(&parts.tokens_per_cycle)).abs() < 1e-12);
        assert!((ln(&parts.tokens_per_joule) - whole + ln(&parts.power)).abs() < 1e-12);
        assert!((ln(&parts.clock) + 1.05f64.ln()).abs() < 1e-9 && ln(&parts.tokens_per_cycle).abs() < 1e-6);
        assert!((ln(&parts.power) - 0.98f64.ln()).abs() < 1e-9);
    }
    let energy = result.cells.iter().find(|cell| cell.metric == Metric::TokensPerJoule).unwrap();
    assert!((effect(energy).ln_1p() - (-(1.05f64.ln()) - 0.98f64.ln())).abs() < 1e-6);
    let (before, after) = (&result.baseline.conditions, &result.candidate.conditions);
    assert_eq!(before.power_cap_s, Maybe::Value(0.0));
    assert!((after.power_cap_s.value().unwrap() / after.window_s - 1.0).abs() < 1e-9);
    // Without sensors the reason stands there.
    let blind = compared(&arm("a", 3, 1.0), &arm("b", 3, 1.05));
    assert!(
        blind
            .why
            .decompositions
            .iter()
            .all(|parts| parts.clock.reason().is_some() && parts.power.reason().is_some())
    );
}

#[test]
fn less_per_joule_at_equal_speed_is_a_regression_and_another_meter_is_not() {
    let before = sensed("a", 1.0, 700.0, 1980.0);
    let result = compared(&before, &sensed("b", 1.0, 735.0, 1980.0));
    assert_eq!(result.verdict, Verdict::Regressed);
    assert!(throughput(&result).iter().all(|cell| cell.verdict == Verdict::Same));
    let other_meter: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = with_sensors(arm_record("b", index, 1.0), 735.0, 1980.0);
            record.meter.source = Maybe::Value("nvml_power_integrated".to_owned());
            sample(&record, "b")
        })
        .collect();
    let result = compared(&before, &other_meter);
    assert_eq!((result.verdict, result.verdict.exit_code()), (Verdict::MeterChanged, 13));
    // A meter that is gone is a changed one, too; energy on neither side is nothing to compare.
    let gone: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = arm_record("b", index, 1.0);
            record.meter.source = Maybe::missing("no_sensor");
            sample(&record, "b")
        })
        .collect();
    assert_eq!(compared(&before, &gone).verdict, Verdict::MeterChanged);
    // A regression is not hidden by it.
    let slow: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = arm_record("b", index, 1.05);
            record.meter.source = Maybe::missing("no_sensor");
            sample(&record, "b")
        })
        .collect();
    assert_eq!(compared(&before, &slow).verdict, Verdict::Regressed);
}

#[test]
fn a_counter_that_drifts_against_integrated_power_is_another_meter() {
    let drifted = |doubts: &[&str], share: f64| -> Vec<Sample> {
        (0..3)
            .map(|index| {
                let mut record = with_sensors(arm_record("b", index, 1.0), 700.0, 1980.0);
                let windows =
                    record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows);
                for window in windows {
                    let Maybe::Value(energy) = &mut window.energy else { panic!("there is energy") };
                    energy.doubts = doubts.iter().map(|doubt| (*doubt).to_owned()).collect();
                    energy.energy_j *= share;
                    energy.devices[0].energy_j *= share;
                }
                sample(&record, "b")
            })
            .collect()
    };
    let before = sensed("a", 1.0, 700.0, 1980.0);
    assert_eq!(compared(&before, &drifted(&[], 1.005)).verdict, Verdict::Same);
    let result = compared(&before, &drifted(&[], 1.04));
    assert_eq!(result.verdict, Verdict::MeterChanged, "{:?}", result.reasons);
    assert!(result.reasons[0].contains("the counter moved by +4.0 %"), "{:?}", result.reasons);
    // Doubted energy does not decide: on one side the question stays open, on both it is not asked.
    assert_eq!(compared(&before, &drifted(&["short_window"], 1.0)).verdict, Verdict::Inconclusive);
    let both = compared(&drifted(&["short_window"], 1.0), &drifted(&["short_window"], 1.0));
    assert!(both.cells.iter().all(|cell| cell.metric == Metric::Throughput));
    assert!(both.remarks.iter().any(|remark| remark.contains("energy does not decide: short window")));
}

#[test]
fn times_of_one_driver_load_that_differ_by_the_clock_are_one_session() {
    let loaded = |index: usize, at: &str| {
        let mut record = arm_record("a", 0, 1.0 + index as f64 * 1e-6);
        record.session.label = Maybe::missing("not_given");
        record.session.driver_loaded_at = Maybe::Value(at.to_owned());
        sample(&record, &index.to_string())
    };
    let mut samples = vec![
        loaded(0, "2026-02-01T00:00:01Z"),
        loaded(1, "2026-02-01T00:00:00Z"),
        loaded(2, "2026-02-01T08:00:00Z"),
    ];
    tokmeter::analysis::compare::align(&mut samples);
    assert_eq!(samples[0].session, samples[1].session);
    assert_ne!(samples[0].session, samples[2].session);
}

#[test]
fn a_price_never_changes_a_verdict() {
    let priced: Vec<Sample> = (0..3)
        .map(|index| {
            let mut record = arm_record("b", index, 1.0);
            record.cost_model = Maybe::Value(tokmeter::record::CostModel::from_price("99 EUR").unwrap());
            sample(&record, "b")
        })
        .collect();
    let plain = compared(&arm("a", 3, 1.0), &arm("b", 3, 1.0));
    let result = compared(&arm("a", 3, 1.0), &priced);
    assert_eq!((result.verdict, result.cells), (plain.verdict, plain.cells));
}

#[test]
fn other_output_tokens_are_reported_when_each_side_agrees_with_itself() {
    let with_output = |name: &str, hash: &dyn Fn(usize) -> String| -> Vec<Sample> {
        (0..3)
            .map(|index| {
                let mut record = arm_record(name, index, 1.0);
                for cell in record.cells.iter_mut().filter(|cell| cell.workload.static_batch().is_some()) {
                    cell.runs.iter_mut().for_each(|run| run.output_token_sha256 = Maybe::Value(hash(index)));
                }
                sample(&record, name)
            })
            .collect()
    };
    let one = with_output("a", &|_| "one".to_owned());
    let changed = compared(&one, &with_output("b", &|_| "other".to_owned()));
    assert_eq!(changed.verdict, Verdict::Same, "numerics are reported, the speed is judged");
    let is_static = TEMPLATE.cells.iter().filter(|cell| cell.workload.static_batch().is_some());
    assert_eq!(changed.why.outputs_changed.len(), is_static.count());
    let unsteady = compared(&one, &with_output("b", &|index| index.to_string()));
    assert!(unsteady.why.outputs_changed.is_empty(), "what does not repeat says nothing");
}

#[test]
fn the_committed_schema_is_the_one_that_the_code_writes_and_results_follow_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("results/compare-schema.json");
    if std::env::var_os("TOKMETER_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&path, json_schema()).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap_or_default() == json_schema(),
        "run TOKMETER_BLESS=1 cargo test --test compare and commit results/compare-schema.json"
    );
    let schema = jsonschema::validator_for(&serde_json::from_str(&json_schema()).unwrap()).unwrap();
    for result in [
        compared(&arm("a", 3, 1.0), &arm("b", 3, 1.03)),
        compared(&arm("a", 1, 1.0), &arm("b", 1, 1.0)),
        compared(&arm("a", 2, 1.0), &arm("b", 2, 1.0)),
        compared(&sensed("a", 1.0, 700.0, 1980.0), &sensed("b", 1.0, 735.0, 1980.0)),
        mutated("/engine/threads", &json!(77), &Settings::default()),
    ] {
        let value = serde_json::to_value(&result).unwrap();
        let faults: Vec<String> = schema.iter_errors(&value).map(|error| error.to_string()).collect();
        assert_eq!(faults, Vec::<String>::new());
    }
}

/// Sessions by the scripted engine: noise in each step, luck in each session, a hidden slow-down.
fn run_sessions(folder: &Path, name: &str, count: u64, slowdown: f64) -> Vec<String> {
    (0..count)
        .map(|index| {
            let file = format!("{name}{index}.json");
            let seed = name.bytes().fold(index, |seed, byte| seed * 31 + u64::from(byte));
            let script = format!(
                r#"{{"slowdown":{slowdown},"noise_rel":0.01,"session_noise_rel":0.003,"seed":{seed}}}"#
            );
            let args = ["run", "--engine", "fake", "--fake-script", &script, "-r", "2", "--min-seconds", "2"];
            let cells = ["--batch", "1,8", "--depth", "64", "--osl", "16", "--session", &file, "-o", &file];
            let done = tokmeter(folder, &[&args[..], &cells].concat());
            assert_eq!(done.code, Some(0), "{}", done.stderr);
            file
        })
        .collect()
}

fn compare_files(folder: &Path, arms: [&[String]; 3], more: &[&str]) -> Finished {
    let mut args = vec!["compare", "--allow-not-a-measurement"];
    for (flag, files) in ["--baseline", "--candidate", "--noise"].into_iter().zip(arms) {
        if !files.is_empty() {
            args.push(flag);
            args.extend(files.iter().map(String::as_str));
        }
    }
    tokmeter(folder, &[&args[..], more].concat())
}

#[test]
fn end_to_end_a_hidden_slow_down_is_found_and_no_change_gives_none() {
    let folder = tempdir().unwrap();
    let noise = run_sessions(folder.path(), "n", 6, 1.0);
    let baseline = run_sessions(folder.path(), "a", 3, 1.0);
    let same = run_sessions(folder.path(), "b", 3, 1.0);
    let slow = run_sessions(folder.path(), "c", 3, 1.03);
    let done = compare_files(folder.path(), [&baseline, &slow, &noise], &[]);
    assert_eq!(done.code, Some(10), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.starts_with("REGRESSED · "), "{}", done.stdout);
    let done = compare_files(folder.path(), [&baseline, &same, &noise], &[]);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    // Twenty random ways to split what did not change: no regression in any of them.
    let all: Vec<Sample> = noise
        .iter()
        .chain(&baseline)
        .chain(&same)
        .map(|file| Sample::of(read(&folder.path().join(file)).unwrap(), file, true).unwrap())
        .collect();
    no_split_regresses(&all, 3);
    // The formats say the same.
    let json = compare_files(folder.path(), [&baseline, &slow, &noise], &["--format", "json"]);
    let value: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((json.code, value["verdict"].as_str()), (Some(10), Some("regressed")));
    assert_eq!(value["schema"], "tokmeter-comparison/1");
    let markdown = compare_files(folder.path(), [&baseline, &slow, &noise], &["--format", "markdown"]);
    assert!(markdown.stdout.starts_with("## REGRESSED"), "{}", markdown.stdout);
    assert!(markdown.stdout.contains("| decode/b1/d64/o16 | tok/s | REGRESSED |"), "{}", markdown.stdout);
}

#[test]
fn the_table_is_exact_to_the_byte() {
    let folder = tempdir().unwrap();
    // 40 prompt tokens take 50 ms, 800 tok/s; 4 % more time is 769.2 tok/s, 3.85 % less.
    let arms = [("a", 1.0), ("b", 1.04)].map(|(name, slowdown)| -> Vec<String> {
        (0..3)
            .map(|index| {
                let file = format!("{name}{index}.json");
                let script = format!(
                    r#"{{"base_ns":10000000,"per_prefill_token_ns":1000000,"per_context_token_ps":0,"slowdown":{slowdown}}}"#
                );
                let args = ["run", "--engine", "fake", "--fake-script", &script, "-r", "2", "--min-seconds", "0.5"];
                let cells = ["--batch", "1", "--isl", "40", "--session", &file, "-o", &file];
                assert_eq!(tokmeter(folder.path(), &[&args[..], &cells].concat()).code, Some(0));
                file
            })
            .collect()
    });
    let done = compare_files(folder.path(), [&arms[0], &arms[1], &[]], &[]);
    assert_eq!((done.code, done.stderr.as_str()), (Some(10), ""));
    let expected = "\
REGRESSED · 1 regressed · NOT A MEASUREMENT: fake engine: step times come from a script
  prefill/b1/i40 tok/s: regressed -3.8 % [-3.8 %, -3.8 %], threshold 2.0 %

baseline   3 sessions (3 declared), 3 records
candidate  3 sessions (3 declared), 3 records
noise      0 sessions in 0 batches
rules      α = 0.05 (look 1); a loss counts from tok/s 2.0 %, tok/J 3.0 %

cell            metric  verdict    baseline  candidate   change       95 % interval  p Holm     MDE       σ       δ  needs
prefill/b1/i40  tok/s   REGRESSED       800        769  -3.85 %  [-3.85 %, -3.85 %]  <0.001  0.00 %  0.00 %  2.00 %      3

MDE: smallest true change found in four of five comparisons like this; σ: between sessions; δ: loss that counts; \
needs: sessions on each side to find a change of δ

why
  prefill: 1 of 1 cell regressed, 0 improved, -3.85 % together
  no split by clock: no power sensor
  no split by power: no power sensor
  prefill/b1/i40 TTFT p50 moved by +4.00 % (p <0.001)
  prefill/b1/i40 E2E p50 moved by +4.00 % (p <0.001)
  prefill/b1/i40 step p50 moved by +4.00 % (p <0.001)

remarks
  6 sessions are declared (--session), from one pair of boot and driver load
";
    assert!(done.stdout == expected, "printed\n{}\nexpected\n{expected}", done.stdout);
}

/// Twenty seeded splits into two arms of `per_arm`, the rest as noise.
fn no_split_regresses(all: &[Sample], per_arm: usize) {
    let mut state = 1u64;
    for split in 0..20 {
        let mut order: Vec<&Sample> = all.iter().collect();
        for index in (1..order.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            order.swap(index, ((state >> 33) % (index as u64 + 1)) as usize);
        }
        let part = |range: std::ops::Range<usize>| {
            order[range].iter().map(|sample| (*sample).clone()).collect::<Vec<_>>()
        };
        let (one, other) = (part(0..per_arm), part(per_arm..2 * per_arm));
        let result = compare(&one, &other, &part(2 * per_arm..all.len()), &Settings::default());
        assert!(
            !matches!(result.verdict, Verdict::Regressed | Verdict::NotComparable),
            "{split}: {:?}",
            result.reasons
        );
    }
}

#[test]
fn the_exit_code_of_an_open_question_can_be_chosen() {
    let folder = tempdir().unwrap();
    let (one, other) = (run_sessions(folder.path(), "a", 1, 1.0), run_sessions(folder.path(), "b", 1, 1.0));
    let done = compare_files(folder.path(), [&one, &other, &[]], &[]);
    assert_eq!(done.code, Some(11), "{done:?}");
    assert!(done.stdout.contains("next: measure 3 sessions of each side"), "{}", done.stdout);
    let done = compare_files(folder.path(), [&one, &other, &[]], &["--inconclusive", "pass"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    for (more, reason) in [
        (["--look", "4"], "--look is 4, expected 1 to 3"),
        (["--changing", "weather"], "--changing is 'weather', expected driver, firmware"),
        (["--threshold", "fast"], "--threshold is 'fast', expected a percentage"),
    ] {
        let done = compare_files(folder.path(), [&one, &other, &[]], &more);
        assert_eq!(done.code, Some(2), "{done:?}");
        assert!(done.stderr.contains(reason), "{}", done.stderr);
    }
}

#[test]
fn kept_sessions_are_the_baseline_of_their_newest_environment() {
    let folder = tempdir().unwrap();
    let files = run_sessions(folder.path(), "a", 3, 1.0);
    let later = run_sessions(folder.path(), "b", 3, 1.04);
    let store = |args: &[&str]| {
        tokmeter(
            folder.path(),
            &[&["compare", "--store", "kept", "--allow-not-a-measurement"], args].concat(),
        )
    };
    let empty = store(&["--candidate", &later[0]]);
    assert_eq!(empty.code, Some(3), "{empty:?}");
    assert!(
        empty.stderr.contains("holds no session") && empty.stderr.contains("hint: keep"),
        "{}",
        empty.stderr
    );
    for _ in 0..2 {
        let kept = store(&["--baseline", &files[0], &files[1], &files[2]]);
        assert_eq!((kept.code, kept.stdout.as_str()), (Some(0), ""), "{kept:?}");
        assert_eq!(kept.stderr.lines().count(), 3);
    }
    let result = store(&["--candidate", &later[0], &later[1], &later[2], "--format", "json"]);
    let value: Value = serde_json::from_str(&result.stdout).unwrap();
    assert_eq!(result.code, Some(10), "{}", result.stdout);
    assert_eq!(value["baseline"]["files"].as_array().unwrap().len(), 3, "kept twice is kept once");
    // Sessions of a newer driver become the baseline, and the older ones noise.
    for file in &later {
        let mut record = read(&folder.path().join(file)).unwrap();
        record.machine.gpu_driver.version = Maybe::Value("999.1".to_owned());
        record.started_at = "2027-01-01T00:00:00.000Z".to_owned();
        std::fs::write(folder.path().join(file), serde_json::to_string(&record).unwrap()).unwrap();
    }
    assert_eq!(store(&["--baseline", &later[0], &later[1]]).code, Some(0));
    let result = store(&["--candidate", &later[2], "--format", "json"]);
    let value: Value = serde_json::from_str(&result.stdout).unwrap();
    assert_eq!(value["baseline"]["files"].as_array().unwrap().len(), 2);
    assert_eq!(value["noise"]["batches"], json!([3]));
    assert_eq!(store(&[]).code, Some(2));
    assert_eq!(store(&["--baseline", &files[0], "--candidate", &files[1]]).code, Some(2));
}

#[test]
fn records_that_are_no_measurement_are_refused() {
    let folder = tempdir().unwrap();
    let files = run_sessions(folder.path(), "a", 1, 1.0);
    let done = tokmeter(folder.path(), &["compare", "--baseline", &files[0], "--candidate", &files[0]]);
    assert_eq!((done.code, done.stdout.as_str()), (Some(3), ""));
    assert_eq!(
        done.stderr,
        "error: a0.json: is not a measurement: fake engine: step times come from a script\n"
    );
}

#[test]
fn hostile_files_give_one_line_and_exit_code_3() {
    let folder = tempdir().unwrap();
    let good = serde_json::to_string(&arm_record("a", 0, 1.0)).unwrap();
    std::fs::write(folder.path().join("good.json"), &good).unwrap();
    let with = |place: &str, text: &str| {
        let mut value: Value = serde_json::from_str(&good).unwrap();
        *value.pointer_mut(place).expect(place) = json!("PLANTED");
        value.to_string().replace("\"PLANTED\"", text)
    };
    let window = "/cells/0/runs/0/windows/0";
    let hundred_megabytes =
        format!("{{\"schema\": \"tokmeter-record/1\", \"x\": \"{}\"}}", "y".repeat(100 << 20));
    let cases = [
        ("empty", String::new()),
        ("truncated", good[..good.len() / 2].to_owned()),
        ("NaN", with(&format!("{window}/t1_ns"), "NaN")),
        ("negative", with(&format!("{window}/tokens_in"), "-1")),
        ("overflow", with(&format!("{window}/t1_ns"), "1e999")),
        ("too many", with(&format!("{window}/tokens_out"), "99999999999999999999999999")),
        ("backwards", with(&format!("{window}/t1_ns"), "0")),
        ("wrong count", with(&format!("{window}/tokens_in"), "17")),
        ("deep", "[".repeat(100_000)),
        ("other schema", with("/schema", "\"tokmeter-record/2\"")),
        ("100 MB", hundred_megabytes),
        ("binary", "\u{0}\u{1}".to_owned()),
    ];
    for (what, text) in cases {
        std::fs::write(folder.path().join("bad.json"), text).unwrap();
        for sides in [["good.json", "bad.json"], ["bad.json", "good.json"]] {
            let args =
                ["compare", "--allow-not-a-measurement", "--baseline", sides[0], "--candidate", sides[1]];
            // 100 MB of text are read, parsed and refused in a gigabyte.
            let done = tokmeter_limited(folder.path(), "ulimit -v 2097152", &args, Duration::from_secs(60));
            assert_eq!((done.code, done.stdout.as_str()), (Some(3), ""), "{what}: {done:?}");
            assert_eq!(done.stderr.lines().count(), 1, "{what}: {}", done.stderr);
            assert!(done.stderr.starts_with("error: bad.json: "), "{what}: {}", done.stderr);
        }
    }
}

/// Whether limits are asserted at their full size: in an optimised build, or when it is asked for.
fn is_full() -> bool {
    !cfg!(debug_assertions) || std::env::var_os("TOKMETER_FULL").is_some()
}

/// A record of `count` decode cells with one run each.
fn large_record(name: &str, count: u32) -> Record {
    let mut record = arm_record(name, 0, 1.0);
    let pattern = record.cells[2].clone();
    record.command.repeat = 1;
    record.cells = (1..=count)
        .map(|depth| {
            let mut cell = pattern.clone();
            let Workload::Decode { depth: own, .. } = &mut cell.workload else { panic!("cell 2 decodes") };
            *own = depth;
            cell.key = cell.workload.key();
            cell.runs.truncate(1);
            cell.runs[0].requests.iter_mut().for_each(|row| row.isl_tokens = depth);
            cell
        })
        .collect();
    record.command.planned_cells = record.cells.iter().map(|cell| cell.key.clone()).collect();
    assert_eq!(violations(&record), []);
    record
}

#[test]
fn a_thousand_cells_of_fifty_records_are_compared_in_time_and_memory() {
    let (cells, records) = if is_full() { (1000, 50) } else { (100, 10) };
    let folder = tempdir().unwrap();
    let mut files: Vec<String> = Vec::new();
    for index in 0..records {
        let mut record = large_record("p", cells);
        record.session.boot_id = Maybe::Value(format!("boot {index}"));
        let file = format!("{index}.json");
        std::fs::write(folder.path().join(&file), serde_json::to_string(&record).unwrap()).unwrap();
        files.push(file);
    }
    let (baseline, candidate) = files.split_at(records / 2);
    let mut args = vec!["compare", "--allow-not-a-measurement", "--format", "json", "--baseline"];
    args.extend(baseline.iter().map(String::as_str));
    args.push("--candidate");
    args.extend(candidate.iter().map(String::as_str));
    let clock = tokmeter::clock::Clock::monotonic();
    let begin_ns = clock.now_ns();
    // 500 MB of data; the limit is on address space, which threads' stacks and arenas take as well.
    let done = tokmeter_limited(folder.path(), "ulimit -d 512000", &args, Duration::from_secs(120));
    let seconds = (clock.now_ns() - begin_ns) as f64 / 1e9;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let value: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(value["cells"].as_array().unwrap().len(), cells as usize);
    let most = if is_full() { 5.0 } else { 60.0 };
    eprintln!("{cells} cells of {records} records: {seconds:.2} s");
    assert!(seconds < most, "{seconds} s, expected less than {most} s");
}

#[test]
fn on_the_cpu_half_the_threads_are_refused_by_name() {
    let folder = tempdir().unwrap();
    let model = program::tiny_model();
    for (file, threads) in [("two.json", "2"), ("one.json", "1")] {
        let args = ["run", "-m", model.to_str().unwrap(), "--batch", "1", "--isl", "16", "-r", "1"];
        let more = ["--min-seconds", "0.05", "--threads", threads, "--session", file, "-o", file];
        let done = tokmeter(folder.path(), &[&args[..], &more].concat());
        assert_eq!(done.code, Some(0), "{}", done.stderr);
    }
    let done = tokmeter(folder.path(), &["compare", "--baseline", "two.json", "--candidate", "one.json"]);
    assert_eq!(done.code, Some(12), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.starts_with("NOT COMPARABLE: CONFOUNDED"), "{}", done.stdout);
    assert!(done.stdout.contains("confounded by engine.threads: baseline 2, candidate 1"), "{}", done.stdout);
    let allowed = ["--allow-env", "engine.threads"];
    let done = tokmeter(
        folder.path(),
        &[&["compare", "--baseline", "two.json", "--candidate", "one.json"], &allowed[..]].concat(),
    );
    // On a busy machine the runs are left out by rule, and nothing remains to compare.
    assert!([Some(10), Some(11), Some(12)].contains(&done.code), "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains("allowed: engine.threads: 2 → 1"), "{}", done.stdout);
}
