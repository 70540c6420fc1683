//! Plan a few tokens, commit to one, plan again.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::leaf::{Leaf, Start, rollouts, values};
use crate::space::{Best, Space};
use crate::{NodeId, PrefixModel, Request, SearchError, SearchOutput};

/// How far and how wide to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LookaheadConfig {
    /// Tokens to look ahead before each commitment; 1 is value-guided decoding.
    pub depth: usize,
    /// Unfinished prefixes kept at each length of the look; `None` keeps all.
    pub width: Option<usize>,
}

impl Default for LookaheadConfig {
    fn default() -> Self {
        Self {
            depth: 1,
            width: Some(8),
        }
    }
}

impl LookaheadConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`SearchError::Setting`] for the first setting that is out of its range.
    pub fn check(&self) -> Result<(), SearchError> {
        if self.depth == 0 {
            return Err(SearchError::setting("depth", 0, "at least 1"));
        }
        if self.width == Some(0) {
            return Err(SearchError::setting("width", 0, "at least 1"));
        }
        Ok(())
    }
}

/// The completion that a K-step planner writes: at each state the first token of the best
/// `depth`-token continuation, judged by its score and the value of where it leads.
///
/// This is the paper's equation 12 at every token. With `depth` 1 and a value function it is
/// value-guided decoding; with [`Leaf::Zero`] and `depth` 1, greedy; with `depth` at least
/// `max_new_tokens` and no `width`, exhaustive search. What one look computed the next one uses.
///
/// # Errors
///
/// A request or configuration out of range, or those of the model and of the value function.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{Leaf, LookaheadConfig, Policies, Request, lookahead};
///
/// // Greedy takes token 0 (0.6) and ends with 0.6 * 0.5; EOS at once has 0.4.
/// let policy = TabularPolicy::from_probs(Tree::new(2, 2, 1)?, vec![0.6, 0.4, 0.5, 0.5])?;
/// let request = Request::of(policy.tree());
/// let best = |depth| {
///     let config = LookaheadConfig { depth, width: None };
///     let output = lookahead(&mut Policies::new(&policy), &request, &config, Leaf::Zero)?;
///     Ok::<_, search::SearchError>(output.completions[0].tokens.clone())
/// };
/// assert_eq!(best(1)?, [0, 0]);
/// assert_eq!(best(2)?, [1]);
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn lookahead<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
    config: &LookaheadConfig,
    mut leaf: Leaf<'_>,
) -> Result<SearchOutput, SearchError> {
    config.check()?;
    leaf.check()?;
    let mut space = Space::new(model, request)?;
    let mut look = Look {
        met: Best::new(1),
        children: HashMap::new(),
        values: HashMap::new(),
        streams: 0,
    };
    let mut root = NodeId::ROOT;
    while space.end(root).is_none() {
        let next = look.best_next(&mut space, root, config, &mut leaf)?;
        let Some(next) = next else {
            break;
        };
        root = next;
        space.retain(&[root]);
    }
    // Stopped on the way, or at a dead end: a completion that was seen is worth more than a prefix.
    let met = look.met.nodes().first().copied();
    let found = met.filter(|_| space.end(root).is_none()).unwrap_or(root);
    space.stats.covered_mass = space.logp(found).exp();
    Ok(space.finish(&[found], None))
}

/// What was computed so far.
#[derive(Debug)]
struct Look {
    /// The best completion met.
    met: Best,
    children: HashMap<NodeId, Vec<NodeId>>,
    /// Values of unfinished prefixes, in nats.
    values: HashMap<NodeId, f64>,
    streams: u64,
}

