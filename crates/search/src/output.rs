//! What every search returns.

use serde::Serialize;

/// How far a score may be below its bound and still have reached it, relative to the bound: the same
/// numbers, summed in another order.
const ROUNDING: f64 = 1e-12;

/// Completions with their scores, what it cost to find them, and how sure one can be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SearchOutput {
    /// The completions found, best score first; those of [`sample`](crate::sample) in the order of
    /// drawing.
    ///
    /// If the search was stopped before it had a whole completion, the best unfinished one.
    pub completions: Vec<Completion>,
    /// What it cost.
    pub stats: SearchStats,
    /// No allowed completion scores above this, in nats; `None` where no bound is known, as with
    /// [`Score::LogRatio`](crate::Score::LogRatio).
    pub upper_bound: Option<f64>,
    /// The tree, if [`Request::keep_tree`](crate::Request::keep_tree) asked for it.
    pub tree: Option<TreeView>,
}

impl SearchOutput {
    /// The completion of the highest score, the first among equals.
    #[must_use]
    pub fn best(&self) -> Option<&Completion> {
        let whole = |completion: &&Completion| completion.end != End::Unfinished;
        let better = |best: &'_ &Completion, other: &'_ &Completion| other.score > best.score;
        let fold = |found: Option<_>, completion| match found {
            Some(best) if !better(&best, &completion) => Some(best),
            _ => Some(completion),
        };
        let all = || self.completions.iter();
        all()
            .filter(whole)
            .fold(None, fold)
            .or_else(|| all().fold(None, fold))
    }

    /// Whether the best completion is proven to be the best of all: its score reaches the bound.
    #[must_use]
    pub fn is_optimal(&self) -> bool {
        match (self.best(), self.upper_bound) {
            (Some(best), Some(bound)) => {
                let slack = ROUNDING * bound.abs().max(1.0);
                best.end != End::Unfinished && best.score >= bound - slack
            }
            _ => false,
        }
    }
}

/// A completion and what is known of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Completion {
    /// Tokens after the prompt, the end token or stop sequence included.
    pub tokens: Vec<u32>,
    /// What it was ranked by: the request's score in nats, over the length penalty if there is one;
    /// or the value that an external judge gave it.
    pub score: f64,
    /// `Σ log π`, in nats.
    pub logp: f64,
    /// `Σ log π_ref`, in nats, if the model has a reference.
    pub reference_logp: Option<f64>,
    /// `β Σ log(π/π_ref)`, in reward units, if the model has a reference.
    pub implicit_reward: Option<f64>,
    /// Why it ends here.
    pub end: End,
}

/// Why a completion ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// With an end token.
    Eos,
    /// With a stop sequence.
    Stop,
    /// At the most tokens allowed.
    Length,
    /// Not at all: the search was stopped, or the constraints allow no further token.
    Unfinished,
}

/// What a search cost and how much it saw.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SearchStats {
    /// Calls of the model: device round trips.
    pub model_calls: usize,
    /// States expanded, over all calls: tokens through the model.
    pub states_expanded: usize,
    /// States in the largest call.
    pub largest_batch: usize,
    /// Prefixes in the search tree, the prompt included.
    pub nodes: usize,
    /// Bytes that the search held at its end, the model's own left out.
    pub bytes: usize,
    /// Simulations of a tree search.
    pub simulations: usize,
    /// The policy's probability of what was not left out: that of the prefixes that the search still
    /// held or had completed at its end. 1 if nothing was pruned.
    pub covered_mass: f64,
    /// Seconds from start to end.
    pub seconds: f64,
    /// Seconds of these inside the model.
    pub model_seconds: f64,
    /// Why the search ended.
    pub stopped: Stopped,
    /// The root's value after each batch of a tree search, in nats, if its configuration asks.
    pub root_values: Vec<f64>,
}

/// Why a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// It was done.
    Done,
    /// The budget was spent.
    Budget,
    /// The cancel flag was set.
    Cancelled,
}

/// A search tree for a person to look at: nodes in order of creation, the prompt first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TreeView {
    /// Every prefix that the search made a node of.
    pub nodes: Vec<TreeNode>,
}

/// A prefix as the search saw it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TreeNode {
    /// Number of the prefix without its last token; `None` for the prompt.
    pub parent: Option<usize>,
    /// The last token; `None` for the prompt.
    pub token: Option<u32>,
    /// Simulations that passed, or 1 for each time it was expanded.
    pub visits: usize,
    /// The policy's probability of the token at its parent.
    pub prior: f64,
    /// Score of the prefix, in nats.
    pub score: f64,
    /// `Q` of the token at its parent, in nats: its own score and the value after it.
    pub q: Option<f64>,
    /// `V` of the prefix, in nats: the score still expected after it.
    pub value: Option<f64>,
    /// Of the policy's completions that begin so, the share that was not pruned.
    pub covered_mass: f64,
    /// Whether the best completion returned begins so.
    pub on_path: bool,
    /// Why the completion ends here, if it does.
    pub end: Option<End>,
}
