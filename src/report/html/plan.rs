//! The page of a plan: what a site makes, takes and costs, with intervals, and everything that stands behind the numbers.

use super::bars::{self, Bar, Bars, Part};
use super::chart::{self, Chart, Line, Point};
use super::content::{Block, Figure, LegendEntry, Page, RecordHead, Section, Table};
use super::lay_out;
use super::look::{Look, dash_swatch};
use super::scale::{Axis, prefixed};
use crate::analysis::plan::{Interval, LoadPoint, Plan, RampPoint, Sensitivity, Site};
use crate::record::Maybe;
use crate::report::plan::{large, money, outputs};
use crate::report::plan_markdown::{
    FIGURE_COLUMNS, cells, cost_columns, cost_rows, facts, ramp_rows, sensitivity_rows, site_figures,
};
use crate::units::format_significant;

/// Beginnings of flags that nobody may overlook.
const GRAVE: [&str; 3] = ["extrapolated", "the calibration is no measurement", "the site contradicts itself"];
/// Dash of a line at a price or a share, which is no curve.
const MARK: usize = 3;

/// The page of one plan. `site` is what it was planned from.
///
/// # Errors
/// When the template does not fit the page, which no plan can cause.
pub fn plan_page(plan: &Plan, site: &Site) -> anyhow::Result<String> {
    let is_grave = |flag: &&String| GRAVE.iter().any(|grave| flag.starts_with(grave));
    let head = RecordHead {
        swatch: Look::new(0, 0).swatch(),
        name: format!("{} on {}", plan.model, plan.device),
        facts: facts(plan),
    };
    let sections = [
        Some(read_first(plan)),
        Some(results(plan)),
        Some(cost(plan, site)),
        Some(power(plan)),
        ramp(plan),
        sensitivities(plan),
        concurrency(plan),
        Some(figures(site)),
        Some(formulas(plan)),
    ];
    let page = Page {
        program: "tokmeter plan",
        title: plan.site.clone(),
        style: include_str!("style.css"),
        version: env!("CARGO_PKG_VERSION"),
        warnings: plan.flags.iter().filter(is_grave).cloned().collect(),
        records: vec![head],
        sections: sections.into_iter().flatten().collect(),
        origin: "the site and the calibration above alone; the formulas stand in PLANNING.md",
        tone: "",
        lead: Vec::new(),
    };
    lay_out(&page)
}

fn read_first(plan: &Plan) -> Section {
    let grade = match plan.grade {
        crate::analysis::calibrate::Grade::A => {
            "held-out time within 5 % inside what was measured and 10 % at its edge, energy within 5 %"
        }
        crate::analysis::calibrate::Grade::B => {
            "held-out time within 10 % inside what was measured and 20 % at its edge, energy within 10 %"
        }
        crate::analysis::calibrate::Grade::C => {
            "held-out errors above what a B allows, or nothing was held out, as of figures that others published"
        }
    };
    let blocks = vec![
        Block::text(format!("Grade {} of the calibration behind every number here: {grade}.", plan.grade)),
        Block::Bullets { items: plan.flags.iter().map(|flag| format!("! {flag}")).collect() },
    ];
    Section { id: "first", title: "Read first", blocks }
}

fn results(plan: &Plan) -> Section {
    let table = Table {
        caption: format!("The figures as they stand, and percentiles of {} draws", plan.draws),
        columns: ["output", "value", "p05", "p50", "p95"].map(str::to_owned).to_vec(),
        rows: outputs(plan).into_iter().map(cells).collect(),
        ..Table::default()
    };
    Section {
        id: "results",
        title: "What the site makes, takes and costs",
        blocks: vec![Block::Table(table)],
    }
}

/// A cost of the load curve: its name, and its value at a point.
type CostOf = (&'static str, &'static str, fn(&LoadPoint) -> &Maybe<f64>);

const COSTS: [CostOf; 3] = [
    ("full", "cost_per_mtok_output", |point| &point.cost_per_mtok_output),
    ("cash: without what is written off", "cash_cost_per_mtok_output", |point| {
        &point.cash_cost_per_mtok_output
    }),
    ("marginal: one token more", "marginal_cost_per_mtok_output", |point| {
        &point.marginal_cost_per_mtok_output
    }),
];

