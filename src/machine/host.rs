//! The operating system, the chassis, what stands between this process and the hardware, and the load.

use super::Roots;
use super::files::{Reason, field, number, read};
use crate::record::machine::{Host, Load};

pub(super) fn collect(roots: &Roots) -> Host {
    let kernel = roots.proc.join("sys/kernel");
    let dmi = roots.sys.join("class/dmi/id");
    Host {
        hostname: read(kernel.join("hostname")).into(),
        os: std::env::consts::OS.to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
        kernel: read(kernel.join("osrelease")).into(),
        kernel_build: read(kernel.join("version")).into(),
        kernel_cmdline: read(roots.proc.join("cmdline")).into(),
        distro: distro(roots).into(),
        container: container(roots).into(),
        hypervisor: hypervisor(roots, signature().as_deref()).into(),
        board_vendor: read(dmi.join("sys_vendor")).into(),
        board_product: read(dmi.join("product_name"))
            .or_else(|reason| read(roots.sys.join("firmware/devicetree/base/model")).map_err(|_| reason))
            .into(),
        firmware_version: read(dmi.join("bios_version")).into(),
        boot_id: read(kernel.join("random/boot_id")).into(),
        uptime_s: first_word(roots, "uptime", 0).into(),
    }
}

pub(super) fn load(roots: &Roots) -> Load {
    Load {
        load_1m: first_word(roots, "loadavg", 0).into(),
        load_5m: first_word(roots, "loadavg", 1).into(),
        runnable: runnable(roots).into(),
    }
}

/// A finite number in a file of words.
fn first_word(roots: &Roots, file: &str, index: usize) -> Result<f64, Reason> {
    let text = read(roots.proc.join(file))?;
    let value = number::<f64>(text.split_whitespace().nth(index).ok_or("malformed")?)?;
    if value.is_finite() { Ok(value) } else { Err("malformed") }
}

/// The first half of `2/513` in `loadavg`.
fn runnable(roots: &Roots) -> Result<u32, Reason> {
    let text = read(roots.proc.join("loadavg"))?;
    let threads = text.split_whitespace().nth(3).and_then(|word| word.split_once('/'));
    number(threads.ok_or("malformed")?.0)
}

fn distro(roots: &Roots) -> Result<String, Reason> {
    let text = read(roots.root.join("etc/os-release"))
        .or_else(|reason| read(roots.root.join("usr/lib/os-release")).map_err(|_| reason))?;
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).ok_or("malformed")?;
    Ok(name.trim().trim_matches(['"', '\'']).to_owned())
}

/// Parts of the path of a control group or of a mount, and who puts them there. Kubernetes first: its pods are made by
/// one of the others.
const CONTAINER_WORDS: [(&str, &str); 9] = [
    ("kubepods", "kubernetes"),
    ("/kubelet/", "kubernetes"),
    ("libpod", "podman"),
    ("/containers/storage/", "podman"),
    ("docker-", "docker"),
    ("/docker/", "docker"),
    ("cri-containerd", "containerd"),
    ("lxc.payload", "lxc"),
    ("/lxc/", "lxc"),
];

/// Files that a container gets from whoever runs it; other mounts mention containers on a plain host too.
const GIVEN_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// The kernel's own evidence first, then marks in the file system: those stay behind when a container's files are
/// booted as a virtual machine.
fn container(roots: &Roots) -> Result<String, Reason> {
    let groups = read(roots.proc.join("self/cgroup")).unwrap_or_default();
    let mounts = read(roots.proc.join("self/mountinfo")).unwrap_or_default();
    let given =
        |line: &&str| line.split_whitespace().nth(4).is_some_and(|target| GIVEN_FILES.contains(&target));
    if let Some(name) = by_word(groups.lines()).or_else(|| by_word(mounts.lines().filter(given))) {
        return Ok(name.to_owned());
    }
    // In the first PID namespace, and only there, process 2 is the parent of the kernel's threads.
    let second = read(roots.proc.join("2/comm"));
    if second.as_deref() == Ok("kthreadd") {
        return Ok("none".to_owned());
    }
    if let Some(name) = container_by_mark(roots) {
        return Ok(name);
    }
    match second {
        Err("permission") => Err("permission"),
        _ => read(roots.proc.join("self/stat")).map(|_| "other".to_owned()),
    }
}

fn container_by_mark(roots: &Roots) -> Option<String> {
    if roots.root.join("run/.containerenv").exists() {
        return Some("podman".to_owned());
    }
    if roots.root.join(".dockerenv").exists() {
        return Some("docker".to_owned());
    }
    read(roots.root.join("run/systemd/container")).ok()
}

fn by_word<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    lines.find_map(|line| {
        CONTAINER_WORDS.iter().find(|(word, _)| line.contains(word)).map(|(_, container)| *container)
    })
}

