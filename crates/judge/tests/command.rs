//! Reward commands: what they are sent, what they may answer, and every way in which they fail.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::time::{Duration, Instant};

use judge::{CommandReward, JudgeError, Reward, Sample, score};

/// Longer than anything here takes on a loaded machine.
const PATIENT: Duration = Duration::from_secs(60);

/// Shell functions: `next` reads a line, `id` and `text` are its id and completion.
const LINES: &str = r#"
    next() {
        IFS= read -r line || exit 0
        id=${line#*'"id":'}; id=${id%%[,\}]*}
        text=${line#*'"completion":"'}; text=${text%%'"'*}
    }
    answer() { echo "{\"id\":$1,\"reward\":$2}"; }
"#;

fn shell(script: &str, deadline: Duration) -> CommandReward {
    CommandReward::shell(&format!("{LINES}{script}"), deadline).unwrap()
}

fn samples(texts: &[&str]) -> Vec<Sample> {
    texts.iter().map(|text| Sample::new("p", *text)).collect()
}

fn failure(script: &str) -> JudgeError {
    let reward = shell(script, PATIENT);
    reward.rewards(&samples(&["1", "2", "3"])).unwrap_err()
}

/// The message behind the command, which is long here.
fn message(error: &JudgeError) -> String {
    let text = error.to_string();
    text.rsplit_once("`: ").unwrap().1.to_string()
}

#[test]
fn rewards_come_back_in_the_order_of_the_samples() {
    // Two lines are read before the second of them is answered, then the first.
    let reward = shell(
        r#"while next; do i=$id t=$text; next; answer $id $text; answer $i $t; done"#,
        PATIENT,
    );
    let expected = [0.5, -2.0, 3e-3, 4.0];
    let texts = ["0.5", "-2", "3e-3", "4"];
    assert_eq!(reward.rewards(&samples(&texts)).unwrap(), expected);
}

#[test]
fn a_command_is_started_once_and_sees_whole_rows() {
    // It counts its answers over batches, and says how long the line was.
    let reward = shell(
        r#"n=0; while next; do n=$((n + 1)); answer $id $n.${#line}; done"#,
        PATIENT,
    );
    let row = [Sample::new("p", "c").with("finished", true).with("id", 7)];
    let line = r#"{"id":0,"prompt":"p","completion":"c","finished":true}"#;
    for n in 1..=3 {
        let expected = f64::from(n) + line.len() as f64 / 100.0;
        let found = reward.rewards(&row).unwrap()[0];
        assert!(
            (found - expected).abs() < 1e-12,
            "{found} is not {expected}"
        );
    }
}

#[test]
fn a_batch_larger_than_a_pipe_does_not_block() {
    let reward = shell("while next; do answer $id $text; done", PATIENT);
    let filler = "x".repeat(300);
    let many: Vec<Sample> = (0..2000)
        .map(|i| Sample::new(&filler, i.to_string()))
        .collect();
    let rewards = reward.rewards(&many).unwrap();
    let expected: Vec<f64> = (0..2000).map(f64::from).collect();
    assert_eq!(rewards, expected);
}

#[test]
fn a_bad_line_is_named_by_its_number_and_shown() {
    let found = message(&failure("next; answer $id 1; echo 'hello there'; sleep 60"));
    assert!(
        found.starts_with(
            r#"line 2 of its output: expected {"id": .., "reward": ..}, got hello there"#
        ),
        "{found}"
    );
}

#[test]
fn a_missing_id_or_reward_is_named() {
    let found = message(&failure(r#"echo '{"reward": 1}'"#));
    assert!(found.contains("got no id in {\"reward\": 1}"), "{found}");
    let found = message(&failure(r#"echo '{"id": 0}'"#));
    assert!(found.contains("got no reward in {\"id\": 0}"), "{found}");
}

#[test]
fn a_reward_that_is_no_finite_number_is_refused() {
    for (reward, expected) in [
        ("null", "reward of id 0 is null, expected a finite number"),
        (
            "\\\"1\\\"",
            "reward of id 0 is \"1\", expected a finite number",
        ),
        ("NaN", "got {\"id\":0,\"reward\":NaN}"),
        ("1e999", "got {\"id\":0,\"reward\":1e999}"),
    ] {
        let found = message(&failure(&format!("answer 0 \"{reward}\"")));
        assert!(found.contains("line 1 of its output: "), "{found}");
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn an_id_that_was_not_asked_or_is_answered_is_refused() {
    let found = message(&failure("answer 9 1"));
    assert!(found.contains("id 9 was not asked for"), "{found}");
    let found = message(&failure("answer 0 1; answer 0 1"));
    assert!(found.starts_with("line 2 of its output: id 0 "), "{found}");
}

#[test]
fn a_command_that_ends_early_says_how_and_what_it_wrote() {
    let found = message(&failure(
        "next; answer $id 1; echo no such model >&2; exit 3",
    ));
    assert_eq!(
        found,
        "ended with exit status: 3 after line 1 of its output, 1 of 3 rewards were there; \
         it wrote: no such model"
    );
}

#[test]
fn a_silent_command_meets_its_deadline_and_is_ended() {
    let reward = shell(
        "next; answer $id 1; exec sleep 600",
        Duration::from_millis(300),
    );
    let start = Instant::now();
    let error = reward.rewards(&samples(&["1", "2"])).unwrap_err();
    assert!(
        matches!(error, JudgeError::CommandDeadline { .. }),
        "{error}"
    );
    let found = message(&error);
    assert_eq!(
        found,
        "no reward within 0.3 s after line 1 of its output, 1 of 2 were there"
    );
    assert!(start.elapsed() < PATIENT, "the command was waited for");
}

#[test]
fn after_a_failure_the_command_is_started_afresh() {
    let folder = tempfile::tempdir().unwrap();
    let flag = folder.path().join("flag");
    let script = format!(
        "if [ -e '{0}' ]; then while next; do answer $id $text; done; fi; touch '{0}'",
        flag.display()
    );
    let reward = shell(&script, PATIENT);
    reward.rewards(&samples(&["1"])).unwrap_err();
    assert_eq!(reward.rewards(&samples(&["5"])).unwrap(), [5.0]);
}

#[test]
fn a_program_that_does_not_exist_is_found_out_at_once() {
    let error = CommandReward::new("no-such-program-here", &["x".into()], PATIENT).unwrap_err();
    let message = error.to_string();
    assert!(
        message.starts_with("reward command `no-such-program-here x`: cannot be started: "),
        "{message}"
    );
}

#[test]
fn scoring_reports_how_far_it_is() {
    let reward = shell("while next; do answer $id $text; done", PATIENT);
    let many: Vec<Sample> = (0..300).map(|i| Sample::new("p", i.to_string())).collect();
    let mut seen = Vec::new();
    let scored = score(&many, &reward, &mut |p| seen.push((p.done, p.total))).unwrap();
    assert_eq!(scored.len(), 300);
    let expected: Vec<f64> = (0..300).map(f64::from).collect();
    let rewards: Vec<f64> = scored.iter().map(|scored| scored.reward).collect();
    assert_eq!(rewards, expected);
    assert_eq!(seen.last(), Some(&(300, 300)));
    assert!(seen.len() > 1);
}
