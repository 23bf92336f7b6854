//! One file per verb: its arguments, its help and its `run`. Results go to stdout, everything else to stderr.

pub mod doctor;