/// Beginnings of the firmware's vendor and product, and the hypervisor that puts them there.
const HYPERVISOR_WORDS: [(&str, &str); 12] = [
    ("KVM", "kvm"),
    ("QEMU", "kvm"),
    ("Amazon EC2", "kvm"),
    ("Google", "kvm"),
    ("OpenStack", "kvm"),
    ("Alibaba Cloud", "kvm"),
    ("VMware", "vmware"),
    ("Microsoft Corporation Virtual", "hyperv"),
    ("Xen", "xen"),
    ("innotek", "virtualbox"),
    ("Parallels", "parallels"),
    ("Apple Virtualization", "apple"),
];

/// `signature` is what the processor calls its hypervisor: asked last, since a fixture tree cannot replace it.
fn hypervisor(roots: &Roots, signature: Option<&str>) -> Result<String, Reason> {
    let guest = cpu_says_guest(roots)?;
    if guest == Some(false) {
        return Ok("none".to_owned());
    }
    if let Ok(kind) = read(roots.sys.join("hypervisor/type")) {
        return Ok(kind);
    }
    if roots.sys.join("firmware/devicetree/base/hypervisor").exists() {
        let kind = read(roots.sys.join("firmware/devicetree/base/hypervisor/compatible"));
        return Ok(if kind.is_ok_and(|kind| kind.contains("kvm")) { "kvm" } else { "other" }.to_owned());
    }
    let vendor = read(roots.sys.join("class/dmi/id/sys_vendor"));
    let product = read(roots.sys.join("class/dmi/id/product_name")).unwrap_or_default();
    let known = vendor.as_ref().ok().and_then(|vendor| hypervisor_by_firmware(vendor, &product));
    match (known, guest) {
        (Some(kind), _) => Ok(kind.to_owned()),
        (None, Some(_)) => Ok(signature.map_or("other", by_signature).to_owned()),
        (None, None) => vendor.map(|_| "none".to_owned()),
    }
}

fn hypervisor_by_firmware(vendor: &str, product: &str) -> Option<&'static str> {
    // A cloud's bare-metal machines carry the cloud's name too.
    if product.contains(".metal") {
        return None;
    }
    let both = format!("{vendor} {product}");
    let starts = |word: &str| both.starts_with(word) || product.starts_with(word);
    HYPERVISOR_WORDS.iter().find(|(word, _)| starts(word)).map(|(_, kind)| *kind)
}

/// The twelve letters in CPUID leaf 0x4000_0000, which only a guest has.
#[cfg(target_arch = "x86_64")]
fn signature() -> Option<String> {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let letters = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    Some(String::from_utf8_lossy(&letters).trim_end_matches('\0').to_owned())
}

#[cfg(not(target_arch = "x86_64"))]
fn signature() -> Option<String> {
    None
}

fn by_signature(signature: &str) -> &'static str {
    match signature {
        "KVMKVMKVM" => "kvm",
        "TCGTCGTCGTCG" => "qemu",
        "Microsoft Hv" => "hyperv",
        "VMwareVMware" => "vmware",
        "XenVMMXenVMM" => "xen",
        "bhyve bhyve " => "bhyve",
        _ => "other",
    }
}

