//! Token-level Markov decision processes, solved exactly.

mod beta;
mod error;

pub use beta::Beta;
pub use error::MdpError;
