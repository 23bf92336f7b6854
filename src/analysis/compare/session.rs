//! What a session is, and which records belong to one: a boot and a driver load, unless the user declared it.

use serde::{Deserialize, Serialize};

use super::sample::{Sample, printable};
use crate::record::{Maybe, Session, hashed_identity};

/// Identity of a session. Ordered, so that sessions can be listed the same way every time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum SessionId {
    /// `--session LABEL` at `run`.
    Declared { label: String },
    /// Hash of the boot id, and the driver's load time where a GPU driver is in use.
    Recognised {
        boot: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        driver_loaded_at: Option<String>,
    },
    /// Neither is known: all such records count as one session.
    Unknown,
}

impl SessionId {
    pub(super) fn of(session: &Session) -> Self {
        if let Maybe::Value(label) = &session.label {
            return SessionId::Declared { label: printable(label) };
        }
        match recognised(session) {
            Some((boot, driver_loaded_at)) => SessionId::Recognised { boot, driver_loaded_at },
            None => SessionId::Unknown,
        }
    }
}

/// The boot (hashed, so that a redacted copy gives the same) and the driver load.
pub(super) fn recognised(session: &Session) -> Option<(String, Option<String>)> {
    let boot = hashed_identity(&session.boot_id).into_value()?;
    Some((boot, session.driver_loaded_at.value().cloned()))
}

/// Times of one driver load that records give may differ by so much: they come from clocks that are set.
const SAME_LOAD_SECONDS: i64 = 120;

/// Gives samples of one boot whose driver load is the same but for the clock one time of it: the earliest.
pub fn align<'a>(samples: impl IntoIterator<Item = &'a mut Sample>) {
    let mut loads: Vec<(&'a mut String, &'a str, jiff::Timestamp)> = samples
        .into_iter()
        .filter_map(|sample| match &mut sample.session {
            SessionId::Recognised { boot, driver_loaded_at: Some(loaded) } => {
                let time = loaded.parse().ok()?;
                Some((loaded, boot.as_str(), time))
            }
            _ => None,
        })
        .collect();
    loads.sort_by(|a, b| (a.1, a.2).cmp(&(b.1, b.2)));
    let mut first: Option<(&str, jiff::Timestamp, String)> = None;
    for (loaded, boot, time) in loads {
        match &first {
            Some((known, since, text))
                if *known == boot && time.as_second() - since.as_second() <= SAME_LOAD_SECONDS =>
            {
                loaded.clone_from(text);
            }
            _ => first = Some((boot, time, loaded.clone())),
        }
    }
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SessionId::Declared { label } => write!(f, "session {label}"),
            SessionId::Recognised { boot, driver_loaded_at: Some(loaded) } => {
                write!(f, "boot {:.15}, driver loaded {loaded}", boot)
            }
            SessionId::Recognised { boot, .. } => write!(f, "boot {boot:.15}"),
            SessionId::Unknown => write!(f, "a session of unknown boot"),
        }
    }
}

/// The records of one session.
#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    pub(super) id: &'a SessionId,
    pub(super) samples: Vec<&'a Sample>,
}

/// Records by session, oldest session first. A record that is given twice counts once; `remarks` says so.
pub(super) fn group<'a>(samples: &'a [Sample], remarks: &mut Vec<String>) -> Vec<Group<'a>> {
    let mut sorted: Vec<&Sample> = samples.iter().collect();
    sorted.sort_by(|a, b| (&a.started_at, &a.session).cmp(&(&b.started_at, &b.session)));
    let mut groups: Vec<Group<'a>> = Vec::new();
    for sample in sorted {
        match groups.iter_mut().find(|group| *group.id == sample.session) {
            None => groups.push(Group { id: &sample.session, samples: vec![sample] }),
            Some(group) => match group.samples.iter().find(|known| known.is_same_measurement(sample)) {
                Some(known) => remarks.push(format!(
                    "{} is the same measurement as {} and counts once",
                    sample.name, known.name
                )),
                None => group.samples.push(sample),
            },
        }
    }
    groups
}
