//! On the embedded task the true win rate is known: evaluations must find it.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use judge::{
    Comparison, EvalOptions, EvalOutcome, LengthUnit, MemoReward, RewardJudge, Rule, Sample,
    evaluate,
};
use memo_task::{MemoConfig, MemoTask, Split};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A careful writer's and an ordinary writer's summaries of the same memos.
fn pairs(n: usize, seed: u64) -> Vec<Comparison> {
    let ordinary = MemoTask::new(MemoConfig::default()).unwrap();
    let careful = MemoTask::new(MemoConfig {
        unusual_wrong_rate: 0.3,
        omit_rate: 0.06,
        ..MemoConfig::default()
    })
    .unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let examples = ordinary.examples(Split::Prompts, n, seed);
    examples
        .into_iter()
        .map(|example| {
            let mut write = |task: &MemoTask| {
                let completion = task.sample_completion(&example.memo, &mut rng).unwrap();
                let n_tokens = completion.ids.len();
                Sample::new(&example.prompt, completion.text).with("n_tokens", n_tokens)
            };
            Comparison {
                a: write(&careful),
                b: write(&ordinary),
            }
        })
        .collect()
}

fn run(pairs: &[Comparison], rule: Rule) -> EvalOutcome {
    let reward = MemoReward::new(MemoConfig::default()).unwrap();
    let judge = RewardJudge::new(reward, rule).unwrap();
    let options = EvalOptions {
        seed: 1,
        length_unit: LengthUnit::Tokens,
    };
    evaluate(pairs, &judge, &options, &mut |_| ()).unwrap()
}

#[test]
fn the_interval_holds_the_true_win_rate_as_often_as_it_says() {
    const RUNS: u64 = 40;
    // All of them at once, 20 times as many pairs as one run has, stand for the truth. The first
    // seed's pairs are in no run.
    let truth = run(&pairs(8000, 0), Rule::default()).win_rate.unwrap();
    assert!(truth.mean > 0.6 && truth.mean < 0.9, "{truth:?}");
    assert!(truth.ci_high - truth.ci_low < 0.025, "{truth:?}");
    let held = (1..=RUNS).filter(|&seed| {
        let found = run(&pairs(200, seed), Rule::default()).win_rate.unwrap();
        found.ci_low < truth.mean && truth.mean < found.ci_high
    });
    // 38 are expected. With a true coverage of 0.95, fewer than 33 come up once in 300 tries.
    let held = held.count();
    assert!(held >= 33, "{held} of {RUNS} intervals hold the truth");
}

#[test]
fn a_soft_rule_gives_the_rate_at_which_drawn_labels_prefer_a() {
    let pairs = pairs(400, 3);
    let sharpness = MemoConfig::default().label_sharpness;
    let soft = run(&pairs, Rule::BradleyTerry { sharpness });
    let strict = run(&pairs, Rule::default());
    assert_eq!(
        (soft.wins, soft.ties, soft.losses),
        (strict.wins, strict.ties, strict.losses)
    );
    // Noise of labels pulls the rate towards one half.
    let (soft, strict) = (soft.win_rate.unwrap().mean, strict.win_rate.unwrap().mean);
    assert!(0.5 < soft && soft < strict, "{soft}, {strict}");
}

#[test]
fn rewards_and_lengths_are_reported_for_both_sides() {
    let outcome = run(&pairs(400, 4), Rule::default());
    let (a, b) = (
        outcome.mean_reward_a.unwrap(),
        outcome.mean_reward_b.unwrap(),
    );
    assert!(a.ci_low > b.ci_high, "{a:?}, {b:?}");
    // The careful writer leaves less out.
    assert!(outcome.mean_length_a > outcome.mean_length_b);
    let controlled = outcome.length_controlled.unwrap();
    assert!(controlled.win_rate.mean > 0.5);
    assert_eq!(outcome.by_length.len(), 3);
    let json = serde_json::to_string(&outcome).unwrap();
    assert!(!json.contains("judgements") && json.contains("length_controlled"));
}
