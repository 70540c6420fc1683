//! Limits, constraints, forms of output: what holds for every request.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Case, Constant, Honest, IDENTITY, assert_close};
use mdp_core::{LogpRows, MdpError, TabularPolicy, TokenPolicy, Tree, proxy_tuned};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use search::{
    Backup, BeamConfig, BestFirstConfig, Budget, Commit, Constraints, EarlyStopping, End, Judge,
    Leaf, LogitProcessor, LookaheadConfig, MctsConfig, NodeId, Policies, PrefixModel, PrefixTree,
    ProxyTuned, Request, RootChoice, Rows, SampleConfig, Score, SearchError, SearchOutput, Stopped,
    TabularModel, beam_search, best_first, best_of_n, greedy, lookahead, mcts, sample,
};

/// Every algorithm, in several of its forms.
const N_SEARCHES: usize = 12;

fn run_search<M: PrefixModel>(
    which: usize,
    model: &mut M,
    request: &Request<'_>,
) -> Result<SearchOutput, SearchError> {
    let draws = SampleConfig {
        n: 5,
        seed: 2,
        ..SampleConfig::default()
    };
    let tree = MctsConfig {
        simulations: 9,
        batch: 3,
        ..MctsConfig::default()
    };
    let gumbel = RootChoice::Gumbel {
        considered: 3,
        seed: 1,
    };
    let mut value = |states: &[&[u32]]| Ok(states.iter().map(|s| -(s.len() as f64)).collect());
    match which {
        0 => greedy(model, request),
        1 => sample(model, request, &draws),
        2 => best_of_n(model, request, &draws, Judge::Score),
        3 => {
            let config = BeamConfig {
                width: 3,
                n_best: 3,
                ..BeamConfig::default()
            };
            beam_search(model, request, &config)
        }
        4 => {
            let config = BeamConfig {
                width: 4,
                groups: 2,
                diversity_penalty: 0.5,
                length_penalty: 1.0,
                early_stopping: EarlyStopping::Estimate,
                ..BeamConfig::default()
            };
            beam_search(model, request, &config)
        }
        5 => best_first(
            model,
            request,
            &BestFirstConfig {
                n_best: 2,
                batch: 4,
            },
        ),
        6 => mcts(model, request, &tree, Leaf::Zero),
        7 => {
            let backup = Backup::Mean;
            mcts(
                model,
                request,
                &MctsConfig { backup, ..tree },
                Leaf::Rollouts(draws),
            )
        }
        8 => {
            let config = MctsConfig {
                backup: Backup::Soft,
                root: gumbel,
                ..tree
            };
            mcts(model, request, &config, Leaf::Value(&mut value))
        }
        9 => {
            let config = MctsConfig {
                commit: Commit::AtEnd,
                simulations: 60,
                ..tree
            };
            mcts(model, request, &config, Leaf::Rollouts(draws))
        }
        10 => {
            let config = LookaheadConfig {
                depth: 2,
                width: Some(3),
            };
            lookahead(model, request, &config, Leaf::Value(&mut value))
        }
        11 => {
            let config = LookaheadConfig::default();
            lookahead(model, request, &config, Leaf::Rollouts(draws))
        }
        _ => unreachable!("{which} of {N_SEARCHES}"),
    }
}

/// Sets the cancel flag during its `at`-th call.
struct Cancelling<'a, M> {
    inner: M,
    flag: &'a AtomicBool,
    calls: usize,
    at: usize,
}

impl<M: PrefixModel> PrefixModel for Cancelling<'_, M> {
    fn vocab(&self) -> usize {
        self.inner.vocab()
    }

    fn has_reference(&self) -> bool {
        self.inner.has_reference()
    }

    fn has_rewards(&self) -> bool {
        self.inner.has_rewards()
    }

    fn expand(
        &mut self,
        prefixes: &PrefixTree,
        frontier: &[NodeId],
        top_k: Option<usize>,
    ) -> Result<Rows, SearchError> {
        self.calls += 1;
        if self.calls == self.at {
            self.flag.store(true, Ordering::Relaxed);
        }
        self.inner.expand(prefixes, frontier, top_k)
    }
}

#[test]
fn a_cancelled_search_makes_no_further_call_and_returns_the_best_found() {
    let case = Case::new((4, 6), 1.0, 8);
    for which in 0..N_SEARCHES {
        for at in 1..6 {
            let flag = AtomicBool::new(false);
            let request = Request {
                cancel: Some(&flag),
                ..case.request(Score::LogRatio)
            };
            let mut model = Cancelling {
                inner: case.model(&case.policy),
                flag: &flag,
                calls: 0,
                at,
            };
            let output = run_search(which, &mut model, &request).unwrap();
            assert!(model.calls <= at, "search {which} went on after call {at}");
            if model.calls == at && output.stats.stopped != Stopped::Done {
                assert_eq!(output.stats.stopped, Stopped::Cancelled);
                assert!(output.best().is_some(), "search {which} gave nothing back");
            }
        }
    }
    // A flag that is set beforehand: the prompt itself is all there is.
    let flag = AtomicBool::new(true);
    let request = Request {
        cancel: Some(&flag),
        ..case.request(Score::Likelihood)
    };
    for which in 0..N_SEARCHES {
        let output = run_search(which, &mut case.model(&case.policy), &request).unwrap();
        assert_eq!(output.stats.model_calls, 0);
        let best = output.best().unwrap();
        assert_eq!((&best.tokens[..], best.end), (&[][..], End::Unfinished));
        assert!(!output.is_optimal());
    }
}

