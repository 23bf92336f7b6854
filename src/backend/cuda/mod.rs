//! The CUDA backend: our kernels (`kernels/*.cu`), compiled for the very device, launched in one stream. From below:
//! `library`/`preload` find the software, `error` names what fails, `context`, `memory`, `module` and `launch` own one
//! driver object each, `compile`/`prebuilt`/`cache`/`nvrtc` make images, `capture` makes graphs, `staging` brings a batch to the device, `kernels` is the
//! table of entries, `cublaslt` takes the large products where it is there, and `ops` puts them together as a [`super::Backend`]. All `unsafe` code of the crate that computes
//! is in this folder.

mod attend;
mod buffers;
mod cache;
mod capture;
mod compile;
mod context;
mod convert;
mod cublaslt;
mod device;
mod error;
mod generate;
mod kernels;
mod launch;
pub mod library;
mod memory;
mod module;
mod nvrtc;
mod ops;
mod peaks;
mod prebuilt;
mod preload;
mod products;
mod python;
mod queue;
mod samples;
mod staging;

pub use buffers::{CudaBuf, CudaKv, CudaWeight};
pub use compile::Form;
pub use compile::{Origin, architecture, embedded_architectures};
pub use context::{Properties, Refusal, refusals};
pub use convert::CudaDType;
pub use device::{Cuda, CudaOptions, Gemm, supports};
pub use error::{CudaError, OutOfMemory, is_device_error};
