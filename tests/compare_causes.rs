//! What a comparison says beside its numbers: steadiness, the library's algorithms, the forms of the kernels, the device's
//! own abilities, and the page that shows all of it.

#![allow(clippy::unwrap_used)]

#[path = "common/made_up.rs"]
mod made_up;
#[path = "common/markup.rs"]
mod markup;
#[path = "common/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use markup::{Element, elements};
use program::{fake_record, tokmeter};
use serde_json::Value;
use tempfile::tempdir;
use tokmeter::analysis::compare::{
    self, AlgorithmChange, Class, Comparand, Comparison, Declared, HeldBack, Metric, Sample, Settings,
    Verdict,
};
use tokmeter::record::{
    Chosen, ClockEvents, CublasLt, DeviceEnergy, Energy, IdlePower, KernelResources, Kernels, Maybe, Record,
    Steady, TunedProduct, Window,
};
use tokmeter::report::{comparison_json, comparison_markdown, comparison_page, comparison_table};

/// As if a GPU had measured it, with power and ceilings.
static TEMPLATE: LazyLock<Record> = LazyLock::new(|| {
    let mut record = made_up::on_gpu(&fake_record(tempdir().unwrap().path()), "Test GPU");
    record.machine.env.clear();
    made_up::set_power(&mut record, 500.0);
    made_up::set_ceilings(&mut record, 3e12, 8e14);
    record
});

/// Sessions of one side: each run `slowness(cell)` times as long, but for a little, then changed by `change`.
fn side(name: &str, slowness: impl Fn(&str) -> f64, change: impl Fn(&mut Record)) -> Vec<Sample> {
    let session = |index: usize| {
        let mut record = TEMPLATE.clone();
        record.session.boot_id = Maybe::Value(format!("boot {name}{index}"));
        record.started_at = format!("2026-02-01T00:00:00.{name}{index}Z");
        let jitter = [0.0, 0.002, -0.002][index];
        for cell in &mut record.cells {
            let factor = slowness(&cell.key) * (1.0 + jitter);
            for window in cell.runs.iter_mut().flat_map(|run| &mut run.windows) {
                window.t1_ns = window.t0_ns + ((window.t1_ns - window.t0_ns) as f64 * factor) as u64;
                window.energy = Maybe::Value(energy(window));
            }
        }
        change(&mut record);
        Sample::of(record, &format!("{name}{index}.json"), true).unwrap()
    };
    (0..3).map(session).collect()
}

/// At 500 W, by one device whose integrated power agrees.
fn energy(window: &Window) -> Energy {
    let whole = made_up::energy(window, 500.0);
    let device = DeviceEnergy {
        device: "cuda:0".to_owned(),
        t_a_ns: window.t0_ns,
        t_b_ns: window.t1_ns,
        half_width_a_ns: 0,
        half_width_b_ns: 0,
        energy_j: whole.energy_j,
        readings: 100,
        update_period_ns: Maybe::missing("power_only"),
        integral_j: Maybe::Value(whole.energy_j),
        power_min_w: Maybe::missing("not_read"),
        power_max_w: Maybe::missing("not_read"),
    };
    Energy { devices: vec![device], ..whole }
}

fn compared(baseline: &[Sample], candidate: &[Sample]) -> Comparison {
    compare::compare(baseline, candidate, &[], &Settings::default())
}

fn unchanged(_: &mut Record) {}

fn even(_: &str) -> f64 {
    1.0
}

fn throughput<'a>(result: &'a Comparison, key: &str) -> &'a Comparand {
    result.cells.iter().find(|cell| cell.metric == Metric::Throughput && cell.cell == key).unwrap()
}

/// Gives the first `count` runs of every cell this class.
fn with_class(count: usize, class: Steady) -> impl Fn(&mut Record) {
    move |record| {
        for cell in &mut record.cells {
            cell.runs.iter_mut().take(count).for_each(|run| run.steady = class);
        }
    }
}

