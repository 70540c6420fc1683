//! `r2q score`: what is written, and what may not change it.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod common;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use common::{fail, model_folder, r2q, succeed, testdata, write};
use dpo_loss::{Beta, PairLogps};
use implicit_reward::PairRewards;
use lm::data::{TokenizeOptions, read_preferences, tokenize_pairs};
use lm::tokenizer::Tokenizer;
use lm::{CompletionBatch, Transformer};
use serde_json::{Map, Value, json};
use trainer::score::{ScoreOptions, score};

/// The same sums in another order, in f32; rewards are β times logps of up to a hundred nats.
const TOLERANCE: f64 = 1e-5;
const BETA: f64 = 0.1;

/// Two models of one tokenizer, and a folder for the rest.
struct Place {
    folder: tempfile::TempDir,
    policy: PathBuf,
    reference: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            policy: model_folder(folder.path(), "llama_untied"),
            reference: model_folder(folder.path(), "llama_tied"),
            folder,
        }
    }

    fn options(&self, data: &Path, name: &str) -> ScoreOptions {
        let (policy, reference) = (self.policy.clone(), self.reference.clone());
        let out = self.folder.path().join(name);
        ScoreOptions {
            beta: Some(Beta::new(BETA).unwrap()),
            candidates: 3,
            show: 1,
            ..ScoreOptions::new(policy, reference, data.to_path_buf(), out)
        }
    }

    /// Scores `data` as `change` says; the lines that were written.
    fn lines(
        &self,
        data: &Path,
        name: &str,
        change: impl FnOnce(&mut ScoreOptions),
    ) -> Vec<Map<String, Value>> {
        let mut options = self.options(data, name);
        change(&mut options);
        score(&options).unwrap();
        let text = std::fs::read_to_string(options.out.join("scores.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn write(&self, name: &str, rows: &[Value]) -> PathBuf {
        let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
        write(self.folder.path(), name, lines.join("\n"))
    }
}

fn pairs() -> PathBuf {
    testdata("trl/pairs.jsonl")
}

fn number(line: &Map<String, Value>, key: &str) -> f64 {
    line[key].as_f64().unwrap()
}

fn sum(line: &Map<String, Value>, key: &str) -> f64 {
    line[key]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_f64)
        .sum()
}

/// Whether two lines hold the same, numbers within the tolerance.
fn assert_same(a: &Value, b: &Value, place: &str) {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            // Logps are one over β times as large as rewards.
            let tolerance = TOLERANCE.max(1e-6 * a.abs());
            assert!((a - b).abs() <= tolerance, "{place}: {a} {b}");
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{place}");
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                assert_same(a, b, &format!("{place}[{i}]"));
            }
        }
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.len(), b.len(), "{place}");
            for (key, a) in a {
                assert_same(a, &b[key], &format!("{place}.{key}"));
            }
        }
        _ => assert_eq!(a, b, "{place}"),
    }
}

fn assert_lines_same(a: &[Map<String, Value>], b: &[Map<String, Value>]) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let (a, b) = (Value::Object(a.clone()), Value::Object(b.clone()));
        assert_same(&a, &b, &format!("line {i}"));
    }
}

#[test]
fn rewards_of_tokens_sum_to_the_reward_of_the_sequence() {
    let place = Place::new();
    let lines = place.lines(&pairs(), "scores", |_| ());
    let device = Device::default();
    let tokenizer = Tokenizer::from_folder(&place.policy).unwrap();
    let rows: Vec<_> = read_preferences(&pairs())
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let pairs = tokenize_pairs(&rows, &tokenizer, None, &TokenizeOptions::new(128)).unwrap();
    let models = [&place.policy, &place.reference].map(|f| Transformer::read(f, &device).unwrap());
    assert_eq!(lines.len(), 2 * pairs.examples.len());
    for (pair, lines) in pairs.examples.iter().zip(lines.chunks(2)) {
        let (prompt, chosen, rejected) = (&pair.prompt_ids, &pair.chosen_ids, &pair.rejected_ids);
        let rows: [(&[u32], &[u32]); 2] = [(prompt, chosen), (prompt, rejected)];
        let batch = CompletionBatch::new(&rows, &device);
        let [policy, reference] = [0, 1]
            .map(|i: usize| PairLogps::from_halves(models[i].score(&batch, false).table.sums()));
        let rewards = PairRewards::new(&policy, &reference, Beta::new(BETA).unwrap());
        let margin: f32 = rewards.margins().into_scalar();
        let expected: [f32; 2] = [rewards.chosen.into_scalar(), rewards.rejected.into_scalar()];
        for (line, expected) in lines.iter().zip(expected) {
            let reward = number(line, "reward");
            assert!((reward - f64::from(expected)).abs() < TOLERANCE, "{line:?}");
            assert!(
                (sum(line, "rewards") - reward).abs() < TOLERANCE,
                "{line:?}"
            );
            let running = line["running_rewards"].as_array().unwrap();
            let last = running.last().unwrap().as_f64().unwrap();
            assert!((last - reward).abs() < TOLERANCE, "{line:?}");
            assert!((number(line, "margin") - f64::from(margin)).abs() < TOLERANCE);
            assert!((sum(line, "policy_logps") - number(line, "policy_logp")).abs() < 1e-4);
            // Two random models are far apart, so that equality means something.
            assert!(sum(line, "policy_kls") > 0.1);
        }
    }
}

