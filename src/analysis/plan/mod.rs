//! A site and a calibration → what the site makes, takes and costs, with intervals. Money is decimal up to the last
//! division; what is drawn at random is not, and is rounded when it is printed. The formulas stand in PLANNING.md, and
//! `--explain` prints them with this site's numbers.

mod draws;
mod explain;
mod frame;
mod lint;
mod outcome;
mod service;
mod site;

pub use draws::{Interval, Intervals};
pub use lint::{Finding, Level, lint};
pub use outcome::{Curve, LoadPoint, Outcome, RampPoint, Sensitivity};
pub use site::{
    CapacityKind, Claim, Confidence, Demand, DeviceTransfer, Figure, Fleet, Money, OtherValue, Power,
    RampStep, SITE_SCHEMA, Shape, Site, Slo, Span, Unit, parse_site, read_site,
};

use serde::Serialize;

use self::frame::{Fixed, Frame};
use self::service::Service;
use super::calibrate::{Calibration, Grade};
use super::cost::{Work, cell_cost, without_capital};
use super::devices::device_sheet;
use crate::record::{Amount, CostMode, CostModel, EnergyPrice, Maybe, Usage};

/// Asked so far beyond what was measured, a calibration is not believed unasked.
pub const MOST_REACH: f64 = 1.25;
/// Draws behind the intervals.
pub const DRAWS: u32 = 10_000;

/// How a plan is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanOptions {
    pub draws: u32,
    pub seed: u64,
    /// Go on beyond [`MOST_REACH`] times the domain.
    pub allow_extrapolation: bool,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions { draws: DRAWS, seed: 0, allow_extrapolation: false }
    }
}

/// All that is forecast of a site.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub schema: &'static str,
    pub site: String,
    pub site_as_of: String,
    pub device: String,
    pub model: String,
    pub precision: String,
    pub engine: String,
    pub grade: Grade,
    pub basis: &'static str,
    /// Beyond what the calibration learnt from; intervals are twice as wide then.
    pub extrapolated: bool,
    pub currency: String,
    /// From the figures as they stand.
    pub outcome: Outcome,
    /// Name of an output → its interval.
    pub intervals: Intervals,
    pub ramp: Vec<RampPoint>,
    /// Cost and idle tax over utilisation.
    pub load_curve: Vec<LoadPoint>,
    /// Rates and marginal cost over concurrency; empty for a saturated law.
    pub concurrency_curve: Vec<Curve>,
    /// What each input's range does to the cost and the tokens, the largest first.
    pub sensitivities: Vec<Sensitivity>,
    pub flags: Vec<String>,
    /// Formulas with numbers.
    pub explanation: Vec<String>,
    pub draws: u32,
    pub seed: u64,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct PlanRefusal(pub String);

