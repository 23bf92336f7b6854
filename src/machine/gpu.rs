//! The GPUs and their driver, as far as both are known without opening a device.

use super::Roots;
use super::files::{Reason, read};
use crate::backend::cuda::library::{Device, Unavailable};
use crate::record::Maybe;
use crate::record::machine::{Gpu, GpuDriver};

/// `cuda_version` is what the driver library answered.
pub(super) fn driver(roots: &Roots, cuda_version: Result<String, Unavailable>) -> GpuDriver {
    let text = read(roots.proc.join("driver/nvidia/version"));
    GpuDriver {
        version: text.clone().and_then(|text| version(&text)).into(),
        kernel_module: text.map(|text| kernel_module(&text).to_owned()).into(),
        cuda_version: known(cuda_version),
    }
}

pub(super) fn devices(devices: Vec<Device>) -> Vec<Gpu> {
    let gpu = |device: Device| Gpu {
        index: device.index,
        name: known(device.name),
        uuid: known(device.uuid),
        memory_bytes: known(device.memory_bytes),
        compute_capability: known(device.compute_capability).map(|(major, minor)| format!("{major}.{minor}")),
    };
    devices.into_iter().map(gpu).collect()
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
        driver(&Roots::under(dir.path()), Ok("13.0".to_owned()))
    }

    #[test]
    fn both_kernel_modules_are_read() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs@host)\n\
            GCC version:  gcc version 12.3.0\n";
        let expected = GpuDriver {
            version: Maybe::Value("580.95.05".to_owned()),
            kernel_module: Maybe::Value("open".to_owned()),
            cuda_version: Maybe::Value("13.0".to_owned()),
        };
        assert_eq!(driver_of(open), expected);
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n";
        assert_eq!(driver_of(closed).version, Maybe::Value("535.104.05".to_owned()));
        assert_eq!(driver_of(closed).kernel_module, Maybe::Value("proprietary".to_owned()));
    }

    #[test]
    fn a_machine_without_the_driver_says_so() {
        let driver = driver(&Roots::under("/nonexistent"), Err(Unavailable::NoLibrary));
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
        let gpus = devices(vec![device]);
        assert_eq!(gpus[0].uuid.reason(), Some("cuda_error_not_supported"));
        assert_eq!(gpus[0].compute_capability, Maybe::Value("9.0".to_owned()));
    }
}
