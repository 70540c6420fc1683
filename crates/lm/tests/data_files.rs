//! Files of rows in every format, and what each kind of bad input says.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field};
use lm::chat::{ChatError, ChatTemplate, Message, RenderOptions};
use lm::data::{
    Boundary, Content, DataError, DropReason, EmptyCompletions, Format, PreferenceRow, RowReader,
    SftRow, TokenizeOptions, Treatment, load_rows, read_labelled, read_preferences, read_sft,
    tokenize_labelled, tokenize_pairs, tokenize_sft,
};
use lm::tokenizer::{Tokenizer, TokenizerError};
use serde_json::{Value, json};

fn testdata(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata")
        .join(relative)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&testdata("trl")).unwrap()
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

fn preferences(path: &Path) -> Result<Vec<PreferenceRow>, DataError> {
    read_preferences(path)?.collect()
}

/// The message for a file with these lines, without the folder.
fn message(lines: &str) -> String {
    let scratch = Scratch::new();
    let path = scratch.write("pairs.jsonl", lines);
    let error = preferences(&path).unwrap_err().to_string();
    let folder = format!("{}/", scratch.0.path().display());
    assert!(!error.contains('\n'), "one line: {error}");
    error.replace(&folder, "")
}

const GOOD: &str = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;

#[test]
fn a_missing_file_is_named() {
    let error = preferences(Path::new("/nowhere/pairs.jsonl")).unwrap_err();
    assert!(
        error.to_string().starts_with("/nowhere/pairs.jsonl: "),
        "{error}"
    );
}

#[test]
fn an_empty_file_and_a_folder_are_refused() {
    assert_eq!(
        message(""),
        "pairs.jsonl: expected at least one row, found none"
    );
    assert_eq!(
        message(" \n\n"),
        "pairs.jsonl: expected at least one row, found none"
    );
    assert_eq!(
        message("[ ]"),
        "pairs.jsonl: expected at least one row, found none"
    );
    let scratch = Scratch::new();
    assert!(matches!(
        preferences(scratch.0.path()),
        Err(DataError::Io { .. })
    ));
}

#[test]
fn bad_json_names_its_line() {
    let message = message(&format!("{GOOD}\n\n{{\"prompt\": \"a\",,}}\n"));
    assert_eq!(
        message,
        "pairs.jsonl line 3: bad JSON: key must be a string (column 16)"
    );
}

#[test]
fn bad_json_in_an_array_names_its_line() {
    let text = format!("[\n{GOOD},\n{{\"prompt\": \"a\",\n \"chosen\": tru}}\n]");
    assert_eq!(
        message(&text),
        "pairs.jsonl line 4: bad JSON: expected ident (column 15)"
    );
    assert_eq!(
        message(&format!("[{GOOD}\n{GOOD}]")),
        "pairs.jsonl line 1: bad JSON: trailing characters (column 1)".replace("line 1", "line 2")
    );
    assert_eq!(
        message(&format!("[{GOOD}")),
        "pairs.jsonl line 1: bad JSON: the file ends within this row"
    );
    assert_eq!(
        message(&format!("[{GOOD}] x")),
        "pairs.jsonl line 1: bad JSON: expected the end of the file after `]`"
    );
    assert_eq!(
        message(&format!("[{GOOD}, }}]")),
        "pairs.jsonl line 1: bad JSON: expected value (column 1)"
    );
}

#[test]
fn deep_nesting_is_refused_without_a_crash() {
    let deep = "[".repeat(100_000);
    assert!(message(&format!("{{\"chosen\": {deep}")).contains("recursion limit"));
    assert!(message(&deep).contains("bad JSON"));
}

#[test]
fn a_row_that_is_no_object_is_named() {
    assert_eq!(
        message(&format!("{GOOD}\n[1]\n")),
        "pairs.jsonl line 2: expected an object with columns, got a list"
    );
}

#[test]
fn a_column_that_is_there_twice_is_named() {
    let twice = r#"{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}"#;
    let said = message(&format!("{GOOD}\n{twice}\n"));
    assert!(
        said.starts_with("pairs.jsonl line 2: bad JSON: column `chosen` is there twice"),
        "{said}"
    );
    let said = message(&format!("[{twice}]"));
    assert!(said.contains("column `chosen` is there twice"), "{said}");
}

