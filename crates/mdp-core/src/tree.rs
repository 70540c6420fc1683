//! The complete tree of token prefixes, stored level by level.

use std::fmt;
use std::ops::Range;

use crate::MdpError;

/// The most state-action pairs that [`Tree::new`] allows: 2^28, which is 4 GiB of reference and
/// reward tables. [`Tree::with_limit`] sets another limit.
pub const DEFAULT_MAX_PAIRS: usize = 1 << 28;

/// All completions of one prompt: every state with actions, numbered level by level.
///
/// A completion ends with EOS or with its `horizon`-th token; both kinds of end are terminal and
/// have value 0. A state with actions has the `vocab - 1` children that its tokens other than EOS
/// lead to, so at depth `t` there are `(vocab - 1)^t` of them, and the tree is an array heap: the
/// children of state `s` are the consecutive states from `s * (vocab - 1) + 1`. Nothing is stored
/// per state.
///
/// A *state* below is the number of a state with actions. A *pair* is the number of a state and an
/// action, `state * vocab + action`, so a table over pairs is rows of `vocab` numbers. A
/// *completion* is named by its last pair.
///
/// # Examples
///
/// ```
/// use mdp_core::Tree;
///
/// // Tokens 0, 1 and EOS = 2; at most two tokens.
/// let tree = Tree::new(3, 2, 2)?;
/// assert_eq!(tree.n_states(), 3); // the prompt, "0", "1"
/// assert_eq!(tree.n_pairs(), 9);
/// assert_eq!(tree.n_completions(), 7); // EOS alone, and three ends after each of 0 and 1
/// assert_eq!(tree.tokens(2), [1]);
/// # Ok::<(), mdp_core::MdpError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    vocab: usize,
    horizon: usize,
    eos: u32,
    prompt: Vec<u32>,
    /// `starts[t]` is the first state at depth t; one more entry holds the number of states.
    starts: Vec<usize>,
}

/// Where a token prefix stands in a [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A state with actions, by number.
    State(usize),
    /// A complete completion, by its last pair.
    Completion(usize),
}

impl Tree {
    /// The tree of all completions of at most `horizon` tokens, with an empty prompt.
    ///
    /// # Errors
    ///
    /// [`MdpError::Vocabulary`], [`MdpError::Horizon`] or [`MdpError::EosOutside`] for a shape that
    /// has no tree, and [`MdpError::TreeTooLarge`] past [`DEFAULT_MAX_PAIRS`].
    pub fn new(vocab: usize, horizon: usize, eos: u32) -> Result<Self, MdpError> {
        Self::with_limit(vocab, horizon, eos, DEFAULT_MAX_PAIRS)
    }

    /// As [`Tree::new`], with `max_pairs` state-action pairs as the limit.
    ///
    /// # Errors
    ///
    /// As [`Tree::new`].
    pub fn with_limit(
        vocab: usize,
        horizon: usize,
        eos: u32,
        max_pairs: usize,
    ) -> Result<Self, MdpError> {
        // Token ids are u32, so a larger vocabulary could not be addressed.
        if vocab < 2 || u32::try_from(vocab).is_err() {
            return Err(MdpError::Vocabulary { vocab });
        }
        if horizon == 0 {
            return Err(MdpError::Horizon);
        }
        if eos as usize >= vocab {
            return Err(MdpError::EosOutside { eos, vocab });
        }
        let too_large = |pairs: Option<u128>| MdpError::TreeTooLarge {
            vocab,
            horizon,
            pairs: pairs.unwrap_or(u128::MAX),
            bytes: pairs
                .and_then(|p| p.checked_mul(BYTES_PER_PAIR))
                .unwrap_or(u128::MAX),
            limit: max_pairs,
        };
        // Counted before anything is allocated, and for the whole tree, so that the message can
        // say how large it would have been. A chain (vocab 2) has a state per level, so the
        // horizon itself is bounded first.
        if horizon > max_pairs {
            let pairs = (vocab == 2).then(|| horizon as u128 * 2);
            return Err(too_large(pairs));
        }
        let mut starts = vec![0];
        let (mut width, mut states) = (1_u128, 0_u128);
        for depth in 0..horizon {
            states = match states.checked_add(width) {
                Some(states) => states,
                None => return Err(too_large(None)),
            };
            if states * vocab as u128 <= max_pairs as u128 {
                starts.push(usize::try_from(states).map_err(|_| too_large(Some(states)))?);
            }
            if depth + 1 < horizon {
                width = match width.checked_mul(vocab as u128 - 1) {
                    // Leaves room for the product with `vocab` above.
                    Some(width) if width < u128::MAX >> 34 => width,
                    _ => return Err(too_large(None)),
                };
            }
        }
        if starts.len() != horizon + 1 {
            return Err(too_large(states.checked_mul(vocab as u128)));
        }
        Ok(Self {
            vocab,
            horizon,
            eos,
            prompt: Vec::new(),
            starts,
        })
    }

