//! Text to token ids and back, over the `tokenizers` crate: from a checkpoint's `tokenizer.json`, or from the
//! vocabulary inside a GGUF file (byte-level BPE only). Whatever a file claims is checked before it is built in: the
//! crate trusts its input, and a wrong vocabulary gives wrong ids without a word.

mod json;
mod pre;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, anyhow, bail, ensure};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper};

use super::vocab::GgufVocab;
pub use pre::Pre;

/// No vocabulary is larger, tokens ([`crate::arch::Config::check`] has the same bound).
const MOST_TOKENS: usize = 1 << 24;

/// `tokenizer.ggml.token_type` of tokens that are found in a text as they are, never by merging.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    /// Put first when `add_special` asks for it. A `tokenizer.json` does so by its own template instead.
    bos: Option<u32>,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn from_file(path: &Path) -> anyhow::Result<Self> {
        let (inner, vocab_size) = json::read(path).with_context(|| path.display().to_string())?;
        Ok(Self { inner, vocab_size, bos: None })
    }

    /// Builds the byte-level BPE that a GGUF file describes.
    ///
    /// # Errors
    /// When it describes another kind, names an unknown `pre`, or contradicts itself.
    pub fn from_gguf(vocab: &GgufVocab) -> anyhow::Result<Self> {
        let pre = check_kind(vocab)?;
        let ids = token_ids(vocab)?;
        let merges = merges(vocab, &ids)?;
        let bos = bos(vocab, pre)?;
        let bpe = BPE::builder()
            .vocab_and_merges(
                ids.into_iter().map(|(token, id)| (token.to_owned(), id)).collect::<Vocab>(),
                merges,
            )
            .ignore_merges(pre.ignores_merges())
            .build()
            .map_err(|error| anyhow!("tokenizer.ggml.merges: {error}"))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(pre.pre_tokenizer()?));
        inner.with_decoder(Some(DecoderWrapper::from(ByteLevel::default())));
        add_special_tokens(&mut inner, vocab)?;
        Ok(Self { inner, vocab_size: vocab.tokens.len(), bos })
    }

    /// Token ids of a text. Special tokens written in it count as such. `add_special` puts before (or around) it what
    /// the checkpoint says belongs there, such as BOS.
    ///
    /// # Errors
    /// When the tokenizer has no id for a part of the text and says that this is an error.
    pub fn encode(&self, text: &str, add_special: bool) -> anyhow::Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, add_special).map_err(|error| anyhow!("tokenising: {error}"))?;
        let bos = self.bos.filter(|_| add_special);
        Ok(bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The text of token ids, special tokens written out. Ids outside the vocabulary give nothing, and bytes that are
    /// no UTF-8 give U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's own decoder refuses.
    pub fn decode(&self, ids: &[u32]) -> anyhow::Result<String> {
        self.inner.decode(ids, false).map_err(|error| anyhow!("detokenising: {error}"))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

fn check_kind(vocab: &GgufVocab) -> anyhow::Result<Pre> {
    ensure!(
        vocab.model == "gpt2",
        "tokenizer.ggml.model is {:?}, expected \"gpt2\" (byte-level BPE), the only kind that is read from a GGUF file",
        vocab.model
    );
    let name =
        vocab.pre.as_deref().context("tokenizer.ggml.pre is missing, so how to cut a text is unknown")?;
    let count = vocab.tokens.len();
    ensure!(
        (1..=MOST_TOKENS).contains(&count),
        "tokenizer.ggml.tokens has {count} tokens, expected 1 to {MOST_TOKENS}"
    );
    ensure!(
        vocab.token_types.len() == count,
        "tokenizer.ggml.token_type has {} entries, expected one for each of {count} tokens",
        vocab.token_types.len()
    );
    for (key, id) in
        [("bos", vocab.bos_token_id), ("eos", vocab.eos_token_id), ("unknown", vocab.unknown_token_id)]
    {
        if let Some(id) = id.filter(|id| *id as usize >= count) {
            bail!("tokenizer.ggml.{key}_token_id is {id}, expected less than {count}");
        }
    }
    Pre::parse(name)
}

fn token_ids(vocab: &GgufVocab) -> anyhow::Result<HashMap<&str, u32>> {
    let mut ids = HashMap::with_capacity(vocab.tokens.len());
    for (id, token) in vocab.tokens.iter().enumerate() {
        ensure!(!token.is_empty(), "tokenizer.ggml.tokens: token {id} is empty");
        if let Some(first) = ids.insert(token.as_str(), id as u32) {
            bail!("tokenizer.ggml.tokens: {token:?} stands twice, as {first} and {id}");
        }
    }
    Ok(ids)
}

/// The merges as pairs, each checked: both halves and their union are tokens. The first of equal merges counts.
fn merges(vocab: &GgufVocab, ids: &HashMap<&str, u32>) -> anyhow::Result<Vec<(String, String)>> {
    let mut seen = HashSet::with_capacity(vocab.merges.len());
    let mut pairs = Vec::with_capacity(vocab.merges.len());
    for (rank, merge) in vocab.merges.iter().enumerate() {
        let (left, right) = split_merge(merge).with_context(|| {
            format!("tokenizer.ggml.merges: merge {rank} is {merge:?}, expected two tokens")
        })?;
        for token in [left, right, &format!("{left}{right}")] {
            ensure!(
                ids.contains_key(token),
                "tokenizer.ggml.merges: merge {rank} names {token:?}, which is no token"
            );
        }
        if seen.insert(merge) {
            pairs.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(pairs)
}

/// `left right`; the first character belongs to the left token even if it is a space.
fn split_merge(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let space = first + merge[first..].find(' ')?;
    let (left, right) = (&merge[..space], &merge[space + 1..]);
    (!right.is_empty()).then_some((left, right))
}

fn bos(vocab: &GgufVocab, pre: Pre) -> anyhow::Result<Option<u32>> {
    if !vocab.add_bos_token.unwrap_or(pre.adds_bos()) {
        return Ok(None);
    }
    vocab
        .bos_token_id
        .map(Some)
        .context("a BOS comes before every text, but tokenizer.ggml.bos_token_id is missing")
}

fn add_special_tokens(inner: &mut tokenizers::Tokenizer, vocab: &GgufVocab) -> anyhow::Result<()> {
    let found_as_written = |kind: i32| [UNKNOWN, CONTROL, USER_DEFINED].contains(&kind);
    let added = vocab.tokens.iter().zip(&vocab.token_types).filter(|(_, kind)| found_as_written(**kind));
    let added =
        added.map(|(token, kind)| AddedToken::from(token.as_str(), *kind != USER_DEFINED).normalized(false));
    inner.add_tokens(added).map(drop).map_err(|error| anyhow!("tokenizer.ggml.tokens: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All 256 bytes under their byte-level letters, then `more` (normal), then one control and one user-defined.
    fn vocab(pre: &str, more: &[&str], merges: &[&str]) -> GgufVocab {
        let mut tokens: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
        tokens.sort();
        tokens.extend(more.iter().map(|token| (*token).to_owned()));
        let mut token_types = vec![1; tokens.len()];
        tokens.extend(["<|end|>".to_owned(), "<user>".to_owned()]);
        token_types.extend([CONTROL, USER_DEFINED]);
        GgufVocab {
            model: "gpt2".into(),
            pre: Some(pre.into()),
            eos_token_id: Some(token_types.len() as u32 - 2),
            merges: merges.iter().map(|merge| (*merge).to_owned()).collect(),
            tokens,
            token_types,
            ..GgufVocab::default()
        }
    }

    fn refusal(vocab: &GgufVocab) -> String {
        format!("{:#}", Tokenizer::from_gguf(vocab).err().expect("a refusal"))
    }

    #[test]
    fn any_text_comes_back_from_its_ids() {
        for pre in ["smollm", "llama-bpe", "qwen2", "gpt-2"] {
            let vocab = GgufVocab { bos_token_id: Some(0), ..vocab(pre, &["he", "Ġhe"], &["h e", "Ġ he"]) };
            let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
            for text in ["", "he said", " he  he\n\n", "naïve 日本 🚀", "12345 <|end|><user>x", "\0\u{7f}"]
            {
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{pre} {text:?}");
            }
        }
    }

    #[test]
    fn merging_follows_the_order_of_the_merges() {
        let (more, merges) = (["ab", "bc"], ["b c", "a b"]);
        let tokenizer = Tokenizer::from_gguf(&vocab("gpt-2", &more, &merges)).unwrap();
        let token = |text| tokenizer.inner.token_to_id(text).unwrap();
        assert_eq!(tokenizer.encode("abc", false).unwrap(), [token("a"), token("bc")]);
        let repeated = Tokenizer::from_gguf(&vocab("gpt-2", &more, &["b c", "a b", "b c"])).unwrap();
        assert_eq!(repeated.encode("abc", false).unwrap(), [token("a"), token("bc")]);
    }

    #[test]
    fn llama3_takes_a_whole_word_from_the_vocabulary_without_merges() {
        let ids = |pre| {
            Tokenizer::from_gguf(&vocab(pre, &["abc"], &[])).unwrap().encode("abc", false).unwrap().len()
        };
        let with_bos = GgufVocab { bos_token_id: Some(0), ..vocab("llama-bpe", &["abc"], &[]) };
        assert_eq!(Tokenizer::from_gguf(&with_bos).unwrap().encode("abc", false).unwrap(), [256]);
        assert_eq!(ids("qwen2"), 3);
    }

    #[test]
    fn control_and_user_defined_tokens_in_a_text_are_one_id_each() {
        let tokenizer = Tokenizer::from_gguf(&vocab("qwen2", &[], &[])).unwrap();
        let ids = tokenizer.encode("a<|end|> <user>", false).unwrap();
        assert_eq!(ids.len(), 4);
        assert_eq!([ids[1], ids[3]], [256, 257]);
    }

    #[test]
    fn bos_is_added_only_when_the_file_says_so_and_the_caller_asks() {
        let with = |add, pre| GgufVocab { bos_token_id: Some(7), add_bos_token: add, ..vocab(pre, &[], &[]) };
        let first = |vocab: GgufVocab, add_special| {
            Tokenizer::from_gguf(&vocab).unwrap().encode("", add_special).unwrap().first().copied()
        };
        assert_eq!(first(with(Some(true), "gpt-2"), true), Some(7));
        assert_eq!(first(with(Some(true), "gpt-2"), false), None);
        assert_eq!(first(with(Some(false), "llama-bpe"), true), None);
        assert_eq!(
            first(with(None, "llama-bpe"), true),
            Some(7),
            "llama 3 has a BOS unless the file denies it"
        );
        assert_eq!(first(with(None, "smollm"), true), None);
        let none = GgufVocab { add_bos_token: Some(true), ..vocab("gpt-2", &[], &[]) };
        assert!(refusal(&none).contains("bos_token_id is missing"));
    }

    #[test]
    fn other_kinds_of_tokenizer_are_refused_by_name() {
        let spm = GgufVocab { model: "llama".into(), ..vocab("gpt-2", &[], &[]) };
        assert!(refusal(&spm).starts_with("tokenizer.ggml.model is \"llama\", expected \"gpt2\""));
        let missing = GgufVocab { pre: None, ..vocab("gpt-2", &[], &[]) };
        assert!(refusal(&missing).starts_with("tokenizer.ggml.pre is missing"));
        for unknown in ["default", "tekken", ""] {
            assert!(
                refusal(&vocab(unknown, &[], &[])).starts_with(&format!("tokenizer.ggml.pre is {unknown:?}"))
            );
        }
    }

    #[test]
    fn hostile_vocabularies_are_refused_with_the_offending_entry() {
        let refused = |expected: &str, change: &dyn Fn(&mut GgufVocab)| {
            let mut vocab = vocab("gpt-2", &["ab"], &["a b"]);
            change(&mut vocab);
            let message = refusal(&vocab);
            assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        };
        refused("stands twice, as 256 and 257", &|v| v.tokens[257] = "ab".into());
        refused("token 3 is empty", &|v| v.tokens[3].clear());
        refused("token_type has 2 entries, expected one for each of 259", &|v| v.token_types.truncate(2));
        refused("has 0 tokens, expected 1 to", &|v| v.tokens.clear());
        refused("eos_token_id is 259, expected less than 259", &|v| v.eos_token_id = Some(259));
        refused("bos_token_id is 4294967295", &|v| v.bos_token_id = Some(u32::MAX));
        refused("unknown_token_id is 300", &|v| v.unknown_token_id = Some(300));
        refused("merge 1 names \"zzz\", which is no token", &|v| v.merges.push("zzz a".into()));
        refused("merge 1 names \"aa\", which is no token", &|v| v.merges.push("a a".into()));
        for merge in ["", " ", "a", "a ", " a", "ab"] {
            refused("merge 0 ", &|v| v.merges[0] = merge.into());
        }
    }
}
