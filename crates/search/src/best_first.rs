//! Dijkstra's search over completions: the best of all, with a proof.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use serde::{Deserialize, Serialize};

use crate::space::{Best, Candidate, Seen, Space};
use crate::{NodeId, PrefixModel, Request, SearchError, SearchOutput};

/// How many completions, and how many states to expand at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BestFirstConfig {
    /// How many completions to find, the best first.
    pub n_best: usize,
    /// States per call of the model. Above 1 some states are expanded that a search one by one
    /// would not have needed; the answer is the same.
    pub batch: usize,
}

impl Default for BestFirstConfig {
    fn default() -> Self {
        Self {
            n_best: 1,
            batch: 1,
        }
    }
}

impl BestFirstConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`SearchError::Setting`] for the first setting that is out of its range.
    pub fn check(&self) -> Result<(), SearchError> {
        if self.n_best == 0 {
            return Err(SearchError::setting("n_best", 0, "at least 1"));
        }
        if self.batch == 0 {
            return Err(SearchError::setting("batch", 0, "at least 1"));
        }
        Ok(())
    }
}

/// The `n_best` completions of the highest scores, by always expanding the best open prefix.
///
/// With [`Score::Likelihood`](crate::Score::Likelihood) this is Dijkstra's algorithm with costs
/// `-log π`: a completion that is the best of all open prefixes is the best of all completions,
/// since no prefix gains by going on. [`SearchOutput::is_optimal`] then says so. A search that its
/// budget stopped, or that left tokens out by `top_k`, still has the bound: no completion is better
/// than the best prefix that it did not finish.
///
/// A score that can rise, such as [`Score::LogRatio`](crate::Score::LogRatio), has no such bound.
/// Every completion must then be seen; the search does so, best prefix first, unless its budget
/// stops it.
///
/// # Errors
///
/// A request or configuration out of range, or those of the model.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{BestFirstConfig, Policies, Request, best_first};
///
/// // Greedy takes token 0 (0.6) and ends with 0.6 * 0.5; EOS at once has 0.4.
/// let policy = TabularPolicy::from_probs(Tree::new(2, 2, 1)?, vec![0.6, 0.4, 0.5, 0.5])?;
/// let request = Request::of(policy.tree());
/// let config = BestFirstConfig::default();
/// let output = best_first(&mut Policies::new(&policy), &request, &config)?;
/// assert_eq!(output.completions[0].tokens, [1]);
/// assert!(output.is_optimal());
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn best_first<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
    config: &BestFirstConfig,
) -> Result<SearchOutput, SearchError> {
    config.check()?;
    let mut space = Space::new(model, request)?;
    let mut best = Best::new(config.n_best);
    // Every state expanded so far stands in the heap by its best child that is left, so that the heap
    // is as large as the states expanded and not as the tokens that may follow them.
    let mut open: BinaryHeap<Open> = BinaryHeap::new();
    let mut children: Vec<Candidate> = Vec::new();
    let mut lost = 0.0;
    // The best prefix that nothing may follow.
    let mut stuck: Option<NodeId> = None;
    // Prefixes to expand in the next call; those that a stop leaves unexpanded stay in here.
    let mut frontier = vec![NodeId::ROOT];
    loop {
        let Some(expansion) = space.expand(&frontier, None)? else {
            break;
        };
        for (i, &parent) in frontier.iter().enumerate() {
            lost += space.logp(parent).exp() * (1.0 - expansion.mass(i)).max(0.0);
            let first = children.len();
            children.extend_from_slice(expansion.of(i));
            // The better first; among equals the lower token.
            let order = |a: &Candidate, b: &Candidate| {
                let by_token = || a.token.cmp(&b.token);
                b.step.total_cmp(&a.step).then_with(by_token)
            };
            children[first..].sort_unstable_by(order);
            let left = children.len() - first;
            if left == 0 && stuck.is_none_or(|at| space.score(parent) > space.score(at)) {
                stuck = Some(parent);
            }
            open.extend(Open::new(&space, &children, parent, first, left));
        }
        frontier.clear();
        let limit = config.batch.min(space.room().max(1));
        while frontier.len() < limit {
            let Some(next) = open.pop() else {
                break;
            };
            // Whatever is still open is no better, so nothing more can get in.
            if space.is_bounded() && best.is_full() && next.score <= best.worst() {
                open.push(next);
                break;
            }
            let node = space.child(next.parent, &children[next.first])?;
            let sibling = (next.first + 1, next.left - 1);
            open.extend(Open::new(
                &space,
                &children,
                next.parent,
                sibling.0,
                sibling.1,
            ));
            if space.end(node).is_none() {
                frontier.push(node);
            } else {
                best.add(next.score, node);
            }
        }
        if frontier.is_empty() {
            break;
        }
    }
    let heap = open.peek().map(|next| next.score);
    let bound = frontier.iter().map(|&node| space.score(node)).chain(heap);
    let bound = bound.fold(f64::NEG_INFINITY, f64::max);
    let mut found = best.nodes();
    if found.is_empty() {
        // Stopped before anything was complete, or nothing can be: the most promising prefix is what
        // there is.
        found.extend(space.best_of(frontier.iter().copied()).or(stuck));
    }
    space.stats.covered_mass = 1.0 - lost;
    let bytes = open.capacity() * size_of::<Open>() + children.capacity() * size_of::<Candidate>();
    let completions = found.iter().map(|&node| space.completion(node)).collect();
    let path = found.first().copied();
    Ok(space.finish_with(completions, path, Some(bound), |_| Seen::default(), bytes))
}

/// The children of a prefix that are not nodes yet, by the best of them.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Score of the best, in nats.
    score: f64,
    parent: NodeId,
    /// Where the best stands among all candidates; the others follow.
    first: usize,
    /// How many there are.
    left: usize,
}

impl Open {
    fn new<M: PrefixModel + ?Sized>(
        space: &Space<'_, M>,
        children: &[Candidate],
        parent: NodeId,
        first: usize,
        left: usize,
    ) -> Option<Self> {
        (left > 0).then(|| Self {
            score: space.score(parent) + children[first].step,
            parent,
            first,
            left,
        })
    }
}

impl Ord for Open {
    fn cmp(&self, other: &Self) -> Ordering {
        // A heap gives the largest; among equals the prefix that was expanded first.
        self.score
            .total_cmp(&other.score)
            .then_with(|| other.first.cmp(&self.first))
    }
}

impl PartialOrd for Open {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Open {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Open {}
