//! What this process may use of the machine: control group, affinity, resource limits.

use std::path::{Path, PathBuf};

use super::Roots;
use super::files::{Reason, cpu_list, field, number, parse, read};
use crate::record::machine::Limits;

/// Where version 1 of control groups puts "no limit": the largest multiple of the page size in an `i64`.
const V1_UNLIMITED_BYTES: u64 = 1 << 62;

pub(super) fn collect(roots: &Roots) -> Limits {
    let group = ControlGroup::of_this_process(roots);
    Limits {
        cgroup_cpu_cores: group.cpu_cores().into(),
        cgroup_cpuset: group.cpuset().into(),
        cgroup_memory_bytes: group.memory_bytes().into(),
        affinity_cpus: affinity_cpus(roots).into(),
        address_space_bytes: resource(roots, "Max address space").into(),
        locked_memory_bytes: resource(roots, "Max locked memory").into(),
    }
}

/// CPUs that the scheduler may put this process on.
pub(super) fn affinity_cpus(roots: &Roots) -> Result<u32, Reason> {
    let status = read(roots.proc.join("self/status"))?;
    Ok(cpu_list(field(&status, "Cpus_allowed_list")?)?.len() as u32)
}

/// The soft limit of one line of `/proc/self/limits`.
fn resource(roots: &Roots, name: &str) -> Result<u64, Reason> {
    let text = read(roots.proc.join("self/limits"))?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name)).ok_or("not_found")?;
    match rest.split_whitespace().next() {
        Some("unlimited") => Err("unlimited"),
        Some(word) => number(word),
        None => Err("malformed"),
    }
}

/// The control groups that this process is in, each as the directories from its own up to the root of the mount: a
/// limit on any of them holds. Version 2 and version 1 may be mounted side by side.
#[derive(Debug)]
pub(super) struct ControlGroup {
    unified: Vec<PathBuf>,
    v1_cpu: Vec<PathBuf>,
    v1_cpuset: Vec<PathBuf>,
    v1_memory: Vec<PathBuf>,
}

impl ControlGroup {
    pub(super) fn of_this_process(roots: &Roots) -> Self {
        let mount = roots.sys.join("fs/cgroup");
        let groups = read(roots.proc.join("self/cgroup")).unwrap_or_default();
        let v1 = |controller: &str| match path_of(&groups, controller) {
            Some(path) => levels(&mount.join(controller), path),
            None => Vec::new(),
        };
        let unified = [mount.join("unified"), mount.clone()].into_iter().find(|base| is_unified(base));
        ControlGroup {
            unified: match (unified, path_of(&groups, "")) {
                (Some(base), Some(path)) => levels(&base, path),
                _ => Vec::new(),
            },
            v1_cpu: v1("cpu"),
            v1_cpuset: v1("cpuset"),
            v1_memory: v1("memory"),
        }
    }

    /// CPU bandwidth in cores.
    pub(super) fn cpu_cores(&self) -> Result<f64, Reason> {
        let v2 = self.unified.iter().map(|level| quota_v2(level));
        least(v2.chain(self.v1_cpu.iter().map(|level| quota_v1(level))))
    }

    fn memory_bytes(&self) -> Result<u64, Reason> {
        let v2 = self.unified.iter().map(|level| match read(level.join("memory.max"))?.as_str() {
            "max" => Err("unlimited"),
            bytes => number::<u64>(bytes),
        });
        let v1 =
            self.v1_memory.iter().map(|level| match parse::<u64>(level.join("memory.limit_in_bytes"))? {
                V1_UNLIMITED_BYTES.. => Err("unlimited"),
                bytes => Ok(bytes),
            });
        least(v2.chain(v1))
    }

    fn cpuset(&self) -> Result<String, Reason> {
        let v2 = self.unified.iter().map(|level| level.join("cpuset.cpus.effective"));
        let v1 = self
            .v1_cpuset
            .iter()
            .flat_map(|level| [level.join("cpuset.effective_cpus"), level.join("cpuset.cpus")]);
        v2.chain(v1).find_map(|file| read(file).ok()).ok_or("not_found")
    }

    /// Time for which the quota held threads back since the group was made, ns, summed over CPUs and levels.
    pub(super) fn throttled_ns(&self) -> Result<u64, Reason> {
        let stats =
            self.unified.iter().chain(&self.v1_cpu).filter_map(|level| read(level.join("cpu.stat")).ok());
        let levels: Vec<u64> = stats.filter_map(|text| throttled_ns(&text)).collect();
        if levels.is_empty() { Err("not_found") } else { Ok(levels.into_iter().fold(0, u64::saturating_add)) }
    }
}

/// Version 2 counts microseconds, version 1 nanoseconds.
fn throttled_ns(stat: &str) -> Option<u64> {
    let value = |key| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
    let from_us = value("throttled_usec ").map(|us| us.saturating_mul(1000));
    from_us.or_else(|| value("throttled_time "))
}

fn is_unified(base: &Path) -> bool {
    base.join("cgroup.controllers").exists() || base.join("cgroup.procs").exists()
}

/// The group's path in `self/cgroup`: lines such as `4:memory:/a/b`, with no controller for version 2.
fn path_of<'a>(groups: &'a str, controller: &str) -> Option<&'a str> {
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        controllers.split(',').any(|name| name == controller).then_some(path)
    })
}

/// The directories of `path` that exist, from the innermost to `base`. Inside a container the path may be one of the
/// host's, and then only `base` exists.
fn levels(base: &Path, path: &str) -> Vec<PathBuf> {
    let inside: PathBuf = path.split('/').filter(|part| !part.is_empty() && *part != "..").collect();
    inside.ancestors().map(|part| base.join(part)).filter(|directory| directory.is_dir()).collect()
}

