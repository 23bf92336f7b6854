//! The environment that explains the numbers: what NVML and the kernel's log say of a GPU, against stand-ins for both,
//! for every numbering of fields and every way to refuse; how older files are read, and what a public copy hides.

#![allow(clippy::unwrap_used)]

#[path = "common/fake_nvml.rs"]
mod fake_nvml;
#[path = "common/program.rs"]
mod program;

use std::collections::BTreeSet;
use std::path::Path;

use fake_nvml::configured;
use program::fake_record;
use serde_json::{Value, json};
use tempfile::tempdir;
use tokmeter::machine::{GpuWatch, Roots, capture};
use tokmeter::meter::nvml::{GpuId, Library};
use tokmeter::record::environment::{CellGpu, GpuReading, GpuSetup};
use tokmeter::record::machine::Gpu;
use tokmeter::record::{Maybe, Record, classes, parse, redacted, violations};

const UUID: &str = "GPU-fake-0";
const LOG: &str = "4,1,5000000,-;NVRM: Xid (PCI:0000:1b:00): 94, pid=7, name=x\n\
    4,2,6000000,-;NVRM: Xid (PCI:0000:1c:00): 13, pid=7, name=x\n";

fn library(settings: &str, withdrawn: bool) -> Library {
    Library::open(configured(settings, withdrawn).as_os_str()).unwrap()
}

fn setup(settings: &str, withdrawn: bool) -> GpuSetup {
    library(settings, withdrawn).described(UUID).unwrap().setup()
}

fn reading(settings: &str, withdrawn: bool) -> GpuReading {
    library(settings, withdrawn).described(UUID).unwrap().reading()
}

fn tree(log: &str) -> (tempfile::TempDir, Roots) {
    let folder = tempdir().unwrap();
    std::fs::create_dir(folder.path().join("dev")).unwrap();
    std::fs::write(folder.path().join("dev/kmsg"), log).unwrap();
    let roots = Roots::under(folder.path());
    (folder, roots)
}

fn to_value<T: serde::Serialize>(of: &T) -> Value {
    serde_json::to_value(of).unwrap()
}

#[test]
fn the_setup_of_a_gpu_is_read_whole() {
    let expected = json!({
        "serial": "1650123456789",
        "board_part_number": "692-2G520-0200-000",
        "pci_address": "00000000:1B:00.0",
        "pci_device_id": "0x233510de",
        "pci_subsystem_id": "0x18be10de",
        "cuda_cores": 16896,
        "memory_bus_bits": 6144,
        "gsp_firmware": "580.95.05",
        "gsp_firmware_enabled": true,
        "vbios": "96.00.A5.00.01",
        "inforom_image": "G520.0200.00.05",
        "inforom_checksum": "0x0000beef",
        "power_limits": {
            "enforced_w": 600.0, "requested_w": 650.0, "default_w": 700.0, "min_w": 200.0, "max_w": 700.0
        },
        "max_clocks": {"sm_mhz": 1981, "memory_mhz": 2619, "graphics_mhz": 1980},
        "ecc_enabled": true,
        "ecc_pending": false,
        "persistence_mode": true,
        "compute_mode": "exclusive_process",
        "mig_enabled": true,
        "mig_pending": true,
        "virtualization": "passthrough",
        "confidential_compute": {"missing": "function_not_found"},
        "max_pcie_generation": 5,
        "max_pcie_width": 16,
        "numa_node": 1
    });
    assert_eq!(to_value(&setup("limit_w=600;mig=1", false)), expected);
    let library = library("", false);
    assert_eq!(library.driver_branch(), Ok("r580_00".to_owned()));
    assert_eq!(library.version(), Ok("13.580.95.05".to_owned()));
}

/// The stand-in answers 666 s and more for a field that the driver of this version does not mean.
#[test]
fn held_down_time_is_right_whatever_the_driver_calls_its_fields() {
    for driver in ["570.86.15", "580.65.06", "580.82.07", "590.44.01"] {
        let held = reading(&format!("driver={driver}"), false).clock_events;
        let seconds = |ns: &Maybe<u64>| ns.value().unwrap() / 1_000_000_000;
        let found = [
            &held.software_thermal_ns,
            &held.hardware_thermal_ns,
            &held.hardware_power_brake_ns,
            &held.software_power_cap_ns,
            &held.sync_boost_ns,
        ];
        assert_eq!(found.map(seconds), [1, 2, 3, 4, 5], "{driver}");
    }
    let unknown = reading("driver=next", false).clock_events;
    assert_eq!(unknown.software_thermal_ns.reason(), Some("driver_version_unknown"));
    assert_eq!(unknown.software_power_cap_ns.value().unwrap() / 1_000_000_000, 4);
}