#[test]
fn batches_and_padding_change_nothing() {
    let place = Place::new();
    let alone = place.lines(&pairs(), "alone", |options| options.batch_size = 1);
    for size in [3, 64] {
        let together = place.lines(&pairs(), &format!("b{size}"), |o| o.batch_size = size);
        assert_lines_same(&alone, &together);
    }
}

#[test]
fn sharing_prompts_changes_nothing() {
    let place = Place::new();
    // Long prompts with short completions are what pays to share; see `CompletionBatch`.
    let rows: Vec<Value> = (0..12)
        .map(|i| {
            json!({
                "prompt": format!("Di sent a map to Ann and to Ed, and then {i} more. ").repeat(1 + i % 3),
                "chosen": " Ann said so.".repeat(1 + i % 2),
                "rejected": " No one did",
            })
        })
        .collect();
    let together = place.lines(&place.write("pairs.jsonl", &rows), "pairs", |_| ());
    let singles: Vec<Value> = rows
        .iter()
        .flat_map(|row| {
            ["chosen", "rejected"]
                .map(|side| json!({"prompt": row["prompt"], "completion": row[side]}))
        })
        .collect();
    let apart = place.lines(&place.write("singles.jsonl", &singles), "singles", |_| ());
    let strip = |lines: Vec<Map<String, Value>>| -> Vec<Map<String, Value>> {
        let strip = |mut line: Map<String, Value>| {
            for key in ["row", "side", "margin"] {
                line.shift_remove(key);
            }
            line
        };
        lines.into_iter().map(strip).collect()
    };
    assert_lines_same(&strip(together), &strip(apart));
}

#[test]
fn a_file_longer_than_a_window_is_scored_whole_and_in_order() {
    let place = Place::new();
    let rows: Vec<Value> = (0..600)
        .map(|i| {
            let chosen = " 17".repeat(1 + i * 7 % 5);
            json!({"prompt": "8 and 9 is", "chosen": chosen, "rejected": format!(" {i}")})
        })
        .collect();
    let data = place.write("long.jsonl", &rows);
    let lines = place.lines(&data, "long", |options| options.page_rows = 300);
    assert_eq!(lines.len(), 1200);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["row"], i / 2);
        assert_eq!(line["side"], ["chosen", "rejected"][i % 2]);
    }
    let page = std::fs::read_to_string(place.folder.path().join("long/scores.html")).unwrap();
    assert!(page.contains("The first 300 of 600 rows are shown"));
    // An array of the same rows is the same data.
    let array = write(
        place.folder.path(),
        "long.json",
        Value::from(rows).to_string(),
    );
    let first = place.lines(&array, "array", |options| options.max_rows = Some(5));
    assert_lines_same(&first, &lines[..10]);
}

