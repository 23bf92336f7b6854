//! `tokmeter run`: the main job. Settles what is asked for, opens the model, starts the engine, measures cell by cell
//! and saves the record after each.

mod choices;
mod model;
mod numerics;
mod power;
mod record;
mod start;
mod view;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::ValueEnum;

use crate::clock::{Clock, file_stamp_utc};
use crate::machine::{GpuWatch, Roots};
use crate::meter::nvml::Library;
use crate::meter::{Choice, PowerMeter};
use crate::record::{Cell, Outcome, Record, Status, Store, Thermal, Workload, check_place};
use crate::runner::{self, Stage, Witness};
use crate::{analysis, report};

use super::device::{self, DType, GemmChoice, JitChoice, switches_help};
use super::price::PriceArgs;
use super::{FAILED, INTERRUPTED, interrupt, print, remark, usage};
use choices::Choices;
use view::View;

/// Measure this machine: run cells, write one record, print the table
#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = concat!("Cells: give --suite, or sizes. The sizes choose the kind:\n  \
    --batch --isl                     prefill\n  \
    --batch --depth [--osl]           decode at a context depth\n  \
    --batch --isl --osl               generate\n  \
    --concurrency --isl --osl         serve, closed loop\n  \
    --request-rate --isl --osl        serve, open loop (Poisson)\n\
    Lists (1,8,32) and ranges (1..64*2, 128..512+128) multiply.\n\n\
    Examples:\n  \
    tokmeter run\n  \
    tokmeter run --suite standard --price-per-gpu-hour \"2.50 USD\"\n  \
    tokmeter run --suite standard --cost costs/owned-8-gpu-server.toml --currency EUR\n  \
    tokmeter run -m smollm2-135m --dtype quantized --batch 1..16*2 --depth 128,512\n  \
    tokmeter run -m ./model.gguf --concurrency 4 --isl 64 --osl 32 --format csv\n  \
    tokmeter run --weights synthetic -m llama-3.2-1b --batch 1 --isl 128 --dry-run\n\n", switches_help!())
)]
pub struct Args {
    /// Named suite (quick, gpu-quick, standard, gpu-standard, decode, prefill, driver, calibration, calibration-small) or
    /// a suite file [default: quick, on cuda gpu-quick]
    #[arg(long, value_name = "NAME|FILE")]
    suite: Option<String>,
    /// Known model, .gguf or .safetensors file, or folder [default: smollm2-135m; on cuda the shapes of llama-3.1-8b, or
    /// of a smaller one that fits, with made-up weights]
    #[arg(long, short, value_name = "NAME|PATH")]
    model: Option<String>,
    /// The checkpoint's own weights, or made-up values of its shapes
    #[arg(long, value_name = "checkpoint|synthetic[:SEED]", default_value = "checkpoint")]
    weights: String,
    /// What weights and products are kept in [default: bf16 on cuda, f32 on cpu]
    #[arg(long, value_enum)]
    dtype: Option<DType>,
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// On cuda: the same output bits for a sequence whatever else is in the batch, at some cost
    #[arg(long)]
    deterministic: bool,
    /// On cuda: what computes products of more than 64 rows [auto: cuBLASLt where it is found]
    #[arg(long, value_enum, default_value_t = GemmChoice::Auto)]
    gemm: GemmChoice,
    /// On cuda: the kernels as machine code, or as intermediate code that the driver compiles
    #[arg(long, value_enum, default_value_t = JitChoice::Sass)]
    jit: JitChoice,
    /// CPU threads that compute [default: the cores this process may use]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Sequences at once
    #[arg(long, value_name = "LIST")]
    batch: Option<String>,
    /// Input (prompt) tokens
    #[arg(long, value_name = "LIST")]
    isl: Option<String>,
    /// Output tokens
    #[arg(long, value_name = "LIST")]
    osl: Option<String>,
    /// Context tokens at which decoding starts
    #[arg(long, value_name = "LIST")]
    depth: Option<String>,
    /// Requests always in flight
    #[arg(long, value_name = "LIST")]
    concurrency: Option<String>,
    /// Poisson arrivals per second
    #[arg(long, value_name = "LIST")]
    request_rate: Option<String>,
    /// Requests a serving cell measures at least [default: 4 for each in flight, 32 in the open loop]
    #[arg(long, value_name = "N")]
    requests: Option<u32>,
    /// Repetitions of each cell [default: the suite's, or 3]
    #[arg(long, short, value_name = "N")]
    repeat: Option<u32>,
    /// Shortest window [default: the suite's, or 1.5]
    #[arg(long, value_name = "SECONDS")]
    min_seconds: Option<f64>,
    /// Longest serving window, and longest drain after it
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    max_seconds: f64,
    /// Prompt tokens computed in one step [default: 2048 on cuda, 512 on cpu]
    #[arg(long, value_name = "TOKENS")]
    chunk: Option<usize>,
    /// Memory for keys and values, such as 512MiB [default: what the largest cell needs, or what is free]
    #[arg(long, value_name = "SIZE")]
    kv_memory: Option<String>,
    #[command(flatten)]
    price: PriceArgs,
    /// Power sensor: auto, none, nvml, rapl, hwmon, replay:FILE or csv:FILE
    #[arg(long, value_name = "SENSOR", default_value = "auto")]
    power: Choice,
    /// A cell without undoubted energy fails; windows last 10 s at least
    #[arg(long)]
    require_energy: bool,
    /// Watch power before the start, with the weights resident, and after the load, for so long each [default: the suite's,
    /// or 0]
    #[arg(long, value_name = "SECONDS")]
    idle_seconds: Option<f64>,
    /// Between runs: hot goes on at once; cooldown waits until the device is as cool as before the first cell, and warms
    /// up again
    #[arg(long, value_enum, default_value_t = ThermalChoice::Hot)]
    thermal: ThermalChoice,
    /// Name of this session (a boot and driver load), for comparing
    #[arg(long, value_name = "LABEL")]
    session: Option<String>,
    /// Seed of prompts and arrivals
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 53))]
    seed: u64,
    /// Use only what is in the cache
    #[arg(long)]
    offline: bool,
    /// Print the plan and the least time it takes, measure nothing
    #[arg(long)]
    dry_run: bool,
    /// The record's place [default: ./tokmeter-DEVICE-UTC.json]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How the derived summary is printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Which engine runs: a scripted one exists for tests of the tool itself
    #[arg(long, value_enum, default_value_t = EngineChoice::Llm, hide = true)]
    engine: EngineChoice,
    /// Step times of the scripted engine, as JSON
    #[arg(long, value_name = "JSON", default_value = "{}", hide = true)]
    fake_script: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
    Jsonl,
    Csv,
    Markdown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EngineChoice {
    Llm,
    Fake,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ThermalChoice {
    Hot,
    Cooldown,
}

impl From<ThermalChoice> for Thermal {
    fn from(choice: ThermalChoice) -> Self {
        match choice {
            ThermalChoice::Hot => Thermal::Hot,
            ThermalChoice::Cooldown => Thermal::Cooldown,
        }
    }
}

/// # Errors
/// When nothing could be measured. A cell that fails is part of the record, and only changes the exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let mut choices = Choices::settle(&args)?;
    if args.dry_run {
        print(&choices.describe())?;
        return Ok(0);
    }
    check_out(args.out.as_deref())?;
    let stop = interrupt::on_signal()?;
    let view = View::new(Arc::clone(&stop));
    let mut meter = power::open(&choices)?;
    choices.protocol.cool_to_c = power::cool_to_c(&choices, &mut meter)?;
    let mut started = start::start(&choices, &stop, &view)?;
    power::observe_idle(&choices, &mut meter, &started.clock);
    let clock = started.clock.clone();
    let out = args.out.unwrap_or_else(|| {
        let device = choices.subject.to_string().replace(':', "");
        PathBuf::from(format!("tokmeter-{device}-{}.json", file_stamp_utc(clock.unix_ns())))
    });
    let nvml = Library::open_default();
    let mut record = record::open(&choices, &started, &meter, &nvml);
    let watch = GpuWatch::new(Roots::default(), nvml, power::gpus(&choices));
    let store = Store::create(out, &record)?;
    let mut bench = Bench {
        choices: &choices,
        started: &mut started,
        meter: &mut meter,
        watch: &watch,
        view: &view,
        stop: &stop,
    };
    bench.measure_all(&mut record, &store)?;
    view.finish();
    print(&rendered(&record, args.format)?)?;
    remark(&format!("record: {}", store.path().display()));
    Ok(exit_code(&record))
}

