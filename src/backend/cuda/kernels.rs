//! The kernels that one backend launches, looked up once for its type and head size. Their arguments are documented at
//! the top of each `kernels/*.cu`.

use std::sync::Arc;

use super::compile::{self, Compiler, Form, Origin, Source};
use super::context::Context;
use super::convert::CudaDType;
use super::module::{Kernel, Module};
use crate::record::KernelResources;

/// Head sizes that the attention kernels are made for.
pub(super) const HEAD_DIMS: [usize; 6] = [16, 32, 64, 96, 128, 256];
/// Query heads that may share one key/value head: the rows of an mma.
pub(super) const MAX_GROUP: usize = 16;

/// What a product does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Epilogue {
    /// `y = `, f32
    Store,
    /// `y += `, f32
    Residual,
    /// `y = silu(gate) · up`, 16-bit; the weight has twice the columns of `y` as rows
    Silu,
}

impl Epilogue {
    /// In kernel names and in records.
    pub(super) fn name(self) -> &'static str {
        match self {
            Epilogue::Store => "store_f32",
            Epilogue::Residual => "residual",
            Epilogue::Silu => "silu",
        }
    }
}

const EPILOGUES: [Epilogue; 3] = [Epilogue::Store, Epilogue::Residual, Epilogue::Silu];

/// Most tokens of each entry of the streaming product.
pub(super) const STREAM_TOKENS: [usize; 4] = [8, 16, 32, 64];

/// The entry of the streaming product for so many tokens: an index into [`STREAM_TOKENS`].
pub(super) fn stream_entry(tokens: usize) -> usize {
    STREAM_TOKENS.iter().position(|&most| tokens <= most).unwrap_or(STREAM_TOKENS.len() - 1)
}

#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed: Kernel,
    pub(super) rms_norm: Kernel,
    /// By [`Epilogue`] and [`stream_entry`].
    stream: [[Kernel; 4]; 3],
    tiled: [Kernel; 3],
    pub(super) silu_mul: Kernel,
    pub(super) rope_kv: Kernel,
    pub(super) decode: Kernel,
    pub(super) decode_shared_bytes: u32,
    pub(super) prefill: Kernel,
    pub(super) prefill_shared_bytes: u32,
    pub(super) sample_stage1: Kernel,
    pub(super) sample_stage2: Kernel,
    /// Made-up values in the backend's type, and in f32.
    pub(super) synthetic: Kernel,
    pub(super) synthetic_f32: Kernel,
    /// What they were compiled for.
    pub(super) architecture: String,
    /// How each module came to be.
    pub(super) origins: Vec<(&'static str, Origin)>,
}

impl Kernels {
    /// # Errors
    /// When a module cannot be compiled or loaded, or lacks a kernel.
    pub(super) fn load(
        context: &Arc<Context>,
        dtype: CudaDType,
        head_dim: usize,
        form: Form,
    ) -> anyhow::Result<Self> {
        let mut loader = Loader::new(context, form)?;
        let t = dtype.name();
        let (embed, norm, rope) =
            (loader.module(compile::EMBED)?, loader.module(compile::NORM)?, loader.module(compile::ROPE)?);
        let (gemm, attention) = (loader.module(compile::GEMM)?, loader.module(compile::ATTENTION)?);
        let (sample, silu) = (loader.module(compile::SAMPLE)?, loader.module(compile::SILU)?);
        let synthetic = loader.module(compile::SYNTHETIC)?;
        let stream = |epilogue: Epilogue| {
            let entry = |tokens| gemm.kernel(format!("gemm_stream_{t}_{}_{tokens}", epilogue.name()));
            all(STREAM_TOKENS.map(entry))
        };
        let tiled = |epilogue: Epilogue| gemm.kernel(format!("gemm_tiled_{t}_{}", epilogue.name()));
        let kernels = Kernels {
            embed: embed.kernel(format!("embed_{t}"))?,
            rms_norm: norm.kernel(format!("rms_norm_{t}"))?,
            stream: all(EPILOGUES.map(stream))?,
            tiled: all(EPILOGUES.map(tiled))?,
            silu_mul: silu.kernel(format!("silu_mul_{t}"))?,
            rope_kv: rope.kernel(format!("rope_kv_{t}"))?,
            decode: attention.kernel(format!("attention_decode_{t}_{head_dim}"))?,
            decode_shared_bytes: match head_dim {
                16 | 32 => 32 << 10,
                96 => 48 << 10,
                _ => 64 << 10,
            },
            prefill: attention.kernel(format!("attention_prefill_{t}_{head_dim}"))?,
            prefill_shared_bytes: match head_dim {
                16 | 32 => 16 << 10,
                64 | 256 => 32 << 10,
                96 => 48 << 10,
                _ => 64 << 10,
            },
            sample_stage1: sample.kernel("sample_stage1".to_owned())?,
            sample_stage2: sample.kernel("sample_stage2".to_owned())?,
            synthetic: synthetic.kernel(format!("synthetic_{t}"))?,
            synthetic_f32: synthetic.kernel("synthetic_f32".to_owned())?,
            architecture: loader.compiler.architecture().to_owned(),
            origins: loader.origins,
        };
        kernels.decode.allow_shared(kernels.decode_shared_bytes)?;
        kernels.prefill.allow_shared(kernels.prefill_shared_bytes)?;
        for entries in &kernels.stream {
            for (kernel, tokens) in entries.iter().zip(STREAM_TOKENS) {
                kernel.allow_shared(super::products::stream_shared_bytes(tokens))?;
            }
        }
        for kernel in kernels.of_a_decode_step() {
            kernel.prefer_shared()?;
        }
        Ok(kernels)
    }

