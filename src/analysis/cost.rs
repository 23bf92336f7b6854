//! Money: what a device costs by the busy hour, and what that makes of a million tokens. Exact decimal arithmetic up to the
//! last division. The prices never enter a measurement; they are applied afterwards, to all cells alike.

use std::path::Path;

use anyhow::Context as _;
use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive as _;
use serde::Serialize;

use crate::record::{Amount, CostMode, CostModel, Maybe, hex};

const HOURS_PER_YEAR: i64 = 8760;
const MONTHS_PER_YEAR: i64 = 12;
const SECONDS_PER_HOUR: i64 = 3600;
const MEGA: i64 = 1_000_000;
/// Largest cost file that is read.
const LARGEST_FILE_BYTES: u64 = 1 << 20;

/// Reads and checks a cost file.
///
/// # Errors
/// Names the file and what is wrong in it.
pub fn read_cost_file(path: &Path) -> anyhow::Result<CostModel> {
    let read = || {
        let size_bytes = std::fs::metadata(path)?.len();
        anyhow::ensure!(
            size_bytes <= LARGEST_FILE_BYTES,
            "has {size_bytes} bytes, expected a small TOML file"
        );
        let text = std::fs::read_to_string(path)?;
        let mut model = parse_cost(&text)?;
        model.sha256 = Maybe::Value(hex(&<sha2::Sha256 as sha2::Digest>::digest(&text)));
        Ok(model)
    };
    read().with_context(|| format!("{}: is no cost model", path.display()))
}

/// A cost model from TOML.
///
/// # Errors
/// Names the field.
pub fn parse_cost(text: &str) -> anyhow::Result<CostModel> {
    let model: CostModel = toml::from_str(text).map_err(|error| {
        let line = error.message().lines().next().unwrap_or("").to_owned();
        match error.span() {
            Some(span) => anyhow::anyhow!("{line} (line {})", text[..span.start].lines().count().max(1)),
            None => anyhow::anyhow!("{line}"),
        }
    })?;
    model.check().map_err(anyhow::Error::msg)?;
    Ok(model)
}

/// The model in a sentence.
pub(super) fn describe(model: &CostModel) -> String {
    let hour = match &model.mode {
        CostMode::Rental { price_per_gpu_hour, energy_included, .. } => format!(
            "{} {} per device and hour, energy {}",
            price_per_gpu_hour.value(),
            model.currency,
            if *energy_included { "included" } else { "on top" }
        ),
        CostMode::Owned { lifetime_years, .. } => format!(
            "{}, owned, written off over {lifetime_years} years, energy on top, in {}",
            model.name, model.currency
        ),
    };
    let date = model.as_of.value().map_or(String::new(), |date| format!(", as of {date}"));
    let converted = model.converted.as_ref().map_or(String::new(), |converted| {
        format!(", converted from {} at {} ({})", converted.from, converted.rate.value(), converted.as_of)
    });
    let example = if model.is_example { ", AN EXAMPLE" } else { "" };
    let percent = model.usage.utilization.value() * Decimal::from(100);
    format!("{hour}{date}{converted}{example}; {} % of the paid hours used", percent.normalize())
}

/// What a cell made and took, all devices together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Work {
    pub(super) devices: usize,
    pub(super) input_tokens_per_s: f64,
    pub(super) output_tokens_per_s: f64,
    /// Mean power of one device while it worked, W.
    pub(super) device_watts: Maybe<f64>,
    /// Mean power of one idle device with its context, W.
    pub(super) idle_watts: Maybe<f64>,
}

/// What tokens cost, in the model's currency.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellCost {
    /// One device for one hour in which it makes tokens; hours without are in it.
    pub per_busy_device_hour: Maybe<f64>,
    pub per_mtok_output: Maybe<f64>,
    pub per_mtok_input: Maybe<f64>,
    /// Over input and output tokens together.
    pub per_mtok_total: Maybe<f64>,
    /// The energy in `per_mtok_output` alone.
    pub energy_per_mtok_output: Maybe<f64>,
    /// The same as `per_mtok_output` at these shares of the paid hours.
    pub per_mtok_output_at: [(f64, Maybe<f64>); 3],
}

/// Utilisations that a reader is shown.
const UTILIZATIONS: [(i64, u32); 3] = [(10, 1), (6, 1), (3, 1)];

