//! What holds for the data: labels, splits, flaws, and the laws of the reward.

use std::collections::{HashMap, HashSet};

use memo_task::{
    Completion, CorruptionKind, Fact, Layout, Memo, MemoConfig, MemoTask, RewardKind, Split,
    UNSEEN_TOGETHER, ceiling,
};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Sums of at most 40 decimal weights.
const EXACT: f64 = 1e-10;

fn task() -> MemoTask {
    MemoTask::new(MemoConfig::default()).expect("the defaults are in range")
}

fn completions(task: &MemoTask, split: Split, n_pairs: usize) -> Vec<(Memo, Completion)> {
    let pairs = task.pairs(split, n_pairs, 0);
    let both =
        |pair: memo_task::Pair| [(pair.memo.clone(), pair.chosen), (pair.memo, pair.rejected)];
    pairs.into_iter().flat_map(both).collect()
}

#[test]
fn each_flaw_costs_exactly_its_penalty_where_it_stands() {
    let task = task();
    let weights = task.config().weights;
    for split in Split::ALL {
        for (memo, completion) in completions(&task, split, 500) {
            let mut expected = vec![0.0; completion.ids.len()];
            for corruption in &completion.corruptions {
                for at in corruption.positions.clone() {
                    expected[at] += match corruption.kind {
                        CorruptionKind::Wrong(_) => weights.contradiction,
                        CorruptionKind::Omitted(_) => weights.missing,
                        CorruptionKind::Filler | CorruptionKind::Repeat => weights.filler,
                    };
                }
                if let CorruptionKind::Wrong(fact) = corruption.kind {
                    assert_eq!(completion.facts[corruption.positions.start], Some(fact));
                }
            }
            for (at, (reward, expected)) in completion.rewards.iter().zip(&expected).enumerate() {
                assert!(
                    (reward - expected).abs() < EXACT,
                    "{memo:?}\n{}\ntoken {at}: {reward}, planned {expected}",
                    completion.text
                );
            }
        }
    }
}

#[test]
fn good_completions_are_perfect_and_worded_in_many_ways() {
    let task = task();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let memo = task.examples(Split::Eval, 1, 0)[0].memo.clone();
    let mut texts = HashSet::new();
    for _ in 0..300 {
        let completion = task.good_completion(&memo, &mut rng).unwrap();
        assert!(
            completion.total_reward().abs() < EXACT,
            "{}",
            completion.text
        );
        texts.insert(completion.text);
    }
    assert!(texts.len() > 100, "only {} wordings", texts.len());
    assert!(task.best_completion(&memo).unwrap().total_reward().abs() < EXACT);
}

#[test]
fn corrupting_one_fact_changes_one_token_and_costs_one_contradiction() {
    let task = task();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for example in task.examples(Split::Eval, 50, 0) {
        let good = task.good_completion(&example.memo, &mut rng).unwrap();
        for fact in Fact::ALL {
            let bad = task
                .corrupt(&example.memo, &good, &[fact], &mut rng)
                .unwrap();
            let at = bad.corruptions[0].positions.start;
            for i in 0..good.ids.len() {
                assert_eq!(good.ids[i] == bad.ids[i], i != at);
                let expected = if i == at { -1.0 } else { 0.0 };
                assert!((bad.rewards[i] - expected).abs() < EXACT, "{}", bad.text);
            }
            // What is wrong already cannot be corrupted again.
            let error = task
                .corrupt(&example.memo, &bad, &[fact], &mut rng)
                .unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("does not state the {fact}"))
            );
        }
        for (a, b) in UNSEEN_TOGETHER {
            let bad = task
                .corrupt(&example.memo, &good, &[a, b], &mut rng)
                .unwrap();
            assert!(bad.has_unseen_combination());
            assert!((bad.total_reward() - -2.0).abs() < EXACT);
        }
    }
}

#[test]
fn forbidden_combinations_are_only_in_the_unseen_split() {
    let task = task();
    for split in Split::ALL {
        for (_, completion) in completions(&task, split, 2000) {
            assert_eq!(completion.has_unseen_combination(), split == Split::Unseen);
        }
        for example in task.examples(split, 2000, 0) {
            assert_eq!(
                example.completion.has_unseen_combination(),
                split == Split::Unseen
            );
        }
    }
    // Either half of each pair does occur in training, and so do other combinations.
    let train = completions(&task, Split::Train, 2000);
    let n_with = |facts: &[Fact]| {
        let wrong = |c: &Completion| facts.iter().all(|fact| c.has(CorruptionKind::Wrong(*fact)));
        train
            .iter()
            .filter(|(_, completion)| wrong(completion))
            .count()
    };
    for (a, b) in UNSEEN_TOGETHER {
        assert!(n_with(&[a]) > 300 && n_with(&[b]) > 300);
    }
    assert!(n_with(&[Fact::Amount, Fact::Day]) > 20);
}

