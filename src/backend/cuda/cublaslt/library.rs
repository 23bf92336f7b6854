//! The library's objects, each owned by a thin type, and its calls. What is asked of them is decided above. The library
//! must have been made ready.

use std::ffi::{CStr, c_void};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtMatmulAlgo_t as RawAlgorithm,
    cublasLtMatmulAlgoConfigAttributes_t as Config, cublasLtMatmulDescAttributes_t as Description,
    cublasLtMatmulHeuristicResult_t as RawCandidate, cublasLtMatmulPreferenceAttributes_t as Wanted,
    cublasLtMatrixLayoutAttribute_t as LayoutAttribute, cublasStatus_t as Status, cudaDataType_t as DataType,
};

use super::shape::{Matrix, ProductShape, Value};
use crate::backend::CudaDType;
use crate::backend::cuda::context::Stream;
use crate::backend::cuda::error::CudaError;

/// Words of an algorithm's description, which only the library understands.
pub(super) const ALGORITHM_WORDS: usize = 8;
/// `CUBLAS_OP_T`, for which the bindings have no name.
const TRANSPOSED: u32 = 1;

/// What makes the library compute a product in one certain way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Algorithm(pub(super) [u64; ALGORITHM_WORDS]);

impl Algorithm {
    fn raw(&self) -> RawAlgorithm {
        RawAlgorithm { data: self.0 }
    }

    /// One number of its configuration.
    #[allow(unsafe_code)]
    fn config(&self, which: Config) -> Result<u32, CudaError> {
        let (raw, mut value, mut written) = (self.raw(), 0u32, 0usize);
        // SAFETY: all outlive the call, which writes at most the four bytes of `value`.
        let status = unsafe {
            sys::cublasLtMatmulAlgoConfigGetAttribute(
                &raw const raw,
                which,
                (&raw mut value).cast(),
                size_of::<u32>(),
                &raw mut written,
            )
        };
        check(status, || format!("cublasLtMatmulAlgoConfigGetAttribute of {which:?}"))?;
        Ok(value)
    }

    pub(super) fn numbers(&self) -> Result<Numbers, CudaError> {
        Ok(Numbers {
            id: self.config(Config::CUBLASLT_ALGO_CONFIG_ID)?,
            tile_id: self.config(Config::CUBLASLT_ALGO_CONFIG_TILE_ID)?,
            stages_id: self.config(Config::CUBLASLT_ALGO_CONFIG_STAGES_ID)?,
            split_k: self.config(Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM)?,
        })
    }
}

/// The library's own numbers for what an algorithm does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) id: u32,
    pub(super) tile_id: u32,
    pub(super) stages_id: u32,
    pub(super) split_k: u32,
}

/// An algorithm that can do a product, and the workspace that it then needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
}

/// Device addresses of one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) y: u64,
    pub(super) a: u64,
    pub(super) w: u64,
    pub(super) workspace: u64,
    pub(super) workspace_bytes: usize,
}

/// Version of the library, major, minor and patch as it encodes them: `130100`.
#[allow(unsafe_code)]
pub(super) fn version() -> usize {
    // SAFETY: the library is present; the call only returns a number.
    unsafe { sys::cublasLtGetVersion() }
}

