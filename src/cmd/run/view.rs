//! What a person sees while it runs, on stderr: bars for fetching, hashing and loading, one line between runs. Nothing
//! is drawn inside a window: a thread that ticks would take a core from what is measured.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use indicatif::{ProgressBar, ProgressStyle};

use super::choices::Choices;
use crate::cmd::progress::{FetchBar, byte_bar};
use crate::weights::fetch;

/// The invocation's progress; hidden when stderr is no terminal.
pub(super) struct View {
    cells: ProgressBar,
    stop: Arc<AtomicBool>,
}

impl View {
    pub(super) fn new(stop: Arc<AtomicBool>) -> Self {
        let style = ProgressStyle::with_template("{pos}/{len} {wide_msg} {elapsed} of about {duration}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let cells = ProgressBar::new(0).with_style(style);
        cells.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        View { cells, stop }
    }

    /// Draws the line of a run and stays still until the next.
    pub(super) fn run_begins(&self, choices: &Choices, cell: usize, run: u32, runs: u32) {
        let runs_in_all = choices.cells.len() as u64 * u64::from(runs);
        if self.cells.length() != Some(runs_in_all) {
            self.cells.set_length(runs_in_all);
            self.cells.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            self.cells.reset();
        }
        self.cells.set_position(cell as u64 * u64::from(runs) + u64::from(run));
        let workload = &choices.cells[cell];
        self.cells.set_message(format!("{}  run {}/{runs}", workload.key(), run + 1));
        self.cells.force_draw();
    }

    pub(super) fn finish(&self) {
        self.cells.finish_and_clear();
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
