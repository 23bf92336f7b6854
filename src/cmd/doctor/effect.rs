//! What reading the power sensor takes from the speed (`--sampler-effect`): the same decode steps with the sensor read and
//! not read, in pairs of windows whose order is drawn from the seed.

use serde::Serialize;

use super::{Asked, Section};
use crate::analysis::stats::{Change, paired_change};
use crate::arch::Config;
use crate::backend::{Backend, Cpu, CpuDType, Cuda, Sampling};
use crate::clock::Clock;
use crate::cmd::device::{self, GemmChoice, JitChoice, Target};
use crate::cmd::model::{config_of, name_of};
use crate::cmd::{bad_file, usage};
use crate::engine::{Engine, EngineLimits, LlmEngine, Request, StepOutput, pages_needed};
use crate::machine::Roots;
use crate::meter::{Absent, Choice, PowerMeter, Subject};
use crate::model::{Model, shape_of};
use crate::record::Maybe;
use crate::units::format_significant;
use crate::weights::synthetic::Synthetic;
use crate::workload;

/// Context of the sequence that is decoded, and the steps of one pass over it, tokens. One sequence of a small model has
/// the shortest steps, and loses most to whatever else runs.
const DEPTH: usize = 64;
const PASS_STEPS: u32 = 16;
const WEIGHTS_SEED: u64 = 0;
const CONFIDENCE: f64 = 0.95;
/// More than this share of the speed is too much.
const ALLOWED_RATIO: f64 = 0.003;

/// What is asked of the measurement.
pub(super) struct Wanted {
    pub(super) asked: Asked,
    pub(super) power: Choice,
    pub(super) model: String,
    pub(super) pairs: u32,
    pub(super) window_ns: u64,
    pub(super) seed: u64,
}

/// What was measured, for files.
#[derive(Debug, Serialize)]
pub(super) struct Effect {
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_a_measurement: Option<String>,
    /// As the meter of a record.
    source: Maybe<String>,
    model: String,
    weights: &'static str,
    depth_tokens: usize,
    seed: u64,
    window_ns: u64,
    /// Tokens per second while the sensor was read and while it was not, pair by pair.
    pairs: Vec<Pair>,
    /// Change of tokens per second by reading the sensor: −0.01 is one percent slower. With the 95 % interval over pairs.
    tokens_per_s_change: Maybe<Change>,
    /// CPU time of the reading thread over the time of the windows.
    sampler_cpu_share: Maybe<f64>,
}

/// Two neighbouring windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Pair {
    reading_first: bool,
    reading_tokens_per_s: f64,
    not_reading_tokens_per_s: f64,
}

/// # Errors
/// When the model or a named trace cannot be read, the command line does not fit the device, or the device fails.
pub(super) fn measure(request: &Wanted) -> anyhow::Result<(Section, Option<Effect>)> {
    let mut section = Section::new("sampler effect");
    let target = Target::settle(&request.asked.to_string(), None, false, GemmChoice::Auto, JitChoice::Sass)?;
    let clock = Clock::monotonic();
    let subject = match target {
        Target::Cpu(_) => Subject::Cpu,
        Target::Cuda { index, .. } => Subject::Gpus(device::gpu_id(index).into_iter().collect()),
    };
    let meter =
        PowerMeter::open(&request.power, &subject, &clock, &Roots::default().sys).map_err(bad_file)?;
    if let Some(absent) = meter.absence() {
        missing(&mut section, &target, absent);
        return Ok((section, None));
    }
    let config = config_of(&request.model)?;
    let (engine, not_a_measurement) = engine(target, config, &clock)?;
    let source = meter.record().source;
    let replayed = meter.is_replay().then(|| "the trace is read from a file after each window".to_owned());
    let mut bench = Bench::new(engine, meter, clock)?;
    let (pairs, sampler_cpu_share) = bench.pairs(request)?;
    let rates: Vec<(f64, f64)> =
        pairs.iter().map(|pair| (pair.reading_tokens_per_s, pair.not_reading_tokens_per_s)).collect();
    let effect = Effect {
        device: target.to_string(),
        not_a_measurement: not_a_measurement.or(replayed),
        source,
        model: name_of(&request.model),
        weights: "synthetic",
        depth_tokens: DEPTH,
        seed: request.seed,
        window_ns: request.window_ns,
        tokens_per_s_change: paired_change(&rates, CONFIDENCE).ok_or("needs_2_pairs").into(),
        pairs,
        sampler_cpu_share,
    };
    report(&mut section, &effect);
    Ok((section, Some(effect)))
}