    /// The same tree after `prompt`; every state given as tokens then begins with it.
    #[must_use]
    pub fn with_prompt(mut self, prompt: impl Into<Vec<u32>>) -> Self {
        self.prompt = prompt.into();
        self
    }

    /// The number of tokens, EOS included.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.vocab
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

    /// The number of states with actions.
    #[must_use]
    pub fn n_states(&self) -> usize {
        self.starts[self.horizon]
    }

    /// The number of state-action pairs.
    #[must_use]
    pub fn n_pairs(&self) -> usize {
        self.n_states() * self.vocab
    }

    /// The number of complete completions.
    #[must_use]
    pub fn n_completions(&self) -> usize {
        // Every pair leads to a new state or ends; every state but the first is led to once.
        self.n_pairs() + 1 - self.n_states()
    }

    /// The states at `depth` tokens after the prompt; empty from the horizon on.
    #[must_use]
    pub fn level(&self, depth: usize) -> Range<usize> {
        if depth < self.horizon {
            self.starts[depth]..self.starts[depth + 1]
        } else {
            self.n_states()..self.n_states()
        }
    }

    /// The number of tokens after the prompt at `state`.
    #[must_use]
    pub fn depth(&self, state: usize) -> usize {
        self.starts.partition_point(|&start| start <= state) - 1
    }

    /// The pairs of `state`: a row of `vocab` entries in any table over pairs.
    #[must_use]
    pub fn row(&self, state: usize) -> Range<usize> {
        state * self.vocab..(state + 1) * self.vocab
    }

    /// The state that `pair` leads to, or `None` if it ends the completion.
    #[must_use]
    pub fn child(&self, pair: usize) -> Option<usize> {
        let (state, action) = (pair / self.vocab, pair % self.vocab);
        let eos = self.eos as usize;
        if action == eos {
            return None;
        }
        let child = state * (self.vocab - 1) + 1 + action - usize::from(action > eos);
        (child < self.n_states()).then_some(child)
    }

    /// The states that the tokens of `state` other than EOS lead to, in order of token; empty if all
    /// of its tokens end the completion.
    #[must_use]
    pub fn children(&self, state: usize) -> Range<usize> {
        let first = state * (self.vocab - 1) + 1;
        if first < self.n_states() {
            first..first + self.vocab - 1
        } else {
            self.n_states()..self.n_states()
        }
    }

    /// The pair that leads to `state`, or `None` at the prompt.
    #[must_use]
    pub fn parent(&self, state: usize) -> Option<usize> {
        let before = state.checked_sub(1)?;
        let rank = before % (self.vocab - 1);
        let action = rank + usize::from(rank >= self.eos as usize);
        Some(before / (self.vocab - 1) * self.vocab + action)
    }

    /// The tokens after the prompt at `state`.
    ///
    /// # Panics
    ///
    /// If there is no such state.
    #[must_use]
    pub fn tokens(&self, state: usize) -> Vec<u32> {
        assert!(
            state < self.n_states(),
            "state {state} of {}",
            self.n_states()
        );
        let mut tokens = Vec::with_capacity(self.depth(state));
        let mut at = state;
        while let Some(pair) = self.parent(at) {
            tokens.push((pair % self.vocab) as u32);
            at = pair / self.vocab;
        }
        tokens.reverse();
        tokens
    }

    /// The tokens after the prompt once `pair`'s action is appended.
    ///
    /// # Panics
    ///
    /// If there is no such pair.
    #[must_use]
    pub fn pair_tokens(&self, pair: usize) -> Vec<u32> {
        let mut tokens = self.tokens(pair / self.vocab);
        tokens.push((pair % self.vocab) as u32);
        tokens
    }

