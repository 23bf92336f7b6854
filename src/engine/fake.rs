//! An engine without a model: the real scheduler, steps that take as long as a script says, tokens from a hash. On a
//! scripted clock whole command-line runs are exact to the byte; on a real clock every step returns at once, which
//! leaves the harness's own cost. Its records are no measurements and say so.

use std::collections::VecDeque;

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::scheduler::{Scheduler, StepPlan};
use super::{Engine, EngineInfo, EngineLimits, Request, StepOutput, SubmitError};
use crate::backend::{BackendInfo, Batch, Memory};
use crate::clock::Clock;
use crate::record::Maybe;

/// How long a step takes: the sum of the costs, times `slowdown`, times the session's and the step's own noise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FakeScript {
    /// Cost of any step.
    pub base_ns: u64,
    pub per_prefill_token_ns: u64,
    pub per_decode_token_ns: u64,
    /// Cost of each token attended to, summed over the step's sequences, picoseconds.
    pub per_context_token_ps: u64,
    /// Factor on every duration: a regression to be found.
    pub slowdown: f64,
    /// Standard deviation of each step's duration, relative to it.
    pub noise_rel: f64,
    /// Standard deviation of a factor drawn once for the engine's whole life.
    pub session_noise_rel: f64,
    /// The first step is slower by this share of its duration, and each later one by less, until after `cold_steps`
    /// nothing is left: an engine that has to warm up.
    pub cold_rel: f64,
    pub cold_steps: u64,
    /// Factor on every duration from step number `shift_at_step` on; 0 for never.
    pub shift: f64,
    pub shift_at_step: u64,
    /// Seed of both noises; same script and requests, same durations.
    pub seed: u64,
    /// As [`crate::backend::Backend::STEPS_IN_FLIGHT`]: 1 reports each step one call late.
    pub steps_in_flight: usize,
}

impl Default for FakeScript {
    /// Roughly a small model on two CPU cores, without noise.
    fn default() -> Self {
        FakeScript {
            base_ns: 10_000_000,
            per_prefill_token_ns: 1_000_000,
            per_decode_token_ns: 1_500_000,
            per_context_token_ps: 2_000_000,
            slowdown: 1.0,
            noise_rel: 0.0,
            session_noise_rel: 0.0,
            cold_rel: 0.0,
            cold_steps: 0,
            shift: 1.0,
            shift_at_step: 0,
            seed: 0,
            steps_in_flight: 0,
        }
    }
}

impl FakeScript {
    fn check(&self) -> anyhow::Result<()> {
        let most = 1 << 10;
        for (name, factor) in [("slowdown", self.slowdown), ("shift", self.shift)] {
            ensure!(
                factor.is_finite() && factor > 0.0,
                "{name} of the fake engine is {factor}, expected a positive number"
            );
        }
        let cold_rel = self.cold_rel;
        ensure!(
            (0.0..=1e3).contains(&cold_rel),
            "cold_rel of the fake engine is {cold_rel}, expected 0 to 1000"
        );
        for (name, value) in [("noise_rel", self.noise_rel), ("session_noise_rel", self.session_noise_rel)] {
            ensure!((0.0..=1.0).contains(&value), "{name} of the fake engine is {value}, expected 0 to 1");
        }
        let deepest = self.steps_in_flight;
        ensure!(deepest <= most, "steps_in_flight of the fake engine is {deepest}, expected 0 to {most}");
        Ok(())
    }

    /// Duration of step number `step`.
    fn duration_ns(&self, plan: &StepPlan, step: u64) -> u64 {
        let cost_ns = self.base_ns as f64
            + self.per_prefill_token_ns as f64 * f64::from(plan.prefill_tokens)
            + self.per_decode_token_ns as f64 * f64::from(plan.decode_tokens)
            + self.per_context_token_ps as f64 * plan.context_tokens as f64 / 1000.0;
        let session = noise_factor(self.session_noise_rel, mix(self.seed, u64::MAX));
        let noise = noise_factor(self.noise_rel, mix(self.seed, step));
        (cost_ns * self.slowdown * self.stage_factor(step) * session * noise).round() as u64
    }

    /// How much longer a step takes for the time at which it comes.
    fn stage_factor(&self, step: u64) -> f64 {
        let left = self.cold_steps.saturating_sub(step) as f64 / self.cold_steps.max(1) as f64;
        let shifted = self.shift_at_step > 0 && step >= self.shift_at_step;
        (1.0 + self.cold_rel * left) * if shifted { self.shift } else { 1.0 }
    }
}

/// `1 + relative · z` for a standard normal `z`, cut off where time would run backwards. The normal is a sum of
/// twelve 16-bit uniforms: good to six deviations, and made of exact additions, so that it is the same on every
/// platform, unlike a logarithm or a cosine.
fn noise_factor(relative: f64, seed: u64) -> f64 {
    let words = [mix(seed, 0), mix(seed, 1), mix(seed, 2)];
    let sum: u64 = words.iter().flat_map(|word| [0, 16, 32, 48].map(|shift| (word >> shift) & 0xffff)).sum();
    let z = (sum as f64 + 6.0) / 65536.0 - 6.0;
    (1.0 + relative * z).max(0.05)
}