fn cost(plan: &Plan, site: &Site) -> Section {
    let mut blocks = vec![Block::text(break_even(plan, site))];
    let is_rented =
        plan.load_curve.iter().all(|point| point.cost_per_mtok_output == point.cash_cost_per_mtok_output);
    if is_rented {
        blocks.push(Block::text("Nothing is written off, so the cash cost is the full cost."));
    }
    blocks.extend(cost_chart(plan, site, is_rented).map(|chart| Block::Charts { charts: vec![chart] }));
    blocks.push(Block::Table(Table {
        caption: format!("{} per million output tokens over the share of the time with work", plan.currency),
        columns: cost_columns(plan).to_vec(),
        rows: cost_rows(plan),
        ..Table::default()
    }));
    Section { id: "cost", title: "Cost", blocks }
}

/// Where the price of tokens covers their cost, in a sentence.
fn break_even(plan: &Plan, site: &Site) -> String {
    let price = site.money.price_per_mtok.as_ref().map(|price| price.value().to_string());
    match (&plan.outcome.break_even_utilization, price) {
        (Maybe::Value(share), Some(price)) => format!(
            "At {price} {} per million output tokens the site breaks even at a utilisation of {:.1} %; it is planned at {:.1} %.",
            plan.currency,
            share * 100.0,
            site.demand.utilization.value * 100.0
        ),
        (Maybe::Missing(missing), Some(price)) if missing.missing == "never" => {
            format!("At {price} {} per million output tokens the site never breaks even.", plan.currency)
        }
        (break_even, _) => format!(
            "No break-even utilisation ({}): money.price_per_mtok gives what a million output tokens are sold for.",
            break_even.reason().unwrap_or("no price per mtok").replace('_', " ")
        ),
    }
}

fn cost_chart(plan: &Plan, site: &Site, is_rented: bool) -> Option<Figure> {
    let costs = COSTS.iter().enumerate().filter(|(index, _)| !(is_rented && *index == 1));
    let mut lines = Vec::new();
    let mut legend = Vec::new();
    for (index, (name, key, value)) in costs {
        let line = cost_line(plan, Look::new(index, index), key, *value);
        if !line.points.is_empty() {
            legend.push(LegendEntry { swatch: line.look.swatch(), text: (*name).to_owned() });
            lines.push(line);
        }
    }
    if lines.is_empty() {
        return None;
    }
    let most = lines.iter().flat_map(|line| line.area.iter().map(|(_, _, high)| *high)).fold(0.0, f64::max);
    let marks = marks(plan, site, most);
    legend
        .extend(marks.iter().map(|(text, _)| LegendEntry { swatch: dash_swatch(MARK), text: text.clone() }));
    lines.extend(marks.into_iter().map(|(_, line)| line));
    let title = "Cost of output tokens against utilisation".to_owned();
    let chart = Chart {
        id: "cost-load".to_owned(),
        title: title.clone(),
        x: Axis {
            is_linear: true,
            ..Axis::new("share of the available time with work (%)")
                .at((1..=10).map(|tenth| f64::from(tenth) * 10.0))
        },
        y: Axis::new(format!("{} per million output tokens", plan.currency)),
        lines,
        bands: Vec::new(),
    };
    let note = "Areas: 5th to 95th percentile of the draws.".to_owned();
    Some(Figure { title, svg: chart::draw(&chart), legend, note })
}

fn cost_line(plan: &Plan, look: Look, key: &str, value: fn(&LoadPoint) -> &Maybe<f64>) -> Line {
    let known = plan.load_curve.iter().filter_map(|point| Some((point, *value(point).value()?)));
    let points = known.clone().map(|(point, cost)| Point {
        title: format!(
            "{:.0} %: {} {} per Mtok",
            point.utilization * 100.0,
            format_significant(cost),
            plan.currency
        ),
        ..Point::bare(point.utilization * 100.0, cost)
    });
    let area = known.filter_map(|(point, _)| {
        let interval = point.intervals.get(key)?;
        Some((point.utilization * 100.0, interval.p05, interval.p95))
    });
    Line { area: area.collect(), ..Line::new(look, points.collect()) }
}

