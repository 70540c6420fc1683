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

/// Means of the same tens of nats, in another order.
const SAME_SUM: f64 = 1e-6;

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

#[test]
fn curves_look_at_every_cell_from_no_step_to_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", RECIPE);
    let out = folder.path().join("out");
    let run = || {
        let mut command = r2q();
        command.args(["reproduce", "curves", "--seeds", "1,2", "--betas", "0.5,2"]);
        command.args(["--fit-examples", "16", "--evaluations", "2"]);
        command.arg("--recipe").arg(&recipe).arg("--out").arg(&out);
        succeed(&mut command)
    };
    let read = || std::fs::read_to_string(out.join("results.json")).unwrap();
    run();
    let first = read();
    let results: Value = serde_json::from_str(&first).unwrap();
    for seed in results["seeds"].as_array().unwrap() {
        let cross_entropy = |name: &str| seed["cross_entropies"][name].as_f64().unwrap();
        let cells = seed["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 3 * 2);
        for cell in cells {
            let beta = cell["beta"].as_f64().unwrap();
            let reference = cell["reference"].as_str().unwrap();
            // The bound by its two cross-entropies.
            let bound = beta * (cross_entropy(reference) - cross_entropy("best fit"));
            assert!((cell["bound"].as_f64().unwrap() - bound).abs() < SAME_SUM);
            let points = cell["points"].as_array().unwrap();
            assert_eq!(points.len(), 3);
            let number = |at: usize, key: &str| points[at][key].as_f64().unwrap();
            // A policy that is the reference has earned nothing, by any path.
            for key in ["chosen", "rejected", "kl"] {
                assert!(number(0, key).abs() < SAME_SUM, "{key}");
            }
            assert!(number(2, "chosen").abs() > SAME_SUM);
            for at in 0..3 {
                let excess = number(at, "chosen") - bound;
                assert!((number(at, "excess") - excess).abs() < SAME_SUM);
            }
        }
    }
    // The bound, and two claims of each cell.
    assert_eq!(results["targets"].as_array().unwrap().len(), 1 + 2 * 6);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("SFT on both") && page.contains("Stated beforehand"));
    assert!(run().contains("seed 1: taken from"));
    assert_eq!(read(), first);

    let mut command = r2q();
    command.args(["reproduce", "curves", "--betas", "1,0", "--out"]);
    command.arg(folder.path().join("refused"));
    assert!(fail(&mut command).contains("beta 0"));
}
