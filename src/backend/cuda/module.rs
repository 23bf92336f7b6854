//! Loaded kernel code: modules, the kernels in them, and captured graphs of launches. A module is loaded once for a
//! device and, like its context, kept until the process ends.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use cudarc::driver::sys;

use super::compile::{Form, Origin};
use super::context::{Context, Stream};
use super::error::{CudaError, check, check_call};
use crate::record::{KernelResources, Maybe};

/// Shared memory that a block may have without asking for it.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// Room for what the driver's compiler has to say.
const JIT_LOG_BYTES: usize = 8 << 10;

/// The modules that were loaded. Within a process a kernel file has one image of each form for a device.
static LOADED: Mutex<Option<HashMap<Key, Arc<Module>>>> = Mutex::new(None);

/// Device, kernel file, and what the driver was given.
type Key = (sys::CUdevice, String, Form);

/// A loaded image of kernels.
#[derive(Debug)]
pub(super) struct Module {
    raw: sys::CUmodule,
    /// How its image came to be.
    origin: Origin,
}

// SAFETY: a module may be used from any thread whose context is current; the driver locks inside.
#[allow(unsafe_code)]
unsafe impl Send for Module {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Module {}

impl Module {
    /// The module of the kernel file `name`: what was loaded before, else what the driver makes of the `image`, which is
    /// then made. What failed is tried again.
    ///
    /// # Errors
    /// Those of `image`, or the driver's, with the first line of what its compiler says.
    pub(super) fn of(
        context: &Context,
        name: &str,
        form: Form,
        image: impl FnOnce() -> anyhow::Result<(Vec<u8>, Origin)>,
    ) -> anyhow::Result<Arc<Self>> {
        context.bind()?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        let key = (context.device(), name.to_owned(), form);
        if let Some(module) = loaded.get(&key) {
            return Ok(Arc::clone(module));
        }
        let (image, origin) = image()?;
        let raw = match form {
            Form::Sass => load(name, image)?,
            Form::Ptx => compile(name, image)?,
        };
        let module = Arc::new(Module { raw, origin });
        loaded.insert(key, Arc::clone(&module));
        Ok(module)
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// Looks up the kernel `name`.
    #[allow(unsafe_code)]
    pub(super) fn kernel(&self, name: String) -> anyhow::Result<Kernel> {
        let c_name = CString::new(name.as_str()).context("a kernel's name has a zero byte")?;
        let mut function = std::ptr::null_mut();
        // SAFETY: modules are never unloaded, the name is terminated.
        check_call(
            unsafe { sys::cuModuleGetFunction(&raw mut function, self.raw, c_name.as_ptr()) },
            || format!("cuModuleGetFunction of {name}"),
        )?;
        Ok(Kernel { function, name })
    }
}

/// Loads a CUBIN or source text into the current context.
#[allow(unsafe_code)]
fn load(name: &str, mut image: Vec<u8>) -> Result<sys::CUmodule, CudaError> {
    image.push(0);
    let mut raw = std::ptr::null_mut();
    // SAFETY: a context is current; the image is terminated as text must be, and outlives the call.
    check_call(unsafe { sys::cuModuleLoadData(&raw mut raw, image.as_ptr().cast()) }, || {
        format!("cuModuleLoadData of the kernels in {name}.cu")
    })?;
    Ok(raw)
}

/// Has the driver compile intermediate code, and loads what it makes into the current context.
#[allow(unsafe_code)]
fn compile(name: &str, mut ptx: Vec<u8>) -> Result<sys::CUmodule, CudaError> {
    use sys::CUjit_option::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    ptx.push(0);
    let mut log = vec![0u8; JIT_LOG_BYTES];
    let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // A value is a pointer or, for the size, a number in a pointer's place.
    let mut values = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(JIT_LOG_BYTES - 1)];
    let mut raw = std::ptr::null_mut();
    // SAFETY: a context is current; the text is terminated; both lists have two entries; the driver writes at most
    // the given size into the log, which outlives the call and ends with a zero that is not counted.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut raw,
            ptx.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    check_call(result, || {
        let said = log.split(|byte| *byte == 0).next().unwrap_or_default();
        let said = String::from_utf8_lossy(said);
        let said =
            said.lines().next().map_or(String::new(), |line| format!(", whose compiler says \"{line}\""));
        format!("cuModuleLoadDataEx of the intermediate code of {name}.cu{said}")
    })?;
    Ok(raw)
}

/// A kernel that can be launched.
#[derive(Debug)]
pub(super) struct Kernel {
    function: sys::CUfunction,
    name: String,
}

// SAFETY: as for its module.
#[allow(unsafe_code)]
unsafe impl Send for Kernel {}

impl Kernel {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn function(&self) -> sys::CUfunction {
        self.function
    }

