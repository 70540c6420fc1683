//! What a recipe can ask for beyond the plain run: each does what it says, and survives a resume.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

mod common;

use std::path::{Path, PathBuf};

use common::{
    TINY, fail, metrics, model_folder, names, r2q, succeed, summary, testdata, train, write,
};
use dpo_loss::Objective;
use lm::weights::WeightFiles;
use serde_json::Value;
use trainer::{ModelRecipe, Recipe, TaskRecipe};

/// A folder for a test, and the tiny recipe with some lines put in place of others.
fn place(changes: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let mut text = TINY.to_string();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let recipe = write(folder.path(), "tiny.toml", text);
    let out = folder.path().join("run");
    (folder, recipe, out)
}

/// The tiny recipe with more keys in its preference table.
fn with(keys: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
    place(&[("[preference]", &format!("[preference]\n{keys}"))])
}

/// The bytes of a run's final weights.
fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("model/model.safetensors")).unwrap()
}

/// Puts a finished run back to its checkpoint of some step, and resumes it.
fn again_from(recipe: &Path, run: &Path, step: usize) -> String {
    for name in names(&run.join("checkpoints")) {
        let later = name
            .strip_prefix("preference-")
            .and_then(|step| step.parse::<usize>().ok())
            .is_some_and(|at| at > step);
        if later {
            std::fs::remove_dir_all(run.join("checkpoints").join(name)).unwrap();
        }
    }
    std::fs::remove_dir_all(run.join("model")).unwrap();
    let said = succeed(train(recipe, run).arg("--resume"));
    assert!(said.contains(&format!("preference-{step:06}")), "{said}");
    said
}

#[test]
fn a_second_run_takes_the_reference_logps_from_the_cache() {
    let (folder, recipe, out) = place(&[]);
    let cache = folder.path().join("cache");
    let run = |name: &str, extra: &[&str]| {
        let out = folder.path().join(name);
        let mut command = train(&recipe, &out);
        let said = succeed(command.env("R2Q_CACHE_DIR", &cache).args(extra));
        (said, out)
    };
    let (first, one) = run("one", &[]);
    let (second, two) = run("two", &[]);
    assert!(!first.contains("from the cache"), "{first}");
    for split in ["train", "eval"] {
        let line = format!("reference logps, {split}: ");
        let line = second.lines().find(|l| l.starts_with(&line)).unwrap();
        assert!(line.contains("from the cache"), "{second}");
    }
    assert_eq!(weights(&one), weights(&two));
    // Without the cache the same comes out: it changes the time and nothing else.
    let (without, three) = run("three", &["--no-cache"]);
    assert!(!without.contains("from the cache"), "{without}");
    assert_eq!(weights(&one), weights(&three));
    // Another seed is another model and other rows.
    let (other, _) = run("four", &["--seed", "4"]);
    assert!(!other.contains("from the cache"), "{other}");
    // A damaged file is passed over.
    for name in names(&cache) {
        let path = cache.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let (damaged, five) = run("five", &[]);
    assert!(!damaged.contains("from the cache"), "{damaged}");
    assert_eq!(weights(&one), weights(&five));
    assert!(!out.exists());
}

#[test]
fn a_changed_row_or_weight_is_not_found_in_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let model = model_folder(folder.path(), "llama_tied");
    let text = std::fs::read_to_string(testdata("trl/pairs.jsonl")).unwrap();
    let run = |name: &str, model: &Path, text: &str| {
        let data = write(folder.path(), &format!("{name}.jsonl"), text);
        let out = folder.path().join(name);
        let mut command = common::train_on(model, &data, &out);
        succeed(command.env("R2Q_CACHE_DIR", &cache)).contains("from the cache")
    };
    assert!(!run("first", &model, &text));
    assert!(run("again", &model, &text));
    let fewer: Vec<&str> = text.lines().skip(1).collect();
    assert!(!run("fewer", &model, &fewer.join("\n")));
    let trained = folder.path().join("first/model");
    assert!(!run("trained", &trained, &text));
}

