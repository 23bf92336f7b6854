//! What records say, computed from them alone: rates, percentiles, tokens per joule and per unit of money. Pure
//! functions of files; nothing here touches the machine.

mod cost;
mod energy;
mod quantile;
mod summary;

pub use cost::{PriceError, parse_price, tokens_per_money};
pub use energy::CellEnergy;
pub use quantile::Quantiles;
pub use summary::{CellSummary, Flag, Summary, Throughput, TokenKind, refuse_unmeasured, summarize};
