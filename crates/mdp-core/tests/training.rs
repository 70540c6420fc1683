//! Tabular DPO by gradient: to the exact optimum on the population, and towards it with more labels.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Case, policy_distance};
use mdp_core::{
    Adam, PairTable, RewardPlacement, TabularPolicy, bellman_residuals, dpo_loss, mean_path_error,
    minimise_margin_loss,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What a gradient method is held to, in probability.
const TRAINED: f64 = 1e-3;

#[test]
fn population_dpo_reaches_the_optimum_from_twenty_random_starts() {
    let case = Case::new((3, 3, 2), RewardPlacement::Dense, 0.5, 4);
    let pairs = PairTable::population(&case.mdp, case.mdp.reference()).unwrap();
    for seed in 0..20 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let start = TabularPolicy::random(case.tree().clone(), 1.5, &mut rng).unwrap();
        assert!(policy_distance(&start, &case.optimum) > 0.1);
        let trained = minimise_margin_loss(
            &case.mdp,
            &pairs,
            case.strength(),
            start.logps(),
            Adam::default(),
            dpo_loss,
        )
        .unwrap();
        let error = policy_distance(&trained, &case.optimum);
        assert!(error < TRAINED, "start {seed}: error {error:e}");
    }
}

#[test]
fn error_falls_with_the_number_of_sampled_labels() {
    let case = Case::new((3, 3, 2), RewardPlacement::Dense, 0.5, 4);
    let error = |n_pairs: usize| {
        let mut squares = 0.0;
        for seed in 0..4 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let sampler = case.mdp.reference();
            let pairs = PairTable::sample(&case.mdp, sampler, n_pairs, &mut rng).unwrap();
            let start = sampler.logps();
            let adam = Adam {
                steps: 2000,
                ..Adam::default()
            };
            let beta = case.strength();
            let trained =
                minimise_margin_loss(&case.mdp, &pairs, beta, start, adam, dpo_loss).unwrap();
            squares += policy_distance(&trained, &case.optimum).powi(2);
            // What is left is the policy's own optimism, in reward units.
            let optimism = mean_path_error(&case.solution, &trained, &trained, 3).unwrap();
            assert!(optimism > 0.0);
            assert!(bellman_residuals(&case.solution, &trained).is_ok());
        }
        (squares / 4.0).sqrt()
    };
    let (few, many) = (error(1_000), error(100_000));
    // The rate of independent labels is a root: 10 between the two. Half of that is required.
    assert!(few / many > 5.0, "{few:e} to {many:e}");
}
