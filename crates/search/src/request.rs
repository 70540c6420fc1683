//! What is searched, by which score, and within which limits.

use std::fmt;
use std::sync::atomic::AtomicBool;

use mdp_core::{Beta, Tree};
use serde::{Deserialize, Serialize};

use crate::SearchError;

/// What a search maximises over completions, summed over their tokens, in nats.
///
/// The choice is not a detail: the crate's front page has an example where the two answers differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Score {
    /// `Σ log π(a_t|s_t)`: the paper's likelihood search (equation 13).
    ///
    /// For a policy that is optimal for a reward r this ranks prefixes, of any length, as
    /// `Σ (r + β log π_ref) + V(s_end)` does: reward, *anchored to the reference*.
    #[default]
    Likelihood,
    /// `Σ log(π/π_ref)(a_t|s_t)`: the implicit reward over β.
    ///
    /// For a policy that is optimal for a reward r this ranks completions as r does, with no anchor.
    /// Of a policy that was *trained*, a wide search finds the places where it is most wrong.
    LogRatio,
    /// `Σ log π - reference * Σ log π_ref`: 0 is [`Likelihood`](Self::Likelihood), 1 is
    /// [`LogRatio`](Self::LogRatio).
    Mix {
        /// How much of the reference is subtracted.
        reference: f64,
    },
}

impl Score {
    /// The weight of `-log π_ref`.
    pub(crate) fn reference_weight(self) -> f64 {
        match self {
            Self::Likelihood => 0.0,
            Self::LogRatio => 1.0,
            Self::Mix { reference } => reference,
        }
    }

    /// The score of one token, in nats.
    pub(crate) fn step(self, logp: f64, reference_logp: Option<f64>) -> f64 {
        match (self, reference_logp) {
            (Self::Likelihood, _) | (_, None) => logp,
            (Self::LogRatio, Some(reference)) => logp - reference,
            // Without its weight even a token to which the reference gives no mass is the policy's.
            (Self::Mix { reference: 0.0 }, _) => logp,
            (Self::Mix { reference: weight }, Some(reference)) => logp - weight * reference,
        }
    }

    /// Whether no token can raise it, so that a prefix's score bounds every completion's.
    pub(crate) fn never_rises(self) -> bool {
        // log π is at most 0, and a reference that is added and not subtracted is as well.
        self.reference_weight() <= 0.0
    }

    pub(crate) fn needs_reference(self) -> bool {
        !matches!(self, Self::Likelihood)
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Likelihood => f.write_str("likelihood"),
            Self::LogRatio => f.write_str("log-ratio"),
            Self::Mix { reference } => write!(f, "likelihood minus {reference} of the reference"),
        }
    }
}

/// One prompt and what is wanted of it: the same for every algorithm.
///
/// # Examples
///
/// ```
/// use search::{Budget, Request, Score};
///
/// let request = Request {
///     score: Score::LogRatio,
///     top_k: Some(20),
///     budget: Budget { seconds: Some(2.0), ..Budget::default() },
///     ..Request::new([5, 6], [0], 64)
/// };
/// assert_eq!(request.max_new_tokens, 64);
/// ```
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The tokens that every completion continues.
    pub prompt: Vec<u32>,
    /// Tokens that end a completion; the completion keeps the token.
    pub eos: Vec<u32>,
    /// The most tokens of a completion; one of this length is complete.
    pub max_new_tokens: usize,
    /// What is maximised.
    pub score: Score,
    /// Reward units per nat: turns log-ratios into the implicit reward that is reported, and the
    /// values of a value function into nats. 1 unless set, which leaves all in nats.
    pub beta: Beta,
    /// Only the `k` tokens likeliest under the policy are considered at each state; `None` considers
    /// all. What is left out is reported as lost mass.
    ///
    /// With [`Score::LogRatio`] this is the trust region: the largest log-ratios of a whole
    /// vocabulary belong to tokens that neither model believes in.
    pub top_k: Option<usize>,
    /// Which completions are allowed.
    pub constraints: Constraints<'a>,
    /// When to stop at the latest.
    pub budget: Budget,
    /// Set it, from a Ctrl-C handler for one, and the search returns the best found so far.
    pub cancel: Option<&'a AtomicBool>,
    /// Whether the output holds the tree that was searched.
    pub keep_tree: bool,
}

impl<'a> Request<'a> {
    /// Completions of `prompt` that end with a token of `eos` or at `max_new_tokens`, by
    /// [`Score::Likelihood`], unconstrained and unlimited.
    #[must_use]
    pub fn new(
        prompt: impl Into<Vec<u32>>,
        eos: impl Into<Vec<u32>>,
        max_new_tokens: usize,
    ) -> Self {
        Self {
            prompt: prompt.into(),
            eos: eos.into(),
            max_new_tokens,
            score: Score::Likelihood,
            beta: unit_beta(),
            top_k: None,
            constraints: Constraints::default(),
            budget: Budget::default(),
            cancel: None,
            keep_tree: false,
        }
    }

    /// All completions of an enumerated tree.
    #[must_use]
    pub fn of(tree: &Tree) -> Self {
        Self::new(tree.prompt(), [tree.eos()], tree.horizon())
    }

