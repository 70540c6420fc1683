//! Policies and processes as tables over a [`Tree`].

use std::sync::Arc;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::math::log_softmax;
use crate::{LogpRows, MdpError, Moves, Node, TokenMdp, TokenPolicy, Tree};

/// How far from one a row of probabilities may sum. Rows written by hand in decimal, or computed in
/// f64 by any reasonable path, are far closer; an error in a row is far further.
pub const ROW_SUM_TOLERANCE: f64 = 1e-9;

/// How far from one a language model's row may sum: its log-softmax runs in f32, over a vocabulary.
pub const MODEL_ROW_SUM_TOLERANCE: f64 = 1e-4;

/// A policy as a table of logps over the pairs of a [`Tree`]. Cloning shares the table.
///
/// Rows sum to one. A logp may be minus infinity, so deterministic policies can be evaluated; a
/// *reference* must give every token some probability, which [`TabularMdp::new`] checks.
#[derive(Clone, Debug)]
pub struct TabularPolicy {
    tree: Tree,
    logps: Arc<Vec<f64>>,
}

impl TabularPolicy {
    /// The policy with these probabilities, `[pairs]`.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`], [`MdpError::Logp`] or [`MdpError::RowSum`], with the state.
    pub fn from_probs(tree: Tree, mut probs: Vec<f64>) -> Result<Self, MdpError> {
        tree.check_pairs("policy", probs.len())?;
        for p in &mut probs {
            *p = p.ln();
        }
        Self::from_logps(tree, probs)
    }

    /// The policy with these logps in nats, `[pairs]`.
    ///
    /// # Errors
    ///
    /// As [`from_probs`](Self::from_probs).
    pub fn from_logps(tree: Tree, logps: Vec<f64>) -> Result<Self, MdpError> {
        tree.check_pairs("policy", logps.len())?;
        check_rows("policy", &tree, &logps, ROW_SUM_TOLERANCE)?;
        Ok(Self::from_checked(tree, logps))
    }

    /// The softmax policy of these logits, `[pairs]`: any finite numbers are a policy.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`], or [`MdpError::NotFinite`] with the state and token.
    pub fn from_logits(tree: Tree, mut logits: Vec<f64>) -> Result<Self, MdpError> {
        tree.check_pairs("logits", logits.len())?;
        check_finite("logit", &tree, &logits)?;
        for row in logits.chunks_exact_mut(tree.vocab()) {
            log_softmax(row);
        }
        Ok(Self::from_checked(tree, logits))
    }

    /// The policy that gives every token the same probability.
    #[must_use]
    pub fn uniform(tree: Tree) -> Self {
        let logps = vec![-(tree.vocab() as f64).ln(); tree.n_pairs()];
        Self::from_checked(tree, logps)
    }

    /// A softmax policy with independent normal logits of standard deviation `spread`.
    ///
    /// # Errors
    ///
    /// [`MdpError::Parameter`] if `spread` is negative or not finite.
    pub fn random(tree: Tree, spread: f64, rng: &mut impl Rng) -> Result<Self, MdpError> {
        check_spread("spread", spread)?;
        let logits = (0..tree.n_pairs()).map(|_| spread * normal(rng)).collect();
        Self::from_logits(tree, logits)
    }

    /// Writes down any policy at every state of `tree`: a language model with a small vocabulary is
    /// enumerated this way. Rows are normalised in f64 once they pass the check.
    ///
    /// # Errors
    ///
    /// Those of the policy; [`MdpError::Vocabulary`] if its vocabulary is not the tree's;
    /// [`MdpError::Logp`] or [`MdpError::RowSum`] if a row is further than
    /// [`MODEL_ROW_SUM_TOLERANCE`] from a distribution.
    pub fn tabulate(tree: Tree, policy: &(impl TokenPolicy + ?Sized)) -> Result<Self, MdpError> {
        /// Prefixes per call: enough to fill a batch, few enough to hold.
        const BATCH: usize = 256;
        if policy.vocab() != tree.vocab() {
            return Err(MdpError::TableLength {
                table: "the policy's vocabulary",
                expected: tree.vocab(),
                got: policy.vocab(),
            });
        }
        let mut logps = reserve(tree.n_pairs())?;
        for first in (0..tree.n_states()).step_by(BATCH) {
            let last = (first + BATCH).min(tree.n_states());
            let states: Vec<Vec<u32>> = (first..last)
                .map(|state| [tree.prompt(), &tree.tokens(state)].concat())
                .collect();
            let states: Vec<&[u32]> = states.iter().map(Vec::as_slice).collect();
            let rows = policy.next_logps(&states)?;
            if rows.len() != states.len() || rows.vocab() != tree.vocab() {
                return Err(MdpError::TableLength {
                    table: "the policy's rows",
                    expected: states.len() * tree.vocab(),
                    got: rows.len() * rows.vocab(),
                });
            }
            logps.extend_from_slice(&rows.into_values());
        }
        check_rows("policy", &tree, &logps, MODEL_ROW_SUM_TOLERANCE)?;
        for row in logps.chunks_exact_mut(tree.vocab()) {
            log_softmax(row);
        }
        Ok(Self::from_checked(tree, logps))
    }

