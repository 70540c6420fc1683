//! The identities S1 to S8 of planning against likelihood search, and shaping's invariance.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Case, IDENTITY, assert_all_close, assert_close, for_each_case};
use mdp_core::{
    Potential, RewardPlacement, bellman_residuals, conservative_objective, conservative_objectives,
    implicit_rewards, max_backup, mean_path_error, path_error, reward_objective, shape,
    soft_backup, solve,
};
use proptest::prelude::*;
use rand::RngExt;

/// S1: `G(p) = V(s_0) + β Σ log π*` for every prefix, of any length.
fn conservative_objective_is_likelihood(case: &Case) {
    let logps = case.tree().path_sums(case.optimum.logps());
    for (objective, logp) in conservative_objectives(&case.solution).iter().zip(&logps) {
        assert_close(*objective, case.root_value() + case.beta * logp, IDENTITY);
    }
    assert_close(
        conservative_objective(&case.solution, &[]).unwrap(),
        case.root_value(),
        IDENTITY,
    );
}

/// S2: `J(p) = V(s_0) + β (Σ log π* - Σ log π_ref)`.
fn reward_objective_is_the_log_ratio(case: &Case) {
    let logps = case.tree().path_sums(case.optimum.logps());
    let reference = case.tree().path_sums(case.mdp.reference().logps());
    for pair in 0..case.tree().n_pairs() {
        let tokens = case.tree().pair_tokens(pair);
        let logratio = logps[pair] - reference[pair];
        let expected = case.root_value() + case.beta * logratio;
        let objective = reward_objective(&case.solution, &tokens).unwrap();
        assert_close(objective, expected, IDENTITY);
        let conservative = conservative_objective(&case.solution, &tokens).unwrap();
        assert_close(
            conservative - objective,
            case.beta * reference[pair],
            IDENTITY,
        );
    }
    // Over completions the implicit return therefore ranks as the true one does.
    let (returns, implicit) = (case.mdp.returns(), case.implicit_returns(&case.optimum));
    let best = |x: &[f64]| (0..x.len()).max_by(|&i, &j| x[i].total_cmp(&x[j])).unwrap();
    assert_eq!(best(&returns), best(&implicit));
}

/// S3: the soft backup of any frontier is `V(s_0)`: K-prefixes and random cuts alike.
fn soft_backup_changes_nothing(case: &Case) {
    for depth in 1..=case.tree().horizon() {
        let frontier: Vec<usize> = case.tree().prefixes(depth).collect();
        let value = soft_backup(&case.solution, &frontier);
        assert_close(value, case.root_value(), IDENTITY);
        // The policy that the backup induces at the root is the optimal one.
        for root in case.tree().row(0) {
            let through: Vec<usize> = frontier
                .iter()
                .copied()
                .filter(|&pair| case.tree().path(pair)[0] == root)
                .collect();
            let share = (soft_backup(&case.solution, &through) - value) / case.beta;
            assert_close(share, case.optimum.logps()[root], IDENTITY);
        }
    }
    let mut rng = case.rng();
    let mut frontier: Vec<usize> = case.tree().row(0).collect();
    for _ in 0..30 {
        let at = rng.random_range(0..frontier.len());
        if let Some(state) = case.tree().child(frontier[at]) {
            frontier.swap_remove(at);
            frontier.extend(case.tree().row(state));
        }
        let value = soft_backup(&case.solution, &frontier);
        assert_close(value, case.root_value(), IDENTITY);
    }
}

/// S4: the max backup is `V(s_0) + β max log π*`, never above `V(s_0)`; deepest, it is the MAP.
fn max_backup_is_the_likeliest_prefix(case: &Case) {
    let logps = case.tree().path_sums(case.optimum.logps());
    for depth in 1..=case.tree().horizon() {
        let (value, tokens) = max_backup(&case.solution, depth);
        let best = case
            .tree()
            .prefixes(depth)
            .map(|pair| logps[pair])
            .fold(f64::NEG_INFINITY, f64::max);
        assert_close(value, case.root_value() + case.beta * best, IDENTITY);
        assert!(value <= case.root_value() + IDENTITY);
        let pair = *case.tree().path_of(&tokens).unwrap().last().unwrap();
        assert_close(logps[pair], best, IDENTITY);
    }
    assert!(
        case.tree()
            .completion(&max_backup(&case.solution, 99).1)
            .is_ok()
    );
}

