//! What a person sees while it runs, on stderr: bars for fetching, hashing and loading, one line between runs. Nothing
//! is drawn inside a window: a thread that ticks would take a core from what is measured.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use indicatif::ProgressBar;

use super::choices::Choices;
use crate::cmd::progress::{FetchBar, byte_bar, step_bar};
use crate::weights::fetch;

/// The invocation's progress; hidden when stderr is no terminal.
pub(super) struct View {
    /// Made by the first run.
    runs: OnceCell<ProgressBar>,
    stop: Arc<AtomicBool>,
}

impl View {
    pub(super) fn new(stop: Arc<AtomicBool>) -> Self {
        View { runs: OnceCell::new(), stop }
    }

    /// Draws the bar of a run, which stays still until the next.
    pub(super) fn run_begins(&self, choices: &Choices, cell: usize, run: u32, runs: u32) {
        let bar = self.runs.get_or_init(|| step_bar("", choices.cells.len() as u64 * u64::from(runs)));
        bar.set_message(format!("{} run {}/{runs}", choices.cells[cell].key(), run + 1));
        bar.set_position(cell as u64 * u64::from(runs) + u64::from(run));
        bar.force_draw();
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = self.runs.get() {
            bar.finish_and_clear();
        }
    }

    /// A bar over `total` bytes.
    pub(super) fn bytes(&self, label: &str, total: u64) -> ProgressBar {
        byte_bar(label, Some(total))
    }

    /// A fetch that stops at a signal.
    pub(super) fn fetch_progress(&self) -> Box<dyn fetch::Progress> {
        Box::new(FetchBar::with_interrupt(Arc::clone(&self.stop)))
    }
}
