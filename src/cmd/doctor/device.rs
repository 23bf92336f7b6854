//! Findings about the devices, the CUDA driver and the libraries that kernels need.

use super::{Asked, Section, Status};
use crate::backend::cuda;
use crate::backend::cuda::library::{Device, Found, LIBRARIES, SEARCH_VARIABLE, Unavailable};
use crate::record::machine::Machine;
use crate::units::format_bytes;

/// The devices, and whether the one that was asked for can run.
pub(super) fn look(
    asked: Asked,
    machine: &Machine,
    devices: &Result<Vec<Device>, Unavailable>,
    libraries: &[Found],
) -> (Section, bool) {
    let mut section = Section::new("devices");
    let usable = devices.iter().flatten().find(|device| device.unusable().is_none());
    let chosen = |is_chosen: bool| if asked == Asked::Auto && is_chosen { " (auto chooses it)" } else { "" };
    section.ok(format!("cpu{}", chosen(usable.is_none())), "can run");
    match devices {
        Ok(devices) if devices.is_empty() => {
            section.missing("cuda", "the driver shows no device", no_device_remedy())
        }
        Ok(devices) => devices.iter().for_each(|device| {
            let is_chosen = usable.is_some_and(|usable| usable.index == device.index);
            present(&mut section, device, chosen(is_chosen));
        }),
        Err(error) => {
            section.missing("cuda", error.to_string(), Some(&driver_remedy(error, machine, libraries)))
        }
    }
    driver(&mut section, machine);
    let Asked::Cuda(index) = asked else { return (section, true) };
    let what = format!("asked: cuda:{index}");
    let asked = devices.iter().flatten().find(|device| device.index == index);
    if let Some(refusal) = refusal(index, devices) {
        section.missing(what, refusal, Some("use --device cpu"));
    } else if asked.is_some_and(|device| needs_compiler(device, libraries)) {
        let remedy = format!(
            "pip install nvidia-cuda-nvrtc, or name its folder in {SEARCH_VARIABLE}, or use a binary built after \
             scripts/prebuild_kernels.py"
        );
        section.missing(what, "the kernel compiler libnvrtc.so is missing", Some(&remedy));
    } else {
        return (section, true);
    }
    (section, false)
}

/// Kernels are compiled for the very device, unless they were when this binary was built; the stand-in driver takes
/// their text.
fn needs_compiler(device: &Device, libraries: &[Found]) -> bool {
    let architecture = device.compute_capability.as_ref().ok().and_then(|c| cuda::architecture(*c).ok());
    let is_embedded = architecture.is_some_and(|name| cuda::embedded_architectures().contains(&&*name));
    let is_here = libraries.iter().any(|file| file.library == "libnvrtc.so");
    !(device.is_emulated() || is_embedded || is_here)
}

/// Where each library was found first.
pub(super) fn libraries(found: &[Found]) -> Section {
    let mut section = Section::new("libraries");
    section.ok(
        "kernels in this binary",
        match &cuda::embedded_architectures()[..] {
            [] => "none: libnvrtc.so compiles them for the device at its first run".to_owned(),
            some => format!("compiled for {}", some.join(", ")),
        },
    );
    for library in &LIBRARIES {
        let what = format!("{} ({})", library.file, library.purpose);
        let files: Vec<&Found> = found.iter().filter(|file| file.library == library.file).collect();
        let Some(first) = files.first() else {
            let remedy = format!("{}, or name its folder in {SEARCH_VARIABLE}", library.source);
            section.missing(what, "not found", Some(&remedy));
            continue;
        };
        let more = match files.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        section.ok(what, format!("{} (by {}{more})", first.path.display(), first.rule));
    }
    section
}

fn present(section: &mut Section, device: &Device, chosen: &str) {
    let name = text(&device.name, String::clone);
    let memory = text(&device.memory_bytes, |bytes| format_bytes(*bytes));
    let capability = text(&device.compute_capability, |(major, minor)| format!("{major}.{minor}"));
    let (status, verdict) = match device.unusable() {
        None => (Status::Ok, "can run".to_owned()),
        Some(reason) => (Status::Warn, format!("cannot run: {reason}")),
    };
    let slice = if device.is_slice() { " (a slice of a card)" } else { "" };
    let value = format!("{name}{slice}, {memory}, compute capability {capability}: {verdict}");
    section.add(status, format!("cuda:{}{chosen}", device.index), value, None);
}

fn text<T>(value: &Result<T, Unavailable>, print: impl FnOnce(&T) -> String) -> String {
    value.as_ref().map_or_else(|error| error.to_string(), print)
}

fn driver(section: &mut Section, machine: &Machine) {
    let driver = &machine.gpu_driver;
    if let (Some(version), Some(module)) = (driver.version.value(), driver.kernel_module.value()) {
        section.ok("NVIDIA kernel module", format!("{version} ({module})"));
    }
    if let Some(version) = driver.cuda_version.value() {
        section.ok("CUDA driver", format!("up to CUDA {version}"));
    }
}

fn refusal(index: u32, devices: &Result<Vec<Device>, Unavailable>) -> Option<String> {
    match devices {
        Ok(found) => match found.iter().find(|device| device.index == index) {
            Some(device) => device.unusable(),
            None => Some(format!("no such device: the driver shows {}", found.len())),
        },
        Err(error) => Some(error.to_string()),
    }
}

fn no_device_remedy() -> Option<&'static str> {
    Some("look at CUDA_VISIBLE_DEVICES, and at what the container was given")
}

