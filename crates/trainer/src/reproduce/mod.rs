//! Experiments that test what the paper claims: `r2q reproduce`.
//!
//! Each runs over several seeds, writes `results.json` and a page, and says of every target
//! whether it was reached.

pub mod credit;
pub mod statistics;

use serde::{Deserialize, Serialize};

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
