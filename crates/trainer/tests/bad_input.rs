//! Bad input gets one clear line, no panic, and nothing is overwritten or left behind.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    TINY, contents, fail, metrics, model_folder, names, r2q, succeed, temporary, testdata, train,
    train_on, write,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use trainer::checkpoint::verify_files;

/// A good model and good pairs, for a test to spoil; there is no run yet.
struct Input {
    folder: TempDir,
    model: PathBuf,
    data: PathBuf,
    out: PathBuf,
}

impl Input {
    fn new(model: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pairs = std::fs::read_to_string(testdata("trl/pairs.jsonl")).unwrap();
        Self {
            model: model_folder(folder.path(), model),
            data: write(folder.path(), "pairs.jsonl", pairs),
            out: folder.path().join("run"),
            folder,
        }
    }

    /// Three rows, of which the second is `row`.
    fn with_row(row: &str) -> Self {
        let input = Self::new("qwen2");
        let good = r#"{"prompt": "8 and 9 is", "chosen": " 17", "rejected": " 19"}"#;
        std::fs::write(&input.data, format!("{good}\n{row}\n{good}\n")).unwrap();
        input
    }

    fn command(&self) -> Command {
        train_on(&self.model, &self.data, &self.out)
    }

    /// The one line that the program says about this input, which must hold `parts`; asserts that
    /// nothing is made and nothing changed.
    fn refused(&self, parts: &[&str]) {
        self.refused_by(&mut self.command(), parts);
    }

    fn refused_by(&self, command: &mut Command, parts: &[&str]) {
        let before = contents(self.folder.path());
        let error = fail(command);
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        assert!(!self.out.exists(), "{error}");
        assert!(contents(self.folder.path()) == before, "{error}");
    }

    /// Changes the value of a JSON file of the model.
    fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let path = self.model.join(file);
        let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    }

    /// Changes the bytes of a file of the model.
    fn edit_bytes(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.model.join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }

    /// Puts one value in every place of a tensor, which is stored as bf16.
    fn fill(&self, tensor: &str, value: f32) {
        self.edit_bytes("model.safetensors", |bytes| {
            let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
            assert_eq!(header[tensor]["dtype"], "BF16");
            let ends = &header[tensor]["data_offsets"];
            let [from, to] = [0, 1].map(|end| start + ends[end].as_u64().unwrap() as usize);
            let [_, _, low, high] = value.to_le_bytes();
            for place in bytes[from..to].chunks_exact_mut(2) {
                place.copy_from_slice(&[low, high]);
            }
        });
    }

    /// Puts another header before the bytes of the weights.
    fn edit_header(&self, change: impl FnOnce(&mut Value)) {
        self.edit_bytes("model.safetensors", |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
            change(&mut header);
            let header = header.to_string();
            let rest = bytes.split_off(8 + length);
            *bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(rest);
        });
    }
}

#[test]
fn the_good_input_of_these_tests_is_good() {
    let input = Input::new("qwen2");
    succeed(&mut input.command());
    assert!(input.out.join("model/model.safetensors").is_file());
}

// Files.

#[test]
fn missing_files_are_named() {
    let input = Input::new("qwen2");
    std::fs::remove_file(&input.data).unwrap();
    input.refused(&["pairs.jsonl: No such file"]);

    let input = Input::new("qwen2");
    let mut command = input.command();
    command.arg("--eval-data").arg("nowhere.parquet");
    input.refused_by(&mut command, &["nowhere.parquet: No such file"]);

    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let input = Input::new("qwen2");
        std::fs::remove_file(input.model.join(file)).unwrap();
        input.refused(&[file, "No such file"]);
    }

    let input = Input::new("qwen2");
    let missing = input.folder.path().join("nowhere.toml");
    input.refused_by(
        &mut train(&missing, &input.out),
        &["nowhere.toml: No such file"],
    );
    let missing = input.folder.path().join("no-model");
    input.refused_by(
        &mut train_on(&missing, &input.data, &input.out),
        &["no-model/config.json: No such file"],
    );
}

