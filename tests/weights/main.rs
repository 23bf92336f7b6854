//! Opening weights: both file formats against writers that share no code with the readers, quantised values against
//! formulas written here, and everything that can be broken.

#![allow(clippy::unwrap_used)]

mod broken;
mod files;
mod fuzz;
mod quantised;
mod round_trip;
mod tiny;
