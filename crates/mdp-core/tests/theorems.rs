//! The theorems P1 to P17 on random processes: exhaustively on small shapes, and as laws.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{
    BETAS, Case, IDENTITY, assert_all_close, assert_close, distance, for_each_case, policy_distance,
};
use mdp_core::{
    Beta, KlForm, MaxEntForm, PairTable, Potential, RewardPlacement, Slope, TabularMdp,
    TabularPolicy, Tree, WeightedPair, bradley_terry, chosen_reward_bound, conservative_dpo_loss,
    dpo_loss, expectation_to_go, implicit_rewards, log_sum_exp, margin_loss, mean_implicit_return,
    plackett_luce, proxy_tuned, robust_dpo_loss, shape, sigmoid, solve, state_kls, trajectory_kls,
};
use proptest::prelude::*;
use rand::RngExt;

/// P1: `Σ_a exp((Q - V)/β) = 1` at every state, Q in the MaxEnt form.
fn optimal_policy_sums_to_one(case: &Case) {
    let advantages = case.solution.max_ent_form().advantages();
    for row in advantages.chunks_exact(case.tree().vocab()) {
        let sum: f64 = row.iter().map(|a| (a / case.beta).exp()).sum();
        assert_close(sum, 1.0, IDENTITY);
    }
    for row in case.optimum.logps().chunks_exact(case.tree().vocab()) {
        assert_close(log_sum_exp(row), 0.0, IDENTITY);
    }
}

/// P2, Lemma 1: rewards and action values are one to one, in both forms.
fn rewards_and_action_values_are_one_to_one(case: &Case) {
    let (kl, max_ent) = (case.solution.kl_form(), case.solution.max_ent_form());
    assert_all_close(&kl.rewards(), case.mdp.rewards(), IDENTITY);
    assert_all_close(&max_ent.rewards(), case.mdp.rewards(), IDENTITY);
    // Any table is the action values of some reward; solving for that reward gives it back.
    let table: Vec<f64> = case.policy.logps().iter().map(|x| 2.0 * x + 1.0).collect();
    let form = MaxEntForm::new(&case.mdp, case.strength(), table.clone()).unwrap();
    let again = solve(
        &case.mdp.with_rewards(form.rewards()).unwrap(),
        case.strength(),
    )
    .unwrap();
    assert_all_close(again.max_ent_form().action_values(), &table, IDENTITY);
    assert_all_close(again.soft_values(), &form.soft_values(), IDENTITY);
    let form = KlForm::new(&case.mdp, case.strength(), table.clone()).unwrap();
    let again = solve(
        &case.mdp.with_rewards(form.rewards()).unwrap(),
        case.strength(),
    )
    .unwrap();
    assert_all_close(again.kl_form().action_values(), &table, IDENTITY);
    // Another reward has other action values.
    let other: Vec<f64> = case.mdp.rewards().iter().map(|r| r + 0.25).collect();
    let other = solve(&case.mdp.with_rewards(other).unwrap(), case.strength()).unwrap();
    assert!(distance(other.kl_form().action_values(), kl.action_values()) > 0.2);
}

/// P3, equation 10: `β log(π*/π_ref) = r + V(s') - V(s)`.
fn implicit_reward_of_the_optimum_is_the_advantage(case: &Case) {
    let rewards = implicit_rewards(&case.mdp, &case.optimum, case.strength()).unwrap();
    let vocab = case.tree().vocab();
    for (pair, reward) in rewards.iter().enumerate() {
        let advantage = case.mdp.rewards()[pair] + case.solution.next_soft_value(pair)
            - case.solution.soft_values()[pair / vocab];
        assert_close(*reward, advantage, IDENTITY);
    }
    assert_all_close(&rewards, &case.solution.kl_form().advantages(), IDENTITY);
    // And the MaxEnt form's advantage is β log π.
    let logps: Vec<f64> = case.optimum.logps().iter().map(|x| case.beta * x).collect();
    assert_all_close(&logps, &case.solution.max_ent_form().advantages(), IDENTITY);
}

/// P4: `Σ r = V(s_0) + Σ β log(π*/π_ref)` over every completion.
fn returns_are_implicit_returns_up_to_the_prompts_value(case: &Case) {
    let implicit = case.implicit_returns(&case.optimum);
    for (r, implicit) in case.mdp.returns().iter().zip(implicit) {
        assert_close(*r, case.root_value() + implicit, IDENTITY);
    }
}

