//! What a search asks of its models, and the answer.

use std::fmt;

use mdp_core::{ActionValue, Beta, LogpRows, MdpError, TokenPolicy};

use crate::{NodeId, PrefixTree, SearchError};

/// A policy, and perhaps its reference, that answers a whole frontier of prefixes at once.
///
/// This is the seam between a search and a language model. Prefixes come as handles into a
/// [`PrefixTree`] and not as token strings, so that an implementer with a cache of keys and values
/// has one token to compute for each of them, and one device round trip for all:
///
/// - The parent of every prefix in a frontier was in an earlier frontier of the same search (or the
///   prefix is the prompt). So the rows of the caches to continue are `parent(node)`, a gather with
///   repeats, and the tokens to append are `token(node)`.
/// - A prefix is asked for at most once, and a frontier holds no prefix twice.
/// - [`retain`](Self::retain) says which prefixes can still be continued; what no such prefix needs
///   may be freed. An implementer that frees more, to stay within its memory, can recompute any
///   prefix from [`PrefixTree::state`].
/// - [`begin`](Self::begin) starts a search: handles of an earlier one mean nothing from then on.
///
/// Every policy of `mdp-core` is such a model by way of [`Policies`], which recomputes each prefix
/// from its tokens. [`TabularModel`](crate::TabularModel) is one that continues its parents.
pub trait PrefixModel {
    /// The number of tokens.
    fn vocab(&self) -> usize;

    /// Whether answers hold the reference's logps.
    fn has_reference(&self) -> bool {
        false
    }

    /// Whether answers hold rewards, so that the likeliest token need not be that of the best score.
    fn has_rewards(&self) -> bool {
        false
    }

    /// Called once before the first frontier of a search over completions of `prompt` with at most
    /// `max_new_tokens` tokens.
    ///
    /// # Errors
    ///
    /// If the model cannot read the prompt or hold so many tokens.
    fn begin(&mut self, prompt: &[u32], max_new_tokens: usize) -> Result<(), SearchError> {
        let _ = (prompt, max_new_tokens);
        Ok(())
    }

    /// The next-token logps at each prefix of the frontier.
    ///
    /// With `top_k`, at least the `k` tokens likeliest under the policy at each; an implementer may
    /// give more, or all. The reference's logps are of the same tokens.
    ///
    /// # Errors
    ///
    /// If a model fails.
    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError>;

    /// From now on only prefixes at or below `live` will be asked for.
    ///
    /// A live prefix that was not asked for yet continues its parent, whose cache it needs.
    fn retain(&mut self, prefixes: &PrefixTree, live: &[NodeId]) {
        let _ = (prefixes, live);
    }
}

impl<M: PrefixModel + ?Sized> PrefixModel for &mut M {
    fn vocab(&self) -> usize {
        (**self).vocab()
    }

    fn has_reference(&self) -> bool {
        (**self).has_reference()
    }

    fn has_rewards(&self) -> bool {
        (**self).has_rewards()
    }

    fn begin(&mut self, prompt: &[u32], max_new_tokens: usize) -> Result<(), SearchError> {
        (**self).begin(prompt, max_new_tokens)
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        (**self).expand(prefixes, frontier, top_k)
    }

    fn retain(&mut self, prefixes: &PrefixTree, live: &[NodeId]) {
        (**self).retain(prefixes, live);
    }
}

/// Next-token logps of a frontier, in nats: whole rows, or the likeliest tokens of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Where each state's entries start; one more entry holds their number.
    starts: Vec<usize>,
    /// Token of each entry; `None` for whole rows.
    tokens: Option<Vec<u32>>,
    logps: Vec<f64>,
    reference_logps: Option<Vec<f64>>,
    rewards: Option<Vec<f64>>,
}

impl Rows {
    /// Whole rows, `[states, vocab]`: the entry's position is its token.
    #[must_use]
    pub fn full(rows: LogpRows) -> Self {
        let (vocab, n_states) = (rows.vocab(), rows.len());
        Self {
            starts: (0..=n_states).map(|state| state * vocab).collect(),
            tokens: None,
            logps: rows.into_values(),
            reference_logps: None,
            rewards: None,
        }
    }

    /// The likeliest tokens of each state with their logps, in any order.
    ///
    /// A token left out must not be likelier than one that is there.
    #[must_use]
    pub fn top(rows: &[Vec<(u32, f64)>]) -> Self {
        let mut starts = vec![0];
        starts.extend(rows.iter().scan(0, |sum, row| {
            *sum += row.len();
            Some(*sum)
        }));
        let entries = || rows.iter().flatten();
        Self {
            starts,
            tokens: Some(entries().map(|&(token, _)| token).collect()),
            logps: entries().map(|&(_, logp)| logp).collect(),
            reference_logps: None,
            rewards: None,
        }
    }

    /// The same with the reference's logp of every entry, in nats.
    ///
    /// # Errors
    ///
    /// [`SearchError::Rows`] if there are not as many.
    pub fn with_reference(mut self, logps: Vec<f64>) -> Result<Self, SearchError> {
        self.check("reference logps", logps.len())?;
        self.reference_logps = Some(logps);
        Ok(self)
    }

    /// The same with a reward for every entry, in nats (reward units over β), which the search adds
    /// to the entry's score; for models that [have rewards](PrefixModel::has_rewards).
    ///
    /// # Errors
    ///
    /// [`SearchError::Rows`] if there are not as many.
    pub fn with_rewards(mut self, rewards: Vec<f64>) -> Result<Self, SearchError> {
        self.check("rewards", rewards.len())?;
        self.rewards = Some(rewards);
        Ok(self)
    }

