//! What the tests of the program share: tiny recipes and models, and running it as a process.

#![allow(
    dead_code,
    reason = "each test file is a crate of its own and uses a part of this"
)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value};

/// Both stages in seconds: 24 steps of fine-tuning and 20 of preferences, saved every 5.
pub(crate) const TINY: &str = r#"
name = "tiny"
seed = 3

[model]
hidden_size = 16
intermediate_size = 32
layers = 2
heads = 2
kv_heads = 2

[task]
sft_examples = 96
train_pairs = 40
eval_pairs = 12
eval_prompts = 8
max_new_tokens = 12

[sft]
batch_size = 2
accumulation = 2

[preference]
epochs = 2.0
batch_size = 4
eval_every = 8

[preference.optimizer]
learning_rate = 1e-3
warmup_steps = 3

[checkpoints]
every = 5
keep = 2
"#;

/// The program under test.
pub(crate) fn r2q() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_r2q"));
    command.stdin(Stdio::null());
    // A test that wants the cache of reference logps names a folder for it.
    command.env("R2Q_CACHE_DIR", "");
    command
}

/// `r2q train --recipe RECIPE --out OUT`.
pub(crate) fn train(recipe: &Path, out: &Path) -> Command {
    let mut command = r2q();
    command.arg("train");
    command.arg("--recipe").arg(recipe);
    command.arg("--out").arg(out);
    command
}

/// `r2q train --model MODEL --data DATA --out OUT`.
pub(crate) fn train_on(model: &Path, data: &Path, out: &Path) -> Command {
    let mut command = r2q();
    command.arg("train");
    command.arg("--model").arg(model);
    command.arg("--data").arg(data);
    command.arg("--out").arg(out);
    command.args(["--max-steps", "3"]);
    command
}

/// Runs a command that must end well; returns what it said.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    let said = stderr(&output);
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// Runs a command that must fail as the house promises: exit code 1, one line that begins with
/// `error: `, no panic. Returns that line.
pub(crate) fn fail(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    let errors: Vec<&str> = said.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    assert_eq!(
        said.lines().last(),
        Some(errors[0]),
        "one line, and the last"
    );
    // The cause of an error is easily printed twice.
    assert!(said.matches("os error").count() <= 1, "{said}");
    errors[0].to_string()
}

/// What a process said.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes a file into a folder; returns its path.
pub(crate) fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).expect("a temporary folder can be written");
    path
}

/// A path under `testdata/`.
pub(crate) fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata")
        .join(name)
}

/// A Hugging Face folder: a tiny model of `testdata/lm` with the tokenizer of `testdata/trl`.
pub(crate) fn model_folder(inside: &Path, name: &str) -> PathBuf {
    let folder = inside.join(name);
    copy(&testdata("lm").join(name), &folder);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(testdata("trl").join(file), folder.join(file)).unwrap();
    }
    folder
}

/// Copies a folder and all in it.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// Every file under a folder with its content, by its path inside the folder.
pub(crate) fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn collect(root: &Path, folder: &Path, into: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(root, &path, into);
            } else {
                let name = path.strip_prefix(root).unwrap().to_path_buf();
                into.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    collect(folder, folder, &mut found);
    found
}

/// The names in a folder, sorted; none if there is no folder.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The first temporary file or folder under a folder, if there is one.
pub(crate) fn temporary(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let name = path.file_name().unwrap_or(OsStr::new("")).to_string_lossy();
        if name.starts_with(".tmp-") {
            return Some(path);
        }
        if let Some(found) = temporary(&path) {
            return Some(found);
        }
    }
    None
}

/// The lines of a run's `metrics.jsonl`, as far as they are whole.
pub(crate) fn metrics(run: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// A run's `summary.json`.
pub(crate) fn summary(run: &Path) -> Map<String, Value> {
    let text = std::fs::read_to_string(run.join("summary.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}
