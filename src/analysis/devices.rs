//! Spec sheets of devices (`devices/gpus.toml`, in the binary): power, prices, peaks, and how many dies and GPUs the names
//! that announcements use stand for. Absent figures are unknown.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use rust_decimal::Decimal;
use serde::Deserialize;

use crate::record::Amount;

/// What is published of one device. Powers are per GPU package.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSheet {
    /// Parts of the driver's name for it.
    pub names: Vec<String>,
    /// Board power limit.
    pub tdp_w: Option<f64>,
    /// Share of server and network included.
    pub all_in_kw: Option<f64>,
    owner_usd_per_hour: Option<Amount>,
    pub memory_bytes_per_s: Option<f64>,
    /// Dense.
    pub bf16_flops_per_s: Option<f64>,
    /// Both directions of one GPU.
    pub nvlink_bytes_per_s: Option<f64>,
    pub gpus_per_rack: Option<u32>,
    pub gpus_per_superchip: u32,
    pub dies_per_gpu: u32,
    /// The node's power without work, over its GPUs.
    pub idle_node_w_per_gpu: Option<f64>,
    pub idle_source: Option<String>,
    pub source: String,
    pub as_of: String,
}

static SHEETS: LazyLock<BTreeMap<String, DeviceSheet>> =
    LazyLock::new(|| toml::from_str(include_str!("../../devices/gpus.toml")).unwrap_or_default());

impl DeviceSheet {
    /// The owner's cost by the hour, US dollars, energy included.
    pub fn owner_usd_per_hour(&self) -> Option<Decimal> {
        self.owner_usd_per_hour.map(Amount::value)
    }
}

/// The sheet of this name, such as `gb200`.
pub fn device_sheet(name: &str) -> Option<&'static DeviceSheet> {
    SHEETS.get(name)
}

/// All names.
pub fn device_names() -> impl Iterator<Item = &'static str> {
    SHEETS.keys().map(String::as_str)
}

/// The name of the sheet for what a driver calls its device; the longest name that occurs in it wins, so that a GB200 is no
/// B200.
pub fn device_of(driver_name: &str) -> Option<&'static str> {
    let of = |sheet: &DeviceSheet| {
        sheet.names.iter().filter(|name| driver_name.contains(name.as_str())).map(String::len).max()
    };
    let matches = SHEETS.iter().filter_map(|(name, sheet)| Some((of(sheet)?, name)));
    matches.max_by_key(|(length, _)| *length).map(|(_, name)| name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sheet_is_read_and_physical() {
        assert!(device_names().count() >= 6);
        for name in device_names() {
            let sheet = device_sheet(name).unwrap();
            if let (Some(tdp_w), Some(all_in_kw)) = (sheet.tdp_w, sheet.all_in_kw) {
                assert!(all_in_kw * 1000.0 > tdp_w, "{name}");
            }
            assert!(sheet.owner_usd_per_hour().is_some(), "{name}");
        }
        // 72 GPUs at 1.8 TB/s are the 130 TB/s of announcements.
        let rack = device_sheet("gb300").unwrap();
        assert_eq!(rack.nvlink_bytes_per_s.unwrap() * f64::from(rack.gpus_per_rack.unwrap()), 129.6e12);
    }

    #[test]
    fn a_drivers_name_finds_its_sheet() {
        assert_eq!(device_of("NVIDIA H100 80GB HBM3"), Some("h100"));
        assert_eq!(device_of("NVIDIA GB200"), Some("gb200"));
        assert_eq!(device_of("NVIDIA GeForce RTX 4090"), None);
    }
}
