//! Completions drawn at random.

use std::collections::HashMap;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::space::{Candidate, Space};
use crate::{NodeId, PrefixModel, Request, SearchError, SearchOutput};

/// How many completions to draw, and from what.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// How many.
    pub n: usize,
    /// Divides the logps; 1 is the policy's own distribution.
    pub temperature: f64,
    /// Keeps the `k` likeliest tokens; `None` keeps all.
    pub top_k: Option<usize>,
    /// Keeps the fewest likeliest tokens whose mass reaches this; 1 keeps all.
    pub top_p: f64,
    /// Seed of the random streams, one for each completion.
    pub seed: u64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            seed: 0,
        }
    }
}

impl SampleConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`SearchError::Setting`] for the first setting that is out of its range.
    pub fn check(&self) -> Result<(), SearchError> {
        let positive = "a number above 0 (greedy is the limit of 0)";
        if self.n == 0 {
            return Err(SearchError::setting("n", 0, "at least 1"));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(SearchError::setting(
                "temperature",
                self.temperature,
                positive,
            ));
        }
        if self.top_k == Some(0) {
            return Err(SearchError::setting("top_k", 0, "at least 1"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SearchError::setting("top_p", self.top_p, "in (0, 1]"));
        }
        Ok(())
    }

    pub(crate) fn stream(&self, row: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(row);
        rng
    }
}

/// `n` completions drawn from the policy, in the order of drawing, side by side in every call.
///
/// Each has its own random stream, so that a completion does not depend on its neighbours. Whatever
/// the temperature, `logp` is the policy's own. Prefixes that several completions share are computed
/// once. `covered_mass` is the probability of the distinct completions together.
///
/// # Errors
///
/// A request or configuration out of range, or those of the model.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{Policies, Request, SampleConfig, sample};
///
/// let policy = TabularPolicy::uniform(Tree::new(3, 4, 2)?);
/// let config = SampleConfig { n: 8, seed: 1, ..SampleConfig::default() };
/// let output = sample(&mut Policies::new(&policy), &Request::of(policy.tree()), &config)?;
/// assert_eq!(output.completions.len(), 8);
/// // All eight begin at the prompt: four rounds at most, and the prompt is computed once.
/// assert!(output.stats.model_calls <= 4);
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn sample<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
    config: &SampleConfig,
) -> Result<SearchOutput, SearchError> {
    let (space, nodes) = draw_completions(model, request, config)?;
    Ok(space.finish(&nodes, None))
}

/// The completions of [`sample`] before they are turned into an output.
pub(crate) fn draw_completions<'s, M: PrefixModel + ?Sized>(
    model: &'s mut M,
    request: &'s Request<'s>,
    config: &SampleConfig,
) -> Result<(Space<'s, M>, Vec<NodeId>), SearchError> {
    config.check()?;
    let mut space = Space::new(model, request)?;
    let mut rngs: Vec<ChaCha8Rng> = (0..config.n as u64).map(|row| config.stream(row)).collect();
    let mut nodes = vec![NodeId::ROOT; config.n];
    let mut walking: Vec<usize> = (0..config.n).collect();
    while !walking.is_empty() {
        let mut frontier: Vec<NodeId> = walking.iter().map(|&row| nodes[row]).collect();
        frontier.sort_unstable();
        frontier.dedup();
        space.retain(&frontier);
        // A cut to the likeliest tokens needs no others.
        let Some(expansion) = space.expand(&frontier, config.top_k)? else {
            break;
        };
        let mut known: HashMap<(NodeId, u32), NodeId> = HashMap::new();
        let mut still = Vec::with_capacity(walking.len());
        for row in walking {
            let parent = nodes[row];
            let at = frontier.partition_point(|&node| node < parent);
            let Some(candidate) = draw(expansion.of(at), config, &mut rngs[row]) else {
                continue;
            };
            let node = match known.get(&(parent, candidate.token)) {
                Some(&node) => node,
                None => space.child(parent, &candidate)?,
            };
            known.insert((parent, candidate.token), node);
            nodes[row] = node;
            if space.end(node).is_none() {
                still.push(row);
            }
        }
        walking = still;
    }
    let mut distinct = nodes.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let masses = distinct.iter().map(|&node| space.logp(node).exp());
    space.stats.covered_mass = masses.sum();
    Ok((space, nodes))
}

/// One of the candidates at random; `None` if there are none.
pub(crate) fn draw(
    candidates: &[Candidate],
    config: &SampleConfig,
    rng: &mut impl Rng,
) -> Option<Candidate> {
    let uniform: f64 = rng.random();
    let largest = candidates
        .iter()
        .map(|c| c.logp)
        .fold(f64::NEG_INFINITY, f64::max);
    let weight = |c: &Candidate| ((c.logp - largest) / config.temperature).exp();
    let mut ranked: Vec<(f64, Candidate)> = candidates.iter().map(|c| (weight(c), *c)).collect();
    if config.top_k.is_some() || config.top_p < 1.0 {
        // Equal weights keep the order of their tokens.
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        ranked.truncate(config.top_k.unwrap_or(usize::MAX));
        let total: f64 = ranked.iter().map(|(weight, _)| weight).sum();
        let mut mass = 0.0;
        let last = ranked.iter().position(|(weight, _)| {
            mass += weight;
            mass >= config.top_p * total
        });
        ranked.truncate(last.map_or(ranked.len(), |last| last + 1));
    }
    let total: f64 = ranked.iter().map(|(weight, _)| weight).sum();
    let mut left = uniform * total;
    let mut drawn = None;
    for (weight, candidate) in ranked {
        if weight > 0.0 {
            // The last possible token also takes what rounding leaves over.
            drawn = Some(candidate);
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    drawn
}
