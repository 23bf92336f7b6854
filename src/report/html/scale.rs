//! Axes: from values to places, with round ticks. Logarithmic where values span a decade or more.

use crate::units::format_significant;

/// Values that lie so many times apart get a logarithmic axis.
const DECADE: f64 = 10.0;
/// Ticks at most, about.
const TICKS: f64 = 6.0;

/// What an axis shows.
#[derive(Clone, Debug, Default)]
pub(super) struct Axis {
    /// With the unit: `output tokens per second`.
    pub(super) label: String,
    /// Ticks at these values and nowhere else, with their own texts.
    pub(super) ticks: Option<Vec<(f64, String)>>,
    /// Zero belongs on a linear axis.
    pub(super) from_zero: bool,
    /// Room at both ends, for points that are not to lie on the frame.
    pub(super) is_padded: bool,
    /// Never logarithmic.
    pub(super) is_linear: bool,
}

impl Axis {
    pub(super) fn new(label: impl Into<String>) -> Axis {
        Axis { label: label.into(), from_zero: true, ..Axis::default() }
    }

    /// With ticks at the given values, which are the only ones that occur.
    pub(super) fn at(self, values: impl IntoIterator<Item = f64>) -> Axis {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let ticks = values.into_iter().map(|value| (value, tick_text(value))).collect();
        Axis { ticks: Some(ticks), is_padded: true, from_zero: false, ..self }
    }
}

/// An axis with its range.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    is_log: bool,
    ticks: Vec<(f64, String)>,
}

impl Scale {
    /// A scale that holds all finite `values`.
    pub(super) fn new(axis: &Axis, values: impl IntoIterator<Item = f64>) -> Scale {
        let finite = values.into_iter().filter(|value| value.is_finite());
        let (low, high) = finite
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let is_log = !axis.is_linear && low > 0.0 && high / low >= DECADE;
        let scale = if is_log { Scale::log(low, high) } else { Scale::linear(axis, low, high) };
        scale.with_ticks(axis)
    }

    fn log(low: f64, high: f64) -> Scale {
        // Out to the next of 1, 2, 5 and their tens.
        let below =
            |value: f64| steps_of_decades(value).rfind(|step| *step <= value * 1.0001).unwrap_or(value);
        let above =
            |value: f64| steps_of_decades(value).find(|step| *step >= value * 0.9999).unwrap_or(value);
        let (low, high) = (below(low), above(high));
        let decades = (high / low).log10();
        let leads: &[f64] = if decades < 2.1 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let every = (decades / TICKS).ceil().max(1.0) as i32;
        let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let ticks = exponents
            .filter(|exponent| exponent.rem_euclid(every) == 0)
            .flat_map(|exponent| leads.iter().map(move |lead| lead * 10f64.powi(exponent)));
        let ticks = ticks
            .filter(|tick| (low * 0.999..=high * 1.001).contains(tick))
            .map(|tick| (tick, tick_text(tick)));
        Scale { low, high, is_log: true, ticks: ticks.collect() }
    }

    fn linear(axis: &Axis, low: f64, high: f64) -> Scale {
        let low = if axis.from_zero { low.min(0.0) } else { low };
        let span = if high > low { high - low } else { high.abs().max(1.0) };
        let step = round_step(span / TICKS);
        let (low, high) = match axis.ticks {
            Some(_) => (low, low + if high > low { span } else { 0.0 }),
            None => ((low / step).floor() * step, ((low + span) / step).ceil() * step),
        };
        let count = ((high - low) / step).round() as i64;
        let ticks = (0..=count.clamp(0, 50)).map(|index| low + index as f64 * step);
        // Ten digits: what adding leaves behind must not be printed.
        let ticks = ticks.map(|tick| (tick, tick_text((tick / step).round() * step)));
        Scale { low, high, is_log: false, ticks: ticks.collect() }
    }

    fn with_ticks(mut self, axis: &Axis) -> Scale {
        if let Some(ticks) = &axis.ticks {
            self.ticks.clone_from(ticks);
        }
        if axis.is_padded {
            let (low, high) = (self.warp(self.low), self.warp(self.high));
            let room = if high > low { (high - low) * 0.06 } else { 0.5 };
            let at_zero = axis.from_zero && self.low == 0.0;
            (self.low, self.high) =
                (self.unwarp(if at_zero { low } else { low - room }), self.unwarp(high + room));
        }
        let (low, high) = (self.warp(self.low), self.warp(self.high));
        let slack = (high - low) * 1e-6;
        let within = low - slack..=high + slack;
        let ticks = std::mem::take(&mut self.ticks);
        self.ticks = ticks.into_iter().filter(|(value, _)| within.contains(&self.warp(*value))).collect();
        self
    }

    fn warp(&self, value: f64) -> f64 {
        if self.is_log { value.max(f64::MIN_POSITIVE).log10() } else { value }
    }

    fn unwarp(&self, value: f64) -> f64 {
        if self.is_log { 10f64.powf(value) } else { value }
    }

    pub(super) fn low(&self) -> f64 {
        self.low
    }

    pub(super) fn high(&self) -> f64 {
        self.high
    }

    pub(super) fn is_log(&self) -> bool {
        self.is_log
    }

