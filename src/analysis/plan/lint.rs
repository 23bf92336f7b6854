//! Units and physics of a site file: what its own figures contradict, and what announcements say that cannot be.

use super::site::{CapacityKind, Claim, Site, Unit};
use crate::analysis::devices::{DeviceSheet, device_sheet};

/// Facility watts per GPU above which the figures probably belong to different things.
const MANY_W: f64 = 4000.0;
/// A board's limit is a share of what it needs at least around it.
const LEAST_OVER_TDP: f64 = 1.05;
/// Less than any currency's electricity costs, except by the kWh.
const LEAST_PER_MWH: f64 = 1.0;
/// Sane PUE.
const PUE: [f64; 2] = [1.02, 2.0];

/// Something found in a site.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    pub level: Level,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Worth a look.
    Note,
    /// Somebody announced what cannot be; the site's own figures are not those.
    RefutedClaim,
    /// The site's own figures cannot be.
    Error,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Note => "note",
            Level::RefutedClaim => "refuted claim",
            Level::Error => "error",
        }
    }
}

/// GPUs in one unit of a count.
pub(super) fn gpus_per_unit(sheet: &DeviceSheet, unit: Unit) -> Option<f64> {
    match unit {
        Unit::Die => Some(1.0 / f64::from(sheet.dies_per_gpu)),
        Unit::Gpu => Some(1.0),
        Unit::Superchip => Some(f64::from(sheet.gpus_per_superchip)),
        Unit::Rack => sheet.gpus_per_rack.map(f64::from),
    }
}

/// All that the rules find, in the order of the file.
pub fn lint(site: &Site) -> Vec<Finding> {
    let mut findings = Vec::new();
    let pue = site.power.pue.value;
    if !(PUE[0]..=PUE[1]).contains(&pue) {
        findings.push(error(format!("power.pue is {pue}, expected {} to {}", PUE[0], PUE[1])));
    }
    let facility_mw = site.power.contract_mw.value
        * match site.power.capacity_kind {
            CapacityKind::Facility => 1.0,
            CapacityKind::It => pue,
        };
    if let (Some(count), Some(sheet)) = (&site.fleet.count, device_sheet(&site.fleet.device)) {
        let gpus = gpus_per_unit(sheet, site.fleet.unit).map(|per_unit| per_unit * count.value);
        match gpus {
            None => findings.push(error(format!(
                "fleet.unit is rack, and the size of a {} rack is unknown",
                site.fleet.device
            ))),
            Some(gpus) => {
                findings.extend(fleet(&site.fleet.device, sheet, gpus, facility_mw, Level::Error, "the site"))
            }
        }
        for other in &count.others {
            if let Some(per_unit) = gpus_per_unit(sheet, site.fleet.unit) {
                let what =
                    format!("{} {:?}s ({})", other.value, site.fleet.unit, other.source).to_lowercase();
                let gpus = per_unit * other.value;
                findings.extend(fleet(
                    &site.fleet.device,
                    sheet,
                    gpus,
                    facility_mw,
                    Level::RefutedClaim,
                    &what,
                ));
            }
        }
    }
    let price = site.money.electricity_per_mwh.value;
    if (0.0..LEAST_PER_MWH).contains(&price) && price > 0.0 {
        findings.push(error(format!(
            "money.electricity_per_mwh is {price} {} per MWh, expected {LEAST_PER_MWH} or more: a price per kWh was probably meant",
            site.money.currency
        )));
    }
    if let Some(steps) = out_of_order(site) {
        findings.push(error(format!("power.ramp goes back in time at {steps}")));
    }
    findings.extend(site.claims.iter().filter_map(claim));
    findings
}

fn error(text: String) -> Finding {
    Finding { level: Level::Error, text }
}

fn out_of_order(site: &Site) -> Option<&str> {
    site.power.ramp.windows(2).find(|pair| pair[1].date < pair[0].date).map(|pair| pair[1].date.as_str())
}

