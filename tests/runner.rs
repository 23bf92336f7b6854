//! The runner over the scripted engine, where every time is known in advance.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::AtomicBool;

use tokmeter::clock::Clock;
use tokmeter::engine::{
    Engine, EngineInfo, EngineLimits, FakeEngine, FakeScript, Request, StepOutput, SubmitError,
};
use tokmeter::meter::{PowerMeter, PowerSensor, Quantity, Samples, SensorInfo, Series, State};
use tokmeter::record::{Cell, Maybe, Outcome, RequestRow, Run, Steady, WarmupEnd, Workload};
use tokmeter::runner::{Protocol, Stage, Witness, measure};

const MS: u64 = 1_000_000;
const LIMITS: EngineLimits = EngineLimits { max_batch: 16, chunk: 64, pages: 4096, max_context: 4096 };
const PROTOCOL: Protocol = Protocol {
    repeat: 2,
    min_window_ns: 500 * MS,
    max_window_ns: 20_000 * MS,
    warmup_ns: 0,
    steady: false,
    cool_to_c: None,
    seed: 1,
};

/// 10 ms a step, and 1 ms for each prompt token or sequence in it.
fn script() -> FakeScript {
    FakeScript {
        base_ns: 10 * MS,
        per_prefill_token_ns: MS,
        per_decode_token_ns: MS,
        per_context_token_ps: 0,
        ..FakeScript::default()
    }
}

fn measured(workload: Workload, script: FakeScript) -> Cell {
    let clock = Clock::scripted();
    let engine = FakeEngine::new(script, LIMITS, 1000, clock.clone()).unwrap();
    measured_on(engine, clock, workload)
}

fn measured_on(engine: impl Engine, clock: Clock, workload: Workload) -> Cell {
    measured_by(engine, clock, workload, &PROTOCOL)
}

fn measured_by(mut engine: impl Engine, clock: Clock, workload: Workload, protocol: &Protocol) -> Cell {
    let mut stage = Stage {
        engine: &mut engine,
        clock,
        witness: Witness::blind(),
        stop: &AtomicBool::new(false),
        device: "fake".to_owned(),
        on_run: &mut |_, _| {},
    };
    measure(&mut stage, &workload, protocol)
}

fn only_window(run: &Run) -> &tokmeter::record::Window {
    assert_eq!(run.windows.len(), 1);
    &run.windows[0]
}

fn p50_ns(histogram: &Maybe<tokmeter::record::LatencyHistogram>) -> f64 {
    histogram.value().expect("a histogram").decode().unwrap().value_at_quantile(0.5) as f64
}

fn assert_within_a_thousandth(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() <= 1e-3, "{found} against {expected}");
}

#[test]
fn a_prefill_cell_counts_prompt_tokens_over_whole_passes() {
    let cell = measured(Workload::Prefill { batch: 2, isl: 50 }, script());
    assert_eq!(cell.outcome, Outcome::Measured);
    assert_eq!(cell.runs.len(), 2);
    for run in &cell.runs {
        let window = only_window(run);
        // 100 prompt tokens in chunks of 64: two steps, 10 + 64 and 10 + 36 ms. Five passes pass 500 ms.
        assert_eq!((window.passes, window.steps), (5, 10));
        assert_eq!((window.tokens_in, window.tokens_out), (500, 10));
        assert_eq!(window.t1_ns - window.t0_ns, 5 * 120 * MS);
        assert!(run.checks.iter().all(|check| check.ok), "{:?}", run.checks);
    }
    assert_eq!(cell.runs[0].output_token_sha256, cell.runs[1].output_token_sha256);
    assert!(cell.runs[0].output_token_sha256.value().is_some());
}