    /// The policy whose completions are distributed as `weights`, in the order of
    /// [`Tree::completions`]: every distribution over completions is a token policy.
    ///
    /// Its rows are the conditionals of the weights; a state of no weight is given the uniform row.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`], or [`MdpError::Weight`] if a weight is negative or not finite or
    /// all are zero.
    pub fn from_completion_weights(tree: Tree, weights: &[f64]) -> Result<Self, MdpError> {
        if weights.len() != tree.n_completions() {
            return Err(MdpError::TableLength {
                table: "completion weights",
                expected: tree.n_completions(),
                got: weights.len(),
            });
        }
        check_weights(weights)?;
        let mut mass = vec![0.0; tree.n_pairs()];
        for (pair, &weight) in tree.completions().zip(weights) {
            mass[pair] = weight;
        }
        let vocab = tree.vocab();
        for state in (0..tree.n_states()).rev() {
            let total: f64 = mass[tree.row(state)].iter().sum();
            if let Some(before) = tree.parent(state) {
                mass[before] = total;
            }
            for m in &mut mass[tree.row(state)] {
                *m = if total > 0.0 {
                    (*m / total).ln()
                } else {
                    -(vocab as f64).ln()
                };
            }
        }
        Ok(Self::from_checked(tree, mass))
    }

    /// Rows that are distributions by construction.
    pub(crate) fn from_checked(tree: Tree, logps: Vec<f64>) -> Self {
        debug_assert_eq!(logps.len(), tree.n_pairs());
        Self {
            tree,
            logps: Arc::new(logps),
        }
    }

    /// The tree that the table is over.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// `log π(a|s)` in nats, `[pairs]`.
    #[must_use]
    pub fn logps(&self) -> &[f64] {
        &self.logps
    }

    /// `log π(·|s)` in nats at state number `state`, `[vocab]`.
    ///
    /// # Panics
    ///
    /// If there is no such state.
    #[must_use]
    pub fn row(&self, state: usize) -> &[f64] {
        &self.logps[self.tree.row(state)]
    }
}

impl TokenPolicy for TabularPolicy {
    fn vocab(&self) -> usize {
        self.tree.vocab()
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        let mut values = Vec::with_capacity(states.len() * self.tree.vocab());
        for state in states {
            match self.tree.find_state(state)? {
                Node::State(at) => values.extend_from_slice(self.row(at)),
                Node::Completion(_) => {
                    return Err(MdpError::Terminal {
                        state: state.to_vec(),
                    });
                }
            }
        }
        LogpRows::new(self.tree.vocab(), values)
    }
}

/// A process as tables over a [`Tree`]: a full-support reference, a reward per pair and, where the
/// environment moves, its distribution. Cloning shares the tables.
///
/// At a state of the environment the reference's row *is* the environment's distribution, and every
/// function of this crate that takes a policy ignores the policy's row there: the log-ratio is 0.
#[derive(Clone, Debug)]
pub struct TabularMdp {
    reference: TabularPolicy,
    rewards: Arc<Vec<f64>>,
    /// One entry per state, or none at all if the policy moves everywhere.
    environment: Arc<Vec<bool>>,
}

/// Where a random process gives reward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RewardPlacement {
    /// On every token.
    Dense,
    /// On the last token of each completion only, as a sequence-level reward model does.
    TerminalOnly,
}

