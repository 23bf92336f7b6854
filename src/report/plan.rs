//! A plan as text: what binds, what is made, what it takes and costs, and everything that a reader must know first.

use std::fmt::Write as _;

use super::DASH;
use crate::analysis::plan::{Finding, Interval, Plan};
use crate::record::Maybe;
use crate::units::format_significant;

/// The plan with its intervals, flags and curves; formulas at the end when asked for.
pub fn plan(plan: &Plan, explain: bool) -> String {
    let mut text = format!(
        "{} ({})\n{} on {}, {} · calibration {} · grade {}\n\n",
        plan.site, plan.site_as_of, plan.model, plan.device, plan.precision, plan.basis, plan.grade
    );
    for flag in &plan.flags {
        let _ = writeln!(text, "! {flag}");
    }
    text.push('\n');
    text.extend(outputs(plan).into_iter().map(line));
    text.push_str(&curves(plan));
    if !plan.sensitivities.is_empty() {
        let _ = writeln!(
            text,
            "\nwhat moves it                        from         to   {} per Mtok   output tok/day",
            plan.currency
        );
        for found in &plan.sensitivities {
            let _ = writeln!(
                text,
                "  {:<28} {:>10} {:>10}   {} to {}   {} to {}",
                found.input,
                format_significant(found.low),
                format_significant(found.high),
                money(&found.cost_at_low),
                money(&found.cost_at_high),
                large(found.tokens_per_day_at_low),
                large(found.tokens_per_day_at_high)
            );
        }
    }
    let _ = writeln!(text, "\n{} draws, seed {}", plan.draws, plan.seed);
    if explain {
        text.push_str("\nwith numbers\n");
        plan.explanation.iter().for_each(|line| {
            let _ = writeln!(text, "  {line}");
        });
    }
    text
}

/// One output as texts: what it is, its value or why there is none, and its percentiles.
pub(super) struct OutputRow {
    pub(super) name: String,
    pub(super) value: String,
    /// p05, p50, p95.
    pub(super) interval: Option<[String; 3]>,
}

/// Every output of a plan, in the order in which a planner asks for them.
pub(super) fn outputs(plan: &Plan) -> Vec<OutputRow> {
    let outcome = &plan.outcome;
    let currency = &plan.currency;
    let interval = |name: &str| plan.intervals.get(name).copied();
    let known = |value: f64| Maybe::Value(value);
    let plain = |value: f64| format_significant(value);
    let named = |name: &str, value: &Maybe<f64>, output: &str| row(name, value, interval(output), &plain);
    vec![
        row("GPUs fed by the power", &known(outcome.gpus_supported_by_power), None, &plain),
        named("GPUs that work", &known(outcome.gpus), "gpus"),
        row("racks", &outcome.racks, None, &plain),
        OutputRow {
            name: "what binds".to_owned(),
            value: format!(
                "{} for the fleet, {} for a replica",
                outcome.fleet_constraint, outcome.replica_constraint
            ),
            interval: None,
        },
        row("requests in a replica", &outcome.concurrency, None, &plain),
        row("time per output token, ms", &outcome.tpot_ms, None, &plain),
        row("time to first token alone, ms", &outcome.ttft_ms, None, &plain),
        named(
            "output tok/s per GPU, busy",
            &known(outcome.output_tokens_per_s_per_gpu),
            "output_tokens_per_s_per_gpu",
        ),
        row("total tok/s per GPU, busy", &known(outcome.total_tokens_per_s_per_gpu), None, &plain),
        row("output tok/s, mean", &known(outcome.output_tokens_per_s), None, &large),
        row(
            "output tok/day",
            &known(outcome.output_tokens_per_day),
            interval("output_tokens_per_day"),
            &large,
        ),
        row("input tok/day", &known(outcome.input_tokens_per_day), None, &large),
        row("output tok/year", &known(outcome.output_tokens_per_year), None, &large),
        named(
            "output tok/s per MW, boards",
            &outcome.output_tokens_per_s_per_board_mw,
            "output_tokens_per_s_per_board_mw",
        ),
        named(
            "output tok/s per MW, nodes",
            &outcome.output_tokens_per_s_per_node_mw,
            "output_tokens_per_s_per_node_mw",
        ),
        named(
            "output tok/s per MW, IT",
            &known(outcome.output_tokens_per_s_per_it_mw),
            "output_tokens_per_s_per_it_mw",
        ),
        named(
            "output tok/s per MW, facility",
            &known(outcome.output_tokens_per_s_per_facility_mw),
            "output_tokens_per_s_per_facility_mw",
        ),
        row("J per output token, boards", &outcome.board_j_per_output_token, None, &plain),
        row("J per output token, nodes", &outcome.node_j_per_output_token, None, &plain),
        row("J per output token, IT", &known(outcome.it_j_per_output_token), None, &plain),
        named(
            "J per output token, facility",
            &known(outcome.facility_j_per_output_token),
            "facility_j_per_output_token",
        ),
        named("MW of the site, busy", &known(outcome.facility_mw), "facility_mw"),
        row("MWh per year", &outcome.facility_mwh_per_year, None, &large),
        named(
            &format!("{currency} per Mtok output, full"),
            &outcome.cost_per_mtok_output,
            "cost_per_mtok_output",
        ),
        row(&format!("{currency} per Mtok total, full"), &outcome.cost_per_mtok_total, None, &plain),
        named(
            &format!("{currency} per Mtok output, cash"),
            &outcome.cash_cost_per_mtok_output,
            "cash_cost_per_mtok_output",
        ),
        row(
            &format!("{currency} per Mtok output, energy"),
            &outcome.energy_cost_per_mtok_output,
            None,
            &plain,
        ),
        named(
            &format!("{currency} per Mtok output, marginal"),
            &outcome.marginal_cost_per_mtok_output,
            "marginal_cost_per_mtok_output",
        ),
        row(&format!("idle tax, {currency} per hour"), &outcome.idle_tax_per_hour, None, &plain),
        row("break-even utilisation", &outcome.break_even_utilization, None, &plain),
    ]
}

