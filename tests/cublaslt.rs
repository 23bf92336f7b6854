//! Large products by cuBLASLt, without a GPU and without NVIDIA's library: a stand-in (`tests/emulated_gpu/cublaslt.cpp`)
//! queues real products on the stand-in driver and is as unkind as its interface allows. What it computes is compared
//! with the reference and with our own kernels.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::stand_in::{Build, cublaslt, run_test, stderr, tokmeter};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokmeter::backend::check::{OpCheck, check_ops};
use tokmeter::backend::cuda::supports;
use tokmeter::backend::{
    Backend, Batch, BufferUse, Cuda, CudaDType, CudaOptions, Form, Gemm, Reference, Sampling, TokenInput,
};
use tokmeter::model::{Model, Workspace, shape_of};
use tokmeter::record::{Chosen, CublasLt, TunedProduct, read};
use tokmeter::weights::{StoredDType, open};

const TINY: &str = "models/tiny/llama";
const VOCAB: usize = 320;
const LIBRARY: CudaOptions = CudaOptions {
    dtype: CudaDType::Bf16,
    deterministic: false,
    gemm: Gemm::CublasLt,
    graphs: true,
    dependent_launch: true,
    form: Form::Sass,
};
/// The stand-in's fast algorithms; 11 is slow, and 20 is refused when it is checked.
const FAST: [u32; 2] = [66, 72];

/// Runs the ignored test `name` with both stand-ins and an empty cache.
fn on_the_device(name: &str, settings: &[(&str, &str)]) {
    let Some(library) = cublaslt() else { return };
    let cache = tempfile::tempdir().unwrap();
    let own = [("TOKMETER_CUDA_LIBS", library.as_str()), ("TOKMETER_CACHE", cache.path().to_str().unwrap())];
    let Some(output) = run_test(name, Build::Plain, &[&own[..], settings].concat()) else { return };
    let stdout = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && stdout.contains("1 passed");
    assert!(passed, "{settings:?}\n{stdout}\n{}", stderr(&output));
    print!("{stdout}");
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
    let candidate = |shape| Cuda::new(0, shape, CudaOptions { dtype, ..LIBRARY });
    let is_supported = |shape: &_| supports(shape).is_ok();
    let checks = check_ops(|shape| Ok(Reference::new(shape)), candidate, stored, is_supported).unwrap();
    let failed: Vec<&OpCheck> = checks.iter().filter(|check| !check.passed()).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), checks.len());
    for op in ["attn_in", "attn_out", "mlp_in", "mlp_out", "logits"] {
        let large = checks.iter().filter(|check| check.op == op && check.case.contains("across tiles"));
        let used: Vec<f64> = large.map(|check| check.deviation.tolerance_used).collect();
        assert!(used.len() >= 6, "{op} was checked {} times for more than 64 rows", used.len());
        println!("{op}: {:.3} of the tolerance used", used.iter().copied().fold(0.0, f64::max));
    }
}

/// All that is promised in deterministic mode is computed by own kernels, whatever was asked for.
#[test]
fn a_check_of_the_library_ends_and_names_it() {
    let Some(library) = cublaslt() else { return };
    let cache = tempfile::tempdir().unwrap();
    let settings =
        [("TOKMETER_CUDA_LIBS", library.as_str()), ("TOKMETER_CACHE", cache.path().to_str().unwrap())];
    let arguments =
        ["check", "--device", "cuda:0", "--gemm", "cublaslt", "-m", TINY, "--offline", "--format", "json"];
    let Some(output) = tokmeter(Build::Plain, &settings, &arguments) else { return };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["large_products"], "cuBLASLt 13.1.99 from 65 rows");
    let forward = report["forward"].as_array().unwrap();
    let deterministic = forward.iter().filter(|way| way["case"].as_str().unwrap().contains("deterministic"));
    assert_eq!(deterministic.map(|way| way["verdict"].clone()).collect::<Vec<_>>(), ["ok"]);
}

struct Running {
    cuda: Cuda,
    model: Model<Cuda>,
}

fn start(options: CudaOptions) -> Running {
    let weights = open(Path::new(TINY)).unwrap();
    let mut cuda = Cuda::new(0, shape_of(weights.config()), options).unwrap();
    let model = Model::load(&mut cuda, weights.as_ref(), &mut |_| {}).unwrap();
    Running { cuda, model }
}