/// S5: mean backups are off by the entropy and by the divergence.
fn mean_backup_is_off_by_entropy_and_divergence(case: &Case) {
    let (kl_form, max_ent_form) = (case.solution.kl_form(), case.solution.max_ent_form());
    for (state, value) in case.solution.soft_values().iter().enumerate() {
        let row = case.tree().row(state);
        let optimum = &case.optimum.logps()[row.clone()];
        let reference = &case.mdp.reference().logps()[row.clone()];
        let mean = |x: &[f64]| -> f64 { optimum.iter().zip(x).map(|(l, x)| l.exp() * x).sum() };
        let entropy = -mean(optimum);
        let divergence = -entropy - mean(reference);
        let q = mean(&max_ent_form.action_values()[row.clone()]);
        assert_close(q, value - case.beta * entropy, IDENTITY);
        let q = mean(&kl_form.action_values()[row]);
        assert_close(q, value + case.beta * divergence, IDENTITY);
    }
}

/// S6: with depth the best likelihood falls and the best implicit reward rises, for any policy.
fn likelihood_falls_and_reward_rises_with_depth(case: &Case) {
    for policy in [&case.policy, &case.optimum] {
        let logps = case.tree().path_sums(policy.logps());
        let rewards = implicit_rewards(&case.mdp, policy, case.strength()).unwrap();
        let rewards = case.tree().path_sums(&rewards);
        let (mut logp_before, mut reward_before) = (0.0, 0.0);
        for depth in 1..=case.tree().horizon() {
            let best = |table: &[f64]| {
                case.tree()
                    .prefixes(depth)
                    .map(|pair| table[pair])
                    .fold(f64::NEG_INFINITY, f64::max)
            };
            let (logp, reward) = (best(&logps), best(&rewards));
            assert!(logp <= logp_before + IDENTITY);
            assert!(reward >= reward_before - IDENTITY);
            (logp_before, reward_before) = (logp, reward);
        }
    }
}

/// S7: a policy is optimal for its own reward, residuals are `β log(π/π*)`, and their means are
/// divergences that grow with depth.
fn residuals_are_log_ratios_to_the_optimum(case: &Case) {
    let rewards = implicit_rewards(&case.mdp, &case.policy, case.strength()).unwrap();
    let own = case.mdp.with_rewards(rewards).unwrap();
    let own = Case::of(own, case.beta, case.seed);
    conservative_objective_is_likelihood(&own);
    soft_backup_changes_nothing(&own);
    // Judged by its own reward no policy has a residual: such an audit is empty.
    let vacuous = bellman_residuals(&own.solution, &case.policy).unwrap();
    assert!(vacuous.iter().all(|x| x.abs() < IDENTITY));

    let residuals = bellman_residuals(&case.solution, &case.policy).unwrap();
    let expected: Vec<f64> = case
        .policy
        .logps()
        .iter()
        .zip(case.optimum.logps())
        .map(|(policy, optimum)| case.beta * (policy - optimum))
        .collect();
    assert_all_close(&residuals, &expected, IDENTITY);

    let sums = case.tree().path_sums(&residuals);
    for pair in (0..sums.len()).step_by((sums.len() / 20).max(1)) {
        let tokens = case.tree().pair_tokens(pair);
        let error = path_error(&case.solution, &case.policy, &tokens).unwrap();
        assert_close(error, sums[pair], IDENTITY);
    }

    let (policy, optimum) = (&case.policy, &case.optimum);
    let (mut own_before, mut optimal_before) = (0.0, 0.0);
    for depth in 1..=case.tree().horizon() {
        let mean = |sampler| mean_path_error(&case.solution, policy, sampler, depth).unwrap();
        let (on_own, on_optimal) = (mean(policy), mean(optimum));
        // β KL of the K-prefixes, by brute force.
        let by_prefix = |sampler: &mdp_core::TabularPolicy| -> f64 {
            let logps = case.tree().path_sums(sampler.logps());
            case.tree()
                .prefixes(depth)
                .map(|pair| logps[pair].exp() * sums[pair])
                .sum()
        };
        assert_close(on_own, by_prefix(policy), IDENTITY);
        assert_close(on_optimal, by_prefix(optimum), IDENTITY);
        assert!(on_own >= own_before - IDENTITY && on_own > 0.0, "optimism");
        assert!(on_optimal <= optimal_before + IDENTITY && on_optimal < 0.0);
        (own_before, optimal_before) = (on_own, on_optimal);
    }
}

