//! Searches on models: cached prefixes equal recomputed ones, and beams equal transformers'.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use lm::{PrefixCache, Transformer};
use mdp_core::{LogpRows, MdpError, TokenPolicy, log_sum_exp};
use search::{
    BeamConfig, BestFirstConfig, Budget, Commit, EarlyStopping, Leaf, MctsConfig, Policies,
    Request, SampleConfig, Score, SearchOutput, beam_search, best_first, greedy, mcts, sample,
};
use serde_json::Value;

/// Both sides add up to 16 logps in f32, whose spread is below 1e-6 each; a wrong rule or a wrong
/// prefix moves a score by 1e-2 at least.
const SCORE_TOLERANCE: f64 = 1e-5;
/// transformers keeps scores in f32, and rounds once for each token.
const SCORE_ROUNDING: f64 = 1e-7;
/// The same sums in another order, in f32: logits differ by 1e-6, a dozen are added.
const FORK_TOLERANCE: f64 = 1e-5;

fn folders() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/lm");
    let further = std::env::var_os("R2Q_GOLDEN").map(PathBuf::from);
    let mut folders = Vec::new();
    for root in std::iter::once(own).chain(further) {
        let entries = std::fs::read_dir(&root).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        folders.extend(paths.filter(|path| path.join("golden.json").is_file()));
    }
    folders.sort();
    assert!(folders.len() >= 7, "the seven fixtures are there");
    folders
}

fn read(name: &str) -> Transformer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/lm");
    Transformer::read(&folder.join(name), &Device::default()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn beams_equal_transformers_for_every_family_penalty_and_stopping_rule() {
    let (mut n_cases, mut n_ended, mut worst) = (0, 0, 0.0_f64);
    for folder in folders() {
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        let beam = &golden["beam"];
        let Some(cases) = beam["results"].as_array() else {
            continue;
        };
        let policy = Transformer::read(&folder, &Device::default()).unwrap();
        for case in cases {
            let width = case["num_beams"].as_u64().unwrap() as usize;
            let config = BeamConfig {
                width,
                n_best: width,
                length_penalty: case["length_penalty"].as_f64().unwrap(),
                early_stopping: match &case["early_stopping"] {
                    Value::Bool(true) => EarlyStopping::AtOnce,
                    Value::Bool(false) => EarlyStopping::Estimate,
                    _ => EarlyStopping::Never,
                },
                ..BeamConfig::default()
            };
            let eos: Vec<u32> = case["eos_id"]
                .as_u64()
                .map(|id| id as u32)
                .into_iter()
                .collect();
            n_ended += usize::from(!eos.is_empty());
            let most = case["max_new_tokens"].as_u64().unwrap() as usize;
            let request = Request::new(ids(&beam["prompt"]), eos, most);
            let output = beam_search(&mut PrefixCache::new(&policy), &request, &config).unwrap();
            let found: Vec<&[u32]> = output.completions.iter().map(|c| &c.tokens[..]).collect();
            let expected: Vec<Vec<u32>> =
                serde_json::from_value(case["float32"]["sequences"].clone()).unwrap();
            assert_eq!(found, expected, "{} {case}", folder.display());
            let scores = case["float32"]["sequences_scores"].as_array().unwrap();
            for (completion, score) in output.completions.iter().zip(scores) {
                let difference = (completion.score - score.as_f64().unwrap()).abs();
                let allowed = SCORE_TOLERANCE + SCORE_ROUNDING * completion.score.abs();
                assert!(difference <= allowed, "{difference:e} in {case}");
                worst = worst.max(difference);
            }
            n_cases += 1;
        }
    }
    println!("{n_cases} cases, {n_ended} with an end token, worst score {worst:e}");
    assert!(
        n_cases >= 84 && n_ended >= 42,
        "two penalties, three rules, seven models"
    );
}

/// The model without any cache: each prefix from its first token.
struct FromScratch<'a>(&'a Transformer);

impl TokenPolicy for FromScratch<'_> {
    fn vocab(&self) -> usize {
        self.0.config().vocab_size
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        let mut values = Vec::new();
        for state in states {
            let ids: Vec<i64> = state.iter().map(|&id| i64::from(id)).collect();
            let ids = TensorData::new(ids, [1, state.len()]);
            let ids = Tensor::<2, Int>::from_data(ids, &Device::default());
            let logits: Vec<f32> = self.0.logits(ids).try_into_vec_as().unwrap();
            let last: Vec<f64> = logits[logits.len() - self.vocab()..]
                .iter()
                .map(|&logit| f64::from(logit))
                .collect();
            let total = log_sum_exp(&last);
            values.extend(last.iter().map(|logit| logit - total));
        }
        LogpRows::new(self.vocab(), values)
    }
}

fn request(score: Score, top_k: Option<usize>, states: usize) -> Request<'static> {
    Request {
        score,
        top_k,
        keep_tree: true,
        budget: Budget {
            tokens: Some(states),
            ..Budget::default()
        },
        ..Request::new([5, 17, 99], [92], 10)
    }
}

