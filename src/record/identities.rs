//! Identities between energy, tokens and time, for those who measure and for those who check a file alike.

use super::{DeviceEnergy, Energy};

/// Power from the meter, and energy per token times the rate of tokens, may differ by this much.
pub const POWER_AGREEMENT: f64 = 0.005;
/// A device may exceed its power limit by this factor for a moment; on average over a window it does not.
pub const LIMIT_MARGIN: f64 = 1.05;

/// An energy counter and power integrated over the same time may differ by this much before the energy is in doubt.
pub const COUNTER_AGREEMENT: f64 = 0.05;
/// The doubt about energy whose counter and power differ by more.
pub const DISAGREEMENT: &str = "counter_and_power_disagree";

/// Whether a device's counter and its power readings differ by more than [`COUNTER_AGREEMENT`].
pub fn disagrees(device: &DeviceEnergy) -> bool {
    let integral_j = device.integral_j.value();
    integral_j.is_some_and(|integral_j| (device.energy_j / integral_j - 1.0).abs() > COUNTER_AGREEMENT)
}

/// Joules per output token times output tokens per second: watts, from the tokens' side. `None` without a token.
pub fn power_from_tokens(energy: &Energy, output_tokens_per_s: f64) -> Option<f64> {
    let power_w = energy.energy_j / energy.tokens_out * output_tokens_per_s;
    (energy.tokens_out > 0.0 && power_w.is_finite()).then_some(power_w)
}
