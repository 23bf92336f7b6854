//! Every formula of a plan with its numbers, in the order in which one follows from the other: what a planner checks by hand.

use super::frame::{Estimate, Frame};
use super::outcome::Outcome;
use super::service::{self, Service};
use super::site::{CapacityKind, Shape};
use crate::analysis::calibrate::{Law, Load, Phase};
use crate::record::Maybe;
use crate::units::format_significant as number;

/// One formula a line.
pub(super) fn explain(frame: &Frame<'_>, estimate: &Estimate, outcome: &Outcome) -> Vec<String> {
    let mut lines = laws(frame);
    lines.extend(fleet(frame, estimate, outcome));
    lines.extend(power(estimate, outcome));
    lines.extend(money(frame, estimate, outcome));
    lines
}

/// The laws at the first shape of the mix, and how they make a token.
fn laws(frame: &Frame<'_>) -> Vec<String> {
    let Some(first) = frame.site.demand.mix.first() else { return Vec::new() };
    let mut lines: Vec<String> = frame
        .service
        .laws()
        .into_iter()
        .filter_map(|law| {
            let load = load_of(frame, law, first)?;
            Some(format!("{} law at {}: {}", law.phase.name(), first.name, service::formula(law, &load)))
        })
        .collect();
    let concurrency = frame.point.concurrency.unwrap_or(1.0);
    if let Service::Composed { .. } = frame.service {
        let seconds = frame.service.seconds(&frame.service.best(), concurrency, first);
        lines.push(format!(
            "s per output token of a request at {} = t_decode(c, c (S + O / 2)) + c · t_prefill(S) / O = {seconds:.5e} with c = {concurrency}, \
             S = {}, O = {}",
            first.name, first.isl, first.osl
        ));
    }
    let together =
        if frame.point.concurrency.is_some() { "s per output token of a request / c" } else { "the law" };
    lines.push(format!(
        "replica's s per output token = mean of {together} over the mix, shapes by their share of the output tokens = {:.5e}",
        frame.replica_seconds(&frame.service.best())
    ));
    lines
}

fn load_of(frame: &Frame<'_>, law: &Law, shape: &Shape) -> Option<Load> {
    let (isl, osl) = (f64::from(shape.isl), f64::from(shape.osl));
    let concurrency = frame.point.concurrency.unwrap_or(1.0);
    Some(match law.phase {
        Phase::Decode => Load::Decode { batch: concurrency, kv_tokens: concurrency * (isl + osl / 2.0) },
        Phase::Prefill => match frame.service {
            Service::Composed { chunk, .. } => Load::Prefill { batch: 1.0, isl, chunk },
            _ => return None,
        },
        Phase::Serving => Load::Serving { concurrency, isl, osl },
        Phase::Saturated => Load::Saturated { isl, osl },
    })
}

/// GPUs and tokens.
fn fleet(frame: &Frame<'_>, e: &Estimate, outcome: &Outcome) -> Vec<String> {
    let g = frame.gpus_per_replica;
    let rate = outcome.output_tokens_per_s_per_gpu;
    let (divisor, kind) = match frame.site.power.capacity_kind {
        CapacityKind::Facility => (e.pue, "facility"),
        CapacityKind::It => (1.0, "it"),
    };
    let mut lines = vec![
        format!(
            "GPUs fed = floor(P / (PUE · W)) = floor({} MW / ({divisor} · {} W)) = {} ({kind} power)",
            e.contract_mw,
            number(e.provisioned_w),
            outcome.gpus_supported_by_power
        ),
        format!(
            "GPUs = whole replicas of {g} in min({}, {}) = {}",
            outcome.gpus_supported_by_power,
            e.count.map_or("no announced count".to_owned(), |count| count.to_string()),
            outcome.gpus
        ),
        format!(
            "output tok/s per GPU = ratio / (replica's s per output token · GPUs) = {} / ({:.5e} · {g}) = {}",
            e.throughput_ratio,
            e.throughput_ratio / rate / g,
            number(rate)
        ),
        format!(
            "total tok/s per GPU = output · (1 + mean S / mean O) = {} · (1 + {:.4}) = {}",
            number(rate),
            outcome.input_tokens_per_s_per_gpu / rate,
            number(outcome.total_tokens_per_s_per_gpu)
        ),
        format!(
            "output tok/day = GPUs · tok/s · U · A · 86400 = {} · {} · {} · {} · 86400 = {:.4e}",
            outcome.gpus,
            number(rate),
            e.utilization,
            e.availability,
            outcome.output_tokens_per_day
        ),
    ];
    if let Maybe::Value(racks) = outcome.racks
        && let Some(per_rack) = frame.sheet.gpus_per_rack
    {
        lines.push(format!("racks = GPUs / {per_rack} = {racks:.2}"));
    }
    lines
}