/// Costs of a cell under a model.
pub(super) fn cell_cost(model: &CostModel, work: &Work) -> CellCost {
    let utilization = model.usage.utilization.value();
    let per_hour = busy_device_hour(model, work, utilization);
    let output = |per_hour: &Result<Decimal, String>| {
        per_mtok(per_hour, work.devices, work.output_tokens_per_s, "no_output_tokens")
    };
    let total = work.input_tokens_per_s + work.output_tokens_per_s;
    CellCost {
        per_mtok_output: output(&per_hour),
        per_mtok_input: per_mtok(&per_hour, work.devices, work.input_tokens_per_s, "no_input_tokens"),
        per_mtok_total: per_mtok(&per_hour, work.devices, total, "no_tokens"),
        energy_per_mtok_output: output(&energy_hour(model, &work.device_watts)),
        per_mtok_output_at: UTILIZATIONS.map(|(tenths, scale)| {
            let utilization = Decimal::new(tenths, scale);
            (tenths as f64 / 10.0, output(&busy_device_hour(model, work, utilization)))
        }),
        per_busy_device_hour: per_hour.and_then(|value| value.to_f64().ok_or("too_large".to_owned())).into(),
    }
}

/// `fixed / u + energy + (1 − u) / u · idle energy`
fn busy_device_hour(model: &CostModel, work: &Work, utilization: Decimal) -> Result<Decimal, String> {
    let fixed = fixed_hour(model).ok_or("price_too_large")?;
    let busy = charged_energy(model, &work.device_watts)?;
    let idle = match utilization == Decimal::ONE {
        true => Decimal::ZERO,
        false => charged_energy(model, &work.idle_watts)?,
    };
    let sum = || {
        let waiting = (Decimal::ONE - utilization).checked_div(utilization)?.checked_mul(idle)?;
        fixed.checked_div(utilization)?.checked_add(busy)?.checked_add(waiting)
    };
    sum().ok_or_else(|| "price_too_large".to_owned())
}

/// Energy of an hour, or nothing where the price includes it.
fn charged_energy(model: &CostModel, watts: &Maybe<f64>) -> Result<Decimal, String> {
    match model.mode {
        CostMode::Rental { energy_included: true, .. } => Ok(Decimal::ZERO),
        _ => energy_hour(model, watts),
    }
}

/// `(P + P_around) / 1000 · PUE · price per kWh`
fn energy_hour(model: &CostModel, watts: &Maybe<f64>) -> Result<Decimal, String> {
    let energy = model.energy.as_ref().ok_or("no_energy_price")?;
    let watts = match watts {
        Maybe::Value(watts) => Decimal::from_f64_retain(*watts).ok_or("power_unreadable")?,
        Maybe::Missing(missing) => return Err(missing.missing.clone()),
    };
    let product = || {
        let kilowatts =
            watts.checked_add(energy.node_overhead_w_per_gpu.value())?.checked_div(Decimal::from(1000))?;
        kilowatts.checked_mul(energy.pue.value())?.checked_mul(energy.price_per_kwh.value())
    };
    product().ok_or_else(|| "price_too_large".to_owned())
}

/// The same model without what is written off: maintenance, operation and colocation stay. A rental writes nothing off.
pub(super) fn without_capital(model: &CostModel) -> CostModel {
    let mut model = model.clone();
    if let CostMode::Owned { network_storage_share, residual_fraction, .. } = &mut model.mode {
        // C (1 + s) − R is zero where R is C (1 + s).
        let whole = Decimal::ONE + network_storage_share.value();
        if let Ok(whole) = Amount::try_from(whole.to_string()) {
            *residual_fraction = whole;
        }
    }
    model
}

/// What one device costs by the paid hour, energy aside:
/// `(C (1 + s) − R) · CRF / (8760 n) + maintenance · C / (8760 n) + opex / n + colo · kW · 12 / (8760 n)`
pub(super) fn fixed_hour(model: &CostModel) -> Option<Decimal> {
    match &model.mode {
        CostMode::Rental { price_per_gpu_hour, .. } => Some(price_per_gpu_hour.value()),
        CostMode::Owned {
            capex_per_server,
            gpus_per_server,
            network_storage_share,
            lifetime_years,
            residual_fraction,
            discount_rate,
            maintenance_rate_per_year,
            opex_per_server_hour,
            colo_per_kw_month,
            provisioned_kw_per_server,
        } => {
            let capex = capex_per_server.value();
            let written_off = capex
                .checked_mul(Decimal::ONE + network_storage_share.value() - residual_fraction.value())?
                .checked_mul(recovery_factor(discount_rate.value(), *lifetime_years)?)?;
            let maintenance = capex.checked_mul(maintenance_rate_per_year.value())?;
            let colocation = colo_per_kw_month
                .value()
                .checked_mul(provisioned_kw_per_server.value())?
                .checked_mul(Decimal::from(MONTHS_PER_YEAR))?;
            let yearly = written_off.checked_add(maintenance)?.checked_add(colocation)?;
            let hourly = yearly
                .checked_div(Decimal::from(HOURS_PER_YEAR))?
                .checked_add(opex_per_server_hour.value())?;
            hourly.checked_div(Decimal::from(*gpus_per_server))
        }
    }
}