/// Forecasts a site.
///
/// # Errors
/// When the calibration is of another device or of other loads, or the figures leave nothing to compute.
pub fn plan(site: &Site, calibration: &Calibration, options: &PlanOptions) -> Result<Plan, PlanRefusal> {
    let refuse = |reason: String| PlanRefusal(reason);
    let sheet =
        device_sheet(&site.fleet.device).ok_or_else(|| refuse("the device has no sheet".to_owned()))?;
    let transfer = transfer(site, calibration)?;
    let service = Service::of(calibration).ok_or_else(|| {
        refuse("the calibration has neither both prefill and decode laws nor a law of serving".to_owned())
    })?;
    let mix = &site.demand.mix;
    let most_reach = if options.allow_extrapolation { f64::INFINITY } else { 1.0 };
    let kv_tokens = calibration.subject.kv_tokens_held.value().map(|tokens| *tokens as f64);
    let point = service.operating_point(mix, site.demand.slo, kv_tokens, most_reach).ok_or_else(|| {
        refuse("not even one request at a time keeps the promise of demand.slo within memory".to_owned())
    })?;
    let concurrency = point.concurrency.unwrap_or(1.0);
    let reach = service.reach(concurrency, mix);
    if reach > MOST_REACH && !options.allow_extrapolation {
        return Err(refuse(format!(
            "the demand lies {reach:.2} times as far out as what the calibration learnt from, expected at most {MOST_REACH}; {}\n\
             hint: measure there, change demand.mix, or accept it with --allow-extrapolation",
            domain_in_words(&service)
        )));
    }
    let cost = cost_model(site)?;
    let frame = Frame {
        site,
        sheet,
        service,
        point,
        fixed: Fixed::of(&cost),
        gpus_per_replica: f64::from(calibration.subject.gpus_per_replica),
        cost,
        energy_included: matches!(site.money.cost, CostMode::Rental { energy_included: true, .. }),
        // Machines that wait for work keep their weights.
        idle_board_w: calibration.ready_w.value().or(calibration.idle_w.value()).copied(),
    };
    let estimate = frame.estimate(transfer)?;
    let best = service.best();
    let outcome = priced(&frame, frame.outcome(&estimate, &best));
    let extrapolated = reach > 1.0 + 1e-9;
    let spread = draws::spread(&frame, &estimate, options, if extrapolated { 2.0 } else { 1.0 });
    Ok(Plan {
        schema: "tokmeter-plan/1",
        site: site.name.clone(),
        site_as_of: site.as_of.clone(),
        device: site.fleet.device.clone(),
        model: calibration.subject.model.clone(),
        precision: calibration.subject.precision.clone(),
        engine: calibration.subject.engine.clone(),
        grade: calibration.grade,
        basis: calibration.basis.name(),
        extrapolated,
        currency: site.money.currency.to_string(),
        ramp: frame.ramp(&estimate, &outcome, &spread.ramp),
        load_curve: with_intervals(frame.load_curve(&estimate, &outcome), spread.load),
        concurrency_curve: frame.concurrency_curve(&estimate),
        sensitivities: frame.sensitivities(&estimate, &best, [&spread.slow, &spread.fast]),
        intervals: spread.intervals,
        flags: flags(&frame, calibration, extrapolated),
        explanation: explain::explain(&frame, &estimate, &outcome),
        outcome,
        draws: options.draws,
        seed: options.seed,
    })
}

/// Throughput of the site's device over the calibration's, with its range.
fn transfer(site: &Site, calibration: &Calibration) -> Result<Span, PlanRefusal> {
    let (has, needs) = (&calibration.subject.device, &site.fleet.device);
    if has == needs {
        return Ok(Span { min: 1.0, max: 1.0 });
    }
    match &site.device_transfer {
        Some(transfer) if transfer.from == *has && transfer.to == *needs => Ok(Span {
            min: transfer.throughput_ratio * (1.0 - transfer.uncertainty_share),
            max: transfer.throughput_ratio * (1.0 + transfer.uncertainty_share),
        }),
        _ => Err(PlanRefusal(format!(
            "the calibration is of {has}, the site has {needs}, and the site states no [device_transfer] from one to the other\n\
             hint: give a calibration of {needs}, or state the ratio, its basis and its uncertainty in the site"
        ))),
    }
}

fn domain_in_words(service: &Service<'_>) -> String {
    let of = |law: &super::calibrate::Law| {
        let ranges: Vec<String> =
            law.domain.iter().map(|(name, range)| format!("{name} {} to {}", range.min, range.max)).collect();
        format!("{}: {}", law.phase.name(), ranges.join(", "))
    };
    service.laws().into_iter().take(2).map(of).collect::<Vec<_>>().join("; ")
}

/// The site's money as a cost model in the currency of the results. The energy's price is put in after the conversion.
fn cost_model(site: &Site) -> Result<CostModel, PlanRefusal> {
    let money = &site.money;
    let amount = |key: &str, value: f64| {
        Amount::try_from(format!("{value}")).map_err(|error| PlanRefusal(format!("{key}: {error}")))
    };
    let per_kwh = amount("money.electricity_per_mwh", money.electricity_per_mwh.value / 1000.0)?;
    let energy = EnergyPrice {
        price_per_kwh: per_kwh,
        pue: amount("power.pue", site.power.pue.value)?,
        node_overhead_w_per_gpu: amount("overhead", 0.0)?,
        node_power_source: "assumed".to_owned(),
    };
    let share = site.demand.utilization.value * site.fleet.availability.value;
    let model = CostModel {
        schema: "cost/1".to_owned(),
        name: site.name.clone(),
        currency: money.cost_currency.clone(),
        as_of: Maybe::Value(money.cost_as_of.clone()),
        source: money.cost_source.clone(),
        is_example: false,
        sha256: Maybe::missing("part_of_a_site"),
        mode: money.cost.clone(),
        energy: Some(energy.clone()),
        usage: Usage { utilization: amount("utilization times availability", share)? },
        fx: money.fx.clone(),
        converted: None,
    };
    let say = |error: String| PlanRefusal(format!("money: {error}"));
    model.check().map_err(say)?;
    let mut model = model.in_currency(&money.currency.to_string()).map_err(say)?;
    model.energy = Some(energy);
    Ok(model)
}

