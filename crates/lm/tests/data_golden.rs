//! Token ids and rendered chats against TRL 1.16.0 and transformers 5.23.0.
//!
//! The fixtures under `testdata/` are always checked. With `R2Q_GOLDEN=DIR` the larger set in that
//! folder (`dpo_trajectory.json`, `dpo_pairs.jsonl`, `tokenizer.json`) is checked too, and with
//! `R2Q_CHAT_GOLDEN=FILE` the rows that `testdata/scripts/dump_chat_ids.py` wrote for a real model.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::fs;
use std::path::{Path, PathBuf};

use lm::chat::{ChatTemplate, Message, RenderOptions};
use lm::data::{
    EmptyCompletions, PreferencePair, PreferenceRow, RawRow, SftRow, TokenizeOptions, Tokenized,
    Treatment, load_rows, read_preferences, tokenize_pairs, tokenize_sft,
};
use lm::tokenizer::Tokenizer;
use serde_json::{Map, Value};

fn testdata(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata")
        .join(relative)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

fn preferences(path: &Path) -> Vec<PreferenceRow> {
    read_preferences(path)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap()
}

/// Rows as a file with these lines would hold them.
fn raw_rows(rows: impl Iterator<Item = Value>) -> impl Iterator<Item = RawRow> {
    rows.enumerate().map(|(i, row)| RawRow {
        location: lm::data::Location::in_memory("golden", i),
        columns: row.as_object().unwrap().clone(),
    })
}

fn assert_tokens(pairs: &[PreferencePair], golden: &[Value]) {
    assert_eq!(pairs.len(), golden.len());
    for (pair, golden) in pairs.iter().zip(golden) {
        assert_eq!(
            pair.prompt_ids,
            ids(&golden["prompt_ids"]),
            "row {}",
            pair.row
        );
        assert_eq!(
            pair.chosen_ids,
            ids(&golden["chosen_ids"]),
            "row {}",
            pair.row
        );
        assert_eq!(
            pair.rejected_ids,
            ids(&golden["rejected_ids"]),
            "row {}",
            pair.row
        );
    }
}

fn rows_kept(tokenized: &Tokenized<PreferencePair>) -> Vec<u32> {
    let rows = tokenized.examples.iter();
    rows.map(|pair| u32::try_from(pair.row).unwrap()).collect()
}

#[test]
fn text_pairs_have_the_tokens_that_trl_gives_them() {
    let tokenizer = Tokenizer::from_folder(&testdata("trl")).unwrap();
    let rows = preferences(&testdata("trl/pairs.jsonl"));
    let golden = json(&testdata("trl/trajectory.json"));
    let options = TokenizeOptions::new(tokenizer.vocab_size());
    let pairs = tokenize_pairs(&rows, &tokenizer, None, &options).unwrap();
    assert_tokens(
        &pairs.examples,
        golden["tokenized_pairs"].as_array().unwrap(),
    );
    let merged = golden["boundary_merged_rows"].as_array().unwrap().len();
    assert!(
        merged > 0,
        "the fixture has rows that merge across the boundary"
    );
    assert_eq!(pairs.report.boundary_merged, merged);
    let ended = rows
        .iter()
        .filter(|row| row.chosen.to_text().ends_with("</s>"))
        .count();
    assert_eq!(pairs.report.eos_appended, 2 * rows.len() - ended);
    assert_eq!(rows[3].extra["id"], 3, "other columns are kept");
}

#[test]
fn prompts_that_fill_max_length_are_the_rows_that_trl_drops() {
    let tokenizer = Tokenizer::from_folder(&testdata("trl")).unwrap();
    let rows = preferences(&testdata("trl/pairs.jsonl"));
    let run = &json(&testdata("trl/trajectory.json"))["runs"]["max_length_drop"];
    let max_length = run["config"]["max_length"].as_u64().unwrap() as usize;
    let options = TokenizeOptions {
        max_length: Some(max_length),
        ..TokenizeOptions::new(tokenizer.vocab_size())
    };
    let pairs = tokenize_pairs(&rows, &tokenizer, None, &options).unwrap();
    assert_eq!(rows_kept(&pairs), ids(&run["kept_pair_indices"]));
    assert_eq!(pairs.report.n_dropped() + pairs.report.kept, rows.len());
    for pair in &pairs.examples {
        assert!(!pair.chosen_ids.is_empty() && !pair.rejected_ids.is_empty());
        assert!(pair.prompt_ids.len() + pair.chosen_ids.len() <= max_length);
        assert!(pair.prompt_ids.len() + pair.rejected_ids.len() <= max_length);
    }
}

#[test]
fn larger_golden_pairs_have_the_tokens_that_trl_gives_them() {
    let Some(folder) = std::env::var_os("R2Q_GOLDEN").map(PathBuf::from) else {
        println!("skipped: R2Q_GOLDEN names no folder with dpo_trajectory.json");
        return;
    };
    let tokenizer = Tokenizer::from_json(
        "golden",
        &fs::read_to_string(folder.join("tokenizer.json")).unwrap(),
        r#"{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}"#,
    )
    .unwrap();
    let rows = preferences(&folder.join("dpo_pairs.jsonl"));
    let golden = json(&folder.join("dpo_trajectory.json"));
    let options = TokenizeOptions::new(256);
    let pairs = tokenize_pairs(&rows, &tokenizer, None, &options).unwrap();
    assert_tokens(
        &pairs.examples,
        golden["tokenized_pairs"].as_array().unwrap(),
    );
    assert_eq!(pairs.examples.len(), 80);
    assert_eq!(pairs.report.boundary_merged, 4);
    if let Some(kept) = golden["runs"]["max_length_drop"].get("kept_pair_indices") {
        let max_length = &golden["runs"]["max_length_drop"]["config"]["max_length"];
        let options = TokenizeOptions {
            max_length: max_length.as_u64().map(|n| n as usize),
            ..options
        };
        let pairs = tokenize_pairs(&rows, &tokenizer, None, &options).unwrap();
        assert_eq!(rows_kept(&pairs), ids(kept));
    }
}

/// The three templates of the chat fixture, with its tokenizer.
fn chat_fixture() -> (Tokenizer, ChatTemplate, Value) {
    let tokenizer = Tokenizer::from_folder(&testdata("chat")).unwrap();
    let template = ChatTemplate::from_tokenizer(&tokenizer).unwrap().unwrap();
    (tokenizer, template, json(&testdata("chat/golden.json")))
}

#[test]
fn conversations_render_and_tokenise_as_in_transformers() {
    let (tokenizer, listed, golden) = chat_fixture();
    let config: Value =
        serde_json::from_slice(tokenizer.file("tokenizer_config.json").unwrap()).unwrap();
    let source = |name: &str| {
        let templates = config["chat_template"].as_array().unwrap().iter();
        let mut named = templates.filter(|t| t["name"] == name);
        named.next().unwrap()["template"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    for (i, case) in golden["cases"].as_array().unwrap().iter().enumerate() {
        let name = case["template"].as_str().unwrap();
        let mut options: Map<String, Value> = case["options"].as_object().unwrap().clone();
        let tools: Option<Vec<Value>> = options
            .remove("tools")
            .map(|tools| tools.as_array().unwrap().clone());
        let generation = options.remove("add_generation_prompt");
        let options = RenderOptions {
            add_generation_prompt: generation == Some(Value::Bool(true)),
            tools: tools.as_deref(),
            kwargs: Some(&options),
        };
        let messages = messages(&case["messages"]);
        let template =
            ChatTemplate::new(&source(name), tokenizer.special_tokens().clone()).unwrap();
        let rendered = template.render(&messages, &options);
        if let Some(error) = case["error"].as_str() {
            let message = rendered.unwrap_err().to_string();
            assert!(message.contains(error), "case {i}: {message}");
            continue;
        }
        assert_eq!(
            rendered.unwrap(),
            case["text"].as_str().unwrap(),
            "case {i}"
        );
        let encoded = template.encode(&tokenizer, &messages, &options).unwrap();
        assert_eq!(encoded, ids(&case["ids"]), "case {i}");
        // With tools the template of that name is picked, else the default one.
        if name != "strict" {
            assert_eq!(
                listed.encode(&tokenizer, &messages, &options).unwrap(),
                encoded
            );
        }
    }
}

#[test]
fn tokenizers_that_transformers_rebuilds_give_its_ids_and_texts() {
    let (_, _, golden) = chat_fixture();
    let texts = golden["classes"]["texts"].as_array().unwrap();
    let mut replaced = 0;
    for case in golden["classes"]["cases"].as_array().unwrap() {
        let file = &golden["classes"]["tokenizers"][case["tokenizer"].as_str().unwrap()];
        let config = case["config"].to_string();
        let tokenizer = Tokenizer::from_json("case", &file.to_string(), &config).unwrap();
        replaced += usize::from(tokenizer.replaced_by_class().is_some());
        for (i, text) in texts.iter().enumerate() {
            let found = tokenizer.encode(text.as_str().unwrap()).unwrap();
            assert_eq!(found, ids(&case["ids"][i]), "{text} {config}");
            let shown = tokenizer.decode(&found, false).unwrap();
            assert_eq!(shown, case["decoded"][i].as_str().unwrap(), "{config}");
            assert_eq!(tokenizer.decode_pieces(&found).unwrap().concat(), shown);
            let plain = tokenizer.decode(&found, true).unwrap();
            assert_eq!(
                plain,
                case["decoded_plain"][i].as_str().unwrap(),
                "{config}"
            );
        }
    }
    assert_eq!(
        replaced, 7,
        "all but the two generic ones and byte-level Llama"
    );
}

#[test]
fn conversational_and_implicit_pairs_have_the_tokens_that_trl_gives_them() {
    let (tokenizer, template, golden) = chat_fixture();
    let options = TokenizeOptions::new(tokenizer.vocab_size());
    for (kind, cases) in golden["preferences"].as_object().unwrap() {
        let cases = cases.as_array().unwrap();
        let rows: Vec<PreferenceRow> = raw_rows(cases.iter().map(|case| case["row"].clone()))
            .map(|raw| PreferenceRow::from_raw(raw).unwrap())
            .collect();
        let pairs = tokenize_pairs(&rows, &tokenizer, Some(&template), &options).unwrap();
        let expected: Vec<Value> = cases.iter().map(|case| case["tokens"].clone()).collect();
        println!("{kind}");
        assert_tokens(&pairs.examples, &expected);
    }
}

#[test]
fn fine_tuning_rows_have_the_tokens_and_labels_that_trl_gives_them() {
    let (tokenizer, template, golden) = chat_fixture();
    let options = TokenizeOptions::new(tokenizer.vocab_size());
    for (kind, cases) in golden["sft"].as_object().unwrap() {
        let cases = cases.as_array().unwrap();
        let rows: Vec<SftRow> = raw_rows(cases.iter().map(|case| case["row"].clone()))
            .map(|raw| SftRow::from_raw(raw).unwrap())
            .collect();
        let found = tokenize_sft(&rows, &tokenizer, Some(&template), &options).unwrap();
        assert_eq!(found.examples.len(), cases.len());
        for (example, case) in found.examples.iter().zip(cases) {
            let all = [example.prompt_ids.clone(), example.completion_ids.clone()].concat();
            assert_eq!(
                all,
                ids(&case["tokens"]["input_ids"]),
                "{kind} {}",
                example.row
            );
            let labels = case["tokens"]["labels"].as_array().unwrap();
            let masked = labels.iter().filter(|label| **label == -100).count();
            assert_eq!(example.prompt_ids.len(), masked, "{kind} {}", example.row);
        }
    }
}

#[test]
fn a_real_model_s_chats_have_the_tokens_that_transformers_gives_them() {
    let Some(path) = std::env::var_os("R2Q_CHAT_GOLDEN").map(PathBuf::from) else {
        println!("skipped: R2Q_CHAT_GOLDEN names no file from dump_chat_ids.py");
        return;
    };
    let golden = json(&path);
    let folder = PathBuf::from(golden["model"].as_str().unwrap());
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let template = ChatTemplate::from_tokenizer(&tokenizer).unwrap();
    let reader = read_preferences(&PathBuf::from(golden["data"].as_str().unwrap())).unwrap();
    let (mut rows, dropped) = load_rows(reader, Treatment::Drop).unwrap();
    let expected = golden["rows"].as_array().unwrap();
    rows.truncate(expected.len());
    for (row, expected) in rows.iter().zip(expected) {
        assert_eq!(Some(row.location.row as u64), expected["row"].as_u64());
    }
    let options = TokenizeOptions {
        empty_completions: EmptyCompletions::Keep,
        ..TokenizeOptions::new(tokenizer.vocab_size())
    };
    let pairs = tokenize_pairs(&rows, &tokenizer, template.as_ref(), &options).unwrap();
    assert_tokens(&pairs.examples, expected);
    println!(
        "{} rows equal, {} malformed",
        expected.len(),
        dropped.n_dropped()
    );
    println!("{}", pairs.report);
}