/// P5: preferences by returns and by implicit returns are the same, for pairs and for rankings of 3.
fn preferences_follow_from_the_policy(case: &Case) {
    let (returns, implicit) = (case.mdp.returns(), case.implicit_returns(&case.optimum));
    let n = returns.len();
    for i in 0..n {
        for j in 0..n {
            assert_close(
                bradley_terry(returns[i], returns[j]),
                bradley_terry(implicit[i], implicit[j]),
                IDENTITY,
            );
        }
    }
    // All ordered triples of the small shapes, an even sample of them for the larger.
    for at in (0..n * n * n).step_by((n * n * n / 20_000).max(1)) {
        let triple = [at % n, at / n % n, at / n / n];
        assert_close(
            plackett_luce(&triple.map(|i| returns[i])),
            plackett_luce(&triple.map(|i| implicit[i])),
            IDENTITY,
        );
    }
}

/// P6: for its implicit reward the optimal policy is optimal, with soft value 0 everywhere.
fn implicit_reward_has_soft_value_zero(case: &Case) {
    for policy in [&case.optimum, &case.policy] {
        let rewards = implicit_rewards(&case.mdp, policy, case.strength()).unwrap();
        let mdp = case.mdp.with_rewards(rewards.clone()).unwrap();
        let solution = solve(&mdp, case.strength()).unwrap();
        for value in solution.soft_values() {
            assert_close(*value, 0.0, IDENTITY);
        }
        assert_all_close(solution.optimal_policy().logps(), policy.logps(), IDENTITY);
        // What makes it the only one of its class: Σ_a π_ref exp(r/β) = 1.
        for state in 0..case.tree().n_states() {
            let terms: Vec<f64> = case
                .tree()
                .row(state)
                .map(|pair| case.mdp.reference().logps()[pair] + rewards[pair] / case.beta)
                .collect();
            assert_close(log_sum_exp(&terms), 0.0, IDENTITY);
        }
    }
}

/// P7: shaping keeps the policy and preferences, and takes the potential off the soft values.
fn shaping_keeps_the_policy_and_preferences(case: &Case) {
    let mut rng = case.rng();
    let potential = Potential::random(case.tree().clone(), &mut rng);
    let shaped = shape(&case.mdp, &potential).unwrap();
    let solution = solve(&shaped, case.strength()).unwrap();
    assert!(
        distance(shaped.rewards(), case.mdp.rewards()) > 0.0,
        "the reward did change"
    );
    assert_all_close(
        solution.optimal_policy().logps(),
        case.optimum.logps(),
        IDENTITY,
    );
    for (state, value) in solution.soft_values().iter().enumerate() {
        let expected = case.solution.soft_values()[state] - potential.values()[state];
        assert_close(*value, expected, IDENTITY);
    }
    // Returns all move by one number, so no preference does.
    for (a, b) in shaped.returns().iter().zip(case.mdp.returns()) {
        assert_close(a - b, -potential.values()[0], IDENTITY);
    }
    // One constant on every terminal state is as good as zero.
    let ends = vec![rng.random::<f64>(); case.tree().n_completions()];
    let lifted =
        Potential::with_terminals(case.tree().clone(), potential.values().to_vec(), &ends).unwrap();
    let lifted = shape(&case.mdp, &lifted).unwrap();
    let solution = solve(&lifted, case.strength()).unwrap();
    assert_all_close(
        solution.optimal_policy().logps(),
        case.optimum.logps(),
        IDENTITY,
    );
}

/// P8: `V(s) = β log E_{y ~ π_ref(·|s)} exp(return to go / β)`, by brute force over completions.
fn soft_value_is_a_free_energy(case: &Case) {
    let tree = case.tree();
    let reference = tree.path_sums(case.mdp.reference().logps());
    let returns = tree.path_sums(case.mdp.rewards());
    let mut terms = vec![Vec::new(); tree.n_states()];
    for last in tree.completions() {
        for pair in tree.path(last) {
            let state = pair / tree.vocab();
            let before = tree.parent(state);
            let (logp, reward) = before.map_or((0.0, 0.0), |p| (reference[p], returns[p]));
            terms[state].push(reference[last] - logp + (returns[last] - reward) / case.beta);
        }
    }
    for (state, terms) in terms.iter().enumerate() {
        assert_close(
            case.beta * log_sum_exp(terms),
            case.solution.soft_values()[state],
            IDENTITY,
        );
    }
}