#[test]
fn a_shard_that_is_missing_is_named() {
    let input = Input::new("llama_untied");
    std::fs::remove_file(input.model.join("model-00002-of-00003.safetensors")).unwrap();
    input.refused(&["model-00002-of-00003.safetensors: No such file"]);
}

#[test]
fn a_file_where_the_run_should_be_stays_as_it_is() {
    let input = Input::new("qwen2");
    let out = write(input.folder.path(), "taken", "precious");
    let before = contents(input.folder.path());
    let error = fail(&mut train_on(&input.model, &input.data, &out));
    assert!(error.contains("taken: Not a directory"), "{error}");
    assert!(contents(input.folder.path()) == before);
}

// Rows.

#[test]
fn bad_json_is_named_by_line() {
    Input::with_row(r#"{"prompt": "8 and", "chosen": "#).refused(&[
        "pairs.jsonl line 2",
        "bad JSON",
        "column",
    ]);
    Input::with_row(r#"["a list"]"#).refused(&["pairs.jsonl line 2", "expected an object", "list"]);
}

#[test]
fn a_missing_column_is_named() {
    Input::with_row(r#"{"prompt": "8 and", "chosen": " 9"}"#).refused(&[
        "pairs.jsonl line 2",
        "column `rejected` is missing",
        "`prompt`",
        "`chosen`",
    ]);
}

#[test]
fn a_wrong_type_is_named_with_what_was_expected() {
    Input::with_row(r#"{"prompt": "8 and", "chosen": 9, "rejected": " 8"}"#).refused(&[
        "pairs.jsonl line 2",
        "column `chosen`",
        "expected a string",
        "got a number",
    ]);
}

#[test]
fn an_empty_completion_is_named() {
    Input::with_row(r#"{"prompt": "8 and", "chosen": "", "rejected": " 8"}"#).refused(&[
        "pairs.jsonl line 2",
        "column `chosen`",
        "expected a completion, got an empty one",
    ]);
}

#[test]
fn prompts_longer_than_the_window_are_dropped_and_counted_and_an_error_when_none_is_left() {
    // The models' window is 128 tokens, and these letters do not merge.
    let long = json!({"prompt": "x y ".repeat(128), "chosen": " 9", "rejected": " 8"});
    let input = Input::with_row(&long.to_string());
    let said = succeed(&mut input.command());
    let dropped = said.lines().find(|line| line.starts_with("dropped: "));
    let dropped = dropped.unwrap_or_else(|| panic!("{said}"));
    assert!(dropped.ends_with(" 1"), "{dropped}");

    let input = Input::new("qwen2");
    std::fs::write(&input.data, format!("{long}\n{long}\n")).unwrap();
    input.refused(&["pairs.jsonl: all 2 rows were dropped: 2 (", "prompt"]);
}

#[test]
fn a_completion_longer_than_the_window_is_cut_and_counted() {
    let long = json!({"prompt": "8 and", "chosen": "x y ".repeat(128), "rejected": " 8"});
    let said = succeed(&mut Input::with_row(&long.to_string()).command());
    assert!(
        said.contains("chosen completions cut at max_length"),
        "{said}"
    );
}

#[test]
fn a_file_without_rows_is_named() {
    for content in ["", "\n\n", "[]"] {
        let input = Input::new("qwen2");
        std::fs::write(&input.data, content).unwrap();
        input.refused(&["pairs.jsonl", "row"]);
    }
}

#[test]
fn a_damaged_parquet_file_is_named() {
    let input = Input::new("qwen2");
    std::fs::write(&input.data, b"PAR1 and then nothing of the kind PAR1").unwrap();
    input.refused(&["pairs.jsonl", "Parquet"]);
}

