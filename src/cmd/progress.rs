//! Progress bars on stderr, drawn only when that is a terminal: for fetches, and for any work counted in bytes or in
//! steps. Measures nothing; what is timed must not draw.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};

use crate::weights::fetch::Progress;

/// Bar, how far, how fast, time left, what: a narrow terminal cuts the end.
const BYTES: &str = "{bar:20} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}";
const BYTES_OF_UNKNOWN: &str = "{bytes} {bytes_per_sec} {msg}";
const STEPS: &str = "{bar:20} {pos}/{len} {eta} {msg}";

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates above are well formed").progress_chars("=> ")
}

/// A bar over bytes; without a total it only counts them.
pub fn byte_bar(label: &str, total_bytes: Option<u64>) -> ProgressBar {
    let bar = match total_bytes {
        Some(total) => ProgressBar::new(total).with_style(style(BYTES)),
        None => ProgressBar::no_length().with_style(style(BYTES_OF_UNKNOWN)),
    };
    bar.with_message(label.to_owned())
}

/// A bar over `total` steps.
pub fn step_bar(label: &str, total: u64) -> ProgressBar {
    ProgressBar::new(total).with_style(style(STEPS)).with_message(label.to_owned())
}

/// Shows a fetch, one bar after the other, each gone when its work is done.
#[derive(Default)]
pub struct FetchBar {
    shown: Mutex<Option<(String, ProgressBar)>>,
    interrupt: Option<Arc<AtomicBool>>,
}

impl FetchBar {
    /// A fetch that stops when `interrupt` becomes true.
    pub fn with_interrupt(interrupt: Arc<AtomicBool>) -> Self {
        Self { shown: Mutex::default(), interrupt: Some(interrupt) }
    }
}

impl Progress for FetchBar {
    fn on_progress(&self, label: &str, done_bytes: u64, total_bytes: Option<u64>) {
        let Ok(mut shown) = self.shown.lock() else { return };
        if shown.as_ref().is_none_or(|(own, _)| own != label) {
            if let Some((_, finished)) = shown.take() {
                finished.finish_and_clear();
            }
            *shown = Some((label.to_owned(), byte_bar(label, total_bytes)));
        }
        if let Some((_, bar)) = shown.as_ref() {
            bar.set_position(done_bytes);
        }
    }

    fn is_interrupted(&self) -> bool {
        self.interrupt.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

impl Drop for FetchBar {
    fn drop(&mut self) {
        if let Ok(Some((_, bar))) = self.shown.get_mut().map(|shown| shown.take()) {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_follows_its_work_and_a_new_label_begins_a_new_bar() {
        let progress = FetchBar::default();
        progress.on_progress("one", 5, Some(10));
        progress.on_progress("one", 10, Some(10));
        progress.on_progress("two", 1, None);
        let shown = progress.shown.lock().unwrap();
        let (label, bar) = shown.as_ref().unwrap();
        assert_eq!((label.as_str(), bar.position(), bar.length()), ("two", 1, None));
    }

    #[test]
    fn the_interrupt_flag_reaches_the_fetch() {
        let flag = Arc::new(AtomicBool::new(false));
        let progress = FetchBar::with_interrupt(flag.clone());
        assert!(!progress.is_interrupted());
        flag.store(true, Ordering::Relaxed);
        assert!(progress.is_interrupted());
        assert!(!FetchBar::default().is_interrupted());
    }

    #[test]
    fn every_template_is_well_formed() {
        byte_bar("x", Some(1));
        byte_bar("x", None);
        step_bar("x", 1);
    }
}
