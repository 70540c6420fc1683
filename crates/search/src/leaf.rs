//! What an unfinished prefix is worth before it is searched.

use std::fmt;

use rand_chacha::ChaCha8Rng;

use crate::best_of_n::check_values;
use crate::sampling::draw;
use crate::space::{Candidate, Space};
use crate::{NodeId, PrefixModel, SampleConfig, SearchError};

/// A function of token sequences that gives a number for each: prefixes with their prompt, where
/// it is a [`Leaf`]; completions without, where it is a [`Judge`](crate::Judge).
pub type ValueFunction<'a> = &'a mut dyn FnMut(&[&[u32]]) -> Result<Vec<f64>, SearchError>;

/// The value of an unfinished prefix: the score still to come, before anything below it was seen.
pub enum Leaf<'a> {
    /// Zero. A policy is optimal for its own implicit reward, and its soft value then is 0
    /// everywhere, so this is exact for the soft backup, and for the others an upper bound of the
    /// likelihood still to come.
    Zero,
    /// A value function, in reward units; the request's β turns it into nats.
    Value(ValueFunction<'a>),
    /// Completions drawn from the policy: their mean score to go, or their best with
    /// [`Backup::Max`](crate::Backup::Max). `n` completions for each prefix, all side by side.
    Rollouts(SampleConfig),
}

impl fmt::Debug for Leaf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("Zero"),
            Self::Value(_) => f.write_str("Value"),
            Self::Rollouts(config) => f.debug_tuple("Rollouts").field(config).finish(),
        }
    }
}

impl Leaf<'_> {
    pub(crate) fn check(&self) -> Result<(), SearchError> {
        match self {
            Self::Rollouts(config) => config.check(),
            Self::Zero | Self::Value(_) => Ok(()),
        }
    }

    pub(crate) fn is_zero(&self) -> bool {
        matches!(self, Self::Zero)
    }
}

/// The value function at each node, in nats.
pub(crate) fn values<M: PrefixModel + ?Sized>(
    space: &Space<'_, M>,
    function: &mut ValueFunction<'_>,
    nodes: &[NodeId],
) -> Result<Vec<f64>, SearchError> {
    let states: Vec<Vec<u32>> = nodes.iter().map(|&node| space.tree.state(node)).collect();
    let states: Vec<&[u32]> = states.iter().map(Vec::as_slice).collect();
    let mut values = function(&states)?;
    check_values("the value function", &values, nodes.len())?;
    for value in &mut values {
        *value /= space.request.beta.get();
    }
    Ok(values)
}

/// Where a rollout starts: a node, and the candidates that it was expanded to.
pub(crate) struct Start<'c> {
    pub(crate) node: NodeId,
    pub(crate) candidates: &'c [Candidate],
    /// The node of the first candidate; the others follow in order.
    pub(crate) first: NodeId,
}

/// The ends of `config.n` completions from every start, `[starts][n]`, all side by side.
///
/// A stop leaves unfinished ends behind.
pub(crate) fn rollouts<M: PrefixModel + ?Sized>(
    space: &mut Space<'_, M>,
    config: &SampleConfig,
    starts: &[Start<'_>],
    streams: &mut u64,
) -> Result<Vec<Vec<NodeId>>, SearchError> {
    let mut walkers: Vec<(NodeId, ChaCha8Rng)> = Vec::with_capacity(starts.len() * config.n);
    for start in starts {
        for _ in 0..config.n {
            let mut rng = config.stream(*streams);
            *streams += 1;
            // The first step stays inside the tree, so that it is not computed again.
            let drawn = draw(start.candidates, config, &mut rng);
            let place = drawn.and_then(|drawn| {
                let token = drawn.token;
                start.candidates.iter().position(|c| c.token == token)
            });
            let node = place.map_or(start.node, |at| NodeId(start.first.0 + at as u32));
            walkers.push((node, rng));
        }
    }
    // A walker that could not start stands at its start, which was expanded already.
    let mut stuck: Vec<bool> = (0..walkers.len())
        .map(|row| walkers[row].0 == starts[row / config.n].node)
        .collect();
    // The children of the tree must stay unexpanded there: a walker goes on from a twin of its own.
    for (row, (node, _)) in walkers.iter_mut().enumerate() {
        if !stuck[row] && space.end(*node).is_none() {
            *node = space.twin(*node)?;
        }
    }
    loop {
        let walking: Vec<usize> = (0..walkers.len())
            .filter(|&row| !stuck[row] && space.end(walkers[row].0).is_none())
            .collect();
        if walking.is_empty() {
            break;
        }
        let frontier: Vec<NodeId> = walking.iter().map(|&row| walkers[row].0).collect();
        let Some(expansion) = space.expand(&frontier, config.top_k)? else {
            break;
        };
        for (at, row) in walking.into_iter().enumerate() {
            let (node, rng) = &mut walkers[row];
            match draw(expansion.of(at), config, rng) {
                Some(candidate) => *node = space.child(*node, &candidate)?,
                None => stuck[row] = true,
            }
        }
    }
    let ends: Vec<NodeId> = walkers.into_iter().map(|(node, _)| node).collect();
    Ok(ends.chunks(config.n).map(<[NodeId]>::to_vec).collect())
}
