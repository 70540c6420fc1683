//! A run that is killed and resumed ends as one that was left alone, and damage is told by name.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{
    TINY, contents, copy, fail, metrics, names, succeed, summary, temporary, train, write,
};
use serde_json::Value;
use tempfile::TempDir;

/// Longest wait for a moment of a run, for a machine under load.
const PATIENCE: Duration = Duration::from_secs(120);

/// Tries to kill a run in a moment of milliseconds before the test gives up.
const TRIES: usize = 20;

/// Values of `summary.json` that tell of the machine and not of the run.
const OF_THE_MACHINE: [&str; 4] = [
    "pairs_per_second",
    "preference_seconds",
    "wall_seconds",
    "peak_rss_bytes",
];

/// A finished run that nothing broke off, made once for all tests of this file.
fn unbroken() -> &'static Path {
    static RUN: OnceLock<PathBuf> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resume");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let recipe = write(&folder, "tiny.toml", TINY);
        let out = folder.join("unbroken");
        succeed(&mut train(&recipe, &out));
        out
    })
}

/// A folder with the recipe, and a place for a run in it.
fn place() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "tiny.toml", TINY);
    let out = folder.path().join("run");
    (folder, recipe, out)
}

/// A run whose process died after training, before the judgement: all but the last files.
fn nearly_finished() -> (TempDir, PathBuf, PathBuf) {
    let (folder, recipe, out) = place();
    copy(unbroken(), &out);
    for name in ["summary.json", "report.html"] {
        std::fs::remove_file(out.join(name)).unwrap();
    }
    std::fs::remove_dir_all(out.join("model")).unwrap();
    (folder, recipe, out)
}

/// Asserts that two runs have the same metrics, weights, samples and summary.
fn assert_same(run: &Path) {
    let expected = unbroken();
    let lines = |run: &Path| -> Vec<_> {
        let mut lines = metrics(run);
        for line in &mut lines {
            line.retain(|key, _| !key.ends_with("_per_second"));
        }
        lines
    };
    let (ours, theirs) = (lines(run), lines(expected));
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    for name in [
        "recipe.toml",
        "inputs.sha256",
        "sft/model.safetensors",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "reference_logps.train.safetensors",
        "reference_logps.eval.safetensors",
    ] {
        let read = |run: &Path| std::fs::read(run.join(name)).unwrap();
        assert!(read(run) == read(expected), "{name} differs");
    }
    let plain = |run: &Path| {
        let mut summary = summary(run);
        summary.retain(|key, _| !OF_THE_MACHINE.contains(&key.as_str()));
        summary
    };
    assert_eq!(plain(run), plain(expected));
    assert!(run.join("report.html").is_file());
    assert_eq!(
        names(&run.join("checkpoints")),
        names(&expected.join("checkpoints"))
    );
    assert_eq!(temporary(run), None, "nothing half-written stays behind");
}

/// Waits for a moment of a run, or for its end.
fn wait_for(child: &mut Child, moment: impl Fn() -> bool) {
    let began = Instant::now();
    while !moment() && child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < PATIENCE, "the moment never came");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Ends a process by SIGKILL.
fn kill(child: &mut Child) {
    child.kill().unwrap();
}

/// Starts a run in a fresh folder and ends it when `moment` has come to the folder of the run.
///
/// Moments are short and the signal takes its time, so runs are tried until one was in time:
/// `in_time` still holds for the folder when the process is gone.
fn ended_at(
    end: impl Fn(&mut Child),
    moment: impl Fn(&Path) -> bool,
    in_time: impl Fn(&Path) -> bool,
) -> (TempDir, PathBuf, PathBuf) {
    for _ in 0..TRIES {
        let (folder, recipe, out) = place();
        let mut child = train(&recipe, &out).stderr(Stdio::null()).spawn().unwrap();
        wait_for(&mut child, || moment(&out));
        end(&mut child);
        let status = child.wait().unwrap();
        if !status.success() && moment(&out) && in_time(&out) {
            return (folder, recipe, out);
        }
    }
    panic!("of {TRIES} runs none was ended in time");
}

/// Whether the log has come to a step of a stage.
fn at_step(out: &Path, stage: &str, step: u64) -> bool {
    metrics(out)
        .iter()
        .any(|line| line["stage"] == stage && line["step"].as_u64().unwrap() >= step)
}

