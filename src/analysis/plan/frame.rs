//! The arithmetic of a site: from watts and seconds per token to GPUs, tokens, megawatts and money. One function maps inputs
//! to outputs; the figures as they stand, the draws and the sensitivities all go through it.

use super::PlanRefusal;
use super::draws::{Interval, Intervals};
use super::lint::gpus_per_unit;
use super::outcome::{Curve, LoadPoint, Outcome, RampPoint, Sensitivity};
use super::service::{DrawnLaws, OperatingPoint, Service};
use super::site::{CapacityKind, Figure, Site, Span};
use crate::analysis::cost::{fixed_hour, without_capital};
use crate::analysis::devices::DeviceSheet;
use crate::analysis::rng::Rng;
use crate::record::{CostModel, Maybe};
use rust_decimal::prelude::ToPrimitive as _;

const SECONDS_PER_DAY: f64 = 86_400.0;
const SECONDS_PER_HOUR: f64 = 3600.0;
const DAYS_PER_YEAR: f64 = 365.0;
const HOURS_PER_YEAR: f64 = 8760.0;
/// The sensitivity that is no figure of the site: the laws' speed, as a share of their best.
const CALIBRATION: &str = "calibration";

/// Inputs that may be drawn.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) contract_mw: f64,
    pub(super) pue: f64,
    pub(super) provisioned_w: f64,
    pub(super) overhead_w: f64,
    pub(super) network_w: Option<f64>,
    pub(super) availability: f64,
    pub(super) utilization: f64,
    pub(super) electricity_per_mwh: f64,
    pub(super) cost_factor: f64,
    pub(super) throughput_ratio: f64,
    pub(super) transferred: bool,
    /// GPUs that were announced.
    pub(super) count: Option<f64>,
    pub(super) idle_it_w: Option<f64>,
    pub(super) throughput_span: Span,
}

/// A name, a place in the inputs, and the range.
struct Input {
    name: &'static str,
    place: fn(&mut Estimate) -> &mut f64,
    span: Span,
}

/// What all computations of one plan share.
pub(super) struct Frame<'a> {
    pub(super) site: &'a Site,
    pub(super) sheet: &'static DeviceSheet,
    pub(super) service: Service<'a>,
    pub(super) point: OperatingPoint,
    pub(super) gpus_per_replica: f64,
    pub(super) cost: CostModel,
    pub(super) fixed: Fixed,
    pub(super) energy_included: bool,
    pub(super) idle_board_w: Option<f64>,
}

/// What one GPU costs by the paid hour, energy aside, in the binary numbers of the draws; none where it is too large.
pub(super) struct Fixed {
    pub(super) full: Option<f64>,
    /// Without what is written off.
    pub(super) cash: Option<f64>,
}

impl Fixed {
    pub(super) fn of(cost: &CostModel) -> Fixed {
        let hour = |model: &CostModel| fixed_hour(model).and_then(|hour| hour.to_f64());
        Fixed { full: hour(cost), cash: hour(&without_capital(cost)) }
    }
}