fn driver_remedy(error: &Unavailable, machine: &Machine, libraries: &[Found]) -> String {
    let library = libraries.iter().find(|file| file.library == "libcuda.so");
    match (error, library) {
        (Unavailable::NoLibrary, Some(file)) => {
            let folder = file.path.parent().unwrap_or(&file.path);
            format!("the loader does not look where it is: export LD_LIBRARY_PATH={}", folder.display())
        }
        (Unavailable::NoLibrary, None) if machine.gpu_driver.version.value().is_some() => {
            "the kernel module is loaded, its library is not here: start the container with --gpus all".to_owned()
        }
        (Unavailable::NoLibrary | Unavailable::TooOld(_), _) => "install NVIDIA driver 535 or newer".to_owned(),
        (Unavailable::Driver(_), _) => {
            "look at `dmesg | grep NVRM`, at the permissions of /dev/nvidia*, and at what the container was given"
                .to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Roots;
    use crate::machine::tests::described;
    use crate::record::Maybe;

    fn h200() -> Device {
        Device {
            index: 0,
            name: Ok("NVIDIA H200".to_owned()),
            uuid: Ok("GPU-0".to_owned()),
            memory_bytes: Ok(141 << 30),
            compute_capability: Ok((9, 0)),
        }
    }

    fn text_of(
        asked: Asked,
        devices: &Result<Vec<Device>, Unavailable>,
        libraries: &[Found],
    ) -> (String, bool) {
        let machine = described(&Roots::under("/nonexistent"));
        let (section, can_run) = look(asked, &machine, devices, libraries);
        let line = |finding: &super::super::Finding| {
            format!("{}: {} / {}\n", finding.what, finding.value, finding.remedy.as_deref().unwrap_or("-"))
        };
        (section.findings.iter().map(line).collect(), can_run)
    }

    #[test]
    fn auto_chooses_the_first_device_that_can_run() {
        let (text, can_run) = text_of(Asked::Auto, &Ok(vec![h200()]), &[]);
        assert!(can_run && text.contains("cpu: can run"), "{text}");
        let line = "cuda:0 (auto chooses it): NVIDIA H200, 141 GiB, compute capability 9.0: can run";
        assert!(text.contains(line), "{text}");
        let old = Device { compute_capability: Ok((7, 5)), ..h200() };
        let (text, can_run) = text_of(Asked::Auto, &Ok(vec![old]), &[]);
        assert!(can_run && text.contains("cpu (auto chooses it): can run"), "{text}");
        assert!(text.contains("cannot run: compute capability 7.5 is too old"), "{text}");
    }

    #[test]
    fn a_gpu_that_was_asked_for_runs_or_says_why_not() {
        let compiler = Found { library: "libnvrtc.so", path: "/lib/libnvrtc.so.13".into(), rule: "system" };
        let (text, can_run) = text_of(Asked::Cuda(0), &Ok(vec![h200()]), &[compiler]);
        assert!(can_run && !text.contains("asked"), "{text}");
        if !cuda::embedded_architectures().contains(&"sm_90a") {
            let (text, can_run) = text_of(Asked::Cuda(0), &Ok(vec![h200()]), &[]);
            assert!(!can_run && text.contains("asked: cuda:0: the kernel compiler"), "{text}");
        }
        let (text, can_run) = text_of(Asked::Cuda(4), &Ok(vec![h200()]), &[]);
        assert!(!can_run && text.contains("asked: cuda:4: no such device: the driver shows 1"), "{text}");
        let (text, can_run) = text_of(Asked::Cuda(0), &Err(Unavailable::NoLibrary), &[]);
        assert!(!can_run && text.contains("asked: cuda:0: no CUDA driver on this machine"), "{text}");
    }

    #[test]
    fn the_remedy_fits_what_is_missing() {
        let found = Found { library: "libcuda.so", path: "/opt/lib/libcuda.so.1".into(), rule: "system" };
        let (text, _) = text_of(Asked::Auto, &Err(Unavailable::NoLibrary), &[found]);
        assert!(text.contains("export LD_LIBRARY_PATH=/opt/lib\n"), "{text}");
        let (text, _) = text_of(Asked::Auto, &Err(Unavailable::TooOld("11.4".to_owned())), &[]);
        assert!(
            text.contains("supports CUDA 11.4 only") && text.contains("install NVIDIA driver 535"),
            "{text}"
        );
        let (text, _) =
            text_of(Asked::Auto, &Err(Unavailable::Driver("CUDA_ERROR_NO_DEVICE".to_owned())), &[]);
        assert!(text.contains("answers CUDA_ERROR_NO_DEVICE") && text.contains("dmesg"), "{text}");
        let mut machine = described(&Roots::under("/nonexistent"));
        machine.gpu_driver.version = Maybe::Value("580.95.05".to_owned());
        assert!(driver_remedy(&Unavailable::NoLibrary, &machine, &[]).contains("--gpus all"));
    }

    #[test]
    fn the_preferred_file_of_each_library_is_shown() {
        let file = |path: &str| Found { library: "libnvrtc.so", path: path.into(), rule: "python packages" };
        let section = libraries(&[file("/a/libnvrtc.so.13"), file("/b/libnvrtc.so.12")]);
        let nvrtc = section.findings.iter().find(|finding| finding.what.starts_with("libnvrtc.so")).unwrap();
        assert_eq!(nvrtc.value, "/a/libnvrtc.so.13 (by python packages, and 1 more)");
        assert_eq!(section.findings.iter().filter(|finding| finding.status == Status::Missing).count(), 3);
    }
}
