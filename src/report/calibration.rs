//! A calibration as text: laws, errors beside those of simpler forecasts, physical rates, notes.

use std::fmt::Write as _;

use super::{DASH, percent};
use crate::analysis::calibrate::{
    Calibration, ErrorStatistics, FittedLaw, GroupFit, PowerStep, Quantity, ReadOut, Term,
};
use crate::record::Maybe;
use crate::units::format_significant;

/// Everything that a user of the calibration should have seen.
pub fn calibration(calibration: &Calibration) -> String {
    let subject = &calibration.subject;
    let mut text = format!(
        "{} · {} · {} on {} × {} · {}\n",
        subject.model,
        subject.precision,
        subject.engine,
        subject.gpus_per_replica,
        subject.device,
        calibration.basis.name()
    );
    if let Some(reason) = &calibration.not_a_measurement {
        let _ = writeln!(text, "NOT A MEASUREMENT: {reason}");
    }
    for fitted in &calibration.laws {
        text.push('\n');
        text.push_str(&law(fitted));
    }
    let read_outs: Vec<String> = calibration.read_outs.iter().map(read_out).collect();
    if !read_outs.is_empty() {
        let _ = write!(text, "\nphysical rates\n{}", read_outs.concat());
    }
    if !calibration.compositions.is_empty() {
        text.push_str("\nput together (not learnt from)        measured   forecast   error\n");
        for found in &calibration.compositions {
            let (measured, forecast) =
                (found.measured_output_tokens_per_s, found.forecast_output_tokens_per_s);
            let _ = writeln!(
                text,
                "  {:<32} {:>11} {:>10} {:>+6.1} %",
                found.key,
                format_significant(measured),
                format_significant(forecast),
                (forecast / measured - 1.0) * 100.0
            );
        }
    }
    text.push_str(&power_ladder(&calibration.power_steps));
    let _ = writeln!(text, "\ngrade {}", calibration.grade);
    for note in &calibration.notes {
        let _ = writeln!(text, "· {note}");
    }
    text
}

/// Watts of one device, from idle upwards and back.
fn power_ladder(steps: &[PowerStep]) -> String {
    if steps.is_empty() {
        return String::new();
    }
    let watts = |value: &Maybe<f64>| value.value().map_or(DASH.to_owned(), |watts| format!("{watts:.1}"));
    let mut text =
        "\npower of one device, W                   mean        ±     least   largest\n".to_owned();
    for step in steps {
        let _ = writeln!(
            text,
            "  {:<34} {:>8.1} {:>8} {:>9} {:>9}",
            step.step,
            step.mean_w,
            percent(&step.variation_share),
            watts(&step.min_w),
            watts(&step.max_w)
        );
    }
    text
}

fn law(fitted: &FittedLaw) -> String {
    let unit = match fitted.quantity {
        Quantity::Time => "s",
        Quantity::Energy => "J",
    };
    let mut text = format!("{} {}\n", fitted.law.phase.name(), fitted.quantity.name());
    for coefficient in &fitted.law.coefficients {
        let per = if coefficient.term == Term::Constant {
            String::new()
        } else {
            format!(" per {}", name(coefficient.term))
        };
        let _ = writeln!(
            text,
            "  {:<24} {:>10.3e}  [{:.2e}, {:.2e}] {unit}{per}",
            name(coefficient.term),
            coefficient.value,
            coefficient.low,
            coefficient.high
        );
    }
    if let Some(knot) = fitted.law.knot {
        let _ = writeln!(text, "  knot at {}", format_significant(knot));
    }
    let domain: Vec<String> = fitted
        .law
        .domain
        .iter()
        .map(|(name, range)| {
            format!(
                "{} {} to {}",
                name.replace('_', " "),
                format_significant(range.min),
                format_significant(range.max)
            )
        })
        .collect();
    let _ = writeln!(text, "  holds for {}", domain.join(", "));
    text.push_str("  forecast            fold       points    MAPE  median     p90  signed  covered\n");
    for (fold, errors) in
        [("interior", &fitted.interior), ("row", &fitted.row), ("frontier", &fitted.frontier)]
    {
        text.push_str(&errors_line(fold, errors));
    }
    text.push_str(&errors_line("one out", &Maybe::Value(fitted.leave_one_out.clone())));
    for baseline in &fitted.baselines {
        for (fold, share) in [
            ("interior", &baseline.interior_mape_share),
            ("row", &baseline.row_mape_share),
            ("frontier", &baseline.frontier_mape_share),
        ] {
            if share.value().is_some() {
                let _ = writeln!(
                    text,
                    "  {:<19} {fold:<17} {:>7}",
                    baseline.name.replace('_', " "),
                    percent(share)
                );
            }
        }
    }
    if let Maybe::Value(floor) = fitted.noise_floor_share {
        let _ = writeln!(text, "  noise floor {:.1} %: how much runs of one point vary", floor * 100.0);
    }
    text
}

