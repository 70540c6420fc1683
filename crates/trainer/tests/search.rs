//! Searching from the command line.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::{TINY, fail, r2q, succeed, train, write};
use lm::{Decoding, Generate, PrefixCache};
use search::{BeamConfig, EarlyStopping, Request, Score, beam_search};
use serde_json::Value;
use trainer::{Policy, PromptSource, device};

/// Two processes sum the same 32-bit numbers; only the split over threads may differ.
const SAME: f64 = 1e-5;
/// Prompts asked for in these tests, and the most tokens of a completion.
const PROMPTS: usize = 3;
const MAX_NEW_TOKENS: usize = 10;

/// A finished tiny run, made once for all tests of this file.
fn run() -> &'static Path {
    static RUN: OnceLock<PathBuf> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("search");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let recipe = write(&folder, "tiny.toml", TINY);
        let out = folder.join("run");
        succeed(&mut train(&recipe, &out));
        out
    })
}

fn model() -> PathBuf {
    run().join("model")
}

fn sft() -> PathBuf {
    run().join("sft")
}

fn search(out: &Path, flags: &[&str]) -> Command {
    let mut command = r2q();
    command.args(["search", "--max-new-tokens", &MAX_NEW_TOKENS.to_string()]);
    command.arg("--policy").arg(model()).arg("--out").arg(out);
    command.args(flags);
    command
}

/// What a search with these flags wrote, a row for each prompt.
fn found(out: &Path, flags: &[&str]) -> Vec<Value> {
    let n = PROMPTS.to_string();
    succeed(search(out, &["--memo-prompts", &n]).args(flags));
    rows(out)
}