/// Refuses a place that cannot be written before anything is measured, and one that holds a file: what it holds may be
/// a record, which cannot be measured again.
fn check_out(out: Option<&Path>) -> anyhow::Result<()> {
    let anywhere_here = Path::new("tokmeter-DEVICE-UTC.json");
    check_place(out.unwrap_or(anywhere_here))?;
    match out {
        Some(path) if path.exists() => {
            let hint = "hint: name another file, or remove it";
            Err(usage(format!("--out {} exists already, expected a new file\n{hint}", path.display())))
        }
        _ => Ok(()),
    }
}

/// Everything that measuring needs, settled and started.
struct Bench<'a> {
    choices: &'a Choices,
    started: &'a mut start::Started,
    meter: &'a mut PowerMeter,
    watch: &'a GpuWatch,
    view: &'a View,
    stop: &'a AtomicBool,
}

impl Bench<'_> {
    /// Measures every cell, saving the record after each; stops early at a signal.
    fn measure_all(&mut self, record: &mut Record, store: &Store) -> anyhow::Result<()> {
        for (index, workload) in self.choices.cells.iter().enumerate() {
            if let Some(why) = self.started.obstacle(self.choices, workload) {
                remark(&format!("skipped {}: {why}", workload.key()));
                record.cells.push(Cell::skipped(*workload, self.choices.subject.to_string(), why));
                continue;
            }
            let cell = self.measure(index, workload);
            record.meter = self.meter.record();
            let interrupted = cell.outcome == Outcome::Interrupted;
            record.cells.push(cell);
            record::update_engine(record, self.started);
            device::remark_refusals();
            if interrupted {
                record.status = Status::Interrupted;
                break;
            }
            store.save(record)?;
        }
        if record.status == Status::Running {
            power::observe_after_load(self.choices, self.meter, &self.started.clock);
            record.meter = self.meter.record();
        }
        record::close(record, &self.started.clock);
        store.save(record)
    }

    fn measure(&mut self, index: usize, workload: &Workload) -> Cell {
        let (choices, view, watch) = (self.choices, self.view, self.watch);
        let (before, mut warm) = (watch.read(), None);
        let mut on_run = |run, runs| {
            warm.get_or_insert_with(|| watch.read());
            view.run_begins(choices, index, run, runs);
        };
        let mut stage = Stage {
            engine: self.started.engine.as_mut(),
            clock: self.started.clock.clone(),
            witness: witness_for(&self.started.clock).metered(self.meter),
            stop: self.stop,
            device: choices.subject.to_string(),
            on_run: &mut on_run,
        };
        let cell = runner::measure(&mut stage, workload, &choices.protocol);
        let gpus = watch.around(before, warm, watch.read());
        let cell = Cell { gpus, ..cell };
        if choices.require_energy { power::require_energy(cell) } else { cell }
    }
}

fn witness_for(clock: &Clock) -> Witness<'static> {
    match clock {
        Clock::Monotonic { .. } => Witness::new(Roots::default()),
        Clock::Scripted(_) => Witness::blind(),
    }
}

fn rendered(record: &Record, format: Format) -> anyhow::Result<String> {
    let summary = analysis::summarize(record);
    Ok(match format {
        Format::Table => report::table(&summary),
        Format::Json => report::json(&summary)?,
        Format::Jsonl => report::jsonl(&summary)?,
        Format::Csv => report::csv(&summary),
        Format::Markdown => report::section(&summary),
    })
}

fn exit_code(record: &Record) -> u8 {
    if record.status == Status::Interrupted {
        return INTERRUPTED;
    }
    let failed = record.cells.iter().any(|cell| matches!(cell.outcome, Outcome::Failed { .. }));
    let broken = !crate::record::violations(record).is_empty();
    if failed || broken { FAILED } else { 0 }
}
