//! Findings about how power sensors behave, from reading them (`--sensors`).

use super::Section;
use crate::clock::Clock;
use crate::meter::nvml::{GpuId, Library};
use crate::meter::probe::{Probe, probe};
use crate::meter::{Absent, Reason};
use crate::units::{format_ns, format_significant};

/// Counter and integrated power, and a whole and its parts, should agree this well.
const AGREEMENT: f64 = 0.05;
const ADDITIVITY: f64 = 0.001;
/// What a probe without a load of its own cannot see.
const NEEDS_LOAD: &str = "not known: needs a load that is switched on and off";

pub(super) fn sensors(clock: &Clock) -> Section {
    let mut section = Section::new("sensor probe");
    let found = Library::open_default().and_then(|library| Ok((library.all()?, library)));
    match found {
        Ok((gpus, _)) if gpus.is_empty() => section.missing("NVML probe", "the driver shows no GPU", None),
        Ok((gpus, library)) => gpus.iter().for_each(|gpu| one(&mut section, &library, gpu, clock)),
        Err(absent) => missing(&mut section, "NVML probe", &absent),
    }
    section
}

fn missing(section: &mut Section, what: &str, absent: &Absent) {
    section.missing(what, absent.to_string(), absent.remedy.as_deref());
}

fn one(section: &mut Section, library: &Library, gpu: &GpuId, clock: &Clock) {
    let named = |what: &str| format!("{} {what}", gpu.name);
    let (mut gauge, info) = match library.gauge(std::slice::from_ref(gpu), clock) {
        Ok(found) => found,
        Err(absent) => return missing(section, &named("power"), &absent),
    };
    let sensor = &info.devices[0];
    section.ok(named("source"), format!("{}, scope {}", info.source, info.scope));
    if sensor.shared.value() == Some(&true) {
        let remedy = "end the other processes on it, or turn partitioning off";
        section.warn(named("sharing"), "others use it too: its energy is not ours alone", remedy);
    }
    report(section, &named, &probe(&mut gauge, clock, &info, 0));
}

fn report(section: &mut Section, named: &dyn Fn(&str) -> String, found: &Probe) {
    let mut say = |what: &str, value: Result<(String, bool), Reason>| match value {
        Ok((text, true)) => section.ok(named(what), text),
        Ok((text, false)) => {
            section.warn(
                named(what),
                text,
                "do not compare energy from this sensor before this is understood",
            );
        }
        Err(reason) => section.missing(named(what), reason.replace('_', " "), None),
    };
    let fine = |text: String| (text, true);
    say("counter period", found.update_period_ns.clone().map(|ns| fine(format_ns(ns as f64))));
    say(
        "counter unit",
        found
            .resolution_uj
            .clone()
            .map(|uj| fine(format!("{} mJ or a part of it", format_significant(uj as f64 / 1e3)))),
    );
    say(
        "call",
        found.call_ns.clone().map(|(median, late)| {
            fine(format!("{} median, {} p99", format_ns(median as f64), format_ns(late as f64)))
        }),
    );
    say(
        "counter against power",
        found.counter_over_power.clone().map(|ratio| {
            (format!("counter is {ratio:.4} of integrated power"), (ratio - 1.0).abs() <= AGREEMENT)
        }),
    );
    say(
        "energy adds up",
        found.additivity_error.clone().map(|error| {
            (format!("halves and whole differ by {:.3} %", error * 100.0), error.abs() <= ADDITIVITY)
        }),
    );
    for what in ["width of the power average", "energy in proportion to work"] {
        section.missing(named(what), NEEDS_LOAD, None);
    }
}
