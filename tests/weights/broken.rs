//! Broken inputs. Each is refused with one sentence that names the file and the thing.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::tempdir;
use tokmeter::weights::gguf::Gguf;
use tokmeter::weights::open;

use crate::files::{GGUF_F32, GgufFile, GgufTensor, Meta, Tensor, array, safetensors, with_header};
use crate::tiny::{Tiny, VOCAB, f32_bytes};

/// `error` is one sentence (and perhaps a hint) that names `file` and contains `expected`.
fn assert_sentence(error: &anyhow::Error, file: &str, expected: &str) {
    let text = format!("{error:#}");
    assert!(text.contains(file), "{text:?} does not name {file}");
    assert!(text.contains(expected), "{text:?} does not say {expected:?}");
    let sentence = text.split("\nhint: ").next().unwrap();
    assert!(!sentence.contains('\n') && !sentence.ends_with('.'), "{text:?} is not one sentence");
    assert!(!sentence.chars().any(char::is_control), "{text:?} has control characters");
    assert!(text.len() < 600, "{} characters: {text}", text.len());
}

fn refusal(path: &Path) -> anyhow::Error {
    match open(path) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error,
    }
}

/// What is to be said, and what spoils the file.
type GgufCase = (&'static str, fn(&mut GgufFile));

const GGUF_CASES: [GgufCase; 44] = [
    ("begins with \"GGML\"", |file| file.magic = *b"GGML"),
    ("version 1, expected 2 or 3", |file| file.version = 1),
    ("version 4, expected 2 or 3", |file| file.version = 4),
    ("big-endian", |file| file.version = 3u32.swap_bytes()),
    ("announces 1152921504606846976 tensors", |file| file.tensor_count = Some(1 << 60)),
    ("announces 1152921504606846976 metadata keys", |file| file.metadata_count = Some(1 << 60)),
    ("announces 60000 metadata keys", |file| {
        file.metadata_count = Some(60_000);
        file.tensors.clear();
    }),
    ("token_embd.weight (model.embed_tokens.weight) is missing", |file| file.tensors.clear()),
    ("a string at byte", |file| file.set("general.name", Meta::Raw(8, (1u64 << 60).to_le_bytes().into()))),
    ("value of a.b: is an array of 1152921504606846976 U8 values", |file| {
        file.set("a.b", Meta::Raw(9, array(0, 1 << 60, [])));
    }),
    ("is an array of 1152921504606846976 String values", |file| {
        file.set("a.b", Meta::Raw(9, array(8, 1 << 60, [])));
    }),
    ("nests arrays deeper", |file| {
        let nested = (0..9).fold(array(0, 0, []), |inner, _| array(9, 1, inner));
        file.set("a.b", Meta::Raw(9, nested));
    }),
    ("has value type 13, expected 0 to 12", |file| file.set("a.b", Meta::Raw(13, vec![0; 8]))),
    ("key general.alignment occurs twice", |file| {
        file.metadata.push((b"general.alignment".to_vec(), Meta::U32(32)));
    }),
    ("is not UTF-8", |file| file.metadata.push((vec![b'a', 0xff], Meta::U32(1)))),
    ("expected no control characters", |file| file.metadata.push((b"a\nb".to_vec(), Meta::U32(1)))),
    ("general.alignment is 0, expected a power of two", |file| {
        file.set("general.alignment", Meta::U32(0));
    }),
    ("general.alignment is 48, expected a power of two", |file| {
        file.set("general.alignment", Meta::U32(48));
    }),
    ("general.alignment: is a string", |file| file.set("general.alignment", Meta::Text("32"))),
    ("a tensor name at byte", |file| file.tensors[2].name = vec![0xc3, 0x28]),
    ("tensor output.weight occurs twice", |file| {
        let twice = file.tensors.last().cloned().unwrap();
        file.tensors.push(twice);
    }),
    ("tensor blk.0.attn_q.weight: has type 99 (unknown)", |file| {
        file.tensor("blk.0.attn_q.weight").kind = 99
    }),
    ("has type 23 (IQ4_XS)", |file| file.tensor("blk.0.attn_q.weight").kind = 23),
    ("has 0 dimensions", |file| file.tensor("blk.0.attn_q.weight").ne.clear()),
    ("has 5 dimensions", |file| file.tensor("blk.0.attn_q.weight").ne = vec![1; 5]),
    ("has a dimension of 0", |file| file.tensor("blk.0.attn_q.weight").ne = vec![64, 0]),
    ("rows of whole blocks of 32", |file| {
        let tensor = file.tensor("blk.0.attn_q.weight");
        (tensor.kind, tensor.ne) = (8, vec![63, 64]);
    }),
    ("tensor blk.0.attn_q.weight: has shape [1152921504606846976, 1152921504606846976]", |file| {
        file.tensor("blk.0.attn_q.weight").ne = vec![1 << 60, 1 << 60];
    }),
    ("expected it inside the file", |file| file.tensor("blk.0.attn_q.weight").ne = vec![64, 1 << 50]),
    ("expected it inside the file", |file| file.tensor("blk.0.attn_q.weight").offset = Some(u64::MAX - 31)),
    ("expected a multiple of the alignment 32", |file| {
        file.tensor("blk.0.attn_q.weight").offset = Some(33);
    }),
    ("inside tensor token_embd.weight", |file| file.tensor("blk.0.attn_norm.weight").offset = Some(64)),
    ("expected [64, 64] from the configuration", |file| {
        file.tensor("blk.0.attn_q.weight").ne = vec![64, 32];
    }),
    ("blk.1.ffn_up.weight (model.layers.1.mlp.up_proj.weight) is missing", |file| {
        file.tensors.retain(|tensor| tensor.name != b"blk.1.ffn_up.weight");
    }),
    ("tensor blk.0.attn_q.bias has no place", |file| {
        let bias =
            GgufTensor { name: b"blk.0.attn_q.bias".to_vec(), ne: vec![64], ..file.tensors[1].clone() };
        file.tensors.push(bias);
    }),
    ("tensor rope_freqs.weight has shape [7], expected [8]", |file| file.tensors.push(rope_freqs(&[1.0; 7]))),
    ("rope scaling factor is NaN", |file| file.tensors.push(rope_freqs(&[f32::NAN; 8]))),
    ("the vocabulary does not match: llama.vocab_size is 41", |file| {
        file.set("llama.vocab_size", Meta::U32(VOCAB as u32 + 1));
    }),
    ("llama.vocab_size and tokenizer.ggml.tokens are missing", |file| {
        file.remove("llama.vocab_size");
        file.remove("tokenizer.ggml.tokens");
    }),
    ("llama.attention.head_count: is an array of 2 values", |file| {
        file.set("llama.attention.head_count", Meta::I32s(vec![4, 4]));
    }),
    ("general.architecture is \"mamba\", which is not supported", |file| {
        file.set("general.architecture", Meta::Text("mamba"));
    }),
    ("general.architecture is missing", |file| file.remove("general.architecture")),
    ("general.type is \"adapter\"", |file| file.set("general.type", Meta::Text("adapter"))),
    ("one of 3 parts", |file| file.set("split.count", Meta::U32(3))),
];

fn rope_freqs(factors: &[f32]) -> GgufTensor {
    GgufTensor {
        name: b"rope_freqs.weight".to_vec(),
        ne: vec![factors.len() as u64],
        kind: GGUF_F32,
        data: f32_bytes(factors),
        offset: None,
    }
}

/// Model keys that are missing, wrong or not supported.
const KEY_CASES: [(&str, Option<Meta>, &str); 20] = [
    ("llama.block_count", None, "llama.block_count is missing"),
    ("llama.block_count", Some(Meta::U64(1 << 60)), "num_hidden_layers is 1152921504606846976"),
    ("llama.block_count", Some(Meta::U32(3)), "blk.2.attn_norm.weight (model.layers.2.input_layernorm"),
    ("llama.embedding_length", Some(Meta::Text("64")), "llama.embedding_length: is a string"),
    ("llama.attention.head_count", Some(Meta::U32(0)), "num_attention_heads is 0"),
    ("llama.attention.head_count", Some(Meta::U32(5)), "expected a multiple of num_key_value_heads 2"),
    ("llama.attention.head_count_kv", Some(Meta::U32(3)), "expected a multiple of num_key_value_heads 3"),
    ("llama.attention.key_length", Some(Meta::U32(15)), "rope.dimension_count is 16"),
    ("llama.attention.value_length", Some(Meta::U32(8)), "llama.attention.value_length is 8"),
    ("llama.rope.dimension_count", Some(Meta::U32(8)), "llama.rope.dimension_count is 8"),
    ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is missing"),
    ("llama.attention.layer_norm_rms_epsilon", Some(Meta::F32(f32::NAN)), "rms_norm_eps is NaN"),
    ("llama.rope.freq_base", Some(Meta::F32(-1.0)), "rope_theta is -1"),
    ("llama.rope.scaling.type", Some(Meta::Text("yarn")), "\"yarn\", which is not supported"),
    ("llama.rope.scaling.type", Some(Meta::Text("longrope")), "\"longrope\", which is not supported"),
    ("llama.expert_count", Some(Meta::U32(8)), "mixture of experts is not supported"),
    ("llama.attention.sliding_window", Some(Meta::U32(128)), "sliding-window attention is not supported"),
    ("llama.attention.causal", Some(Meta::Bool(false)), "llama.attention.causal is false"),
    ("llama.logit_scale", Some(Meta::F32(0.5)), "llama.logit_scale is 0.5"),
    ("llama.context_length", None, "llama.context_length is missing"),
];

#[test]
fn broken_gguf_files_are_refused_by_name() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("broken.gguf");
    for (expected, break_it) in GGUF_CASES {
        let mut file = Tiny::llama().gguf();
        break_it(&mut file);
        file.save(&path);
        assert_sentence(&refusal(&path), "broken.gguf", expected);
    }
}

