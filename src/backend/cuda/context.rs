//! One opened device: its properties, its primary context, and streams and events on it. A context is kept until the
//! process ends; everything else is a thin owner of one driver object. When and in which order they are used is decided
//! above.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context as _, bail};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::error::{CudaError, check};
use super::library::{self, Unavailable};

/// Programmatic dependent launches can be captured into graphs from CUDA 12.3 on.
const PDL_IN_GRAPHS_SINCE: i32 = 12_030;

/// What the driver says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    pub name: String,
    /// `GPU-` and five groups of hexadecimal digits.
    pub uuid: String,
    pub compute_capability: (i32, i32),
    pub multiprocessors: u32,
    pub total_bytes: u64,
    /// Shared memory that one block may ask for.
    pub shared_bytes_per_block: u32,
    /// 1000 major + 10 minor, as CUDA encodes it.
    pub driver_cuda_version: i32,
}

impl Properties {
    /// The stand-in driver of the tests, not hardware.
    pub fn is_emulated(&self) -> bool {
        library::is_emulated(&self.name)
    }

    /// Whether a kernel may start while its predecessor ends.
    pub fn has_dependent_launch(&self) -> bool {
        self.compute_capability >= (9, 0) && self.driver_cuda_version >= PDL_IN_GRAPHS_SINCE
    }
}

/// The contexts that were opened, by the N of `cuda:N`. None is released: making one takes a good part of a second, and
/// libraries keep state in it that they do not expect to lose while the process lives.
static OPENED: Mutex<BTreeMap<u32, Arc<Context>>> = Mutex::new(BTreeMap::new());

fn opened() -> MutexGuard<'static, BTreeMap<u32, Arc<Context>>> {
    OPENED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Devices whose driver refused a capture with dependent launch, and took it without.
pub fn refusals() -> Vec<(u32, Refusal)> {
    let refusal = |(index, context): (&u32, &Arc<Context>)| Some((*index, context.refusal()?.clone()));
    opened().iter().filter_map(refusal).collect()
}

/// The primary context of a device, retained for the life of the process.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    properties: Properties,
    refusal: OnceLock<Refusal>,
}

/// Why graphs on a device are captured without dependent launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// CUDA's name of the error with which the driver refused a capture with it.
    pub error: String,
    /// The call that failed.
    pub call: String,
}

// SAFETY: a context may be used from any thread that makes it current; the driver locks inside.
#[allow(unsafe_code)]
unsafe impl Send for Context {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Context {}

impl Context {
    /// The context of `cuda:index`, opened at the first call, and made current.
    ///
    /// # Errors
    /// No driver, a driver below the floor, no such device, or a device that cannot be opened; each with a hint. The
    /// next call tries again.
    pub fn open(index: u32) -> anyhow::Result<Arc<Self>> {
        let mut opened = opened();
        let context = match opened.get(&index) {
            Some(context) => Arc::clone(context),
            None => Arc::new(Self::retain(index)?),
        };
        context.bind()?;
        opened.insert(index, Arc::clone(&context));
        Ok(context)
    }

    #[allow(unsafe_code)]
    fn retain(index: u32) -> anyhow::Result<Self> {
        let device = find(index)?;
        let properties = properties(device).with_context(|| format!("asking cuda:{index} what it is"))?;
        if properties.compute_capability < (8, 0) {
            let (major, minor) = properties.compute_capability;
            bail!(
                "cuda:{index} ({}) has compute capability {major}.{minor}, expected at least 8.0\nhint: use --device cpu",
                properties.name
            );
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: `device` comes from `cuDeviceGet`; `raw` outlives the call.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })
            .with_context(|| format!("opening cuda:{index} ({})", properties.name))?;
        Ok(Context { device, raw, properties, refusal: OnceLock::new() })
    }

    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    pub(super) fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// Makes the context current in this thread.
    #[allow(unsafe_code)]
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: `raw` is retained and never released.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// Why no further graph is captured with dependent launch; none while no capture was refused.
    pub(super) fn refusal(&self) -> Option<&Refusal> {
        self.refusal.get()
    }

    /// The driver refused a capture, and took it without dependent launch. The first refusal stays.
    pub(super) fn refused(&self, refusal: Refusal) {
        let _ = self.refusal.set(refusal);
    }