/// Watts per GPU, and whole racks.
fn fleet(
    device: &str,
    sheet: &DeviceSheet,
    gpus: f64,
    facility_mw: f64,
    level: Level,
    what: &str,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let watts = facility_mw * 1e6 / gpus;
    let figures = format!("{what}: {facility_mw} MW over {gpus:.0} {device} GPUs are {watts:.0} W for each");
    match sheet.tdp_w {
        Some(tdp_w) if watts < tdp_w => findings.push(Finding {
            level,
            text: format!("{figures}, below the {tdp_w:.0} W of the board alone: impossible"),
        }),
        Some(tdp_w) if watts < LEAST_OVER_TDP * tdp_w => findings.push(Finding {
            level,
            text: format!("{figures}, with less than 5 % above the {tdp_w:.0} W of the board for all else: impossible"),
        }),
        _ if watts > MANY_W => findings.push(Finding {
            level: Level::Note,
            text: format!("{figures}, above {MANY_W:.0} W: the power is not for these alone, or the count is of something else"),
        }),
        _ => {}
    }
    if let Some(per_rack) = sheet.gpus_per_rack.map(f64::from).filter(|per_rack| gpus % per_rack != 0.0) {
        findings.push(Finding {
            level: Level::Note,
            text: format!(
                "{what}: {gpus:.0} GPUs are {:.1} racks of {per_rack:.0}, no whole number",
                gpus / per_rack
            ),
        });
    }
    findings
}

fn claim(claim: &Claim) -> Option<Finding> {
    match claim {
        Claim::Fleet { text, source, device, count, unit, power_mw } => {
            let sheet = device_sheet(device)?;
            let gpus = count * gpus_per_unit(sheet, *unit)?;
            let what = format!("\"{text}\" ({source})");
            fleet(device, sheet, gpus, *power_mw, Level::RefutedClaim, &what)
                .into_iter()
                .find(|finding| finding.level == Level::RefutedClaim)
        }
        Claim::Fabric { text, source, device, value, unit } => {
            fabric(text, source, device_sheet(device)?, *value, unit)
        }
        Claim::Capex { text, source, millions, currency, scope, power_mw } => {
            let per_mw = millions / power_mw;
            let (low, high) = match scope.as_str() {
                "shell" => (1.0, 8.0),
                "shell_and_mep" => (6.0, 18.0),
                "full" => (25.0, 110.0),
                other => {
                    return Some(error(format!(
                        "\"{text}\": scope is '{other}', expected shell, shell_and_mep or full"
                    )));
                }
            };
            let is_within = (low..=high).contains(&per_mw);
            (!is_within).then(|| Finding {
                level: Level::Note,
                text: format!(
                    "\"{text}\" ({source}): {per_mw:.1} million {currency} per MW, outside the {low:.0} to {high:.0} of the \
                     scope {scope}: the money is for more, for less, or for another phase"
                ),
            })
        }
    }
}

/// A fabric's bandwidth against the rack's, in both units.
fn fabric(text: &str, source: &str, sheet: &DeviceSheet, value: f64, unit: &str) -> Option<Finding> {
    let rack_bytes_per_s = sheet.nvlink_bytes_per_s? * f64::from(sheet.gpus_per_rack?);
    let bits_per_unit = match unit {
        "TB/s" => 8e12,
        "Tbit/s" => 1e12,
        other => return Some(error(format!("\"{text}\": unit is '{other}', expected TB/s or Tbit/s"))),
    };
    let ratio = value * bits_per_unit / (rack_bytes_per_s * 8.0);
    if (0.9..=1.1).contains(&ratio) {
        return None;
    }
    let (tb, tbit) = (rack_bytes_per_s / 1e12, rack_bytes_per_s * 8.0 / 1e12);
    let meant = if (0.9..=1.1).contains(&(ratio * 8.0)) {
        ": bytes were meant, not bits"
    } else if (0.9..=1.1).contains(&(ratio / 8.0)) {
        ": bits were meant, not bytes"
    } else {
        ""
    };
    Some(Finding {
        level: Level::RefutedClaim,
        text: format!(
            "\"{text}\" ({source}): a rack's fabric carries {tb:.1} TB/s, which are {tbit:.0} Tbit/s, not {value} {unit}{meant}"
        ),
    })
}
