//! A cost model: what a device costs by the hour and what its energy costs, as it was given for a run. The same structure
//! is read from a TOML file and inlined in the record. Amounts are decimal text, never binary floating point. What follows
//! from it is computed in [`crate::analysis`].

use std::collections::BTreeMap;

use rust_decimal::Decimal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Maybe;

/// Name and version of the file format.
pub const COST_SCHEMA: &str = "cost/1";

/// Active codes of ISO 4217 (funds and metals left out).
const CURRENCIES: &str = "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD \
    CAD CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD \
    HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL \
    MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD \
    RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD \
    UYU UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG";

/// Largest amount of money that is taken for one.
const MOST: i64 = 1_000_000_000;

/// A decimal number of at least 0, written as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Amount(Decimal);

impl Amount {
    pub fn value(self) -> Decimal {
        self.0
    }
}

impl TryFrom<String> for Amount {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let refuse =
            |reason: &str| format!("amount '{text}' {reason}, expected a decimal number such as \"2.50\"");
        let value: Decimal = text.parse().map_err(|_| refuse("is no decimal number"))?;
        if value < Decimal::ZERO || value > Decimal::from(MOST) {
            return Err(refuse("is not between 0 and 10^9"));
        }
        Ok(Amount(value))
    }
}

impl From<Amount> for String {
    fn from(amount: Amount) -> String {
        amount.0.to_string()
    }
}

/// A code of ISO 4217.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Currency(String);

impl std::fmt::Display for Currency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Currency {
    type Error = String;

    fn try_from(code: String) -> Result<Self, String> {
        match CURRENCIES.split_whitespace().any(|known| known == code) {
            true => Ok(Currency(code)),
            false => {
                Err(format!("'{code}' is no currency code, expected one of ISO 4217 such as USD or EUR"))
            }
        }
    }
}

impl From<Currency> for String {
    fn from(currency: Currency) -> String {
        currency.0
    }
}

/// What a device costs, and where that is from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CostModel {
    /// `cost/1`
    pub schema: String,
    pub name: String,
    pub currency: Currency,
    /// Date of the prices.
    pub as_of: Maybe<String>,
    /// `command_line`, `invoice`, or an address.
    pub source: String,
    /// Made up to show the form: check your own contract.
    #[serde(default)]
    pub is_example: bool,
    /// SHA-256 of the file it was read from.
    #[serde(default = "no_file")]
    pub sha256: Maybe<String>,
    pub mode: CostMode,
    /// What energy costs beside it; needed unless the mode includes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<EnergyPrice>,
    #[serde(default, rename = "use")]
    pub usage: Usage,
    /// Currency → what one unit of [`CostModel::currency`] is in it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fx: BTreeMap<Currency, ExchangeRate>,
    /// The conversion that the amounts have been through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converted: Option<Converted>,
}

fn no_file() -> Maybe<String> {
    Maybe::missing("not_a_file")
}

/// Who owns the device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum CostMode {
    Rental {
        /// One device for one hour.
        price_per_gpu_hour: Amount,
        /// Energy is in the price.
        energy_included: bool,
        /// `on-demand`, `1y`, `3y`, …
        #[serde(default, skip_serializing_if = "Option::is_none")]
        commitment: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        region: Option<String>,
    },
    Owned {
        capex_per_server: Amount,
        gpus_per_server: u32,
        /// Network and storage, as a share of the servers' price.
        network_storage_share: Amount,
        lifetime_years: u32,
        /// What is left at the end, as a share of the servers' price.
        residual_fraction: Amount,
        /// Per year; 0 writes off in equal parts.
        discount_rate: Amount,
        /// Share of the servers' price per year.
        maintenance_rate_per_year: Amount,
        opex_per_server_hour: Amount,
        colo_per_kw_month: Amount,
        provisioned_kw_per_server: Amount,
    },
}