fn rows(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("completions.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
    rows.collect()
}

fn tokens(completion: &Value) -> Vec<u32> {
    serde_json::from_value(completion["tokens"].clone()).unwrap()
}

fn policy(folder: &Path) -> Policy {
    Policy::read(folder, &device("cpu").unwrap()).unwrap()
}

fn prompts(policy: &Policy) -> Vec<Vec<u32>> {
    let source = PromptSource::Memo {
        n: PROMPTS,
        seed: 1,
    };
    source.read(&policy.tokenizer).unwrap().ids
}

fn greedy_of(policy: &Policy) -> Vec<Vec<u32>> {
    let options = Generate {
        max_new_tokens: MAX_NEW_TOKENS,
        eos_ids: policy.tokenizer.eos_ids().to_vec(),
        decoding: Decoding::Greedy,
        seed: 0,
    };
    let rows = policy.model.generate(&prompts(policy), &options).unwrap();
    rows.into_iter().map(|row| row.ids).collect()
}

#[test]
fn beams_are_those_of_the_library() {
    let folder = tempfile::tempdir().unwrap();
    let sft = sft();
    let flags = [
        "--reference",
        sft.to_str().unwrap(),
        "--score",
        "log-ratio",
        "--width",
        "4",
        "--n-best",
        "3",
        "--length-penalty",
        "1",
        "--early-stopping",
        "estimate",
    ];
    let rows = found(&folder.path().join("out"), &flags);
    assert_eq!(rows.len(), PROMPTS);

    let (policy, reference) = (policy(&model()), policy(&sft));
    let model = PrefixCache::new(&policy.model);
    let mut model = model.with_reference(&reference.model).unwrap();
    let config = BeamConfig {
        width: 4,
        n_best: 3,
        length_penalty: 1.0,
        early_stopping: EarlyStopping::Estimate,
        ..BeamConfig::default()
    };
    for (row, prompt) in rows.iter().zip(prompts(&policy)) {
        let request = Request {
            score: Score::LogRatio,
            ..Request::new(prompt, policy.tokenizer.eos_ids(), MAX_NEW_TOKENS)
        };
        let output = beam_search(&mut model, &request, &config).unwrap();
        let written = row["completions"].as_array().unwrap();
        assert_eq!(written.len(), output.completions.len());
        for (written, own) in written.iter().zip(&output.completions) {
            assert_eq!(tokens(written), own.tokens);
            let score = written["score"].as_f64().unwrap();
            assert!((score - own.score).abs() < SAME, "{score}, {}", own.score);
        }
    }
}

#[test]
fn greedy_search_and_a_beam_of_one_write_what_the_decoder_writes() {
    let folder = tempfile::tempdir().unwrap();
    let expected = greedy_of(&policy(&model()));
    let algorithms: [(&str, &[&str]); 2] = [
        ("greedy", &["--algorithm", "greedy"]),
        // Of one beam there is nothing to rank by length.
        (
            "beam",
            &["--width", "1", "--n-best", "1", "--length-penalty", "-1"],
        ),
    ];
    for (name, flags) in algorithms {
        let rows = found(&folder.path().join(name), flags);
        let first = rows.iter().map(|row| tokens(&row["completions"][0]));
        assert_eq!(first.collect::<Vec<_>>(), expected, "{name}");
    }
}

#[test]
fn proxy_tuning_a_model_on_its_own_past_gives_what_it_became() {
    let folder = tempfile::tempdir().unwrap();
    let (sft, model) = (sft(), model());
    let [sft, model] = [&sft, &model].map(|path| path.to_str().unwrap());
    // model + 1 (sft - model) = sft.
    let flags = [
        "--algorithm",
        "greedy",
        "--expert",
        sft,
        "--anti-expert",
        model,
    ];
    let rows = found(&folder.path().join("out"), &flags);
    let first = rows.iter().map(|row| tokens(&row["completions"][0]));
    assert_eq!(first.collect::<Vec<_>>(), greedy_of(&policy(&self::sft())));
    assert_ne!(
        std::fs::read(self::sft().join("model.safetensors")).unwrap(),
        std::fs::read(self::model().join("model.safetensors")).unwrap()
    );
}

#[test]
fn every_algorithm_writes_scores_and_a_tree() {
    let folder = tempfile::tempdir().unwrap();
    let sft = sft();
    let mut greedy = Vec::new();
    let algorithms: [&[&str]; 9] = [
        &["greedy"],
        &["sample", "--n", "2"],
        &[
            "beam",
            "--groups",
            "2",
            "--width",
            "4",
            "--diversity-penalty",
            "1",
        ],
        &["best-first", "--budget-tokens", "40"],
        &["mcts", "--simulations", "8", "--backup", "soft"],
        &[
            "mcts",
            "--simulations",
            "8",
            "--backup",
            "mean",
            "--gumbel",
            "4",
        ],
        &["mcts", "--simulations", "40", "--at-end"],
        &["best-of-n", "--n", "3"],
        &["lookahead", "--width", "3"],
    ];
    for (number, flags) in algorithms.into_iter().enumerate() {
        let out = folder.path().join(number.to_string());
        let mut all = vec!["--reference", sft.to_str().unwrap(), "--beta", "0.5"];
        all.push("--algorithm");
        all.extend(flags);
        let rows = found(&out, &all);
        assert_eq!(rows.len(), PROMPTS, "{flags:?}");
        for row in &rows {
            let best = &row["completions"][0];
            let value = |name: &str| best[name].as_f64().unwrap();
            let reward = 0.5 * (value("logp") - value("reference_logp"));
            assert!((value("implicit_reward") - reward).abs() < SAME, "{row}");
            assert!((value("score") - value("logp")).abs() < SAME, "{row}");
            assert!(!tokens(best).is_empty(), "{flags:?}");
        }
        let page = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert_eq!(page.matches("<section").count(), PROMPTS, "{flags:?}");
        assert_eq!(page.matches("The tree, ").count(), PROMPTS, "{flags:?}");
        let texts = rows.iter().map(|row| row["completion"].clone());
        greedy.push(texts.collect::<Vec<_>>());
    }
    // Soft backup plans nothing: it writes what greedy writes.
    assert_eq!(greedy[4], greedy[0]);
}

#[test]
fn chat_prompts_go_through_the_template_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let chat = folder.path().join("chat");
    std::fs::create_dir(&chat).unwrap();
    for file in std::fs::read_dir(model()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), chat.join(file.file_name())).unwrap();
    }
    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}";
    write(&chat, "chat_template.jinja", template);
    let out = folder.path().join("out");
    let mut command = r2q();
    command.args(["search", "--prompt", "a name", "--chat"]);
    command.args(["--max-new-tokens", "3"]);
    command.arg("--policy").arg(&chat);
    succeed(command.arg("--out").arg(&out));
    assert_eq!(rows(&out)[0]["prompt"], "[user] a name");

    let none = folder.path().join("none");
    let said = fail(&mut search(&none, &["--prompt", "a", "--chat"]));
    assert!(said.contains("has no chat template"), "{said}");
}

#[test]
fn text_from_data_is_escaped_on_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let data = write(
        folder.path(),
        "prompts.jsonl",
        "{\"prompt\": \"memo </div><script>alert(1)</script>\"}\n",
    );
    succeed(&mut search(&out, &["--data", data.to_str().unwrap()]));
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(!page.contains("<script>alert"));
    assert!(page.contains("&lt;/div&gt;&lt;script&gt;alert(1)"));
}

