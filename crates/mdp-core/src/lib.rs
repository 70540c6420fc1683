//! Token-level Markov decision processes, solved exactly.

mod beta;
mod error;
mod math;
mod mdp;

pub use beta::Beta;
pub use error::MdpError;
pub use math::{log_sigmoid, log_sum_exp, sigmoid};
pub use mdp::{ActionValue, LogpRows, Moves, TokenMdp, TokenPolicy, ZeroValue};