/// `130100` → `13.1.0`
pub(super) fn dotted(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The library in the current context.
#[derive(Debug)]
pub(super) struct Handle(sys::cublasLtHandle_t);

// SAFETY: a handle may be used from any thread whose context is current.
#[allow(unsafe_code)]
unsafe impl Send for Handle {}

impl Handle {
    /// The context must be current.
    #[allow(unsafe_code)]
    pub(super) fn new() -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a context is current; `raw` outlives the call.
        check(unsafe { sys::cublasLtCreate(&raw mut raw) }, || "cublasLtCreate".to_owned())?;
        Ok(Handle(raw))
    }

    /// The library's guesses for `problem`, its best first.
    #[allow(unsafe_code)]
    pub(super) fn candidates(
        &self,
        problem: &Problem,
        most: usize,
        workspace_bytes: usize,
    ) -> Result<Vec<Candidate>, CudaError> {
        let preference = Preference::new(workspace_bytes)?;
        // SAFETY: plain numbers, for which zeros are valid (the status that is zero is success).
        let mut found: Vec<RawCandidate> = vec![unsafe { std::mem::zeroed() }; most];
        let mut count = 0;
        let Problem { operation, first, second, result, .. } = problem;
        // SAFETY: all objects live, and `found` has room for `most`.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.0,
                operation.0,
                first.0,
                second.0,
                result.0,
                result.0,
                preference.0,
                most as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        if status == Status::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check(status, || "cublasLtMatmulAlgoGetHeuristic".to_owned())?;
        found.truncate(count.unsigned_abs() as usize);
        let usable = found.iter().filter(|candidate| candidate.state == Status::CUBLAS_STATUS_SUCCESS);
        Ok(usable
            .map(|candidate| Candidate {
                algorithm: Algorithm(candidate.algo.data),
                workspace_bytes: candidate.workspaceSize,
            })
            .collect())
    }

    /// Whether `algorithm` can do `problem` within `workspace_bytes`; what it then needs.
    #[allow(unsafe_code)]
    pub(super) fn check(
        &self,
        problem: &Problem,
        algorithm: Algorithm,
        workspace_bytes: usize,
    ) -> Option<Candidate> {
        let raw = algorithm.raw();
        // SAFETY: plain numbers, for which zeros are valid.
        let mut found: RawCandidate = unsafe { std::mem::zeroed() };
        let Problem { operation, first, second, result, .. } = problem;
        // SAFETY: all objects live and outlive the call; any words may be asked about.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.0,
                operation.0,
                first.0,
                second.0,
                result.0,
                result.0,
                &raw const raw,
                &raw mut found,
            )
        };
        let fits = status == Status::CUBLAS_STATUS_SUCCESS && found.workspaceSize <= workspace_bytes;
        fits.then_some(Candidate { algorithm, workspace_bytes: found.workspaceSize })
    }

    /// Queues `problem`.
    ///
    /// # Errors
    /// When the library refuses; nothing was queued then.
    ///
    /// # Safety
    /// The addresses must be live device memory of the problem's sizes, and stay so until the stream has come to it.
    #[allow(unsafe_code)]
    pub(super) unsafe fn multiply(
        &self,
        problem: &Problem,
        algorithm: Algorithm,
        at: Addresses,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let (raw, alpha) = (algorithm.raw(), 1.0f32);
        let pointer = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let Problem { operation, first, second, result, beta } = problem;
        // SAFETY: the caller's promise; alpha, beta and the algorithm are read during the call.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.0,
                operation.0,
                (&raw const alpha).cast(),
                pointer(at.w),
                first.0,
                pointer(at.a),
                second.0,
                std::ptr::from_ref(beta).cast(),
                pointer(at.y),
                result.0,
                pointer(at.y),
                result.0,
                &raw const raw,
                pointer(at.workspace),
                at.workspace_bytes,
                stream.raw().cast(),
            )
        };
        check(status, || "cublasLtMatmul".to_owned())
    }
}

impl Drop for Handle {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { sys::cublasLtDestroy(self.0) };
    }
}

/// A product described to the library: what it computes, and how its matrices lie.
#[derive(Debug)]
pub(super) struct Problem {
    operation: Operation,
    first: Layout,
    second: Layout,
    result: Layout,
    beta: f32,
}

impl Problem {
    pub(super) fn new(shape: &ProductShape, dtype: CudaDType) -> Result<Self, CudaError> {
        let operands = shape.operands(dtype);
        Ok(Problem {
            operation: Operation::new()?,
            first: Layout::new(operands.first)?,
            second: Layout::new(operands.second)?,
            result: Layout::new(operands.result)?,
            beta: shape.beta(),
        })
    }

