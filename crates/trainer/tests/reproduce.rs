//! `r2q reproduce`: what an experiment writes, at a size that says nothing about the claims.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod common;

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
beta = 1.0
[preference.optimizer]
learning_rate = 1e-3
"#;

#[test]
fn credit_writes_results_and_a_page_and_takes_finished_seeds_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", RECIPE);
    let out = folder.path().join("out");
    let run = || {
        let mut command = r2q();
        command.args(["reproduce", "credit", "--seeds", "1,2"]);
        command.args(["--copies", "6", "--oracle-copies", "2", "--rollouts", "4"]);
        command.arg("--recipe").arg(&recipe).arg("--out").arg(&out);
        succeed(&mut command)
    };
    let read = || std::fs::read_to_string(out.join("results.json")).unwrap();
    let said = run();
    assert!(said.contains("seed 2: AUROC"), "{said}");
    let first = read();
    let results: Value = serde_json::from_str(&first).unwrap();
    let methods = results["methods"].as_object().unwrap();
    assert_eq!(methods.len(), 6);
    for (name, figures) in methods {
        let auroc = figures["auroc"]["mean"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&auroc), "{name}: {auroc}");
        assert_eq!(figures["auroc"]["values"].as_array().unwrap().len(), 2);
    }
    assert!(
        results["targets"]
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t["held"].is_boolean())
    );
    let points = results["seeds"][0]["oracle_points"].as_array().unwrap();
    // Two copies, each at least as long as the shortest perfect summary.
    assert!(points.len() > 2 * 10);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("sequence reward model") && page.contains("Stated beforehand"));

    let said = run();
    assert!(said.contains("seed 1: taken from"), "{said}");
    assert_eq!(read(), first);
}

#[test]
fn credit_refuses_a_recipe_without_fine_tuning_and_odd_rollouts() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "bare.toml", "name = \"bare\"\n[task]\n");
    let mut command = r2q();
    command
        .args(["reproduce", "credit", "--recipe"])
        .arg(&recipe);
    command.arg("--out").arg(folder.path().join("out"));
    let said = fail(&mut command);
    assert!(
        said.contains("expected a recipe with [task] and [sft]"),
        "{said}"
    );

    let mut command = r2q();
    command.args(["reproduce", "credit", "--rollouts", "3", "--out"]);
    command.arg(folder.path().join("out"));
    assert!(fail(&mut command).contains("expected a multiple of 4 rollouts"));
    assert!(!folder.path().join("out").exists());
}
