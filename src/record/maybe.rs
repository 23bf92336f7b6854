//! A value that may be missing, and then says why: nothing in a record is guessed, and nothing is silently absent.
//! Written as the value itself, or as `{"missing": "reason_code"}`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Stands for a field that an older file lacks; never written.
const NOT_RECORDED: &str = "not_recorded";

/// A value, or why there is none.
// `Missing` stands first because an untagged enum takes the first variant that fits, and a map would fit anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Maybe<T> {
    Missing(Missing),
    Value(T),
}

/// Why a value is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Missing {
    /// A short reason in snake_case: `not_found`, `permission`, `malformed`, …
    pub missing: String,
}

impl<T> Maybe<T> {
    pub fn missing(reason: impl Into<String>) -> Self {
        Maybe::Missing(Missing { missing: reason.into() })
    }

    /// How a field is read that the program which wrote the file did not know.
    pub(super) fn not_recorded() -> Self {
        Self::missing(NOT_RECORDED)
    }

    /// Such a field is left out again when the file is copied, so that it keeps its hash.
    pub(super) fn is_not_recorded(&self) -> bool {
        self.reason() == Some(NOT_RECORDED)
    }

    pub fn value(&self) -> Option<&T> {
        match self {
            Maybe::Value(value) => Some(value),
            Maybe::Missing(_) => None,
        }
    }

    pub fn into_value(self) -> Option<T> {
        match self {
            Maybe::Value(value) => Some(value),
            Maybe::Missing(_) => None,
        }
    }

    /// Why there is no value.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Maybe::Value(_) => None,
            Maybe::Missing(missing) => Some(&missing.missing),
        }
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Maybe<U> {
        match self {
            Maybe::Value(value) => Maybe::Value(change(value)),
            Maybe::Missing(missing) => Maybe::Missing(missing),
        }
    }

    /// What `next` makes of the value; else the reason why there is none.
    pub fn and_then<U>(self, next: impl FnOnce(T) -> Maybe<U>) -> Maybe<U> {
        match self {
            Maybe::Value(value) => next(value),
            Maybe::Missing(missing) => Maybe::Missing(missing),
        }
    }

    /// Both values; else the first reason.
    pub fn zip<U>(self, other: Maybe<U>) -> Maybe<(T, U)> {
        self.and_then(|value| other.map(|other| (value, other)))
    }

    pub fn as_ref(&self) -> Maybe<&T> {
        match self {
            Maybe::Value(value) => Maybe::Value(value),
            Maybe::Missing(missing) => Maybe::Missing(missing.clone()),
        }
    }
}

impl<T, E: Into<String>> From<Result<T, E>> for Maybe<T> {
    fn from(result: Result<T, E>) -> Self {
        match result {
            Ok(value) => Maybe::Value(value),
            Err(reason) => Maybe::missing(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn round_trip<T: Serialize + for<'a> Deserialize<'a>>(value: &Maybe<T>) -> (String, Maybe<T>) {
        let text = serde_json::to_string(value).unwrap();
        let back = serde_json::from_str(&text).unwrap();
        (text, back)
    }

    #[test]
    fn a_value_is_written_as_itself_and_a_missing_one_as_its_reason() {
        let value = Maybe::Value(5_u64);
        let missing = Maybe::<u64>::missing("permission");
        assert_eq!(round_trip(&value), ("5".to_owned(), value));
        assert_eq!(round_trip(&missing), (r#"{"missing":"permission"}"#.to_owned(), missing));
    }

    #[test]
    fn a_missing_map_is_not_read_as_a_map_with_the_key_missing() {
        let missing = Maybe::<BTreeMap<String, String>>::missing("not_found");
        assert_eq!(round_trip(&missing).1, missing);
    }

    #[test]
    fn a_fraction_keeps_every_bit() {
        let value = Maybe::Value(0.1_f64 + 0.2);
        assert_eq!(round_trip(&value).1, value);
    }

    #[test]
    fn anything_but_a_value_or_a_reason_is_refused() {
        for text in ["null", "{}", r#"{"missing":3}"#, r#"{"missing":"x","more":1}"#, r#""five""#] {
            assert!(serde_json::from_str::<Maybe<u64>>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_result_becomes_a_value_or_its_reason() {
        assert_eq!(Maybe::from(Ok::<_, &str>(1)), Maybe::Value(1));
        let missing: Maybe<i32> = Err("malformed").into();
        assert_eq!(missing.reason(), Some("malformed"));
        assert_eq!(missing.value(), None);
        assert_eq!(Maybe::Value(2).map(|n| n * 2).into_value(), Some(4));
    }

    #[test]
    fn the_schema_allows_both_forms() {
        let schema = serde_json::to_string(&schemars::schema_for!(Maybe<u64>)).unwrap();
        assert!(
            schema.contains("anyOf") && schema.contains("integer") && schema.contains("missing"),
            "{schema}"
        );
    }
}
