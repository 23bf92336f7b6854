//! What records say, computed from them alone: rates, percentiles, shares of the device's ceilings, tokens per joule
//! and per unit of money. Pure functions of files; nothing here touches the machine.

pub mod calibrate;
mod cost;
pub mod devices;
pub mod nnls;
pub mod plan;
mod quantile;
mod rng;
mod roofline;
mod summary;

pub use cost::{CellCost, parse_cost, read_cost_file};
pub use quantile::Quantiles;
pub use roofline::{Utilization, is_impossible, utilization, violations};
pub use summary::{CellSummary, Flag, Summary, Throughput, TokenKind, refuse_unmeasured, summarize};
