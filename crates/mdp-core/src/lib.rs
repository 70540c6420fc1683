//! Token-level Markov decision processes, solved exactly.

mod beta;
mod error;
mod math;
mod mdp;
mod soft;
mod tabular;
mod tree;

pub use beta::Beta;
pub use error::MdpError;
pub use math::{log_sigmoid, log_sum_exp, sigmoid};
pub use mdp::{ActionValue, LogpRows, Moves, TokenMdp, TokenPolicy, ZeroValue};
pub use soft::{KlForm, MaxEntForm, SoftSolution, solve};
pub use tabular::{
    MODEL_ROW_SUM_TOLERANCE, ROW_SUM_TOLERANCE, RewardPlacement, TabularMdp, TabularPolicy,
};
pub use tree::{DEFAULT_MAX_PAIRS, Node, Tree};
