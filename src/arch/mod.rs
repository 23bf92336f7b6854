//! What a model is, as numbers: its configuration under Hugging Face's names, the tensors it consists of, and the
//! bytes and flops of its work. Knows no file format and no device; everything later counts with these.

mod config;
mod cost;
mod tensors;

pub use config::{Architecture, Config, ConfigError, Rope, RopeScaling};
pub use cost::{
    Op, OpWork, StepTokens, decode_step_flops, kv_bytes_per_token, matmul_parameters, parameters,
    prefill_flops,
};
pub use tensors::{TensorRole, TensorSpec, layer_prefix, tensors};
