//! From a trace to the record's run: windows, request rows, latency distributions, checks. Runs after the clock.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use super::trace::{Trace, arrives_inside, inside};
use crate::engine::TokenEvent;
use crate::meter::Piece;
use crate::record::machine::CpuShare;
use crate::record::{
    Check, Latency, LatencyHistogram, Maybe, RequestRow, Run, Steady, Window, WindowEnd, Workload, hex,
};

/// A window's edges and what the witness saw between them.
pub(super) struct Measured {
    pub(super) t0_ns: u64,
    pub(super) t1_ns: u64,
    pub(super) cpu: Maybe<CpuShare>,
}

/// Start of one pass of a static cell.
pub(super) struct Pass {
    pub(super) begin_ns: u64,
    /// Its first event in the trace.
    pub(super) events_begin: usize,
}

/// A request of a serving cell as it entered the engine.
pub(super) struct Submission {
    pub(super) id: u64,
    pub(super) arrival_ns: u64,
    pub(super) submitted_ns: u64,
}

/// The life of one request: its row, and the gaps between its tokens.
struct Life {
    row: RequestRow,
    expected_tokens: u32,
    gaps_ns: Vec<u64>,
}

impl Life {
    fn new(id: u64, isl_tokens: u32, expected_tokens: u32, arrival_ns: u64, submitted_ns: u64) -> Self {
        let row = RequestRow {
            id,
            isl_tokens,
            osl_tokens: 0,
            arrival_ns,
            submitted_ns,
            first_token_ns: Maybe::missing("no_token"),
            last_token_ns: Maybe::missing("no_token"),
            complete: false,
        };
        Life { row, expected_tokens, gaps_ns: Vec::with_capacity(expected_tokens as usize) }
    }

    fn token_at(&mut self, visible_ns: u64) {
        match self.row.last_token_ns {
            Maybe::Value(previous_ns) => self.gaps_ns.push(visible_ns - previous_ns),
            Maybe::Missing(_) => self.row.first_token_ns = Maybe::Value(visible_ns),
        }
        self.row.last_token_ns = Maybe::Value(visible_ns);
        self.row.osl_tokens += 1;
        self.row.complete = self.row.osl_tokens == self.expected_tokens;
    }

    fn ttft_ns(&self) -> Option<u64> {
        self.row.first_token_ns.value().map(|first_ns| first_ns - self.row.arrival_ns)
    }

    fn e2e_ns(&self) -> Option<u64> {
        let last_ns = self.row.last_token_ns.value()?;
        self.row.complete.then(|| last_ns - self.row.arrival_ns)
    }

    /// (last − first) / (tokens − 1), for complete requests of two tokens or more.
    fn tpot_ns(&self) -> Option<u64> {
        let span_ns = self.row.last_token_ns.value()? - self.row.first_token_ns.value()?;
        (self.row.complete && self.row.osl_tokens >= 2).then(|| span_ns / u64::from(self.row.osl_tokens - 1))
    }
}

/// The run of a static cell: one window of whole passes.
pub(super) fn of_passes(workload: &Workload, trace: &Trace, passes: &[Pass], measured: Measured) -> Run {
    let batch = u64::from(workload.static_batch().unwrap_or(0));
    let lives = lives_of_passes(workload, trace, passes, batch);
    let window = Window { passes: passes.len() as u64, ..window(trace, measured, WindowEnd::default()) };
    let mut latency = latency(trace, &lives, &window);
    if matches!(workload, Workload::Decode { .. }) {
        latency.ttft = Maybe::missing("prefill_not_timed");
        latency.e2e = Maybe::missing("prefill_not_timed");
    }
    let mut checks = common_checks(trace, &lives);
    checks.push(passes_repeat(trace, passes));
    Run {
        requests: lives.into_iter().map(|life| life.row).collect(),
        output_token_sha256: Maybe::Value(hash_of(pass_events(trace, passes, 0))),
        ..blank(window, latency, checks)
    }
}

