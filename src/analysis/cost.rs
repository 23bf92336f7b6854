//! Money: decimal amounts with a currency, and tokens per unit of it. The price never enters a measurement; it is
//! applied afterwards, to all cells alike.

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive as _;

use crate::record::CostModel;

/// A price text that was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("price '{text}' {reason}, expected an amount and a currency such as \"2.50 USD\"")]
pub struct PriceError {
    text: String,
    reason: &'static str,
}

/// Parses `2.50 USD`: what one device costs for one hour.
///
/// # Errors
/// When the amount is no positive decimal number or the currency is not three capital letters (ISO 4217).
pub fn parse_price(text: &str, source: &str) -> Result<CostModel, PriceError> {
    let refuse = |reason| PriceError { text: text.to_owned(), reason };
    let mut words = text.split_whitespace();
    let (Some(amount), Some(currency), None) = (words.next(), words.next(), words.next()) else {
        return Err(refuse("has not two words"));
    };
    let price: Decimal = amount.parse().map_err(|_| refuse("has no decimal amount"))?;
    if price <= Decimal::ZERO || price > Decimal::from(1_000_000) {
        return Err(refuse("is not between 0 and 1000000"));
    }
    if currency.len() != 3 || !currency.bytes().all(|letter| letter.is_ascii_uppercase()) {
        return Err(refuse("has no currency code"));
    }
    Ok(CostModel {
        price_per_device_hour: price.to_string(),
        currency: currency.to_owned(),
        source: source.to_owned(),
    })
}

/// Tokens for one unit of money at `tokens_per_s` on `devices` devices: `3600 · rate / (devices · price)`.
///
/// # Errors
/// When the stored price is no positive number.
pub fn tokens_per_money(model: &CostModel, tokens_per_s: f64, devices: usize) -> Result<f64, String> {
    let price = model
        .price_per_device_hour
        .parse::<Decimal>()
        .ok()
        .filter(|price| *price > Decimal::ZERO)
        .and_then(|price| price.to_f64())
        .ok_or_else(|| format!("price_per_device_hour is '{}'", model.price_per_device_hour))?;
    Ok(3600.0 * tokens_per_s / (price * devices.max(1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_gives_the_published_tokens_per_dollar() {
        // 9,010 tok/s at 1.30 USD/h is 24.95 M tokens per dollar.
        let model = parse_price("1.30 USD", "command_line").unwrap();
        let tokens = tokens_per_money(&model, 9010.0, 1).unwrap();
        assert!((tokens / 24.95e6 - 1.0).abs() < 1e-3, "{tokens}");
        assert!((tokens_per_money(&model, 9010.0, 2).unwrap() * 2.0 - tokens).abs() < 1.0);
    }

    #[test]
    fn prices_that_mean_nothing_are_refused() {
        for bad in [
            "",
            "2.50",
            "USD",
            "NaN USD",
            "inf USD",
            "-1 USD",
            "0 USD",
            "1e400 USD",
            "2.5 usd",
            "2 US Dollars",
        ] {
            let error = parse_price(bad, "command_line").expect_err(bad).to_string();
            assert!(error.contains("expected an amount"), "{error}");
        }
    }
}