#[test]
fn a_budget_is_passed_by_less_than_one_batch() {
    let case = Case::new((4, 6), 1.0, 8);
    for which in 0..N_SEARCHES {
        let unlimited = case.request(Score::Likelihood);
        let model = &mut case.model(&case.policy);
        let whole = run_search(which, model, &unlimited).unwrap().stats;
        for tokens in 0..20 {
            let request = Request {
                budget: Budget {
                    tokens: Some(tokens),
                    ..Budget::default()
                },
                ..unlimited.clone()
            };
            let model = &mut Honest::new(case.model(&case.policy));
            let output = run_search(which, model, &request).unwrap();
            let stats = &output.stats;
            assert!(stats.states_expanded < tokens + stats.largest_batch.max(1));
            // Where the batch can be cut to the budget, it is.
            if [0, 5, 6, 8].contains(&which) {
                assert!(stats.states_expanded <= tokens, "search {which}");
            }
            assert_eq!(
                stats.stopped == Stopped::Done,
                stats.states_expanded == whole.states_expanded
            );
            assert!(
                output.best().is_some(),
                "search {which} with {tokens} tokens"
            );
        }
        let budget = Budget {
            seconds: Some(0.0),
            ..Budget::default()
        };
        let request = Request {
            budget,
            ..unlimited
        };
        let output = run_search(which, &mut case.model(&case.policy), &request).unwrap();
        assert_eq!(output.stats.model_calls, 0);
        assert_eq!(output.stats.stopped, Stopped::Budget);
    }
}

#[test]
fn simulations_are_never_more_than_asked_for() {
    let case = Case::new((5, 5), 1.0, 8);
    for budget in [1, 7, 23] {
        for batch in [1, 4] {
            let request = Request {
                budget: Budget {
                    simulations: Some(budget),
                    ..Budget::default()
                },
                ..case.request(Score::LogRatio)
            };
            let config = MctsConfig {
                batch,
                backup: Backup::Mean,
                ..MctsConfig::default()
            };
            let output =
                mcts(&mut case.model(&case.policy), &request, &config, Leaf::Zero).unwrap();
            // The expansion of the prompt counts as one too.
            assert!(
                output.stats.simulations <= budget.max(1),
                "{}",
                output.stats.simulations
            );
            assert_eq!(output.stats.stopped, Stopped::Budget);
        }
    }
}

/// Depth is limited by memory, not by the stack.
#[test]
fn completions_of_ten_thousand_tokens_overflow_no_stack() {
    let depth = 10_000;
    let policy = Constant::of(&[0.999, 0.0008, 0.0002]);
    let request = Request::new([0], [2], depth);
    let long = |output: SearchOutput| {
        let best = output.best().unwrap().clone();
        assert_eq!((best.tokens.len(), best.end), (depth, End::Length));
        assert_close(best.logp, depth as f64 * 0.999_f64.ln(), 1e-6);
    };
    let model = || Policies::new(&policy);
    long(greedy(&mut model(), &request).unwrap());
    let config = BeamConfig {
        width: 2,
        early_stopping: EarlyStopping::Never,
        length_penalty: 1.0,
        ..BeamConfig::default()
    };
    let output = beam_search(&mut model(), &request, &config).unwrap();
    assert_eq!(output.completions[0].tokens.len(), depth);
    let config = MctsConfig {
        simulations: 1,
        backup: Backup::Soft,
        ..MctsConfig::default()
    };
    long(mcts(&mut model(), &request, &config, Leaf::Zero).unwrap());
    let config = LookaheadConfig {
        depth: 2,
        width: Some(1),
    };
    long(lookahead(&mut model(), &request, &config, Leaf::Zero).unwrap());
    // A single path as deep as that, searched from the prompt every time.
    let sure = Constant(vec![0.0, f64::NEG_INFINITY, f64::NEG_INFINITY]);
    let model = || Policies::new(&sure);
    let output = best_first(&mut model(), &request, &BestFirstConfig::default()).unwrap();
    assert_eq!(output.completions[0].tokens.len(), depth);
    assert!(output.is_optimal());
    let config = MctsConfig {
        simulations: 2 * depth,
        commit: Commit::AtEnd,
        ..MctsConfig::default()
    };
    let request = Request {
        max_new_tokens: depth,
        keep_tree: true,
        ..request
    };
    let output = mcts(&mut model(), &request, &config, Leaf::Zero).unwrap();
    assert_eq!(output.completions[0].tokens.len(), depth);
    assert_eq!(output.tree.unwrap().nodes.len(), depth + 1);
}

/// Allowed completions by the words of the documentation, one token after the other.
fn allowed(policy: &impl TokenPolicy, request: &Request<'_>) -> Vec<(Vec<u32>, f64, End)> {
    let constraints = &request.constraints;
    let mut found = Vec::new();
    let mut open = vec![(Vec::new(), 0.0)];
    while let Some((tokens, logp)) = open.pop() {
        let state = [&request.prompt[..], &tokens].concat();
        let mut row = policy.next_logps(&[&state]).unwrap().into_values();
        if let Some(processor) = constraints.processor {
            processor(&state, &mut row);
        }
        for (token, step) in (0..).zip(row) {
            let is_eos = request.eos.contains(&token);
            if constraints.banned.contains(&token)
                || is_eos && tokens.len() < constraints.min_new_tokens
                || step == f64::NEG_INFINITY
            {
                continue;
            }
            let mut longer = tokens.clone();
            longer.push(token);
            let stops = longer.len() >= constraints.min_new_tokens
                && constraints.stop.iter().any(|stop| longer.ends_with(stop));
            let end = match () {
                () if is_eos => Some(End::Eos),
                () if stops => Some(End::Stop),
                () if longer.len() == request.max_new_tokens => Some(End::Length),
                () => None,
            };
            match end {
                Some(end) => found.push((longer, logp + step, end)),
                None => open.push((longer, logp + step)),
            }
        }
    }
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found
}