/// What the library did in this backend.
fn done(cuda: &Cuda) -> CublasLt {
    cuda.info().cublaslt.into_value().unwrap()
}

fn token(sequence: usize, position: u32) -> TokenInput {
    TokenInput::Id((sequence as u32 * 11 + position * 37) % VOCAB as u32)
}

/// One prompt of so many tokens, every one of which gets logits.
fn prompt(tokens: usize) -> Batch {
    let mut batch = Batch::default();
    batch.clear();
    let pages: Vec<u32> = (0..tokens.div_ceil(16) as u32).collect();
    batch.push((0..tokens).map(|at| token(0, at as u32)), 0, &pages, Some(Sampling::GREEDY));
    batch.sample_rows = (0..tokens as u32).collect();
    batch.sampling = vec![Sampling::GREEDY; tokens];
    batch.keep_logits = true;
    batch
}

/// Logits of every token of `batch`.
fn logits<B: Backend>(backend: &mut B, model: &Model<B>, batch: &Batch) -> anyhow::Result<Vec<f32>> {
    let mut kv = backend.kv_cache(batch.pages.len())?;
    let rows = batch.sample_rows.len();
    let mut workspace = Workspace::new(backend, batch.tokens.len(), rows)?;
    model.forward(backend, batch, &mut kv, &mut workspace)?;
    backend.sampled(&mut Vec::new())?;
    backend.download(&workspace.logits, rows, VOCAB)
}

/// Largest difference, in parts of the root mean square of `right`.
fn difference(found: &[f32], right: &[f32]) -> f64 {
    assert_eq!(found.len(), right.len());
    let square = right.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / right.len() as f64;
    let worst = found.iter().zip(right).map(|(a, b)| f64::from((a - b).abs()));
    assert!(found.iter().all(|value| value.is_finite()));
    worst.fold(0.0, f64::max) / square.sqrt()
}

#[test]
fn logits_of_many_rows_agree_with_the_reference_and_with_our_kernels() {
    on_the_device("on_the_device_logits_of_many_rows", &[]);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_logits_of_many_rows() {
    let batch = prompt(130);
    let weights = open(Path::new(TINY)).unwrap();
    let mut reference = Reference::new(shape_of(weights.config()));
    let model = Model::load(&mut reference, weights.as_ref(), &mut |_| {}).unwrap();
    let right = logits(&mut reference, &model, &batch).unwrap();
    for dtype in [CudaDType::Bf16, CudaDType::F16] {
        let run = |gemm| {
            let Running { mut cuda, model } = start(CudaOptions { dtype, gemm, ..LIBRARY });
            (logits(&mut cuda, &model, &batch).unwrap(), cuda.info().cublaslt)
        };
        let ((library, products), (own, none)) = (run(Gemm::CublasLt), run(Gemm::Own));
        assert_eq!(none.reason(), Some("own_kernels"));
        let of_head = |product: &&TunedProduct| product.columns as usize == VOCAB && product.rows == 160;
        let products = products.into_value().unwrap().products;
        assert_eq!(products.iter().filter(of_head).count(), 1, "{products:#?}");
        let (ours, theirs) = (difference(&own, &right), difference(&library, &right));
        println!("{}: {ours:.4} by our kernels, {theirs:.4} by the library", dtype.name());
        assert!(theirs < 1.5 * ours && difference(&library, &own) < 1.5 * ours, "{ours} {theirs}");
    }
}

#[test]
fn a_replayed_decode_step_of_seventy_gives_the_bits_of_single_launches() {
    on_the_device("on_the_device_decode_of_seventy", &[]);
}

/// The library's products are captured into the graph of 96 sequences, after they were tuned in its rehearsal.
#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_decode_of_seventy() {
    // The second backend finds the choices of the first on disk, so that both compute by the same algorithms.
    let (graphs, eager) = (decode_steps(true), decode_steps(false));
    assert!(graphs.iter().all(|logits| logits.iter().all(|logit| logit.is_finite())));
    assert_eq!(graphs, eager, "logits differ in their bits");
}

