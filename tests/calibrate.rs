//! `calibrate` against machines whose laws are known, against records that it must refuse, and against the figures and
//! files that are committed.

#![allow(clippy::unwrap_used)]

#[path = "common/planted.rs"]
mod planted;
#[path = "common/program.rs"]
mod program;

use std::path::Path;

use planted::{LINEAR, Truth, decode_grid, prefill_grid, record, slow_down};
use program::{fake_record, tokmeter};
use serde_json::json;
use tempfile::tempdir;
use tokmeter::analysis::calibrate::{
    Calibration, FittedLaw, Given, Grade, Law, Phase, Quantity, RowsForm, Term, calibrate,
    calibration_schema, fit_groups, parse_calibration, read_calibration, read_rows,
};
use tokmeter::record::{ClockEvents, IdlePower, Maybe, MeteredDevice, Workload};

fn grids() -> Vec<Workload> {
    [decode_grid(), prefill_grid()].concat()
}

fn fitted(given: &[Given]) -> Calibration {
    calibrate(given, Vec::new()).unwrap_or_else(|refusal| panic!("{refusal}"))
}

fn refused(given: &[Given]) -> String {
    calibrate(given, Vec::new()).expect_err("a refusal").to_string()
}

fn law(calibration: &Calibration, phase: Phase, quantity: Quantity) -> &FittedLaw {
    let is_it = |fitted: &&FittedLaw| fitted.law.phase == phase && fitted.quantity == quantity;
    calibration.laws.iter().find(is_it).unwrap()
}

/// Phase, quantity, term and planted coefficient of [`LINEAR`].
const PLANTED: [(Phase, Quantity, Term, f64); 12] = [
    (Phase::Decode, Quantity::Time, Term::Constant, 40e-3),
    (Phase::Decode, Quantity::Time, Term::Batch, 5e-3),
    (Phase::Decode, Quantity::Time, Term::KvTokens, 4e-6),
    (Phase::Decode, Quantity::Energy, Term::Constant, 8.0),
    (Phase::Decode, Quantity::Energy, Term::Batch, 0.5),
    (Phase::Decode, Quantity::Energy, Term::KvTokens, 2e-4),
    (Phase::Prefill, Quantity::Time, Term::Steps, 30e-3),
    (Phase::Prefill, Quantity::Time, Term::NewTokens, 4e-3),
    (Phase::Prefill, Quantity::Time, Term::AttendedPairs, 1e-6),
    (Phase::Prefill, Quantity::Energy, Term::Steps, 6.0),
    (Phase::Prefill, Quantity::Energy, Term::NewTokens, 0.3),
    (Phase::Prefill, Quantity::Energy, Term::AttendedPairs, 5e-5),
];

#[test]
fn without_noise_the_planted_coefficients_come_back_and_the_grade_is_a() {
    let calibration = fitted(&[record(&LINEAR, &grids())]);
    for (phase, quantity, term, planted) in PLANTED {
        let found = law(&calibration, phase, quantity).law.coefficient(term);
        assert!(
            (found / planted - 1.0).abs() < 1e-4,
            "{phase:?} {quantity:?} {term:?}: {found}, planted {planted}"
        );
    }
    assert_eq!(calibration.grade, Grade::A, "{:?}", calibration.notes);
    assert_eq!(calibration.subject.device, "b200");
    let share = |name: &str| {
        let found = calibration.read_outs.iter().find(|read_out| read_out.name == name).unwrap();
        *found.share.value().unwrap()
    };
    // By hand: 538 060 032 B / 40 ms / 20 GB/s; 46 080 B / 4 µs / 20 GB/s.
    assert!((share("decode_weights_bandwidth") - 0.6726).abs() < 1e-3);
    assert!((share("decode_kv_bandwidth") - 0.576).abs() < 1e-3);
}

