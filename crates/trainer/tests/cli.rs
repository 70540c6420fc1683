//! The program from flags to files, on tiny models.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

mod common;

use std::path::{Path, PathBuf};

use common::{
    TINY, metrics, model_folder, names, r2q, stderr, succeed, summary, testdata, train, train_on,
    write,
};
use serde_json::Value;
use toml::{Table, Value as Toml};

/// TRL's names of what is logged of a preference step, loss and rates aside.
const TRL: [&str; 10] = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
];

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// Whether what was written under `model/` is a model of the tokenizer beside it.
fn assert_model(folder: &Path) {
    let device = trainer::device("cpu").unwrap();
    let model = lm::Transformer::read(folder, &device).unwrap();
    let tokenizer = lm::tokenizer::Tokenizer::from_folder(folder).unwrap();
    let ids = tokenizer.encode("8 and 9 is").unwrap();
    assert!(!ids.is_empty());
    assert!(
        ids.iter()
            .all(|&id| (id as usize) < model.config().vocab_size)
    );
}

#[test]
fn a_run_on_the_embedded_task_leaves_every_file_that_is_promised() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", TINY);
    let out = folder.path().join("run");
    let said = succeed(&mut train(&recipe, &out));
    for part in [
        "true reward, SFT",
        "true reward, DPO",
        "win rate",
        "label noise allows",
    ] {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    assert_eq!(
        names(&out),
        [
            "checkpoints",
            "inputs.sha256",
            "metrics.jsonl",
            "model",
            "recipe.toml",
            "reference_logps.eval.safetensors",
            "reference_logps.train.safetensors",
            "report.html",
            "sft",
            "summary.json",
            "tensorboard",
        ]
    );
    assert_model(&out.join("model"));
    assert_model(&out.join("sft"));

    let lines = metrics(&out);
    let steps = |stage: &str, key: &str| -> Vec<u64> {
        let lines = lines
            .iter()
            .filter(|line| line["stage"] == stage && line.contains_key(key));
        lines.map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("sft", "loss"), (1..=24).collect::<Vec<_>>());
    assert_eq!(steps("preference", "loss"), (1..=20).collect::<Vec<_>>());
    assert_eq!(steps("preference", "eval_loss"), [0, 8, 16, 20]);
    for line in lines.iter().filter(|line| line["stage"] == "preference") {
        let (prefix, own) = match line.contains_key("eval_loss") {
            true => ("eval_", &["loss"][..]),
            false => (
                "",
                &["loss", "grad_norm", "learning_rate", "epoch", "num_tokens"][..],
            ),
        };
        for key in TRL.iter().chain(own) {
            assert!(number(&line[&format!("{prefix}{key}")]).is_finite());
        }
    }

    let summary = summary(&out);
    for (table, leaf) in [
        ("true_reward", Some("sft")),
        ("true_reward", Some("dpo")),
        ("win_rate_vs_sft", None),
    ] {
        let interval = leaf.map_or(&summary[table], |leaf| &summary[table][leaf]);
        let at = |key: &str| number(&interval[key]);
        assert!(
            at("ci_low") <= at("mean") && at("mean") <= at("ci_high"),
            "{interval}"
        );
    }
    for key in [
        "eval_reward_accuracy",
        "eval_reward_margin",
        "eval_reward_accuracy_ceiling",
        "wall_seconds",
        "pairs_per_second",
        "peak_rss_bytes",
    ] {
        assert!(number(&summary[key]).is_finite(), "{key}");
    }
    assert_eq!(summary["n_prompts"], 8);
    assert_eq!(summary["device"], "cpu");

    let report = std::fs::read_to_string(out.join("report.html")).unwrap();
    for part in [
        "Before and after",
        "Training curves",
        "Sampled completions",
        "Resolved recipe",
        "<svg",
        "Fine-tuning loss",
        "Preference loss",
        "Implicit rewards",
        "Reward margins",
        "Reward accuracies",
        "Log-probabilities of completions",
        "max_grad_norm = 1.0",
        "95",
    ] {
        assert!(report.contains(part), "`{part}` is not in the report");
    }
    // One self-contained page.
    for part in ["src=\"http", "href=\"http", "@import", "<link"] {
        assert!(!report.contains(part), "`{part}` is in the report");
    }
}

#[test]
fn the_resolved_recipe_of_a_run_gives_the_same_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", TINY);
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    succeed(&mut train(&recipe, &first));
    succeed(&mut train(&first.join("recipe.toml"), &second));
    let other = folder.path().join("other");
    succeed(train(&recipe, &other).args(["--seed", "4"]));
    let weights = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
    assert!(weights(&first) == weights(&second));
    assert!(weights(&first) != weights(&other));
}

#[test]
fn a_run_on_files_has_no_true_reward_and_tells_what_became_of_the_rows() {
    for name in ["llama_untied", "qwen3", "gpt2", "gpt_neox"] {
        let folder = tempfile::tempdir().unwrap();
        let model = model_folder(folder.path(), name);
        let data = testdata("trl/pairs.jsonl");
        let out = folder.path().join("run");
        let mut command = train_on(&model, &data, &out);
        let said = succeed(command.arg("--eval-data").arg(&data));
        assert_eq!(said.matches("rows kept ").count(), 2, "{said}");
        assert!(!said.contains("true reward"), "{said}");
        assert_model(&out.join("model"));
        assert!(!out.join("sft").exists());
        let summary = summary(&out);
        assert!(number(&summary["eval_reward_accuracy"]).is_finite());
        for key in ["true_reward", "win_rate_vs_sft", "n_prompts"] {
            assert!(!summary.contains_key(key), "{key}");
        }
        // The policy begins as the reference, and eq. 9 is then the logarithm of 2.
        let first = &metrics(&out)[0];
        assert_eq!(first["step"], 0);
        // Sums of logps are made in another order for other batches.
        const ROUNDING: f64 = 1e-5;
        assert!(
            (number(&first["eval_loss"]) - 2_f64.ln()).abs() < ROUNDING,
            "{first:?}"
        );
        let report = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(report.contains("Training curves") && report.contains("Resolved recipe"));
    }
}

