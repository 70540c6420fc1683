//! `r2q reproduce`: what an experiment writes, at a size that says nothing about the claims.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod common;

use std::path::{Path, PathBuf};

use common::{fail, model_folder, r2q, succeed, testdata, write};
use serde_json::{Value, json};

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

/// Problems of two steps, each with a solution that errs at once and one that errs later.
fn solutions(folder: &Path) -> PathBuf {
    let rows = (2..26).flat_map(|n| {
        let solution = |first: i32, second: i32| {
            format!(
                "He has 2*{n}=<<2*{n}={first}>>{first} pears.\n\
                 With one more {first}+1=<<{first}+1={second}>>{second}.\nA: {second}"
            )
        };
        let right = solution(2 * n, 2 * n + 1);
        let late = solution(2 * n, 2 * n + 7);
        [solution(3 * n, 3 * n + 1), late].map(|wrong| {
            let question = format!("How many pears are twice {n} and one?");
            json!({"prompt": question, "chosen": right, "rejected": wrong}).to_string()
        })
    });
    write(
        folder,
        "solutions.jsonl",
        rows.collect::<Vec<_>>().join("\n"),
    )
}

#[test]
fn first_errors_are_looked_for_in_problems_that_were_not_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_untied");
    let data = solutions(folder.path());
    let out = folder.path().join("out");
    // The tiny tokenizer knows no signs; it gets them for letters that nothing here is written with.
    let tokenizer = model.join("tokenizer.json");
    let mut known: Value =
        serde_json::from_str(&std::fs::read_to_string(&tokenizer).unwrap()).unwrap();
    let vocabulary = known["model"]["vocab"].as_object_mut().unwrap();
    for (letter, sign) in ["BH", "j<", "k>", "q=", "x*", "v+"].map(|both| both.split_at(1)) {
        let id = vocabulary.remove(letter).unwrap();
        vocabulary.insert(sign.into(), id);
    }
    std::fs::write(&tokenizer, known.to_string()).unwrap();
    let run = || {
        let mut command = r2q();
        command.args(["reproduce", "first-error", "--seeds", "1,2"]);
        command.args(["--train-pairs", "16", "--eval-pairs", "9"]);
        command.arg("--model").arg(&model).arg("--data").arg(&data);
        command.arg("--out").arg(&out);
        succeed(&mut command)
    };
    let read = || -> Value {
        serde_json::from_str(&std::fs::read_to_string(out.join("results.json")).unwrap()).unwrap()
    };
    run();
    let results = read();
    assert_eq!(results["pairs_in_file"], json!([48, 48]));
    assert_eq!(results["targets"].as_array().unwrap().len(), 4);
    assert!((results["chance"]["mean"].as_f64().unwrap() - 0.5).abs() < SAME_SUM);
    let mut errors = [0; 2];
    for seed in results["seeds"].as_array().unwrap() {
        assert_eq!(
            (&seed["train_pairs"], &seed["unread"]),
            (&json!(16), &json!(0))
        );
        let pairs = seed["pairs"].as_array().unwrap();
        assert_eq!(pairs.len(), 9);
        for pair in pairs {
            errors[pair["first_error"].as_u64().unwrap() as usize] += 1;
            for side in ["wrong", "right"] {
                let steps = pair[side].as_array().unwrap();
                assert_eq!(steps.len(), 2);
                assert!(
                    steps
                        .iter()
                        .all(|step| step["reference_logp"].as_f64() < Some(0.0))
                );
            }
        }
        let folder = out.join(format!("seed-{}", seed["seed"]));
        let lines = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
        let questions = |name: &str| -> Vec<String> {
            let rows = lines(name).lines().map(str::to_owned).collect::<Vec<_>>();
            let row = |line: &String| serde_json::from_str::<Value>(line).unwrap();
            rows.iter()
                .map(|line| row(line)["prompt"].to_string())
                .collect()
        };
        let trained = questions("train.jsonl");
        assert!(
            !questions("held-out.jsonl")
                .iter()
                .any(|q| trained.contains(q))
        );
    }
    // The first step is as often the first wrong one as the file has it, and both occur.
    assert!(errors.iter().all(|&n| n > 0));
    let first_step = &results["methods"][3]["lowest"]["mean"];
    let share = f64::from(errors[0]) / 18.0;
    assert!((first_step.as_f64().unwrap() - share).abs() < SAME_SUM);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Stated beforehand") && page.contains("seed-2/scores/scores.html"));

    // What was interrupted after training is read again, what was done is not.
    std::fs::remove_file(out.join("seed-2/result.json")).unwrap();
    let said = run();
    assert!(said.contains("seed 1: taken from") && !said.contains("seed 2: taken"));
    assert_eq!(read()["seeds"][1]["pairs"], results["seeds"][1]["pairs"]);
    assert_eq!(read()["methods"], results["methods"]);
}

#[test]
fn first_errors_need_solutions_with_calculator_marks() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_untied");
    let mut command = r2q();
    command
        .args(["reproduce", "first-error", "--model"])
        .arg(&model);
    command.arg("--data").arg(testdata("trl/pairs.jsonl"));
    command.arg("--out").arg(folder.path().join("out"));
    let said = fail(&mut command);
    assert!(
        said.contains("pairs.jsonl") && said.contains("calculator marks"),
        "{said}"
    );
}
