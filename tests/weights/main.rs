//! Opening weights: both file formats against writers that share no code with the readers, quantised values against
//! formulas written here, and everything that can be broken.

mod broken;
mod files;
mod fuzz;
mod quantised;
mod round_trip;
mod tiny;
