//! Token-level Markov decision processes, solved exactly.
//!
//! A language model is a policy in a process whose states are token prefixes and whose actions are
//! tokens. Preference training, reward readouts and search all make claims about the *optimal*
//! policy of such a process. Here the process is small enough to be solved, in f64 and without
//! tensors, so those claims can be checked against the truth.
//!
//! # The problem and its solution: the KL form
//!
//! A policy π earns `E[Σ_t r(s_t, a_t)] - β KL(π ‖ π_ref)`. In the **KL form**, which this project
//! uses throughout,
//!
//! ```text
//! Q(s,a) = r(s,a) + V(s')                       V = 0 once the episode ends
//! V(s)   = β log Σ_a π_ref(a|s) exp(Q(s,a)/β)
//! π*(a|s) = π_ref(a|s) exp((Q(s,a) - V(s))/β)
//! Q - V  = β log(π*/π_ref)                      the implicit reward
//! ```
//!
//! The paper, *From r to Q\** (<https://arxiv.org/abs/2404.12358>), writes the same problem in the
//! **`MaxEnt` form**, its equations 5 to 7, which puts the reference into Q. The map is
//! `Q_maxent = Q_kl + β log π_ref`; V and π* are the same. The two are different types here,
//! [`KlForm`] and [`MaxEntForm`], so they cannot be mixed up.
//!
//! # Example
//!
//! Two tokens, "a" and EOS, and at most two tokens; the reference tosses a fair coin, and a
//! completion that says "a" twice is worth `ln 7`. Let β be 1.
//!
//! ```
//! use mdp_core::{Beta, TabularMdp, bradley_terry, implicit_rewards, implicit_return, solve};
//!
//! let mdp: TabularMdp = r#"
//!     vocab = 2
//!     horizon = 2
//!     eos = 1
//!     [[completion]]
//!     tokens = [0, 0]
//!     reward = 1.9459101490553132 # ln 7
//! "#
//! .parse()?;
//! let beta = Beta::new(1.0)?;
//! let solution = solve(&mdp, beta)?;
//!
//! // After "a": V = log(7/2 + 1/2) = log 4. At the prompt: V = log(4/2 + 1/2) = log 2.5.
//! let close = |x: f64, y: f64| (x - y).abs() < 1e-12;
//! assert!(close(solution.soft_values()[1], 4.0_f64.ln()));
//! assert!(close(solution.soft_values()[0], 2.5_f64.ln()));
//!
//! // The optimal policy says "a" with probability (4/2)/2.5 = 0.8, and again with 7/8.
//! let optimum = solution.optimal_policy();
//! assert!(close(optimum.logps()[0].exp(), 0.8));
//! assert!(close(optimum.logps()[2].exp(), 0.875));
//!
//! // The first "a" earned no reward, yet its implicit reward is log(0.8 / 0.5): it is an advantage,
//! // V("a") - V(prompt) = log 4 - log 2.5 = log 1.6.
//! let rewards = implicit_rewards(&mdp, &optimum, beta)?;
//! assert!(close(rewards[0], 1.6_f64.ln()));
//!
//! // Preferences come out right: 7 to 1 for saying it twice over stopping at once.
//! let twice = implicit_return(&mdp, &optimum, beta, &[0, 0])?;
//! let stop = implicit_return(&mdp, &optimum, beta, &[1])?;
//! assert!(close(twice.preference(&stop)?, 7.0 / 8.0));
//! assert!(close(bradley_terry(7.0_f64.ln(), 0.0), 7.0 / 8.0));
//! # Ok::<(), mdp_core::MdpError>(())
//! ```
//!
//! # What there is
//!
//! - **Processes**: [`TabularMdp`] over a [`Tree`] of prefixes, from code, from a seed, from TOML
//!   ([`TabularMdp::from_str`](std::str::FromStr::from_str), [`TabularMdp::from_file`]);
//!   [`PrefixMdp`] from any reward function and any policy. The environment may append tokens too.
//! - **What others implement**: [`TokenMdp`], [`TokenPolicy`], [`ActionValue`].
//! - **The optimum**: [`solve`] gives a [`SoftSolution`]: soft values, both forms of Q, the policy.
//! - **Any policy's worth**: [`evaluate`], [`occupancies`], [`state_kls`], [`trajectory_kls`],
//!   [`bellman_residuals`], [`path_error`], [`mean_path_error`].
//! - **Readouts**: [`implicit_rewards`], [`implicit_return`], [`chosen_reward_bound`],
//!   [`proxy_tuned`].
//! - **Preferences**: [`bradley_terry`], [`plackett_luce`], [`PairTable`], [`margin_loss`] with
//!   [`dpo_loss`] and its relatives, [`minimise_margin_loss`].
//! - **Freedom of the reward**: [`Potential`] and [`shape`].
//! - **Planning**: [`conservative_objective`], [`reward_objective`], [`soft_backup`],
//!   [`max_backup`].
//!
//! # Where the paper misleads
//!
//! Each of these is a test in `tests/errata.rs`: the corrected form holds and the printed one fails.
//!
//! | Place | Printed | Here |
//! |---|---|---|
//! | section 3.3 | `π ∝ π_ref exp(r)`, `r = β log(π/π_ref) - Z` | `exp(r/β)`, `+ β log Z` |
//! | display before (8) | later terms subtracted | added |
//! | (13) | `-V(s_0)` | `+V(s_0)`: [`conservative_objective`] |
//! | (14) to (15) | exponent `β (Q - V)` | `alpha/β_train (Q - V)`, KL form: [`proxy_tuned`] |
//! | Definition 1 | any potential | one constant on terminal states: [`Potential`] |
//! | section 4.2 | advantage of the `MaxEnt` Q | of the KL form: [`KlForm::advantages`] |
//! | section 5.1 | π(s\|a) | π(a\|s) |

mod beta;
mod description;
mod error;
mod evaluate;
mod implicit;
mod math;
mod mdp;
mod planning;
mod preference;
mod prefix;
mod shaping;
mod soft;
mod tabular;
mod tree;

pub use beta::Beta;
pub use error::MdpError;
pub use evaluate::{
    Evaluation, bellman_residuals, completion_logps, evaluate, expectation_to_go, mean_path_error,
    occupancies, path_error, state_kls, trajectory_kls,
};
pub use implicit::{
    ImplicitReturn, chosen_reward_bound, implicit_return, implicit_rewards, mean_implicit_return,
    proxy_tuned,
};
pub use math::{log_sigmoid, log_sum_exp, sigmoid};
pub use mdp::{ActionValue, LogpRows, Moves, TokenMdp, TokenPolicy, ZeroValue};
pub use planning::{
    conservative_objective, conservative_objectives, max_backup, reward_objective, soft_backup,
};
pub use preference::{
    Adam, LossAndGradient, PairTable, Slope, WeightedPair, bradley_terry, conservative_dpo_loss,
    dpo_loss, margin_loss, minimise_margin_loss, plackett_luce, robust_dpo_loss, sample_completion,
};
pub use prefix::PrefixMdp;
pub use shaping::{Potential, shape};
pub use soft::{KlForm, MaxEntForm, SoftSolution, solve};
pub use tabular::{
    MODEL_ROW_SUM_TOLERANCE, ROW_SUM_TOLERANCE, RewardPlacement, TabularMdp, TabularPolicy,
};
pub use tree::{DEFAULT_MAX_PAIRS, Node, Tree};
