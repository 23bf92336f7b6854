//! A USD properties layer for a SimReady AI-factory compute rack, as digital twins load it: the one of its 18 attributes
//! that a benchmark knows, and in a namespace of our own the measured power of all its GPU boards, extrapolated from one.
//! Powers are kW. Rack power, ramps, cooling and flow are not measured here and are left out.

use super::dps_device::hottest;
use super::{About, Exported, Refusal, Setting, Settings, Source, subject};
use crate::record::Record;

pub(super) const ABOUT: About = About {
    name: "simready-rack",
    made_from: "one record with energy of GPU boards",
    consumer: "USD layer of class 'compute rack': SimReady Foundation, AI-factory tier",
    source: "Python package simready-foundation-tier-aif 2026.8.0, config/aif-equipment-compute-rack.json",
    settings: &[Setting {
        key: "gpus_per_rack",
        meaning: "GPUs in the rack [default: the spec sheet's, where it has one]",
    }],
    fields: &[
        ("aif:core:assetClass", "compute rack"),
        ("aif:spec:numGPUs", "--set gpus_per_rack, or the device's sheet (72 for GB200 and GB300)"),
        ("tokmeter:gpuBoards:maxPower", "kW: the highest mean power of a cell per GPU, times numGPUs"),
        (
            "tokmeter:gpuBoards:idlePower",
            "kW: meter.idle_no_context per device, times numGPUs; left out where missing",
        ),
        (
            "tokmeter:gpuBoards:readyPower",
            "kW: meter.idle_context_resident per device, times numGPUs; left out where missing",
        ),
        ("tokmeter:gpuBoards:measuredGPUs", "GPUs that the powers were measured on"),
        ("tokmeter:recordSha256", "the record's hash"),
    ],
};

pub(super) fn export(source: &Source<'_>, settings: &Settings) -> Result<Exported, Refusal> {
    let record = source.record;
    let Some((max_w, key)) = hottest(record) else {
        return Err(source.refuse(
            "has no energy of a GPU board, which simready-rack extrapolates\n\
             hint: tokmeter run --device cuda:0 --require-energy says what the sensor lacks",
        ));
    };
    let gpus = gpus_per_rack(source, settings)?;
    let rack_kw = |watts: f64| watts * f64::from(gpus) / 1e3;
    let mut attributes = vec![
        "string aif:core:assetClass = \"compute rack\"".to_owned(),
        format!("int aif:spec:numGPUs = {gpus}"),
        format!("custom double tokmeter:gpuBoards:maxPower = {}", rack_kw(max_w)),
    ];
    for (name, watts) in [
        ("idlePower", subject::idle_w_per_device(record)),
        ("readyPower", subject::ready_w_per_device(record)),
    ] {
        attributes.extend(
            watts.map(|watts| format!("custom double tokmeter:gpuBoards:{name} = {}", rack_kw(watts))),
        );
    }
    attributes.push(format!("custom int tokmeter:gpuBoards:measuredGPUs = {}", measured_gpus(record, key)));
    attributes.push(format!("custom string tokmeter:recordSha256 = \"{}\"", source.sha256));
    let text = format!(
        "#usda 1.0\n(\n    defaultPrim = \"Rack\"\n    doc = \"Made by tokmeter {}. Powers are kW of the GPU boards alone, \
         extrapolated to a whole rack.\"\n)\n\ndef Xform \"Rack\"\n{{\n    {}\n}}\n",
        record.tool.version,
        attributes.join("\n    ")
    );
    let notes = vec![
        "17 of the 18 attributes of a compute rack are left out: nothing here measures the rack's power, ramps or cooling"
            .to_owned(),
        "SimReady wants the layer's file name to contain 'properties'".to_owned(),
    ];
    Ok(Exported { text, notes })
}

fn gpus_per_rack(source: &Source<'_>, settings: &Settings) -> Result<u32, Refusal> {
    if let Some(text) = settings.get("gpus_per_rack") {
        return match text.parse() {
            Ok(gpus @ 1..=10_000) => Ok(gpus),
            _ => Err(Refusal(format!("--set gpus_per_rack={text}: expected a number from 1 to 10000"))),
        };
    }
    subject::sheet(source.record).and_then(|(_, sheet)| sheet.gpus_per_rack).ok_or_else(|| {
        source.refuse(format!(
            "ran on {}, of which no rack is known\nhint: --set gpus_per_rack=32",
            subject::on_one_line(subject::device_name(source.record))
        ))
    })
}

fn measured_gpus(record: &Record, key: &str) -> usize {
    record.cells.iter().find(|cell| cell.key == key).map_or(1, |cell| cell.devices.len().max(1))
}
