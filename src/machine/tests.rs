//! The whole block: on trees that lack everything, on trees of garbage, and on the machine that runs the tests.

use super::*;
use crate::clock::Clock;
use crate::meter::Absent;
use crate::record::machine::Machine;

/// The machine as it is without NVML.
pub(crate) fn described(roots: &Roots) -> Machine {
    capture(roots, &Err(Absent::new("no_nvml", "no NVML in tests")))
}

/// A directory with these files, each given by its path and text.
pub(super) fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

fn round_trip(machine: &Machine) -> Machine {
    serde_json::from_str(&serde_json::to_string(machine).unwrap()).unwrap()
}

#[test]
fn a_machine_without_any_file_is_described_by_reasons() {
    let machine = described(&Roots::under("/nonexistent"));
    assert_eq!(machine.host.hostname.reason(), Some("not_found"));
    assert_eq!(machine.cpu.logical_cpus.reason(), Some("not_found"));
    assert_eq!(machine.memory.total_bytes.reason(), Some("not_found"));
    assert_eq!(machine.software.binary_sha256.reason(), Some("not_found"));
    assert_eq!(round_trip(&machine), machine);
}

#[test]
fn garbage_in_every_file_gives_reasons_and_no_panic() {
    let files = [
        "proc/cpuinfo",
        "proc/meminfo",
        "proc/loadavg",
        "proc/uptime",
        "proc/self/cgroup",
        "proc/self/status",
        "proc/self/limits",
        "proc/self/stat",
        "proc/self/mountinfo",
        "proc/driver/nvidia/version",
        "sys/devices/system/cpu/online",
        "sys/devices/system/node/online",
        "sys/fs/cgroup/cgroup.controllers",
        "sys/fs/cgroup/cpu.max",
        "sys/fs/cgroup/memory.max",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq",
        "sys/devices/system/cpu/intel_pstate/no_turbo",
        "sys/class/dmi/id/sys_vendor",
        "etc/os-release",
    ];
    for garbage in
        ["\u{0}\u{1}::::\n:\n - , \n", "-1", "99999999999999999999999999 kB", "[", "0-", "(((", "é:é"]
    {
        let files: Vec<(&str, &str)> = files.iter().map(|file| (*file, garbage)).collect();
        let machine = described(&Roots::under(tree(&files).path()));
        assert_eq!(machine.cpu.logical_cpus.value(), None, "{garbage}");
        assert_eq!(machine.memory.total_bytes.value(), None, "{garbage}");
        assert_eq!(machine.limits.cgroup_cpu_cores.value(), None, "{garbage}");
        assert_eq!(round_trip(&machine), machine, "{garbage}");
    }
}

#[test]
fn this_machine_is_described() {
    let machine = described(&Roots::default());
    assert_eq!(round_trip(&machine), machine);
    let cpus = *machine.cpu.logical_cpus.value().unwrap();
    assert!(cpus >= *machine.cpu.physical_cores.value().unwrap());
    assert!(cpus >= *machine.limits.affinity_cpus.value().unwrap());
    assert!(machine.cpu.model.value().is_some() && machine.cpu.flags.value().is_some());
    assert!(machine.memory.total_bytes.value().unwrap() >= machine.memory.available_bytes.value().unwrap());
    assert!(*machine.host.uptime_s.value().unwrap() > 0.0);
    assert_eq!(machine.software.binary_sha256.value().unwrap().len(), 64);
}

/// The tenth of a second that a capture may take, on the fastest of a few tries: other tests run beside this one.
#[test]
fn a_capture_without_the_hash_takes_less_than_a_tenth_of_a_second() {
    let clock = Clock::monotonic();
    let roots = Roots { proc: tree(&[]).path().to_path_buf(), ..Roots::default() };
    let fastest_ns = (0..5)
        .map(|_| {
            let begin_ns = clock.now_ns();
            let hash_free = (host::collect(&Roots::default()), cpu::collect(&Roots::default()));
            std::hint::black_box((hash_free, limits::collect(&Roots::default()), described(&roots)));
            clock.now_ns() - begin_ns
        })
        .min();
    assert!(fastest_ns.unwrap() < 100_000_000, "{fastest_ns:?} ns");
}
