//! A GPU's device specification for NVIDIA's Dynamic Power Software, as `dpsctl device upsert` takes it: the watts that its
//! power limit can be set to. DPS has no field for what a load draws, so measured watts stand in comments. Node limits are
//! no GPU's and are left out.

use super::windows::{EnergySums, measured};
use super::{About, Exported, Refusal, Source, subject};
use crate::record::Record;
use crate::record::environment::PowerLimits;

pub(super) const ABOUT: About = About {
    name: "dps-device",
    made_from: "one record on a GPU whose power limits the driver shows",
    consumer: "device specification YAML of type GPU: NVIDIA DPS (dpsctl device upsert)",
    source: "docs.nvidia.com/datacenter/dps, Device Specifications and v1/devices.proto, read in November 2026",
    settings: &[],
    fields: &[
        ("type", "GPU"),
        ("description", "the driver's name"),
        ("model", "the spec sheet's name in capitals (GB200, H100, …); else the driver's name"),
        ("spec.minLoadWatts", "W: the lowest limit that can be set (setup.power_limits.min_w)"),
        ("spec.maxLoadWatts", "W: the highest limit that can be set (setup.power_limits.max_w)"),
        ("comments", "W: the default limit, idle and ready power, and the highest power of a cell, per GPU"),
    ],
};

pub(super) fn export(source: &Source<'_>) -> Result<Exported, Refusal> {
    let record = source.record;
    let Some(name) = subject::gpu_name(record) else {
        return Err(source.refuse(format!(
            "ran on {}, and dps-device is of a GPU\nhint: tokmeter run --device cuda:0",
            record.engine.device
        )));
    };
    let limits = subject::gpu(record).and_then(|gpu| gpu.setup.value()).map(|setup| &setup.power_limits);
    let range = limits.and_then(|limits| Some((*limits.min_w.value()?, *limits.max_w.value()?)));
    let Some((min_w, max_w)) = range else {
        return Err(source.refuse(
            "does not know the lowest and highest power limit of its GPU\n\
             hint: tokmeter doctor says whether the driver shows power limits",
        ));
    };
    let model = subject::sheet(record).map_or_else(|| name.to_owned(), |(key, _)| key.to_uppercase());
    let mut lines =
        vec![format!("# Made by tokmeter {} from record {}.", record.tool.version, source.sha256)];
    lines.extend(comments(record, limits));
    lines.push("- type: GPU".to_owned());
    lines.push(format!("  description: {}", quoted(name)));
    lines.push(format!("  model: {}", quoted(&model)));
    lines.push("  spec:".to_owned());
    lines.push(format!("    minLoadWatts: {min_w}"));
    lines.push(format!("    maxLoadWatts: {max_w}"));
    let notes = vec!["wppsSupport is left out: the record does not know it".to_owned()];
    Ok(Exported { text: lines.join("\n") + "\n", notes })
}

/// A text as JSON writes it, which YAML reads the same.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn comments(record: &Record, limits: Option<&PowerLimits>) -> Vec<String> {
    let known = [
        ("default limit", limits.and_then(|limits| limits.default_w.value().copied())),
        ("idle, no program", subject::idle_w_per_device(record)),
        ("ready, weights resident and no work", subject::ready_w_per_device(record)),
    ];
    let mut lines: Vec<String> =
        known.into_iter().filter_map(|(what, watts)| Some(format!("# {what}: {} W", watts?))).collect();
    if let Some((watts, key)) = hottest(record) {
        lines.push(format!("# highest mean power of a cell: {watts} W ({})", subject::on_one_line(key)));
    }
    lines
}

/// The highest power per GPU that a cell sustained over its windows, and the cell. Only readings of GPU boards count.
pub(super) fn hottest(record: &Record) -> Option<(f64, &str)> {
    if record.meter.scope.value().is_none_or(|scope| scope != "gpu") {
        return None;
    }
    measured(record)
        .filter_map(|cell| {
            let energy = EnergySums::of(cell).ok()?;
            Some((energy.power_w() / cell.devices.len().max(1) as f64, cell.key.as_str()))
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
}