#[test]
fn label_frequencies_are_bradley_terry() {
    let task = task();
    let pairs = task.pairs(Split::Train, 4000, 5);
    for pair in &pairs {
        let margin = pair.chosen.total_reward() - pair.rejected.total_reward();
        let p = 1.0 / (1.0 + (-task.config().label_sharpness * margin).exp());
        assert!((p - pair.p_chosen).abs() < EXACT);
    }
    // Where the better completion has probability p, it is chosen in a share p of the pairs. Four
    // standard deviations of a sum of independent labels: one failure in 16,000 seeds.
    const BOUND_SDS: f64 = 4.0;
    for (low, high) in [(0.5, 0.8), (0.8, 0.97), (0.97, 1.0), (0.5, 1.0)] {
        let (mut n_better, mut expected, mut variance) = (0.0, 0.0, 0.0);
        for pair in &pairs {
            let p = pair.p_chosen.max(1.0 - pair.p_chosen);
            if (low..=high).contains(&p) {
                n_better += f64::from(u8::from(pair.p_chosen > 0.5));
                // A tie is neither better nor worse.
                expected += if p > 0.5 { p } else { 0.0 };
                variance += p * (1.0 - p);
            }
        }
        let bound = BOUND_SDS * f64::sqrt(variance);
        assert!(variance > 1.0, "too few pairs in {low}..{high}");
        assert!(
            f64::abs(n_better - expected) < bound,
            "{n_better} of {expected} ± {bound}"
        );
    }
}

#[test]
fn the_label_noise_leaves_the_ceiling_near_nine_in_ten() {
    let task = task();
    for split in [Split::Train, Split::Eval, Split::Unseen] {
        let pairs = task.pairs(split, 2000, 1);
        let ceiling = ceiling(&pairs);
        assert!((0.87..0.93).contains(&ceiling), "{split:?}: {ceiling}");
    }
}

#[test]
fn the_ceiling_of_hand_made_pairs_is_known() {
    let mut pairs = task().pairs(Split::Eval, 4, 0);
    for (pair, p) in pairs.iter_mut().zip([1.0, 0.25, 0.5, 0.75]) {
        pair.p_chosen = p;
    }
    assert!((ceiling(&pairs) - 0.75).abs() < EXACT);
    assert!((ceiling(&[]) - 0.5).abs() < EXACT);
}

#[test]
fn quality_varies_widely() {
    let task = task();
    let rewards: Vec<f64> = completions(&task, Split::Sft, 2000)
        .iter()
        .map(|(_, c)| c.total_reward())
        .collect();
    let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
    let share = |keep: &dyn Fn(f64) -> bool| {
        rewards.iter().filter(|reward| keep(**reward)).count() as f64 / rewards.len() as f64
    };
    assert!((-2.0..-1.3).contains(&mean), "{mean}");
    assert!(share(&|reward| reward > -EXACT) > 0.05);
    assert!(share(&|reward| reward < -3.0) > 0.05);
}

/// The probability that a value drawn from `high` has the larger score, ties counting half.
fn auroc(high: &[f64], low: &[f64]) -> f64 {
    let mut sum = 0.0;
    for a in high {
        for b in low {
            sum += if a > b {
                1.0
            } else {
                f64::from(u8::from(a >= b)) / 2.0
            };
        }
    }
    sum / (high.len() * low.len()) as f64
}

#[test]
fn surprise_does_not_find_the_wrong_values() {
    let task = task();
    let data = completions(&task, Split::Sft, 2000);
    let mut counts: HashMap<u32, f64> = HashMap::new();
    for (_, completion) in &data {
        for id in &completion.ids {
            *counts.entry(*id).or_default() += 1.0;
        }
    }
    let total: f64 = counts.values().sum();
    let (mut wrong, mut right) = (Vec::new(), Vec::new());
    for (_, completion) in &data[..600] {
        for (id, kind) in completion.ids.iter().zip(&completion.kinds) {
            let surprise = -(counts[id] / total).ln();
            match kind {
                RewardKind::Contradiction => wrong.push(surprise),
                RewardKind::Right => right.push(surprise),
                _ => {}
            }
        }
    }
    let auroc = auroc(&wrong, &right);
    assert!((0.3..0.7).contains(&auroc), "{auroc}");
    // Both ways of being misled are there: rare and right, common and wrong.
    let middle = (counts.len() as f64).ln();
    assert!(right.iter().filter(|surprise| **surprise > middle).count() > 100);
    assert!(wrong.iter().filter(|surprise| **surprise < middle).count() > 100);
}

