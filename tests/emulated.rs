//! The CUDA backend without a GPU: a stand-in driver (`tests/emulated_gpu`), compiled by g++ together with the
//! unmodified kernels, lets the real host code run. Tests named `on_the_device_…` run in a child process in which the
//! loader finds that driver; what they compare with is the reference backend.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/fake_nvml.rs"]
mod fake_nvml;

use std::path::Path;
use std::process::Output;

use common::stand_in::{Build, run_test, stderr, tokmeter};
use tokmeter::arch::TensorRole;
use tokmeter::backend::peaks::{HostMemory, Protocol};
use tokmeter::backend::{
    Backend, Batch, BufferUse, Cuda, CudaDType, CudaOptions, Head, Reference, Sampling, TokenInput, WeightUse,
};
use tokmeter::clock::Clock;
use tokmeter::engine::{Engine, EngineLimits, LlmEngine, Request, StepOutput, score};
use tokmeter::model::op_times::{OpTimer, StepShape};
use tokmeter::model::{Model, shape_of};
use tokmeter::record::{Ceilings, Kernels, Maybe, Outcome, Record, read};
use tokmeter::weights::slice::Slice;
use tokmeter::weights::synthetic::Synthetic;
use tokmeter::weights::{HostTensor, StoredDType, Weights, open};

/// Forward, reverse and two seeds that shuffle.
const ORDERS: [&str; 4] = ["forward", "reverse", "7", "12"];

/// Runs the ignored test `name` of this file on the stand-in driver.
fn on_the_device(name: &str, settings: &[(&str, &str)]) {
    on_a_device(Build::Plain, name, settings);
}

fn on_a_device(build: Build, name: &str, settings: &[(&str, &str)]) {
    let Some(output) = run_test(name, build, settings) else { return };
    let stdout = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && stdout.contains("1 passed");
    assert!(passed, "{build:?} {settings:?}\n{stdout}\n{}", stderr(&output));
    print!("{stdout}");
}

fn in_every_order(name: &str) {
    for order in ORDERS {
        on_the_device(name, &[("EMU_ORDER", order)]);
    }
}

const OPS: [&str; 7] = ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"];

/// `check --device cuda:0` as a user runs it.
fn check(build: Build, dtype: &str, settings: &[(&str, &str)]) -> Option<Output> {
    let arguments =
        ["check", "--device", "cuda:0", "--dtype", dtype, "-m", TINY[0], "--offline", "--format", "json"];
    tokmeter(build, settings, &arguments)
}

/// Its exit code and what it printed.
fn checked(output: &Output) -> (i32, serde_json::Value) {
    let report =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", stderr(output)));
    (output.status.code().unwrap(), report)
}

fn failed(parts: &serde_json::Value, name: &str) -> Vec<String> {
    let parts = parts.as_array().unwrap().iter().filter(|part| part["passed"] == false);
    parts.map(|part| part[name].as_str().unwrap().to_owned()).collect()
}

fn assert_all_agree(dtype: &str, output: &Output) {
    let (code, report) = checked(output);
    assert_eq!((code, &report["passed"]), (0, &true.into()), "{report:#}");
    assert_eq!((&report["backend"], &report["compute_dtype"]), (&"cuda".into(), &dtype.into()));
    for op in OPS {
        let line = report["ops"].as_array().unwrap().iter().find(|line| line["op"] == op).unwrap();
        assert!(line["cases"].as_u64().unwrap() >= 30, "{op} was checked {} times", line["cases"]);
        println!("{op}: {} of the tolerance used, {} checks", line["tolerance_used"], line["cases"]);
    }
    assert!(report["forward"].as_array().unwrap().len() >= 4, "{report:#}");
}

#[test]
fn every_operation_in_bf16_agrees_with_the_reference() {
    let Some(output) = check(Build::Plain, "bf16", &[]) else { return };
    assert_all_agree("bf16", &output);
}

#[test]
fn every_operation_in_f16_agrees_with_the_reference() {
    let Some(output) = check(Build::Plain, "f16", &[("EMU_ORDER", "reverse")]) else { return };
    assert_all_agree("f16", &output);
}

#[test]
fn a_wrong_kernel_fails_the_check_by_the_name_of_its_operation() {
    let Some(output) = check(Build::WrongAttention, "bf16", &[]) else { return };
    let (code, report) = checked(&output);
    assert_eq!((code, failed(&report["ops"], "op")), (1, vec!["attention".to_owned()]));
    assert!(!failed(&report["forward"], "case").is_empty(), "{report:#}");
}

