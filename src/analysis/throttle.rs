//! Windows in which a GPU's clocks were held down, and by what. Such windows are kept: the flag says which numbers they
//! are behind.

use super::Flag;
use crate::record::{Cell, ClockEvents, Maybe, Run};

/// Share of a window from which on clocks that were held down are worth a word.
const WORTH_A_WORD: f64 = 0.01;

/// The power limit as a cause.
const POWER_CAP: &str = "power_cap";

/// The driver's bits of what holds clocks down. Those of idling and of clocks that somebody set are not among them.
const BITS: [(u64, &str); 5] = [
    (0x04, POWER_CAP),
    (0x08, "hardware_slowdown"),
    (0x20, "heat"),
    (0x40, "heat_hardware"),
    (0x80, "power_brake"),
];

/// All causes of all windows, and the largest share of a window; no share where the driver counts no time.
pub(super) fn throttled(cell: &Cell) -> Option<Flag> {
    let mut largest: Option<f64> = None;
    let mut causes = Vec::new();
    for window in cell.runs.iter().flat_map(|run| &run.windows) {
        let Some(events) = window.clock_events.value() else { continue };
        let duration_ns = window.t1_ns.saturating_sub(window.t0_ns).max(1) as f64;
        for (cause, held_ns) in counted(events) {
            let share = held_ns as f64 / duration_ns;
            if share >= WORTH_A_WORD {
                largest = Some(largest.map_or(share, |largest| largest.max(share)));
                causes.push(cause.to_owned());
            }
        }
        if counted(events).next().is_none() {
            causes.extend(seen(events).map(str::to_owned));
        }
    }
    causes.sort();
    causes.dedup();
    let share = largest.map_or_else(|| Maybe::missing("not_counted"), Maybe::Value);
    (!causes.is_empty()).then_some(Flag::Throttled { share, causes })
}

/// Whether something else than the power limit held the clocks down for a share of a window of `run` that is worth a
/// word. The power limit is where a busy device works; heat, the hardware and the power supply are disturbances.
pub(super) fn is_disturbed(run: &Run) -> bool {
    run.windows.iter().any(|window| {
        let Some(events) = window.clock_events.value() else { return false };
        let duration_ns = window.t1_ns.saturating_sub(window.t0_ns).max(1) as f64;
        if counted(events).next().is_none() {
            return seen(events).any(|cause| cause != POWER_CAP);
        }
        counted(events)
            .any(|(cause, held_ns)| cause != POWER_CAP && held_ns as f64 / duration_ns >= WORTH_A_WORD)
    })
}

/// Causes whose time the driver counts.
fn counted(events: &ClockEvents) -> impl Iterator<Item = (&'static str, u64)> {
    let ClockEvents {
        software_power_cap_ns,
        software_thermal_ns,
        hardware_thermal_ns,
        hardware_power_brake_ns,
        reasons_mask: _,
    } = events;
    let causes = [
        (POWER_CAP, software_power_cap_ns),
        ("heat", software_thermal_ns),
        ("heat_hardware", hardware_thermal_ns),
        ("power_brake", hardware_power_brake_ns),
    ];
    causes.into_iter().filter_map(|(cause, held_ns)| Some((cause, *held_ns.value()?)))
}

/// Causes that the driver named at some moment.
fn seen(events: &ClockEvents) -> impl Iterator<Item = &'static str> {
    let text = events.reasons_mask.value().map_or("", String::as_str);
    let mask = u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0);
    BITS.into_iter().filter(move |(bit, _)| mask & bit != 0).map(|(_, cause)| cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Latency, Maybe, Outcome, Steady, Window, WindowEnd, Workload};

    fn events(power_cap_ns: Maybe<u64>, heat_ns: Maybe<u64>, mask: &str) -> ClockEvents {
        let none = power_cap_ns.clone().map(|_| 0);
        ClockEvents {
            software_power_cap_ns: power_cap_ns,
            software_thermal_ns: heat_ns,
            hardware_thermal_ns: none.clone(),
            hardware_power_brake_ns: none,
            reasons_mask: Maybe::Value(mask.to_owned()),
        }
    }

    fn window(clock_events: ClockEvents) -> Window {
        Window {
            t0_ns: 1000,
            t1_ns: 2000,
            tokens_in: 0,
            tokens_out: 0,
            steps: 0,
            requests_completed: 0,
            passes: 0,
            backlog: WindowEnd::default(),
            cpu: Maybe::missing("no_sensor"),
            energy: Maybe::missing("no_sensor"),
            clocks: Maybe::missing("no_sensor"),
            temperature: Maybe::missing("no_sensor"),
            clock_events: Maybe::Value(clock_events),
        }
    }

    fn cell(windows: Vec<Window>) -> Cell {
        let none = || Maybe::missing("no_token");
        let run = Run {
            index: 0,
            started_at: String::new(),
            windows,
            ramp: Maybe::missing("static_workload"),
            latency: Latency { ttft: none(), itl: none(), tpot: none(), e2e: none(), step: none() },
            requests: Vec::new(),
            drain: Maybe::missing("static_workload"),
            cooldown: Maybe::missing("hot"),
            steady: Steady::NotAssessed,
            checks: Vec::new(),
            output_token_sha256: Maybe::missing("not_computed"),
        };
        let skipped =
            Cell::skipped(Workload::Prefill { batch: 1, isl: 1 }, "cuda:0".to_owned(), String::new());
        Cell { outcome: Outcome::Measured, runs: vec![run], ..skipped }
    }

    fn flag(share: Maybe<f64>, causes: &[&str]) -> Option<Flag> {
        Some(Flag::Throttled { share, causes: causes.iter().map(|cause| (*cause).to_owned()).collect() })
    }

    #[test]
    fn the_worst_window_gives_the_share_and_all_windows_the_causes() {
        let counted = |cap_ns, heat_ns| window(events(Maybe::Value(cap_ns), Maybe::Value(heat_ns), "0x1"));
        // Of a window of 1000 ns: 25 % and 2 %; 0.9 % is not worth a word.
        let windows = vec![counted(250, 9), counted(9, 20), counted(0, 0)];
        assert_eq!(throttled(&cell(windows)), flag(Maybe::Value(0.25), &["heat", "power_cap"]));
        assert_eq!(throttled(&cell(vec![counted(9, 9)])), None);
    }

    #[test]
    fn the_power_limit_alone_disturbs_no_run() {
        let run = |events| cell(vec![window(events)]).runs.remove(0);
        let counted = |cap_ns, heat_ns| run(events(Maybe::Value(cap_ns), Maybe::Value(heat_ns), "0x24"));
        assert!(!is_disturbed(&counted(1000, 9)));
        assert!(is_disturbed(&counted(0, 10)));
        let missing = || Maybe::missing("not_supported");
        assert!(!is_disturbed(&run(events(missing(), missing(), "0x5"))));
        assert!(is_disturbed(&run(events(missing(), missing(), "0x24"))));
    }

    #[test]
    fn where_no_time_is_counted_the_causes_that_were_seen_stand() {
        let missing = || Maybe::missing("not_supported");
        let seen = |mask| cell(vec![window(events(missing(), missing(), mask))]);
        assert_eq!(
            throttled(&seen("0x44")),
            flag(Maybe::missing("not_counted"), &["heat_hardware", "power_cap"])
        );
        // Idle, and clocks that somebody set.
        assert_eq!(throttled(&seen("0x3")), None);
    }
}
