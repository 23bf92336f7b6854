//! `tokmeter check`: does this device compute what it should? Every operation and the whole forward pass against the
//! reference; with `--op`, one operation or some of its cases; with `--prompts`, what the model thinks of given texts,
//! to be held against another engine.

mod numerics;
mod prompts;
mod report;

use std::path::PathBuf;

use clap::ValueEnum;
use clap::builder::PossibleValue;

use super::device::{self, DType, GemmChoice, JitChoice, Target, switches_help};
use super::{FAILED, print, remark};
use crate::arch::Op;

/// Check what this device computes against the reference, or dump log-probabilities of given texts
#[derive(Debug, clap::Args)]
#[command(
    after_help = concat!("Without --prompts, every operation and a shallow slice of the model (its shapes, 2 layers, at \
    most 4096 tokens of vocabulary) are held against plain scalar arithmetic: made-up weights, or with --dtype \
    quantized the checkpoint's own. A result is ok, OVER (beyond the tolerance by \
    no more than rounding may be) or WRONG (a bug).\n\n\
    --op checks one operation alone, at its own shapes; --case keeps the cases whose text contains TEXT, each with the \
    same numbers as in the whole check. A case is \"SHAPE, BATCH, PART\", such as \"GQA 3, prompt of 45, bias\"; a TEXT \
    that is in none lists them. The keys and values that attn_in writes are seen by attention.\n\n\
    With --prompts, each line of FILE is {\"id\": \"a\", \"text\": \"…\"} or {\"id\": \"a\", \"token_ids\": [1, 2]}. \
    Each line of the output is {\"id\", \"token_ids\", \"top\", \"greedy\": {\"token_ids\", \"text\"}}: top[i] ranks \
    the K likeliest tokens after token_ids[i] as [token id, natural log-probability]. Special tokens written in a \
    text count as such; BOS comes first only where the checkpoint says so. The text of the continuation is null \
    where there is no tokenizer.\n\n\
    Examples:\n  \
    tokmeter check\n  \
    tokmeter check -m qwen3-8b --format json\n  \
    tokmeter check -m model.gguf --dtype quantized\n  \
    tokmeter check --op attention --case \"GQA 3, prompt of 45\"\n  \
    tokmeter check --prompts prompts.jsonl --top 8 --greedy 32 --out logprobs.jsonl\n\n\
    ", switches_help!(), "\n\n\
    Exit codes: 0 all within tolerance, 1 something failed, 2 usage, 3 a broken prompt or model file")
)]
pub struct Args {
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// What weights and products are kept in [default: bf16 on cuda, f32 on cpu]
    #[arg(long, value_enum)]
    dtype: Option<DType>,
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
    /// Known model, .gguf or .safetensors file, or folder [default: smollm2-135m]
    #[arg(long, short, value_name = "NAME|PATH")]
    model: Option<String>,
    /// How the results are printed
    #[arg(long, value_enum, default_value_t = Format::Table, conflicts_with = "prompts")]
    format: Format,
    /// Check this operation alone, without the forward pass
    #[arg(long, value_enum, value_name = "NAME", conflicts_with = "prompts")]
    op: Option<Op>,
    /// Of the operation, only the cases whose text contains this
    #[arg(long, value_name = "TEXT", requires = "op")]
    case: Option<String>,
    /// Score these texts instead
    #[arg(long, value_name = "FILE.jsonl")]
    prompts: Option<PathBuf>,
    /// Candidates to list after each position [default: 8]
    #[arg(long, value_name = "K", requires = "prompts")]
    top: Option<usize>,
    /// Tokens to continue each text with, greedily [default: 0]
    #[arg(long, value_name = "N", requires = "prompts")]
    greedy: Option<usize>,
    /// Write the scores here instead of stdout
    #[arg(long, short, value_name = "FILE.jsonl", requires = "prompts")]
    out: Option<PathBuf>,
    /// Use only what is in the cache
    #[arg(long)]
    offline: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// On the command line as in reports.
impl ValueEnum for Op {
    fn value_variants<'a>() -> &'a [Self] {
        &Op::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// # Errors
/// When nothing could be checked. A check that fails is a result, and only changes the exit code.
pub fn run(args: Args) -> anyhow::Result<u8> {
    let target = Target::settle(&args.device, args.dtype, args.deterministic, args.gemm, args.jit)?;
    device::check_threads(args.threads)?;
    device::start_threads(args.threads)?;
    if let Some(file) = &args.prompts {
        prompts::score_file(file, target, &args)?;
        return Ok(0);
    }
    let has_graphs = !matches!(target, Target::Cuda { options, .. } if !options.graphs);
    if args.op.is_none() && !has_graphs {
        remark("graphs are switched off (TOKMETER_CUDA_GRAPHS=0) and not held against single launches");
    }
    let report = numerics::check(target, &args)?;
    print(&match args.format {
        Format::Table => report.table(),
        Format::Json => report.json()?,
    })?;
    Ok(if report.passed { 0 } else { FAILED })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_can_be_named_as_reports_name_it() {
        let given = |op: &Op| op.to_possible_value().unwrap().get_name().to_owned();
        let names: Vec<String> = Op::value_variants().iter().map(given).collect();
        assert_eq!(names, Op::ALL.map(Op::name));
    }
}
