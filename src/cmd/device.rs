//! The device, the types and the threads that several verbs ask for on the command line: device and type must fit
//! each other. Also what the environment switches off on cuda.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;

use super::{remark, usage};
use crate::backend::cpu;
use crate::backend::cuda::library::{self, Device, Variable};
use crate::backend::cuda::{Refusal, refusals};
use crate::backend::{BackendInfo, CpuDType, Cuda, CudaDType, CudaOptions, Form, Gemm};
use crate::meter::nvml::GpuId;

/// Switches that isolate a fault of a driver: with 0 no kernel starts while its predecessor ends, and decode steps are
/// launched kernel by kernel.
const PDL_SWITCH: &str = "TOKMETER_CUDA_PDL";
const GRAPHS_SWITCH: &str = "TOKMETER_CUDA_GRAPHS";

/// What help says of them.
macro_rules! switches_help {
    () => {
        "Environment, to isolate a fault of a driver on cuda:\n  \
        TOKMETER_CUDA_PDL=0      no kernel starts while its predecessor ends\n  \
        TOKMETER_CUDA_GRAPHS=0   decode steps are launched kernel by kernel, not as graphs"
    };
}
pub(in crate::cmd) use switches_help;

/// Most threads that make sense to ask for.
const MOST_THREADS: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DType {
    /// 32-bit floating point; quantised checkpoints are dequantised (cpu)
    F32,
    /// The checkpoint's own quantised blocks (cpu)
    Quantized,
    /// 16-bit floating point with the range of f32, sums in f32 (cuda)
    Bf16,
    /// 16-bit floating point with a longer mantissa, sums in f32 (cuda)
    F16,
}

impl DType {
    fn on_cpu(self) -> anyhow::Result<CpuDType> {
        match self {
            DType::F32 => Ok(CpuDType::F32),
            DType::Quantized => Ok(CpuDType::Quantized),
            DType::Bf16 | DType::F16 => {
                Err(usage("--dtype bf16 and f16 are computed on cuda only; expected f32 or quantized on cpu"))
            }
        }
    }
}

/// What computes large products on cuda.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GemmChoice {
    /// cuBLASLt where it is found, else own kernels
    Auto,
    /// Own kernels for every product
    Own,
    /// cuBLASLt, or an error
    Cublaslt,
}

impl From<GemmChoice> for Gemm {
    fn from(choice: GemmChoice) -> Self {
        match choice {
            GemmChoice::Auto => Gemm::Auto,
            GemmChoice::Own => Gemm::Own,
            GemmChoice::Cublaslt => Gemm::CublasLt,
        }
    }
}

/// What the driver is given of the kernels on cuda.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum JitChoice {
    /// Machine code for the very device
    Sass,
    /// Intermediate code that the driver compiles: shows what its compiler does
    Ptx,
}

impl From<JitChoice> for Form {
    fn from(choice: JitChoice) -> Self {
        match choice {
            JitChoice::Sass => Form::Sass,
            JitChoice::Ptx => Form::Ptx,
        }
    }
}

/// What the model runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cmd) enum Target {
    Cpu(CpuDType),
    Cuda { index: u32, options: CudaOptions },
}

/// As in records: `cpu`, `cuda:0`.
impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Cpu(_) => write!(f, "cpu"),
            Target::Cuda { index, .. } => write!(f, "cuda:{index}"),
        }
    }
}

impl Target {
    /// `auto` is the first CUDA device that can run, else the CPU, and says why.
    ///
    /// # Errors
    /// Usage errors: no such device name, a type that the device does not compute in, or a way of computing products
    /// that does not fit the rest.
    pub(in crate::cmd) fn settle(
        device: &str,
        dtype: Option<DType>,
        deterministic: bool,
        gemm: GemmChoice,
        jit: JitChoice,
    ) -> anyhow::Result<Self> {
        if deterministic && gemm == GemmChoice::Cublaslt {
            return Err(usage(
                "--deterministic computes all products by own kernels; expected --gemm auto or own with it",
            ));
        }
        let target = Self::settle_device(
            device,
            dtype,
            CudaOptions { deterministic, gemm: gemm.into(), form: jit.into(), ..CudaOptions::default() },
        )?;
        if let (Target::Cpu(_), JitChoice::Ptx) = (target, jit) {
            return Err(usage("--jit ptx is for cuda; expected sass, or none, on cpu"));
        }
        match (target, gemm) {
            (Target::Cpu(_), GemmChoice::Own | GemmChoice::Cublaslt) => {
                Err(usage("--gemm is for cuda; expected auto, or none, on cpu"))
            }
            _ => Ok(target),
        }
    }