#[test]
fn every_loss_trains_from_a_recipe() {
    for objective in Objective::ALL {
        if objective == Objective::Step {
            continue;
        }
        let name = objective.name();
        let mut keys = format!("max_steps = 2\nobjective = {{ loss = \"{name}\"");
        if objective == Objective::ExoPair {
            keys += ", label_smoothing = 1e-3";
        }
        keys += " }";
        let (folder, recipe, out) = place(&[
            ("sft_examples = 96", "sft_examples = 4"),
            ("[preference]", &format!("[preference]\n{keys}")),
        ]);
        if objective == Objective::TokenWeighted {
            let said = fail(&mut train(&recipe, &out));
            assert!(said.contains("[preference.contrast]"), "{said}");
            let first = folder.path().join("first");
            succeed(&mut train(&place(&[]).1, &first));
            let contrast = format!(
                "[preference.contrast]\npositive = {:?}\nnegative = {:?}\n\n[preference.optimizer]",
                first.join("model"),
                first.join("sft"),
            );
            let text = std::fs::read_to_string(&recipe).unwrap();
            let text = text.replace("[preference.optimizer]", &contrast);
            std::fs::write(&recipe, text).unwrap();
        }
        succeed(&mut train(&recipe, &out));
        let lines = metrics(&out);
        let losses: Vec<f64> = lines
            .iter()
            .filter(|line| line["stage"] == "preference")
            .filter_map(|line| line.get("loss")?.as_f64())
            .collect();
        assert_eq!(losses.len(), 2, "{name}");
        assert!(losses.iter().all(|loss| loss.is_finite()), "{name}");
    }
}

#[test]
fn a_loss_of_steps_is_refused_with_what_to_do_instead() {
    let (_folder, recipe, out) = with("objective = { loss = \"step\" }");
    let said = fail(&mut train(&recipe, &out));
    assert!(said.contains("shared steps into the prompt"), "{said}");
}

#[test]
fn weighting_and_length_desensitising_change_what_is_learnt() {
    let plain = with("max_steps = 4");
    succeed(&mut train(&plain.1, &plain.2));
    for option in ["use_weighting = true", "ld_alpha = 0.3"] {
        let (_folder, recipe, out) = with(&format!(
            "max_steps = 4\nobjective = {{ loss = \"sigmoid\", {option} }}"
        ));
        succeed(&mut train(&recipe, &out));
        assert_ne!(weights(&out), weights(&plain.2), "{option}");
    }
}

#[test]
fn a_reference_that_follows_the_policy_starts_margins_anew_and_survives_a_resume() {
    let keys = "sync_reference = { alpha = 1.0, every = 5 }";
    let (_folder, recipe, out) = with(keys);
    succeed(&mut train(&recipe, &out));
    let margin = |step: u64| -> f64 {
        let lines = metrics(&out);
        let line = lines.iter().find(|line| {
            line["stage"] == "preference" && line["step"] == step && line.contains_key("loss")
        });
        line.unwrap()["rewards/margins"].as_f64().unwrap()
    };
    // With alpha 1 the reference is the policy itself at the step after each change.
    for step in [1, 6, 11, 16] {
        assert!(margin(step).abs() < 1e-4, "step {step}: {}", margin(step));
    }
    assert!(margin(5).abs() > 1e-3, "{}", margin(5));
    let whole = weights(&out);
    again_from(&recipe, &out, 15);
    assert_eq!(weights(&out), whole);
}

#[test]
fn the_best_weights_are_kept_and_a_stage_without_progress_is_left() {
    // So large a rate that held-out pairs soon get worse.
    let changes = [
        (
            "learning_rate = 1e-3\nwarmup_steps = 3",
            "learning_rate = 0.05",
        ),
        (
            "eval_every = 8",
            "eval_every = 2\nbest = { metric = \"eval_loss\", patience = 2 }",
        ),
        ("keep = 2", "keep = 20"),
        ("every = 5", "every = 2"),
    ];
    let (_folder, recipe, out) = place(&changes);
    let said = succeed(&mut train(&recipe, &out));
    assert!(said.contains("stopped at step"), "{said}");
    let lines = metrics(&out);
    let evaluations: Vec<(u64, f64)> = lines
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line.get("eval_loss")?.as_f64()?)))
        .collect();
    let best = evaluations
        .iter()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap();
    let last = evaluations.last().unwrap();
    assert_eq!(summary(&out)["best_step"], best.0);
    assert_eq!(last.0, best.0 + 4, "two evaluations of patience");
    let kept = out.join("checkpoints/preference-best/model.safetensors");
    assert_eq!(
        tensors(&out.join("model/model.safetensors")),
        tensors(&kept)
    );
    let whole = weights(&out);
    // Over is over, also for a resumed run; and an earlier checkpoint leads to the same end.
    std::fs::remove_dir_all(out.join("model")).unwrap();
    succeed(train(&recipe, &out).arg("--resume"));
    assert_eq!(weights(&out), whole);
    again_from(&recipe, &out, 2);
    assert_eq!(weights(&out), whole);
}

