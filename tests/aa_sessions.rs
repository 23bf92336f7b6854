//! The verdict on a real machine: sessions of the CPU engine between which nothing changed (`results/*-aa-sessions/`),
//! split at random, slowed down, and held against sessions on fewer cores.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};

use tokmeter::analysis::compare::{Comparison, Sample, Settings, Verdict, compare};
use tokmeter::record::{Maybe, Record, read};

/// Sessions on each side; the others are noise.
const ARM: usize = 3;
const SPLITS: u64 = 20;
/// Splits from which the rate of false alarms is told, and how many of them at most: the promise is one in a hundred.
const MANY_SPLITS: u64 = 1000;
const MOST_FALSE_ALARMS: usize = 10;
const LEAST_SESSIONS: usize = 24;

fn records(folder: &Path) -> Vec<Record> {
    let mut files: Vec<PathBuf> = folder
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    files.iter().map(|path| read(path).unwrap()).collect()
}

fn folders() -> Vec<PathBuf> {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let folders = results.read_dir().unwrap().map(|entry| entry.unwrap().path());
    folders.filter(|path| path.to_str().unwrap().ends_with("-aa-sessions")).collect()
}

fn sample(record: &Record) -> Sample {
    Sample::of(record.clone(), record.session.label.value().unwrap(), false).unwrap()
}

/// The sessions in an order of their own for each `seed` (Fisher and Yates, with a multiplicative generator).
fn shuffled(samples: &[Sample], seed: u64) -> Vec<Sample> {
    let mut samples = samples.to_vec();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for last in (1..samples.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        samples.swap(last, (state >> 33) as usize % (last + 1));
    }
    samples
}

fn verdict(baseline: &[Sample], candidate: &[Sample], noise: &[Sample]) -> Comparison {
    compare(baseline, candidate, noise, &Settings::default())
}

/// The same session, every window `factor` times as long.
fn slowed(record: &Record, factor: f64) -> Record {
    let mut record = record.clone();
    for window in record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows) {
        window.t1_ns = window.t0_ns + ((window.t1_ns - window.t0_ns) as f64 * factor).round() as u64;
    }
    record
}

/// The largest of the smallest changes that a comparison can tell, as ln.
fn largest_detectable_ln(comparison: &Comparison) -> f64 {
    let numbers = comparison.cells.iter().filter_map(|cell| cell.numbers.value());
    let ratios = numbers.filter_map(|numbers| numbers.detectable_holm_ratio.value().copied());
    ratios.map(|ratio| ratio.abs().ln_1p()).fold(0.0, f64::max)
}

#[test]
fn sessions_without_a_change_are_never_called_regressed() {
    let folders = folders();
    assert!(!folders.is_empty());
    for folder in folders {
        let samples: Vec<Sample> = records(&folder).iter().map(sample).collect();
        assert!(samples.len() >= LEAST_SESSIONS, "{}: {}", folder.display(), samples.len());
        for seed in 0..SPLITS {
            let order = shuffled(&samples, seed);
            let (arms, noise) = order.split_at(2 * ARM);
            let result = verdict(&arms[..ARM], &arms[ARM..], noise);
            println!(
                "{}: split {seed}: {:?}, MDE {:.3}",
                folder.display(),
                result.verdict,
                largest_detectable_ln(&result)
            );
            assert_ne!(result.verdict, Verdict::Regressed, "split {seed}: {:?}", result.reasons);
            assert_ne!(result.verdict, Verdict::NotComparable, "split {seed}: {:?}", result.reasons);
        }
    }
}

/// The same on many splits, as a rate: what the rule about a single session's weight is there for.
#[test]
fn false_alarms_are_as_rare_as_promised() {
    for folder in folders() {
        let samples: Vec<Sample> = records(&folder).iter().map(sample).collect();
        let is_alarm = |seed: &u64| {
            let order = shuffled(&samples, *seed);
            let (arms, noise) = order.split_at(2 * ARM);
            verdict(&arms[..ARM], &arms[ARM..], noise).verdict == Verdict::Regressed
        };
        let alarms = (SPLITS..SPLITS + MANY_SPLITS).filter(is_alarm).count();
        println!("{}: {alarms} false alarms in {MANY_SPLITS} splits", folder.display());
        assert!(alarms <= MOST_FALSE_ALARMS, "{alarms} of {MANY_SPLITS}");
    }
}