#[test]
fn bad_input_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let cases: [(&[&str], &str); 21] = [
        (&[], "which prompts?"),
        (&["--prompt", "a", "--score", "log-ratio"], "--reference"),
        (&["--prompt", "a", "--reference", "/nowhere"], "/nowhere"),
        (&["--width", "0"], "--width: expected at least 1, got 0"),
        (
            &["--width", "1000000000"],
            "--width: expected at most 65536, got 1000000000",
        ),
        (
            &["--n-best", "9"],
            "--n-best: expected from 1 to the width, got 9",
        ),
        (
            &["--algorithm", "sample", "--n", "100000000"],
            "--n: expected at most 65536",
        ),
        (&["--algorithm", "mcts", "--gumbel", "0"], "--gumbel"),
        (
            &["--algorithm", "greedy", "--simulations", "8"],
            "--simulations: --algorithm greedy has no use for it; mcts has",
        ),
        (
            &["--algorithm", "mcts", "--n-best", "2"],
            "--n-best: mcts writes one completion unless --at-end",
        ),
        (&["--reference-weight", "0.3"], "--reference-weight"),
        (&["--diversity-penalty", "1"], "--diversity-penalty"),
        (&["--min-new-tokens", "11"], "--min-new-tokens"),
        (
            &["--memo-prompts", "9999999999999999"],
            "--memo-prompts: expected at most",
        ),
        (&["--prompt", "a", "--ban", "99999999"], "99999999"),
        (
            &["--prompt", "a", "--beta", "0.5"],
            "--beta: is of the implicit reward",
        ),
        (&["--prompt", "a", "--budget-seconds", "-1"], "-1"),
        (&["--prompt", "a", "--stop", ""], "stop"),
        (&["--top-k", "0"], "--top-k: expected at least 1, got 0"),
        (
            &["--algorithm", "sample", "--temperature", "0"],
            "--temperature: expected a number above 0",
        ),
        (&["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ];
    for (flags, expected) in cases {
        let said = fail(&mut search(&out, flags));
        assert!(said.contains(expected), "{flags:?}: {said}");
        assert!(!out.exists(), "{flags:?}");
    }
    std::fs::create_dir(&out).unwrap();
    let mine = write(&out, "mine", "");
    let said = fail(&mut search(&out, &["--prompt", "a"]));
    assert!(said.contains("not empty"), "{said}");
    // Said before any model is read.
    let mut command = search(&mine.join("out"), &["--prompt", "a"]);
    let said = fail(command.args(["--reference", "/nowhere"]));
    assert!(said.contains("mine/out: Not a directory"), "{said}");
}

#[test]
fn a_prompt_that_is_too_long_is_told_before_the_others_are_searched() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let long = " in".repeat(400);
    let lines = format!("{{\"prompt\": \" in\"}}\n{{\"prompt\": \"{long}\"}}\n");
    let data = write(folder.path(), "prompts.jsonl", lines);
    let said = fail(search(&out, &[]).arg("--data").arg(&data));
    assert!(said.contains("prompt 1 has 4"), "{said}");
    let beta = ["--prompt", " in", "--beta", "0", "--reference"];
    let said = fail(search(&out, &beta).arg(sft()));
    assert!(said.contains("--beta"), "{said}");
}

#[test]
fn equal_prompts_are_not_drawn_alike() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let data = write(
        folder.path(),
        "prompts.jsonl",
        "{\"prompt\": \" in\"}\n".repeat(2),
    );
    let flags = ["--algorithm", "sample", "--n", "2", "--temperature", "3"];
    succeed(search(&out, &flags).arg("--data").arg(&data));
    let rows = rows(&out);
    assert_ne!(rows[0]["completions"], rows[1]["completions"]);
}

#[test]
fn searches_that_hold_every_token_consider_fifty_unless_told_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--algorithm", "mcts", "--simulations", "4"];
    let covered = |name: &str, more: &[&str]| -> Vec<f64> {
        let rows = found(&folder.path().join(name), &[&flags[..], more].concat());
        let covered = |row: &Value| row["stats"]["covered_mass"].as_f64().unwrap();
        rows.iter().map(covered).collect()
    };
    let (fifty, all) = (
        covered("fifty", &[]),
        covered("all", &["--top-k", "100000"]),
    );
    let said = covered("said", &["--top-k", "50"]);
    let same = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < SAME);
    assert!(
        same(&fifty, &said) && fifty.iter().all(|&mass| mass < 1.0 - SAME),
        "{fifty:?}"
    );
    assert!(same(&all, &[1.0; PROMPTS]), "{all:?}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_search_writes_the_best_so_far() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;
    use std::time::Duration;

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let flags = ["--memo-prompts", "2", "--algorithm", "mcts", "--at-end"];
    let mut command = search(&out, &flags);
    command.args(["--simulations", "1000000000", "--backup", "soft"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with("searching"), "{line}");
    // Long enough for some simulations; none of them is needed for the test to pass.
    std::thread::sleep(Duration::from_secs(1));
    let id = child.id().to_string();
    succeed(Command::new("kill").args(["-INT", &id]));
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("best found so far"), "{rest}");
    let rows = rows(&out);
    assert_eq!(rows.len(), 1, "the second prompt is not begun");
    assert_eq!(rows[0]["stats"]["stopped"], "cancelled");
    assert_eq!(rows[0]["completions"].as_array().unwrap().len(), 1);
}
