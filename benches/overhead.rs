//! What the harness itself costs per step: scheduling, bookkeeping and events, without any model. The fake engine on
//! a real clock answers at once, so all the time is ours. Prints µs per step for several batch sizes, of the engine
//! alone and of whole windows that the runner measures; the work is O(batch), and at batch 64 it should stay below
//! 20 µs.

#![allow(clippy::unwrap_used)]
#![allow(clippy::print_stdout)]

use std::sync::atomic::AtomicBool;

use tokmeter::backend::Sampling;
use tokmeter::clock::Clock;
use tokmeter::engine::{Engine, EngineLimits, FakeEngine, FakeScript, Request, StepOutput};
use tokmeter::record::{Outcome, Workload};
use tokmeter::runner::{Protocol, Stage, Witness, measure};

const BATCHES: [usize; 4] = [1, 8, 64, 256];
const ISL: usize = 512;
const OSL: u32 = 256;
const REPEATS: usize = 15;
const WINDOW: Protocol = Protocol {
    repeat: 1,
    min_window_ns: 5_000_000,
    max_window_ns: 10_000_000_000,
    warmup_ns: 0,
    steady: false,
    cool_to_c: None,
    seed: 0,
};

fn main() {
    println!(
        "fake engine, prompts of {ISL} tokens, {OSL} output tokens; least and median of {REPEATS} passes"
    );
    println!("{:<34} {:>6} {:>12} {:>12} {:>14}", "work", "batch", "least µs", "median µs", "least ns/token");
    for batch in BATCHES {
        let mut bench = Bench::new(batch);
        bench.report("decode", Bench::decode);
        bench.report("continuous batching, mixed steps", Bench::serve);
        bench.report("runner: decode cell", Bench::decode_cell);
        bench.report("runner: serve-closed cell", Bench::serve_cell);
    }
}

/// Time in the engine and steps it made.
struct Pass {
    ns: u64,
    steps: u64,
    decode_tokens: u64,
}

struct Bench {
    batch: usize,
    engine: FakeEngine,
    output: StepOutput,
    clock: Clock,
    next_id: u64,
}

impl Bench {
    fn new(batch: usize) -> Self {
        let clock = Clock::monotonic();
        let tokens = ISL + OSL as usize;
        let limits = EngineLimits {
            max_batch: batch,
            chunk: 512,
            pages: batch * tokens.div_ceil(16),
            max_context: tokens,
        };
        let script = FakeScript { steps_in_flight: 1, ..FakeScript::default() };
        let engine = FakeEngine::new(script, limits, 32_000, clock.clone()).expect("the limits are sound");
        Bench { batch, engine, output: StepOutput::default(), clock, next_id: 0 }
    }

    fn submit(&mut self, max_tokens: u32, hold: bool) {
        let request =
            Request { id: self.next_id, prompt: vec![1; ISL], max_tokens, sampling: Sampling::GREEDY, hold };
        self.next_id += 1;
        self.engine.submit(request).expect("the request fits");
    }

    /// Steps until idle. The clock is read around the whole pass, since two readings per step would cost as much as a
    /// small step.
    fn run(&mut self, mut after_step: impl FnMut(&mut Self)) -> Pass {
        let (mut steps, mut decode_tokens) = (0, 0);
        let begin = self.clock.now_ns();
        while self.engine.step(&mut self.output).expect("the fake engine does not fail") {
            steps += 1;
            decode_tokens += u64::from(self.output.decode_tokens);
            after_step(self);
        }
        Pass { ns: self.clock.now_ns() - begin, steps, decode_tokens }
    }

    /// Pure decode steps: a held batch, decoded again over the same context.
    fn decode(&mut self) -> Pass {
        let first = self.next_id;
        (0..self.batch).for_each(|_| self.submit(OSL, true));
        self.run(|_| {});
        let ids = first..self.next_id;
        ids.clone().for_each(|id| self.engine.rewind(id));
        let pass = self.run(|_| {});
        ids.for_each(|id| self.engine.release(id));
        pass
    }

    /// A closed loop: every finished request is followed by a new one, of another length.
    fn serve(&mut self) -> Pass {
        let mut left = 4 * self.batch;
        (0..self.batch)
            .for_each(|slot| self.submit(1 + OSL * (slot as u32 + 1) / self.batch as u32 / 2, false));
        self.run(|bench| {
            let finished = bench.output.events.iter().filter(|event| event.last).count();
            for _ in 0..finished.min(left) {
                bench.submit(OSL - 64 + (bench.next_id % 64) as u32, false);
            }
            left -= finished.min(left);
        })
    }

    /// A decode window as the runner measures it.
    fn decode_cell(&mut self) -> Pass {
        let (batch, depth) = (self.batch as u32, ISL as u32);
        self.window(Workload::Decode { batch, depth, osl: OSL - 1 })
    }

    /// A closed loop as the runner measures it.
    fn serve_cell(&mut self) -> Pass {
        let concurrency = self.batch as u32;
        self.window(Workload::ServeClosed {
            concurrency,
            isl: ISL as u32,
            osl: OSL,
            requests: 4 * concurrency,
        })
    }

    /// The window of one run: the engine's steps, the runner's trace of them, and in a serving cell its arrivals.
    fn window(&mut self, workload: Workload) -> Pass {
        let mut stage = Stage {
            engine: &mut self.engine,
            clock: self.clock.clone(),
            witness: Witness::blind(),
            stop: &AtomicBool::new(false),
            device: "fake".to_owned(),
            on_run: &mut |_, _| {},
        };
        let cell = measure(&mut stage, &workload, &WINDOW);
        assert_eq!(cell.outcome, Outcome::Measured);
        let window = &cell.runs[0].windows[0];
        Pass { ns: window.t1_ns - window.t0_ns, steps: window.steps, decode_tokens: window.tokens_out }
    }

    fn report(&mut self, work: &str, pass: fn(&mut Self) -> Pass) {
        pass(self);
        let mut passes: Vec<Pass> = (0..REPEATS).map(|_| pass(self)).collect();
        passes.sort_by(|a, b| (a.ns * b.steps).cmp(&(b.ns * a.steps)));
        let us_per_step = |pass: &Pass| pass.ns as f64 / pass.steps as f64 / 1e3;
        let least = &passes[0];
        println!(
            "{work:<34} {:>6} {:>12.2} {:>12.2} {:>14.1}",
            self.batch,
            us_per_step(least),
            us_per_step(&passes[REPEATS / 2]),
            least.ns as f64 / least.decode_tokens as f64
        );
    }
}