#[test]
fn what_changes_under_work_is_read_whole() {
    let mut found = to_value(&reading("processes=2", false));
    let held = found.as_object_mut().unwrap().remove("clock_events").unwrap();
    assert!(held.as_object().unwrap().values().all(Value::is_u64), "{held}");
    let process =
        |pid: u32| json!({"pid": pid, "name": format!("trainer-{pid}"), "kind": "compute", "own": false});
    let expected = json!({
        "clocks": {"sm_mhz": 1755, "memory_mhz": 2619, "graphics_mhz": 1755},
        "performance_state": 2,
        "clock_reasons_mask": 1_u64 << 40 | 4,
        "ecc": {"corrected": 11, "uncorrected": 21, "lifetime_corrected": 12, "lifetime_uncorrected": 22},
        "pages": {
            "retired_corrected": 0, "retired_uncorrected": 1, "retirement_pending": true,
            "remapped_rows_corrected": 5, "remapped_rows_uncorrected": 6,
            "remap_pending": true, "remap_failed": false
        },
        "pcie_generation": 4,
        "pcie_width": 8,
        "pcie_replays": 3,
        "nvlinks_active": 3,
        // Three counters of links 0, 1 and 2, which each count their number.
        "nvlink_errors": 9,
        "processes": [process(4001), process(4002)],
        "xids": {"missing": "not_read"}
    });
    assert_eq!(found, expected);
}

/// All reason codes below a value.
fn reasons(value: &Value, found: &mut BTreeSet<String>, values: &mut usize) {
    match value {
        Value::Object(fields) if fields.len() == 1 && fields.contains_key("missing") => {
            found.insert(fields["missing"].as_str().unwrap().to_owned());
        }
        Value::Object(fields) => fields.values().for_each(|field| reasons(field, found, values)),
        Value::Array(items) => items.iter().for_each(|item| reasons(item, found, values)),
        _ => *values += 1,
    }
}

#[test]
fn each_refusal_is_a_reason_and_never_a_number() {
    for (code, reason) in
        [(3, "not_supported"), (4, "no_permission"), (13, "function_not_found"), (15, "gpu_is_lost")]
    {
        let mut found = BTreeSet::new();
        let mut values = 0;
        reasons(&to_value(&setup(&format!("refuse={code}"), false)), &mut found, &mut values);
        assert!(found.contains(reason), "{found:?}");
        // What is left: the limit in force and both MIG modes, which the meter asks for too.
        assert_eq!(values, 3, "{code}");
        let found = reading(&format!("refuse={code}"), false);
        assert_eq!(found.ecc.corrected.reason(), Some(reason));
        assert_eq!(found.pages.remap_pending.reason(), Some(reason));
        assert_eq!(found.nvlinks_active.reason(), Some(reason));
        assert_eq!(found.nvlink_errors.reason(), Some(reason));
        assert!(found.clocks.sm_mhz.value().is_some());
    }
}

#[test]
fn one_function_that_refuses_leaves_the_others() {
    let found = setup("refuse=4;only=nvmlDeviceGetSerial", false);
    let mut codes = BTreeSet::new();
    let mut values = 0;
    reasons(&to_value(&found), &mut codes, &mut values);
    assert_eq!(found.serial.reason(), Some("no_permission"));
    assert_eq!(codes, BTreeSet::from(["function_not_found".to_owned(), "no_permission".to_owned()]));
    assert!(values > 25, "{values}");
}

#[test]
fn a_library_without_the_functions_gives_reasons() {
    let bare = library("", true);
    assert_eq!(bare.driver_branch(), Err("function_not_found".to_owned()));
    let found = setup("", true);
    assert_eq!(found.vbios.reason(), Some("function_not_found"));
    assert_eq!(found.power_limits.enforced_w, Maybe::Value(700.0));
    let found = reading("processes=1", true);
    assert_eq!(found.pages.remapped_rows_corrected.reason(), Some("function_not_found"));
    let processes = found.processes.into_value().unwrap();
    assert_eq!((processes.len(), processes[0].name.reason()), (1, Some("function_not_found")));
}

fn watched(roots: &Roots, settings: &str) -> Maybe<Vec<CellGpu>> {
    let gpus = vec![GpuId { name: "cuda:0".to_owned(), uuid: UUID.to_owned() }];
    let watch = GpuWatch::new(roots.clone(), Ok(library(settings, false)), gpus);
    watch.around(watch.read(), Some(watch.read()), watch.read())
}

#[test]
fn a_cell_is_surrounded_by_readings_with_the_faults_of_its_own_gpu() {
    let (_folder, roots) = tree(LOG);
    let gpus = watched(&roots, "").into_value().unwrap();
    assert_eq!(gpus[0].device, "cuda:0");
    assert_eq!(gpus[0].before.xids, Maybe::Value(vec![94]));
    let held = |reading: &GpuReading| *reading.clock_events.software_power_cap_ns.value().unwrap();
    let warm = gpus[0].warm.value().unwrap();
    assert!(held(&gpus[0].before) <= held(warm) && held(warm) <= held(&gpus[0].after));
    let gpus = watched(&Roots::under("/nonexistent"), "").into_value().unwrap();
    assert_eq!(gpus[0].after.xids.reason(), Some("not_found"));
    let none = GpuWatch::new(roots, Ok(library("", false)), Vec::new());
    assert_eq!(none.around(none.read(), None, none.read()).reason(), Some("no_gpu_in_use"));
}