#[test]
fn more_than_a_third_of_unsettled_runs_cannot_pass_and_hide_no_regression() {
    let steady = side("a", even, unchanged);
    assert_eq!(compared(&steady, &side("b", even, unchanged)).verdict, Verdict::Same);
    for class in [Steady::Warmup, Steady::Slowdown, Steady::NoSteadyState] {
        let result = compared(&steady, &side("b", even, with_class(1, class)));
        assert_eq!((result.verdict, result.verdict.exit_code()), (Verdict::Inconclusive, 11), "{class:?}");
        for cell in &result.cells {
            assert_eq!(cell.held_back, Some(HeldBack::UnsettledRuns), "{cell:?}");
            assert!(
                cell.notes.iter().any(|note| note.starts_with("3 of 6 runs of the candidate")),
                "{cell:?}"
            );
        }
        assert!(result.reasons[0].ends_with("it would pass, but too many runs were not settled"));
        assert!(
            result.next.iter().all(|step| step.starts_with("measure again on a device that has settled"))
        );
    }
    // On either side, and a faster candidate is no better shown.
    for slowness in [1.0, 1.05] {
        let restless = side("b", |_| slowness, with_class(1, Steady::Slowdown));
        assert_eq!(compared(&restless, &side("c", even, unchanged)).verdict, Verdict::Inconclusive);
    }
    // One of six is within a third; not to have looked is nothing found.
    let one_session = |record: &mut Record| {
        if record.started_at.contains("b0") {
            with_class(1, Steady::Slowdown)(record);
        }
    };
    assert_eq!(compared(&steady, &side("b", even, one_session)).verdict, Verdict::Same);
    assert_eq!(
        compared(&steady, &side("b", even, with_class(2, Steady::NotAssessed))).verdict,
        Verdict::Same
    );
    // What is worse beyond chance stays a regression.
    let slow = side("b", |_| 1.05, with_class(2, Steady::Slowdown));
    let result = compared(&steady, &slow);
    assert_eq!(result.verdict, Verdict::Regressed);
    assert!(result.cells.iter().all(|cell| cell.held_back.is_none() && !cell.notes.is_empty()));
}

fn clock_events(power_cap_ns: u64, heat_ns: u64, brake_ns: u64) -> ClockEvents {
    ClockEvents {
        software_power_cap_ns: Maybe::Value(power_cap_ns),
        software_thermal_ns: Maybe::Value(heat_ns),
        hardware_thermal_ns: Maybe::Value(0),
        hardware_power_brake_ns: Maybe::Value(brake_ns),
        reasons_mask: Maybe::missing("no_bits"),
    }
}

/// Clocks held down for these shares of every window.
fn held_down(power_cap: f64, heat: f64, brake: f64) -> impl Fn(&mut Record) {
    move |record| {
        for window in record.cells.iter_mut().flat_map(|cell| &mut cell.runs).flat_map(|run| &mut run.windows)
        {
            let of = |share: f64| ((window.t1_ns - window.t0_ns) as f64 * share) as u64;
            window.clock_events = Maybe::Value(clock_events(of(power_cap), of(heat), of(brake)));
        }
    }
}

#[test]
fn heat_and_the_power_supply_hold_a_pass_back_and_the_power_limit_does_not() {
    let quiet = side("a", even, held_down(0.0, 0.0, 0.0));
    for ((power_cap, heat, brake), expected) in [
        ((1.0, 0.0, 0.0), Verdict::Same),
        ((0.0, 0.005, 0.005), Verdict::Same),
        ((0.0, 0.02, 0.0), Verdict::Inconclusive),
        ((0.0, 0.0, 0.02), Verdict::Inconclusive),
    ] {
        let result = compared(&quiet, &side("b", even, held_down(power_cap, heat, brake)));
        assert_eq!(result.verdict, expected, "{power_cap} {heat} {brake}: {:?}", result.reasons);
        let conditions = &result.candidate.conditions;
        for (held_s, share) in [
            (&conditions.power_cap_s, power_cap),
            (&conditions.thermal_s, heat),
            (&conditions.power_brake_s, brake),
        ] {
            assert!((held_s.value().unwrap() / conditions.window_s - share).abs() < 1e-6);
        }
        let text = comparison_table(&result);
        assert!(text.contains("clock held down by the power supply: 0.0 s of "), "{text}");
    }
}

