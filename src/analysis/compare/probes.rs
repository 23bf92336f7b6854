//! What each record measured of the device itself: its ceilings layer by layer, its power and its idle power. They tell
//! on which layer a difference of the cells arose; they decide nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::arms::Arms;
use super::cells::interval_ratio;
use super::effect::{Series, estimate};
use super::result::Probe;
use super::session::Group;
use crate::analysis::stats::{TQuantiles, mean};
use crate::record::{Ceiling, Ceilings, IdlePower, Maybe, Record};

/// One thing that is measured of a device; the order is that of the layers, from the host to the idle device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ProbeKind {
    LaunchNs,
    GraphNodeNs,
    HostToDevice,
    DeviceToHost,
    Copy,
    Read,
    /// By type of the operands.
    Matmul(String),
    Mma(String),
    Power,
    IdleNoContext,
    IdleContextResident,
}

impl ProbeKind {
    fn layer(&self) -> &'static str {
        match self {
            ProbeKind::LaunchNs | ProbeKind::GraphNodeNs => "launch",
            ProbeKind::HostToDevice | ProbeKind::DeviceToHost | ProbeKind::Copy => "copy",
            ProbeKind::Read => "memory",
            ProbeKind::Matmul(_) | ProbeKind::Mma(_) => "matmul",
            ProbeKind::Power => "power",
            ProbeKind::IdleNoContext | ProbeKind::IdleContextResident => "idle",
        }
    }

    /// The field of the record.
    fn what(&self) -> String {
        match self {
            ProbeKind::LaunchNs => "launch_ns".to_owned(),
            ProbeKind::GraphNodeNs => "graph_node_ns".to_owned(),
            ProbeKind::HostToDevice => "host_to_device_bytes_per_s".to_owned(),
            ProbeKind::DeviceToHost => "device_to_host_bytes_per_s".to_owned(),
            ProbeKind::Copy => "copy_bandwidth_bytes_per_s".to_owned(),
            ProbeKind::Read => "read_bandwidth_bytes_per_s".to_owned(),
            ProbeKind::Matmul(dtype) => format!("matmul_flops_per_s.{dtype}"),
            ProbeKind::Mma(dtype) => format!("mma_flops_per_s.{dtype}"),
            ProbeKind::Power => "energy_j per window".to_owned(),
            ProbeKind::IdleNoContext => "idle_no_context.power_w".to_owned(),
            ProbeKind::IdleContextResident => "idle_context_resident.power_w".to_owned(),
        }
    }

    fn unit(&self) -> &'static str {
        match self.layer() {
            "launch" => "ns",
            "matmul" => "flop/s",
            "power" | "idle" => "W",
            _ => "bytes/s",
        }
    }

    fn is_better_low(&self) -> bool {
        matches!(self.layer(), "launch" | "power" | "idle")
    }
}

/// ln of all that `record` knows.
pub(super) fn of(record: &Record) -> BTreeMap<ProbeKind, f64> {
    let all = record.ceilings.value().map_or(&[][..], Vec::as_slice);
    let own = all.iter().find(|ceilings| ceilings.device == record.engine.device);
    let mut found: Vec<(ProbeKind, f64)> = own.map_or(Vec::new(), of_ceilings);
    found.extend(power(record).map(|watts| (ProbeKind::Power, watts)));
    let idle = |idle: &Maybe<IdlePower>| idle.value().map(|idle| idle.power_w);
    found.extend(idle(&record.meter.idle_no_context).map(|watts| (ProbeKind::IdleNoContext, watts)));
    found.extend(
        idle(&record.meter.idle_context_resident).map(|watts| (ProbeKind::IdleContextResident, watts)),
    );
    let positive = found.into_iter().filter(|(_, value)| value.is_finite() && *value > 0.0);
    positive.map(|(kind, value)| (kind, value.ln())).collect()
}

fn of_ceilings(ceilings: &Ceilings) -> Vec<(ProbeKind, f64)> {
    let single = [
        (ProbeKind::LaunchNs, &ceilings.launch_ns),
        (ProbeKind::GraphNodeNs, &ceilings.graph_node_ns),
        (ProbeKind::HostToDevice, &ceilings.host_to_device_bytes_per_s),
        (ProbeKind::DeviceToHost, &ceilings.device_to_host_bytes_per_s),
        (ProbeKind::Copy, &ceilings.copy_bandwidth_bytes_per_s),
        (ProbeKind::Read, &ceilings.read_bandwidth_bytes_per_s),
    ];
    let matmul =
        ceilings.matmul_flops_per_s.iter().map(|(dtype, value)| (ProbeKind::Matmul(dtype.clone()), value));
    let mma = ceilings.mma_flops_per_s.iter().map(|(dtype, value)| (ProbeKind::Mma(dtype.clone()), value));
    let known = |(kind, ceiling): (ProbeKind, &Maybe<Ceiling>)| Some((kind, ceiling.value()?.value));
    single.into_iter().chain(matmul).chain(mma).filter_map(known).collect()
}

/// Energy over time of all windows that have energy, W; none where no window has.
fn power(record: &Record) -> Option<f64> {
    let windows = record.cells.iter().flat_map(|cell| &cell.runs).flat_map(|run| &run.windows);
    let energies: Vec<(f64, f64)> = windows
        .filter_map(|window| window.energy.value())
        .map(|energy| (energy.energy_j, energy.t_b_ns.saturating_sub(energy.t_a_ns) as f64 / 1e9))
        .collect();
    let (joules, seconds) =
        energies.iter().fold((0.0, 0.0), |(joules, seconds), (j, s)| (joules + j, seconds + s));
    (seconds > 0.0).then(|| joules / seconds)
}

/// Every probe that both sides have, in the order of the layers.
pub(super) fn compare(arms: &Arms<'_>, quantiles: &TQuantiles) -> Vec<Probe> {
    let samples = arms.baseline.iter().flat_map(|group| &group.samples);
    let kinds: BTreeSet<&ProbeKind> = samples.flat_map(|sample| sample.probes.keys()).collect();
    kinds.into_iter().filter_map(|kind| probe(arms, kind, quantiles)).collect()
}

fn probe(arms: &Arms<'_>, kind: &ProbeKind, quantiles: &TQuantiles) -> Option<Probe> {
    let series = Series {
        baseline: by_session(&arms.baseline, kind),
        candidate: by_session(&arms.candidate, kind),
        noise: arms.noise.iter().map(|batch| by_session(batch, kind)).filter(|all| !all.is_empty()).collect(),
        runs: Default::default(),
    };
    if series.baseline.is_empty() || series.candidate.is_empty() {
        return None;
    }
    let effect = estimate(&series);
    Some(Probe {
        layer: kind.layer().to_owned(),
        what: kind.what(),
        unit: kind.unit().to_owned(),
        is_better_low: kind.is_better_low(),
        baseline: mean(&series.baseline).exp(),
        candidate: mean(&series.candidate).exp(),
        effect_ratio: effect.difference.exp_m1(),
        interval_95_ratio: interval_ratio(&effect, quantiles),
    })
}

fn by_session(groups: &[Group<'_>], kind: &ProbeKind) -> Vec<f64> {
    let of_group = |group: &Group<'_>| {
        let own: Vec<f64> =
            group.samples.iter().filter_map(|sample| sample.probes.get(kind).copied()).collect();
        (!own.is_empty()).then(|| mean(&own))
    };
    groups.iter().filter_map(of_group).collect()
}