#[test]
fn with_noise_the_intervals_hold_the_planted_coefficients_at_the_stated_rate() {
    for (noise, seeds) in [(0.01, 10), (0.03, 24), (0.05, 10)] {
        let (mut held, mut asked, mut graded_a) = (0_u32, 0_u32, 0_u32);
        let (mut errors, mut floors) = (0.0, 0.0);
        for seed in 0..seeds {
            let truth = Truth { noise, seed: 100 + seed, ..LINEAR };
            let calibration = fitted(&[record(&truth, &grids())]);
            graded_a += u32::from(calibration.grade == Grade::A);
            for (phase, quantity, term, planted) in PLANTED {
                let fitted = law(&calibration, phase, quantity);
                // A knot that noise bought splits a coefficient in two; the sum of slopes is then not the planted one.
                if fitted.law.knot.is_some() {
                    continue;
                }
                let found = fitted.law.coefficients.iter().find(|found| found.term == term).unwrap();
                asked += 1;
                held += u32::from((found.low..=found.high).contains(&planted));
            }
            let decode = law(&calibration, Phase::Decode, Quantity::Time);
            errors += decode.interior.value().unwrap().mape_share;
            floors += decode.noise_floor_share.value().unwrap();
        }
        let (error, floor) = (errors / f64::from(seeds as u32), floors / f64::from(seeds as u32));
        // What is held out is missed by what the runs differ by, and by nothing else: its own median of three runs has
        // 0.67 of their deviation, whose mean size is 0.8 of that, and the law's error comes on top.
        assert!((0.3..0.9).contains(&(error / floor)), "{error} over a noise of {floor} at {noise}");
        assert!((floor / noise - 0.85).abs() < 0.25, "{floor} at {noise}");
        let rate = f64::from(held) / f64::from(asked);
        assert!(asked > 70 && (0.80..=0.99).contains(&rate), "{held} of {asked} at {noise}");
        assert!(graded_a + 2 >= seeds as u32, "{graded_a} of {seeds} at {noise}");
    }
}

#[test]
fn the_longer_of_memory_and_arithmetic_is_met_by_a_hinge_or_costs_the_grade() {
    let truth = Truth {
        decode_s: |batch, kv_tokens| (40e-3 + 4e-6 * kv_tokens).max(8e-3 * batch),
        noise: 0.005,
        ..LINEAR
    };
    let calibration = fitted(&[record(&truth, &decode_grid())]);
    let decode = law(&calibration, Phase::Decode, Quantity::Time);
    let has_hinge = decode.law.knot.is_some_and(|knot| (2.0..=16.0).contains(&knot));
    assert!(has_hinge || calibration.grade > Grade::A, "{decode:?}");
    // And a hinge that is one: memory, then arithmetic, in the prompt's tokens.
    let truth = Truth {
        prefill_s: |batch, isl| 30e-3_f64.max(4e-3 * batch * isl - 0.6) + 1e-3,
        noise: 0.002,
        ..LINEAR
    };
    let calibration = fitted(&[record(&truth, &prefill_grid())]);
    let knot = law(&calibration, Phase::Prefill, Quantity::Time).law.knot.unwrap();
    assert!((64.0..=256.0).contains(&knot), "{knot}");
}

#[test]
fn what_is_held_out_decides_the_error_and_nothing_else() {
    let truth = Truth { noise: 0.02, ..LINEAR };
    let given = record(&truth, &grids());
    let honest = fitted(std::slice::from_ref(&given));
    let mut tampered = given.clone();
    let held_out = given.record.command.hold_out.value().unwrap().clone();
    let is_held_out = |key: &str| {
        [&held_out.interior, &held_out.row, &held_out.frontier]
            .iter()
            .any(|keys| keys.iter().any(|held| held == key))
    };
    slow_down(&mut tampered.record, 2.0, is_held_out);
    let ruined = fitted(&[tampered]);
    for (honest, ruined) in
        honest.laws.iter().zip(&ruined.laws).filter(|(law, _)| law.quantity == Quantity::Time)
    {
        let bits = |law: &Law| serde_json::to_string(law).unwrap();
        assert_eq!(bits(&honest.law), bits(&ruined.law), "the law has seen what was held out");
        for (honest, ruined) in [
            (&honest.interior, &ruined.interior),
            (&honest.row, &ruined.row),
            (&honest.frontier, &ruined.frontier),
        ] {
            let (honest, ruined) = (honest.value().unwrap(), ruined.value().unwrap());
            assert!(honest.mape_share < 0.05 && (0.45..0.55).contains(&ruined.mape_share), "{ruined:?}");
            assert!(ruined.coverage_share < 0.2 && ruined.signed_share < -0.45);
        }
    }
    assert_eq!((honest.grade, ruined.grade), (Grade::A, Grade::C));
}