impl Frame<'_> {
    /// The figures as they stand.
    pub(super) fn estimate(&self, throughput: Span) -> Result<Estimate, PlanRefusal> {
        let (site, sheet, fleet) = (self.site, self.sheet, &self.site.fleet);
        let value = |figure: &Option<Figure>| figure.as_ref().map(|figure| figure.value);
        let device = &fleet.device;
        let all_in_w = sheet.all_in_kw.map(|kilowatts| kilowatts * 1000.0);
        let provisioned_w = value(&fleet.provisioned_w_per_gpu).or(all_in_w).ok_or_else(|| {
            PlanRefusal(format!(
                "fleet.provisioned_w_per_gpu is missing, and the sheet of {device} has no all-in power"
            ))
        })?;
        let overhead_w = value(&fleet.overhead_w_per_gpu).or_else(|| Some(all_in_w? - sheet.tdp_w?));
        if overhead_w.is_none() && self.service.has_energy() {
            return Err(PlanRefusal(format!(
                "fleet.overhead_w_per_gpu is missing, and the sheet of {device} does not give it"
            )));
        }
        let overhead_w = overhead_w.unwrap_or(0.0);
        let count = match &fleet.count {
            None => None,
            Some(figure) => {
                let per_unit = gpus_per_unit(sheet, fleet.unit).ok_or_else(|| {
                    PlanRefusal(format!("fleet.unit is rack, and the size of a {device} rack is unknown"))
                })?;
                Some(figure.value * per_unit)
            }
        };
        let network_w = value(&fleet.network_w_per_gpu);
        if let Some(network_w) = network_w.filter(|network_w| *network_w > overhead_w) {
            return Err(PlanRefusal(format!(
                "fleet.network_w_per_gpu is {network_w}, expected at most the {overhead_w} W that are beside the board, of which it is a part"
            )));
        }
        let idle_board_w = self.idle_board_w.map(|watts| watts + overhead_w);
        Ok(Estimate {
            contract_mw: site.power.contract_mw.value,
            pue: site.power.pue.value,
            provisioned_w,
            overhead_w,
            network_w,
            availability: fleet.availability.value,
            utilization: site.demand.utilization.value,
            electricity_per_mwh: site.money.electricity_per_mwh.value,
            cost_factor: 1.0,
            throughput_ratio: (throughput.min + throughput.max) / 2.0,
            transferred: (throughput.min, throughput.max) != (1.0, 1.0),
            count,
            idle_it_w: value(&fleet.idle_w_per_gpu).or(idle_board_w).or(sheet.idle_node_w_per_gpu),
            throughput_span: throughput,
        })
    }

    /// Inputs with a range.
    fn inputs(&self, estimate: &Estimate) -> Vec<Input> {
        let site = self.site;
        let mut inputs = vec![
            Input {
                name: "power.contract_mw",
                place: |e| &mut e.contract_mw,
                span: site.power.contract_mw.span(),
            },
            Input { name: "power.pue", place: |e| &mut e.pue, span: site.power.pue.span() },
            Input {
                name: "fleet.availability",
                place: |e| &mut e.availability,
                span: site.fleet.availability.span(),
            },
            Input {
                name: "demand.utilization",
                place: |e| &mut e.utilization,
                span: site.demand.utilization.span(),
            },
            Input {
                name: "money.electricity_per_mwh",
                place: |e| &mut e.electricity_per_mwh,
                span: site.money.electricity_per_mwh.span(),
            },
            Input {
                name: "device_transfer",
                place: |e| &mut e.throughput_ratio,
                span: estimate.throughput_span,
            },
        ];
        if let Some(figure) = &site.fleet.provisioned_w_per_gpu {
            let place: fn(&mut Estimate) -> &mut f64 = |e| &mut e.provisioned_w;
            inputs.push(Input { name: "fleet.provisioned_w_per_gpu", place, span: figure.span() });
        }
        if let Some(figure) = &site.fleet.overhead_w_per_gpu {
            let place: fn(&mut Estimate) -> &mut f64 = |e| &mut e.overhead_w;
            inputs.push(Input { name: "fleet.overhead_w_per_gpu", place, span: figure.span() });
        }
        if let (Some(figure), Some(_)) = (&site.fleet.network_w_per_gpu, estimate.network_w) {
            let place: fn(&mut Estimate) -> &mut f64 = |e| e.network_w.get_or_insert(0.0);
            inputs.push(Input { name: "fleet.network_w_per_gpu", place, span: figure.span() });
        }
        if let Some(span) = site.money.cost_factor {
            inputs.push(Input { name: "money.cost_factor", place: |e| &mut e.cost_factor, span });
        }
        inputs.retain(|input| input.span.max > input.span.min);
        inputs
    }

    /// One draw of all inputs, each on its own.
    pub(super) fn draw(&self, estimate: &Estimate, rng: &mut Rng) -> Estimate {
        let mut drawn = estimate.clone();
        for input in self.inputs(estimate) {
            let value = (input.place)(&mut drawn);
            *value = rng.triangular(input.span.min, *value, input.span.max);
        }
        drawn
    }

    /// Inputs and laws → everything else.
    pub(super) fn outcome(&self, estimate: &Estimate, laws: &DrawnLaws) -> Outcome {
        let (site, e) = (self.site, estimate);
        let mix = &site.demand.mix;
        let concurrency = self.point.concurrency.unwrap_or(1.0);
        let seconds = self.replica_seconds(laws);
        let rate = e.throughput_ratio / seconds / self.gpus_per_replica;
        let joules = self.service.replica_joules(laws, concurrency, mix).filter(|_| !e.transferred);
        let board_w = joules.map(|joules| {
            let watts = joules / seconds / self.gpus_per_replica;
            self.sheet.tdp_w.map_or(watts, |tdp_w| watts.min(tdp_w))
        });
        let it_w = board_w.map_or(e.provisioned_w, |watts| watts + e.overhead_w);
        let node_w = e.network_w.map(|network_w| it_w - network_w);
        let supported = self.supported(e, e.contract_mw);
        let announced = e.count.unwrap_or(f64::INFINITY);
        let gpus = self.whole_replicas(supported.min(announced));
        let prompt_ratio = prompt_tokens_per_output_token(site);
        let share = e.utilization * e.availability;
        let output_tokens_per_s = rate * gpus * share;
        let known = |value: Option<f64>, reason: &str| value.map_or(Maybe::missing(reason), Maybe::Value);
        let (no_board, no_node) = ("energy_not_measured", "network_not_stated");
        let money = self.money(e, rate, it_w, gpus);
        Outcome {
            gpus_supported_by_power: supported,
            gpus,
            racks: known(self.sheet.gpus_per_rack.map(|per_rack| gpus / f64::from(per_rack)), "no_rack"),
            fleet_constraint: if announced < supported { "count" } else { "power" },
            replica_constraint: self.point.limit,
            concurrency: known(self.point.concurrency, "saturated"),
            tpot_ms: known(self.point.tpot_s.map(|s| s * 1e3 / e.throughput_ratio), "saturated"),
            ttft_ms: known(self.point.ttft_s.map(|s| s * 1e3 / e.throughput_ratio), "no_prefill_law"),
            output_tokens_per_s_per_gpu: rate,
            input_tokens_per_s_per_gpu: rate * prompt_ratio,
            total_tokens_per_s_per_gpu: rate * (1.0 + prompt_ratio),
            output_tokens_per_s,
            output_tokens_per_day: output_tokens_per_s * SECONDS_PER_DAY,
            input_tokens_per_day: output_tokens_per_s * prompt_ratio * SECONDS_PER_DAY,
            output_tokens_per_year: output_tokens_per_s * SECONDS_PER_DAY * DAYS_PER_YEAR,
            board_w_per_gpu: known(board_w, no_board),
            node_w_per_gpu: known(node_w, no_node),
            it_w_per_gpu: it_w,
            idle_it_w_per_gpu: known(e.idle_it_w, "idle_power_unknown"),
            output_tokens_per_s_per_board_mw: known(board_w.map(|watts| rate / watts * 1e6), no_board),
            output_tokens_per_s_per_node_mw: known(node_w.map(|watts| rate / watts * 1e6), no_node),
            output_tokens_per_s_per_it_mw: rate / it_w * 1e6,
            output_tokens_per_s_per_facility_mw: rate / (it_w * e.pue) * 1e6,
            total_tokens_per_s_per_it_mw: rate * (1.0 + prompt_ratio) / it_w * 1e6,
            board_j_per_output_token: known(board_w.map(|watts| watts / rate), no_board),
            node_j_per_output_token: known(node_w.map(|watts| watts / rate), no_node),
            it_j_per_output_token: it_w / rate,
            facility_j_per_output_token: it_w * e.pue / rate,
            it_j_per_total_token: it_w / (rate * (1.0 + prompt_ratio)),
            facility_mw: gpus * it_w * e.pue / 1e6,
            facility_mwh_per_year: money.mean_w.map(|watts| gpus * watts * e.pue * HOURS_PER_YEAR / 1e6),
            cost_per_mtok_total: money.per_mtok.clone().map(|cost| cost / (1.0 + prompt_ratio)),
            cost_per_mtok_output: money.per_mtok,
            cash_cost_per_mtok_output: money.cash_per_mtok,
            energy_cost_per_mtok_output: Maybe::missing("not_drawn"),
            marginal_cost_per_mtok_output: money.marginal_per_mtok,
            idle_tax_per_hour: money.idle_tax_per_hour,
            break_even_utilization: money.break_even,
        }
    }

    /// Seconds of a replica for each output token of the site's mix at the operating point.
    pub(super) fn replica_seconds(&self, laws: &DrawnLaws) -> f64 {
        let concurrency = self.point.concurrency.unwrap_or(1.0);
        self.service.replica_seconds(laws, concurrency, &self.site.demand.mix)
    }

    /// GPUs that so many megawatts feed, by their provisioned power.
    fn supported(&self, estimate: &Estimate, contract_mw: f64) -> f64 {
        let it_mw = match self.site.power.capacity_kind {
            CapacityKind::Facility => contract_mw / estimate.pue,
            CapacityKind::It => contract_mw,
        };
        (it_mw * 1e6 / estimate.provisioned_w).floor()
    }

    fn whole_replicas(&self, gpus: f64) -> f64 {
        (gpus / self.gpus_per_replica).floor() * self.gpus_per_replica
    }

    fn money(&self, e: &Estimate, rate: f64, it_w: f64, gpus: f64) -> MoneyFlow {
        let share = e.utilization * e.availability;
        let per_hour = |watts: f64| watts / 1e6 * e.pue * e.electricity_per_mwh;
        let scaled = |hour: Option<f64>| match hour {
            Some(hour) => Maybe::Value(hour * e.cost_factor),
            None => Maybe::missing("price_too_large"),
        };
        let (fixed, cash): (Maybe<f64>, Maybe<f64>) = (scaled(self.fixed.full), scaled(self.fixed.cash));
        let idle: Maybe<f64> = match e.idle_it_w {
            Some(watts) => Maybe::Value(per_hour(watts)),
            None => Maybe::missing("idle_power_unknown"),
        };
        // Energy that the fixed cost includes is not charged again.
        let charged_idle =
            if self.energy_included || share == 1.0 { Maybe::Value(0.0) } else { idle.clone() };
        let charged_busy = if self.energy_included { 0.0 } else { per_hour(it_w) };
        let both = |a: &Maybe<f64>, b: &Maybe<f64>, join: &dyn Fn(f64, f64) -> f64| {
            a.as_ref().zip(b.as_ref()).map(|(a, b)| join(*a, *b))
        };
        let mtok_per_hour = rate * SECONDS_PER_HOUR / 1e6;
        let revenue = self.site.money.price_per_mtok.and_then(|price| price.value().to_f64());
        let break_even = match revenue {
            None => Maybe::missing("no_price_per_mtok"),
            Some(price) => {
                let share = both(&fixed, &charged_idle, &|fixed, idle| {
                    (fixed + idle) / (price * mtok_per_hour - charged_busy + idle)
                });
                match share {
                    Maybe::Value(share) if share > 0.0 && share <= e.availability => {
                        Maybe::Value(share / e.availability)
                    }
                    Maybe::Value(_) => Maybe::missing("never"),
                    missing => missing,
                }
            }
        };
        let per_mtok = |fixed: f64, idle: f64| {
            (fixed / share + charged_busy + (1.0 - share) / share * idle) / mtok_per_hour
        };
        MoneyFlow {
            per_mtok: both(&fixed, &charged_idle, &per_mtok),
            cash_per_mtok: both(&cash, &charged_idle, &per_mtok),
            marginal_per_mtok: idle.map(|idle| (per_hour(it_w) - idle).max(0.0) / mtok_per_hour),
            idle_tax_per_hour: both(&fixed, &charged_idle, &|fixed, idle| {
                gpus * (1.0 - share) * (fixed + idle)
            }),
            mean_w: match e.idle_it_w {
                Some(idle_w) => Maybe::Value(share * it_w + (1.0 - share) * idle_w),
                None if share == 1.0 => Maybe::Value(it_w),
                None => Maybe::missing("idle_power_unknown"),
            },
            break_even,
        }
    }

    /// GPUs that work on each step of the site's ramp: as many as its power feeds.
    fn ramp_gpus(&self, estimate: &Estimate) -> Vec<f64> {
        let steps = self.site.power.ramp.iter();
        steps.map(|step| self.whole_replicas(self.supported(estimate, step.mw))).collect()
    }

    /// Output tokens per day of each step of the site's ramp, at the rate of an outcome of the same inputs.
    pub(super) fn ramp_tokens_per_day(&self, e: &Estimate, outcome: &Outcome) -> Vec<f64> {
        let per_gpu = outcome.output_tokens_per_s_per_gpu * e.utilization * e.availability * SECONDS_PER_DAY;
        self.ramp_gpus(e).into_iter().map(|gpus| gpus * per_gpu).collect()
    }

    /// The site's ramp, each step filled as far as power goes.
    pub(super) fn ramp(&self, e: &Estimate, outcome: &Outcome, intervals: &[Interval]) -> Vec<RampPoint> {
        let (gpus, tokens) = (self.ramp_gpus(e), self.ramp_tokens_per_day(e, outcome));
        let steps = self.site.power.ramp.iter().zip(gpus).zip(tokens).zip(intervals);
        steps
            .map(|(((step, gpus), output_tokens_per_day), interval)| RampPoint {
                date: step.date.clone(),
                mw: step.mw,
                gpus,
                output_tokens_per_day,
                output_tokens_per_day_interval: *interval,
            })
            .collect()
    }

    /// The site at tenths of full use, with the rate, power and GPUs of an outcome of the same inputs.
    pub(super) fn load_curve(&self, estimate: &Estimate, outcome: &Outcome) -> Vec<LoadPoint> {
        (1..=10)
            .map(|tenth| {
                let utilization = f64::from(tenth) / 10.0;
                let moved = Estimate { utilization, ..estimate.clone() };
                let (rate, it_w) = (outcome.output_tokens_per_s_per_gpu, outcome.it_w_per_gpu);
                let money = self.money(&moved, rate, it_w, outcome.gpus);
                LoadPoint {
                    utilization,
                    cost_per_mtok_output: money.per_mtok,
                    cash_cost_per_mtok_output: money.cash_per_mtok,
                    marginal_cost_per_mtok_output: money.marginal_per_mtok,
                    idle_tax_per_hour: money.idle_tax_per_hour,
                    intervals: Intervals::new(),
                }
            })
            .collect()
    }

    /// A replica at powers of two up to the operating point.
    pub(super) fn concurrency_curve(&self, estimate: &Estimate) -> Vec<Curve> {
        let Some(most) = self.point.concurrency else { return Vec::new() };
        let powers = (0..31).map(|power| f64::from(1_u32 << power)).take_while(|value| *value < most);
        let laws = self.service.best();
        let mix = &self.site.demand.mix;
        let mut before: Option<(f64, f64)> = None;
        let mut curve = Vec::new();
        for concurrency in powers.chain([most]) {
            let seconds = self.service.replica_seconds(&laws, concurrency, mix);
            let joules =
                self.service.replica_joules(&laws, concurrency, mix).filter(|_| !estimate.transferred);
            let (rate, watts) = (1.0 / seconds, joules.map(|joules| joules / seconds));
            let marginal = watts
                .zip(before)
                .map(|(watts, (rate_before, watts_before))| (watts - watts_before) / (rate - rate_before));
            before = watts.map(|watts| (rate, watts));
            let known =
                |value: Option<f64>| value.map_or(Maybe::missing("energy_not_measured"), Maybe::Value);
            curve.push(Curve {
                concurrency,
                tpot_ms: mix
                    .iter()
                    .map(|shape| self.service.seconds(&laws, concurrency, shape))
                    .fold(0.0, f64::max)
                    / estimate.throughput_ratio
                    * 1e3,
                output_tokens_per_s_per_gpu: rate * estimate.throughput_ratio / self.gpus_per_replica,
                board_j_per_output_token: known(joules),
                marginal_board_j_per_output_token: known(marginal),
            });
        }
        curve
    }

    /// Each ranged input alone at both ends, and the calibration at its 5 % and 95 %; the one that moves the cost most first.
    pub(super) fn sensitivities(
        &self,
        estimate: &Estimate,
        laws: &DrawnLaws,
        ends: [&DrawnLaws; 2],
    ) -> Vec<Sensitivity> {
        let at = |input: &Input, value: f64| {
            let mut moved = estimate.clone();
            *(input.place)(&mut moved) = value;
            self.outcome(&moved, laws)
        };
        let of = |input: &Input| {
            let Span { min, max } = input.span;
            sensitivity(input.name, [min, max], [at(input, min), at(input, max)])
        };
        let mut found: Vec<Sensitivity> = self.inputs(estimate).iter().map(of).collect();
        let best_s = self.replica_seconds(laws);
        let shares = ends.map(|laws| best_s / self.replica_seconds(laws));
        if shares[0] < shares[1] {
            found.push(sensitivity(CALIBRATION, shares, ends.map(|laws| self.outcome(estimate, laws))));
        }
        let swing = |sensitivity: &Sensitivity| match (&sensitivity.cost_at_low, &sensitivity.cost_at_high) {
            (Maybe::Value(low), Maybe::Value(high)) => (high - low).abs(),
            _ => (sensitivity.tokens_per_day_at_high - sensitivity.tokens_per_day_at_low).abs(),
        };
        found.sort_by(|a, b| swing(b).total_cmp(&swing(a)));
        found
    }
}

fn sensitivity(input: &'static str, [low, high]: [f64; 2], [at_low, at_high]: [Outcome; 2]) -> Sensitivity {
    Sensitivity {
        input,
        low,
        high,
        cost_at_low: at_low.cost_per_mtok_output,
        cost_at_high: at_high.cost_per_mtok_output,
        tokens_per_day_at_low: at_low.output_tokens_per_day,
        tokens_per_day_at_high: at_high.output_tokens_per_day,
    }
}

/// Cost and energy over time.
struct MoneyFlow {
    per_mtok: Maybe<f64>,
    cash_per_mtok: Maybe<f64>,
    marginal_per_mtok: Maybe<f64>,
    idle_tax_per_hour: Maybe<f64>,
    mean_w: Maybe<f64>,
    break_even: Maybe<f64>,
}

/// Prompt tokens for each output token over the mix.
fn prompt_tokens_per_output_token(site: &Site) -> f64 {
    let sum = |pick: fn(&super::site::Shape) -> u32| -> f64 {
        site.demand.mix.iter().map(|shape| shape.share * f64::from(pick(shape))).sum()
    };
    sum(|shape| shape.isl) / sum(|shape| shape.osl)
}