/// Every tensor of a file, by name.
fn tensors(path: &Path) -> Vec<(String, Vec<f32>)> {
    let files = WeightFiles::open_file(path).unwrap();
    let mut names = files.names();
    names.sort_unstable();
    names
        .into_iter()
        .map(|name| (name.to_string(), files.read_any(name).unwrap().values))
        .collect()
}

#[test]
fn a_metric_that_no_evaluation_has_is_refused_by_name() {
    let (_folder, recipe, out) = with("best = { metric = \"eval_los\" }");
    let said = fail(&mut train(&recipe, &out));
    assert!(
        said.contains("expected one of eval_loss, ") && said.contains("got eval_los"),
        "{said}"
    );
    // Before anything is trained.
    assert!(!out.exists());
}

#[test]
fn several_files_are_mixed_by_weight_and_named_in_errors() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_tied");
    let text = std::fs::read_to_string(testdata("trl/pairs.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let (few, rest) = lines.split_at(4);
    let one = write(folder.path(), "few.jsonl", few.join("\n"));
    let two = write(folder.path(), "rest.jsonl", rest.join("\n"));
    let recipe = |rate: f64| {
        format!(
            "name = \"mixed\"\n[model]\npath = {model:?}\n[data]\nmax_length = 64\n\
             train = [{{ path = {one:?}, weight = 2.0 }}, {{ path = {two:?}, weight = 0.5 }}]\n\
             [preference]\nbatch_size = 1\ngroup_by_length = true\n\
             [preference.optimizer]\nlearning_rate = {rate:e}\nmax_grad_norm = 0.0\n"
        )
    };
    let path = write(folder.path(), "mixed.toml", recipe(1e-4));
    let out = folder.path().join("run");
    succeed(&mut train(&path, &out));
    let steps = metrics(&out)
        .iter()
        .filter(|line| line.contains_key("loss"))
        .count();
    let half = (0.5 * rest.len() as f64).round() as usize;
    assert_eq!(steps, 2 * few.len() + half);
    // A rate that ends in infinities names the row with its file.
    let path = write(folder.path(), "bad.toml", recipe(1e30));
    let said = fail(&mut train(&path, &folder.path().join("bad")));
    assert!(
        said.contains("few.jsonl ") || said.contains("rest.jsonl "),
        "{said}"
    );
}

#[test]
fn devices_that_train_together_give_what_one_gives_and_need_a_batch_each() {
    let two_batches = ("batch_size = 4", "batch_size = 2\naccumulation = 2");
    let run = |devices: &str| {
        let (_folder, recipe, out) = place(&[two_batches]);
        succeed(train(&recipe, &out).args(["--device", devices]));
        weights(&out)
    };
    assert_eq!(run("cpu,cpu"), run("cpu"));
    let (_folder, recipe, out) = place(&[two_batches]);
    let said = fail(train(&recipe, &out).args(["--device", "cpu,cpu,cpu"]));
    assert!(
        said.contains("sft.accumulation") && said.contains("got 2"),
        "{said}"
    );
    assert!(!out.exists());
    let mut sample = r2q();
    sample.args(["sample", "--memo-prompts", "1", "--device", "cpu,cpu"]);
    let said = fail(sample.arg("--policy").arg(testdata("lm/llama_tied")));
    assert!(said.contains("expected one device"), "{said}");
}

#[test]
fn adapters_are_trained_alone_written_for_peft_and_merged_and_survive_a_resume() {
    let lora =
        "[lora]\nrank = 2\nalpha = 4.0\ntargets = [\"q_proj\", \"down_proj\"]\n\n[preference]";
    // Two workers: a model is then copied for each of them.
    let (_folder, recipe, out) = place(&[
        ("[preference]", lora),
        ("seed = 3", "seed = 3\nworkers = 2"),
        ("batch_size = 4", "batch_size = 2\naccumulation = 2"),
        ("learning_rate = 1e-3", "learning_rate = 2e-2"),
    ]);
    succeed(&mut train(&recipe, &out));
    let adapter = names(&out.join("adapter"));
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ] {
        assert!(adapter.contains(&file.to_string()), "{adapter:?}");
    }
    // They lie on what they were trained on, which other commands find by itself.
    let checkpoints = names(&out.join("checkpoints"));
    let checkpoint = checkpoints.iter().rfind(|it| it.starts_with("preference"));
    let checkpoint = Path::new("checkpoints").join(checkpoint.unwrap());
    for adapter in [Path::new("adapter"), &checkpoint] {
        let settings = std::fs::read(out.join(adapter).join("adapter_config.json")).unwrap();
        let settings: serde_json::Value = serde_json::from_slice(&settings).unwrap();
        let base = out.join("sft").canonicalize().unwrap();
        assert_eq!(settings["base_model_name_or_path"], base.to_str().unwrap());
        let mut sample = common::r2q();
        sample.args(["sample", "--memo-prompts", "1", "--max-new-tokens", "2"]);
        sample.arg("--policy").arg(out.join(adapter));
        let name = adapter.file_name().unwrap().to_str().unwrap();
        succeed(sample.arg("--out").arg(out.join(format!("{name}.jsonl"))));
    }
    // The model is the fine-tuned one but for the targets.
    let before = tensors(&out.join("sft/model.safetensors"));
    let after = tensors(&out.join("model/model.safetensors"));
    for ((name, before), (same, after)) in before.iter().zip(&after) {
        assert_eq!(name, same);
        let target = name.contains("q_proj") || name.contains("down_proj");
        assert_eq!(before != after, target, "{name}");
    }
    let margins: Vec<f64> = metrics(&out)
        .iter()
        .filter_map(|line| line.get("rewards/margins")?.as_f64())
        .collect();
    assert!(margins[0].abs() < 1e-5 && margins.last().unwrap().abs() > 1e-4);
    let whole = weights(&out);
    let bytes = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    let adapter = bytes(&out);
    again_from(&recipe, &out, 15);
    assert_eq!(weights(&out), whole);
    assert_eq!(bytes(&out), adapter);
}

