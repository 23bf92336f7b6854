//! A patch for one of AIConfigurator's system files (`systems/h100_sxm.yaml`, …): the two factors that its authors ask users
//! to take from their own observations, and what the driver says of memory and power. Bandwidths are bytes per second,
//! times seconds, capacities bytes, powers W. Published peaks are the file's own and stay untouched.

use super::{About, Exported, Refusal, Source, subject};
use crate::record::{Ceiling, Ceilings, Maybe, Record};

/// One of AIConfigurator's systems, as version 0.12.0 has it.
struct System {
    /// Our spec sheet's name.
    sheet: &'static str,
    /// Of its file.
    name: &'static str,
    /// Its `gpu.mem_bw`, which the factor is of.
    bytes_per_s: f64,
}

const fn system(sheet: &'static str, name: &'static str, bytes_per_s: f64) -> System {
    System { sheet, name, bytes_per_s }
}

const SYSTEMS: [System; 6] = [
    system("h100", "h100_sxm", 3.35e12),
    system("h200", "h200_sxm", 4.8e12),
    system("b200", "b200_sxm", 7.7e12),
    system("b300", "b300_sxm", 7.75e12),
    system("gb200", "gb200", 8e12),
    system("gb300", "gb300", 8e12),
];
/// A share of the published bandwidth above this says that the system is another device.
const MOST_SHARE: f64 = 1.02;

pub(super) const ABOUT: About = About {
    name: "aic-system",
    made_from: "one record with ceilings, on a GPU that is one of its systems",
    consumer: "patch of systems/NAME.yaml, loaded with --systems-paths: AIConfigurator",
    source: "Python package aiconfigurator-core 0.12.0, aiconfigurator_core/systems/*.yaml",
    settings: &[],
    fields: &[
        (
            "gpu.mem_bw_empirical_scaling_factor",
            "the ceiling read_bandwidth_bytes_per_s over the file's own gpu.mem_bw, which stays as it is",
        ),
        (
            "gpu.mem_empirical_constant_latency",
            "s: the ceiling graph_node_ns, an empty kernel within a graph; left out where missing",
        ),
        ("gpu.mem_capacity", "bytes: what the driver reports"),
        ("gpu.power", "W: the board's power limit in force; left out where missing"),
    ],
};

pub(super) fn export(source: &Source<'_>) -> Result<Exported, Refusal> {
    let record = source.record;
    let system = system_of(source)?;
    let ceilings = ceilings(source)?;
    let bandwidth = match &ceilings.read_bandwidth_bytes_per_s {
        Maybe::Value(ceiling) => ceiling.value,
        Maybe::Missing(missing) => {
            return Err(source.refuse(format!(
                "has no read bandwidth ({}), which aic-system is about\nhint: tokmeter peaks shows what can be measured here",
                missing.missing.replace('_', " ")
            )));
        }
    };
    let share = bandwidth / system.bytes_per_s;
    if !(share > 0.0 && share <= MOST_SHARE) {
        return Err(source.refuse(format!(
            "read {bandwidth:.3e} bytes/s, expected at most the published {:.3e} of {}: it is another device\n\
             hint: tokmeter validate looks for shares that cannot be",
            system.bytes_per_s, system.name
        )));
    }
    let mut notes = Vec::new();
    let mut lines = vec![
        format!(
            "# For systems/{}.yaml of AIConfigurator 0.12: replace these keys in a copy of it.",
            system.name
        ),
        format!(
            "# Measured by tokmeter {} on {}, record {}.",
            record.tool.version,
            subject::on_one_line(subject::device_name(record)),
            source.sha256
        ),
        "gpu:".to_owned(),
        format!(
            "  mem_bw_empirical_scaling_factor: {share} # {bandwidth} of mem_bw's {} bytes/s were read",
            system.bytes_per_s
        ),
    ];
    match &ceilings.graph_node_ns {
        Maybe::Value(Ceiling { value, .. }) => lines.push(format!(
            "  mem_empirical_constant_latency: {} # seconds: an empty kernel within a graph",
            value / 1e9
        )),
        Maybe::Missing(missing) => notes.push(format!(
            "mem_empirical_constant_latency is left out: no graph was timed ({})",
            missing.missing.replace('_', " ")
        )),
    }
    lines.extend(from_driver(record));
    Ok(Exported { text: lines.join("\n") + "\n", notes })
}

fn system_of(source: &Source<'_>) -> Result<&'static System, Refusal> {
    let record = source.record;
    let Some(name) = subject::gpu_name(record) else {
        return Err(source.refuse(format!(
            "ran on {}, and AIConfigurator's systems are of GPUs\nhint: tokmeter run --device cuda:0",
            record.engine.device
        )));
    };
    let of_sheet = |key: &str| SYSTEMS.iter().find(|system| system.sheet == key);
    subject::sheet(record).and_then(|(key, _)| of_sheet(key)).ok_or_else(|| {
        source.refuse(format!(
            "ran on {}, expected one of AIConfigurator's systems\nhint: they are {}; cards and slices of other sizes are not",
            subject::on_one_line(name),
            SYSTEMS.map(|system| system.name).join(", ")
        ))
    })
}

fn ceilings<'a>(source: &Source<'a>) -> Result<&'a Ceilings, Refusal> {
    let record = source.record;
    let of_device = |all: &'a Vec<Ceilings>| all.iter().find(|found| found.device == record.engine.device);
    record.ceilings.value().and_then(of_device).ok_or_else(|| {
        source.refuse(
            "has no ceilings of its device, which aic-system is made from\n\
             hint: a record of this version's tokmeter run has them",
        )
    })
}

fn from_driver(record: &Record) -> Vec<String> {
    let Some(gpu) = subject::gpu(record) else { return Vec::new() };
    let memory = gpu
        .memory_bytes
        .value()
        .map(|bytes| format!("  mem_capacity: {bytes} # bytes, as the driver reports"));
    let limit = gpu.setup.value().and_then(|setup| setup.power_limits.enforced_w.value().copied());
    let power = limit.map(|watts| format!("  power: {watts} # W, the limit in force"));
    memory.into_iter().chain(power).collect()
}