/// A hash of two integers (the finaliser of SplitMix64 over their combination).
fn mix(seed: u64, counter: u64) -> u64 {
    let mut z = seed.rotate_left(32) ^ counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A step on the imagined device.
struct InFlight {
    plan: StepPlan,
    started_ns: u64,
    done_ns: u64,
}

pub struct FakeEngine {
    script: FakeScript,
    scheduler: Scheduler,
    clock: Clock,
    /// Oldest first.
    in_flight: VecDeque<InFlight>,
    /// Steps queued so far: the counter behind the noise.
    steps: u64,
    /// When the imagined device has worked off its queue.
    device_free_ns: u64,
    batch: Batch,
    tokens: Vec<u32>,
}

impl FakeEngine {
    /// # Errors
    /// When a limit or a number of the script makes no sense.
    pub fn new(
        script: FakeScript,
        limits: EngineLimits,
        vocab_size: usize,
        clock: Clock,
    ) -> anyhow::Result<Self> {
        limits.check()?;
        script.check()?;
        ensure!(vocab_size > 0, "the vocabulary of the fake engine is 0, expected at least 1");
        Ok(FakeEngine {
            scheduler: Scheduler::new(limits, vocab_size),
            script,
            clock,
            in_flight: VecDeque::new(),
            steps: 0,
            device_free_ns: 0,
            batch: Batch::default(),
            tokens: Vec::with_capacity(limits.max_batch),
        })
    }

    fn queue(&mut self) -> bool {
        let Some(plan) = self.scheduler.plan(&mut self.batch) else { return false };
        let started_ns = self.clock.now_ns();
        let done_ns =
            started_ns.max(self.device_free_ns).saturating_add(self.script.duration_ns(&plan, self.steps));
        self.device_free_ns = done_ns;
        self.steps += 1;
        self.in_flight.push_back(InFlight { plan, started_ns, done_ns });
        true
    }

    fn collect(&mut self, output: &mut StepOutput) {
        let Some(InFlight { plan, started_ns, done_ns }) = self.in_flight.pop_front() else { return };
        // Not a sleep: a real clock goes its own way.
        self.clock.advance_ns(done_ns.saturating_sub(self.clock.now_ns()));
        output.visible_ns = self.clock.now_ns();
        output.started_ns = started_ns;
        output.prefill_tokens = plan.prefill_tokens;
        output.decode_tokens = plan.decode_tokens;
        let vocab_size = self.scheduler.vocab_size() as u64;
        let token = |(request, index)| (mix(request, u64::from(index)) % vocab_size) as u32;
        self.tokens.clear();
        self.tokens.extend(plan.samples().map(token));
        self.scheduler.apply(plan, &self.tokens, &mut output.events);
    }
}

impl Engine for FakeEngine {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: "fake",
            backend: BackendInfo {
                name: "fake",
                compute_dtype: "none",
                kv_dtype: "none",
                threads: 1,
                kernels: None,
                cublaslt: Maybe::missing("not_cuda"),
            },
            limits: self.scheduler.limits(),
            vocab_size: self.scheduler.vocab_size(),
            memory: Memory::default(),
        }
    }

    fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        self.scheduler.submit(request)
    }

    fn step(&mut self, output: &mut StepOutput) -> anyhow::Result<bool> {
        output.clear();
        let queued = self.queue();
        let in_flight = self.in_flight.len();
        if in_flight > self.script.steps_in_flight || !queued {
            self.collect(output);
        }
        Ok(in_flight > 0)
    }

    fn unfinished(&self) -> usize {
        self.scheduler.unfinished()
    }

    fn rewind(&mut self, request: u64) {
        self.scheduler.rewind(request);
    }

    fn release(&mut self, request: u64) {
        self.scheduler.release(request);
    }

    fn reset(&mut self) -> anyhow::Result<()> {
        while !self.in_flight.is_empty() {
            self.collect(&mut StepOutput::default());
        }
        self.scheduler.reset();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Sampling;

    const LIMITS: EngineLimits = EngineLimits { max_batch: 4, chunk: 8, pages: 64, max_context: 256 };

    fn request(id: u64, prompt: usize, max_tokens: u32) -> Request {
        Request { id, prompt: vec![0; prompt], max_tokens, sampling: Sampling::GREEDY, hold: false }
    }

    fn script() -> FakeScript {
        FakeScript {
            base_ns: 100,
            per_prefill_token_ns: 10,
            per_decode_token_ns: 3,
            per_context_token_ps: 1000,
            ..FakeScript::default()
        }
    }

    fn run(script: FakeScript) -> Vec<StepOutput> {
        let mut engine = FakeEngine::new(script, LIMITS, 1000, Clock::scripted()).unwrap();
        engine.submit(request(1, 10, 3)).unwrap();
        engine.submit(request(2, 4, 2)).unwrap();
        let (mut outputs, mut output) = (Vec::new(), StepOutput::default());
        while engine.step(&mut output).unwrap() {
            if !output.is_empty() {
                outputs.push(output.clone());
            }
        }
        outputs
    }

    fn stamps(outputs: &[StepOutput]) -> Vec<(u64, u64)> {
        outputs.iter().map(|output| (output.started_ns, output.visible_ns)).collect()
    }

    #[test]
    fn a_step_takes_what_the_script_says() {
        let outputs = run(script());
        let work: Vec<_> =
            outputs.iter().map(|o| (o.prefill_tokens, o.decode_tokens, o.events.len())).collect();
        assert_eq!(work, [(8, 0, 0), (6, 0, 2), (0, 2, 2), (0, 1, 1)]);
        let (first, second) = (100 + 80 + 8, 100 + 60 + 10 + 4);
        let (third, fourth) = (100 + 6 + 11 + 5, 100 + 3 + 12);
        let ends = [first, first + second, first + second + third, first + second + third + fourth];
        let expected: Vec<_> = [0].into_iter().chain(ends).zip(ends).collect();
        assert_eq!(stamps(&outputs), expected);
    }

    #[test]
    fn a_step_in_flight_is_queued_before_the_last_one_is_seen_and_changes_no_token() {
        let late = run(FakeScript { steps_in_flight: 1, ..script() });
        let prompt = run(script());
        let events =
            |outputs: &[StepOutput]| -> Vec<_> { outputs.iter().flat_map(|o| o.events.clone()).collect() };
        assert_eq!(events(&late), events(&prompt));
        let visible = |outputs: &[StepOutput]| -> Vec<_> { stamps(outputs).iter().map(|s| s.1).collect() };
        assert_eq!(visible(&late), visible(&prompt), "the device is never idle either way");
        assert!(late[1].started_ns < late[0].visible_ns);
    }

    #[test]
    fn noise_is_reproducible_and_has_the_deviation_it_was_given() {
        let noisy = FakeScript { noise_rel: 0.05, seed: 7, ..script() };
        assert_eq!(run(noisy.clone()), run(noisy.clone()));
        assert_ne!(stamps(&run(noisy)), stamps(&run(FakeScript { noise_rel: 0.05, seed: 8, ..script() })));

        let draws: Vec<f64> = (0..20_000).map(|step| noise_factor(0.05, mix(7, step))).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|draw| (draw - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        // Four standard errors of the mean and of the deviation of 20 000 draws.
        assert!((mean - 1.0).abs() < 4.0 * 0.05 / 20_000f64.sqrt(), "mean {mean}");
        assert!(
            (variance.sqrt() / 0.05 - 1.0).abs() < 4.0 / 40_000f64.sqrt(),
            "deviation {}",
            variance.sqrt()
        );
    }

    #[test]
    fn session_noise_and_slowdown_scale_every_step_alike() {
        let plain = run(FakeScript { base_ns: 1_000_000_000, ..script() });
        for changed in [
            FakeScript { slowdown: 1.25, base_ns: 1_000_000_000, ..script() },
            FakeScript { session_noise_rel: 0.1, base_ns: 1_000_000_000, ..script() },
        ] {
            let ratios: Vec<f64> = run(changed)
                .iter()
                .zip(&plain)
                .map(|(slow, plain)| {
                    (slow.visible_ns - slow.started_ns) as f64 / (plain.visible_ns - plain.started_ns) as f64
                })
                .collect();
            assert!((ratios[0] - 1.0).abs() > 1e-3, "{ratios:?}");
            // Durations are rounded to nanoseconds of about a second.
            assert!(ratios.iter().all(|ratio| (ratio - ratios[0]).abs() < 1e-8), "{ratios:?}");
        }
    }

    #[test]
    fn on_a_real_clock_a_step_returns_at_once() {
        let clock = Clock::monotonic();
        let hour = FakeScript { base_ns: 3_600_000_000_000, ..FakeScript::default() };
        let mut engine = FakeEngine::new(hour, LIMITS, 10, clock.clone()).unwrap();
        engine.submit(request(1, 4, 1)).unwrap();
        let mut output = StepOutput::default();
        assert!(engine.step(&mut output).unwrap());
        assert_eq!(output.events.len(), 1);
        assert!(output.visible_ns >= output.started_ns && clock.now_ns() < 3_600_000_000_000);
    }

    #[test]
    fn a_script_may_be_written_in_part_but_not_misspelt() {
        let script: FakeScript = toml::from_str("slowdown = 1.05\nseed = 3").unwrap();
        assert_eq!(script, FakeScript { slowdown: 1.05, seed: 3, ..FakeScript::default() });
        let error = toml::from_str::<FakeScript>("slow_down = 1.05").unwrap_err().to_string();
        assert!(error.contains("unknown field `slow_down`"), "{error}");
    }

    #[test]
    fn a_script_that_makes_no_sense_is_refused() {
        let refuse =
            |script| FakeEngine::new(script, LIMITS, 10, Clock::scripted()).err().unwrap().to_string();
        assert_eq!(
            refuse(FakeScript { slowdown: -1.0, ..script() }),
            "slowdown of the fake engine is -1, expected a positive number"
        );
        assert_eq!(
            refuse(FakeScript { noise_rel: f64::NAN, ..script() }),
            "noise_rel of the fake engine is NaN, expected 0 to 1"
        );
    }
}