#[test]
fn a_name_that_is_longer_than_the_file_is_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("name.gguf");
    let mut bytes = Tiny::llama().gguf().bytes();
    bytes[24..32].copy_from_slice(&(1u64 << 60).to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    assert_sentence(&refusal(&path), "name.gguf", "metadata key at byte 24 has 1152921504606846976 bytes");
}

#[test]
fn model_keys_of_a_gguf_are_refused_by_name() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("keys.gguf");
    for (key, value, expected) in KEY_CASES {
        let mut file = Tiny::llama().gguf();
        file.remove(key);
        if let Some(value) = value {
            file.set(key, value);
        }
        file.save(&path);
        assert_sentence(&refusal(&path), "keys.gguf", expected);
    }
}

#[test]
fn a_malformed_vocabulary_is_refused_by_its_key() {
    let cases: [(&str, Option<Meta>, &str); 6] = [
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model is missing"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokenizer.ggml.token_type", Some(Meta::I32s(vec![1; 3])), "token_type has 3 entries"),
        ("tokenizer.ggml.merges", Some(Meta::I32s(vec![1; 3])), "merges: is an array of I32"),
        ("tokenizer.ggml.bos_token_id", Some(Meta::U32(VOCAB as u32)), "bos_token_id is 40"),
        (
            "tokenizer.ggml.pre",
            Some(Meta::Raw(8, crate::files::string(&[0xff]))),
            "tokenizer.ggml.pre: is not UTF-8",
        ),
    ];
    let folder = tempdir().unwrap();
    let path = folder.path().join("vocab.gguf");
    for (key, value, expected) in cases {
        let mut file = Tiny::llama().gguf();
        file.remove(key);
        if let Some(value) = value {
            file.set(key, value);
        }
        let error = Gguf::open(&file.save(&path)).unwrap().vocab().unwrap_err();
        assert_sentence(&error, "vocab.gguf", expected);
    }
}

