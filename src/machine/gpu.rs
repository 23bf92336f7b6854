//! The GPUs and their driver, as far as both are known without computing on a device.

use super::Roots;
use super::files::{Reason, read, read_start};
use crate::backend::cuda::library::{Device, Unavailable};
use crate::meter::nvml::Library;
use crate::record::Maybe;
use crate::record::environment::{GpuSetup, MappedDriver};
use crate::record::machine::{Gpu, GpuDriver};

/// Maps of a process with many libraries.
const MAX_MAPS_BYTES: u64 = 16 << 20;

/// The management library, or the reason code why there is none.
pub(super) type Nvml<'a> = Result<&'a Library, String>;

/// `cuda_version` is what the driver library answered.
pub(super) fn driver(roots: &Roots, cuda_version: Result<String, Unavailable>, nvml: Nvml<'_>) -> GpuDriver {
    let text = read(roots.proc.join("driver/nvidia/version"));
    GpuDriver {
        version: text.clone().and_then(|text| version(&text)).into(),
        kernel_module: text.map(|text| kernel_module(&text).to_owned()).into(),
        cuda_version: known(cuda_version),
        branch: nvml.clone().and_then(Library::driver_branch).into(),
        nvml_version: nvml.and_then(Library::version).into(),
        library: mapped_driver(roots).into(),
    }
}

pub(super) fn devices(devices: Vec<Device>, nvml: Nvml<'_>) -> Vec<Gpu> {
    let gpu = |device: Device| Gpu {
        index: device.index,
        setup: setup(&device, nvml.clone()).into(),
        name: known(device.name),
        uuid: known(device.uuid),
        memory_bytes: known(device.memory_bytes),
        compute_capability: known(device.compute_capability).map(|(major, minor)| format!("{major}.{minor}")),
    };
    devices.into_iter().map(gpu).collect()
}

/// Found by its UUID, because NVML counts devices in another order.
fn setup(device: &Device, nvml: Nvml<'_>) -> Result<GpuSetup, String> {
    let uuid = device.uuid.as_ref().map_err(Unavailable::reason)?;
    Ok(nvml?.described(uuid)?.setup())
}

/// The file of `libcuda` that this process has mapped, with its links followed. A forward-compatibility package lies in
/// a folder of its own and is not of the kernel module's version.
fn mapped_driver(roots: &Roots) -> Result<MappedDriver, Reason> {
    let maps = read_start(roots.proc.join("self/maps"), MAX_MAPS_BYTES)?;
    // Address, rights, offset, device and number stand before the path.
    let path = |line: &str| line.find('/').map(|start| line[start..].to_owned());
    let is_driver =
        |path: &String| path.rsplit('/').next().is_some_and(|name| name.starts_with("libcuda.so"));
    let path = maps.lines().filter_map(path).find(is_driver).ok_or("no_cuda_driver")?;
    let version = path.rsplit("libcuda.so.").next().filter(|version| version.contains('.'));
    let is_number = |version: &&str| version.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let version = version.filter(is_number).map(str::to_owned).ok_or("no_version_in_name").into();
    Ok(MappedDriver { path, version })
}

fn known<T>(value: Result<T, Unavailable>) -> Maybe<T> {
    value.map_err(|unavailable| unavailable.reason()).into()
}

/// The first dotted number of a line such as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue …`.
fn version(text: &str) -> Result<String, Reason> {
    let line = text.lines().find(|line| line.starts_with("NVRM version")).ok_or("malformed")?;
    let dotted = |word: &&str| {
        word.contains('.')
            && word.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    };
    line.split_whitespace().find(dotted).map(str::to_owned).ok_or("malformed")
}

fn kernel_module(text: &str) -> &'static str {
    if text.contains("Open Kernel Module") { "open" } else { "proprietary" }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;

    fn driver_of(text: &str) -> GpuDriver {
        let dir = tree(&[("proc/driver/nvidia/version", text)]);
        driver(&Roots::under(dir.path()), Ok("13.0".to_owned()), Err("no_nvml".to_owned()))
    }

    #[test]
    fn both_kernel_modules_are_read() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs@host)\n\
            GCC version:  gcc version 12.3.0\n";
        let expected = GpuDriver {
            version: Maybe::Value("580.95.05".to_owned()),
            kernel_module: Maybe::Value("open".to_owned()),
            cuda_version: Maybe::Value("13.0".to_owned()),
            branch: Maybe::missing("no_nvml"),
            nvml_version: Maybe::missing("no_nvml"),
            library: Maybe::missing("not_found"),
        };
        assert_eq!(driver_of(open), expected);
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n";
        assert_eq!(driver_of(closed).version, Maybe::Value("535.104.05".to_owned()));
        assert_eq!(driver_of(closed).kernel_module, Maybe::Value("proprietary".to_owned()));
    }

    #[test]
    fn a_machine_without_the_driver_says_so() {
        let driver =
            driver(&Roots::under("/nonexistent"), Err(Unavailable::NoLibrary), Err("no_nvml".to_owned()));
        assert_eq!(driver.version.reason(), Some("not_found"));
        assert_eq!(driver.cuda_version.reason(), Some("no_cuda_driver"));
        assert_eq!(driver_of("hello").version.reason(), Some("malformed"));
    }

    #[test]
    fn what_a_device_does_not_answer_is_missing_and_the_rest_is_kept() {
        let failed = || Unavailable::Driver("CUDA_ERROR_NOT_SUPPORTED".to_owned());
        let device = Device {
            index: 1,
            name: Ok("NVIDIA H200".to_owned()),
            uuid: Err(failed()),
            memory_bytes: Ok(5),
            compute_capability: Ok((9, 0)),
        };
        let gpus = devices(vec![device], Err("no_nvml".to_owned()));
        assert_eq!(gpus[0].uuid.reason(), Some("cuda_error_not_supported"));
        assert_eq!(gpus[0].compute_capability, Maybe::Value("9.0".to_owned()));
        assert_eq!(gpus[0].setup.reason(), Some("cuda_error_not_supported"));
    }

    #[test]
    fn the_library_that_is_mapped_is_named_with_its_own_version() {
        let library = |name: &str| {
            let maps = format!(
                "7f00-7f01 r--p 00000000 08:01 11 /usr/lib/libc.so.6\n\
                 7f02-7f03 r-xp 00000000 08:01 12 /usr/lib/{name}\n7f04-7f05 rw-p 00000000 00:00 0 [heap]\n"
            );
            let dir = tree(&[("proc/self/maps", &maps)]);
            mapped_driver(&Roots::under(dir.path()))
        };
        let found = library("libcuda.so.580.95.05").unwrap();
        assert_eq!(found.path, "/usr/lib/libcuda.so.580.95.05");
        assert_eq!(found.version, Maybe::Value("580.95.05".to_owned()));
        assert_eq!(library("libcuda.so.1").unwrap().version.reason(), Some("no_version_in_name"));
        assert_eq!(library("libcudart.so.13.0.1"), Err("no_cuda_driver"));
        assert_eq!(
            library("libcuda.so.545.1 (deleted)").unwrap().version.reason(),
            Some("no_version_in_name")
        );
    }
}
