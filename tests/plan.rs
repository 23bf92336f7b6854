//! `plan` against paper and pencil, against the shipped sites, and against sites that cannot be.

#![allow(clippy::unwrap_used)]

#[path = "common/planted.rs"]
mod planted;
#[path = "common/program.rs"]
mod program;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use planted::{LINEAR, Truth, decode_grid, prefill_grid, record};
use program::tokmeter;
use tokmeter::analysis::calibrate::{Calibration, calibrate, parse_calibration, read_calibration};
use tokmeter::analysis::plan::{Level, Outcome, Plan, PlanOptions, lint, parse_site, plan, read_site};
use tokmeter::record::Maybe;

/// Figures around an 8k/1k service on GB300: 2.12 kW all-in, 2.65 USD per GPU and hour, 70 EUR per MWh, PUE 1.2, always busy.
fn gb300_site() -> String {
    "schema = 'tokmeter-site/1'\nid = 'x'\nname = 'Example'\nas_of = '2026-11-22'\nstatus = 'example'\n\
     [power]\ncapacity_kind = 'facility'\n[power.contract_mw]\nvalue = 1.0\nsource = 's'\nconfidence = 'assumed'\n\
     [power.pue]\nvalue = 1.2\nsource = 's'\nconfidence = 'assumed'\n\
     [fleet]\ndevice = 'gb300'\nunit = 'gpu'\n[fleet.availability]\nvalue = 1.0\nsource = 's'\nconfidence = 'assumed'\n\
     [demand.utilization]\nvalue = 1.0\nsource = 's'\nconfidence = 'assumed'\n\
     [[demand.mix]]\nname = '8k/1k'\nisl = 8192\nosl = 1024\nshare = 1.0\n\
     [money]\ncurrency = 'USD'\ncost_currency = 'USD'\ncost_source = 's'\ncost_as_of = '2026-11-22'\n\
     [money.cost]\nkind = 'rental'\nprice_per_gpu_hour = '2.65'\nenergy_included = true\n\
     [money.electricity_per_mwh]\nvalue = 70.0\nsource = 's'\nconfidence = 'assumed'\n"
        .to_owned()
}

/// The same rack owned: 1.00 USD an hour and GPU, 500 W idle.
fn owned_site() -> String {
    gb300_site().replace(
        "kind = 'rental'\nprice_per_gpu_hour = '2.65'\nenergy_included = true\n",
        "kind = 'owned'\ncapex_per_server = '3153600'\ngpus_per_server = 72\nnetwork_storage_share = '0'\nlifetime_years = 5\n\
         residual_fraction = '0'\ndiscount_rate = '0'\nmaintenance_rate_per_year = '0'\nopex_per_server_hour = '0'\n\
         colo_per_kw_month = '0'\nprovisioned_kw_per_server = '0'\n",
    ) + "[fleet.idle_w_per_gpu]\nvalue = 500.0\nsource = 's'\nconfidence = 'assumed'\n"
}

/// A saturated law with one term: so many output tokens per second and GPU, whatever the load.
fn saturated(device: &str, output_tokens_per_s: f64) -> Calibration {
    let mut calibration =
        read_calibration(&repository("results/calibrations/published-gb200-llama-3.3-70b-fp4.json")).unwrap();
    calibration.subject.device = device.to_owned();
    let law = &mut calibration.laws[0].law;
    law.coefficients.truncate(1);
    law.coefficients[0].value = 1.0 / output_tokens_per_s;
    law.without_one.iter_mut().for_each(|values| *values = vec![1.0 / output_tokens_per_s]);
    law.errors_without_one.iter_mut().for_each(|error| *error = 0.0);
    calibration
}

fn planned(text: &str, settings: &[&str], calibration: &Calibration) -> Plan {
    let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    let site = parse_site(text, &settings).unwrap();
    plan(&site, calibration, &PlanOptions { draws: 200, ..PlanOptions::default() }).unwrap()
}

fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found / expected - 1.0).abs() < tolerance, "{found}, expected {expected}");
}

fn value(maybe: &Maybe<f64>) -> f64 {
    *maybe.value().unwrap_or_else(|| panic!("{maybe:?}"))
}