/// A cell that the library takes part in, and one that it does not.
const LIBRARY_CELL: &str = "prefill/b1/i512";
const OWN_CELL: &str = "decode/b1/d128/o16";

fn product(rows: u32) -> TunedProduct {
    TunedProduct {
        rows,
        columns: 6144,
        depth: 4096,
        dtype: "bf16".to_owned(),
        epilogue: "store_f32".to_owned(),
        algorithm_id: 66,
        tile_id: 20,
        stages_id: 35,
        split_k: 1,
        workspace_bytes: 0,
        chosen: Chosen::Tuned,
        timed_algorithms: 16,
        best_ns: Maybe::Value(1000),
    }
}

fn with_library(change: impl Fn(&mut TunedProduct)) -> impl Fn(&mut Record) {
    move |record| {
        let mut products = vec![product(96), product(512)];
        change(&mut products[1]);
        record.engine.cublaslt = Maybe::Value(CublasLt {
            version: "13.1.0".to_owned(),
            least_rows: 65,
            workspace_limit_bytes: 32 << 20,
            tuning_ns: 7,
            products,
        });
    }
}

fn slow_in(cell: &'static str) -> impl Fn(&str) -> f64 {
    move |key| if key == cell { 1.06 } else { 1.0 }
}

#[test]
fn every_number_of_an_algorithm_gives_its_line_and_its_timing_gives_none() {
    let before = side("a", even, with_library(|_| {}));
    let algorithms = |change: fn(&mut TunedProduct)| -> Vec<AlgorithmChange> {
        compared(&before, &side("b", even, with_library(change))).why.library.algorithms
    };
    for change in [
        (|product| product.algorithm_id = 67) as fn(&mut TunedProduct),
        |product| product.tile_id = 21,
        |product| product.stages_id = 36,
        |product| product.split_k = 2,
    ] {
        let found = algorithms(change);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].rows, found[0].baseline[0].algorithm_id), (512, 66));
        assert_ne!(found[0].baseline, found[0].candidate);
        assert!(found[0].cells.contains(&LIBRARY_CELL.to_owned()), "{found:?}");
        assert!(!found[0].cells.contains(&OWN_CELL.to_owned()), "{found:?}");
    }
    for change in [
        (|product| product.best_ns = Maybe::Value(999)) as fn(&mut TunedProduct),
        |product| product.chosen = Chosen::Cache,
        |product| product.timed_algorithms = 3,
        |product| product.workspace_bytes = 1,
    ] {
        assert_eq!(algorithms(change), []);
    }
    // A choice that varies between sessions of one side and meets the other's is no change.
    let varied = side("b", even, |record| {
        let is_first = record.started_at.contains("b0");
        with_library(|product| product.algorithm_id = if is_first { 66 } else { 67 })(record);
    });
    assert_eq!(compared(&before, &varied).why.library.algorithms, []);
}

#[test]
fn a_loss_with_another_algorithm_of_the_library_is_no_regression_of_the_driver() {
    let other = |product: &mut TunedProduct| product.algorithm_id = 67;
    let before = side("a", even, with_library(|_| {}));
    let slow = side("b", slow_in(LIBRARY_CELL), with_library(other));
    let result = compared(&before, &slow);
    let cell = throughput(&result, LIBRARY_CELL);
    assert_eq!((cell.verdict, cell.held_back), (Verdict::Inconclusive, Some(HeldBack::LibraryAlgorithm)));
    assert_eq!((result.verdict, result.verdict.exit_code()), (Verdict::Inconclusive, 11));
    assert!(result.next[0].contains("--gemm own"), "{:?}", result.next);
    let text = comparison_table(&result);
    assert!(
        text.contains("library algorithm changed: 512 rows, 6144 columns, depth 4096, bf16 store_f32: 66 (tile 20, stages 35, split 1) → 67"),
        "{text}"
    );
    assert!(text.contains("prefill, products by cuBLASLt: "), "{text}");
    // The same algorithm, or a library that is updated on purpose: the loss counts.
    let same = side("b", slow_in(LIBRARY_CELL), with_library(|_| {}));
    assert_eq!(compared(&before, &same).verdict, Verdict::Regressed);
    let declared = Declared { changing: vec!["kernels".to_owned()], ..Declared::default() };
    let settings = Settings { declared, ..Settings::default() };
    assert_eq!(compare::compare(&before, &slow, &[], &settings).verdict, Verdict::Regressed);
    // A cell of our own kernels is the device's, whatever the library does.
    let own = side("b", slow_in(OWN_CELL), with_library(other));
    let result = compared(&before, &own);
    assert_eq!(
        (result.verdict, throughput(&result, OWN_CELL).verdict),
        (Verdict::Regressed, Verdict::Regressed)
    );
    assert!(result.why.library.cells.contains(&LIBRARY_CELL.to_owned()));
    assert!(!result.why.library.cells.contains(&OWN_CELL.to_owned()));
}

