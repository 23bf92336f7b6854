//! What records say, computed from them alone: rates, percentiles, tokens per joule and per unit of money. Pure
//! functions of files; nothing here touches the machine.

pub mod compare;
mod cost;
mod quantile;
pub mod stats;
mod summary;

pub use cost::{PriceError, parse_price, tokens_per_money};
pub use quantile::Quantiles;
pub use summary::{CellSummary, Flag, Summary, Throughput, TokenKind, refuse_unmeasured, summarize};
