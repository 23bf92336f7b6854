//! The processors: what they are, how they share cores and caches, how their clock is governed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::Roots;
use super::files::{Reason, cpu_list, distinct, field, number, numbered, parse, read, read_start, reason};
use crate::record::machine::{Cache, Cpu};

/// Enough of `/proc/cpuinfo` for its first processor; on a large machine the whole would take tens of milliseconds.
const FIRST_PROCESSOR_BYTES: u64 = 8 * 1024;

/// Instruction sets that matter to matrix arithmetic, as Linux spells them on x86-64 and on aarch64.
const FLAGS: [&str; 36] = [
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "avx_vnni_int8",
    "avx_ne_convert",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "fphp",
    "asimdhp",
    "asimddp",
    "asimdfhm",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "svei8mm",
    "svebf16",
    "sme",
    "sme2",
    "atomics",
    "dcpop",
    "popcnt",
    "movbe",
    "abm",
];

/// Implementer and part numbers in an Arm `cpuinfo`, which gives no name.
const ARM_PARTS: [(&str, &str, &str); 11] = [
    ("0x41", "0xd08", "Cortex-A72"),
    ("0x41", "0xd0b", "Cortex-A76"),
    ("0x41", "0xd0c", "Neoverse-N1"),
    ("0x41", "0xd40", "Neoverse-V1"),
    ("0x41", "0xd49", "Neoverse-N2"),
    ("0x41", "0xd4f", "Neoverse-V2"),
    ("0x41", "0xd83", "Neoverse-V3AE"),
    ("0x41", "0xd84", "Neoverse-V3"),
    ("0x41", "0xd8e", "Neoverse-N3"),
    ("0xc0", "0xac3", "Ampere-1"),
    ("0xc0", "0xac4", "Ampere-1a"),
];

const ARM_IMPLEMENTERS: [(&str, &str); 7] = [
    ("0x41", "ARM"),
    ("0x46", "Fujitsu"),
    ("0x48", "HiSilicon"),
    ("0x4e", "NVIDIA"),
    ("0x51", "Qualcomm"),
    ("0x61", "Apple"),
    ("0xc0", "Ampere"),
];

pub(super) fn collect(roots: &Roots) -> Cpu {
    let info = first_processor(roots);
    let directory = roots.sys.join("devices/system/cpu");
    let cpus = online(&directory);
    let topology = cpus.clone().and_then(|cpus| Topology::read(&cpus));
    let caches = cpus.clone().and_then(|cpus| caches(&cpus));
    Cpu {
        model: info.clone().and_then(|info| model(&info)).into(),
        vendor: info.clone().and_then(|info| vendor(&info)).into(),
        physical_cores: topology.as_ref().map(|topology| topology.cores).map_err(|reason| *reason).into(),
        logical_cpus: cpus.map(|cpus| cpus.len() as u32).into(),
        sockets: topology.as_ref().map(|topology| topology.sockets).map_err(|reason| *reason).into(),
        numa_nodes: numa_nodes(roots).into(),
        smt: topology.map(|topology| topology.smt).into(),
        last_level_cache_bytes: caches.clone().and_then(|caches| last_level_bytes(&caches)).into(),
        caches: caches.into(),
        governor: policy_words(&directory, "scaling_governor").into(),
        energy_performance_preference: policy_words(&directory, "energy_performance_preference").into(),
        boost: boost(&directory).into(),
        min_mhz: policy_mhz(&directory, "scaling_min_freq").map(|(least, _)| least).into(),
        max_mhz: policy_mhz(&directory, "scaling_max_freq").map(|(_, most)| most).into(),
        hardware_max_mhz: policy_mhz(&directory, "cpuinfo_max_freq").map(|(_, most)| most).into(),
        microcode: microcode(&directory, info.as_deref().unwrap_or_default()).into(),
        flags: info.and_then(|info| flags(&info)).into(),
        mitigations: mitigations(&directory).into(),
    }
}

/// The block of the first processor in `cpuinfo`.
pub(super) fn first_processor(roots: &Roots) -> Result<String, Reason> {
    let text = read_start(roots.proc.join("cpuinfo"), FIRST_PROCESSOR_BYTES)?;
    Ok(text.split("\n\n").next().unwrap_or_default().to_owned())
}

