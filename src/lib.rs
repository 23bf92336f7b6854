//! Measures how many tokens a machine makes per second, per joule and per dollar, on real open-weight models.
//!
//! Data flows one way, and the modules below stand in its order; none imports a later one (a test enforces it):
//!
//! ```text
//! weights ─► model + backend ─► engine ◄─ workload
//!                                 │ token events
//!          meter ─┐               ▼
//!          machine ┴─────────► runner: warm-up │ windows │ drain
//!                                 ▼
//!                   ═══ record: one JSON file ═══
//!                                 ▼
//!                      analysis ─► report, export
//! ```
//!
//! Left of the record everything touches the machine; right of it everything is a pure function of files.

pub mod analysis;
pub mod arch;
pub mod backend;
pub mod clock;
pub mod cmd;
pub mod engine;
pub mod export;
pub mod machine;
pub mod meter;
pub mod model;
pub mod record;
pub mod report;
pub mod runner;
pub mod suite;
pub mod units;
pub mod weights;
pub mod workload;
