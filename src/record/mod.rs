//! What is written down: the types of the record file. Raw facts with their units, no derived values. Knows nothing
//! of how they were measured; everything after the wall reads only these.

pub mod machine;
mod maybe;

pub use maybe::{Maybe, Missing};
