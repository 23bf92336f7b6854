//! The verb `check` through the binary, on the tiny models.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const OPS: [&str; 7] = ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"];

fn check(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokmeter"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("check").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A folder with a file of prompts.
fn prompts(lines: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    std::fs::write(&file, lines).unwrap();
    let file = file.to_str().unwrap().to_owned();
    (folder, file)
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    text(bytes).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn numerics_pass_on_this_machine_and_are_listed_by_operation() {
    let output = check(&["-m", "models/tiny/qwen3", "--format", "json", "--threads", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["passed"], &report["threads"]), (&Value::Bool(true), &Value::from(2)));
    let ops: Vec<&str> =
        report["ops"].as_array().unwrap().iter().map(|op| op["op"].as_str().unwrap()).collect();
    assert_eq!(ops, OPS);
    assert_eq!(report["forward"].as_array().unwrap().len(), 4);
    assert!(report["only"].is_null());
    for part in report["ops"].as_array().unwrap().iter().chain(report["forward"].as_array().unwrap()) {
        let number = |field: &str| part[field].as_f64().unwrap_or_else(|| panic!("{field}: {part:#}"));
        let (error, tolerance, used) = (number("worst_error"), number("tolerance"), number("tolerance_used"));
        assert_eq!(part["verdict"], "ok");
        assert!(error <= number("max_error") && error <= tolerance && used <= 1.0, "{part:#}");
        // What looks up a row is exact and has no worst case.
        assert_eq!(part["worst_case"].is_string(), used > 0.0, "{part:#}");
        assert!(used == 0.0 || (error / tolerance / used - 1.0).abs() < 1e-9, "{part:#}");
    }
}

#[test]
fn one_operation_is_checked_alone_and_the_report_says_what_is_left_out() {
    let args = ["--device", "cpu", "--op", "attention", "--case", "GQA 3, prompt of 45"];
    let output = check(&[&args[..], &["--format", "json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ops = report["ops"].as_array().unwrap();
    assert_eq!((ops.len(), &ops[0]["op"], &ops[0]["cases"]), (1, &"attention".into(), &3.into()));
    assert!(ops[0]["worst_case"].as_str().unwrap().starts_with("GQA 3, prompt of 45, "), "{report:#}");
    let expected = serde_json::json!({
        "op": "attention", "case": "GQA 3, prompt of 45", "cases": 3, "cases_of_op": 147,
        "not_checked": ["embed", "attn_in", "attn_out", "mlp_in", "mlp_out", "logits", "forward pass"],
    });
    assert_eq!(report["only"], expected);
    assert_eq!((&report["forward"], &report["model"]), (&serde_json::json!([]), &Value::Null));
    let table = check(&args);
    let table = text(&table.stdout);
    assert!(
        table.contains("only 3 of 147 cases of attention\n") && !table.contains("forward pass of"),
        "{table}"
    );
    assert!(table.contains("ok: 3 of 147 cases of attention\nnot checked: 144 other cases"), "{table}");
}

#[test]
fn every_operation_can_be_checked_alone() {
    for op in OPS {
        let args = ["--device", "cpu", "--op", op, "--case", "odd sizes, prompts across tiles"];
        let output = check(&[&args[..], &["--format", "json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let found: Vec<&Value> = report["ops"].as_array().unwrap().iter().map(|line| &line["op"]).collect();
        assert_eq!(found, [op]);
    }
}

#[test]
fn an_operation_or_a_case_that_does_not_exist_lists_those_that_do() {
    let refused = |args: &[&str]| {
        let output = check(args);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{args:?}");
        text(&output.stderr).to_owned()
    };
    let error = refused(&["--op", "softmax"]);
    assert!(error.contains("embed, attn_in, attention, attn_out, mlp_in, mlp_out, logits"), "{error}");
    assert!(refused(&["--case", "GQA 3"]).contains("--op <NAME>"));
    assert!(refused(&["--op", "embed", "--prompts", "a.jsonl"]).contains("cannot be used with"));
    let error = refused(&["--device", "cpu", "--op", "attn_in", "--case", "GQA 5"]);
    let start = "error: --case is 'GQA 5', expected a part of one of the 252 cases of attn_in\n\
                 hint: a case is \"SHAPE, BATCH, PART\", of\n  SHAPE  \"odd sizes\", \"GQA 3\", ";
    assert!(error.starts_with(start), "{error}");
    assert!(error.contains("\n  PART   \"plain, new\", "), "{error}");
    let error = refused(&["--device", "cpu", "--op", "mlp_in", "--case", "GQA 5"]);
    assert!(error.contains("\nhint: a case is \"SHAPE, BATCH\", of\n") && !error.contains("PART"), "{error}");
}

#[test]
fn quantised_numerics_need_a_quantised_model_and_say_so() {
    let output = check(&["-m", "models/tiny/llama/model.gguf", "--dtype", "quantized"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        text(&output.stderr),
        "error: models/tiny/llama/model.gguf: no tensor is quantised, expected a quantised GGUF file for --dtype \
         quantized\n"
    );
}

#[test]
fn both_formats_of_a_model_give_a_text_the_same_ids_and_continuation() {
    let (_folder, file) = prompts("{\"id\": \"a\", \"text\": \"Hello <|im_end|> meter\"}\n");
    let args = |model| ["--prompts", &file, "--top", "3", "--greedy", "5", "-m", model].map(str::to_owned);
    let [one, other] = ["models/tiny/llama", "models/tiny/llama/model.gguf"].map(|model| {
        let output = check(&args(model).each_ref().map(String::as_str));
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        lines(&output.stdout).remove(0)
    });
    let ids = one["token_ids"].as_array().unwrap();
    assert!(ids.contains(&Value::from(2)), "the special token in the text is one id");
    assert_eq!(one["top"].as_array().unwrap().len(), ids.len());
    assert_eq!(one["top"][0].as_array().unwrap().len(), 3);
    assert_eq!(one["greedy"]["token_ids"].as_array().unwrap().len(), 5);
    assert!(one["greedy"]["text"].is_string());
    assert_eq!((&one["token_ids"], &one["greedy"]), (&other["token_ids"], &other["greedy"]));
}

#[test]
fn token_ids_need_no_tokenizer_and_their_continuation_has_no_text_then() {
    let (folder, file) = prompts("{\"id\": \"a\", \"token_ids\": [5, 6]}\n");
    let out = folder.path().join("out.jsonl");
    let args =
        ["-m", "models/tiny/qwen2", "--prompts", &file, "--greedy", "2", "--out", out.to_str().unwrap()];
    let output = check(&args);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0), "{}", text(&output.stderr));
    let line = lines(&std::fs::read(out).unwrap()).remove(0);
    assert!(line["greedy"]["text"].is_null());
    assert_eq!(line["token_ids"], serde_json::json!([5, 6]));
}

#[test]
fn one_bad_line_stops_everything_before_a_byte_is_written() {
    let (folder, file) =
        prompts("{\"id\": \"a\", \"token_ids\": [5]}\n{\"id\": \"b\", \"token_ids\": [320]}\n");
    let out = folder.path().join("out.jsonl");
    let output = check(&["-m", "models/tiny/qwen2", "--prompts", &file, "--out", out.to_str().unwrap()]);
    assert_eq!((output.status.code(), output.stdout.len(), out.exists()), (Some(3), 0, false));
    let expected = format!("error: {file}: line 2: token_ids[0] is 320, expected an integer from 0 to 319\n");
    assert!(text(&output.stderr).ends_with(&expected), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_dir(Path::new(&file).parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_text_without_a_tokenizer_is_refused() {
    let (_folder, file) = prompts("{\"id\": \"a\", \"text\": \"hello\"}\n");
    let output = check(&["-m", "models/tiny/qwen2", "--prompts", &file]);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        text(&output.stderr).contains("a text needs a tokenizer: models/tiny/qwen2/tokenizer.json"),
        "{}",
        text(&output.stderr)
    );
}