#[test]
fn a_decode_cell_times_no_prefill_and_returns_to_its_depth_in_every_pass() {
    let cell = measured(Workload::Decode { batch: 4, depth: 100, osl: 8 }, script());
    for run in &cell.runs {
        let window = only_window(run);
        // 8 steps of 10 + 4 ms a pass: 112 ms.
        assert_eq!((window.passes, window.steps, window.tokens_in, window.tokens_out), (5, 40, 0, 160));
        assert_eq!(window.t1_ns - window.t0_ns, 5 * 112 * MS);
        assert_eq!(run.latency.ttft, Maybe::missing("prefill_not_timed"));
        assert_within_a_thousandth(p50_ns(&run.latency.tpot), 14e6);
        assert_within_a_thousandth(p50_ns(&run.latency.step), 14e6);
        assert_eq!(run.requests.len(), 5 * 4);
        assert!(run.requests.iter().all(|row| row.complete && row.osl_tokens == 8));
    }
}

#[test]
fn a_generate_cell_separates_first_token_from_the_rest() {
    let cell = measured(Workload::Generate { batch: 2, isl: 32, osl: 5 }, script());
    let run = &cell.runs[0];
    // One step of 10 + 64 ms, then four of 10 + 2 ms.
    assert_within_a_thousandth(p50_ns(&run.latency.ttft), 74e6);
    assert_within_a_thousandth(p50_ns(&run.latency.itl), 12e6);
    assert_within_a_thousandth(p50_ns(&run.latency.tpot), 12e6);
    assert_within_a_thousandth(p50_ns(&run.latency.e2e), 122e6);
    assert_eq!(only_window(run).passes, 5);
}

#[test]
fn late_delivery_changes_no_count_and_no_rate() {
    for workload in [
        Workload::Prefill { batch: 2, isl: 50 },
        Workload::Decode { batch: 4, depth: 100, osl: 8 },
        Workload::Generate { batch: 2, isl: 32, osl: 5 },
    ] {
        let prompt = measured(workload, script());
        let late = measured(workload, FakeScript { steps_in_flight: 1, ..script() });
        for (prompt, late) in prompt.runs.iter().zip(&late.runs) {
            let (prompt_window, late_window) = (only_window(prompt), only_window(late));
            assert_eq!(prompt_window.tokens_out, late_window.tokens_out);
            assert_eq!(
                prompt_window.t1_ns - prompt_window.t0_ns,
                late_window.t1_ns - late_window.t0_ns,
                "the device is never idle within a pass"
            );
            assert_eq!(prompt.output_token_sha256, late.output_token_sha256);
        }
    }
}

#[test]
fn a_closed_loop_keeps_its_concurrency_and_measures_enough_requests() {
    let workload = Workload::ServeClosed { concurrency: 4, isl: 16, osl: 10, requests: 20 };
    let cell = measured(workload, script());
    for run in &cell.runs {
        let window = only_window(run);
        assert!(run.requests.len() >= 20, "{} requests", run.requests.len());
        assert!(run.requests.iter().all(|row| row.complete && row.osl_tokens == 10 && row.isl_tokens == 16));
        assert_eq!((window.backlog.at_t0, window.backlog.at_t1), (4, 4));
        assert_eq!(run.drain.value().unwrap().unfinished, 0);
        assert!(run.ramp.value().unwrap().requests >= 4);
        assert_eq!(run.steady, Steady::NotAssessed);
        let rate = window.tokens_out as f64 / (window.t1_ns - window.t0_ns) as f64;
        let all_in = window.tokens_in as f64 / window.tokens_out as f64;
        assert!((all_in - 1.6).abs() < 0.2, "16 tokens in for 10 out, found {all_in}");
        // 10 tokens cost ten shares of a 10 ms step, 10 ms of decode and 16 ms of prefill: 4 tokens in about 20.6 ms.
        assert!((rate * 1e9 / 194.0 - 1.0).abs() < 0.1, "{} tok/s", rate * 1e9);
    }
}

