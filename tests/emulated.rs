//! The CUDA backend without a GPU: a stand-in driver (`tests/emulated_gpu`), compiled by g++ together with the
//! unmodified kernels, lets the real host code run. Tests named `on_the_device_…` run in a child process in which the
//! loader finds that driver; what they compare with is the reference backend.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/fake_nvml.rs"]
mod fake_nvml;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use tokmeter::arch::TensorRole;
use tokmeter::backend::check::{OpCheck, check_ops};
use tokmeter::backend::cuda::supports;
use tokmeter::backend::{
    Backend, Batch, BufferUse, Cuda, CudaDType, CudaOptions, Head, Reference, Sampling, TokenInput, WeightUse,
};
use tokmeter::clock::Clock;
use tokmeter::engine::{Engine, EngineLimits, LlmEngine, Request, StepOutput, score};
use tokmeter::model::{Model, shape_of};
use tokmeter::record::Maybe;
use tokmeter::weights::slice::Slice;
use tokmeter::weights::synthetic::Synthetic;
use tokmeter::weights::{HostTensor, StoredDType, Weights, open};

/// The folder with the stand-in `libcuda.so.1`, built once; none without g++.
fn driver() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(build_driver).as_deref()
}

fn build_driver() -> Option<PathBuf> {
    if Command::new("g++").arg("--version").output().is_err() {
        common::waived("g++ is missing, which compiles the stand-in CUDA driver");
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated_gpu");
    std::fs::create_dir_all(&folder).unwrap();
    let (library, made) = (folder.join("libcuda.so.1"), folder.join(format!("{}.so", std::process::id())));
    if !is_newer(&library, &["tests/emulated_gpu", "kernels"]) {
        let flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DCUDA_EMU"];
        let folders = ["-shared", "-fPIC", "-I", "tests/emulated_gpu", "-I", "kernels"];
        let status = Command::new("g++")
            .args(flags)
            .args(folders)
            .arg("tests/emulated_gpu/driver.cpp")
            .arg("-o")
            .arg(&made)
            .status()
            .unwrap();
        assert!(status.success(), "the stand-in driver does not compile");
        std::fs::rename(&made, &library).unwrap();
    }
    Some(folder)
}

/// Whether `file` was made after everything in `folders`.
fn is_newer(file: &Path, folders: &[&str]) -> bool {
    let changed = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified());
    let Ok(made) = changed(file) else { return false };
    let sources = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    sources.map(|entry| changed(&entry.unwrap().path()).unwrap()).all(|time| time < made)
}

/// Runs the ignored test `name` of this file where the loader finds the stand-in driver.
fn on_the_device(name: &str, settings: &[(&str, &str)]) {
    let Some(folder) = driver() else { return };
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{settings:?}\n{stdout}\n{stderr}");
    print!("{stdout}");
}

/// The program itself on the stand-in driver.
fn tokmeter(settings: &[(&str, &str)], arguments: &[&str]) -> Option<Output> {
    let folder = driver()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokmeter"));
    command.args(arguments).env("LD_LIBRARY_PATH", folder).envs(settings.iter().copied());
    Some(command.output().unwrap())
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_operation_agrees_with_the_reference() {
    on_the_device("on_the_device_every_operation_in_bf16", &[]);
    on_the_device("on_the_device_every_operation_in_f16", &[("EMU_ORDER", "reverse")]);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_every_operation_in_bf16() {
    assert_all_pass(CudaDType::Bf16, StoredDType::BF16);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_every_operation_in_f16() {
    assert_all_pass(CudaDType::F16, StoredDType::F16);
}

fn assert_all_pass(dtype: CudaDType, stored: StoredDType) {
    let options = CudaOptions { dtype, ..CudaOptions::default() };
    let candidate = |shape| Cuda::new(0, shape, options);
    let is_supported = |shape: &_| supports(shape).is_ok();
    let checks = check_ops(|shape| Ok(Reference::new(shape)), candidate, stored, is_supported).unwrap();
    let failed: Vec<&OpCheck> = checks.iter().filter(|check| !check.passed).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), checks.len());
    for op in ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"] {
        let worst = checks.iter().filter(|check| check.op == op).map(|check| check.tolerance_used);
        let count = checks.iter().filter(|check| check.op == op).count();
        assert!(count >= 30, "{op} was checked {count} times");
        println!("{op}: {:.3} of the tolerance used, {count} checks", worst.fold(0.0, f64::max));
    }
}

