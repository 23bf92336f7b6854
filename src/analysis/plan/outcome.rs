//! What a plan says of a site: plain numbers with their units, to be printed or written.

use serde::Serialize;

use super::draws::{Interval, Intervals};
use crate::record::Maybe;

/// What a site makes, takes and costs. "Busy" is while there is work; means are over utilisation and availability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    pub gpus_supported_by_power: f64,
    /// Those that work: whole replicas, within power and count.
    pub gpus: f64,
    pub racks: Maybe<f64>,
    /// `power` or `count`: what limits the fleet.
    pub fleet_constraint: &'static str,
    /// What limits a replica: `slo`, `kv`, `domain`, `throughput` or `saturated`.
    pub replica_constraint: &'static str,
    pub concurrency: Maybe<f64>,
    pub tpot_ms: Maybe<f64>,
    pub ttft_ms: Maybe<f64>,
    /// Busy.
    pub output_tokens_per_s_per_gpu: f64,
    pub input_tokens_per_s_per_gpu: f64,
    pub total_tokens_per_s_per_gpu: f64,
    /// Means.
    pub output_tokens_per_s: f64,
    pub output_tokens_per_day: f64,
    pub input_tokens_per_day: f64,
    pub output_tokens_per_year: f64,
    /// Busy, one GPU: its board; with its share of the host; of network and switches too; without work.
    pub board_w_per_gpu: Maybe<f64>,
    pub node_w_per_gpu: Maybe<f64>,
    pub it_w_per_gpu: f64,
    pub idle_it_w_per_gpu: Maybe<f64>,
    /// Busy: output tokens per second for each megawatt of boards, nodes, all machines, site.
    pub output_tokens_per_s_per_board_mw: Maybe<f64>,
    pub output_tokens_per_s_per_node_mw: Maybe<f64>,
    pub output_tokens_per_s_per_it_mw: f64,
    pub output_tokens_per_s_per_facility_mw: f64,
    pub total_tokens_per_s_per_it_mw: f64,
    pub board_j_per_output_token: Maybe<f64>,
    pub node_j_per_output_token: Maybe<f64>,
    pub it_j_per_output_token: f64,
    pub facility_j_per_output_token: f64,
    pub it_j_per_total_token: f64,
    /// Busy.
    pub facility_mw: f64,
    pub facility_mwh_per_year: Maybe<f64>,
    /// Everything, at the site's utilisation.
    pub cost_per_mtok_output: Maybe<f64>,
    pub cost_per_mtok_total: Maybe<f64>,
    /// Without what is written off.
    pub cash_cost_per_mtok_output: Maybe<f64>,
    /// The busy energy alone, whether or not the cost's price includes it.
    pub energy_cost_per_mtok_output: Maybe<f64>,
    /// One token more while machines stand ready: the energy above idling.
    pub marginal_cost_per_mtok_output: Maybe<f64>,
    /// What the whole fleet's idle time costs by the hour.
    pub idle_tax_per_hour: Maybe<f64>,
    /// Share of the time with work at which the price covers the cost.
    pub break_even_utilization: Maybe<f64>,
}

/// Power that is there from a date on, filled with the site's device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RampPoint {
    pub date: String,
    pub mw: f64,
    pub gpus: f64,
    pub output_tokens_per_day: f64,
    pub output_tokens_per_day_interval: Interval,
}

/// The site at another utilisation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadPoint {
    pub utilization: f64,
    pub cost_per_mtok_output: Maybe<f64>,
    pub cash_cost_per_mtok_output: Maybe<f64>,
    pub marginal_cost_per_mtok_output: Maybe<f64>,
    pub idle_tax_per_hour: Maybe<f64>,
    /// Of the three costs, by name.
    pub intervals: Intervals,
}

/// A replica at another concurrency.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Curve {
    pub concurrency: f64,
    pub tpot_ms: f64,
    pub output_tokens_per_s_per_gpu: f64,
    /// Boards alone, where energy was measured.
    pub board_j_per_output_token: Maybe<f64>,
    /// Energy of the next token per second, over the last step of the curve.
    pub marginal_board_j_per_output_token: Maybe<f64>,
}

/// One input at the ends of its range.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    pub input: &'static str,
    pub low: f64,
    pub high: f64,
    pub cost_at_low: Maybe<f64>,
    pub cost_at_high: Maybe<f64>,
    pub tokens_per_day_at_low: f64,
    pub tokens_per_day_at_high: f64,
}
