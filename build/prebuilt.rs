//! Which compiled kernels a build embeds: all that `kernels/prebuilt/` holds, or none and a sentence that says what is
//! wrong with the folder. For each architecture in it every kernel must be there, compiled from the present source: a
//! binary that carries some kernels and compiles others when it runs would be slow without a word. Part of build.rs;
//! tests/prebuilt.rs includes it too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../src/backend/cuda/prebuilt.rs"]
mod form;

pub use form::{pack, unpack};

/// Digits of a key in a message; the file names have them all.
const SHOWN_DIGITS: usize = 12;

/// A compiled kernel to embed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub kernel: String,
    pub architecture: String,
    /// Of the source that it was compiled from.
    pub key: String,
    pub path: PathBuf,
}

impl Image {
    /// `<kernel>.<architecture>.<key>`, as the program asks for it.
    pub fn name(&self) -> String {
        form::image_name(&self.kernel, &self.architecture, &self.key)
    }

    /// Of a file named as scripts/prebuild_kernels.py names them.
    fn of(path: &Path) -> Option<Self> {
        let parts: Vec<&str> = path.file_name()?.to_str()?.split('.').collect();
        let [kernel, architecture, key, "cubin"] = parts[..] else { return None };
        let is_key = key.len() == 64 && key.bytes().all(|digit| digit.is_ascii_hexdigit());
        (architecture.starts_with("sm_") && is_key).then(|| Image {
            kernel: kernel.to_owned(),
            architecture: architecture.to_owned(),
            key: key.to_owned(),
            path: path.to_owned(),
        })
    }

    /// The machine code.
    ///
    /// # Errors
    /// When the file cannot be read, or is shorter than it says itself.
    pub fn read(&self) -> Result<Vec<u8>, String> {
        let bytes = fs::read(&self.path).map_err(|error| format!("{}: {error}", self.path.display()))?;
        if is_whole(&bytes) {
            return Ok(bytes);
        }
        let fault = format!("{} is cut off or no machine code", self.path.display());
        Err(format!("{fault}\n{}", again(&BTreeSet::from([self.architecture.as_str()]))))
    }
}

/// What is wrong with the folder.
enum Fault<'a> {
    Stray(&'a Path),
    Unknown(&'a Image),
    Stale { image: &'a Image, key: &'a str },
    Missing { kernel: &'a str, architecture: &'a str, key: &'a str },
}

impl fmt::Display for Fault<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |key: &str| key.chars().take(SHOWN_DIGITS).collect::<String>();
        match self {
            Fault::Stray(path) => {
                let path = path.display();
                write!(f, "{path} is no compiled kernel, expected <kernel>.<architecture>.<source key>.cubin")
            }
            Fault::Unknown(Image { kernel, path, .. }) => {
                write!(f, "{} is of a kernel that is gone: there is no {kernel}.cu", path.display())
            }
            Fault::Stale { image: Image { kernel, architecture, key: found, .. }, key } => write!(
                f,
                "{kernel} for {architecture} in kernels/prebuilt is of another source: {kernel}.cu or a header \
                 changed since, expected key {}…, found {}…",
                short(key),
                short(found)
            ),
            Fault::Missing { kernel, architecture, key } => write!(
                f,
                "{kernel} for {architecture} is not in kernels/prebuilt, which has other kernels for it: expected \
                 {kernel}.{architecture}.{}….cubin, found none",
                short(key)
            ),
        }
    }
}

/// The images in `kernels`/prebuilt, sorted; none when there is no such folder or it is empty.
///
/// # Errors
/// When the folder holds anything but every kernel of `kernels` as it is now, for the architectures it has.
pub fn images(kernels: &Path) -> Result<Vec<Image>, String> {
    let files = files(&kernels.join("prebuilt"))?;
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let keys = keys(kernels)?;
    let mut images: Vec<Image> = files.iter().filter_map(|path| Image::of(path)).collect();
    images.sort_by_key(Image::name);
    let strays = files.iter().filter(|path| Image::of(path).is_none()).map(|path| Fault::Stray(path));
    let faults: Vec<Fault<'_>> = strays.chain(disagreements(&keys, &images)).collect();
    let Some(first) = faults.first() else { return Ok(images) };
    let more = match faults.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    let hint = match first {
        Fault::Stray(_) => "hint: remove it".to_owned(),
        _ => again(&images.iter().map(|image| image.architecture.as_str()).collect()),
    };
    Err(format!("{first}{more}\n{hint}"))
}

fn again(architectures: &BTreeSet<&str>) -> String {
    let list = architectures.iter().copied().collect::<Vec<_>>().join(",");
    format!(
        "hint: scripts/prebuild_kernels.py --arch {list} compiles what changed; or remove kernels/prebuilt, and the \
         program compiles its kernels when it runs"
    )
}

/// Where images and the sources' `keys` do not agree.
fn disagreements<'a>(keys: &'a BTreeMap<String, String>, images: &'a [Image]) -> Vec<Fault<'a>> {
    let old = images.iter().filter_map(|image| match keys.get(&image.kernel) {
        None => Some(Fault::Unknown(image)),
        Some(key) => (*key != image.key).then_some(Fault::Stale { image, key }),
    });
    let has = |kernel: &str, architecture: &str| {
        images.iter().any(|image| image.kernel == kernel && image.architecture == architecture)
    };
    let architectures: BTreeSet<&str> = images.iter().map(|image| image.architecture.as_str()).collect();
    let wanted =
        architectures.iter().flat_map(|architecture| keys.iter().map(move |pair| (*architecture, pair)));
    let absent = wanted
        .filter(|(architecture, (kernel, _))| !has(kernel, architecture))
        .map(|(architecture, (kernel, key))| Fault::Missing { kernel, architecture, key });
    old.chain(absent).collect()
}

/// Kernel file without `.cu` → the key of its text.
fn keys(kernels: &Path) -> Result<BTreeMap<String, String>, String> {
    let read = |path: PathBuf| fs::read(&path).map_err(|error| format!("{}: {error}", path.display()));
    let mut headers = form::HEADERS.map(|_| Vec::new());
    for (text, name) in headers.iter_mut().zip(form::HEADERS) {
        *text = read(kernels.join(name))?;
    }
    let mut keys = BTreeMap::new();
    for path in files(kernels)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "cu")) {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        keys.insert(name, form::source_key(&read(path)?, &headers));
    }
    Ok(keys)
}

/// What is in `folder`, sorted; nothing when there is no such folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| format!("{}: {error}", folder.display()))?,
    };
    let paths: Result<Vec<PathBuf>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut paths = paths.map_err(|error| format!("{}: {error}", folder.display()))?;
    paths.sort();
    Ok(paths)
}

/// Whether an ELF file is as long as its header says: compiling or copying may have been stopped.
fn is_whole(bytes: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        let field = bytes.get(at..at + length)?;
        Some(field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    // Where the table of program headers or sections begins, the bytes of each, and how many there are.
    let end =
        |begin, size, count| number(begin, 8)?.checked_add(number(size, 2)?.checked_mul(number(count, 2)?)?);
    let (Some(segments), Some(sections)) = (end(32, 54, 56), end(40, 58, 60)) else { return false };
    bytes.starts_with(b"\x7fELF") && bytes.len() as u64 >= segments.max(sections)
}