#[test]
fn one_operation_alone_takes_no_other_kernel() {
    let arguments = ["check", "--device", "cuda:0", "--op", "mlp_out", "--case", "GQA 4, prompt of 45"];
    let settings = [("EMU_TRACE", "1")];
    let Some(output) = tokmeter(Build::Plain, &settings, &[&arguments[..], &["--format", "json"]].concat())
    else {
        return;
    };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["backend"], &report["only"]["cases"]), (&"cuda".into(), &1.into()), "{report:#}");
    assert_eq!(report["ops"][0]["worst_case"], "GQA 4, prompt of 45");
    let trace = stderr(&output);
    let launches = trace.lines().filter(|line| line.contains(", carve-out"));
    let ran: Vec<&str> = launches.filter_map(|line| line.strip_prefix("emulated GPU: ")).collect();
    assert!(!ran.is_empty() && ran.iter().all(|kernel| kernel.starts_with("gemm_")), "{ran:?}");
}

#[test]
fn operations_are_timed_with_weights_that_the_device_makes() {
    let name = "on_the_device_operation_times";
    let Some(output) = run_test(name, Build::Plain, &[("EMU_UPLOADS", "1")]) else { return };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), stderr(&output));
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}\n{stderr}");
    let number = |text: &str| text.parse::<u64>().unwrap();
    let rotated = stdout.lines().find_map(|line| line.strip_prefix("weights: ")).map(number).unwrap();
    let copy =
        |line: &str| line.strip_prefix("emulated GPU: ")?.strip_suffix(" bytes from the host").map(number);
    let brought: Vec<u64> = stderr.lines().filter_map(copy).collect();
    // Activations and what describes the steps are brought.
    assert!(!brought.is_empty() && brought.iter().sum::<u64>() < rotated / 4, "{rotated} {brought:?}");
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_operation_times() {
    let weights = Synthetic::new(open(Path::new(TINY[1])).unwrap().config().clone(), 0);
    let host = HostMemory {
        last_level_cache_bytes: Maybe::missing("not_asked"),
        available_bytes: Maybe::missing("not_asked"),
    };
    let protocol = Protocol {
        clock: Clock::monotonic(),
        probe_ns: 1,
        deadline_ns: u64::MAX,
        host,
        arithmetic_only: false,
    };
    let timer = OpTimer {
        make: &|shape| Cuda::new(0, shape, CudaOptions::default()),
        weights: &weights,
        ceilings: &Ceilings {
            last_level_cache_bytes: Maybe::Value(256 << 10),
            ..Ceilings::missing("not_measured")
        },
        protocol: &protocol,
        most_bytes: 64 << 20,
        captures: false,
    };
    let times = timer.time_all(&[StepShape::Decode { batch: 1, depth: 16 }]).unwrap();
    // Of a table only some rows are rotated, and attention has no weights.
    let has_weights = |op: &str| !matches!(op, "embed" | "attention");
    let rotated = times.iter().filter(|time| has_weights(time.op)).map(|time| time.rotated_bytes);
    println!("\nweights: {}", rotated.sum::<u64>());
}

#[test]
fn copies_of_a_weight_that_the_device_makes_differ() {
    on_the_device("on_the_device_copies_of_a_weight", &[]);
}

/// A table's rows, which embedding looks up, are those that the host makes of the same recipe.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_copies_of_a_weight() {
    let weights = Synthetic::new(open(Path::new(TINY[0])).unwrap().config().clone(), 0);
    let shape = shape_of(weights.config());
    let hidden = shape.hidden_size;
    let mut cuda = Cuda::new(0, shape, CudaOptions::default()).unwrap();
    let mut batch = Batch::default();
    batch.clear();
    batch.push((0..16).map(TokenInput::Id), 0, &[0], None);
    let mut rows = |copy| {
        let recipe = weights.recipe("model.embed_tokens.weight").unwrap().for_copy(copy);
        let table = cuda.generate(WeightUse::Embedding, std::slice::from_ref(&recipe)).unwrap().unwrap();
        let mut x = cuda.buffer(BufferUse::Residual, 16, hidden).unwrap();
        cuda.embed(&batch, &table, &mut x).unwrap();
        let found = cuda.download(&x, 16, hidden).unwrap();
        let host = |index| half::bf16::from_f32(recipe.generator.value(index)).to_f32();
        assert_eq!(found, (0..found.len() as u64).map(host).collect::<Vec<f32>>(), "copy {copy}");
        found
    };
    let copies = [0, 1, 2].map(&mut rows);
    for [a, b] in [[0, 1], [1, 2], [0, 2]] {
        let same = copies[a].iter().zip(&copies[b]).filter(|(a, b)| a == b).count();
        assert!(same < copies[a].len() / 20, "{same} values of copies {a} and {b} are the same");
    }
}