#[test]
fn an_open_loop_counts_latency_from_the_intended_arrival() {
    // 1 ms of service a request and 20 a second: nearly idle, so that every request waits for its own steps alone.
    let light = FakeScript { base_ns: MS, per_prefill_token_ns: 0, per_decode_token_ns: 0, ..script() };
    let workload = Workload::ServeOpen { request_rate_per_s: 20.0, isl: 8, osl: 2, requests: 50 };
    let run = &measured(workload, light).runs[0];
    assert!(run.requests.len() >= 50);
    assert_eq!(run.steady, Steady::NotAssessed);
    let seconds = (only_window(run).t1_ns - only_window(run).t0_ns) as f64 / 1e9;
    let rate = run.requests.len() as f64 / seconds;
    assert!((rate / 20.0 - 1.0).abs() < 0.5, "{rate} arrivals a second");
    assert!(p50_ns(&run.latency.ttft) < 2.1e6);
}

#[test]
fn an_open_loop_that_cannot_keep_up_is_unsustainable_and_bounded() {
    let slow = FakeScript { base_ns: 100 * MS, ..script() };
    let workload = Workload::ServeOpen { request_rate_per_s: 50.0, isl: 8, osl: 10, requests: 50 };
    let run = &measured(workload, slow).runs[0];
    assert_eq!(run.steady, Steady::Unsustainable);
    assert!(run.drain.value().unwrap().duration_ns <= PROTOCOL.max_window_ns + 1000 * MS);
    // The queue is in the latency: a request's own steps take about 1.2 s.
    let latest = run.latency.ttft.value().unwrap().max_ns;
    assert!(latest > 1_500 * MS, "the longest wait is {latest} ns");
}

/// Stalls once, for a second, before the first step at or after the given time.
struct Stalling {
    inner: FakeEngine,
    clock: Clock,
    stall_at_ns: u64,
}

impl Engine for Stalling {
    fn info(&self) -> EngineInfo {
        self.inner.info()
    }
    fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        self.inner.submit(request)
    }
    fn step(&mut self, output: &mut StepOutput) -> anyhow::Result<bool> {
        if self.clock.now_ns() >= self.stall_at_ns {
            self.stall_at_ns = u64::MAX;
            self.clock.advance_ns(1_000 * MS);
        }
        self.inner.step(output)
    }
    fn unfinished(&self) -> usize {
        self.inner.unfinished()
    }
    fn rewind(&mut self, request: u64) {
        self.inner.rewind(request);
    }
    fn release(&mut self, request: u64) {
        self.inner.release(request);
    }
    fn reset(&mut self) -> anyhow::Result<()> {
        self.inner.reset()
    }
}

#[test]
fn a_stall_shows_in_every_request_that_it_delayed() {
    let clock = Clock::scripted();
    // 16 sequences of one 40 ms step: 400 requests a second at most.
    let service =
        FakeScript { base_ns: 40 * MS, per_prefill_token_ns: 0, per_decode_token_ns: 0, ..script() };
    let inner = FakeEngine::new(service, LIMITS, 1000, clock.clone()).unwrap();
    let engine = Stalling { inner, clock: clock.clone(), stall_at_ns: 7_000 * MS };
    let workload = Workload::ServeOpen { request_rate_per_s: 100.0, isl: 1, osl: 1, requests: 1000 };
    let protocol = Protocol { repeat: 1, min_window_ns: 10_000 * MS, ..PROTOCOL };
    let cell = measured_by(engine, clock, workload, &protocol);
    let run = &cell.runs[0];
    let window = only_window(run);
    assert!(window.t0_ns < 6_000 * MS && window.t1_ns > 9_000 * MS, "the stall is not inside {window:?}");
    let seconds = (window.t1_ns - window.t0_ns) as f64 / 1e9;
    assert!((9.9..13.0).contains(&seconds), "{seconds} s");
    let p99_ns = run.latency.ttft.value().unwrap().decode().unwrap().value_at_quantile(0.99);
    assert!(p99_ns >= 900 * MS, "p99 is {p99_ns} ns");
    // The rows say the same, and how a stall hides when time counts from the submission.
    let p99 = |mut waits_ns: Vec<u64>| {
        waits_ns.sort_unstable();
        waits_ns[(waits_ns.len() as f64 * 0.99).ceil() as usize - 1] as f64
    };
    let first_ns = |row: &RequestRow| *row.first_token_ns.value().unwrap();
    let from_arrival_ns = p99(run.requests.iter().map(|row| first_ns(row) - row.arrival_ns).collect());
    assert_within_a_thousandth(p99_ns as f64, from_arrival_ns);
    let delayed = run.requests.iter().filter(|row| first_ns(row) - row.arrival_ns > 200 * MS).count();
    assert!((60..250).contains(&delayed), "{delayed} of {} requests waited", run.requests.len());
    let from_submission_ns = p99(run.requests.iter().map(|row| first_ns(row) - row.submitted_ns).collect());
    assert!(from_submission_ns < 0.6 * from_arrival_ns, "{from_submission_ns} ns from the submission");
}

