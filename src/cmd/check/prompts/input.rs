//! Lines of prompts: parsed without trust, then made into token ids that the model can take. An error names the line
//! and the field, what was found and what was expected.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde_json::Value;

use crate::weights::tokenizer::Tokenizer;

/// Largest file that is read.
const LARGEST_FILE_BYTES: u64 = 1 << 30;
/// Characters of a found value that an error shows.
const SHOWN_CHARACTERS: usize = 60;

/// A line as it was written.
#[derive(Debug, PartialEq)]
pub(super) struct Line {
    /// From 1.
    number: usize,
    id: String,
    input: Input,
}

#[derive(Debug, PartialEq)]
enum Input {
    Text(String),
    TokenIds(Vec<Value>),
}

/// What the model can take.
pub(super) struct Bounds {
    pub(super) vocab_size: usize,
    /// Tokens of prompt and continuation together.
    pub(super) context: usize,
    /// Tokens that follow each prompt.
    pub(super) greedy: usize,
}

/// A prompt that can be scored.
#[derive(Debug, PartialEq)]
pub(super) struct Prompt {
    pub(super) id: String,
    pub(super) token_ids: Vec<u32>,
}

/// # Errors
/// Names the file, the line, the field, what was found and what was expected.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Line>> {
    let text = text_of(path).with_context(|| path.display().to_string())?;
    parse(&text).with_context(|| path.display().to_string())
}

fn text_of(path: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LARGEST_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() as u64 <= LARGEST_FILE_BYTES,
        "is larger than {LARGEST_FILE_BYTES} bytes, expected a file of prompts"
    );
    String::from_utf8(bytes).map_err(|error| {
        anyhow!("byte {} is not UTF-8, expected a text file", error.utf8_error().valid_up_to())
    })
}

fn parse(text: &str) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut lines_of_ids = HashMap::new();
    for (number, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let line = parse_line(number, text).with_context(|| format!("line {number}"))?;
        if let Some(first) = lines_of_ids.insert(line.id.clone(), number) {
            bail!("line {number}: id is {:?}, expected another than that of line {first}", line.id);
        }
        lines.push(line);
    }
    ensure!(!lines.is_empty(), "has no prompts, expected one JSON object a line");
    Ok(lines)
}

fn parse_line(number: usize, text: &str) -> anyhow::Result<Line> {
    let value: Value = serde_json::from_str(text).map_err(|error| anyhow!("is not JSON: {error}"))?;
    let Value::Object(mut fields) = value else { bail!("is {}, expected an object", shown(&value)) };
    let id = id(fields.remove("id"))?;
    let input = match (fields.remove("text"), fields.remove("token_ids")) {
        (Some(Value::String(text)), None) => Input::Text(text),
        (None, Some(Value::Array(ids))) => Input::TokenIds(ids),
        (Some(_), Some(_)) => bail!("has text and token_ids, expected one of them"),
        (None, None) => bail!("has neither text nor token_ids, expected one of them"),
        (Some(other), None) => bail!("text is {}, expected a string", shown(&other)),
        (None, Some(other)) => bail!("token_ids is {}, expected an array of token ids", shown(&other)),
    };
    if let Some(name) = fields.keys().next() {
        bail!("has a field {name:?}, expected only id, and text or token_ids");
    }
    Ok(Line { number, id, input })
}

fn id(value: Option<Value>) -> anyhow::Result<String> {
    match value {
        Some(Value::String(id)) => Ok(id),
        Some(other) => bail!("id is {}, expected a string", shown(&other)),
        None => bail!("id is missing, expected a string"),
    }
}

/// A value for an error: as written, unless it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

impl Line {
    pub(super) fn is_text(&self) -> bool {
        matches!(self.input, Input::Text(_))
    }

    /// Token ids that the model can take. A text needs the tokenizer.
    ///
    /// # Errors
    /// Names the line, the field, what was found and what was expected.
    pub(super) fn settle(self, tokenizer: Option<&Tokenizer>, bounds: &Bounds) -> anyhow::Result<Prompt> {
        let number = self.number;
        self.token_ids(tokenizer, bounds).with_context(|| format!("line {number}"))
    }

    fn token_ids(self, tokenizer: Option<&Tokenizer>, bounds: &Bounds) -> anyhow::Result<Prompt> {
        let (field, token_ids) = match self.input {
            Input::Text(text) => {
                let tokenizer = tokenizer.context("text needs a tokenizer")?;
                ("text", encode(tokenizer, &text, bounds.vocab_size)?)
            }
            Input::TokenIds(ids) => ("token_ids", check_ids(&ids, bounds.vocab_size)?),
        };
        ensure!(!token_ids.is_empty(), "{field} has no tokens, expected at least 1");
        let (tokens, greedy, context) = (token_ids.len(), bounds.greedy, bounds.context);
        ensure!(
            tokens.saturating_add(greedy) <= context,
            "{field} has {tokens} tokens, expected at most {} beside a continuation of {greedy} in the model's \
             context of {context}",
            context.saturating_sub(greedy)
        );
        Ok(Prompt { id: self.id, token_ids })
    }
}

