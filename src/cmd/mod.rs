//! One file per verb: its arguments, its help and its run. Only here (and in `report`) is anything printed.

pub mod models;
pub mod progress;