#[test]
fn a_request_that_can_never_run_fails_its_cell_with_the_reason() {
    let cell = measured(Workload::Prefill { batch: 1, isl: 5000 }, script());
    let Outcome::Failed { error } = &cell.outcome else { panic!("{:?}", cell.outcome) };
    assert!(error.contains("5000 prompt tokens") && error.contains("4096"), "{error}");
    assert!(cell.runs.is_empty());
}

#[test]
fn a_signal_keeps_the_runs_that_were_whole() {
    let clock = Clock::scripted();
    let mut engine = FakeEngine::new(script(), LIMITS, 1000, clock.clone()).unwrap();
    let stop = AtomicBool::new(false);
    let mut stage = Stage {
        engine: &mut engine,
        clock,
        witness: Witness::blind(),
        stop: &stop,
        device: "fake".to_owned(),
        on_run: &mut |run, _| {
            if run == 1 {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        },
    };
    let cell = measure(&mut stage, &Workload::Prefill { batch: 1, isl: 10 }, &PROTOCOL);
    assert_eq!(cell.outcome, Outcome::Interrupted);
    assert_eq!(cell.runs.len(), 1);
    assert_eq!(stage.engine.unfinished(), 0, "the engine is empty again");
}

#[test]
fn the_same_seed_gives_the_same_cell_to_the_bit() {
    for workload in [
        Workload::ServeOpen { request_rate_per_s: 5.0, isl: 16, osl: 4, requests: 30 },
        Workload::ServeClosed { concurrency: 3, isl: 16, osl: 4, requests: 30 },
    ] {
        let noisy = FakeScript { noise_rel: 0.05, ..script() };
        assert_eq!(measured(workload, noisy.clone()), measured(workload, noisy));
    }
}

/// Windows of 33 decode passes of 11 ms after a warm-up of 100 ms, assessed.
const ASSESSED: Protocol =
    Protocol { min_window_ns: 360 * MS, warmup_ns: 100 * MS, steady: true, ..PROTOCOL };
const DECODE: Workload = Workload::Decode { batch: 1, depth: 64, osl: 1 };

fn assessed(workload: Workload, script: FakeScript) -> Cell {
    let clock = Clock::scripted();
    let engine =
        FakeEngine::new(FakeScript { per_context_token_ps: 0, ..script }, LIMITS, 1000, clock.clone());
    measured_by(engine.unwrap(), clock, workload, &ASSESSED)
}

fn classes(cell: &Cell) -> Vec<Steady> {
    cell.runs.iter().map(|run| run.steady).collect()
}

#[test]
fn an_even_load_is_flat_after_one_stretch_and_steady() {
    for workload in [
        DECODE,
        Workload::Prefill { batch: 1, isl: 2 },
        Workload::ServeClosed { concurrency: 4, isl: 4, osl: 8, requests: 40 },
    ] {
        let cell = assessed(workload, FakeScript { noise_rel: 0.01, ..script() });
        let warmup = cell.warmup.value().unwrap();
        assert_eq!(warmup.ended, Maybe::Value(WarmupEnd::Flat), "{workload:?}: {warmup:?}");
        assert_eq!(classes(&cell), [Steady::Steady; 2], "{workload:?}");
    }
}

#[test]
fn a_cold_engine_is_warmed_up_until_it_is_flat_and_longer_than_asked() {
    let cold = FakeScript { cold_rel: 1.0, cold_steps: 30, ..script() };
    let cell = assessed(DECODE, cold.clone());
    let warmup = cell.warmup.value().unwrap();
    assert_eq!(warmup.ended, Maybe::Value(WarmupEnd::Flat));
    assert!(warmup.steps >= 30 && warmup.duration_ns < 1_000 * MS, "{warmup:?}");
    assert_eq!(classes(&cell), [Steady::Steady; 2]);
    // Without the wait the first window is inside the slow stretch.
    let clock = Clock::scripted();
    let engine = FakeEngine::new(cold, LIMITS, 1000, clock.clone()).unwrap();
    let fixed = measured_by(engine, clock, DECODE, &Protocol { steady: false, ..ASSESSED });
    assert_eq!(fixed.warmup.value().unwrap().ended, Maybe::Value(WarmupEnd::Fixed));
    assert_eq!(classes(&fixed), [Steady::NotAssessed; 2]);
    let span_ns = |cell: &Cell| only_window(&cell.runs[0]).t1_ns - only_window(&cell.runs[0]).t0_ns;
    let passes = |cell: &Cell| only_window(&cell.runs[0]).passes;
    assert!(span_ns(&fixed) / passes(&fixed) > span_ns(&cell) / passes(&cell) * 11 / 10);
}

#[test]
fn a_warm_up_that_never_becomes_flat_ends_at_ten_times_its_length() {
    let cell = assessed(DECODE, FakeScript { cold_rel: 1.0, cold_steps: 300, ..script() });
    let warmup = cell.warmup.value().unwrap();
    assert_eq!(warmup.ended, Maybe::Value(WarmupEnd::Bound));
    assert!(warmup.duration_ns >= 1_000 * MS && warmup.duration_ns < 1_030 * MS, "{warmup:?}");
    assert_eq!(cell.outcome, Outcome::Measured);
    assert_eq!(classes(&cell)[0], Steady::Warmup);
}

#[test]
fn a_shift_within_a_window_flags_that_run_alone() {
    // The warm-up takes 12 steps, two of them for the first pass; each run about 33.
    for (shift, class) in [(1.05, Steady::Slowdown), (0.95, Steady::Warmup)] {
        let cell = assessed(DECODE, FakeScript { shift, shift_at_step: 25, ..script() });
        assert_eq!(classes(&cell), [class, Steady::Steady], "{shift}");
        assert_eq!(cell.outcome, Outcome::Measured, "kept");
        assert!(only_window(&cell.runs[0]).passes >= 28);
    }
}

#[test]
fn an_open_loop_is_never_assessed_by_its_pace_and_few_passes_are_not_at_all() {
    let light = FakeScript { base_ns: MS, per_prefill_token_ns: 0, per_decode_token_ns: 0, ..script() };
    let open = Workload::ServeOpen { request_rate_per_s: 20.0, isl: 8, osl: 2, requests: 50 };
    let cell = assessed(open, light);
    assert_eq!(classes(&cell), [Steady::NotAssessed; 2]);
    assert_eq!(cell.warmup.value().unwrap().ended, Maybe::Value(WarmupEnd::Fixed));
    let long = assessed(Workload::Prefill { batch: 1, isl: 60 }, script());
    assert_eq!(classes(&long), [Steady::NotAssessed; 2], "6 passes of 71 ms");
}

#[test]
fn an_open_loops_window_opens_on_a_queue_that_has_filled() {
    // 16 run at once, about 1.1 s each: 10 a second keep about 11 in flight, which take about a second to gather.
    let slow = FakeScript { base_ns: 100 * MS, per_prefill_token_ns: 0, per_decode_token_ns: 0, ..script() };
    let cell =
        measured(Workload::ServeOpen { request_rate_per_s: 10.0, isl: 8, osl: 11, requests: 60 }, slow);
    for run in &cell.runs {
        assert!(only_window(run).backlog.at_t0 >= 5, "{:?}", only_window(run).backlog);
        assert!(run.ramp.value().unwrap().duration_ns >= 1_500 * MS, "{:?}", run.ramp);
        assert_ne!(run.steady, Steady::Unsustainable);
    }
}

/// A device of 80 °C that cools by 1 °C a second while nothing is asked of it, to 40 °C.
struct Cooling {
    clock: Clock,
    since_ns: u64,
}

impl PowerSensor for Cooling {
    fn info(&self) -> SensorInfo {
        SensorInfo {
            source: "replay",
            scope: "gpu",
            quantity: Quantity::Power,
            devices: Vec::new(),
            systematic_share: Maybe::missing("not_known"),
            shortest_window_ns: 0,
            idle_floor_w: None,
            trace: Maybe::missing("not_a_trace"),
        }
    }

    fn begin(&mut self, _: &Clock) {}

    fn end(&mut self) {}

    /// A look at the temperature takes half a second; anything else is work, which heats it again.
    fn collect(&mut self, _: &Clock, (t0_ns, t1_ns): (u64, u64)) -> Samples {
        if t1_ns - t0_ns != 500 * MS {
            self.since_ns = self.clock.now_ns();
        }
        let temperature_c = (80.0 - (self.clock.now_ns() - self.since_ns) as f64 / 1e9).max(40.0);
        let no = || Err("not_known".to_owned());
        let state = State {
            sm_mhz: Err("not_known".to_owned()),
            memory_mhz: Err("not_known".to_owned()),
            temperature_c: Ok(temperature_c),
            reasons_mask: no(),
            software_power_cap_ns: no(),
            software_thermal_ns: no(),
            hardware_thermal_ns: no(),
            hardware_power_brake_ns: no(),
        };
        let series = Series { states: vec![state.clone(), state], ..Series::failed("not_known") };
        Samples { series: vec![series], sampler_cpu_ns: Maybe::missing("not_known"), clock_stepped: false }
    }
}

fn cooled_to(cool_to_c: f64) -> Cell {
    let clock = Clock::scripted();
    let mut engine = FakeEngine::new(script(), LIMITS, 1000, clock.clone()).unwrap();
    let mut meter = PowerMeter::of(Ok(Box::new(Cooling { clock: clock.clone(), since_ns: 0 })));
    let mut stage = Stage {
        engine: &mut engine,
        clock,
        witness: Witness::blind().metered(&mut meter),
        stop: &AtomicBool::new(false),
        device: "fake".to_owned(),
        on_run: &mut |_, _| {},
    };
    measure(&mut stage, &DECODE, &Protocol { cool_to_c: Some(cool_to_c), ..ASSESSED })
}

#[test]
fn a_device_cools_before_each_run_and_is_warmed_up_again() {
    let cell = cooled_to(70.0);
    assert_eq!(cell.outcome, Outcome::Measured);
    for run in &cell.runs {
        let cooldown = run.cooldown.value().unwrap();
        assert!(cooldown.reached && cooldown.end_c <= 70.0 && cooldown.end_c > 69.0, "{cooldown:?}");
        assert!(cooldown.duration_ns >= 9_000 * MS && cooldown.duration_ns <= 11_000 * MS, "{cooldown:?}");
        assert!(cooldown.warmup.steps >= 8, "{cooldown:?}");
        assert_eq!(run.output_token_sha256, cell.runs[0].output_token_sha256);
    }
    assert_eq!(cell.warmup.value(), cell.runs[0].cooldown.value().map(|cooldown| &cooldown.warmup));
}

#[test]
fn a_device_that_stays_warm_is_waited_for_two_minutes_and_no_longer() {
    let cell = cooled_to(30.0);
    let cooldown = cell.runs[1].cooldown.value().unwrap();
    assert!(!cooldown.reached && cooldown.end_c == 40.0, "{cooldown:?}");
    assert!(cooldown.duration_ns.abs_diff(120_000 * MS) <= 500 * MS, "{cooldown:?}");
}