/// Every algorithm that asks for frontiers of another kind: one prefix, a beam, prefixes of
/// different lengths, subtrees that are kept.
fn outputs(model: &mut dyn search::PrefixModel) -> Vec<SearchOutput> {
    let beam = BeamConfig {
        width: 4,
        n_best: 4,
        ..BeamConfig::default()
    };
    let first = BestFirstConfig {
        n_best: 2,
        batch: 5,
    };
    let tree = |commit| MctsConfig {
        simulations: 24,
        batch: 3,
        commit,
        ..MctsConfig::default()
    };
    let drawn = SampleConfig {
        n: 6,
        seed: 3,
        ..SampleConfig::default()
    };
    let ratio = request(Score::LogRatio, Some(5), 200);
    let likely = request(Score::Likelihood, None, 120);
    vec![
        greedy(model, &likely).unwrap(),
        beam_search(model, &likely, &beam).unwrap(),
        beam_search(model, &ratio, &beam).unwrap(),
        best_first(model, &likely, &first).unwrap(),
        best_first(model, &ratio, &first).unwrap(),
        mcts(model, &ratio, &tree(Commit::EachToken), Leaf::Zero).unwrap(),
        mcts(model, &ratio, &tree(Commit::AtEnd), Leaf::Rollouts(drawn)).unwrap(),
        sample(model, &likely, &drawn).unwrap(),
    ]
}

fn assert_same(cached: &[SearchOutput], scratch: &[SearchOutput]) -> f64 {
    let mut worst = 0.0_f64;
    for (which, (a, b)) in cached.iter().zip(scratch).enumerate() {
        assert_eq!(a.completions.len(), b.completions.len());
        for (a, b) in a.completions.iter().zip(&b.completions) {
            assert_eq!(a.tokens, b.tokens, "algorithm {which}");
        }
        let (a, b) = (a.tree.as_ref().unwrap(), b.tree.as_ref().unwrap());
        assert_eq!(a.nodes.len(), b.nodes.len(), "algorithm {which}");
        for (a, b) in a.nodes.iter().zip(&b.nodes) {
            assert_eq!(
                (a.parent, a.token),
                (b.parent, b.token),
                "algorithm {which}"
            );
            let difference = (a.score - b.score).abs();
            assert!(
                difference < FORK_TOLERANCE,
                "algorithm {which}: {difference:e}"
            );
            worst = worst.max(difference);
        }
    }
    worst
}

#[test]
fn forked_prefixes_equal_prefixes_recomputed_from_scratch() {
    for (policy, reference) in [("llama_tied", "llama_untied"), ("gpt2", "qwen3")] {
        let (policy, reference) = (read(policy), read(reference));
        let (p, r) = (FromScratch(&policy), FromScratch(&reference));
        let scratch = outputs(&mut Policies::new(&p).with_reference(&r));
        let mut model = PrefixCache::new(&policy)
            .with_reference(&reference)
            .unwrap();
        let worst = assert_same(&outputs(&mut model), &scratch);
        println!("worst score of a prefix {worst:e}");
        assert_eq!(model.stats().recomputed, 0);
    }
}

#[test]
fn a_tight_budget_forgets_and_recomputes_without_changing_an_answer() {
    let (policy, reference) = (read("llama_tied"), read("llama_untied"));
    let model = || {
        PrefixCache::new(&policy)
            .with_reference(&reference)
            .unwrap()
    };
    let mut free = model().max_rows(2);
    let expected = outputs(&mut free);
    let first = BestFirstConfig {
        n_best: 2,
        batch: 5,
    };
    let ratio = request(Score::LogRatio, Some(5), 200);
    best_first(&mut free, &ratio, &first).unwrap();
    let bytes = free.stats().bytes_per_token;
    // Five prefixes of at most 13 tokens always have their place among 70.
    let tokens = 70;
    let mut tight = model().limit_bytes(tokens * bytes);
    assert_same(&outputs(&mut tight), &expected);
    best_first(&mut tight, &ratio, &first).unwrap();
    let stats = tight.stats();
    assert!(
        stats.recomputed > 0 && free.stats().recomputed == 0,
        "{stats:?}"
    );
    assert!(free.stats().peak_tokens > 2 * tokens, "{:?}", free.stats());
    assert!(
        stats.peak_tokens <= tokens && stats.peak_capacity <= tokens,
        "{stats:?}"
    );
}

#[test]
fn a_beam_holds_the_tokens_of_its_tree_and_an_eighth_more() {
    let policy = read("llama_tied");
    let mut model = PrefixCache::new(&policy);
    let (prompt, new) = (vec![7; 40], 80);
    let request = Request::new(prompt, [], new);
    let beam = BeamConfig {
        width: 5,
        ..BeamConfig::default()
    };
    beam_search(&mut model, &request, &beam).unwrap();
    let stats = model.stats();
    assert!(
        stats.peak_tokens < 40 + 5 * new,
        "beams share their beginnings: {stats:?}"
    );
    assert!(
        stats.peak_capacity <= stats.peak_tokens * 9 / 8 + 1,
        "{stats:?}"
    );
    assert_eq!(
        stats.steps, new,
        "the prompt, and a step for each token but the last"
    );
}

#[test]
fn what_a_model_cannot_hold_is_an_error_before_the_search() {
    let policy = read("llama_tied");
    let mut model = PrefixCache::new(&policy);
    let message = |request: &Request<'_>, model: &mut PrefixCache<'_>| {
        greedy(model, request).unwrap_err().to_string()
    };
    let long = message(&Request::new([5, 6], [2], 127), &mut model);
    assert!(long.contains("128"), "{long}");
    let empty = message(&Request::new([], [2], 4), &mut model);
    assert!(empty.contains("empty"), "{empty}");
}
