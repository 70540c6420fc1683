//! Every readout of f32 logits against the exact solution of enumerated processes in f64.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use implicit_reward::{
    Beta, TokenReadout, bellman_residuals, read_rows, running_sums, soft_value_differences,
    value_differences,
};
use mdp_core::{
    KlForm, MaxEntForm, RewardPlacement, SoftSolution, TabularMdp, TabularPolicy, Tree,
    implicit_return, implicit_rewards, solve, state_kls,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Logits of a model are f32 and f32 has seven digits; values here are of size one to sixty.
const TOLERANCE: f64 = 1e-5;
/// The same at the optimum, whose logits are known to the last bit of f32.
const AT_THE_OPTIMUM: f64 = 1e-6;

/// Processes, dense and terminal-only, with their solutions.
fn solved() -> Vec<SoftSolution> {
    let mut solved = Vec::new();
    for (vocab, horizon) in [(2, 5), (3, 4), (4, 3)] {
        for placement in [RewardPlacement::Dense, RewardPlacement::TerminalOnly] {
            for (seed, beta) in [(1, 0.1), (2, 0.5), (3, 1.0)] {
                let tree = Tree::new(vocab, horizon, 1).unwrap();
                let mdp = TabularMdp::seeded(tree, placement, seed).unwrap();
                solved.push(solve(&mdp, Beta::new(beta).unwrap()).unwrap());
            }
        }
    }
    solved
}

/// A policy that is nobody's optimum here.
fn another(mdp: &TabularMdp) -> TabularPolicy {
    let mut rng = ChaCha8Rng::seed_from_u64(99);
    TabularPolicy::random(mdp.tree().clone(), 1.5, &mut rng).unwrap()
}

/// A table of logps as the logits of a model: moved by another constant in each row, in f32.
fn logits(policy: &TabularPolicy, pairs: &[usize], constant: f64) -> Vec<f32> {
    let vocab = policy.tree().vocab();
    let rows = pairs.iter().enumerate().map(|(row, pair)| {
        let logps = policy.row(pair / vocab).iter();
        logps.map(move |logp| (logp + constant * row as f64) as f32)
    });
    rows.flatten().collect()
}

/// What is read at the given pairs of state and token, with all candidates.
fn read(mdp: &TabularMdp, policy: &TabularPolicy, pairs: &[usize]) -> Vec<TokenReadout> {
    let vocab = mdp.tree().vocab();
    let targets: Vec<u32> = pairs.iter().map(|pair| (pair % vocab) as u32).collect();
    let policy = logits(policy, pairs, 0.0);
    let reference = logits(mdp.reference(), pairs, 0.0);
    read_rows(&policy, &reference, &targets, vocab).unwrap()
}

fn all_pairs(mdp: &TabularMdp) -> Vec<usize> {
    (0..mdp.tree().n_pairs()).collect()
}

fn assert_close(got: f64, expected: f64, tolerance: f64, what: &str) {
    assert!(
        (got - expected).abs() < tolerance,
        "{what}: {got} {expected}"
    );
}

#[test]
fn rewards_and_advantages_are_the_oracles_for_any_policy() {
    for solution in solved() {
        let (mdp, beta) = (solution.mdp(), solution.beta());
        let pairs = all_pairs(mdp);
        for policy in [another(mdp), solution.optimal_policy()] {
            let expected = implicit_rewards(mdp, &policy, beta).unwrap();
            // Action values of which this policy is the softmax: those of its implicit reward.
            let own = solve(&mdp.with_rewards(expected.clone()).unwrap(), beta).unwrap();
            let kl = KlForm::new(mdp, beta, own.kl_form().action_values().to_vec()).unwrap();
            let values = own.max_ent_form().action_values().to_vec();
            let max_ent = MaxEntForm::new(mdp, beta, values).unwrap();
            let (kl, max_ent) = (kl.advantages(), max_ent.advantages());
            for (&pair, readout) in pairs.iter().zip(read(mdp, &policy, &pairs)) {
                let reward = readout.implicit_reward(beta);
                assert_close(reward, expected[pair], TOLERANCE, "reward");
                assert_close(reward, kl[pair], TOLERANCE, "advantage, KL form");
                let max_ent_advantage = readout.max_ent_advantage(beta);
                assert_close(max_ent_advantage, max_ent[pair], TOLERANCE, "MaxEnt form");
            }
        }
    }
}

#[test]
fn the_optimums_implicit_reward_is_reward_plus_change_of_value() {
    for solution in solved() {
        let (mdp, beta) = (solution.mdp(), solution.beta());
        let optimum = solution.optimal_policy();
        let pairs = all_pairs(mdp);
        for (&pair, readout) in pairs.iter().zip(read(mdp, &optimum, &pairs)) {
            let state = pair / mdp.tree().vocab();
            let expected = mdp.rewards()[pair] + solution.next_soft_value(pair)
                - solution.soft_values()[state];
            let reward = readout.implicit_reward(beta);
            assert_close(reward, expected, AT_THE_OPTIMUM, "equation 10");
        }
    }
}

#[test]
fn candidates_differ_as_the_exact_action_values_do() {
    for solution in solved() {
        let (mdp, beta) = (solution.mdp(), solution.beta());
        let vocab = mdp.tree().vocab();
        let (kl, max_ent) = (solution.kl_form(), solution.max_ent_form());
        let firsts: Vec<usize> = (0..mdp.tree().n_states()).map(|s| s * vocab).collect();
        let optimum = solution.optimal_policy();
        for (state, readout) in read(mdp, &optimum, &firsts).iter().enumerate() {
            assert_eq!(readout.candidates.len(), vocab);
            let value = solution.soft_values()[state];
            for candidate in &readout.candidates {
                let pair = state * vocab + candidate.id as usize;
                let expected = kl.action_values()[pair] - value;
                assert_close(candidate.advantage(beta), expected, TOLERANCE, "Q - V");
                let expected = max_ent.action_values()[pair] - value;
                let got = candidate.max_ent_advantage(beta);
                assert_close(got, expected, TOLERANCE, "Q - V, MaxEnt");
            }
            let sorted = readout.candidates.windows(2);
            assert!(
                sorted
                    .into_iter()
                    .all(|c| c[0].policy_logp >= c[1].policy_logp)
            );
        }
    }
}

#[test]
fn divergences_and_entropies_are_the_oracles() {
    for solution in solved() {
        let mdp = solution.mdp();
        let policy = another(mdp);
        let forward = state_kls(mdp, &policy, mdp.reference()).unwrap();
        let backward = state_kls(mdp, mdp.reference(), &policy).unwrap();
        let firsts: Vec<usize> = (0..mdp.tree().n_states())
            .map(|s| s * mdp.tree().vocab())
            .collect();
        let entropy = |row: &[f64]| -> f64 { row.iter().map(|logp| -logp * logp.exp()).sum() };
        for (state, readout) in read(mdp, &policy, &firsts).iter().enumerate() {
            assert_close(
                readout.policy_kl,
                forward[state],
                TOLERANCE,
                "KL of the policy",
            );
            assert_close(
                readout.reference_kl,
                backward[state],
                TOLERANCE,
                "KL of the reference",
            );
            let expected = entropy(policy.row(state));
            assert_close(readout.policy_entropy, expected, TOLERANCE, "entropy");
            let expected = entropy(mdp.reference().row(state));
            assert_close(readout.reference_entropy, expected, TOLERANCE, "entropy");
        }
    }
}

#[test]
fn along_every_completion_sums_values_and_residuals_are_the_oracles() {
    for solution in solved() {
        let (mdp, beta) = (solution.mdp(), solution.beta());
        let tree = mdp.tree();
        let optimum = solution.optimal_policy();
        let policy = another(mdp);
        let exact = mdp_core::bellman_residuals(&solution, &policy).unwrap();
        for last in tree.completions() {
            let path = tree.path(last);
            let true_rewards: Vec<f64> = path.iter().map(|&pair| mdp.rewards()[pair]).collect();
            let mut values: Vec<f64> = path
                .iter()
                .map(|&pair| solution.soft_values()[pair / tree.vocab()])
                .collect();
            values.push(0.0);
            let rewards = |policy: &TabularPolicy| -> Vec<f64> {
                let readouts = read(mdp, policy, &path);
                readouts
                    .iter()
                    .map(|token| token.implicit_reward(beta))
                    .collect()
            };

            // At the optimum: the only identified form of the value, and the value itself where
            // the true reward is known.
            let learned = rewards(&optimum);
            let differences = value_differences(&learned);
            let alone = soft_value_differences(&learned, &true_rewards);
            let mut earned = 0.0;
            for t in 0..=path.len() {
                let expected = values[t] - values[0] + earned;
                assert_close(differences[t], expected, TOLERANCE, "V - V(s_0) + rewards");
                assert_close(alone[t], values[t] - values[0], TOLERANCE, "V - V(s_0)");
                earned += true_rewards.get(t).unwrap_or(&0.0);
            }

            // Of any policy: the return, and how far each token is from the optimum.
            let learned = rewards(&policy);
            let completion = tree.pair_tokens(last);
            let expected = implicit_return(mdp, &policy, beta, &completion).unwrap();
            let total = running_sums(&learned)[path.len() - 1];
            assert_close(total, expected.value(), TOLERANCE, "implicit return");
            let residuals = bellman_residuals(&learned, &true_rewards, &values);
            for (&pair, residual) in path.iter().zip(residuals) {
                assert_close(residual, exact[pair], TOLERANCE, "Bellman residual");
            }
        }
    }
}

#[test]
fn a_constant_added_to_a_row_of_logits_changes_nothing() {
    let solution = &solved()[0];
    let (mdp, policy) = (solution.mdp(), another(solution.mdp()));
    let pairs: Vec<usize> = all_pairs(mdp).into_iter().take(12).collect();
    let vocab = mdp.tree().vocab();
    let targets: Vec<u32> = pairs.iter().map(|pair| (pair % vocab) as u32).collect();
    let reference = logits(mdp.reference(), &pairs, -0.7);
    let moved = read_rows(&logits(&policy, &pairs, 1.3), &reference, &targets, vocab).unwrap();
    for (moved, plain) in moved.iter().zip(read(mdp, &policy, &pairs)) {
        assert_close(moved.policy_logp, plain.policy_logp, TOLERANCE, "policy");
        assert_close(
            moved.reference_logp,
            plain.reference_logp,
            TOLERANCE,
            "reference",
        );
        assert_close(moved.policy_kl, plain.policy_kl, TOLERANCE, "KL");
    }
}