#[test]
fn a_token_id_outside_the_vocabulary_is_named() {
    let row = r#"{"prompt": "8 and", "chosen": " 9<new>", "rejected": " 8"}"#;
    let input = Input::with_row(row);
    input.edit("tokenizer.json", |tokenizer| {
        tokenizer["added_tokens"]
            .as_array_mut()
            .unwrap()
            .push(json!({
                "id": 128, "content": "<new>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": false,
            }));
    });
    input.refused(&[
        "pairs.jsonl line 2",
        "column `chosen`",
        "token id 128",
        "vocabulary of 128",
    ]);
}

// Models.

#[test]
fn a_truncated_weights_file_is_named() {
    let whole = Input::new("qwen2");
    let length = std::fs::read(whole.model.join("model.safetensors"))
        .unwrap()
        .len();
    // In the length, in the header, in the values, and one byte short.
    for kept in [0, 5, 100, length / 2, length - 1] {
        let input = Input::new("qwen2");
        input.edit_bytes("model.safetensors", |bytes| bytes.truncate(kept));
        input.refused(&["model.safetensors: "]);
    }
    let input = Input::new("qwen2");
    input.edit_bytes("model.safetensors", |bytes| bytes.push(0));
    input.refused(&["model.safetensors: ", "overlong"]);
}

#[test]
fn a_header_that_lies_about_its_own_length_is_refused() {
    for claimed in [u64::MAX, 99_999_999] {
        let input = Input::new("qwen2");
        input.edit_bytes("model.safetensors", |bytes| {
            bytes[..8].copy_from_slice(&claimed.to_le_bytes());
        });
        input.refused(&["model.safetensors: the header claims", &claimed.to_string()]);
    }
}

#[test]
fn a_header_that_lies_about_its_tensors_is_refused() {
    type Lie<'a> = &'a dyn Fn(&mut Value);
    let lies: [(&str, Lie<'_>); 7] = [
        ("offsets far outside", &|norm| {
            norm["data_offsets"] = json!([0, 1_u64 << 60])
        }),
        ("offsets of another tensor", &|norm| {
            norm["data_offsets"] = json!([0, 64])
        }),
        ("offsets backwards", &|norm| {
            norm["data_offsets"] = json!([64, 0])
        }),
        ("a shape too large", &|norm| {
            norm["shape"] = json!([1_u64 << 40])
        }),
        ("a shape that overflows", &|norm| {
            norm["shape"] = json!([u64::MAX, u64::MAX])
        }),
        ("another type", &|norm| norm["dtype"] = json!("F64")),
        ("an unknown type", &|norm| norm["dtype"] = json!("Q7")),
    ];
    for (name, lie) in lies {
        println!("{name}");
        let input = Input::new("qwen2");
        input.edit_header(|header| lie(&mut header["model.norm.weight"]));
        input.refused(&["model.safetensors: the safetensors header is damaged"]);
    }
    let input = Input::new("qwen2");
    input.edit_bytes("model.safetensors", |bytes| bytes[8] = b'?');
    input.refused(&["model.safetensors: the safetensors header is damaged"]);
}

#[test]
fn weights_of_another_shape_or_name_than_the_configuration_are_refused() {
    let input = Input::new("qwen2");
    input.edit("config.json", |config| {
        config["intermediate_size"] = json!(57)
    });
    input.refused(&[
        "model.safetensors: tensor `model.layers.0.mlp",
        "expected [57, 32]",
    ]);

    let input = Input::new("qwen2");
    input.edit_header(|header| {
        let map = header.as_object_mut().unwrap();
        let norm = map.remove("model.norm.weight").unwrap();
        map.insert("model.norm.height".into(), norm);
    });
    input.refused(&["model.safetensors: tensor `model.norm.weight` is missing"]);
}

#[test]
fn a_shard_index_that_points_outside_its_folder_is_refused() {
    for file in ["../secret.safetensors", "/etc/passwd", "a/../../b", "."] {
        let input = Input::new("llama_untied");
        input.edit("model.safetensors.index.json", |index| {
            index["weight_map"]["model.norm.weight"] = json!(file);
        });
        input.refused(&[
            "model.safetensors.index.json: tensor `model.norm.weight`",
            &format!("`{file}`"),
            "outside the folder",
        ]);
    }
    let input = Input::new("llama_untied");
    input.edit("model.safetensors.index.json", |index| {
        index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00003.safetensors");
    });
    input.refused(&["model.safetensors.index.json: tensor `model.norm.weight` is not in"]);
}

#[test]
fn an_unknown_architecture_is_named_with_the_known_ones() {
    let input = Input::new("qwen2");
    input.edit("config.json", |config| {
        config["model_type"] = json!("mamba")
    });
    input.refused(&[
        "config.json: field `model_type`",
        "`mamba`",
        "llama",
        "gpt2",
    ]);
}

#[test]
fn an_unsupported_rope_scaling_is_named() {
    let input = Input::new("llama_untied");
    input.edit("config.json", |config| {
        config["rope_parameters"] = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4});
    });
    input.refused(&[
        "config.json: field `rope_parameters",
        "`yarn` is not supported",
    ]);
}

