//! Data flows one way: no module names a later one. Every path in the source is parsed, not only `use` lines, and
//! `super` is followed, so that no reference slips through.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// Modules in the order of the data's path; each may name itself and those before it.
const ORDER: [&str; 17] = [
    "units", "clock", "arch", "record", "weights", "backend", "model", "engine", "workload", "suite",
    "meter", "machine", "runner", "analysis", "report", "export", "cmd",
];

/// Right of the record nothing touches the machine: these may name only the modules beside them.
const PURE: [(&str, &[&str]); 3] = [
    ("analysis", &["units", "record", "arch", "analysis"]),
    ("report", &["units", "record", "arch", "analysis", "report"]),
    ("export", &["units", "record", "arch", "analysis", "export"]),
];

/// Scheduling and paging are integers: they must not know a device.
const DEVICE_FREE: [&str; 3] = ["src/engine/pages.rs", "src/engine/scheduler.rs", "src/engine/sequence.rs"];

#[test]
fn no_module_names_a_later_one() {
    let mut faults = Vec::new();
    for file in rust_files(Path::new("src")) {
        let Some(own) = top_module(&file) else { continue };
        let place = position(&own).unwrap_or_else(|| panic!("{own} is not in the list of modules"));
        for named in named_modules(&file) {
            if position(&named).is_some_and(|other| other > place) {
                faults.push(format!("{} names {named}, which comes after {own}", file.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn nothing_right_of_the_record_touches_the_machine() {
    let mut faults = Vec::new();
    for (own, allowed) in PURE {
        for file in rust_files(&Path::new("src").join(own)) {
            for named in named_modules(&file).iter().filter(|named| !allowed.contains(&named.as_str())) {
                faults.push(format!("{} names {named}", file.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn scheduling_names_no_device() {
    for file in DEVICE_FREE {
        let text = std::fs::read_to_string(file).expect(file);
        for word in ["cudarc", "candle", "Backend"] {
            assert!(!code_of(&text).contains(word), "{file} names {word}");
        }
    }
}

#[test]
fn the_test_sees_every_way_of_naming_a_module() {
    let file: syn::File = syn::parse_quote! {
        use crate::{units::format_ns, clock};
        fn f(x: crate::record::Maybe<u8>) { super::super::cmd::execute(); println!("{}", crate::arch::parameters(y)); }
        mod inner { fn g() { super::super::super::suite::load(); } }
    };
    let named = modules_named_in(&file, &["runner".into(), "serve".into()]);
    let expected = ["arch", "clock", "cmd", "record", "suite", "units"];
    assert_eq!(named.into_iter().collect::<Vec<_>>(), expected);
}

fn position(module: &str) -> Option<usize> {
    ORDER.iter().position(|name| *name == module)
}

fn code_of(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files = Vec::new();
    for path in entries.map(|entry| entry.expect("a readable folder").path()) {
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// `src/engine/llm.rs` → `["engine", "llm"]`; `mod.rs` stands for its folder.
fn module_path(file: &Path) -> Vec<String> {
    let relative = file.strip_prefix("src").expect("a file under src").with_extension("");
    let mut parts: Vec<String> = relative.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

fn top_module(file: &Path) -> Option<String> {
    let top = module_path(file).into_iter().next()?;
    (top != "lib" && top != "main").then_some(top)
}

fn named_modules(file: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(file).expect("a readable source file");
    let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    modules_named_in(&parsed, &module_path(file))
}

fn modules_named_in(file: &syn::File, module: &[String]) -> BTreeSet<String> {
    let mut finder = Finder { module: module.to_vec(), named: BTreeSet::new() };
    finder.visit_file(file);
    finder.named
}

/// Collects the top-level modules that a file names.
struct Finder {
    /// Module that the visited item is in.
    module: Vec<String>,
    named: BTreeSet<String>,
}

impl Finder {
    /// `words` from the crate's root, when the path leads there: `crate::a::b` or enough `super`s.
    fn note(&mut self, words: &[String]) {
        let mut place = self.module.clone();
        let mut rest = words;
        match words.first().map(String::as_str) {
            Some("crate") => {
                place.clear();
                rest = &words[1..];
            }
            Some("super") => {
                while rest.first().is_some_and(|word| word == "super") {
                    place.pop();
                    rest = &rest[1..];
                }
            }
            _ => return,
        }
        if let Some(top) = place.iter().chain(rest).next() {
            self.named.insert(top.clone());
        }
    }

    fn walk_use(&mut self, tree: &syn::UseTree, prefix: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.walk_use(&path.tree, prefix);
                prefix.pop();
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.walk_use(item, prefix)),
            syn::UseTree::Name(name) => self.note(&[&prefix[..], &[name.ident.to_string()]].concat()),
            syn::UseTree::Rename(name) => self.note(&[&prefix[..], &[name.ident.to_string()]].concat()),
            syn::UseTree::Glob(_) => self.note(prefix),
        }
    }

    /// Paths inside a macro's tokens, such as `format!("{}", crate::units::x(y))`.
    fn walk_tokens(&mut self, text: &str) {
        for marker in ["crate", "super"] {
            for (at, _) in text.match_indices(marker) {
                let words: Vec<String> = text[at..]
                    .split("::")
                    .map(|word| {
                        word.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
                    })
                    .take(6)
                    .collect();
                let starts_a_path = !text[..at].trim_end().ends_with("::");
                if starts_a_path && words[0] == marker && words.len() > 1 {
                    self.note(&words);
                }
            }
        }
    }
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.walk_use(&item.tree, &mut Vec::new());
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let words: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.note(&words);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.walk_tokens(&call.tokens.to_string());
        visit::visit_macro(self, call);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }
}
