//! Ctrl-C and SIGTERM: the first asks the work to stop and save what it has, the second ends the program
//! at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

/// Becomes true once a signal has come.
///
/// # Errors
/// When the system refuses the handler.
#[allow(clippy::exit, clippy::disallowed_methods)]
pub(crate) fn on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(super::INTERRUPTED));
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}