#[test]
fn flags_override_the_recipe_and_are_written_into_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "qwen2");
    let out = folder.path().join("run");
    let mut command = train_on(&model, &testdata("trl/pairs.jsonl"), &out);
    command.args(["--seed", "7", "--beta", "0.25", "--learning-rate", "2e-4"]);
    command.args(["--batch-size", "5", "--epochs", "0.5", "--max-length", "40"]);
    succeed(command.arg("--encode-apart"));
    let text = std::fs::read_to_string(out.join("recipe.toml")).unwrap();
    let recipe: Table = text.parse().unwrap();
    let preference = &recipe["preference"];
    assert_eq!(recipe["seed"], Toml::Integer(7));
    assert_eq!(preference["beta"], Toml::Float(0.25));
    assert_eq!(preference["optimizer"]["learning_rate"], Toml::Float(2e-4));
    assert_eq!(preference["batch_size"], Toml::Integer(5));
    assert_eq!(preference["epochs"], Toml::Float(0.5));
    assert_eq!(preference["max_steps"], Toml::Integer(3));
    assert_eq!(recipe["data"]["max_length"], Toml::Integer(40));
    assert_eq!(recipe["data"]["boundary"], Toml::String("apart".into()));
    // Every default is in the resolved recipe.
    for key in [
        "beta1",
        "beta2",
        "epsilon",
        "weight_decay",
        "max_grad_norm",
        "schedule",
    ] {
        assert!(preference["optimizer"].get(key).is_some(), "{key}");
    }
}

#[test]
fn without_out_a_run_takes_the_next_free_name() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", TINY);
    for expected in ["runs/tiny", "runs/tiny-2"] {
        let mut command = r2q();
        command
            .current_dir(folder.path())
            .arg("train")
            .arg("--recipe")
            .arg(&recipe);
        let said = succeed(&mut command);
        assert!(
            said.contains(&format!("report: {expected}/report.html")),
            "{said}"
        );
        assert!(folder.path().join(expected).join("summary.json").is_file());
    }
}

#[test]
fn every_recipe_of_the_repository_runs_to_its_end_when_made_small() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut seen = 0;
    for entry in std::fs::read_dir(recipes).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|kind| kind != "toml") {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut recipe: Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        if recipe.contains_key("data") {
            let text = |path: PathBuf| Toml::String(path.to_str().unwrap().into());
            recipe["model"]["path"] = text(model_folder(folder.path(), "llama_tied"));
            recipe["data"]["train"] = text(testdata("trl/pairs.jsonl"));
            if recipe["data"].get("eval").is_some() {
                recipe["data"]["eval"] = text(testdata("trl/pairs.jsonl"));
            }
        }
        shrink(&mut recipe);
        let small = write(folder.path(), "small.toml", recipe.to_string());
        let out = folder.path().join("run");
        let said = succeed(&mut train(&small, &out));
        assert!(
            out.join("report.html").is_file(),
            "{}: {said}",
            path.display()
        );
        seen += 1;
    }
    assert!(seen > 0);
}

/// Caps what makes a run long: sizes of the model and counts of examples.
fn shrink(table: &mut Table) {
    for (key, value) in table.iter_mut() {
        let most = match key.as_str() {
            "hidden_size" | "intermediate_size" => 16,
            "sft_examples" | "train_pairs" => 48,
            "eval_pairs" | "eval_prompts" => 8,
            "max_new_tokens" => 8,
            "batch_size" | "eval_batch_size" => 8,
            _ => i64::MAX,
        };
        match value {
            Toml::Integer(number) => *number = (*number).min(most),
            Toml::Table(inner) => shrink(inner),
            _ => {}
        }
    }
}

#[test]
fn help_names_every_flag() {
    let output = r2q().args(["train", "--help"]).output().unwrap();
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    for flag in [
        "--recipe",
        "--model",
        "--data",
        "--eval-data",
        "--out",
        "--resume",
        "--seed",
        "--beta",
        "--learning-rate",
        "--batch-size",
        "--epochs",
        "--max-steps",
        "--max-length",
        "--encode-apart",
        "--device",
    ] {
        assert!(help.contains(flag), "`{flag}` is not in: {help}");
    }
    let output = r2q().arg("--help").output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("train"));
}

#[test]
fn flags_that_do_not_fit_together_are_refused_by_name() {
    for (flags, parts) in [
        (&["--model", "m"][..], ["--data"]),
        (&["--data", "d"], ["--model"]),
        (&["--eval-data", "d"], ["--data"]),
        (&["--max-length", "9"], ["--data"]),
        (&["--sped", "1"], ["--sped"]),
        (&["--seed", "one"], ["--seed"]),
    ] {
        let output = r2q().arg("train").args(flags).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(said.starts_with("error: "), "{said}");
        for part in parts {
            assert!(said.contains(part), "{said}");
        }
    }
}
