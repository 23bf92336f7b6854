//! What a release says of itself beside the program: the licences of what is in it, and the glibc that it needs.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use tempfile::tempdir;

use common::waived;
use program::BINARY;

/// A package of a made-up `cargo`: its expression and the files beside its manifest.
struct Package<'a> {
    expression: Option<&'a str>,
    files: &'a [(&'a str, &'a str)],
}

/// What the script writes, or its message; none without python3.
fn licences(cargo: Option<&Path>, folder: &Path) -> Option<Result<String, String>> {
    if Command::new("python3").arg("--version").output().is_err() {
        waived("python3 is missing, which collects the licences");
        return None;
    }
    let out = folder.join("licences.txt");
    let mut command = Command::new("python3");
    command.args(["scripts/third_party_licences.py", "--offline", "--target"]);
    command.arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH)).arg("--out").arg(&out);
    if let Some(cargo) = cargo {
        command.env("CARGO", cargo);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    Some(if output.status.success() { Ok(fs::read_to_string(out).unwrap()) } else { Err(said) })
}

/// The same of one package, beside a root that depends on it.
fn licences_of(package: &Package<'_>) -> Option<Result<String, String>> {
    let folder = tempdir().unwrap();
    for (name, text) in package.files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let described = |name: &str, version: &str| {
        json!({
            "name": name, "version": version, "license": package.expression, "license_file": null,
            "authors": ["Ada"], "repository": "https://example.org", "homepage": null,
            "manifest_path": folder.path().join("Cargo.toml"),
        })
    };
    // The other version is for another target.
    let metadata = json!({"packages": [described("one", "1.2.3"), described("one", "0.9.0"), described("root", "1.0.0")]});
    fs::write(folder.path().join("metadata"), metadata.to_string()).unwrap();
    fs::write(folder.path().join("tree"), "root v1.0.0 (/somewhere)\none v1.2.3\none v1.2.3 (*)\n").unwrap();
    let cargo = folder.path().join("cargo");
    fs::write(&cargo, "#!/bin/sh\nexec cat \"$(dirname \"$0\")/$1\"\n").unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    licences(Some(&cargo), folder.path())
}

#[test]
fn every_dependency_of_the_program_and_none_of_its_tests_has_its_licence_listed() {
    let folder = tempdir().unwrap();
    let Some(said) = licences(None, folder.path()) else { return };
    let text = said.unwrap();
    let crates: Vec<&str> = text
        .split("\n====")
        .next()
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with(' ') && line.split(' ').count() == 2)
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    let manifest: toml::Table = fs::read_to_string("Cargo.toml").unwrap().parse().unwrap();
    for name in manifest["dependencies"].as_table().unwrap().keys() {
        assert!(crates.contains(&name.as_str()), "{name} is not among {crates:?}");
    }
    for name in ["tokmeter", "insta", "jsonschema", "proptest"] {
        assert!(!crates.contains(&name), "{name} is not in the binary");
    }
    // Each number that a crate names has its text.
    let numbers =
        text.lines().filter_map(|line| line.split_once("; text ")).flat_map(|(_, list)| list.split(", "));
    let last = numbers.map(|number| number.parse::<u32>().unwrap()).max().unwrap();
    for number in 1..=last {
        assert!(text.contains(&format!("\nText {number}: ")), "text {number} of {last} is not there");
    }
}

#[test]
fn a_crate_has_its_texts_wherever_they_lie_in_its_package() {
    let files = [
        ("LICENSE-MIT", "for the crate"),
        ("src/taken/COPYING", "for what it took"),
        ("src/license.rs", "code"),
        ("README.md", "readme"),
    ];
    let Some(said) = licences_of(&Package { expression: Some("MIT/Apache-2.0"), files: &files }) else {
        return;
    };
    let text = said.unwrap();
    assert!(
        text.contains("one 1.2.3\n    MIT OR Apache-2.0; text 1, 2\n    https://example.org\n"),
        "{text}"
    );
    assert!(text.contains("for the crate") && text.contains("for what it took"), "{text}");
    for other in ["0.9.0", "root", "readme", "code"] {
        assert!(!text.contains(other), "{other} is in\n{text}");
    }
}

