//! Findings about the processor, the memory, what stands between us and the hardware, and how quiet it is.

use super::{Section, Status};
use crate::machine::warning;
use crate::record::Maybe;
use crate::record::machine::{Interference, Machine};
use crate::units::format_bytes;

/// A load above this share of the logical CPUs means that somebody else computes.
const QUIET_LOAD_SHARE: f64 = 0.1;

/// Less than this makes weights of any size doubtful.
const LITTLE_MEMORY_BYTES: u64 = 2 << 30;

pub(super) fn processor(machine: &Machine) -> Section {
    let cpu = &machine.cpu;
    let mut section = Section::new("cpu");
    section.known("model", &cpu.model, String::clone);
    section.known("physical cores", &cpu.physical_cores, u32::to_string);
    section.known("logical CPUs", &cpu.logical_cpus, u32::to_string);
    let parts = |what: &Maybe<u32>, one: &str| what.value().map(|count| format!("{count} {one}"));
    let sockets = [parts(&cpu.sockets, "socket(s)"), parts(&cpu.numa_nodes, "NUMA node(s)")];
    if sockets.iter().any(Option::is_some) {
        section.ok("layout", sockets.into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
    section.known("vector units", &cpu.flags, |flags| flags.join(" "));
    section.known("caches", &cpu.caches, |caches| {
        let one = |cache: &crate::record::machine::Cache| {
            format!("L{} {} {} × {}", cache.level, cache.kind, format_bytes(cache.bytes), cache.instances)
        };
        caches.iter().map(one).collect::<Vec<_>>().join(", ")
    });
    let threads = crate::backend::cpu::default_threads();
    section.ok("default threads", threads.to_string());
    section
}

pub(super) fn memory(machine: &Machine) -> Section {
    let memory = &machine.memory;
    let mut section = Section::new("memory");
    let bytes = |bytes: &u64| format_bytes(*bytes);
    section.known("total", &memory.total_bytes, bytes);
    match memory.available_bytes.value() {
        Some(&available) if available < LITTLE_MEMORY_BYTES => {
            let remedy = "stop other programs, or choose a smaller model or --dtype quantized";
            section.warn("available", format_bytes(available), remedy);
        }
        _ => section.known("available", &memory.available_bytes, bytes),
    }
    section.known("transparent huge pages", &memory.transparent_hugepages, String::clone);
    section
}

pub(super) fn surroundings(machine: &Machine) -> Section {
    let (host, limits) = (&machine.host, &machine.limits);
    let mut section = Section::new("surroundings");
    section.known("system", &host.distro, String::clone);
    section.known("kernel", &host.kernel, String::clone);
    section.known("container", &host.container, String::clone);
    section.known("hypervisor", &host.hypervisor, String::clone);
    match (limits.cgroup_cpu_cores.value(), limits.affinity_cpus.value()) {
        (Some(&quota), Some(&cpus)) if quota < f64::from(cpus) => section.warn(
            "CPU quota",
            format!("{quota} cores of {cpus}"),
            "threads beyond the quota are held back: raise the quota, or use --threads and pin the process to as many CPUs",
        ),
        _ => section.limit("CPU quota", &limits.cgroup_cpu_cores, |cores| format!("{cores} cores")),
    }
    section.limit("CPU set", &limits.cgroup_cpuset, String::clone);
    section.limit("memory limit", &limits.cgroup_memory_bytes, |bytes| format_bytes(*bytes));
    section.known("affinity", &limits.affinity_cpus, |cpus| format!("{cpus} CPUs"));
    section.limit("address space", &limits.address_space_bytes, |bytes| format_bytes(*bytes));
    section.limit("locked memory", &limits.locked_memory_bytes, |bytes| format_bytes(*bytes));
    section
}

pub(super) fn quiet(machine: &Machine, interference: &Interference) -> Section {
    let mut section = Section::new("quiet");
    match (warning(interference), interference.foreign_share.value()) {
        (Some(sentence), _) => {
            section.warn("other processes", sentence, "stop them, or expect wider intervals");
        }
        (None, Some(share)) => section.ok("other processes", format!("{:.1} % of CPU time", share * 100.0)),
        (None, None) => section.known("other processes", &interference.foreign_share, f64::to_string),
    }
    load(&mut section, machine);
    governor(&mut section, machine);
    section.known("boost clocks", &machine.cpu.boost, |on| if *on { "on" } else { "off" }.to_owned());
    smt(&mut section, machine);
    match machine.memory.swap_used_bytes.value() {
        Some(&used) if used > 0 => {
            section.warn("swap in use", format_bytes(used), "sudo swapoff -a && sudo swapon -a")
        }
        _ => section.known("swap in use", &machine.memory.swap_used_bytes, |_| "none".to_owned()),
    }
    section
}

fn load(section: &mut Section, machine: &Machine) {
    let cpus = machine.cpu.logical_cpus.value().copied().unwrap_or(1);
    match machine.load.load_1m.value() {
        Some(&load) if load > (QUIET_LOAD_SHARE * f64::from(cpus)).max(0.5) => {
            section.warn("load", format!("{load} over the last minute, {cpus} CPUs"), "wait until it falls");
        }
        _ => section.known("load", &machine.load.load_1m, f64::to_string),
    }
}

fn governor(section: &mut Section, machine: &Machine) {
    match machine.cpu.governor.value() {
        Some(governor) if governor != "performance" => {
            section.warn(
                "frequency governor",
                governor.as_str(),
                "sudo cpupower frequency-set -g performance",
            );
        }
        _ => section.known("frequency governor", &machine.cpu.governor, String::clone),
    }
}

fn smt(section: &mut Section, machine: &Machine) {
    match (machine.cpu.smt.value(), machine.cpu.physical_cores.value()) {
        (Some(true), Some(cores)) => section.warn(
            "hardware threads",
            format!("two or more on each of {cores} cores"),
            format!("--threads {cores} uses each core once; steadier"),
        ),
        _ => section.known("hardware threads", &machine.cpu.smt, |_| "one on each core".to_owned()),
    }
}

impl Section {
    fn known<T>(&mut self, what: &str, value: &Maybe<T>, print: impl FnOnce(&T) -> String) {
        match value {
            Maybe::Value(value) => self.ok(what, print(value)),
            Maybe::Missing(missing) => {
                self.missing(what, explain(&missing.missing), remedy(&missing.missing))
            }
        }
    }

    /// As [`Section::known`], where no limit is good news.
    fn limit<T>(&mut self, what: &str, value: &Maybe<T>, print: impl FnOnce(&T) -> String) {
        match value.reason() {
            Some("unlimited") => self.add(Status::Ok, what.to_owned(), "unlimited".to_owned(), None),
            _ => self.known(what, value, print),
        }
    }
}

/// A reason code as words.
fn explain(reason: &str) -> String {
    match reason {
        "not_found" => "this system does not tell".to_owned(),
        "no_frequency_policy" => {
            "the system does not show clocks, as is usual in a virtual machine".to_owned()
        }
        "permission" => "not readable by this user".to_owned(),
        other => other.replace('_', " "),
    }
}

fn remedy(reason: &str) -> Option<&'static str> {
    (reason == "permission").then_some("run as a user who may read it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Roots;
    use crate::machine::tests::described;
    use crate::record::machine::BusyProgram;

    /// A machine about which nothing is known.
    fn unknown() -> Machine {
        described(&Roots::under("/nonexistent"))
    }

    fn status(section: &Section, what: &str) -> (Status, String) {
        let finding = section.findings.iter().find(|finding| finding.what == what).unwrap();
        (finding.status, finding.remedy.clone().unwrap_or_default())
    }

    fn silent() -> Interference {
        Interference { observed_ns: 1, foreign_share: Maybe::Value(0.001), busiest: Vec::new() }
    }

    #[test]
    fn an_unknown_machine_is_missing_throughout_and_nothing_is_guessed() {
        let machine = unknown();
        assert_eq!(status(&processor(&machine), "model").0, Status::Missing);
        assert_eq!(status(&memory(&machine), "available").0, Status::Missing);
        assert_eq!(status(&surroundings(&machine), "CPU quota").0, Status::Missing);
        assert_eq!(status(&quiet(&machine, &silent()), "frequency governor").0, Status::Missing);
    }

    #[test]
    fn noise_is_a_warning_with_its_remedy() {
        let mut machine = unknown();
        machine.cpu.governor = Maybe::Value("powersave".to_owned());
        machine.cpu.smt = Maybe::Value(true);
        machine.cpu.physical_cores = Maybe::Value(8);
        machine.load.load_1m = Maybe::Value(3.0);
        machine.memory.swap_used_bytes = Maybe::Value(1);
        let noisy = Interference {
            foreign_share: Maybe::Value(0.5),
            busiest: vec![BusyProgram { name: "rustc".to_owned(), processes: 1, cpu_share: 0.5 }],
            ..silent()
        };
        let section = quiet(&machine, &noisy);
        assert_eq!(status(&section, "other processes").0, Status::Warn);
        assert_eq!(status(&section, "load").0, Status::Warn);
        assert!(status(&section, "frequency governor").1.contains("frequency-set -g performance"));
        assert!(status(&section, "hardware threads").1.contains("--threads 8"));
        assert_eq!(status(&section, "swap in use").0, Status::Warn);
    }

    #[test]
    fn a_quiet_machine_has_no_warnings() {
        let mut machine = unknown();
        machine.cpu.governor = Maybe::Value("performance".to_owned());
        machine.cpu.smt = Maybe::Value(false);
        machine.cpu.boost = Maybe::Value(true);
        machine.load.load_1m = Maybe::Value(0.2);
        machine.memory.swap_used_bytes = Maybe::Value(0);
        let section = quiet(&machine, &silent());
        assert!(
            section.findings.iter().all(|finding| finding.status == Status::Ok),
            "{:?}",
            section.findings
        );
    }

    #[test]
    fn a_quota_below_the_affinity_is_a_warning_and_no_quota_is_not() {
        let mut machine = unknown();
        machine.limits.affinity_cpus = Maybe::Value(4);
        machine.limits.cgroup_cpu_cores = Maybe::Value(1.5);
        assert_eq!(status(&surroundings(&machine), "CPU quota").0, Status::Warn);
        machine.limits.cgroup_cpu_cores = Maybe::missing("unlimited");
        assert_eq!(status(&surroundings(&machine), "CPU quota").0, Status::Ok);
    }
}