#[test]
fn frozen_parameters_stay_as_they_are_and_a_wrong_name_is_refused() {
    let frozen = "[model]\nfrozen = [\"model.embed_tokens.*\", \"model.layers.0.*\"]";
    let (_folder, recipe, out) =
        place(&[("[model]", frozen), ("seed = 3", "seed = 3\nworkers = 2")]);
    succeed(&mut train(&recipe, &out));
    let before = tensors(&out.join("sft/model.safetensors"));
    let after = tensors(&out.join("model/model.safetensors"));
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let frozen = name.contains("embed_tokens") || name.contains("layers.0.");
        assert_eq!(before == after, frozen, "{name}");
    }
    let whole = weights(&out);
    again_from(&recipe, &out, 15);
    assert_eq!(weights(&out), whole);
    let (_folder, recipe, out) = place(&[("[model]", "[model]\nfrozen = [\"model.embd.*\"]")]);
    let said = fail(&mut train(&recipe, &out));
    assert!(said.contains("model.embd.*") && !out.exists(), "{said}");
}

#[test]
fn gradient_checkpointing_changes_memory_and_nothing_else() {
    let (_folder, recipe, out) = place(&[]);
    succeed(&mut train(&recipe, &out));
    let again = place(&[("seed = 3", "seed = 3\ngradient_checkpointing = true")]);
    succeed(&mut train(&again.1, &again.2));
    // Gradients of tied parts are summed in another order, in f32, over 44 steps.
    const ORDER: f32 = 1e-4;
    let path = "model/model.safetensors";
    for ((name, one), (_, two)) in tensors(&out.join(path))
        .iter()
        .zip(&tensors(&again.2.join(path)))
    {
        for (one, two) in one.iter().zip(two) {
            assert!((one - two).abs() < ORDER, "{name}: {one} {two}");
        }
    }
}

#[test]
fn a_run_in_bf16_ends_near_the_one_in_f32() {
    let (_folder, recipe, out) = place(&[]);
    succeed(&mut train(&recipe, &out));
    let rounded = place(&[("seed = 3", "seed = 3\nprecision = \"bf16\"")]);
    succeed(&mut train(&rounded.1, &rounded.2));
    let eval_loss = |out: &Path| {
        let lines = metrics(out);
        let last = lines.iter().rev().find_map(|line| line.get("eval_loss"));
        last.unwrap().as_f64().unwrap()
    };
    // Eight bits in every product, over 44 steps: the third digit moves, and not the second.
    let gap = (eval_loss(&out) - eval_loss(&rounded.2)).abs();
    assert!(gap > 0.0 && gap < 2e-2, "{gap}");
}