#[test]
fn the_forward_pass_agrees_with_the_reference() {
    in_every_order("on_the_device_the_forward_pass");
}

/// Two layers of the default model: the values of a trained checkpoint, dequantised, at its own shapes.
#[test]
fn two_layers_of_smollm2_agree_with_the_reference() {
    if common::cached_default_model().is_none() {
        return common::waived("smollm2-135m is not in the cache (`tokmeter models fetch smollm2-135m`)");
    }
    on_the_device("on_the_device_two_layers_of_smollm2", &[]);
}

const TINY: [&str; 3] = ["models/tiny/llama", "models/tiny/qwen2", "models/tiny/qwen3"];

fn cuda_model(path: &str, options: CudaOptions) -> (Cuda, Model<Cuda>) {
    let weights = open(Path::new(path)).unwrap();
    let mut cuda = Cuda::new(0, shape_of(weights.config()), options).unwrap();
    let model = Model::load(&mut cuda, weights.as_ref(), &mut |_| {}).unwrap();
    (cuda, model)
}

/// Log-probabilities of the whole vocabulary under teacher forcing.
fn log_probabilities<B: Backend>(mut backend: B, weights: &dyn Weights, text: &[u32]) -> Vec<f64> {
    let model = Model::load(&mut backend, weights, &mut |_| {}).unwrap();
    let score = score(&mut backend, &model, text, weights.config().vocab_size, 4).unwrap();
    let by_token = |mut top: Vec<(u32, f64)>| {
        top.sort_by_key(|(token, _)| *token);
        top.into_iter().map(|(_, log)| log)
    };
    score.top.into_iter().flat_map(by_token).collect()
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_the_forward_pass() {
    for path in TINY {
        assert_no_further_than_rounding(path, open(Path::new(path)).unwrap().as_ref(), 100);
    }
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_two_layers_of_smollm2() {
    let whole = open(&common::cached_default_model().unwrap()).unwrap();
    assert_no_further_than_rounding("smollm2-135m", &Slice::new(whole.as_ref(), 2, 1024), 40);
}

/// Ours may be no further from f32 than a plain implementation that rounds what it keeps to bf16: at most a tenth
/// further, on average and in the worst hundredth.
fn assert_no_further_than_rounding(name: &str, weights: &dyn Weights, tokens: u32) {
    let vocab_size = weights.config().vocab_size as u32;
    let text: Vec<u32> = (0..tokens).map(|i| (i * 37 + i * i) % vocab_size).collect();
    let shape = shape_of(weights.config());
    let right = log_probabilities(Reference::new(shape.clone()), weights, &text);
    let bf16 = |value| half::bf16::from_f32(value).to_f32();
    let rounded = log_probabilities(Reference::rounding(shape.clone(), bf16), weights, &text);
    let found = log_probabilities(Cuda::new(0, shape, CudaOptions::default()).unwrap(), weights, &text);
    let errors = |values: &[f64]| {
        let mut errors: Vec<f64> = values.iter().zip(&right).map(|(a, b)| (a - b).abs()).collect();
        errors.sort_by(f64::total_cmp);
        (errors.iter().sum::<f64>() / errors.len() as f64, errors[errors.len() / 100 * 99])
    };
    let (ours, plain) = (errors(&found), errors(&rounded));
    println!(
        "{name}: mean {:.5}, p99 {:.5} nat from f32; plain bf16 {:.5}, {:.5}",
        ours.0, ours.1, plain.0, plain.1
    );
    assert!(ours.0 <= 1.1 * plain.0 && ours.1 <= 1.1 * plain.1, "{name}: {ours:?}, plain bf16 {plain:?}");
}

#[test]
fn a_replayed_graph_gives_the_bits_of_single_launches() {
    in_every_order("on_the_device_graphs_and_single_launches");
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
    in_every_order("on_the_device_alone_and_together");
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
fn a_product_has_all_its_rows_on_both_sides_of_every_entrys_limit() {
    in_every_order("on_the_device_products_of_many_numbers_of_rows");
}

/// A weight of ones: each row of the product is the sum of a row of activations, exactly.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_products_of_many_numbers_of_rows() {
    let shape = shape_of(open(Path::new(TINY[0])).unwrap().config());
    let (hidden, depth) = (shape.hidden_size, shape.q_size());
    let mut cuda = Cuda::new(0, shape, CudaOptions::default()).unwrap();
    let bytes = vec![1.0f32; hidden * depth].iter().flat_map(|one| one.to_le_bytes()).collect::<Vec<u8>>();
    let (name, role, dtype) = ("ones".to_owned(), TensorRole::Linear, StoredDType::F32);
    let ones = HostTensor { name, role, dtype, shape: vec![hidden, depth], bytes: bytes.into() };
    let weight = cuda.upload(WeightUse::Linear, &[ones]).unwrap();
    for rows in [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65] {
        let mut y = cuda.buffer(BufferUse::Activation, rows, depth).unwrap();
        let mut x = cuda.buffer(BufferUse::Residual, rows, hidden).unwrap();
        let of_row = |row: usize| vec![(row + 1) as f32; depth];
        cuda.fill(&mut y, &(0..rows).flat_map(of_row).collect::<Vec<f32>>()).unwrap();
        cuda.fill(&mut x, &vec![0.5; rows * hidden]).unwrap();
        let mut batch = Batch::default();
        batch.clear();
        batch.push((0..rows as u32).map(TokenInput::Id), 0, &[0, 1, 2, 3, 4], None);
        cuda.attn_out(&batch, &weight, &y, &mut x).unwrap();
        let found = cuda.download(&x, rows, hidden).unwrap();
        let expected = |at: usize| ((at / hidden + 1) * depth) as f32 + 0.5;
        let wrong = found.iter().enumerate().find(|(at, value)| **value != expected(*at));
        assert_eq!(wrong, None, "{rows} rows");
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
    let Some(output) = tokmeter(Build::Plain, &[("EMU_MEMORY_BYTES", "6000000")], &arguments) else { return };
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
fn steps_may_be_queued_without_waiting_for_their_samples() {
    on_the_device("on_the_device_steps_without_waiting", &[]);
}

/// Six steps whose samples are all taken at the end, against the same steps one at a time: what a step reads from
/// pinned memory must not be overwritten by a later one.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_steps_without_waiting() {
    let run = |waits: bool, graphs: bool| {
        let (mut cuda, model) = cuda_model(TINY[0], CudaOptions { graphs, ..CudaOptions::default() });
        let mut kv = cuda.kv_cache(4).unwrap();
        let mut workspace = tokmeter::model::Workspace::new(&mut cuda, 8, 1).unwrap();
        let (mut batch, mut taken, steps) = (Batch::default(), Vec::new(), 6);
        for step in 0..steps {
            batch.clear();
            let tokens = [TokenInput::Id(17 * step + 3)];
            batch.push(tokens, step, &[2], Some(Sampling { temperature: 0.9, seed: u64::from(step) }));
            model.forward(&mut cuda, &batch, &mut kv, &mut workspace).unwrap();
            if waits {
                cuda.sampled(&mut taken).unwrap();
            }
        }
        (0..if waits { 0 } else { steps }).for_each(|_| cuda.sampled(&mut taken).unwrap());
        taken
    };
    let right = run(true, false);
    assert_eq!(right.len(), 6);
    assert_eq!((&right, &right), (&run(false, false), &run(false, true)));
}

#[test]
fn an_array_that_the_host_made_too_small_is_seen_by_the_address_sanitizer() {
    let name = "on_the_device_too_few_frequencies";
    let Some(output) = run_test(name, Build::Sanitized, &[]) else { return };
    let text = stderr(&output);
    assert!(!output.status.success(), "nothing was noticed");
    assert!(text.contains("heap-buffer-overflow") && text.contains("rope.cu:"), "{text}");
    on_a_device(Build::Sanitized, "on_the_device_steps_without_waiting", &[("EMU_ORDER", "7")]);
    on_a_device(Build::Sanitized, "on_the_device_wrong_use", &[]);
}

/// The frequencies of one rotary pair are missing.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_too_few_frequencies() {
    let weights = open(Path::new(TINY[0])).unwrap();
    let mut shape = shape_of(weights.config());
    shape.inv_freq.pop();
    log_probabilities(Cuda::new(0, shape, CudaOptions::default()).unwrap(), weights.as_ref(), &[1, 2, 3]);
}

/// A run with these kernels, which are kept in `cache`: its error, or its record.
fn run_with(form: &str, cache: &Path, settings: &[(&str, &str)]) -> Option<Result<Record, String>> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let cells = ["--batch", "2", "--isl", "16", "--osl", "4", "--min-seconds", "0.05", "--repeat", "1"];
    let path = out.to_str().unwrap();
    let arguments =
        [&["run", "--device", "cuda:0", "-m", TINY[0], "-o", path, "--jit", form], &cells[..]].concat();
    let settings = [&[("TOKMETER_CACHE", cache.to_str().unwrap())], settings].concat();
    let output = tokmeter(Build::Plain, &settings, &arguments)?;
    Some(if output.status.success() { Ok(read(&out).unwrap()) } else { Err(stderr(&output)) })
}

#[test]
fn kernels_that_the_driver_compiles_make_the_same_tokens_and_say_their_form() {
    let folder = tempfile::tempdir().unwrap();
    let Some(sass) = run_with("sass", folder.path(), &[]) else { return };
    let ptx = match run_with("ptx", folder.path(), &[]).unwrap() {
        Ok(record) => record,
        Err(error) => {
            assert!(
                error.contains("(--jit ptx) is in no binary: the kernel compiler libnvrtc.so was not found"),
                "{error}"
            );
            return common::waived("NVRTC is missing, which makes intermediate code");
        }
    };
    let again = run_with("ptx", folder.path(), &[]).unwrap().unwrap();
    let kernels = |record: &Record| {
        let kernels = record.engine.kernels.value().unwrap();
        (kernels.form.value().unwrap().clone(), kernels.origins["gemm"].clone())
    };
    let named = |form: &str, origin: &str| (form.to_owned(), origin.to_owned());
    let sass = sass.unwrap();
    assert_eq!(kernels(&sass), named("sass", "emulated"));
    assert_eq!((kernels(&ptx), kernels(&again)), (named("ptx", "compiled"), named("ptx", "cache")));
    let tokens = |record: &Record| record.cells[0].runs[0].output_token_sha256.value().unwrap().clone();
    assert_eq!((tokens(&ptx), tokens(&again)), (tokens(&sass), tokens(&sass)));
    // What the driver's compiler says is part of the error.
    let refused = run_with("ptx", folder.path(), &[("EMU_MODULE_ERROR", "222")]).unwrap().unwrap_err();
    let expected = "cuModuleLoadDataEx of the intermediate code of embed.cu, whose compiler says \"ptxas: asked to fail\": \
                    CUDA_ERROR_UNSUPPORTED_PTX_VERSION";
    assert!(
        refused.contains(expected) && refused.contains("install a driver as new as the kernel compiler"),
        "{refused}"
    );
}

/// How often the stand-in driver said `what`.
fn said(output: &Output, what: &str) -> usize {
    stderr(output).lines().filter(|line| *line == format!("emulated GPU: {what}")).count()
}

#[test]
fn a_check_of_many_backends_opens_the_device_and_loads_each_kernel_file_once() {
    // Each shape has a backend of its own.
    let arguments = ["check", "--device", "cuda:0", "--op", "embed"];
    let Some(output) = tokmeter(Build::Plain, &[("EMU_TRACE", "loads")], &arguments) else { return };
    let output = &output;
    assert!(output.status.success(), "{}", stderr(output));
    assert_eq!((said(output, "context retained"), said(output, "context released")), (1, 0));
    let files = std::fs::read_dir("kernels").unwrap().map(|entry| entry.unwrap().file_name());
    // Those of the ceilings are not needed here.
    let needed = files.filter(|name| name.as_encoded_bytes().ends_with(b".cu") && name != "peaks.cu").count();
    assert_eq!((said(output, "module loaded"), said(output, "module unloaded")), (needed, 0));
}

/// A kernel that wants another split of shared memory and L1 than the one before it cannot overlap it.
#[test]
fn the_kernels_of_a_decode_step_want_all_the_shared_memory_that_there_is() {
    let Some((output, _)) = short_run(&[("EMU_TRACE", "1")]) else { return };
    let text = stderr(&output);
    let decode = ["embed", "rms_norm", "gemm_stream", "rope_kv", "attention_decode", "sample_stage"];
    for name in decode {
        let runs = text.lines().filter(|line| line.contains(&format!("emulated GPU: {name}")));
        let (all, right) =
            (runs.clone().count(), runs.filter(|line| line.ends_with("carve-out 100")).count());
        assert!(all > 0 && all == right, "{name}: {right} of {all} launches");
    }
}

/// A short run with decode steps: what it said, and its record where it has one.
fn short_run(settings: &[(&str, &str)]) -> Option<(Output, Option<Record>)> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let cells = ["--batch", "2", "--isl", "16", "--osl", "4", "--min-seconds", "0.05", "--repeat", "1"];
    let arguments =
        [&["run", "--device", "cuda:0", "-m", TINY[0], "-o", out.to_str().unwrap()], &cells[..]].concat();
    let output = tokmeter(Build::Plain, settings, &arguments)?;
    let record = out.exists().then(|| read(&out).unwrap());
    Some((output, record))
}

