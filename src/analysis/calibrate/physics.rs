//! What coefficients mean: bandwidths and arithmetic rates, beside the ceilings that the same machine measured. A rate above
//! its ceiling refutes the fit. And the roofline, as a forecast to beat.

use super::file::ReadOut;
use super::law::Law;
use super::load::{Load, Phase, Term};
use super::score::Simple;
use crate::analysis::devices::DeviceSheet;
use crate::analysis::roofline;
use crate::arch;
use crate::record::{Maybe, Record};

/// Ceilings and counts are exact to this.
const MOST_SHARE: f64 = 1.02;
/// Share of a spec sheet's bandwidth that planners count on.
const SPEC_SHEET_SHARE: f64 = 0.8;

/// Bytes, flops and ceilings of the machine and model that were measured.
#[derive(Clone, Debug)]
pub(super) struct Physics {
    config: arch::Config,
    pub(super) weights_bytes: Maybe<f64>,
    pub(super) kv_bytes_per_token: Maybe<u64>,
    bandwidth_bytes_per_s: Maybe<f64>,
    matmul_flops_per_s: Maybe<f64>,
}

impl Physics {
    pub(super) fn of(record: &Record) -> Self {
        let config = record.model.config.clone();
        let is_supported = config.check().is_ok();
        let kv_bytes_per_token = match (is_supported, roofline::kv_value_bytes(&record.engine.kv_dtype)) {
            (true, Some(value_bytes)) => Maybe::Value(arch::kv_bytes_per_token(&config, value_bytes)),
            _ => Maybe::missing("kv_dtype_unknown"),
        };
        let device = record
            .ceilings
            .value()
            .and_then(|all| all.iter().find(|ceilings| ceilings.device == record.engine.device));
        let none = || Maybe::missing("no_ceilings");
        Physics {
            weights_bytes: if is_supported {
                roofline::read_weights_bytes(record).into()
            } else {
                Maybe::missing("shapes_not_supported")
            },
            kv_bytes_per_token,
            bandwidth_bytes_per_s: device.map_or_else(none, |ceilings| ceilings.bandwidth_bytes_per_s()),
            matmul_flops_per_s: device
                .map_or_else(none, |ceilings| ceilings.matmul_of(&record.engine.compute_dtype)),
            config,
        }
    }