#[test]
fn a_throttled_point_is_named_and_does_not_bend_the_law() {
    let truth = Truth { noise: 0.005, ..LINEAR };
    let mut given = record(&truth, &decode_grid());
    let held_out = given.record.command.hold_out.value().unwrap().clone();
    let key = given
        .record
        .cells
        .iter()
        .map(|cell| cell.key.clone())
        .find(|key| key.contains("/b8/") && !held_out.interior.contains(key) && !held_out.row.contains(key))
        .unwrap();
    slow_down(&mut given.record, 1.6, |other| other == key);
    let calibration = fitted(&[given]);
    let decode = law(&calibration, Phase::Decode, Quantity::Time);
    assert_eq!(decode.outliers.iter().map(|outlier| &outlier.key).collect::<Vec<_>>(), [&key]);
    assert!((decode.outliers[0].ratio - 1.6).abs() < 0.05);
    assert!(calibration.notes.iter().any(|note| note.starts_with(&key)), "{:?}", calibration.notes);
    for (term, planted) in [(Term::Constant, 40e-3), (Term::Batch, 5e-3), (Term::KvTokens, 4e-6)] {
        assert!((decode.law.coefficient(term) / planted - 1.0).abs() < 0.03, "{term:?}");
    }
}

#[test]
fn clocks_that_heat_held_down_are_told_with_the_role_of_their_cell() {
    let mut given = record(&LINEAR, &decode_grid());
    let held_out = given.record.command.hold_out.value().unwrap().frontier[0].clone();
    let learnt = given.record.cells[0].key.clone();
    for cell in given.record.cells.iter_mut().filter(|cell| [&held_out, &learnt].contains(&&cell.key)) {
        cell.runs[1].windows[0].clock_events = Maybe::Value(ClockEvents {
            software_power_cap_ns: Maybe::Value(0),
            software_thermal_ns: Maybe::Value(1),
            hardware_thermal_ns: Maybe::Value(0),
            hardware_power_brake_ns: Maybe::Value(0),
            reasons_mask: Maybe::missing("not_supported"),
        });
    }
    let notes = fitted(&[given]).notes;
    for (key, role) in [(held_out, "held out"), (learnt, "learnt from")] {
        let note = format!("{key} ({role}): clocks were held down by heat");
        assert!(notes.contains(&note), "{note} is not in {notes:?}");
    }
}

/// Power of the loads that the truth has: joules over seconds of a step.
fn planted_w(batch: f64, depth: f64) -> f64 {
    let kv_tokens = batch * (depth + 8.5);
    (LINEAR.decode_j)(batch, kv_tokens) / (LINEAR.decode_s)(batch, kv_tokens)
}