impl TabularMdp {
    /// The process with this reference and these rewards, `[pairs]`, in reward units.
    ///
    /// # Errors
    ///
    /// [`MdpError::ReferenceSupport`] if the reference gives a token no probability,
    /// [`MdpError::TableLength`], or [`MdpError::NotFinite`] if a reward is NaN or infinite.
    pub fn new(reference: TabularPolicy, rewards: Vec<f64>) -> Result<Self, MdpError> {
        let tree = reference.tree();
        tree.check_pairs("rewards", rewards.len())?;
        check_finite("reward", tree, &rewards)?;
        if let Some(pair) = reference.logps().iter().position(|x| !x.is_finite()) {
            return Err(MdpError::ReferenceSupport {
                state: tree.tokens(pair / tree.vocab()),
                action: (pair % tree.vocab()) as u32,
                probability: reference.logps()[pair].exp(),
            });
        }
        Ok(Self {
            reference,
            rewards: Arc::new(rewards),
            environment: Arc::new(Vec::new()),
        })
    }

    /// The process with this reference and the reward function `reward(tokens after the prompt,
    /// action)`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_fn(
        reference: TabularPolicy,
        mut reward: impl FnMut(&[u32], u32) -> f64,
    ) -> Result<Self, MdpError> {
        let tree = reference.tree();
        let mut rewards = reserve(tree.n_pairs())?;
        for state in 0..tree.n_states() {
            let tokens = tree.tokens(state);
            rewards.extend((0..tree.vocab() as u32).map(|action| reward(&tokens, action)));
        }
        Self::new(reference, rewards)
    }

    /// A process with normal rewards of standard deviation 1 and a softmax reference of normal
    /// logits, the same for the same `seed` on every machine.
    ///
    /// # Errors
    ///
    /// None for a tree that exists; the signature leaves room for memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use mdp_core::{RewardPlacement, TabularMdp, Tree};
    ///
    /// let mdp = TabularMdp::seeded(Tree::new(3, 4, 2)?, RewardPlacement::Dense, 7)?;
    /// assert_eq!(mdp.rewards().len(), mdp.tree().n_pairs());
    /// # Ok::<(), mdp_core::MdpError>(())
    /// ```
    pub fn seeded(tree: Tree, placement: RewardPlacement, seed: u64) -> Result<Self, MdpError> {
        Self::random(tree, placement, 1.0, &mut ChaCha8Rng::seed_from_u64(seed))
    }

    /// As [`seeded`](Self::seeded), from a stream, with rewards of standard deviation
    /// `reward_scale` in reward units.
    ///
    /// # Errors
    ///
    /// [`MdpError::Parameter`] if `reward_scale` is negative or not finite.
    pub fn random(
        tree: Tree,
        placement: RewardPlacement,
        reward_scale: f64,
        rng: &mut impl Rng,
    ) -> Result<Self, MdpError> {
        check_spread("reward scale", reward_scale)?;
        let reference = TabularPolicy::random(tree.clone(), 1.0, rng)?;
        let rewards = (0..tree.n_pairs())
            .map(|pair| {
                // Drawn for every pair, so that the two placements share a stream.
                let reward = reward_scale * normal(rng);
                let counts = placement == RewardPlacement::Dense || tree.child(pair).is_none();
                if counts { reward } else { 0.0 }
            })
            .collect();
        Self::new(reference, rewards)
    }

    /// The same process with the environment moving where `distribution(tokens after the prompt)`
    /// is `Some`, with those probabilities, `[vocab]`.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`], [`MdpError::ReferenceSupport`] or [`MdpError::RowSum`] for a row
    /// that is no full-support distribution, with the state.
    pub fn with_environment(
        self,
        mut distribution: impl FnMut(&[u32]) -> Option<Vec<f64>>,
    ) -> Result<Self, MdpError> {
        let tree = self.tree().clone();
        let mut logps = self.reference.logps().to_vec();
        let mut environment = vec![false; tree.n_states()];
        for (state, moves) in environment.iter_mut().enumerate() {
            let tokens = tree.tokens(state);
            let Some(row) = distribution(&tokens) else {
                continue;
            };
            check_support("environment", &tokens, &row, tree.vocab())?;
            *moves = true;
            for (logp, p) in logps[tree.row(state)].iter_mut().zip(&row) {
                *logp = p.ln();
            }
        }
        Ok(Self {
            reference: TabularPolicy::from_checked(tree, logps),
            rewards: self.rewards,
            environment: Arc::new(environment),
        })
    }

    /// The same process with other rewards, `[pairs]`.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`] or [`MdpError::NotFinite`].
    pub fn with_rewards(&self, rewards: Vec<f64>) -> Result<Self, MdpError> {
        self.tree().check_pairs("rewards", rewards.len())?;
        check_finite("reward", self.tree(), &rewards)?;
        Ok(Self {
            reference: self.reference.clone(),
            rewards: Arc::new(rewards),
            environment: Arc::clone(&self.environment),
        })
    }

    /// The tree that the tables are over.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        self.reference.tree()
    }

    /// The reference policy.
    #[must_use]
    pub fn reference(&self) -> &TabularPolicy {
        &self.reference
    }

    /// `r(s, a)` in reward units, `[pairs]`.
    #[must_use]
    pub fn rewards(&self) -> &[f64] {
        &self.rewards
    }

    /// Whether the environment, not the policy, moves at state number `state`.
    #[must_use]
    pub fn is_environment(&self, state: usize) -> bool {
        self.environment.get(state).copied().unwrap_or(false)
    }

    /// Whether the environment moves anywhere.
    #[must_use]
    pub fn has_environment(&self) -> bool {
        self.environment.contains(&true)
    }

    /// The logps by which a token is drawn at `state` when `policy` acts: the policy's row, or the
    /// environment's where that moves. `[vocab]`, in nats.
    ///
    /// # Panics
    ///
    /// If there is no such state in both.
    #[must_use]
    pub fn acting_row<'a>(&'a self, policy: &'a TabularPolicy, state: usize) -> &'a [f64] {
        if self.is_environment(state) {
            self.reference.row(state)
        } else {
            policy.row(state)
        }
    }

    /// The policy as it acts here: its own rows, and the environment's where that moves.
    ///
    /// # Errors
    ///
    /// [`MdpError::TreeMismatch`] if `policy` is over another tree.
    pub fn acting(&self, policy: &TabularPolicy) -> Result<TabularPolicy, MdpError> {
        self.tree().check_same("policy", policy.tree())?;
        if !self.has_environment() {
            return Ok(policy.clone());
        }
        let mut logps = reserve(self.tree().n_pairs())?;
        for state in 0..self.tree().n_states() {
            logps.extend_from_slice(self.acting_row(policy, state));
        }
        Ok(TabularPolicy::from_checked(self.tree().clone(), logps))
    }

    /// The undiscounted return of every completion, in the order of [`Tree::completions`], in
    /// reward units.
    #[must_use]
    pub fn returns(&self) -> Vec<f64> {
        let sums = self.tree().path_sums(&self.rewards);
        self.tree().completions().map(|pair| sums[pair]).collect()
    }
}