fn errors_line(fold: &str, errors: &Maybe<ErrorStatistics>) -> String {
    let Maybe::Value(errors) = errors else {
        return format!("  {:<19} {fold:<10} {:>6}\n", "this law", DASH);
    };
    format!(
        "  {:<19} {fold:<10} {:>6} {:>5.1} % {:>5.1} % {:>5.1} % {:>+5.1} % {:>6.0} %\n",
        "this law",
        errors.points,
        errors.mape_share * 100.0,
        errors.median_share * 100.0,
        errors.p90_share * 100.0,
        errors.signed_share * 100.0,
        errors.coverage_share * 100.0
    )
}

fn read_out(read_out: &ReadOut) -> String {
    let value = match &read_out.value {
        Maybe::Value(value) => format!("{value:.3e} {}", read_out.unit.replace("_per_", "/")),
        Maybe::Missing(missing) => format!("{DASH} ({})", missing.missing.replace('_', " ")),
    };
    let share = match read_out.share.value() {
        Some(share) => format!(", {:.0} % of the measured ceiling", share * 100.0),
        None => String::new(),
    };
    format!("  {:<26} {value}{share}\n", read_out.name.replace('_', " "))
}

fn name(term: Term) -> String {
    term.name().replace('_', " ")
}

/// One line for each group of published rows, and the errors of all together.
pub fn groups(fits: &[GroupFit]) -> String {
    let mut text = String::from("points   MAPE  median     p90   group\n");
    let mut pooled: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for fit in fits {
        match &fit.calibration {
            Ok(calibration) => {
                for fitted in &calibration.laws {
                    let errors = &fitted.leave_one_out;
                    let _ = writeln!(
                        text,
                        "{:>6} {:>4.1} % {:>5.1} % {:>5.1} %   {}",
                        errors.points,
                        errors.mape_share * 100.0,
                        errors.median_share * 100.0,
                        errors.p90_share * 100.0,
                        fit.group.name()
                    );
                    let pool = &mut pooled[usize::from(fit.group.has_experts)];
                    pool.extend(fitted.law.errors_without_one.iter().map(|error| error.abs()));
                }
            }
            Err(refusal) => {
                let _ = writeln!(
                    text,
                    "{:>6} refused  {}: {}",
                    fit.points,
                    fit.group.name(),
                    refusal.0.join("; ")
                );
            }
        }
    }
    for (kind, mut errors) in ["dense", "experts"].into_iter().zip(pooled) {
        if errors.is_empty() {
            continue;
        }
        errors.sort_by(f64::total_cmp);
        let _ = writeln!(
            text,
            "{:>6} {:>4.1} % {:>5.1} %           all groups, {kind}: each point by the law without it",
            errors.len(),
            errors.iter().sum::<f64>() / errors.len() as f64 * 100.0,
            errors[errors.len() / 2] * 100.0,
        );
    }
    text
}
