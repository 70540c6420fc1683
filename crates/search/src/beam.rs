//! Beam search with transformers' rules.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::space::{Best, Candidate, Expansion, Seen, Space};
use crate::{NodeId, PrefixModel, Request, SearchError, SearchOutput};

/// Width, length penalty and stopping rule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BeamConfig {
    /// Prefixes continued at each length, over all groups.
    pub width: usize,
    /// Completions returned; at most `width`.
    pub n_best: usize,
    /// A finished completion's score is divided by its length to this power. **0 here, 1 in
    /// transformers.**
    ///
    /// Only the plain sum is what the theory speaks of: `Σ log π*` ranks completions as reward
    /// anchored to the reference does, and dividing it by the length ranks them otherwise, in favour
    /// of long ones.
    pub length_penalty: f64,
    /// When to stop looking.
    pub early_stopping: EarlyStopping,
    /// Groups of `width / groups` that search side by side, each kept apart from those before it by
    /// `diversity_penalty`.
    pub groups: usize,
    /// What a token costs a later group, in nats, for each time that an earlier group took it at
    /// this length. It steers the choice and is no part of any score.
    pub diversity_penalty: f64,
}

impl Default for BeamConfig {
    fn default() -> Self {
        Self {
            width: 1,
            n_best: 1,
            length_penalty: 0.0,
            early_stopping: EarlyStopping::Never,
            groups: 1,
            diversity_penalty: 0.0,
        }
    }
}

impl BeamConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`SearchError::Setting`] for the first setting that is out of its range.
    pub fn check(&self) -> Result<(), SearchError> {
        if self.width == 0 {
            return Err(SearchError::setting("width", 0, "at least 1"));
        }
        if self.n_best == 0 || self.n_best > self.width {
            let expected = "from 1 to the width";
            return Err(SearchError::setting("n_best", self.n_best, expected));
        }
        if !self.length_penalty.is_finite() {
            let expected = "a finite number";
            return Err(SearchError::setting(
                "length_penalty",
                self.length_penalty,
                expected,
            ));
        }
        if self.groups == 0 || !self.width.is_multiple_of(self.groups) {
            let expected = "a divisor of the width";
            return Err(SearchError::setting("groups", self.groups, expected));
        }
        if !(self.diversity_penalty.is_finite() && self.diversity_penalty >= 0.0) {
            let expected = "a finite number of at least 0";
            let value = self.diversity_penalty;
            return Err(SearchError::setting("diversity_penalty", value, expected));
        }
        Ok(())
    }
}

/// When a beam that has as many completions as it is wide stops looking for better ones; the three
/// rules of transformers' `early_stopping`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EarlyStopping {
    /// `True`: at once.
    AtOnce,
    /// `False`: when the best running prefix, were it complete at its present length, would not
    /// beat the worst completion.
    Estimate,
    /// `"never"`: the same, but with a length penalty above 0 the running prefix is judged by the
    /// longest length it can reach. With no penalty and
    /// [`Score::Likelihood`](crate::Score::Likelihood) it stops only when
    /// nothing better can come.
    #[default]
    Never,
}