/// The same where it has to succeed: what was told on the way, how the kernels were launched, and the tokens.
fn short_record(settings: &[(&str, &str)]) -> Option<(String, Kernels, String)> {
    let (output, record) = short_run(settings)?;
    assert!(output.status.success(), "{settings:?}: {}", stderr(&output));
    let record = record.unwrap();
    assert_eq!(record.cells[0].outcome, Outcome::Measured, "{settings:?}");
    let tokens = record.cells[0].runs[0].output_token_sha256.value().unwrap().clone();
    Some((stderr(&output), record.engine.kernels.value().unwrap().clone(), tokens))
}

#[test]
fn the_first_launch_of_a_capture_overlaps_nothing() {
    let Some((said, kernels, _)) = short_record(&[("EMU_REFUSE_PDL", "first")]) else { return };
    assert!(kernels.dependent_launch && kernels.graphs);
    assert_eq!(kernels.capture_retry, Maybe::missing("not_needed"), "{said}");
    assert!(!said.contains("refused"), "{said}");
}

#[test]
fn a_capture_that_is_refused_is_repeated_once_without_overlap_and_recorded() {
    let Some((_, _, expected)) = short_record(&[]) else { return };
    let settings = [("EMU_REFUSE_PDL", "capture"), ("EMU_TRACE", "loads")];
    let (said, kernels, tokens) = short_record(&settings).unwrap();
    assert!(kernels.dependent_launch && kernels.graphs);
    assert_eq!(kernels.capture_retry, Maybe::Value("CUDA_ERROR_INVALID_HANDLE".to_owned()));
    assert_eq!(tokens, expected);
    let lines_with = |what: &str| said.lines().filter(|line| line.contains(what)).collect::<Vec<&str>>();
    assert_eq!(
        lines_with("emulated GPU: overlapping launch refused").len(),
        1,
        "no later capture tries again"
    );
    let refusals = lines_with("the driver refused");
    assert_eq!(refusals.len(), 1, "{said}");
    assert!(
        refusals[0]
            .starts_with("warning: cuda:0: the driver refused a graph whose kernels may overlap (launching ")
    );
    assert!(refusals[0].contains(": CUDA_ERROR_INVALID_HANDLE)"), "{said}");
    // Where nothing overlaps there is nothing to repeat.
    let settings = [("EMU_REFUSE_PDL", "capture"), ("TOKMETER_CUDA_PDL", "0")];
    let (said, kernels, _) = short_record(&settings).unwrap();
    assert_eq!(kernels.capture_retry, Maybe::missing("not_needed"), "{said}");
}

