//! The vocabulary that a GGUF file carries in its metadata, as plain data: read by `gguf`, made into a tokenizer by
//! `tokenizer`. Nothing here is checked; the file may claim anything.

/// The `tokenizer.ggml.*` keys of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// Kind of tokenizer: `gpt2` for byte-level BPE, `llama` for SentencePiece.
    pub model: String,
    /// How a text is cut before merging: `smollm`, `llama-bpe`, …
    pub pre: Option<String>,
    /// Token of each id.
    pub tokens: Vec<String>,
    /// Type of each id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `left right`, most frequent first.
    pub merges: Vec<String>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    pub unknown_token_id: Option<u32>,
    pub add_bos_token: Option<bool>,
}
