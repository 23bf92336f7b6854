//! What CUDA software is here: the driver library and its devices, asked without opening one, and where the libraries
//! lie that come with a toolkit or with Python packages. Lists only; nothing but the driver library is loaded, and no
//! program is started but the `python3` that is asked for its packages (`python`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use cudarc::driver::result::{DriverError, device, init};
use cudarc::driver::sys;

use super::python;

/// The driver that came with CUDA 12.2, R535, is the oldest that we call into: cudarc panics on a missing function.
const OLDEST_CUDA_VERSION: i32 = 12_020;

/// Folders, separated by colons, that are searched before all others.
pub const SEARCH_VARIABLE: &str = "TOKMETER_CUDA_LIBS";

/// Why the driver or one of its answers is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    #[error("no CUDA driver on this machine (libcuda.so.1 not found)")]
    NoLibrary,
    #[error("the CUDA driver supports CUDA {0} only, and 12.2 (driver 535) is needed")]
    TooOld(String),
    #[error("the CUDA driver answers {0}")]
    Driver(String),
}

impl Unavailable {
    /// The reason code that stands in a record.
    pub fn reason(&self) -> String {
        match self {
            Unavailable::NoLibrary => "no_cuda_driver".to_owned(),
            Unavailable::TooOld(_) => "cuda_driver_too_old".to_owned(),
            Unavailable::Driver(code) => code.to_lowercase(),
        }
    }
}

impl From<DriverError> for Unavailable {
    fn from(error: DriverError) -> Self {
        Unavailable::Driver(format!("{:?}", error.0))
    }
}

/// A device as the driver describes it without a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The N of `cuda:N`.
    pub index: u32,
    pub name: Result<String, Unavailable>,
    /// `GPU-` and five groups of hexadecimal digits.
    pub uuid: Result<String, Unavailable>,
    pub memory_bytes: Result<u64, Unavailable>,
    /// Major and minor.
    pub compute_capability: Result<(i32, i32), Unavailable>,
}

/// Whether the device of this name is the stand-in driver of the tests, not hardware.
pub(super) fn is_emulated(name: &str) -> bool {
    name.contains("emulated")
}

/// Whether the device of this name is a part of a card (multi-instance GPU).
pub(super) fn is_slice(name: &str) -> bool {
    name.contains(" MIG ")
}

impl Device {
    /// The stand-in driver of the tests, which takes kernels as text.
    pub fn is_emulated(&self) -> bool {
        self.name.as_deref().is_ok_and(is_emulated)
    }

    /// A part of a card (multi-instance GPU).
    pub fn is_slice(&self) -> bool {
        self.name.as_deref().is_ok_and(is_slice)
    }

    /// Why the kernels cannot run on it; none when they can.
    pub fn unusable(&self) -> Option<String> {
        let capability = match &self.compute_capability {
            Ok(capability) => *capability,
            Err(error) => return Some(error.to_string()),
        };
        super::architecture(capability).err().map(|error| error.to_string())
    }
}

/// Whether the driver library can be loaded. cudarc panics in every other call when it cannot.
#[allow(unsafe_code)]
pub fn is_present() -> bool {
    // SAFETY: loads `libcuda`, whose initialisers run; the process would load the same library for any CUDA call, and
    // NVIDIA's driver library may be loaded from any thread at any time.
    unsafe { sys::is_culib_present() }
}

/// Newest CUDA version that the driver supports, `13.0`. Missing when the driver cannot be started either.
pub fn driver_version() -> Result<String, Unavailable> {
    start().map(dotted)
}

/// The same as CUDA encodes it: 1000 major + 10 minor.
pub(super) fn cuda_version() -> Result<i32, Unavailable> {
    start()
}

/// The devices in CUDA's order; `CUDA_VISIBLE_DEVICES` has been applied.
pub fn devices() -> Result<Vec<Device>, Unavailable> {
    let version = start()?;
    if version < OLDEST_CUDA_VERSION {
        return Err(Unavailable::TooOld(dotted(version)));
    }
    let count = device::get_count()?;
    (0..count).map(|ordinal| Ok(describe(ordinal, device::get(ordinal)?))).collect()
}