/// Logits of decode steps of 70, 70 and 67 sequences: a capture, and two replays.
fn decode_steps(graphs: bool) -> Vec<Vec<f32>> {
    let Running { mut cuda, model } = start(CudaOptions { graphs, ..LIBRARY });
    let mut kv = cuda.kv_cache(70).unwrap();
    let mut workspace = Workspace::new(&mut cuda, 70, 70).unwrap();
    let (mut batch, mut all) = (Batch::default(), Vec::new());
    for (position, sequences) in [70usize, 70, 67].into_iter().enumerate() {
        batch.clear();
        for s in 0..sequences {
            batch.push([token(s, position as u32)], position as u32, &[s as u32], Some(Sampling::GREEDY));
        }
        batch.keep_logits = true;
        model.forward(&mut cuda, &batch, &mut kv, &mut workspace).unwrap();
        cuda.sampled(&mut Vec::new()).unwrap();
        all.push(cuda.download(&workspace.logits, sequences, VOCAB).unwrap());
    }
    let products = done(&cuda).products;
    assert!(products.len() == 5 && products.iter().all(|product| product.rows == 96), "{products:#?}");
    let expected = if graphs { Chosen::Tuned } else { Chosen::Cache };
    assert!(products.iter().all(|product| product.chosen == expected), "{products:#?}");
    all
}