/// The price across, and the site's own utilisation and its break-even up to `most`, each with its text.
fn marks(plan: &Plan, site: &Site, most: f64) -> Vec<(String, Line)> {
    let straight = |from: (f64, f64), to: (f64, f64)| Line {
        has_markers: false,
        ..Line::new(Look::new(6, MARK), vec![Point::bare(from.0, from.1), Point::bare(to.0, to.1)])
    };
    let least = plan
        .load_curve
        .iter()
        .filter_map(|point| {
            point
                .intervals
                .get("marginal_cost_per_mtok_output")
                .or(point.intervals.get("cost_per_mtok_output"))
        })
        .map(|interval| interval.p05)
        .fold(most, f64::min);
    let upright = |share: f64| straight((share * 100.0, least), (share * 100.0, most));
    let planned = site.demand.utilization.value;
    let mut marks = vec![(format!("planned: {:.0} %", planned * 100.0), upright(planned))];
    if let Maybe::Value(share) = plan.outcome.break_even_utilization {
        marks.push((format!("breaks even: {:.1} %", share * 100.0), upright(share)));
    }
    let price =
        site.money.price_per_mtok.as_ref().and_then(|price| price.value().to_string().parse::<f64>().ok());
    if let Some(price) = price {
        marks.push((format!("price: {price} {}", plan.currency), straight((10.0, price), (100.0, price))));
    }
    marks
}

/// A boundary: its name, the value, and the name of its interval.
fn boundaries(plan: &Plan) -> [(&'static str, Maybe<f64>, &'static str); 4] {
    let outcome = &plan.outcome;
    [
        ("boards", outcome.output_tokens_per_s_per_board_mw.clone(), "output_tokens_per_s_per_board_mw"),
        (
            "nodes: boards and hosts",
            outcome.output_tokens_per_s_per_node_mw.clone(),
            "output_tokens_per_s_per_node_mw",
        ),
        (
            "IT: nodes, network and switches",
            Maybe::Value(outcome.output_tokens_per_s_per_it_mw),
            "output_tokens_per_s_per_it_mw",
        ),
        (
            "facility: IT times PUE",
            Maybe::Value(outcome.output_tokens_per_s_per_facility_mw),
            "output_tokens_per_s_per_facility_mw",
        ),
    ]
}

fn power(plan: &Plan) -> Section {
    let known = boundaries(plan).into_iter().filter_map(|(name, value, key)| {
        Some((name.to_owned(), *value.value()?, plan.intervals.get(key).copied()))
    });
    let chart = value_bars(
        "power-boundaries",
        "Output tokens per second for each megawatt, busy",
        "output tok/s per MW",
        known.collect(),
    );
    let mut blocks = vec![Block::Charts { charts: vec![chart] }];
    let missing = boundaries(plan)
        .into_iter()
        .filter_map(|(name, value, _)| Some(format!("– {name}: {}", value.reason()?.replace('_', " "))));
    let missing: Vec<String> = missing.collect();
    if !missing.is_empty() {
        blocks.push(Block::Bullets { items: missing });
    }
    Section { id: "power", title: "Tokens per megawatt", blocks }
}

/// Bars from zero, with whiskers from p05 to p95.
fn value_bars(id: &str, title: &str, unit: &str, values: Vec<(String, f64, Option<Interval>)>) -> Figure {
    let ends = values
        .iter()
        .map(|(_, value, interval)| interval.map_or(*value, |interval| interval.p95.max(*value)));
    let (factor, prefix) = prefixed(ends.fold(0.0, f64::max));
    let bar = |(name, value, interval): (String, f64, Option<Interval>)| {
        let ends = interval.map(|interval| (interval.p05 / factor, interval.p95 / factor));
        let text = |value: f64| format_significant(value / factor);
        let range = interval
            .map_or(String::new(), |interval| format!(" ({} to {})", text(interval.p05), text(interval.p95)));
        Bar {
            title: format!("{name}: {}{range} {unit}", text(value)),
            value: format!("{}{range}", text(value)),
            parts: vec![Part { from: 0.0, to: value / factor, is_hollow: false }],
            interval: ends,
            name,
        }
    };
    let axis = match prefix {
        "" => unit.to_owned(),
        prefix => format!("{prefix} {unit}"),
    };
    let bars = Bars {
        id: id.to_owned(),
        title: title.to_owned(),
        axis: Axis::new(axis),
        bars: values.into_iter().map(bar).collect(),
        base: None,
    };
    Figure {
        title: title.to_owned(),
        svg: bars::draw(&bars),
        legend: Vec::new(),
        note: "Whiskers: 5th to 95th percentile of the draws.".to_owned(),
    }
}

