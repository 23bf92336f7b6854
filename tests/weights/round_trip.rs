//! The same values through every format.

use std::path::Path;

use tempfile::tempdir;
use tokmeter::arch::{Config, RopeScaling, tensors};
use tokmeter::weights::gguf::Gguf;
use tokmeter::weights::vocab::GgufVocab;
use tokmeter::weights::{StoredDType, Weights, first_non_finite, open, sha256_files};

use crate::files::{GgufTensor, Meta, Tensor, safetensors};
use crate::tiny::{HEAD_DIM, Tiny, VOCAB, f32_bytes};

fn families() -> [Tiny; 3] {
    [Tiny::llama(), Tiny::new("qwen2", "Qwen2ForCausalLM"), Tiny::new("qwen3", "Qwen3ForCausalLM")]
}

/// Every tensor holds exactly the values it was written with.
fn assert_values(opened: &dyn Weights, tiny: &Tiny) {
    assert_eq!(tensors(opened.config()).len(), tiny.weights.len());
    for weight in &tiny.weights {
        let tensor = opened.tensor(&weight.hf).unwrap();
        assert_eq!(tensor.shape, weight.shape, "{}", weight.hf);
        assert_eq!(tensor.to_f32().unwrap(), weight.values, "{}", weight.hf);
        assert_eq!(first_non_finite(&tensor), None);
    }
}

#[test]
fn both_formats_give_the_same_configuration_and_tensors() {
    for tiny in families() {
        let folder = tempdir().unwrap();
        tiny.save_safetensors(folder.path());
        let from_safetensors = open(folder.path()).unwrap();
        let from_gguf = open(&tiny.gguf().save(&folder.path().join("m.gguf"))).unwrap();
        assert_eq!(from_gguf.config(), from_safetensors.config());
        assert_values(&*from_safetensors, &tiny);
        assert_values(&*from_gguf, &tiny);
    }
}

#[test]
fn version_2_other_alignments_and_gaps_are_read_too() {
    let tiny = Tiny::llama();
    let folder = tempdir().unwrap();
    for (version, alignment) in [(2, 32), (3, 8), (3, 4096)] {
        let mut file = tiny.gguf();
        file.version = version;
        file.alignment = alignment;
        file.set("general.alignment", Meta::U32(alignment as u32));
        assert_values(&*open(&file.save(&folder.path().join("m.gguf"))).unwrap(), &tiny);
    }
    let mut file = tiny.gguf();
    file.remove("general.alignment");
    assert_values(&*open(&file.save(&folder.path().join("m.gguf"))).unwrap(), &tiny);
}