#[test]
fn a_tenth_slower_or_twice_what_can_be_told_is_found() {
    for folder in folders() {
        let records = records(&folder);
        let samples: Vec<Sample> = records.iter().map(sample).collect();
        for seed in 0..SPLITS {
            let order = shuffled(&samples, seed);
            let (arms, noise) = order.split_at(2 * ARM);
            let unchanged = verdict(&arms[..ARM], &arms[ARM..], noise);
            let factor = 1.1f64.max((2.0 * largest_detectable_ln(&unchanged)).exp());
            let slow: Vec<Sample> = arms[ARM..]
                .iter()
                .map(|fast| {
                    let is_it = |record: &&Record| record.session.label.value() == Some(&fast.name);
                    sample(&slowed(records.iter().find(is_it).unwrap(), factor))
                })
                .collect();
            let result = verdict(&arms[..ARM], &slow, noise);
            println!("{}: split {seed}: {factor:.3} times as slow", folder.display());
            assert_eq!(result.verdict, Verdict::Regressed, "split {seed}: {:?}", result.reasons);
        }
    }
}

/// Half the threads are another setting of the machine: refused by that name. Who declares the change gets the verdict,
/// and the change stands first among what was expected.
#[test]
fn half_the_threads_are_refused_by_name_or_regressed_where_declared() {
    for folder in folders() {
        let samples: Vec<Sample> = records(&folder).iter().map(sample).collect();
        let half: Vec<Sample> = records(&folder.join("half-the-threads")).iter().map(sample).collect();
        assert!(half.len() >= ARM);
        let refused = verdict(&samples[..ARM], &half, &samples[ARM..]);
        assert_eq!(refused.verdict, Verdict::NotComparable, "{:?}", refused.reasons);
        let cause = "confounded by engine.threads: baseline 2, candidate 1";
        assert!(refused.reasons.iter().any(|reason| reason == cause), "{:?}", refused.reasons);

        let mut settings = Settings::default();
        settings.declared.changing = vec!["cpu".to_owned()];
        let judged = compare(&samples[..ARM], &half, &samples[ARM..], &settings);
        assert_eq!(judged.verdict, Verdict::Regressed, "{:?}", judged.reasons);
        assert!(
            judged.environment.iter().any(|line| line.field == "engine.threads"),
            "{:?}",
            judged.environment
        );
    }
}

/// Another CPU, another model file: no verdict, and the reason names the field. Tokens that do not add up: no record.
#[test]
fn another_machine_or_model_file_is_refused_with_the_reason() {
    type Change = fn(&mut Record);
    let changes: [(&str, Change); 2] = [
        ("machine.cpu.model", |record| record.machine.cpu.model = Maybe::Value("another CPU".to_owned())),
        ("model.weights", |record| record.model.weights.files[0].sha256 = Maybe::Value("0".repeat(64))),
    ];
    for folder in folders() {
        let records = records(&folder);
        let baseline: Vec<Sample> = records[..ARM].iter().map(sample).collect();
        let other = |change: Change| {
            let mut record = records[ARM].clone();
            change(&mut record);
            Sample::of(record, "other", false)
        };
        for (field, change) in changes {
            let result = verdict(&baseline, &[other(change).unwrap()], &[]);
            assert_eq!(result.verdict, Verdict::NotComparable, "{field}");
            let expected = format!("another thing was measured: {field}");
            assert!(
                result.reasons.iter().any(|reason| reason.starts_with(&expected)),
                "{:?}",
                result.reasons
            );
        }
        let error = other(|record| record.cells[0].runs[0].windows[0].tokens_out += 1).unwrap_err();
        assert!(error.contains("contradicts itself") && error.contains("output tokens, expected"), "{error}");
    }
}