/// Exact prices in place of those in binary floating point.
fn priced(frame: &Frame<'_>, mut outcome: Outcome) -> Outcome {
    let work = Work {
        devices: 1,
        input_tokens_per_s: outcome.input_tokens_per_s_per_gpu,
        output_tokens_per_s: outcome.output_tokens_per_s_per_gpu,
        device_watts: Maybe::Value(outcome.it_w_per_gpu),
        idle_watts: outcome.idle_it_w_per_gpu.clone(),
    };
    let cost = cell_cost(&frame.cost, &work);
    outcome.cost_per_mtok_output = cost.per_mtok_output;
    outcome.cost_per_mtok_total = cost.per_mtok_total;
    outcome.energy_cost_per_mtok_output = cost.energy_per_mtok_output;
    outcome.cash_cost_per_mtok_output = cell_cost(&without_capital(&frame.cost), &work).per_mtok_output;
    outcome
}

fn with_intervals(mut points: Vec<LoadPoint>, intervals: Vec<Intervals>) -> Vec<LoadPoint> {
    points.iter_mut().zip(intervals).for_each(|(point, intervals)| point.intervals = intervals);
    points
}

/// What a reader must know before using a number.
fn flags(frame: &Frame<'_>, calibration: &Calibration, extrapolated: bool) -> Vec<String> {
    let site = frame.site;
    let mut flags = vec![format!(
        "the calibration is {}, grade {}: {} on {}",
        calibration.basis.name(),
        calibration.grade,
        calibration.subject.model,
        calibration.subject.engine
    )];
    if let Some(reason) = &calibration.not_a_measurement {
        flags.push(format!("the calibration is no measurement: {reason}"));
    }
    if extrapolated {
        flags.push("extrapolated: the demand lies outside what the calibration learnt from; intervals are twice as wide".to_owned());
    }
    if let Some(transfer) = &site.device_transfer
        && transfer.from == calibration.subject.device
    {
        flags.push(format!(
            "transferred from {} to {}: {} times the throughput, ± {:.0} % ({})",
            transfer.from,
            transfer.to,
            transfer.throughput_ratio,
            transfer.uncertainty_share * 100.0,
            transfer.basis
        ));
    }
    if !frame.service.has_energy() {
        flags.push("power is provisioned, not measured: the calibration has no energy law".to_owned());
    }
    if frame.point.concurrency.is_none() {
        flags.push("no concurrency: the calibration is of saturated replicas, so no promise on latency can be checked".to_owned());
    }
    if let Some(ttft_ms) = site.demand.slo.and_then(|slo| slo.ttft_ms) {
        match frame.point.ttft_s {
            Some(seconds) if seconds * 1e3 > ttft_ms => flags.push(format!(
                "the longest prompt alone takes {:.0} ms to its first token, more than the promised {ttft_ms} ms",
                seconds * 1e3
            )),
            Some(_) => flags.push("time to first token is checked without queueing".to_owned()),
            None => flags.push("time to first token is not checked: the calibration has no prefill law".to_owned()),
        }
    }
    if calibration.subject.kv_tokens_held.value().is_none() && frame.point.concurrency.is_some() {
        flags.push(
            "memory for keys and values is not checked: the calibration does not say how much there is"
                .to_owned(),
        );
    }
    for finding in lint(site).into_iter().filter(|finding| finding.level == Level::Error) {
        flags.push(format!("the site contradicts itself: {}", finding.text));
    }
    flags
}