    /// The last pairs of all completions, in order.
    pub fn completions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.n_pairs()).filter(|&pair| self.child(pair).is_none())
    }

    /// The pairs from the prompt to `pair`, in order of time.
    #[must_use]
    pub fn path(&self, pair: usize) -> Vec<usize> {
        let mut path = vec![pair];
        let mut state = pair / self.vocab;
        while let Some(before) = self.parent(state) {
            path.push(before);
            state = before / self.vocab;
        }
        path.reverse();
        path
    }

    /// The pairs that appending `tokens` to the prompt passes, in order of time.
    ///
    /// # Errors
    ///
    /// [`MdpError::TokenOutside`] or [`MdpError::PastTheEnd`].
    pub fn path_of(&self, tokens: &[u32]) -> Result<Vec<usize>, MdpError> {
        let mut path = Vec::with_capacity(tokens.len());
        let mut state = Some(0);
        for (t, &token) in tokens.iter().enumerate() {
            let at = state.ok_or_else(|| MdpError::PastTheEnd {
                state: tokens.to_vec(),
                ended_at: t,
            })?;
            if token as usize >= self.vocab {
                return Err(MdpError::TokenOutside {
                    state: tokens.to_vec(),
                    token,
                    vocab: self.vocab,
                });
            }
            let pair = at * self.vocab + token as usize;
            path.push(pair);
            state = self.child(pair);
        }
        Ok(path)
    }

    /// Where `tokens`, appended to the prompt, lead.
    ///
    /// # Errors
    ///
    /// As [`path_of`](Self::path_of).
    pub fn find(&self, tokens: &[u32]) -> Result<Node, MdpError> {
        Ok(match self.path_of(tokens)?.last() {
            None => Node::State(0),
            Some(&pair) => match self.child(pair) {
                Some(state) => Node::State(state),
                None => Node::Completion(pair),
            },
        })
    }

    /// Where `state`, prompt included, stands.
    ///
    /// # Errors
    ///
    /// [`MdpError::Prompt`] if `state` does not begin with the prompt, else as
    /// [`path_of`](Self::path_of).
    pub fn find_state(&self, state: &[u32]) -> Result<Node, MdpError> {
        let tokens =
            state
                .strip_prefix(self.prompt.as_slice())
                .ok_or_else(|| MdpError::Prompt {
                    state: state.to_vec(),
                    prompt: self.prompt.clone(),
                })?;
        self.find(tokens)
    }

    /// The last pair of `completion`, given as tokens after the prompt.
    ///
    /// # Errors
    ///
    /// [`MdpError::NotComplete`] if it does not end, else as [`path_of`](Self::path_of).
    pub fn completion(&self, completion: &[u32]) -> Result<usize, MdpError> {
        match self.find(completion)? {
            Node::Completion(pair) => Ok(pair),
            Node::State(_) => Err(MdpError::NotComplete {
                state: completion.to_vec(),
                eos: self.eos,
                horizon: self.horizon,
            }),
        }
    }

    /// For each pair the sum of `table` along the path that ends with it, `[pairs]`.
    ///
    /// With rewards this is the return so far, with logps the log-probability of the prefix.
    ///
    /// # Panics
    ///
    /// If `table` has not one entry per pair.
    #[must_use]
    pub fn path_sums(&self, table: &[f64]) -> Vec<f64> {
        assert_eq!(table.len(), self.n_pairs(), "one entry per pair");
        let mut sums = table.to_vec();
        for state in 1..self.n_states() {
            let before = self.parent(state).map_or(0.0, |pair| sums[pair]);
            for sum in &mut sums[state * self.vocab..(state + 1) * self.vocab] {
                *sum += before;
            }
        }
        sums
    }

    /// All K-step prefixes as last pairs: those of exactly `depth` tokens, and the completions that
    /// ended before. Empty for `depth` 0.
    pub fn prefixes(&self, depth: usize) -> impl Iterator<Item = usize> + '_ {
        let depth = depth.min(self.horizon);
        let end = self.starts[depth] * self.vocab;
        let last = depth
            .checked_sub(1)
            .map_or(0, |d| self.starts[d] * self.vocab);
        (0..end).filter(move |&pair| pair >= last || self.child(pair).is_none())
    }

    pub(crate) fn check_same(&self, table: &'static str, other: &Self) -> Result<(), MdpError> {
        if self == other {
            Ok(())
        } else {
            Err(MdpError::TreeMismatch {
                table,
                expected: self.to_string(),
                got: other.to_string(),
            })
        }
    }

    pub(crate) fn check_pairs(&self, table: &'static str, got: usize) -> Result<(), MdpError> {
        if got == self.n_pairs() {
            Ok(())
        } else {
            Err(MdpError::TableLength {
                table,
                expected: self.n_pairs(),
                got,
            })
        }
    }
}