fn ramp(plan: &Plan) -> Option<Section> {
    if plan.ramp.is_empty() {
        return None;
    }
    let step = |step: &RampPoint| {
        let name = format!("{} · {} MW", step.date, format_significant(step.mw));
        (name, step.output_tokens_per_day, Some(step.output_tokens_per_day_interval))
    };
    let chart = value_bars(
        "ramp-steps",
        "Output tokens per day, each step filled with this device",
        "output tok/day",
        plan.ramp.iter().map(step).collect(),
    );
    let table = Table {
        caption: "Steps of the power".to_owned(),
        columns: ["from", "MW", "GPUs", "output tok/day", "p05 · p50 · p95"].map(str::to_owned).to_vec(),
        rows: ramp_rows(plan),
        ..Table::default()
    };
    Some(Section {
        id: "ramp",
        title: "As the power comes",
        blocks: vec![Block::Charts { charts: vec![chart] }, Block::Table(table)],
    })
}

fn sensitivities(plan: &Plan) -> Option<Section> {
    if plan.sensitivities.is_empty() {
        return None;
    }
    let costs = plan
        .sensitivities
        .iter()
        .filter_map(|found| Some((found, [*found.cost_at_low.value()?, *found.cost_at_high.value()?])));
    let tokens = plan
        .sensitivities
        .iter()
        .map(|found| (found, [found.tokens_per_day_at_low, found.tokens_per_day_at_high]));
    let cost_axis = format!("{} per million output tokens", plan.currency);
    let cost_base = plan.outcome.cost_per_mtok_output.value().copied();
    let charts = [
        tornado("sensitivity-cost", "What moves the cost", &cost_axis, cost_base, costs.collect()),
        tornado(
            "sensitivity-tokens",
            "What moves the tokens of a day",
            "output tok/day",
            Some(plan.outcome.output_tokens_per_day),
            tokens.collect(),
        ),
    ];
    let table = Table {
        caption: "One input at a time, at the ends of its range".to_owned(),
        columns: ["input", "from", "to", &format!("{} per Mtok", plan.currency), "output tok/day"]
            .map(str::to_owned)
            .to_vec(),
        rows: sensitivity_rows(plan),
        ..Table::default()
    };
    let text = "Every input alone at the ends of its range. `calibration` is the laws\u{2019} own uncertainty: the replica at the 5th and \
                95th percentile of its speed, as a share of its best.";
    let blocks = vec![
        Block::text(text.replace('`', "")),
        Block::Charts { charts: charts.into_iter().flatten().collect() },
        Block::Table(table),
    ];
    Some(Section { id: "sensitivity", title: "What moves it", blocks })
}

/// Bars to both sides of the value as it stands, the longest first; inputs that do not move it are left out.
fn tornado(
    id: &str,
    title: &str,
    unit: &str,
    base: Option<f64>,
    mut found: Vec<(&Sensitivity, [f64; 2])>,
) -> Option<Figure> {
    let base = base?;
    let swing = |[low, high]: [f64; 2]| (high - low).abs();
    found.retain(|(_, ends)| swing(*ends) > 1e-9 * base.abs());
    found.sort_by(|(_, a), (_, b)| swing(*b).total_cmp(&swing(*a)));
    let most = found.iter().flat_map(|(_, ends)| *ends).fold(base, f64::max);
    let (factor, prefix) = prefixed(most);
    let bar = |(found, [at_low, at_high]): &(&Sensitivity, [f64; 2])| Bar {
        name: format!(
            "{} {} to {}",
            found.input,
            format_significant(found.low),
            format_significant(found.high)
        ),
        value: format!("{} to {}", large(*at_low), large(*at_high)),
        title: format!(
            "{}: {} at {}, {} at {}",
            found.input,
            large(*at_low),
            format_significant(found.low),
            large(*at_high),
            format_significant(found.high)
        ),
        parts: vec![
            Part { from: base / factor, to: at_low / factor, is_hollow: true },
            Part { from: base / factor, to: at_high / factor, is_hollow: false },
        ],
        interval: None,
    };
    if found.is_empty() {
        return None;
    }
    let bars = Bars {
        id: id.to_owned(),
        title: title.to_owned(),
        axis: Axis {
            from_zero: false,
            ..Axis::new(if prefix.is_empty() { unit.to_owned() } else { format!("{prefix} {unit}") })
        },
        bars: found.iter().map(bar).collect(),
        base: Some(base / factor),
    };
    Some(Figure {
        title: title.to_owned(),
        svg: bars::draw(&bars),
        legend: Vec::new(),
        note: format!(
            "Hollow: the lower end of the input. Filled: the upper end. Dashed: as it stands, {}.",
            large(base)
        ),
    })
}