/// S8: with residuals of at most ε, likelihood search loses at most `2 K ε`.
fn regret_is_bounded_by_the_residuals(case: &Case) {
    // A policy near the optimum, so that the bound says something.
    let mut rng = case.rng();
    let near: Vec<f64> = case
        .optimum
        .logps()
        .iter()
        .map(|x| x + 0.3 * (rng.random::<f64>() - 0.5))
        .collect();
    let near = mdp_core::TabularPolicy::from_logits(case.tree().clone(), near).unwrap();
    let objectives = conservative_objectives(&case.solution);
    for policy in [&near, &case.policy] {
        let epsilon = bellman_residuals(&case.solution, policy)
            .unwrap()
            .iter()
            .fold(0.0, |m: f64, x| m.max(x.abs()));
        let logps = case.tree().path_sums(policy.logps());
        for depth in 1..=case.tree().horizon() {
            let found = case
                .tree()
                .prefixes(depth)
                .max_by(|&a, &b| logps[a].total_cmp(&logps[b]))
                .unwrap();
            let (best, _) = max_backup(&case.solution, depth);
            let regret = best - objectives[found];
            assert!(regret >= -IDENTITY);
            assert!(regret <= 2.0 * depth as f64 * epsilon + IDENTITY);
        }
    }
}

/// Shaping moves every objective by one number, so rankings of prefixes stay.
fn shaping_moves_every_objective_by_one_number(case: &Case) {
    let potential = Potential::random(case.tree().clone(), &mut case.rng());
    let shaped = solve(&shape(&case.mdp, &potential).unwrap(), case.strength()).unwrap();
    let (before, after) = (
        conservative_objectives(&case.solution),
        conservative_objectives(&shaped),
    );
    for (before, after) in before.iter().zip(&after) {
        assert_close(after - before, -potential.values()[0], IDENTITY);
    }
    for depth in 1..=case.tree().horizon() {
        assert_eq!(
            max_backup(&shaped, depth).1,
            max_backup(&case.solution, depth).1
        );
    }
    // V itself is not identified; V(s) - V(s_0) + Σ r = Σ r̂ is.
    let implicit = implicit_rewards(&case.mdp, &case.optimum, case.strength()).unwrap();
    let implicit = case.tree().path_sums(&implicit);
    for solution in [&case.solution, &shaped] {
        let returns = case.tree().path_sums(solution.mdp().rewards());
        for pair in 0..returns.len() {
            let readout =
                solution.next_soft_value(pair) - solution.soft_values()[0] + returns[pair];
            assert_close(readout, implicit[pair], IDENTITY);
        }
    }
}

const LAWS: [fn(&Case); 9] = [
    conservative_objective_is_likelihood,
    reward_objective_is_the_log_ratio,
    soft_backup_changes_nothing,
    max_backup_is_the_likeliest_prefix,
    mean_backup_is_off_by_entropy_and_divergence,
    likelihood_falls_and_reward_rises_with_depth,
    residuals_are_log_ratios_to_the_optimum,
    regret_is_bounded_by_the_residuals,
    shaping_moves_every_objective_by_one_number,
];

