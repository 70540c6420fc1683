//! Processes to search, a brute force to compare with, and a model that keeps a search honest.

#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "each test program uses a part of it, and stops at the first surprise"
)]

use std::collections::HashSet;

use mdp_core::{Beta, LogpRows, MdpError, RewardPlacement, SoftSolution, TabularMdp};
use mdp_core::{TabularPolicy, TokenPolicy, Tree, solve};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use search::{NodeId, Policies, PrefixModel, PrefixTree, Request, Rows, Score, SearchError};

/// Identities between f64 sums of at most ten terms of order 10, over a beta of at least 0.1:
/// rounding is near 1e-13, and a wrong identity is off by order 1.
pub const IDENTITY: f64 = 1e-9;

/// A process, its exact solution, and a policy that is not optimal.
pub struct Case {
    pub mdp: TabularMdp,
    pub beta: Beta,
    pub solution: SoftSolution,
    pub optimum: TabularPolicy,
    pub policy: TabularPolicy,
}

impl Case {
    pub fn new((vocab, horizon): (usize, usize), beta: f64, seed: u64) -> Self {
        let eos = (seed % vocab as u64) as u32;
        let tree = Tree::new(vocab, horizon, eos).unwrap().with_prompt([0, 1]);
        let placement = if seed.is_multiple_of(2) {
            RewardPlacement::Dense
        } else {
            RewardPlacement::TerminalOnly
        };
        Self::of(
            TabularMdp::seeded(tree, placement, seed).unwrap(),
            beta,
            seed,
        )
    }

    pub fn of(mdp: TabularMdp, beta: f64, seed: u64) -> Self {
        let beta = Beta::new(beta).unwrap();
        let solution = solve(&mdp, beta).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xA5A5);
        Self {
            optimum: solution.optimal_policy(),
            policy: TabularPolicy::random(mdp.tree().clone(), 1.0, &mut rng).unwrap(),
            mdp,
            beta,
            solution,
        }
    }

    pub fn tree(&self) -> &Tree {
        self.mdp.tree()
    }

    pub fn request(&self, score: Score) -> Request<'static> {
        Request {
            score,
            beta: self.beta,
            ..Request::of(self.tree())
        }
    }

    pub fn model<'a>(&'a self, policy: &'a TabularPolicy) -> Policies<'a> {
        Policies::new(policy).with_reference(self.mdp.reference())
    }

    /// The score of every pair's prefix, in nats.
    pub fn path_scores(&self, policy: &TabularPolicy, score: Score) -> Vec<f64> {
        let reference = self.mdp.reference().logps();
        let weight = match score {
            Score::Likelihood => 0.0,
            Score::LogRatio => 1.0,
            Score::Mix { reference } => reference,
        };
        let steps = policy.logps().iter().zip(reference);
        let steps: Vec<f64> = steps
            .map(|(logp, reference)| logp - weight * reference)
            .collect();
        self.tree().path_sums(&steps)
    }

    /// The best completion by brute force, and its score in nats.
    pub fn brute_force(&self, policy: &TabularPolicy, score: Score) -> (Vec<u32>, f64) {
        let scores = self.path_scores(policy, score);
        let best = |a: usize, b: usize| if scores[b] > scores[a] { b } else { a };
        let pair = self.tree().completions().reduce(best).unwrap();
        (self.tree().pair_tokens(pair), scores[pair])
    }
}

/// Small shapes with a few to a few thousand completions.
pub const SHAPES: [(usize, usize); 6] = [(2, 5), (3, 3), (3, 5), (4, 3), (4, 4), (5, 4)];

/// Checks what a search promises to a model that keeps caches: parents first, nothing twice,
/// nothing that was given up by `retain`; and holds exactly the caches that the promise leaves.
pub struct Honest<M> {
    pub inner: M,
    /// Prefixes whose caches are held.
    cached: HashSet<NodeId>,
    asked: HashSet<NodeId>,
    pub begun: usize,
    pub most_cached: usize,
}

impl<M> Honest<M> {
    pub fn new(inner: M) -> Self {
        Self {
            inner,
            cached: HashSet::new(),
            asked: HashSet::new(),
            begun: 0,
            most_cached: 0,
        }
    }
}

impl<M: PrefixModel> PrefixModel for Honest<M> {
    fn vocab(&self) -> usize {
        self.inner.vocab()
    }

    fn has_reference(&self) -> bool {
        self.inner.has_reference()
    }

    fn has_rewards(&self) -> bool {
        self.inner.has_rewards()
    }

    fn begin(&mut self, prompt: &[u32], max_new_tokens: usize) -> Result<(), SearchError> {
        self.cached.clear();
        self.asked.clear();
        self.begun += 1;
        self.inner.begin(prompt, max_new_tokens)
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        assert_eq!(self.begun, 1, "a search begins once");
        assert!(!frontier.is_empty());
        for &node in frontier {
            assert!(self.asked.insert(node), "{node:?} is asked for twice");
            if let Some(parent) = prefixes.parent(node) {
                assert!(
                    self.cached.contains(&parent),
                    "the cache of {node:?}'s parent is gone"
                );
            }
        }
        self.cached.extend(frontier);
        self.most_cached = self.most_cached.max(self.cached.len());
        let rows = self.inner.expand(prefixes, frontier, top_k)?;
        // Whoever asked for the likeliest gets no more than that.
        let (Some(k), true) = (top_k, rows.is_full() && !self.inner.has_reference()) else {
            return Ok(rows);
        };
        let cut: Vec<Vec<(u32, f64)>> = (0..rows.len())
            .map(|i| {
                let row = rows.row(i).logps;
                let mut row: Vec<(u32, f64)> = (0..).zip(row.iter().copied()).collect();
                row.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                row.truncate(k);
                row
            })
            .collect();
        Ok(Rows::top(&cut))
    }

    fn retain(&mut self, prefixes: &PrefixTree, live: &[NodeId]) {
        let live: HashSet<NodeId> = live.iter().copied().collect();
        let parents: HashSet<NodeId> = live.iter().filter_map(|&n| prefixes.parent(n)).collect();
        // What is at or below a live prefix, and what a live prefix itself continues.
        self.cached.retain(|&node| {
            parents.contains(&node) || prefixes.ancestors(node).any(|at| live.contains(&at))
        });
        self.inner.retain(prefixes, &[]);
    }
}

/// A policy that says the same at every state, at any depth.
#[derive(Clone, Debug)]
pub struct Constant(pub Vec<f64>);

impl Constant {
    pub fn of(probs: &[f64]) -> Self {
        Self(probs.iter().map(|p| p.ln()).collect())
    }
}

impl TokenPolicy for Constant {
    fn vocab(&self) -> usize {
        self.0.len()
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        LogpRows::new(self.0.len(), self.0.repeat(states.len()))
    }
}

#[track_caller]
pub fn assert_close(x: f64, y: f64, tolerance: f64) {
    assert!(
        (x - y).abs() <= tolerance,
        "{x} and {y} differ by {:e}",
        (x - y).abs()
    );
}
