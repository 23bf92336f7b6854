//! Windows in which a GPU's clocks were held down, and by what. Such windows are kept: the flag says which numbers they
//! are behind.

use super::Flag;
use crate::record::{Cell, ClockEvents, Maybe};

/// Share of a window from which on clocks that were held down are worth a word.
const WORTH_A_WORD: f64 = 0.01;

/// The driver's bits of what holds clocks down. Those of idling and of clocks that somebody set are not among them.
const BITS: [(u64, &str); 5] = [
    (0x04, "power_cap"),
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

/// Causes whose time the driver counts.
fn counted(events: &ClockEvents) -> impl Iterator<Item = (&'static str, u64)> {
    let ClockEvents {
        software_power_cap_ns,
        software_thermal_ns,
        hardware_thermal_ns,
        hardware_power_brake_ns,
        reasons_mask: _,
    } = events;
    [
        ("power_cap", software_power_cap_ns),
        ("heat", software_thermal_ns),
        ("heat_hardware", hardware_thermal_ns),
        ("power_brake", hardware_power_brake_ns),
    ]
    .into_iter()
    .filter_map(|(cause, held_ns)| Some((cause, *held_ns.value()?)))
    .collect::<Vec<_>>()
    .into_iter()
}

/// Causes that the driver named at some moment.
fn seen(events: &ClockEvents) -> impl Iterator<Item = &'static str> {
    let text = events.reasons_mask.value().map_or("", String::as_str);
    let mask = u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0);
    BITS.into_iter().filter(move |(bit, _)| mask & bit != 0).map(|(_, cause)| cause)
}
