//! What all algorithms share: the tree that grows, the constraints, the limits and the counting.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::{
    Completion, End, NodeId, PrefixModel, PrefixTree, Request, Row, Rows, Score, SearchError,
    SearchOutput, SearchStats, Stopped, TreeNode, TreeView,
};

/// A log-softmax in f32 may round above 0 by this much; anything larger is no logp.
const LOGP_SLACK: f64 = 1e-4;

/// A token that may follow a state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) token: u32,
    /// `log π(token|state)`, in nats.
    pub(crate) logp: f64,
    /// `log π_ref(token|state)`, in nats; NaN without a reference.
    pub(crate) reference_logp: f64,
    /// What the model adds to the score, in nats: part of `step`.
    pub(crate) reward: f64,
    /// What the token adds to the score, in nats.
    pub(crate) step: f64,
}

/// The candidates of every state of a frontier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expansion {
    starts: Vec<usize>,
    candidates: Vec<Candidate>,
    /// The policy's mass on the candidates of each state.
    mass: Vec<f64>,
}

impl Expansion {
    pub(crate) fn of(&self, i: usize) -> &[Candidate] {
        &self.candidates[self.starts[i]..self.starts[i + 1]]
    }

    pub(crate) fn mass(&self, i: usize) -> f64 {
        self.mass[i]
    }
}

pub(crate) struct Space<'s, M: ?Sized> {
    model: &'s mut M,
    pub(crate) request: &'s Request<'s>,
    pub(crate) tree: PrefixTree,
    /// `Σ log π` by node, in nats.
    pub(crate) logps: Vec<f64>,
    /// Score by node, in nats.
    pub(crate) scores: Vec<f64>,
    /// `Σ log π_ref` by node, in nats; empty without a reference.
    reference_logps: Vec<f64>,
    ends: Vec<Option<End>>,
    expanded: Vec<bool>,
    /// The best score that a prefix left out by `top_k` can have had, in nats.
    pub(crate) pruned: f64,
    /// Whether a prefix's score bounds those of all its completions.
    bounded: bool,
    pub(crate) stats: SearchStats,
    /// By token: whether it must not appear, and whether it ends a completion.
    banned: Vec<bool>,
    eos: Vec<bool>,
    vocab: usize,
    started: Instant,
}

impl<'s, M: PrefixModel + ?Sized> Space<'s, M> {
    pub(crate) fn new(model: &'s mut M, request: &'s Request<'s>) -> Result<Self, SearchError> {
        let started = Instant::now();
        let vocab = model.vocab();
        request.check(vocab, model.has_reference())?;
        model.begin(&request.prompt, request.max_new_tokens)?;
        let (has_reference, has_rewards) = (model.has_reference(), model.has_rewards());
        Ok(Self {
            model,
            request,
            tree: PrefixTree::new(request.prompt.as_slice()),
            logps: vec![0.0],
            scores: vec![0.0],
            reference_logps: if has_reference { vec![0.0] } else { Vec::new() },
            ends: vec![None],
            expanded: vec![false],
            pruned: f64::NEG_INFINITY,
            bounded: request.score.never_rises()
                && request.constraints.processor.is_none()
                && !has_rewards,
            stats: SearchStats {
                model_calls: 0,
                states_expanded: 0,
                largest_batch: 0,
                nodes: 1,
                bytes: 0,
                simulations: 0,
                covered_mass: 1.0,
                seconds: 0.0,
                model_seconds: 0.0,
                stopped: Stopped::Done,
                root_values: Vec::new(),
            },
            banned: flags(vocab, &request.constraints.banned),
            eos: flags(vocab, &request.eos),
            vocab,
            started,
        })
    }

    pub(crate) fn end(&self, node: NodeId) -> Option<End> {
        self.ends[node.index()]
    }

    pub(crate) fn logp(&self, node: NodeId) -> f64 {
        self.logps[node.index()]
    }

    pub(crate) fn score(&self, node: NodeId) -> f64 {
        self.scores[node.index()]
    }

    /// The prefix of the highest score, the first among equals.
    pub(crate) fn best_of(&self, nodes: impl IntoIterator<Item = NodeId>) -> Option<NodeId> {
        nodes
            .into_iter()
            .reduce(|a, b| if self.score(b) > self.score(a) { b } else { a })
    }

    pub(crate) fn is_bounded(&self) -> bool {
        self.bounded
    }

    pub(crate) fn has_reference(&self) -> bool {
        !self.reference_logps.is_empty()
    }

    /// Whether the likeliest token is that of the highest score, so that others need not be looked at.
    pub(crate) fn ranks_by_logp(&self) -> bool {
        self.request.score == Score::Likelihood && !self.model.has_rewards()
    }

