//! The tree: selection, expansion, backup.

use crate::leaf::{Leaf, Start, rollouts, values};
use crate::space::{Best, Expansion, Seen, Space};
use crate::{
    Backup, Commit, MctsConfig, NodeId, PrefixModel, RootChoice, SearchError, SearchOutput, Stopped,
};

/// What the search knows of a prefix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    /// The first child; children are numbered in a row.
    first: u32,
    /// Children; 0 before it is expanded, and if nothing may follow.
    count: u32,
    pub(super) visits: u32,
    /// Simulations under way.
    pending: u16,
    expanded: bool,
    /// Whether a leaf value or a search stands behind `value`.
    pub(super) evaluated: bool,
    /// Whether everything below is known.
    solved: bool,
    /// Whether no completion can be had below.
    pub(super) dead: bool,
    /// `log π` of the last token, in nats.
    pub(super) logp: f64,
    /// Score of the last token, in nats.
    step: f64,
    /// What the model adds to the score of the last token, in nats.
    reward: f64,
    /// The score still to come, in nats.
    pub(super) value: f64,
    /// Its leaf value at first, in nats; with the mean backup the sum over visits.
    total: f64,
    /// The share of the policy's mass that was not pruned below.
    covered: f64,
}

impl Node {
    fn new(logp: f64, step: f64, terminal: bool) -> Self {
        Self {
            first: 0,
            count: 0,
            visits: 0,
            pending: 0,
            expanded: false,
            evaluated: terminal,
            solved: terminal,
            dead: false,
            logp,
            step,
            reward: 0.0,
            value: 0.0,
            total: 0.0,
            covered: 1.0,
        }
    }

    /// A node that is no part of the search tree, such as one of a rollout.
    fn unused() -> Self {
        Self {
            evaluated: false,
            ..Self::new(0.0, 0.0, true)
        }
    }

    pub(super) fn q(&self) -> f64 {
        self.step + self.value
    }

    pub(super) fn children(&self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }
}

pub(super) struct Mcts<'s, 'l, M: ?Sized> {
    pub(super) space: Space<'s, M>,
    pub(super) nodes: Vec<Node>,
    pub(super) config: &'s MctsConfig,
    leaf: Leaf<'l>,
    /// Completions met.
    best: Best,
    /// The smallest and largest Q seen, in nats.
    range: Option<(f64, f64)>,
    streams: u64,
}

/// Where a simulation went.
struct Walk {
    /// From the root to the leaf.
    path: Vec<NodeId>,
}

impl<'s, 'l, M: PrefixModel + ?Sized> Mcts<'s, 'l, M> {
    pub(super) fn new(space: Space<'s, M>, config: &'s MctsConfig, leaf: Leaf<'l>) -> Self {
        Self {
            space,
            nodes: vec![Node::new(0.0, 0.0, false)],
            config,
            leaf,
            best: Best::new(config.n_best),
            range: None,
            streams: 0,
        }
    }

    /// Gives up everything that is not below `root`; returns whether there is something to search.
    pub(super) fn descend(&mut self, root: NodeId) -> bool {
        self.space.retain(&[root]);
        self.space.end(root).is_none()
    }

    /// Runs the simulations of one token and returns the child decided for; `None` if the search
    /// must stop, or nothing may follow.
    pub(super) fn search(&mut self, root: NodeId) -> Result<Option<NodeId>, SearchError> {
        if !self.node(root).expanded && !self.run(vec![Walk { path: vec![root] }])? {
            return Ok(None);
        }
        if self.node(root).count == 0 {
            return Ok(None);
        }
        match self.config.root {
            RootChoice::Puct => {
                let done = self.simulate(root, self.config.simulations, None)?;
                Ok(self.decide(root).filter(|_| done))
            }
            RootChoice::Gumbel { considered, seed } => self.gumbel(root, considered, seed),
        }
    }

