//! What the paper prints wrongly: for each place the corrected form holds and the printed form fails.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{Case, IDENTITY, assert_all_close, assert_close, distance};
use mdp_core::{
    Beta, Potential, RewardPlacement, TabularMdp, bradley_terry, conservative_objective,
    implicit_rewards, log_sum_exp, proxy_tuned, solve,
};

/// Larger than any rounding by far: the printed form is another number.
const WRONG: f64 = 1e-2;

fn case(beta: f64) -> Case {
    Case::new((3, 3, 2), RewardPlacement::Dense, beta, 17)
}

/// Section 3.3 prints `π ∝ π_ref exp(r)` and `r = β log(π/π_ref) - Z`.
#[test]
fn section_3_3_needs_one_over_beta_and_plus_beta_log_z() {
    let case = case(0.5);
    let returns = case.mdp.returns();
    let reference = case.completion_logps(case.mdp.reference());
    let optimum = case.completion_logps(&case.optimum);
    let closed_form = |per_beta: f64| {
        let mut logps: Vec<f64> = reference
            .iter()
            .zip(&returns)
            .map(|(l, r)| l + r * per_beta)
            .collect();
        let log_z = log_sum_exp(&logps);
        logps.iter_mut().for_each(|x| *x -= log_z);
        (logps, log_z)
    };
    let (right, log_z) = closed_form(1.0 / 0.5);
    assert_all_close(&right, &optimum, IDENTITY);
    let (printed, _) = closed_form(1.0);
    assert!(distance(&printed, &optimum) > WRONG);
    for i in 0..returns.len() {
        let logratio = 0.5 * (optimum[i] - reference[i]);
        assert_close(returns[i], logratio + 0.5 * log_z, IDENTITY);
        assert!((returns[i] - (logratio - log_z.exp())).abs() > WRONG);
    }
}

/// The display before equation 8: `Σ r = Q(s_0,a_0) - β log π_ref + Σ_{t>=1} (Q - V - β log π_ref)`,
/// in the MaxEnt form; the last sum is printed with a minus.
#[test]
fn display_before_equation_8_adds_the_later_terms() {
    let case = case(0.5);
    let q = case.solution.max_ent_form();
    let q = q.action_values();
    let returns = case.tree().path_sums(case.mdp.rewards());
    let mut wrong: f64 = 0.0;
    for last in case.tree().completions() {
        let path = case.tree().path(last);
        let term = |pair: usize| q[pair] - case.beta * case.mdp.reference().logps()[pair];
        let later: f64 = path[1..]
            .iter()
            .map(|&pair| term(pair) - case.solution.soft_values()[pair / case.tree().vocab()])
            .sum();
        assert_close(returns[last], term(path[0]) + later, IDENTITY);
        wrong = wrong.max((returns[last] - (term(path[0]) - later)).abs());
    }
    assert!(wrong > WRONG);
}

/// Equation 13 prints `-V(s_0)`. The ranking is the same and the value is not.
#[test]
fn equation_13_adds_the_root_value() {
    let case = case(0.5);
    assert!(case.root_value().abs() > WRONG);
    let logps = case.tree().path_sums(case.optimum.logps());
    for (pair, logp) in logps.iter().enumerate() {
        let tokens = case.tree().pair_tokens(pair);
        let objective = conservative_objective(&case.solution, &tokens).unwrap();
        let likelihood = case.beta * logp;
        assert_close(objective, case.root_value() + likelihood, IDENTITY);
        assert!((objective - (likelihood - case.root_value())).abs() > WRONG);
    }
}

/// Equation 15 prints `base exp(β (Q - V))` for equation 14 with exponent β. The exponent is
/// `alpha / β_train`, and Q must be in the KL form.
#[test]
fn equation_15_scales_by_alpha_over_the_training_beta() {
    const ALPHA: f64 = 0.5;
    let case = case(0.5);
    let base = &case.policy;
    let tuned = proxy_tuned(base, &case.optimum, case.mdp.reference(), ALPHA).unwrap();
    let tilted = |scale: f64, advantages: &[f64]| {
        let logits = base
            .logps()
            .iter()
            .zip(advantages)
            .map(|(l, a)| l + scale * a)
            .collect();
        mdp_core::TabularPolicy::from_logits(case.tree().clone(), logits).unwrap()
    };
    let kl = case.solution.kl_form().advantages();
    let right = tilted(ALPHA / case.beta, &kl);
    assert_all_close(right.logps(), tuned.logps(), IDENTITY);
    let printed = tilted(ALPHA, &kl);
    assert!(distance(printed.logps(), tuned.logps()) > WRONG);
    let mixed_up = tilted(
        ALPHA / case.beta,
        &case.solution.max_ent_form().advantages(),
    );
    assert!(distance(mixed_up.logps(), tuned.logps()) > WRONG);
}

/// Definition 1 leaves out that the potential is constant on terminal states. Without it two
/// rewards of one "class" prefer different completions; the type refuses such a potential.
#[test]
fn definition_1_needs_a_constant_on_terminal_states() {
    let case = case(0.5);
    let tree = case.tree();
    let ends: Vec<f64> = (0..tree.n_completions()).map(|i| 0.2 * i as f64).collect();
    let zeros = vec![0.0; tree.n_states()];
    assert!(Potential::with_terminals(tree.clone(), zeros, &ends).is_err());
    let mut rewards = case.mdp.rewards().to_vec();
    for (pair, end) in tree.completions().zip(&ends) {
        rewards[pair] += end;
    }
    let printed = case.mdp.with_rewards(rewards).unwrap();
    let (before, after) = (case.mdp.returns(), printed.returns());
    let moved = (bradley_terry(before[0], before[6]) - bradley_terry(after[0], after[6])).abs();
    assert!(moved > WRONG, "preference moved by {moved}");
    let optimum = solve(&printed, case.strength()).unwrap().optimal_policy();
    assert!(distance(optimum.logps(), case.optimum.logps()) > WRONG);
}

/// Section 4.2 calls `β log(π/π_ref)` the optimal advantage, after defining Q in the MaxEnt form.
/// It is the KL form's; the MaxEnt form's is `β log π`.
#[test]
fn section_4_2_means_the_advantage_of_the_kl_form() {
    let case = case(0.5);
    let rewards = implicit_rewards(&case.mdp, &case.optimum, case.strength()).unwrap();
    assert_all_close(&rewards, &case.solution.kl_form().advantages(), IDENTITY);
    let max_ent = case.solution.max_ent_form().advantages();
    assert!(distance(&rewards, &max_ent) > WRONG);
}

/// Equation 7 needs `V = 0` at terminal states: a constant there is a reward for ending early or
/// late only if ends differ, but it does move V.
#[test]
fn equation_7_needs_value_zero_at_terminal_states() {
    let case = case(0.5);
    let one = Beta::new(0.5).unwrap();
    let mut rewards = case.mdp.rewards().to_vec();
    for pair in case.tree().completions() {
        rewards[pair] += 1.0;
    }
    let lifted: TabularMdp = case.mdp.with_rewards(rewards).unwrap();
    let solution = solve(&lifted, one).unwrap();
    assert_close(solution.soft_values()[0], case.root_value() + 1.0, IDENTITY);
    assert_all_close(
        solution.optimal_policy().logps(),
        case.optimum.logps(),
        IDENTITY,
    );
}
