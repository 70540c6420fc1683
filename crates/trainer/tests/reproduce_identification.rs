//! `r2q reproduce identification`: what it writes, at a size that says nothing about the claims.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod common;

use common::{fail, r2q, succeed};
use serde_json::Value;

#[test]
fn identification_writes_results_and_a_page_and_takes_finished_seeds_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let of_seeds = |seeds: &str| {
        let mut command = r2q();
        command.args(["reproduce", "identification", "--seeds", seeds]);
        command.args(["--pairs", "100,3000", "--steps", "60", "--horizon", "3"]);
        command.arg("--out").arg(&out);
        command
    };
    let run = || succeed(&mut of_seeds("1,2"));
    let read = || std::fs::read_to_string(out.join("results.json")).unwrap();
    run();
    let first = read();
    let results: Value = serde_json::from_str(&first).unwrap();
    // 1 + 3 + 9 states of four tokens.
    let cells = results["seeds"][0]["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 4);
    for cell in cells {
        assert_eq!(cell["visits"].as_array().unwrap().len(), 13);
        // Both sides of every pair go through the root.
        assert_eq!(
            cell["visits"][0].as_u64().unwrap(),
            2 * cell["pairs"].as_u64().unwrap()
        );
        for learner in ["language model", "table"] {
            let figures = &cell["learners"][learner];
            assert_eq!(figures["residuals"].as_array().unwrap().len(), 52);
        }
    }
    // Even so small, more labels bring either learner of the reward that repeats closer.
    for learner in ["language model", "table"] {
        let error = |pairs: usize| {
            let key = format!("bigram / {learner} / {pairs} / error");
            results["figures"][&key]["mean"].as_f64().unwrap()
        };
        assert!(error(3000) < error(100), "{learner}");
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Stated beforehand") && page.contains("Residuals"));

    let said = run();
    assert!(said.contains("seed 1: taken from"), "{said}");
    assert_eq!(read(), first);

    // Results of other settings are not written over.
    let mut command = r2q();
    command.args(["reproduce", "identification", "--steps", "1", "--out"]);
    let said = fail(command.arg(&out).args(["--seeds", "1"]));
    assert!(
        said.contains("seed-1/result.json: was made under other"),
        "{said}"
    );
    assert_eq!(read(), first);
    // Nor does anything stand beside those of another experiment, whose summary would be lost.
    let other = out.join("seed-7");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("result.json"), "{\"cells\": 3}").unwrap();
    let said = fail(&mut of_seeds("6"));
    assert!(
        said.contains("seed-7/result.json: is no result of this experiment"),
        "{said}"
    );
    assert!(!out.join("seed-6").exists());
    let kept = std::fs::read_to_string(other.join("result.json")).unwrap();
    assert_eq!(kept, "{\"cells\": 3}");
    assert_eq!(read(), first);
    // Of a seed that was begun its settings are known; one that left nothing else was not.
    let out = folder.path().join("begun");
    std::fs::create_dir_all(out.join("seed-7/run")).unwrap();
    std::fs::write(out.join("seed-7/settings.txt"), "others").unwrap();
    for expected in [
        "seed-7/settings.txt: was begun under other",
        "device `abacus`",
    ] {
        let mut command = r2q();
        command.args(["reproduce", "identification", "--device", "abacus", "--out"]);
        let said = fail(command.arg(&out).args(["--seeds", "6"]));
        assert!(said.contains(expected), "{said}");
        let _ = std::fs::remove_dir(out.join("seed-7/run"));
    }
}

#[test]
fn a_seed_counts_once_and_a_folder_of_something_else_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let run = |flags: &[&str]| {
        let mut command = r2q();
        command.arg("reproduce").args(flags).arg("--out").arg(&out);
        fail(&mut command)
    };
    for (flags, expected) in [
        (
            &["identification", "--seeds", "3,4,3"][..],
            "identification: --seeds: expected each value once, got 3 twice",
        ),
        (&["credit", "--seeds", "1", "--seeds", "1"], "got 1 twice"),
        (
            &["curves", "--betas", "1,1.0"],
            "--betas: expected each value once",
        ),
        (&["beam", "--seeds", "0,0"], "got 0 twice"),
        (
            &[
                "first-error",
                "--model",
                "m",
                "--data",
                "d",
                "--epochs",
                "0",
            ],
            "first-error: key `preference.epochs`",
        ),
        (
            &[
                "first-error",
                "--model",
                "m",
                "--data",
                "d",
                "--learning-rate=-1",
            ],
            "learning_rate",
        ),
    ] {
        let said = run(flags);
        assert!(said.contains(expected), "{flags:?}: {said}");
        assert!(!out.exists(), "{flags:?}");
    }
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("report.html"), "mine").unwrap();
    // A name alone makes no seed.
    std::fs::write(out.join("seed-notes"), "mine").unwrap();
    let said = run(&["identification"]);
    assert!(
        said.contains("holds something else than an experiment"),
        "{said}"
    );
    assert_eq!(std::fs::read(out.join("report.html")).unwrap(), b"mine");
}

#[test]
fn identification_refuses_pairs_that_do_not_rise() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = r2q();
    command.args(["reproduce", "identification", "--pairs", "100,100", "--out"]);
    command.arg(folder.path().join("out"));
    let said = fail(&mut command);
    assert!(said.contains("rising numbers of pairs"), "{said}");
}