    pub(super) fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.index()]
    }

    fn prunes_solved(&self) -> bool {
        self.config.backup != Backup::Mean
    }

    /// Runs up to `n` simulations, through `child` if given; returns whether the search may go on.
    pub(super) fn simulate(
        &mut self,
        root: NodeId,
        n: usize,
        child: Option<NodeId>,
    ) -> Result<bool, SearchError> {
        let mut left = n;
        while left > 0 {
            if self.is_proven(root) {
                return Ok(true);
            }
            if self.budget_spent() {
                return Ok(false);
            }
            let limits = [left, self.simulations_left(), self.space.room().max(1)];
            let limit = limits.into_iter().fold(self.config.batch, usize::min);
            let walks = self.select(root, child, limit);
            if walks.is_empty() {
                return Ok(true);
            }
            left -= walks.len();
            if !self.run(walks)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn simulations_left(&self) -> usize {
        let budget = self.space.request.budget.simulations;
        budget.map_or(usize::MAX, |n| {
            n.saturating_sub(self.space.stats.simulations)
        })
    }

    fn budget_spent(&mut self) -> bool {
        if self.simulations_left() == 0 {
            self.space.stats.stopped = Stopped::Budget;
            return true;
        }
        false
    }

    /// Whether the best completion met is proven to be the best of those below the root.
    fn is_proven(&self, root: NodeId) -> bool {
        if !self.prunes_solved() {
            return false;
        }
        if self.node(root).solved {
            return true;
        }
        if self.config.backup != Backup::Max || self.config.n_best > 1 || !self.is_best_first() {
            return false;
        }
        // The value of an open prefix is what it can reach at most; so if the best path is whole,
        // nothing beats it.
        let mut at = root;
        while let Some(best) = self.best_child(at) {
            at = best;
        }
        self.node(at).solved
    }

    /// Whether every value is an upper bound of what is below it.
    fn is_best_first(&self) -> bool {
        self.leaf.is_zero() && self.space.is_bounded()
    }

    fn best_child(&self, node: NodeId) -> Option<NodeId> {
        let evaluated = self
            .node(node)
            .children()
            .filter(|&c| self.nodes[c].evaluated);
        let best = evaluated.reduce(|a, b| {
            if self.nodes[b].q() > self.nodes[a].q() {
                b
            } else {
                a
            }
        });
        best.map(|at| NodeId(at as u32))
    }

    /// Paths to up to `limit` leaves, marked as under way.
    fn select(&mut self, root: NodeId, child: Option<NodeId>, limit: usize) -> Vec<Walk> {
        let mut walks = Vec::new();
        // Prefixes below which all leaves are under way already.
        let mut blocked: Vec<NodeId> = Vec::new();
        let mut terminals: Vec<NodeId> = Vec::new();
        while walks.len() < limit {
            let mut path = vec![root];
            if let Some(child) = child {
                if self.is_closed(child) || blocked.contains(&child) {
                    break;
                }
                path.push(child);
            }
            let reached = loop {
                let at = path[path.len() - 1];
                let node = self.node(at);
                if !node.expanded || node.count == 0 {
                    break true;
                }
                match self.pick(at, &blocked) {
                    Some(next) => path.push(next),
                    None => {
                        blocked.push(at);
                        break false;
                    }
                }
            };
            let at = path[path.len() - 1];
            if !reached {
                if at == root || Some(at) == child {
                    break;
                }
                continue;
            }
            if self.space.end(at).is_none() && !self.node(at).expanded {
                blocked.push(at);
            } else if terminals.contains(&at) && walks.len() == terminals.len() {
                // Only completions are left to visit, again and again: one round is enough.
                break;
            } else {
                terminals.push(at);
            }
            for node in &path {
                let node = &mut self.nodes[node.index()];
                node.pending = node.pending.saturating_add(1);
            }
            walks.push(Walk { path });
        }
        walks
    }

    fn is_closed(&self, node: NodeId) -> bool {
        let node = self.node(node);
        self.prunes_solved() && node.solved || node.dead
    }

    /// The child of the best value and prior among those that may be visited.
    fn pick(&self, at: NodeId, blocked: &[NodeId]) -> Option<NodeId> {
        let parent = self.node(at);
        let visits = f64::from(parent.visits) + f64::from(parent.pending);
        let explore = self.config.exploration * (visits + 1.0).sqrt();
        let mut best: Option<(f64, NodeId)> = None;
        for child in parent.children() {
            let id = NodeId(child as u32);
            let node = &self.nodes[child];
            if self.is_closed(id) || blocked.contains(&id) {
                continue;
            }
            // What was never valued is taken to be as good as its parent.
            let q = if node.evaluated {
                node.q()
            } else {
                parent.value
            };
            let visits = f64::from(node.visits) + f64::from(node.pending);
            let score = self.scaled(q) + explore * node.logp.exp() / (1.0 + visits);
            if best.is_none_or(|(best, _)| score > best) {
                best = Some((score, id));
            }
        }
        best.map(|(_, child)| child)
    }

    /// Q in [0, 1] over those seen.
    pub(super) fn scaled(&self, q: f64) -> f64 {
        match self.range {
            Some((low, high)) if high > low => (q - low) / (high - low),
            _ => 0.0,
        }
    }

    /// Expands and values the leaves, and renews the values above; returns whether the search may
    /// go on.
    fn run(&mut self, walks: Vec<Walk>) -> Result<bool, SearchError> {
        let leaf = |walk: &Walk| walk.path[walk.path.len() - 1];
        let open = |walk: &&Walk| {
            let at = leaf(walk);
            self.space.end(at).is_none() && !self.node(at).expanded
        };
        let frontier: Vec<NodeId> = walks.iter().filter(open).map(leaf).collect();
        let expanded = self.expand(&frontier)?;
        for walk in &walks {
            for node in &walk.path {
                let node = &mut self.nodes[node.index()];
                node.pending = node.pending.saturating_sub(1);
            }
        }
        if !expanded {
            return Ok(false);
        }
        for walk in walks {
            self.space.stats.simulations += 1;
            self.back_up(&walk.path);
        }
        if self.config.trace {
            let value = self.nodes[0].value;
            self.space.stats.root_values.push(value);
        }
        Ok(true)
    }

    /// Whether the frontier now has its children and its leaf values.
    fn expand(&mut self, frontier: &[NodeId]) -> Result<bool, SearchError> {
        if frontier.is_empty() {
            return Ok(!self.space.must_stop());
        }
        let Some(expansion) = self.space.expand(frontier, None)? else {
            return Ok(false);
        };
        for (i, &node) in frontier.iter().enumerate() {
            self.grow(node, &expansion, i)?;
        }
        match &mut self.leaf {
            Leaf::Zero => {}
            Leaf::Value(function) => {
                let found = values(&self.space, function, frontier)?;
                for (node, value) in frontier.iter().zip(found) {
                    self.nodes[node.index()].value = value;
                }
            }
            Leaf::Rollouts(config) => {
                let starts: Vec<Start<'_>> = frontier
                    .iter()
                    .enumerate()
                    .map(|(i, &node)| Start {
                        node,
                        candidates: expansion.of(i),
                        first: NodeId(self.nodes[node.index()].first),
                    })
                    .collect();
                let ends = rollouts(&mut self.space, config, &starts, &mut self.streams)?;
                // Nodes of the walks are no part of the search tree; the numbering goes on past them.
                self.nodes.resize(self.space.tree.len(), Node::unused());
                for (&node, ends) in frontier.iter().zip(ends) {
                    let from = self.space.score(node);
                    let to_go = ends.iter().map(|&end| self.space.score(end) - from);
                    let value = if self.config.backup == Backup::Max {
                        to_go.fold(f64::NEG_INFINITY, f64::max)
                    } else {
                        to_go.sum::<f64>() / ends.len() as f64
                    };
                    self.nodes[node.index()].value = value;
                    for end in ends {
                        self.meet(end);
                    }
                }
            }
        }
        for &node in frontier {
            if self.node(node).count == 0 {
                self.bury(node);
            }
        }
        let prunes_solved = self.prunes_solved();
        for node in frontier {
            let node = &mut self.nodes[node.index()];
            if node.count == 0 && prunes_solved {
                // Nothing may follow, so no completion can be had here.
                node.value = f64::NEG_INFINITY;
            }
            node.evaluated = true;
            node.total = node.value;
        }
        Ok(true)
    }

    /// Notes that no completion can be had below a prefix, and below those above that have no other way.
    fn bury(&mut self, node: NodeId) {
        let mut at = Some(node);
        while let Some(node) = at {
            let children = &self.nodes[self.node(node).children()];
            if children.iter().any(|child| !child.dead) {
                break;
            }
            self.nodes[node.index()].dead = true;
            at = self.space.tree.parent(node);
        }
    }

    /// Makes nodes of a state's candidates.
    fn grow(&mut self, node: NodeId, expansion: &Expansion, i: usize) -> Result<(), SearchError> {
        let first = self.nodes.len();
        let zero = self.leaf.is_zero();
        for candidate in expansion.of(i) {
            let child = self.space.child(node, candidate)?;
            let terminal = self.space.end(child).is_some();
            let mut new = Node::new(candidate.logp, candidate.step, terminal);
            new.evaluated |= zero;
            new.reward = candidate.reward;
            self.nodes.push(new);
            if terminal {
                self.meet(child);
            }
        }
        let count = self.nodes.len() - first;
        let at = &mut self.nodes[node.index()];
        // The space has numbered them in 32 bits already.
        (at.first, at.count) = (first as u32, count as u32);
        at.expanded = true;
        // Where nothing may follow, all is known.
        at.solved = count == 0;
        // The lost mass of a prefix is lost to all above it, in proportion.
        let mut loss = (1.0 - expansion.mass(i)).max(0.0);
        let mut at = node;
        loop {
            self.nodes[at.index()].covered -= loss;
            loss *= self.nodes[at.index()].logp.exp();
            match self.space.tree.parent(at) {
                Some(parent) => at = parent,
                None => return Ok(()),
            }
        }
    }

    fn meet(&mut self, end: NodeId) {
        if self.space.end(end).is_none() {
            return;
        }
        let score = self.space.score(end);
        // Rollouts meet the same completion by several nodes.
        let same = |&(known, node): &(f64, NodeId)| {
            (known - score).abs() < 1e-9
                && self.space.tree.completion(node) == self.space.tree.completion(end)
        };
        if score > self.best.worst() && !self.best.scored().iter().any(same) {
            self.best.add(score, end);
        }
    }

    /// Counts a simulation and renews the values along its path, from the leaf up.
    fn back_up(&mut self, path: &[NodeId]) {
        // The mean's return: the leaf's value, and on the way up the scores passed.
        let leaf = path[path.len() - 1].index();
        let mut to_go = self.nodes[leaf].value;
        for (up, &id) in path.iter().rev().enumerate() {
            let at = id.index();
            self.nodes[at].visits += 1;
            match self.config.backup {
                Backup::Mean => {
                    let node = &mut self.nodes[at];
                    node.total = if node.visits == 1 {
                        to_go
                    } else {
                        node.total + to_go
                    };
                    node.value = node.total / f64::from(node.visits);
                    node.evaluated = true;
                    to_go += node.step;
                }
                Backup::Max | Backup::Soft => self.renew(at),
            }
            if up + 1 < path.len() {
                self.see(self.nodes[at].q());
            }
        }
        // Children are seen too, or the first choice would have nothing to compare.
        for child in self.nodes[leaf].children() {
            if self.nodes[child].evaluated {
                self.see(self.nodes[child].q());
            }
        }
    }

    fn see(&mut self, q: f64) {
        if !q.is_finite() {
            return;
        }
        self.range = Some(match self.range {
            None => (q, q),
            Some((low, high)) => (low.min(q), high.max(q)),
        });
    }

    /// The value of a node from its children's.
    fn renew(&mut self, at: usize) {
        let node = self.nodes[at];
        let children = &self.nodes[node.children()];
        // Whatever was not valued itself stands at the leaf value of its parent.
        let soft = |child: &Node| {
            child.logp
                + child.reward
                + if child.evaluated {
                    child.value
                } else {
                    node.total
                }
        };
        let mut solved = node.expanded;
        let (mut any, mut open, mut searched) = (false, false, false);
        let mut largest = f64::NEG_INFINITY;
        for child in children {
            solved &= child.solved;
            any |= child.evaluated;
            open |= !child.evaluated;
            searched |= child.expanded;
            if self.config.backup == Backup::Soft {
                largest = largest.max(soft(child));
            } else if child.evaluated {
                largest = largest.max(child.q());
            }
        }
        self.nodes[at].solved = solved;
        if self.config.backup == Backup::Max {
            // A rollout's score was reached; a guess holds until something below was looked at.
            let reached = matches!(self.leaf, Leaf::Rollouts(_));
            if open && (reached || !searched) {
                largest = largest.max(node.total);
            }
        }
        // Where nothing below was valued yet, the leaf value stays.
        if any {
            let children = &self.nodes[node.children()];
            let sum = || {
                let terms = children.iter().map(|child| (soft(child) - largest).exp());
                terms.sum::<f64>()
            };
            let is_soft = self.config.backup == Backup::Soft && largest.is_finite();
            self.nodes[at].value = largest + if is_soft { sum().ln() } else { 0.0 };
        }
    }

    /// The child to commit to.
    pub(super) fn decide(&self, root: NodeId) -> Option<NodeId> {
        if self.prunes_solved() {
            return self.best_child(root);
        }
        // Nothing is to be had behind a dead end, however often it was visited before that was known.
        let children = self.node(root).children().filter(|&c| !self.nodes[c].dead);
        let rank = |at: usize| (self.nodes[at].visits, self.nodes[at].q());
        let best = children.reduce(|a, b| {
            let ((visits_a, q_a), (visits_b, q_b)) = (rank(a), rank(b));
            if visits_b > visits_a || visits_b == visits_a && q_b > q_a {
                b
            } else {
                a
            }
        });
        best.map(|at| NodeId(at as u32))
    }

    pub(super) fn finish(mut self, committed: NodeId) -> SearchOutput {
        let whole = self.space.end(committed).is_some();
        let found = match self.config.commit {
            Commit::EachToken if whole => vec![committed],
            _ => self.best.nodes(),
        };
        // Nothing whole was met: the prefix committed to, or the most promising one below it.
        let found = if found.is_empty() {
            let mut at = committed;
            while let Some(next) = self.best_child(at) {
                at = next;
            }
            vec![at]
        } else {
            found
        };
        if self.prunes_solved() {
            // Simulations renewed values up to the prefix committed to, and not above.
            let above: Vec<NodeId> = self.space.tree.ancestors(committed).skip(1).collect();
            for node in above {
                self.renew(node.index());
            }
        }
        // The root's value bounds every completion only if every value below it does.
        let is_bound = self.config.backup == Backup::Max && self.is_best_first();
        let open = is_bound.then(|| self.nodes[0].value);
        self.space.stats.covered_mass = self.nodes[0].covered;
        let completions = found
            .iter()
            .map(|&node| self.space.completion(node))
            .collect();
        let bytes = self.nodes.capacity() * size_of::<Node>();
        let (nodes, n_nodes) = (std::mem::take(&mut self.nodes), self.space.tree.len());
        let seen = |node: NodeId| {
            let unused = Node::unused();
            let known = if node.index() < n_nodes {
                nodes.get(node.index())
            } else {
                None
            };
            let known = known.unwrap_or(&unused);
            Seen {
                visits: Some(known.visits as usize),
                q: known.evaluated.then(|| known.q()),
                value: known.evaluated.then_some(known.value),
                covered_mass: Some(known.covered),
            }
        };
        let path = found.first().copied();
        self.space.finish_with(completions, path, open, seen, bytes)
    }
}