impl TokenMdp for TabularMdp {
    fn vocab(&self) -> usize {
        self.tree().vocab()
    }

    fn moves(&self, state: &[u32]) -> Result<Moves, MdpError> {
        Ok(match self.tree().find_state(state)? {
            Node::Completion(_) => Moves::Terminal,
            Node::State(at) => {
                let rewards = self.rewards[self.tree().row(at)].to_vec();
                if self.is_environment(at) {
                    Moves::Environment {
                        logps: self.reference.row(at).to_vec(),
                        rewards,
                    }
                } else {
                    Moves::Policy { rewards }
                }
            }
        })
    }
}

/// An empty table with room for `entries`, or an error where the machine has no memory for it.
pub(crate) fn reserve<T>(entries: usize) -> Result<Vec<T>, MdpError> {
    let mut table = Vec::new();
    table
        .try_reserve_exact(entries)
        .map_err(|_| MdpError::OutOfMemory {
            entries,
            bytes: entries.saturating_mul(size_of::<T>()),
        })?;
    Ok(table)
}

/// One standard normal draw by Box and Muller, from two uniforms.
pub(crate) fn normal(rng: &mut impl Rng) -> f64 {
    // 1 - u is in (0, 1], so the logarithm is finite.
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Checks a row of probabilities that must give every token some: the right length, each above 0,
/// sum 1.
pub(crate) fn check_support(
    table: &'static str,
    tokens: &[u32],
    row: &[f64],
    vocab: usize,
) -> Result<(), MdpError> {
    if row.len() != vocab {
        return Err(MdpError::TableLength {
            table,
            expected: vocab,
            got: row.len(),
        });
    }
    // `p > 0` is also false for NaN.
    if let Some((action, &probability)) = row
        .iter()
        .enumerate()
        .find(|&(_, &p)| !(p > 0.0 && p.is_finite()))
    {
        return Err(MdpError::ReferenceSupport {
            state: tokens.to_vec(),
            action: action as u32,
            probability,
        });
    }
    let sum: f64 = row.iter().sum();
    if (sum - 1.0).abs() > ROW_SUM_TOLERANCE {
        return Err(MdpError::RowSum {
            table,
            state: tokens.to_vec(),
            sum,
            tolerance: ROW_SUM_TOLERANCE,
        });
    }
    Ok(())
}

fn check_rows(
    table: &'static str,
    tree: &Tree,
    logps: &[f64],
    tolerance: f64,
) -> Result<(), MdpError> {
    for (state, row) in logps.chunks_exact(tree.vocab()).enumerate() {
        // A single token's share may exceed one by no more than the row's sum may. NaN fails too.
        if let Some(action) = row.iter().position(|&x| x.is_nan() || x > tolerance) {
            return Err(MdpError::Logp {
                table,
                state: tree.tokens(state),
                action: action as u32,
                logp: row[action],
            });
        }
        let sum: f64 = row.iter().map(|x| x.exp()).sum();
        if (sum - 1.0).abs() > tolerance {
            return Err(MdpError::RowSum {
                table,
                state: tree.tokens(state),
                sum,
                tolerance,
            });
        }
    }
    Ok(())
}

pub(crate) fn check_finite(
    table: &'static str,
    tree: &Tree,
    values: &[f64],
) -> Result<(), MdpError> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(pair) => Err(MdpError::NotFinite {
            table,
            state: tree.tokens(pair / tree.vocab()),
            action: (pair % tree.vocab()) as u32,
            value: values[pair],
        }),
    }
}