/// P9: `Π π* = π_ref(y|x) exp(R(y)/β) / Z(x)`: the token optimum is the bandit's.
fn token_optimum_is_the_bandit_optimum(case: &Case) {
    let reference = case.completion_logps(case.mdp.reference());
    let mut bandit: Vec<f64> = reference
        .iter()
        .zip(case.mdp.returns())
        .map(|(logp, r)| logp + r / case.beta)
        .collect();
    let log_z = log_sum_exp(&bandit);
    bandit.iter_mut().for_each(|x| *x -= log_z);
    assert_all_close(&case.completion_logps(&case.optimum), &bandit, IDENTITY);
    assert_close(case.beta * log_z, case.root_value(), IDENTITY);
}

/// P10, equation 16 and the chain rule: the reference's mean implicit return, for any policy.
fn reference_mean_of_implicit_return_is_a_divergence(case: &Case) {
    let reference = case.mdp.reference();
    let logps = case.completion_logps(reference);
    let policy_logps = case.completion_logps(&case.policy);
    let implicit = case.implicit_returns(&case.policy);
    let mean: f64 = logps.iter().zip(&implicit).map(|(l, r)| l.exp() * r).sum();
    let kl: f64 = logps
        .iter()
        .zip(&policy_logps)
        .map(|(p, q)| p.exp() * (p - q))
        .sum();
    assert_close(mean, -case.beta * kl, IDENTITY);
    let per_state = state_kls(&case.mdp, reference, &case.policy).unwrap();
    let occupancies = mdp_core::occupancies(&case.mdp, reference).unwrap();
    let chained: f64 = per_state.iter().zip(&occupancies).map(|(k, d)| k * d).sum();
    assert_close(kl, chained, IDENTITY);
    let kls = trajectory_kls(&case.mdp, reference, &case.policy).unwrap();
    assert_close(kls[0], kl, IDENTITY);
    let through_api =
        mean_implicit_return(&case.mdp, &case.policy, reference, case.strength()).unwrap();
    assert_close(through_api, mean, IDENTITY);
    assert!(mean < 0.0, "a policy other than the reference");
}

/// P11: the chosen completions' mean implicit return and its bound.
fn chosen_reward_is_bounded_by_a_divergence(case: &Case) {
    let mut rng = case.rng();
    let weights: Vec<f64> = (0..case.tree().n_completions())
        .map(|_| rng.random::<f64>() + 0.01)
        .collect();
    let chosen = TabularPolicy::from_completion_weights(case.tree().clone(), &weights).unwrap();
    let bound = chosen_reward_bound(&case.mdp, &chosen, case.strength()).unwrap();
    let mean_of = |policy| mean_implicit_return(&case.mdp, policy, &chosen, case.strength());
    for policy in [&case.policy, &case.optimum, case.mdp.reference()] {
        let mean = mean_of(policy).unwrap();
        let away = trajectory_kls(&case.mdp, &chosen, policy).unwrap()[0];
        assert_close(mean, bound - case.beta * away, IDENTITY);
        assert!(mean <= bound + IDENTITY);
    }
    // The bound is reached by the policy that is the chosen distribution.
    assert_close(mean_of(&chosen).unwrap(), bound, IDENTITY);
    // A reference fitted to the chosen side: bound 0, reached at the start and only there.
    let fitted = TabularMdp::new(chosen.clone(), case.mdp.rewards().to_vec()).unwrap();
    let bound = chosen_reward_bound(&fitted, &chosen, case.strength()).unwrap();
    assert_close(bound, 0.0, IDENTITY);
    let mean = |policy| mean_implicit_return(&fitted, policy, &chosen, case.strength()).unwrap();
    assert_close(mean(&chosen), 0.0, IDENTITY);
    // How far below is said by the divergence, which may be small: two policies can be near by chance.
    let away = trajectory_kls(&fitted, &chosen, &case.policy).unwrap()[0];
    assert_close(mean(&case.policy), -case.beta * away, IDENTITY);
    assert!(mean(&case.policy) < 0.0);
}