#[test]
fn other_tokens_with_another_algorithm_are_not_called_numerics() {
    let with_output = |hash: &'static str, algorithm_id: u32| {
        move |record: &mut Record| {
            with_library(|product| product.algorithm_id = algorithm_id)(record);
            for cell in
                record.cells.iter_mut().filter(|cell| [LIBRARY_CELL, OWN_CELL].contains(&cell.key.as_str()))
            {
                cell.runs.iter_mut().for_each(|run| run.output_token_sha256 = Maybe::Value(hash.to_owned()));
            }
        }
    };
    let before = side("a", even, with_output("one", 66));
    let why = compared(&before, &side("b", even, with_output("other", 67))).why;
    assert_eq!(
        (why.library.outputs_changed, why.outputs_changed),
        (vec![LIBRARY_CELL.to_owned()], vec![OWN_CELL.to_owned()])
    );
    let why = compared(&before, &side("b", even, with_output("other", 66))).why;
    assert_eq!((why.library.outputs_changed.len(), why.outputs_changed.len()), (0, 2));
}

#[test]
fn every_ability_of_the_device_has_its_layer_and_its_direction() {
    let with = |place: &'static str, value: f64| {
        move |record: &mut Record| {
            let idle = || {
                Maybe::Value(IdlePower {
                    power_w: 70.0,
                    uncertainty_w: 0.1,
                    duration_ns: 60_000_000_000,
                    parts_w: Maybe::missing("made_up"),
                })
            };
            (record.meter.idle_no_context, record.meter.idle_context_resident) = (idle(), idle());
            let mut json = serde_json::to_value(&*record).unwrap();
            let some = json["ceilings"][0]["read_bandwidth_bytes_per_s"].clone();
            for field in
                ["launch_ns", "graph_node_ns", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s"]
            {
                json["ceilings"][0][field] = some.clone();
            }
            json["ceilings"][0]["mma_flops_per_s"] = serde_json::json!({ "bf16": some });
            if !place.is_empty() {
                let of = json.pointer_mut(place).expect(place);
                *of = (of.as_f64().unwrap() * value).into();
            }
            *record = serde_json::from_value(json).unwrap();
        }
    };
    let before = side("a", even, with("", 1.0));
    for (place, layer, is_better_low) in [
        ("/ceilings/0/launch_ns/value", "launch", true),
        ("/ceilings/0/graph_node_ns/value", "launch", true),
        ("/ceilings/0/host_to_device_bytes_per_s/value", "copy", false),
        ("/ceilings/0/device_to_host_bytes_per_s/value", "copy", false),
        ("/ceilings/0/copy_bandwidth_bytes_per_s/value", "copy", false),
        ("/ceilings/0/read_bandwidth_bytes_per_s/value", "memory", false),
        ("/ceilings/0/matmul_flops_per_s/bf16/value", "matmul", false),
        ("/ceilings/0/mma_flops_per_s/bf16/value", "matmul", false),
        ("/meter/idle_no_context/power_w", "idle", true),
        ("/meter/idle_context_resident/power_w", "idle", true),
    ] {
        let result = compared(&before, &side("b", even, with(place, 1.25)));
        assert_eq!((result.verdict, result.why.probes.len()), (Verdict::Same, 11), "{:?}", result.reasons);
        let moved: Vec<_> =
            result.why.probes.iter().filter(|probe| probe.effect_ratio.abs() > 1e-9).collect();
        assert_eq!(moved.len(), 1, "{place}: {moved:?}");
        assert_eq!((moved[0].layer.as_str(), moved[0].is_better_low), (layer, is_better_low), "{place}");
        assert!(
            (moved[0].effect_ratio - 0.25).abs() < 1e-9
                && (moved[0].candidate / moved[0].baseline - 1.25).abs() < 1e-9
        );
        assert!(comparison_table(&result).contains(&format!("{layer}: {} ", moved[0].what)), "{place}");
    }
    let power = compared(&before, &side("b", even, with("", 1.0))).why.probes;
    let power = power.iter().find(|probe| probe.layer == "power").unwrap();
    assert!((power.baseline - 500.0).abs() < 1e-6, "{power:?}");
}