/// Starts the driver and returns its CUDA version as CUDA encodes it: 1000 major + 10 minor.
#[allow(unsafe_code)]
fn start() -> Result<i32, Unavailable> {
    if !is_present() {
        return Err(Unavailable::NoLibrary);
    }
    init()?;
    let mut version = 0;
    // SAFETY: the library is present, and `version` outlives the call, which writes one `int` to it.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}

#[allow(unsafe_code)]
pub(super) fn describe(ordinal: i32, device: sys::CUdevice) -> Device {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: `device` comes from `cuDeviceGet`.
    let attribute = |which| unsafe { device::get_attribute(device, which) };
    Device {
        index: ordinal.unsigned_abs(),
        name: device::get_name(device).map_err(Unavailable::from),
        uuid: device::get_uuid(device)
            .map(|uuid| format_uuid(&uuid.bytes.map(|c| c as u8)))
            .map_err(Unavailable::from),
        // SAFETY: `device` comes from `cuDeviceGet`.
        memory_bytes: unsafe { device::total_mem(device) }
            .map(|bytes| bytes as u64)
            .map_err(Unavailable::from),
        compute_capability: attribute(MAJOR)
            .and_then(|major| Ok((major, attribute(MINOR)?)))
            .map_err(Unavailable::from),
    }
}

fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn format_uuid(bytes: &[u8; 16]) -> String {
    let hex = |part: &[u8]| part.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let groups = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]];
    format!("GPU-{}", groups.map(hex).join("-"))
}

/// A library that the backend uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Library {
    /// File name up to its version.
    pub file: &'static str,
    pub purpose: &'static str,
    /// Where it comes from when it is missing.
    pub source: &'static str,
}

pub const LIBRARIES: [Library; 4] = [
    Library { file: "libcuda.so", purpose: "CUDA driver", source: "install the NVIDIA driver" },
    Library { file: "libnvidia-ml.so", purpose: "power and clocks", source: "install the NVIDIA driver" },
    Library { file: "libnvrtc.so", purpose: "kernel compiler", source: "pip install nvidia-cuda-nvrtc" },
    Library { file: "libcublasLt.so", purpose: "large matrix products", source: "pip install nvidia-cublas" },
];

/// A file of a library, and by which rule it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub library: &'static str,
    pub path: PathBuf,
    pub rule: &'static str,
}

/// Looks up a variable of the environment.
pub type Variable<'v> = &'v dyn Fn(&str) -> Option<OsString>;

/// All files of [`LIBRARIES`] in the places where they usually lie, the preferred first. Links to one file count once.
/// `root` is `/`. Starts no program.
pub fn search(root: &Path, variable: Variable<'_>) -> Vec<Found> {
    files(folders(root, variable))
}

/// The same, and last the packages of the `python3` on PATH, which is asked.
pub fn search_all(root: &Path, variable: Variable<'_>) -> Vec<Found> {
    let sites = python::sites(variable);
    let python = packages(&sites).map(|folder| ("python3", folder));
    files(folders(root, variable).into_iter().chain(python))
}

/// The files of `library`, the preferred first; `python3` is asked only where they lie nowhere else.
pub fn search_for(library: &str, root: &Path, variable: Variable<'_>) -> Vec<Found> {
    let of_library = |mut found: Vec<Found>| {
        found.retain(|file| file.library == library);
        found
    };
    let found = of_library(search(root, variable));
    if found.is_empty() { of_library(search_all(root, variable)) } else { found }
}

fn files(folders: impl IntoIterator<Item = (&'static str, PathBuf)>) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (rule, folder) in folders {
        for (library, path) in libraries_in(&folder) {
            let file = path.canonicalize().unwrap_or_else(|_| path.clone());
            if seen.insert((library, file)) {
                found.push(Found { library, path, rule });
            }
        }
    }
    found
}