    fn check(&self, table: &'static str, got: usize) -> Result<(), SearchError> {
        let expected = self.logps.len();
        if got == expected {
            Ok(())
        } else {
            Err(SearchError::Rows {
                table,
                expected,
                got,
            })
        }
    }

    /// The number of states.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there are no states.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether every token of the vocabulary is there.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.tokens.is_none()
    }

    /// The entries of the `i`-th state.
    ///
    /// # Panics
    ///
    /// If there is no such state.
    #[must_use]
    pub fn row(&self, i: usize) -> Row<'_> {
        let range = self.starts[i]..self.starts[i + 1];
        Row {
            tokens: self.tokens.as_ref().map(|t| &t[range.clone()]),
            logps: &self.logps[range.clone()],
            reference_logps: self.reference_logps.as_ref().map(|l| &l[range.clone()]),
            rewards: self.rewards.as_ref().map(|r| &r[range]),
        }
    }

    /// Tokens per state as `[states]` slices; whole rows borrow `all`, which is `0..vocab`.
    fn candidates<'a>(&'a self, all: &'a [u32]) -> Vec<&'a [u32]> {
        (0..self.len())
            .map(|i| self.row(i).tokens.unwrap_or(all))
            .collect()
    }
}

/// The entries of one state; the slices are of equal length.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Token of each entry; `None` if the position is the token.
    pub tokens: Option<&'a [u32]>,
    /// Logps of the policy, in nats.
    pub logps: &'a [f64],
    /// Logps of the reference, in nats.
    pub reference_logps: Option<&'a [f64]>,
    /// What the search adds to each entry's score, in nats.
    pub rewards: Option<&'a [f64]>,
}

impl Row<'_> {
    /// The token of the `i`-th entry.
    #[must_use]
    pub fn token(&self, i: usize) -> u32 {
        self.tokens.map_or(i as u32, |tokens| tokens[i])
    }
}

/// Policies of `mdp-core` as a model: each prefix is handed over as its tokens.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{Policies, Request, greedy};
///
/// let policy = TabularPolicy::from_probs(Tree::new(2, 1, 1)?, vec![0.75, 0.25])?;
/// let output = greedy(&mut Policies::new(&policy), &Request::new([], [1], 1))?;
/// assert_eq!(output.completions[0].tokens, [0]);
/// # Ok::<(), search::SearchError>(())
/// ```
#[derive(Clone, Copy)]
pub struct Policies<'a> {
    policy: &'a dyn TokenPolicy,
    reference: Option<&'a dyn TokenPolicy>,
    rewards: Option<(&'a dyn ActionValue, Beta)>,
}

impl<'a> Policies<'a> {
    /// The policy alone.
    #[must_use]
    pub fn new(policy: &'a dyn TokenPolicy) -> Self {
        Self {
            policy,
            reference: None,
            rewards: None,
        }
    }

    /// The same with the reference that log-ratios are taken to.
    #[must_use]
    pub fn with_reference(self, reference: &'a dyn TokenPolicy) -> Self {
        Self {
            reference: Some(reference),
            ..self
        }
    }

    /// The same with `rewards / beta` added to the score of every action.
    ///
    /// With the reference as the policy and a process's rewards here, the score of a prefix is the
    /// paper's planning objective (equation 12) over β, but for the soft value of its end.
    #[must_use]
    pub fn with_rewards(self, rewards: &'a dyn ActionValue, beta: Beta) -> Self {
        Self {
            rewards: Some((rewards, beta)),
            ..self
        }
    }
}

impl fmt::Debug for Policies<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policies")
            .field("vocab", &self.policy.vocab())
            .field("has_reference", &self.reference.is_some())
            .field("has_rewards", &self.rewards.is_some())
            .finish()
    }
}

impl PrefixModel for Policies<'_> {
    fn vocab(&self) -> usize {
        self.policy.vocab()
    }

    fn has_reference(&self) -> bool {
        self.reference.is_some()
    }

    fn has_rewards(&self) -> bool {
        self.rewards.is_some()
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        let states: Vec<Vec<u32>> = frontier.iter().map(|&node| prefixes.state(node)).collect();
        let states: Vec<&[u32]> = states.iter().map(Vec::as_slice).collect();
        let mut rows = match top_k {
            Some(k) if k < self.vocab() => Rows::top(&self.policy.top_k(&states, k)?),
            _ => Rows::full(self.policy.next_logps(&states)?),
        };
        if let Some(reference) = self.reference {
            let whole = reference.next_logps(&states)?;
            let logps = match &rows.tokens {
                None => whole.into_values(),
                Some(_) => gather(&rows, &whole)?,
            };
            rows = rows.with_reference(logps)?;
        }
        if let Some((values, beta)) = self.rewards {
            let all: Vec<u32> = (0..self.vocab() as u32).collect();
            let mut rewards = values.action_values(&states, &rows.candidates(&all))?;
            for reward in &mut rewards {
                *reward /= beta.get();
            }
            rows = rows.with_rewards(rewards)?;
        }
        Ok(rows)
    }
}

/// The entries of `whole` at the tokens that `rows` has.
fn gather(rows: &Rows, whole: &LogpRows) -> Result<Vec<f64>, SearchError> {
    let mut logps = Vec::with_capacity(rows.logps.len());
    if whole.len() != rows.len() {
        return Err(SearchError::Rows {
            table: "reference rows",
            expected: rows.len(),
            got: whole.len(),
        });
    }
    for (i, row) in whole.iter().enumerate() {
        for &token in rows.row(i).tokens.unwrap_or_default() {
            logps.push(
                *row.get(token as usize)
                    .ok_or(SearchError::Mdp(MdpError::Vocabulary { vocab: row.len() }))?,
            );
        }
    }
    Ok(logps)
}