/// The best completions that a beam of `width` prefixes finds.
///
/// At each length all continuations of the running prefixes are ranked by score together. The best
/// `max(2, 1 + e) width`, with `e` end tokens and stop sequences, are looked at: of the first `width`
/// those that end become completions, and the first `width` that do not end run on. These are the
/// rules of transformers 5.23, which this equals to the last digits; there is one difference, that a vocabulary smaller than the beam fills transformers' first steps with copies of
/// the prompt.
///
/// A wider beam can find a *less* likely completion. Only a beam that drops nothing better than what
/// it returns is optimal, and [`SearchOutput::is_optimal`] says when that is so.
///
/// # Errors
///
/// A request or configuration out of range, or those of the model.
///
/// # Examples
///
/// ```
/// use mdp_core::{TabularPolicy, Tree};
/// use search::{BeamConfig, Policies, Request, beam_search};
///
/// // Greedy takes token 0 (0.6) and ends with 0.6 * 0.5; EOS at once has 0.4.
/// let policy = TabularPolicy::from_probs(Tree::new(2, 2, 1)?, vec![0.6, 0.4, 0.5, 0.5])?;
/// let request = Request::of(policy.tree());
/// let config = BeamConfig { width: 2, ..BeamConfig::default() };
/// let output = beam_search(&mut Policies::new(&policy), &request, &config)?;
/// assert_eq!(output.completions[0].tokens, [1]);
///
/// // Divided by the length, log(0.3) / 2 = -0.60 beats log(0.4) = -0.92: another objective.
/// let config = BeamConfig { length_penalty: 1.0, ..config };
/// let output = beam_search(&mut Policies::new(&policy), &request, &config)?;
/// assert_eq!(output.completions[0].tokens.len(), 2);
/// # Ok::<(), search::SearchError>(())
/// ```
pub fn beam_search<M: PrefixModel + ?Sized>(
    model: &mut M,
    request: &Request<'_>,
    config: &BeamConfig,
) -> Result<SearchOutput, SearchError> {
    config.check()?;
    let mut space = Space::new(model, request)?;
    let width = config.width / config.groups;
    let ends = request.eos.len() + request.constraints.stop.len();
    let keep = width.saturating_mul(2.max(1 + ends));
    // The best `keep` of all are among the best `keep` of each, if the policy's order is the score's;
    // a penalty can push down as many tokens as the groups choose, which is two for each beam at
    // most: one that ends and one that runs on.
    let penalised = if config.groups > 1 {
        2 * config.width
    } else {
        0
    };
    let at_most = space
        .ranks_by_logp()
        .then_some(keep.saturating_add(penalised));
    let mut groups = vec![Group::new(width); config.groups];
    // The best of the prefixes that were continued last: all there is where none may go on or end.
    let mut deepest = NodeId::ROOT;
    for length in 1..=request.max_new_tokens {
        let mut frontier: Vec<NodeId> = groups.iter().flat_map(|g| &g.running).copied().collect();
        frontier.sort_unstable();
        frontier.dedup();
        let Some(best) = space.best_of(frontier.iter().copied()) else {
            break;
        };
        deepest = best;
        space.retain(&frontier);
        let Some(expansion) = space.expand(&frontier, at_most)? else {
            break;
        };
        let mut step = Step {
            frontier: &frontier,
            expansion: &expansion,
            known: HashMap::new(),
            taken: HashMap::new(),
            keep,
            config,
            length,
        };
        for group in &mut groups {
            step.advance(&mut space, group)?;
            if group.is_done(&space, config, length) {
                group.running.clear();
            }
        }
    }
    let mut best = Best::new(config.n_best);
    let mut finished: Vec<(f64, NodeId)> = Vec::new();
    for group in &groups {
        finished.extend_from_slice(group.finished.scored());
    }
    // Groups may find the same completion.
    let mut seen: HashSet<NodeId> = HashSet::new();
    finished.retain(|&(_, node)| seen.insert(node));
    best.extend(finished);
    let running = || groups.iter().flat_map(|group| &group.running).copied();
    if best.nodes().is_empty() {
        let node = space.best_of(running()).unwrap_or(deepest);
        best.add(space.score(node), node);
    }
    // A length penalty or a second group makes what was dropped incomparable.
    let comparable = config.groups == 1 && config.length_penalty == 0.0;
    let open = comparable.then(|| {
        let stopped = groups[0].abandoned;
        let running = running().map(|node| space.score(node));
        running.fold(groups[0].dropped.max(stopped), f64::max)
    });
    seen.extend(running());
    space.stats.covered_mass = seen.iter().map(|&node| space.logp(node).exp()).sum();
    let completions = best.scored().iter().map(|&(score, node)| {
        let completion = space.completion(node);
        crate::Completion {
            score,
            ..completion
        }
    });
    let completions = completions.collect();
    let path = best.nodes().first().copied();
    Ok(space.finish_with(completions, path, open, |_| Seen::default(), 0))
}

/// One beam: all of it, or a group.
#[derive(Clone, Debug)]
struct Group {
    width: usize,
    /// Best first.
    running: Vec<NodeId>,
    finished: Best,
    /// The best score among what was looked at and dropped, in nats.
    dropped: f64,
    /// The best score among what still ran when the stopping rule said enough, in nats.
    abandoned: f64,
}