/// The run of a serving cell: its rows are the requests that arrived in the window.
pub(super) fn of_serving(
    workload: &Workload,
    trace: &Trace,
    submissions: &[Submission],
    measured: Measured,
    unfinished: u64,
) -> Run {
    let (t0_ns, t1_ns) = (measured.t0_ns, measured.t1_ns);
    let lives = lives_of_submissions(workload, trace, submissions, t0_ns, t1_ns);
    let window = window(trace, measured, backlog(trace, submissions, t0_ns, t1_ns));
    let latency = latency(trace, &lives, &window);
    let checks = common_checks(trace, &lives[..]);
    let open = matches!(workload, Workload::ServeOpen { .. });
    let growth = window.backlog.at_t1.saturating_sub(window.backlog.at_t0) as f64;
    // Poisson arrivals alone move a stable backlog by about the square root of their number.
    let grows = growth > 3.0 * (lives.len() as f64).sqrt() || unfinished > 0;
    Run {
        steady: if open && grows { Steady::Unsustainable } else { Steady::NotAssessed },
        requests: lives.into_iter().map(|life| life.row).collect(),
        output_token_sha256: Maybe::missing("order_depends_on_time"),
        ..blank(window, latency, checks)
    }
}

/// The passes of a static cell as pieces of work, each up to the next one's beginning.
pub(super) fn pieces_of_passes(workload: &Workload, passes: &[Pass], t1_ns: u64) -> Vec<Piece> {
    let (batch, (input, output)) = (workload.static_batch().unwrap_or(0), workload.counted_tokens());
    let tokens = |tokens: u32| u64::from(batch) * u64::from(tokens);
    let piece = |(index, pass): (usize, &Pass)| Piece {
        begin_ns: pass.begin_ns,
        end_ns: passes.get(index + 1).map_or(t1_ns, |next| next.begin_ns),
        tokens_in: tokens(input),
        tokens_out: tokens(output),
    };
    passes.iter().enumerate().map(piece).collect()
}

/// The steps of a serving cell as pieces of work.
pub(super) fn pieces_of_steps(trace: &Trace) -> Vec<Piece> {
    let (mut previous_ns, mut events_begin) = (0, 0);
    let piece = |step: &super::trace::StepTrace| {
        let piece = Piece {
            begin_ns: step.started_ns.max(previous_ns),
            end_ns: step.visible_ns,
            tokens_in: u64::from(step.prefill_tokens),
            tokens_out: (step.events_end - events_begin) as u64,
        };
        (previous_ns, events_begin) = (step.visible_ns, step.events_end);
        piece
    };
    trace.steps.iter().map(piece).collect()
}

fn blank(window: Window, latency: Latency, checks: Vec<Check>) -> Run {
    Run {
        index: 0,
        started_at: String::new(),
        windows: vec![window],
        ramp: Maybe::missing("static_workload"),
        latency,
        requests: Vec::new(),
        drain: Maybe::missing("static_workload"),
        cooldown: Maybe::missing("hot"),
        steady: Steady::NotAssessed,
        checks,
        output_token_sha256: Maybe::missing("not_computed"),
    }
}

fn window(trace: &Trace, measured: Measured, backlog: WindowEnd) -> Window {
    let Measured { t0_ns, t1_ns, cpu } = measured;
    let steps = || trace.steps.iter().filter(|step| inside(step.visible_ns, t0_ns, t1_ns));
    let events = || trace.stamped_events().filter(|(at_ns, _)| inside(*at_ns, t0_ns, t1_ns));
    Window {
        t0_ns,
        t1_ns,
        tokens_in: steps().map(|step| u64::from(step.prefill_tokens)).sum(),
        tokens_out: events().count() as u64,
        steps: steps().count() as u64,
        requests_completed: events().filter(|(_, event)| event.last).count() as u64,
        passes: 0,
        backlog,
        cpu,
        energy: Maybe::missing("no_sensor"),
        clocks: Maybe::missing("no_sensor"),
        temperature: Maybe::missing("no_sensor"),
        clock_events: Maybe::missing("no_sensor"),
    }
}

fn pass_events<'a>(trace: &'a Trace, passes: &[Pass], pass: usize) -> &'a [TokenEvent] {
    let end = passes.get(pass + 1).map_or(trace.events.len(), |next| next.events_begin);
    &trace.events[passes[pass].events_begin..end]
}

/// Row `pass * batch + request` for each request of each pass.
fn lives_of_passes(workload: &Workload, trace: &Trace, passes: &[Pass], batch: u64) -> Vec<Life> {
    let (isl, osl) = (workload.lengths().0, workload.counted_tokens().1);
    let mut lives: Vec<Life> = (0..passes.len() as u64 * batch)
        .map(|row| {
            let begin_ns = passes[(row / batch) as usize].begin_ns;
            Life::new(row, isl, osl, begin_ns, begin_ns)
        })
        .collect();
    let mut pass = 0;
    for (index, (visible_ns, event)) in trace.stamped_events().enumerate() {
        while passes.get(pass + 1).is_some_and(|next| next.events_begin <= index) {
            pass += 1;
        }
        lives[pass * batch as usize + event.request as usize].token_at(visible_ns);
    }
    lives
}