    fn settle_device(device: &str, dtype: Option<DType>, options: CudaOptions) -> anyhow::Result<Self> {
        let index = device.strip_prefix("cuda:").and_then(|index| index.parse::<u32>().ok());
        match (device, index) {
            ("cpu", _) => cpu(dtype),
            (_, Some(index)) => cuda(index, dtype, options),
            ("auto", _) => match (dtype, first_usable()) {
                (Some(DType::F32 | DType::Quantized), _) => cpu(dtype),
                (_, Ok(index)) => cuda(index, dtype, options),
                (Some(DType::Bf16 | DType::F16), Err(reason)) => Err(usage(format!(
                    "--dtype bf16 and f16 are computed on cuda only, and there is no device for them: {reason}"
                ))),
                (None, Err(reason)) => {
                    // Without a driver nobody expects a GPU.
                    if library::is_present() {
                        remark(&format!("device: cpu, since {reason}"));
                    }
                    cpu(dtype)
                }
            },
            _ => Err(usage(format!("--device is '{device}', expected auto, cpu or cuda:N"))),
        }
    }
}

fn cpu(dtype: Option<DType>) -> anyhow::Result<Target> {
    Ok(Target::Cpu(dtype.unwrap_or(DType::F32).on_cpu()?))
}

fn cuda(index: u32, dtype: Option<DType>, options: CudaOptions) -> anyhow::Result<Target> {
    let dtype = match dtype {
        None | Some(DType::Bf16) => CudaDType::Bf16,
        Some(DType::F16) => CudaDType::F16,
        Some(DType::F32 | DType::Quantized) => {
            return Err(usage(
                "--dtype f32 and quantized are computed on cpu only; expected bf16 or f16 on cuda",
            ));
        }
    };
    let options = switched(CudaOptions { dtype, ..options }, &|name| std::env::var_os(name))?;
    Ok(Target::Cuda { index, options })
}

/// Options for what only looks at a device.
///
/// # Errors
/// A usage error when a switch is neither 0 nor 1.
pub(super) fn plain_cuda_options() -> anyhow::Result<CudaOptions> {
    switched(CudaOptions::default(), &|name| std::env::var_os(name))
}

/// `options` without what the environment switches off.
fn switched(options: CudaOptions, variable: Variable<'_>) -> anyhow::Result<CudaOptions> {
    Ok(CudaOptions {
        graphs: options.graphs && is_on(GRAPHS_SWITCH, variable(GRAPHS_SWITCH))?,
        dependent_launch: options.dependent_launch && is_on(PDL_SWITCH, variable(PDL_SWITCH))?,
        ..options
    })
}

fn is_on(switch: &str, value: Option<OsString>) -> anyhow::Result<bool> {
    match value.as_ref().map(|value| value.to_string_lossy()).as_deref() {
        None | Some("1") => Ok(true),
        Some("0") => Ok(false),
        Some(other) => Err(usage(format!(
            "{switch} is '{other}', expected 0 or 1\nhint: unset it, or set it to 0 to find out whether a fault of the \
             driver goes away"
        ))),
    }
}

/// Says once for each device that its driver refused a capture, and what runs since.
pub(super) fn remark_refusals() {
    static TOLD: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    for (index, refusal) in refusals() {
        if told.insert(index) {
            remark(&refused(index, &refusal));
        }
    }
}

fn refused(index: u32, Refusal { error, call }: &Refusal) -> String {
    format!(
        "warning: cuda:{index}: the driver refused a graph whose kernels may overlap ({call}: {error}); decode steps are \
         captured without overlap, and the record says so\nhint: {PDL_SWITCH}=0 runs everything without overlap"
    )
}

/// Memory of `cuda:index`, bytes.
pub(super) fn memory_bytes(index: u32) -> anyhow::Result<u64> {
    let devices = library::devices().map_err(|error| anyhow::anyhow!("cuda:{index} cannot run: {error}"))?;
    let device = devices.into_iter().find(|device| device.index == index);
    let device = device.ok_or_else(|| anyhow::anyhow!("there is no device cuda:{index}"))?;
    Ok(device.memory_bytes?)
}

/// `cuda:index` as NVML knows it, where the driver gives its identity.
pub(super) fn gpu_id(index: u32) -> Option<GpuId> {
    let devices = library::devices().unwrap_or_default();
    let uuid = devices.into_iter().find(|device| device.index == index).and_then(|device| device.uuid.ok());
    uuid.map(|uuid| GpuId { name: format!("cuda:{index}"), uuid })
}

/// The first device that the kernels are made for; else why there is none.
fn first_usable() -> Result<u32, String> {
    let devices = library::devices().map_err(|error| format!("there is {error}"))?;
    let is_usable = |device: &&Device| device.unusable().is_none();
    match (devices.iter().find(is_usable), devices.first()) {
        (Some(device), _) => Ok(device.index),
        (None, Some(device)) => Err(format!("cuda:0 cannot run: {}", device.unusable().unwrap_or_default())),
        (None, None) => Err("the CUDA driver shows no device".to_owned()),
    }
}

