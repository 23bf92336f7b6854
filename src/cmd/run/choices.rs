//! From what was typed to what it means: every default and every conflict is settled here, and nothing below asks
//! again.

use anyhow::Context as _;

use super::{Args, EngineChoice};
use crate::cmd::device::{self, Target};
use crate::cmd::{bad_file, usage};
use crate::engine::FakeScript;
use crate::meter::Choice as PowerChoice;
use crate::record::{CostModel, Thermal, Workload};
use crate::runner::Protocol;
use crate::suite::{self, Kind, Sizes, Suite};
use crate::units::{format_duration_s, parse_bytes};
use crate::weights::registry::{self, DEFAULT_MODEL};
use crate::workload;

/// Output tokens of a decode pass when none are given.
const DEFAULT_DECODE_OSL: u32 = 32;
/// Requests that an open loop measures when no number is given.
const DEFAULT_OPEN_REQUESTS: u32 = 32;
/// What a GPU is measured with when no model is named, the largest first.
const GPU_MODELS: [&str; 3] = ["llama-3.1-8b", "llama-3.2-1b", DEFAULT_MODEL];
/// Bytes of a bf16 or f16 value.
const GPU_WEIGHT_BYTES: u64 = 2;
/// Memory that a model needs, keys, values and activations included, for each byte of its weights.
const ROOM_FOR_WEIGHTS: f64 = 1.35;
const NANOS_PER_SECOND: f64 = 1e9;
/// Shortest window in which a GPU's energy counter says enough.
const ENERGY_SECONDS: f64 = 10.0;

/// What this invocation will do.
#[derive(Debug)]
pub(super) struct Choices {
    pub(super) suite: Option<String>,
    pub(super) cells: Vec<Workload>,
    pub(super) protocol: Protocol,
    pub(super) model: String,
    /// The model was named by the user, so that nothing may stand in for it.
    pub(super) model_is_explicit: bool,
    /// The numerics of the device are looked at first, on the default model's own weights.
    pub(super) check_numerics: bool,
    /// Seed of synthetic weights, if those are asked for.
    pub(super) synthetic_seed: Option<u64>,
    pub(super) subject: Subject,
    pub(super) threads: Option<usize>,
    pub(super) chunk: usize,
    pub(super) kv_memory_bytes: Option<u64>,
    pub(super) cost_model: Option<CostModel>,
    pub(super) power: PowerChoice,
    pub(super) require_energy: bool,
    pub(super) thermal: Thermal,
    /// How long idle power is watched; 0 for not at all.
    pub(super) idle_ns: u64,
    pub(super) session: Option<String>,
    pub(super) offline: bool,
}

/// What is measured.
#[derive(Debug)]
pub(super) enum Subject {
    /// The model, on this device.
    Model(Target),
    /// The tool itself: a scripted engine.
    Script(FakeScript),
}

/// The device as records name it: `cpu`, `cuda:0`, `fake`.
impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Model(target) => write!(f, "{target}"),
            Subject::Script(_) => write!(f, "fake"),
        }
    }
}

impl Subject {
    fn is_gpu(&self) -> bool {
        matches!(self, Subject::Model(Target::Cuda { .. }))
    }

    /// Prompt tokens of a step: enough to keep the device busy, few enough for those who decode beside them.
    fn default_chunk(&self) -> usize {
        if self.is_gpu() { 2048 } else { 512 }
    }
}

/// Which weights are measured.
struct ModelChoice {
    name: String,
    synthetic_seed: Option<u64>,
    /// Nobody named a model: this one is there to show the device's speed.
    stands_for_the_device: bool,
}

impl ModelChoice {
    /// A GPU is not shown by a model that its caches nearly hold, and large checkpoints are not fetched unasked: without
    /// a name, the largest of [`GPU_MODELS`] that fits is filled with made-up values.
    fn settle(args: &Args, subject: &Subject) -> anyhow::Result<Self> {
        let synthetic_seed = synthetic_seed(&args.weights)?;
        match (&args.model, subject) {
            (Some(name), _) => {
                Ok(ModelChoice { name: name.clone(), synthetic_seed, stands_for_the_device: false })
            }
            (None, Subject::Model(Target::Cuda { index, .. })) => Ok(ModelChoice {
                name: largest_that_fits(device::memory_bytes(*index)?)?,
                synthetic_seed: Some(synthetic_seed.unwrap_or(0)),
                stands_for_the_device: true,
            }),
            (None, _) => {
                let name = DEFAULT_MODEL.to_owned();
                Ok(ModelChoice { name, synthetic_seed, stands_for_the_device: false })
            }
        }
    }
}

