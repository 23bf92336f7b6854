//! What the result says in sentences: why the verdict is what it is, and what would settle it.

use std::collections::BTreeSet;

use super::effect::Noise;
use super::environment::{Class, Difference};
use super::result::{Comparand, Comparison, HeldBack, Numbers, SessionCounts};
use super::sample::Sample;
use super::verdict::Verdict;
use crate::record::Maybe;

/// Noise sessions that are advised once for a machine and suite.
const ADVISED_NOISE_SESSIONS: u32 = 6;
/// Sessions of each side that are advised.
const ADVISED_SESSIONS: u32 = 3;
/// Looks at a growing set of sessions that the levels allow.
const MOST_LOOKS: u32 = 3;

pub(super) fn reasons(result: &Comparison) -> Vec<String> {
    let mut reasons = Vec::new();
    for (side, arm) in [("baseline", &result.baseline), ("candidate", &result.candidate)] {
        if arm.files.is_empty() {
            reasons.push(format!("there is no {side} record"));
        }
    }
    let changed = |line: &Difference| {
        format!(
            "{}: baseline {}, candidate {}",
            line.field,
            line.baseline.join(" | "),
            line.candidate.join(" | ")
        )
    };
    let of = |class| result.environment.iter().filter(move |line| line.class == class && !line.allowed);
    reasons.extend(of(Class::Identity).map(|line| format!("another thing was measured: {}", changed(line))));
    reasons.extend(of(Class::Suspicious).map(|line| format!("confounded by {}", changed(line))));
    let cells = |verdict| result.cells.iter().filter(move |cell| cell.verdict == verdict);
    for cell in cells(Verdict::NotComparable).chain(cells(Verdict::MeterChanged)) {
        reasons.push(format!("{} {}: {}", cell.cell, cell.metric.unit(), cell.notes.join("; ")));
    }
    for verdict in [Verdict::Regressed, Verdict::Improved, Verdict::Inconclusive] {
        let judged = cells(verdict).chain(result.aggregate.value().filter(|all| all.verdict == verdict));
        reasons.extend(judged.map(|cell| said(cell, verdict)));
    }
    if result.cells.is_empty() && result.verdict_of_the_cells.value().is_some() {
        reasons.push("no cell was measured on both sides".to_owned());
    }
    reasons
}

fn said(cell: &Comparand, verdict: Verdict) -> String {
    let percent = |ratio: f64| format!("{:+.1} %", ratio * 100.0);
    let Some(numbers) = cell.numbers.value() else { return String::new() };
    let interval = match &numbers.interval_95_ratio {
        Maybe::Value([low, high]) => format!(" [{}, {}]", percent(*low), percent(*high)),
        Maybe::Missing(_) => String::new(),
    };
    let held_back = match cell.held_back {
        None => "",
        Some(HeldBack::UnsettledRuns) => "; it would pass, but too many runs were not settled",
        Some(HeldBack::LibraryAlgorithm) => {
            "; it would be a regression, but the library computes it by another algorithm"
        }
    };
    format!(
        "{} {}: {} {}{interval}, threshold {:.1} %{held_back}",
        cell.cell,
        cell.metric.unit(),
        verdict.words().to_lowercase(),
        percent(numbers.effect_ratio),
        numbers.threshold_ratio * 100.0
    )
}

/// What would settle an open question.
pub(super) fn next_steps(result: &Comparison, sample: Option<&Sample>) -> Vec<String> {
    let mut next = Vec::new();
    if result.confounded && result.verdict_of_the_cells.value().is_some() {
        let groups: BTreeSet<&str> = result
            .environment
            .iter()
            .filter(|line| line.class == Class::Suspicious && !line.allowed)
            .map(|line| if line.group.is_empty() { line.field.as_str() } else { line.group.as_str() })
            .collect();
        let groups: Vec<&str> = groups.into_iter().collect();
        next.push(format!(
            "undo what changed ({}) and measure again; or declare it with --changing, or let it pass with --allow-env",
            groups.join(", ")
        ));
    }
    let held_back = |why| result.cells.iter().any(|cell| cell.held_back == Some(why));
    if held_back(HeldBack::UnsettledRuns) {
        next.push(
            "measure again on a device that has settled: a suite with steady = true, a longer warm-up, --thermal \
             cooldown, or better cooling"
                .to_owned(),
        );
    }
    if held_back(HeldBack::LibraryAlgorithm) {
        next.push(
            "measure both sides with --gemm own to judge the machine without the library, or declare the library's \
             update with --changing kernels"
                .to_owned(),
        );
    }
    let is_open = |cell: &Comparand| cell.verdict == Verdict::Inconclusive && cell.held_back.is_none();
    let any_open = result.cells.iter().any(is_open);
    if result.verdict_of_the_cells.value() == Some(&Verdict::Inconclusive) && any_open {
        next.push(more_sessions(result, sample));
    }
    next
}

fn more_sessions(result: &Comparison, sample: Option<&Sample>) -> String {
    if result.settings.look >= MOST_LOOKS {
        return format!(
            "this was look {MOST_LOOKS}, the last that the error rates allow: start anew with fresh sessions on both sides"
        );
    }
    let open =
        result.cells.iter().filter(|cell| cell.verdict == Verdict::Inconclusive && cell.held_back.is_none());
    let numbers: Vec<(&SessionCounts, &Numbers)> =
        open.filter_map(|cell| cell.numbers.value().map(|numbers| (&cell.sessions, numbers))).collect();
    let is_guess =
        numbers.iter().any(|(_, numbers)| matches!(numbers.sigma_source, Noise::Assumed | Noise::Unknown));
    let command = command(sample);
    if is_guess {
        return format!(
            "measure {ADVISED_SESSIONS} sessions of each side, and once for this machine {ADVISED_NOISE_SESSIONS} \
             sessions without any change for --noise, each in a boot of its own: {command}"
        );
    }
    let more = |(counts, numbers): &(&SessionCounts, &Numbers)| {
        let needed = numbers.sessions_needed.value().copied().unwrap_or(ADVISED_SESSIONS);
        needed.saturating_sub(counts.baseline.min(counts.candidate)).max(1)
    };
    let more = numbers.iter().map(more).max().unwrap_or(1);
    format!(
        "add {more} session{} to each side, each in a boot of its own, and compare with --look {}: {command}",
        if more == 1 { "" } else { "s" },
        result.settings.look + 1
    )
}

fn command(sample: Option<&Sample>) -> String {
    let Some(sample) = sample else { return "tokmeter run".to_owned() };
    match &sample.suite {
        Maybe::Value(suite) => format!("tokmeter run --suite {suite} -m {}", sample.model),
        Maybe::Missing(_) => format!("tokmeter run -m {}, with the same sizes", sample.model),
    }
}
