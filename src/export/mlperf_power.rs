//! A draft of `system_power.json`, MLPerf Endpoints' descriptor of provisioned power (Appendix E of its rules), with what
//! the record knows of the node, and beside it in a block of our own the power that was measured. Rated power must come
//! from a public source and never from a measurement, so every rated figure is left to the submitter or to the rules'
//! defaults. Powers are W in the descriptor and kW in the block, latencies milliseconds at the 90th percentile.

use serde::Serialize;

use super::windows::{EnergySums, Sums, measured_with_summary};
use super::{About, Exported, Refusal, Setting, Settings, Source, as_json, subject};
use crate::analysis::{CellSummary, Quantiles, summarize};
use crate::record::{Cell, Maybe, Record, Workload};

pub(super) const ABOUT: About = About {
    name: "mlperf-power",
    made_from: "one record with serve-closed cells and energy on a GPU",
    consumer: "system_power.json (Appendix E): the checker of MLPerf Endpoints",
    source: "Python package endpoints-submission-cli 1.5.3.0, submission_checker/models/file/system_power.py",
    settings: &[
        Setting { key: "cooling", meaning: "liquid or air; needed" },
        Setting {
            key: "system_desc_id",
            meaning: "the system description's id [default: tokmeter- and the record's hash]",
        },
    ],
    fields: &[
        ("system_desc_id, cooling", "--set"),
        (
            "node_sets[0].node_set_id, system_node_ensemble_id, nodes_provisioned",
            "0, 0, 1: a record is of one node",
        ),
        ("power_method", "component_sum"),
        (
            "components.cpu.model, count_per_node",
            "machine.cpu.model, machine.cpu.sockets; left out where unknown",
        ),
        ("components.accelerator.model, count_per_node", "the driver's name, machine.gpus"),
        (
            "components.scale_up_network.method",
            "none with one GPU; with several left out, since the record knows no switches",
        ),
        ("scale_out.present", "false: one node"),
        ("measured.boundary, energy_source", "meter.scope, meter.source"),
        ("measured.gpu_power_limit_w", "W: the limit in force on the GPU that ran"),
        ("measured.idle_gpu_power_kw", "kW: meter.idle_no_context, per metered device"),
        ("measured.points[].concurrency", "the cell's concurrency"),
        ("measured.points[].system_tps", "output tokens per second, all devices of the cell"),
        ("measured.points[].tps_per_user", "1000 / tpot_p90_ms"),
        ("measured.points[].ttft_p90_ms, tpot_p90_ms", "ms; left out below 29 requests"),
        ("measured.points[].gpu_power_kw", "kW: energy over the metered time"),
        (
            "measured.points[].system_tps_per_gpu_kw",
            "system_tps over gpu_power_kw: GPU boards only, not system_tps_per_kw",
        ),
        (
            "measured.points[].joules_per_output_token",
            "J: energy over the output tokens between the same readings",
        ),
        ("measured.points[].doubts", "why the energy must not decide a comparison"),
    ],
};

/// Stands in the file, since a reader of the file may not know this program.
const NOTES: &str = "Draft by tokmeter. Rated powers are absent: give them with public sources, or Appendix D applies. The block \
                     'measured' is energy that was read on the GPU boards while they worked; it is not provisioned power.";

#[derive(Serialize)]
struct SystemPower {
    system_desc_id: String,
    cooling: String,
    node_sets: [NodeSet; 1],
    scale_out: ScaleOut,
    notes: &'static str,
    measured: Measured,
}

#[derive(Serialize)]
struct NodeSet {
    node_set_id: u32,
    system_node_ensemble_id: u32,
    nodes_provisioned: u32,
    power_method: &'static str,
    components: Components,
}

#[derive(Serialize)]
struct Components {
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<Part>,
    accelerator: Part,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale_up_network: Option<ScaleUp>,
}

#[derive(Serialize)]
struct Part {
    model: String,
    count_per_node: usize,
}

#[derive(Serialize)]
struct ScaleUp {
    method: &'static str,
}

#[derive(Serialize)]
struct ScaleOut {
    present: bool,
}

#[derive(Serialize)]
struct Measured {
    record_sha256: String,
    boundary: String,
    energy_source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_power_limit_w: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_gpu_power_kw: Option<f64>,
    points: Vec<Point>,
}

#[derive(Serialize)]
struct Point {
    cell: String,
    gpus: usize,
    concurrency: u32,
    system_tps: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tps_per_user: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttft_p90_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tpot_p90_ms: Option<f64>,
    gpu_power_kw: f64,
    system_tps_per_gpu_kw: f64,
    joules_per_output_token: f64,
    doubts: Vec<String>,
}