    /// They overlap: a multiprocessor that splits its memory in another way for the next has to run dry in between.
    fn of_a_decode_step(&self) -> impl Iterator<Item = &Kernel> {
        let few = [
            &self.embed,
            &self.rms_norm,
            &self.rope_kv,
            &self.decode,
            &self.sample_stage1,
            &self.sample_stage2,
        ];
        few.into_iter().chain(self.stream.iter().flatten())
    }

    /// Every kernel of the forward pass and what the driver gives it.
    pub(super) fn resources(&self) -> Vec<(String, KernelResources)> {
        let all = self.of_a_decode_step().chain([&self.silu_mul, &self.prefill]).chain(&self.tiled);
        all.map(|kernel| (kernel.name().to_owned(), kernel.resources())).collect()
    }

    /// For at most 64 rows: bound by the bytes of the weight.
    pub(super) fn stream(&self, epilogue: Epilogue, rows: usize) -> &Kernel {
        &self.stream[epilogue as usize][stream_entry(rows)]
    }

    /// For any number of rows.
    pub(super) fn tiled(&self, epilogue: Epilogue) -> &Kernel {
        &self.tiled[epilogue as usize]
    }
}

/// All of them, or what went wrong first.
fn all<T, const N: usize>(results: [anyhow::Result<T>; N]) -> anyhow::Result<[T; N]> {
    let values: Vec<T> = results.into_iter().collect::<anyhow::Result<_>>()?;
    values.try_into().map_err(|_| anyhow::anyhow!("a list of {N} kernels has another length"))
}

/// The kernels that measure the device itself.
#[derive(Debug)]
pub(super) struct PeakKernels {
    pub(super) read_bandwidth: Kernel,
    pub(super) copy_bandwidth: Kernel,
    pub(super) empty: Kernel,
    pub(super) mma_peak: Kernel,
    /// Fills a buffer of the type.
    pub(super) random: Kernel,
}

impl PeakKernels {
    /// # Errors
    /// As for [`Kernels::load`].
    pub(super) fn load(context: &Arc<Context>, dtype: CudaDType) -> anyhow::Result<Self> {
        // Ceilings are the hardware's: they are measured with machine code, whatever the model's kernels are.
        let mut loader = Loader::new(context, Form::Sass)?;
        let (peaks, synthetic) = (loader.module(compile::PEAKS)?, loader.module(compile::SYNTHETIC)?);
        Ok(PeakKernels {
            read_bandwidth: peaks.kernel("read_bandwidth".to_owned())?,
            copy_bandwidth: peaks.kernel("copy_bandwidth".to_owned())?,
            empty: peaks.kernel("empty".to_owned())?,
            mma_peak: peaks.kernel(format!("mma_peak_{}", dtype.name()))?,
            random: synthetic.kernel(format!("synthetic_{}", dtype.name()))?,
        })
    }
}

struct Loader<'a> {
    context: &'a Arc<Context>,
    form: Form,
    compiler: Compiler,
    origins: Vec<(&'static str, Origin)>,
}

impl<'a> Loader<'a> {
    fn new(context: &'a Arc<Context>, form: Form) -> anyhow::Result<Self> {
        let compiler = Compiler::new(context.properties(), form)?;
        Ok(Loader { context, form, compiler, origins: Vec::new() })
    }

    fn module(&mut self, source: Source) -> anyhow::Result<Arc<Module>> {
        let module = Module::of(self.context, source.name, self.form, || self.compiler.image(source))?;
        self.origins.push((source.name, module.origin()));
        Ok(module)
    }
}