#[test]
fn a_choice_is_kept_for_the_next_start_if_it_is_whole_and_its_own() {
    on_the_device("on_the_device_choices_on_disk", &[]);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_choices_on_disk() {
    let run = || {
        let Running { mut cuda, model } = start(LIBRARY);
        logits(&mut cuda, &model, &prompt(100)).unwrap();
        done(&cuda).products
    };
    let chosen = |products: &[TunedProduct]| {
        let mut count = BTreeMap::new();
        products.iter().for_each(|product| *count.entry(format!("{:?}", product.chosen)).or_insert(0) += 1);
        count.into_iter().collect::<Vec<(String, i32)>>()
    };
    let all = |name: &str| vec![(name.to_owned(), 5)];
    let but_one = || vec![("Cache".to_owned(), 4), ("Tuned".to_owned(), 1)];
    let first = run();
    assert_eq!(chosen(&first), all("Tuned"));
    // Of four guesses one is refused when it is checked.
    assert!(first.iter().all(|product| product.timed_algorithms == 3), "{first:#?}");
    let second = run();
    assert_eq!(chosen(&second), all("Cache"));
    let ids = |products: &[TunedProduct]| products.iter().map(|p| p.algorithm_id).collect::<Vec<_>>();
    assert_eq!(ids(&first), ids(&second));

    let entries = entries();
    assert_eq!(entries.len(), 5);
    let whole = std::fs::read(&entries[0]).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let foreign = std::fs::read(&entries[1]).unwrap();
    for content in [damaged, foreign, refused(&whole), Vec::new()] {
        std::fs::write(&entries[0], content).unwrap();
        assert_eq!(chosen(&run()), but_one());
        assert_eq!(chosen(&run()), all("Cache"), "the entry was not made again");
    }
}

fn entries() -> Vec<PathBuf> {
    let folder = Path::new(&std::env::var("TOKMETER_CACHE").unwrap()).join("cublaslt");
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

/// A sound entry for the same product, whose algorithm the library refuses.
fn refused(entry: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(entry).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let words = lines.last_mut().unwrap();
    let id = words.split(' ').nth(1).unwrap().to_owned();
    *words = words.replacen(&id, &format!("{:016x}", 20), 1);
    let content = lines[2..].join("\n") + "\n";
    let mut hasher = Sha256::new();
    hasher.update((content.len() as u64).to_le_bytes());
    hasher.update(&content);
    let digest: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(lines[1].len() == digest.len() && lines[1] != digest);
    format!("{}\n{digest}\n{content}", lines[0]).into_bytes()
}

#[test]
fn rows_that_an_algorithm_cannot_do_get_one_of_their_own() {
    // 66 is chosen for 128 rows, since 11 is slow and 72 fails, and then refuses 100.
    let settings = [("EMU_LT_REFUSE", "72"), ("EMU_LT_NARROW", "100")];
    on_the_device("on_the_device_rows_of_their_own", &settings);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_rows_of_their_own() {
    let Running { mut cuda, model } = start(LIBRARY);
    let first = logits(&mut cuda, &model, &prompt(100)).unwrap();
    let products = done(&cuda).products;
    let found: Vec<(u32, u32)> = products.iter().map(|p| (p.rows, p.algorithm_id)).collect();
    assert_eq!(found, [(100, 11), (128, 66)].repeat(5));
    assert_eq!(first, logits(&mut cuda, &model, &prompt(100)).unwrap());
    assert_eq!(done(&cuda).products.len(), 10);
}

#[test]
fn a_full_device_runs_the_first_guess_untimed() {
    on_the_device("on_the_device_full", &[("EMU_MEMORY_BYTES", "67108864")]);
}

#[test]
#[ignore = "runs in a child process with the stand-in driver"]
fn on_the_device_full() {
    let Running { mut cuda, model } = start(LIBRARY);
    let mut kv = cuda.kv_cache(20).unwrap();
    let mut workspace = Workspace::new(&mut cuda, 200, 200).unwrap();
    let mut run = |cuda: &mut Cuda, tokens| {
        model.forward(cuda, &prompt(tokens), &mut kv, &mut workspace).unwrap();
        cuda.sampled(&mut Vec::new()).unwrap();
        done(cuda).products
    };
    // All scratch memory is taken at 200 rows; then everything else is.
    let tuned = run(&mut cuda, 200);
    assert!(tuned.iter().all(|product| product.chosen == Chosen::Tuned && product.best_ns.value().is_some()));
    let mut ballast = Vec::new();
    for columns in [1 << 18, 1 << 14, 1 << 10, 128] {
        while let Ok(buffer) = cuda.buffer(BufferUse::Residual, 1, columns) {
            ballast.push(buffer);
        }
    }
    let products = run(&mut cuda, 100);
    let untimed: Vec<&TunedProduct> = products.iter().filter(|product| product.rows == 128).collect();
    assert_eq!(untimed.len(), 5);
    for product in untimed {
        assert_eq!(
            (product.chosen, product.algorithm_id, product.timed_algorithms),
            (Chosen::Heuristic, 11, 0)
        );
        assert_eq!(product.best_ns.reason(), Some("no_memory_for_tuning"));
    }
}

/// A short run of static cells whose prompts have more than 64 rows; see [`run_cells`].
fn run(library: bool, settings: &[(&str, &str)], arguments: &[&str]) -> Option<(Output, Option<Value>)> {
    run_cells(library, settings, &[&["--batch", "2"], arguments].concat())
}

/// A short run with prompts of 100 tokens, with the stand-in library where `library` says so.
fn run_cells(
    library: bool,
    settings: &[(&str, &str)],
    arguments: &[&str],
) -> Option<(Output, Option<Value>)> {
    let named = cublaslt()?;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("record.json");
    let cache = folder.path().join("cache");
    let own = [
        ("TOKMETER_CACHE", cache.to_str().unwrap()),
        ("TOKMETER_CUDA_LIBS", if library { named.as_str() } else { "" }),
    ];
    let command = ["run", "--device", "cuda:0", "-m", TINY, "-o", out.to_str().unwrap()];
    let cells = ["--isl", "100", "--min-seconds", "0.05", "--repeat", "1"];
    let output =
        tokmeter(Build::Plain, &[&own[..], settings].concat(), &[&command[..], &cells, arguments].concat())?;
    if output.status.success() {
        read(&out).unwrap();
    }
    let record = std::fs::read(&out).ok().map(|text| serde_json::from_slice(&text).unwrap());
    Some((output, record))
}

#[test]
fn the_record_names_the_library_and_every_algorithm() {
    for (settings, ids) in
        [(&[][..], &FAST[..]), (&[("EMU_LT_REFUSE", "66")], &[72]), (&[("EMU_LT_REFUSE", "72")], &[66])]
    {
        let Some((output, record)) = run(true, settings, &[]) else { return };
        assert!(output.status.success(), "{}", stderr(&output));
        let library = &record.unwrap()["engine"]["cublaslt"];
        assert_eq!((&library["version"], &library["least_rows"]), (&"13.1.99".into(), &65.into()));
        assert!(library["tuning_ns"].as_u64().unwrap() > 0);
        let products: Vec<TunedProduct> = serde_json::from_value(library["products"].clone()).unwrap();
        let shapes = |rows| products.iter().filter(move |product| product.rows == rows);
        // qkv, o_proj, gate and up together, down_proj; the head has two rows and is our own.
        let found: Vec<(&str, u32, u32)> =
            shapes(224).map(|p| (p.epilogue.as_str(), p.columns, p.depth)).collect();
        let expected =
            [("store_f32", 128, 64), ("residual", 64, 64), ("residual", 64, 96), ("silu", 192, 64)];
        assert_eq!(found, expected, "{products:#?}");
        for product in &products {
            assert!(ids.contains(&product.algorithm_id), "{product:#?}");
            let expected = match product.algorithm_id {
                66 => (20, 8, 2, u64::from(2 * product.rows * product.columns * 4)),
                _ => (18, 6, 1, 0),
            };
            let numbers = (product.tile_id, product.stages_id, product.split_k, product.workspace_bytes);
            assert_eq!(numbers, expected);
            assert_eq!((product.dtype.as_str(), product.chosen), ("bf16", Chosen::Tuned));
            assert!(product.best_ns.value().is_some());
        }
    }
}

#[test]
fn a_serving_cell_has_every_algorithm_before_its_first_window() {
    let serving = ["--concurrency", "3", "--osl", "4", "--requests", "3", "--chunk", "200"];
    let Some((output, record)) = run_cells(true, &[], &serving) else { return };
    assert!(output.status.success(), "{}", stderr(&output));
    let record = record.unwrap();
    let kinds = record["cells"].as_array().unwrap().iter().map(|cell| cell["workload"]["kind"].clone());
    assert!(kinds.clone().any(|kind| kind == "serve-closed"), "{:?}", kinds.collect::<Vec<_>>());
    let products: Vec<TunedProduct> =
        serde_json::from_value(record["engine"]["cublaslt"]["products"].clone()).unwrap();
    let rows: std::collections::BTreeSet<u32> = products.iter().map(|product| product.rows).collect();
    assert!([96, 128, 160, 192, 224].iter().all(|expected| rows.contains(expected)), "{rows:?}");
}

#[test]
fn own_kernels_compute_where_they_are_asked_to_or_nothing_else_is_there() {
    for (library, settings, arguments, reason, remarked) in [
        (true, &[][..], &["--gemm", "own"][..], "own_kernels", ""),
        (true, &[], &["--deterministic"], "deterministic", ""),
        (false, &[], &[], "cublaslt_not_found", "own kernels, since cuBLASLt was not found"),
        (
            true,
            &[("EMU_LT_BROKEN", "1")],
            &[],
            "cublaslt_unusable",
            "since cuBLASLt was found and cannot be used",
        ),
    ] {
        let Some((output, record)) = run(library, settings, arguments) else { return };
        let text = stderr(&output);
        assert!(output.status.success(), "{text}");
        assert_eq!(record.unwrap()["engine"]["cublaslt"]["missing"], reason);
        assert_eq!(text.contains("own kernels"), !remarked.is_empty(), "{text}");
        assert!(text.contains(remarked), "{text}");
    }
}

#[test]
fn a_library_that_is_asked_for_and_cannot_be_had_is_one_clear_error() {
    for (library, settings, expected) in [
        (false, &[][..], "cuBLASLt (libcublasLt.so) was not found in TOKMETER_CUDA_LIBS, CUDA_HOME, "),
        (
            true,
            &[("EMU_LT_BROKEN", "1")],
            "cuBLASLt 13.1.99 cannot be started: cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED (the library was",
        ),
    ] {
        let Some((output, record)) = run(library, settings, &["--gemm", "cublaslt"]) else { return };
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(expected) && text.contains("\nhint: "), "{text}");
        assert!(record.is_none() && !text.contains("panicked"), "{text}");
    }
}

#[test]
fn a_product_that_no_algorithm_can_do_is_one_clear_error() {
    let Some((output, record)) = run(true, &[("EMU_LT_REFUSE", "0")], &[]) else { return };
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let reason = "store_f32: cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED";
    assert!(
        text.contains("error: cuBLASLt has no algorithm for the product of ") && text.contains(reason),
        "{text}"
    );
    assert!(text.contains("hint: use --gemm own") && record.is_none(), "{text}");
}

#[test]
fn ways_of_computing_that_contradict_each_other_are_usage_errors() {
    for (arguments, expected) in [
        (
            &["--gemm", "cublaslt", "--deterministic"][..],
            "--deterministic computes all products by own kernels",
        ),
        (&["--gemm", "cublaslt", "--device", "cpu"], "--gemm is for cuda"),
        (&["--gemm", "fast"], "possible values: auto, own, cublaslt"),
    ] {
        let device = if arguments.contains(&"--device") { &[][..] } else { &["--device", "cuda:0"] };
        for verb in ["run", "check"] {
            let Some(output) =
                tokmeter(Build::Plain, &[], &[&[verb, "-m", TINY], arguments, device].concat())
            else {
                return;
            };
            assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
            assert!(stderr(&output).contains(expected), "{}", stderr(&output));
        }
    }
}