#[test]
fn the_forward_pass_agrees_with_the_reference() {
    on_the_device("on_the_device_the_forward_pass", &[]);
}

const TINY: [&str; 3] = ["models/tiny/llama", "models/tiny/qwen2", "models/tiny/qwen3"];

fn cuda_model(path: &str, options: CudaOptions) -> (Cuda, Model<Cuda>) {
    let weights = open(Path::new(path)).unwrap();
    let mut cuda = Cuda::new(0, shape_of(weights.config()), options).unwrap();
    let model = Model::load(&mut cuda, weights.as_ref(), &mut |_| {}).unwrap();
    (cuda, model)
}

/// Log-probabilities of the whole vocabulary under teacher forcing.
fn log_probabilities<B: Backend>(mut backend: B, path: &str, text: &[u32]) -> Vec<f64> {
    let weights = open(Path::new(path)).unwrap();
    let model = Model::load(&mut backend, weights.as_ref(), &mut |_| {}).unwrap();
    let score = score(&mut backend, &model, text, weights.config().vocab_size, 4).unwrap();
    let by_token = |mut top: Vec<(u32, f64)>| {
        top.sort_by_key(|(token, _)| *token);
        top.into_iter().map(|(_, log)| log)
    };
    score.top.into_iter().flat_map(by_token).collect()
}

/// Ours may be no further from f32 than a plain implementation that rounds what it keeps to bf16: at most a tenth
/// further, on average and in the worst hundredth.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_the_forward_pass() {
    let text: Vec<u32> = (0..100u32).map(|i| (i * 37 + i * i) % 320).collect();
    for path in TINY {
        let shape = shape_of(open(Path::new(path)).unwrap().config());
        let right = log_probabilities(Reference::new(shape.clone()), path, &text);
        let bf16 = |value| half::bf16::from_f32(value).to_f32();
        let rounded = log_probabilities(Reference::rounding(shape.clone(), bf16), path, &text);
        let found = log_probabilities(Cuda::new(0, shape, CudaOptions::default()).unwrap(), path, &text);
        let errors = |values: &[f64]| {
            let mut errors: Vec<f64> = values.iter().zip(&right).map(|(a, b)| (a - b).abs()).collect();
            errors.sort_by(f64::total_cmp);
            (errors.iter().sum::<f64>() / errors.len() as f64, errors[errors.len() / 100 * 99])
        };
        let (ours, plain) = (errors(&found), errors(&rounded));
        println!(
            "{path}: mean {:.5}, p99 {:.5} nat from f32; plain bf16 {:.5}, {:.5}",
            ours.0, ours.1, plain.0, plain.1
        );
        assert!(ours.0 <= 1.1 * plain.0 && ours.1 <= 1.1 * plain.1, "{path}: {ours:?}, plain bf16 {plain:?}");
    }
}

#[test]
fn a_replayed_graph_gives_the_bits_of_single_launches() {
    on_the_device("on_the_device_graphs_and_single_launches", &[]);
}

fn requests() -> Vec<Request> {
    let request = |id: u64| Request {
        id,
        prompt: (0..5 + id as u32 * 13).map(|i| (i * 31 + id as u32 * 7) % 320).collect(),
        max_tokens: 6 + id as u32 * 3,
        sampling: Sampling { temperature: [0.0, 0.8][id as usize % 2], seed: id },
        hold: false,
    };
    (0..5).map(request).collect()
}

/// Tokens of all requests in one engine, in the order of their ids.
fn tokens<B: Backend>(engine: &mut LlmEngine<B>, requests: &[Request]) -> Vec<Vec<u32>> {
    for request in requests {
        engine.submit(request.clone()).unwrap();
    }
    let mut tokens = vec![Vec::new(); requests.len()];
    let mut output = StepOutput::default();
    while engine.step(&mut output).unwrap() {
        for event in &output.events {
            tokens[event.request as usize].push(event.token);
        }
    }
    tokens
}

