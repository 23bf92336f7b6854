//! `tokmeter peaks`: what this device can do at most, measured now; with `--ops`, how near each fused operation of a
//! model comes to it.

mod ops;
mod table;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;

use super::device::{self, DType, GemmChoice, JitChoice, Target, switches_help};
use super::model::config_of;
use super::{print, remark, usage};
use crate::backend::peaks::Protocol;
use crate::backend::{Backend as _, Cpu, Cuda, CudaDType, CudaOptions};
use crate::clock::Clock;
use crate::machine::{Roots, host_memory};
use crate::model::op_times::OpTime;
use crate::model::shape_of;
use crate::record::{Ceilings, Kernels, check_place, write_atomically};
use crate::weights::registry::DEFAULT_MODEL;

/// Probes of one device, the slow ones counted twice.
const PROBES: f64 = 12.0;
/// Time that preparing them may take, seconds.
const PREPARATION_S: f64 = 30.0;

/// Measure this device's ceilings: bandwidth, matmul peak, launches, transfers
#[derive(Debug, clap::Args)]
#[command(
    after_help = concat!("Every ceiling is the best that was sustained over three repetitions in a row, on random data and, \
    for memory, on at least 8 times the last-level cache. --ops then times every fused operation at a model's shapes \
    against the bound max(bytes / bandwidth, flops / matmul peak): decode steps for each --batch and --depth, \
    prompts for each --batch and --isl.\n\n\
    Examples:\n  \
    tokmeter peaks\n  \
    tokmeter peaks --device cuda:0 --seconds 2 --format json --out peaks.json\n  \
    tokmeter peaks --ops -m llama-3.1-8b --batch 1,64 --depth 1024\n  \
    tokmeter peaks --ops --batch 1 --isl 512\n\n\
    ", switches_help!(), "\n\n\
    Exit codes: 0 done, 1 the device failed, 2 usage")
)]
pub struct Args {
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Type of products [default: every type of the device; with --ops bf16 on cuda, f32 on cpu]
    #[arg(long, value_enum)]
    dtype: Option<DType>,
    /// On cuda: what computes products of more than 64 rows [auto: cuBLASLt where it is found]
    #[arg(long, value_enum, default_value_t = GemmChoice::Auto)]
    gemm: GemmChoice,
    /// CPU threads that compute [default: the cores this process may use]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Time for each ceiling and each operation
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    seconds: f64,
    /// Also time every operation of a model against its bound
    #[arg(long)]
    ops: bool,
    /// Known model, .gguf or .safetensors file, or folder [default: smollm2-135m]
    #[arg(long, short, value_name = "NAME|PATH", requires = "ops")]
    model: Option<String>,
    /// Sequences in a step [default: 1]
    #[arg(long, value_name = "LIST", requires = "ops")]
    batch: Option<String>,
    /// Context tokens of decode steps [default: 512, unless --isl is given]
    #[arg(long, value_name = "LIST", requires = "ops")]
    depth: Option<String>,
    /// Tokens of whole prompts
    #[arg(long, value_name = "LIST", requires = "ops")]
    isl: Option<String>,
    /// Use only what is in the cache
    #[arg(long, requires = "ops")]
    offline: bool,
    /// How the results are printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also write them here, as JSON
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// All that was measured.
#[derive(Debug, Serialize)]
struct Peaks {
    /// What the driver or the kernel calls it.
    device_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_a_measurement: Option<String>,
    ceilings: Ceilings,
    methods: Vec<table::Method>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<Ops>,
}

/// The operations of one model.
#[derive(Debug, Serialize)]
struct Ops {
    model: String,
    compute_dtype: String,
    /// `synthetic`, or the format of the file.
    weights: &'static str,
    /// The kernels that ran, on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernels: Option<Kernels>,
    times: Vec<OpTime>,
}

/// # Errors
/// When the command line does not fit the device, or the device fails.
pub fn run(args: Args) -> anyhow::Result<u8> {
    if !(args.seconds > 0.0 && args.seconds <= 3600.0) {
        return Err(usage(format!("--seconds is {}, expected more than 0 and at most 3600", args.seconds)));
    }
    check_out(args.out.as_deref())?;
    let target = Target::settle(&args.device, args.dtype, false, args.gemm, JitChoice::Sass)?;
    device::check_threads(args.threads)?;
    let request = args.ops.then(|| ops::Request::settle(&args)).transpose()?;
    device::start_threads(args.threads)?;
    let mut peaks = match target {
        Target::Cpu(_) => on_cpu(&args)?,
        Target::Cuda { index, options } => on_cuda(index, options, &args)?,
    };
    peaks.ceilings.device = target.to_string();
    if let Some(request) = request {
        peaks.ops = Some(request.time(target, &peaks.ceilings, &protocol(args.seconds, false))?);
    }
    let json = serde_json::to_string_pretty(&peaks)? + "\n";
    if let Some(out) = &args.out {
        write_atomically(out, json.as_bytes())
            .with_context(|| format!("{}: cannot write the peaks", out.display()))?;
        remark(&format!("peaks: {}", out.display()));
    }
    print(&match args.format {
        Format::Table => table::text(&peaks),
        Format::Json => json,
    })?;
    Ok(0)
}

/// Refuses a place that cannot be written, or that holds a file, before anything is measured.
fn check_out(out: Option<&Path>) -> anyhow::Result<()> {
    let Some(out) = out else { return Ok(()) };
    check_place(out)?;
    if out.exists() {
        let hint = "hint: name another file, or remove it";
        return Err(usage(format!("--out {} exists already, expected a new file\n{hint}", out.display())));
    }
    Ok(())
}

fn protocol(seconds: f64, arithmetic_only: bool) -> Protocol {
    let clock = Clock::monotonic();
    let ns = |seconds: f64| (seconds * 1e9) as u64;
    let deadline_ns = clock.now_ns() + ns(PREPARATION_S + PROBES * seconds);
    Protocol {
        clock,
        probe_ns: ns(seconds),
        deadline_ns,
        host: host_memory(&Roots::default()),
        arithmetic_only,
    }
}

fn on_cpu(args: &Args) -> anyhow::Result<Peaks> {
    let machine = crate::machine::cpu_name(&Roots::default());
    let shape = shape_of(&config_of(DEFAULT_MODEL)?);
    let mut cpu = Cpu::new(shape, crate::backend::CpuDType::F32);
    let ceilings = cpu.ceilings(&protocol(args.seconds, false))?;
    let device_name = format!("{machine}, {} threads", cpu.info().threads);
    Ok(Peaks {
        device_name,
        not_a_measurement: None,
        methods: table::methods(&ceilings),
        ceilings,
        ops: None,
    })
}

/// Everything in one type, and the arithmetic in the other too unless one was asked for.
fn on_cuda(index: u32, options: CudaOptions, args: &Args) -> anyhow::Result<Peaks> {
    let shape = shape_of(&config_of(DEFAULT_MODEL)?);
    let mut cuda = Cuda::new(index, shape.clone(), options)?;
    let mut ceilings = cuda.ceilings(&protocol(args.seconds, false))?;
    let device_name = cuda.properties().name.clone();
    let not_a_measurement = device::not_a_measurement(&cuda);
    drop(cuda);
    if args.dtype.is_none() {
        let dtype = if options.dtype == CudaDType::Bf16 { CudaDType::F16 } else { CudaDType::Bf16 };
        let mut other = Cuda::new(index, shape, CudaOptions { dtype, ..options })?;
        let more = other.ceilings(&protocol(args.seconds, true))?;
        ceilings.matmul_flops_per_s.extend(more.matmul_flops_per_s);
        ceilings.mma_flops_per_s.extend(more.mma_flops_per_s);
        ceilings.duration_ns += more.duration_ns;
    }
    Ok(Peaks { device_name, not_a_measurement, methods: table::methods(&ceilings), ceilings, ops: None })
}