fn with_kernels(form: &'static str, registers: u32) -> impl Fn(&mut Record) {
    move |record| {
        let resources = KernelResources {
            registers: Maybe::Value(registers),
            static_shared_bytes: Maybe::Value(0),
            local_bytes: Maybe::Value(0),
            max_block_threads: Maybe::Value(1024),
            binary_version: Maybe::Value(90),
            ptx_version: Maybe::Value(90),
        };
        record.engine.kernels = Maybe::Value(Kernels {
            architecture: "sm_90a".to_owned(),
            origins: BTreeMap::from([("gemm".to_owned(), "compiled".to_owned())]),
            form: Maybe::Value(form.to_owned()),
            graphs: true,
            dependent_launch: true,
            capture_retry: Maybe::missing("not_needed"),
            deterministic: false,
            resources: Maybe::Value(BTreeMap::from([("gemm_stream_bf16".to_owned(), resources)])),
        });
    }
}

#[test]
fn registers_of_machine_code_are_suspicious_and_those_of_the_driver_s_compiler_are_what_is_compared() {
    for (form, branch, class, code) in
        [("sass", "engine.kernels", Class::Suspicious, 12), ("ptx", "engine.ptx_kernels", Class::Expected, 0)]
    {
        let before = side("a", even, with_kernels(form, 96));
        let result = compared(&before, &side("b", even, with_kernels(form, 128)));
        assert_eq!(result.verdict.exit_code(), code, "{form}: {:?}", result.reasons);
        let field = format!("{branch}.resources.gemm_stream_bf16.registers");
        let line = result.environment.iter().find(|line| line.field == field).unwrap();
        assert_eq!(line.class, class);
        assert!(comparison_table(&result).contains("kernel gemm_stream_bf16: registers 96 → 128"));
    }
    // One form against the other is no comparison.
    let result =
        compared(&side("a", even, with_kernels("sass", 96)), &side("b", even, with_kernels("ptx", 96)));
    assert_eq!(result.verdict, Verdict::NotComparable);
}

#[test]
fn a_capture_that_the_driver_refused_is_its_doing_and_a_switch_is_a_changed_option() {
    let launched = |change: &'static (dyn Fn(&mut Kernels) + Sync), form: &'static str| {
        move |record: &mut Record| {
            with_kernels(form, 96)(record);
            let Maybe::Value(kernels) = &mut record.engine.kernels else { unreachable!("just made") };
            change(kernels);
        }
    };
    let refused: &(dyn Fn(&mut Kernels) + Sync) =
        &|kernels| kernels.capture_retry = Maybe::Value("CUDA_ERROR_INVALID_HANDLE".to_owned());
    for (form, branch) in [("sass", "engine.kernels"), ("ptx", "engine.ptx_kernels")] {
        let before = side("a", even, with_kernels(form, 96));
        let result = compared(&before, &side("b", even, launched(refused, form)));
        assert_eq!(result.verdict, Verdict::Same, "{form}: {:?}", result.reasons);
        let line = &result.environment[0];
        assert_eq!((line.field.as_str(), line.class), (&*format!("{branch}.capture_retry"), Class::Expected));
        let text = comparison_table(&result);
        let cause =
            "driver: graphs whose kernels may overlap not refused → refused with CUDA_ERROR_INVALID_HANDLE";
        assert!(text.contains(cause), "{text}");
        // A file of a program that did not retry is no change of the driver, and yet a cause.
        let older: &(dyn Fn(&mut Kernels) + Sync) =
            &|kernels| kernels.capture_retry = Maybe::missing("not_recorded");
        let result =
            compared(&side("a", even, launched(older, form)), &side("b", even, launched(refused, form)));
        assert_eq!((result.verdict, result.environment[0].class), (Verdict::Same, Class::Dynamic));
        assert!(comparison_table(&result).contains(cause));
        let off: &(dyn Fn(&mut Kernels) + Sync) = &|kernels| kernels.dependent_launch = false;
        let result = compared(&before, &side("b", even, launched(off, form)));
        assert!(result.confounded, "{:?}", result.reasons);
        let line = &result.environment[0];
        assert_eq!((line.class, &*line.group), (Class::Suspicious, "kernels"));
    }
}