#[test]
fn a_device_that_captures_nothing_is_an_error_of_the_first_try() {
    let Some((output, _)) = short_run(&[("EMU_REFUSE_CAPTURE", "1")]) else { return };
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cuStreamBeginCapture_v2: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), "{said}");
    assert!(said.contains("hint: TOKMETER_CUDA_GRAPHS=0 ") && !said.contains("refused"), "{said}");
}

#[test]
fn a_driver_that_begins_to_refuse_after_a_first_graph_changes_no_bit() {
    on_the_device("on_the_device_a_late_refusal", &[]);
}

/// The driver begins to refuse after a first graph: the step that is captured next, and replays of the first one, have
/// the bits of single launches.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_a_late_refusal() {
    let run = |graphs: bool, refuse: &dyn Fn()| {
        let (mut cuda, model) = cuda_model(TINY[0], CudaOptions { graphs, ..CudaOptions::default() });
        let mut kv = cuda.kv_cache(4).unwrap();
        let mut workspace = tokmeter::model::Workspace::new(&mut cuda, 8, 2).unwrap();
        let (mut batch, mut all, mut retries) = (Batch::default(), Vec::new(), Vec::new());
        let mut lengths = [0u32; 2];
        for (step, sequences) in [1u32, 1, 2, 1, 2].into_iter().enumerate() {
            if step == 2 {
                refuse();
            }
            batch.clear();
            for (page, length) in (0..sequences).zip(&mut lengths) {
                batch.push([TokenInput::Id(17 * *length + page)], *length, &[page], Some(Sampling::GREEDY));
                *length += 1;
            }
            batch.keep_logits = true;
            model.forward(&mut cuda, &batch, &mut kv, &mut workspace).unwrap();
            cuda.sampled(&mut Vec::new()).unwrap();
            all.push(cuda.download(&workspace.logits, sequences as usize, 320).unwrap());
            retries.push(cuda.info().kernels.unwrap().capture_retry.is_some());
        }
        (all, retries)
    };
    let (eager, none) = run(false, &|| {});
    // SAFETY: this process runs this test alone, in one thread that reads or writes the environment.
    #[allow(unsafe_code)]
    let (graphs, retries) = run(true, &|| unsafe { std::env::set_var("EMU_REFUSE_PDL", "capture") });
    assert_eq!(graphs, eager);
    assert_eq!((none, retries), (vec![false; 5], vec![false, false, true, true, true]));
    // Other backends on the device do not try again.
    assert_eq!(run(true, &|| {}), (eager, vec![true; 5]));
}

