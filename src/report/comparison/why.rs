//! What explains a difference, as sentences: layer by layer from the cells, from what the device can do at most, from the
//! library, the kernels and the clocks.

use super::{interval, shortened, signed};
use crate::analysis::compare::{
    Algorithm, AlgorithmChange, Arm, Comparison, Difference, FormPair, Part, Probe, Verdict,
};
use crate::record::Maybe;
use crate::report::{DASH, explain};
use crate::units::{format_ns, format_significant};

/// Lines about products or kernels at most; the JSON has all.
const MOST_LINES: usize = 12;
/// Where the facts of the kernels' resources lie, for both forms.
const RESOURCES: [&str; 2] = ["engine.kernels.resources.", "engine.ptx_kernels.resources."];

/// Where the fact lies that a driver refused a capture, for both forms.
const RETRIES: [&str; 2] = ["engine.kernels.capture_retry", "engine.ptx_kernels.capture_retry"];

/// All of it, most telling first.
pub(in crate::report) fn why(result: &Comparison) -> Vec<String> {
    if result.cells.is_empty() {
        return Vec::new();
    }
    let mut lines = layers(result);
    lines.extend(probes(result));
    lines.extend(forms(result));
    lines.extend(library(result));
    lines.extend(kernels(result));
    lines.extend(decompositions(result));
    lines.extend(outputs(result));
    lines.extend(latencies(result));
    lines.extend(conditions(&result.baseline, &result.candidate));
    lines
}

fn layers(result: &Comparison) -> Vec<String> {
    let measured = result.why.layers.iter().filter(|layer| layer.cells > 0);
    measured
        .map(|layer| {
            format!(
                "{}: {} of {} regressed, {} improved, {} together",
                layer.layer,
                layer.regressed,
                super::plural(layer.cells as usize, "cell"),
                layer.improved,
                layer.effect_ratio.value().map_or(DASH.to_owned(), |ratio| signed(*ratio))
            )
        })
        .collect()
}

fn probes(result: &Comparison) -> Vec<String> {
    let line = |probe: &Probe| {
        let range =
            probe.interval_95_ratio.value().map_or(String::new(), |range| format!(" {}", interval(range)));
        format!(
            "{}: {} {} → {}, {}{range}",
            probe.layer,
            probe.what,
            probe_value(probe, probe.baseline),
            probe_value(probe, probe.candidate),
            signed(probe.effect_ratio)
        )
    };
    result.why.probes.iter().map(line).collect()
}

/// A value of a probe with a unit that people use.
pub(in crate::report) fn probe_value(probe: &Probe, value: f64) -> String {
    match probe.unit.as_str() {
        "ns" => format_ns(value),
        "bytes/s" => format!("{} GB/s", format_significant(value / 1e9)),
        "flop/s" => format!("{} Tflop/s", format_significant(value / 1e12)),
        unit => format!("{} {unit}", format_significant(value)),
    }
}

/// What the two forms of the kernels say together.
pub(in crate::report) fn forms(result: &Comparison) -> Vec<String> {
    result.why.forms.iter().map(form).collect()
}

fn form(pair: &FormPair) -> String {
    let lost = |verdict| verdict == Verdict::Regressed;
    let meaning = match (lost(pair.sass), lost(pair.ptx)) {
        (false, true) => "the driver's compiler made it slower",
        (true, true) => "not the driver's compiler alone: both forms lost",
        (true, false) => "not the driver's compiler: its own code kept its speed",
        (false, false) => "neither form regressed",
    };
    format!(
        "JIT against SASS: {}: compiled by the driver {} {}, machine code {} {}: {meaning}",
        pair.cell,
        signed(pair.ptx_effect_ratio),
        pair.ptx.words().to_lowercase(),
        signed(pair.sass_effect_ratio),
        pair.sass.words().to_lowercase()
    )
}

/// What the library does otherwise than before, and which cells it takes part in.
pub(in crate::report) fn library(result: &Comparison) -> Vec<String> {
    let library = &result.why.library;
    let mut lines = limited(library.algorithms.iter().map(algorithm), "products have another algorithm");
    lines.extend(library.outputs_changed.iter().map(|cell| {
        format!("library algorithm changed: {cell} gives other output tokens with it, which is no change of the device's numerics")
    }));
    lines
}

fn algorithm(change: &AlgorithmChange) -> String {
    let named = |algorithms: &[Algorithm]| {
        let name = |one: &Algorithm| {
            format!(
                "{} (tile {}, stages {}, split {})",
                one.algorithm_id, one.tile_id, one.stages_id, one.split_k
            )
        };
        algorithms.iter().map(name).collect::<Vec<String>>().join(" or ")
    };
    let cells = if change.cells.is_empty() { "no compared cell".to_owned() } else { change.cells.join(", ") };
    format!(
        "library algorithm changed: {} rows, {} columns, depth {}, {} {}: {} → {}; in {cells}",
        change.rows,
        change.columns,
        change.depth,
        change.dtype,
        change.epilogue,
        named(&change.baseline),
        named(&change.candidate)
    )
}

