//! `r2q reproduce beam`: what it writes, at a size that says nothing about the claims.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod common;

use std::collections::HashMap;

use common::{fail, r2q, succeed, write};
use serde_json::Value;

const RECIPE: &str = r#"
name = "tiny"
[model]
hidden_size = 16
intermediate_size = 16
layers = 1
heads = 2
kv_heads = 2
[task]
sft_examples = 32
train_pairs = 16
eval_pairs = 8
eval_prompts = 4
max_new_tokens = 8
[sft]
batch_size = 8
[preference]
[preference.optimizer]
learning_rate = 1e-3
"#;

/// Sums of the same f32 logps by a search and by a batch, and means of a few rewards.
const SAME: f64 = 1e-4;

#[test]
fn beam_writes_outcomes_that_agree_with_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", RECIPE);
    let out = folder.path().join("out");
    let run = || {
        let mut command = r2q();
        command.args(["reproduce", "beam", "--seeds", "1,2", "--betas", "0.5,2"]);
        command.args(["--widths", "2,3", "--prompts", "5", "--map-states", "64"]);
        command.args(["--simulations", "4"]);
        command.arg("--recipe").arg(&recipe).arg("--out").arg(&out);
        succeed(&mut command)
    };
    let read = || std::fs::read_to_string(out.join("results.json")).unwrap();
    run();
    let first = read();
    let results: Value = serde_json::from_str(&first).unwrap();
    for seed in results["seeds"].as_array().unwrap() {
        for cell in seed["cells"].as_array().unwrap() {
            let outcomes = cell["outcomes"].as_array().unwrap();
            let by_name: HashMap<&str, &Value> = outcomes
                .iter()
                .map(|outcome| (outcome["method"].as_str().unwrap(), outcome))
                .collect();
            let of = |name: &str, key: &str| by_name[name][key].as_f64().unwrap();
            assert!(of("greedy", "gain").abs() < SAME);
            assert!((of("greedy", "wins_greedy") - 0.5).abs() < SAME);
            for name in by_name.keys() {
                // The likeliest completion is at least as likely as anything that was found.
                assert!(of("MAP", "logp") >= of(name, "logp") - SAME, "{name}");
                let gain = of(name, "true_reward") - of("greedy", "true_reward");
                assert!((of(name, "gain") - gain).abs() < SAME, "{name}");
                assert!((1.0..=8.0).contains(&of(name, "tokens")), "{name}");
            }
            // Each chooser is best by its own measure, and more draws leave more to choose from.
            for (chooser, key) in [
                ("likelihood", "logp"),
                ("implicit reward", "implicit_reward"),
                ("true reward", "true_reward"),
            ] {
                let best = |n: usize| of(&format!("best of {n}, {chooser}"), key);
                for other in ["likelihood", "implicit reward", "true reward"] {
                    assert!(best(3) >= of(&format!("best of 3, {other}"), key) - SAME);
                }
                assert!(best(3) >= best(2) - SAME && best(2) >= of("sample", key) - SAME);
            }
        }
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("MCTS, soft backup") && page.contains("likelihood over length"));
    // Finished seeds are taken as they are.
    let said = run();
    assert!(said.contains("seed 2: taken from"), "{said}");
    assert_eq!(read(), first);
}

#[test]
fn widths_that_do_not_rise_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = r2q();
    command.args(["reproduce", "beam", "--widths", "5,2"]);
    let said = fail(command.arg("--out").arg(folder.path().join("out")));
    assert!(
        said.contains("rising widths") && said.contains("[5, 2]"),
        "{said}"
    );
}
