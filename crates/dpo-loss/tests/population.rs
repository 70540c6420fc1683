//! Where losses rest on all pairs of a small process, against its exact solution.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../examples/population/tabular.rs"]
mod tabular;

use dpo_loss::{Beta, LossConfig, Objective, Objectives, Optimum};
use mdp_core::{
    Adam, PairTable, TabularMdp, TabularPolicy, Tree, completion_logps, conservative_dpo_loss,
    expectation_to_go, minimise_margin_loss, robust_dpo_loss, solve,
};
use tabular::{Population, mild_process};

const TURNED: f64 = 0.1;
const STEPS: usize = 600;
/// What Adam leaves of a distance that is zero; the nearest miss below is a hundred times as far.
const REACHED: f64 = 5e-4;
const MISSED: f64 = 0.04;

struct Case {
    mdp: TabularMdp,
    beta: Beta,
    optimum: TabularPolicy,
    clean: PairTable,
    turned: PairTable,
}

impl Case {
    fn new(seed: u64, beta: f64) -> Self {
        let mdp = mild_process(Tree::new(3, 2, 2).unwrap(), seed).unwrap();
        let beta = Beta::new(beta).unwrap();
        let clean = PairTable::population(&mdp, mdp.reference()).unwrap();
        Self {
            optimum: solve(&mdp, beta).unwrap().optimal_policy(),
            turned: clean.flipped(TURNED).unwrap(),
            clean,
            mdp,
            beta,
        }
    }

    fn population(&self, table: &PairTable) -> Population<'_> {
        Population::new(&self.mdp, self.beta, table.pairs().to_vec())
    }

    fn settle(&self, table: &PairTable, config: LossConfig) -> TabularPolicy {
        let objectives = Objectives::new(config).unwrap();
        let mut population = self.population(table);
        if !objectives.terms().all(|(loss, _)| loss.is_pair_mean()) {
            population = population.replicated(400);
        }
        population.settle(&objectives, STEPS).unwrap()
    }

    fn away(&self, policy: &TabularPolicy, from: &TabularPolicy) -> f64 {
        let population = self.population(&self.clean);
        population.distance(policy, from).unwrap().total_variation
    }
}

fn single(objective: Objective) -> LossConfig {
    LossConfig {
        label_smoothing: TURNED,
        ..LossConfig::single(objective)
    }
}

/// Whether every loss comes to the optimum on these labels that says it does, and no other.
fn check_each_loss(turned: bool) {
    let case = Case::new(5, 0.5);
    let table = if turned { &case.turned } else { &case.clean };
    for objective in Objective::ALL {
        let policy = case.settle(table, single(objective));
        let away = case.away(&policy, &case.optimum);
        let reaches = match objective.optimum() {
            Optimum::Exact => !turned,
            Optimum::ExactIfTurned => turned,
            Optimum::Other => false,
        };
        if reaches {
            assert!(away < REACHED, "{objective}: {away} away");
        } else {
            assert!(away > MISSED, "{objective}: {away} away");
        }
    }
}

#[test]
fn each_loss_reaches_the_optimum_on_clean_labels_if_it_says_so() {
    check_each_loss(false);
}

#[test]
fn each_loss_reaches_the_optimum_on_turned_labels_if_it_says_so() {
    check_each_loss(true);
}

#[test]
fn weighing_pairs_by_likelihood_keeps_the_optimum_of_dpo_on_clean_labels() {
    // The weight has no gradient and is one number for both orders of a pair.
    let case = Case::new(6, 0.5);
    let config = LossConfig {
        use_weighting: true,
        ..LossConfig::default()
    };
    let policy = case.settle(&case.clean, config);
    assert!(case.away(&policy, &case.optimum) < REACHED);
}