#[test]
fn a_switch_is_declared_with_the_kernels() {
    let off = |record: &mut Record| {
        with_kernels("sass", 96)(record);
        record.machine.env.insert("TOKMETER_CUDA_GRAPHS".to_owned(), "0".to_owned());
        let Maybe::Value(kernels) = &mut record.engine.kernels else { unreachable!("just made") };
        kernels.graphs = false;
    };
    let result = compared(&side("a", even, with_kernels("sass", 96)), &side("b", even, off));
    let fields: Vec<(&str, &str)> =
        result.environment.iter().map(|line| (line.field.as_str(), line.group.as_str())).collect();
    let expected = [("engine.kernels.graphs", "kernels"), ("machine.env.TOKMETER_CUDA_GRAPHS", "kernels")];
    assert_eq!(fields, expected);
    assert!(result.confounded);
}

#[test]
fn what_only_the_driver_s_compiler_slows_is_told_by_the_two_forms() {
    let both = |name: &str, sass: f64, ptx: f64| {
        let mut samples = side(name, |_| sass, with_kernels("sass", 96));
        samples.extend(side(
            name,
            |_| ptx,
            |record| {
                with_kernels("ptx", 96)(record);
                record.started_at.push('2');
            },
        ));
        samples
    };
    let before = both("a", 1.0, 1.0);
    for (sass, ptx, meaning) in [
        (1.0, 1.06, "the driver's compiler made it slower"),
        (1.06, 1.06, "not the driver's compiler alone: both forms lost"),
        (1.06, 1.0, "not the driver's compiler: its own code kept its speed"),
    ] {
        let result = compared(&before, &both("b", sass, ptx));
        assert_eq!(result.verdict, Verdict::Regressed, "{:?}", result.reasons);
        assert_eq!(result.baseline.sessions.len(), 3);
        assert_eq!(result.why.forms.len(), TEMPLATE.cells.len());
        let is_lost = |slowness: f64| if slowness > 1.0 { Verdict::Regressed } else { Verdict::Same };
        for pair in &result.why.forms {
            assert_eq!((pair.sass, pair.ptx), (is_lost(sass), is_lost(ptx)), "{pair:?}");
        }
        let text = comparison_table(&result);
        assert!(
            text.lines().any(|line| line.contains("JIT against SASS") && line.ends_with(meaning)),
            "{text}"
        );
    }
    let same = compared(&before, &both("b", 1.0, 1.0));
    assert_eq!(same.verdict, Verdict::Same, "{:?} {:?}", same.reasons, same.environment);
}

fn named<'a>(all: &'a [Element], name: &'a str) -> impl Iterator<Item = &'a Element> {
    all.iter().filter(move |element| element.name == name)
}

/// Nests, asks for nothing, names nothing twice.
fn assert_sound(text: &str) -> Vec<Element> {
    let all = elements(text);
    let mut ids: Vec<&str> =
        all.iter().map(|element| element.attribute("id")).filter(|id| !id.is_empty()).collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id stands twice");
    for element in &all {
        assert!(
            !["script", "img", "iframe", "object", "image", "form"].contains(&element.name.as_str()),
            "{element:?}"
        );
        for (attribute, value) in &element.attributes {
            assert!(
                !attribute.starts_with("on") && attribute != "src" && attribute != "style",
                "{element:?}"
            );
            assert!(
                attribute != "href" || value == "data:," || ids.contains(&value.trim_start_matches('#')),
                "{element:?}"
            );
        }
    }
    let style = named(&all, "style").next().unwrap();
    assert!(!style.text.contains("url(") && !style.text.contains("@import"));
    all
}

