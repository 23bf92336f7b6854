//! A comparison as people read it: the verdict first, then why, then every number. The table and the Markdown hold the
//! same parts.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use super::DASH;
use crate::analysis::compare::{
    Arm, Class, Comparand, Comparison, Difference, Metric, Part, SessionId, Thresholds, Verdict,
};
use crate::record::Maybe;
use crate::units::format_significant;

/// Longest value of the environment that is printed whole, characters.
const LONGEST_VALUE: usize = 60;
/// Most reasons under the headline.
const MOST_REASONS: usize = 8;
const TITLES: [&str; 12] = [
    "cell",
    "metric",
    "verdict",
    "baseline",
    "candidate",
    "change",
    "95 % interval",
    "p Holm",
    "MDE",
    "σ",
    "δ",
    "needs",
];

/// # Errors
/// When a number cannot be written as JSON.
pub fn comparison_json(result: &Comparison) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(result)? + "\n")
}

/// Plain text for a terminal.
pub fn comparison_table(result: &Comparison) -> String {
    let mut text = format!("{}\n", headline(result));
    for reason in reasons(result) {
        text.push_str(&format!("  {reason}\n"));
    }
    for step in &result.next {
        text.push_str(&format!("next: {step}\n"));
    }
    text.push('\n');
    for (title, value) in sides(result) {
        text.push_str(&format!("{title:<10} {value}\n"));
    }
    text.push_str(&block("environment", &environment(result)));
    if !result.cells.is_empty() {
        text.push_str(&format!("\n{}\n\n{}\n", cell_table(result), notes(result).join("\n")));
    }
    text.push_str(&block("why", &why(result)));
    text.push_str(&block("left out by rule", &result.exclusions));
    text.push_str(&block("remarks", &result.remarks));
    text
}

/// Indented lines under a title, after an empty line; nothing when there are none.
fn block(title: &str, lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let indented: String = lines.iter().map(|line| format!("  {line}\n")).collect();
    format!("\n{title}\n{indented}")
}

/// Markdown for a change ticket.
pub fn comparison_markdown(result: &Comparison) -> String {
    let mut text = format!("## {}\n\n", headline(result));
    text.push_str(&list("", &reasons(result)));
    text.push_str(&list("Next", &result.next));
    let sides: Vec<String> =
        sides(result).into_iter().map(|(title, value)| format!("**{title}**: {value}")).collect();
    text.push_str(&list("", &sides));
    text.push_str(&list("Environment", &environment(result)));
    if !result.cells.is_empty() {
        text.push_str(&format!(
            "| {} |\n|---|---|---|{}\n",
            TITLES.join(" | "),
            "--:|".repeat(TITLES.len() - 3)
        ));
        for cell in compared(result) {
            text.push_str(&format!("| {} |\n", row(cell).join(" | ")));
        }
        text.push('\n');
    }
    text.push_str(&list("Notes", &notes(result)));
    text.push_str(&list("Why", &why(result)));
    text.push_str(&list("Left out by rule", &result.exclusions));
    text.push_str(&list("Remarks", &result.remarks));
    text
}

/// A list under a bold title; nothing when it is empty.
fn list(title: &str, lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let head = if title.is_empty() { String::new() } else { format!("**{title}**\n\n") };
    let items: String = lines.iter().map(|line| format!("- {line}\n")).collect();
    format!("{head}{items}\n")
}

/// The first reasons; the others stand below, cell by cell and field by field.
fn reasons(result: &Comparison) -> Vec<String> {
    let mut shown: Vec<String> = result.reasons.iter().take(MOST_REASONS).cloned().collect();
    if result.reasons.len() > MOST_REASONS {
        shown.push(format!("and {} more", result.reasons.len() - MOST_REASONS));
    }
    shown
}

fn headline(result: &Comparison) -> String {
    let mut text = result.verdict.words().to_owned();
    if let (true, Some(cells)) = (result.confounded, result.verdict_of_the_cells.value()) {
        text.push_str(&format!(": CONFOUNDED (the cells alone say {})", cells.words()));
    }
    let count = |verdict| result.cells.iter().filter(|cell| cell.verdict == verdict).count();
    let counts: Vec<String> = [
        Verdict::Regressed,
        Verdict::Improved,
        Verdict::Pass,
        Verdict::Same,
        Verdict::Inconclusive,
        Verdict::NotComparable,
        Verdict::MeterChanged,
    ]
    .into_iter()
    .filter(|verdict| count(*verdict) > 0)
    .map(|verdict| format!("{} {}", count(verdict), verdict.words().to_lowercase()))
    .collect();
    if !counts.is_empty() {
        text.push_str(&format!(" · {}", counts.join(", ")));
    }
    if let Some(reason) = &result.not_a_measurement {
        text.push_str(&format!(" · NOT A MEASUREMENT: {reason}"));
    }
    text
}

