//! Broken inputs through the whole program. Each is refused within seconds and 4 GB, with one line that names the file,
//! the thing, what was expected and what was found, the documented exit code, and nothing left behind.

#![allow(clippy::unwrap_used)]

#[path = "weights/files.rs"]
#[allow(dead_code)]
mod files;
#[path = "common/program.rs"]
mod program;
#[path = "weights/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use files::{GgufFile, Meta, safetensors};
use program::{Finished, tiny_model, tokmeter_limited};
use serde_json::json;
use tempfile::tempdir;
use tiny::{Tiny, f32_bytes};

const USAGE: i32 = 2;
const BAD_FILE: i32 = 3;
const FAILED: i32 = 1;

/// Address space of 4 GiB, in KiB.
const LITTLE_MEMORY: &str = "ulimit -v 4194304";
/// Files of half a KiB or one, which is too little for a record. The signal is ignored so that the write fails instead,
/// as on a full disk.
const FULL_DISK: &str = "ulimit -v 4194304; trap '' XFSZ; ulimit -f 1";
/// Enough on a busy machine, and less than the windows of runs that must not begin.
const PATIENCE: Duration = Duration::from_secs(40);

/// Runs the program, which must refuse: with `code` and one error line that says all of `words`.
fn assert_refused(folder: &Path, limits: &str, args: &[&str], code: i32, words: &[&str]) {
    let before = names_in(folder);
    let done = tokmeter_limited(folder, limits, args, PATIENCE);
    let place = format!("{args:?} gave {done:?}");
    assert_eq!(done.code, Some(code), "{place}");
    assert_one_sentence(&done, &place);
    for word in words {
        assert!(done.stderr.contains(word), "expected {word:?}: {place}");
    }
    assert_eq!(done.stdout, "", "{place}");
    assert_eq!(names_in(folder), before, "files were left behind: {place}");
}

fn assert_one_sentence(done: &Finished, place: &str) {
    // That the machine is not quiet may be said before.
    let lines = done.stderr.lines().filter(|line| !line.is_empty());
    let mut lines = lines.filter(|line| !line.starts_with("warning: the machine"));
    let error = lines.next().unwrap_or_default();
    assert!(error.starts_with("error: ") && !error.ends_with('.'), "{place}");
    // Clap shows the usage after its own errors.
    let rest = lines.all(|line| {
        ["hint: ", "Usage: ", "For more information", "  "].iter().any(|&begin| line.starts_with(begin))
    });
    assert!(rest, "{place}");
    assert!(!done.stderr.contains("panicked") && done.stderr.len() < 800, "{place}");
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// `run` on a model, short, with its record in the folder.
fn run_on<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", "-m", model, "-r", "1", "--min-seconds", "0", "--threads", "2", "-o", "out.json"], more]
        .concat()
}

fn f16(bits: u16, rest: usize) -> Vec<u8> {
    [&bits.to_le_bytes()[..], &vec![0x11; rest]].concat()
}

