//! Decoding and search: the same texts, with the same scores.

use dpo_loss::Beta;
use lm::{Decoding, Generate, PrefixCache, Sampling, Transformer};
use search::{BeamConfig, Request, Score, SearchOutput, beam_search};

use super::common::testdata;
use super::training::folders;
use super::{LOGP_TOLERANCE, assert_close, numbers, on_both};

/// Prompts of unequal length, so that rows are padded.
const PROMPTS: [&[u32]; 3] = [&[5, 9, 11, 40], &[7, 3], &[60, 61, 62, 63, 20, 21]];
const NEW_TOKENS: usize = 8;

#[test]
fn greedy_and_sampled_texts_agree_on_every_architecture() {
    for folder in folders() {
        let [cpu, device] = on_both(|device| {
            let model = Transformer::read(&folder, device).unwrap();
            let texts = |decoding| {
                let options = Generate {
                    max_new_tokens: NEW_TOKENS,
                    eos_ids: vec![2],
                    decoding,
                    seed: 4,
                };
                model.generate(&PROMPTS, &options).unwrap()
            };
            // A draw hangs on a sum of probabilities: the chance that rounding moves it across a
            // token's bound is 1e-6 for each token.
            let drawn = texts(Decoding::Sample(Sampling::default()));
            (texts(Decoding::Greedy), drawn)
        });
        assert_eq!(cpu, device, "{}", folder.display());
    }
}

#[test]
fn logits_behind_a_cache_agree() {
    for name in ["llama_untied", "gpt2"] {
        let [cpu, device] = on_both(|device| {
            let model = Transformer::read(&testdata("lm").join(name), device).unwrap();
            let decoder = lm::Decoder::new(&model);
            let (cache, first) = decoder.prefill(&PROMPTS, 2).unwrap();
            let mut fork = cache.select(&[2, 0, 0]);
            let second = decoder.step(&[10, 11, 12], &mut fork);
            [numbers(first), numbers(second)].concat()
        });
        assert_close(&cpu, &device, LOGP_TOLERANCE, name);
    }
}

/// A beam's completions and their scores.
fn beam(name: &str, request: &Request<'_>) -> [SearchOutput; 2] {
    on_both(|device| {
        let model = Transformer::read(&testdata("lm").join(name), device).unwrap();
        let reference = Transformer::init(model.config().clone(), 5, device).unwrap();
        let config = BeamConfig {
            width: 4,
            n_best: 4,
            ..BeamConfig::default()
        };
        let cache = PrefixCache::new(&model);
        let mut cache = cache.with_reference(&reference).unwrap();
        beam_search(&mut cache, request, &config).unwrap()
    })
}

#[test]
fn beams_agree_by_likelihood_and_by_implicit_reward() {
    for name in ["llama_untied", "gpt_neox"] {
        for score in [Score::Likelihood, Score::LogRatio] {
            let request = Request {
                score: score.clone(),
                beta: Beta::new(0.5).unwrap(),
                ..Request::new(PROMPTS[0], vec![2], NEW_TOKENS)
            };
            let [cpu, device] = beam(name, &request);
            let what = format!("{name} by {score:?}");
            let tokens = |output: &SearchOutput| -> Vec<Vec<u32>> {
                let found = output.completions.iter();
                found.map(|completion| completion.tokens.clone()).collect()
            };
            assert_eq!(tokens(&cpu), tokens(&device), "{what}");
            let scores = |output: &SearchOutput| -> Vec<f32> {
                let found = output.completions.iter();
                found.map(|completion| completion.score as f32).collect()
            };
            assert_close(&scores(&cpu), &scores(&device), LOGP_TOLERANCE, &what);
        }
    }
}
