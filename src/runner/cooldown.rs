//! The pause before a run in which the device cools, so that every run begins at about the same temperature. The load
//! has ended by then; a warm-up follows.

use std::sync::atomic::Ordering;

use super::{Halt, Stage};

/// Longest pause, ns.
const LONGEST_NS: u64 = 120_000_000_000;

/// How a pause ended.
pub(super) struct Cooled {
    pub(super) duration_ns: u64,
    pub(super) end_c: f64,
    pub(super) reached: bool,
}

/// Waits until the device is at most `cool_to_c` warm, or the longest time is over.
pub(super) fn cool_down(stage: &mut Stage<'_>, cool_to_c: f64) -> Result<Cooled, Halt> {
    let begin_ns = stage.clock.now_ns();
    loop {
        if stage.stop.load(Ordering::Relaxed) {
            return Err(Halt::Interrupted);
        }
        let shown = stage.witness.temperature_c(&stage.clock);
        let duration_ns = stage.clock.now_ns() - begin_ns;
        let Some(&end_c) = shown.value() else {
            let reason = shown.reason().unwrap_or("unknown");
            return Err(Halt::Failed(anyhow::anyhow!("the temperature cannot be read any more ({reason})")));
        };
        let reached = end_c <= cool_to_c;
        if reached || duration_ns >= LONGEST_NS {
            return Ok(Cooled { duration_ns, end_c, reached });
        }
    }
}
