//! From the kernel sources in this binary to an image that the opened device can load. In this order: a CUBIN that was
//! embedded when the binary was built, one from the cache on disk, one that NVRTC makes now. Where the driver's own
//! compiler is to be measured, PTX from the cache or from NVRTC instead.

use anyhow::{Context as _, bail};

use super::cache::{self, Cache};
use super::context::Properties;
use super::prebuilt::{self, HEADERS, OPTIONS};
use super::{nvrtc, preload};

/// One kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// File name without `.cu`.
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../../../kernels/", $name, ".cu")) }
    };
}

pub const EMBED: Source = source!("embed");
pub const NORM: Source = source!("norm");
pub const GEMM: Source = source!("gemm");
pub const ROPE: Source = source!("rope");
pub const ATTENTION: Source = source!("attention");
pub const SAMPLE: Source = source!("sample");
pub const SYNTHETIC: Source = source!("synthetic");
pub const SILU: Source = source!("silu");
pub const PEAKS: Source = source!("peaks");

/// All of them.
#[cfg(test)]
const SOURCES: [Source; 9] = [EMBED, NORM, GEMM, ROPE, ATTENTION, SAMPLE, SYNTHETIC, SILU, PEAKS];

/// The texts of [`HEADERS`].
const HEADER_TEXTS: [&str; HEADERS.len()] =
    [include_str!("../../../kernels/common.cuh"), include_str!("../../../kernels/ptx.cuh")];

/// A CUBIN from `kernels/prebuilt/`, packed by the build script.
struct Prebuilt {
    /// `<kernel>.<architecture>.<source key>`
    name: &'static str,
    packed: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/prebuilt.rs"));

/// How an image came to be, for the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Prebuilt,
    Cache,
    Compiled,
    /// The stand-in driver was compiled from the same sources and takes their text.
    Emulated,
}

impl Origin {
    /// As in records.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Prebuilt => "prebuilt",
            Origin::Cache => "cache",
            Origin::Compiled => "compiled",
            Origin::Emulated => "emulated",
        }
    }
}

/// What the driver is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Form {
    /// Machine code for the very device: the driver only loads it.
    #[default]
    Sass,
    /// Intermediate code, which the driver's compiler makes machine code from.
    Ptx,
}

impl Form {
    /// As in records.
    pub fn name(self) -> &'static str {
        match self {
            Form::Sass => "sass",
            Form::Ptx => "ptx",
        }
    }

    /// What the compiler is told to compile for.
    fn target(self, architecture: &str) -> String {
        match self {
            Form::Sass => architecture.to_owned(),
            Form::Ptx => architecture.replacen("sm_", "compute_", 1),
        }
    }

    fn cache(self) -> cache::Kind {
        match self {
            Form::Sass => cache::KERNELS,
            Form::Ptx => cache::INTERMEDIATE,
        }
    }
}

/// Architectures for which this binary carries its kernels compiled, oldest first: the build script refuses a part of
/// them.
pub fn embedded_architectures() -> Vec<&'static str> {
    let mut found: Vec<&str> = PREBUILT.iter().filter_map(|image| image.name.split('.').nth(1)).collect();
    found.sort_unstable_by_key(|name| (name.len(), *name));
    found.dedup();
    found
}

/// The architecture that kernels are compiled for, for this device alone: `sm_90a`.
///
/// # Errors
/// When the device is too old for the kernels.
pub fn architecture((major, minor): (i32, i32)) -> anyhow::Result<String> {
    // These have instructions that only they have.
    const SPECIFIC: [(i32, i32); 5] = [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)];
    anyhow::ensure!(major >= 8, "compute capability {major}.{minor} is too old, expected at least 8.0");
    let suffix = if SPECIFIC.contains(&(major, minor)) { "a" } else { "" };
    Ok(format!("sm_{major}{minor}{suffix}"))
}

/// Turns sources into images for one device. The compiler is only looked for when it is needed.
pub(super) struct Compiler {
    form: Form,
    architecture: String,
    is_emulated: bool,
    driver_cuda_version: i32,
    images: Option<Cache>,
    /// Version, once the compiler was found.
    nvrtc: Option<String>,
}