#[test]
fn the_gb300_example_comes_out_as_by_hand() {
    // 6,182 total tokens per second and GPU at 8k/1k: a ninth of them is output.
    let calibration = saturated("gb300", 6182.0 / 9.0);
    let outcome = planned(&gb300_site(), &[], &calibration).outcome;
    // 6182 / 2.12 kW = 2.916 M/s per MW; 2120 / 6182 = 0.3429 J; 2.65 / (3600 · 6182) · 10⁶ = 0.11907.
    close(outcome.total_tokens_per_s_per_it_mw, 2.916e6, 1e-3);
    close(outcome.it_j_per_total_token, 0.3429, 1e-3);
    close(value(&outcome.cost_per_mtok_total), 0.11907, 1e-3);
    // 2.12 kW · 1.2 · 0.07 / (3600 · 6182) · 10⁶ = 0.0080 per total token, nine times that per output token.
    close(value(&outcome.energy_cost_per_mtok_output) / 9.0, 0.008_002, 1e-3);
    close(outcome.it_j_per_output_token, 3.086, 1e-3);
    // 10⁶ W / (1.2 · 2120 W) = 393.08: 393 GPUs, and 393 · 686.9 · 86400 tokens a day.
    assert_eq!((outcome.gpus, outcome.fleet_constraint), (393.0, "power"));
    close(outcome.output_tokens_per_day, 393.0 * 686.888_9 * 86_400.0, 1e-6);
    // Of 70 EUR per MWh, 0.008 EUR is in a million tokens, whatever the machines are paid in.
    let euros = gb300_site().replacen("currency = 'USD'", "currency = 'EUR'", 1)
        + "[money.fx.EUR]\nrate = '0.92'\nas_of = '2026-11-22'\n";
    let outcome = planned(&euros, &[], &calibration).outcome;
    close(value(&outcome.energy_cost_per_mtok_output) / 9.0, 0.008_002, 1e-3);
    close(value(&outcome.cost_per_mtok_total), 0.11907 * 0.92, 1e-3);
    // NVIDIA's own: 2.65 USD and 6,000 tokens per second make 0.12 USD.
    let outcome = planned(&gb300_site(), &[], &saturated("gb300", 6000.0 / 9.0)).outcome;
    close(value(&outcome.cost_per_mtok_total), 0.1227, 1e-3);
}

#[test]
fn each_figure_moves_what_it_should_and_nothing_else() {
    let calibration = saturated("gb300", 600.0);
    let base = planned(&gb300_site(), &[], &calibration).outcome;
    let set = |setting: &str| planned(&gb300_site(), &[setting], &calibration).outcome;
    let pue = set("power.pue=1.5");
    close(pue.facility_j_per_output_token, base.facility_j_per_output_token * 1.25, 1e-12);
    assert_eq!(pue.it_j_per_output_token, base.it_j_per_output_token);
    assert_eq!(pue.cost_per_mtok_output, base.cost_per_mtok_output);
    close(value(&pue.energy_cost_per_mtok_output), value(&base.energy_cost_per_mtok_output) * 1.25, 1e-9);
    assert_eq!(pue.gpus, 314.0); // floor(10⁶ / (1.5 · 2120))
    let price = set("money.electricity_per_mwh=140.0");
    close(value(&price.energy_cost_per_mtok_output), value(&base.energy_cost_per_mtok_output) * 2.0, 1e-9);
    assert_eq!(price.output_tokens_per_day, base.output_tokens_per_day);
    let half = set("demand.utilization=0.5");
    close(half.output_tokens_per_day, base.output_tokens_per_day / 2.0, 1e-12);
    close(value(&half.cost_per_mtok_output), value(&base.cost_per_mtok_output) * 2.0, 1e-9);
    assert_eq!(half.output_tokens_per_s_per_it_mw, base.output_tokens_per_s_per_it_mw);
    // An idle power that nobody gave is not made up; one that is given counts.
    assert_eq!(half.facility_mwh_per_year.reason(), Some("idle_power_unknown"));
    let euros = gb300_site().replacen("currency = 'USD'", "currency = 'EUR'", 1)
        + "[money.fx.EUR]\nrate = '0.5'\nas_of = '2026-11-22'\n";
    let euros = planned(&euros, &[], &calibration).outcome;
    close(value(&euros.cost_per_mtok_output), value(&base.cost_per_mtok_output) * 0.5, 1e-9);
    assert_eq!(euros.energy_cost_per_mtok_output, base.energy_cost_per_mtok_output);
}