fn row(
    name: &str,
    value: &Maybe<f64>,
    interval: Option<Interval>,
    format: &dyn Fn(f64) -> String,
) -> OutputRow {
    let value = match value {
        Maybe::Value(value) => format(*value),
        Maybe::Missing(missing) => format!("{DASH} ({})", missing.missing.replace('_', " ")),
    };
    let interval = interval.map(|interval| [interval.p05, interval.p50, interval.p95].map(format));
    OutputRow { name: name.to_owned(), value, interval }
}

/// A name, a value, its interval.
fn line(row: OutputRow) -> String {
    let interval = row.interval.map_or(String::new(), |interval| format!("   {}", interval.join(" · ")));
    format!("{:<36} {}{interval}\n", row.name, row.value)
}

fn curves(plan: &Plan) -> String {
    let mut text = String::from("   (value   p05 · p50 · p95)\n");
    if !plan.ramp.is_empty() {
        text.push_str(
            "\nramp, filled with this device     MW       GPUs   output tok/day   p05 · p50 · p95\n",
        );
        for step in &plan.ramp {
            let _ = writeln!(
                text,
                "  {:<26} {:>9} {:>10}   {:<14}   {}",
                step.date,
                format_significant(step.mw),
                format_significant(step.gpus),
                large(step.output_tokens_per_day),
                percentiles(&step.output_tokens_per_day_interval).join(" · ")
            );
        }
    }
    let _ = writeln!(
        text,
        "\nutilisation   {0} per Mtok       cash   marginal   idle tax, {0} per hour",
        plan.currency
    );
    for point in &plan.load_curve {
        let _ = writeln!(
            text,
            "  {:>4.0} %       {:>10} {:>10} {:>10}   {}",
            point.utilization * 100.0,
            money(&point.cost_per_mtok_output),
            money(&point.cash_cost_per_mtok_output),
            money(&point.marginal_cost_per_mtok_output),
            money(&point.idle_tax_per_hour)
        );
    }
    if !plan.concurrency_curve.is_empty() {
        text.push_str("\nrequests at once   ms per token   output tok/s per GPU   board J per token\n");
        for point in &plan.concurrency_curve {
            let _ = writeln!(
                text,
                "  {:>10} {:>16} {:>20}   {}",
                point.concurrency,
                format_significant(point.tpot_ms),
                format_significant(point.output_tokens_per_s_per_gpu),
                money(&point.board_j_per_output_token)
            );
        }
    }
    text
}

pub(super) fn money(value: &Maybe<f64>) -> String {
    value.value().map_or(DASH.to_owned(), |value| format_significant(*value))
}

/// p05, p50, p95 of large counts.
pub(super) fn percentiles(interval: &Interval) -> [String; 3] {
    [interval.p05, interval.p50, interval.p95].map(large)
}

/// Large counts with an exponent, which readers of 10¹² prefer to commas.
pub(super) fn large(value: f64) -> String {
    if value.abs() < 1e6 { format_significant(value) } else { format!("{value:.2e}") }
}

/// What a lint found, one line each.
pub fn findings(site: &str, found: &[Finding]) -> String {
    if found.is_empty() {
        return format!("{site}: nothing found\n");
    }
    found.iter().map(|finding| format!("{site}: {}: {}\n", finding.level.name(), finding.text)).collect()
}
