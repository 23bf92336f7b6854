//! Ctrl-C and SIGTERM: the first asks the measurement to stop and save, the second ends the program at once.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

static STOP: AtomicBool = AtomicBool::new(false);

/// Set once a signal has come.
///
/// # Errors
/// When the system refuses the handler.
#[allow(clippy::exit, clippy::disallowed_methods)]
pub(super) fn on_signal() -> anyhow::Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(super::INTERRUPTED));
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(&STOP)
}