/// Special tokens written in the text count as such, and BOS comes first where the checkpoint says so.
fn encode(tokenizer: &Tokenizer, text: &str, vocab_size: usize) -> anyhow::Result<Vec<u32>> {
    ensure!(!text.is_empty(), "text is empty, expected at least one character");
    let ids = tokenizer.encode(text, true).context("text")?;
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => {
            bail!("text has token id {id}, expected less than the model's vocabulary of {vocab_size}")
        }
        None => Ok(ids),
    }
}

fn check_ids(ids: &[Value], vocab_size: usize) -> anyhow::Result<Vec<u32>> {
    let check = |(index, value): (usize, &Value)| {
        let id = value.as_u64().filter(|&id| id < vocab_size as u64).and_then(|id| u32::try_from(id).ok());
        id.with_context(|| {
            format!(
                "token_ids[{index}] is {}, expected an integer from 0 to {}",
                shown(value),
                vocab_size - 1
            )
        })
    };
    ids.iter().enumerate().map(check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { vocab_size: 320, context: 10, greedy: 4 };

    fn settled(text: &str) -> anyhow::Result<Vec<Prompt>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny/llama/tokenizer.json");
        let tokenizer = Tokenizer::from_file(folder.as_ref()).unwrap();
        parse(text)?.into_iter().map(|line| line.settle(Some(&tokenizer), &BOUNDS)).collect()
    }

    #[test]
    fn texts_and_ids_may_be_mixed_and_empty_lines_are_none() {
        let text =
            "{\"id\": \"a\", \"text\": \"<|im_end|>!\"}\n\n  \n{\"token_ids\": [0, 319], \"id\": \"b\"}";
        let prompts = settled(text).unwrap();
        let prompt =
            |id: &str, token_ids: &[u32]| Prompt { id: id.to_owned(), token_ids: token_ids.to_vec() };
        // Four special tokens, then the bytes in their order.
        assert_eq!(prompts, [prompt("a", &[2, 4 + u32::from(b'!')]), prompt("b", &[0, 319])]);
    }

    #[test]
    fn a_bad_line_is_refused_with_its_number_its_field_and_what_was_expected() {
        let refused = |line: &str, expected: &str| {
            let text = format!("{{\"id\": \"good\", \"token_ids\": [1]}}\n\n{line}\n");
            let message = format!("{:#}", settled(&text).expect_err(line));
            assert_eq!(message, format!("line 3: {expected}"));
        };
        refused("[1]", "is [1], expected an object");
        refused(r#"{"token_ids": [1]}"#, "id is missing, expected a string");
        refused(r#"{"id": 7, "token_ids": [1]}"#, "id is 7, expected a string");
        refused(r#"{"id": "good", "text": "a"}"#, "id is \"good\", expected another than that of line 1");
        refused(r#"{"id": "a"}"#, "has neither text nor token_ids, expected one of them");
        refused(
            r#"{"id": "a", "text": "a", "token_ids": [1]}"#,
            "has text and token_ids, expected one of them",
        );
        refused(r#"{"id": "a", "text": null}"#, "text is null, expected a string");
        refused(r#"{"id": "a", "text": ""}"#, "text is empty, expected at least one character");
        refused(r#"{"id": "a", "token_ids": "1"}"#, "token_ids is \"1\", expected an array of token ids");
        refused(r#"{"id": "a", "token_ids": []}"#, "token_ids has no tokens, expected at least 1");
        for bad in ["-1", "320", "4294967296", "1.5", "\"1\"", "null", "1e3"] {
            let value: Value = serde_json::from_str(bad).unwrap();
            refused(
                &format!("{{\"id\": \"a\", \"token_ids\": [0, {bad}]}}"),
                &format!("token_ids[1] is {value}, expected an integer from 0 to 319"),
            );
        }
        refused(
            r#"{"id": "a", "token_ids": [1, 1, 1, 1, 1, 1, 1]}"#,
            "token_ids has 7 tokens, expected at most 6 beside a continuation of 4 in the model's context of 10",
        );
        refused(
            r#"{"id": "a", "text": "a", "tokens": []}"#,
            "has a field \"tokens\", expected only id, and text or token_ids",
        );
        let long = "x".repeat(1000);
        refused(&format!("\"{long}\""), &format!("is \"{}…, expected an object", "x".repeat(59)));
    }

    #[test]
    fn what_is_not_json_is_refused_with_the_column() {
        let message = format!("{:#}", settled("{\"id\": ").unwrap_err());
        assert!(message.starts_with("line 1: is not JSON: EOF while parsing"), "{message}");
        let deep = "[".repeat(100_000);
        assert!(format!("{:#}", settled(&deep).unwrap_err()).contains("recursion limit"));
    }

    #[test]
    fn a_file_without_prompts_is_refused() {
        for text in ["", "\n \n"] {
            assert_eq!(
                settled(text).unwrap_err().to_string(),
                "has no prompts, expected one JSON object a line"
            );
        }
    }
}
