//! Where the CPU's time goes between two instants: to this process, to others, to the hypervisor's other guests, or
//! nowhere because a quota held us back. Read at the edges of a window, never inside it.
//!
//! The kernel counts in ticks of 10 ms, so a window should be a second or longer. `/proc/stat` counts the whole host
//! even inside a container (unless LXCFS replaces it), which is right here: the host's other work disturbs us too.

use super::Roots;
use super::files::{Reason, number, read, read_start};
use super::limits::{ControlGroup, affinity_cpus};
use crate::record::Maybe;
use crate::record::machine::CpuShare;

/// `USER_HZ` is 100 on every architecture that we run on.
const TICK_NS: u64 = 10_000_000;

/// The first line of `/proc/stat` is the only one that counts.
const FIRST_LINE_BYTES: u64 = 512;

/// The kernel's counters at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuSnapshot {
    host: Result<HostTicks, Reason>,
    own_ticks: Result<u64, Reason>,
    throttled_ns: Result<u64, Reason>,
    available_cores: Result<f64, Reason>,
}

/// Ticks of all CPUs since boot. The kernel counts guests' time as user time already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostTicks {
    /// User, nice, system, hard and soft interrupts.
    busy: [u64; 5],
    /// Idle, waiting for I/O.
    idle: [u64; 2],
    steal: u64,
}

impl CpuSnapshot {
    /// Reads about six small files. On a host with hundreds of CPUs the kernel takes up to a millisecond for the first.
    pub fn take(roots: &Roots) -> Self {
        let group = ControlGroup::of_this_process(roots);
        CpuSnapshot {
            host: read_start(roots.proc.join("stat"), FIRST_LINE_BYTES).and_then(|text| host_ticks(&text)),
            own_ticks: read(roots.proc.join("self/stat")).and_then(|text| own_ticks(&text)),
            throttled_ns: group.throttled_ns(),
            available_cores: available_cores(affinity_cpus(roots), group.cpu_cores()),
        }
    }

    /// What happened from this snapshot to a later one. Missing altogether where the host's counters are.
    pub fn until(&self, later: &CpuSnapshot) -> Maybe<CpuShare> {
        let hosts = self.host.and_then(|begin| Ok((begin, later.host?)));
        Maybe::from(hosts.map(|(begin, end)| {
            let host = end.since(&begin);
            let own_ticks = between(self.own_ticks, later.own_ticks);
            let foreign = own_ticks.map(|own| host.busy.iter().sum::<u64>().saturating_sub(own));
            CpuShare {
                total_cpu_ns: whole(&host).map(|ticks| ticks * TICK_NS).into(),
                own_cpu_ns: own_ticks.map(|ticks| ticks * TICK_NS).into(),
                foreign_share: foreign.and_then(|ticks| share(ticks, &host)).into(),
                steal_share: share(host.steal, &host).into(),
                throttled_ns: between(self.throttled_ns, later.throttled_ns).into(),
                available_cores: later.available_cores.into(),
                resolution_ns: TICK_NS,
            }
        }))
    }
}

impl HostTicks {
    /// Single counters may step back a little (idle and I/O wait do); that counts as no time.
    fn since(&self, begin: &HostTicks) -> HostTicks {
        HostTicks {
            busy: std::array::from_fn(|i| self.busy[i].saturating_sub(begin.busy[i])),
            idle: std::array::from_fn(|i| self.idle[i].saturating_sub(begin.idle[i])),
            steal: self.steal.saturating_sub(begin.steal),
        }
    }
}

/// Time of all CPUs together, in ticks.
fn whole(host: &HostTicks) -> Result<u64, Reason> {
    match host.busy.iter().chain(&host.idle).sum::<u64>() + host.steal {
        0 => Err("window_too_short"),
        ticks => Ok(ticks),
    }
}

fn share(ticks: u64, host: &HostTicks) -> Result<f64, Reason> {
    Ok(ticks as f64 / whole(host)? as f64)
}

fn between(begin: Result<u64, Reason>, end: Result<u64, Reason>) -> Result<u64, Reason> {
    end?.checked_sub(begin?).ok_or("counter_went_back")
}

