//! What does a search cost beside its model?
//!
//! The process is a table, walked from parent to child, so that next to nothing of the time is the
//! model's. Ids hold the algorithm and the nodes of its tree; criterion's throughput is in nodes.
//! Before the measurements the program prints, for each, nodes per second (best of several rounds),
//! bytes per node and the share of the time that was spent inside the model.

#![allow(missing_docs, reason = "criterion generates the items")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mdp_core::{RewardPlacement, TabularMdp, TabularPolicy, Tree};
use search::{
    Backup, BeamConfig, BestFirstConfig, Commit, Leaf, MctsConfig, Request, Score, SearchOutput,
    TabularModel, beam_search, best_first, mcts,
};

/// 111,111 states and 1,222,221 state-action pairs.
const VOCAB: usize = 11;
const HORIZON: usize = 6;

fn process() -> TabularMdp {
    let tree = Tree::new(VOCAB, HORIZON, 1).expect("a tree below the default limit");
    TabularMdp::seeded(tree, RewardPlacement::Dense, 0).expect("a valid process")
}

/// Every algorithm that can grow a tree of a million nodes, until it holds the whole tree.
const SEARCHES: [&str; 4] = ["best_first", "mcts_max", "mcts_soft", "beam"];

fn run(name: &str, mdp: &TabularMdp) -> SearchOutput {
    let tree = mdp.tree();
    let uniform = TabularPolicy::uniform(tree.clone());
    let mut model = TabularModel::new(mdp.reference()).expect("states in 32 bits");
    let mut request = Request::of(tree);
    let searched = match name {
        "best_first" => {
            // A score that can rise, so that every completion must be seen.
            model = model.with_reference(&uniform).expect("one tree");
            request.score = Score::LogRatio;
            let config = BestFirstConfig {
                n_best: 1,
                batch: 64,
            };
            best_first(&mut model, &request, &config)
        }
        "beam" => {
            let config = BeamConfig {
                width: tree.n_completions(),
                ..BeamConfig::default()
            };
            beam_search(&mut model, &request, &config)
        }
        _ => {
            let config = MctsConfig {
                simulations: tree.n_states(),
                batch: 64,
                commit: Commit::AtEnd,
                // Two completions, so that a proof of the first does not end it.
                n_best: 2,
                backup: match name {
                    "mcts_max" => Backup::Max,
                    _ => Backup::Soft,
                },
                ..MctsConfig::default()
            };
            mcts(&mut model, &request, &config, Leaf::Zero)
        }
    };
    searched.expect("a valid search")
}

fn summary(mdp: &TabularMdp) {
    const ROUNDS: usize = 3;
    for name in SEARCHES {
        let rounds = (0..ROUNDS).map(|_| run(name, mdp).stats);
        let best = rounds.min_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let stats = best.expect("at least one round");
        eprintln!(
            "{name}: {} nodes, {:.2} million nodes per second, {:.0} bytes per node, {:.0}% of the \
             time in the model",
            stats.nodes,
            stats.nodes as f64 / stats.seconds / 1e6,
            stats.bytes as f64 / stats.nodes as f64,
            100.0 * stats.model_seconds / stats.seconds,
        );
    }
}

fn million_nodes(c: &mut Criterion) {
    let mdp = process();
    summary(&mdp);
    let mut group = c.benchmark_group("search");
    group.sample_size(10);
    for name in SEARCHES {
        let nodes = run(name, &mdp).stats.nodes;
        group.throughput(Throughput::Elements(nodes as u64));
        group.bench_with_input(BenchmarkId::new(name, nodes), &mdp, |b, mdp| {
            b.iter(|| black_box(run(name, mdp)));
        });
    }
    group.finish();
}

criterion_group!(benches, million_nodes);
criterion_main!(benches);