#[test]
fn completions_labelled_one_by_one_train_by_kto_and_survive_a_resume() {
    for loss in ["kto", "apo_zero_unpaired"] {
        let keys = format!("unpaired = {{ loss = \"{loss}\", undesirable_weight = 1.5 }}");
        let (_folder, recipe, out) = place(&[
            ("[preference]", &format!("[preference]\n{keys}")),
            ("learning_rate = 1e-3", "learning_rate = 5e-3"),
            ("epochs = 2.0", "epochs = 1.0"),
        ]);
        succeed(&mut train(&recipe, &out));
        let lines = metrics(&out);
        let steps: Vec<_> = lines
            .iter()
            .filter(|line| line["stage"] == "preference" && line.contains_key("loss"))
            .collect();
        // 40 pairs are 80 labelled completions, 4 a step.
        assert_eq!(steps.len(), 20);
        // Policy and reference are one at first: every completion loses a half times its weight,
        // 1 or 1.5, in the mean over four.
        let first = steps[0]["loss"].as_f64().unwrap();
        let undesirable = (first - 0.5) / (0.5 * 0.5 / 4.0);
        let whole = undesirable.round();
        assert!(
            (undesirable - whole).abs() < 1e-4 && (0.0..=4.0).contains(&whole),
            "{first}"
        );
        let mean = |name: &str| -> f64 {
            let values = steps[15..].iter().filter_map(|line| line[name].as_f64());
            values.sum::<f64>() / 5.0
        };
        assert!(mean("rewards/chosen") > mean("rewards/rejected"));
        assert!(steps.iter().all(|line| line["kl"].as_f64().unwrap() >= 0.0));
        assert!(lines.iter().any(|line| line.contains_key("eval_loss")));
        let whole = weights(&out);
        again_from(&recipe, &out, 15);
        assert_eq!(weights(&out), whole);
    }
}

#[test]
fn weights_of_tokens_are_read_from_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_tied");
    let text = std::fs::read_to_string(testdata("trl/pairs.jsonl")).unwrap();
    let tokenizer = lm::tokenizer::Tokenizer::from_folder(&model).unwrap();
    let rows = lm::data::read_preferences(&testdata("trl/pairs.jsonl")).unwrap();
    let rows: Vec<_> = rows.map(Result::unwrap).collect();
    let options = lm::data::TokenizeOptions::new(tokenizer.vocab_size());
    let pairs = lm::data::tokenize_pairs(&rows, &tokenizer, None, &options).unwrap();
    let weighted = |weight: f64, more: usize| -> String {
        let rows = text.lines().zip(&pairs.examples).map(|(line, pair)| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            for (side, ids) in [
                ("chosen", &pair.chosen_ids),
                ("rejected", &pair.rejected_ids),
            ] {
                let weights = vec![weight; ids.len() - 1 + more];
                row[format!("{side}_token_weights")] = weights.into();
            }
            row.to_string()
        });
        rows.collect::<Vec<_>>().join("\n")
    };
    let run = |name: &str, loss: &str, data: String| {
        let data = write(folder.path(), &format!("{name}.jsonl"), data);
        let recipe = format!(
            "name = \"weighted\"\n[model]\npath = {model:?}\n[data]\ntrain = {data:?}\n\
             [preference]\nmax_steps = 3\nobjective = {{ loss = \"{loss}\" }}\n\
             [preference.optimizer]\nlearning_rate = 1e-3\n"
        );
        let recipe = write(folder.path(), &format!("{name}.toml"), recipe);
        let out = folder.path().join(name);
        (train(&recipe, &out), out)
    };
    // Weights of one are no weights; the end of sequence has its own, or one.
    let (mut command, plain) = run("plain", "sigmoid", text.clone());
    succeed(&mut command);
    let plain = tensors(&plain.join("model/model.safetensors"));
    for (name, more) in [("ones", 0), ("ones-and-end", 1)] {
        let (mut command, out) = run(name, "token_weighted", weighted(1.0, more));
        succeed(&mut command);
        for ((name, one), (_, two)) in plain
            .iter()
            .zip(&tensors(&out.join("model/model.safetensors")))
        {
            for (one, two) in one.iter().zip(two) {
                assert!((one - two).abs() < 1e-5, "{name}: {one} {two}");
            }
        }
    }
    let (mut command, half) = run("half", "token_weighted", weighted(0.5, 1));
    succeed(&mut command);
    assert_ne!(tensors(&half.join("model/model.safetensors")), plain);
    // A list that does not fit is named.
    let (mut command, _) = run("long", "token_weighted", weighted(1.0, 2));
    let said = fail(&mut command);
    assert!(
        said.contains("long.jsonl row 0") && said.contains("chosen_token_weights"),
        "{said}"
    );
}