impl Group {
    fn new(width: usize) -> Self {
        Self {
            width,
            running: vec![NodeId::ROOT],
            finished: Best::new(width),
            dropped: f64::NEG_INFINITY,
            abandoned: f64::NEG_INFINITY,
        }
    }

    fn is_done<M: PrefixModel + ?Sized>(
        &mut self,
        space: &Space<'_, M>,
        config: &BeamConfig,
        length: usize,
    ) -> bool {
        // Not the first: a penalty for what other groups took orders them, and is no part of the score.
        let scores = self.running.iter().map(|&node| space.score(node));
        let Some(best) = scores.reduce(f64::max) else {
            return true;
        };
        if !self.finished.is_full() {
            return false;
        }
        let longest = config.early_stopping == EarlyStopping::Never && config.length_penalty > 0.0;
        let length = if longest {
            space.request.max_new_tokens
        } else {
            length
        };
        let possible = penalised(best, length, config.length_penalty);
        let done =
            config.early_stopping == EarlyStopping::AtOnce || possible <= self.finished.worst();
        if done {
            self.abandoned = best;
        }
        done
    }
}

fn penalised(score: f64, length: usize, penalty: f64) -> f64 {
    score / (length as f64).powf(penalty)
}

/// All groups' step from one length to the next.
struct Step<'a> {
    frontier: &'a [NodeId],
    expansion: &'a Expansion,
    /// Nodes made in this step, so that groups share them.
    known: HashMap<(NodeId, u32), NodeId>,
    /// How often earlier groups took each token in this step.
    taken: HashMap<u32, usize>,
    keep: usize,
    config: &'a BeamConfig,
    length: usize,
}

impl Step<'_> {
    fn advance<M: PrefixModel + ?Sized>(
        &mut self,
        space: &mut Space<'_, M>,
        group: &mut Group,
    ) -> Result<(), SearchError> {
        let mut ranked = Vec::new();
        for (beam, &node) in group.running.iter().enumerate() {
            let at = self.frontier.partition_point(|&other| other < node);
            let score = space.score(node);
            ranked.extend(self.expansion.of(at).iter().map(|&candidate| {
                let taken = self.taken.get(&candidate.token).copied().unwrap_or(0);
                let score = score + candidate.step;
                Ranked {
                    key: score - self.config.diversity_penalty * taken as f64,
                    score,
                    beam,
                    candidate,
                }
            }));
        }
        // Best first; among equals the earlier beam, then the lower token.
        let order = |a: &Ranked, b: &Ranked| {
            let by_place = || (a.beam, a.candidate.token).cmp(&(b.beam, b.candidate.token));
            b.key.total_cmp(&a.key).then_with(by_place)
        };
        if self.keep < ranked.len() {
            // What is not looked at needs no bound of its own: either something better is dropped
            // below, or something better ends.
            ranked.select_nth_unstable_by(self.keep, order);
            ranked.truncate(self.keep);
        }
        ranked.sort_unstable_by(order);
        let parents = std::mem::take(&mut group.running);
        let mut chosen = Vec::new();
        let mut ended = Vec::new();
        for (rank, next) in ranked.iter().enumerate() {
            let parent = parents[next.beam];
            let key = (parent, next.candidate.token);
            let node = match self.known.get(&key) {
                Some(&node) => node,
                None => space.child(parent, &next.candidate)?,
            };
            self.known.insert(key, node);
            match space.end(node) {
                Some(_) if rank < group.width => {
                    let score = penalised(next.score, self.length, self.config.length_penalty);
                    ended.push((score, node));
                }
                None if group.running.len() < group.width => group.running.push(node),
                _ => {
                    group.dropped = group.dropped.max(next.score);
                    continue;
                }
            }
            chosen.push(next.candidate.token);
        }
        // What falls out here is worse than what stays, so it raises no bound.
        group.finished.extend(ended);
        for token in chosen {
            *self.taken.entry(token).or_default() += 1;
        }
        Ok(())
    }
}

/// A continuation with its place among the others.
#[derive(Clone, Copy, Debug)]
struct Ranked {
    /// What it is ranked by.
    key: f64,
    /// Score of the prefix, in nats.
    score: f64,
    beam: usize,
    candidate: Candidate,
}