#[test]
fn shards_are_joined_and_may_be_symlinks() {
    let tiny = Tiny::new("qwen2", "Qwen2ForCausalLM");
    let (folder, blobs) = (tempdir().unwrap(), tempdir().unwrap());
    tiny.save_config(folder.path());
    let as_bf16 = |tensor: Tensor| Tensor {
        dtype: "BF16",
        data: tensor.data.chunks(4).flat_map(|raw| [raw[2], raw[3]]).collect(),
        ..tensor
    };
    let tensors: Vec<Tensor> = tiny.tensors().into_iter().map(as_bf16).collect();
    let mut weight_map = serde_json::Map::new();
    for (shard, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("part-{shard}.safetensors");
        let blob = blobs.path().join(format!("blob{shard}"));
        std::fs::write(&blob, safetensors(part)).unwrap();
        std::os::unix::fs::symlink(&blob, folder.path().join(&name)).unwrap();
        weight_map.extend(part.iter().map(|tensor| (tensor.name.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let opened = open(folder.path()).unwrap();
    assert_values(&*opened, &tiny);
    let info = opened.info();
    assert_eq!(info.files.len(), 2);
    let bytes: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
    assert_eq!(info.stored_bytes, [("bf16".to_owned(), bytes as u64)].into());
    let hashes = sha256_files(&info.files, &mut |_| {}).unwrap();
    assert_eq!(hashes[0].0, "part-0.safetensors");
    assert_ne!(hashes[0].1, hashes[1].1);
}

#[test]
fn tensors_that_the_model_does_not_use_are_ignored_in_safetensors() {
    let tiny = Tiny::llama();
    let folder = tempdir().unwrap();
    tiny.save_config(folder.path());
    let mut tensors = tiny.tensors();
    tensors.push(Tensor { name: "position_ids".into(), dtype: "I64", shape: vec![1], data: vec![0; 8] });
    let path = folder.path().join("other.safetensors");
    std::fs::write(&path, safetensors(&tensors)).unwrap();
    assert_values(&*open(&path).unwrap(), &tiny);
}

#[test]
fn a_folder_with_one_gguf_file_is_that_model() {
    let tiny = Tiny::llama();
    let folder = tempdir().unwrap();
    tiny.gguf().save(&folder.path().join("any name.gguf"));
    assert_eq!(open(folder.path()).unwrap().info().format, "gguf");
}

#[test]
fn frequency_factors_of_a_gguf_become_rope_scaling() {
    let mut file = Tiny::llama().gguf();
    let factors: Vec<f32> = (0..HEAD_DIM / 2).map(|pair| 1.0 + pair as f32).collect();
    file.tensors.push(GgufTensor {
        name: b"rope_freqs.weight".to_vec(),
        ne: vec![factors.len() as u64],
        kind: 0,
        data: f32_bytes(&factors),
        offset: None,
    });
    let config = opened_config(&file);
    assert_eq!(config.rope.scaling, RopeScaling::Factors { factors });
}

#[test]
fn linear_rope_scaling_of_a_gguf_is_read() {
    let mut file = Tiny::llama().gguf();
    file.set("llama.rope.scaling.type", Meta::Text("linear"));
    file.set("llama.rope.scaling.factor", Meta::F32(2.5));
    assert_eq!(opened_config(&file).rope.scaling, RopeScaling::Linear { factor: 2.5 });
}

#[test]
fn absent_gguf_keys_take_the_formats_defaults() {
    let mut file = Tiny::llama().gguf();
    let expected = opened_config(&file);
    for key in ["llama.attention.key_length", "llama.rope.dimension_count", "llama.vocab_size"] {
        file.remove(key);
    }
    assert_eq!(opened_config(&file), expected);
    file.remove("llama.rope.freq_base");
    assert_eq!(opened_config(&file).rope.theta, 10_000.0);
}

fn opened_config(file: &crate::files::GgufFile) -> Config {
    let folder = tempdir().unwrap();
    Gguf::open(&file.save(&folder.path().join("m.gguf"))).unwrap().config().clone()
}

#[test]
fn the_vocabulary_is_handed_over_as_stored() {
    let folder = tempdir().unwrap();
    let path = Tiny::llama().gguf().save(&folder.path().join("m.gguf"));
    let expected = GgufVocab {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        tokens: (0..VOCAB).map(|id| format!("t{id}")).collect(),
        token_types: vec![1; VOCAB],
        merges: vec!["t 1".into(), "t 2".into()],
        bos_token_id: Some(1),
        eos_token_id: None,
        unknown_token_id: None,
        add_bos_token: Some(false),
    };
    assert_eq!(Gguf::open(&path).unwrap().vocab().unwrap(), expected);
}

#[test]
fn values_that_are_not_numbers_are_found_by_index() {
    let tiny = Tiny::llama();
    let folder = tempdir().unwrap();
    let mut file = tiny.gguf();
    file.tensor("blk.0.attn_v.weight").data[4 * 77..4 * 78].copy_from_slice(&f32::NAN.to_le_bytes());
    let opened = open(&file.save(&folder.path().join("m.gguf"))).unwrap();
    let tensor = opened.tensor("model.layers.0.self_attn.v_proj.weight").unwrap();
    assert_eq!((tensor.dtype, first_non_finite(&tensor)), (StoredDType::F32, Some(77)));
}

/// Models committed as files, made by another program.
#[test]
fn the_committed_tiny_models_open_in_every_format_they_have() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let mut compared = 0;
    for entry in root.read_dir().unwrap() {
        let folder = entry.unwrap().path();
        if !folder.join("config.json").exists() {
            continue;
        }
        let opened = open(&folder).unwrap();
        let gguf = folder.join("model.gguf").exists().then(|| open(&folder.join("model.gguf")).unwrap());
        for spec in tensors(opened.config()) {
            let tensor = opened.tensor(&spec.name).unwrap();
            assert_eq!(first_non_finite(&tensor), None);
            if let Some(gguf) = &gguf {
                assert_eq!(gguf.tensor(&spec.name).unwrap().to_f32().unwrap(), tensor.to_f32().unwrap());
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "no model under {} has both formats", root.display());
}