/// What energy costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EnergyPrice {
    pub price_per_kwh: Amount,
    /// Energy of the site over energy of its machines, at least 1.
    pub pue: Amount,
    /// The machine around each device: processors, memory, fans, network.
    pub node_overhead_w_per_gpu: Amount,
    /// `assumed` or `measured`
    pub node_power_source: String,
}

/// How the paid hours are used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Share of the paid hours in which tokens are made at the measured rate, above 0 and at most 1.
    pub utilization: Amount,
}

impl Default for Usage {
    fn default() -> Self {
        Usage { utilization: Amount(Decimal::ONE) }
    }
}

/// A dated exchange rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExchangeRate {
    pub rate: Amount,
    pub as_of: String,
}

/// Where converted amounts come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Converted {
    pub from: Currency,
    pub rate: Amount,
    pub as_of: String,
}

impl CostModel {
    /// A rental price from the command line, such as `2.50 USD`, energy included.
    ///
    /// # Errors
    /// When the text is not a positive amount and a currency.
    pub fn from_price(text: &str) -> Result<Self, String> {
        let refuse = |reason: &str| {
            format!("price '{text}' {reason}, expected an amount and a currency such as \"2.50 USD\"")
        };
        let mut words = text.split_whitespace();
        let (Some(amount), Some(currency), None) = (words.next(), words.next(), words.next()) else {
            return Err(refuse("has not two words"));
        };
        let price_per_gpu_hour =
            Amount::try_from(amount.to_owned()).map_err(|_| refuse("has no decimal amount"))?;
        if price_per_gpu_hour.0.is_zero() {
            return Err(refuse("is zero"));
        }
        let currency = Currency::try_from(currency.to_owned())
            .map_err(|_| refuse("has no currency code of ISO 4217"))?;
        Ok(CostModel {
            schema: COST_SCHEMA.to_owned(),
            name: "price per device and hour".to_owned(),
            currency,
            as_of: Maybe::missing("not_given"),
            source: "command_line".to_owned(),
            is_example: false,
            sha256: no_file(),
            mode: CostMode::Rental {
                price_per_gpu_hour,
                energy_included: true,
                commitment: None,
                region: None,
            },
            energy: None,
            usage: Usage::default(),
            fx: BTreeMap::new(),
            converted: None,
        })
    }

    /// # Errors
    /// Names the field that makes no sense.
    pub fn check(&self) -> Result<(), String> {
        let between = |name: &str, amount: Amount, low: i64, high: i64| {
            let fits = (Decimal::from(low)..=Decimal::from(high)).contains(&amount.0);
            fits.then_some(()).ok_or_else(|| format!("{name} is {}, expected {low} to {high}", amount.0))
        };
        if self.schema != COST_SCHEMA {
            return Err(format!("schema is '{}', expected '{COST_SCHEMA}'", self.schema));
        }
        between("use.utilization", self.usage.utilization, 0, 1)?;
        if self.usage.utilization.0.is_zero() {
            return Err("use.utilization is 0, expected more: nothing is made".to_owned());
        }
        if let Some(energy) = &self.energy {
            between("energy.pue", energy.pue, 1, 5)?;
            between("energy.price_per_kwh", energy.price_per_kwh, 0, 100_000)?;
            if !["assumed", "measured"].contains(&energy.node_power_source.as_str()) {
                let found = &energy.node_power_source;
                return Err(format!("energy.node_power_source is '{found}', expected assumed or measured"));
            }
        }
        match &self.mode {
            CostMode::Rental { energy_included, .. } => {
                if !energy_included && self.energy.is_none() {
                    return Err("[energy] is missing, and mode.energy_included is false".to_owned());
                }
            }
            CostMode::Owned {
                gpus_per_server,
                lifetime_years,
                residual_fraction,
                discount_rate,
                network_storage_share,
                maintenance_rate_per_year,
                ..
            } => {
                if self.energy.is_none() {
                    return Err(
                        "[energy] is missing, expected what the energy of an owned device costs".to_owned()
                    );
                }
                for (name, count) in
                    [("gpus_per_server", gpus_per_server), ("lifetime_years", lifetime_years)]
                {
                    if !(1..=1000).contains(count) {
                        return Err(format!("mode.{name} is {count}, expected 1 to 1000"));
                    }
                }
                between("mode.residual_fraction", *residual_fraction, 0, 1)?;
                between("mode.discount_rate", *discount_rate, 0, 1)?;
                between("mode.network_storage_share", *network_storage_share, 0, 10)?;
                between("mode.maintenance_rate_per_year", *maintenance_rate_per_year, 0, 1)?;
            }
        }
        match self.fx.iter().find(|(_, rate)| rate.rate.0.is_zero()) {
            Some((currency, _)) => Err(format!("fx.{currency}.rate is 0, expected more")),
            None => Ok(()),
        }
    }