#[test]
fn broken_json_of_a_model_is_named_by_line() {
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let input = Input::new("qwen2");
        input.edit_bytes(file, |bytes| bytes.truncate(bytes.len() / 2));
        input.refused(&[file, "line"]);
    }
}

// Recipes and flags.

#[test]
fn an_unknown_recipe_key_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let text = TINY.replace("accumulation = 2", "acumulation = 2");
    let line = text
        .lines()
        .position(|line| line.starts_with("acum"))
        .unwrap()
        + 1;
    let recipe = write(folder.path(), "bad.toml", &text);
    let out = folder.path().join("run");
    let output = train(&recipe, &out).output().unwrap();
    let said = common::stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    // The place is shown, so this error may take some lines; the first says where.
    assert!(said.starts_with("error: "), "{said}");
    let first = said.lines().next().unwrap();
    assert!(
        first.contains("bad.toml") && first.contains(&format!("line {line}")),
        "{said}"
    );
    assert!(said.contains("unknown field `acumulation`"), "{said}");
    assert!(
        said.contains("`accumulation`"),
        "it says what would be known: {said}"
    );
    assert!(!said.contains("panicked"), "{said}");
    assert!(!out.exists());
}

#[test]
fn a_recipe_value_out_of_its_range_is_named() {
    for (old, new, parts) in [
        (
            "batch_size = 4",
            "batch_size = 0",
            ["preference.batch_size", "at least 1", "got 0"],
        ),
        (
            "epochs = 2.0",
            "epochs = -1.0",
            ["preference.epochs", "above 0", "got -1"],
        ),
        (
            "name = \"tiny\"",
            "name = \"../x\"",
            ["`name`", "letters", "`../x`"],
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let recipe = write(folder.path(), "bad.toml", TINY.replacen(old, new, 1));
        let out = folder.path().join("run");
        let error = fail(&mut train(&recipe, &out));
        for part in parts.iter().chain(&["bad.toml"]) {
            assert!(error.contains(part), "{error}");
        }
        assert!(!out.exists());
    }
}

#[test]
fn what_the_embedded_task_cannot_do_with_a_model_is_refused_before_training() {
    let other = Input::new("qwen2");
    let path = format!("[model]\npath = {:?}\n", other.model.to_str().unwrap());
    let end = TINY.find("[model]").unwrap();
    let rest = TINY[end..].find("\n[").unwrap() + end + 1;
    let elsewhere = format!("{}{path}{}", &TINY[..end], &TINY[rest..]);
    for (text, parts) in [
        (
            elsewhere,
            ["qwen2: expected the memo task's tokenizer", "token id"],
        ),
        (
            TINY.replacen("max_new_tokens = 12", "max_new_tokens = 300", 1),
            ["key `task.max_new_tokens`", "the model's 256"],
        ),
        (
            TINY.replacen("train_pairs = 40", "train_pairs = 9223372036854775807", 1),
            ["key `task.train_pairs`", "from 1 to 10000000"],
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        assert_ne!(text, TINY);
        let recipe = write(folder.path(), "bad.toml", text);
        let out = folder.path().join("run");
        let error = fail(&mut train(&recipe, &out));
        for part in parts {
            assert!(error.contains(part), "{error}");
        }
        assert!(!out.exists());
    }
}

#[test]
fn sizes_of_a_fresh_model_that_do_not_fit_are_refused() {
    for (old, new, key) in [
        ("heads = 2", "heads = 3", "model.heads"),
        ("heads = 2", "heads = 0", "model.heads"),
        ("layers = 2", "layers = 0", "model.layers"),
        ("hidden_size = 16", "hidden_size = 0", "model.hidden_size"),
        ("hidden_size = 16", "hidden_size = 2", "model.heads"),
        ("hidden_size = 16", "hidden_size = 100000000", "model"),
        ("kv_heads = 2", "kv_heads = 0", "model.kv_heads"),
        ("kv_heads = 2", "kv_heads = 4", "model.kv_heads"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let text = TINY.replacen(&format!("\n{old}"), &format!("\n{new}"), 1);
        assert_ne!(text, TINY);
        let recipe = write(folder.path(), "bad.toml", text);
        let out = folder.path().join("run");
        let error = fail(&mut train(&recipe, &out));
        let place = format!("bad.toml: key `{key}`: expected");
        assert!(error.contains(&place), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let input = Input::new("qwen2");
    let mut command = input.command();
    command.args(["--device", "abacus"]);
    input.refused_by(&mut command, &["device `abacus`", "expected `cpu`"]);
}

// Numbers.

#[test]
fn weights_that_are_not_numbers_are_refused_by_their_tensor() {
    for (bad, shown) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        let input = Input::new("qwen2");
        input.fill("model.norm.weight", bad);
        input.refused(&[&format!(
            "model.safetensors: tensor `model.norm.weight` holds {shown} as value 0, \
             expected finite numbers"
        )]);
    }
}

#[test]
fn a_prompt_that_does_not_fit_is_named_before_any_is_sampled() {
    let input = Input::new("qwen2");
    let mut prompts = "{\"prompt\": \"8 and 9 is\"}\n".repeat(70);
    prompts += &format!("{{\"prompt\": \"{}\"}}\n", "8 and ".repeat(2000));
    let prompts = write(input.folder.path(), "prompts.jsonl", prompts);
    let mut command = r2q();
    command.args(["sample", "--max-new-tokens", "4", "--n", "2"]);
    command.arg("--policy").arg(&input.model);
    command.arg("--prompts").arg(&prompts);
    command.arg("--out").arg(&input.out);
    input.refused_by(&mut command, &["prompt 70 has", "with 4 new ones"]);
}

/// A model of finite weights whose logits are none.
fn overflowing() -> Input {
    let input = Input::new("qwen2");
    input.fill("model.norm.weight", f32::MAX);
    input
}

#[test]
fn a_model_whose_logps_are_not_numbers_is_refused_by_row() {
    let input = overflowing();
    let error = fail(&mut input.command());
    for part in [
        "reference logps, train",
        "finite logp",
        "NaN",
        "rows of the data, from 0: 0",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(names(&input.out), ["inputs.sha256", "recipe.toml"]);
}

#[test]
fn nothing_is_sampled_from_logits_that_are_not_numbers() {
    let input = overflowing();
    let prompts = write(
        input.folder.path(),
        "prompts.jsonl",
        "{\"prompt\": \"8 and 9 is\"}\n",
    );
    for flags in [&[][..], &["--top-k", "3"]] {
        let mut command = r2q();
        command
            .args(["sample", "--max-new-tokens", "4"])
            .args(flags);
        command.arg("--policy").arg(&input.model);
        command.arg("--prompts").arg(&prompts);
        command.arg("--out").arg(&input.out);
        input.refused_by(
            &mut command,
            &["qwen2", "the logits after 0 new tokens are not all numbers"],
        );
    }
}

#[test]
fn a_loss_that_is_not_a_number_stops_the_run_and_leaves_whole_checkpoints() {
    for stage in ["sft", "preference"] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        // The first update with a learning rate above 0 throws the weights out of all bounds.
        let text = TINY.replace("every = 5", "every = 1");
        let text = match stage {
            "sft" => text + "\n[sft.optimizer]\nlearning_rate = 1e30\nwarmup_steps = 2\n",
            _ => text.replace("learning_rate = 1e-3", "learning_rate = 1e30"),
        };
        let recipe = write(folder.path(), "wild.toml", text);
        let error = fail(&mut train(&recipe, &out));
        assert!(
            error.starts_with(&format!("error: {stage} step ")),
            "{error}"
        );
        for part in ["expected a finite ", "got ", "; rows of the data, from 0: "] {
            assert!(error.contains(part), "{error}");
        }
        let step: usize = error
            .split_whitespace()
            .nth(3)
            .unwrap()
            .trim_end_matches(':')
            .parse()
            .unwrap();
        assert!(step > 1, "{error}");
        let rows = error.split("from 0: ").nth(1).unwrap().split(", ").count();
        assert_eq!(rows, 4, "{error}");
        // The steps before are in the log, and the checkpoint of the last good one is whole.
        let last = metrics(&out)
            .iter()
            .filter(|line| line["stage"] == stage)
            .count();
        assert!(last > 0);
        verify_files(&out.join(format!("checkpoints/{stage}-{:06}", step - 1))).unwrap();
        assert!(!out.join("model").exists());
        assert_eq!(temporary(&out), None);
    }
}

// Disks.

/// A command under a limit on the size of files, which fails writes as a full disk does.
#[cfg(unix)]
fn limited(command: &Command, blocks: usize) -> Command {
    let mut limited = Command::new("sh");
    // Ignored, the signal becomes an error of `write`. `ulimit` counts blocks of 512 bytes.
    limited.args([
        "-c",
        &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""),
    ]);
    limited.arg(command.get_program()).args(command.get_args());
    limited
}

#[test]
#[cfg(unix)]
fn a_full_disk_is_an_error_that_leaves_only_whole_files_and_can_be_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", TINY);
    let unbroken = folder.path().join("unbroken");
    succeed(&mut train(&recipe, &unbroken));
    let size = |name: &str| std::fs::metadata(unbroken.join(name)).unwrap().len() as usize;
    let optimizer = size("checkpoints/sft-000020/optimizer.safetensors");
    let (model, log) = (size("model/model.safetensors"), size("metrics.jsonl"));
    assert!(model < optimizer);
    for (limit, every, part) in [
        // A log that cannot grow, and a checkpoint that cannot be finished.
        (log / 8, "every = 0", "metrics.jsonl: "),
        (optimizer - 1024, "every = 5", "checkpoints/sft-000005: "),
    ] {
        let recipe = write(folder.path(), "tiny.toml", TINY.replace("every = 5", every));
        let out = folder.path().join(format!("run-{limit}"));
        let error = fail(&mut limited(&train(&recipe, &out), limit / 512));
        assert!(error.contains(part), "{error}");
        assert!(error.contains("File too large"), "{error}");
        assert_eq!(temporary(&out), None);
        assert!(names(&out.join("checkpoints")).is_empty());
        // With room again, the run goes on and ends as it would have.
        succeed(train(&recipe, &out).arg("--resume"));
        let weights = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
        assert!(weights(&out) == weights(&unbroken));
    }
}