#[test]
fn files_of_labels_and_of_completions_to_fine_tune_on_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_tied");
    let text = std::fs::read_to_string(testdata("trl/pairs.jsonl")).unwrap();
    let rows: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let labelled: Vec<String> = rows
        .iter()
        .enumerate()
        .map(|(row, pair)| {
            let side = if row % 2 == 0 { "chosen" } else { "rejected" };
            let label = row % 2 == 0;
            let (prompt, completion) = (&pair["prompt"], &pair[side]);
            format!("{{\"prompt\": {prompt}, \"completion\": {completion}, \"label\": {label}}}")
        })
        .collect();
    let completions: Vec<String> = rows
        .iter()
        .map(|pair| {
            format!(
                "{{\"prompt\": {}, \"completion\": {}}}",
                pair["prompt"], pair["chosen"]
            )
        })
        .collect();
    let labels = write(folder.path(), "labels.jsonl", labelled.join("\n"));
    let texts = write(folder.path(), "texts.jsonl", completions.join("\n"));
    let recipe = |sft: &str| {
        format!(
            "name = \"kto\"\n[model]\npath = {model:?}\n[data]\nmax_length = 64\n\
             train = {labels:?}\nsft = {texts:?}\n{sft}\n\
             [preference]\nbatch_size = 4\nmax_steps = 3\nunpaired = {{}}\n"
        )
    };
    let path = write(folder.path(), "kto.toml", recipe("[sft]\nbatch_size = 8"));
    let out = folder.path().join("run");
    succeed(&mut train(&path, &out));
    let count = |stage: &str| {
        let lines = metrics(&out);
        lines
            .iter()
            .filter(|line| line["stage"] == stage && line.contains_key("loss"))
            .count()
    };
    assert_eq!(
        (count("sft"), count("preference")),
        (rows.len().div_ceil(8), 3)
    );
    // A file that nothing reads is a mistake, and so are preferences where labels are asked for.
    let path = write(folder.path(), "bad.toml", recipe(""));
    let said = fail(&mut train(&path, &folder.path().join("bad")));
    assert!(said.contains("data.sft"), "{said}");
    std::fs::write(&labels, &text).unwrap();
    let path = write(folder.path(), "kto.toml", recipe("[sft]"));
    let said = fail(&mut train(&path, &folder.path().join("bad")));
    assert!(
        said.contains("labels.jsonl") && said.contains("completion"),
        "{said}"
    );
}

#[test]
fn an_event_file_for_tensorboard_lies_beside_the_metrics() {
    let (_folder, recipe, out) = place(&[]);
    succeed(&mut train(&recipe, &out));
    let bytes = std::fs::read(out.join("tensorboard/events.out.tfevents.0.r2q")).unwrap();
    // Every record's length leads to the next, and the last ends with the file.
    let (mut at, mut records) = (0, 0);
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        at += 8 + 4 + length as usize + 4;
        records += 1;
    }
    assert_eq!(at, bytes.len());
    assert_eq!(records, metrics(&out).len() + 1);
}