/// Both switches off, on a driver that takes no graph and no launch that may overlap.
const SWITCHED_OFF: [(&str, &str); 4] = [
    ("TOKMETER_CUDA_PDL", "0"),
    ("EMU_REFUSE_PDL", "all"),
    ("TOKMETER_CUDA_GRAPHS", "0"),
    ("EMU_REFUSE_CAPTURE", "1"),
];

#[test]
fn a_run_without_overlap_or_without_graphs_makes_the_same_tokens_and_says_so() {
    let Some((_, _, expected)) = short_record(&[]) else { return };
    for (settings, overlap, graphs) in [
        (&SWITCHED_OFF[..2], false, true),
        (&SWITCHED_OFF[2..], true, false),
        (&SWITCHED_OFF[..], false, false),
        (&[("TOKMETER_CUDA_PDL", "1"), ("TOKMETER_CUDA_GRAPHS", "1")], true, true),
    ] {
        let (_, kernels, tokens) = short_record(settings).unwrap();
        assert_eq!((kernels.dependent_launch, kernels.graphs, &tokens), (overlap, graphs, &expected));
    }
    // The switches are what makes the difference.
    for only in [SWITCHED_OFF[1], SWITCHED_OFF[3]] {
        let (output, _) = short_run(&[only]).unwrap();
        assert_eq!(output.status.code(), Some(1), "{only:?}: {}", stderr(&output));
    }
}