/// What is to be said, and what spoils a sound GGUF file.
type GgufCase = (&'static str, fn(&mut GgufFile));

const O_PROJ: &str = "blk.0.attn_output.weight";
const ONE_F16: u16 = 0x3c00;
const NAN_F16: u16 = 0x7e00;

const GGUF_CASES: [GgufCase; 22] = [
    ("begins with \"GGML\"", |file| file.magic = *b"GGML"),
    ("version 4, expected 2 or 3", |file| file.version = 4),
    ("announces 1152921504606846976 tensors", |file| file.tensor_count = Some(1 << 60)),
    ("announces 1152921504606846976 metadata keys", |file| file.metadata_count = Some(1 << 60)),
    ("is an array of 1152921504606846976 String values", |file| {
        file.set("a.b", Meta::Raw(9, files::array(8, 1 << 60, [])));
    }),
    ("inside tensor token_embd.weight", |file| file.tensor("blk.0.attn_norm.weight").offset = Some(64)),
    ("expected a multiple of the alignment 32", |file| file.tensor("blk.0.attn_q.weight").offset = Some(33)),
    ("general.alignment is 0, expected a power of two", |file| file.set("general.alignment", Meta::U32(0))),
    ("expected it inside the file", |file| file.tensor("blk.0.attn_q.weight").ne = vec![64, 1 << 50]),
    ("expected [64, 64] from the configuration", |file| file.tensor("blk.0.attn_q.weight").ne = vec![64, 32]),
    ("blk.1.ffn_up.weight (model.layers.1.mlp.up_proj.weight) is missing", |file| {
        file.tensors.retain(|tensor| tensor.name != b"blk.1.ffn_up.weight");
    }),
    ("tensor blk.0.attn_q.weight: has type 99 (unknown)", |file| {
        file.tensor("blk.0.attn_q.weight").kind = 99
    }),
    ("the vocabulary does not match: llama.vocab_size is 41", |file| {
        file.set("llama.vocab_size", Meta::U32(tiny::VOCAB as u32 + 1));
    }),
    ("embed_tokens.weight has shape [39, 64], expected [40, 64]", |file| {
        file.tensor("token_embd.weight").ne = vec![64, 39]
    }),
    ("general.architecture is \"mamba\", which is not supported", |file| {
        file.set("general.architecture", Meta::Text("mamba"));
    }),
    ("llama.rope.scaling.type", |file| file.set("llama.rope.scaling.type", Meta::Text("yarn"))),
    ("num_attention_heads is 5, expected a multiple", |file| {
        file.set("llama.attention.head_count", Meta::U32(5));
    }),
    ("num_hidden_layers is 1152921504606846976", |file| file.set("llama.block_count", Meta::U64(1 << 60))),
    ("tensor model.norm.weight has a value that is NaN or infinite at index 3", |file| {
        file.tensor("output_norm.weight").data[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
    }),
    ("tensor model.embed_tokens.weight has a value that is NaN or infinite at index 2559", |file| {
        let data = &mut file.tensor("token_embd.weight").data;
        let last = data.len() - 4;
        data[last..].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    }),
    // Q8_0: 34 bytes a block of 32, the scale first. Block 5 begins at element 160.
    ("o_proj.weight has a value that is NaN or infinite at index 160, expected finite numbers", |file| {
        let tensor = file.tensor(O_PROJ);
        tensor.kind = 8;
        tensor.data =
            (0..128).flat_map(|block| f16(if block == 5 { NAN_F16 } else { ONE_F16 }, 32)).collect();
    }),
    // Q4_1: 20 bytes a block of 32, scale and minimum first. The minimum of block 7 is infinite.
    ("o_proj.weight has a value that is NaN or infinite at index 224, expected finite numbers", |file| {
        let tensor = file.tensor(O_PROJ);
        tensor.kind = 3;
        tensor.data = (0..128)
            .flat_map(|block| [f16(ONE_F16, 0), f16(if block == 7 { 0x7c00 } else { 0 }, 16)].concat())
            .collect();
    }),
];

#[test]
fn broken_gguf_files_are_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("broken.gguf");
    for (expected, spoil) in GGUF_CASES {
        let mut file = Tiny::llama().gguf();
        spoil(&mut file);
        file.save(&path);
        let args = run_on("broken.gguf", &["--isl", "8"]);
        assert_refused(folder.path(), LITTLE_MEMORY, &args, BAD_FILE, &["broken.gguf", expected]);
    }
}

#[test]
fn a_sound_file_of_the_same_kind_is_measured() {
    let folder = tempdir().unwrap();
    let mut file = Tiny::llama().gguf();
    let tensor = file.tensor(O_PROJ);
    (tensor.kind, tensor.data) = (8, (0..128).flat_map(|_| f16(ONE_F16, 32)).collect());
    file.save(&folder.path().join("sound.gguf"));
    let done =
        tokmeter_limited(folder.path(), LITTLE_MEMORY, &run_on("sound.gguf", &["--isl", "8"]), PATIENCE);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.stdout.contains("prefill/b1/i8"), "{done:?}");
}

#[test]
fn truncated_and_flipped_gguf_headers_are_refused_or_harmless() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("broken.gguf");
    let file = Tiny::llama().gguf();
    let (whole, header_bytes) = (file.bytes(), file.header().len());
    for length in [0, 3, 20, 100, header_bytes - 1, header_bytes + 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let args = run_on("broken.gguf", &["--isl", "8"]);
        assert_refused(folder.path(), LITTLE_MEMORY, &args, BAD_FILE, &["broken.gguf", "byte"]);
    }
    // Seeded places; a flip in the text of a token does no harm, all others must be refused in one sentence.
    for flip in 0..24 {
        let mut bytes = whole.clone();
        bytes[flip * 7919 % header_bytes] ^= 1 << (flip % 8);
        std::fs::write(&path, bytes).unwrap();
        let done =
            tokmeter_limited(folder.path(), LITTLE_MEMORY, &run_on("broken.gguf", &["--isl", "8"]), PATIENCE);
        match done.code {
            Some(0) => std::fs::remove_file(folder.path().join("out.json")).unwrap(),
            code => {
                assert_eq!(code, Some(BAD_FILE), "flip {flip}: {done:?}");
                assert_one_sentence(&done, &format!("flip {flip}: {done:?}"));
                assert!(done.stderr.contains("broken.gguf"), "{done:?}");
            }
        }
    }
}

