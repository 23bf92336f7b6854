//! Serving cells: requests arrive while others run. Closed loop: a new one for each that finished. Open loop: at
//! Poisson times, whatever the engine does, and latency counts from the intended time, so that a slow engine cannot
//! hide its own queue. Load goes on unchanged while the window's requests are finished.

use super::summary::{self, Measured, Submission};
use super::trace::{Trace, arrives_inside, inside};
use super::warmup::{self, Stretch};
use super::{Halt, Protocol, Stage, steady, warmup_of};
use crate::engine::{Request, StepOutput};
use crate::record::{Drain, Maybe, Run, Warmup, WarmupEnd, Workload};
use crate::workload::{self, PoissonArrivals};

/// Seed distance between the arrivals of two runs.
const RUN_SEED_STRIDE: u64 = 0x0001_0000_0001;

/// Where the next request comes from.
enum Source {
    Closed { concurrency: u32 },
    Open { times: std::iter::Peekable<PoissonArrivals>, begin_ns: u64 },
}

/// Requests on their way into the engine, and the list of those that went.
struct Load<'a> {
    workload: &'a Workload,
    seed: u64,
    vocab_size: usize,
    source: Source,
    submissions: Vec<Submission>,
    finished: u64,
}

/// Runs the load until as many requests have finished as can be in flight, and on until a closed loop is flat where
/// that is asked for; then empties the engine. An open loop's pace is that of its arrivals, which is never flat.
pub(super) fn warm_up(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    trace: &mut Trace,
) -> Result<Warmup, Halt> {
    let mut output = StepOutput::default();
    let begin_ns = stage.clock.now_ns();
    let mut load = Load::new(stage, workload, protocol, u64::MAX);
    let mut ended = load.ramp(stage, protocol, &mut output, trace)?;
    if protocol.steady && load.is_closed() {
        ended = warmup::until_flat(stage, protocol, begin_ns, |stage, stretch| {
            load.stretch(stage, stretch, &mut output, trace)
        })?;
    }
    stage.finish_all(&mut output, trace)?;
    Ok(warmup_of(trace, stage.clock.now_ns() - begin_ns, load.submissions.len() as u64, ended))
}

/// One run: ramp, window, drain.
pub(super) fn run(
    stage: &mut Stage<'_>,
    workload: &Workload,
    protocol: &Protocol,
    index: u32,
    trace: &mut Trace,
) -> Result<Run, Halt> {
    let mut output = StepOutput::default();
    stage.shift_phase(protocol, index);
    let mut load = Load::new(stage, workload, protocol, u64::from(index));
    let begin_ns = stage.clock.now_ns();
    let ended = load.ramp(stage, protocol, &mut output, trace)?;
    let ramp = warmup_of(trace, stage.clock.now_ns() - begin_ns, load.submissions.len() as u64, ended);

    stage.witness.window_opens(&stage.clock);
    let t0_ns = stage.clock.now_ns();
    load.window(stage, protocol, t0_ns, &mut output, trace)?;
    let t1_ns = stage.clock.now_ns();
    let cpu = stage.witness.window_closes();

    let unfinished = load.drain(stage, protocol, (t0_ns, t1_ns), &mut output, trace)?;
    let drain = Drain { duration_ns: stage.clock.now_ns() - t1_ns, unfinished };
    let measured = Measured { t0_ns, t1_ns, cpu };
    let mut run = summary::of_serving(workload, trace, &load.submissions, measured, drain.unfinished);
    if protocol.steady && load.is_closed() {
        run.steady = steady::class_of(&times_between_finished_ns(trace, t0_ns, t1_ns));
    }
    stage.engine.reset()?;
    let run = stage.with_power(run, &summary::pieces_of_steps(trace));
    Ok(Run { ramp: Maybe::Value(ramp), drain: Maybe::Value(drain), ..run })
}

impl<'a> Load<'a> {
    fn new(stage: &Stage<'_>, workload: &'a Workload, protocol: &Protocol, run: u64) -> Self {
        let seed = protocol.seed.wrapping_add(run.wrapping_mul(RUN_SEED_STRIDE));
        let source = match *workload {
            Workload::ServeOpen { request_rate_per_s, .. } => Source::Open {
                times: PoissonArrivals::new(request_rate_per_s, seed).peekable(),
                begin_ns: stage.clock.now_ns(),
            },
            _ => Source::Closed { concurrency: concurrency(workload) },
        };
        let vocab_size = stage.engine.info().vocab_size;
        Load { workload, seed, vocab_size, source, submissions: Vec::new(), finished: 0 }
    }

    /// Requests measured at least, as the workload asks.
    fn wanted_requests(&self) -> u32 {
        match *self.workload {
            Workload::ServeClosed { requests, .. } | Workload::ServeOpen { requests, .. } => requests,
            _ => 0,
        }
    }

    fn is_closed(&self) -> bool {
        matches!(self.source, Source::Closed { .. })
    }

    /// Load until the engine is as full as it will be: as many requests have finished as are in flight. Of an open
    /// loop that is too fast for the engine, as many as run at once; the others wait, more and more of them.
    fn ramp(
        &mut self,
        stage: &mut Stage<'_>,
        protocol: &Protocol,
        output: &mut StepOutput,
        trace: &mut Trace,
    ) -> Result<WarmupEnd, Halt> {
        let begin_ns = stage.clock.now_ns();
        let most_at_once = stage.engine.info().limits.max_batch;
        loop {
            let elapsed_ns = stage.clock.now_ns() - begin_ns;
            let full = match self.source {
                Source::Closed { concurrency } => concurrency as usize,
                Source::Open { .. } => stage.engine.unfinished().min(most_at_once).max(1),
            };
            if self.finished >= full as u64 && elapsed_ns >= protocol.warmup_ns {
                return Ok(WarmupEnd::Fixed);
            }
            if elapsed_ns >= protocol.max_window_ns {
                return Ok(WarmupEnd::Bound);
            }
            self.turn(stage, output, trace)?;
        }
    }

