//! Random processes that the theorems are held against.

#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "each test program uses a part of it, and stops at the first surprise"
)]

use mdp_core::{
    Beta, RewardPlacement, SoftSolution, TabularMdp, TabularPolicy, Tree, completion_logps,
    implicit_rewards, solve,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Identities between f64 computations: sums of at most ten terms of order 10 in reward units,
/// divided by a beta of at least 0.1. Rounding is near 1e-13; a wrong identity is off by order 1.
pub const IDENTITY: f64 = 1e-9;

/// The strengths that every theorem is tried at.
pub const BETAS: [f64; 4] = [0.1, 0.5, 1.0, 3.0];

/// A process, its exact solution, and a policy that is not optimal.
pub struct Case {
    pub mdp: TabularMdp,
    pub beta: f64,
    pub solution: SoftSolution,
    pub optimum: TabularPolicy,
    pub policy: TabularPolicy,
    pub seed: u64,
}

impl Case {
    pub fn new(
        (vocab, horizon, eos): (usize, usize, u32),
        placement: RewardPlacement,
        beta: f64,
        seed: u64,
    ) -> Self {
        let tree = Tree::new(vocab, horizon, eos).unwrap();
        let mdp = TabularMdp::seeded(tree, placement, seed).unwrap();
        Self::of(mdp, beta, seed)
    }

    pub fn of(mdp: TabularMdp, beta: f64, seed: u64) -> Self {
        let solution = solve(&mdp, Beta::new(beta).unwrap()).unwrap();
        let optimum = solution.optimal_policy();
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xA5A5);
        let policy = TabularPolicy::random(mdp.tree().clone(), 1.0, &mut rng).unwrap();
        Self {
            mdp,
            beta,
            solution,
            optimum,
            policy,
            seed,
        }
    }

    pub fn tree(&self) -> &Tree {
        self.mdp.tree()
    }

    pub fn strength(&self) -> Beta {
        self.solution.beta()
    }

    pub fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.seed ^ 0x5A5A)
    }

    /// V of the prompt.
    pub fn root_value(&self) -> f64 {
        self.solution.soft_values()[0]
    }

    /// Implicit returns of every completion under `policy`.
    pub fn implicit_returns(&self, policy: &TabularPolicy) -> Vec<f64> {
        let rewards = implicit_rewards(&self.mdp, policy, self.strength()).unwrap();
        let sums = self.tree().path_sums(&rewards);
        self.tree().completions().map(|pair| sums[pair]).collect()
    }

    pub fn completion_logps(&self, policy: &TabularPolicy) -> Vec<f64> {
        completion_logps(&self.mdp, policy).unwrap()
    }
}

/// Every shape with V <= 4 and H <= 5, every EOS in turn, both placements, all four betas.
pub fn for_each_case(check: impl Fn(&Case)) {
    let mut seed = 0;
    for vocab in 2..=4 {
        for horizon in 1..=5 {
            for placement in [RewardPlacement::Dense, RewardPlacement::TerminalOnly] {
                for beta in BETAS {
                    seed += 1;
                    let eos = (seed % vocab as u64) as u32;
                    check(&Case::new((vocab, horizon, eos), placement, beta, seed));
                }
            }
        }
    }
    assert_eq!(seed, 120, "every combination was tried");
}

#[track_caller]
pub fn assert_close(x: f64, y: f64, tolerance: f64) {
    assert!(
        (x - y).abs() <= tolerance,
        "{x} and {y} differ by {:e}",
        (x - y).abs()
    );
}

#[track_caller]
pub fn assert_all_close(x: &[f64], y: &[f64], tolerance: f64) {
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter().zip(y) {
        assert_close(*x, *y, tolerance);
    }
}

/// The largest difference of two tables.
pub fn distance(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    x.iter()
        .zip(y)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f64::max)
}

/// The largest difference of two policies, in probability.
pub fn policy_distance(a: &TabularPolicy, b: &TabularPolicy) -> f64 {
    let probs = |p: &TabularPolicy| p.logps().iter().map(|x| x.exp()).collect::<Vec<_>>();
    distance(&probs(a), &probs(b))
}