/// Reference and reward, eight bytes each.
const BYTES_PER_PAIR: u128 = 16;

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the tree of {} tokens, eos {}, horizon {}, after prompt {:?}",
            self.vocab, self.eos, self.horizon, self.prompt
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shapes_without_a_tree_are_refused_with_their_numbers() {
        let message = |r: Result<Tree, MdpError>| r.unwrap_err().to_string();
        assert!(message(Tree::new(1, 3, 0)).contains("1 tokens"));
        assert!(message(Tree::new(3, 0, 0)).contains("horizon is 0"));
        assert!(message(Tree::new(3, 2, 3)).contains("token 3"));
        assert!(Tree::new(usize::MAX, 2, 0).is_err());
    }

    #[test]
    fn a_tree_too_large_for_memory_is_refused_before_anything_is_allocated() {
        let message = Tree::new(50_257, 64, 0).unwrap_err().to_string();
        assert!(message.contains("50257 tokens and horizon 64"), "{message}");
        let message = Tree::with_limit(4, 5, 0, 100).unwrap_err().to_string();
        assert!(message.contains("484 state-action pairs"), "{message}");
        assert!(message.contains("7744 bytes"), "{message}");
        assert!(Tree::with_limit(4, 5, 0, 484).is_ok());
        // A chain grows by one state a level; the horizon alone makes it too large.
        let message = Tree::new(2, usize::MAX, 0).unwrap_err().to_string();
        assert!(
            message.contains("too") || message.contains("allowed"),
            "{message}"
        );
    }

    #[test]
    fn a_chain_of_ten_thousand_levels_is_a_tree() {
        let tree = Tree::new(2, 10_000, 0).unwrap();
        assert_eq!(tree.n_states(), 10_000);
        assert_eq!(tree.tokens(9_999).len(), 9_999);
    }

    #[test]
    fn tokens_past_an_end_or_outside_the_vocabulary_are_refused() {
        let tree = Tree::new(3, 2, 1).unwrap().with_prompt([9]);
        assert!(matches!(
            tree.find(&[1, 0]),
            Err(MdpError::PastTheEnd { ended_at: 1, .. })
        ));
        assert!(matches!(
            tree.find(&[0, 3]),
            Err(MdpError::TokenOutside { token: 3, .. })
        ));
        assert!(matches!(
            tree.find_state(&[8]),
            Err(MdpError::Prompt { .. })
        ));
        assert!(matches!(
            tree.completion(&[0]),
            Err(MdpError::NotComplete { .. })
        ));
        assert_eq!(tree.find_state(&[9, 2]).unwrap(), Node::State(2));
    }

    proptest! {
        #[test]
        fn tokens_and_numbers_name_the_same_state(
            vocab in 2_usize..6, horizon in 1_usize..6, eos in 0_u32..6,
        ) {
            let tree = Tree::new(vocab, horizon, eos % vocab as u32).unwrap();
            for state in 0..tree.n_states() {
                let tokens = tree.tokens(state);
                prop_assert_eq!(tree.find(&tokens).unwrap(), Node::State(state));
                prop_assert_eq!(tokens.len(), tree.depth(state));
                prop_assert!(tree.level(tokens.len()).contains(&state));
            }
            let mut count = 0;
            for pair in tree.completions() {
                let tokens = tree.pair_tokens(pair);
                prop_assert_eq!(tree.find(&tokens).unwrap(), Node::Completion(pair));
                prop_assert_eq!(tree.path(pair), tree.path_of(&tokens).unwrap());
                prop_assert!(tokens.len() == horizon || tokens.last() == Some(&tree.eos()));
                count += 1;
            }
            prop_assert_eq!(count, tree.n_completions());
            prop_assert_eq!(tree.prefixes(horizon).count(), count);
        }
    }
}