pub(crate) fn check_weights(weights: &[f64]) -> Result<(), MdpError> {
    if let Some(index) = weights.iter().position(|&w| !(w >= 0.0 && w.is_finite())) {
        return Err(MdpError::Weight {
            index,
            value: weights[index],
        });
    }
    if weights.iter().all(|&w| w <= 0.0) {
        return Err(MdpError::Weight {
            index: 0,
            value: 0.0,
        });
    }
    Ok(())
}

fn check_spread(name: &'static str, value: f64) -> Result<(), MdpError> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(MdpError::Parameter {
            name,
            value,
            expected: "a finite number of at least 0",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        Tree::new(3, 2, 2).unwrap()
    }

    #[test]
    fn a_row_that_does_not_sum_to_one_is_refused_with_its_state_and_sum() {
        let mut probs = [0.2, 0.3, 0.5].repeat(3);
        probs[6] = 0.3;
        let message = TabularPolicy::from_probs(tree(), probs)
            .unwrap_err()
            .to_string();
        assert!(message.contains("state [1] sums to 1.1"), "{message}");
    }

    #[test]
    fn a_reference_with_a_zero_is_refused_with_its_state_and_token() {
        let mut probs = [0.2, 0.3, 0.5].repeat(3);
        probs[3..6].copy_from_slice(&[0.5, 0.0, 0.5]);
        let policy = TabularPolicy::from_probs(tree(), probs).unwrap();
        let message = TabularMdp::new(policy, vec![0.0; 9])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("state [0] gives token 1 probability 0"),
            "{message}"
        );
    }

    #[test]
    fn a_reward_that_is_not_a_number_is_refused_with_its_state_and_token() {
        let mut rewards = vec![0.0; 9];
        rewards[8] = f64::NAN;
        let message = TabularMdp::new(TabularPolicy::uniform(tree()), rewards)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("reward at state [1], token 2, is NaN"),
            "{message}"
        );
        assert!(TabularMdp::new(TabularPolicy::uniform(tree()), vec![0.0; 8]).is_err());
    }

    #[test]
    fn negative_and_missing_probabilities_are_refused() {
        let mut probs = [0.2, 0.3, 0.5].repeat(3);
        probs[0] = -0.2;
        assert!(matches!(
            TabularPolicy::from_probs(tree(), probs),
            Err(MdpError::Logp { action: 0, .. })
        ));
        assert!(TabularPolicy::from_probs(tree(), vec![0.5; 4]).is_err());
        assert!(TabularPolicy::from_logits(tree(), vec![f64::INFINITY; 9]).is_err());
    }

    #[test]
    fn an_environment_row_is_checked_and_then_acts_in_place_of_the_policy() {
        let mdp = TabularMdp::new(TabularPolicy::uniform(tree()), vec![0.0; 9]).unwrap();
        let broken = mdp.clone().with_environment(|_| Some(vec![0.5, 0.5, 0.0]));
        assert!(matches!(
            broken,
            Err(MdpError::ReferenceSupport { action: 2, .. })
        ));
        let short = mdp.clone().with_environment(|_| Some(vec![1.0]));
        assert!(matches!(short, Err(MdpError::TableLength { .. })));
        let mdp = mdp
            .with_environment(|tokens| (tokens == [0]).then(|| vec![0.2, 0.3, 0.5]))
            .unwrap();
        assert!(mdp.is_environment(1) && !mdp.is_environment(0));
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let policy = TabularPolicy::random(tree(), 1.0, &mut rng).unwrap();
        assert_eq!(mdp.acting_row(&policy, 1), mdp.reference().row(1));
        assert_eq!(mdp.acting_row(&policy, 2), policy.row(2));
        assert!(matches!(
            mdp.moves(&[0]).unwrap(),
            Moves::Environment { .. }
        ));
        assert!(matches!(mdp.moves(&[2]).unwrap(), Moves::Terminal));
        assert!(mdp.is_terminal(&[0, 1]).unwrap());
    }

    #[test]
    fn the_same_seed_gives_the_same_process() {
        let a = TabularMdp::seeded(tree(), RewardPlacement::Dense, 3).unwrap();
        let b = TabularMdp::seeded(tree(), RewardPlacement::Dense, 3).unwrap();
        let c = TabularMdp::seeded(tree(), RewardPlacement::Dense, 4).unwrap();
        assert_eq!(a.rewards(), b.rewards());
        assert_ne!(a.rewards(), c.rewards());
    }

    #[test]
    fn terminal_only_rewards_sit_on_last_tokens() {
        let mdp = TabularMdp::seeded(tree(), RewardPlacement::TerminalOnly, 3).unwrap();
        let zero = |pair: &usize| mdp.rewards()[*pair].abs() < f64::MIN_POSITIVE;
        assert!((0..9).filter(zero).eq([0, 1]));
    }

    #[test]
    fn every_distribution_over_completions_is_a_policy() {
        let weights = [1.0, 2.0, 0.0, 0.0, 3.0, 3.0, 1.0];
        let policy = TabularPolicy::from_completion_weights(tree(), &weights).unwrap();
        let sums = tree().path_sums(policy.logps());
        for (pair, weight) in tree().completions().zip(weights) {
            assert!((sums[pair].exp() - weight / 10.0).abs() < 1e-15);
        }
        assert!(TabularPolicy::from_completion_weights(tree(), &[0.0; 7]).is_err());
        assert!(TabularPolicy::from_completion_weights(tree(), &[f64::NAN; 7]).is_err());
    }

    #[test]
    fn a_policy_is_tabulated_as_itself() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let tree = Tree::new(4, 5, 1).unwrap().with_prompt([7, 7]);
        let policy = TabularPolicy::random(tree.clone(), 2.0, &mut rng).unwrap();
        let copy = TabularPolicy::tabulate(tree, &policy).unwrap();
        for (a, b) in policy.logps().iter().zip(copy.logps()) {
            assert!((a - b).abs() < 1e-14);
        }
        assert!(TabularPolicy::tabulate(super::tests::tree(), &policy).is_err());
    }
}