    /// Where a value lies between the ends, 0 to 1.
    pub(super) fn share(&self, value: f64) -> f64 {
        let (low, high) = (self.warp(self.low), self.warp(self.high));
        if high > low { (self.warp(value) - low) / (high - low) } else { 0.5 }
    }

    /// Ticks that keep `distance` (as a share of the axis) from each other.
    pub(super) fn ticks(&self, distance: f64) -> Vec<(f64, &str)> {
        let mut kept: Vec<(f64, &str)> = Vec::new();
        for (value, text) in &self.ticks {
            if kept.last().is_none_or(|(last, _)| self.share(*value) - self.share(*last) >= distance) {
                kept.push((*value, text));
            }
        }
        kept
    }
}

/// 1, 2, 5 times the powers of ten around a value.
fn steps_of_decades(value: f64) -> impl DoubleEndedIterator<Item = f64> {
    let exponent = value.log10().floor() as i32;
    (exponent - 1..=exponent + 1).flat_map(|exponent| [1.0, 2.0, 5.0].map(|lead| lead * 10f64.powi(exponent)))
}

/// The next of 1, 2, 2.5 and 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|lead| lead * power)
        .into_iter()
        .find(|round| *round >= step * 0.9999)
        .unwrap_or(step)
}

/// `0.05`, `2.5`, `4,000`, `12k`, `3M`: no digits that say nothing.
pub(super) fn tick_text(value: f64) -> String {
    let scales = [(1e12, "T"), (1e9, "G"), (1e6, "M")];
    if (1e4..1e6).contains(&value.abs()) && value % 100.0 == 0.0 {
        return format!("{}k", trimmed(value / 1e3));
    }
    if let Some((scale, prefix)) = scales.iter().find(|(scale, _)| value.abs() >= *scale) {
        return format!("{}{prefix}", trimmed(value / scale));
    }
    trimmed(value)
}

fn trimmed(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    if value.abs() >= 1000.0 && value.fract() == 0.0 && value.abs() < 1e6 {
        return if value % 10f64.powf(value.abs().log10().floor() - 2.0) == 0.0 {
            format_significant(value)
        } else {
            format!("{value:.0}")
        };
    }
    let decimals = (3 - value.abs().log10().floor() as i32).clamp(0, 9) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A factor and a prefix that make `largest` a number between 1 and 1000.
pub(super) fn prefixed(largest: f64) -> (f64, &'static str) {
    let scales = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    scales.into_iter().find(|(scale, _)| largest >= *scale).unwrap_or((1.0, ""))
}

/// A factor and a unit for times in ns.
pub(super) fn time_unit(largest_ns: f64) -> (f64, &'static str) {
    match largest_ns {
        ns if ns >= 2e9 => (1e9, "s"),
        ns if ns >= 2e6 => (1e6, "ms"),
        _ => (1e3, "µs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(scale: &Scale) -> Vec<&str> {
        scale.ticks(0.0).into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn axes_are_round_and_hold_all_values() {
        let scale = Scale::new(&Axis::new("x"), [3.0, 17.0]);
        assert_eq!((scale.low(), scale.high(), scale.is_log()), (0.0, 20.0, false));
        assert_eq!(texts(&scale), ["0", "5", "10", "15", "20"]);
        let scale = Scale::new(&Axis::new("x"), [3.0, 17_000.0]);
        assert_eq!((scale.low(), scale.high(), scale.is_log()), (2.0, 20_000.0, true));
        assert_eq!(texts(&scale), ["10", "100", "1,000", "10k"]);
        let scale = Scale::new(&Axis::new("x"), [0.03, 0.4]);
        assert_eq!(texts(&scale), ["0.02", "0.05", "0.1", "0.2", "0.5"]);
        let scale = Scale::new(&Axis::new("x").at([8.0, 1.0, 8.0]), [8.0, 1.0]);
        assert_eq!(texts(&scale), ["1", "8"]);
        assert!(scale.share(1.0) > 0.0 && scale.share(8.0) < 1.0);
    }

    #[test]
    fn strange_values_make_an_axis_all_the_same() {
        for values in [vec![], vec![f64::NAN], vec![0.0], vec![-3.0], vec![7.0, 7.0], vec![1e-300, 1e300]] {
            let scale = Scale::new(&Axis::new("x"), values.clone());
            assert!(scale.low() < scale.high() && scale.low().is_finite(), "{values:?}: {scale:?}");
            assert!(scale.ticks(0.05).len() < 25 && scale.share(7.0).is_finite(), "{values:?}");
            let padded = Scale::new(&Axis::new("x").at(values.clone()), values.clone());
            assert!(padded.share(7.0).is_finite(), "{values:?}: {padded:?}");
        }
    }

    #[test]
    fn numbers_on_axes_are_short() {
        let cases = [
            (0.0, "0"),
            (0.05, "0.05"),
            (2.5, "2.5"),
            (40.0, "40"),
            (4_000.0, "4,000"),
            (12_000.0, "12k"),
            (16_384.0, "16384"),
            (3e6, "3M"),
            (2.5e12, "2.5T"),
            (1337.0, "1337"),
        ];
        for (value, text) in cases {
            assert_eq!(tick_text(value), text);
        }
    }
}