#[test]
fn the_power_ladder_is_read_off_the_records_rung_by_rung() {
    let watched = |power_w: f64, parts_w: [f64; 3]| {
        Maybe::Value(IdlePower {
            power_w,
            uncertainty_w: 1.0,
            duration_ns: 60_000_000_000,
            parts_w: Maybe::Value(parts_w.to_vec()),
        })
    };
    let mut given = record(&Truth { noise: 0.01, ..LINEAR }, &grids());
    given.record.meter.idle_no_context = watched(70.0, [70.0, 71.0, 69.0]);
    given.record.meter.idle_context_resident = watched(120.0, [120.0; 3]);
    given.record.meter.idle_after_load = watched(150.0, [180.0, 140.0, 130.0]);
    let calibration = fitted(std::slice::from_ref(&given));
    assert_eq!((calibration.idle_w, calibration.ready_w), (Maybe::Value(70.0), Maybe::Value(120.0)));
    let names: Vec<&str> = calibration.power_steps.iter().map(|step| step.step.as_str()).collect();
    let ramp = [1, 2, 4, 8, 16, 32, 64].map(|batch| format!("decode/b{batch}/d128/o16"));
    let expected: Vec<&str> =
        ["idle", "ready"].into_iter().chain(ramp.iter().map(String::as_str)).chain(["after_load"]).collect();
    assert_eq!(names, expected);
    for (step, batch) in calibration.power_steps[2..9].iter().zip([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]) {
        let planted = planted_w(batch, 128.0);
        assert!((step.mean_w / planted - 1.0).abs() < 0.03, "{step:?}, planted {planted}");
        assert!((0.0..0.05).contains(step.variation_share.value().unwrap()), "{step:?}");
    }
    // By hand: deviations 1, 1 and 0 from 70, over 2.
    assert!((calibration.power_steps[0].variation_share.value().unwrap() - 1.0 / 70.0).abs() < 1e-12);
    // Two boards in one reading: each draws half.
    given.record.meter.devices = Maybe::Value(vec![
        MeteredDevice {
            device: "cuda:0".to_owned(),
            update_period_ns: Maybe::missing("no_counter"),
            power_limit_w: Maybe::missing("not_known"),
            shared: Maybe::Value(false),
        };
        2
    ]);
    let halves = fitted(std::slice::from_ref(&given));
    assert_eq!(halves.ready_w, Maybe::Value(60.0));
    assert!((halves.power_steps[2].mean_w * 2.0 / calibration.power_steps[2].mean_w - 1.0).abs() < 1e-12);
    // Without a meter there is no ladder, and the reason is the meter's.
    let mut blind = record(&LINEAR, &grids());
    blind.record.meter.idle_no_context = Maybe::missing("no_powercap");
    blind
        .record
        .cells
        .iter_mut()
        .flat_map(|cell| &mut cell.runs)
        .flat_map(|run| &mut run.windows)
        .for_each(|window| window.energy = Maybe::missing("no_powercap"));
    let blind = fitted(&[blind]);
    assert_eq!((blind.idle_w.reason(), blind.power_steps.len()), (Some("no_powercap"), 0));
}

#[test]
fn records_that_do_not_determine_a_physical_law_are_refused_with_the_reason() {
    let grid = decode_grid();
    let few = refused(&[record(&LINEAR, &grid[..3])]);
    assert!(few.contains("2 points to learn from, expected at least 8"), "{few}");
    let one_context: Vec<Workload> =
        (1..=12).map(|batch| Workload::Decode { batch, depth: 128, osl: 16 }).collect();
    let refusal = refused(&[record(&LINEAR, &one_context)]);
    assert!(refusal.contains("1 contexts to learn from, expected at least 2"), "{refusal}");
    let none = refused(&[record(&LINEAR, &[])]);
    assert!(none.contains("no decode and no prefill cell"), "{none}");
    let impossible = Truth { decode_s: |batch, kv| 20e-3 + 5e-3 * batch + 4e-6 * kv, ..LINEAR };
    let refusal = refused(&[record(&impossible, &grid)]);
    assert!(refusal.contains("decode weights bandwidth is 135 % of the ceiling"), "{refusal}");
    let proportional = Truth { decode_s: |batch, kv| 5e-3 * batch + 4e-6 * kv, ..LINEAR };
    let refusal = refused(&[record(&proportional, &grid)]);
    assert!(refusal.contains("coefficient of constant is zero"), "{refusal}");
}

