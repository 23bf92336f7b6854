//! The power ladder of one device: empty, with the weights resident, at each load of a ramp of decode batches, and after the
//! load. Nothing is fitted here, and nothing stands in for a rung that was not watched.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::observe::{joules, variation};
use crate::record::{Cell, IdlePower, Maybe, Outcome, Record, Run, Workload};

/// Power of one device in one state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerStep {
    /// `idle` (no model), `ready` (weights resident, no work), a cell's key, or `after_load`
    pub step: String,
    /// Mean power of one device, W.
    pub mean_w: f64,
    /// Coefficient of variation over the repeats: runs of a cell, parts of an idle watch.
    pub variation_share: Maybe<f64>,
    /// Least and largest power that was read of any device, W.
    pub min_w: Maybe<f64>,
    pub max_w: Maybe<f64>,
}

/// One cell in each record that has it.
type Visits<'a> = Vec<(&'a Record, &'a Cell)>;

/// All rungs that the records have, from idle upwards, `after_load` last.
pub(super) fn power_steps(records: &[Record]) -> Vec<PowerStep> {
    let idle = |name: &str, pick: fn(&Record) -> &Maybe<IdlePower>| idle_step(name, records, pick);
    let below = [
        idle("idle", |record| &record.meter.idle_no_context),
        idle("ready", |record| &record.meter.idle_context_resident),
    ];
    let after = idle("after_load", |record| &record.meter.idle_after_load);
    below.into_iter().flatten().chain(ramp(records)).chain(after).collect()
}

/// The mean power of a rung, or the reason of the first record that lacks it.
pub(super) fn idle_w(records: &[Record], pick: fn(&Record) -> &Maybe<IdlePower>) -> Maybe<f64> {
    let known: Vec<f64> = records
        .iter()
        .filter_map(|record| Some(pick(record).value()?.power_w / metered_devices(record)))
        .collect();
    if known.is_empty() {
        let reason = records.iter().find_map(|record| pick(record).reason());
        return Maybe::missing(reason.unwrap_or("no_record"));
    }
    Maybe::Value(known.iter().sum::<f64>() / known.len() as f64)
}

fn idle_step(name: &str, records: &[Record], pick: fn(&Record) -> &Maybe<IdlePower>) -> Option<PowerStep> {
    let mean_w = *idle_w(records, pick).value()?;
    let parts: Vec<f64> = records
        .iter()
        .filter_map(|record| Some((pick(record).value()?.parts_w.value()?, metered_devices(record))))
        .flat_map(|(parts, devices)| parts.iter().map(move |watts| watts / devices))
        .collect();
    Some(PowerStep {
        step: name.to_owned(),
        mean_w,
        variation_share: variation(&parts).ok_or("needs_2_runs").into(),
        min_w: Maybe::missing("not_kept"),
        max_w: Maybe::missing("not_kept"),
    })
}

/// The row of decode cells with the most batches that have energy, the shallowest of several, by batch.
fn ramp(records: &[Record]) -> Vec<PowerStep> {
    let mut rows: BTreeMap<u32, BTreeMap<u32, Visits<'_>>> = BTreeMap::new();
    for record in records {
        for cell in record.cells.iter().filter(|cell| matches!(cell.outcome, Outcome::Measured)) {
            if let Workload::Decode { batch, depth, .. } = cell.workload {
                rows.entry(depth).or_default().entry(batch).or_default().push((record, cell));
            }
        }
    }
    let steps = rows.into_values().map(|row| row.into_values().filter_map(|cells| step(&cells)).collect());
    let longest = |longest: Vec<PowerStep>, row: Vec<PowerStep>| match row.len() > longest.len() {
        true => row,
        false => longest,
    };
    steps.fold(Vec::new(), longest)
}

/// One load: all runs of all its visits.
fn step(cells: &[(&Record, &Cell)]) -> Option<PowerStep> {
    let (_, first) = cells.first()?;
    let runs = || cells.iter().flat_map(|(record, cell)| cell.runs.iter().map(|run| (*record, run)));
    let watts: Vec<f64> = runs().filter_map(|(record, run)| watts(record, run)).collect();
    if watts.is_empty() || watts.len() < runs().count() {
        return None;
    }
    let devices = || {
        let windows = runs().flat_map(|(_, run)| &run.windows);
        windows.filter_map(|window| window.energy.value()).flat_map(|energy| &energy.devices)
    };
    let ends = |pick: fn(&crate::record::DeviceEnergy) -> &Maybe<f64>, choose: fn(f64, f64) -> f64| {
        devices().filter_map(|device| pick(device).value().copied()).reduce(choose).ok_or("not_read").into()
    };
    Some(PowerStep {
        step: first.key.clone(),
        mean_w: watts.iter().sum::<f64>() / watts.len() as f64,
        variation_share: variation(&watts).ok_or("needs_2_runs").into(),
        min_w: ends(|device| &device.power_min_w, f64::min),
        max_w: ends(|device| &device.power_max_w, f64::max),
    })
}

/// Mean power of one device over the windows of a run.
fn watts(record: &Record, run: &Run) -> Option<f64> {
    let ns: u64 = run.windows.iter().map(|window| window.t1_ns.saturating_sub(window.t0_ns)).sum();
    let joules = joules(run).into_value()?;
    (ns > 0).then(|| joules / (ns as f64 / 1e9) / metered_devices(record))
}

fn metered_devices(record: &Record) -> f64 {
    record.meter.devices.value().map_or(1, |devices| devices.len().max(1)) as f64
}
