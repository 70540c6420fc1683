//! What does the exact solution of a token MDP cost beside one exponential per state-action pair?
//!
//! Ids hold the vocabulary and horizon; criterion's throughput is in state-action pairs. Before the
//! measurements the program prints nanoseconds per pair, the ratio to the standard `exp`, the
//! speedup of two threads, and bytes per pair, each the best of several alternating rounds, so that
//! a busy machine disturbs both sides alike.

#![allow(missing_docs, reason = "criterion generates the items")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mdp_core::{Beta, RewardPlacement, TabularMdp, Tree, solve};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Vocabulary and horizon: 28.7, 13.0 and 10.0 million pairs.
const SIZES: [(usize, usize); 3] = [(4, 15), (16, 6), (216, 3)];

fn mdp(vocab: usize, horizon: usize) -> TabularMdp {
    let tree = Tree::new(vocab, horizon, 1).expect("a tree below the default limit");
    TabularMdp::seeded(tree, RewardPlacement::Dense, 0).expect("a random process is valid")
}

/// One standard exponential per entry, summed so that it cannot be left out.
fn exponentials(arguments: &[f64]) -> f64 {
    arguments.iter().map(|x| x.exp()).sum()
}

/// The same on the threads of the current pool: what two threads gain here at best.
fn exponentials_in_parallel(arguments: &[f64]) -> f64 {
    arguments.par_chunks(1 << 15).map(exponentials).sum()
}

fn threads(n: usize) -> ThreadPool {
    ThreadPoolBuilder::new()
        .num_threads(n)
        .build()
        .expect("threads can be started")
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Best of several rounds in which every candidate runs once.
fn summary(mdp: &TabularMdp, beta: Beta, one: &ThreadPool, two: &ThreadPool) {
    const ROUNDS: usize = 9;
    let mut best = [f64::INFINITY; 5];
    for _ in 0..ROUNDS {
        let round = [
            seconds(|| {
                black_box(exponentials(black_box(mdp.rewards())));
            }),
            seconds(|| {
                one.install(|| black_box(solve(mdp, beta)).expect("finite values"));
            }),
            seconds(|| {
                two.install(|| black_box(solve(mdp, beta)).expect("finite values"));
            }),
            seconds(|| {
                one.install(|| {
                    let solution = solve(mdp, beta).expect("finite values");
                    black_box(solution.optimal_policy());
                });
            }),
            seconds(|| {
                two.install(|| black_box(exponentials_in_parallel(black_box(mdp.rewards()))));
            }),
        ];
        for (best, time) in best.iter_mut().zip(round) {
            *best = best.min(time);
        }
    }
    let tree = mdp.tree();
    let [exp, solve1, solve2, policy, exp2] = best.map(|t| t * 1e9 / tree.n_pairs() as f64);
    let state_bytes = 8.0 * tree.n_states() as f64 / tree.n_pairs() as f64;
    eprintln!(
        "v{}_h{}: {} pairs; exp {exp:.2} ns/pair; solve {solve1:.2} ns/pair = {:.2}x exp; two \
         threads {solve2:.2} ns/pair = {:.2}x faster (exp itself {:.2}x); solve and optimal policy {policy:.2} ns/pair \
         = {:.2}x exp; {:.2} bytes/pair (16 input, {state_bytes:.2} soft values)",
        tree.vocab(),
        tree.horizon(),
        tree.n_pairs(),
        solve1 / exp,
        solve1 / solve2,
        exp / exp2,
        policy / exp,
        16.0 + state_bytes,
    );
}

fn exact_solution(c: &mut Criterion) {
    let beta = Beta::new(0.5).expect("a positive number");
    let (one, two) = (threads(1), threads(2));
    let mut group = c.benchmark_group("mdp");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    for (vocab, horizon) in SIZES {
        let mdp = mdp(vocab, horizon);
        let size = format!("v{vocab}_h{horizon}");
        if !std::env::args().any(|argument| argument == "--test") {
            summary(&mdp, beta, &one, &two);
        }
        group.throughput(Throughput::Elements(mdp.tree().n_pairs() as u64));
        group.bench_with_input(BenchmarkId::new("exp", &size), &mdp, |b, mdp| {
            b.iter(|| exponentials(black_box(mdp.rewards())));
        });
        group.bench_with_input(BenchmarkId::new("solve_1_thread", &size), &mdp, |b, mdp| {
            b.iter(|| one.install(|| solve(mdp, beta)));
        });
        group.bench_with_input(
            BenchmarkId::new("solve_2_threads", &size),
            &mdp,
            |b, mdp| {
                b.iter(|| two.install(|| solve(mdp, beta)));
            },
        );
        group.bench_with_input(BenchmarkId::new("optimal_policy", &size), &mdp, |b, mdp| {
            b.iter(|| one.install(|| solve(mdp, beta).map(|s| s.optimal_policy())));
        });
    }
    group.finish();
}

criterion_group!(benches, exact_solution);
criterion_main!(benches);