#[test]
fn an_anchor_that_drifts_is_refused() {
    let anchor = Workload::Decode { batch: 4, depth: 256, osl: 16 };
    let cells = [&[anchor], &decode_grid()[..], &[anchor]].concat();
    let mut given = record(&Truth { noise: 0.002, ..LINEAR }, &cells);
    assert!(calibrate(std::slice::from_ref(&given), Vec::new()).is_ok());
    let last = given.record.cells.len() - 1;
    for window in given.record.cells[last].runs.iter_mut().flat_map(|run| &mut run.windows) {
        window.t1_ns += (window.t1_ns - window.t0_ns) / 10;
    }
    let refusal = refused(&[given]);
    assert!(refusal.contains("between its 3 visits"), "{refusal}");
}

#[test]
fn records_of_different_things_and_a_changed_hold_out_are_refused() {
    let given = record(&LINEAR, &grids());
    let mut other = given.clone();
    other.file = "other.json".to_owned();
    other.record.engine.compute_dtype = "bf16".to_owned();
    let refusal = refused(&[given.clone(), other]);
    assert!(refusal.contains("other.json has compute type bf16, expected f32"), "{refusal}");
    let mut changed = given;
    if let Maybe::Value(held_out) = &mut changed.record.command.hold_out {
        held_out.interior.pop();
    }
    assert!(refused(&[changed]).contains("it was changed"));
}

#[test]
fn the_same_records_give_the_same_bits_in_any_order() {
    let truth = Truth { noise: 0.04, ..LINEAR };
    let given = record(&truth, &grids());
    let mut turned = given.clone();
    turned.record.cells.reverse();
    let [one, two, three] = [&given, &given, &turned].map(|given| fitted(std::slice::from_ref(given)).laws);
    assert_eq!(serde_json::to_string(&one).unwrap(), serde_json::to_string(&two).unwrap());
    assert_eq!(one, three);
}

#[test]
fn one_window_without_energy_leaves_no_energy_law_and_says_why() {
    let mut given = record(&LINEAR, &grids());
    given.record.cells[0].runs[0].windows[0].energy = Maybe::missing("no_sensor");
    let calibration = fitted(&[given]);
    let has_law = |phase| calibration.law(phase, Quantity::Energy).is_some();
    assert!(!has_law(Phase::Decode) && has_law(Phase::Prefill));
}

#[test]
fn the_program_fits_refuses_and_writes() {
    let folder = tempdir().unwrap();
    let write = |name: &str, given: &Given| {
        let path = folder.path().join(name);
        std::fs::write(&path, serde_json::to_string(&given.record).unwrap()).unwrap();
    };
    write("good.json", &record(&Truth { noise: 0.01, ..LINEAR }, &grids()));
    write("few.json", &record(&LINEAR, &decode_grid()[..3]));
    let done = tokmeter(folder.path(), &["calibrate", "good.json", "--out", "c.json"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    for word in
        ["decode time", "prefill energy", "interpolation", "measured roofline", "grade A", "noise floor"]
    {
        assert!(done.stdout.contains(word), "{word} is not in\n{}", done.stdout);
    }
    let calibration = read_calibration(&folder.path().join("c.json")).unwrap();
    assert_eq!(calibration.command, ["tokmeter", "calibrate", "good.json", "--out", "c.json"]);
    let done = tokmeter(folder.path(), &["calibrate", "few.json", "--out", "none.json"]);
    assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""));
    assert!(done.stderr.contains("refused: decode: 2 points"), "{}", done.stderr);
    assert!(!folder.path().join("none.json").exists());
    fake_record(folder.path());
    let done = tokmeter(folder.path(), &["calibrate", "fake.json"]);
    assert_eq!(done.code, Some(3));
    assert!(done.stderr.contains("not a measurement"), "{}", done.stderr);
    let done = tokmeter(folder.path(), &["calibrate", "c.json"]);
    assert_eq!(done.code, Some(3));
    let done = tokmeter(folder.path(), &["calibrate", "good.json", "--group", "x"]);
    assert_eq!(done.code, Some(2));
}