#[test]
fn every_verb_that_opens_a_device_heeds_the_switches() {
    let library = fake_nvml::library(false).to_str().unwrap();
    let meter = [("TOKMETER_NVML", library), ("FAKE_NVML", "any_uuid=1;trace=constant:300;period_ms=20")];
    let settings = [&SWITCHED_OFF[..], &meter].concat();
    for arguments in [
        &["check", "-m", TINY[0], "--offline"][..],
        &[
            "peaks",
            "--ops",
            "-m",
            TINY[0],
            "--batch",
            "1",
            "--depth",
            "8",
            "--seconds",
            "0.02",
            "--dtype",
            "bf16",
        ],
        &["doctor", "--sampler-effect", "-m", TINY[0], "--seconds", "0.1", "--pairs", "2"],
        &["doctor", "--sensors", "--seconds", "0.1"],
    ] {
        let arguments = [arguments, &["--device", "cuda:0", "--format", "json"]].concat();
        let Some(output) = tokmeter(Build::Plain, &settings, &arguments) else { return };
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(!found.to_string().contains("CUDA_ERROR"), "{found:#}");
        if arguments[0] == "peaks" {
            let reason = |value: &serde_json::Value| value["missing"].as_str().unwrap_or("").to_owned();
            assert_eq!(reason(&found["ceilings"]["graph_node_ns"]), "graphs_switched_off");
            assert_eq!(reason(&found["ops"]["times"][0]["replayed_ns"]), "not_captured");
        }
        let wrong =
            tokmeter(Build::Plain, &[&meter[..], &[("TOKMETER_CUDA_PDL", "off")]].concat(), &arguments)
                .unwrap();
        assert_eq!(wrong.status.code(), Some(2), "{arguments:?}: {}", stderr(&wrong));
        assert!(stderr(&wrong).starts_with("error: TOKMETER_CUDA_PDL is 'off', expected 0 or 1\nhint: "));
    }
}

