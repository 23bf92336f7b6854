//! What else happened on the machine during a window. Reads at the window's two edges only, never inside.

use crate::machine::{CpuSnapshot, Roots};
use crate::record::Maybe;
use crate::record::machine::CpuShare;

/// Takes the readings at both ends of a window.
#[derive(Debug)]
pub struct Witness {
    /// `None` where time is scripted and the machine means nothing.
    roots: Option<Roots>,
    opened: Option<CpuSnapshot>,
}

impl Witness {
    pub fn new(roots: Roots) -> Self {
        Witness { roots: Some(roots), opened: None }
    }

    /// For the fake engine.
    pub fn blind() -> Self {
        Witness { roots: None, opened: None }
    }

    pub(crate) fn window_opens(&mut self) {
        self.opened = self.roots.as_ref().map(CpuSnapshot::take);
    }

    pub(crate) fn window_closes(&mut self) -> Maybe<CpuShare> {
        match (&self.roots, self.opened.take()) {
            (Some(roots), Some(opened)) => opened.until(&CpuSnapshot::take(roots)),
            _ => Maybe::missing("scripted_clock"),
        }
    }
}