#[test]
fn prompts_are_shared_by_no_two_splits() {
    let task = task();
    let mut seen: HashMap<Memo, Split> = HashMap::new();
    for split in Split::ALL {
        for seed in 0..2 {
            let memos: Vec<Memo> = task
                .pairs(split, 1000, seed)
                .into_iter()
                .map(|pair| pair.memo)
                .collect();
            assert_eq!(memos.iter().collect::<HashSet<_>>().len(), memos.len());
            for memo in memos {
                assert_eq!(*seen.entry(memo).or_insert(split), split);
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_data_and_a_longer_draw_begins_alike() {
    let (a, b) = (task(), task());
    for split in Split::ALL {
        let long = a.pairs(split, 60, 7);
        assert_eq!(long[..20], b.pairs(split, 20, 7));
        assert_ne!(long[..20], b.pairs(split, 20, 8));
        assert_eq!(a.examples(split, 9, 7), b.examples(split, 9, 7));
        assert_ne!(a.examples(split, 1, 7)[0].memo, long[0].memo);
    }
}

#[test]
fn the_first_pair_is_the_same_on_every_platform() {
    let pair = &task().pairs(Split::Train, 1, 0)[0];
    let shown = format!(
        "{}{}\n{}",
        pair.prompt, pair.chosen.text, pair.rejected.text
    );
    assert_eq!(shown, FIRST_TRAIN_PAIR);
}

/// Written by this crate; a change of it changes every figure measured on the task.
const FIRST_TRAIN_PAIR: &str = "Memo:
From: Laura
Place: Paris
Day: Friday
Time: 11:00
Goods: 40 crates of lamps
To: Hansen
Summary: Laura forwards 40 crates of lamps to Hansen, once again, in Paris at 11:00. They land on Friday.
 40 crates of lamps journey in Paris on Friday to Hansen from Laura. That is all we know.";

#[test]
fn memos_survive_json_and_prompts() {
    for example in task().examples(Split::Prompts, 50, 0) {
        let json = serde_json::to_string(&example).unwrap();
        assert_eq!(
            serde_json::from_str::<memo_task::Example>(&json).unwrap(),
            example
        );
        assert_eq!(Memo::parse(&example.prompt).unwrap(), example.memo);
        for layout in [Layout::Record, Layout::Note] {
            assert_eq!(
                Memo::parse(&example.memo.prompt(layout)).unwrap(),
                example.memo
            );
        }
    }
}

proptest! {
    #[test]
    fn any_tokens_have_finite_rewards_at_most_zero(
        ids in prop::collection::vec(0_u32..310, 1..60),
        seed in 0_u64..4,
    ) {
        let task = task();
        let memo = task.examples(Split::Prompts, 1, seed)[0].memo.clone();
        let rewards = task.token_rewards(&memo, &ids);
        prop_assert_eq!(rewards.len(), ids.len());
        for token in &rewards {
            prop_assert!(token.reward.is_finite() && token.reward <= 0.0);
            let is_free = matches!(
                token.kind,
                RewardKind::Right
                    | RewardKind::Connective
                    | RewardKind::End
                    | RewardKind::AfterEnd
            );
            prop_assert_eq!(is_free, token.reward.abs() < EXACT);
        }
        prop_assert!(ids.contains(&task.eos_id()) || rewards[ids.len() - 1].kind == RewardKind::Truncated);
    }

    #[test]
    fn a_reward_depends_on_the_tokens_up_to_it_only(
        ids in prop::collection::vec(2_u32..310, 1..40),
        cut in 0_usize..40,
    ) {
        let task = task();
        let memo = task.examples(Split::Prompts, 1, 0)[0].memo.clone();
        let cut = cut.min(ids.len());
        let with_end = |ids: &[u32]| [ids, &[task.eos_id()]].concat();
        let long = task.token_rewards(&memo, &with_end(&ids));
        let short = task.token_rewards(&memo, &with_end(&ids[..cut]));
        prop_assert_eq!(&long[..cut], &short[..cut]);
    }

    #[test]
    fn padding_behind_the_end_changes_nothing(seed in 0_u64..50, n_pad in 0_usize..10) {
        let task = task();
        let example = &task.examples(Split::Eval, 1, seed)[0];
        let mut ids = example.completion.ids.clone();
        ids.extend(std::iter::repeat_n(task.pad_id(), n_pad));
        let rewards = task.token_rewards(&example.memo, &ids);
        for (at, token) in rewards.iter().enumerate() {
            let expected = example.completion.rewards.get(at).copied().unwrap_or(0.0);
            prop_assert!((token.reward - expected).abs() < EXACT);
        }
    }
}