#[test]
fn the_oldest_driver_that_is_supported_has_all_that_is_called() {
    on_a_device(Build::Old, "on_the_device_steps_without_waiting", &[]);
    on_a_device(Build::Old, "on_the_device_wrong_use", &[]);
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
    let Some(output) = tokmeter(Build::Plain, &settings, &arguments) else { return };
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

/// The stand-in for NVML draws 100 W, and 300 W more while the emulated GPU runs kernels.
#[test]
fn a_sensor_under_the_devices_own_load_shows_its_width_and_that_it_is_straight() {
    let library = fake_nvml::library(false).to_str().unwrap();
    let trace = "any_uuid=1;trace=load:100,300;period_ms=20;power_period_ms=20;width_ms=15";
    let settings = [("TOKMETER_NVML", library), ("FAKE_NVML", trace)];
    let arguments = ["doctor", "--sensors", "--device", "cuda:0", "--format", "json", "--seconds", "2"];
    let Some(output) = tokmeter(Build::Plain, &settings, &arguments) else { return };
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let probe = &found["sensor_probes"][0];
    let number = |field: &str| probe[field].as_f64().unwrap_or_else(|| panic!("{field}: {probe:#}"));
    assert_eq!((&probe["device"], &probe["load"]), (&"cuda:0".into(), &"read".into()));
    assert!(probe["not_a_measurement"].as_str().unwrap().starts_with("emulated GPU"));
    assert!((15e6..25e6).contains(&number("update_period_ns")), "{probe:#}");
    assert!(number("additivity_error_ratio").abs() < 0.02, "{probe:#}");
    assert!(number("linearity_r2") > 0.999, "{probe:#}");
    let steps = probe["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 9);
    // What was metered is the device's own time at work.
    for step in steps {
        let expected_w = 100.0 + 300.0 * step["busy_share"].as_f64().unwrap();
        let power_w = step["power_w"].as_f64().unwrap();
        assert!((power_w / expected_w - 1.0).abs() < 0.05, "{step}: expected {expected_w} W");
    }
    // On a busy machine the load's edges are blurred, and so is what they show.
    let width_ms = number("average_width_ns") / 1e6;
    assert!((5.0..45.0).contains(&width_ms), "{width_ms} ms, expected 15 ms");
}

#[test]
fn what_reading_nvml_takes_from_decode_steps_is_measured_on_the_device() {
    let library = fake_nvml::library(false).to_str().unwrap();
    let settings = [("TOKMETER_NVML", library), ("FAKE_NVML", "any_uuid=1;trace=constant:300;period_ms=20")];
    let arguments = ["doctor", "--sampler-effect", "--device", "cuda:0", "--format", "json", "-m", TINY[0]];
    let windows = ["--seconds", "0.5", "--pairs", "3"];
    let Some(output) = tokmeter(Build::Plain, &settings, &[&arguments[..], &windows].concat()) else {
        return;
    };
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let effect = &found["sampler_effect"];
    assert_eq!((&effect["device"], &effect["source"]), (&"cuda:0".into(), &"nvml_total_energy".into()));
    assert!(effect["not_a_measurement"].as_str().unwrap().starts_with("emulated GPU"), "{effect}");
    let change = |field: &str| effect["tokens_per_s_change"][field].as_f64().unwrap();
    assert!(change("low") <= change("ratio") && change("ratio") <= change("high"), "{effect}");
    for pair in effect["pairs"].as_array().unwrap() {
        assert!(pair["reading_tokens_per_s"].as_f64().unwrap() > 0.0, "{pair}");
    }
    let share = effect["sampler_cpu_share"].as_f64().unwrap_or_else(|| panic!("{effect}"));
    assert!(share > 0.0 && share < 0.2, "{share}");
}