/// Share of a sum to be paid each year so that it and its interest are paid off: `r (1 + r)^L / ((1 + r)^L − 1)`.
fn recovery_factor(rate: Decimal, years: u32) -> Option<Decimal> {
    if rate.is_zero() {
        return Decimal::ONE.checked_div(Decimal::from(years));
    }
    let growth = (0..years).try_fold(Decimal::ONE, |growth, _| growth.checked_mul(Decimal::ONE + rate))?;
    rate.checked_mul(growth)?.checked_div(growth - Decimal::ONE)
}

fn per_mtok(per_hour: &Result<Decimal, String>, devices: usize, tokens_per_s: f64, none: &str) -> Maybe<f64> {
    let per_hour = match per_hour {
        Ok(per_hour) => *per_hour,
        Err(reason) => return Maybe::missing(reason.clone()),
    };
    if tokens_per_s <= 0.0 {
        return Maybe::missing(none);
    }
    let quotient = || {
        let tokens_per_hour =
            Decimal::from_f64_retain(tokens_per_s)?.checked_mul(Decimal::from(SECONDS_PER_HOUR))?;
        per_hour
            .checked_mul(Decimal::from(devices.max(1)))?
            .checked_mul(Decimal::from(MEGA))?
            .checked_div(tokens_per_hour)?
            .to_f64()
    };
    quotient().map_or(Maybe::missing("price_too_large"), Maybe::Value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(output_tokens_per_s: f64, watts: f64) -> Work {
        Work {
            devices: 1,
            input_tokens_per_s: 0.0,
            output_tokens_per_s,
            device_watts: Maybe::Value(watts),
            idle_watts: Maybe::Value(100.0),
        }
    }

    fn close(found: &Maybe<f64>, expected: f64) {
        let found = *found.value().unwrap_or_else(|| panic!("{found:?}, expected {expected}"));
        assert!((found / expected - 1.0).abs() < 5e-4, "{found}, expected {expected}");
    }

    const HEAD: &str =
        "schema = 'cost/1'\nname = 'n'\ncurrency = 'USD'\nas_of = '2026-11-22'\nsource = 'invoice'\n";

    fn rental(energy_included: bool, utilization: &str) -> CostModel {
        parse_cost(&format!(
            "{HEAD}[mode]\nkind = 'rental'\nprice_per_gpu_hour = '1.30'\nenergy_included = {energy_included}\n[energy]\n\
             price_per_kwh = '0.12'\npue = '1.3'\nnode_overhead_w_per_gpu = '0'\nnode_power_source = 'assumed'\n[use]\n\
             utilization = '{utilization}'\n"
        ))
        .unwrap()
    }

    #[test]
    fn a_rented_h100_gives_the_published_cost_of_a_million_tokens() {
        // 9,010 tok/s at 0.0766 J and 1.30 USD/h: 0.0401 USD/Mtok, of it 0.0033 USD of energy at 0.12 USD/kWh, PUE 1.3.
        let cost = cell_cost(&rental(true, "1"), &work(9010.0, 9010.0 * 0.0766));
        close(&cost.per_mtok_output, 1.30 / (9010.0 * 3600.0) * 1e6);
        assert!((cost.per_mtok_output.value().unwrap() - 0.0401).abs() < 5e-5);
        close(&cost.energy_per_mtok_output, 0.0766 * 1.3 * 0.12 / 3.6);
        assert_eq!(cost.per_mtok_input, Maybe::missing("no_input_tokens"));
        assert_eq!(cost.per_mtok_total, cost.per_mtok_output);
        // With energy on top, and at half the hours: 2.60 + 690 W and as many idle hours at 100 W.
        let cost = cell_cost(&rental(false, "0.5"), &work(9010.0, 690.166));
        close(&cost.per_busy_device_hour, 2.60 + (0.690166 + 0.100) * 1.3 * 0.12);
        close(&cost.per_mtok_output_at[0].1, (1.30 + 0.690166 * 0.156) / (9010.0 * 3600.0) * 1e6);
        assert_eq!(cost.per_mtok_output_at.clone().map(|(share, _)| share), [1.0, 0.6, 0.3]);
    }

    fn owned(discount_rate: &str) -> CostModel {
        parse_cost(&format!(
            "{HEAD}[mode]\nkind = 'owned'\ncapex_per_server = '300000'\ngpus_per_server = 8\nnetwork_storage_share = '0.15'\n\
             lifetime_years = 4\nresidual_fraction = '0.05'\ndiscount_rate = '{discount_rate}'\n\
             maintenance_rate_per_year = '0.03'\nopex_per_server_hour = '0.80'\ncolo_per_kw_month = '150'\n\
             provisioned_kw_per_server = '10.2'\n[energy]\nprice_per_kwh = '0.12'\npue = '1.25'\n\
             node_overhead_w_per_gpu = '250'\nnode_power_source = 'assumed'\n"
        ))
        .unwrap()
    }

    #[test]
    fn an_owned_server_costs_what_paper_and_pencil_say() {
        // By hand, per device and hour: capex 300000 · 1.10 / 4 = 82500 a year, maintenance 9000, colocation
        // 150 · 10.2 · 12 = 18360: 109860 / 8760 = 12.54110; with 0.80: 13.34110 / 8 = 1.667637.
        // Energy: 0.95 kW · 1.25 · 0.12 = 0.1425.
        let cost = cell_cost(&owned("0"), &work(1000.0, 700.0));
        close(&cost.per_busy_device_hour, 1.667_637 + 0.1425);
        // At 8 %: CRF = 0.08 · 1.08^4 / (1.08^4 − 1) = 0.3019208; 330000 of it are 99633.86 a year.
        let cost = cell_cost(&owned("0.08"), &work(1000.0, 700.0));
        close(&cost.per_busy_device_hour, ((99_633.86 + 9000.0 + 18_360.0) / 8760.0 + 0.80) / 8.0 + 0.1425);
        assert!(
            (recovery_factor(Decimal::new(8, 2), 4).unwrap().to_f64().unwrap() - 0.301_920_8).abs() < 1e-7
        );
    }

    #[test]
    fn every_shipped_example_is_valid_and_says_that_it_is_one() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("costs");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let models = files.iter().filter(|path| path.extension().is_some_and(|ending| ending == "toml"));
        let models: Vec<CostModel> = models.map(|path| read_cost_file(path).unwrap()).collect();
        assert_eq!(models.len(), 3);
        for model in models {
            assert!(
                model.is_example && model.as_of.value().is_some() && model.sha256.value().is_some(),
                "{model:?}"
            );
            assert!(describe(&model).contains("AN EXAMPLE; 100 % of the paid hours used"));
        }
    }

    #[test]
    fn what_was_not_measured_is_not_charged_but_missing() {
        let unknown = Work { device_watts: Maybe::missing("no_sensor"), ..work(100.0, 0.0) };
        assert!(cell_cost(&rental(true, "1"), &unknown).per_mtok_output.value().is_some());
        assert_eq!(cell_cost(&rental(false, "1"), &unknown).per_mtok_output, Maybe::missing("no_sensor"));
        let unknown = Work { idle_watts: Maybe::missing("not_measured"), ..work(100.0, 500.0) };
        assert_eq!(
            cell_cost(&rental(false, "0.9"), &unknown).per_mtok_output,
            Maybe::missing("not_measured")
        );
        assert!(cell_cost(&rental(false, "1"), &unknown).per_mtok_output.value().is_some());
    }

    #[test]
    fn a_wrong_cost_file_is_refused_with_its_field() {
        let rental = "[mode]\nkind='rental'\nprice_per_gpu_hour='1'\nenergy_included=true\n";
        for (text, reason) in [
            ("", "missing field `schema`".to_owned()),
            (&*HEAD.replace("cost/1", "cost/2"), "missing field `mode`".to_owned()),
            (&*format!("{}{rental}", HEAD.replace("cost/1", "cost/2")), "schema is 'cost/2'".to_owned()),
            (&*format!("{}{rental}", HEAD.replace("USD", "DOL")), "'DOL' is no currency code".to_owned()),
            (&*format!("{HEAD}{}", rental.replace("'1'", "'NaN'")), "'NaN' is no decimal number".to_owned()),
            (&*format!("{HEAD}{}", rental.replace("'1'", "'-2'")), "not between 0".to_owned()),
            (&*format!("{HEAD}{}", rental.replace("true", "false")), "[energy] is missing".to_owned()),
            (&*format!("{HEAD}{rental}[use]\nutilization='0'"), "use.utilization is 0".to_owned()),
            (
                &*format!("{HEAD}{rental}[use]\nutilization='1.2'"),
                "use.utilization is 1.2, expected 0 to 1".to_owned(),
            ),
            (&*format!("{HEAD}colour='red'\n{rental}"), "unknown field `colour`".to_owned()),
        ] {
            let error = format!("{:#}", parse_cost(text).expect_err(text));
            assert!(error.contains(&reason), "{text}\ngave {error}\nexpected {reason}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