/// A comparison that has something in every section.
fn rich() -> Comparison {
    let before = side("a", even, |record| {
        with_library(|_| {})(record);
        held_down(0.0, 0.0, 0.0)(record);
    });
    let after = side(
        "b",
        |key| if key == OWN_CELL { 1.06 } else { 1.004 },
        |record| {
            with_library(|product| product.tile_id = 99)(record);
            held_down(0.2, 0.0, 0.0)(record);
            record.machine.gpu_driver.version = Maybe::Value("590.12".to_owned());
        },
    );
    compared(&before, &after)
}

#[test]
fn every_number_on_the_page_is_in_the_json() {
    let result = rich();
    assert_eq!(result.verdict, Verdict::Regressed);
    let all = assert_sound(&comparison_page(&result).unwrap());
    let heading = named(&all, "h1").next().unwrap();
    assert!(heading.text.starts_with("REGRESSED · ") && heading.attribute("class") == "worse", "{heading:?}");
    let json: Value = serde_json::from_str(&comparison_json(&result).unwrap()).unwrap();
    let mut known: Vec<(String, String, String)> = Vec::new();
    for cell in json["cells"].as_array().unwrap().iter().chain([&json["aggregate"]]) {
        let numbers = &cell["numbers"];
        let text = |value: &Value| value.as_f64().unwrap().to_string();
        let range = &numbers["interval_95_ratio"];
        known.push((text(&numbers["effect_ratio"]), text(&range[0]), text(&range[1])));
        let name = cell["cell"].as_str().unwrap();
        assert!(named(&all, "th").any(|head| head.text == name), "{name}");
    }
    let effects = named(&all, "g").filter(|group| group.attribute("class") == "effect");
    let mut drawn: Vec<(String, String, String)> = effects
        .map(|group| {
            let of = |name: &str| group.attribute(name).to_owned();
            (of("data-effect"), of("data-low"), of("data-high"))
        })
        .collect();
    known.sort();
    drawn.sort();
    assert_eq!(drawn, known);
    // Rows of the table are those of the Markdown.
    let markdown = comparison_markdown(&result);
    for row in markdown.lines().filter(|line| line.starts_with("| ") && line.contains(" tok/")) {
        let cells: String = row.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
        assert!(named(&all, "tr").any(|shown| shown.text.starts_with(&cells)), "{row}");
    }
    for (element, text) in [
        ("li", "library algorithm changed: 512 rows"),
        ("li", "clock held down by the power cap: 0.0 s of "),
        ("tr", "expectedmachine.gpu_driver.versiondriver580.95.05590.12"),
        ("tr", "memoryread_bandwidth_bytes_per_s3,000 GB/s3,000 GB/s"),
    ] {
        assert!(named(&all, element).any(|found| found.text.contains(text)), "{text}");
    }
    assert_eq!(named(&all, "svg").filter(|svg| svg.attribute("class") == "chart").count(), 2);
}

#[test]
fn a_comparison_reads_back_as_it_was_written() {
    for result in [
        rich(),
        compared(&side("a", even, unchanged)[..1], &side("b", even, unchanged)[..1]),
        compared(&[], &[]),
    ] {
        let text = comparison_json(&result).unwrap();
        assert_eq!(compare::parse(&text).unwrap(), result);
        assert_sound(&comparison_page(&result).unwrap());
        let newer = text.replace("tokmeter-comparison/1", "tokmeter-comparison/2");
        assert_eq!(
            compare::parse(&newer).unwrap_err(),
            "has schema tokmeter-comparison/2, expected tokmeter-comparison/1"
        );
    }
}