/// Says when own kernels compute what a library was hoped for.
pub(super) fn remark_products(info: &BackendInfo) {
    let why = match info.cublaslt.reason() {
        Some("cublaslt_not_found") => "was not found",
        Some("cublaslt_unusable") => "was found and cannot be used",
        _ => return,
    };
    remark(&format!(
        "products of more than 64 rows: own kernels, since cuBLASLt {why} (--gemm cublaslt says more, --gemm own is \
         silent)"
    ));
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
    cpu::set_threads(threads.unwrap_or_else(cpu::default_threads))
}

/// Why nothing that this device computes is its speed.
pub(super) fn not_a_measurement(cuda: &Cuda) -> Option<String> {
    let is_emulated = cuda.properties().is_emulated();
    is_emulated.then(|| "emulated GPU: a stand-in driver ran the kernels on the CPU".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::Usage;

    #[test]
    fn each_device_computes_in_its_own_types() {
        let settle = |device, dtype| Target::settle(device, dtype, false, GemmChoice::Auto, JitChoice::Sass);
        assert_eq!(settle("cpu", None).unwrap(), Target::Cpu(CpuDType::F32));
        assert_eq!(settle("cpu", Some(DType::Quantized)).unwrap(), Target::Cpu(CpuDType::Quantized));
        assert_eq!(settle("auto", Some(DType::F32)).unwrap(), Target::Cpu(CpuDType::F32));
        let options = CudaOptions { dtype: CudaDType::F16, ..CudaOptions::default() };
        assert_eq!(settle("cuda:3", Some(DType::F16)).unwrap(), Target::Cuda { index: 3, options });
        let default = Target::Cuda { index: 0, options: CudaOptions::default() };
        assert_eq!((settle("cuda:0", None).unwrap(), default.to_string()), (default, "cuda:0".to_owned()));
        for (device, dtype) in [
            ("cpu", Some(DType::Bf16)),
            ("cuda:0", Some(DType::Quantized)),
            ("cuda:0", Some(DType::F32)),
            ("gpu", None),
            ("cuda:", None),
            ("cuda:-1", None),
        ] {
            assert!(settle(device, dtype).unwrap_err().is::<Usage>(), "{device} {dtype:?}");
        }
    }

    #[test]
    fn a_switch_is_zero_or_one_and_only_switches_off() {
        let options = CudaOptions::default();
        let with = |switch: &'static str, value: &'static str| {
            switched(options, &move |name| (name == switch).then(|| value.into()))
        };
        assert_eq!(switched(options, &|_| None).unwrap(), options);
        for (switch, off) in [
            (PDL_SWITCH, CudaOptions { dependent_launch: false, ..options }),
            (GRAPHS_SWITCH, CudaOptions { graphs: false, ..options }),
        ] {
            assert_eq!((with(switch, "0").unwrap(), with(switch, "1").unwrap()), (off, options));
            assert_eq!(switched(off, &|_| Some("1".into())).unwrap(), off);
            for wrong in ["", "2", "off", " 1", "00"] {
                let error = with(switch, wrong).unwrap_err();
                let expected = format!("{switch} is '{wrong}', expected 0 or 1\nhint: ");
                assert!(error.is::<Usage>() && error.to_string().starts_with(&expected), "{error}");
            }
            assert!(switches_help!().contains(&format!("{switch}=0 ")));
        }
    }

    #[test]
    fn the_way_of_computing_products_fits_the_device_and_determinism() {
        let settle =
            |device, deterministic, gemm| Target::settle(device, None, deterministic, gemm, JitChoice::Sass);
        let gemm_of = |target| match target {
            Target::Cuda { options, .. } => options.gemm,
            Target::Cpu(_) => unreachable!("the CPU was not asked for"),
        };
        for (choice, gemm) in [
            (GemmChoice::Auto, Gemm::Auto),
            (GemmChoice::Own, Gemm::Own),
            (GemmChoice::Cublaslt, Gemm::CublasLt),
        ] {
            assert_eq!(gemm_of(settle("cuda:0", false, choice).unwrap()), gemm);
        }
        assert!(settle("cpu", false, GemmChoice::Auto).is_ok());
        let with_jit = |device| Target::settle(device, None, false, GemmChoice::Auto, JitChoice::Ptx);
        assert!(
            matches!(with_jit("cuda:0").unwrap(), Target::Cuda { options, .. } if options.form == Form::Ptx)
        );
        assert!(with_jit("cpu").unwrap_err().is::<Usage>());
        assert!(settle("cuda:0", true, GemmChoice::Own).is_ok());
        for (device, deterministic, gemm) in [
            ("cuda:0", true, GemmChoice::Cublaslt),
            ("cpu", false, GemmChoice::Cublaslt),
            ("cpu", false, GemmChoice::Own),
        ] {
            assert!(settle(device, deterministic, gemm).unwrap_err().is::<Usage>(), "{device} {gemm:?}");
        }
    }
}