/// A replica at other numbers of requests; none of a saturated law.
fn concurrency(plan: &Plan) -> Option<Section> {
    if plan.concurrency_curve.is_empty() {
        return None;
    }
    let point = |at: &crate::analysis::plan::Curve| Point {
        title: format!(
            "{} requests: {} ms per token, {} output tok/s per GPU",
            at.concurrency,
            format_significant(at.tpot_ms),
            format_significant(at.output_tokens_per_s_per_gpu)
        ),
        label: at.concurrency.to_string(),
        ..Point::bare(1e3 / at.tpot_ms, at.output_tokens_per_s_per_gpu)
    };
    let title = "What a GPU makes against what a user gets".to_owned();
    let chart = Chart {
        id: "concurrency-curve".to_owned(),
        title: title.clone(),
        x: Axis::new("output tok/s of each user"),
        y: Axis::new("output tok/s per GPU"),
        lines: vec![Line::new(Look::new(0, 0), plan.concurrency_curve.iter().map(point).collect())],
        bands: Vec::new(),
    };
    let figure = Figure {
        title,
        svg: chart::draw(&chart),
        legend: Vec::new(),
        note: "Numbers: requests in a replica at once.".to_owned(),
    };
    let row = |at: &crate::analysis::plan::Curve| {
        vec![
            at.concurrency.to_string(),
            format_significant(at.tpot_ms),
            format_significant(at.output_tokens_per_s_per_gpu),
            money(&at.board_j_per_output_token),
            money(&at.marginal_board_j_per_output_token),
        ]
    };
    let table = Table {
        caption: "Up to the operating point".to_owned(),
        columns: [
            "requests at once",
            "ms per token",
            "output tok/s per GPU",
            "board J per token",
            "J of the next token",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: plan.concurrency_curve.iter().map(row).collect(),
        ..Table::default()
    };
    Some(Section {
        id: "concurrency",
        title: "Load of a replica",
        blocks: vec![Block::Charts { charts: vec![figure] }, Block::Table(table)],
    })
}

fn figures(site: &Site) -> Section {
    let mix: Vec<String> = site
        .demand
        .mix
        .iter()
        .map(|shape| {
            format!(
                "{}: {} in, {} out, {:.0} % of the requests",
                shape.name,
                shape.isl,
                shape.osl,
                shape.share * 100.0
            )
        })
        .collect();
    let table = Table {
        caption: "What was put in".to_owned(),
        columns: FIGURE_COLUMNS.map(str::to_owned).to_vec(),
        rows: site_figures(site),
        is_text: true,
        is_folded: false,
    };
    let blocks = vec![
        Block::text(format!(
            "Status: {}. Cost: {} ({}).",
            site.status, site.money.cost_source, site.money.cost_as_of
        )),
        Block::Bullets { items: mix },
        Block::Table(table),
    ];
    Section { id: "figures", title: "Figures of the site", blocks }
}

fn formulas(plan: &Plan) -> Section {
    let caption = format!("All {} formulas with this site\u{2019}s numbers", plan.explanation.len());
    Section {
        id: "formulas",
        title: "Formulas",
        blocks: vec![Block::Formulas { caption, items: plan.explanation.clone() }],
    }
}
