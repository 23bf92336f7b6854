//! Who else is busy: looked at for a moment before a measurement, so that a noisy machine is said to be one before the
//! time is spent and not after.

use std::collections::{BTreeMap, HashMap};

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

use super::{CpuSnapshot, Roots};
use crate::clock::Clock;
use crate::record::Maybe;
use crate::record::machine::{BusyProgram, Interference, QUIET_SHARE};

/// Programs that are named.
const MOST_PROGRAMS: usize = 5;

/// A program below this share of all cores' time is not worth a name.
const LEAST_SHARE: f64 = 0.005;

/// Watches the machine for `duration_ns`, a third of a second or longer; kernel ticks are 10 ms.
pub fn observe(roots: &Roots, clock: &Clock, duration_ns: u64) -> Interference {
    if let Clock::Scripted(_) = clock {
        let foreign_share = Maybe::missing("scripted_clock");
        return Interference { observed_ns: 0, foreign_share, busiest: Vec::new() };
    }
    let begin_ns = clock.now_ns();
    let (host, before) = (CpuSnapshot::take(roots), Processes::now());
    clock.sleep_until_ns(begin_ns + duration_ns);
    let (host_after, after) = (CpuSnapshot::take(roots), Processes::now());
    let observed_ns = clock.now_ns() - begin_ns;
    let share = host.until(&host_after);
    let total_ms = share.value().and_then(|share| share.total_cpu_ns.value()).map_or(0, |ns| ns / 1_000_000);
    Interference {
        observed_ns,
        foreign_share: match share {
            Maybe::Value(share) => share.foreign_share,
            Maybe::Missing(missing) => Maybe::Missing(missing),
        },
        busiest: busiest(&before, &after, total_ms),
    }
}

/// One sentence when the machine is not quiet.
pub fn warning(interference: &Interference) -> Option<String> {
    let share = *interference.foreign_share.value().filter(|share| **share > QUIET_SHARE)?;
    let names: Vec<String> = interference
        .busiest
        .iter()
        .map(|program| match program.processes {
            1 => format!("{} {}", program.name, percent(program.cpu_share)),
            processes => format!("{} × {processes} {}", program.name, percent(program.cpu_share)),
        })
        .collect();
    let by = if names.is_empty() {
        "processes that cannot be seen from here".to_owned()
    } else {
        names.join(", ")
    };
    Some(format!("the machine is not quiet: {} of its CPU time goes to others ({by})", percent(share)))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Name and CPU time so far, ms, of every process but this one.
struct Processes(HashMap<Pid, (String, u64)>);

impl Processes {
    /// Empty where processes cannot be listed.
    fn now() -> Self {
        let wanted = RefreshKind::nothing();
        let Ok(mut system) = System::new_with_specifics(wanted) else { return Processes(HashMap::new()) };
        let cpu_time = ProcessRefreshKind::nothing().with_cpu().without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::All, true, cpu_time);
        let own = Pid::from_u32(std::process::id());
        let others = system.processes().iter().filter(|(pid, _)| **pid != own);
        Processes(
            others
                .map(|(pid, process)| {
                    let name = process.name().to_string_lossy().into_owned();
                    (*pid, (name, process.accumulated_cpu_time()))
                })
                .collect(),
        )
    }
}

/// The programs that used most of `total_ms`; a process that is new spent all its time since.
fn busiest(before: &Processes, after: &Processes, total_ms: u64) -> Vec<BusyProgram> {
    let mut programs: BTreeMap<&str, (u32, u64)> = BTreeMap::new();
    for (pid, (name, cpu_ms)) in &after.0 {
        let used_ms = cpu_ms.saturating_sub(before.0.get(pid).map_or(0, |(_, cpu_ms)| *cpu_ms));
        if used_ms > 0 {
            let (processes, sum_ms) = programs.entry(name).or_default();
            *processes += 1;
            *sum_ms += used_ms;
        }
    }
    let mut programs: Vec<BusyProgram> = programs
        .into_iter()
        .map(|(name, (processes, used_ms))| BusyProgram {
            name: name.to_owned(),
            processes,
            cpu_share: used_ms as f64 / total_ms.max(1) as f64,
        })
        .filter(|program| program.cpu_share >= LEAST_SHARE)
        .collect();
    programs.sort_by(|a, b| b.cpu_share.total_cmp(&a.cpu_share));
    programs.truncate(MOST_PROGRAMS);
    programs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processes(list: &[(u32, &str, u64)]) -> Processes {
        Processes(
            list.iter().map(|(pid, name, ms)| (Pid::from_u32(*pid), ((*name).to_owned(), *ms))).collect(),
        )
    }

    #[test]
    fn processes_of_one_name_are_one_program_and_new_ones_count() {
        let before = processes(&[(1, "cc1plus", 1000), (2, "sshd", 5), (3, "gone", 9)]);
        let after = processes(&[(1, "cc1plus", 1100), (2, "sshd", 5), (4, "cc1plus", 50), (5, "small", 1)]);
        let expected = BusyProgram { name: "cc1plus".to_owned(), processes: 2, cpu_share: 0.25 };
        assert_eq!(busiest(&before, &after, 600), [expected]);
    }

    #[test]
    fn a_quiet_machine_gets_no_warning_and_a_busy_one_is_told_who() {
        let program =
            |name: &str, processes, cpu_share| BusyProgram { name: name.to_owned(), processes, cpu_share };
        let mut interference = Interference {
            observed_ns: 300_000_000,
            foreign_share: Maybe::Value(0.02),
            busiest: vec![program("rustc", 3, 0.25), program("sshd", 1, 0.1)],
        };
        assert_eq!(warning(&interference), None);
        interference.foreign_share = Maybe::Value(0.354);
        let expected =
            "the machine is not quiet: 35 % of its CPU time goes to others (rustc × 3 25 %, sshd 10 %)";
        assert_eq!(warning(&interference).unwrap(), expected);
        interference.busiest.clear();
        assert!(warning(&interference).unwrap().ends_with("(processes that cannot be seen from here)"));
        interference.foreign_share = Maybe::missing("not_found");
        assert_eq!(warning(&interference), None);
    }

    #[test]
    fn a_scripted_clock_observes_nothing() {
        let clock = Clock::scripted();
        let interference = observe(&Roots::default(), &clock, 300_000_000);
        assert_eq!(interference.foreign_share.reason(), Some("scripted_clock"));
        assert_eq!(clock.now_ns(), 0);
    }

    /// A child named like nothing else here, which runs until it has been seen; eight tries on a busy machine.
    #[test]
    fn a_busy_child_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("tokmeter-noise");
        std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
        let mut child =
            std::process::Command::new(&program).args(["-c", "while :; do :; done"]).spawn().unwrap();
        let clock = Clock::monotonic();
        let seen = (0..8).any(|_| {
            let interference = observe(&Roots::default(), &clock, 400_000_000);
            interference
                .busiest
                .iter()
                .any(|program| program.name == "tokmeter-noise" && program.cpu_share > 0.02)
        });
        let _ = child.kill();
        let _ = child.wait();
        assert!(seen);
    }
}