    /// The measured ceilings as a forecast: the longer of moving the bytes and doing the arithmetic.
    pub(super) fn measured_roofline(&self) -> Option<Simple<'_>> {
        let bandwidth = *self.bandwidth_bytes_per_s.value()?;
        let flops_per_s = *self.matmul_flops_per_s.value()?;
        self.roofline("measured_roofline", bandwidth, flops_per_s)
    }

    /// The spec sheet's, at 0.8 of its bandwidth; only where one is shipped.
    pub(super) fn spec_sheet_roofline(
        &self,
        sheet: Option<&DeviceSheet>,
        compute_dtype: &str,
    ) -> Option<Simple<'_>> {
        let sheet = sheet.filter(|_| ["bf16", "f16"].contains(&compute_dtype))?;
        let bandwidth = SPEC_SHEET_SHARE * sheet.memory_bytes_per_s?;
        self.roofline("spec_sheet_roofline", bandwidth, sheet.bf16_flops_per_s?)
    }

    fn roofline(&self, name: &'static str, bandwidth: f64, flops_per_s: f64) -> Option<Simple<'_>> {
        let weights_bytes = *self.weights_bytes.value()?;
        let kv_bytes = *self.kv_bytes_per_token.value()? as f64;
        let at = move |load: &Load| {
            let (bytes, flops) = match *load {
                Load::Decode { batch, kv_tokens } => {
                    let context = kv_tokens / batch;
                    let flops = batch * arch::decode_step_flops(&self.config, 1, context.round() as usize);
                    (weights_bytes + kv_tokens * kv_bytes, flops)
                }
                Load::Prefill { batch, isl, .. } => {
                    let flops = batch * arch::prefill_flops(&self.config, 1, isl as usize);
                    (Term::Steps.value(load, 0.0) * weights_bytes + batch * isl * kv_bytes, flops)
                }
                Load::Serving { .. } | Load::Saturated { .. } => return None,
            };
            Some((bytes / bandwidth).max(flops / flops_per_s))
        };
        Some(Simple { name, at: Box::new(at) })
    }

    /// The physical rates of a time law.
    pub(super) fn read_outs(&self, law: &Law) -> Vec<ReadOut> {
        match law.phase {
            Phase::Decode => self.decode_read_outs(law),
            Phase::Prefill => vec![self.prefill_flops(law)],
            Phase::Serving | Phase::Saturated => Vec::new(),
        }
    }

    fn decode_read_outs(&self, law: &Law) -> Vec<ReadOut> {
        let kv_bytes = self.kv_bytes_per_token.clone().map(|bytes| bytes as f64);
        let token_flops = Maybe::Value(2.0 * arch::matmul_parameters(&self.config) as f64);
        let hinge = law.coefficient(Term::BatchBeyondKnot);
        let floor = self.weights_bytes.as_ref().zip(self.bandwidth_bytes_per_s.as_ref());
        let floor =
            floor.map(|(bytes, bandwidth)| (law.coefficient(Term::Constant) - bytes / bandwidth).max(0.0));
        vec![
            rate(
                "decode_weights_bandwidth",
                &self.weights_bytes,
                law.coefficient(Term::Constant),
                &self.bandwidth_bytes_per_s,
                true,
            ),
            rate(
                "decode_kv_bandwidth",
                &kv_bytes,
                law.coefficient(Term::KvTokens),
                &self.bandwidth_bytes_per_s,
                true,
            ),
            // Below the ridge arithmetic hides behind the weights' reading, so a small coefficient refutes nothing.
            rate(
                "decode_flops",
                &token_flops,
                law.coefficient(Term::Batch) + hinge,
                &self.matmul_flops_per_s,
                law.knot.is_some(),
            ),
            ReadOut {
                name: "decode_launch_floor".to_owned(),
                unit: "s".to_owned(),
                value: floor,
                share: Maybe::missing("not_a_rate"),
                binding: false,
            },
        ]
    }

    fn prefill_flops(&self, law: &Law) -> ReadOut {
        let head = (self.config.vocab_size * self.config.hidden_size) as f64;
        let token_flops = Maybe::Value(2.0 * (arch::matmul_parameters(&self.config) as f64 - head));
        let slope = law.coefficient(Term::NewTokens) + law.coefficient(Term::NewTokensBeyondKnot);
        rate("prefill_flops", &token_flops, slope, &self.matmul_flops_per_s, true)
    }

    /// The rates that cannot be, as sentences. The interval's slower end is asked: what only noise lifts above the
    /// ceiling is no contradiction.
    pub(super) fn contradictions(&self, law: &Law) -> Vec<String> {
        let mut slowest = law.clone();
        slowest.coefficients.iter_mut().for_each(|coefficient| coefficient.value = coefficient.high);
        self.read_outs(&slowest)
            .into_iter()
            .filter(|read_out| read_out.binding)
            .filter_map(|read_out| {
                let share = read_out.share.into_value().filter(|share| *share > MOST_SHARE)?;
                Some(format!(
                    "{} is {:.0} % of the ceiling that this machine measured, expected at most 100 %",
                    read_out.name.replace('_', " "),
                    share * 100.0
                ))
            })
            .collect()
    }
}

/// Work per unit over its seconds, and its share of a ceiling.
fn rate(name: &str, work: &Maybe<f64>, seconds: f64, ceiling: &Maybe<f64>, binding: bool) -> ReadOut {
    let value = match work {
        Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
        Maybe::Value(_) if seconds <= 0.0 => Maybe::missing("coefficient_is_zero"),
        Maybe::Value(work) => Maybe::Value(work / seconds),
    };
    let share = value.as_ref().zip(ceiling.as_ref()).map(|(value, ceiling)| value / ceiling);
    let unit = if name.ends_with("flops") { "flops_per_s" } else { "bytes_per_s" };
    ReadOut { name: name.to_owned(), unit: unit.to_owned(), value, share, binding }
}