/// Whether the processor says that it is a guest's; `None` on processors that do not say.
fn cpu_says_guest(roots: &Roots) -> Result<Option<bool>, Reason> {
    let text = super::cpu::first_processor(roots)?;
    let Ok(flags) = field(&text, "flags") else { return Ok(None) };
    Ok(Some(flags.split_whitespace().any(|flag| flag == "hypervisor")))
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;
    use crate::record::Maybe;

    fn container_of(files: &[(&str, &str)]) -> Result<String, Reason> {
        let dir = tree(files);
        container(&Roots::under(dir.path()))
    }

    #[test]
    fn a_container_is_recognised_by_its_marks() {
        let stat = ("proc/self/stat", "1 (x) R");
        assert_eq!(container_of(&[stat, (".dockerenv", "")]).unwrap(), "docker");
        assert_eq!(container_of(&[stat, ("run/.containerenv", "")]).unwrap(), "podman");
        assert_eq!(
            container_of(&[stat, ("run/systemd/container", "systemd-nspawn")]).unwrap(),
            "systemd-nspawn"
        );
        let pod = ("proc/self/cgroup", "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope");
        assert_eq!(container_of(&[stat, pod, (".dockerenv", "")]).unwrap(), "kubernetes");
        let mount = "612 584 254:1 /var/lib/docker/containers/1/hosts /etc/hosts rw - ext4 /dev/vda1 rw";
        assert_eq!(container_of(&[stat, ("proc/self/mountinfo", mount)]).unwrap(), "docker");
    }

    #[test]
    fn a_host_that_runs_containers_is_not_one() {
        let mount = "612 584 254:1 / /var/lib/docker/overlay2/1 rw - overlay overlay rw";
        let host = [
            ("proc/2/comm", "kthreadd\n"),
            ("proc/self/mountinfo", mount),
            ("proc/self/cgroup", "0::/user.slice"),
        ];
        assert_eq!(container_of(&host).unwrap(), "none");
        // Files of an image that were booted as a virtual machine keep their mark.
        assert_eq!(container_of(&[("proc/2/comm", "kthreadd"), (".dockerenv", "")]).unwrap(), "none");
    }

    #[test]
    fn a_process_that_sees_no_kernel_threads_is_in_some_container() {
        assert_eq!(container_of(&[("proc/self/stat", "1 (x) R"), ("proc/2/comm", "bash")]).unwrap(), "other");
        assert_eq!(container_of(&[]), Err("not_found"));
    }

    fn hypervisor_of(files: &[(&str, &str)]) -> Result<String, Reason> {
        let dir = tree(files);
        hypervisor(&Roots::under(dir.path()), None)
    }

    #[test]
    fn a_hypervisor_is_named_by_the_firmware() {
        let guest = ("proc/cpuinfo", "processor : 0\nflags : fpu hypervisor\n");
        let vendor = |name| ("sys/class/dmi/id/sys_vendor", name);
        assert_eq!(hypervisor_of(&[guest, vendor("QEMU")]).unwrap(), "kvm");
        assert_eq!(hypervisor_of(&[guest, ("sys/hypervisor/type", "xen\n")]).unwrap(), "xen");
        assert_eq!(hypervisor_of(&[guest, vendor("Nobody")]).unwrap(), "other");
        assert_eq!(hypervisor_of(&[guest]).unwrap(), "other");
        let roots = tree(&[guest]);
        assert_eq!(hypervisor(&Roots::under(roots.path()), Some("KVMKVMKVM")).unwrap(), "kvm");
        assert_eq!(hypervisor(&Roots::under(roots.path()), Some("mist")).unwrap(), "other");
        let product = ("sys/class/dmi/id/product_name", "Virtual Machine");
        assert_eq!(hypervisor_of(&[guest, vendor("Microsoft Corporation"), product]).unwrap(), "hyperv");
    }

    #[test]
    fn bare_metal_has_no_hypervisor_whoever_sells_it() {
        let bare = ("proc/cpuinfo", "processor : 0\nflags : fpu sse\n");
        assert_eq!(hypervisor_of(&[bare, ("sys/class/dmi/id/sys_vendor", "Google")]).unwrap(), "none");
        let arm = ("proc/cpuinfo", "processor : 0\nFeatures : fp asimd\n");
        let vendor = ("sys/class/dmi/id/sys_vendor", "Amazon EC2");
        let metal = ("sys/class/dmi/id/product_name", "c7g.metal");
        assert_eq!(hypervisor_of(&[arm, vendor, metal]).unwrap(), "none");
        assert_eq!(
            hypervisor_of(&[arm, vendor, ("sys/class/dmi/id/product_name", "c7g.large")]).unwrap(),
            "kvm"
        );
        assert_eq!(hypervisor_of(&[arm]), Err("not_found"));
        let tree = ("sys/firmware/devicetree/base/hypervisor/compatible", "linux,kvm\0");
        assert_eq!(hypervisor_of(&[arm, tree]).unwrap(), "kvm");
    }

    #[test]
    fn the_load_is_read_to_the_last_field() {
        let dir = tree(&[("proc/loadavg", "1.50 0.25 0.10 3/513 4711\n")]);
        let load = load(&Roots::under(dir.path()));
        assert_eq!(load.load_1m, Maybe::Value(1.5));
        assert_eq!(load.load_5m, Maybe::Value(0.25));
        assert_eq!(load.runnable, Maybe::Value(3));
    }

    #[test]
    fn garbage_is_malformed_and_never_a_number() {
        let dir = tree(&[("proc/loadavg", "inf x"), ("proc/uptime", "NaN 5"), ("etc/os-release", "ID=x")]);
        let roots = Roots::under(dir.path());
        assert_eq!(load(&roots).load_1m.reason(), Some("malformed"));
        assert_eq!(load(&roots).load_5m.reason(), Some("malformed"));
        assert_eq!(load(&roots).runnable.reason(), Some("malformed"));
        let host = collect(&roots);
        assert_eq!(host.uptime_s.reason(), Some("malformed"));
        assert_eq!(host.distro.reason(), Some("malformed"));
        assert_eq!(host.boot_id.reason(), Some("not_found"));
    }
}