fn missing(section: &mut Section, target: &Target, absent: &Absent) {
    section.missing(format!("{target} power"), absent.to_string(), absent.remedy.as_deref());
}

fn engine(
    target: Target,
    config: Config,
    clock: &Clock,
) -> anyhow::Result<(Box<dyn Engine>, Option<String>)> {
    let shape = shape_of(&config);
    match target {
        Target::Cpu(_) => Ok((with_weights(Cpu::new(shape, CpuDType::F32), config, clock)?, None)),
        Target::Cuda { index, options } => {
            let cuda = Cuda::new(index, shape, options)?;
            let not_a_measurement = device::not_a_measurement(&cuda);
            Ok((with_weights(cuda, config, clock)?, not_a_measurement))
        }
    }
}

fn with_weights<B: Backend + 'static>(
    mut backend: B,
    config: Config,
    clock: &Clock,
) -> anyhow::Result<Box<dyn Engine>> {
    let tokens = DEPTH + PASS_STEPS as usize + 1;
    if config.max_position_embeddings < tokens {
        return Err(usage(format!(
            "--model has a context of {} tokens, expected at least {tokens}",
            config.max_position_embeddings
        )));
    }
    let model = Model::load(&mut backend, &Synthetic::new(config, WEIGHTS_SEED), &mut |_| {})?;
    let limits =
        EngineLimits { max_batch: 1, chunk: DEPTH, pages: pages_needed(tokens), max_context: tokens };
    Ok(Box::new(LlmEngine::new(backend, model, limits, clock.clone())?))
}

/// One sequence that is decoded again and again, and the sensor beside it.
struct Bench {
    engine: Box<dyn Engine>,
    meter: PowerMeter,
    clock: Clock,
    output: StepOutput,
    sampler_cpu: Vec<Maybe<f64>>,
}

impl Bench {
    fn new(engine: Box<dyn Engine>, meter: PowerMeter, clock: Clock) -> anyhow::Result<Self> {
        let mut bench =
            Bench { engine, meter, clock, output: StepOutput::default(), sampler_cpu: Vec::new() };
        let prompt = (0..DEPTH as u32).map(|token| token % 7).collect();
        let (max_tokens, sampling) = (PASS_STEPS + 1, Sampling::GREEDY);
        bench.engine.submit(Request { id: 0, prompt, max_tokens, sampling, hold: true })?;
        bench.finish()?;
        Ok(bench)
    }

    fn pairs(&mut self, request: &Wanted) -> anyhow::Result<(Vec<Pair>, Maybe<f64>)> {
        // What is slow at first belongs to no pair.
        self.window(false, request.window_ns)?;
        let mut pairs = Vec::with_capacity(request.pairs as usize);
        for index in 0..request.pairs {
            let reading_first = reads_first(request.seed, index);
            let first = self.window(reading_first, request.window_ns)?;
            let second = self.window(!reading_first, request.window_ns)?;
            let (reading, not_reading) = if reading_first { (first, second) } else { (second, first) };
            pairs.push(Pair {
                reading_first,
                reading_tokens_per_s: reading,
                not_reading_tokens_per_s: not_reading,
            });
        }
        Ok((pairs, mean_share(&self.sampler_cpu)))
    }

