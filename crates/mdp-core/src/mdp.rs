//! What the rest of the workspace may ask of a process, a policy and a value.

use crate::MdpError;

/// A token-level decision process whose states are token prefixes.
///
/// A state is the prompt followed by the tokens appended so far; an action is a token; appending it
/// is the whole dynamics, so the states form a tree. Rewards are undiscounted, in reward units.
///
/// Most tokens are the policy's choice. A process may also have tokens that the *environment*
/// appends, such as a user's turn or a tool's answer: [`Moves::Environment`] carries their own
/// distribution. Soft values average over them, and their log-ratio never enters a reward.
pub trait TokenMdp {
    /// The number of tokens, EOS included.
    fn vocab(&self) -> usize;

    /// Who appends the next token at `state`, and the reward of each token.
    ///
    /// # Errors
    ///
    /// If `state` is not a state of this process, or its rewards cannot be computed.
    fn moves(&self, state: &[u32]) -> Result<Moves, MdpError>;

    /// The reward `r(s, a)` of appending `action` to `state`, in reward units.
    ///
    /// # Errors
    ///
    /// As [`moves`](Self::moves), and if `state` is terminal or `action` is outside the vocabulary.
    fn reward(&self, state: &[u32], action: u32) -> Result<f64, MdpError> {
        let (Moves::Policy { rewards } | Moves::Environment { rewards, .. }) = self.moves(state)?
        else {
            return Err(MdpError::Terminal {
                state: state.to_vec(),
            });
        };
        rewards
            .get(action as usize)
            .copied()
            .ok_or_else(|| MdpError::TokenOutside {
                state: state.to_vec(),
                token: action,
                vocab: rewards.len(),
            })
    }

    /// Whether the episode has ended at `state`.
    ///
    /// # Errors
    ///
    /// As [`moves`](Self::moves).
    fn is_terminal(&self, state: &[u32]) -> Result<bool, MdpError> {
        Ok(matches!(self.moves(state)?, Moves::Terminal))
    }

    /// The state that appending `action` leads to: `f(s, a) = s | a`.
    fn next_state(&self, state: &[u32], action: u32) -> Vec<u32> {
        let mut next = Vec::with_capacity(state.len() + 1);
        next.extend_from_slice(state);
        next.push(action);
        next
    }
}

/// What can happen at a state.
#[derive(Clone, Debug, PartialEq)]
pub enum Moves {
    /// The episode has ended: no action, and the value is 0.
    Terminal,
    /// The policy appends a token.
    Policy {
        /// `r(s, a)` by token, `[vocab]`, in reward units.
        rewards: Vec<f64>,
    },
    /// The environment appends a token; the policy has no say and its log-ratio does not count.
    Environment {
        /// Log-probabilities by token, `[vocab]`, in nats.
        logps: Vec<f64>,
        /// `r(s, a)` by token, `[vocab]`, in reward units.
        rewards: Vec<f64>,
    },
}

/// Anything that gives next-token log-probabilities at a token prefix.
///
/// States are given in batches because language models answer batches at little more than the cost
/// of one. The receiver is shared; an implementer that caches keeps its cache behind a lock.
pub trait TokenPolicy {
    /// The number of tokens.
    fn vocab(&self) -> usize;

    /// A row of next-token logps for each state, in nats.
    ///
    /// A row's probabilities sum to 1. A token that cannot follow has minus infinity.
    ///
    /// # Errors
    ///
    /// If a state is outside the policy's domain or its model fails.
    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError>;

    /// For each state its `k` likeliest tokens with their logps in nats, best first.
    ///
    /// Equal logps are ordered by token id. Fewer than `k` are returned only if the vocabulary is
    /// smaller.
    ///
    /// # Errors
    ///
    /// As [`next_logps`](Self::next_logps).
    fn top_k(&self, states: &[&[u32]], k: usize) -> Result<Vec<Vec<(u32, f64)>>, MdpError> {
        let rows = self.next_logps(states)?;
        Ok(rows.iter().map(|row| top_k_of(row, k)).collect())
    }