/// A template that writes each turn by itself, in the tokenizer's configuration.
fn add_template(folder: &Path) {
    let path = folder.join("tokenizer_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}\
                    {% if add_generation_prompt %}[assistant]{% endif %}";
    config.insert("chat_template".into(), template.into());
    std::fs::write(&path, Value::Object(config).to_string()).unwrap();
}

#[test]
fn of_conversations_the_assistants_turns_alone_are_scored() {
    let place = Place::new();
    add_template(&place.policy);
    add_template(&place.reference);
    let say = |role: &str, content: &str| json!({"role": role, "content": content});
    let turns = [
        say("user", "Who sent it?"),
        say("assistant", "Di."),
        say("user", "And the tea?"),
        say("assistant", "Ed sent it."),
    ];
    let rows = [json!({"messages": turns})];
    let line = &place.lines(&place.write("chat.jsonl", &rows), "whole", |_| ())[0];
    let scored = |line: &Map<String, Value>| -> String {
        let tokens = line["tokens"].as_array().unwrap().iter();
        let rewards = line["rewards"].as_array().unwrap();
        let kept = tokens.zip(rewards).filter(|(_, reward)| !reward.is_null());
        kept.map(|(token, _)| token.as_str().unwrap()).collect()
    };
    assert_eq!(scored(line), "Di.</s>Ed sent it.</s>");
    // As completions: the first turn is the prompt, the user's second one earns nothing.
    let rows = [json!({"prompt": turns[..1], "chosen": turns[1..], "rejected": turns[1..2]})];
    let lines = place.lines(&place.write("pair.jsonl", &rows), "pair", |_| ());
    assert_eq!(scored(&lines[0]), "Di.</s>Ed sent it.</s>");
    assert_eq!(scored(&lines[1]), "Di.</s>");
    for key in ["reward", "policy_logp"] {
        let difference = number(&lines[0], key) - number(line, key);
        assert!(difference.abs() < TOLERANCE * 10.0, "{key}: {difference}");
    }
}

/// Makes a folder's tokenizer one that has every printable character, one token each.
fn spell_ascii(folder: &Path) {
    let path = folder.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let mut vocab = Map::new();
    for special in json["added_tokens"].as_array().unwrap() {
        vocab.insert(
            special["content"].as_str().unwrap().into(),
            special["id"].clone(),
        );
    }
    // As byte-level tokenizers spell a space, a line break and an escape.
    let others = ['\u{120}', '\u{10a}', '\u{11b}'];
    for c in ('!'..='~').chain(others) {
        let id = vocab.len();
        vocab.entry(c.to_string()).or_insert(id.into());
    }
    json["model"]["vocab"] = vocab.into();
    json["model"]["merges"] = json!([]);
    std::fs::write(&path, json.to_string()).unwrap();
}

/// The data block of a page.
fn data_block(page: &str) -> Value {
    let opening = "<script type=\"application/json\" id=\"data\">";
    let start = page.find(opening).unwrap() + opening.len();
    let end = start + page[start..].find("</script>").unwrap();
    serde_json::from_str(&page[start..end]).unwrap()
}

#[test]
fn a_script_in_the_data_shows_as_text() {
    let place = Place::new();
    spell_ascii(&place.policy);
    spell_ascii(&place.reference);
    let evil = "</script><script>a()</script><img onerror=a()><!--\u{1b}[31m";
    let rows =
        [json!({"prompt": evil, "chosen": format!(" {evil}"), "rejected": format!(" a{evil}b")})];
    let mut options = place.options(&place.write("evil.jsonl", &rows), "evil");
    options.command = format!("cargo xtask score {evil}");
    let outcome = score(&options).unwrap();
    let page = std::fs::read_to_string(options.out.join("scores.html")).unwrap();
    // The data, and the page's own script.
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script").count(), 2);
    assert!(!page.contains("<img") && !page.contains("<!--"));
    let row = &data_block(&page)["rows"][0];
    assert!(row["p"].as_str().unwrap().contains("<script>a()</script>"));
    let tokens = row["c"][0]["t"].as_array().unwrap().iter();
    let text: String = tokens.map(|token| token.as_str().unwrap()).collect();
    assert!(text.contains("<img onerror=a()>"), "{text}");
    // Nor does a terminal obey the data.
    let text = outcome.terminal(false);
    assert!(
        text.contains("<script>") && !text.contains('\u{1b}'),
        "{text}"
    );
}

#[test]
fn the_page_points_at_nothing_outside_and_holds_what_its_tooltips_show() {
    let place = Place::new();
    let mut options = place.options(&pairs(), "page");
    options.show = 5;
    let outcome = score(&options).unwrap();
    let page = std::fs::read_to_string(options.out.join("scores.html")).unwrap();
    for address in ["https:", "src=", "url(", "@import", "<link"] {
        assert!(!page.contains(address), "{address}");
    }
    let data = data_block(&page);
    assert_eq!(data["rows"].as_array().unwrap().len(), 40);
    let side = &data["rows"][0]["c"][0];
    let n = side["t"].as_array().unwrap().len();
    for key in ["i", "a", "b", "e", "k", "x"] {
        assert_eq!(side[key].as_array().unwrap().len(), n, "{key}");
    }
    // Three alternatives of three numbers, each with a text.
    let alternatives = side["x"][0].as_array().unwrap();
    assert_eq!(alternatives.len(), 9);
    for alternative in alternatives.chunks(3) {
        assert!(data["words"][alternative[0].to_string()].is_string());
    }
    let colours = outcome.terminal(true);
    assert!(colours.contains("\u{1b}[48;2;") && colours.contains("\u{1b}[4;48;2;"));
}

#[test]
fn the_programs_words_on_what_cannot_be_scored_are_one_line() {
    let place = Place::new();
    let run = |policy: &Path, reference: &Path, data: &Path, out: &str| {
        let mut command = r2q();
        command.arg("score").arg("--policy").arg(policy);
        command.arg("--reference").arg(reference);
        command.arg("--data").arg(data);
        command.arg("--out").arg(place.folder.path().join(out));
        command
    };
    let (policy, reference) = (&place.policy, &place.reference);
    let said = succeed(&mut run(policy, reference, &pairs(), "out"));
    assert!(
        said.contains("scores.jsonl") && said.contains("rows kept"),
        "{said}"
    );
    // Nothing is written over.
    let said = fail(&mut run(policy, reference, &pairs(), "out"));
    assert!(said.contains("not empty"), "{said}");

    // A bad row is told of before anything is computed, with its line.
    let bad = write(
        place.folder.path(),
        "bad.jsonl",
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"prompt\": \"a\", \"chosen\": 3, \"rejected\": \"c\"}\n",
    );
    let said = fail(&mut run(policy, reference, &bad, "bad"));
    assert!(
        said.contains("line 2") && said.contains("`chosen`"),
        "{said}"
    );
    assert!(!place.folder.path().join("bad").exists());

    // Another tokenizer's ids mean other tokens.
    let other = place.folder.path().join("other");
    common::copy(reference, &other);
    let path = other.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
    vocab.insert("a".into(), b);
    vocab.insert("b".into(), a);
    std::fs::write(&path, json.to_string()).unwrap();
    let said = fail(&mut run(policy, &other, &pairs(), "tokens"));
    assert!(
        said.contains("token id") && said.contains("other"),
        "{said}"
    );
}

#[test]
fn beta_is_that_of_the_run_which_made_the_policy() {
    let place = Place::new();
    let run = place.folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    common::copy(&place.policy, &run.join("model"));
    write(
        &run,
        "recipe.toml",
        "name = \"x\"\n[task]\ntrain_pairs = 8\n[preference]\nbeta = 0.7\n",
    );
    let mut options = place.options(&pairs(), "beta");
    (options.policy, options.beta) = (run.join("model"), None);
    assert!((score(&options).unwrap().beta.get() - 0.7).abs() < 1e-12);
    let mut options = place.options(&pairs(), "default");
    options.beta = None;
    assert!((score(&options).unwrap().beta.get() - 0.1).abs() < 1e-12);
}

#[test]
fn a_peft_folder_is_scored_as_its_merged_model_against_its_base() {
    let place = Place::new();
    let base = place.reference.clone();
    let adapter = place.folder.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    let fixture = testdata("lora/llama");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture.join(file), adapter.join(file)).unwrap();
    }
    let path = adapter.join("adapter_config.json");
    let settings = std::fs::read_to_string(&path).unwrap();
    let mut settings: Value = serde_json::from_str(&settings).unwrap();
    settings["base_model_name_or_path"] = base.to_str().unwrap().into();
    std::fs::write(&path, settings.to_string()).unwrap();

    let merged = place.folder.path().join("merged");
    let model = Transformer::read(&base, &Device::default()).unwrap();
    let model = model.read_adapter(&adapter).unwrap().merge();
    std::fs::create_dir(&merged).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        for folder in [&adapter, &merged] {
            std::fs::copy(base.join(file), folder.join(file)).unwrap();
        }
    }
    model.write(&merged).unwrap();

    let of = |policy: &Path, name: &str| {
        place.lines(&pairs(), name, |options| {
            options.policy = policy.to_path_buf();
            options.reference.clone_from(&base);
        })
    };
    let lines = of(&adapter, "by_adapter");
    assert_lines_same(&lines, &of(&merged, "by_merged"));
    assert!(lines.iter().any(|line| number(line, "reward").abs() > 1e-3));

    // The program takes the base for the reference where none is named.
    let mut command = r2q();
    command
        .args(["score", "--beta", "0.1", "--policy"])
        .arg(&adapter);
    command.arg("--data").arg(pairs());
    command
        .arg("--out")
        .arg(place.folder.path().join("by_program"));
    succeed(&mut command);
    let mut command = r2q();
    command.args(["score", "--policy"]).arg(&merged);
    command.arg("--data").arg(pairs());
    command
        .arg("--out")
        .arg(place.folder.path().join("refused"));
    assert!(fail(&mut command).contains("--reference: expected a folder"));
}
