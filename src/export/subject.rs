//! What a record was measured on, by the names that other programs know.

use crate::analysis::devices::{DeviceSheet, device_of, device_sheet};
use crate::record::Record;
use crate::record::machine::Gpu;

/// Parts of a driver's name that stand for a variant with other memory and power than the sheet's.
const VARIANTS: [&str; 3] = ["PCIe", "NVL", "MIG"];

/// The GPU that computed; none when a CPU did.
pub(super) fn gpu(record: &Record) -> Option<&Gpu> {
    let index: u32 = record.engine.device.strip_prefix("cuda:")?.parse().ok()?;
    record.machine.gpus.iter().find(|gpu| gpu.index == index)
}

/// What the driver calls the GPU that computed.
pub(super) fn gpu_name(record: &Record) -> Option<&str> {
    gpu(record)?.name.value().map(String::as_str)
}

/// What the driver or the kernel calls the device that computed.
pub(super) fn device_name(record: &Record) -> &str {
    match gpu(record) {
        Some(gpu) => gpu.name.value(),
        None => record.machine.cpu.model.value(),
    }
    .map_or(&record.engine.device, String::as_str)
}

/// The device's spec sheet and its name; none for a variant that only shares its name.
pub(super) fn sheet(record: &Record) -> Option<(&'static str, &'static DeviceSheet)> {
    let driver_name = gpu_name(record)?;
    if VARIANTS.iter().any(|variant| driver_name.contains(variant)) {
        return None;
    }
    let name = device_of(driver_name)?;
    Some((name, device_sheet(name)?))
}

/// The first thing in which two records differ that belong to one file: what, and both values.
pub(super) fn differing(a: &Record, b: &Record) -> Option<(&'static str, String, String)> {
    let of = |record: &Record| {
        [
            ("model", record.model.name.clone()),
            ("device", device_name(record).to_owned()),
            ("compute type", record.engine.compute_dtype.clone()),
            ("backend", record.engine.backend.clone()),
            ("steps of at most", record.engine.chunk_tokens.to_string()),
        ]
    };
    let pairs = of(a).into_iter().zip(of(b));
    pairs.into_iter().find(|(a, b)| a.1 != b.1).map(|((what, one), (_, another))| (what, one, another))
}

/// A name on one line, for a comment.
pub(super) fn on_one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Power of one metered device before this program touched it, W.
pub(super) fn idle_w_per_device(record: &Record) -> Option<f64> {
    per_device(record, record.meter.idle_no_context.value()?.power_w)
}

/// Power of one metered device with the weights resident and no work, W.
pub(super) fn ready_w_per_device(record: &Record) -> Option<f64> {
    per_device(record, record.meter.idle_context_resident.value()?.power_w)
}

fn per_device(record: &Record, watts: f64) -> Option<f64> {
    let devices = record.meter.devices.value()?.len();
    (devices > 0).then(|| watts / devices as f64)
}