/// Names of the outputs that differ.
fn moved(a: &Outcome, b: &Outcome) -> BTreeSet<String> {
    let fields = |outcome: &Outcome| serde_json::to_value(outcome).unwrap().as_object().unwrap().clone();
    let (a, b) = (fields(a), fields(b));
    a.into_iter().filter(|(name, value)| b[name] != *value).map(|(name, _)| name).collect()
}

#[test]
fn what_a_figure_does_not_touch_stays_the_same_to_the_bit() {
    let calibration = saturated("gb300", 600.0);
    // Owned, fewer than the power feeds, idle at a known power, sold at a price: every output has a value that could move.
    let site = owned_site().replace("[money.cost]", "price_per_mtok = '1.0'\n[money.cost]")
        + "[fleet.count]\nvalue = 144.0\nsource = 's'\nconfidence = 'assumed'\n[money.fx.EUR]\nrate = '0.5'\nas_of = '2026-11-22'\n";
    let base = planned(&site, &["demand.utilization=0.5"], &calibration).outcome;
    let set = |setting: &str| {
        let settings = ["demand.utilization=0.5", setting];
        moved(&base, &planned(&site, &settings, &calibration).outcome)
    };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>();
    let costs = [
        "cost_per_mtok_output",
        "cost_per_mtok_total",
        "cash_cost_per_mtok_output",
        "energy_cost_per_mtok_output",
        "marginal_cost_per_mtok_output",
        "idle_tax_per_hour",
        "break_even_utilization",
    ];
    let of_the_site = [
        "gpus_supported_by_power",
        "output_tokens_per_s_per_facility_mw",
        "facility_j_per_output_token",
        "facility_mw",
        "facility_mwh_per_year",
    ];
    assert_eq!(set("money.electricity_per_mwh=90.0"), names(&costs));
    assert_eq!(set("power.pue=1.5"), names(&[&costs[..], &of_the_site].concat()));
    let of_time = [
        "output_tokens_per_s",
        "output_tokens_per_day",
        "input_tokens_per_day",
        "output_tokens_per_year",
        "facility_mwh_per_year",
        "cost_per_mtok_output",
        "cost_per_mtok_total",
        "cash_cost_per_mtok_output",
        "idle_tax_per_hour",
    ];
    assert_eq!(set("demand.utilization=0.8"), names(&of_time));
    assert_eq!(set("power.contract_mw=2.0"), names(&["gpus_supported_by_power"]));
    // The machines' price in dollars at half a euro; the electricity's is in the currency of the results already.
    let euros = site.replacen("currency = 'USD'", "currency = 'EUR'", 1);
    let euros = planned(&euros, &["demand.utilization=0.5"], &calibration).outcome;
    let of_the_rate =
        ["cost_per_mtok_output", "cost_per_mtok_total", "idle_tax_per_hour", "break_even_utilization"];
    assert_eq!(moved(&base, &euros), names(&of_the_rate));
}

#[test]
fn maintenance_is_paid_in_cash_and_the_network_parts_node_from_it() {
    let calibration = saturated("gb300", 1000.0);
    let site = owned_site().replace("maintenance_rate_per_year = '0'", "maintenance_rate_per_year = '0.1'")
        + "[fleet.network_w_per_gpu]\nvalue = 120.0\nsource = 's'\nconfidence = 'assumed'\n";
    let outcome = planned(&site, &["demand.utilization=0.5"], &calibration).outcome;
    // 0.1 · 3153600 / (72 · 8760 h) = 0.50 an hour, over half of the hours; what is written off is not paid again.
    close(value(&outcome.cash_cost_per_mtok_output), (0.5 / 0.5 + 0.17808 + 0.042) / 3.6, 1e-5);
    close(value(&outcome.cost_per_mtok_output), (1.5 / 0.5 + 0.17808 + 0.042) / 3.6, 1e-5);
    assert_eq!(value(&outcome.node_w_per_gpu), 2000.0);
    close(value(&outcome.output_tokens_per_s_per_node_mw), 0.5e6, 1e-12);
    close(value(&outcome.node_j_per_output_token), 2.0, 1e-12);
    let site = parse_site(&site, &["fleet.network_w_per_gpu=900.0".to_owned()]).unwrap();
    let refusal = plan(&site, &calibration, &PlanOptions::default()).unwrap_err().to_string();
    assert!(refusal.contains("fleet.network_w_per_gpu is 900, expected at most the 720 W"), "{refusal}");
}