/// The first of [`GPU_MODELS`] that this memory holds with room for a context, else the last.
fn largest_that_fits(memory_bytes: u64) -> anyhow::Result<String> {
    for name in GPU_MODELS {
        let weights_bytes = (registry::find(name)?.parameters * GPU_WEIGHT_BYTES) as f64;
        if weights_bytes * ROOM_FOR_WEIGHTS <= memory_bytes as f64 {
            return Ok(name.to_owned());
        }
    }
    Ok(DEFAULT_MODEL.to_owned())
}

impl Choices {
    /// # Errors
    /// Usage errors, and a broken suite file.
    pub(super) fn settle(args: &Args) -> anyhow::Result<Self> {
        let subject = match args.engine {
            EngineChoice::Llm => Subject::Model(Target::settle(
                &args.device,
                args.dtype,
                args.deterministic,
                args.gemm,
                args.jit,
            )?),
            EngineChoice::Fake => {
                let script =
                    serde_json::from_str(&args.fake_script).context("--fake-script").map_err(usage)?;
                Subject::Script(script)
            }
        };
        let suite = suite_of(args, &subject)?;
        let protocol = protocol(args, &suite).map_err(usage)?;
        let chunk = args.chunk.unwrap_or(subject.default_chunk());
        if chunk == 0 || chunk > 1 << 20 {
            return Err(usage(format!("--chunk is {chunk}, expected 1 to {}", 1 << 20)));
        }
        let model = ModelChoice::settle(args, &subject)?;
        device::check_threads(args.threads)?;
        let kv_memory_bytes = args.kv_memory.as_deref().map(parse_bytes).transpose();
        Ok(Choices {
            suite: (!suite.name.is_empty()).then(|| suite.name.clone()),
            cells: suite.cells,
            protocol,
            model: model.name,
            model_is_explicit: args.model.is_some(),
            check_numerics: model.stands_for_the_device,
            synthetic_seed: model.synthetic_seed,
            subject,
            threads: args.threads,
            chunk,
            kv_memory_bytes: kv_memory_bytes.map_err(|error| usage(format!("--kv-memory: {error}")))?,
            cost_model: args.price.settle()?,
            power: args.power.clone(),
            require_energy: args.require_energy,
            thermal: args.thermal.into(),
            idle_ns: idle_ns(args.idle_seconds.unwrap_or(suite.idle_seconds))?,
            session: args.session.clone(),
            offline: args.offline,
        })
    }

    /// Time that the windows alone take, seconds.
    pub(super) fn least_seconds(&self) -> f64 {
        let run_ns = self.protocol.min_window_ns * u64::from(self.protocol.repeat) + self.protocol.warmup_ns;
        self.cells.len() as f64 * run_ns as f64 / NANOS_PER_SECOND
    }

    /// The plan, for `--dry-run`.
    pub(super) fn describe(&self) -> String {
        let mut text = format!(
            "model    {}{}\ndevice   {}\nsuite    {}\nruns     {} per cell, windows of at least {} s\n\n",
            self.model,
            self.synthetic_seed.map_or(String::new(), |seed| format!(" (synthetic weights, seed {seed})")),
            self.subject,
            self.suite.as_deref().unwrap_or("from the command line"),
            self.protocol.repeat,
            self.protocol.min_window_ns as f64 / NANOS_PER_SECOND,
        );
        for cell in &self.cells {
            text.push_str(&cell.key());
            text.push('\n');
        }
        text.push_str(&format!(
            "\n{} cells, at least {}: windows and warm-up alone; loading, ceilings, prefilled contexts and passes longer \
             than a window come on top\n",
            self.cells.len(),
            format_duration_s(self.least_seconds())
        ));
        text
    }
}

/// The suite that is named, or one made of the sizes on the command line.
fn suite_of(args: &Args, subject: &Subject) -> anyhow::Result<Suite> {
    let sizes = sizes(args).map_err(usage)?;
    let Some(kind) = kind(args).map_err(usage)? else {
        let default = if subject.is_gpu() { suite::DEFAULT_GPU_SUITE } else { suite::DEFAULT_SUITE };
        let name = args.suite.as_deref().unwrap_or(default);
        return suite::load(name).map_err(if suite::is_file(name) { bad_file } else { usage_of });
    };
    if args.suite.is_some() {
        return Err(usage("--suite and sizes such as --batch cannot be given together"));
    }
    let cells = suite::expand(kind, &sizes).map_err(usage)?;
    let (repeat, min_seconds, warmup_seconds) = (3, 1.5, 0.3);
    let (name, description) = (String::new(), String::new());
    let (steady, idle_seconds) = (false, 0.0);
    Ok(Suite { name, description, repeat, min_seconds, warmup_seconds, steady, idle_seconds, cells })
}

fn usage_of(error: anyhow::Error) -> anyhow::Error {
    usage(format!("{error:#}"))
}