#[test]
fn a_missing_column_is_named_on_every_row() {
    assert_eq!(
        message(&format!(
            "{GOOD}\n{{\"prompt\": \"a\", \"chosen\": \"b\", \"id\": 1}}\n"
        )),
        "pairs.jsonl line 2: column `rejected` is missing; the row has `prompt`, `chosen`, `id`"
    );
    // The prompt may be implicit, but then for the whole file.
    assert_eq!(
        message(&format!(
            "{GOOD}\n{{\"chosen\": \"b\", \"rejected\": \"c\"}}\n"
        )),
        "pairs.jsonl line 2: column `prompt` is missing; the row has `chosen`, `rejected`"
    );
}

#[test]
fn a_wrong_type_is_named() {
    assert_eq!(
        message(r#"{"prompt": "a", "chosen": 3, "rejected": "c"}"#),
        "pairs.jsonl line 1: column `chosen`: expected a string or a list of messages, got a number"
    );
    assert_eq!(
        message(
            r#"{"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]}"#
        ),
        "pairs.jsonl line 1: column `rejected`: expected a string, as `chosen` is, got a list of messages"
    );
    let chat = |message: Value| {
        json!({"prompt": [{"role": "user", "content": "a"}], "chosen": [message],
            "rejected": [{"role": "assistant", "content": "b"}]})
        .to_string()
    };
    assert_eq!(
        message(&chat(json!({"role": "assistant", "content": true}))),
        "pairs.jsonl line 1: column `chosen[0].content`: expected a string, got true or false"
    );
    assert_eq!(
        message(&chat(json!({"from": "gpt", "value": "b"}))),
        "pairs.jsonl line 1: column `chosen[0]`: expected a message with `role` and `content`, got one with `from` and `value`"
    );
    assert_eq!(
        message(&chat(json!("b"))),
        "pairs.jsonl line 1: column `chosen[0]`: expected a message with a `role`, got a string"
    );
}

#[test]
fn malformed_rows_are_dropped_and_counted_where_that_is_asked_for() {
    let scratch = Scratch::new();
    let path = scratch.write("pairs.jsonl", format!("{{}}\n{GOOD}\n3\n{GOOD}\n"));
    // The first row settles that there is a prompt, so it must be a good one here.
    let path_good = scratch.write("good.jsonl", format!("{GOOD}\n3\n{{}}\n{GOOD}\n"));
    let (rows, report) = load_rows(read_preferences(&path_good).unwrap(), Treatment::Drop).unwrap();
    assert_eq!((rows.len(), report.n_dropped()), (2, 2));
    assert_eq!(report.dropped[&DropReason::Malformed], 2);
    assert_eq!(rows[1].location.line, Some(4));
    let refused = load_rows(read_preferences(&path_good).unwrap(), Treatment::Refuse);
    assert!(refused.unwrap_err().is_malformed_row());
    let none = load_rows(read_preferences(&path).unwrap(), Treatment::Drop);
    assert!(matches!(none, Err(DataError::AllMalformed(_))));
}

fn options() -> TokenizeOptions {
    TokenizeOptions::new(tokenizer().vocab_size())
}

#[test]
fn an_empty_completion_is_refused_dropped_or_kept() {
    let rows = [
        PreferenceRow::from_text("pairs.jsonl", 0, "a", "b", "c"),
        PreferenceRow::from_text("pairs.jsonl", 1, "a", "b", ""),
    ];
    let tokenizer = tokenizer();
    let error = tokenize_pairs(&rows, &tokenizer, None, &options()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "pairs.jsonl row 2: column `rejected`: expected a completion, got an empty one; --empty-completions drop (or keep) goes on"
    );
    let with = |empty_completions| TokenizeOptions {
        empty_completions,
        ..options()
    };
    let dropped = tokenize_pairs(&rows, &tokenizer, None, &with(EmptyCompletions::Drop)).unwrap();
    assert_eq!(dropped.examples.len(), 1);
    assert_eq!(dropped.report.dropped[&DropReason::EmptyCompletion], 1);
    let kept = tokenize_pairs(&rows, &tokenizer, None, &with(EmptyCompletions::Keep)).unwrap();
    assert_eq!(kept.examples[1].rejected_ids, [tokenizer.eos_id().unwrap()]);
    // Where no token is predicted by another there is nothing to keep.
    let rows = [
        PreferenceRow::from_text("pairs.jsonl", 0, "", "", ""),
        PreferenceRow::from_text("pairs.jsonl", 1, "", "", "b b"),
    ];
    let kept = tokenize_pairs(&rows, &tokenizer, None, &with(EmptyCompletions::Keep)).unwrap();
    assert_eq!(kept.examples.len(), 1);
    let error = tokenize_pairs(&rows, &tokenizer, None, &options()).unwrap_err();
    assert!(
        error.to_string().contains("row 1: column `chosen`"),
        "{error}"
    );
}

#[test]
fn a_text_of_one_token_is_an_empty_one() {
    let tokenizer = tokenizer();
    let scratch = Scratch::new();
    let eos = tokenizer.eos_text().unwrap();
    let path = scratch.0.path().join("texts.jsonl");
    fs::write(&path, json!({ "text": eos }).to_string()).unwrap();
    let rows: Vec<SftRow> = read_sft(&path).unwrap().map(Result::unwrap).collect();
    let error = tokenize_sft(&rows, &tokenizer, None, &options()).unwrap_err();
    assert!(
        matches!(error, DataError::EmptyCompletion { .. }),
        "{error}"
    );
}

#[test]
fn a_prompt_that_leaves_no_room_is_dropped_or_refused() {
    let long = "the den, ".repeat(40) + "so";
    let rows = [PreferenceRow::from_text(
        "pairs.jsonl",
        0,
        &long,
        " b",
        " c",
    )];
    let tokenizer = tokenizer();
    let n = tokenizer.encode(&long).unwrap().len();
    let whole = tokenizer.encode(&format!("{long} b</s>")).unwrap().len();
    let limited = TokenizeOptions {
        max_length: Some(n - 10),
        ..options()
    };
    let all = tokenize_pairs(&rows, &tokenizer, None, &limited).unwrap_err();
    assert_eq!(
        all.to_string(),
        "all 1 rows were dropped: 1 (the prompt fills max_length)"
    );
    let refuse = TokenizeOptions {
        long_prompts: Treatment::Refuse,
        ..limited
    };
    let error = tokenize_pairs(&rows, &tokenizer, None, &refuse).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "pairs.jsonl row 1: the prompt has {} tokens, longest allowed is {}",
            n,
            n - 11
        )
    );
    // Without max_length the model's window is the limit, and passing it is an error.
    let window = TokenizeOptions {
        window: Some(64),
        ..options()
    };
    let error = tokenize_pairs(&rows, &tokenizer, None, &window).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "pairs.jsonl row 1: prompt and chosen have {} tokens, the model's window is 64; set max_length to at most 64",
            whole
        )
    );
}

