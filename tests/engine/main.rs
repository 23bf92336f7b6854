//! The engine: its scheduler without a device, and its loop over a device whose every output depends on its whole
//! input.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod hash_backend;
mod llm;
mod scheduler;
