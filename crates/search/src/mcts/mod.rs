//! Tree search: PUCT or Gumbel at the root, three backups, three leaf values.

mod gumbel;
mod tree;

use serde::{Deserialize, Serialize};

use crate::leaf::Leaf;
use crate::space::Space;
use crate::{NodeId, PrefixModel, Request, SearchError, SearchOutput};
use tree::Mcts;

/// Simulations, selection and backup.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MctsConfig {
    /// Simulations for each token that is committed to, or in all with [`Commit::AtEnd`].
    pub simulations: usize,
    /// Simulations per call of the model. Above 1 a simulation does not know the results of its
    /// neighbours; that they are under way counts as a visit.
    pub batch: usize,
    /// How a prefix's value follows from those below it.
    pub backup: Backup,
    /// Whether to commit to a token at a time.
    pub commit: Commit,
    /// How the first token of a simulation is chosen.
    pub root: RootChoice,
    /// The weight of the prior against the values, PUCT's `c`; 0 follows the values alone.
    pub exploration: f64,
    /// Completions returned, with [`Commit::AtEnd`].
    pub n_best: usize,
    /// Whether [`SearchStats::root_values`](crate::SearchStats::root_values) is filled.
    pub trace: bool,
}

impl Default for MctsConfig {
    fn default() -> Self {
        Self {
            simulations: 64,
            batch: 1,
            backup: Backup::Max,
            commit: Commit::EachToken,
            root: RootChoice::Puct,
            exploration: 1.25,
            n_best: 1,
            trace: false,
        }
    }
}

/// How a prefix's value follows from those below it; `s` is a token's score and `V` the value after
/// it, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backup {
    /// `V = max_a (s_a + V_a)`: planning for the one best completion. In the limit the MAP, and with
    /// [`Leaf::Zero`] best-first search.
    #[default]
    Max,
    /// `V = log Σ_a π_a exp(r_a + V_a)`, where `r` is what a model with rewards adds to a token's score:
    /// what KL-regularised planning does. With [`Leaf::Zero`] and no rewards the root's value is the log
    /// of the covered mass at every moment, 0 if nothing is pruned, and the tree says nothing that the
    /// policy did not: search is then a no-op.
    Soft,
    /// The mean over simulations, as in `AlphaZero`. Under the policy's own visits it is off by the
    /// entropy (likelihood) or the divergence (log-ratio).
    Mean,
}

/// Whether a search commits to a token at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Commit {
    /// After the simulations of one token the best is taken, its subtree kept, and the search goes on
    /// from there. The completion so written is returned.
    #[default]
    EachToken,
    /// One tree from the prompt; the best completions that it met are returned.
    AtEnd,
}

/// How the first token of a simulation is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RootChoice {
    /// As everywhere else in the tree.
    #[default]
    Puct,
    /// As in Gumbel `AlphaZero` (Danihelka et al., 2022): `considered` tokens are drawn without
    /// replacement from the policy, the simulations shared among them by sequential halving, and the
    /// winner is the token of the best `gumbel + log π + σ(Q)`.
    Gumbel {
        /// Tokens drawn at the root.
        considered: usize,
        /// Seed of the draws.
        seed: u64,
    },
}

impl MctsConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`SearchError::Setting`] for the first setting that is out of its range.
    pub fn check(&self) -> Result<(), SearchError> {
        let counts = [
            ("simulations", self.simulations),
            ("batch", self.batch),
            ("n_best", self.n_best),
        ];
        for (name, value) in counts {
            if value == 0 {
                return Err(SearchError::setting(name, 0, "at least 1"));
            }
        }
        if let RootChoice::Gumbel { considered: 0, .. } = self.root {
            return Err(SearchError::setting("considered", 0, "at least 1"));
        }
        if !(self.exploration.is_finite() && self.exploration >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(SearchError::setting(
                "exploration",
                self.exploration,
                expected,
            ));
        }
        Ok(())
    }
}

/// The completion, or with [`Commit::AtEnd`] the completions, that tree search finds.
///
/// A simulation goes from the root to a prefix that was not expanded yet, by the tokens of the best
/// `Q + exploration * π * sqrt(1 + visits of the parent) / (1 + visits)`, where Q is the token's own score
/// and the value after it, scaled to [0, 1] over the tree. That prefix is expanded, valued as `leaf`
/// says, and the values above it are renewed.
///
/// With the max and the soft backup a token is decided by its Q, and a prefix below which everything
/// is known is not visited again: enough simulations make them exact. With the mean backup it is
/// decided by visits.
///
/// # Errors
///
/// A request or configuration out of range, or those of the model and of the value function.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{Backup, Commit, Leaf, MctsConfig, Policies, Request, mcts};
///
/// // Greedy takes token 0 (0.6) and ends with 0.6 * 0.5; EOS at once has 0.4.
/// let policy = TabularPolicy::from_probs(Tree::new(2, 2, 1)?, vec![0.6, 0.4, 0.5, 0.5])?;
/// let request = Request::of(policy.tree());
/// let best = |backup| {
///     let config = MctsConfig { simulations: 2, backup, ..MctsConfig::default() };
///     let output = mcts(&mut Policies::new(&policy), &request, &config, Leaf::Zero)?;
///     Ok::<_, search::SearchError>(output.completions[0].tokens.clone())
/// };
/// // The max backup finds the likeliest completion; the soft one is the policy's own choice.
/// assert_eq!(best(Backup::Max)?, [1]);
/// assert_eq!(best(Backup::Soft)?, [0, 0]);
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn mcts<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
    config: &MctsConfig,
    leaf: Leaf<'_>,
) -> Result<SearchOutput, SearchError> {
    config.check()?;
    leaf.check()?;
    let mut tree = Mcts::new(Space::new(model, request)?, config, leaf);
    let mut root = NodeId::ROOT;
    while let Some(next) = tree.search(root)? {
        if config.commit == Commit::AtEnd {
            break;
        }
        root = next;
        if !tree.descend(root) {
            break;
        }
    }
    Ok(tree.finish(root))
}
