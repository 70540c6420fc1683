//! Where each loss rests on endless pairs, against the exact optimum.
//!
//! `cargo run -p dpo-loss --example population` prints the table of the book's page on losses.

#![allow(clippy::print_stdout, reason = "a program that reports")]

mod tabular;

use dpo_loss::{Beta, Divergence, LossConfig, Objective, Objectives, UnpairedObjective};
use mdp_core::{PairTable, Tree, solve};
use tabular::{Distance, Failure, Population, mild_process};

const TURNED: f64 = 0.1;
const STEPS: usize = 1500;
/// Stand-ins for all pairs, where a loss mixes its batch.
const COPIES: usize = 500;

fn main() -> Result<(), Failure> {
    let mdp = mild_process(Tree::new(3, 2, 2)?, 5)?;
    let beta = Beta::new(0.5)?;
    let optimum = solve(&mdp, beta)?.optimal_policy();
    let clean = PairTable::population(&mdp, mdp.reference())?;
    let turned = clean.flipped(TURNED)?;
    let populations = [&clean, &turned].map(|t| Population::new(&mdp, beta, t.pairs().to_vec()));

    let away = populations[0].distance(mdp.reference(), &optimum)?;
    println!("reference: {}", cell(away));
    println!("| loss | clean labels | {TURNED} of labels turned |");
    println!("|---|---|---|");
    for (name, config) in configs() {
        let objectives = Objectives::new(config)?;
        let whole = objectives
            .terms()
            .all(|(objective, _)| objective.is_pair_mean());
        let mut cells = Vec::new();
        for population in &populations {
            let copies;
            let population = if whole {
                population
            } else {
                copies = population.replicated(COPIES);
                &copies
            };
            let policy = population.settle(&objectives, STEPS)?;
            cells.push(cell(population.distance(&policy, &optimum)?));
        }
        println!("| {name} | {} |", cells.join(" | "));
    }
    let mut cells = Vec::new();
    for population in &populations {
        let policy = population.settle_unpaired(UnpairedObjective::default(), STEPS)?;
        cells.push(cell(population.distance(&policy, &optimum)?));
    }
    println!("| `kto` | {} |", cells.join(" | "));
    let values = solve(&mdp, beta)?.kl_form();
    let steps = Population::of_actions(&mdp, beta, values.action_values());
    let objectives = Objectives::new(LossConfig::single(Objective::Step))?;
    let policy = steps.settle(&objectives, STEPS)?;
    let cell = cell(steps.distance(&policy, &optimum)?);
    println!("| `step`, steps labelled by their soft values | {cell} | |");
    Ok(())
}

/// Each loss alone, and some options of the first.
fn configs() -> Vec<(String, LossConfig)> {
    let single = |objective: Objective| LossConfig {
        label_smoothing: TURNED,
        ..LossConfig::single(objective)
    };
    let mut configs: Vec<(String, LossConfig)> = Objective::ALL
        .into_iter()
        .map(|objective| (format!("`{objective}`"), single(objective)))
        .collect();
    for f_divergence_type in [
        Divergence::ForwardKl,
        Divergence::JsDivergence,
        Divergence::AlphaDivergence,
    ] {
        let config = LossConfig {
            f_divergence_type,
            ..LossConfig::default()
        };
        configs.push((format!("`sigmoid`, {}", f_divergence_type.name()), config));
    }
    let options = LossConfig::default;
    configs.push((
        "`sigmoid`, ld_alpha = 0.5".into(),
        LossConfig {
            ld_alpha: Some(0.5),
            ..options()
        },
    ));
    configs.push((
        "`sigmoid`, use_weighting".into(),
        LossConfig {
            use_weighting: true,
            ..options()
        },
    ));
    configs.push(("RPO, alpha 0.5".into(), LossConfig::rpo(0.5)));
    configs.push(("MPO".into(), LossConfig::mpo()));
    configs
}

/// Total variation and margin error; a margin this far off is still growing.
fn cell(distance: Distance) -> String {
    if distance.margin > 5.0 {
        format!("{:.3} (does not rest)", distance.total_variation)
    } else {
        format!("{:.3} ({:.3})", distance.total_variation, distance.margin)
    }
}
