//! Tokens per second of the CPU backend on SmolLM2, beside llama.cpp on the same file, in turns within one run:
//! decode at batch 1 (128 steps after 16 prompt tokens) and prefill (512 tokens in one batch), for both dtypes.
//!
//!     cargo bench --bench cpu_speed              (needs the model: `tokmeter models fetch`, or TOKMETER_BENCH_MODEL)
//!
//! The peer runs when `$PYTHON` (else python3) can import llama_cpp; otherwise its column stays empty. Medians over
//! the rounds. Both engines want every core to themselves: on a busy machine the ratios mean nothing.

#![allow(clippy::unwrap_used)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use tokmeter::backend::{Backend, Batch, Cpu, CpuDType, PAGE_SIZE, Sampling, TokenInput};
use tokmeter::clock::Clock;
use tokmeter::model::{Model, Workspace, shape_of};
use tokmeter::weights::{self, Weights};

const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const ROUNDS: usize = 5;
const PROMPT: usize = 16;
const DECODE: usize = 128;
const PREFILL: usize = 512;

fn main() -> anyhow::Result<()> {
    let path = model_path()?;
    let weights = weights::open(&path)?;
    let clock = Clock::monotonic();
    let mut f32 = Subject::load(CpuDType::F32, &*weights)?;
    let mut quantized = Subject::load(CpuDType::Quantized, &*weights)?;
    let threads = f32.backend.info().threads;
    println!("{}, {threads} threads, medians of {ROUNDS} rounds, tokens/s", path.display());
    let mut rates = Rates::default();
    for round in 0..=ROUNDS {
        let ours = [
            quantized.decode(&clock)?,
            f32.decode(&clock)?,
            quantized.prefill(&clock)?,
            f32.prefill(&clock)?,
        ];
        let peer = peer(&path, threads);
        if round > 0 {
            rates.push(ours, peer);
        }
    }
    rates.print();
    Ok(())
}

/// One dtype of the model, ready to run.
struct Subject {
    backend: Cpu,
    model: Model<Cpu>,
    workspace: Workspace<Cpu>,
    kv: <Cpu as Backend>::Kv,
    pages: Vec<u32>,
    batch: Batch,
    out: Vec<u32>,
}

impl Subject {
    fn load(dtype: CpuDType, weights: &dyn Weights) -> anyhow::Result<Self> {
        let mut backend = Cpu::new(shape_of(weights.config()), dtype);
        let model = Model::load(&mut backend, weights, &mut |_| {})?;
        let pages = PREFILL / PAGE_SIZE;
        Ok(Subject {
            workspace: Workspace::new(&mut backend, PREFILL, 1)?,
            kv: backend.kv_cache(pages)?,
            pages: (0..pages as u32).collect(),
            model,
            backend,
            batch: Batch::default(),
            out: Vec::new(),
        })
    }

    /// One forward pass over `tokens` at `position`, until its arg-max is known.
    fn step(&mut self, tokens: impl IntoIterator<Item = TokenInput>, position: usize) -> anyhow::Result<()> {
        self.batch.clear();
        self.batch.push(tokens, position as u32, &self.pages, Some(Sampling::GREEDY));
        self.model.forward(&mut self.backend, &self.batch, &mut self.kv, &mut self.workspace)?;
        self.out.clear();
        self.backend.sampled(&mut self.out)
    }

    fn decode(&mut self, clock: &Clock) -> anyhow::Result<f64> {
        self.step(prompt(PROMPT), 0)?;
        let start = clock.now_ns();
        for step in 0..DECODE {
            self.step([TokenInput::Id(self.out[0])], PROMPT + step)?;
        }
        Ok(DECODE as f64 * 1e9 / (clock.now_ns() - start) as f64)
    }

    fn prefill(&mut self, clock: &Clock) -> anyhow::Result<f64> {
        let start = clock.now_ns();
        self.step(prompt(PREFILL), 0)?;
        Ok(PREFILL as f64 * 1e9 / (clock.now_ns() - start) as f64)
    }
}

/// Token ids that look like nothing in particular.
fn prompt(tokens: usize) -> impl Iterator<Item = TokenInput> {
    (0..tokens as u32).map(|i| TokenInput::Id(i.wrapping_mul(2_654_435_761) % 49_152))
}

/// llama.cpp's (decode, prefill) in one short run of its own.
fn peer(model: &Path, threads: usize) -> Option<[f64; 2]> {
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama_cpp_speed.py");
    let mut command = Command::new(python);
    command.arg(script).arg(model).args(["--runs", "1", "--threads", &threads.to_string()]);
    let output = command.output().ok().filter(|output| output.status.success())?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let rate = |key: &str| json.get(key)?.as_f64();
    Some([rate("decode_output_tokens_per_second")?, rate("prefill_input_tokens_per_second")?])
}

/// Every round's rates.
#[derive(Default)]
struct Rates {
    /// decode quantized, decode f32, prefill quantized, prefill f32
    ours: [Vec<f64>; 4],
    /// decode, prefill
    peer: [Vec<f64>; 2],
}

impl Rates {
    fn push(&mut self, ours: [f64; 4], peer: Option<[f64; 2]>) {
        self.ours.iter_mut().zip(ours).for_each(|(all, rate)| all.push(rate));
        if let Some(peer) = peer {
            self.peer.iter_mut().zip(peer).for_each(|(all, rate)| all.push(rate));
        }
    }

    fn print(&self) {
        println!(
            "{:<9} {:<10} {:>10} {:>7} {:>10} {:>7}",
            "work", "dtype", "tokmeter", "±", "llama.cpp", "ratio"
        );
        let rows = ["decode", "decode", "prefill", "prefill"]
            .into_iter()
            .zip(["quantized", "f32"].into_iter().cycle());
        for (index, (work, dtype)) in rows.enumerate() {
            let ours = median(&self.ours[index]);
            let spread = self.ours[index].iter().map(|rate| (rate - ours).abs()).fold(0.0, f64::max);
            let peer = &self.peer[index / 2];
            let (peer, ratio) = match peer.is_empty() {
                true => ("-".to_owned(), "-".to_owned()),
                false => (format!("{:.1}", median(peer)), format!("{:.2}", ours / median(peer))),
            };
            println!("{work:<9} {dtype:<10} {ours:>10.1} {spread:>7.1} {peer:>10} {ratio:>7}");
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// `$TOKMETER_BENCH_MODEL`, or the default model in the cache.
fn model_path() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("TOKMETER_BENCH_MODEL") {
        return Ok(path.into());
    }
    let cache = std::env::var_os("TOKMETER_CACHE").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")));
        Some(cache?.join("tokmeter"))
    });
    let cache = cache.context("no cache folder: HOME is not set\nhint: set TOKMETER_BENCH_MODEL")?;
    find(&cache, 4).with_context(|| {
        format!("{MODEL} is not in {}\nhint: set TOKMETER_BENCH_MODEL to the file", cache.display())
    })
}

fn find(folder: &Path, depth: usize) -> Option<PathBuf> {
    let entries: Vec<PathBuf> = folder.read_dir().ok()?.flatten().map(|entry| entry.path()).collect();
    if let Some(found) = entries.iter().find(|path| path.file_name().is_some_and(|name| name == MODEL)) {
        return Some(found.clone());
    }
    entries.iter().filter(|path| path.is_dir() && depth > 0).find_map(|path| find(path, depth - 1))
}
