//! Tokens that the environment appends: averaged over, never rewarded, and what that costs.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{BETAS, Case, IDENTITY, assert_all_close, assert_close, distance};
use mdp_core::{
    PairTable, RewardPlacement, TabularMdp, TabularPolicy, Tree, bellman_residuals, bradley_terry,
    completion_logps, conservative_objectives, dpo_loss, evaluate, implicit_return,
    implicit_rewards, margin_loss, mean_implicit_return, sample_completion, trajectory_kls,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Two policy tokens, then one of the environment, then one of the policy.
fn case(beta: f64, seed: u64) -> Case {
    let tree = Tree::new(3, 4, 2).unwrap();
    let mdp = TabularMdp::seeded(tree, RewardPlacement::Dense, seed)
        .unwrap()
        .with_environment(|tokens| (tokens.len() == 2).then(|| vec![0.5, 0.3, 0.2]))
        .unwrap();
    Case::of(mdp, beta, seed)
}

fn cases() -> impl Iterator<Item = Case> {
    (0..20).map(|seed| case(BETAS[seed % 4], seed as u64))
}

#[test]
fn soft_values_average_over_the_environment() {
    // By hand: after token 0 the environment pays 1 with probability 1/4; β = 1.
    let mdp: TabularMdp = "
        vocab = 2
        horizon = 2
        eos = 1
        [[state]]
        tokens = [0]
        environment = [0.25, 0.75]
        rewards = [1.0, 0.0]
    "
    .parse()
    .unwrap();
    let case = Case::of(mdp, 1.0, 0);
    let after = 0.25;
    assert_close(case.solution.soft_values()[1], after, IDENTITY);
    let root = (0.5 * f64::exp(after) + 0.5).ln();
    assert_close(case.root_value(), root, IDENTITY);
}

#[test]
fn the_solution_is_the_best_policy_and_its_soft_value() {
    for case in cases() {
        let worth = evaluate(&case.mdp, &case.optimum, case.strength()).unwrap();
        assert_all_close(&worth.soft_values, case.solution.soft_values(), IDENTITY);
        let other = evaluate(&case.mdp, &case.policy, case.strength()).unwrap();
        for (state, value) in other.soft_values.iter().enumerate() {
            assert!(*value <= case.solution.soft_values()[state] + IDENTITY);
        }
        assert!(other.soft_values[0] < case.root_value() - 1e-4);
    }
}

#[test]
fn the_environments_tokens_have_no_implicit_reward_whatever_the_policy_says_there() {
    for case in cases() {
        assert!(case.mdp.has_environment());
        let rewards = implicit_rewards(&case.mdp, &case.policy, case.strength()).unwrap();
        let residuals = bellman_residuals(&case.solution, &case.policy).unwrap();
        for state in 0..case.tree().n_states() {
            if case.mdp.is_environment(state) {
                let row = case.tree().row(state);
                assert!(
                    rewards[row.clone()]
                        .iter()
                        .all(|r| r.abs() < f64::MIN_POSITIVE)
                );
                assert!(residuals[row].iter().all(|r| r.abs() < f64::MIN_POSITIVE));
                // The random policy does say something else.
                assert!(distance(case.policy.row(state), case.optimum.row(state)) > 1e-6);
            }
        }
        let acting = case.mdp.acting(&case.policy).unwrap();
        let beta = case.strength();
        assert_eq!(
            evaluate(&case.mdp, &acting, beta).unwrap(),
            evaluate(&case.mdp, &case.policy, beta).unwrap()
        );
        let returns = |policy| implicit_return(&case.mdp, policy, beta, &[0, 1, 0, 2]).unwrap();
        assert_eq!(returns(&acting), returns(&case.policy));
    }
}

#[test]
fn divergences_and_probabilities_count_each_side_once() {
    for case in cases() {
        let logps = completion_logps(&case.mdp, &case.policy).unwrap();
        let total: f64 = logps.iter().map(|x| x.exp()).sum();
        assert_close(total, 1.0, IDENTITY);
        let reference = completion_logps(&case.mdp, case.mdp.reference()).unwrap();
        let kl: f64 = reference
            .iter()
            .zip(&logps)
            .map(|(p, q)| p.exp() * (p - q))
            .sum();
        let kls = trajectory_kls(&case.mdp, case.mdp.reference(), &case.policy).unwrap();
        assert_close(kls[0], kl, IDENTITY);
        let mean = mean_implicit_return(
            &case.mdp,
            &case.policy,
            case.mdp.reference(),
            case.strength(),
        );
        assert_close(mean.unwrap(), -case.beta * kl, IDENTITY);
    }
}

/// P4 with an environment: its luck `r + V(s') - V(s)` is the missing term, and it is why a pair of
/// completions with different draws is not labelled as equation 8 says.
#[test]
fn returns_are_implicit_returns_plus_the_environments_luck() {
    for case in cases() {
        let tree = case.tree();
        let luck: Vec<f64> = (0..tree.n_pairs())
            .map(|pair| {
                let state = pair / tree.vocab();
                if case.mdp.is_environment(state) {
                    case.mdp.rewards()[pair] + case.solution.next_soft_value(pair)
                        - case.solution.soft_values()[state]
                } else {
                    0.0
                }
            })
            .collect();
        let luck = tree.path_sums(&luck);
        let returns = tree.path_sums(case.mdp.rewards());
        let implicit = implicit_rewards(&case.mdp, &case.optimum, case.strength()).unwrap();
        let implicit = tree.path_sums(&implicit);
        let mut worst: f64 = 0.0;
        let completions: Vec<usize> = tree.completions().collect();
        for &i in &completions {
            let expected = case.root_value() + implicit[i] + luck[i];
            assert_close(returns[i], expected, IDENTITY);
            for &j in &completions {
                let truth = bradley_terry(returns[i], returns[j]);
                worst = worst.max((truth - bradley_terry(implicit[i], implicit[j])).abs());
                let corrected = bradley_terry(implicit[i] + luck[i], implicit[j] + luck[j]);
                assert_close(truth, corrected, IDENTITY);
            }
        }
        assert!(worst > 0.01, "labels without the luck are off by {worst}");
        // The same luck closes S1.
        let logps = case.optimum.logps().iter().enumerate();
        let own: Vec<f64> = logps
            .map(|(pair, l)| {
                if case.mdp.is_environment(pair / tree.vocab()) {
                    0.0
                } else {
                    *l
                }
            })
            .collect();
        let own = tree.path_sums(&own);
        for (pair, objective) in conservative_objectives(&case.solution).iter().enumerate() {
            let expected = case.root_value() + case.beta * own[pair] + luck[pair];
            assert_close(*objective, expected, IDENTITY);
        }
    }
}

#[test]
fn no_gradient_reaches_the_environments_rows() {
    let case = case(0.5, 3);
    let pairs = PairTable::population(&case.mdp, case.mdp.reference()).unwrap();
    let logits = case.policy.logps();
    let result = margin_loss(&case.mdp, &pairs, case.strength(), logits, dpo_loss).unwrap();
    for state in 0..case.tree().n_states() {
        let row = &result.gradient[case.tree().row(state)];
        let moved = row.iter().any(|g| g.abs() > 1e-12);
        assert_eq!(moved, !case.mdp.is_environment(state));
    }
}

#[test]
fn samples_follow_the_environment_and_not_the_policys_row() {
    let case = case(0.5, 3);
    // A policy that would always end where the environment moves.
    let never = TabularPolicy::from_logits(
        case.tree().clone(),
        (0..case.tree().n_pairs())
            .map(|pair| {
                let environment = case.mdp.is_environment(pair / 3);
                if environment && pair % 3 != 2 {
                    -700.0
                } else {
                    0.0
                }
            })
            .collect(),
    )
    .unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut reached, mut ended) = (0, 0);
    for _ in 0..4000 {
        let pair = sample_completion(&case.mdp, &never, &mut rng).unwrap();
        let tokens = case.tree().pair_tokens(pair);
        if tokens.len() >= 3 {
            reached += 1;
            ended += usize::from(tokens[2] == 2);
        }
    }
    // Binomial with p = 0.2 and about 1800 draws: standard deviation 0.0094.
    let share = f64::from(ended as u32) / f64::from(reached as u32);
    assert!((share - 0.2).abs() < 0.05, "{share}");
}