#[test]
fn margin_losses_rest_where_the_exact_solver_says() {
    let case = Case::new(7, 1.0);
    let exact = |table: &PairTable, robust: bool| {
        let start = case.mdp.reference().logps();
        let adam = Adam::default();
        if robust {
            let loss = robust_dpo_loss(TURNED);
            minimise_margin_loss(&case.mdp, table, case.beta, start, adam, loss)
        } else {
            let loss = conservative_dpo_loss(TURNED);
            minimise_margin_loss(&case.mdp, table, case.beta, start, adam, loss)
        }
        .unwrap()
    };
    for table in [&case.clean, &case.turned] {
        for (objective, robust) in [(Objective::Cdpo, false), (Objective::Robust, true)] {
            let policy = case.settle(table, single(objective));
            let away = case.away(&policy, &exact(table, robust));
            assert!(away < REACHED, "{objective}: {away}");
        }
    }
}

/// The first form of TDPO compares advantages under the reference's own evaluation.
#[test]
fn tdpo_takes_one_step_of_improvement_on_the_reference() {
    let case = Case::new(5, 0.5);
    let (mdp, tree) = (&case.mdp, case.mdp.tree());
    let values = expectation_to_go(mdp, mdp.reference(), mdp.rewards()).unwrap();
    let logits = (0..tree.n_pairs())
        .map(|pair| {
            let next = tree.child(pair).map_or(0.0, |state| values[state]);
            mdp.reference().logps()[pair] + (mdp.rewards()[pair] + next) / case.beta.get()
        })
        .collect();
    let improved = TabularPolicy::from_logits(tree.clone(), logits).unwrap();
    let policy = case.settle(&case.clean, LossConfig::single(Objective::Tdpo1));
    assert!(case.away(&policy, &improved) < REACHED);
    assert!(case.away(&improved, &case.optimum) > MISSED);
}

#[test]
fn step_preferences_reach_the_optimum_if_they_follow_soft_action_values() {
    let case = Case::new(9, 0.5);
    let values = solve(&case.mdp, case.beta).unwrap().kl_form();
    let steps = Population::of_actions(&case.mdp, case.beta, values.action_values());
    let objectives = Objectives::new(LossConfig::single(Objective::Step)).unwrap();
    let policy = steps.settle(&objectives, STEPS).unwrap();
    assert!(case.away(&policy, &case.optimum) < REACHED);
}

#[test]
fn fine_tuning_rests_at_the_chosen_completions() {
    let case = Case::new(10, 0.5);
    let completions: Vec<usize> = case.mdp.tree().completions().collect();
    let mut weights = vec![0.0; completions.len()];
    for pair in case.clean.pairs() {
        let place = completions.iter().position(|&c| c == pair.chosen).unwrap();
        weights[place] += pair.weight;
    }
    let chosen = TabularPolicy::from_completion_weights(case.mdp.tree().clone(), &weights).unwrap();
    let policy = case.settle(&case.clean, LossConfig::single(Objective::Sft));
    // Stand-ins for all pairs round each share to a four-hundredth, for seven completions.
    const ROUNDED: f64 = 0.02;
    assert!(case.away(&policy, &chosen) < ROUNDED);
    assert!(case.away(&policy, &case.optimum) > 2.0 * ROUNDED);
}

#[test]
fn without_a_reference_dpo_is_exact_for_the_uniform_one() {
    let case = Case::new(11, 0.5);
    let returns = case.mdp.returns();
    let weights: Vec<f64> = returns
        .iter()
        .map(|r| (r / case.beta.get()).exp())
        .collect();
    let exact = TabularPolicy::from_completion_weights(case.mdp.tree().clone(), &weights).unwrap();
    let policy = case.settle(&case.clean, LossConfig::single(Objective::ReferenceFree));
    assert!(case.away(&policy, &exact) < REACHED);
    let total: f64 = completion_logps(&case.mdp, &policy)
        .unwrap()
        .iter()
        .map(|l| l.exp())
        .sum();
    assert!((total - 1.0).abs() < 1e-9);
}