/// P12: both sides drawn from the reference: the mean of the two sides is `-β KL(π_ref ‖ π)`.
fn mean_of_both_sides_is_a_divergence(case: &Case) {
    let weights: Vec<f64> = case
        .completion_logps(case.mdp.reference())
        .iter()
        .map(|x| x.exp())
        .collect();
    let (returns, implicit) = (case.mdp.returns(), case.implicit_returns(&case.policy));
    let (mut chosen, mut rejected) = (0.0, 0.0);
    for i in 0..weights.len() {
        for j in 0..weights.len() {
            let wins = bradley_terry(returns[i], returns[j]);
            let weight = weights[i] * weights[j];
            chosen += weight * (wins * implicit[i] + (1.0 - wins) * implicit[j]);
            rejected += weight * (wins * implicit[j] + (1.0 - wins) * implicit[i]);
        }
    }
    let kl = trajectory_kls(&case.mdp, case.mdp.reference(), &case.policy).unwrap()[0];
    assert_close((chosen + rejected) / 2.0, -case.beta * kl, IDENTITY);
}

/// P13: the population DPO loss is flat at the optimum, and not at another policy.
fn population_loss_is_flat_at_the_optimum_only(case: &Case) {
    let pairs = PairTable::population(&case.mdp, case.mdp.reference()).unwrap();
    let at =
        |logits: &[f64]| margin_loss(&case.mdp, &pairs, case.strength(), logits, dpo_loss).unwrap();
    let optimum = at(case.optimum.logps());
    for g in &optimum.gradient {
        assert_close(*g, 0.0, IDENTITY);
    }
    let elsewhere = at(case.policy.logps());
    let steepest = elsewhere
        .gradient
        .iter()
        .fold(0.0, |m: f64, g| m.max(g.abs()));
    // A random policy may come as near to the optimum as it likes.
    if distance(case.policy.logps(), case.optimum.logps()) > 0.05 {
        assert!(steepest > IDENTITY, "steepest slope {steepest:e}");
        assert!(elsewhere.loss > optimum.loss);
    }
}

/// P14: the gradient of one pair by hand, and by finite differences.
fn gradient_of_a_pair_is_the_printed_one(case: &Case) {
    const STEP: f64 = 1e-5;
    // Central differences of a smooth function: third derivative times 1e-10, plus rounding / 1e-5.
    const DIFFERENCES: f64 = 1e-6;
    let tree = case.tree();
    let completions: Vec<usize> = tree.completions().collect();
    let mut rng = case.rng();
    let chosen = completions[rng.random_range(0..completions.len())];
    let rejected = completions[rng.random_range(0..completions.len())];
    if chosen == rejected {
        return;
    }
    let pair = WeightedPair {
        chosen,
        rejected,
        weight: 1.0,
    };
    let pairs = PairTable::new(tree.clone(), vec![pair]).unwrap();
    let logits = case.policy.logps().to_vec();
    let at =
        |logits: &[f64]| margin_loss(&case.mdp, &pairs, case.strength(), logits, dpo_loss).unwrap();
    let result = at(&logits);
    let returns =
        tree.path_sums(&implicit_rewards(&case.mdp, &case.policy, case.strength()).unwrap());
    let margin = returns[chosen] - returns[rejected];
    let mut expected = vec![0.0; tree.n_pairs()];
    for (last, sign) in [(chosen, 1.0), (rejected, -1.0)] {
        for taken in tree.path(last) {
            let state = taken / tree.vocab();
            for other in tree.row(state) {
                let indicator = f64::from(u8::from(other == taken));
                expected[other] -= case.beta
                    * sigmoid(-margin)
                    * sign
                    * (indicator - case.policy.logps()[other].exp());
            }
        }
    }
    assert_all_close(&result.gradient, &expected, IDENTITY);
    for i in (0..logits.len()).step_by((logits.len() / 40).max(1)) {
        let moved = |by: f64| {
            let mut logits = logits.clone();
            logits[i] += by;
            at(&logits).loss
        };
        let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        assert_close(slope, result.gradient[i], DIFFERENCES);
    }
}

