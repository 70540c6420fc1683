//! Experiments that test what the paper claims: `r2q reproduce`.
//!
//! Each runs over several seeds, writes `results.json` and a page, and says of every target
//! whether it was reached.

pub mod beam;
pub mod credit;
pub mod curves;
mod fit;
pub mod identification;
mod page;
pub mod statistics;

use std::path::Path;

use lm::files::write_atomically;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// A claim with a number, and whether the data bear it out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The claim.
    pub claim: String,
    /// What was measured.
    pub measured: String,
    /// Whether it held; none where there are too few seeds to tell.
    pub held: Option<bool>,
}

/// Writes results, whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    write_atomically(path, |file| {
        serde_json::to_writer_pretty(file, value).map_err(std::io::Error::from)
    })
    .map_err(TrainError::io(path))
}
