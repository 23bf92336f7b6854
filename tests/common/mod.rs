//! What several integration tests need.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part
#![allow(clippy::print_stderr)]

pub mod requests;
pub mod stand_in;
pub mod tiny;

use std::path::PathBuf;

use tokmeter::weights::fetch::{Fetcher, Silent};
use tokmeter::weights::registry::{self, DEFAULT_MODEL};

/// Says that a test proves nothing here, and why. Under `TOKMETER_REQUIRE_ALL=1` (continuous integration) that fails.
pub fn waived(reason: &str) {
    assert!(std::env::var_os("TOKMETER_REQUIRE_ALL").is_none_or(|value| value != "1"), "waived: {reason}");
    eprintln!("waived: {reason}");
}

/// The default model's GGUF if it is in this user's cache; nothing is fetched.
pub fn cached_default_model() -> Option<PathBuf> {
    let fetcher = Fetcher::from_env(true, Box::new(Silent)).ok()?;
    fetcher.cached(&registry::find(DEFAULT_MODEL).ok()?).ok()?
}