/// P15: proxy tuning against the optimum that it aims at.
fn proxy_tuning_misses_by_the_next_states_value(case: &Case) {
    const TARGET: f64 = 0.7;
    let mut rng = case.rng();
    let base = TabularPolicy::random(case.tree().clone(), 1.0, &mut rng).unwrap();
    let (expert, anti) = (&case.optimum, case.mdp.reference());
    let alpha = case.beta / TARGET;
    let tuned = proxy_tuned(&base, expert, anti, alpha).unwrap();
    let rewards = implicit_rewards(&case.mdp, expert, case.strength()).unwrap();
    let aim = TabularMdp::new(base.clone(), rewards.clone()).unwrap();
    let aim = solve(&aim, Beta::new(TARGET).unwrap()).unwrap();
    let optimum = aim.optimal_policy();
    let vocab = case.tree().vocab();
    for state in 0..case.tree().n_states() {
        // log Z of the tuned policy's product.
        let terms: Vec<f64> = case
            .tree()
            .row(state)
            .map(|p| base.logps()[p] + alpha * (expert.logps()[p] - anti.logps()[p]))
            .collect();
        let log_z = log_sum_exp(&terms);
        for pair in case.tree().row(state) {
            let miss = optimum.logps()[pair] - tuned.logps()[pair];
            let values = aim.next_soft_value(pair) - aim.soft_values()[state];
            assert_close(miss, values / TARGET + log_z, IDENTITY);
        }
        if case.tree().children(state).is_empty() {
            // On the last token it is exact.
            let row = state * vocab..(state + 1) * vocab;
            assert_all_close(&optimum.logps()[row.clone()], &tuned.logps()[row], IDENTITY);
        }
    }
    let same = proxy_tuned(anti, expert, anti, 1.0).unwrap();
    assert_all_close(same.logps(), expert.logps(), IDENTITY);
}

/// P17: the reference's KL to the policy at a state is minus its mean implicit reward there, over β.
fn position_kl_is_a_mean_implicit_reward(case: &Case) {
    let rewards = implicit_rewards(&case.mdp, &case.policy, case.strength()).unwrap();
    let kls = state_kls(&case.mdp, case.mdp.reference(), &case.policy).unwrap();
    for (state, kl) in kls.iter().enumerate() {
        let row = case.tree().row(state);
        let mean: f64 = case.mdp.reference().logps()[row.clone()]
            .iter()
            .zip(&rewards[row])
            .map(|(logp, r)| logp.exp() * r)
            .sum();
        assert_close(*kl, -mean / case.beta, IDENTITY);
    }
}