fn sides(result: &Comparison) -> Vec<(&'static str, String)> {
    let batches: u32 = result.noise.batches.iter().sum();
    let rules = &result.settings.rules;
    vec![
        ("baseline", side(&result.baseline)),
        ("candidate", side(&result.candidate)),
        (
            "noise",
            format!(
                "{} in {}",
                plural(batches as usize, "session"),
                plural(result.noise.batches.len(), "batch")
            ),
        ),
        (
            "rules",
            format!(
                "α = {} (look {}){}; a loss counts from {}",
                rules.alpha,
                result.settings.look,
                if rules.strict { ", strict" } else { "" },
                thresholds(&result.settings.thresholds)
            ),
        ),
    ]
}

fn plural(count: usize, word: &str) -> String {
    let ending = match (count, word.ends_with("ch")) {
        (1, _) => "",
        (_, true) => "es",
        _ => "s",
    };
    format!("{count} {word}{ending}")
}

fn side(arm: &Arm) -> String {
    let declared = arm.sessions.iter().filter(|id| matches!(id, SessionId::Declared { .. })).count();
    let kinds = if declared > 0 { format!(" ({declared} declared)") } else { String::new() };
    format!("{}{kinds}, {}", plural(arm.sessions.len(), "session"), plural(arm.files.len(), "record"))
}

fn thresholds(thresholds: &Thresholds) -> String {
    let mut text = Metric::ALL
        .map(|metric| format!("{} {:.1} %", metric.unit(), thresholds.of(metric, "") * 100.0))
        .join(", ");
    for cell in &thresholds.cells {
        text.push_str(&format!(", {} of {} {:.1} %", cell.metric.unit(), cell.cell, cell.ratio * 100.0));
    }
    text
}

/// What changed, the expected first; what moves by itself is in the JSON only.
fn environment(result: &Comparison) -> Vec<String> {
    let listed = result.environment.iter().filter(|line| line.class != Class::Dynamic);
    listed.map(|line| format!("{}: {}", class_words(line), changed(line))).collect()
}

fn class_words(line: &Difference) -> &'static str {
    match line.class {
        Class::Identity => "ANOTHER",
        Class::Suspicious if line.allowed => "allowed",
        Class::Suspicious => "SUSPICIOUS",
        Class::Expected => "expected",
        Class::Meter => "METER",
        Class::Dynamic => "moving",
    }
}

fn changed(line: &Difference) -> String {
    format!("{}: {} → {}", line.field, shortened(&line.baseline), shortened(&line.candidate))
}

