//! What a replica gives at an operating point: seconds and joules per output token, under the calibration's own laws or
//! under laws drawn from their uncertainty.

use super::site::{Shape, Slo};
use crate::analysis::calibrate::{Calibration, Law, Load, Phase, Quantity, Term};
use crate::analysis::rng::Rng;

/// Concurrencies that are tried at most.
const MOST_CONCURRENCY: u32 = 16_384;

/// The laws that forecasts rest on, and how they are put together.
#[derive(Clone, Copy, Debug)]
pub(super) enum Service<'a> {
    /// Time per output token of a request among so many.
    Serving(&'a Law),
    /// Decode steps with prompts between them.
    Composed { decode: &'a Law, prefill: &'a Law, chunk: f64, energy: Option<[&'a Law; 2]> },
    /// A replica that is never short of requests; nothing is known of the single request.
    Saturated(&'a Law),
}

/// How far each law was drawn from its best fit: coefficients in place of the law's own, and a factor for what the law
/// does not explain.
#[derive(Clone, Debug)]
pub(super) struct DrawnLaw {
    values: Vec<f64>,
    factor: f64,
}

/// One draw of all laws, in the order of [`Service::laws`].
pub(super) type DrawnLaws = Vec<DrawnLaw>;

/// Requests in a replica at once, and what it makes of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct OperatingPoint {
    /// None of a saturated law.
    pub(super) concurrency: Option<f64>,
    /// The slowest shape's.
    pub(super) tpot_s: Option<f64>,
    /// The longest prompt's, alone.
    pub(super) ttft_s: Option<f64>,
    /// What keeps it from more: `slo`, `kv`, `domain`, `throughput` or `saturated`.
    pub(super) limit: &'static str,
}

impl<'a> Service<'a> {
    /// The most that the calibration knows: composed, else serving, else saturated.
    pub(super) fn of(calibration: &'a Calibration) -> Option<Self> {
        let time = |phase| calibration.law(phase, Quantity::Time);
        let energy = |phase| calibration.law(phase, Quantity::Energy);
        if let (Some(decode), Some(prefill)) = (time(Phase::Decode), time(Phase::Prefill)) {
            let chunk = f64::from(*calibration.subject.chunk_tokens.value()?);
            let energy = energy(Phase::Decode).zip(energy(Phase::Prefill)).map(<[&Law; 2]>::from);
            return Some(Service::Composed { decode, prefill, chunk, energy });
        }
        let serving = time(Phase::Serving).map(Service::Serving);
        serving.or_else(|| time(Phase::Saturated).map(Service::Saturated))
    }

    /// All laws, in the order of their draws.
    pub(super) fn laws(&self) -> Vec<&'a Law> {
        match *self {
            Service::Serving(law) | Service::Saturated(law) => vec![law],
            Service::Composed { decode, prefill, energy, .. } => {
                [decode, prefill].into_iter().chain(energy.into_iter().flatten()).collect()
            }
        }
    }

    pub(super) fn has_energy(&self) -> bool {
        matches!(self, Service::Composed { energy: Some(_), .. })
    }

    /// The laws as they are.
    pub(super) fn best(&self) -> DrawnLaws {
        self.laws().into_iter().map(|law| DrawnLaw { values: law.values(), factor: 1.0 }).collect()
    }

    /// Coefficients with the jackknife's covariance, and a leave-one-out error for what no law explains. `wider` is 2
    /// outside the domain.
    pub(super) fn draw(&self, rng: &mut Rng, wider: f64) -> DrawnLaws {
        self.laws().into_iter().map(|law| draw_law(law, rng, wider)).collect()
    }

    /// What the laws are asked at a shape, in the order of the draws, energy left out.
    fn loads(&self, concurrency: f64, shape: &Shape) -> Vec<Load> {
        let (isl, osl) = (f64::from(shape.isl), f64::from(shape.osl));
        match *self {
            Service::Serving(_) => vec![Load::Serving { concurrency, isl, osl }],
            Service::Saturated(_) => vec![Load::Saturated { isl, osl }],
            Service::Composed { chunk, .. } => vec![
                Load::Decode { batch: concurrency, kv_tokens: concurrency * (isl + osl / 2.0) },
                Load::Prefill { batch: 1.0, isl, chunk },
            ],
        }
    }

    /// How far the time laws are asked beyond what they learnt from; at most 1 inside.
    pub(super) fn reach(&self, concurrency: f64, mix: &[Shape]) -> f64 {
        let of = |load: Load| {
            let law = self.laws().into_iter().find(|law| law.phase == load.phase());
            law.map_or(0.0, |law| law.reach(&load))
        };
        mix.iter().flat_map(|shape| self.loads(concurrency, shape)).map(of).fold(0.0, f64::max)
    }

    /// Seconds per output token of one request of this shape; of a saturated replica, of all together.
    pub(super) fn seconds(&self, laws: &DrawnLaws, concurrency: f64, shape: &Shape) -> f64 {
        let loads = self.loads(concurrency, shape);
        let at = |index: usize| at(self.laws()[index], &laws[index], &loads[index]);
        match self {
            Service::Serving(_) | Service::Saturated(_) => at(0),
            Service::Composed { .. } => at(0) + concurrency * at(1) / f64::from(shape.osl),
        }
    }

    /// Joules of the boards per output token, where the energy was measured.
    fn joules(&self, laws: &DrawnLaws, concurrency: f64, shape: &Shape) -> Option<f64> {
        let Service::Composed { energy: Some(energy), .. } = self else { return None };
        let loads = self.loads(concurrency, shape);
        let step = at(energy[0], &laws[2], &loads[0]);
        let prompt = at(energy[1], &laws[3], &loads[1]);
        Some(step / concurrency + prompt / f64::from(shape.osl))
    }

    /// Seconds of the replica per output token over a mix of requests.
    pub(super) fn replica_seconds(&self, laws: &DrawnLaws, concurrency: f64, mix: &[Shape]) -> f64 {
        let together = match self {
            Service::Saturated(_) => 1.0,
            _ => concurrency,
        };
        mean_per_token(mix, |shape| self.seconds(laws, concurrency, shape) / together)
    }

    /// Joules of the replica's boards per output token over a mix.
    pub(super) fn replica_joules(&self, laws: &DrawnLaws, concurrency: f64, mix: &[Shape]) -> Option<f64> {
        self.has_energy()
            .then(|| mean_per_token(mix, |shape| self.joules(laws, concurrency, shape).unwrap_or(0.0)))
    }

    /// The concurrency of the most tokens per second within the promise, the memory and `most_reach` times the domain.
    pub(super) fn operating_point(
        &self,
        mix: &[Shape],
        slo: Option<Slo>,
        kv_tokens: Option<f64>,
        most_reach: f64,
    ) -> Option<OperatingPoint> {
        let laws = self.best();
        if let Service::Saturated(_) = self {
            return Some(OperatingPoint {
                concurrency: None,
                tpot_s: None,
                ttft_s: None,
                limit: "saturated",
            });
        }
        let most_tpot_s = slo.and_then(|slo| slo.tpot_ms).map_or(f64::INFINITY, |ms| ms / 1e3);
        let held = mix.iter().map(|shape| shape.share * f64::from(shape.isl + shape.osl)).sum::<f64>();
        let slowest = |concurrency: f64| {
            mix.iter().map(|shape| self.seconds(&laws, concurrency, shape)).fold(0.0, f64::max)
        };
        let mut best: Option<(f64, f64)> = None;
        let mut limit = "throughput";
        for concurrency in (1..=MOST_CONCURRENCY).map(f64::from) {
            let axis = self.concurrency_reach(concurrency);
            if axis > most_reach {
                limit = "domain";
                break;
            }
            if kv_tokens.is_some_and(|tokens| concurrency * held > tokens) {
                limit = "kv";
                break;
            }
            if slowest(concurrency) > most_tpot_s {
                limit = "slo";
                break;
            }
            let seconds = self.replica_seconds(&laws, concurrency, mix);
            if best.is_none_or(|(_, least)| seconds < least) {
                best = Some((concurrency, seconds));
            }
        }
        let (concurrency, _) = best?;
        Some(OperatingPoint {
            concurrency: Some(concurrency),
            tpot_s: Some(slowest(concurrency)),
            ttft_s: self.ttft(&laws, mix),
            limit,
        })
    }

    /// Reach along the axis of concurrency alone, upwards.
    fn concurrency_reach(&self, concurrency: f64) -> f64 {
        let largest = |law: &Law, name: &str| law.domain.get(name).map_or(f64::INFINITY, |range| range.max);
        match self {
            Service::Serving(law) => concurrency / largest(law, "concurrency"),
            Service::Composed { decode, .. } => concurrency / largest(decode, "batch"),
            Service::Saturated(_) => 0.0,
        }
    }

    /// The longest prompt alone.
    fn ttft(&self, laws: &DrawnLaws, mix: &[Shape]) -> Option<f64> {
        let Service::Composed { prefill, chunk, .. } = *self else { return None };
        let longest = mix.iter().map(|shape| f64::from(shape.isl)).fold(0.0, f64::max);
        Some(at(prefill, &laws[1], &Load::Prefill { batch: 1.0, isl: longest, chunk }))
    }
}

fn at(law: &Law, drawn: &DrawnLaw, load: &Load) -> f64 {
    law.with_coefficients(load, &drawn.values) * drawn.factor
}

/// A quantity per output token, over all requests of a mix: shapes count by their share of the output tokens.
fn mean_per_token(mix: &[Shape], quantity: impl Fn(&Shape) -> f64) -> f64 {
    let tokens: f64 = mix.iter().map(|shape| shape.share * f64::from(shape.osl)).sum();
    mix.iter().map(|shape| shape.share * f64::from(shape.osl) * quantity(shape)).sum::<f64>() / tokens
}

fn draw_law(law: &Law, rng: &mut Rng, wider: f64) -> DrawnLaw {
    let count = law.without_one.len() as f64;
    let terms = law.coefficients.len();
    let mean = |term: usize| law.without_one.iter().map(|values| values[term]).sum::<f64>() / count;
    let means: Vec<f64> = (0..terms).map(mean).collect();
    let scale = ((count - 1.0) / count).sqrt() * wider;
    let mut values = law.values();
    for without in &law.without_one {
        let normal = rng.normal();
        for term in 0..terms {
            values[term] += scale * normal * (without[term] - means[term]);
        }
    }
    values.iter_mut().for_each(|value| *value = value.max(0.0));
    // A law that cannot be without this coefficient stays within a twentieth of it.
    if let Some(needed) = law.phase.needed()
        && let Some(index) = law.coefficients.iter().position(|coefficient| coefficient.term == needed)
    {
        values[index] = values[index].max(law.coefficient(needed) / 20.0);
    }
    let error = wider * law.errors_without_one[rng.index(law.errors_without_one.len())];
    DrawnLaw { values, factor: 1.0 / (1.0 + error).max(0.05) }
}

/// Terms of a law with its coefficients, as a formula with numbers.
pub(super) fn formula(law: &Law, load: &Load) -> String {
    let knot = law.knot.unwrap_or(0.0);
    let terms: Vec<String> = law
        .coefficients
        .iter()
        .filter(|coefficient| coefficient.value > 0.0)
        .map(|coefficient| match coefficient.term {
            Term::Constant => format!("{:.4e}", coefficient.value),
            term => format!("{:.4e} · {}", coefficient.value, trimmed(term.value(load, knot))),
        })
        .collect();
    format!("{} = {:.5e}", terms.join(" + "), law.at(load))
}

fn trimmed(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.4}") }
}