impl Look {
    /// The child of `root` that the best continuation begins with; `None` if there is none, or the
    /// search must stop.
    fn best_next<M: PrefixModel + ?Sized>(
        &mut self,
        space: &mut Space<'_, M>,
        root: NodeId,
        config: &LookaheadConfig,
        leaf: &mut Leaf<'_>,
    ) -> Result<Option<NodeId>, SearchError> {
        let mut open = vec![root];
        let mut ended: Vec<NodeId> = Vec::new();
        for _ in 0..config.depth {
            if open.is_empty() {
                break;
            }
            if !self.expand(space, &open)? {
                return Ok(None);
            }
            let children = open
                .iter()
                .filter_map(|node| self.children.get(node))
                .flatten();
            let (done, mut next): (Vec<_>, Vec<_>) =
                children.partition(|&&node| space.end(node).is_some());
            for &&node in &done {
                self.met.add(space.score(node), node);
            }
            ended.extend(done);
            if let Some(width) = config.width.filter(|&width| width < next.len()) {
                // A stable sort: the earlier stays first among equals.
                next.sort_by(|&&a, &&b| space.score(b).total_cmp(&space.score(a)));
                next.truncate(width);
            }
            open = next.into_iter().copied().collect();
        }
        if !self.evaluate(space, &open, leaf)? {
            return Ok(None);
        }
        let judged = ended.iter().map(|&node| (space.score(node), node));
        let judged = judged.chain(open.iter().map(|&node| {
            let value = self.values.get(&node).copied().unwrap_or(0.0);
            (space.score(node) + value, node)
        }));
        let best = judged.reduce(|best, other| {
            let better = other.0 > best.0 || other.0.total_cmp(&best.0).is_eq() && other.1 < best.1;
            if better { other } else { best }
        });
        let depth = space.tree.depth(root) + 1;
        Ok(best.map(|(_, node)| space.tree.ancestor_at(node, depth)))
    }

    /// Whether all of `nodes` have their children now.
    fn expand<M: PrefixModel + ?Sized>(
        &mut self,
        space: &mut Space<'_, M>,
        nodes: &[NodeId],
    ) -> Result<bool, SearchError> {
        let new = |node: &&NodeId| !self.children.contains_key(*node);
        let frontier: Vec<NodeId> = nodes.iter().filter(new).copied().collect();
        if frontier.is_empty() {
            return Ok(true);
        }
        let Some(expansion) = space.expand(&frontier, None)? else {
            return Ok(false);
        };
        for (i, &node) in frontier.iter().enumerate() {
            let candidates = expansion.of(i).iter();
            let children = candidates.map(|candidate| space.child(node, candidate));
            self.children
                .insert(node, children.collect::<Result<_, _>>()?);
        }
        Ok(true)
    }

    /// Whether all of `nodes` have their values now.
    fn evaluate<M: PrefixModel + ?Sized>(
        &mut self,
        space: &mut Space<'_, M>,
        nodes: &[NodeId],
        leaf: &mut Leaf<'_>,
    ) -> Result<bool, SearchError> {
        let new = |node: &&NodeId| !self.values.contains_key(*node);
        let nodes: Vec<NodeId> = nodes.iter().filter(new).copied().collect();
        if nodes.is_empty() {
            return Ok(true);
        }
        match leaf {
            Leaf::Zero => {}
            Leaf::Value(function) => {
                let found = values(space, function, &nodes)?;
                self.values.extend(nodes.into_iter().zip(found));
            }
            Leaf::Rollouts(config) => {
                // From twins, so that the next look can expand these nodes itself.
                let starts = nodes.iter().map(|&node| space.twin(node));
                let starts = starts.collect::<Result<Vec<_>, _>>()?;
                let Some(expansion) = space.expand(&starts, config.top_k)? else {
                    return Ok(false);
                };
                let mut first = Vec::with_capacity(starts.len());
                for (i, &node) in starts.iter().enumerate() {
                    first.push(NodeId(space.tree.len() as u32));
                    for candidate in expansion.of(i) {
                        space.child(node, candidate)?;
                    }
                }
                let starts: Vec<Start<'_>> = starts
                    .iter()
                    .zip(first)
                    .enumerate()
                    .map(|(i, (&node, first))| Start {
                        node,
                        candidates: expansion.of(i),
                        first,
                    })
                    .collect();
                let ends = rollouts(space, config, &starts, &mut self.streams)?;
                for (node, ends) in nodes.into_iter().zip(ends) {
                    for &end in ends.iter().filter(|&&end| space.end(end).is_some()) {
                        self.met.add(space.score(end), end);
                    }
                    let from = space.score(node);
                    let sum: f64 = ends.iter().map(|&end| space.score(end) - from).sum();
                    self.values.insert(node, sum / ends.len() as f64);
                }
            }
        }
        Ok(true)
    }
}