    /// Checks what does not need the model.
    pub(crate) fn check(&self, vocab: usize, has_reference: bool) -> Result<(), SearchError> {
        if self.max_new_tokens == 0 {
            return Err(SearchError::setting("max_new_tokens", 0, "at least 1"));
        }
        if self.top_k == Some(0) {
            return Err(SearchError::setting("top_k", 0, "at least 1"));
        }
        let weight = self.score.reference_weight();
        if !weight.is_finite() {
            let expected = "a finite number";
            return Err(SearchError::setting("reference weight", weight, expected));
        }
        if self.score.needs_reference() && !has_reference {
            return Err(SearchError::NoReference {
                score: self.score.to_string(),
            });
        }
        let outside = |place, tokens: &[u32]| {
            let found = tokens.iter().find(|&&token| token as usize >= vocab);
            found.map(|&token| SearchError::TokenOutside {
                place,
                token,
                vocab,
            })
        };
        let stops = self.constraints.stop.iter();
        let error = outside("the prompt", &self.prompt)
            .or_else(|| outside("eos", &self.eos))
            .or_else(|| outside("the banned tokens", &self.constraints.banned))
            .or_else(|| {
                stops
                    .clone()
                    .find_map(|stop| outside("a stop sequence", stop))
            });
        if let Some(error) = error {
            return Err(error);
        }
        if stops.clone().any(Vec::is_empty) {
            let expected = "at least one token";
            return Err(SearchError::setting("stop sequence", "empty", expected));
        }
        self.budget.check()
    }
}

/// Which completions are allowed.
///
/// A token that is not allowed has no score at all, and the others keep theirs: nothing is
/// renormalised, so scores stay the policy's own likelihoods and completions of different
/// constraints can be compared. Drawing at random renormalises, since something must be drawn.
#[derive(Clone, Default)]
pub struct Constraints<'a> {
    /// Token sequences that end a completion, which keeps them.
    ///
    /// A string may be written in more than one way in tokens; whoever knows the tokenizer lists
    /// the ways.
    pub stop: Vec<Vec<u32>>,
    /// Tokens that must not appear.
    pub banned: Vec<u32>,
    /// The fewest tokens before an end token, which is banned until then; a stop sequence that is
    /// complete earlier does not stop.
    pub min_new_tokens: usize,
    /// Changes the policy's logps of a state before anything else sees them.
    pub processor: Option<LogitProcessor<'a>>,
}

/// A function of a state's tokens, prompt included, that may change its logps `[vocab]` in place.
///
/// Minus infinity forbids a token. The changed numbers are the policy's from there on: they are
/// summed into scores and are not renormalised.
pub type LogitProcessor<'a> = &'a dyn Fn(&[u32], &mut [f64]);

impl fmt::Debug for Constraints<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraints")
            .field("stop", &self.stop)
            .field("banned", &self.banned)
            .field("min_new_tokens", &self.min_new_tokens)
            .field("has_processor", &self.processor.is_some())
            .finish()
    }
}

/// When a search must stop; `None` is no limit.
///
/// A limit is looked at before every call of the model, so it is passed by one batch at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// States expanded, which is tokens through the model, those of the prompt left out.
    pub tokens: Option<usize>,
    /// Simulations of a tree search.
    pub simulations: Option<usize>,
    /// Seconds from the start of the search.
    pub seconds: Option<f64>,
}

impl Budget {
    fn check(&self) -> Result<(), SearchError> {
        match self.seconds {
            Some(seconds) if seconds.is_nan() || seconds < 0.0 => Err(SearchError::setting(
                "budget in seconds",
                seconds,
                "a number of at least 0",
            )),
            _ => Ok(()),
        }
    }
}

fn unit_beta() -> Beta {
    Beta::new(1.0).expect("1 is finite and above 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_searched_is_named() {
        let message = |request: Request<'_>| request.check(10, false).unwrap_err().to_string();
        let base = || Request::new([1], [2], 4);
        assert!(base().check(10, false).is_ok());
        assert!(
            message(Request {
                max_new_tokens: 0,
                ..base()
            })
            .contains("max_new_tokens")
        );
        assert!(
            message(Request {
                top_k: Some(0),
                ..base()
            })
            .contains("top_k")
        );
        assert!(message(Request::new([10], [2], 4)).contains("prompt"));
        assert!(message(Request::new([1], [77], 4)).contains("eos holds token 77"));
        let score = Score::LogRatio;
        assert!(message(Request { score, ..base() }).contains("log-ratio"));
        let constraints = Constraints {
            stop: vec![vec![]],
            ..Constraints::default()
        };
        assert!(
            message(Request {
                constraints,
                ..base()
            })
            .contains("stop sequence")
        );
        let budget = Budget {
            seconds: Some(-1.0),
            ..Budget::default()
        };
        assert!(message(Request { budget, ..base() }).contains("-1"));
        let score = Score::Mix {
            reference: f64::NAN,
        };
        assert!(message(Request { score, ..base() }).contains("NaN"));
    }

    #[test]
    fn scores_and_budgets_are_read_by_name() {
        let read = |text: &str| serde_json::from_str::<Score>(text);
        assert_eq!(read("\"log-ratio\"").unwrap(), Score::LogRatio);
        assert_eq!(
            read(r#"{"mix":{"reference":0.5}}"#).unwrap(),
            Score::Mix { reference: 0.5 }
        );
        assert!(read("\"logratio\"").is_err());
        assert!(serde_json::from_str::<Budget>(r#"{"token":3}"#).is_err());
    }
}
