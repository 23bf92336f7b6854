//! Tells the program how it was built: commit, compiler, target, profile, features, versions of the libraries that
//! compute; a value that cannot be had is `missing:` and the reason. And hands it the kernels that were compiled
//! beforehand, which must be those of the present source: that alone fails a build.

// Printing is how a build script speaks to cargo.
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use prebuilt::Image;

#[path = "build/prebuilt.rs"]
mod prebuilt;

/// Tracked files that cannot reach the binary: changing them neither makes it dirty nor builds it again.
const NOT_BUILT: [&str; 2] = ["tests", "results"];

/// Libraries whose version may change a result.
const LIBRARIES: [&str; 6] = ["candle-core", "cudarc", "gemm", "half", "rayon", "tokenizers"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=Cargo.lock");
    let git = Git::find();
    tell("GIT_REVISION", git.as_ref().map_err(|reason| *reason).and_then(Git::revision));
    tell("GIT_DIRTY", git.as_ref().map_err(|reason| *reason).and_then(Git::dirty));
    if let Ok(git) = &git {
        git.watch();
    }
    tell("RUSTC", rustc().ok_or("no_rustc"));
    tell("TARGET", env::var("TARGET").map_err(|_| "not_set"));
    tell("PROFILE", env::var("PROFILE").map_err(|_| "not_set"));
    tell("FEATURES", Ok(features()));
    tell("TARGET_FEATURES", Ok(env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default()));
    tell("LIBRARIES", libraries());
    if let Err(error) = embed_kernels() {
        // Each line is a message of its own for cargo; any of them fails the build.
        error.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

/// Writes the table `PREBUILT` of what lies in `kernels/prebuilt/`, which is not tracked and may be empty.
fn embed_kernels() -> Result<(), String> {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut table = String::from("const PREBUILT: &[Prebuilt] = &[\n");
    for image in prebuilt::images(Path::new("kernels"))? {
        let packed = packed(&image, &out)?;
        let name = image.name();
        table.push_str(&format!("    Prebuilt {{ name: {name:?}, packed: include_bytes!({packed:?}) }},\n"));
    }
    table.push_str("];\n");
    write(&out.join("prebuilt.rs"), table.as_bytes())
}

/// The packed form of `image` in a file below `out`. What an earlier build packed is taken if it is still the same:
/// this script runs at every change of the source, and packing takes seconds.
fn packed(image: &Image, out: &Path) -> Result<PathBuf, String> {
    let code = image.read()?;
    let path = out.join(format!("{}.{}.packed", image.kernel, image.architecture));
    let is_same = std::fs::read(&path).is_ok_and(|before| prebuilt::unpack(&before).as_ref() == Some(&code));
    if !is_same {
        let packed =
            prebuilt::pack(&code).map_err(|error| format!("{} cannot be packed: {error}", image.name()))?;
        write(&path, &packed)?;
    }
    Ok(path)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

fn tell(name: &str, value: Result<String, &str>) {
    let value = value.unwrap_or_else(|reason| format!("missing:{reason}"));
    println!("cargo:rustc-env=TOKMETER_{name}={}", value.replace('\n', " "));
}

/// The repository that this package is tracked in.
struct Git;

impl Git {
    /// A copy unpacked inside somebody else's repository is not a checkout of it.
    fn find() -> Result<Git, &'static str> {
        let in_own_repository = git(&["ls-files", "--error-unmatch", "Cargo.toml"]).is_some();
        match (in_own_repository, Path::new(".git").exists()) {
            (true, _) => Ok(Git),
            (false, true) => Err("git_failed"),
            (false, false) => Err("not_a_git_checkout"),
        }
    }

    fn revision(&self) -> Result<String, &'static str> {
        git(&["rev-parse", "--verify", "HEAD"]).ok_or("no_commit")
    }

    /// Whether a tracked file that reaches the binary differs from the commit.
    fn dirty(&self) -> Result<String, &'static str> {
        let mut arguments =
            vec!["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude,glob)**/*.md"];
        let excluded = NOT_BUILT.map(|folder| format!(":(exclude){folder}"));
        arguments.extend(excluded.iter().map(String::as_str));
        let changed = git(&arguments).ok_or("git_failed")?;
        Ok((!changed.is_empty()).to_string())
    }

    /// Runs this script again when the commit, the index or a tracked file changes. A path that does not exist would
    /// run it on every build.
    fn watch(&self) {
        let mut names =
            vec!["HEAD".to_owned(), "logs/HEAD".to_owned(), "index".to_owned(), "packed-refs".to_owned()];
        names.extend(git(&["symbolic-ref", "-q", "HEAD"]));
        let in_git = names.iter().filter_map(|name| git(&["rev-parse", "--git-path", name]));
        let tracked = git(&["ls-files"]).unwrap_or_default();
        let built = |name: &&str| !NOT_BUILT.contains(name) && !name.ends_with(".md");
        let top: BTreeSet<&str> =
            tracked.lines().filter_map(|path| path.split('/').next()).filter(built).collect();
        for path in in_git.chain(top.into_iter().map(str::to_owned)).filter(|path| Path::new(path).exists()) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
}

/// The output of a git command that succeeds. Without optional locks: a look must not touch the index.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("--no-optional-locks").args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn rustc() -> Option<String> {
    let output = Command::new(env::var_os("RUSTC")?).arg("--version").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// `CARGO_FEATURE_SOME_NAME` → `some-name`, comma-separated.
fn features() -> String {
    let names: BTreeSet<String> = env::vars()
        .filter_map(|(name, _)| Some(name.strip_prefix("CARGO_FEATURE_")?.to_lowercase().replace('_', "-")))
        .collect();
    names.into_iter().collect::<Vec<_>>().join(",")
}

/// `candle-core=0.11.1,cudarc=0.19.10`, from the lock file's `name = "…"` lines and the `version = "…"` after each.
fn libraries() -> Result<String, &'static str> {
    let lock = std::fs::read_to_string("Cargo.lock").map_err(|_| "no_lock_file")?;
    let value =
        |line: &str, key: &str| Some(line.strip_prefix(key)?.trim_matches([' ', '=', '"']).to_owned());
    let lines: Vec<&str> = lock.lines().collect();
    let packages =
        lines.windows(2).filter_map(|pair| Some((value(pair[0], "name")?, value(pair[1], "version")?)));
    let wanted = packages.filter(|(name, _)| LIBRARIES.contains(&name.as_str()));
    Ok(wanted.map(|(name, version)| format!("{name}={version}")).collect::<Vec<_>>().join(","))
}