#[test]
fn a_curve_over_utilisation_agrees_with_the_plan_at_its_points_and_the_calibration_is_a_sensitivity() {
    let calibration = composed(0.03);
    let site = b200_site() + "[fleet.idle_w_per_gpu]\nvalue = 400.0\nsource = 's'\nconfidence = 'assumed'\n";
    let at =
        |utilization: &str| planned(&site, &[&format!("demand.utilization={utilization}")], &calibration);
    let (half, full) = (at("0.5"), at("1.0"));
    for (plan, tenth) in [(&half, 5), (&full, 10)] {
        let point = &plan.load_curve[tenth - 1];
        close(value(&point.cost_per_mtok_output), value(&plan.outcome.cost_per_mtok_output), 1e-9);
        close(value(&point.cash_cost_per_mtok_output), value(&plan.outcome.cash_cost_per_mtok_output), 1e-9);
        // No figure of the site has a range, so at this utilisation the draws are the same.
        assert_eq!(point.intervals["cost_per_mtok_output"], plan.intervals["cost_per_mtok_output"]);
    }
    let found = full.sensitivities.iter().find(|found| found.input == "calibration").unwrap();
    let interval = full.intervals["output_tokens_per_s_per_gpu"];
    let best = full.outcome.output_tokens_per_s_per_gpu;
    close(found.low, interval.p05 / best, 5e-3);
    close(found.high, interval.p95 / best, 5e-3);
    close(found.tokens_per_day_at_high / full.outcome.output_tokens_per_day, found.high, 1e-9);
}

#[test]
fn every_formula_of_an_explanation_gives_the_number_that_it_ends_with() {
    let site = owned_site().replace("[money.cost]", "price_per_mtok = '1.0'\n[money.cost]");
    let plan = planned(&site, &["demand.utilization=0.5"], &saturated("gb300", 1000.0));
    let outcome = &plan.outcome;
    let numbers = [
        ("cost per Mtok output, full", value(&outcome.cost_per_mtok_output)),
        ("cost per Mtok output, cash", value(&outcome.cash_cost_per_mtok_output)),
        ("energy cost per Mtok output", value(&outcome.energy_cost_per_mtok_output)),
        ("marginal cost per Mtok output", value(&outcome.marginal_cost_per_mtok_output)),
        ("break-even utilisation", value(&outcome.break_even_utilization)),
        ("MWh per year", value(&outcome.facility_mwh_per_year)),
        ("output tok/day", outcome.output_tokens_per_day),
        ("GPUs = whole replicas", outcome.gpus),
    ];
    for (name, number) in numbers {
        let line =
            plan.explanation.iter().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
        let end = line.rsplit(" = ").next().unwrap().split(' ').next().unwrap();
        close(end.parse().unwrap(), number, 1e-3);
    }
    // Those of the cost can be typed into a calculator: (1 / 0.5 + 0.17808 + 0.042 · 1) / 3.6.
    let full = plan.explanation.iter().find(|line| line.starts_with("cost per Mtok output, full")).unwrap();
    assert!(
        full.contains("(1.000000 / 0.5000 + 0.178080 + 0.042000 · 1.0000) / 3.600000 = 0.61669 USD"),
        "{full}"
    );
}

