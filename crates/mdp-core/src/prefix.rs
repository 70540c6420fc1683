//! A process given by functions: any reward on prefixes, any policy that gives logps.

use std::fmt;

use crate::tabular::{check_support, reserve};
use crate::{MdpError, Moves, TabularMdp, TabularPolicy, TokenMdp, TokenPolicy, Tree};

/// The environment's next-token probabilities at a state, or `None` where the policy moves.
type Environment = Box<dyn Fn(&[u32]) -> Option<Vec<f64>> + Send + Sync>;

/// A process over token prefixes with an arbitrary reward function, of any vocabulary and length.
///
/// Nothing is stored per state, so searches run on it at the size of a language model. Where the tree
/// is small enough, [`tabulate`](Self::tabulate) writes it down together with a reference, for
/// [`solve`](crate::solve) to solve.
///
/// States, in the reward function too, are whole prefixes: the prompt, then the completion so far.
///
/// # Examples
///
/// ```
/// use mdp_core::{Beta, PrefixMdp, TabularPolicy, TokenMdp, Tree, solve};
///
/// // One point for each token 0, at most two tokens; 2 is EOS.
/// let mdp = PrefixMdp::new(3, 2, 2, [9], |_state, action| f64::from(u8::from(action == 0)))?;
/// assert_eq!(mdp.reward(&[9], 0)?, 1.0);
/// assert!(mdp.is_terminal(&[9, 0, 1])?);
///
/// // Any `TokenPolicy` serves as the reference, such as a language model; here a uniform one.
/// let model = TabularPolicy::uniform(Tree::new(3, 2, 2)?.with_prompt([9]));
/// let table = mdp.tabulate(&model)?;
/// let value = solve(&table, Beta::new(1.0)?)?.soft_values()[0];
/// // V after one token is log((e + 2) / 3) = u; V = log((e exp(u) + exp(u) + 1) / 3).
/// let (e, after) = (1.0_f64.exp(), (1.0_f64.exp() + 2.0) / 3.0);
/// assert!((value - ((e * after + after + 1.0) / 3.0).ln()).abs() < 1e-12);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
pub struct PrefixMdp<R> {
    vocab: usize,
    horizon: usize,
    eos: u32,
    prompt: Vec<u32>,
    reward: R,
    environment: Option<Environment>,
}

impl<R: Fn(&[u32], u32) -> f64> PrefixMdp<R> {
    /// The process of completions of `prompt` with at most `horizon` tokens and the reward
    /// `reward(state, action)` in reward units.
    ///
    /// # Errors
    ///
    /// [`MdpError::Vocabulary`], [`MdpError::Horizon`] or [`MdpError::EosOutside`].
    pub fn new(
        vocab: usize,
        horizon: usize,
        eos: u32,
        prompt: impl Into<Vec<u32>>,
        reward: R,
    ) -> Result<Self, MdpError> {
        // The checks of a tree of one level are those of this process; its size is not bounded.
        Tree::with_limit(vocab, horizon.min(1), eos, usize::MAX)?;
        Ok(Self {
            vocab,
            horizon,
            eos,
            prompt: prompt.into(),
            reward,
            environment: None,
        })
    }

    /// The same process with the environment moving where `distribution(state)` is `Some`, with
    /// those probabilities, `[vocab]`. Rows are checked when a state is asked for.
    #[must_use]
    pub fn with_environment(
        mut self,
        distribution: impl Fn(&[u32]) -> Option<Vec<f64>> + Send + Sync + 'static,
    ) -> Self {
        self.environment = Some(Box::new(distribution));
        self
    }

    /// Writes the process down with `reference`'s logps at every state.
    ///
    /// # Errors
    ///
    /// [`MdpError::TreeTooLarge`] past [`DEFAULT_MAX_PAIRS`](crate::DEFAULT_MAX_PAIRS), those of
    /// [`TabularPolicy::tabulate`] and [`TabularMdp::new`].
    pub fn tabulate(
        &self,
        reference: &(impl TokenPolicy + ?Sized),
    ) -> Result<TabularMdp, MdpError> {
        let tree = Tree::new(self.vocab, self.horizon, self.eos)?.with_prompt(&self.prompt[..]);
        let reference = TabularPolicy::tabulate(tree.clone(), reference)?;
        let mut rewards = reserve(tree.n_pairs())?;
        for at in 0..tree.n_states() {
            let state = [&self.prompt[..], &tree.tokens(at)].concat();
            rewards.extend((0..self.vocab as u32).map(|action| (self.reward)(&state, action)));
        }
        let mdp = TabularMdp::new(reference, rewards)?;
        match &self.environment {
            None => Ok(mdp),
            Some(environment) => {
                mdp.with_environment(|tokens| environment(&[&self.prompt[..], tokens].concat()))
            }
        }
    }

    /// The most tokens of a completion.
    #[must_use]
    pub fn horizon(&self) -> usize {
        self.horizon
    }

    /// The token that ends a completion.
    #[must_use]
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The tokens that every state begins with.
    #[must_use]
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }
}