    /// Load for one stretch of a warm-up: the times from one finished request to the next.
    fn stretch(
        &mut self,
        stage: &mut Stage<'_>,
        stretch: &Stretch,
        output: &mut StepOutput,
        trace: &mut Trace,
    ) -> Result<Vec<u64>, Halt> {
        let (begin_ns, before) = (stage.clock.now_ns(), self.finished);
        loop {
            let now_ns = stage.clock.now_ns();
            if stretch.is_over(now_ns, (self.finished - before).saturating_sub(1) as usize) {
                return Ok(times_between_finished_ns(trace, begin_ns, now_ns));
            }
            self.turn(stage, output, trace)?;
        }
    }

    /// Load until the window is long enough and has seen enough arrivals, or the time is up.
    fn window(
        &mut self,
        stage: &mut Stage<'_>,
        protocol: &Protocol,
        t0_ns: u64,
        output: &mut StepOutput,
        trace: &mut Trace,
    ) -> Result<(), Halt> {
        loop {
            self.turn(stage, output, trace)?;
            let elapsed_ns = stage.clock.now_ns() - t0_ns;
            // Arrivals are in order of time.
            let before = self.submissions.partition_point(|submission| submission.arrival_ns < t0_ns);
            let enough = self.submissions.len() - before >= self.wanted_requests() as usize;
            if elapsed_ns >= protocol.max_window_ns || (enough && elapsed_ns >= protocol.min_window_ns) {
                return Ok(());
            }
        }
    }

    /// Load until the window's requests are finished or the time is up; how many are not.
    fn drain(
        &mut self,
        stage: &mut Stage<'_>,
        protocol: &Protocol,
        (t0_ns, t1_ns): (u64, u64),
        output: &mut StepOutput,
        trace: &mut Trace,
    ) -> Result<u64, Halt> {
        let mut waiting: std::collections::HashSet<u64> = self
            .submissions
            .iter()
            .filter(|submission| arrives_inside(submission.arrival_ns, t0_ns, t1_ns))
            .map(|submission| submission.id)
            .collect();
        for event in trace.events.iter().filter(|event| event.last) {
            waiting.remove(&event.request);
        }
        while !waiting.is_empty() && stage.clock.now_ns() - t1_ns < protocol.max_window_ns {
            let seen = trace.events.len();
            self.turn(stage, output, trace)?;
            for event in trace.events[seen..].iter().filter(|event| event.last) {
                waiting.remove(&event.request);
            }
        }
        Ok(waiting.len() as u64)
    }

    /// Submits what is due, then one step; with nothing to do, waits for the next arrival.
    fn turn(
        &mut self,
        stage: &mut Stage<'_>,
        output: &mut StepOutput,
        trace: &mut Trace,
    ) -> Result<(), Halt> {
        self.submit_due(stage)?;
        let seen = trace.events.len();
        let busy = stage.step(output, trace)?;
        self.finished += trace.events[seen..].iter().filter(|event| event.last).count() as u64;
        if !busy && let Source::Open { times, begin_ns } = &mut self.source {
            let next_ns = times.peek().copied().unwrap_or(0);
            stage.clock.sleep_until_ns(begin_ns.saturating_add(next_ns));
        }
        Ok(())
    }

    fn submit_due(&mut self, stage: &mut Stage<'_>) -> Result<(), Halt> {
        loop {
            let now_ns = stage.clock.now_ns();
            let arrival_ns = match &mut self.source {
                Source::Closed { concurrency } => {
                    if stage.engine.unfinished() >= *concurrency as usize {
                        return Ok(());
                    }
                    now_ns
                }
                Source::Open { times, begin_ns } => {
                    match times.next_if(|at_ns| begin_ns.saturating_add(*at_ns) <= now_ns) {
                        Some(at_ns) => *begin_ns + at_ns,
                        None => return Ok(()),
                    }
                }
            };
            let request = self.next_request();
            let id = request.id;
            stage.engine.submit(request).map_err(|error| Halt::Failed(error.into()))?;
            self.submissions.push(Submission { id, arrival_ns, submitted_ns: now_ns });
        }
    }

    /// The first requests of a closed loop are cut to evenly spread lengths: otherwise all would start together,
    /// finish together, and the engine would see bursts that no service has.
    fn next_request(&self) -> Request {
        let id = self.submissions.len() as u64;
        let mut request = workload::request(self.workload, id, self.seed, self.vocab_size);
        if let Source::Closed { concurrency } = self.source
            && id < u64::from(concurrency)
        {
            let share = u64::from(request.max_tokens) * (id + 1);
            request.max_tokens = share.div_ceil(u64::from(concurrency)) as u32;
        }
        request
    }
}

/// From each request that finished in (`t0_ns`, `t1_ns`] to the next.
fn times_between_finished_ns(trace: &Trace, t0_ns: u64, t1_ns: u64) -> Vec<u64> {
    let ends: Vec<u64> = trace
        .stamped_events()
        .filter(|(at_ns, event)| event.last && inside(*at_ns, t0_ns, t1_ns))
        .map(|(at_ns, _)| at_ns)
        .collect();
    ends.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

fn concurrency(workload: &Workload) -> u32 {
    match *workload {
        Workload::ServeClosed { concurrency, .. } => concurrency,
        _ => 1,
    }
}