fn model(info: &str) -> Result<String, Reason> {
    if let Ok(name) = field(info, "model name") {
        return Ok(name.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let (implementer, part) = (field(info, "CPU implementer")?, field(info, "CPU part")?);
    let known = ARM_PARTS.iter().find(|known| (known.0, known.1) == (implementer, part));
    Ok(known.map_or_else(|| format!("Arm implementer {implementer} part {part}"), |known| known.2.to_owned()))
}

fn vendor(info: &str) -> Result<String, Reason> {
    if let Ok(vendor) = field(info, "vendor_id") {
        return Ok(vendor.to_owned());
    }
    let implementer = field(info, "CPU implementer")?;
    let known = ARM_IMPLEMENTERS.iter().find(|known| known.0 == implementer);
    Ok(known.map_or(implementer, |known| known.1).to_owned())
}

fn flags(info: &str) -> Result<Vec<String>, Reason> {
    let flags: BTreeSet<&str> =
        field(info, "flags").or_else(|_| field(info, "Features"))?.split_whitespace().collect();
    Ok(FLAGS.iter().filter(|flag| flags.contains(*flag)).map(|flag| (*flag).to_owned()).collect())
}

/// Directories of the CPUs that are online.
fn online(directory: &Path) -> Result<Vec<PathBuf>, Reason> {
    let numbers = cpu_list(&read(directory.join("online"))?)?;
    Ok(numbers.into_iter().map(|number| directory.join(format!("cpu{number}"))).collect())
}

struct Topology {
    cores: u32,
    sockets: u32,
    smt: bool,
}

impl Topology {
    fn read(cpus: &[PathBuf]) -> Result<Topology, Reason> {
        let (mut cores, mut sockets) = (BTreeSet::new(), BTreeSet::new());
        for cpu in cpus {
            let topology = cpu.join("topology");
            let siblings = read(topology.join("core_cpus_list"))
                .or_else(|_| read(topology.join("thread_siblings_list")))?;
            cores.insert(cpu_list(&siblings)?);
            sockets.insert(parse::<i64>(topology.join("physical_package_id"))?);
        }
        let smt = cores.iter().any(|siblings| siblings.len() > 1);
        Ok(Topology { cores: cores.len() as u32, sockets: sockets.len() as u32, smt })
    }
}

fn numa_nodes(roots: &Roots) -> Result<u32, Reason> {
    Ok(cpu_list(&read(roots.sys.join("devices/system/node/online"))?)?.len() as u32)
}

/// The caches of all `cpus`, each instance counted once, equal ones together.
fn caches(cpus: &[PathBuf]) -> Result<Vec<Cache>, Reason> {
    let mut instances = BTreeMap::new();
    for cpu in cpus {
        for index in numbered(&cpu.join("cache"), "index")? {
            let shared_by = read(index.join("shared_cpu_list"))?;
            let kind = read(index.join("type"))?.to_lowercase();
            let key = (parse::<u32>(index.join("level"))?, kind, shared_by);
            // Some Arm firmware names its caches without their sizes.
            if let Ok(bytes) = cache_bytes(&index) {
                instances.insert(key, bytes);
            }
        }
    }
    let mut kinds: Vec<Cache> = Vec::new();
    for ((level, kind, shared_by), bytes) in instances {
        let shared_by_cpus = cpu_list(&shared_by)?.len() as u32;
        let cache = Cache { level, kind, bytes, shared_by_cpus, instances: 0 };
        match kinds.iter_mut().find(|known| Cache { instances: 0, ..(*known).clone() } == cache) {
            Some(known) => known.instances += 1,
            None => kinds.push(Cache { instances: 1, ..cache }),
        }
    }
    if kinds.is_empty() { Err("not_found") } else { Ok(kinds) }
}

/// `48K` → 49152.
fn cache_bytes(index: &Path) -> Result<u64, Reason> {
    let text = read(index.join("size"))?;
    let (digits, unit) = match text.strip_suffix(['K', 'M']) {
        Some(digits) if text.ends_with('K') => (digits, 1024),
        Some(digits) => (digits, 1024 * 1024),
        None => (text.as_str(), 1),
    };
    number::<u64>(digits)?.checked_mul(unit).ok_or("malformed")
}

fn last_level_bytes(caches: &[Cache]) -> Result<u64, Reason> {
    let level = caches.iter().map(|cache| cache.level).max().ok_or("not_found")?;
    Ok(caches
        .iter()
        .filter(|cache| cache.level == level && cache.kind != "instruction")
        .fold(0, |sum: u64, cache| {
            sum.saturating_add(cache.bytes.saturating_mul(u64::from(cache.instances)))
        }))
}

/// One file of every frequency policy. Virtual machines have none.
fn policies(directory: &Path, file: &str) -> Result<Vec<String>, Reason> {
    let policies = numbered(&directory.join("cpufreq"), "policy").unwrap_or_default();
    if policies.is_empty() {
        return Err("no_frequency_policy");
    }
    policies.iter().map(|policy| read(policy.join(file))).collect()
}

fn policy_words(directory: &Path, file: &str) -> Result<String, Reason> {
    distinct(policies(directory, file)?).ok_or("empty")
}

/// The least and the most of a file in kHz, as MHz.
fn policy_mhz(directory: &Path, file: &str) -> Result<(u32, u32), Reason> {
    let khz: Vec<u32> =
        policies(directory, file)?.iter().map(|text| number::<u32>(text)).collect::<Result<_, _>>()?;
    let (least, most) = (khz.iter().min().ok_or("empty")?, khz.iter().max().ok_or("empty")?);
    Ok((least / 1000, most / 1000))
}

fn boost(directory: &Path) -> Result<bool, Reason> {
    if let Ok(no_turbo) = parse::<u8>(directory.join("intel_pstate/no_turbo")) {
        return Ok(no_turbo == 0);
    }
    Ok(parse::<u8>(directory.join("cpufreq/boost"))? != 0)
}

fn microcode(directory: &Path, info: &str) -> Result<String, Reason> {
    match field(info, "microcode") {
        Ok(version) => Ok(version.to_owned()),
        Err(_) => read(directory.join("cpu0/microcode/version")),
    }
}

fn mitigations(directory: &Path) -> Result<BTreeMap<String, String>, Reason> {
    let entries =
        std::fs::read_dir(directory.join("vulnerabilities")).map_err(|error| reason(error.kind()))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, read(entry.path()).ok()?)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use crate::record::Maybe;

    const XEON: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R)  Xeon(R) Processor\n\
        microcode\t: 0x1\nflags\t\t: fpu avx2 fma f16c avx512f amx_tile hypervisor\n\nprocessor\t: 1\nflags\t\t: sve\n";

    /// Two sockets with two cores each, two threads per core, one L2 a core, one L3 a socket.
    fn two_sockets() -> Vec<(String, String)> {
        let cpu = |n: usize, path: &str| format!("sys/devices/system/cpu/cpu{n}/{path}");
        let mut files = vec![
            ("proc/cpuinfo".to_owned(), XEON.to_owned()),
            ("sys/devices/system/cpu/online".to_owned(), "0-7\n".to_owned()),
            ("sys/devices/system/node/online".to_owned(), "0-1\n".to_owned()),
        ];
        for n in 0..8 {
            let (core, socket) = (n % 4, n % 4 / 2);
            let siblings = format!("{core},{}", core + 4);
            let package = format!("{}-{},{}-{}", 2 * socket, 2 * socket + 1, 2 * socket + 4, 2 * socket + 5);
            files.push((cpu(n, "topology/core_cpus_list"), siblings.clone()));
            files.push((cpu(n, "topology/physical_package_id"), socket.to_string()));
            let caches = [
                (1, "Data", "48K", &siblings),
                (1, "Instruction", "32K", &siblings),
                (2, "Unified", "2M", &siblings),
                (3, "Unified", "107520K", &package),
            ];
            for (index, (level, kind, size, shared)) in caches.into_iter().enumerate() {
                files.push((cpu(n, &format!("cache/index{index}/level")), level.to_string()));
                files.push((cpu(n, &format!("cache/index{index}/type")), kind.to_owned()));
                files.push((cpu(n, &format!("cache/index{index}/size")), size.to_owned()));
                files.push((cpu(n, &format!("cache/index{index}/shared_cpu_list")), shared.clone()));
            }
        }
        files
    }

    fn collect_from(files: &[(String, String)]) -> Cpu {
        let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        collect(&Roots::under(tree(&files).path()))
    }

    #[test]
    fn a_server_with_two_sockets_is_counted_once_per_core_and_cache() {
        let cpu = collect_from(&two_sockets());
        assert_eq!(cpu.model, Maybe::Value("Intel(R) Xeon(R) Processor".to_owned()));
        assert_eq!(cpu.vendor, Maybe::Value("GenuineIntel".to_owned()));
        assert_eq!(cpu.microcode, Maybe::Value("0x1".to_owned()));
        assert_eq!((cpu.physical_cores, cpu.logical_cpus), (Maybe::Value(4), Maybe::Value(8)));
        assert_eq!((cpu.sockets, cpu.numa_nodes), (Maybe::Value(2), Maybe::Value(2)));
        assert_eq!(cpu.smt, Maybe::Value(true));
        let cache = |level, kind: &str, kib: u64, shared_by_cpus, instances| Cache {
            level,
            kind: kind.to_owned(),
            bytes: kib * 1024,
            shared_by_cpus,
            instances,
        };
        let expected = vec![
            cache(1, "data", 48, 2, 4),
            cache(1, "instruction", 32, 2, 4),
            cache(2, "unified", 2048, 2, 4),
            cache(3, "unified", 107_520, 4, 2),
        ];
        assert_eq!(cpu.caches, Maybe::Value(expected));
        assert_eq!(cpu.last_level_cache_bytes, Maybe::Value(2 * 107_520 * 1024));
        assert_eq!(cpu.governor.reason(), Some("no_frequency_policy"));
    }

    #[test]
    fn only_the_flags_that_matter_are_kept_and_only_the_first_processors() {
        let flags = collect_from(&two_sockets()).flags.into_value().unwrap();
        assert_eq!(flags, ["avx2", "fma", "f16c", "avx512f", "amx_tile"]);
    }

    #[test]
    fn an_arm_server_is_named_by_its_part_number() {
        let grace = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd sve i8mm bf16\n\
            CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd4f\nCPU revision\t: 0\n";
        let cpu = collect_from(&[("proc/cpuinfo".to_owned(), grace.to_owned())]);
        assert_eq!(cpu.model, Maybe::Value("Neoverse-V2".to_owned()));
        assert_eq!(cpu.vendor, Maybe::Value("ARM".to_owned()));
        assert_eq!(cpu.flags.into_value().unwrap(), ["asimd", "i8mm", "bf16", "sve"]);
        assert_eq!(cpu.microcode.reason(), Some("not_found"));
        assert_eq!(
            model("CPU implementer : 0x99\nCPU part : 0x001").unwrap(),
            "Arm implementer 0x99 part 0x001"
        );
    }

    #[test]
    fn the_frequency_policy_is_that_of_all_cpus() {
        let policy = |n: usize, file: &str, text: &str| {
            (format!("sys/devices/system/cpu/cpufreq/policy{n}/{file}"), text.to_owned())
        };
        let cpu = collect_from(&[
            policy(0, "scaling_governor", "performance\n"),
            policy(1, "scaling_governor", "powersave\n"),
            policy(0, "scaling_min_freq", "800000"),
            policy(1, "scaling_min_freq", "600000"),
            policy(0, "scaling_max_freq", "3500000"),
            policy(1, "scaling_max_freq", "3000000"),
            policy(0, "cpuinfo_max_freq", "3900000"),
            policy(1, "cpuinfo_max_freq", "fast"),
            ("sys/devices/system/cpu/intel_pstate/no_turbo".to_owned(), "1\n".to_owned()),
        ]);
        assert_eq!(cpu.governor, Maybe::Value("performance,powersave".to_owned()));
        assert_eq!((cpu.min_mhz, cpu.max_mhz), (Maybe::Value(600), Maybe::Value(3500)));
        assert_eq!(cpu.hardware_max_mhz.reason(), Some("malformed"));
        assert_eq!(cpu.energy_performance_preference.reason(), Some("not_found"));
        assert_eq!(cpu.boost, Maybe::Value(false));
    }

    #[test]
    fn a_cache_without_a_size_is_left_out() {
        let index = |file: &str, text: &str| {
            (format!("sys/devices/system/cpu/cpu0/cache/index0/{file}"), text.to_owned())
        };
        let online = ("sys/devices/system/cpu/online".to_owned(), "0".to_owned());
        let files = [online, index("level", "1"), index("type", "Data"), index("shared_cpu_list", "0")];
        assert_eq!(collect_from(&files).caches.reason(), Some("not_found"));
        let mut files = files.to_vec();
        files.push(index("size", "99999999999999999999K"));
        assert_eq!(collect_from(&files).last_level_cache_bytes.reason(), Some("not_found"));
    }
}