    /// What it takes on this device.
    pub(super) fn resources(&self) -> KernelResources {
        use sys::CUfunction_attribute as Attribute;
        KernelResources {
            registers: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS),
            static_shared_bytes: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
            local_bytes: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
            max_block_threads: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK),
            binary_version: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION),
            ptx_version: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION),
        }
    }

    #[allow(unsafe_code)]
    fn attribute(&self, which: sys::CUfunction_attribute) -> Maybe<u32> {
        let mut value = 0;
        // SAFETY: modules, and so functions, are never unloaded; the call writes one integer, which lives here.
        let code = unsafe { sys::cuFuncGetAttribute(&raw mut value, which, self.function) };
        match (code.result(), u32::try_from(value)) {
            (Ok(()), Ok(value)) => Maybe::Value(value),
            (Ok(()), Err(_)) => Maybe::missing("implausible"),
            (Err(error), _) => Maybe::missing(format!("{:?}", error.0).to_lowercase()),
        }
    }

    /// Lets its blocks ask for up to `bytes` of dynamic shared memory.
    pub(super) fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        if bytes <= DEFAULT_SHARED_BYTES {
            return Ok(());
        }
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.set(which, bytes as i32)
    }

    /// Runs with as much of a multiprocessor's memory as can be shared memory, and the rest as L1 cache.
    pub(super) fn prefer_shared(&self) -> Result<(), CudaError> {
        self.set(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    }

    #[allow(unsafe_code)]
    fn set(&self, which: sys::CUfunction_attribute, value: i32) -> Result<(), CudaError> {
        // SAFETY: as in `attribute`.
        check_call(unsafe { sys::cuFuncSetAttribute(self.function, which, value) }, || {
            format!("cuFuncSetAttribute: {which:?} of {value} for {}", self.name)
        })
    }
}

/// Launches that were captured once and are queued together.
#[derive(Debug)]
pub(super) struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraphExec,
}

// SAFETY: a graph may be launched from any one thread at a time; it has one owner.
#[allow(unsafe_code)]
unsafe impl Send for Graph {}

impl Graph {
    /// What `body` queues in `stream` becomes a graph and is not run. Everything that `body` allocates or waits for
    /// must have been there before.
    #[allow(unsafe_code)]
    pub(super) fn capture(
        stream: &Stream,
        body: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives and is not the default one.
        check("cuStreamBeginCapture_v2", unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) })?;
        let queued = body();
        let mut graph = std::ptr::null_mut();
        // SAFETY: capture was begun on this stream by this thread.
        let ended =
            check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream.raw(), &raw mut graph) });
        let mut raw = std::ptr::null_mut();
        // The first thing that went wrong invalidates the capture; its error says more than the end's.
        let made = queued.and_then(|()| Ok(ended?)).and_then(|()| {
            // SAFETY: `graph` was just made; the executable one does not need it afterwards.
            let result = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut raw, graph, 0) };
            Ok(check("cuGraphInstantiateWithFlags", result)?)
        });
        if !graph.is_null() {
            // SAFETY: made by `cuStreamEndCapture`, destroyed once.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        made?;
        Ok(Graph { context: Arc::clone(stream.context()), raw })
    }

    #[allow(unsafe_code)]
    pub(super) fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both live; what the graph reads and writes was checked by its owner to be what was captured.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.raw, stream.raw()) })
    }
}

impl Drop for Graph {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: instantiated in `capture`, destroyed once; a running launch of it still ends.
            let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
        }
    }
}