#[test]
fn a_token_outside_the_vocabulary_names_row_and_column() {
    let rows = [
        PreferenceRow::from_text("pairs.jsonl", 0, "a", "b", "c"),
        PreferenceRow::from_text("pairs.jsonl", 1, "a", "b", "the den"),
    ];
    let small = TokenizeOptions::new(100);
    let error = tokenize_pairs(&rows, &tokenizer(), None, &small).unwrap_err();
    let DataError::TokenOutsideVocabulary { id, .. } = error else {
        panic!("another error: {error}");
    };
    assert!(id >= 100);
    assert_eq!(
        error.to_string(),
        format!(
            "pairs.jsonl row 2: column `rejected`: token id {id} is outside the model's vocabulary of 100"
        )
    );
}

#[test]
fn a_conversation_without_a_template_is_refused() {
    let scratch = Scratch::new();
    let row = json!({"prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}]});
    let rows = preferences(&scratch.write("chat.jsonl", row.to_string())).unwrap();
    let error = tokenize_pairs(&rows, &tokenizer(), None, &options()).unwrap_err();
    assert!(matches!(error, DataError::NoTemplate { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("line 1: the row is a conversation")
    );
}

#[test]
fn truncation_cuts_completions_at_the_end_and_is_counted() {
    let rows = [PreferenceRow::from_text(
        "pairs.jsonl",
        0,
        "sort a b c:",
        " a b c and so on and on",
        " b",
    )];
    let tokenizer = tokenizer();
    let whole = tokenize_pairs(&rows, &tokenizer, None, &options()).unwrap();
    let n = whole.examples[0].prompt_ids.len();
    let limited = TokenizeOptions {
        max_length: Some(n + 4),
        ..options()
    };
    let cut = tokenize_pairs(&rows, &tokenizer, None, &limited).unwrap();
    assert_eq!(
        cut.examples[0].chosen_ids,
        whole.examples[0].chosen_ids[..4]
    );
    assert_eq!(cut.examples[0].rejected_ids, whole.examples[0].rejected_ids);
    assert_eq!(cut.report.chosen_truncated, 1);
    assert_eq!(cut.report.rejected_truncated, 0);
    assert_eq!(
        cut.report.tokens_cut,
        whole.examples[0].chosen_ids.len() - 4
    );
    let shown = cut.report.to_string();
    assert!(
        shown.contains("chosen completions cut at max_length"),
        "{shown}"
    );
}

#[test]
fn apart_boundaries_keep_the_prompt_s_own_tokens() {
    let rows = [PreferenceRow::from_text(
        "pairs.jsonl",
        0,
        "say th",
        "e den",
        "at",
    )];
    let tokenizer = tokenizer();
    let joined = tokenize_pairs(&rows, &tokenizer, None, &options()).unwrap();
    let apart = TokenizeOptions {
        boundary: Boundary::Apart,
        ..options()
    };
    let apart = tokenize_pairs(&rows, &tokenizer, None, &apart).unwrap();
    assert_eq!(
        apart.examples[0].prompt_ids,
        tokenizer.encode("say th").unwrap()
    );
    assert_eq!(joined.report.boundary_merged, 1, "the fixture merges here");
    assert_eq!(apart.report.boundary_merged, 0);
    let text = |ids: &[u32]| tokenizer.decode(ids, true).unwrap();
    assert_eq!(text(&apart.examples[0].chosen_ids), "e den");
    for pairs in [&joined, &apart] {
        let pair = &pairs.examples[0];
        let whole = [pair.prompt_ids.clone(), pair.chosen_ids.clone()].concat();
        assert_eq!(text(&whole), "say the den");
    }
}

/// The same two rows as JSON lines, as an array and as Parquet.
#[test]
fn formats_hold_the_same_rows() {
    let scratch = Scratch::new();
    let rows = [
        json!({"prompt": "a\n\"]", "chosen": "b", "rejected": "{c", "score": 0.5}),
        json!({"prompt": "d", "chosen": "é", "rejected": "f", "score": 2.0}),
    ];
    let lines = format!("\u{feff}{}\r\n\n{}", rows[0], rows[1]);
    let lines = scratch.write("rows.txt", lines);
    let array = serde_json::to_string_pretty(&rows).unwrap();
    let array = scratch.write("rows.json", format!("\n {array}\n"));

    let column = |name: &str| -> ArrayRef {
        let values = rows.iter().map(|row| row[name].as_str().unwrap());
        Arc::new(values.map(Some).collect::<StringArray>())
    };
    let batch = RecordBatch::try_from_iter([
        ("prompt", column("prompt")),
        ("chosen", column("chosen")),
        ("rejected", column("rejected")),
        (
            "score",
            Arc::new(Float64Array::from(vec![0.5, 2.0])) as ArrayRef,
        ),
    ])
    .unwrap();
    let parquet = scratch.write("rows.parquet", parquet_bytes(&batch));

    let wanted = preferences(&lines).unwrap();
    assert_eq!(RowReader::open(&lines).unwrap().format(), Format::JsonLines);
    assert_eq!(RowReader::open(&array).unwrap().format(), Format::JsonArray);
    assert_eq!(RowReader::open(&parquet).unwrap().format(), Format::Parquet);
    assert_eq!(wanted.len(), 2);
    assert_eq!(wanted[1].extra["score"], 2.0);
    for path in [&array, &parquet] {
        let found = preferences(path).unwrap();
        assert_eq!(found.len(), wanted.len());
        for (mut found, wanted) in found.into_iter().zip(&wanted) {
            assert_eq!(found.location.row, wanted.location.row);
            found.location = wanted.location.clone();
            assert_eq!(&found, wanted);
        }
    }
    let array_rows = preferences(&array).unwrap();
    assert_eq!(array_rows[1].location.line, Some(9));
    let parquet_rows = preferences(&parquet).unwrap();
    assert!(
        parquet_rows[1]
            .location
            .to_string()
            .ends_with("rows.parquet row 2")
    );
}

fn parquet_bytes(batch: &RecordBatch) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn parquet_conversations_are_lists_of_messages_and_damage_is_named() {
    let fields = vec![
        Field::new("role", DataType::Utf8, true),
        Field::new("content", DataType::Utf8, true),
    ];
    let turns = |role: &str, contents: [&str; 2]| -> ArrayRef {
        let mut list = ListBuilder::new(StructBuilder::from_fields(fields.clone(), 2));
        for content in contents {
            let message = list.values();
            message
                .field_builder::<StringBuilder>(0)
                .unwrap()
                .append_value(role);
            message
                .field_builder::<StringBuilder>(1)
                .unwrap()
                .append_value(content);
            message.append(true);
            list.append(true);
        }
        Arc::new(list.finish())
    };
    let batch = RecordBatch::try_from_iter([
        ("prompt", turns("user", ["a", "b"])),
        ("chosen", turns("assistant", ["c", "d"])),
        ("rejected", turns("assistant", ["e", "f"])),
    ])
    .unwrap();
    let bytes = parquet_bytes(&batch);
    let scratch = Scratch::new();
    let rows = preferences(&scratch.write("rows.parquet", &bytes)).unwrap();
    let Content::Chat(chosen) = &rows[1].chosen else {
        panic!("messages expected");
    };
    assert_eq!(
        Value::Object(chosen[0].clone()),
        json!({"role": "assistant", "content": "d"})
    );

    let cut = scratch.write("cut.parquet", &bytes[..bytes.len() / 2]);
    let error = preferences(&cut).unwrap_err().to_string();
    assert!(
        error.contains("cut.parquet: not a readable Parquet file"),
        "{error}"
    );
}

#[test]
fn fine_tuning_and_labelled_rows_are_read_and_checked() {
    let scratch = Scratch::new();
    let path = scratch.write(
        "sft.jsonl",
        "{\"text\": \"the den\", \"id\": 1}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n",
    );
    let rows: Vec<SftRow> = read_sft(&path).unwrap().collect::<Result<_, _>>().unwrap();
    let found = tokenize_sft(&rows, &tokenizer(), None, &options()).unwrap();
    assert!(found.examples[0].prompt_ids.is_empty());
    assert_eq!(found.report.completions, 2);
    let bad = scratch.write("bad.jsonl", "{\"body\": \"x\"}");
    let error = read_sft(&bad).unwrap().next().unwrap().unwrap_err();
    let expected = "column `text`, `messages`, or `prompt` with `completion` is missing";
    assert!(error.to_string().contains(expected), "{error}");

    let path = scratch.write(
        "kto.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\", \"label\": true}\n{\"prompt\": \"a\", \"completion\": \"c\", \"label\": false}\n",
    );
    let rows: Vec<_> = read_labelled(&path).unwrap().map(Result::unwrap).collect();
    let found = tokenize_labelled(&rows, &tokenizer(), None, &options()).unwrap();
    let desirable: Vec<bool> = found.examples.iter().map(|e| e.desirable).collect();
    assert_eq!(desirable, [true, false]);
    let bad = scratch.write(
        "bad.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\", \"label\": 1}",
    );
    let error = read_labelled(&bad).unwrap().next().unwrap().unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("column `label`: expected true or false, got a number"),
        "{error}"
    );
}

#[test]
fn a_saved_tokenizer_is_the_same_bytes() {
    let scratch = Scratch::new();
    let folder = scratch.0.path().join("model");
    fs::create_dir_all(folder.join("additional_chat_templates")).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(testdata("chat").join(name), folder.join(name)).unwrap();
    }
    fs::write(
        folder.join("chat_template.jinja"),
        "{{ messages[0].content }}\r\n",
    )
    .unwrap();
    fs::write(folder.join("additional_chat_templates/rag.jinja"), "rag").unwrap();
    fs::write(folder.join("special_tokens_map.json"), "{ }\n").unwrap();
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let copy = scratch.0.path().join("copy");
    tokenizer.save(&copy).unwrap();
    assert_eq!(tokenizer.files().count(), 5);
    for name in tokenizer.files() {
        assert_eq!(
            fs::read(folder.join(name)).unwrap(),
            fs::read(copy.join(name)).unwrap()
        );
    }
    // The file of its own comes before the template in the configuration.
    let template = ChatTemplate::from_tokenizer(&tokenizer).unwrap().unwrap();
    assert_eq!(render(&template, "hi").unwrap(), "hi");
}

#[test]
fn special_tokens_are_found_in_every_place_and_form() {
    let file = fs::read_to_string(testdata("trl/tokenizer.json")).unwrap();
    let load = |config: &str| Tokenizer::from_json("tok", &file, config);
    let tokenizer = load(r#"{"eos_token": {"content": "</s>"}}"#).unwrap();
    assert_eq!(tokenizer.eos_id().unwrap(), 2);
    assert_eq!(
        tokenizer.pad_id(),
        2,
        "without a pad token the end of sequence fills up"
    );
    assert_eq!(tokenizer.bos_id(), None);
    assert_eq!(tokenizer.vocab_size(), 128);
    assert!(matches!(
        load("{}").unwrap().eos_id(),
        Err(TokenizerError::NoEos { .. })
    ));
    let unknown = load(r#"{"eos_token": "<end>"}"#).unwrap_err();
    assert!(
        unknown
            .to_string()
            .contains("eos_token is `<end>`, which the vocabulary does not have")
    );
    assert!(matches!(
        load(r#"{"eos_token": 3}"#),
        Err(TokenizerError::Malformed { .. })
    ));
    let texts = ["the den", "", "who is in?"];
    let batch = tokenizer.encode_batch(&texts).unwrap();
    for (ids, text) in batch.iter().zip(texts) {
        assert_eq!(ids, &tokenizer.encode(text).unwrap());
        assert_eq!(tokenizer.decode(ids, true).unwrap(), text);
    }

    let scratch = Scratch::new();
    scratch.write("tokenizer.json", &file);
    scratch.write("generation_config.json", r#"{"eos_token_id": [3, 2]}"#);
    let folder = Tokenizer::from_folder(scratch.0.path()).unwrap();
    assert_eq!(folder.eos_ids(), [3, 2]);
    assert_eq!(folder.eos_text().unwrap(), "<unk>");
}

#[test]
fn a_hostile_tokenizer_file_is_an_error() {
    for text in [
        "",
        "{}",
        "[]",
        "null",
        r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}"#,
        r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}, "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
    ] {
        let error = Tokenizer::from_json("hostile", text, "{}").unwrap_err();
        assert!(
            matches!(error, TokenizerError::Malformed { .. }),
            "{text}: {error}"
        );
    }
    assert!(matches!(
        Tokenizer::from_folder(Path::new("/nowhere")),
        Err(TokenizerError::Io { .. })
    ));
}

fn render(template: &ChatTemplate, text: &str) -> Result<String, ChatError> {
    let message: Message = json!({"role": "user", "content": text})
        .as_object()
        .unwrap()
        .clone();
    template.render(&[message], &RenderOptions::default())
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, [].into()).unwrap()
}

#[test]
fn a_bad_template_names_its_line() {
    let error = ChatTemplate::new("a\n{% if %}", [].into()).unwrap_err();
    assert!(
        matches!(error, ChatError::Syntax { line: 2, .. }),
        "{error}"
    );
    let error = render(&template("a\n{{ messages[0].content.nothing() }}"), "x").unwrap_err();
    assert!(
        matches!(error, ChatError::Render { line: 2, .. }),
        "{error}"
    );
    let error = render(&template("{{ raise_exception('only one turn') }}"), "x").unwrap_err();
    assert!(error.to_string().ends_with("only one turn"), "{error}");
    let none = template("x").render(&[], &RenderOptions::default());
    assert!(matches!(none, Err(ChatError::NoMessages)));
}

#[test]
fn a_hostile_template_ends() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(9000) %}{{ 'x' * 90000 }}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{% include 'default' %}",
    ] {
        let error = render(&template(source), "x").unwrap_err();
        assert!(
            matches!(error, ChatError::Render { .. }),
            "{source}: {error}"
        );
    }
}

#[test]
fn a_message_s_text_is_never_run_as_a_template() {
    let text = "{{ 1 + 1 }}{% for %}<b>&";
    assert_eq!(
        render(&template("{{ messages[0].content }}"), text).unwrap(),
        text
    );
}

#[test]
fn values_print_as_python_prints_them() {
    let source = "{{ true }} {{ none }} {{ 1.0 }} {{ 1e-7 }} {{ 1e16 }} {{ [1, 'a', \"it's\"] }} {{ {'k': none} }}|{{ nothing }}|{{ {'a': [1, {}]} | tojson(indent=1) }}|{{ [1, 2] | tojson(separators=[',', ':']) }}";
    assert_eq!(
        render(&template(source), "x").unwrap(),
        "True None 1.0 1e-07 1e+16 [1, 'a', \"it's\"] {'k': None}||{\n \"a\": [\n  1,\n  {}\n ]\n}|[1,2]"
    );
}