#[test]
fn foreign_and_future_calibrations_are_refused_in_one_line() {
    let path = repository("results/calibrations/published-gb200-llama-3.3-70b-fp4.json");
    let good = std::fs::read_to_string(path).unwrap();
    let cases = [
        (good.replace("tokmeter-calibration/1", "tokmeter-calibration/2"), "another version"),
        (good.replace("tokmeter-calibration/1", "tokmeter-record/1"), "it is a record"),
        (good.replace("tokmeter-calibration/1", "somebody/1"), "schema somebody/1"),
        (good.replace("\"grade\": \"C\"", "\"grade\": \"A\""), "published and its grade A"),
        (good.replace("\"basis\"", "\"bases\""), "unknown field `bases`"),
        ("{}".to_owned(), "no field schema"),
        ("not json".to_owned(), "no JSON"),
    ];
    for (text, reason) in cases {
        let error = format!("{:#}", parse_calibration(&text).expect_err(reason));
        assert!(error.contains(reason), "{error}, expected {reason}");
    }
}

#[test]
fn the_committed_schema_is_the_programs_and_the_committed_calibrations_follow_it() {
    let path = repository("results/calibration-schema.json");
    if std::env::var_os("TOKMETER_BLESS").is_some() {
        std::fs::write(&path, calibration_schema()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), calibration_schema(), "run with TOKMETER_BLESS=1");
    let schema: serde_json::Value = serde_json::from_str(&calibration_schema()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(repository("results/calibrations")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let value: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let faults: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
            assert!(faults.is_empty(), "{}: {faults:?}", path.display());
            let calibration = read_calibration(&path).unwrap();
            assert_eq!(calibration.grade, Grade::C, "{}", path.display());
            count += 1;
        }
    }
    assert!(count >= 6, "{count}");
}

#[test]
fn the_published_calibrations_follow_from_the_committed_figures() {
    let rows = read_rows(&repository("results/calibrations/tensorrt-llm-1.0.csv"), RowsForm::Csv).unwrap();
    for (group, file, most_mape) in [
        ("h100/trtllm/Llama-3.3-70B/fp8/tp2", "h100-llama-3.3-70b-fp8", 0.06),
        ("h200/trtllm/Llama-3.3-70B/fp8/tp1", "h200-llama-3.3-70b-fp8", 0.08),
        ("b200/trtllm/Llama-3.3-70B/fp4/tp1", "b200-llama-3.3-70b-fp4", 0.06),
        ("gb200/trtllm/Llama-3.3-70B/fp4/tp1", "gb200-llama-3.3-70b-fp4", 0.06),
    ] {
        let committed =
            read_calibration(&repository(&format!("results/calibrations/published-{file}.json"))).unwrap();
        let fits = fit_groups(&rows, &committed.command);
        let fit = fits.into_iter().find(|fit| fit.group.name() == group).unwrap();
        let made = fit.calibration.unwrap();
        assert_eq!(made.sources, committed.sources, "{file}");
        for (made, committed) in made.laws[0].law.values().iter().zip(committed.laws[0].law.values()) {
            assert!((made - committed).abs() <= 1e-9 * committed, "{file}: {made} {committed}");
        }
        let errors = &made.laws[0].leave_one_out;
        assert!(errors.points == 10 && errors.mape_share < most_mape, "{file}: {errors:?}");
    }
}