#[test]
fn an_owned_rack_pays_for_its_idle_hours_and_breaks_even_where_it_should() {
    let with_price = owned_site().replace("[money.cost]", "price_per_mtok = '1.0'\n[money.cost]");
    let outcome = planned(&with_price, &["demand.utilization=0.5"], &saturated("gb300", 1000.0)).outcome;
    // 3153600 / (72 · 5 · 8760 h) = 1.00 an hour; busy 2.12 · 1.2 · 0.07 = 0.17808, idle 0.5 · 1.2 · 0.07 = 0.042.
    // At half: (1 / 0.5 + 0.17808 + 0.042) / 3.6 Mtok = 0.616689.
    close(value(&outcome.cost_per_mtok_output), 0.616_689, 1e-5);
    close(value(&outcome.cash_cost_per_mtok_output), (0.17808 + 0.042) / 3.6, 1e-5);
    close(value(&outcome.marginal_cost_per_mtok_output), (0.17808 - 0.042) / 3.6, 1e-5);
    close(value(&outcome.idle_tax_per_hour), outcome.gpus * 0.5 * 1.042, 1e-9);
    // Where 1.00 per Mtok pays: (1 + 0.042) / (3.6 − 0.17808 + 0.042).
    close(value(&outcome.break_even_utilization), 1.042 / 3.463_92, 1e-6);
    close(value(&outcome.facility_mwh_per_year), outcome.gpus * (0.5 * 2.12 + 0.5 * 0.5) * 1.2 * 8.76, 1e-9);
}

#[test]
fn binary_and_decimal_money_agree() {
    for site in ["nvl72-gb200", "germany-industrial-ai-cloud"] {
        let path = repository(&format!("sites/{site}.toml"));
        let site = read_site(&path, &["demand.utilization=0.5".to_owned()]).unwrap();
        let calibration = read_calibration(&repository(site.calibration.as_ref().unwrap())).unwrap();
        let plan = plan(&site, &calibration, &PlanOptions { draws: 20, ..PlanOptions::default() }).unwrap();
        assert_eq!(plan.load_curve[4].utilization, 0.5);
        close(
            value(&plan.outcome.cost_per_mtok_output),
            value(&plan.load_curve[4].cost_per_mtok_output),
            1e-9,
        );
    }
}

/// Measured laws of time and energy for one device, fitted to records of a known machine.
fn composed(noise: f64) -> Calibration {
    let cells = [decode_grid(), prefill_grid()].concat();
    calibrate(&[record(&Truth { noise, ..LINEAR }, &cells)], Vec::new()).unwrap()
}

fn b200_site() -> String {
    gb300_site().replace("gb300", "b200").replace("isl = 8192\nosl = 1024", "isl = 512\nosl = 512")
}

#[test]
fn measured_laws_give_the_operating_point_its_promise_and_its_energy() {
    let calibration = composed(0.0);
    let promise = b200_site() + "[demand.slo]\ntpot_ms = 2500.0\n";
    let outcome = planned(&promise, &[], &calibration).outcome;
    // TPOT(c) = 0.04 + c (0.005 + 4e-6 · 768 + t_prefill(512) / 512), t_prefill = 0.03 + 2.048 + 0.131328 s:
    // 0.04 + c · 0.012387: below 2.5 s up to a batch of 198, beyond the 32 that were learnt from.
    assert_eq!((outcome.concurrency.clone(), outcome.replica_constraint), (Maybe::Value(32.0), "domain"));
    let tpot_s = 0.04 + 32.0 * (0.005 + 4e-6 * 768.0 + 2.209_328 / 512.0);
    close(value(&outcome.tpot_ms), tpot_s * 1e3, 1e-4);
    close(outcome.output_tokens_per_s_per_gpu, 32.0 / tpot_s, 1e-4);
    // Joules: (8 + 0.5 c + 2e-4 · 768 c) / c + (6 + 0.3 · 512 + 5e-5 · 131328) / 512; board at most 1000 W.
    let joules = 8.0 / 32.0 + 0.5 + 2e-4 * 768.0 + (6.0 + 153.6 + 6.5664) / 512.0;
    close(value(&outcome.board_j_per_output_token), joules, 1e-3);
    close(outcome.it_w_per_gpu, joules * 32.0 / tpot_s + 710.0, 1e-3);
    let promise = b200_site() + "[demand.slo]\ntpot_ms = 165.0\n";
    let outcome = planned(&promise, &[], &calibration).outcome;
    assert_eq!((outcome.concurrency.clone(), outcome.replica_constraint), (Maybe::Value(10.0), "slo"));
    let mut little_memory = calibration;
    little_memory.subject.kv_tokens_held = Maybe::Value(5 * 1024);
    let outcome = planned(&b200_site(), &[], &little_memory).outcome;
    assert_eq!((outcome.concurrency.clone(), outcome.replica_constraint), (Maybe::Value(5.0), "kv"));
}