#[test]
fn a_truncated_gguf_names_the_file_wherever_it_ends() {
    let file = Tiny::llama().gguf();
    let (whole, header_bytes) = (file.bytes(), file.header().len());
    let folder = tempdir().unwrap();
    let path = folder.path().join("short.gguf");
    let lengths = (0..header_bytes).step_by(5).chain((header_bytes..whole.len()).step_by(9973));
    for length in lengths.chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert_sentence(&refusal(&path), "short.gguf", "byte");
    }
}

#[test]
fn broken_safetensors_are_refused_by_name() {
    let tiny = Tiny::llama();
    let whole = safetensors(&tiny.tensors());
    let header_bytes = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let (header, data) = (&whole[8..8 + header_bytes], &whole[8 + header_bytes..]);
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_slice(header).unwrap();
        edit(&mut json);
        with_header(json.to_string().as_bytes(), data)
    };
    let changed = |edit: &dyn Fn(&mut Vec<Tensor>)| {
        let mut tensors = tiny.tensors();
        edit(&mut tensors);
        safetensors(&tensors)
    };
    let norm = "model.norm.weight";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("has 0 bytes", Vec::new()),
        ("has 7 bytes", whole[..7].to_vec()),
        ("announces a header of 1152921504606846976 bytes", (1u64 << 60).to_le_bytes().to_vec()),
        ("announces a header of", whole[..header_bytes].to_vec()),
        ("expected at most 100", [&u64::MAX.to_le_bytes(), &whole[8..108]].concat()),
        ("no valid safetensors header", whole[..whole.len() - 1].to_vec()),
        ("no valid safetensors header", [&whole[..], &[0]].concat()),
        ("no valid safetensors header", with_header(b"not json", data)),
        ("no valid safetensors header", with_header(&[0xff, 0xfe], data)),
        ("no valid safetensors header", with_header("[".repeat(100_000).as_bytes(), data)),
        ("no valid safetensors header", edited(&|json| json[norm]["dtype"] = json!("F99"))),
        ("no valid safetensors header", edited(&|json| json[norm]["dtype"] = json!("F\n".repeat(5000)))),
        (
            "no valid safetensors header",
            edited(&|json| json[norm]["shape"] = json!([1u64 << 60, 1u64 << 60])),
        ),
        ("no valid safetensors header", edited(&|json| json[norm]["data_offsets"] = json!([0, 256]))),
        ("no valid safetensors header", edited(&|json| json[norm]["data_offsets"] = json!([256, 0]))),
        ("no valid safetensors header", edited(&|json| json[norm]["data_offsets"] = json!([-1, 256]))),
        ("embed_tokens.weight is missing", with_header(b"{}", &[])),
        ("model.norm.weight is missing", changed(&|tensors| tensors.retain(|tensor| tensor.name != norm))),
        (
            "embed_tokens.weight has shape [64, 40], expected [40, 64]",
            changed(&|tensors| tensors[0].shape.reverse()),
        ),
        (
            "has type F64",
            changed(&|tensors| {
                tensors[1].dtype = "F64";
                tensors[1].data.extend(vec![0; 256]);
            }),
        ),
    ];
    let folder = tempdir().unwrap();
    tiny.save_config(folder.path());
    let path = folder.path().join("model.safetensors");
    for (expected, bytes) in cases {
        std::fs::write(&path, bytes).unwrap();
        assert_sentence(&refusal(&path), "model.safetensors", expected);
    }
}