#[test]
fn what_the_view_of_tokens_adds_is_logged() {
    let (_folder, recipe, out) = place(&[]);
    succeed(&mut train(&recipe, &out));
    let lines = metrics(&out);
    let step = |number: u64| {
        lines
            .iter()
            .find(|line| {
                line["stage"] == "preference" && line["step"] == number && line.contains_key("loss")
            })
            .unwrap()
    };
    let value = |number: u64, name: &str| step(number)[name].as_f64().unwrap();
    for name in [
        "kl_estimate/policy_reference",
        "kl_estimate/reference_policy",
    ] {
        assert!(
            value(1, name).abs() < 1e-6,
            "policy and reference are one at first"
        );
        assert!(value(20, name) > 1e-6);
    }
    // At the start every token is pushed by beta / 2, so that masses go by tokens not yet known.
    let beta = 0.1;
    for side in ["chosen", "rejected"] {
        let mass = value(1, &format!("grad_mass/{side}"));
        let most = 2.0 * (beta / 2.0) * value(1, &format!("length/{side}"));
        assert!(
            mass > 0.5 * most && mass <= most,
            "{side}: {mass} of {most}"
        );
    }
    let exact = lines
        .iter()
        .rev()
        .find_map(|line| line.get("eval_kl/reference_policy").and_then(Value::as_f64));
    assert!(exact.unwrap() > 0.0);
}

#[test]
fn every_recipe_of_the_repository_runs_at_tiny_scale() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|kind| kind != "toml") {
            continue;
        }
        let mut recipe = Recipe::read(&path).unwrap();
        recipe.model = ModelRecipe {
            hidden_size: 16,
            intermediate_size: 16,
            layers: 1,
            heads: 2,
            kv_heads: 2,
            ..recipe.model
        };
        if let Some(task) = &mut recipe.task {
            *task = TaskRecipe {
                sft_examples: 32,
                train_pairs: 16,
                eval_pairs: 8,
                eval_prompts: 4,
                ..task.clone()
            };
        }
        recipe.preference.max_steps = 2;
        let tiny = tempfile::tempdir().unwrap();
        let file = write(tiny.path(), "tiny.toml", recipe.to_toml().unwrap());
        let out = tiny.path().join("run");
        succeed(&mut train(&file, &out));
        assert!(out.join("report.html").is_file(), "{}", path.display());
        seen += 1;
    }
    assert!(seen > 0);
}

#[test]
fn fine_tuning_by_parts_of_a_step_is_fine_tuning_at_once() {
    /// Sums in another order, over three dozen steps of a rate of 1e-3.
    const ROUNDING: f64 = 1e-4;
    let run = |batches: &str| {
        let (_folder, recipe, out) = place(&[("batch_size = 2\naccumulation = 2", batches)]);
        succeed(&mut train(&recipe, &out));
        let lines = metrics(&out).into_iter();
        lines
            .filter(|line| line["stage"] == "sft")
            .collect::<Vec<_>>()
    };
    let parts = run("batch_size = 1\naccumulation = 4");
    let whole = run("batch_size = 4\naccumulation = 1");
    assert_eq!(parts.len(), 24);
    for (part, whole) in parts.iter().zip(&whole) {
        for name in ["loss", "grad_norm", "entropy", "mean_token_accuracy"] {
            let (part, whole) = (part[name].as_f64().unwrap(), whole[name].as_f64().unwrap());
            let gap = (part - whole).abs();
            assert!(
                gap < ROUNDING * (1.0 + whole.abs()),
                "{name}: {part} {whole}"
            );
        }
    }
}

#[test]
fn a_checkpoint_is_a_folder_that_other_commands_read() {
    let (folder, recipe, out) = with("beta = 0.7");
    succeed(&mut train(&recipe, &out));
    let checkpoint = out.join("checkpoints/preference-000020");
    let samples = folder.path().join("samples.jsonl");
    let mut sample = r2q();
    sample.args(["sample", "--memo-prompts", "2"]);
    sample
        .arg("--policy")
        .arg(&checkpoint)
        .arg("--out")
        .arg(&samples);
    succeed(&mut sample);
    assert_eq!(std::fs::read_to_string(samples).unwrap().lines().count(), 2);
    for policy in [checkpoint, out.join("model")] {
        let beta = trainer::beta_of_run(&policy).unwrap();
        assert!((beta.get() - 0.7).abs() < 1e-12);
    }
    let beta = trainer::beta_of_run(&testdata("lm/gpt2")).unwrap();
    assert!((beta.get() - 0.1).abs() < 1e-12, "no run's");
}

