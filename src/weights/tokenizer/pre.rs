//! How a text is cut into words before byte-pair merging, by the name a GGUF file gives it (`tokenizer.ggml.pre`).
//! The rules are those of llama.cpp's src/llama-vocab.cpp, which wrote the names; an unknown name is an error, since
//! any guess gives wrong ids that look right.

use anyhow::{anyhow, bail};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
    SplitDelimiterBehavior,
};

/// Contractions, words, runs of digits, of signs and of spaces. Qwen2 cuts digits one by one, Llama 3 by threes.
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A way of cutting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pre {
    SmolLm,
    Llama3,
    Qwen2,
    Gpt2,
}

impl Pre {
    /// The way that `tokenizer.ggml.pre` names.
    ///
    /// # Errors
    /// When the name is unknown here.
    pub fn parse(name: &str) -> anyhow::Result<Self> {
        Ok(match name {
            "smollm" => Pre::SmolLm,
            "llama-bpe" | "llama3" | "llama-v3" => Pre::Llama3,
            "qwen2" => Pre::Qwen2,
            "gpt-2" => Pre::Gpt2,
            _ => bail!("tokenizer.ggml.pre is {name:?}, expected smollm, llama-bpe, qwen2 or gpt-2"),
        })
    }

    /// The pieces of a text, in order; together they are the text.
    ///
    /// # Errors
    /// When the regular expression gives up.
    pub fn cut(self, text: &str) -> anyhow::Result<Vec<String>> {
        let mut cut = PreTokenizedString::from(text);
        self.pre_tokenizer()?.pre_tokenize(&mut cut).map_err(|error| anyhow!("cutting a text: {error}"))?;
        let pieces = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(pieces.into_iter().map(|(_, (begin, end), _)| text[begin..end].to_owned()).collect())
    }

    /// Cuts, and turns bytes into their byte-level letters.
    pub(super) fn pre_tokenizer(self) -> anyhow::Result<PreTokenizerWrapper> {
        // `use_regex` is GPT-2's expression.
        let byte_level = |use_regex| ByteLevel::new(false, true, use_regex).into();
        Ok(match self {
            Pre::Gpt2 => byte_level(true),
            Pre::SmolLm => Sequence::new(vec![Digits::new(true).into(), byte_level(true)]).into(),
            Pre::Llama3 => Sequence::new(vec![split(LLAMA3)?.into(), byte_level(false)]).into(),
            Pre::Qwen2 => Sequence::new(vec![split(QWEN2)?.into(), byte_level(false)]).into(),
        })
    }

    /// Whether a piece that is a token as a whole is taken so, whatever the merges say.
    pub(super) fn ignores_merges(self) -> bool {
        self == Pre::Llama3
    }

    /// Whether a BOS comes first when the file does not say.
    pub(super) fn adds_bos(self) -> bool {
        self == Pre::Llama3
    }
}

fn split(expression: &str) -> anyhow::Result<Split> {
    let pattern = SplitPattern::Regex(expression.to_owned());
    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map_err(|error| anyhow!("{expression}: {error}"))
}
