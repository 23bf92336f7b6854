//! The CUDA backend. So far it only finds the driver, its devices and the libraries that kernels will need; no kernel
//! runs yet, and `cuda:N` is refused.

pub mod library;