/// The scripted engine's record as if a GPU had been there.
fn record_with_gpu() -> Record {
    let folder = tempdir().unwrap();
    let mut record = fake_record(folder.path());
    let (_tree, roots) = tree(LOG);
    record.machine.gpus = vec![Gpu {
        index: 0,
        name: Maybe::Value("NVIDIA H200".to_owned()),
        uuid: Maybe::Value(UUID.to_owned()),
        memory_bytes: Maybe::missing("not_found"),
        compute_capability: Maybe::Value("9.0".to_owned()),
        setup: Maybe::Value(setup("", false)),
    }];
    record.cells[0].gpus = watched(&roots, "processes=1");
    record
}

#[test]
fn a_public_copy_names_no_board_and_no_program() {
    let record = record_with_gpu();
    let secret = ["1650123456789", "trainer-4002", "4002", UUID];
    let text = serde_json::to_string(&record).unwrap();
    assert!(secret.iter().all(|word| text.contains(word)));
    let public = redacted(&record);
    let text = serde_json::to_string(&public).unwrap();
    assert!(secret.iter().all(|word| !text.contains(word)), "{text}");
    assert_eq!(public.cells[0].gpus.value().unwrap()[0].before.processes.value().unwrap().len(), 1);
    assert_eq!(redacted(&public), public);
    assert_eq!(violations(&public), violations(&record));
    assert_eq!(parse(&text).unwrap(), public);
}

#[test]
fn a_file_from_before_the_setup_of_gpus_is_read_and_written_back_as_it_was() {
    let mut older = to_value(&record_with_gpu());
    older["machine"]["gpus"][0].as_object_mut().unwrap().remove("setup").unwrap();
    let read = parse(&older.to_string()).unwrap();
    assert_eq!(read.machine.gpus[0].setup.reason(), Some("not_recorded"));
    assert_eq!(to_value(&read), older);
}

/// Pointers in `value` that a pattern fits.
fn fitting<'a>(value: &'a Value, pattern: &[&str]) -> Vec<&'a Value> {
    let Some((first, rest)) = pattern.split_first() else { return vec![value] };
    match value {
        Value::Object(fields) if *first == "*" => {
            fields.values().flat_map(|field| fitting(field, rest)).collect()
        }
        Value::Array(items) if *first == "*" => items.iter().flat_map(|item| fitting(item, rest)).collect(),
        Value::Object(fields) => fields.get(*first).map_or_else(Vec::new, |field| fitting(field, rest)),
        _ => Vec::new(),
    }
}

/// Whether a branch above the place has a reason instead of a value, or is an empty list.
fn is_below_missing(value: &Value, pattern: &[&str]) -> bool {
    let above = (1..pattern.len()).flat_map(|end| fitting(value, &pattern[..end]));
    above.into_iter().any(|branch| branch.get("missing").is_some() || branch == &json!([]))
}

#[test]
fn every_place_with_a_class_is_in_a_record_and_has_one_class() {
    let mut record = to_value(&record_with_gpu());
    // Only what is set is there.
    for switch in ["TOKMETER_CUDA_GRAPHS", "TOKMETER_CUDA_PDL"] {
        record["machine"]["env"][switch] = json!("0");
    }
    let mut seen = BTreeSet::new();
    for (pattern, class, _) in classes() {
        assert!(seen.insert(pattern), "{pattern} has two classes");
        let parts: Vec<&str> = pattern.strip_prefix('/').unwrap().split('/').collect();
        // No kernels ran on a GPU here, and there is no sensor.
        let is_known = !fitting(&record, &parts).is_empty() || is_below_missing(&record, &parts);
        assert!(is_known, "{pattern} ({class:?}) is nowhere in a record");
    }
    let machine = record["machine"].as_object().unwrap();
    for block in machine.keys() {
        let prefix = format!("/machine/{block}");
        assert!(classes().iter().any(|(place, ..)| place.starts_with(&prefix)), "{prefix} has no class");
    }
}

#[test]
fn a_machine_is_described_whether_nvml_is_there_or_not() {
    let with = capture(&Roots::default(), &Ok(library("", false)));
    assert_eq!(with.gpu_driver.branch, Maybe::Value("r580_00".to_owned()));
    let without = Library::open(Path::new("/nonexistent/libnvidia-ml.so").as_os_str());
    let without = capture(&Roots::default(), &without);
    assert_eq!(without.gpu_driver.branch.reason(), Some("no_nvml"));
    assert_eq!(without.gpu_driver.nvml_version.reason(), Some("no_nvml"));
}