#[test]
fn a_package_without_a_text_gets_that_of_a_licence_it_is_under() {
    let of = |expression| licences_of(&Package { expression: Some(expression), files: &[] });
    let Some(apache) = of("Apache-2.0 OR ISC") else { return };
    assert!(apache.unwrap().contains("Apache License\n"));
    let mit = of("MIT").unwrap().unwrap();
    assert!(mit.contains("Copyright (c) Ada\n") && mit.contains("Permission is hereby granted"), "{mit}");
    let error = of("ISC").unwrap().unwrap_err();
    assert_eq!(error, "error: one 1.2.3 is under ISC and comes without its text\n");
}

#[test]
fn a_licence_that_may_not_be_given_away_or_is_none_fails() {
    let files = [("LICENSE", "text")];
    let of = |expression| licences_of(&Package { expression, files: &files }).map(|said| said.map(drop));
    for fine in
        ["MIT", "GPL-3.0-only OR MIT", "(MIT OR GPL-2.0) AND Unicode-3.0", "Apache-2.0 WITH LLVM-exception"]
    {
        let Some(said) = of(Some(fine)) else { return };
        assert_eq!(said, Ok(()), "{fine}");
    }
    for (wrong, expected) in [
        ("GPL-3.0-only", "error: one 1.2.3 is under GPL-3.0-only, expected what 0BSD, "),
        ("MIT AND GPL-3.0-only", "error: one 1.2.3 is under MIT AND GPL-3.0-only, "),
        (
            "MIT OR GPL-3.0-only AND",
            "error: one 1.2.3 has the licence 'MIT OR GPL-3.0-only AND', which is no SPDX",
        ),
        ("MIT Apache-2.0", "error: one 1.2.3 has the licence 'MIT Apache-2.0', which is no SPDX"),
        ("(MIT", "error: one 1.2.3 has the licence '(MIT', which is no SPDX"),
        ("GPL-2.0 WITH Classpath-exception-2.0", "error: one 1.2.3 is under GPL-2.0 WITH Classpath"),
    ] {
        let error = of(Some(wrong)).unwrap().unwrap_err();
        assert!(error.starts_with(expected), "{wrong}: {error}");
    }
    let error = of(None).unwrap().unwrap_err();
    assert!(error.contains("has a licence text but no expression"), "{error}");
    let error = licences_of(&Package { expression: None, files: &[] }).unwrap().unwrap_err();
    assert!(error.contains("has neither a licence expression nor a licence text"), "{error}");
}

fn release(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new("scripts/release.sh").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_release_says_which_glibc_the_program_needs() {
    if Command::new("objdump").arg("--version").output().is_err() {
        return waived("objdump is missing, which reads the symbols of a program");
    }
    // Every version that is asked for stands in the file as text.
    let bytes = fs::read(BINARY).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let versions = text.split("GLIBC_").skip(1).filter_map(|rest| {
        let version = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        version.split('.').map(|part| part.parse::<u32>().ok()).collect::<Option<Vec<u32>>>()
    });
    let newest = versions.max().unwrap();
    let newest: Vec<String> = newest.iter().map(u32::to_string).collect();
    assert_eq!(release(&["--glibc-of", BINARY]), (true, newest.join(".") + "\n", String::new()));
    let (done, _, said) = release(&["--glibc-of", "README.md"]);
    assert!(!done && said.ends_with("error: README.md asks for no glibc\n"), "{said}");
}

#[test]
fn a_release_that_cannot_be_made_fails_at_once_in_one_sentence() {
    let (done, _, said) = release(&["--arch", "sm_90a,sm_1"]);
    assert!(
        !done && said.starts_with("error: unknown architecture in sm_90a,sm_1\nhint: there are sm_80,"),
        "{said}"
    );
    let (done, _, said) = release(&["--archs", "sm_90a"]);
    assert!(!done && said.starts_with("error: unknown argument --archs\n"), "{said}");
    let (done, _, said) = release(&["--out"]);
    assert!(!done && said == "error: --out needs a value\n", "{said}");
}