impl Compiler {
    /// # Errors
    /// When the device is too old for the kernels.
    pub(super) fn new(device: &Properties, form: Form) -> anyhow::Result<Self> {
        Ok(Compiler {
            form,
            architecture: architecture(device.compute_capability)?,
            is_emulated: device.is_emulated(),
            driver_cuda_version: device.driver_cuda_version,
            images: Cache::of_user(form.cache()),
            nvrtc: None,
        })
    }

    pub(super) fn architecture(&self) -> &str {
        &self.architecture
    }

    /// # Errors
    /// When there is no image and no compiler, or it refuses the source.
    pub(super) fn image(&mut self, source: Source) -> anyhow::Result<(Vec<u8>, Origin)> {
        if let Form::Sass = self.form
            && let Some(ready) = self.without_compiler(source)?
        {
            return Ok(ready);
        }
        let version = match (self.form, self.find_nvrtc()) {
            (Form::Ptx, Err(error)) => {
                bail!("intermediate code for the driver to compile (--jit ptx) is in no binary: {error:#}")
            }
            (_, version) => version?,
        };
        let target = self.form.target(&self.architecture);
        let key = cache_key(source, &target, &version);
        if let Some(image) = self.images.as_ref().and_then(|images| images.get(&key)) {
            return Ok((image, Origin::Cache));
        }
        let image =
            compile(source, self.form, &target).with_context(|| format!("NVRTC {version} for {target}"))?;
        if let Some(images) = &self.images {
            // A full or read-only disk costs the next run some seconds.
            let _ = images.put(&key, &image);
        }
        Ok((image, Origin::Compiled))
    }

    /// What the stand-in driver takes, or what this binary carries.
    fn without_compiler(&self, source: Source) -> anyhow::Result<Option<(Vec<u8>, Origin)>> {
        if self.is_emulated {
            return Ok(Some((source.text.as_bytes().to_vec(), Origin::Emulated)));
        }
        let Some(prebuilt) = prebuilt(source, &self.architecture) else { return Ok(None) };
        Ok(Some((prebuilt.image()?, Origin::Prebuilt)))
    }

    fn find_nvrtc(&mut self) -> anyhow::Result<String> {
        if let Some(version) = &self.nvrtc {
            return Ok(version.clone());
        }
        preload::nvrtc(self.driver_cuda_version)?;
        let version = nvrtc::version()?;
        self.nvrtc = Some(version.clone());
        Ok(version)
    }
}

/// # Errors
/// With the compiler's log. The compiler must be ready.
fn compile(source: Source, form: Form, target: &str) -> anyhow::Result<Vec<u8>> {
    let mut options = vec![format!("--gpu-architecture={target}")];
    options.extend(OPTIONS.map(str::to_owned));
    let headers: Vec<(&str, &str)> = HEADERS.into_iter().zip(HEADER_TEXTS).collect();
    nvrtc::compile(&format!("{}.cu", source.name), source.text, &headers, &options, form)
}

fn source_key(source: Source) -> String {
    prebuilt::source_key(source.text.as_bytes(), &HEADER_TEXTS)
}

fn cache_key(source: Source, architecture: &str, nvrtc_version: &str) -> String {
    prebuilt::digest([source_key(source).as_bytes(), architecture.as_bytes(), nvrtc_version.as_bytes()])
}

fn prebuilt(source: Source, architecture: &str) -> Option<&'static Prebuilt> {
    let name = prebuilt::image_name(source.name, architecture, &source_key(source));
    PREBUILT.iter().find(|image| image.name == name)
}