    /// Tokens per second over whole passes, until they have taken `window_ns`. A pass before them is not counted.
    fn window(&mut self, is_reading: bool, window_ns: u64) -> anyhow::Result<f64> {
        let begin_ns = self.clock.now_ns();
        if is_reading {
            self.meter.begin(&self.clock);
        }
        self.pass()?;
        let (t0_ns, mut tokens_out) = (self.clock.now_ns(), 0);
        while self.clock.now_ns() < t0_ns + window_ns {
            self.pass()?;
            tokens_out += u64::from(PASS_STEPS);
        }
        let t1_ns = self.clock.now_ns();
        if is_reading {
            self.meter.end();
            let cpu_ns = self.meter.sampler_cpu_ns(&self.clock, (t0_ns, t1_ns));
            self.sampler_cpu.push(cpu_ns.map(|cpu_ns| cpu_ns as f64 / (t1_ns - begin_ns) as f64));
        }
        Ok(tokens_out as f64 / ((t1_ns - t0_ns) as f64 / 1e9))
    }

    fn pass(&mut self) -> anyhow::Result<()> {
        self.engine.rewind(0);
        self.finish()
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        while self.engine.unfinished() > 0 {
            self.output.clear();
            anyhow::ensure!(
                self.engine.step(&mut self.output)?,
                "the engine is idle with an unfinished request"
            );
        }
        Ok(())
    }
}

/// Whether a pair begins with the window in which the sensor is read.
fn reads_first(seed: u64, pair: u32) -> bool {
    workload::random(seed, u64::from(pair)) >> 63 == 1
}

/// Missing with the first reason when a window lacks it.
fn mean_share(shares: &[Maybe<f64>]) -> Maybe<f64> {
    let mut sum = 0.0;
    for share in shares {
        match share {
            Maybe::Value(share) => sum += share,
            missing @ Maybe::Missing(_) => return missing.clone(),
        }
    }
    if shares.is_empty() { Maybe::missing("no_run") } else { Maybe::Value(sum / shares.len() as f64) }
}

fn report(section: &mut Section, effect: &Effect) {
    let what = format!("{} tokens/s while the sensor is read", effect.device);
    if let Some(why) = &effect.not_a_measurement {
        section.warn(
            format!("{} probe", effect.device),
            format!("NOT A MEASUREMENT: {why}"),
            "measure with the sensor of a real device",
        );
    }
    let change = match &effect.tokens_per_s_change {
        Maybe::Value(change) => *change,
        Maybe::Missing(missing) => return section.missing(what, missing.missing.replace('_', " "), None),
    };
    let percent = |ratio: f64| format!("{:+.2} %", ratio * 100.0);
    let text = format!(
        "{} ({} to {}) over {} pairs",
        percent(change.ratio),
        percent(change.low),
        percent(change.high),
        effect.pairs.len()
    );
    if change.low >= -ALLOWED_RATIO {
        section.ok(what, text);
    } else if change.high < -ALLOWED_RATIO {
        section.warn(
            what,
            text,
            "compare records only with others of the same sensor; --power none measures speed alone",
        );
    } else {
        section.warn(what, text, "too uncertain to rule out 0.3 %: take more --pairs on a quieter machine");
    }
    let share = &effect.sampler_cpu_share;
    let percent = |share: &f64| format!("{} % of one core", format_significant(share * 100.0));
    match share.as_ref().map(percent) {
        Maybe::Value(text) => section.ok(format!("{} reading thread", effect.device), text),
        Maybe::Missing(missing) => section.missing(
            format!("{} reading thread", effect.device),
            missing.missing.replace('_', " "),
            None,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_a_pair_is_drawn_from_the_seed_and_both_come_about() {
        let orders = |seed| (0..40).map(|pair| reads_first(seed, pair)).collect::<Vec<_>>();
        assert_eq!(orders(1), orders(1));
        assert_ne!(orders(1), orders(2));
        let first = orders(1).iter().filter(|first| **first).count();
        assert!((10..=30).contains(&first), "{first} of 40");
    }
}
