//! What a failed call into the driver or the kernel compiler says: the call, CUDA's own name and text for the error,
//! and for launches the kernel and its shape.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaError {
    /// The function, and what it was asked for: `cuMemAlloc_v2 of 2.0 GiB`.
    pub call: String,
    /// `CUDA_ERROR_…`
    pub name: String,
    /// CUDA's sentence for it.
    pub text: String,
}

impl std::fmt::Display for CudaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} ({})", self.call, self.name, self.text)?;
        match hint(&self.name) {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for CudaError {}

/// Something did not fit into the device's memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of device memory: {0}")]
pub struct OutOfMemory(pub String);

/// Whether the device failed or is too small, rather than a file being broken.
pub fn is_device_error(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<CudaError>() || cause.is::<OutOfMemory>())
}

/// `Ok` for success, else an error that names `call`.
pub(super) fn check(call: &str, result: CUresult) -> Result<(), CudaError> {
    check_call(result, || call.to_owned())
}

/// Like [`check`] for a call whose description costs something.
pub(super) fn check_call(result: CUresult, call: impl FnOnce() -> String) -> Result<(), CudaError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(CudaError { call: call(), name: name(code), text: text(code) }),
    }
}

fn name(code: CUresult) -> String {
    described(code, sys::cuGetErrorName).unwrap_or_else(|| format!("{code:?}"))
}

fn text(code: CUresult) -> String {
    described(code, sys::cuGetErrorString).unwrap_or_else(|| "the driver has no text for it".to_owned())
}

type Describe = unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult;

#[allow(unsafe_code)]
fn described(code: CUresult, describe: Describe) -> Option<String> {
    let mut chars = std::ptr::null();
    // SAFETY: `code` came from the driver, which is loaded; it writes a pointer to a static string, or null.
    let result = unsafe { describe(code, &raw mut chars) };
    if result != CUresult::CUDA_SUCCESS || chars.is_null() {
        return None;
    }
    // SAFETY: not null, and the driver's strings are static and end with a zero byte.
    Some(unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned())
}

/// What to do about errors that are not ours.
fn hint(name: &str) -> Option<&'static str> {
    Some(match name {
        "CUDA_ERROR_NO_BINARY_FOR_GPU"
        | "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
        | "CUDA_ERROR_INVALID_IMAGE" => {
            "the driver cannot load this kernel: install a driver as new as the kernel compiler"
        }
        "CUDA_ERROR_LAUNCH_FAILED" | "CUDA_ERROR_ILLEGAL_ADDRESS" | "CUDA_ERROR_HARDWARE_STACK_ERROR" => {
            "run `tokmeter check --device cuda:N`; if that fails too, look at `dmesg | grep -i xid`, and try it with \
             TOKMETER_CUDA_PDL=0 and TOKMETER_CUDA_GRAPHS=0"
        }
        "CUDA_ERROR_INVALID_HANDLE"
        | "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        | "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" => {
            "TOKMETER_CUDA_GRAPHS=0 runs without graphs, TOKMETER_CUDA_PDL=0 without kernels that overlap"
        }
        "CUDA_ERROR_ECC_UNCORRECTABLE"
        | "CUDA_ERROR_NVLINK_UNCORRECTABLE"
        | "CUDA_ERROR_DEVICE_UNAVAILABLE"
        | "CUDA_ERROR_NOT_PERMITTED"
        | "CUDA_ERROR_CONTAINED" => "look at `dmesg | grep -i xid` and at `nvidia-smi -q`",
        "CUDA_ERROR_SYSTEM_NOT_READY" => "the fabric manager must run on machines with NVSwitch",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_call_the_code_and_the_text() {
        let error = CudaError {
            call: "cuLaunchKernel of embed_bf16 (grid 4 x 1 x 1, block 256, 0 B shared)".to_owned(),
            name: "CUDA_ERROR_INVALID_VALUE".to_owned(),
            text: "invalid argument".to_owned(),
        };
        assert_eq!(
            error.to_string(),
            "cuLaunchKernel of embed_bf16 (grid 4 x 1 x 1, block 256, 0 B shared): CUDA_ERROR_INVALID_VALUE \
             (invalid argument)"
        );
    }

    #[test]
    fn a_lost_device_says_where_to_look() {
        let error = CudaError {
            call: "cuEventSynchronize".to_owned(),
            name: "CUDA_ERROR_ECC_UNCORRECTABLE".to_owned(),
            text: "uncorrectable ECC error encountered".to_owned(),
        };
        assert!(error.to_string().ends_with("\nhint: look at `dmesg | grep -i xid` and at `nvidia-smi -q`"));
    }

    #[test]
    fn errors_of_the_device_are_told_from_those_of_files() {
        let device = anyhow::Error::new(OutOfMemory("weights".to_owned())).context("uploading w");
        assert!(is_device_error(&device));
        assert!(!is_device_error(&anyhow::anyhow!("tensor w is cut off").context("uploading w")));
    }

    #[test]
    fn success_is_no_error_and_asks_the_driver_nothing() {
        assert_eq!(check("cuInit", CUresult::CUDA_SUCCESS), Ok(()));
    }
}