fn resume(recipe: &Path, out: &Path) -> String {
    succeed(train(recipe, out).arg("--resume"))
}

#[test]
fn killed_in_fine_tuning_between_checkpoints() {
    let (_folder, recipe, out) = ended_at(
        kill,
        |out| at_step(out, "sft", 8),
        |out| !out.join("sft").exists() && temporary(out).is_none(),
    );
    let said = resume(&recipe, &out);
    assert!(said.contains("resuming from"), "{said}");
    assert!(said.contains("checkpoints/sft-0000"), "{said}");
    assert_same(&out);
}

#[test]
fn killed_before_the_first_checkpoint() {
    let (_folder, recipe, out) = ended_at(
        kill,
        |out| at_step(out, "sft", 1),
        |out| !out.join("checkpoints/sft-000005").exists(),
    );
    let said = resume(&recipe, &out);
    assert!(!said.contains("resuming from"), "{said}");
    assert_same(&out);
}

#[test]
fn killed_in_the_preference_stage() {
    let (_folder, recipe, out) = ended_at(
        kill,
        |out| at_step(out, "preference", 7),
        |out| !out.join("checkpoints/preference-000020").exists(),
    );
    let said = resume(&recipe, &out);
    assert!(said.contains("checkpoints/preference-0000"), "{said}");
    assert_same(&out);
}

#[test]
fn killed_inside_a_checkpoint_write() {
    let (_folder, recipe, out) = ended_at(
        kill,
        // The second checkpoint, so that there is a whole one to go back to.
        |out| {
            let checkpoints = out.join("checkpoints");
            checkpoints.join("sft-000005").exists() && temporary(&checkpoints).is_some()
        },
        |_| true,
    );
    let said = resume(&recipe, &out);
    assert!(said.contains("resuming from"), "{said}");
    assert_same(&out);
}

#[test]
fn killed_when_the_fine_tuned_model_is_there_and_no_reference_logps() {
    let (_folder, recipe, out) = ended_at(
        kill,
        |out| out.join("sft").exists(),
        |out| !out.join("reference_logps.eval.safetensors").exists(),
    );
    resume(&recipe, &out);
    assert_same(&out);
}

