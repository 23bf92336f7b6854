//! The device, the types and the threads that several verbs ask for on the command line.

use clap::ValueEnum;

use super::usage;
use crate::backend::CpuDType;
use crate::backend::cpu;

/// Most threads that make sense to ask for.
const MOST_THREADS: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DType {
    /// 32-bit floating point; quantised checkpoints are dequantised
    F32,
    /// The checkpoint's own quantised blocks
    Quantized,
}

impl DType {
    pub(super) fn on_cpu(self) -> CpuDType {
        match self {
            DType::F32 => CpuDType::F32,
            DType::Quantized => CpuDType::Quantized,
        }
    }
}

/// The device that `--device` means, as records name it.
///
/// # Errors
/// When the text is no device, or one that cannot run.
pub(super) fn parse(text: &str) -> anyhow::Result<String> {
    match text {
        "auto" | "cpu" => Ok("cpu".to_owned()),
        _ if text.strip_prefix("cuda:").is_some_and(|index| index.parse::<u32>().is_ok()) => {
            Err(anyhow::anyhow!("device {text} cannot run: this version of tokmeter computes on cpu only"))
        }
        _ => Err(usage(format!("--device is '{text}', expected auto, cpu or cuda:N"))),
    }
}

/// # Errors
/// When `--threads` is given and is no sensible number.
pub(super) fn check_threads(threads: Option<usize>) -> anyhow::Result<()> {
    match threads {
        Some(threads) if !(1..=MOST_THREADS).contains(&threads) => {
            Err(usage(format!("--threads is {threads}, expected 1 to {MOST_THREADS}")))
        }
        _ => Ok(()),
    }
}

/// Starts the threads that compute: as many as given, else one for each core that this process may use.
///
/// # Errors
/// When they were started before.
pub(super) fn start_threads(threads: Option<usize>) -> anyhow::Result<()> {
    let available = || std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    cpu::set_threads(threads.unwrap_or_else(available))
}