fn folders(root: &Path, variable: Variable<'_>) -> Vec<(&'static str, PathBuf)> {
    let list = |rule: &'static str| {
        let value = variable(rule).unwrap_or_default();
        let folders: Vec<PathBuf> =
            std::env::split_paths(&value).filter(|path| !path.as_os_str().is_empty()).collect();
        folders.into_iter().map(move |folder| (rule, folder))
    };
    let toolkit = |rule: &'static str| list(rule).map(|(rule, folder)| (rule, folder.join("lib64")));
    let system = SYSTEM_FOLDERS.iter().map(|folder| ("system", root.join(folder)));
    let mut folders: Vec<(&'static str, PathBuf)> = list(SEARCH_VARIABLE).collect();
    folders.extend(toolkit("CUDA_HOME"));
    folders.extend(toolkit("CUDA_PATH"));
    folders.push(("/usr/local/cuda", root.join("usr/local/cuda/lib64")));
    let sites = site_packages(root, variable);
    folders.extend(packages(&sites).map(|folder| ("python packages", folder)));
    folders.extend(list("CONDA_PREFIX").map(|(rule, folder)| (rule, folder.join("lib"))));
    folders.extend(list("LD_LIBRARY_PATH"));
    folders.extend(system);
    folders
}

/// Where distributions, container runtimes, WSL and NixOS put the driver's libraries; below `/`.
const SYSTEM_FOLDERS: [&str; 7] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "usr/lib/wsl/lib",
    "run/opengl-driver/lib",
];

/// Where the packages that hold libraries keep them.
fn packages(sites: &[PathBuf]) -> impl Iterator<Item = PathBuf> {
    sites.iter().flat_map(|site| {
        let nvidia = children(&site.join("nvidia")).into_iter().map(|package| package.join("lib"));
        nvidia.chain([site.join("torch/lib")])
    })
}

/// Folders of Python packages of the active environment, the user and the system. Python itself is not started.
fn site_packages(root: &Path, variable: Variable<'_>) -> Vec<PathBuf> {
    let variables = [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX")];
    let mut prefixes: Vec<PathBuf> = variables.into_iter().flatten().map(PathBuf::from).collect();
    prefixes.extend(variable("HOME").map(|home| PathBuf::from(home).join(".local")));
    prefixes.extend([root.join("usr/local"), root.join("usr")]);
    let mut sites = Vec::new();
    for library in prefixes.iter().map(|prefix| prefix.join("lib")) {
        let is_python = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"python"))
        };
        for python in children(&library).into_iter().filter(is_python) {
            sites.extend([python.join("site-packages"), python.join("dist-packages")]);
        }
    }
    sites
}

fn libraries_in(folder: &Path) -> Vec<(&'static str, PathBuf)> {
    let mut files: Vec<(&'static str, PathBuf)> = children(folder)
        .into_iter()
        .filter_map(|path| Some((library_of(path.file_name()?.to_str()?)?, path)))
        .collect();
    files.retain(|(_, path)| path.is_file());
    files
}

/// `libnvrtc.so`, `libnvrtc.so.12` and `libnvrtc.so.12.4.127`, but not `libnvrtc-builtins.so`.
fn library_of(file_name: &str) -> Option<&'static str> {
    let is_file_of = |library: &&Library| {
        file_name
            .strip_prefix(library.file)
            .is_some_and(|version| version.split('.').skip(1).all(|part| part.parse::<u32>().is_ok()))
    };
    LIBRARIES.iter().find(is_file_of).map(|library| library.file)
}