/// File to spoil, its new content, and what is to be said.
type FolderCase = (&'static str, Vec<u8>, &'static [&'static str]);

#[test]
fn broken_checkpoint_folders_are_refused() {
    let tiny = Tiny::llama();
    let whole = safetensors(&tiny.tensors());
    let config = |name: &str, value: serde_json::Value| {
        let mut config = tiny.config.clone();
        config[name] = value;
        config.to_string().into_bytes()
    };
    let nan = {
        let mut tensors = tiny.tensors();
        let norm = tensors.iter_mut().find(|tensor| tensor.name == "model.norm.weight").unwrap();
        norm.data = f32_bytes(&[vec![1.0; 9], vec![f32::NAN], vec![1.0; 54]].concat());
        safetensors(&tensors)
    };
    let weights = "model.safetensors";
    let cases: Vec<FolderCase> = vec![
        (weights, whole[..whole.len() - 1].to_vec(), &["model.safetensors", "no valid safetensors header"]),
        (weights, whole[..100].to_vec(), &["model.safetensors", "announces a header of"]),
        (
            weights,
            (1u64 << 60).to_le_bytes().to_vec(),
            &["announces a header of 1152921504606846976 bytes, expected"],
        ),
        (
            weights,
            safetensors(&tiny.tensors()[1..]),
            &["embed_tokens.weight is missing, expected it with shape [40, 64]"],
        ),
        (weights, nan, &["model.safetensors: tensor model.norm.weight has", "NaN or infinite at index 9"]),
        ("config.json", b"\xff\xfenot json".to_vec(), &["config.json"]),
        ("config.json", b"{\"a\": ".to_vec(), &["config.json", "is not JSON"]),
        ("config.json", b"[".repeat(100_000), &["config.json", "is not JSON"]),
        (
            "config.json",
            config("num_key_value_heads", json!(3)),
            &["config.json", "expected a multiple of num_key_value_heads 3"],
        ),
        (
            "config.json",
            config("architectures", json!(["MixtralForCausalLM"])),
            &["config.json", "MixtralForCausalLM"],
        ),
        (
            "config.json",
            config("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
            &["config.json", "yarn"],
        ),
        (
            "config.json",
            config("hidden_size", json!(1u64 << 60)),
            &["config.json", "hidden_size is 1152921504606846976, expected 1 to"],
        ),
        ("config.json", config("rms_norm_eps", json!("tiny")), &["config.json", "rms_norm_eps"]),
        (
            "model.safetensors.index.json",
            json!({"weight_map": {"model.norm.weight": "../outside.safetensors"}}).to_string().into_bytes(),
            &["index.json", "../outside.safetensors", "expected a plain name in its own folder"],
        ),
    ];
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    for (file, bytes, words) in cases {
        std::fs::create_dir(&model).unwrap();
        tiny.save_safetensors(&model);
        if file.ends_with("index.json") {
            std::fs::remove_file(model.join(weights)).unwrap();
        }
        std::fs::write(model.join(file), bytes).unwrap();
        assert_refused(folder.path(), LITTLE_MEMORY, &run_on("model", &["--isl", "8"]), BAD_FILE, words);
        std::fs::remove_dir_all(&model).unwrap();
    }
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let cases: [(&[&str], &[&str]); 26] = [
        (&["--isl", "0"], &["isl is 0, expected 1 to"]),
        (&["--isl", "8..1"], &["--isl: range '8..1' does not grow"]),
        (&["--isl", "1..4000000000"], &["--isl", "more than 1000 values"]),
        (&["--isl", "8,x"], &["--isl: 'x' is no number or range, expected"]),
        (&["--isl", "99999999999"], &["--isl", "is no number or range"]),
        (&["--isl", "999"], &["prefill/b1/i999", "999 prompt tokens", "context of 256 tokens"]),
        (&["--isl", "8", "--osl", "249"], &["249 output tokens", "context of 256 tokens"]),
        (&["--batch", "0", "--isl", "8"], &["batch is 0, expected 1 to"]),
        (&["--depth", "8", "--concurrency", "2"], &["--depth, --concurrency and --request-rate"]),
        (&["--concurrency", "2"], &["needs isl"]),
        (&["--isl", "8", "--suite", "quick"], &["--suite and sizes", "cannot be given together"]),
        (
            &["--request-rate", "NaN", "--isl", "8", "--osl", "8"],
            &["request_rate_per_s is NaN, expected more than 0"],
        ),
        (
            &["--request-rate", "-1", "--isl", "8", "--osl", "8"],
            &["request_rate_per_s is -1, expected more than 0"],
        ),
        (
            &["--request-rate", "fast", "--isl", "8", "--osl", "8"],
            &["--request-rate: 'fast' is no number, expected"],
        ),
        (&["--isl", "8", "--min-seconds", "-1"], &["min_seconds is -1, expected 0 to 86400"]),
        (&["--isl", "8", "--min-seconds", "NaN"], &["min_seconds is NaN, expected 0 to 86400"]),
        (&["--isl", "8", "--max-seconds", "1e9"], &["--max-seconds is 1000000000, expected"]),
        (&["--isl", "8", "--kv-memory", "1KiB"], &["--kv-memory", "1024 bytes, expected at least"]),
        (&["--isl", "8", "--kv-memory", "lots"], &["--kv-memory: 'lots' is no size, expected"]),
        (&["--isl", "8", "--chunk", "0"], &["--chunk is 0, expected 1 to"]),
        (&["--isl", "8", "--threads", "0"], &["--threads is 0, expected 1 to"]),
        (
            &["--isl", "8", "--price-per-gpu-hour", "cheap"],
            &["price 'cheap'", "expected an amount and a currency"],
        ),
        (
            &["--isl", "8", "--price-per-gpu-hour", "-2 USD"],
            &["price '-2 USD'", "expected an amount and a currency"],
        ),
        (&["--isl", "8", "--device", "tpu"], &["--device is 'tpu', expected auto, cpu or cuda:N"]),
        (&["--isl", "8", "--weights", "random"], &["--weights is 'random', expected checkpoint, synthetic"]),
        (&["--isl", "8", "--seed", "9007199254740992"], &["--seed", "9007199254740992"]),
    ];
    let folder = tempdir().unwrap();
    let model = tiny_model();
    for (more, words) in cases {
        // The last of a flag that is given twice would win; these cases give it once.
        let mut args = vec!["run", "-m", model.to_str().unwrap(), "-r", "1", "-o", "out.json"];
        args.extend(more);
        assert_refused(folder.path(), LITTLE_MEMORY, &args, USAGE, words);
    }
    for (args, words) in [
        (
            &["run", "-m", "no-such-model", "--isl", "8"][..],
            &["no known model is called \"no-such-model\""][..],
        ),
        (&["run", "--suite", "no-such-suite"], &["'no-such-suite', expected quick, gpu-quick, standard"]),
        (&["run", "-r", "0"], &["repeat is 0, expected 1 to 10000"]),
        (&["run", "--engine", "fake", "--fake-script", "{\"slow_down\":2}"], &["--fake-script", "slow_down"]),
        (&["run", "--no-such-flag"], &["--no-such-flag"]),
        (&["no-such-verb"], &["no-such-verb"]),
        (&["validate"], &["required arguments"]),
    ] {
        assert_refused(folder.path(), LITTLE_MEMORY, args, USAGE, words);
    }
}

#[test]
fn suites_that_are_broken_are_refused() {
    let head = "name='x'\ndescription='y'\nmin_seconds=0\nwarmup_seconds=0\n";
    let cases: [(&str, &[&str]); 7] = [
        ("name = [", &["suite.toml", "is no valid suite", "byte"]),
        ("", &["suite.toml", "missing field"]),
        (&format!("{head}cells=[]"), &["suite.toml", "has no cells, expected at least one"]),
        (
            &format!("{head}[[cells]]\nkind='train'\nbatch=1"),
            &["cells[0]: kind is 'train', expected prefill"],
        ),
        (
            &format!("{head}[[cells]]\nkind='prefill'\nbatch=0\nisl=8"),
            &["cells[0]: batch is 0, expected 1 to"],
        ),
        (&format!("{head}[[cells]]\nkind='prefill'\nbatch=1\nisl=8\ncolour=1"), &["suite.toml", "colour"]),
        (
            &format!("{head}[[cells]]\nkind='prefill'\nbatch='1..999'\nisl='1..999'"),
            &["more than 1000 cells"],
        ),
    ];
    let folder = tempdir().unwrap();
    for (text, words) in cases {
        std::fs::write(folder.path().join("suite.toml"), text).unwrap();
        let args = ["run", "--engine", "fake", "--suite", "suite.toml", "-o", "out.json"];
        assert_refused(folder.path(), LITTLE_MEMORY, &args, BAD_FILE, words);
    }
}

#[test]
fn files_that_are_no_records_are_refused_by_every_verb_that_reads_them() {
    let cases: [(&[u8], &str); 9] = [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"{}", "has no field schema, expected tokmeter-record/1"),
        (b"[1, 2]", "has no field schema, expected tokmeter-record/1"),
        (b"{\"schema\": \"vllm-bench/1\"}", "has schema vllm-bench/1, expected tokmeter-record/1"),
        (b"{\"schema\": \"tokmeter-record/2\"}", "has schema tokmeter-record/2, expected tokmeter-record/1"),
        (b"{\"schema\": \"tokmeter-record/1\"}", "missing field"),
        (b"{\"schema\": \"tokmeter-record/1\", \"tool\": NaN}", "is no JSON"),
        (b"\xff\xfe{}", "cannot be read as text"),
    ];
    let folder = tempdir().unwrap();
    let path = folder.path().join("foreign.json");
    for verb in ["validate", "report"] {
        for (bytes, expected) in cases {
            std::fs::write(&path, bytes).unwrap();
            let words = ["foreign.json", expected];
            assert_refused(folder.path(), LITTLE_MEMORY, &[verb, "foreign.json"], BAD_FILE, &words);
        }
        std::fs::write(&path, "[".repeat(1 << 20)).unwrap();
        assert_refused(folder.path(), LITTLE_MEMORY, &[verb, "foreign.json"], BAD_FILE, &["is no JSON"]);
        assert_refused(
            folder.path(),
            LITTLE_MEMORY,
            &[verb, "absent.json"],
            BAD_FILE,
            &["absent.json", "cannot be opened"],
        );
        assert_refused(
            folder.path(),
            LITTLE_MEMORY,
            &[verb, "."],
            BAD_FILE,
            &["is a folder, expected a record file"],
        );
    }
}

#[test]
fn a_place_that_cannot_take_the_record_is_refused_before_anything_is_measured() {
    let folder = tempdir().unwrap();
    let model = tiny_model();
    // A window of 100 s: the program would not end in time if it measured first.
    let run = |limits: &str, out: &str, words: &[&str]| {
        let args = ["run", "-m", model.to_str().unwrap(), "--isl", "8", "--min-seconds", "100", "-o", out];
        assert_refused(
            folder.path(),
            limits,
            &args,
            FAILED,
            &[&[out, "cannot write the record"], words].concat(),
        );
    };
    run(LITTLE_MEMORY, "absent/out.json", &["No such file or directory"]);
    run(LITTLE_MEMORY, ".", &["it is a folder, expected a file or a new name"]);
    run(FULL_DISK, "out.json", &["File too large"]);
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::FileTypeExt as _;
        run(LITTLE_MEMORY, "/dev/full", &["it is no regular file"]);
        run(LITTLE_MEMORY, "/proc/out.json", &[]);
        assert!(
            std::fs::metadata("/dev/full").unwrap().file_type().is_char_device(),
            "the device is untouched"
        );
    }
}

#[test]
fn an_unknown_way_of_cutting_text_is_an_error_and_not_a_guess() {
    let folder = tempdir().unwrap();
    let mut model = std::fs::read(tiny_model().join("model.gguf")).unwrap();
    let known = b"smollm";
    let at = model.windows(known.len()).position(|bytes| bytes == known).expect("the tokenizer's pre");
    model[at..at + known.len()].copy_from_slice(b"smullm");
    std::fs::write(folder.path().join("odd.gguf"), model).unwrap();
    std::fs::write(folder.path().join("prompts.jsonl"), "{\"id\": \"a\", \"text\": \"hello\"}\n").unwrap();
    assert_refused(
        folder.path(),
        LITTLE_MEMORY,
        &["check", "--prompts", "prompts.jsonl", "-m", "odd.gguf", "--out", "scores.jsonl"],
        BAD_FILE,
        &["odd.gguf", "tokenizer.ggml.pre is \"smullm\"", "expected smollm, llama-bpe, qwen2 or gpt-2"],
    );
}
