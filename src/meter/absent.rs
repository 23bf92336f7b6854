//! A sensor that is not there: why, in a code and in a sentence, and what to do about it.

/// Why there is no sensor. Printed as one sentence and a hint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct Absent {
    /// The reason code that stands in a record.
    pub reason: String,
    pub sentence: String,
    /// The exact remedy, if there is one.
    pub remedy: Option<String>,
}

impl Absent {
    pub fn new(reason: impl Into<String>, sentence: impl Into<String>) -> Self {
        Absent { reason: reason.into(), sentence: sentence.into(), remedy: None }
    }

    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Absent { remedy: Some(remedy.into()), ..self }
    }
}
