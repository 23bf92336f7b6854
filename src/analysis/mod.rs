//! What records say, computed from them alone: rates, percentiles, shares of the device's ceilings, tokens per joule
//! and per unit of money. Pure functions of files; nothing here touches the machine.

mod anchors;
pub mod calibrate;
pub mod compare;
mod cost;
pub mod curves;
pub mod devices;
mod energy;
pub mod nnls;
pub mod plan;
pub mod predicted;
mod quantile;
mod rng;
mod roofline;
pub mod stats;
mod summary;
mod throttle;

pub use anchors::{Anchor, AnchorFile, Distance, Figure, Load, PowerScope, embedded_anchors, parse_anchors};
pub use cost::{CellCost, parse_cost, read_cost_file};
pub use energy::CellEnergy;
pub use quantile::Quantiles;
pub use roofline::{Utilization, is_impossible, utilization};
pub use summary::{CellSummary, Flag, Summary, Throughput, TokenKind, refuse_unmeasured, summarize};
