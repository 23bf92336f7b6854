//! The prices that several verbs take on the command line.

use std::path::PathBuf;

use super::{bad_file, usage};
use crate::analysis::read_cost_file;
use crate::record::CostModel;

#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct PriceArgs {
    /// Price of one device for one hour, such as "2.50 USD"
    #[arg(long, value_name = "PRICE", allow_hyphen_values = true, conflicts_with = "cost")]
    price_per_gpu_hour: Option<String>,
    /// Cost model: a TOML file like those in costs/
    #[arg(long, value_name = "FILE")]
    cost: Option<PathBuf>,
    /// Convert money to this currency, by the cost model's own dated rate
    #[arg(long, value_name = "CODE", requires = "cost")]
    currency: Option<String>,
}

impl PriceArgs {
    /// # Errors
    /// When the price or the file makes no sense, or there is no rate for the currency.
    pub(super) fn settle(&self) -> anyhow::Result<Option<CostModel>> {
        let model = match (&self.price_per_gpu_hour, &self.cost) {
            (Some(price), _) => CostModel::from_price(price)
                .map_err(|error| usage(format!("--price-per-gpu-hour: {error}")))?,
            (None, Some(file)) => read_cost_file(file).map_err(bad_file)?,
            (None, None) => return Ok(None),
        };
        match &self.currency {
            Some(code) => {
                Ok(Some(model.in_currency(code).map_err(|error| usage(format!("--currency: {error}")))?))
            }
            None => Ok(Some(model)),
        }
    }
}