    /// The logp in nats of one action at each state, `[states]`.
    ///
    /// # Errors
    ///
    /// As [`next_logps`](Self::next_logps), and if an action is outside the vocabulary or the
    /// two slices differ in length.
    fn logps_of(&self, states: &[&[u32]], actions: &[u32]) -> Result<Vec<f64>, MdpError> {
        if states.len() != actions.len() {
            return Err(MdpError::TableLength {
                table: "actions",
                expected: states.len(),
                got: actions.len(),
            });
        }
        let rows = self.next_logps(states)?;
        rows.iter()
            .zip(states.iter().zip(actions))
            .map(|(row, (state, &action))| {
                row.get(action as usize)
                    .copied()
                    .ok_or_else(|| MdpError::TokenOutside {
                        state: state.to_vec(),
                        token: action,
                        vocab: row.len(),
                    })
            })
            .collect()
    }
}

impl<P: TokenPolicy + ?Sized> TokenPolicy for &P {
    fn vocab(&self) -> usize {
        (**self).vocab()
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        (**self).next_logps(states)
    }

    fn top_k(&self, states: &[&[u32]], k: usize) -> Result<Vec<Vec<(u32, f64)>>, MdpError> {
        (**self).top_k(states, k)
    }

    fn logps_of(&self, states: &[&[u32]], actions: &[u32]) -> Result<Vec<f64>, MdpError> {
        (**self).logps_of(states, actions)
    }
}

/// A value for each candidate action at each state, in reward units.
///
/// Which value (Q in one of the two forms, an advantage, nothing at all) is the implementer's name
/// to say; a searcher adds it to a score.
pub trait ActionValue {
    /// The values of `candidates[i]` at `states[i]`, flat: all of the first state's, then all of the
    /// second's, and so on.
    ///
    /// # Errors
    ///
    /// If a state is outside the domain, a candidate outside the vocabulary, or the two slices
    /// differ in length.
    fn action_values(&self, states: &[&[u32]], candidates: &[&[u32]])
    -> Result<Vec<f64>, MdpError>;
}

impl<Q: ActionValue + ?Sized> ActionValue for &Q {
    fn action_values(
        &self,
        states: &[&[u32]],
        candidates: &[&[u32]],
    ) -> Result<Vec<f64>, MdpError> {
        (**self).action_values(states, candidates)
    }
}

/// The value that is 0 everywhere: search then runs on the policy alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroValue;

impl ActionValue for ZeroValue {
    fn action_values(
        &self,
        states: &[&[u32]],
        candidates: &[&[u32]],
    ) -> Result<Vec<f64>, MdpError> {
        check_candidates(states, candidates)?;
        Ok(vec![0.0; candidates.iter().map(|c| c.len()).sum()])
    }
}

/// Next-token logps of several states, `[states, vocab]` in one flat table, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct LogpRows {
    vocab: usize,
    values: Vec<f64>,
}

impl LogpRows {
    /// Wraps a flat, row-major table.
    ///
    /// # Errors
    ///
    /// [`MdpError::TableLength`] if `values` is not whole rows, [`MdpError::Vocabulary`] if a row
    /// would have no entry.
    pub fn new(vocab: usize, values: Vec<f64>) -> Result<Self, MdpError> {
        if vocab == 0 {
            return Err(MdpError::Vocabulary { vocab });
        }
        if !values.len().is_multiple_of(vocab) {
            return Err(MdpError::TableLength {
                table: "logp rows",
                expected: values.len().next_multiple_of(vocab),
                got: values.len(),
            });
        }
        Ok(Self { vocab, values })
    }

    /// Entries per row.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len() / self.vocab
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The row of the `i`-th state, `[vocab]`, in nats.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    #[must_use]
    pub fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.vocab..(i + 1) * self.vocab]
    }

    /// The rows in order.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, f64> {
        self.values.chunks_exact(self.vocab)
    }

    /// The flat table, row-major.
    #[must_use]
    pub fn into_values(self) -> Vec<f64> {
        self.values
    }
}