fn lives_of_submissions(
    workload: &Workload,
    trace: &Trace,
    submissions: &[Submission],
    t0_ns: u64,
    t1_ns: u64,
) -> Vec<Life> {
    let (isl, osl) = workload.lengths();
    let mut lives: Vec<Life> = submissions
        .iter()
        .filter(|submission| arrives_inside(submission.arrival_ns, t0_ns, t1_ns))
        .map(|submission| Life::new(submission.id, isl, osl, submission.arrival_ns, submission.submitted_ns))
        .collect();
    let place: HashMap<u64, usize> =
        lives.iter().enumerate().map(|(index, life)| (life.row.id, index)).collect();
    for (visible_ns, event) in trace.stamped_events() {
        if let Some(&index) = place.get(&event.request) {
            lives[index].token_at(visible_ns);
        }
    }
    lives
}

/// Requests that had arrived and not finished, at both edges.
fn backlog(trace: &Trace, submissions: &[Submission], t0_ns: u64, t1_ns: u64) -> WindowEnd {
    let at = |edge_ns: u64| {
        let arrived = submissions.iter().filter(|submission| submission.arrival_ns <= edge_ns).count();
        let finished =
            trace.stamped_events().filter(|(at_ns, event)| event.last && *at_ns <= edge_ns).count();
        arrived.saturating_sub(finished) as u64
    };
    WindowEnd { at_t0: at(t0_ns), at_t1: at(t1_ns) }
}

fn latency(trace: &Trace, lives: &[Life], window: &Window) -> Latency {
    let of = |values: Vec<u64>, reason: &str| match LatencyHistogram::of(values) {
        Some(histogram) => Maybe::Value(histogram),
        None => Maybe::missing(reason),
    };
    Latency {
        ttft: of(lives.iter().filter_map(Life::ttft_ns).collect(), "no_request"),
        itl: of(lives.iter().flat_map(|life| life.gaps_ns.iter().copied()).collect(), "one_output_token"),
        tpot: of(lives.iter().filter_map(Life::tpot_ns).collect(), "one_output_token"),
        e2e: of(lives.iter().filter_map(Life::e2e_ns).collect(), "no_complete_request"),
        step: of(trace.step_times_ns(window.t0_ns, window.t1_ns).collect(), "no_step"),
    }
}

fn check(name: &str, ok: bool, detail: impl FnOnce() -> String) -> Check {
    Check { name: name.to_owned(), ok, detail: if ok { String::new() } else { detail() } }
}

fn common_checks(trace: &Trace, lives: &[Life]) -> Vec<Check> {
    let disorder = trace.steps.windows(2).position(|pair| pair[1].visible_ns < pair[0].visible_ns);
    let excess = lives.iter().find(|life| life.row.osl_tokens > life.expected_tokens);
    vec![
        check("stamps_never_go_back", disorder.is_none(), || {
            format!("step {} became visible before step {}", disorder.unwrap_or(0) + 1, disorder.unwrap_or(0))
        }),
        check("no_request_exceeds_its_output_length", excess.is_none(), || {
            excess.map_or_else(String::new, |life| {
                format!("request {} made {} tokens", life.row.id, life.row.osl_tokens)
            })
        }),
    ]
}

/// Greedy passes over the same requests must make the same tokens.
fn passes_repeat(trace: &Trace, passes: &[Pass]) -> Check {
    let first = hash_of(pass_events(trace, passes, 0));
    let odd = (1..passes.len()).find(|&pass| hash_of(pass_events(trace, passes, pass)) != first);
    check("passes_make_the_same_tokens", odd.is_none(), || {
        format!("pass {} made other tokens than pass 0", odd.unwrap_or(0))
    })
}

/// SHA-256 over the token ids, request by request, each as four little-endian bytes.
fn hash_of(events: &[TokenEvent]) -> String {
    let mut ordered: Vec<&TokenEvent> = events.iter().collect();
    ordered.sort_by_key(|event| (event.request, event.index));
    let mut hasher = Sha256::new();
    for event in ordered {
        hasher.update(event.token.to_le_bytes());
    }
    hex(&hasher.finalize())
}