impl Prebuilt {
    /// # Errors
    /// When the binary is not as it was built.
    fn image(&self) -> anyhow::Result<Vec<u8>> {
        prebuilt::unpack(self.packed).with_context(|| {
            format!(
                "the compiled kernels in this binary are damaged: {} is not what was packed\nhint: copy or build the \
                 program again, and hold it against SHA256SUMS of its release",
                self.name
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the compiler is here; TOKMETER_CUDA_LIBS names its folder. Under TOKMETER_REQUIRE_ALL=1 it must be.
    fn has_compiler() -> bool {
        let found = preload::nvrtc(13_000);
        let required = std::env::var_os("TOKMETER_REQUIRE_ALL").is_some_and(|value| value == "1");
        assert!(!required || found.is_ok(), "waived: {found:?}");
        found.is_ok()
    }

    fn compiler_for(architecture: &str, cache: &std::path::Path, form: Form) -> Compiler {
        Compiler {
            form,
            architecture: architecture.to_owned(),
            is_emulated: false,
            driver_cuda_version: 13_000,
            images: Some(Cache::at(form.cache(), cache)),
            nvrtc: None,
        }
    }

    #[test]
    fn every_source_compiles_for_old_and_new_devices() {
        if !has_compiler() {
            return;
        }
        for architecture in ["sm_80", "sm_90a", "sm_120a"] {
            for source in SOURCES {
                let image = compile(source, Form::Sass, architecture).unwrap();
                let entry =
                    format!(".text.{}", FIRST_ENTRY[SOURCES.iter().position(|s| *s == source).unwrap()]);
                let has_entry = image.windows(entry.len()).any(|bytes| bytes == entry.as_bytes());
                assert!(image.starts_with(b"\x7fELF") && has_entry, "{} for {architecture}", source.name);
            }
        }
    }

    /// One kernel of each source.
    const FIRST_ENTRY: [&str; 9] = [
        "embed_bf16",
        "rms_norm_f16",
        "gemm_stream_bf16_silu",
        "rope_kv_bf16",
        "attention_decode_bf16_128",
        "sample_stage1",
        "synthetic_bf16",
        "silu_mul_bf16",
        "mma_peak_f16",
    ];

    /// An image that compresses as machine code does.
    const MADE_UP: &[u8] = b"\x7fELF, and the same word, the same word, the same word again";

    #[test]
    fn a_damaged_image_is_an_error_that_says_so() {
        let packed = prebuilt::pack(MADE_UP).unwrap();
        assert_eq!(prebuilt::unpack(&packed).as_deref(), Some(MADE_UP));
        for length in 0..packed.len() {
            assert_eq!(prebuilt::unpack(&packed[..length]), None, "cut to {length} bytes");
        }
        for bit in 0..packed.len() * 8 {
            let mut damaged = packed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A bit of the padding after the stream's end changes nothing.
            let image = prebuilt::unpack(&damaged);
            assert!(image.is_none() || image.as_deref() == Some(MADE_UP), "bit {bit} flipped");
        }
        let cut = Box::leak(packed[..packed.len() - 1].to_vec().into_boxed_slice());
        let image = Prebuilt { name: "gemm.sm_90a.0", packed: cut };
        let error = image.image().unwrap_err().to_string();
        assert!(error.contains("damaged: gemm.sm_90a.0 is not") && error.contains("\nhint: "), "{error}");
    }

    #[test]
    fn the_script_that_compiles_beforehand_gives_the_names_that_are_looked_for() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/prebuild_kernels.py");
        let run = std::process::Command::new("python3")
            .args([script, "--names", "--arch", "sm_80,sm_120a"])
            .output();
        let output = run.expect("python3, which the tests need");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let names = String::from_utf8(output.stdout).unwrap();
        assert_eq!(names.lines().count(), SOURCES.len() * 2, "other kernels than the program's\n{names}");
        for (source, architecture) in
            SOURCES.iter().flat_map(|source| [(source, "sm_80"), (source, "sm_120a")])
        {
            let name = prebuilt::image_name(source.name, architecture, &source_key(*source)) + ".cubin";
            assert!(names.lines().any(|line| line == name), "{name} is not among\n{names}");
        }
    }

    #[test]
    fn what_is_embedded_is_found_without_a_compiler() {
        let dir = tempfile::tempdir().unwrap();
        for architecture in embedded_architectures() {
            let mut compiler = compiler_for(architecture, dir.path(), Form::Sass);
            for source in SOURCES {
                let (image, origin) = compiler.image(source).unwrap();
                assert!(image.starts_with(b"\x7fELF") && origin == Origin::Prebuilt, "{}", source.name);
            }
            assert_eq!(compiler.nvrtc, None);
        }
        assert!(!embedded_architectures().contains(&"sm_10"));
    }

    #[test]
    fn each_device_gets_its_own_architecture() {
        let named = |capability| architecture(capability).unwrap();
        assert_eq!(
            [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)].map(named),
            ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"]
        );
        assert_eq!(named((13, 0)), "sm_130");
        let error = architecture((7, 5)).unwrap_err().to_string();
        assert_eq!(error, "compute capability 7.5 is too old, expected at least 8.0");
    }

    #[test]
    fn sources_compile_once_and_a_broken_cache_entry_is_made_again() {
        if !has_compiler() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut compiler = compiler_for("sm_90a", dir.path(), Form::Sass);
        // Not one of ours: those may be embedded.
        let own = Source {
            name: "own",
            text: "#include \"common.cuh\"\nextern \"C\" __global__ void own(float* x) { *x = 1; }",
        };
        let (image, origin) = compiler.image(own).unwrap();
        assert_eq!((&image[..4], origin), (&b"\x7fELF"[..], Origin::Compiled));
        assert_eq!(compiler.image(own).unwrap(), (image.clone(), Origin::Cache));
        let entry = std::fs::read_dir(dir.path().join("kernels")).unwrap().next().unwrap().unwrap().path();
        std::fs::write(&entry, "broken").unwrap();
        assert_eq!(compiler.image(own).unwrap().1, Origin::Compiled);
        assert_eq!(compiler.image(own).unwrap().1, Origin::Cache);
        let wrong = Source { name: "wrong", text: "__global__ void f() { undeclared(); }" };
        let error = format!("{:#}", compiler.image(wrong).unwrap_err());
        assert!(
            error.contains("compiling wrong.cu: ") && error.contains("\"undeclared\" is undefined"),
            "{error}"
        );
        compiler.architecture = "sm_10".to_owned();
        let error = format!("{:#}", compiler.image(own).unwrap_err());
        assert!(
            error.contains("for sm_10") && error.contains("\nhint: this compiler does not know"),
            "{error}"
        );
    }

    #[test]
    fn intermediate_code_is_made_for_the_virtual_architecture_and_kept_apart() {
        if !has_compiler() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for architecture in ["sm_80", "sm_90a", "sm_120a"] {
            let mut compiler = compiler_for(architecture, dir.path(), Form::Ptx);
            // What is embedded is machine code and must not be taken.
            let (image, origin) = compiler.image(EMBED).unwrap();
            let text = std::str::from_utf8(&image).unwrap();
            assert_eq!(origin, Origin::Compiled);
            assert!(text.contains(".visible .entry embed_bf16("), "{architecture}");
            assert!(text.contains(&format!(".target {architecture}")), "{architecture}");
            assert_eq!(compiler.image(EMBED).unwrap(), (image, Origin::Cache));
        }
        let files =
            || std::fs::read_dir(dir.path().join("kernels")).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(files().count(), 3);
        assert!(files().all(|path| path.extension().is_some_and(|extension| extension == "ptx")));
    }

    #[test]
    fn the_cache_key_follows_everything_that_the_image_depends_on() {
        let (source, other) = (Source { name: "a", text: "x" }, Source { name: "a", text: "y" });
        let key = cache_key(source, "sm_90a", "13.0");
        assert_eq!(key, cache_key(source, "sm_90a", "13.0"));
        for changed in [
            cache_key(other, "sm_90a", "13.0"),
            cache_key(source, "sm_90", "13.0"),
            cache_key(source, "sm_90a", "13.1"),
        ] {
            assert_ne!(key, changed);
        }
    }
}
