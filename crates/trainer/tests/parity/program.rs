//! The program on the device: what it writes, and what it says where it cannot go on.

use std::path::Path;

use serde_json::{Value, json};
use trainer::checkpoint::verify_files;

use super::common::{fail, model_folder, names, r2q, succeed, testdata, train, write};
use super::{LOGP_TOLERANCE, assert_close};

/// The name of the device under test.
fn device() -> String {
    let default = if cfg!(feature = "wgpu") {
        "wgpu"
    } else {
        "cuda"
    };
    std::env::var("R2Q_DEVICE").unwrap_or_else(|_| default.into())
}

/// All numbers of a JSON value, in the order in which they stand.
fn all_numbers(value: &Value, into: &mut Vec<f32>) {
    match value {
        Value::Number(number) => into.push(number.as_f64().unwrap() as f32),
        Value::Array(values) => values.iter().for_each(|value| all_numbers(value, into)),
        Value::Object(fields) => fields.values().for_each(|value| all_numbers(value, into)),
        _ => {}
    }
}

#[test]
fn scores_of_a_file_agree() {
    let folder = tempfile::tempdir().unwrap();
    let policy = model_folder(folder.path(), "llama_untied");
    let reference = model_folder(folder.path(), "llama_tied");
    let scores = |device: &str| {
        let out = folder.path().join(device.replace(':', ""));
        let mut command = r2q();
        command.arg("score").arg("--policy").arg(&policy);
        command.arg("--reference").arg(&reference);
        command.arg("--data").arg(testdata("trl/pairs.jsonl"));
        command.arg("--out").arg(&out).args(["--device", device]);
        succeed(&mut command);
        let text = std::fs::read_to_string(out.join("scores.jsonl")).unwrap();
        let mut numbers = Vec::new();
        for line in text.lines() {
            all_numbers(&serde_json::from_str(line).unwrap(), &mut numbers);
        }
        numbers
    };
    let (cpu, device) = (scores("cpu"), scores(&device()));
    assert!(cpu.len() > 1000, "{} numbers", cpu.len());
    assert_close(&cpu, &device, LOGP_TOLERANCE, "scores");
}

/// Four short pairs and four whose prompts are so long that one fits where four together do not:
/// their scores of attention then take 200 MB in one piece, more than a buffer of lavapipe holds.
fn long_and_short(folder: &Path) -> std::path::PathBuf {
    let rows = (0..8).map(|row| {
        let prompt = "b d ".repeat(if row < 4 { 3 } else { 850 });
        json!({ "prompt": prompt, "chosen": "b b d", "rejected": " b d end" }).to_string()
    });
    write(
        folder,
        "pairs.jsonl",
        rows.collect::<Vec<String>>().join("\n"),
    )
}

/// Only a driver whose buffers are small can be filled so fast, as that of Mesa that computes on the CPU.
#[cfg(feature = "wgpu")]
#[test]
fn a_device_without_memory_ends_the_run_by_name_and_leaves_the_checkpoint_whole() {
    if device() != "wgpu" || !line_of_the_device().contains("llvmpipe") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = model_folder(folder.path(), "llama_untied");
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let window = "\"max_position_embeddings\": 128";
    assert!(config.contains(window));
    let config = config.replace(window, "\"max_position_embeddings\": 4096");
    write(&model, "config.json", config);
    let data = long_and_short(folder.path());
    let recipe = format!(
        r#"
name = "long"
seed = 3

[model]
path = "{}"

[data]
train = "{}"
max_length = 4096

[preference]
batch_size = 4
eval_batch_size = 1
group_by_length = true

[checkpoints]
every = 1
"#,
        model.display(),
        data.display()
    );
    let recipe = write(folder.path(), "long.toml", recipe);
    let out = folder.path().join("run");
    let said = fail(train(&recipe, &out).args(["--device", "wgpu"]));
    for part in [
        "preference step 2, batches of 4 pairs",
        "no memory",
        "`preference.batch_size`",
    ] {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    let (_, rows) = said
        .trim_end()
        .split_once("rows of the data, from 0: ")
        .unwrap();
    let rows = rows.lines().next().unwrap().split(", ");
    let mut rows: Vec<usize> = rows.map(|row| row.parse().unwrap()).collect();
    rows.sort_unstable();
    assert_eq!(rows, [4, 5, 6, 7], "{said}");
    let checkpoints = out.join("checkpoints");
    assert_eq!(names(&checkpoints), ["preference-000001"]);
    verify_files(&checkpoints.join("preference-000001")).unwrap();
}

#[cfg(feature = "wgpu")]
#[test]
fn a_machine_without_a_driver_is_told_what_to_install() {
    let mut command = r2q();
    command.env("VK_DRIVER_FILES", "/no/such/driver.json");
    // Nor one for OpenGL, which wgpu would take instead.
    command.env("__EGL_VENDOR_LIBRARY_FILENAMES", "/no/such/vendor.json");
    command.args(["devices", "--device", "wgpu"]);
    if cfg!(target_os = "linux") {
        let said = fail(&mut command);
        assert!(
            said.contains("apt-get install mesa-vulkan-drivers"),
            "{said}"
        );
        assert!(said.contains("/no/such/driver.json"), "{said}");
    }
}

#[test]
fn the_list_of_devices_has_the_one_under_test() {
    let line = line_of_the_device();
    assert!(!line.contains("not usable"), "{line}");
}

/// What `r2q devices` says of the device under test, behind a line for the CPU.
fn line_of_the_device() -> String {
    let output = r2q().arg("devices").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("cpu "), "{said}");
    let name = match device() {
        name if name == "cuda" => "cuda:0".into(),
        name => name,
    };
    let line = said.lines().find(|line| line.starts_with(&name));
    line.unwrap().into()
}
