//! Reads `tokenizer.json`. The `tokenizers` crate panics on some contradictions and passes over others, so the parts
//! that matter are looked at first; and settings that would change a benchmark's text (truncation, padding, dropout)
//! are switched off or refused.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::MOST_TOKENS;

/// The largest known is some 35 MB.
const MOST_BYTES: u64 = 256 << 20;

/// What is looked at before the crate builds it.
#[derive(Deserialize)]
struct Head {
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Shape {
    model: Bpe,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: HashMap<String, u32>,
    merges: Merges,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Newer files list pairs, older ones `left right`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merges {
    Pairs(Vec<(String, String)>),
    Lines(Vec<String>),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// The tokenizer, and one more than its largest id.
pub(super) fn read(path: &Path) -> anyhow::Result<(tokenizers::Tokenizer, usize)> {
    let bytes = std::fs::metadata(path)?.len();
    ensure!(bytes <= MOST_BYTES, "has {bytes} bytes, expected at most {MOST_BYTES} for a tokenizer");
    let text = std::fs::read_to_string(path)?;
    let head: Head = serde_json::from_str(&text).context("is no tokenizer.json")?;
    let kind = head.model.kind.unwrap_or_default();
    ensure!(kind == "BPE", "model.type is {kind:?}, expected \"BPE\"");
    let shape: Shape = serde_json::from_str(&text).context("is no BPE tokenizer.json")?;
    let vocab_size = shape.check()?;
    let mut tokenizer: tokenizers::Tokenizer = text.parse().map_err(|error| anyhow!("{error}"))?;
    for added in &shape.added_tokens {
        let id = tokenizer.token_to_id(&added.content);
        ensure!(
            id == Some(added.id),
            "added token {:?} gets id {id:?}, expected {}",
            added.content,
            added.id
        );
    }
    tokenizer.with_truncation(None).map_err(|error| anyhow!("{error}"))?;
    tokenizer.with_padding(None);
    Ok((tokenizer, vocab_size))
}

impl Shape {
    /// The number of ids, if all fits together.
    fn check(&self) -> anyhow::Result<usize> {
        let Bpe { vocab, merges, dropout, continuing_subword_prefix, end_of_word_suffix } = &self.model;
        if let Some(dropout) = dropout.filter(|dropout| *dropout != 0.0) {
            bail!("model.dropout is {dropout}, expected none: the same text would give different ids");
        }
        for affix in [continuing_subword_prefix, end_of_word_suffix].into_iter().flatten() {
            ensure!(affix.is_empty(), "model marks parts of words with {affix:?}, expected none");
        }
        match merges {
            Merges::Pairs(pairs) => {
                pairs.iter().try_for_each(|(left, right)| check_merge(vocab, left, right))?
            }
            Merges::Lines(lines) => {
                // As the crate reads them, comment included.
                for line in lines.iter().filter(|line| !line.starts_with("#version")) {
                    let (left, right) =
                        line.split_once(' ').with_context(|| format!("merge {line:?} is not two tokens"))?;
                    check_merge(vocab, left, right)?;
                }
            }
            Merges::Other(_) => bail!("model.merges is neither a list of pairs nor of lines"),
        }
        self.count_ids()
    }

    fn count_ids(&self) -> anyhow::Result<usize> {
        let mut owner = HashMap::with_capacity(self.model.vocab.len());
        let own = self.model.vocab.iter().map(|(token, id)| (token.as_str(), *id));
        let added: HashSet<(&str, u32)> =
            self.added_tokens.iter().map(|added| (added.content.as_str(), added.id)).collect();
        for (token, id) in own.chain(added) {
            ensure!(
                (id as usize) < MOST_TOKENS,
                "token {token:?} has id {id}, expected less than {MOST_TOKENS}"
            );
            ensure!(!token.is_empty(), "token {id} is empty");
            if let Some(other) = owner.insert(id, token).filter(|other| *other != token) {
                bail!("id {id} belongs to both {other:?} and {token:?}");
            }
        }
        let largest = owner.keys().max().context("the vocabulary is empty")?;
        Ok(*largest as usize + 1)
    }
}

/// The crate takes for granted that no merge makes a longer token than the longest, and panics.
fn check_merge(vocab: &HashMap<String, u32>, left: &str, right: &str) -> anyhow::Result<()> {
    for token in [left, right, &format!("{left}{right}")] {
        ensure!(vocab.contains_key(token), "merge {left:?} {right:?} names {token:?}, which is no token");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Tokenizer;

    fn good() -> Value {
        json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
            "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        })
    }

    fn load(value: &Value) -> anyhow::Result<Tokenizer> {
        load_text(&value.to_string())
    }

    fn load_text(text: &str) -> anyhow::Result<Tokenizer> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, text).unwrap();
        Tokenizer::from_file(&path)
    }

    fn refused(expected: &str, change: impl Fn(&mut Value)) {
        let mut value = good();
        change(&mut value);
        let message = format!("{:#}", load(&value).err().expect(expected));
        assert!(
            message.contains(expected) && message.contains("tokenizer.json: "),
            "{message:?} lacks {expected:?}"
        );
    }

    #[test]
    fn the_files_own_template_adds_its_special_tokens_only_when_asked_and_nothing_is_truncated() {
        let tokenizer = load(&good()).unwrap();
        assert_eq!(tokenizer.encode("abbaa", false).unwrap(), [2, 1, 0, 0]);
        assert_eq!(tokenizer.encode("abbaa", true).unwrap(), [3, 2, 1, 0, 0]);
        assert_eq!(tokenizer.vocab_size(), 4);
    }

    #[test]
    fn merges_written_as_lines_are_the_same() {
        let mut old = good();
        old["model"]["merges"] = json!(["#version: 0.2", "a b"]);
        assert_eq!(load(&old).unwrap().encode("ab", false).unwrap(), [2]);
    }

    #[test]
    fn absurd_files_are_refused_with_the_reason() {
        refused("model.type is \"Unigram\", expected \"BPE\"", |v| v["model"]["type"] = json!("Unigram"));
        refused("model.type is \"\"", |v| v["model"]["type"] = json!(null));
        refused("is no tokenizer.json", |v| v["model"] = json!([1]));
        refused("dropout is 0.5", |v| v["model"]["dropout"] = json!(0.5));
        refused("marks parts of words with \"##\"", |v| {
            v["model"]["continuing_subword_prefix"] = json!("##")
        });
        refused("names \"ba\", which is no token", |v| v["model"]["merges"] = json!([["b", "a"]]));
        refused("names \"abab\", which is no token", |v| v["model"]["merges"] = json!([["ab", "ab"]]));
        refused("is not two tokens", |v| v["model"]["merges"] = json!(["ab"]));
        refused("neither a list of pairs nor of lines", |v| v["model"]["merges"] = json!({"a": "b"}));
        refused("id 0 belongs to both", |v| v["model"]["vocab"]["b"] = json!(0));
        refused("id 2 belongs to both", |v| v["added_tokens"][0]["id"] = json!(2));
        refused("has id 4294967295, expected less than", |v| v["model"]["vocab"]["b"] = json!(u32::MAX));
        refused("is no BPE", |v| v["model"]["vocab"]["b"] = json!(-1));
        refused("the vocabulary is empty", |v| {
            v["model"]["vocab"] = json!({});
            v["model"]["merges"] = json!([]);
            v["added_tokens"] = json!([]);
        });
        refused("gets id", |v| v["added_tokens"][0]["id"] = json!(9));
    }

    #[test]
    fn text_that_is_no_json_or_no_file_is_refused_with_the_path() {
        for text in ["", "{", "[]", "null", "\u{0}", &"[".repeat(100_000)] {
            let message = format!("{:#}", load_text(text).err().expect("a refusal"));
            assert!(message.contains("tokenizer.json: is no tokenizer.json"), "{message}");
        }
        let missing = Tokenizer::from_file(std::path::Path::new("/nowhere/tokenizer.json")).err().unwrap();
        assert!(format!("{missing:#}").starts_with("/nowhere/tokenizer.json: No such file"));
    }
}
