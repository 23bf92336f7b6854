//! A plan as Markdown, for a repository or a ticket.

use super::plan::{OutputRow, large, money, outputs, percentiles};
use crate::analysis::plan::{Figure, LoadPoint, Plan, RampPoint, Sensitivity, Site};
use crate::units::format_significant;

use super::DASH;

/// The plan as one document: what must be known first, outputs, curves, figures of the site with their sources, formulas.
pub fn plan_markdown(plan: &Plan, site: &Site) -> String {
    let mut text = format!("# {}\n\n", inline(&plan.site));
    for (name, value) in facts(plan) {
        text.push_str(&format!("- **{name}**: {}\n", inline(&value)));
    }
    text.push_str("\n## Read first\n\n");
    plan.flags.iter().for_each(|flag| text.push_str(&format!("- {}\n", inline(flag))));
    text.push_str("\n## What the site makes, takes and costs\n\n");
    text.push_str(&table(&["output", "value", "p05", "p50", "p95"], outputs(plan).into_iter().map(cells)));
    for (title, columns, rows) in curves(plan) {
        text.push_str(&format!("\n## {title}\n\n{}", table(&columns.each_ref().map(String::as_str), rows)));
    }
    text.push_str("\n## Figures of the site\n\n");
    text.push_str(&table(&FIGURE_COLUMNS, site_figures(site)));
    text.push_str("\n## Formulas with numbers\n\n");
    plan.explanation.iter().for_each(|line| text.push_str(&format!("- `{}`\n", line.replace('`', "'"))));
    text
}

/// Columns of [`site_figures`].
pub(super) const FIGURE_COLUMNS: [&str; 5] =
    ["figure", "value and where it is from", "as of", "confidence", "others say"];

/// What a plan is of, by name.
pub(super) fn facts(plan: &Plan) -> Vec<(&'static str, String)> {
    vec![
        ("site as of", plan.site_as_of.clone()),
        ("device", plan.device.clone()),
        ("model", format!("{}, {}", plan.model, plan.precision)),
        ("engine", plan.engine.clone()),
        ("calibration", format!("{}, grade {}", plan.basis, plan.grade)),
        ("currency", plan.currency.clone()),
        ("draws", format!("{}, seed {}", plan.draws, plan.seed)),
    ]
}

/// The cells of an output's row.
pub(super) fn cells(row: OutputRow) -> Vec<String> {
    let interval = row.interval.unwrap_or([DASH; 3].map(str::to_owned));
    [row.name, row.value].into_iter().chain(interval).collect()
}

/// A curve's title, columns and rows.
type Curve = (&'static str, [String; 6], Vec<Vec<String>>);

fn curves(plan: &Plan) -> Vec<Curve> {
    let mut curves = Vec::new();
    if !plan.ramp.is_empty() {
        let columns = ["from", "MW", "GPUs", "output tok/day", "p05 · p50 · p95", ""].map(str::to_owned);
        curves.push(("Ramp, filled with this device", columns, ramp_rows(plan)));
    }
    curves.push(("Cost over utilisation", cost_columns(plan), cost_rows(plan)));
    let columns = ["input", "from", "to", &format!("{} per Mtok", plan.currency), "output tok/day", ""];
    curves.push(("What moves it", columns.map(str::to_owned), sensitivity_rows(plan)));
    curves
}

pub(super) fn ramp_rows(plan: &Plan) -> Vec<Vec<String>> {
    let row = |step: &RampPoint| {
        vec![
            step.date.clone(),
            format_significant(step.mw),
            format_significant(step.gpus),
            large(step.output_tokens_per_day),
            percentiles(&step.output_tokens_per_day_interval).join(" · "),
        ]
    };
    plan.ramp.iter().map(row).collect()
}

pub(super) fn cost_columns(plan: &Plan) -> [String; 6] {
    let currency = &plan.currency;
    [
        "utilisation".to_owned(),
        format!("{currency} per Mtok, full"),
        "p05 · p95".to_owned(),
        "cash".to_owned(),
        "marginal".to_owned(),
        format!("idle tax, {currency} per hour"),
    ]
}

pub(super) fn cost_rows(plan: &Plan) -> Vec<Vec<String>> {
    let row = |point: &LoadPoint| {
        let ends = point.intervals.get("cost_per_mtok_output").map_or(DASH.to_owned(), |interval| {
            format!("{} · {}", format_significant(interval.p05), format_significant(interval.p95))
        });
        vec![
            format!("{:.0} %", point.utilization * 100.0),
            money(&point.cost_per_mtok_output),
            ends,
            money(&point.cash_cost_per_mtok_output),
            money(&point.marginal_cost_per_mtok_output),
            money(&point.idle_tax_per_hour),
        ]
    };
    plan.load_curve.iter().map(row).collect()
}

pub(super) fn sensitivity_rows(plan: &Plan) -> Vec<Vec<String>> {
    let row = |found: &Sensitivity| {
        vec![
            found.input.to_owned(),
            format_significant(found.low),
            format_significant(found.high),
            format!("{} to {}", money(&found.cost_at_low), money(&found.cost_at_high)),
            format!("{} to {}", large(found.tokens_per_day_at_low), large(found.tokens_per_day_at_high)),
        ]
    };
    plan.sensitivities.iter().map(row).collect()
}

/// Every figure of the site with where it is from, under [`FIGURE_COLUMNS`].
pub(super) fn site_figures(site: &Site) -> Vec<Vec<String>> {
    let row = |(key, figure): (&'static str, &Figure)| {
        let span = figure.span();
        let range =
            if span.max > span.min { format!(" ({} to {})", span.min, span.max) } else { String::new() };
        let others = figure.others.iter().map(|other| format!("{} ({})", other.value, other.source));
        let others: Vec<String> = others.collect();
        vec![
            key.to_owned(),
            format!("{}{range}: {}", figure.value, figure.source),
            figure.as_of.clone().unwrap_or_else(|| DASH.to_owned()),
            figure.confidence.name().to_owned(),
            if others.is_empty() { DASH.to_owned() } else { others.join("; ") },
        ]
    };
    site.figures().into_iter().map(row).collect()
}

/// Columns without a name are left out.
fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let named: Vec<&str> = columns.iter().filter(|column| !column.is_empty()).copied().collect();
    let mut text = format!("| {} |\n|{}\n", named.join(" | "), " --- |".repeat(named.len()));
    for row in rows {
        let cells: Vec<String> = row.iter().map(|cell| inline(cell)).collect();
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    text
}

/// Text that neither ends a cell nor begins markup: a site's texts are somebody else's.
fn inline(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace('|', "\\|").replace('<', "&lt;")
}