pub(super) fn export(source: &Source<'_>, settings: &Settings) -> Result<Exported, Refusal> {
    let record = source.record;
    let Some(accelerator) = subject::gpu_name(record) else {
        return Err(source.refuse(format!(
            "ran on {}, and MLPerf's descriptor is of accelerators\nhint: tokmeter run --device cuda:0",
            record.engine.device
        )));
    };
    let cooling = cooling(settings)?;
    let points = points(source)?;
    let gpus = record.machine.gpus.len();
    let cpu = cpu(record);
    let mut notes = vec!["rated powers are left out: MLPerf takes them from public sources only".to_owned()];
    if cpu.is_none() {
        notes.push(
            "components.cpu is left out: the record does not know the CPU's name or its sockets".to_owned(),
        );
    }
    if gpus > 1 {
        notes.push(format!("scale_up_network is left out: what joins the {gpus} GPUs is not in the record"));
    }
    let power = SystemPower {
        system_desc_id: settings
            .get("system_desc_id")
            .cloned()
            .unwrap_or_else(|| format!("tokmeter-{}", source.id())),
        cooling,
        node_sets: [NodeSet {
            node_set_id: 0,
            system_node_ensemble_id: 0,
            nodes_provisioned: 1,
            power_method: "component_sum",
            components: Components {
                cpu,
                accelerator: Part { model: accelerator.to_owned(), count_per_node: gpus },
                scale_up_network: (gpus == 1).then_some(ScaleUp { method: "none" }),
            },
        }],
        scale_out: ScaleOut { present: false },
        notes: NOTES,
        measured: measured_block(record, source.sha256.clone(), points),
    };
    Ok(Exported { text: as_json(&power)?, notes })
}

fn cooling(settings: &Settings) -> Result<String, Refusal> {
    match settings.get("cooling").map(String::as_str) {
        Some(cooling @ ("liquid" | "air")) => Ok(cooling.to_owned()),
        Some(other) => Err(Refusal(format!("--set cooling={other}: expected liquid or air"))),
        None => Err(Refusal(
            "mlperf-power needs to know how the node is cooled, which no sensor tells\n\
             hint: --set cooling=liquid or --set cooling=air"
                .to_owned(),
        )),
    }
}

fn cpu(record: &Record) -> Option<Part> {
    let cpu = &record.machine.cpu;
    Some(Part { model: cpu.model.value()?.clone(), count_per_node: *cpu.sockets.value()? as usize })
}

fn measured_block(record: &Record, record_sha256: String, points: Vec<Point>) -> Measured {
    let limit = subject::gpu(record)
        .and_then(|gpu| gpu.setup.value())
        .and_then(|setup| setup.power_limits.enforced_w.value().copied());
    let known = |value: &Maybe<String>| value.value().cloned().unwrap_or_else(|| "unknown".to_owned());
    Measured {
        record_sha256,
        boundary: known(&record.meter.scope),
        energy_source: known(&record.meter.source),
        gpu_power_limit_w: limit,
        idle_gpu_power_kw: subject::idle_w_per_device(record).map(|watts| watts / 1e3),
        points,
    }
}

/// # Errors
/// When no closed loop has energy: with the reason of the first.
fn points(source: &Source<'_>) -> Result<Vec<Point>, Refusal> {
    let summary = summarize(source.record);
    let mut points = Vec::new();
    let mut reason = None;
    for (cell, summary) in measured_with_summary(source.record, &summary) {
        let Workload::ServeClosed { concurrency, .. } = cell.workload else { continue };
        match point(cell, concurrency, summary) {
            Ok(point) => points.push(point),
            Err(why) => reason = reason.or(Some(why)),
        }
    }
    match reason {
        _ if !points.is_empty() => Ok(points),
        Some(reason) => Err(source.refuse(format!(
            "has no energy ({}), and mlperf-power sets measured beside provisioned power\n\
             hint: tokmeter run --require-energy says what the sensor lacks",
            reason.replace('_', " ")
        ))),
        None => Err(source.refuse(
            "has no serve-closed cell, and MLPerf's points are concurrencies\n\
             hint: tokmeter run --concurrency 4,16 --isl 1024 --osl 1024",
        )),
    }
}

fn point(cell: &Cell, concurrency: u32, summary: &CellSummary) -> Result<Point, String> {
    let energy = EnergySums::of(cell)?;
    let sums = Sums::of(&cell.runs).ok_or("no_run")?;
    if energy.tokens_out <= 0.0 {
        return Err("no_output_tokens".to_owned());
    }
    let p90_ms = |quantiles: &Maybe<Quantiles>| Some(quantiles.value()?.p90_ns.value()? / 1e6);
    let tpot_p90_ms = p90_ms(&summary.tpot);
    let gpu_power_kw = energy.power_w() / 1e3;
    let system_tps = sums.tokens_out / sums.seconds;
    Ok(Point {
        cell: cell.key.clone(),
        gpus: cell.devices.len().max(1),
        concurrency,
        system_tps,
        tps_per_user: tpot_p90_ms.map(|ms| 1e3 / ms),
        ttft_p90_ms: p90_ms(&summary.ttft),
        tpot_p90_ms,
        gpu_power_kw,
        system_tps_per_gpu_kw: system_tps / gpu_power_kw,
        joules_per_output_token: energy.joules / energy.tokens_out,
        doubts: energy.doubts.into_iter().collect(),
    })
}