macro_rules! exhaustive {
    ($($test:ident => $law:ident;)*) => {
        $(
            #[test]
            fn $test() {
                for_each_case($law);
            }
        )*
    };
}

exhaustive! {
    s1_conservative_objective_is_likelihood => conservative_objective_is_likelihood;
    s2_reward_objective_is_the_log_ratio => reward_objective_is_the_log_ratio;
    s3_soft_backup_changes_nothing => soft_backup_changes_nothing;
    s4_max_backup_is_the_likeliest_prefix => max_backup_is_the_likeliest_prefix;
    s5_mean_backup_is_off_by_entropy_and_divergence
        => mean_backup_is_off_by_entropy_and_divergence;
    s6_likelihood_falls_and_reward_rises_with_depth
        => likelihood_falls_and_reward_rises_with_depth;
    s7_residuals_are_log_ratios_to_the_optimum => residuals_are_log_ratios_to_the_optimum;
    s8_regret_is_bounded_by_the_residuals => regret_is_bounded_by_the_residuals;
    shaping_invariance_of_every_objective => shaping_moves_every_objective_by_one_number;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_identity_is_a_law(
        vocab in 2_usize..=4,
        horizon in 1_usize..=5,
        eos in 0_u32..4,
        dense in any::<bool>(),
        log_beta in (0.1_f64).ln()..(3.0_f64).ln(),
        seed in any::<u64>(),
    ) {
        let placement = if dense {
            RewardPlacement::Dense
        } else {
            RewardPlacement::TerminalOnly
        };
        let shape = (vocab, horizon, eos % vocab as u32);
        let case = Case::new(shape, placement, log_beta.exp(), seed);
        for law in LAWS {
            law(&case);
        }
    }
}

/// S1 (i): dividing by the length is another objective. By hand: stopping at once has probability
/// 0.4, the likeliest two tokens 0.6 * 0.6 = 0.36; per token the longer is the likelier.
#[test]
fn length_normalised_likelihood_picks_another_completion() {
    let mdp: mdp_core::TabularMdp = "
        vocab = 2
        horizon = 2
        eos = 1
        [[state]]
        tokens = []
        reference = [0.6, 0.4]
        [[state]]
        tokens = [0]
        reference = [0.4, 0.6]
    "
    .parse()
    .unwrap();
    // No reward: the optimum is the reference.
    let case = Case::of(mdp, 1.0, 0);
    let logps = case.tree().path_sums(case.optimum.logps());
    let best = |score: &dyn Fn(usize) -> f64| {
        let mut all = case.tree().completions();
        let first = all.next().unwrap();
        let best = all.fold(first, |b, c| if score(c) > score(b) { c } else { b });
        case.tree().pair_tokens(best)
    };
    assert_eq!(best(&|pair| logps[pair]), [1]);
    let per_token = |pair: usize| logps[pair] / case.tree().path(pair).len() as f64;
    assert_eq!(best(&per_token), [0, 1]);
    assert_eq!(max_backup(&case.solution, 2).1, [1]);
}

/// S2: likelihood and log-ratio disagree where the reference is not uniform. By hand: rewards prefer
/// token 0 by one, the reference prefers token 1 by nine to one, and β = 1.
#[test]
fn likelihood_search_and_log_ratio_search_pick_different_completions() {
    let mdp: mdp_core::TabularMdp = "
        vocab = 2
        horizon = 1
        eos = 1
        [[state]]
        tokens = []
        reference = [0.1, 0.9]
        rewards = [1.0, 0.0]
    "
    .parse()
    .unwrap();
    let case = Case::of(mdp, 1.0, 0);
    let optimum = case.optimum.logps();
    assert!(optimum[1] > optimum[0], "e * 0.1 < 0.9");
    let reward = |a| reward_objective(&case.solution, &[a]).unwrap();
    assert!(reward(0) > reward(1));
    assert_close(reward(0) - reward(1), 1.0, IDENTITY);
}