const LAWS: [fn(&Case); 16] = [
    optimal_policy_sums_to_one,
    rewards_and_action_values_are_one_to_one,
    implicit_reward_of_the_optimum_is_the_advantage,
    returns_are_implicit_returns_up_to_the_prompts_value,
    preferences_follow_from_the_policy,
    implicit_reward_has_soft_value_zero,
    shaping_keeps_the_policy_and_preferences,
    soft_value_is_a_free_energy,
    token_optimum_is_the_bandit_optimum,
    reference_mean_of_implicit_return_is_a_divergence,
    chosen_reward_is_bounded_by_a_divergence,
    mean_of_both_sides_is_a_divergence,
    population_loss_is_flat_at_the_optimum_only,
    gradient_of_a_pair_is_the_printed_one,
    proxy_tuning_misses_by_the_next_states_value,
    position_kl_is_a_mean_implicit_reward,
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
    p1_optimal_policy_sums_to_one => optimal_policy_sums_to_one;
    p2_rewards_and_action_values_are_one_to_one => rewards_and_action_values_are_one_to_one;
    p3_implicit_reward_of_the_optimum_is_the_advantage
        => implicit_reward_of_the_optimum_is_the_advantage;
    p4_returns_are_implicit_returns_up_to_the_prompts_value
        => returns_are_implicit_returns_up_to_the_prompts_value;
    p5_preferences_follow_from_the_policy => preferences_follow_from_the_policy;
    p6_implicit_reward_has_soft_value_zero => implicit_reward_has_soft_value_zero;
    p7_shaping_keeps_the_policy_and_preferences => shaping_keeps_the_policy_and_preferences;
    p8_soft_value_is_a_free_energy => soft_value_is_a_free_energy;
    p9_token_optimum_is_the_bandit_optimum => token_optimum_is_the_bandit_optimum;
    p10_reference_mean_of_implicit_return_is_a_divergence
        => reference_mean_of_implicit_return_is_a_divergence;
    p11_chosen_reward_is_bounded_by_a_divergence => chosen_reward_is_bounded_by_a_divergence;
    p12_mean_of_both_sides_is_a_divergence => mean_of_both_sides_is_a_divergence;
    p13_population_loss_is_flat_at_the_optimum_only => population_loss_is_flat_at_the_optimum_only;
    p14_gradient_of_a_pair_is_the_printed_one => gradient_of_a_pair_is_the_printed_one;
    p15_proxy_tuning_misses_by_the_next_states_value
        => proxy_tuning_misses_by_the_next_states_value;
    p17_position_kl_is_a_mean_implicit_reward => position_kl_is_a_mean_implicit_reward;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_theorem_is_a_law(
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

/// The negative of P5: across prompts, log-odds are off by the difference of `V(s_0)`.
#[test]
fn p5_preferences_across_prompts_are_off_by_the_difference_of_root_values() {
    for beta in BETAS {
        let a = Case::new((3, 3, 2), RewardPlacement::Dense, beta, 1);
        let b = Case::new((3, 3, 2), RewardPlacement::Dense, beta, 2);
        let gap = a.root_value() - b.root_value();
        assert!(gap.abs() > 0.05, "prompts of unequal worth, gap {gap}");
        let (returns_a, returns_b) = (a.mdp.returns(), b.mdp.returns());
        let implicit_a = a.implicit_returns(&a.optimum);
        let implicit_b = b.implicit_returns(&b.optimum);
        for i in 0..returns_a.len() {
            for j in 0..returns_b.len() {
                let true_odds = returns_a[i] - returns_b[j];
                let implicit_odds = implicit_a[i] - implicit_b[j];
                assert_close(true_odds - implicit_odds, gap, IDENTITY);
            }
        }
        let worst = (bradley_terry(returns_a[0], returns_b[0])
            - bradley_terry(implicit_a[0], implicit_b[0]))
        .abs();
        assert!(worst > 1e-3, "and the probability is off: {worst}");
    }
}

/// N1: a potential that is not constant on terminal states changes preferences, which is why
/// `Potential` refuses it.
#[test]
fn n1_a_random_potential_on_terminal_states_changes_preferences() {
    for_each_case(|case| {
        let mut rng = case.rng();
        let ends: Vec<f64> = (0..case.tree().n_completions())
            .map(|i| if i == 0 { 2.0 } else { -rng.random::<f64>() })
            .collect();
        let refused = Potential::with_terminals(
            case.tree().clone(),
            vec![0.0; case.tree().n_states()],
            &ends,
        );
        assert!(refused.is_err());
        // What it would have done.
        let returns = case.mdp.returns();
        let mut gap: f64 = 0.0;
        for i in 0..returns.len() {
            for j in 0..returns.len() {
                let before = bradley_terry(returns[i], returns[j]);
                let after = bradley_terry(returns[i] + ends[i], returns[j] + ends[j]);
                gap = gap.max((before - after).abs());
            }
        }
        assert!(gap > 0.05, "gap {gap}");
    });
}

/// Two rewards of one shaping class cannot be told apart by preferences over completions: dense
/// credit and its terminal-only sum have one optimal policy.
#[test]
fn dense_credit_and_its_sum_on_the_last_token_have_one_optimum() {
    for_each_case(|case| {
        let sums = case.tree().path_sums(case.mdp.rewards());
        let last: Vec<f64> = (0..case.tree().n_pairs())
            .map(|pair| match case.tree().child(pair) {
                Some(_) => 0.0,
                None => sums[pair],
            })
            .collect();
        let moved = case.mdp.with_rewards(last).unwrap();
        assert_all_close(&moved.returns(), &case.mdp.returns(), IDENTITY);
        let optimum = solve(&moved, case.strength()).unwrap().optimal_policy();
        assert_all_close(optimum.logps(), case.optimum.logps(), IDENTITY);
    });
}

/// P16: the margin that each loss settles on for a single pair preferred with probability 0.8.
#[test]
fn p16_margins_of_noisy_label_losses_are_the_derived_ones() {
    const WINS: f64 = 0.8;
    const NOISE: f64 = 0.1;
    // Bisection to the last bit of a margin of order one.
    let settle = |wins: f64, loss: &dyn Fn(f64) -> Slope| {
        let (mut low, mut high) = (-20.0, 20.0);
        for _ in 0..100 {
            let middle = 0.5 * (low + high);
            let slope = wins * loss(middle).slope - (1.0 - wins) * loss(-middle).slope;
            if slope < 0.0 {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    };
    let flipped = WINS * (1.0 - NOISE) + (1.0 - WINS) * NOISE;
    let log_odds = |p: f64| (p / (1.0 - p)).ln();
    // By hand: DPO settles at the log-odds of the labels, 1.386. The conservative loss mixes the
    // labels once more: 1.046 on clean ones, 0.809 on noisy ones. The robust loss undoes a mixing:
    // right on noisy labels, ln 7 = 1.946 on clean ones.
    let mixed = |p: f64| p * (1.0 - NOISE) + (1.0 - p) * NOISE;
    let unmixed = |p: f64| (p - NOISE) / (1.0 - 2.0 * NOISE);
    assert_close(log_odds(WINS), 4.0_f64.ln(), IDENTITY);
    assert_close(settle(WINS, &dpo_loss), log_odds(WINS), IDENTITY);
    let conservative = conservative_dpo_loss(NOISE);
    assert_close(settle(WINS, &conservative), log_odds(mixed(WINS)), IDENTITY);
    let twice = log_odds(mixed(mixed(WINS)));
    assert_close(settle(flipped, &conservative), twice, IDENTITY);
    let robust = robust_dpo_loss(NOISE);
    assert_close(settle(flipped, &robust), log_odds(WINS), IDENTITY);
    assert_close(settle(WINS, &robust), log_odds(unmixed(WINS)), IDENTITY);
    assert_close(unmixed(WINS), 7.0 / 8.0, IDENTITY);
    // None of the three others is near the truth.
    assert!(log_odds(WINS) - log_odds(mixed(WINS)) > 0.3);
}

/// P16 on whole processes: which losses are flat at the optimum, under which labels.
#[test]
fn p16_conservative_loss_never_settles_at_the_optimum_and_robust_only_at_its_noise() {
    const NOISE: f64 = 0.1;
    for (seed, beta) in BETAS.into_iter().enumerate() {
        let case = Case::new((3, 3, 2), RewardPlacement::Dense, beta, seed as u64);
        let clean = PairTable::population(&case.mdp, case.mdp.reference()).unwrap();
        let noisy = clean.flipped(NOISE).unwrap();
        let steepest = |pairs: &PairTable, loss: &dyn Fn(f64) -> Slope| {
            let logits = case.optimum.logps();
            margin_loss(&case.mdp, pairs, case.strength(), logits, loss)
                .unwrap()
                .gradient
                .into_iter()
                .fold(0.0, |m: f64, g| m.max(g.abs()))
        };
        let conservative = conservative_dpo_loss(NOISE);
        let robust = robust_dpo_loss(NOISE);
        assert!(steepest(&clean, &dpo_loss) < IDENTITY);
        assert!(steepest(&noisy, &robust) < IDENTITY);
        // Everything else pulls away from the optimum, by this much at the least.
        const PULL: f64 = 1e-4;
        assert!(steepest(&noisy, &dpo_loss) > PULL);
        assert!(steepest(&clean, &conservative) > PULL);
        assert!(steepest(&noisy, &conservative) > PULL);
        assert!(steepest(&clean, &robust) > PULL);
    }
}

/// The implicit reward gives credit that the true reward does not: `r̂` is the advantage.
#[test]
fn implicit_reward_of_a_terminal_reward_is_spread_over_tokens() {
    let case = Case::new((3, 4, 2), RewardPlacement::TerminalOnly, 1.0, 3);
    let rewards = implicit_rewards(&case.mdp, &case.optimum, case.strength()).unwrap();
    assert!(distance(&rewards, case.mdp.rewards()) > 0.1);
    assert!(rewards[0].abs() > 1e-3, "the first token earns credit");
    // Only the differences along a path are identified.
    let mean = expectation_to_go(&case.mdp, case.mdp.reference(), &rewards).unwrap()[0];
    assert!(mean < 0.0);
}

/// P13's second half: a policy and its optimum are told apart.
#[test]
fn a_random_policy_is_not_optimal() {
    for_each_case(|case| assert!(policy_distance(&case.policy, &case.optimum) > 1e-3));
}

#[test]
fn a_tree_with_a_prompt_is_solved_as_one_without() {
    let tree = Tree::new(3, 3, 2).unwrap();
    let beta = Beta::new(0.5).unwrap();
    let bare = TabularMdp::seeded(tree.clone(), RewardPlacement::Dense, 8).unwrap();
    let tree = tree.with_prompt([4, 4]);
    let prompted = TabularMdp::seeded(tree, RewardPlacement::Dense, 8).unwrap();
    assert_eq!(
        solve(&bare, beta).unwrap().soft_values(),
        solve(&prompted, beta).unwrap().soft_values()
    );
}