#[test]
fn far_demands_are_refused_near_ones_flagged_and_both_are_wider() {
    let calibration = composed(0.02);
    let site =
        |isl: u32| parse_site(&b200_site().replace("isl = 512", &format!("isl = {isl}")), &[]).unwrap();
    let options = PlanOptions { draws: 500, ..PlanOptions::default() };
    let inside = plan(&site(400), &calibration, &options).unwrap();
    assert!(!inside.extrapolated);
    let error = plan(&site(4000), &calibration, &options).unwrap_err().to_string();
    assert!(
        error.contains("as far out as what the calibration learnt from") && error.contains("hint:"),
        "{error}"
    );
    let allowed =
        plan(&site(4000), &calibration, &PlanOptions { allow_extrapolation: true, ..options }).unwrap();
    assert!(allowed.extrapolated && allowed.flags.iter().any(|flag| flag.starts_with("extrapolated")));
    let near = plan(&site(600), &calibration, &options).unwrap();
    assert!(near.extrapolated);
    let width = |plan: &Plan| {
        let interval = plan.intervals["output_tokens_per_s_per_gpu"];
        (interval.p95 - interval.p05) / interval.p50
    };
    assert!(width(&near) > 1.5 * width(&inside), "{} {}", width(&near), width(&inside));
}

#[test]
fn a_calibration_of_another_device_needs_a_stated_transfer() {
    let site = parse_site(&gb300_site(), &[]).unwrap();
    let gb200 = saturated("gb200", 600.0);
    let options = PlanOptions { draws: 500, ..PlanOptions::default() };
    let error = plan(&site, &gb200, &options).unwrap_err().to_string();
    assert!(error.contains("of gb200, the site has gb300"), "{error}");
    let stated = gb300_site()
        + "[device_transfer]\nfrom = 'gb200'\nto = 'gb300'\nthroughput_ratio = 1.5\nuncertainty_share = 0.2\nbasis = 'b'\n";
    let moved = plan(&parse_site(&stated, &[]).unwrap(), &gb200, &options).unwrap();
    close(moved.outcome.output_tokens_per_s_per_gpu, 900.0, 1e-9);
    let interval = moved.intervals["output_tokens_per_s_per_gpu"];
    // Triangular over 720 to 1080: 5 % and 95 % lie √0.05 / 2 of the width from its ends.
    close(interval.p05, 720.0 + 360.0 * (0.05_f64 / 2.0).sqrt(), 0.02);
    close(interval.p95, 1080.0 - 360.0 * (0.05_f64 / 2.0).sqrt(), 0.02);
}

#[test]
fn one_seed_gives_one_plan() {
    let calibration = composed(0.03);
    let site = parse_site(&b200_site(), &[]).unwrap();
    let with = |seed| {
        plan(&site, &calibration, &PlanOptions { draws: 300, seed, ..PlanOptions::default() }).unwrap()
    };
    assert_eq!(serde_json::to_string(&with(3)).unwrap(), serde_json::to_string(&with(3)).unwrap());
    assert_ne!(with(3).intervals, with(4).intervals);
}

#[test]
fn every_shipped_site_is_planned_from_a_clone_within_a_second_and_contradicts_nothing() {
    let mut count = 0;
    for path in sites() {
        let site = read_site(&path, &[]).unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(Some(site.id.as_str()), path.file_stem().and_then(|stem| stem.to_str()));
        let errors: Vec<_> =
            lint(&site).into_iter().filter(|finding| finding.level == Level::Error).collect();
        assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        let calibration = read_calibration(&repository(site.calibration.as_ref().unwrap())).unwrap();
        let clock = tokmeter::clock::Clock::monotonic();
        let begin_ns = clock.now_ns();
        let plan = plan(&site, &calibration, &PlanOptions::default())
            .unwrap_or_else(|error| panic!("{}: {error}", site.id));
        let seconds = (clock.now_ns() - begin_ns) as f64 / 1e9;
        assert!(seconds < 1.0, "{}: {seconds} s", site.id);
        assert!(plan.flags[0].contains("grade C"), "{:?}", plan.flags);
        for (name, interval) in &plan.intervals {
            assert!(interval.p05 <= interval.p50 && interval.p50 <= interval.p95, "{}: {name}", site.id);
        }
        let day = plan.intervals["output_tokens_per_day"];
        assert!(day.p05 < plan.outcome.output_tokens_per_day && plan.outcome.output_tokens_per_day < day.p95);
        count += 1;
    }
    assert!(count >= 11, "{count}");
}