/// `150000 100000` or `max 100000`
fn quota_v2(level: &Path) -> Result<f64, Reason> {
    let text = read(level.join("cpu.max"))?;
    let (quota, period) = text.split_once(' ').ok_or("malformed")?;
    if quota == "max" { Err("unlimited") } else { cores(number(quota)?, number(period)?) }
}

fn quota_v1(level: &Path) -> Result<f64, Reason> {
    match parse::<i64>(level.join("cpu.cfs_quota_us"))? {
        ..0 => Err("unlimited"),
        quota_us => cores(quota_us as u64, parse(level.join("cpu.cfs_period_us"))?),
    }
}

fn cores(quota_us: u64, period_us: u64) -> Result<f64, Reason> {
    if quota_us == 0 || period_us == 0 { Err("malformed") } else { Ok(quota_us as f64 / period_us as f64) }
}

/// The least of the limits that are set. A level without the file sets none; a mount without any level is unknown.
fn least<T: PartialOrd>(limits: impl Iterator<Item = Result<T, Reason>>) -> Result<T, Reason> {
    let mut result = Err("not_found");
    for limit in limits {
        result = match (result, limit) {
            (Ok(known), Ok(limit)) => Ok(if limit < known { limit } else { known }),
            (_, Ok(limit)) => Ok(limit),
            (Err(_), Err(reason @ ("malformed" | "permission"))) => Err(reason),
            (Err("not_found"), Err(_)) => Err("unlimited"),
            (known, Err(_)) => known,
        };
    }
    result
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use crate::record::Maybe;

    fn limits_of(files: &[(&str, &str)]) -> Limits {
        collect(&Roots::under(tree(files).path()))
    }

    #[test]
    fn the_least_limit_on_the_way_to_the_root_holds() {
        let limits = limits_of(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu memory"),
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/a/memory.max", "max"),
            ("sys/fs/cgroup/a/b/memory.max", "1048576\n"),
            ("sys/fs/cgroup/a/b/cpuset.cpus.effective", "0-3\n"),
        ]);
        assert_eq!(limits.cgroup_cpu_cores, Maybe::Value(1.5));
        assert_eq!(limits.cgroup_memory_bytes, Maybe::Value(1_048_576));
        assert_eq!(limits.cgroup_cpuset, Maybe::Value("0-3".to_owned()));
    }

    #[test]
    fn version_one_groups_are_read_beside_an_empty_version_two() {
        let limits = limits_of(&[
            ("proc/self/cgroup", "4:memory:/job\n3:cpuset:/\n1:cpu,cpuacct:/job\n0::/\n"),
            ("sys/fs/cgroup/unified/cgroup.procs", ""),
            ("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/cpuset/cpuset.cpus", "0-1\n"),
        ]);
        assert_eq!(limits.cgroup_cpu_cores, Maybe::Value(0.5));
        assert_eq!(limits.cgroup_memory_bytes.reason(), Some("unlimited"));
        assert_eq!(limits.cgroup_cpuset, Maybe::Value("0-1".to_owned()));
    }

    #[test]
    fn a_path_of_the_host_falls_back_to_what_the_container_sees() {
        let limits = limits_of(&[
            ("proc/self/cgroup", "0::/../../elsewhere"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu"),
            ("sys/fs/cgroup/cpu.max", "200000 100000"),
        ]);
        assert_eq!(limits.cgroup_cpu_cores, Maybe::Value(2.0));
    }

    #[test]
    fn no_limit_and_no_knowledge_are_told_apart() {
        let none = limits_of(&[("proc/self/cgroup", "0::/"), ("sys/fs/cgroup/cgroup.controllers", "")]);
        assert_eq!(none.cgroup_cpu_cores.reason(), Some("unlimited"));
        assert_eq!(limits_of(&[]).cgroup_cpu_cores.reason(), Some("not_found"));
        let garbage = [("proc/self/cgroup", "0::/"), ("sys/fs/cgroup/cgroup.controllers", "")];
        for text in ["x y", "100000", "0 100000", "5 0"] {
            let files = [garbage[0], garbage[1], ("sys/fs/cgroup/cpu.max", text)];
            assert_eq!(limits_of(&files).cgroup_cpu_cores.reason(), Some("malformed"), "{text}");
        }
    }

    #[test]
    fn resource_limits_and_affinity_are_those_of_this_process() {
        let table = "Limit                     Soft Limit           Hard Limit           Units\n\
            Max locked memory         8388608              8388608              bytes\n\
            Max address space         unlimited            unlimited            bytes\n";
        let limits = limits_of(&[
            ("proc/self/limits", table),
            ("proc/self/status", "Name:\tx\nCpus_allowed:\tf\nCpus_allowed_list:\t0-3\n"),
        ]);
        assert_eq!(limits.locked_memory_bytes, Maybe::Value(8_388_608));
        assert_eq!(limits.address_space_bytes.reason(), Some("unlimited"));
        assert_eq!(limits.affinity_cpus, Maybe::Value(4));
    }

    #[test]
    fn throttled_time_is_in_nanoseconds_in_both_versions() {
        assert_eq!(throttled_ns("usage_usec 9\nnr_throttled 3\nthrottled_usec 25\n"), Some(25_000));
        assert_eq!(throttled_ns("nr_throttled 3\nthrottled_time 25\n"), Some(25));
        assert_eq!(throttled_ns("usage_usec 9\n"), None);
    }
}
