//! Search over completions with a policy as its own Q-function.
//!
//! A language model gives the log-probability of every next token. *From r to Q\**
//! (<https://arxiv.org/abs/2404.12358>) shows what such numbers mean after preference training: the
//! log-ratio to the reference is an advantage. So decoding can search, and this crate is that search:
//! one function per algorithm, over any policy, returning one [`SearchOutput`]. It has no tensors, so
//! every algorithm is tested against exact solutions of small processes.
//!
//! # Which score?
//!
//! **Everything depends on what is maximised**, so every search takes a [`Score`]:
//!
//! - [`Score::Likelihood`]: `Σ log π`. For a policy that is optimal for a reward r under a reference,
//!   this ranks as `Σ (r + β log π_ref)` does: reward, anchored to the reference (S1). It is the
//!   paper's likelihood search.
//! - [`Score::LogRatio`]: `Σ log(π/π_ref)`, the implicit reward over β. For such a policy it ranks as
//!   `Σ r` does: reward alone (S2).
//!
//! They agree only where the reference is indifferent. Take one token, β = 1, and a reference that
//! prefers A; the reward speaks for C:
//!
//! | completion | `π_ref` | r | `π_ref exp(r)` | π* | `Σ log π*` | `Σ log(π*/π_ref)` |
//! |---|---|---|---|---|---|---|
//! | A | 0.5 | 0 | 0.5 | 5/12 | **-0.88** | -0.18 |
//! | B | 0.4 | 0 | 0.4 | 4/12 | -1.10 | -0.18 |
//! | C | 0.1 | ln 3 | 0.3 | 3/12 | -1.39 | **0.92** |
//!
//! ```
//! use mdp_core::{Beta, TabularMdp, TabularPolicy, Tree, solve};
//! use search::{BestFirstConfig, Policies, Request, Score, best_first};
//!
//! let (a, c) = (0, 2);
//! let reference = TabularPolicy::from_probs(Tree::new(3, 1, c)?, vec![0.5, 0.4, 0.1])?;
//! let mdp = TabularMdp::new(reference, vec![0.0, 0.0, 3.0_f64.ln()])?;
//! let optimum = solve(&mdp, Beta::new(1.0)?)?.optimal_policy();
//!
//! let best = |score| {
//!     let request = Request { score, ..Request::of(mdp.tree()) };
//!     let mut model = Policies::new(&optimum).with_reference(mdp.reference());
//!     let output = best_first(&mut model, &request, &BestFirstConfig::default())?;
//!     Ok::<_, search::SearchError>(output.completions[0].clone())
//! };
//! let likeliest = best(Score::Likelihood)?;
//! assert_eq!(likeliest.tokens, [a]);
//! assert!((likeliest.logp - (5.0_f64 / 12.0).ln()).abs() < 1e-12);
//! // Its reward is 0, below V(prompt) = ln 1.2, which is what an implicit reward counts from.
//! assert!((likeliest.implicit_reward.unwrap() - (0.0 - 1.2_f64.ln())).abs() < 1e-12);
//!
//! let best_rewarded = best(Score::LogRatio)?;
//! assert_eq!(best_rewarded.tokens, [c]);
//! assert!((best_rewarded.implicit_reward.unwrap() - (3.0_f64.ln() - 1.2_f64.ln())).abs() < 1e-12);
//! # Ok::<(), search::SearchError>(())
//! ```
//!
//! For a policy that is *not* optimal the two also fail differently. Every further token can only
//! lower the likelihood, so likelihood search is anchored; at every state some token has a positive
//! log-ratio, so a search for log-ratios finds more implicit reward with every token, deserved or
//! not. [`Request::top_k`] is the trust region to put around it, and [`Score::Mix`] is between the
//! two. Neither is divided by the length: [`BeamConfig::length_penalty`] is 0 unless set.
//!
//! # The algorithms
//!
//! | Function | What it finds |
//! |---|---|
//! | [`greedy`] | the best token, again and again |
//! | [`sample`](sample()), [`best_of_n`] | random completions; the best of them by score or by a judge |
//! | [`beam_search`] | a beam, with transformers' stopping rules, n-best and diverse groups |
//! | [`best_first`] | the best completion of all, with a proof (Dijkstra) |
//! | [`mcts`] | tree search with PUCT or Gumbel, and a choice of [`Backup`] |
//! | [`lookahead`] | the first token of the best K-step plan, again and again |
//! | [`ProxyTuned`], [`ValueGuided`] | policies made of policies and values, for any of the above |
//!
//! A [`Request`] holds what they have in common: prompt and ends, score, [`Constraints`], [`Budget`],
//! a cancel flag. A budget is never passed by more than one batch, and what was found so far is
//! returned. [`SearchOutput::is_optimal`] says when the best completion is proven to be that.
//!
//! # What a model has to do
//!
//! [`PrefixModel`]: answer a frontier of prefixes with their next-token logps, all in one call.
//! Prefixes are handles into a [`PrefixTree`], so that a model that caches continues each from its
//! parent. [`Policies`] makes such a model of any policies of `mdp-core`, and [`TabularModel`] walks
//! tables.
//!
//! All scores, values and bounds are in nats; [`Request::beta`] turns them into reward units where it
//! says so. Nothing here recurses, so depth is limited by memory alone.

mod beam;
mod best_first;
mod best_of_n;
mod error;
mod greedy;
mod leaf;
mod lookahead;
mod mcts;
mod model;
mod output;
mod prefix_tree;
mod proxy_tuning;
mod request;
mod sampling;
mod space;
mod tabular;
mod value_guided;

pub use beam::{BeamConfig, EarlyStopping, beam_search};
pub use best_first::{BestFirstConfig, best_first};
pub use best_of_n::{Judge, best_of_n};
pub use error::SearchError;
pub use greedy::greedy;
pub use leaf::{Leaf, ValueFunction};
pub use lookahead::{LookaheadConfig, lookahead};
pub use mcts::{Backup, Commit, MctsConfig, RootChoice, mcts};
pub use model::{Policies, PrefixModel, Row, Rows};
pub use output::{Completion, End, SearchOutput, SearchStats, Stopped, TreeNode, TreeView};
pub use prefix_tree::{NodeId, PrefixTree};
pub use proxy_tuning::ProxyTuned;
pub use request::{Budget, Constraints, LogitProcessor, Request, Score};
pub use sampling::{SampleConfig, sample};
pub use tabular::TabularModel;
pub use value_guided::ValueGuided;
