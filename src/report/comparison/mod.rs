//! A comparison as people read it: the verdict first, then why, then every number. The table and the Markdown hold the
//! same parts.

mod why;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};

use super::DASH;
use crate::analysis::compare::{
    Arm, Class, Comparand, Comparison, Difference, Metric, SessionId, Thresholds, Verdict,
};
use crate::units::format_significant;

pub(super) use why::{conditions, forms, kernels, library, outputs, probe_value, why};

/// Longest value of the environment that is printed whole, characters.
const LONGEST_VALUE: usize = 60;
/// Most reasons under the headline.
const MOST_REASONS: usize = 8;
pub(super) const TITLES: [&str; 12] = [
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
pub(super) fn reasons(result: &Comparison) -> Vec<String> {
    let mut shown: Vec<String> = result.reasons.iter().take(MOST_REASONS).cloned().collect();
    if result.reasons.len() > MOST_REASONS {
        shown.push(format!("and {} more", result.reasons.len() - MOST_REASONS));
    }
    shown
}

pub(super) fn headline(result: &Comparison) -> String {
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

pub(super) fn sides(result: &Comparison) -> Vec<(&'static str, String)> {
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

pub(super) fn class_words(line: &Difference) -> &'static str {
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

pub(super) fn shortened(values: &[String]) -> String {
    let text = values.join(" or ");
    match text.char_indices().nth(LONGEST_VALUE) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

pub(super) fn compared(result: &Comparison) -> impl Iterator<Item = &Comparand> {
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

pub(super) fn row(cell: &Comparand) -> Vec<String> {
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

pub(super) fn chance(p: f64) -> String {
    if p < 0.001 { "<0.001".to_owned() } else { format!("{p:.3}") }
}

pub(super) fn percent(ratio: f64) -> String {
    format!("{:.2} %", ratio * 100.0)
}

pub(super) fn signed(ratio: f64) -> String {
    format!("{:+.2} %", ratio * 100.0)
}

pub(super) fn interval([low, high]: &[f64; 2]) -> String {
    format!("[{}, {}]", signed(*low), signed(*high))
}

pub(super) fn notes(result: &Comparison) -> Vec<String> {
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