#[test]
fn broken_configurations_are_refused_by_name() {
    let cases: [(&str, &str); 9] = [
        ("", "is not JSON"),
        ("{\"a\": ", "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ("{}", "architectures is missing"),
        (r#"{"architectures": ["MixtralForCausalLM"]}"#, "MixtralForCausalLM"),
        (r#"{"vocab_size": 41}"#, "model.embed_tokens.weight has shape [40, 64], expected [41, 64]"),
        (r#"{"num_key_value_heads": 3}"#, "expected a multiple of num_key_value_heads 3"),
        (r#"{"quantization_config": {"quant_method": "fp8"}}"#, "quantization_config is fp8"),
        (r#"{"num_hidden_layers": -2}"#, "num_hidden_layers is -2, expected a non-negative integer"),
    ];
    let tiny = Tiny::llama();
    let folder = tempdir().unwrap();
    tiny.save_safetensors(folder.path());
    for (text, expected) in cases {
        let changes: Option<Value> = serde_json::from_str(text).ok().filter(Value::is_object);
        let mut config = tiny.config.clone();
        let whole = match changes.as_ref().and_then(Value::as_object).filter(|changes| !changes.is_empty()) {
            Some(changes) => {
                changes.iter().for_each(|(name, value)| config[name] = value.clone());
                config.to_string()
            }
            None => text.to_owned(),
        };
        std::fs::write(folder.path().join("config.json"), whole).unwrap();
        let file = if text.contains("vocab_size") { "model.safetensors" } else { "config.json" };
        assert_sentence(&refusal(folder.path()), file, expected);
    }
}

/// The tiny model as one shard under an index that `change` may spoil.
fn sharded(folder: &Path, change: impl Fn(&mut Value)) -> PathBuf {
    let tiny = Tiny::llama();
    tiny.save_config(folder);
    let tensors = tiny.tensors();
    std::fs::write(folder.join("a.safetensors"), safetensors(&tensors)).unwrap();
    std::fs::write(folder.join("b.safetensors"), safetensors(&tensors[..1])).unwrap();
    let map: serde_json::Map<String, Value> =
        tensors.iter().map(|tensor| (tensor.name.clone(), "a.safetensors".into())).collect();
    let mut index = json!({"weight_map": map});
    change(&mut index);
    let path = folder.join("model.safetensors.index.json");
    std::fs::write(&path, index.to_string()).unwrap();
    path
}

/// The file to be named, what is to be said, and what spoils the index.
type IndexCase = (&'static str, &'static str, fn(&mut Value));

#[test]
fn an_index_that_lies_or_points_outside_its_folder_is_refused() {
    const NORM: &str = "model.norm.weight";
    let folder = tempdir().unwrap();
    sharded(folder.path(), |_| {});
    assert!(open(folder.path()).is_ok());
    for outside in
        ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a\\b", "a.safetensors/"]
    {
        sharded(folder.path(), |index| index["weight_map"][NORM] = outside.into());
        assert_sentence(&refusal(folder.path()), "index.json", "expected a plain name in its own folder");
    }
    let cases: [IndexCase; 7] = [
        ("index.json", "is not a safetensors index", |index| *index = json!([])),
        ("index.json", "is not a safetensors index", |index| index["weight_map"] = json!("x".repeat(5000))),
        ("index.json", "lists 0 files", |index| index["weight_map"] = json!({})),
        ("c.safetensors", "cannot be opened", |index| index["weight_map"][NORM] = "c.safetensors".into()),
        ("b.safetensors", "occurs in", |index| index["weight_map"][NORM] = "b.safetensors".into()),
        ("index.json", "tensor x is listed in a.safetensors", |index| {
            index["weight_map"]["x"] = "a.safetensors".into();
        }),
        ("config.json", "is not a regular file", |index| index["weight_map"][NORM] = "config.json".into()),
    ];
    for (file, expected, change) in cases {
        sharded(folder.path(), change);
        if expected == "is not a regular file" {
            std::fs::remove_file(folder.path().join("config.json")).unwrap();
            std::fs::create_dir(folder.path().join("config.json")).unwrap();
        }
        assert_sentence(&refusal(folder.path()), file, expected);
    }
}

#[test]
fn paths_that_are_no_model_are_refused_by_name() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert_sentence(&refusal(&at("absent.gguf")), "absent.gguf", "cannot be opened");
    assert_sentence(&refusal(folder.path()), "", "holds no model");
    std::fs::write(at("notes.txt"), "x").unwrap();
    assert_sentence(&refusal(&at("notes.txt")), "notes.txt", "expected a .gguf or .safetensors file");
    std::fs::write(at("zero.gguf"), "").unwrap();
    assert_sentence(&refusal(&at("zero.gguf")), "zero.gguf", "needs 4 bytes, but only 0 are left");
    std::fs::write(at("two.gguf"), "").unwrap();
    assert_sentence(&refusal(folder.path()), "", "holds 2 model files");
    std::fs::write(at("alone.safetensors"), "").unwrap();
    assert_sentence(&refusal(&at("alone.safetensors")), "config.json", "cannot be opened");
}

#[test]
fn a_tensor_that_the_model_does_not_have_is_refused() {
    let folder = tempdir().unwrap();
    let path = Tiny::llama().gguf().save(&folder.path().join("m.gguf"));
    let error = open(&path).unwrap().tensor("model.layers.2.mlp.up_proj.weight").unwrap_err();
    assert_sentence(&error, "m.gguf", "model.layers.2.mlp.up_proj.weight is not one of this model's");
}