    /// The same product of another number of rows, which are columns here.
    pub(super) fn set_rows(&mut self, rows: usize) -> Result<(), CudaError> {
        self.second.set_columns(rows)?;
        self.result.set_columns(rows)
    }
}

/// First operand transposed, sums and scale in f32.
#[derive(Debug)]
struct Operation(sys::cublasLtMatmulDesc_t);

// SAFETY: a description in host memory, tied to no thread.
#[allow(unsafe_code)]
unsafe impl Send for Operation {}

impl Operation {
    #[allow(unsafe_code)]
    fn new() -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        let status = unsafe {
            sys::cublasLtMatmulDescCreate(&raw mut raw, Compute::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F)
        };
        check(status, || "cublasLtMatmulDescCreate".to_owned())?;
        let operation = Operation(raw);
        let transposed = TRANSPOSED;
        // SAFETY: the description lives; four bytes are read during the call.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(
                operation.0,
                Description::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<u32>(),
            )
        };
        check(status, || "cublasLtMatmulDescSetAttribute of TRANSA".to_owned())?;
        Ok(operation)
    }
}

impl Drop for Operation {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// How a matrix lies in memory.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

// SAFETY: a description in host memory, tied to no thread.
#[allow(unsafe_code)]
unsafe impl Send for Layout {}

impl Layout {
    #[allow(unsafe_code)]
    fn new(matrix: Matrix) -> Result<Self, CudaError> {
        let Matrix { value, rows, columns, leading } = matrix;
        let value = match value {
            Value::F32 => DataType::CUDA_R_32F,
            Value::Half(CudaDType::Bf16) => DataType::CUDA_R_16BF,
            Value::Half(CudaDType::F16) => DataType::CUDA_R_16F,
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        let status = unsafe {
            sys::cublasLtMatrixLayoutCreate(&raw mut raw, value, rows as u64, columns as u64, leading as i64)
        };
        check(status, || format!("cublasLtMatrixLayoutCreate of {rows} x {columns}"))?;
        Ok(Layout(raw))
    }

    #[allow(unsafe_code)]
    fn set_columns(&mut self, columns: usize) -> Result<(), CudaError> {
        let columns = columns as u64;
        // SAFETY: the layout lives; eight bytes are read during the call.
        let status = unsafe {
            sys::cublasLtMatrixLayoutSetAttribute(
                self.0,
                LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_COLS,
                (&raw const columns).cast(),
                size_of::<u64>(),
            )
        };
        check(status, || format!("cublasLtMatrixLayoutSetAttribute: {columns} columns"))
    }
}

impl Drop for Layout {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// What algorithms may use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    #[allow(unsafe_code)]
    fn new(workspace_bytes: usize) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut raw) };
        check(status, || "cublasLtMatmulPreferenceCreate".to_owned())?;
        let preference = Preference(raw);
        // SAFETY: the preference lives; eight bytes are read during the call.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(
                preference.0,
                Wanted::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast(),
                size_of::<usize>(),
            )
        };
        check(status, || format!("cublasLtMatmulPreferenceSetAttribute: {workspace_bytes} B of workspace"))?;
        Ok(preference)
    }
}

impl Drop for Preference {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// `Ok` for success, else an error that names `call`.
fn check(status: Status, call: impl FnOnce() -> String) -> Result<(), CudaError> {
    match status {
        Status::CUBLAS_STATUS_SUCCESS => Ok(()),
        code => Err(CudaError { call: call(), name: format!("{code:?}"), text: text(code) }),
    }
}

#[allow(unsafe_code)]
fn text(code: Status) -> String {
    // SAFETY: the library is present; it returns a static string for any code.
    let chars = unsafe { sys::cublasLtGetStatusString(code) };
    if chars.is_null() {
        return "cuBLASLt has no text for it".to_owned();
    }
    // SAFETY: not null, static and terminated.
    unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_three_numbers() {
        assert_eq!((dotted(130_100), dotted(120_405)), ("13.1.0".to_owned(), "12.4.5".to_owned()));
    }
}