fn shortened(values: &[String]) -> String {
    let text = values.join(" or ");
    match text.char_indices().nth(LONGEST_VALUE) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

fn compared(result: &Comparison) -> impl Iterator<Item = &Comparand> {
    result.cells.iter().chain(result.aggregate.value())
}

fn cell_table(result: &Comparison) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(TITLES);
    for cell in compared(result) {
        table.add_row(row(cell));
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    super::table::trimmed(&table.to_string())
}

fn row(cell: &Comparand) -> Vec<String> {
    let mut fields = vec![cell.cell.clone(), cell.metric.unit().to_owned(), cell.verdict.words().to_owned()];
    let Some(numbers) = cell.numbers.value() else {
        fields.extend(std::iter::repeat_n(DASH.to_owned(), TITLES.len() - 3));
        return fields;
    };
    let dash = |text: Option<String>| text.unwrap_or_else(|| DASH.to_owned());
    fields.extend([
        format_significant(numbers.baseline),
        format_significant(numbers.candidate),
        signed(numbers.effect_ratio),
        dash(numbers.interval_95_ratio.value().map(interval)),
        dash(numbers.p_worse_holm.value().copied().map(chance)),
        dash(numbers.detectable_ratio.value().map(|ratio| percent(*ratio))),
        dash(numbers.sigma.value().map(|sigma| percent(*sigma))),
        percent(numbers.threshold_ratio),
        dash(numbers.sessions_needed.value().map(ToString::to_string)),
    ]);
    fields
}

fn chance(p: f64) -> String {
    if p < 0.001 { "<0.001".to_owned() } else { format!("{p:.3}") }
}

fn percent(ratio: f64) -> String {
    format!("{:.2} %", ratio * 100.0)
}

fn signed(ratio: f64) -> String {
    format!("{:+.2} %", ratio * 100.0)
}

fn interval([low, high]: &[f64; 2]) -> String {
    format!("[{}, {}]", signed(*low), signed(*high))
}

fn notes(result: &Comparison) -> Vec<String> {
    let mut notes: Vec<String> = compared(result)
        .flat_map(|cell| {
            cell.notes.iter().map(|note| format!("! {} {}: {note}", cell.cell, cell.metric.unit()))
        })
        .collect();
    if !result.cells.is_empty() {
        notes.push(
            "MDE: smallest true change found in four of five comparisons like this; σ: between sessions; δ: loss that \
             counts; needs: sessions on each side to find a change of δ"
                .to_owned(),
        );
    }
    notes
}

fn why(result: &Comparison) -> Vec<String> {
    if result.cells.is_empty() {
        return Vec::new();
    }
    let mut lines: Vec<String> = result
        .why
        .layers
        .iter()
        .filter(|layer| layer.cells > 0)
        .map(|layer| {
            format!(
                "{}: {} of {} regressed, {} improved, {} together",
                layer.layer,
                layer.regressed,
                plural(layer.cells as usize, "cell"),
                layer.improved,
                layer.effect_ratio.value().map_or(DASH.to_owned(), |ratio| signed(*ratio))
            )
        })
        .collect();
    lines.extend(decompositions(result));
    lines.extend(result.why.outputs_changed.iter().map(|cell| {
        format!("numerics changed: {cell} gives other output tokens, each side agreeing with itself")
    }));
    lines.extend(result.why.latencies.iter().map(|moved| {
        format!(
            "{} {} moved by {} (p {})",
            moved.cell,
            moved.latency,
            signed(moved.effect_ratio),
            chance(moved.p_adjusted)
        )
    }));
    lines.extend(conditions(&result.baseline, &result.candidate));
    lines
}

/// The parts of every change that has any; else one line that says why there are none.
fn decompositions(result: &Comparison) -> Vec<String> {
    let all = &result.why.decompositions;
    let mut lines = Vec::new();
    for parts in all {
        let throughput = Maybe::Value(parts.throughput.clone());
        let clock = [("clock", &parts.clock), ("tokens per cycle", &parts.tokens_per_cycle)];
        let power = [("power", &parts.power), ("tok/s", &throughput)];
        lines.extend(split(&format!("{} tok/s", parts.cell), clock));
        lines.extend(split(&format!("{} tok/J", parts.cell), power));
    }
    for (what, reason) in [
        ("clock", all.iter().find_map(|parts| parts.clock.reason())),
        ("power", all.iter().find_map(|parts| parts.power.reason())),
    ] {
        if let Some(reason) = reason {
            lines.push(format!("no split by {what}: {}", super::explain(reason)));
        }
    }
    lines
}

/// `decode/b1/d64/o16 tok/s: clock -2.0 % […], tokens per cycle +0.1 % […]`, when both parts are known.
fn split(whole: &str, parts: [(&str, &Maybe<Part>); 2]) -> Option<String> {
    let said = |(name, part): (&str, &Maybe<Part>)| {
        let part = part.value()?;
        let range =
            part.interval_95_ratio.value().map_or(String::new(), |range| format!(" {}", interval(range)));
        Some(format!("{name} {}{range}", signed(part.effect_ratio)))
    };
    let [first, second] = parts.map(said);
    Some(format!("{whole}: {}, {}", first?, second?))
}

/// What went on during the windows, side against side.
fn conditions(baseline: &Arm, candidate: &Arm) -> Vec<String> {
    let (one, other) = (&baseline.conditions, &candidate.conditions);
    let pair = |what: &str, a: &Maybe<f64>, b: &Maybe<f64>, say: &dyn Fn(f64, f64) -> String| {
        let (a, b) = (a.value()?, b.value()?);
        Some(format!("{what}: {} → {}", say(*a, one.window_s), say(*b, other.window_s)))
    };
    let of_time = |seconds: f64, window_s: f64| format!("{seconds:.1} s of {window_s:.0} s");
    let share = |share: f64, _: f64| format!("{:.1} %", share * 100.0);
    let celsius = |value: f64, _: f64| format!("{value:.1} °C");
    [
        pair("clock held down by the power cap", &one.power_cap_s, &other.power_cap_s, &of_time),
        pair("clock held down by heat", &one.thermal_s, &other.thermal_s, &of_time),
        pair("temperature", &one.temperature_c, &other.temperature_c, &celsius),
        pair("cores taken by other processes", &one.foreign_share, &other.foreign_share, &share),
        pair("cores taken by the hypervisor", &one.steal_share, &other.steal_share, &share),
    ]
    .into_iter()
    .flatten()
    .collect()
}