const LIMITS: EngineLimits = EngineLimits { max_batch: 5, chunk: 24, pages: 64, max_context: 200 };

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_graphs_and_single_launches() {
    let run = |graphs| {
        let (cuda, model) = cuda_model(TINY[0], CudaOptions { graphs, ..CudaOptions::default() });
        let mut engine = LlmEngine::new(cuda, model, LIMITS, Clock::monotonic()).unwrap();
        let first = tokens(&mut engine, &requests());
        // New buffers at other addresses: what was captured before must not be replayed.
        let (cuda, model) = engine.into_parts().unwrap();
        let limits = EngineLimits { pages: 80, max_batch: 9, ..LIMITS };
        let mut engine = LlmEngine::new(cuda, model, limits, Clock::monotonic()).unwrap();
        (first, tokens(&mut engine, &requests()))
    };
    let (eager, graphs) = (run(false), run(true));
    assert_eq!(eager.0, eager.1);
    assert_eq!(eager, graphs);
    let (eager, graphs) = (logits_of_decode_steps(false), logits_of_decode_steps(true));
    assert!(eager.iter().all(|logits| logits.iter().all(|logit| logit.is_finite())));
    assert_eq!(eager, graphs, "logits differ in their bits");
}

/// Logits of steps of 1 to 5 sequences, each twice so that the second is a replay.
fn logits_of_decode_steps(graphs: bool) -> Vec<Vec<f32>> {
    let (mut cuda, model) = cuda_model(TINY[2], CudaOptions { graphs, ..CudaOptions::default() });
    let mut kv = cuda.kv_cache(20).unwrap();
    let mut workspace = tokmeter::model::Workspace::new(&mut cuda, 64, 5).unwrap();
    let (mut batch, mut lengths) = (Batch::default(), [0u32; 5]);
    let (mut all, mut taken) = (Vec::new(), Vec::new());
    for sequences in [1usize, 1, 3, 3, 5, 5, 2] {
        batch.clear();
        for (s, length) in lengths[..sequences].iter_mut().enumerate() {
            let token = TokenInput::Id(s as u32 * 11 + *length);
            let pages = [s as u32 * 2, s as u32 * 2 + 1];
            batch.push([token], *length, &pages, Some(Sampling::GREEDY));
            *length += 1;
        }
        batch.keep_logits = true;
        model.forward(&mut cuda, &batch, &mut kv, &mut workspace).unwrap();
        cuda.sampled(&mut taken).unwrap();
        all.push(cuda.download(&workspace.logits, sequences, 320).unwrap());
    }
    all
}

#[test]
fn deterministic_output_does_not_depend_on_the_batch() {
    on_the_device("on_the_device_alone_and_together", &[]);
}

/// Every logit bit of a sequence alone (in one chunk, then decoding) and among others (in other chunks).
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_alone_and_together() {
    let options = CudaOptions { deterministic: true, ..CudaOptions::default() };
    let engine = |limits| {
        let (cuda, model) = cuda_model(TINY[1], options);
        LlmEngine::new(cuda, model, limits, Clock::monotonic()).unwrap()
    };
    let together = tokens(&mut engine(LIMITS), &requests());
    for (index, request) in requests().into_iter().enumerate() {
        let alone = Request { id: 0, ..request };
        let limits = EngineLimits { max_batch: 1, chunk: 128, ..LIMITS };
        assert_eq!(tokens(&mut engine(limits), &[alone])[0], together[index], "request {index}");
    }
}

#[test]
fn made_up_weights_have_the_same_bits_whoever_makes_them() {
    on_the_device("on_the_device_weights_are_made_or_brought", &[("EMU_ORDER", "3")]);
}

/// A whole slice hands out the same values, but not how to make them.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_weights_are_made_or_brought() {
    let config = open(Path::new(TINY[2])).unwrap().config().clone();
    let (layers, vocab_size) = (config.num_hidden_layers, config.vocab_size);
    let made = Synthetic::new(config, 11);
    let brought = Slice::new(&made, layers, vocab_size);
    for dtype in [CudaDType::Bf16, CudaDType::F16] {
        let logits = |weights: &dyn Weights| {
            let options = CudaOptions { dtype, ..CudaOptions::default() };
            let mut cuda = Cuda::new(0, shape_of(weights.config()), options).unwrap();
            let model = Model::load(&mut cuda, weights, &mut |_| {}).unwrap();
            let memory = cuda.memory().weights_bytes;
            let scored = score(&mut cuda, &model, &[3, 1, 4, 1, 5], vocab_size, 0).unwrap();
            (memory, scored)
        };
        assert_eq!(logits(&made), logits(&brought), "{dtype:?}");
    }
}