/// `cpu  user nice system idle iowait irq softirq steal guest guest_nice`; the oldest kernels end earlier.
fn host_ticks(stat: &str) -> Result<HostTicks, Reason> {
    let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("malformed")?;
    let mut ticks = [0; 8];
    let mut words = line.split_whitespace();
    for (index, ticks) in ticks.iter_mut().enumerate() {
        match words.next() {
            // A century of ticks of every CPU there is; more could only overflow the sums below.
            Some(word) => {
                *ticks = number::<u64>(word).ok().filter(|&ticks| ticks < 1 << 56).ok_or("malformed")?
            }
            None if index >= 4 => {}
            None => return Err("malformed"),
        }
    }
    let [user, nice, system, idle, iowait, irq, softirq, steal] = ticks;
    Ok(HostTicks { busy: [user, nice, system, irq, softirq], idle: [idle, iowait], steal })
}

/// Fields 14 and 15, `utime` and `stime`, of all threads. The name before them is in brackets and may hold anything.
fn own_ticks(stat: &str) -> Result<u64, Reason> {
    let (_, fields) = stat.rsplit_once(')').ok_or("malformed")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || number::<u64>(fields.next().ok_or("malformed")?);
    next()?.checked_add(next()?).filter(|&ticks| ticks < 1 << 56).ok_or("malformed")
}

