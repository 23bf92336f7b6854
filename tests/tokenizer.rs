//! Tokenizers against goldens of other implementations: llama.cpp's ids, and pieces cut by an unrelated engine.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};
use serde::Deserialize;
use tokmeter::weights::tokenizer::{Pre, Tokenizer};
use tokmeter::weights::vocab::GgufVocab;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[derive(Deserialize)]
struct Goldens {
    vocabularies: Vec<Vocabulary>,
}

#[derive(Deserialize)]
struct Vocabulary {
    file: String,
    pre: String,
    vocab_size: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Cut {
    text: String,
    pieces: Vec<String>,
}

fn golden<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = Path::new(ROOT).join("tests/goldens").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn gguf_vocab(path: &Path) -> GgufVocab {
    let content = Content::read(&mut std::fs::File::open(path).unwrap()).unwrap();
    let get = |key: &str| content.metadata.get(&format!("tokenizer.ggml.{key}"));
    let strings = |key| {
        get(key).map_or(Vec::new(), |list: &Value| {
            list.to_vec().unwrap().iter().map(|item| item.to_string().unwrap().clone()).collect()
        })
    };
    let id = |key| get(key).map(|value| value.to_u32().unwrap());
    GgufVocab {
        model: get("model").unwrap().to_string().unwrap().clone(),
        pre: get("pre").map(|pre| pre.to_string().unwrap().clone()),
        tokens: strings("tokens"),
        token_types: get("token_type")
            .unwrap()
            .to_vec()
            .unwrap()
            .iter()
            .map(|kind| kind.to_i32().unwrap())
            .collect(),
        merges: strings("merges"),
        bos_token_id: id("bos_token_id"),
        eos_token_id: id("eos_token_id"),
        unknown_token_id: id("unknown_token_id"),
        add_bos_token: get("add_bos_token").map(|value| value.to_bool().unwrap()),
    }
}

/// Holds a tokenizer to one vocabulary's goldens: ids exactly, text exactly, no BOS.
fn assert_agrees(path: &Path, golden: &Vocabulary) {
    let vocab = gguf_vocab(path);
    assert_eq!(vocab.pre.as_deref(), Some(golden.pre.as_str()));
    let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
    assert_eq!(tokenizer.vocab_size(), golden.vocab_size);
    assert!(golden.cases.len() > 40);
    for Case { text, ids, decoded } in &golden.cases {
        assert_eq!(tokenizer.encode(text, false).unwrap(), *ids, "{} {text:?}", golden.file);
        assert_eq!(tokenizer.decode(ids).unwrap(), *decoded, "{} {text:?}", golden.file);
    }
}

fn vocabulary(file: &str) -> Vocabulary {
    let goldens: Goldens = golden("tokenizer.json");
    goldens.vocabularies.into_iter().find(|vocabulary| vocabulary.file == file).unwrap()
}

#[test]
fn texts_are_cut_as_by_an_unrelated_regex_engine() {
    let goldens: std::collections::BTreeMap<String, Vec<Cut>> = golden("pretokenize.json");
    assert_eq!(goldens.len(), 4);
    for (name, cuts) in goldens {
        let pre = Pre::parse(&name).unwrap();
        assert!(cuts.len() > 40);
        for Cut { text, pieces } in cuts {
            assert_eq!(pre.cut(&text).unwrap(), pieces, "{name} {text:?}");
        }
    }
}

#[test]
fn the_tiny_gguf_gives_llama_cpps_ids() {
    assert_agrees(&Path::new(ROOT).join("models/tiny/llama/model.gguf"), &vocabulary("model.gguf"));
}

#[test]
fn the_tiny_tokenizer_json_and_the_tiny_gguf_give_the_same_ids() {
    let folder = Path::new(ROOT).join("models/tiny/llama");
    let from_file = Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap();
    let from_gguf = Tokenizer::from_gguf(&gguf_vocab(&folder.join("model.gguf"))).unwrap();
    assert_eq!(from_file.vocab_size(), from_gguf.vocab_size());
    for Case { text, ids, decoded } in vocabulary("model.gguf").cases {
        assert_eq!(from_file.encode(&text, false).unwrap(), ids, "{text:?}");
        assert_eq!(from_file.decode(&ids).unwrap(), decoded, "{text:?}");
    }
}

#[test]
fn smollm2_gives_llama_cpps_ids() {
    let Some(path) = common::cached_default_model() else {
        return common::waived("smollm2-135m is not in the cache (`tokmeter models fetch smollm2-135m`)");
    };
    assert_agrees(&path, &vocabulary("SmolLM2-135M-Instruct.Q4_1.gguf"));
    let tokenizer = Tokenizer::from_gguf(&gguf_vocab(&path)).unwrap();
    let ids = tokenizer.encode("The capital of France is", true).unwrap();
    assert_eq!(ids, [504, 3575, 282, 4649, 314]);
}

#[test]
#[ignore = "needs llama.cpp's models/ggml-vocab-{llama-bpe,qwen2,gpt-2}.gguf in the folder TOKMETER_VOCABS"]
fn llama3_qwen2_and_gpt2_give_llama_cpps_ids() {
    let folder = PathBuf::from(std::env::var_os("TOKMETER_VOCABS").expect("TOKMETER_VOCABS"));
    for pre in ["llama-bpe", "qwen2", "gpt-2"] {
        let file = format!("ggml-vocab-{pre}.gguf");
        assert_agrees(&folder.join(&file), &vocabulary(&file));
    }
}