/// The independent figure: planted serving rows, with and without a mixture of experts.
#[test]
fn the_law_of_serving_is_recovered_from_rows() {
    let folder = tempdir().unwrap();
    let mut text = "system,gpus,engine,model,precision,parallelism,experts,isl,osl,concurrency,output_tokens_per_s,source\n".to_owned();
    for (isl, osl) in [(1024.0, 1024.0), (8192.0, 1024.0), (1024.0, 8192.0)] {
        for concurrency in [1.0, 4.0, 8.0, 16.0, 32.0, 64.0] {
            let dense = 5e-3
                + 6e-5 * concurrency
                + 2e-9 * concurrency * (isl + osl / 2.0)
                + 2e-5 * concurrency * isl / osl;
            let experts = dense + 4e-3 * (1.0 - f64::exp(-concurrency / 16.0));
            for (model, mixture, tpot_s) in [("dense", "no", dense), ("moe", "yes", experts)] {
                let rate = concurrency / tpot_s;
                text.push_str(&format!(
                    "h200,1,own,{model},fp8,tp1,{mixture},{isl},{osl},{concurrency},{rate},planted\n"
                ));
            }
        }
    }
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, text).unwrap();
    let fits = fit_groups(&read_rows(&path, RowsForm::Csv).unwrap(), &[]);
    let planted = [5e-3, 6e-5, 2e-9, 2e-5, 4e-3];
    for fit in fits {
        let law = fit.calibration.unwrap().laws[0].law.clone();
        assert_eq!(law.knot, fit.group.has_experts.then_some(16.0));
        for (found, planted) in law.values().iter().zip(planted) {
            assert!((found / planted - 1.0).abs() < 1e-6, "{}: {found} {planted}", fit.group.name());
        }
    }
}

/// The same of InferenceX's rows, whose throughput is that of one GPU; what is another system is not taken.
#[test]
fn the_law_of_serving_is_recovered_from_inferencex_rows() {
    let folder = tempdir().unwrap();
    let mut rows = Vec::new();
    for (isl, osl) in [(1024.0, 1024.0), (8192.0, 1024.0), (1024.0, 8192.0)] {
        for conc in [4.0, 8.0, 16.0, 32.0, 64.0] {
            let tpot_s = 5e-3 + 6e-5 * conc + 2e-9 * conc * (isl + osl / 2.0) + 2e-5 * conc * isl / osl;
            let row = |disagg: bool, slower: f64| {
                json!({
                    "hw": "h200", "framework": "trt", "model": "meta-llama/Llama-3.3-70B-Instruct", "precision": "fp8",
                    "isl": isl, "osl": osl, "conc": conc, "tp": 4, "ep": 1, "dp_attention": "false",
                    "spec_decoding": "none", "disagg": disagg, "is_multinode": false,
                    "output_tput_per_gpu": conc / (tpot_s * slower) / 4.0,
                })
            };
            rows.extend([row(false, 1.0), row(true, 3.0)]);
        }
    }
    let path = folder.path().join("agg_bmk.json");
    let write =
        |rows: &[serde_json::Value]| std::fs::write(&path, serde_json::to_vec(rows).unwrap()).unwrap();
    write(&rows);
    let fits = fit_groups(&read_rows(&path, RowsForm::InferenceX).unwrap(), &[]);
    assert_eq!((fits.len(), fits[0].points, fits[0].group.gpus), (1, 15, 4));
    assert_eq!(fits[0].group.name(), "h200/trt/Llama-3.3-70B-Instruct/fp8/tp4-pp1-ep1");
    let law = &fits[0].calibration.as_ref().unwrap().laws[0].law;
    for (found, planted) in law.values().iter().zip([5e-3, 6e-5, 2e-9, 2e-5]) {
        assert!((found / planted - 1.0).abs() < 1e-6, "{found} {planted}");
    }
    rows[4]["output_tput_per_gpu"] = json!(-1.0);
    write(&rows);
    let error = format!("{:#}", read_rows(&path, RowsForm::InferenceX).unwrap_err());
    assert!(error.contains("row 5: output_tput_per_gpu is '-1.0', expected a number above 0"), "{error}");
    std::fs::write(&path, "{\"hw\": ").unwrap();
    let error = format!("{:#}", read_rows(&path, RowsForm::InferenceX).unwrap_err());
    assert!(error.contains("agg_bmk.json: is no table of serving rows"), "{error}");
}

fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