    /// States that the budget still allows.
    pub(crate) fn room(&self) -> usize {
        let spent = self.stats.states_expanded;
        let tokens = self.request.budget.tokens;
        tokens.map_or(usize::MAX, |tokens| tokens.saturating_sub(spent))
    }

    /// Whether the search must stop now, and notes why.
    pub(crate) fn must_stop(&mut self) -> bool {
        let cancelled = self.request.cancel;
        let late = |seconds| self.started.elapsed().as_secs_f64() >= seconds;
        if cancelled.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            self.stats.stopped = Stopped::Cancelled;
        } else if self.room() == 0 || self.request.budget.seconds.is_some_and(late) {
            self.stats.stopped = Stopped::Budget;
        } else {
            return false;
        }
        true
    }

    /// From now on only prefixes at or below `live` are expanded.
    pub(crate) fn retain(&mut self, live: &[NodeId]) {
        self.model.retain(&self.tree, live);
    }

    /// The candidates of each state in one call of the model, `at_most` of each if given, those
    /// likeliest under the policy; `None` if the search must stop.
    pub(crate) fn expand(
        &mut self,
        frontier: &[NodeId],
        at_most: Option<usize>,
    ) -> Result<Option<Expansion>, SearchError> {
        if self.must_stop() {
            return Ok(None);
        }
        let keep = [self.request.top_k, at_most].into_iter().flatten().min();
        let constraints = &self.request.constraints;
        // What the constraints take away must not leave fewer than `keep`.
        let spare = constraints.banned.len() + self.request.eos.len();
        let ask = keep
            .map(|k| k.saturating_add(spare))
            .filter(|&k| k < self.vocab && constraints.processor.is_none());
        let asked = Instant::now();
        let rows = self.model.expand(&self.tree, frontier, ask)?;
        self.stats.model_seconds += asked.elapsed().as_secs_f64();
        self.stats.model_calls += 1;
        self.stats.states_expanded += frontier.len();
        self.stats.largest_batch = self.stats.largest_batch.max(frontier.len());
        if rows.len() != frontier.len() {
            return Err(SearchError::Rows {
                table: "answer",
                expected: frontier.len(),
                got: rows.len(),
            });
        }
        let mut expansion = Expansion {
            starts: vec![0],
            ..Expansion::default()
        };
        for (i, &node) in frontier.iter().enumerate() {
            self.expanded[node.index()] = true;
            let left_out = self.candidates(node, &rows, i, keep, &mut expansion)?;
            self.pruned = self.pruned.max(self.score(node) + left_out);
        }
        Ok(Some(expansion))
    }

    /// Appends a state's candidates; returns the largest logp that was left out, in nats.
    fn candidates(
        &mut self,
        node: NodeId,
        rows: &Rows,
        i: usize,
        keep: Option<usize>,
        expansion: &mut Expansion,
    ) -> Result<f64, SearchError> {
        let row = rows.row(i);
        if rows.is_full() && row.logps.len() != self.vocab {
            return Err(SearchError::Rows {
                table: "row",
                expected: self.vocab,
                got: row.logps.len(),
            });
        }
        if self.has_reference() && row.reference_logps.is_none() {
            return Err(SearchError::Rows {
                table: "reference logps",
                expected: row.logps.len(),
                got: 0,
            });
        }
        if row.rewards.is_some() && !self.model.has_rewards() {
            return Err(SearchError::Rows {
                table: "rewards (of a model whose `has_rewards` says none)",
                expected: 0,
                got: row.logps.len(),
            });
        }
        let start = expansion.candidates.len();
        let (mut smallest, mut dense) = (f64::INFINITY, None);
        for (at, &logp) in row.logps.iter().enumerate() {
            // Written so that NaN fails too.
            if logp.is_nan() || logp > LOGP_SLACK {
                return Err(self.not_a_logp("logp", node, row.token(at), logp, "at most 0"));
            }
            smallest = smallest.min(logp);
        }
        if let Some(processor) = self.request.constraints.processor {
            let mut logps = vec![f64::NEG_INFINITY; self.vocab];
            for (at, &logp) in row.logps.iter().enumerate() {
                *self.place(&mut logps, row.token(at))? = logp;
            }
            processor(&self.tree.state(node), &mut logps);
            dense = Some(logps);
        }
        let early = self.tree.depth(node) < self.request.constraints.min_new_tokens;
        for (at, &logp) in row.logps.iter().enumerate() {
            let token = row.token(at);
            let logp = match &mut dense {
                Some(logps) => *self.place(logps, token)?,
                None => logp.min(0.0),
            };
            // A token outside is refused below, so it passes here.
            let is = |flags: &[bool]| flags.get(token as usize).copied().unwrap_or(false);
            let banned = is(&self.banned) || early && is(&self.eos);
            if banned || logp == f64::NEG_INFINITY {
                continue;
            }
            let candidate = self.candidate(node, &row, at, logp)?;
            expansion.candidates.push(candidate);
        }
        let mut left_out = if rows.is_full() {
            f64::NEG_INFINITY
        } else {
            smallest
        };
        let found = &mut expansion.candidates[start..];
        if let Some(keep) = keep.filter(|&keep| keep < found.len()) {
            let likelier = |a: &Candidate, b: &Candidate| {
                b.logp
                    .total_cmp(&a.logp)
                    .then_with(|| a.token.cmp(&b.token))
            };
            let (_, next, _) = found.select_nth_unstable_by(keep, likelier);
            left_out = left_out.max(next.logp);
            expansion.candidates.truncate(start + keep);
        }
        let kept = &mut expansion.candidates[start..];
        // Ties are broken by position, and the order must not depend on how the model answered.
        if !rows.is_full() || keep.is_some() {
            kept.sort_unstable_by_key(|candidate| candidate.token);
        }
        expansion.mass.push(kept.iter().map(|c| c.logp.exp()).sum());
        expansion.starts.push(expansion.candidates.len());
        Ok(left_out)
    }

    fn place<'t>(&self, table: &'t mut [f64], token: u32) -> Result<&'t mut f64, SearchError> {
        table
            .get_mut(token as usize)
            .ok_or(SearchError::TokenOutside {
                place: "the model's answer",
                token,
                vocab: self.vocab,
            })
    }

    fn candidate(
        &self,
        node: NodeId,
        row: &Row<'_>,
        at: usize,
        logp: f64,
    ) -> Result<Candidate, SearchError> {
        let token = row.token(at);
        if token as usize >= self.vocab {
            return Err(SearchError::TokenOutside {
                place: "the model's answer",
                token,
                vocab: self.vocab,
            });
        }
        let reference = row.reference_logps.map(|logps| logps[at]);
        let reward = row.rewards.map_or(0.0, |rewards| rewards[at]);
        let step = self.request.score.step(logp, reference) + reward;
        if !step.is_finite() {
            let expected = "finite: the reference must give every token of the policy some mass";
            return Err(self.not_a_logp("score", node, token, step, expected));
        }
        Ok(Candidate {
            token,
            logp,
            reference_logp: reference.unwrap_or(f64::NAN),
            reward,
            step,
        })
    }

    fn not_a_logp(
        &self,
        table: &'static str,
        node: NodeId,
        token: u32,
        value: f64,
        expected: &'static str,
    ) -> SearchError {
        SearchError::NotALogp {
            table,
            state: self.tree.completion(node),
            token,
            value,
            expected,
        }
    }

    /// The prefix that a candidate leads to.
    pub(crate) fn child(
        &mut self,
        parent: NodeId,
        candidate: &Candidate,
    ) -> Result<NodeId, SearchError> {
        let node = self.tree.push(parent, candidate.token)?;
        let at = parent.index();
        self.logps.push(self.logps[at] + candidate.logp);
        self.scores.push(self.scores[at] + candidate.step);
        if self.has_reference() {
            let sum = self.reference_logps[at] + candidate.reference_logp;
            self.reference_logps.push(sum);
        }
        self.ends.push(self.end_of(node, candidate.token));
        self.expanded.push(false);
        Ok(node)
    }

    /// Another node of the same prefix, for a walk that must leave the first one unexpanded.
    pub(crate) fn twin(&mut self, node: NodeId) -> Result<NodeId, SearchError> {
        let (Some(parent), Some(token)) = (self.tree.parent(node), self.tree.token(node)) else {
            return Ok(node);
        };
        let twin = self.tree.push(parent, token)?;
        self.logps.push(self.logp(node));
        self.scores.push(self.score(node));
        if let Some(&sum) = self.reference_logps.get(node.index()) {
            self.reference_logps.push(sum);
        }
        self.ends.push(self.end(node));
        self.expanded.push(false);
        Ok(twin)
    }

    fn end_of(&self, node: NodeId, token: u32) -> Option<End> {
        let depth = self.tree.depth(node);
        let constraints = &self.request.constraints;
        let stops = || {
            let stops = &mut constraints.stop.iter();
            stops.any(|stop| self.tree.ends_with(node, stop))
        };
        if self.eos[token as usize] {
            Some(End::Eos)
        } else if depth >= constraints.min_new_tokens && stops() {
            Some(End::Stop)
        } else if depth >= self.request.max_new_tokens {
            Some(End::Length)
        } else {
            None
        }
    }

    pub(crate) fn completion(&self, node: NodeId) -> Completion {
        let logp = self.logp(node);
        let reference_logp = self.reference_logps.get(node.index()).copied();
        Completion {
            tokens: self.tree.completion(node),
            score: self.score(node),
            logp,
            reference_logp,
            implicit_reward: reference_logp.map(|r| self.request.beta.get() * (logp - r)),
            end: self.end(node).unwrap_or(End::Unfinished),
        }
    }

    /// The output, its completions being those of `found` in the order given.
    ///
    /// `open` is the best score among prefixes that were neither completed nor pruned by `top_k`;
    /// `None` if the algorithm has no bound to offer.
    pub(crate) fn finish(self, found: &[NodeId], open: Option<f64>) -> SearchOutput {
        let completions = found.iter().map(|&node| self.completion(node)).collect();
        self.finish_with(
            completions,
            found.first().copied(),
            open,
            |_| Seen::default(),
            0,
        )
    }

    /// As [`finish`](Self::finish), with what the algorithm knows of every node and its own bytes.
    pub(crate) fn finish_with(
        mut self,
        completions: Vec<Completion>,
        path: Option<NodeId>,
        open: Option<f64>,
        seen: impl Fn(NodeId) -> Seen,
        bytes: usize,
    ) -> SearchOutput {
        let best = completions
            .iter()
            .map(|c| c.score)
            .fold(f64::NEG_INFINITY, f64::max);
        let upper_bound = open
            .filter(|_| self.bounded)
            .map(|open| open.max(self.pruned).max(best));
        let tree = self.request.keep_tree.then(|| self.view(path, seen));
        self.stats.nodes = self.tree.len();
        self.stats.bytes = self.tree.bytes()
            + 8 * (self.logps.capacity() + self.scores.capacity())
            + 8 * self.reference_logps.capacity()
            + self.ends.capacity()
            + self.expanded.capacity()
            + self.banned.capacity()
            + self.eos.capacity()
            + bytes;
        self.stats.seconds = self.started.elapsed().as_secs_f64();
        SearchOutput {
            completions,
            stats: self.stats,
            upper_bound,
            tree,
        }
    }

    fn view(&self, path: Option<NodeId>, seen: impl Fn(NodeId) -> Seen) -> TreeView {
        let mut on_path = vec![false; self.tree.len()];
        for node in path.iter().flat_map(|&node| self.tree.ancestors(node)) {
            on_path[node.index()] = true;
        }
        let nodes = (0..self.tree.len()).map(|i| {
            let node = NodeId(i as u32);
            let parent = self.tree.parent(node);
            let seen = seen(node);
            TreeNode {
                parent: parent.map(NodeId::index),
                token: self.tree.token(node),
                visits: seen.visits.unwrap_or(usize::from(self.expanded[i])),
                prior: parent.map_or(1.0, |p| (self.logp(node) - self.logp(p)).exp()),
                score: self.score(node),
                q: seen.q,
                value: seen.value,
                covered_mass: seen.covered_mass.unwrap_or(1.0),
                on_path: on_path[i],
                end: self.end(node),
            }
        });
        TreeView {
            nodes: nodes.collect(),
        }
    }
}