fn constraints() -> impl Strategy<Value = Constraints<'static>> {
    let tokens = || prop::collection::vec(0..4_u32, 1..3);
    let stop = prop::collection::vec(tokens(), 0..3);
    let banned = prop::collection::vec(0..4_u32, 0..2);
    (stop, banned, 0..4_usize).prop_map(|(stop, banned, min_new_tokens)| Constraints {
        stop,
        banned,
        min_new_tokens,
        processor: None,
    })
}

/// Saying a token twice in a row costs a nat; token 3 may not come first.
fn processor(state: &[u32], logps: &mut [f64]) {
    if let [_, last] = state {
        logps[*last as usize] -= 1.0;
        logps[3] = f64::NEG_INFINITY;
    }
}

fn random_policy(seed: u64) -> TabularPolicy {
    let tree = Tree::new(4, 4, 0).unwrap().with_prompt([1, 2]);
    TabularPolicy::random(tree, 1.5, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn constrained_search_enumerates_exactly_what_is_allowed(
        constraints in constraints(), seed in 0..1000_u64, processed: bool,
    ) {
        let policy = random_policy(seed);
        let mut request = Request { constraints, ..Request::of(policy.tree()) };
        if processed {
            request.constraints.processor = Some(&processor);
        }
        let expected = allowed(&policy, &request);
        let config = BestFirstConfig { n_best: expected.len().max(1), batch: 2 };
        let model = || Honest::new(Policies::new(&policy));
        let output = best_first(&mut model(), &request, &config).unwrap();
        if expected.is_empty() {
            prop_assert!(output.best().is_none_or(|best| best.end == End::Unfinished));
        } else {
            prop_assert_eq!(output.completions.len(), expected.len());
            for (found, (tokens, logp, end)) in output.completions.iter().zip(&expected) {
                prop_assert!((found.score - logp).abs() < IDENTITY);
                prop_assert_eq!((&found.tokens, found.end), (tokens, *end));
            }
        }
        // A whole tree, dead ends and all.
        let whole = MctsConfig {
            simulations: 100_000,
            commit: Commit::AtEnd,
            ..MctsConfig::default()
        };
        for backup in [Backup::Max, Backup::Soft] {
            let output = mcts(&mut model(), &request, &MctsConfig { backup, ..whole }, Leaf::Zero);
            let found = output.unwrap().completions;
            match expected.first() {
                Some((tokens, ..)) => prop_assert_eq!(&found[0].tokens, tokens),
                None => prop_assert!(found.iter().all(|found| found.end == End::Unfinished)),
            }
        }
        // What is left out by `top_k`, too, is bounded, and what is found is allowed.
        for top_k in 1..4 {
            let request = Request { top_k: Some(top_k), ..request.clone() };
            let config = BestFirstConfig { n_best: 1000, batch: 2 };
            let all = best_first(&mut model(), &request, &config).unwrap();
            let whole = all.completions.iter().filter(|found| found.end != End::Unfinished);
            let mass: f64 = whole.map(|found| found.logp.exp()).sum();
            if !processed {
                // Dead ends hold mass as well, and constraints can make them.
                prop_assert!(all.stats.covered_mass >= mass - IDENTITY);
            }
            for which in [0, 3, 5, 9] {
                let output = run_search(which, &mut model(), &request).unwrap();
                let (Some(bound), Some((_, best, _))) = (output.upper_bound, expected.first()) else {
                    continue;
                };
                prop_assert!(bound >= best - IDENTITY, "{which}: {bound} is below {best}");
                if output.is_optimal() {
                    prop_assert!((output.best().unwrap().score - best).abs() < IDENTITY);
                }
            }
        }
        // Every other search returns something allowed, or says that it did not finish.
        for which in 0..N_SEARCHES {
            let output = run_search(which, &mut model(), &request).unwrap();
            for found in &output.completions {
                let known = expected.iter().any(|(tokens, logp, end)| {
                    *tokens == found.tokens && (logp - found.logp).abs() < IDENTITY && *end == found.end
                });
                prop_assert!(known || found.end == End::Unfinished, "{which}: {found:?}");
            }
        }
    }

    #[test]
    fn covered_mass_is_the_probability_of_what_can_still_be_found(
        seed in 0..1000_u64, top_k in 1..5_usize,
    ) {
        let policy = random_policy(seed);
        let request = Request { top_k: Some(top_k), ..Request::of(policy.tree()) };
        let config = BestFirstConfig { n_best: 1000, batch: 3 };
        let model = || Honest::new(Policies::new(&policy));
        let all = best_first(&mut model(), &request, &config).unwrap();
        let mass: f64 = all.completions.iter().map(|found| found.logp.exp()).sum();
        prop_assert!((all.stats.covered_mass - mass).abs() < IDENTITY);
        let wide = BeamConfig { width: 1000, n_best: 1000, ..BeamConfig::default() };
        let beam = beam_search(&mut model(), &request, &wide).unwrap();
        prop_assert!((beam.stats.covered_mass - mass).abs() < IDENTITY);
        prop_assert_eq!(beam.completions.len(), all.completions.len());
    }

    #[test]
    fn statistics_and_trees_tell_what_happened(seed in 0..1000_u64, top_k in 1..5_usize) {
        let policy = random_policy(seed);
        let reference = random_policy(seed + 1);
        for score in [Score::Likelihood, Score::LogRatio] {
            let request = Request {
                keep_tree: true,
                top_k: Some(top_k),
                score,
                ..Request::of(policy.tree())
            };
            for which in 0..N_SEARCHES {
                let policies = Policies::new(&policy).with_reference(&reference);
                let output = run_search(which, &mut Honest::new(policies), &request).unwrap();
                let stats = &output.stats;
                prop_assert!(stats.covered_mass > 0.0 && stats.covered_mass < 1.0 + IDENTITY);
                prop_assert!(stats.model_calls <= stats.states_expanded);
                prop_assert!(stats.largest_batch <= stats.states_expanded);
                prop_assert!(stats.seconds >= stats.model_seconds && stats.bytes > 0);
                let tree = output.tree.as_ref().unwrap();
                prop_assert_eq!(tree.nodes.len(), stats.nodes);
                let mut path = Vec::new();
                for (i, node) in tree.nodes.iter().enumerate() {
                    prop_assert!(node.parent.is_none_or(|parent| parent < i));
                    prop_assert!(node.prior > 0.0 && node.prior < 1.0 + IDENTITY);
                    let above = node.parent.is_none_or(|parent| tree.nodes[parent].on_path);
                    prop_assert!(above || !node.on_path);
                    path.extend(node.token.filter(|_| node.on_path));
                }
                prop_assert_eq!(&path, &output.completions[0].tokens);
                for completion in &output.completions {
                    let reward = completion.logp - completion.reference_logp.unwrap();
                    prop_assert!((completion.implicit_reward.unwrap() - reward).abs() < IDENTITY);
                    if score == Score::LogRatio && which != 4 {
                        prop_assert!((completion.score - reward).abs() < IDENTITY);
                    }
                }
                prop_assert_eq!(output.upper_bound.is_some() && score == Score::LogRatio, false);
            }
        }
    }

    #[test]
    fn n_best_are_the_best_in_order(seed in 0..1000_u64, n_best in 1..30_usize, batch in 1..9_usize) {
        let policy = random_policy(seed);
        let request = Request::of(policy.tree());
        let expected = allowed(&policy, &request);
        let config = BestFirstConfig { n_best, batch };
        let output = best_first(&mut TabularModel::new(&policy).unwrap(), &request, &config).unwrap();
        let found: Vec<_> = output.completions.iter().map(|c| &c.tokens).collect();
        let expected: Vec<_> = expected.iter().take(n_best).map(|(tokens, ..)| tokens).collect();
        prop_assert_eq!(found, expected);
        prop_assert!(output.is_optimal());
    }

    #[test]
    fn a_draw_depends_on_its_own_stream_alone(seed in 0..1000_u64, n in 1..12_usize) {
        let policy = random_policy(seed);
        let request = Request::of(policy.tree());
        let draw = |n, temperature, top_k, top_p| {
            let config = SampleConfig { n, temperature, top_k, top_p, seed };
            let model = &mut Honest::new(Policies::new(&policy));
            let output = sample(model, &request, &config).unwrap();
            output.completions.into_iter().map(|c| c.tokens).collect::<Vec<_>>()
        };
        prop_assert_eq!(&draw(n, 1.0, None, 1.0)[..], &draw(12, 1.0, None, 1.0)[..n]);
        // Cold, or cut to one token, drawing is greedy.
        let expected = greedy(&mut Policies::new(&policy), &request).unwrap().completions;
        for drawn in [draw(n, 1e-9, None, 1.0), draw(n, 1.0, Some(1), 1.0), draw(n, 1.0, None, 1e-9)] {
            prop_assert!(drawn.iter().all(|tokens| *tokens == expected[0].tokens));
        }
    }

    #[test]
    fn every_whole_tree_search_with_any_leaf_ends_with_the_best(seed in 0..1000_u64, batch in 1..5_usize) {
        let policy = random_policy(seed);
        let request = Request::of(policy.tree());
        let expected = &allowed(&policy, &request)[0];
        let config = MctsConfig {
            simulations: 100_000,
            batch,
            commit: Commit::AtEnd,
            ..MctsConfig::default()
        };
        let draws = SampleConfig { n: 2, seed, ..SampleConfig::default() };
        let mut value = |states: &[&[u32]]| Ok(vec![-0.3; states.len()]);
        for leaf in [Leaf::Zero, Leaf::Rollouts(draws), Leaf::Value(&mut value)] {
            let model = &mut Honest::new(Policies::new(&policy));
            let output = mcts(model, &request, &config, leaf).unwrap();
            prop_assert_eq!(&output.completions[0].tokens, &expected.0);
        }
    }

    #[test]
    fn proxy_tuning_is_mdp_cores_as_a_policy_and_as_a_model(
        seed in 0..1000_u64, alpha in -2.0..2.0_f64,
    ) {
        let (base, expert, anti) = (random_policy(seed), random_policy(seed + 1), random_policy(seed + 2));
        let expected = proxy_tuned(&base, &expert, &anti, alpha).unwrap();
        let tuned = ProxyTuned::new(&base, &expert, &anti, alpha).unwrap();
        let found = TabularPolicy::tabulate(base.tree().clone(), &tuned).unwrap();
        for (x, y) in found.logps().iter().zip(expected.logps()) {
            prop_assert!((x - y).abs() < IDENTITY);
        }
        let model = |policy| Honest::new(TabularModel::new(policy).unwrap());
        let mut models = ProxyTuned::new(model(&base), model(&expert), model(&anti), alpha).unwrap();
        let request = Request::of(base.tree());
        for which in [0, 3, 5] {
            let a = run_search(which, &mut Policies::new(&expected), &request).unwrap();
            models = ProxyTuned::new(model(&base), model(&expert), model(&anti), alpha).unwrap();
            let b = run_search(which, &mut models, &request).unwrap();
            prop_assert_eq!(&a.completions[0].tokens, &b.completions[0].tokens);
            prop_assert!((a.completions[0].score - b.completions[0].score).abs() < IDENTITY);
        }
        drop(models);
    }
}

#[test]
fn groups_with_a_penalty_begin_apart_and_without_one_are_one_narrow_beam() {
    let policy = random_policy(3);
    let request = Request::of(policy.tree());
    let run = |width, groups, diversity_penalty| {
        let config = BeamConfig {
            width,
            n_best: width,
            groups,
            diversity_penalty,
            ..BeamConfig::default()
        };
        let model = &mut Honest::new(TabularModel::new(&policy).unwrap());
        beam_search(model, &request, &config).unwrap()
    };
    let narrow = run(2, 1, 0.0);
    let copies = run(6, 3, 0.0);
    assert_eq!(
        copies.completions, narrow.completions,
        "copies are returned once"
    );
    let apart = run(3, 3, 100.0);
    let mut first: Vec<u32> = apart.completions.iter().map(|c| c.tokens[0]).collect();
    first.sort_unstable();
    first.dedup();
    assert_eq!(first.len(), 3);
    // The penalty is no part of the score.
    for completion in apart.completions {
        assert_close(completion.score, completion.logp, IDENTITY);
    }
}

#[test]
fn gumbel_with_one_token_draws_from_the_policy_and_with_more_leans_to_the_better() {
    let probs = [0.5, 0.3, 0.2];
    let policy = Constant::of(&probs);
    let request = Request::new([], [0, 1, 2], 1);
    let n = 4000;
    let frequency = |considered| {
        let mut counts = [0.0; 3];
        for seed in 0..n {
            let config = MctsConfig {
                simulations: 4,
                root: RootChoice::Gumbel { considered, seed },
                ..MctsConfig::default()
            };
            let model = &mut Policies::new(&policy);
            let output = mcts(model, &request, &config, Leaf::Zero).unwrap();
            counts[output.completions[0].tokens[0] as usize] += 1.0 / n as f64;
        }
        counts
    };
    for (found, p) in frequency(1).into_iter().zip(probs) {
        // Five standard errors.
        assert_close(found, p, 5.0 * (p * (1.0 - p) / n as f64).sqrt());
    }
    let [best, ..] = frequency(3);
    assert!(
        best > 0.9,
        "{best} of the draws took the likeliest, which has 0.5 and the best Q"
    );
}

/// Answers with the rows that it is given, whatever is asked.
struct Fixed(Rows);

impl PrefixModel for Fixed {
    fn vocab(&self) -> usize {
        2
    }

    fn has_reference(&self) -> bool {
        true
    }

    fn expand(
        &mut self,
        _: &PrefixTree,
        _: &[NodeId],
        _: Option<usize>,
    ) -> Result<Rows, SearchError> {
        Ok(self.0.clone())
    }
}

#[test]
fn answers_that_are_no_logps_are_refused_with_their_place() {
    let full = |values: &[f64]| Rows::full(LogpRows::new(2, values.to_vec()).unwrap());
    let with = |values: &[f64], reference: &[f64]| {
        full(values).with_reference(reference.to_vec()).unwrap()
    };
    let request = Request {
        score: Score::LogRatio,
        ..Request::new([], [1], 3)
    };
    let message = |rows| greedy(&mut Fixed(rows), &request).unwrap_err().to_string();
    let even = [-0.7, -0.7];
    assert!(message(with(&[-0.1, f64::NAN], &even)).contains("NaN"));
    assert!(message(with(&[-0.1, 0.5], &even)).contains("token 1 after [] is 0.5"));
    assert!(message(with(&even, &[-0.1, f64::NEG_INFINITY])).contains("reference must give"));
    assert!(message(with(&[-0.7; 4], &[-0.7; 4])).contains("answer has 2 entries, expected 1"));
    assert!(message(full(&even)).contains("reference logps"));
    let top = Rows::top(&[vec![(7, -0.5)]])
        .with_reference(vec![-0.5])
        .unwrap();
    assert!(message(top).contains("token 7"));
    assert!(full(&even).with_reference(vec![0.0]).is_err());
    assert!(full(&even).with_rewards(vec![0.0; 3]).is_err());
    // A token that the policy rules out needs no reference.
    let unsaid = with(&even, &even).with_rewards(vec![0.0; 2]).unwrap();
    assert!(message(unsaid).contains("`has_rewards` says none"));
    let rows = with(&[0.0, f64::NEG_INFINITY], &[-0.5, f64::NEG_INFINITY]);
    let output = greedy(&mut Fixed(rows), &request).unwrap();
    assert_close(output.completions[0].score, 1.5, IDENTITY);
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let policy = Constant::of(&[0.5, 0.5]);
    let request = Request::new([], [1], 3);
    let model = || Policies::new(&policy);
    let beam = |config| {
        beam_search(&mut model(), &request, &config)
            .unwrap_err()
            .to_string()
    };
    let base = BeamConfig::default();
    assert!(beam(BeamConfig { width: 0, ..base }).contains("width"));
    assert!(beam(BeamConfig { n_best: 2, ..base }).contains("n_best"));
    assert!(
        beam(BeamConfig {
            width: 3,
            groups: 2,
            ..base
        })
        .contains("groups")
    );
    assert!(
        beam(BeamConfig {
            length_penalty: f64::NAN,
            ..base
        })
        .contains("length_penalty")
    );
    assert!(
        beam(BeamConfig {
            diversity_penalty: -1.0,
            ..base
        })
        .contains("diversity_penalty")
    );
    let draw = |config| {
        sample(&mut model(), &request, &config)
            .unwrap_err()
            .to_string()
    };
    let base = SampleConfig::default();
    assert!(draw(SampleConfig { n: 0, ..base }).contains("n is 0"));
    assert!(
        draw(SampleConfig {
            temperature: 0.0,
            ..base
        })
        .contains("greedy")
    );
    assert!(draw(SampleConfig { top_p: 0.0, ..base }).contains("top_p"));
    let tree = |config, leaf: Leaf<'_>| mcts(&mut model(), &request, &config, leaf).unwrap_err();
    let config = MctsConfig {
        simulations: 0,
        ..MctsConfig::default()
    };
    assert!(tree(config, Leaf::Zero).to_string().contains("simulations"));
    let error = tree(
        MctsConfig::default(),
        Leaf::Rollouts(SampleConfig { n: 0, ..base }),
    );
    assert!(error.to_string().contains("n is 0"));
    let mut short = |_: &[&[u32]]| Ok(vec![]);
    let error = tree(MctsConfig::default(), Leaf::Value(&mut short));
    assert!(
        error
            .to_string()
            .contains("value function gave 0 values, expected 1"),
        "{error}"
    );
    let mut judge = |completions: &[&[u32]]| Ok(vec![f64::NAN; completions.len()]);
    let judge = Judge::External(&mut judge);
    let error = best_of_n(&mut model(), &request, &base, judge).unwrap_err();
    assert!(error.to_string().contains("judge gave NaN"), "{error}");
    let look = LookaheadConfig {
        depth: 0,
        width: None,
    };
    assert!(lookahead(&mut model(), &request, &look, Leaf::Zero).is_err());
    let score = Score::LogRatio;
    let error = greedy(
        &mut model(),
        &Request {
            score,
            ..request.clone()
        },
    )
    .unwrap_err();
    assert!(matches!(error, SearchError::NoReference { .. }));
    assert!(ProxyTuned::new(&policy, &policy, &policy, f64::INFINITY).is_err());
}

/// What a failing model says comes back.
#[test]
fn errors_of_the_model_pass_through() {
    #[derive(Debug)]
    struct Broken;

    impl TokenPolicy for Broken {
        fn vocab(&self) -> usize {
            2
        }

        fn next_logps(&self, _: &[&[u32]]) -> Result<LogpRows, MdpError> {
            Err(MdpError::policy("the device is gone"))
        }
    }
    let request = Request::new([], [1], 3);
    for which in 0..N_SEARCHES {
        let error = run_search(which, &mut Policies::new(&Broken), &request).unwrap_err();
        assert!(error.to_string().contains("the device is gone"), "{error}");
    }
    assert!(
        SearchError::model("out of memory")
            .to_string()
            .contains("out of memory")
    );
}

/// A prompt that is a state inside the tree is searched from there.
#[test]
fn a_deeper_prompt_is_searched_from_its_own_state() {
    let policy = random_policy(5);
    let request = Request::new([1, 2, 3], [0], 3);
    let config = BestFirstConfig {
        n_best: 100,
        batch: 1,
    };
    let walked = best_first(&mut TabularModel::new(&policy).unwrap(), &request, &config).unwrap();
    let looked_up = best_first(&mut Policies::new(&policy), &request, &config).unwrap();
    assert_eq!(walked.completions, looked_up.completions);
    let foreign = Request::new([9], [0], 3);
    assert!(greedy(&mut TabularModel::new(&policy).unwrap(), &foreign).is_err());
}

/// What `retain` is for: a model need not hold more than the search can still continue.
#[test]
fn caches_to_hold_are_those_of_the_running_prefixes_and_not_of_the_whole_search() {
    let policy = Constant::of(&[0.4, 0.35, 0.249, 0.001]);
    let request = Request::new([], [3], 200);
    let most = |run: &dyn Fn(&mut Honest<Policies<'_>>) -> Result<SearchOutput, SearchError>| {
        let mut model = Honest::new(Policies::new(&policy));
        let expanded = run(&mut model).unwrap().stats.states_expanded;
        (model.most_cached, expanded)
    };
    let (held, expanded) = most(&|model| greedy(model, &request));
    assert!(held <= 2 && expanded == 200, "{held} of {expanded}");
    let config = BeamConfig {
        width: 5,
        ..BeamConfig::default()
    };
    let (held, expanded) = most(&|model| beam_search(model, &request, &config));
    assert!(held <= 10 && expanded > 800, "{held} of {expanded}");
    let draws = SampleConfig {
        n: 7,
        ..SampleConfig::default()
    };
    let (held, expanded) = most(&|model| sample(model, &request, &draws));
    assert!(held <= 14 && expanded > 200, "{held} of {expanded}");
    // Tree search holds its tree: the subtree of what it committed to, here at most 9 more a token.
    let config = MctsConfig {
        simulations: 9,
        backup: Backup::Soft,
        ..MctsConfig::default()
    };
    let (held, expanded) = most(&|model| mcts(model, &request, &config, Leaf::Zero));
    assert!(held < 100 && expanded > 1500, "{held} of {expanded}");
}

#[test]
fn a_beam_that_stops_at_once_claims_no_more_than_it_saw() {
    let policy = Constant::of(&[0.7, 0.2, 0.1]);
    let request = Request::new([], [1], 3);
    let config = BeamConfig {
        width: 2,
        early_stopping: EarlyStopping::AtOnce,
        ..BeamConfig::default()
    };
    let output = beam_search(&mut Policies::new(&policy), &request, &config).unwrap();
    // It stops with 0.2 while a prefix of 0.49 is running, which would have reached 0.343.
    assert_eq!(output.completions[0].tokens, [1]);
    assert_close(output.upper_bound.unwrap(), 0.49_f64.ln(), IDENTITY);
    assert!(!output.is_optimal());
}

/// A model that gives only what it is asked for must be asked for what the constraints take away.
#[test]
fn a_banned_token_does_not_use_up_the_likeliest_few() {
    let policy = Constant::of(&[0.4, 0.3, 0.15, 0.1, 0.03, 0.02]);
    let request = Request {
        top_k: Some(1),
        constraints: Constraints {
            banned: vec![0, 1],
            ..Constraints::default()
        },
        ..Request::new([], [5], 2)
    };
    let output = greedy(&mut Honest::new(Policies::new(&policy)), &request).unwrap();
    assert_eq!(output.completions[0].tokens, [2, 2]);
}

/// The first token decides what follows it: two even choices after 0, one sure one after 1.
#[derive(Clone, Debug)]
struct TwoRoads;

impl TokenPolicy for TwoRoads {
    fn vocab(&self) -> usize {
        3
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        let row = |state: &&[u32]| match state {
            [] => [0.6_f64, 0.4, 0.0],
            [0, ..] => [0.5, 0.5, 0.0],
            _ => [0.0, 0.0, 1.0],
        };
        let probs = states.iter().flat_map(row);
        LogpRows::new(3, probs.map(f64::ln).collect())
    }
}

#[test]
fn rollouts_value_a_prefix_by_the_score_to_come_and_not_by_the_score_so_far() {
    let request = Request::new([], [2], 2);
    let draws = SampleConfig {
        n: 3,
        ..SampleConfig::default()
    };
    let config = LookaheadConfig {
        depth: 1,
        width: None,
    };
    // log 0.6 + log 0.5 is less than log 0.4 + 0; with the prefix counted twice it would be more.
    let look = lookahead(
        &mut Policies::new(&TwoRoads),
        &request,
        &config,
        Leaf::Rollouts(draws),
    );
    assert_eq!(look.unwrap().completions[0].tokens, [1, 2]);
    let greedy = greedy(&mut Policies::new(&TwoRoads), &request).unwrap();
    assert_eq!(greedy.completions[0].tokens[0], 0);
}

#[test]
fn the_max_backup_keeps_the_best_rollout_and_the_mean_backup_their_mean() {
    // Ending at once is possible, and worse than any rollout.
    let policy = Constant::of(&[0.6, 0.3999, 0.0001]);
    let request = Request {
        budget: Budget {
            simulations: Some(1),
            ..Budget::default()
        },
        ..Request::new([], [2], 6)
    };
    let draws = SampleConfig {
        n: 8,
        seed: 4,
        ..SampleConfig::default()
    };
    let root = |backup| {
        let config = MctsConfig {
            backup,
            commit: Commit::AtEnd,
            trace: true,
            n_best: 100,
            ..MctsConfig::default()
        };
        let model = &mut Policies::new(&policy);
        let output = mcts(model, &request, &config, Leaf::Rollouts(draws)).unwrap();
        assert_eq!(output.stats.root_values.len(), 1);
        (output.stats.root_values[0], output.completions)
    };
    let (best, completions) = root(Backup::Max);
    assert_close(best, completions[0].score, IDENTITY);
    let (mean, _) = root(Backup::Mean);
    assert!(mean < best - IDENTITY && mean > -20.0, "{mean} and {best}");
}

/// A request of at most so many tokens, the policy's logps changed on the way.
fn two_roads(processor: LogitProcessor<'_>, max_new_tokens: usize) -> Request<'_> {
    Request {
        constraints: Constraints {
            processor: Some(processor),
            ..Constraints::default()
        },
        ..Request::new([], [2], max_new_tokens)
    }
}

/// Closes the likelier of two roads behind its first token.
fn dead_end(state: &[u32], logps: &mut [f64]) {
    if state == [0] {
        logps.fill(f64::NEG_INFINITY);
    }
}

#[test]
fn a_dead_end_is_no_completion_however_likely_its_prefix() {
    let request = two_roads(&dead_end, 2);
    for (backup, commit) in [
        (Backup::Max, Commit::AtEnd),
        (Backup::Max, Commit::EachToken),
        (Backup::Soft, Commit::EachToken),
    ] {
        let config = MctsConfig {
            backup,
            commit,
            trace: true,
            ..MctsConfig::default()
        };
        let output = mcts(&mut Policies::new(&TwoRoads), &request, &config, Leaf::Zero).unwrap();
        assert_eq!(output.completions[0].tokens, [1, 2]);
        // The other road's 0.6 is worth nothing to the best, and to the covered mass.
        assert_close(
            *output.stats.root_values.last().unwrap(),
            0.4_f64.ln(),
            IDENTITY,
        );
    }
}

#[test]
fn where_every_road_is_a_dead_end_all_return_the_prefix_they_got_to() {
    let closed = |state: &[u32], logps: &mut [f64]| {
        if !state.is_empty() {
            logps.fill(f64::NEG_INFINITY);
        }
    };
    let request = two_roads(&closed, 2);
    let model = || Policies::new(&TwoRoads);
    let wide = LookaheadConfig {
        depth: usize::MAX,
        width: None,
    };
    let outputs = [
        greedy(&mut model(), &request),
        beam_search(&mut model(), &request, &BeamConfig::default()),
        best_first(&mut model(), &request, &BestFirstConfig::default()),
        lookahead(&mut model(), &request, &wide, Leaf::Zero),
        mcts(&mut model(), &request, &MctsConfig::default(), Leaf::Zero),
    ];
    for output in outputs {
        let found = &output.unwrap().completions[0];
        assert_eq!(found.end, End::Unfinished);
        assert!(found.tokens.len() < 2, "{found:?}");
    }
}

#[test]
fn the_mean_backup_writes_nothing_behind_a_dead_end() {
    let request = Request {
        keep_tree: true,
        ..two_roads(&dead_end, 2)
    };
    let config = MctsConfig {
        backup: Backup::Mean,
        ..MctsConfig::default()
    };
    for root in [
        RootChoice::Puct,
        RootChoice::Gumbel {
            considered: 2,
            seed: 3,
        },
    ] {
        let config = MctsConfig { root, ..config };
        let output = mcts(&mut Policies::new(&TwoRoads), &request, &config, Leaf::Zero).unwrap();
        assert_eq!(output.completions[0].tokens, [1, 2]);
        // It is seen to be one at the first visit, and no second is made.
        let tree = output.tree.unwrap();
        let dead = tree
            .nodes
            .iter()
            .find(|node| node.parent == Some(0) && node.token == Some(0));
        assert_eq!(dead.unwrap().visits, 1);
    }
}

#[test]
fn a_road_with_dead_ends_alone_is_one() {
    // All ways on from the likely road are closed, one token later.
    let dead_ends = |state: &[u32], logps: &mut [f64]| match state {
        [0, _] => logps.fill(f64::NEG_INFINITY),
        [1] => logps.copy_from_slice(&[f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0]),
        _ => {}
    };
    let request = Request {
        keep_tree: true,
        ..two_roads(&dead_ends, 3)
    };
    for backup in [Backup::Max, Backup::Soft, Backup::Mean] {
        let config = MctsConfig {
            backup,
            ..MctsConfig::default()
        };
        let output = mcts(&mut Policies::new(&TwoRoads), &request, &config, Leaf::Zero).unwrap();
        assert_eq!(output.completions[0].tokens, [1, 2], "{backup:?}");
        let tree = output.tree.unwrap();
        let dead = tree
            .nodes
            .iter()
            .find(|node| node.parent == Some(0) && node.token == Some(0));
        assert!(
            dead.unwrap().visits <= 3,
            "{backup:?}: the road and its two ends"
        );
    }
}

#[test]
fn a_stopped_best_first_search_returns_a_prefix_that_can_go_on() {
    let request = Request {
        budget: Budget {
            tokens: Some(2),
            ..Budget::default()
        },
        ..two_roads(&dead_end, 2)
    };
    let config = BestFirstConfig::default();
    let output = best_first(&mut Policies::new(&TwoRoads), &request, &config).unwrap();
    assert_eq!(output.completions[0].tokens, [1]);
}

#[test]
fn a_stopped_lookahead_returns_the_best_completion_it_saw() {
    // Three states are the root and both roads; the third road is a completion by itself.
    let policy = Constant::of(&[0.45, 0.35, 0.2]);
    let request = Request {
        budget: Budget {
            tokens: Some(3),
            ..Budget::default()
        },
        ..Request::new([], [2], 4)
    };
    let config = LookaheadConfig {
        depth: 2,
        width: None,
    };
    let output = lookahead(&mut Policies::new(&policy), &request, &config, Leaf::Zero).unwrap();
    assert_eq!(output.completions[0].tokens, [2]);
    assert_eq!(output.completions[0].end, End::Eos);
}

#[test]
fn without_a_weight_the_reference_may_rule_out_what_it_likes() {
    let policy = Constant::of(&[0.4, 0.6]);
    let reference = Constant::of(&[1.0, 0.0]);
    let request = Request {
        score: Score::Mix { reference: 0.0 },
        ..Request::new([], [1], 3)
    };
    let mut model = Policies::new(&policy).with_reference(&reference);
    let output = greedy(&mut model, &request).unwrap();
    assert_eq!(output.completions[0].tokens, [1]);
    assert_close(output.completions[0].score, 0.6_f64.ln(), IDENTITY);
}