/// Watts, tokens per watt and joules per token, boundary by boundary.
fn power(e: &Estimate, outcome: &Outcome) -> Vec<String> {
    let (rate, it_w) = (outcome.output_tokens_per_s_per_gpu, outcome.it_w_per_gpu);
    let mut lines = vec![match outcome.board_w_per_gpu.value() {
        Some(board_w) => format!(
            "W per GPU, IT = board + overhead = {board_w:.1} + {} = {it_w:.1}; board = replica's J per token / s per token / GPUs, at most its limit",
            e.overhead_w
        ),
        None => format!("W per GPU, IT = provisioned = {it_w:.1}"),
    }];
    let boundaries = [
        ("board", outcome.board_w_per_gpu.value().copied()),
        ("node", outcome.node_w_per_gpu.value().copied()),
        ("IT", Some(it_w)),
        ("facility", Some(it_w * e.pue)),
    ];
    if let (Maybe::Value(node_w), Some(network_w)) = (&outcome.node_w_per_gpu, e.network_w) {
        lines.push(format!("W per GPU, node = IT − network = {it_w:.1} − {network_w} = {node_w:.1}"));
    }
    lines.push(format!("W per GPU, facility = IT · PUE = {it_w:.1} · {} = {:.1}", e.pue, it_w * e.pue));
    for (name, watts) in boundaries.into_iter().filter_map(|(name, watts)| Some((name, watts?))) {
        lines.push(format!(
            "{name}: output tok/s per MW = 10^6 · tok/s / W = 10^6 · {rate:.4} / {watts:.1} = {}; J per output token = W / (tok/s) = {}",
            number(rate / watts * 1e6),
            number(watts / rate)
        ));
    }
    lines.push(format!(
        "MW of the site, busy = GPUs · W, facility = {} · {:.1} / 10^6 = {}",
        outcome.gpus,
        it_w * e.pue,
        number(outcome.facility_mw)
    ));
    if let (Maybe::Value(mwh), Some(idle_w)) = (&outcome.facility_mwh_per_year, e.idle_it_w) {
        lines.push(format!(
            "MWh per year = GPUs · (U A · busy + (1 − U A) · idle) · PUE · 8760 h = {} · ({:.4} · {it_w:.1} + {:.4} · {idle_w}) W · {} · 8760 = {mwh:.4e}",
            outcome.gpus,
            e.utilization * e.availability,
            1.0 - e.utilization * e.availability,
            e.pue
        ));
    }
    lines
}

/// Costs, with the share of the hours that they are spread over.
fn money(frame: &Frame<'_>, e: &Estimate, outcome: &Outcome) -> Vec<String> {
    let currency = &frame.site.money.currency;
    let (rate, it_w) = (outcome.output_tokens_per_s_per_gpu, outcome.it_w_per_gpu);
    let share = e.utilization * e.availability;
    let per_hour = |watts: f64| watts / 1e6 * e.pue * e.electricity_per_mwh;
    let mtok = rate * 3600.0 / 1e6;
    let included =
        if frame.energy_included { " (the fixed cost includes energy, so none is added)" } else { "" };
    let idle_text = match e.idle_it_w {
        Some(idle_w) if !frame.energy_included => format!("{:.6}", per_hour(idle_w)),
        _ => "0".to_owned(),
    };
    let busy_text = if frame.energy_included { "0".to_owned() } else { format!("{:.6}", per_hour(it_w)) };
    let mut lines = vec![format!(
        "energy of a GPU's busy hour = W · PUE · price = {it_w:.1} / 10^6 · {} · {} = {:.6} {currency}",
        e.pue,
        e.electricity_per_mwh,
        per_hour(it_w)
    )];
    if let Some(idle_w) = e.idle_it_w {
        lines.push(format!(
            "energy of a GPU's idle hour = {idle_w} / 10^6 · {} · {} = {:.6} {currency}",
            e.pue,
            e.electricity_per_mwh,
            per_hour(idle_w)
        ));
    }
    let full = [
        ("cost per Mtok output, full", frame.fixed.full, &outcome.cost_per_mtok_output),
        ("cost per Mtok output, cash", frame.fixed.cash, &outcome.cash_cost_per_mtok_output),
    ];
    for (name, fixed, cost) in full {
        if let (Some(fixed), Maybe::Value(cost)) = (fixed, cost) {
            lines.push(format!(
                "{name} = (fixed / (U A) + busy + idle · (1 − U A) / (U A)) / (3600 · tok/s) · 10^6 = ({fixed:.6} / {share:.4} + {busy_text} + \
                 {idle_text} · {:.4}) / {mtok:.6} = {cost:.5} {currency}{included}",
                (1.0 - share) / share
            ));
        }
    }
    if let Maybe::Value(cost) = outcome.energy_cost_per_mtok_output {
        lines.push(format!(
            "energy cost per Mtok output = busy energy / (3600 · tok/s) · 10^6 = {:.6} / {mtok:.6} = {cost:.5} {currency}",
            per_hour(it_w)
        ));
    }
    if let (Maybe::Value(cost), Some(idle_w)) = (&outcome.marginal_cost_per_mtok_output, e.idle_it_w) {
        lines.push(format!(
            "marginal cost per Mtok output = (busy − idle energy) / (3600 · tok/s) · 10^6 = ({:.6} − {:.6}) / {mtok:.6} = {cost:.5} {currency}",
            per_hour(it_w),
            per_hour(idle_w)
        ));
    }
    if let (Maybe::Value(tax), Some(fixed)) = (&outcome.idle_tax_per_hour, frame.fixed.full) {
        lines.push(format!(
            "idle tax per hour = GPUs · (1 − U A) · (fixed + idle) = {} · {:.4} · ({fixed:.6} + {idle_text}) = {} {currency}",
            outcome.gpus,
            1.0 - share,
            number(*tax)
        ));
    }
    if let (Maybe::Value(utilization), Some(fixed), Some(price)) =
        (&outcome.break_even_utilization, frame.fixed.full, &frame.site.money.price_per_mtok)
    {
        lines.push(format!(
            "break-even utilisation = (fixed + idle) / (price · Mtok per hour − busy + idle) / A = ({fixed:.6} + {idle_text}) / \
             ({} · {mtok:.6} − {busy_text} + {idle_text}) / {} = {utilization:.4}",
            price.value(),
            e.availability
        ));
    }
    lines
}