impl<R: Fn(&[u32], u32) -> f64> TokenMdp for PrefixMdp<R> {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn moves(&self, state: &[u32]) -> Result<Moves, MdpError> {
        let tokens = state
            .strip_prefix(&self.prompt[..])
            .ok_or_else(|| MdpError::Prompt {
                state: state.to_vec(),
                prompt: self.prompt.clone(),
            })?;
        if let Some(&token) = tokens.iter().find(|&&a| a as usize >= self.vocab) {
            return Err(MdpError::TokenOutside {
                state: tokens.to_vec(),
                token,
                vocab: self.vocab,
            });
        }
        let end = tokens
            .iter()
            .position(|&a| a == self.eos)
            .map_or(self.horizon, |t| (t + 1).min(self.horizon));
        if tokens.len() > end {
            return Err(MdpError::PastTheEnd {
                state: tokens.to_vec(),
                ended_at: end,
            });
        }
        if tokens.len() == end {
            return Ok(Moves::Terminal);
        }
        let rewards: Vec<f64> = (0..self.vocab as u32)
            .map(|action| (self.reward)(state, action))
            .collect();
        if let Some(action) = rewards.iter().position(|r| !r.is_finite()) {
            return Err(MdpError::NotFinite {
                table: "reward",
                state: tokens.to_vec(),
                action: action as u32,
                value: rewards[action],
            });
        }
        Ok(match self.environment.as_ref().and_then(|e| e(state)) {
            None => Moves::Policy { rewards },
            Some(probs) => {
                check_support("environment", tokens, &probs, self.vocab)?;
                Moves::Environment {
                    logps: probs.into_iter().map(f64::ln).collect(),
                    rewards,
                }
            }
        })
    }
}

impl<R> fmt::Debug for PrefixMdp<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrefixMdp")
            .field("vocab", &self.vocab)
            .field("horizon", &self.horizon)
            .field("eos", &self.eos)
            .field("prompt", &self.prompt)
            .field("has_environment", &self.environment.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reward(state: &[u32], action: u32) -> f64 {
        state.iter().map(|&a| f64::from(a)).sum::<f64>() - f64::from(action)
    }

    fn environment(state: &[u32]) -> Option<Vec<f64>> {
        (state == [5, 0]).then(|| vec![0.25, 0.25, 0.5])
    }

    #[test]
    fn functions_and_their_table_are_one_process() {
        let mdp = PrefixMdp::new(3, 3, 1, [5], reward)
            .unwrap()
            .with_environment(environment);
        let tree = Tree::new(3, 3, 1).unwrap().with_prompt([5]);
        let table = mdp.tabulate(&TabularPolicy::uniform(tree.clone())).unwrap();
        let whole = |tokens: &[u32]| [&[5], tokens].concat();
        for state in 0..tree.n_states() {
            let state = whole(&tree.tokens(state));
            assert_eq!(mdp.moves(&state).unwrap(), table.moves(&state).unwrap());
        }
        for pair in tree.completions() {
            let state = whole(&tree.pair_tokens(pair));
            assert!(mdp.is_terminal(&state).unwrap() && table.is_terminal(&state).unwrap());
            let past = mdp.next_state(&state, 0);
            assert!(mdp.moves(&past).is_err() && table.moves(&past).is_err());
        }
        assert!(matches!(
            mdp.moves(&[5, 0]).unwrap(),
            Moves::Environment { .. }
        ));
    }

    #[test]
    fn a_process_of_any_size_answers_single_states() {
        let mdp = PrefixMdp::new(50_000, 100_000, 0, [], reward).unwrap();
        assert!((mdp.reward(&[7, 8], 3).unwrap() - 12.0).abs() < 1e-12);
        assert!(mdp.moves(&[50_000]).is_err());
        let error = mdp.tabulate(&TabularPolicy::uniform(Tree::new(2, 1, 0).unwrap()));
        assert!(matches!(error, Err(MdpError::TreeTooLarge { .. })));
        assert!(PrefixMdp::new(3, 0, 0, [], reward).is_err());
    }

    #[test]
    fn rewards_and_rows_that_are_no_numbers_are_refused_with_the_state() {
        let mdp = PrefixMdp::new(
            3,
            2,
            2,
            [],
            |state: &[u32], _| {
                if state == [1] { f64::NAN } else { 0.0 }
            },
        )
        .unwrap();
        let message = mdp.moves(&[1]).unwrap_err().to_string();
        assert!(
            message.contains("[1]") && message.contains("NaN"),
            "{message}"
        );
        let reference = TabularPolicy::uniform(Tree::new(3, 2, 2).unwrap());
        assert!(mdp.tabulate(&reference).is_err());
        let mdp = PrefixMdp::new(3, 2, 2, [], reward)
            .unwrap()
            .with_environment(|_| Some(vec![0.3, 0.3, 0.3]));
        assert!(matches!(mdp.moves(&[]), Err(MdpError::RowSum { .. })));
    }
}