/// Graphs that a driver took only without overlap, on one side or by another error.
fn retries(result: &Comparison) -> Vec<String> {
    let is_missing = |value: &String| value.starts_with("missing: ");
    let side = |values: &[String]| match values.iter().all(is_missing) {
        true => "not refused".to_owned(),
        false => format!("refused with {}", shortened(values)),
    };
    let is_refused = |change: &&Difference| {
        let mut values = change.baseline.iter().chain(&change.candidate);
        RETRIES.contains(&change.field.as_str()) && !values.all(is_missing)
    };
    let line = |change: &Difference| {
        format!(
            "driver: graphs whose kernels may overlap {} → {}; where they are refused, each kernel of a decode step waits \
             for the one before",
            side(&change.baseline),
            side(&change.candidate)
        )
    };
    result.environment.iter().filter(is_refused).map(line).collect()
}

/// How kernels run otherwise than before, and their registers, spills and sizes.
pub(in crate::report) fn kernels(result: &Comparison) -> Vec<String> {
    let line = |change: &Difference| {
        let (kernel, figure) =
            RESOURCES.iter().find_map(|branch| change.field.strip_prefix(branch))?.split_once('.')?;
        let spill = if figure == "local_bytes" { " (registers that do not fit)" } else { "" };
        Some(format!(
            "kernel {kernel}: {}{spill} {} → {}",
            figure.replace('_', " "),
            shortened(&change.baseline),
            shortened(&change.candidate)
        ))
    };
    let mut lines = retries(result);
    lines.extend(limited(result.environment.iter().filter_map(line), "figures of kernels changed"));
    lines
}

/// The first lines, and how many there are.
fn limited(lines: impl Iterator<Item = String>, what: &str) -> Vec<String> {
    let mut lines: Vec<String> = lines.collect();
    if lines.len() > MOST_LINES {
        let all = lines.len();
        lines.truncate(MOST_LINES);
        lines.push(format!("in all {all} {what}"));
    }
    lines
}

/// Cells whose output tokens changed.
pub(in crate::report) fn outputs(result: &Comparison) -> Vec<String> {
    let line = |cell: &String| {
        format!("numerics changed: {cell} gives other output tokens, each side agreeing with itself")
    };
    result.why.outputs_changed.iter().map(line).collect()
}

fn latencies(result: &Comparison) -> Vec<String> {
    let moved = result.why.latencies.iter();
    moved
        .map(|moved| {
            format!(
                "{} {} moved by {} (p {})",
                moved.cell,
                moved.latency,
                signed(moved.effect_ratio),
                super::chance(moved.p_adjusted)
            )
        })
        .collect()
}

/// The parts of every change that has any; else one line that says why there are none.
fn decompositions(result: &Comparison) -> Vec<String> {
    let all = &result.why.decompositions;
    let mut lines = Vec::new();
    for parts in all {
        let throughput = Maybe::Value(parts.throughput.clone());
        let clock = [("clock", &parts.clock), ("tokens per cycle", &parts.tokens_per_cycle)];
        let power = [("power", &parts.power), ("tok/s", &throughput)];
        lines.extend(split(&format!("{} tok/s", parts.cell), clock));
        lines.extend(split(&format!("{} tok/J", parts.cell), power));
    }
    for (what, reason) in [
        ("clock", all.iter().find_map(|parts| parts.clock.reason())),
        ("power", all.iter().find_map(|parts| parts.power.reason())),
    ] {
        if let Some(reason) = reason {
            lines.push(format!("no split by {what}: {}", explain(reason)));
        }
    }
    lines
}

/// `decode/b1/d64/o16 tok/s: clock -2.0 % […], tokens per cycle +0.1 % […]`, when both parts are known.
fn split(whole: &str, parts: [(&str, &Maybe<Part>); 2]) -> Option<String> {
    let said = |(name, part): (&str, &Maybe<Part>)| {
        let part = part.value()?;
        let range =
            part.interval_95_ratio.value().map_or(String::new(), |range| format!(" {}", interval(range)));
        Some(format!("{name} {}{range}", signed(part.effect_ratio)))
    };
    let [first, second] = parts.map(said);
    Some(format!("{whole}: {}, {}", first?, second?))
}

/// What went on during the windows, side against side.
pub(in crate::report) fn conditions(baseline: &Arm, candidate: &Arm) -> Vec<String> {
    let (one, other) = (&baseline.conditions, &candidate.conditions);
    let pair = |what: &str, a: &Maybe<f64>, b: &Maybe<f64>, say: &dyn Fn(f64, f64) -> String| {
        let (a, b) = (a.value()?, b.value()?);
        Some(format!("{what}: {} → {}", say(*a, one.window_s), say(*b, other.window_s)))
    };
    let of_time = |seconds: f64, window_s: f64| format!("{seconds:.1} s of {window_s:.0} s");
    let share = |share: f64, _: f64| format!("{:.1} %", share * 100.0);
    let celsius = |value: f64, _: f64| format!("{value:.1} °C");
    [
        pair("clock held down by the power cap", &one.power_cap_s, &other.power_cap_s, &of_time),
        pair("clock held down by heat", &one.thermal_s, &other.thermal_s, &of_time),
        pair("clock held down by the power supply", &one.power_brake_s, &other.power_brake_s, &of_time),
        pair("temperature", &one.temperature_c, &other.temperature_c, &celsius),
        pair("cores taken by other processes", &one.foreign_share, &other.foreign_share, &share),
        pair("cores taken by the hypervisor", &one.steal_share, &other.steal_share, &share),
    ]
    .into_iter()
    .flatten()
    .collect()
}