#[test]
fn hostile_texts_in_a_comparison_stay_texts() {
    for hostile in
        ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "</title></svg>", "{{ 7 * 7 }}"]
    {
        let mut result = rich();
        let text = || hostile.to_owned();
        result.not_a_measurement = Some(text());
        result.reasons = vec![text()];
        result.cells[0].cell = text();
        result.cells[1].notes = vec![text()];
        result.baseline.files = vec![text()];
        result.environment[0].field = text();
        result.environment[0].candidate = vec![text()];
        result.why.probes[0].what = text();
        result.why.decompositions[0].cell = text();
        result.exclusions = vec![text()];
        let all = assert_sound(&comparison_page(&result).unwrap());
        for place in ["th", "td", "li", "dd", "title"] {
            assert!(
                named(&all, place).any(|element| element.text.contains(hostile)),
                "{hostile} in <{place}>"
            );
        }
    }
}

#[test]
fn many_cells_are_drawn_as_those_that_moved_most() {
    let mut result = rich();
    let pattern = result.cells[0].clone();
    result.cells = (0..1000)
        .map(|index| {
            let mut cell = Comparand { cell: format!("cell {index}"), ..pattern.clone() };
            let Maybe::Value(numbers) = &mut cell.numbers else { panic!("it was compared") };
            numbers.effect_ratio = f64::from(index) * 1e-5;
            cell
        })
        .collect();
    let page = comparison_page(&result).unwrap();
    let all = assert_sound(&page);
    assert!(
        named(&all, "p").any(|note| note.text.starts_with("Drawn: the 40 of 1001 that moved most.")),
        "no note"
    );
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
}

#[test]
fn compare_writes_and_report_lays_out_what_the_ending_says() {
    let folder = tempdir().unwrap();
    let run = |name: &str, slowdown: f64| {
        let script = format!(r#"{{"slowdown":{slowdown}}}"#);
        let args = ["run", "--engine", "fake", "--fake-script", &script, "-r", "2", "--min-seconds", "0.3"];
        let cells = ["--batch", "1", "--isl", "40", "--session", name, "-o", name];
        assert_eq!(tokmeter(folder.path(), &[&args[..], &cells].concat()).code, Some(0));
    };
    run("a.json", 1.0);
    run("b.json", 1.2);
    let base = ["compare", "--allow-not-a-measurement", "--baseline", "a.json", "--candidate", "b.json"];
    let outs = ["--out", "v.json", "--out", "v.html", "-o", "v.md", "-o", "v.txt"];
    let done = tokmeter(folder.path(), &[&base[..], &outs].concat());
    assert_eq!(done.code, Some(10), "{done:?}");
    assert_eq!(done.stderr.lines().count(), 4, "{}", done.stderr);
    let text = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(text("v.txt"), done.stdout);
    assert!(text("v.md").starts_with("## REGRESSED"));
    let page = text("v.html");
    assert_sound(&page);
    let printed = tokmeter(folder.path(), &[&base[..], &["--format", "html"]].concat());
    assert_eq!((printed.code, printed.stdout), (Some(10), page.clone()));
    // The JSON alone gives the same page and the same Markdown.
    let report = |args: &[&str]| {
        tokmeter(folder.path(), &[&["report", "v.json", "--allow-not-a-measurement"], args].concat())
    };
    assert_eq!(report(&["--out", "again.html"]).code, Some(0));
    assert_eq!(text("again.html"), page);
    assert_eq!(report(&[]).stdout, text("v.md"));
    assert_eq!(report(&["--price-per-gpu-hour", "2 USD"]).code, Some(2));
    let refused = tokmeter(folder.path(), &["report", "v.json"]);
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(
        refused.stderr.starts_with("error: v.json: is not a measurement: fake engine"),
        "{}",
        refused.stderr
    );
    let mixed = tokmeter(folder.path(), &["report", "a.json", "v.json", "--allow-not-a-measurement"]);
    assert_eq!(mixed.code, Some(3), "{mixed:?}");
    assert!(mixed.stderr.contains("v.json: has schema tokmeter-comparison/1"), "{}", mixed.stderr);
    let wrong = tokmeter(folder.path(), &[&base[..], &["--out", "v.pdf"]].concat());
    assert_eq!(wrong.code, Some(2));
    assert!(
        wrong.stderr.contains("--out is 'v.pdf', expected an ending .json, .md, .html or .txt"),
        "{}",
        wrong.stderr
    );
    std::fs::write(folder.path().join("v.json"), &text("v.json")[..200]).unwrap();
    assert_eq!(report(&[]).code, Some(3));
}