fn available_cores(affinity: Result<u32, Reason>, quota: Result<f64, Reason>) -> Result<f64, Reason> {
    let affinity = f64::from(affinity?);
    Ok(quota.map_or(affinity, |quota| quota.min(affinity)))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::super::tests::tree;
    use super::*;
    use crate::clock::Clock;

    fn snapshot(stat: &str, own: &str, throttled_us: u64) -> CpuSnapshot {
        let throttled = format!("usage_usec 5\nthrottled_usec {throttled_us}\n");
        let files = [
            ("proc/stat", stat),
            ("proc/self/stat", own),
            ("proc/self/status", "Cpus_allowed_list:\t0-3\n"),
            ("proc/self/cgroup", "0::/job\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu"),
            ("sys/fs/cgroup/job/cpu.stat", &throttled),
            ("sys/fs/cgroup/job/cpu.max", "250000 100000"),
        ];
        CpuSnapshot::take(&Roots::under(tree(&files).path()))
    }

    #[test]
    fn the_time_of_all_cores_is_divided_exactly() {
        let before = snapshot(
            "cpu  100 10 20 1000 5 1 2 3 50 0\ncpu0 1 1 1 1\n",
            "7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 30 10 900 900 20 0\n",
            100,
        );
        let after = snapshot(
            "cpu  160 20 40 1060 10 6 12 33 90 0\ncpu0 1 1 1 1\n",
            "7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 60 20 990 990 20 0\n",
            350,
        );
        // Busy 60 + 10 + 20 + 5 + 10 = 105, idle 60 + 5 = 65, stolen 30: 200 ticks; own 30 + 10 = 40.
        let expected = CpuShare {
            total_cpu_ns: Maybe::Value(2_000_000_000),
            own_cpu_ns: Maybe::Value(400_000_000),
            foreign_share: Maybe::Value(65.0 / 200.0),
            steal_share: Maybe::Value(30.0 / 200.0),
            throttled_ns: Maybe::Value(250_000),
            available_cores: Maybe::Value(2.5),
            resolution_ns: 10_000_000,
        };
        assert_eq!(before.until(&after), Maybe::Value(expected));
    }

    #[test]
    fn a_window_without_a_tick_has_no_shares() {
        let one = snapshot("cpu  1 2 3 4 5 6 7 8 9 0", "1 (a) S 1 1 1 0 -1 0 0 0 0 0 30 10", 5);
        let share = one.until(&one).into_value().unwrap();
        assert_eq!(share.foreign_share.reason(), Some("window_too_short"));
        assert_eq!(share.steal_share.reason(), Some("window_too_short"));
        assert_eq!(share.own_cpu_ns, Maybe::Value(0));
    }

    #[test]
    fn more_own_time_than_the_host_counted_is_not_a_negative_foreign_share() {
        let before = snapshot("cpu  0 0 0 0 0 0 0 0 0 0", "1 (a) S 1 1 1 0 -1 0 0 0 0 0 0 0", 5);
        let after = snapshot("cpu  9 0 0 90 0 0 0 0 0 0", "1 (a) S 1 1 1 0 -1 0 0 0 0 0 10 1", 4);
        let share = before.until(&after).into_value().unwrap();
        assert_eq!(share.foreign_share, Maybe::Value(0.0));
        assert_eq!(share.throttled_ns.reason(), Some("counter_went_back"));
    }

    #[test]
    fn unreadable_counters_say_why() {
        let nothing = CpuSnapshot::take(&Roots::under("/nonexistent"));
        assert_eq!(nothing.until(&nothing).reason(), Some("not_found"));
        for stat in ["cpu  1 2 3", "cpu  1 2 3 -4", "cpu0 1 2 3 4", "x", "cpu  1 2 3 18446744073709551615"] {
            let garbage = snapshot(stat, "1 a", 0);
            assert_eq!(garbage.until(&garbage).reason(), Some("malformed"), "{stat}");
        }
        let own = snapshot("cpu  1 2 3 4", "1 (a) S 1", 0);
        let share = own.until(&own).into_value().unwrap();
        assert_eq!(share.foreign_share.reason(), Some("malformed"));
    }

    struct Busy(Child);

    impl Busy {
        fn start() -> Self {
            Busy(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap())
        }

        fn ticks(&self) -> u64 {
            own_ticks(&read(format!("/proc/{}/stat", self.0.id())).unwrap()).unwrap()
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn sleep_ms(clock: &Clock, ms: u64) {
        clock.sleep_until_ns(clock.now_ns() + ms * 1_000_000);
    }

    /// All of a child's time is foreign, whatever else runs here: the tolerance is two ticks for each core, and one in
    /// twenty of the child's time, because the kernel counts the host's ticks by sampling and the child's exactly.
    #[test]
    fn a_busy_child_is_seen_as_foreign() {
        let (clock, roots) = (Clock::monotonic(), Roots::default());
        let cores = std::thread::available_parallelism().unwrap().get() as u64;
        let child = Busy::start();
        let (begin, child_begin) = (CpuSnapshot::take(&roots), child.ticks());
        while child.ticks() - child_begin < 50 && clock.now_ns() < 20_000_000_000 {
            sleep_ms(&clock, 50);
        }
        let child_ticks = child.ticks() - child_begin;
        let share = begin.until(&CpuSnapshot::take(&roots)).into_value().unwrap();
        let total_ticks = *share.total_cpu_ns.value().unwrap() / TICK_NS;
        let foreign_ticks = share.foreign_share.value().unwrap() * total_ticks as f64;
        assert!(child_ticks >= 50, "the child got {child_ticks} ticks in 20 s");
        let least = child_ticks as f64 * 0.95 - 2.0 * cores as f64;
        assert!(foreign_ticks >= least, "{foreign_ticks} foreign ticks, the child's were {child_ticks}");
    }

    /// If it were, the foreign share would stay near 1 however much of the machine is ours. The tolerance is one in ten
    /// of the whole, for sampled ticks; tried again when another program took most of the machine meanwhile.
    #[test]
    fn own_work_is_not_counted_as_foreign() {
        let (clock, roots) = (Clock::monotonic(), Roots::default());
        let stop = std::sync::atomic::AtomicBool::new(false);
        let cores = std::thread::available_parallelism().unwrap().get();
        let shares: Vec<(f64, f64)> = std::thread::scope(|scope| {
            for _ in 0..cores {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let one = || {
                let begin = CpuSnapshot::take(&roots);
                sleep_ms(&clock, 500);
                let share = begin.until(&CpuSnapshot::take(&roots)).into_value().unwrap();
                let own =
                    *share.own_cpu_ns.value().unwrap() as f64 / *share.total_cpu_ns.value().unwrap() as f64;
                (own, *share.foreign_share.value().unwrap())
            };
            let shares = (0..4).map(|_| one()).collect();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            shares
        });
        assert!(shares.iter().all(|(own, foreign)| own + foreign < 1.1 && *own > 0.02), "{shares:?}");
    }

    #[test]
    fn a_snapshot_is_cheap() {
        let (clock, roots) = (Clock::monotonic(), Roots::default());
        let cost_ns = |_| {
            let begin_ns = clock.now_ns();
            std::hint::black_box(CpuSnapshot::take(&roots));
            clock.now_ns() - begin_ns
        };
        let fastest_ns = (0..200).map(cost_ns).min().unwrap();
        assert!(fastest_ns < 2_000_000, "{fastest_ns} ns");
    }
}
