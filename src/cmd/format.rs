//! What a result can be written as, and what the ending of a file says about it. One meaning of an ending for all verbs
//! that write by it.

use std::ffi::OsStr;
use std::path::Path;

use clap::ValueEnum;

use super::usage;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Markdown,
    Html,
}

impl Format {
    /// What the ending of a file asks for; none where it says nothing.
    pub(crate) fn by_ending(path: &Path) -> Option<Self> {
        let ending = path.extension().map(OsStr::to_ascii_lowercase)?;
        match ending.to_str()? {
            "json" => Some(Format::Json),
            "md" => Some(Format::Markdown),
            "html" | "htm" => Some(Format::Html),
            "txt" => Some(Format::Table),
            _ => None,
        }
    }

    /// # Errors
    /// When the ending of the file says nothing.
    pub(crate) fn of(path: &Path) -> anyhow::Result<Self> {
        Format::by_ending(path).ok_or_else(|| {
            usage(format!("--out is '{}', expected an ending .json, .md, .html or .txt", path.display()))
        })
    }
}