    /// The same in another currency, by the model's own dated rate.
    ///
    /// # Errors
    /// When there is no rate for it: none is ever assumed.
    pub fn in_currency(&self, code: &str) -> Result<Self, String> {
        let currency = Currency::try_from(code.to_owned())?;
        if currency == self.currency {
            return Ok(self.clone());
        }
        let ExchangeRate { rate, as_of } = self
            .fx
            .get(&currency)
            .ok_or_else(|| {
                format!("[fx] has no rate from {} to {currency}, and none is assumed", self.currency)
            })?
            .clone();
        let mut model = self.clone();
        let convert = |amount: &mut Amount| {
            amount
                .0
                .checked_mul(rate.0)
                .map(|value| amount.0 = value)
                .ok_or("an amount becomes too large".to_owned())
        };
        match &mut model.mode {
            CostMode::Rental { price_per_gpu_hour, .. } => convert(price_per_gpu_hour)?,
            CostMode::Owned { capex_per_server, opex_per_server_hour, colo_per_kw_month, .. } => {
                convert(capex_per_server)?;
                convert(opex_per_server_hour)?;
                convert(colo_per_kw_month)?;
            }
        }
        if let Some(energy) = &mut model.energy {
            convert(&mut energy.price_per_kwh)?;
        }
        model.converted = Some(Converted { from: self.currency.clone(), rate, as_of });
        model.currency = currency;
        model.fx.clear();
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_on_the_command_line_is_a_rental_with_its_energy() {
        let model = CostModel::from_price("2.50 USD").unwrap();
        model.check().unwrap();
        assert_eq!(model.currency.to_string(), "USD");
        let CostMode::Rental { price_per_gpu_hour, energy_included, .. } = model.mode else { panic!() };
        assert_eq!((String::from(price_per_gpu_hour).as_str(), energy_included), ("2.50", true));
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
            "2 XYZ",
            "2 US Dollars",
        ] {
            let error = CostModel::from_price(bad).expect_err(bad);
            assert!(error.contains("expected an amount"), "{error}");
        }
    }

    #[test]
    fn a_conversion_takes_the_models_own_rate_or_none() {
        let mut model = CostModel::from_price("2.00 USD").unwrap();
        assert!(model.in_currency("EUR").unwrap_err().contains("none is assumed"));
        assert!(model.in_currency("EURO").unwrap_err().contains("no currency code"));
        let rate = ExchangeRate { rate: Amount(Decimal::new(92, 2)), as_of: "2026-11-20".to_owned() };
        model.fx.insert(Currency("EUR".to_owned()), rate);
        let converted = model.in_currency("EUR").unwrap();
        let CostMode::Rental { price_per_gpu_hour, .. } = converted.mode else { panic!() };
        assert_eq!(price_per_gpu_hour.0, Decimal::new(184, 2));
        assert_eq!(converted.converted.unwrap().from.to_string(), "USD");
        assert_eq!(model.in_currency("USD").unwrap(), model);
    }
}
