//! Rewards, advantages and values read off a policy and its reference.
//!
//! A policy trained from preferences carries a reward for every token:
//! `r̂(s, a) = β log π(a|s) − β log π_ref(a|s)`, equation 11 of arXiv 2404.12358. At the optimum
//! it is the advantage of the KL-regularised problem, `Q*(s, a) − V*(s)`, and its sum over a
//! completion is the sequence's reward up to a constant of the prompt.
//!
//! | What | Where |
//! |---|---|
//! | everything that two rows of logits say of a token | [`read_logits`], [`TokenReadout`] |
//! | soft action values of the likeliest tokens at a position | [`Candidate`] |
//! | what a completion's tokens add up to | [`running_sums`], [`value_differences`] |
//! | against a true reward | [`soft_value_differences`], [`bellman_residuals`] |
//! | rewards from logps that are already there | [`token_rewards`], [`PairRewards`] |
//!
//! # What a policy does not tell
//!
//! Two rewards that differ by shaping, `r' = r + Φ(s') − Φ(s)`, have one optimal policy. So neither
//! the reward of a token nor the value of a state can be read off it, only what shaping leaves:
//! the advantage `r + V(s') − V(s)`, and its sums `V(s_t) − V(s_0) + Σ_{i<t} r_i`. Nothing here
//! returns a bare `V`.
//!
//! ```
//! use implicit_reward::{Beta, read_rows, running_sums};
//!
//! // Two tokens of a vocabulary of two; the reference tosses a coin, the policy prefers token 0.
//! let policy = [3f32.ln(), 0.0, 3f32.ln(), 0.0];
//! let readouts = read_rows(&policy, &[0.0; 4], &[0, 1], 0)?;
//! let beta = Beta::new(1.0).unwrap();
//! let rewards: Vec<f64> = readouts.iter().map(|token| token.implicit_reward(beta)).collect();
//! // log(3/4 / 1/2), and then log(1/4 / 1/2) more.
//! let sums = running_sums(&rewards);
//! assert!((sums[0] - 1.5f64.ln()).abs() < 1e-6 && (sums[1] - 0.75f64.ln()).abs() < 1e-6);
//! # Ok::<(), implicit_reward::ReadoutError>(())
//! ```

mod error;
mod path;
mod readout;
mod rewards;
mod row;

pub use error::ReadoutError;
pub use mdp_core::Beta;
pub use path::{bellman_residuals, running_sums, soft_value_differences, value_differences};
pub use readout::{Candidate, TokenReadout, read_logits, read_rows};
pub use rewards::{PairRewards, token_rewards};