/// The kind of cell that the given sizes mean; none when no size is given.
fn kind(args: &Args) -> anyhow::Result<Option<Kind>> {
    let loads = [&args.concurrency, &args.request_rate, &args.depth];
    if loads.iter().filter(|load| load.is_some()).count() > 1 {
        anyhow::bail!(
            "--depth, --concurrency and --request-rate each name another kind of cell; give one of them"
        );
    }
    Ok(Some(if args.concurrency.is_some() {
        Kind::ServeClosed
    } else if args.request_rate.is_some() {
        Kind::ServeOpen
    } else if args.depth.is_some() {
        Kind::Decode
    } else if args.osl.is_some() {
        Kind::Generate
    } else if args.isl.is_some() || args.batch.is_some() {
        Kind::Prefill
    } else {
        return Ok(None);
    }))
}

fn sizes(args: &Args) -> anyhow::Result<Sizes> {
    let list = |name: &str, text: &Option<String>| match text {
        Some(text) => workload::parse_numbers(text).map_err(|error| anyhow::anyhow!("--{name}: {error}")),
        None => Ok(Vec::new()),
    };
    let mut sizes = Sizes {
        batch: list("batch", &args.batch)?,
        isl: list("isl", &args.isl)?,
        osl: list("osl", &args.osl)?,
        depth: list("depth", &args.depth)?,
        concurrency: list("concurrency", &args.concurrency)?,
        request_rate_per_s: rates(args)?,
        requests: args.requests.unwrap_or(0),
    };
    if !sizes.depth.is_empty() && sizes.osl.is_empty() {
        sizes.osl = vec![DEFAULT_DECODE_OSL];
    }
    if sizes.batch.is_empty() && sizes.concurrency.is_empty() && sizes.request_rate_per_s.is_empty() {
        sizes.batch = vec![1];
    }
    if args.requests.is_none() {
        let widest = sizes.concurrency.iter().copied().max().unwrap_or(0);
        sizes.requests = if sizes.request_rate_per_s.is_empty() { 4 * widest } else { DEFAULT_OPEN_REQUESTS };
    }
    Ok(sizes)
}

fn rates(args: &Args) -> anyhow::Result<Vec<f64>> {
    let Some(text) = &args.request_rate else { return Ok(Vec::new()) };
    text.split(',')
        .map(|part| {
            part.trim().parse::<f64>().map_err(|_| {
                anyhow::anyhow!("--request-rate: '{part}' is no number, expected for example 0.5,2")
            })
        })
        .collect()
}

fn protocol(args: &Args, suite: &Suite) -> anyhow::Result<Protocol> {
    let repeat = args.repeat.unwrap_or(suite.repeat);
    let least_seconds = if args.require_energy { ENERGY_SECONDS } else { 0.0 };
    let min_seconds = args.min_seconds.unwrap_or(suite.min_seconds.max(least_seconds));
    suite::check_protocol(repeat, min_seconds, suite.warmup_seconds)?;
    let max_seconds = args.max_seconds;
    if !(max_seconds >= min_seconds && max_seconds <= 86_400.0) {
        anyhow::bail!(
            "--max-seconds is {max_seconds}, expected at least --min-seconds {min_seconds} and at most 86400"
        );
    }
    let nanos = |seconds: f64| (seconds * NANOS_PER_SECOND) as u64;
    Ok(Protocol {
        repeat,
        min_window_ns: nanos(min_seconds),
        max_window_ns: nanos(max_seconds).max(1),
        warmup_ns: nanos(suite.warmup_seconds),
        steady: suite.steady,
        cool_to_c: None,
        seed: args.seed,
    })
}

fn idle_ns(seconds: f64) -> anyhow::Result<u64> {
    if (0.0..=suite::LONGEST_IDLE_SECONDS).contains(&seconds) {
        return Ok((seconds * NANOS_PER_SECOND) as u64);
    }
    Err(usage(format!("--idle-seconds is {seconds}, expected 0 to {}", suite::LONGEST_IDLE_SECONDS)))
}

fn synthetic_seed(text: &str) -> anyhow::Result<Option<u64>> {
    match text.split_once(':') {
        None if text == "checkpoint" => Ok(None),
        None if text == "synthetic" => Ok(Some(0)),
        Some(("synthetic", seed)) if seed.parse::<u64>().is_ok_and(|seed| seed < 1 << 53) => {
            Ok(seed.parse().ok())
        }
        _ => Err(usage(format!(
            "--weights is '{text}', expected checkpoint, synthetic or synthetic:SEED, a number below 2^53"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_gets_the_largest_model_that_its_memory_holds() {
        for (memory_gib, expected) in [
            (80, "llama-3.1-8b"),
            (24, "llama-3.1-8b"),
            (16, "llama-3.2-1b"),
            (2, "smollm2-135m"),
            (0, "smollm2-135m"),
        ] {
            assert_eq!(largest_that_fits(memory_gib << 30).unwrap(), expected, "{memory_gib} GiB");
        }
    }
}
