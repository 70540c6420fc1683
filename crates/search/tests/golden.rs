//! Beam search equals transformers', case by case.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;

use mdp_core::{LogpRows, MdpError, TokenPolicy, log_sum_exp};
use search::{BeamConfig, Constraints, EarlyStopping, Policies, Request, beam_search};
use serde_json::Value;

/// Both sides add up to 12 logps in double, of magnitude up to 40: rounding is near 1e-14. A wrong
/// rule moves a score by 1e-3 at least.
const DOUBLE_SUM: f64 = 1e-12;

/// Logits by the number of tokens and the last of them.
struct Table {
    vocab: usize,
    /// `[lengths][last token][vocab]`.
    logits: Vec<Vec<Vec<f64>>>,
}

impl TokenPolicy for Table {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn next_logps(&self, states: &[&[u32]]) -> Result<LogpRows, MdpError> {
        let mut values = Vec::new();
        for state in states {
            let last = state[state.len() - 1] as usize;
            let row = &self.logits[state.len() % self.logits.len()][last];
            let total = log_sum_exp(row);
            values.extend(row.iter().map(|logit| logit - total));
        }
        LogpRows::new(self.vocab, values)
    }
}

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/search/beam.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn tokens(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn size(case: &Value, name: &str) -> usize {
    case[name].as_u64().unwrap() as usize
}

fn config(case: &Value) -> BeamConfig {
    BeamConfig {
        width: size(case, "width"),
        n_best: size(case, "width"),
        length_penalty: case["length_penalty"].as_f64().unwrap(),
        early_stopping: match &case["early_stopping"] {
            Value::Bool(true) => EarlyStopping::AtOnce,
            Value::Bool(false) => EarlyStopping::Estimate,
            _ => EarlyStopping::Never,
        },
        ..BeamConfig::default()
    }
}

fn request(case: &Value) -> Request<'static> {
    Request {
        constraints: Constraints {
            banned: tokens(&case["banned"]),
            min_new_tokens: size(case, "min_new_tokens"),
            ..Constraints::default()
        },
        ..Request::new(
            tokens(&case["prompt"]),
            tokens(&case["eos"]),
            size(case, "max_new_tokens"),
        )
    }
}

#[test]
fn beams_equal_transformers_for_every_penalty_stopping_rule_width_and_constraint() {
    let golden = golden();
    let (mut worst, mut n_completions): (f64, usize) = (0.0, 0);
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let table = &golden["tables"][case["table"].as_str().unwrap()];
        let policy = Table {
            vocab: size(&golden["about"], "vocab"),
            logits: serde_json::from_value(table.clone()).unwrap(),
        };
        let output =
            beam_search(&mut Policies::new(&policy), &request(case), &config(case)).unwrap();
        let found: Vec<&[u32]> = output.completions.iter().map(|c| &c.tokens[..]).collect();
        let expected: Vec<Vec<u32>> = serde_json::from_value(case["sequences"].clone()).unwrap();
        assert_eq!(found, expected, "{case}");
        let scores = case["scores"].as_array().unwrap();
        for (completion, score) in output.completions.iter().zip(scores) {
            let difference = (completion.score - score.as_f64().unwrap()).abs();
            assert!(difference <= DOUBLE_SUM, "{difference:e} in {case}");
            worst = worst.max(difference);
            n_completions += 1;
        }
    }
    println!(
        "{} cases, {n_completions} completions, worst score {worst:e}",
        cases.len()
    );
    assert!(cases.len() > 200 && n_completions > 800);
}

/// A fixture that could not tell the rules apart would prove nothing.
#[test]
fn the_golden_cases_tell_the_stopping_rules_and_the_penalties_apart() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    let differing = |key: &str| {
        let strip = |case: &Value| {
            let mut case = case.as_object().unwrap().clone();
            for name in [key, "sequences", "scores"] {
                case.remove(name);
            }
            Value::Object(case)
        };
        let mut n = 0;
        for (i, a) in cases.iter().enumerate() {
            for b in &cases[i + 1..] {
                n += usize::from(strip(a) == strip(b) && a["sequences"] != b["sequences"]);
            }
        }
        n
    };
    assert!(
        differing("early_stopping") > 20,
        "{}",
        differing("early_stopping")
    );
    assert!(
        differing("length_penalty") > 20,
        "{}",
        differing("length_penalty")
    );
}