/// Entries of a folder in the order of their names; none when it cannot be read.
fn children(folder: &Path) -> Vec<PathBuf> {
    let mut children: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    children.sort();
    children
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Path, path: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }

    fn names(root: &Path, found: &[Found]) -> Vec<(String, &'static str)> {
        let relative = |found: &Found| found.path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        found.iter().map(|found| (relative(found), found.rule)).collect()
    }

    #[test]
    fn libraries_are_found_in_the_order_of_preference() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for path in [
            "usr/lib/x86_64-linux-gnu/libcuda.so.1",
            "usr/local/cuda/lib64/libnvrtc.so.12",
            "usr/local/cuda/lib64/libnvrtc-builtins.so.12.4",
            "usr/local/cuda/lib64/libnvrtc.so.12.bak",
            "home/.local/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12",
            "venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
            "own/libnvrtc.so.13.1",
        ] {
            touch(root, path);
        }
        let variable = |name: &str| match name {
            SEARCH_VARIABLE => Some(root.join("own").into_os_string()),
            "VIRTUAL_ENV" => Some(root.join("venv").into_os_string()),
            "HOME" => Some(root.join("home").into_os_string()),
            _ => None,
        };
        let expected = [
            ("own/libnvrtc.so.13.1", SEARCH_VARIABLE),
            ("usr/local/cuda/lib64/libnvrtc.so.12", "/usr/local/cuda"),
            ("venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13", "python packages"),
            (
                "home/.local/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12",
                "python packages",
            ),
            ("usr/lib/x86_64-linux-gnu/libcuda.so.1", "system"),
        ];
        let found = search(root, &variable);
        assert_eq!(names(root, &found), expected.map(|(path, rule)| (path.to_owned(), rule)));
    }

    #[test]
    fn links_to_one_file_count_once_and_dangling_ones_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        touch(root, "usr/lib64/libcuda.so.580.95.05");
        std::os::unix::fs::symlink("libcuda.so.580.95.05", root.join("usr/lib64/libcuda.so.1")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("usr/lib64/libnvidia-ml.so.1")).unwrap();
        let found = search(root, &|_| None);
        assert_eq!(names(root, &found), [("usr/lib64/libcuda.so.1".to_owned(), "system")]);
    }

    #[test]
    fn empty_variables_and_absent_folders_find_nothing() {
        assert_eq!(search(Path::new("/nonexistent"), &|_| Some(OsString::new())), []);
    }

    #[test]
    fn the_python3_on_path_is_asked_last_and_only_for_what_lies_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        touch(root, "usr/lib64/libnvrtc.so.12");
        touch(root, "conda/site/nvidia/cu13/lib/libnvrtc.so.13");
        touch(root, "conda/site/torch/lib/libcublasLt.so.12");
        let site = root.join("conda/site");
        let program =
            python::tests::script(root, &format!("echo {}; echo asked >> {0}/asked", site.display()));
        let path = program.parent().unwrap().as_os_str().to_owned();
        let variable = |name: &str| (name == "PATH").then(|| path.clone());
        let is_asked = || site.join("asked").exists();
        let named = |found: Vec<Found>| names(root, &found);
        let system = || ("usr/lib64/libnvrtc.so.12".to_owned(), "system");
        assert_eq!(named(search(root, &variable)), [system()]);
        assert_eq!(named(search_for("libnvrtc.so", root, &variable)), [system()]);
        assert!(!is_asked(), "nothing was missing");
        let torch = || ("conda/site/torch/lib/libcublasLt.so.12".to_owned(), "python3");
        assert_eq!(named(search_for("libcublasLt.so", root, &variable)), [torch()]);
        assert!(is_asked());
        let own = ("conda/site/nvidia/cu13/lib/libnvrtc.so.13".to_owned(), "python3");
        assert_eq!(named(search_all(root, &variable)), [system(), own, torch()]);
        assert_eq!(named(search_for("libcuda.so", root, &variable)), []);
        assert_eq!(std::fs::read_to_string(site.join("asked")).unwrap(), "asked\n", "asked once");
    }

    #[test]
    fn a_device_is_named_the_way_the_drivers_own_tool_does() {
        let bytes = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(format_uuid(&bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!((dotted(13_000), dotted(12_020)), ("13.0".to_owned(), "12.2".to_owned()));
    }

    #[test]
    fn a_machine_without_the_driver_gets_a_sentence_and_no_panic() {
        match (is_present(), devices()) {
            (false, devices) => assert_eq!(devices, Err(Unavailable::NoLibrary)),
            // With a driver, any answer is right as long as there is one.
            (true, _) => assert!(driver_version().is_ok() || driver_version().is_err()),
        }
    }
}
