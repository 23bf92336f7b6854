//! What the timed path leaves behind: steps and token events in the order they became visible.

use crate::engine::{StepOutput, TokenEvent};

/// One forward pass. Times are ns of the engine's clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StepTrace {
    pub(crate) started_ns: u64,
    pub(crate) visible_ns: u64,
    pub(crate) prefill_tokens: u32,
    /// End of this step's events in [`Trace::events`]; they begin where the step before ends.
    pub(crate) events_end: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Trace {
    pub(crate) steps: Vec<StepTrace>,
    pub(crate) events: Vec<TokenEvent>,
}

impl Trace {
    pub(crate) fn clear(&mut self) {
        self.steps.clear();
        self.events.clear();
    }

    /// Appends a finished step; one that only queued work and reported none is skipped.
    pub(crate) fn push(&mut self, output: &StepOutput) {
        if output.events.is_empty() && output.prefill_tokens == 0 && output.decode_tokens == 0 {
            return;
        }
        self.events.extend_from_slice(&output.events);
        self.steps.push(StepTrace {
            started_ns: output.started_ns,
            visible_ns: output.visible_ns,
            prefill_tokens: output.prefill_tokens,
            events_end: self.events.len(),
        });
    }

    /// Every event with the time at which it became visible.
    pub(crate) fn stamped_events(&self) -> impl Iterator<Item = (u64, &TokenEvent)> {
        let mut begin = 0;
        self.steps.iter().flat_map(move |step| {
            let events = &self.events[begin..step.events_end];
            begin = step.events_end;
            events.iter().map(|event| (step.visible_ns, event))
        })
    }

    /// How long each step that became visible in (`t0_ns`, `t1_ns`] kept the device busy: from the later of its own
    /// start and the step before's end.
    pub(crate) fn step_times_ns(&self, t0_ns: u64, t1_ns: u64) -> impl Iterator<Item = u64> {
        let mut previous_ns = 0;
        self.steps.iter().filter_map(move |step| {
            let begin_ns = step.started_ns.max(previous_ns);
            previous_ns = step.visible_ns;
            inside(step.visible_ns, t0_ns, t1_ns).then(|| step.visible_ns.saturating_sub(begin_ns))
        })
    }
}

/// Whether an output that became visible at `at_ns` belongs to the window: (`t0_ns`, `t1_ns`], since a step that ends
/// on the edge was worked on before it.
pub(crate) fn inside(at_ns: u64, t0_ns: u64, t1_ns: u64) -> bool {
    t0_ns < at_ns && at_ns <= t1_ns
}

/// Whether a request that arrived at `at_ns` belongs to the window: [`t0_ns`, `t1_ns`), since one that arrives on the
/// edge is worked on after it.
pub(crate) fn arrives_inside(at_ns: u64, t0_ns: u64, t1_ns: u64) -> bool {
    t0_ns <= at_ns && at_ns < t1_ns
}