#[test]
fn a_suites_cell_without_room_is_skipped_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let (out, suite) = (folder.path().join("record.json"), folder.path().join("suite.toml"));
    let text = "name = 'own'\ndescription = 'd'\nrepeat = 1\nmin_seconds = 0.05\nwarmup_seconds = 0\n\
                [[cells]]\nkind = 'decode'\nbatch = '1,64'\ndepth = 200\nosl = 2\n\
                [[cells]]\nkind = 'prefill'\nbatch = 1\nisl = 100000\n";
    std::fs::write(&suite, text).unwrap();
    let arguments = [
        "run",
        "--device",
        "cuda:0",
        "-m",
        TINY[0],
        "-o",
        out.to_str().unwrap(),
        "--suite",
        suite.to_str().unwrap(),
    ];
    // Room for the weights and some pages, but not for 64 sequences of 202 tokens.
    let Some(output) = tokmeter(&[("EMU_MEMORY_BYTES", "6000000")], &arguments) else { return };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let outcome = |cell: usize| record["cells"][cell]["outcome"].clone();
    assert_eq!(outcome(0)["kind"], "measured");
    assert!(
        outcome(1)["why"]
            .as_str()
            .unwrap()
            .starts_with("a batch of 64 sequences of 203 tokens needs 832 KV pages")
    );
    assert!(outcome(2)["why"].as_str().unwrap().contains("exceed the model's context of"), "{}", outcome(2));
    assert!(stderr(&output).contains("skipped decode/b64/d200/o2: a batch of 64"), "{}", stderr(&output));
}

#[test]
fn wrong_use_is_an_error_that_says_what_was_expected() {
    on_the_device("on_the_device_wrong_use", &[]);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_wrong_use() {
    let (mut cuda, model) = cuda_model(TINY[0], CudaOptions::default());
    let mut kv = cuda.kv_cache(1).unwrap();
    let mut workspace = tokmeter::model::Workspace::new(&mut cuda, 8, 8).unwrap();
    let mut batch = Batch::default();
    let mut error_of = |token, page: u32, cuda: &mut Cuda| {
        batch.clear();
        batch.push([token], 0, &[page], Some(Sampling::GREEDY));
        format!("{:#}", model.forward(cuda, &batch, &mut kv, &mut workspace).unwrap_err())
    };
    let error = error_of(TokenInput::Id(320), 0, &mut cuda);
    assert_eq!(error, "token id 320 is outside the embedding table of 320 rows");
    let error = error_of(TokenInput::Sampled(0), 0, &mut cuda);
    assert_eq!(error, "the previous step sampled 0 rows, expected at least 1");
    let error = error_of(TokenInput::Id(1), 1, &mut cuda);
    assert_eq!(error, "the batch needs page 2, and the KV cache has 1");
    assert!(cuda.sampled(&mut Vec::new()).unwrap_err().to_string().contains("no step is waiting"));
    // A failed step leaves no trace in the next one.
    let mut batch = Batch::default();
    batch.clear();
    batch.push([TokenInput::Id(1)], 0, &[0], Some(Sampling::GREEDY));
    model.forward(&mut cuda, &batch, &mut kv, &mut workspace).unwrap();
    cuda.sampled(&mut Vec::new()).unwrap();
    let error = cuda.kv_cache(1 << 24).unwrap_err().to_string();
    assert!(error.starts_with("out of device memory: the KV cache of 268435456 tokens needs "), "{error}");
    assert!(error.contains("are free\nhint: "), "{error}");
    // A logit that is not a number reaches the host as an error, not as a token.
    let mut upload = |usage, shape: Vec<usize>| {
        let bytes = 1f32.to_le_bytes().repeat(shape.iter().product());
        let (name, role, dtype) = ("ones".to_owned(), TensorRole::Linear, StoredDType::F32);
        cuda.upload(usage, &[HostTensor { name, role, dtype, shape, bytes: bytes.into() }]).unwrap()
    };
    let norm = upload(WeightUse::Vector, vec![64]);
    let head = Head { norm, lm_head: upload(WeightUse::Linear, vec![320, 64]) };
    let mut x = cuda.buffer(BufferUse::Residual, 1, 64).unwrap();
    cuda.fill(&mut x, &[f32::NAN; 64]).unwrap();
    let mut logits = cuda.buffer(BufferUse::Logits, 1, 320).unwrap();
    cuda.logits(&batch, &head, &x, &mut logits).unwrap();
    let error = cuda.sampled(&mut Vec::new()).unwrap_err().to_string();
    assert_eq!(error, "the logits of sample 0 are not numbers, expected finite values");
}

#[test]
fn a_run_on_the_emulated_device_is_marked_as_no_measurement() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let path = out.to_str().unwrap();
    let cells = ["--batch", "2", "--isl", "16", "--osl", "4", "--min-seconds", "0.05", "--repeat", "1"];
    let arguments = [&["run", "--device", "cuda:0", "-m", TINY[0], "-o", path], &cells[..]].concat();
    let Some(output) = tokmeter(&[], &arguments) else { return };
    assert!(output.status.success(), "{}", stderr(&output));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let reason = record["not_a_measurement"].as_str().unwrap();
    assert!(reason.starts_with("emulated GPU"), "{reason}");
    assert_eq!(record["engine"]["backend"], "cuda");
    assert_eq!(record["engine"]["device"], "cuda:0");
    assert_eq!(record["engine"]["compute_dtype"], "bf16");
    assert_eq!(record["engine"]["kernels"]["origins"]["gemm"], "emulated");
    assert_eq!(record["numerics"]["missing"], "model_was_named");
}

