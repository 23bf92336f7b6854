//! The verb `check` through the binary, on the tiny models.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

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
    assert_eq!(ops, ["embed", "attn_in", "attention", "attn_out", "mlp_in", "mlp_out", "logits"]);
    assert_eq!(report["forward"].as_array().unwrap().len(), 4);
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