#[test]
fn killed_again_while_resuming() {
    let (_folder, recipe, out) = ended_at(
        kill,
        |out| at_step(out, "sft", 12),
        |out| !out.join("sft").exists(),
    );
    for step in [3, 12] {
        let mut child = train(&recipe, &out)
            .arg("--resume")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for(&mut child, || at_step(&out, "preference", step));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    resume(&recipe, &out);
    assert_same(&out);
}

#[test]
fn killed_after_training_before_the_judgement_is_written() {
    let (_folder, recipe, out) = ended_at(
        kill,
        |out| out.join("model").exists(),
        |out| !out.join("summary.json").exists(),
    );
    resume(&recipe, &out);
    assert_same(&out);
}

#[test]
#[cfg(unix)]
fn asked_to_end_by_a_signal() {
    // What Ctrl-C sends does the same, but may be ignored where tests run in the background.
    let ask = |child: &mut Child| {
        let command = format!("kill -TERM {}", child.id());
        let status = std::process::Command::new("sh")
            .args(["-c", &command])
            .status();
        assert!(status.unwrap().success());
    };
    let (_folder, recipe, out) = ended_at(
        ask,
        |out| at_step(out, "preference", 3),
        |out| !out.join("model").exists(),
    );
    // Nothing under its final name is half-written.
    for folder in names(&out.join("checkpoints")) {
        if !folder.starts_with(".tmp-") {
            trainer::checkpoint::verify_files(&out.join("checkpoints").join(folder)).unwrap();
        }
    }
    trainer::checkpoint::verify_files(&out.join("sft")).unwrap();
    resume(&recipe, &out);
    assert_same(&out);
}

#[test]
fn what_a_killed_process_was_writing_is_not_believed_and_cleared_away() {
    let (_folder, recipe, out) = nearly_finished();
    let half = out.join("checkpoints/.tmp-half/new");
    std::fs::create_dir_all(&half).unwrap();
    write(&half, "model.safetensors", [1, 2, 3]);
    write(&out, ".tmp-summary", "{");
    let log = out.join("metrics.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    // The log ends in the middle of a line, and has lines of steps after the newest checkpoint.
    std::fs::remove_dir_all(out.join("checkpoints/preference-000020")).unwrap();
    std::fs::write(&log, text + "{\"stage\":\"preference\",\"st").unwrap();
    let said = resume(&recipe, &out);
    assert!(said.contains("preference-000015"), "{said}");
    // The second-newest is not made again; the newest two are 15 and 20 as before.
    assert_same(&out);
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used() {
    let flip = |file: PathBuf| {
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
    };
    let cut = |file: PathBuf| {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 7]).unwrap();
    };
    type Damage<'a> = &'a dyn Fn(&Path);
    let damages: [(&str, Damage<'_>); 7] = [
        ("model.safetensors", &|folder| {
            flip(folder.join("model.safetensors"))
        }),
        ("optimizer.safetensors", &|folder| {
            cut(folder.join("optimizer.safetensors"))
        }),
        ("config.json", &|folder| {
            std::fs::remove_file(folder.join("config.json")).unwrap()
        }),
        ("position.json", &|folder| {
            flip(folder.join("position.json"))
        }),
        ("manifest.json", &|folder| cut(folder.join("manifest.json"))),
        ("manifest.json", &|folder| {
            std::fs::remove_file(folder.join("manifest.json")).unwrap()
        }),
        // A manifest that lists nothing vouches for nothing.
        ("manifest.json", &|folder| {
            write(folder, "manifest.json", "{}");
        }),
    ];
    for (file, damage) in damages {
        let (_folder, recipe, out) = nearly_finished();
        let newest = out.join("checkpoints/preference-000020");
        damage(&newest);
        let said = resume(&recipe, &out);
        let warning = said.lines().find(|line| line.starts_with("warning: "));
        let warning = warning.unwrap_or_else(|| panic!("{file}: {said}"));
        for part in ["preference-000020", "damaged", file, "passed over"] {
            assert!(warning.contains(part), "{warning}");
        }
        assert!(said.contains("resuming from"), "{said}");
        assert!(said.contains("preference-000015"), "{said}");
        assert_same(&out);
    }
}

#[test]
fn a_stage_without_a_whole_checkpoint_begins_again() {
    let (_folder, recipe, out) = nearly_finished();
    for step in ["000015", "000020"] {
        write(
            &out.join(format!("checkpoints/preference-{step}")),
            "config.json",
            "{}",
        );
    }
    let said = resume(&recipe, &out);
    assert_eq!(said.matches("warning: checkpoint").count(), 2, "{said}");
    assert!(!said.contains("resuming from"), "{said}");
    assert_same(&out);
}

#[test]
fn a_damaged_fine_tuned_model_is_made_again_with_all_that_hangs_on_it() {
    let (_folder, recipe, out) = nearly_finished();
    let path = out.join("sft/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let said = resume(&recipe, &out);
    assert!(
        said.contains("warning: ") && said.contains("sft: damaged"),
        "{said}"
    );
    assert!(said.contains("sft-000024"), "{said}");
    assert_same(&out);
}

#[test]
fn damaged_reference_logps_are_computed_again() {
    let (_folder, recipe, out) = nearly_finished();
    for checkpoint in ["preference-000015", "preference-000020"] {
        std::fs::remove_dir_all(out.join("checkpoints").join(checkpoint)).unwrap();
    }
    // The header stays right, so that only the digest of the values can tell.
    let path = out.join("reference_logps.train.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let said = resume(&recipe, &out);
    assert!(
        said.contains("reference_logps.train.safetensors: damaged"),
        "{said}"
    );
    assert_same(&out);
}

#[test]
fn resuming_a_finished_run_changes_no_result() {
    let (_folder, recipe, out) = place();
    copy(unbroken(), &out);
    resume(&recipe, &out);
    assert_same(&out);
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let kept = names(&unbroken().join("checkpoints"));
    assert_eq!(
        kept,
        [
            "preference-000015",
            "preference-000020",
            "sft-000020",
            "sft-000024"
        ]
    );
}

#[test]
fn another_recipe_cannot_resume_a_run() {
    let (folder, recipe, out) = nearly_finished();
    let before = contents(&out);
    let other = write(
        folder.path(),
        "other.toml",
        TINY.replace("seed = 3", "seed = 4"),
    );
    let error = fail(train(&other, &out).arg("--resume"));
    assert!(error.contains("recipe.toml differs"), "{error}");
    let error = fail(train(&recipe, &out).args(["--resume", "--beta", "0.2"]));
    assert!(error.contains("recipe.toml differs"), "{error}");
    assert!(contents(&out) == before);
}

#[test]
fn changed_data_cannot_resume_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = common::model_folder(folder.path(), "qwen2");
    let pairs = std::fs::read_to_string(common::testdata("trl/pairs.jsonl")).unwrap();
    let data = write(folder.path(), "pairs.jsonl", &pairs);
    let out = folder.path().join("run");
    succeed(&mut common::train_on(&model, &data, &out));
    let before = contents(&out);
    std::fs::write(
        &data,
        pairs.replacen("chosen\": \" 17", "chosen\": \" 18", 1),
    )
    .unwrap();
    let error = fail(common::train_on(&model, &data, &out).arg("--resume"));
    assert!(error.contains("data or model have changed"), "{error}");
    std::fs::write(&data, pairs).unwrap();
    let weights = model.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let error = fail(common::train_on(&model, &data, &out).arg("--resume"));
    assert!(error.contains("data or model have changed"), "{error}");
    assert!(contents(&out) == before);
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    succeed(common::train_on(&model, &data, &out).arg("--resume"));
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let (_folder, recipe, out) = nearly_finished();
    let path = out.join("checkpoints/preference-000020");
    let position = path.join("position.json");
    let text = std::fs::read_to_string(&position).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value["recipe"] = "another".into();
    std::fs::write(&position, value.to_string()).unwrap();
    std::fs::remove_file(path.join("manifest.json")).unwrap();
    trainer::checkpoint::write_manifest(&path).unwrap();
    let error = fail(train(&recipe, &out).arg("--resume"));
    assert!(error.contains("made with another recipe"), "{error}");
}

#[test]
fn a_second_run_into_the_same_folder_is_refused_and_changes_nothing() {
    let (_folder, recipe, out) = place();
    copy(unbroken(), &out);
    let before = contents(&out);
    let error = fail(&mut train(&recipe, &out));
    assert!(error.contains("not empty"), "{error}");
    assert!(contents(&out) == before);
}

#[test]
fn nothing_can_be_resumed_where_nothing_was_begun() {
    let (_folder, recipe, out) = place();
    let error = fail(train(&recipe, &out).arg("--resume"));
    assert!(error.contains("no run to resume"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_checkpoint_too_many_goes_when_the_run_goes_on() {
    let (_folder, recipe, out) = nearly_finished();
    let checkpoints = out.join("checkpoints");
    // Killed between saving the last and deleting the oldest.
    copy(
        &checkpoints.join("preference-000020"),
        &checkpoints.join("preference-000010"),
    );
    resume(&recipe, &out);
    assert_same(&out);
}

#[test]
fn a_checkpoint_of_the_task_is_a_model_to_begin_with() {
    let checkpoints = unbroken().join("checkpoints");
    let stage = names(&checkpoints);
    let newest = stage
        .iter()
        .rfind(|name| name.starts_with("preference"))
        .unwrap();
    let (start, rest) = TINY.split_once("[model]\n").unwrap();
    let rest = &rest[rest.find("\n[").unwrap()..];
    let (folder, _, out) = place();
    let model = folder.path().join("model");
    copy(&checkpoints.join(newest), &model);
    let text = format!("{start}[model]\npath = {model:?}\n{rest}");
    let recipe = write(folder.path(), "on.toml", text);
    succeed(&mut train(&recipe, &out));
    // The task knows its tokenizer; a folder of the task's vocabulary needs none.
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    succeed(&mut train(&recipe, &folder.path().join("without")));
}

#[test]
fn two_processes_are_never_at_work_in_one_folder() {
    let (_folder, recipe, out) = nearly_finished();
    // What the other one is writing is left alone.
    std::fs::write(out.join(".tmp-other"), "half").unwrap();
    let before = contents(&out);
    // Another run has locked the file, any other command the folder.
    for locked in [out.join("inputs.sha256"), out.clone()] {
        let lock = std::fs::File::open(locked).unwrap();
        lock.try_lock().unwrap();
        let error = fail(train(&recipe, &out).arg("--resume"));
        assert!(
            error.contains("another process is at work in it"),
            "{error}"
        );
        assert!(contents(&out) == before);
    }
    resume(&recipe, &out);
    assert_same(&out);
}