/// The `k` largest entries of a row, best first, ties by position.
fn top_k_of(row: &[f64], k: usize) -> Vec<(u32, f64)> {
    let best_first = |a: &u32, b: &u32| {
        row[*b as usize]
            .total_cmp(&row[*a as usize])
            .then_with(|| a.cmp(b))
    };
    let mut order: Vec<u32> = (0..).take(row.len()).collect();
    let k = k.min(row.len());
    if k == 0 {
        return Vec::new();
    }
    // Selecting first keeps a large vocabulary linear in its size.
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, best_first);
        order.truncate(k);
    }
    order.sort_unstable_by(best_first);
    order.into_iter().map(|a| (a, row[a as usize])).collect()
}

pub(crate) fn check_candidates(states: &[&[u32]], candidates: &[&[u32]]) -> Result<(), MdpError> {
    if states.len() == candidates.len() {
        Ok(())
    } else {
        Err(MdpError::TableLength {
            table: "candidates",
            expected: states.len(),
            got: candidates.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Vec<f64>);

    impl TokenPolicy for Fixed {
        fn vocab(&self) -> usize {
            self.0.len()
        }

        fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
            LogpRows::new(self.0.len(), self.0.repeat(states.len()))
        }
    }

    #[test]
    fn top_k_orders_by_logp_then_by_token() {
        let policy = Fixed(vec![-2.0, -1.0, f64::NEG_INFINITY, -1.0]);
        let top = policy.top_k(&[&[], &[1]], 3).unwrap();
        let tokens: Vec<u32> = top[1].iter().map(|&(a, _)| a).collect();
        assert_eq!(tokens, [1, 3, 0]);
        assert_eq!(policy.top_k(&[&[]], 9).unwrap()[0].len(), 4);
        assert!(policy.top_k(&[&[]], 0).unwrap()[0].is_empty());
    }

    #[test]
    fn logps_of_picks_one_entry_per_state_and_refuses_a_foreign_token() {
        let policy = Fixed(vec![-2.0, -1.0]);
        assert_eq!(
            policy.logps_of(&[&[], &[0]], &[1, 0]).unwrap(),
            [-1.0, -2.0]
        );
        let error = policy.logps_of(&[&[]], &[7]).unwrap_err().to_string();
        assert!(error.contains("token 7"), "{error}");
        assert!(policy.logps_of(&[&[]], &[]).is_err());
    }

    #[test]
    fn a_reference_to_a_policy_answers_as_the_policy_does() {
        /// A policy that knows better than the provided `top_k`.
        struct Sure;

        impl TokenPolicy for Sure {
            fn vocab(&self) -> usize {
                2
            }

            fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
                LogpRows::new(2, [0.0, f64::NEG_INFINITY].repeat(states.len()))
            }

            fn top_k(&self, _: &[&[u32]], _: usize) -> Result<Vec<Vec<(u32, f64)>>, MdpError> {
                Ok(vec![vec![(7, -7.0)]])
            }
        }

        fn ask(policy: impl TokenPolicy) -> Vec<Vec<(u32, f64)>> {
            policy.top_k(&[&[]], 1).unwrap()
        }
        assert_eq!(ask(&Sure), [[(7, -7.0)]]);
        let borrowed = <&Sure as TokenPolicy>::logps_of(&&Sure, &[&[]], &[0]);
        assert_eq!(borrowed.unwrap(), [0.0]);
        let none: &dyn ActionValue = &ZeroValue;
        assert_eq!(
            (&none).action_values(&[&[]], &[&[1, 2]]).unwrap(),
            [0.0, 0.0]
        );
    }

    #[test]
    fn a_table_of_broken_rows_is_refused() {
        assert!(LogpRows::new(3, vec![0.0; 4]).is_err());
        assert!(LogpRows::new(0, vec![]).is_err());
        assert!(LogpRows::new(3, vec![]).unwrap().is_empty());
    }
}