    /// Size of the L2 cache, bytes.
    pub(super) fn l2_bytes(&self) -> Result<u64, CudaError> {
        attribute(self.device, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map(u64::from)
    }

    /// Free and total device memory, bytes.
    #[allow(unsafe_code)]
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: a context is current, and both outlive the call.
        check("cuMemGetInfo_v2", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }
}

#[allow(unsafe_code)]
fn find(index: u32) -> anyhow::Result<sys::CUdevice> {
    const DRIVER: &str = "hint: install NVIDIA driver 535 or newer, or use --device cpu";
    let devices = match library::devices() {
        Ok(devices) => devices,
        Err(error @ (Unavailable::NoLibrary | Unavailable::TooOld(_))) => {
            bail!("cuda:{index} cannot run: {error}\n{DRIVER}")
        }
        Err(error) => bail!("cuda:{index} cannot run: {error}\nhint: `tokmeter doctor` says what is missing"),
    };
    let count = devices.len();
    if index as usize >= count {
        bail!(
            "there is no device cuda:{index}: the driver shows {count}\nhint: look at CUDA_VISIBLE_DEVICES, and at \
             what the container was given"
        );
    }
    let mut device = 0;
    // SAFETY: the driver was started by `library::devices`; `device` outlives the call.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index as i32) })?;
    Ok(device)
}

#[allow(unsafe_code)]
fn attribute(device: sys::CUdevice, which: Attribute) -> Result<u32, CudaError> {
    let mut value = 0i32;
    // SAFETY: `device` comes from `cuDeviceGet`, and `value` outlives the call.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })
        .map(|()| value.unsigned_abs())
}

fn properties(device: sys::CUdevice) -> anyhow::Result<Properties> {
    let described = library::describe(device, device);
    Ok(Properties {
        name: described.name?,
        uuid: described.uuid.unwrap_or_else(|_| "unknown".to_owned()),
        compute_capability: described.compute_capability?,
        multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        total_bytes: described.memory_bytes?,
        shared_bytes_per_block: attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        driver_cuda_version: library::cuda_version()?,
    })
}

/// A queue of work on the device.
#[derive(Debug)]
pub struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: a stream may be used from any thread; the driver locks inside.
#[allow(unsafe_code)]
unsafe impl Send for Stream {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Stream {}

impl Stream {
    /// One that does not wait for the default stream, which nothing here uses.
    #[allow(unsafe_code)]
    pub fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; `raw` outlives the call.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Stream { context: Arc::clone(context), raw })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits for everything queued.
    #[allow(unsafe_code)]
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }
}

impl Drop for Stream {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed once. Work in flight still ends; its memory is freed after it because
        // freeing waits for the device.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A mark in a stream that the host can wait for, or that tells when it was passed.
#[derive(Debug)]
pub struct Event {
    _context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: an event may be used from any thread; the driver locks inside.
#[allow(unsafe_code)]
unsafe impl Send for Event {}

impl Event {
    /// Without a time stamp: recording it costs the device nothing.
    pub fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        Self::with_flags(context, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// With a time stamp of the device.
    pub fn timed(context: &Arc<Context>) -> Result<Self, CudaError> {
        Self::with_flags(context, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    #[allow(unsafe_code)]
    fn with_flags(context: &Arc<Context>, flags: sys::CUevent_flags) -> Result<Self, CudaError> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = flags as u32;
        // SAFETY: a context is current; `raw` outlives the call.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut raw, flags) })?;
        Ok(Event { _context: Arc::clone(context), raw })
    }

    /// Marks the end of what is queued so far.
    #[allow(unsafe_code)]
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both live and belong to one context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw) })
    }

    /// Nanoseconds of the device from `begin` to this mark; both are [`Event::timed`] and were passed.
    #[allow(unsafe_code)]
    pub fn ns_since(&self, begin: &Event) -> Result<u64, CudaError> {
        let mut ms = 0.0f32;
        // SAFETY: the function was looked up under its name, and has this type; both events live.
        check("cuEventElapsedTime", unsafe { elapsed_time()?(&raw mut ms, begin.raw, self.raw) })?;
        Ok((f64::from(ms) * 1e6) as u64)
    }

    /// Waits until the mark is passed; at once when it was never recorded.
    #[allow(unsafe_code)]
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }
}

type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// The call's first version, which is in every driver. The bindings know only the second, which is newer than the
/// oldest driver that we run on.
#[allow(unsafe_code)]
fn elapsed_time() -> Result<ElapsedTime, CudaError> {
    // SAFETY: the driver is present: an event exists. The symbol has the type that the driver's interface gives it.
    let symbol = unsafe { sys::culib().get::<ElapsedTime>(b"cuEventElapsedTime\0") };
    symbol.map(|function| *function).map_err(|error| CudaError {
        call: "cuEventElapsedTime".to_owned(),
        name: "CUDA_ERROR_NOT_FOUND".to_owned(),
        text: error.to_string(),
    })
}

impl Drop for Event {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed once.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, compute_capability: (i32, i32), driver_cuda_version: i32) -> Properties {
        Properties {
            name: name.to_owned(),
            uuid: "GPU-0".to_owned(),
            compute_capability,
            multiprocessors: 1,
            total_bytes: 1,
            shared_bytes_per_block: 1,
            driver_cuda_version,
        }
    }

    #[test]
    fn dependent_launch_needs_the_device_and_the_driver() {
        assert!(device("NVIDIA H200", (9, 0), 13_000).has_dependent_launch());
        assert!(!device("NVIDIA H200", (9, 0), 12_020).has_dependent_launch());
        assert!(!device("NVIDIA A100", (8, 0), 13_000).has_dependent_launch());
    }

    #[test]
    fn a_slice_and_an_emulated_device_are_told_from_a_card() {
        assert!(library::is_slice("NVIDIA A100-SXM4-40GB MIG 1g.5gb") && !library::is_slice("NVIDIA B200"));
        assert!(device("emulated GPU (sm_90)", (9, 0), 13_000).is_emulated());
        assert!(!device("NVIDIA B200", (10, 0), 13_000).is_emulated());
    }

    #[test]
    fn a_machine_without_the_driver_gets_one_clear_error() {
        if !library::is_present() {
            let error = Context::open(0).unwrap_err().to_string();
            assert!(error.starts_with("cuda:0 cannot run: no CUDA driver on this machine"), "{error}");
            assert!(error.contains("hint: install NVIDIA driver 535"), "{error}");
        }
    }
}