#[test]
fn a_tokenizer_with_templates_of_their_own_files_is_kept_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_tied");
    let template = "additional_chat_templates/tool_use.jinja";
    std::fs::create_dir(model.join("additional_chat_templates")).unwrap();
    write(&model, template, "{{ messages }}");
    let texts = write(
        folder.path(),
        "texts.jsonl",
        "{\"prompt\": \"the den\", \"completion\": \" so\"}\n",
    );
    let pairs = testdata("trl/pairs.jsonl");
    let text = format!(
        "name = \"x\"\n[model]\npath = {model:?}\n[data]\nmax_length = 64\ntrain = {pairs:?}\n\
         sft = {texts:?}\n[sft]\n[preference]\nmax_steps = 1\n"
    );
    let recipe = write(folder.path(), "x.toml", text);
    let out = folder.path().join("run");
    succeed(&mut train(&recipe, &out));
    for place in ["sft", "checkpoints/preference-000001", "model"] {
        assert!(out.join(place).join(template).is_file(), "{place}");
    }
    // Its digest is looked at as that of every other file.
    std::fs::remove_dir_all(out.join("model")).unwrap();
    let said = succeed(train(&recipe, &out).arg("--resume"));
    assert!(
        said.contains("preference-000001") && !said.contains("passed over"),
        "{said}"
    );
    write(&out.join("sft"), template, "other");
    std::fs::remove_dir_all(out.join("model")).unwrap();
    let said = succeed(train(&recipe, &out).arg("--resume"));
    assert!(said.contains("passed over"), "{said}");
}

#[test]
fn what_is_set_and_changes_nothing_is_said_and_kept_in_the_summary() {
    let (_folder, recipe, out) = with("objective = { label_smoothing = 0.1, simpo_gamma = 0.7 }");
    let said = succeed(&mut train(&recipe, &out));
    let warnings = summary(&out)["warnings"].clone();
    for (at, name) in ["label_smoothing = 0.1", "simpo_gamma = 0.7"]
        .iter()
        .enumerate()
    {
        assert!(said.contains(&format!("warning: {name}")), "{said}");
        assert!(warnings[at].as_str().unwrap().contains(name), "{warnings}");
    }
}

#[test]
fn a_file_of_which_an_epoch_shows_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_tied");
    let data = testdata("trl/pairs.jsonl");
    let text = format!(
        "name = \"x\"\n[model]\npath = {model:?}\n[data]\n\
         train = [{{ path = {data:?} }}, {{ path = {data:?}, weight = 1e-3 }}]\n"
    );
    let recipe = write(folder.path(), "x.toml", text);
    let out = folder.path().join("run");
    let said = fail(&mut train(&recipe, &out));
    assert!(
        said.contains("0.001") && said.contains("pairs.jsonl"),
        "{said}"
    );
    assert!(!out.exists());
}

#[test]
fn completions_of_other_prompts_stay_within_the_models_window() {
    // Positions of this family are rows of a table, of which there are 128.
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "gpt2");
    let row = |prompt: usize, completion: usize, label: bool| {
        let text = |n: usize| " the den".repeat(n);
        format!(
            "{{\"prompt\": \"so{}\", \"completion\": \"{}\", \"label\": {label}}}\n",
            text(prompt),
            text(completion)
        )
    };
    let data = write(
        folder.path(),
        "labels.jsonl",
        [row(1, 40, true), row(40, 1, false)].concat(),
    );
    let tokenizer = lm::tokenizer::Tokenizer::from_folder(&model).unwrap();
    let n = tokenizer.encode(&" the den".repeat(40)).unwrap().len();
    assert!(
        (64..120).contains(&n),
        "twice that is more than the window: {n}"
    );
    let text = format!(
        "name = \"x\"\n[model]\npath = {model:?}\n[data]\ntrain = {data:?}\n\
         [preference]\nunpaired = {{}}\n"
    );
    let recipe = write(folder.path(), "x.toml", text);
    let out = folder.path().join("run");
    succeed(&mut train(&recipe, &out));
    let lines = metrics(&out);
    assert!(lines.iter().any(|line| line.contains_key("kl")));
}

#[test]
fn a_run_is_named_after_its_models_folder_whatever_that_is_called() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_tied");
    let odd = folder.path().join(".my model (2)");
    std::fs::rename(&model, &odd).unwrap();
    let data = testdata("trl/pairs.jsonl");
    let mut command = common::train_on(Path::new("."), &data, &folder.path().join("run"));
    succeed(command.current_dir(&odd));
    let recipe = Recipe::read(&folder.path().join("run/recipe.toml")).unwrap();
    assert_eq!(recipe.name, "my-model--2-");
}