#[test]
fn a_run_on_the_emulated_device_meters_what_the_library_for_power_plays() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let path = out.to_str().unwrap();
    let cells = ["--batch", "1", "--depth", "8", "--osl", "2", "--min-seconds", "10.5", "--repeat", "1"];
    let arguments =
        [&["run", "--device", "cuda:0", "-m", TINY[0], "-o", path, "--power", "nvml"], &cells[..]].concat();
    let library = fake_nvml::library(false).to_str().unwrap();
    let settings = [("TOKMETER_NVML", library), ("FAKE_NVML", "any_uuid=1;trace=constant:300")];
    let Some(output) = tokmeter(&settings, &arguments) else { return };
    assert!(output.status.success(), "{}", stderr(&output));
    let record = tokmeter::record::read(&out).unwrap();
    assert_eq!(record.meter.source.value().unwrap(), "nvml_total_energy");
    assert_eq!(tokmeter::record::violations(&record), []);
    let window = &record.cells[0].runs[0].windows[0];
    match &window.energy {
        Maybe::Value(energy) => {
            let power_w = energy.energy_j / ((energy.t_b_ns - energy.t_a_ns) as f64 / 1e9);
            assert!((power_w / 300.0 - 1.0).abs() < 2e-3, "{energy:?}");
            assert_eq!(energy.doubts, [""; 0]);
        }
        // The emulated device's speed is that of a busy CPU: where it was not even, there is no energy.
        missing => assert_eq!(missing.reason(), Some("power_is_not_energy_per_token_times_rate")),
    }
    assert_eq!(window.temperature.value().unwrap().max_c, 61.0);
}

#[test]
fn each_failure_is_one_clear_error() {
    let run = ["run", "--device", "cuda:0", "-m", TINY[0], "--batch", "1", "--isl", "8"];
    for (settings, device, expected) in [
        (&[("EMU_NO_DEVICE", "1")][..], "cuda:0", "CUDA_ERROR_NO_DEVICE"),
        (
            &[("EMU_DRIVER_VERSION", "12010")],
            "cuda:0",
            "supports CUDA 12.1 only, and 12.2 (driver 535) is needed",
        ),
        (&[("EMU_COMPUTE_CAPABILITY", "75")], "cuda:0", "compute capability 7.5, expected at least 8.0"),
        (&[], "cuda:1", "there is no device cuda:1: the driver shows 1"),
        (&[("EMU_MEMORY_BYTES", "300000")], "cuda:0", "out of device memory: matrix products needs "),
        (&[("EMU_MEMORY_BYTES", "700000")], "cuda:0", "out of device memory: the model needs "),
        (&[("EMU_OTHER_BYTES", "536000000")], "cuda:0", "out of device memory: "),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("record.json");
        let mut arguments = run.to_vec();
        arguments[2] = device;
        arguments.extend(["-o", out.to_str().unwrap()]);
        let Some(output) = tokmeter(settings, &arguments) else { return };
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{settings:?} {text}");
        assert!(text.contains(expected) && text.contains("\nhint: "), "{settings:?} {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
}

#[test]
fn a_device_that_is_lost_leaves_the_record_so_far() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let path = out.to_str().unwrap();
    let cells = ["--batch", "1", "--isl", "8,16", "--min-seconds", "0.05", "--repeat", "1"];
    let arguments = [&["run", "--device", "cuda:0", "-m", TINY[0], "-o", path], &cells[..]].concat();
    let Some(output) = tokmeter(&[("EMU_LOSE_AFTER", "200")], &arguments) else { return };
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = std::fs::read_to_string(&out).unwrap();
    assert!(text.contains("CUDA_ERROR_LAUNCH_FAILED"), "{text}");
}