#[test]
fn the_lint_refutes_terabits_and_eighteen_thousand_superchips() {
    let folder = tempfile::tempdir().unwrap();
    let path = repository("sites/mistral-compute-bruyeres.toml");
    let done = tokmeter(folder.path(), &["plan", "--lint", path.to_str().unwrap()]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(
        done.stdout.contains("129.6 TB/s, which are 1037 Tbit/s, not 130 Tbit/s: bytes were meant"),
        "{}",
        done.stdout
    );
    assert!(
        done.stdout.contains("1111 W for each, below the 1400 W of the board alone: impossible"),
        "{}",
        done.stdout
    );
    let superchips = ["--set", "fleet.count=18000.0", "--set", "fleet.unit=superchip"];
    let done =
        tokmeter(folder.path(), &[&["plan"], &superchips[..], &["--lint", path.to_str().unwrap()]].concat());
    assert_eq!(done.code, Some(1), "{}", done.stdout);
    assert!(done.stdout.contains("error: the site: 44 MW over 36000 gb300 GPUs"), "{}", done.stdout);
}

#[test]
fn sites_that_cannot_be_are_refused_in_a_sentence() {
    let good = gb300_site();
    let cases = [
        (
            good.replace("capacity_kind = 'facility'", "capacity_knd = 'facility'"),
            "hint: capacity_kind was probably meant",
        ),
        (
            good.replace("[fleet.availability]", "[fleet.availabilty]"),
            "hint: availability was probably meant",
        ),
        (
            good.replace("[fleet.availability]\nvalue = 1.0\nsource = 's'\nconfidence = 'assumed'\n", ""),
            "missing field `availability`",
        ),
        (
            good.replace("[power.contract_mw]\nvalue = 1.0", "[power.contract_mw]\nvalue = -5.0"),
            "power.contract_mw is -5",
        ),
        (good.replace("value = 1.2", "value = 7.0"), "power.pue is 7, expected 1 to 3"),
        (good.replace("value = 1.2", "value = 1.2\nmin = 1.3\nmax = 1.4"), "outside its own range"),
        (good.replace("value = 1.2", "value = nan"), "power.pue is NaN"),
        // Watts for megawatts, per cent for shares, milliseconds for what has no unit.
        (
            good.replace("[power.contract_mw]\nvalue = 1.0", "[power.contract_mw]\nvalue = 44e6"),
            "power.contract_mw is 44000000, expected 0.001 to 100000",
        ),
        (
            good.replace("[fleet.availability]\nvalue = 1.0", "[fleet.availability]\nvalue = 98.0"),
            "fleet.availability is 98, expected 0.01 to 1",
        ),
        (
            good.replace("[demand.utilization]\nvalue = 1.0", "[demand.utilization]\nvalue = 66.0"),
            "demand.utilization is 66, expected 0.01 to 1",
        ),
        (good.clone() + "[demand.slo]\ntpot_ms = 0.0\n", "demand.slo is 0"),
        (good.replace("value = 1.2", "value = '1.2'"), "invalid type"),
        (good.replace("'gb300'", "'gb301'"), "fleet.device is 'gb301', expected one of"),
        (good.replace("'gpu'", "'chip'"), "unknown variant `chip`"),
        (good.replace("share = 1.0", "share = 0.7"), "shares that make 0.7"),
        (good.replace("'USD'", "'DOLLAR'"), "no currency code"),
        (good.replace("'2.65'", "2.65"), "expected a string"),
        (good.replace("site/1", "site/2"), "schema is 'tokmeter-site/2'"),
    ];
    for (text, reason) in cases {
        let error = format!("{:#}", parse_site(&text, &[]).expect_err(reason));
        assert!(error.contains(reason), "{error}\nexpected {reason}");
        let sentences = error.lines().filter(|line| !line.starts_with("hint: ")).count();
        assert_eq!(sentences, 1, "{error}");
    }
    let high = parse_site(&good, &["power.pue=2.5".to_owned()]).unwrap();
    assert!(
        lint(&high)
            .iter()
            .any(|found| found.level == Level::Error && found.text.starts_with("power.pue is 2.5"))
    );
    let cheap = parse_site(&good, &["money.electricity_per_mwh=0.07".to_owned()]).unwrap();
    assert!(
        lint(&cheap)
            .iter()
            .any(|found| found.text.contains("0.07 USD per MWh") && found.text.contains("kWh"))
    );
    for (setting, reason) in [
        ("power.pue", "expected key=value"),
        ("power.peu=1.3", "the site has no peu"),
        ("pwr.pue=1.3", "the site has no table pwr"),
        ("power.pue=9.0", "power.pue is 9"),
    ] {
        let error = format!("{:#}", parse_site(&good, &[setting.to_owned()]).expect_err(setting));
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn the_program_plans_explains_and_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let site = repository("sites/nvl72-gb200.toml");
    let site = site.to_str().unwrap();
    let done =
        tokmeter(folder.path(), &["plan", "--site", site, "--explain", "--draws", "100", "--out", "p.json"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    for words in [
        "grade C",
        "output tok/day",
        "tok/s per MW, facility",
        "idle tax",
        "p05",
        "with numbers",
        "GPUs fed = floor(",
    ] {
        assert!(done.stdout.contains(words), "{words} is not in\n{}", done.stdout);
    }
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("p.json")).unwrap()).unwrap();
    assert_eq!((json["schema"].as_str(), json["grade"].as_str()), (Some("tokmeter-plan/1"), Some("C")));
    let other = repository("results/calibrations/published-h100-llama-3.3-70b-fp8.json");
    let refused =
        tokmeter(folder.path(), &["plan", "--site", site, "--calibration", other.to_str().unwrap()]);
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(1), ""));
    assert!(refused.stderr.contains("refused: the calibration is of h100"), "{}", refused.stderr);
    let typo = tokmeter(folder.path(), &["plan", "--site", site, "--set", "power.peu=1.1"]);
    assert_eq!(typo.code, Some(2), "{}", typo.stderr);
    std::fs::write(folder.path().join("bad.toml"), "schema = 3").unwrap();
    assert_eq!(tokmeter(folder.path(), &["plan", "--site", "bad.toml"]).code, Some(3));
    let good = std::fs::read_to_string(&other).unwrap();
    let record = repository("results/2026-11-23-cpu-2-cores/smollm2-135m-f32.json");
    for (text, reason) in [
        (
            good.replace("tokmeter-calibration/1", "tokmeter-calibration/2"),
            "made by another version of tokmeter",
        ),
        (std::fs::read_to_string(record).unwrap(), "it is a record"),
        (good.replace("tokmeter-calibration/1", "perf-model/3"), "it has schema perf-model/3"),
    ] {
        std::fs::write(folder.path().join("c.json"), text).unwrap();
        let done = tokmeter(folder.path(), &["plan", "--site", site, "--calibration", "c.json"]);
        assert_eq!((done.code, done.stdout.as_str()), (Some(3), ""), "{reason}");
        let sentences = done.stderr.lines().filter(|line| !line.starts_with("hint: ")).count();
        assert!(done.stderr.contains(reason) && sentences == 1, "{}", done.stderr);
    }
    let mut forged: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(other).unwrap()).unwrap();
    forged["not_a_measurement"] = "a test".into();
    assert!(parse_calibration(&forged.to_string()).is_ok());
    std::fs::write(folder.path().join("forged.json"), forged.to_string()).unwrap();
    let done = tokmeter(folder.path(), &["plan", "--site", site, "--calibration", "forged.json"]);
    assert_eq!(done.code, Some(3), "{}", done.stderr);
}

fn sites() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(repository("sites")).unwrap().map(|entry| entry.unwrap().path());
    let mut sites: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect();
    sites.sort();
    sites
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