/// A flag for every token, set for those given, which are in the vocabulary.
fn flags(vocab: usize, tokens: &[u32]) -> Vec<bool> {
    let mut flags = vec![false; vocab];
    for &token in tokens {
        flags[token as usize] = true;
    }
    flags
}

/// What an algorithm knows of a node beyond its score.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) visits: Option<usize>,
    pub(crate) q: Option<f64>,
    pub(crate) value: Option<f64>,
    pub(crate) covered_mass: Option<f64>,
}

/// The best few of what was found, best first, the earlier first among equals.
#[derive(Clone, Debug)]
pub(crate) struct Best {
    n: usize,
    found: Vec<(f64, NodeId)>,
}

impl Best {
    pub(crate) fn new(n: usize) -> Self {
        Self {
            n,
            found: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, score: f64, node: NodeId) {
        let at = self.found.partition_point(|&(known, _)| known >= score);
        if at < self.n {
            self.found.insert(at, (score, node));
            self.found.truncate(self.n);
        }
    }

    /// Puts in many at once, at less than `add` for each.
    pub(crate) fn extend(&mut self, found: Vec<(f64, NodeId)>) {
        self.found.extend(found);
        // Stable, so the earlier stays first among equals.
        self.found.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.found.truncate(self.n);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.found.len() == self.n
    }

    /// The score below which nothing more gets in, in nats.
    pub(crate) fn worst(&self) -> f64 {
        match self.found.last() {
            Some(&(score, _)) if self.is_full() => score,
            _ => f64::NEG_INFINITY,
        }
    }

    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        self.found.iter().map(|&(_, node)| node).collect()
    }

    pub(crate) fn scored(&self) -> &[(f64, NodeId)] {
        &self.found
    }
}
