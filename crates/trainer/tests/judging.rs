//! Sampling, preference making and evaluation from the command line.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use common::{TINY, copy, fail, r2q, succeed, train, write};
use serde_json::Value;

/// A finished tiny run, made once for all tests of this file.
fn run() -> &'static Path {
    static RUN: OnceLock<PathBuf> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("judging");
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let recipe = write(&folder, "tiny.toml", TINY);
        let out = folder.join("run");
        succeed(&mut train(&recipe, &out));
        out
    })
}

fn rows(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn outcome(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("outcome.json")).unwrap()).unwrap()
}

/// Lines of samples, `lengths[i]` words long.
fn samples(folder: &Path, name: &str, lengths: &[usize]) -> PathBuf {
    let lines: Vec<String> = lengths
        .iter()
        .enumerate()
        .map(|(row, &words)| {
            let text = " word".repeat(words);
            format!("{{\"prompt\": \"Say {row}.\", \"completion\": \"{text}\"}}")
        })
        .collect();
    write(folder, name, lines.join("\n"))
}

#[test]
fn samples_are_scored_labelled_and_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut command = r2q();
    command.args([
        "sample",
        "--memo-prompts",
        "6",
        "--n",
        "4",
        "--max-new-tokens",
        "20",
    ]);
    command.arg("--policy").arg(run().join("model"));
    // Folders that are missing are made.
    succeed(command.arg("--out").arg(at("a/b/samples.jsonl")));
    std::fs::rename(at("a/b/samples.jsonl"), at("samples.jsonl")).unwrap();
    let drawn = rows(&at("samples.jsonl"));
    assert_eq!(drawn.len(), 24);
    assert_eq!(drawn[0]["prompt"], drawn[3]["prompt"]);
    assert_ne!(drawn[0]["prompt"], drawn[4]["prompt"]);
    let ids = drawn[0]["completion_ids"].as_array().unwrap().len();
    assert_eq!(drawn[0]["n_tokens"], ids);

    let mut command = r2q();
    command.args(["prefer", "--judge", "memo", "--keep-unfinished"]);
    command.arg("--samples").arg(at("samples.jsonl"));
    let said = succeed(command.arg("--out").arg(at("pairs.jsonl")));
    let pairs = rows(&at("pairs.jsonl"));
    assert!(!pairs.is_empty() && pairs.len() <= 6, "{said}");
    for pair in &pairs {
        let reward = |side: &str| pair[side].as_f64().unwrap();
        assert!(reward("chosen_reward") > reward("rejected_reward"));
    }
    let model = run().join("model");
    let out = at("run");
    let mut command = common::train_on(&model, &at("pairs.jsonl"), &out);
    succeed(command.args(["--batch-size", "2", "--empty-completions", "keep"]));
    assert!(out.join("model/model.safetensors").is_file());

    // Nothing is written over.
    let said =
        fail(command_again(&at("samples.jsonl"), &at("pairs.jsonl")).arg("--keep-unfinished"));
    assert!(said.contains("is there already"), "{said}");
}

#[cfg(unix)]
#[test]
fn interrupted_sampling_writes_the_prompts_that_are_done() {
    use std::process::{Command, Stdio};

    let folder = tempfile::tempdir().unwrap();
    let command = |prompts: &str, name: &str| {
        let mut command = r2q();
        command.args(["sample", "--memo-prompts", prompts, "--n", "3"]);
        command.args(["--max-new-tokens", "8", "--policy"]);
        command.arg(run().join("model"));
        command.arg("--out").arg(folder.path().join(name));
        command
    };
    let mut begun = command("65536", "begun.jsonl");
    let mut child = begun.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with("sample: 196608 completions"), "{line}");
    // Ctrl-C; the first batch is drawn in any case.
    let id = child.id().to_string();
    succeed(Command::new("kill").args(["-INT", &id]));
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("stopped: the first"), "{rest}");
    let begun = rows(&folder.path().join("begun.jsonl"));
    assert!(
        begun.len().is_multiple_of(3) && begun.len() < 196_608,
        "{}",
        begun.len()
    );
    // They are what they would have been: a batch is 64 completions, so 21 prompts of it.
    succeed(&mut command("22", "few.jsonl"));
    let few = rows(&folder.path().join("few.jsonl"));
    assert_eq!(begun[..63], few[..63]);
}

fn command_again(samples: &Path, out: &Path) -> std::process::Command {
    let mut command = r2q();
    command.args(["prefer", "--judge", "memo"]);
    command.arg("--samples").arg(samples).arg("--out").arg(out);
    command
}

#[test]
fn a_policy_against_itself_wins_half_and_the_evaluation_leaves_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("eval");
    let mut command = r2q();
    command.args([
        "eval",
        "--memo-prompts",
        "12",
        "--judge",
        "memo",
        "--max-new-tokens",
        "20",
    ]);
    command.arg("--policy-a").arg(run().join("model"));
    command.arg("--policy-b").arg(run().join("model"));
    command.arg("--out").arg(&out);
    let said = succeed(&mut command);
    assert!(said.contains("A's win rate"), "{said}");
    let outcome = outcome(&out);
    assert_eq!(
        (&outcome["ties"], &outcome["win_rate"]["mean"]),
        (&12.into(), &0.5.into())
    );
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("win rate"));
    let said = fail(&mut command);
    assert!(said.contains("give --resume"), "{said}");
}

#[test]
fn a_command_judges_samples_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let a = samples(folder.path(), "a.jsonl", &[5, 5, 2, 3]);
    let b = samples(folder.path(), "b.jsonl", &[1, 2, 3, 3]);
    let out = folder.path().join("eval");
    // Longer is better.
    let judge = r#"while IFS= read -r line; do rest=${line#*\"id\":}; id=${rest%%,*}
        echo "{\"id\": $id, \"reward\": ${#line}}"; done"#;
    let mut command = r2q();
    command.args(["eval", "--judge-command", judge]);
    command.arg("--policy-a").arg(&a).arg("--policy-b").arg(&b);
    succeed(command.arg("--out").arg(&out));
    let outcome = outcome(&out);
    let counts = ["wins", "ties", "losses"].map(|name| outcome[name].as_u64().unwrap());
    assert_eq!(counts, [2, 1, 1]);
    assert_eq!(outcome["length_unit"], "characters");
}

/// A judge that prefers the longer answer, and has its moods.
fn server(mood: impl Fn(usize) -> Mood + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let mood = Arc::new(mood);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (counter, mood) = (counter.clone(), mood.clone());
            std::thread::spawn(move || serve(stream, &counter, &*mood));
        }
    });
    (address, asked)
}

enum Mood {
    Answers,
    Rambles,
    Sleeps,
    HangsUp,
}

fn serve(
    mut stream: TcpStream,
    asked: &AtomicUsize,
    mood: &(dyn Fn(usize) -> Mood + Send + Sync),
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let verdict = match mood(asked.fetch_add(1, Ordering::SeqCst)) {
        Mood::HangsUp => return None,
        Mood::Sleeps => {
            std::thread::sleep(Duration::from_secs(3));
            return None;
        }
        Mood::Rambles => "It depends on what one likes.".to_string(),
        Mood::Answers => {
            let request: Value = serde_json::from_slice(&body).ok()?;
            let messages = request["messages"].as_array()?;
            let question = messages.last()?["content"].as_str()?.to_string();
            let part = |name: &str| -> Option<usize> {
                let from = question.split(&format!("<answer {name}>")).nth(1)?;
                Some(from.split("</answer").next()?.len())
            };
            match part("A")?.cmp(&part("B")?) {
                std::cmp::Ordering::Greater => "The first. [[A]]".to_string(),
                std::cmp::Ordering::Less => "The second. [[B]]".to_string(),
                std::cmp::Ordering::Equal => "[[TIE]]".to_string(),
            }
        }
    };
    let reply =
        serde_json::json!({"choices": [{"message": {"role": "assistant", "content": verdict}}]});
    let reply = reply.to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{reply}",
        reply.len()
    )
    .ok()
}

/// Settings of a judge that does not wait long for anything.
fn settings(folder: &Path, address: &str) -> PathBuf {
    let text = format!(
        "base_url = \"{address}\"\nmodel = \"judge\"\nname = \"test judge\"\nconcurrency = 1\n\
         timeout_s = 1.0\nretries = 0\nparse_retries = 0\nfirst_wait_s = 0.01\ngive_up_after = 2\n"
    );
    write(folder, "judge.toml", text)
}

#[test]
fn a_server_that_fails_midway_loses_no_answer_and_a_rerun_asks_for_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let a = samples(folder.path(), "a.jsonl", &[5, 4, 3, 2, 1, 6]);
    let b = samples(folder.path(), "b.jsonl", &[1, 2, 2, 3, 4, 1]);
    let out = folder.path().join("eval");
    let evaluate = |resume: bool| {
        let mut command = r2q();
        command.args(["eval", "--judge-config"]);
        command.arg(folder.path().join("judge.toml"));
        command.arg("--policy-a").arg(&a).arg("--policy-b").arg(&b);
        command.arg("--out").arg(&out);
        if resume {
            command.arg("--resume");
        }
        command
    };
    // Both orders of the first two pairs are answered, then nothing but silence and hanging up.
    let (address, _) = server(|nth| match nth {
        0..4 => Mood::Answers,
        4 => Mood::Sleeps,
        _ => Mood::HangsUp,
    });
    settings(folder.path(), &address);
    let said = fail(&mut evaluate(false));
    assert!(said.contains("--resume asks for what is missing"), "{said}");
    let first = outcome(&out);
    let decided = |outcome: &Value| -> u64 {
        ["wins", "ties", "losses"]
            .map(|name| outcome[name].as_u64().unwrap())
            .iter()
            .sum()
    };
    assert_eq!(decided(&first), 2, "{first}");
    assert_eq!(first["errors"], 4);
    // The server is well again: it is asked for the other four pairs, in both orders, and no more.
    let (address, asked) = server(|_| Mood::Answers);
    settings(folder.path(), &address);
    succeed(&mut evaluate(true));
    assert_eq!(asked.load(Ordering::SeqCst), 8);
    let second = outcome(&out);
    assert_eq!(second["errors"], 0);
    assert_eq!((&second["wins"], &second["losses"]), (&4.into(), &2.into()));
}

#[test]
fn an_answer_without_a_verdict_is_counted_and_not_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let a = samples(folder.path(), "a.jsonl", &[5, 4, 3]);
    let b = samples(folder.path(), "b.jsonl", &[1, 2, 2]);
    let (address, _) = server(|nth| {
        if nth < 2 {
            Mood::Rambles
        } else {
            Mood::Answers
        }
    });
    let config = settings(folder.path(), &address);
    let out = folder.path().join("eval");
    let mut command = r2q();
    command.args(["eval", "--judge-config"]).arg(config);
    command.arg("--policy-a").arg(&a).arg("--policy-b").arg(&b);
    succeed(command.arg("--out").arg(&out));
    let outcome = outcome(&out);
    assert_eq!(
        (&outcome["unparsed"], &outcome["wins"]),
        (&1.into(), &2.into())
    );
}

#[test]
fn a_server_labels_preferences() {
    let folder = tempfile::tempdir().unwrap();
    let lines = [" one", " one two", " three", " three"]
        .map(|text| format!("{{\"prompt\": \"Say.\", \"completion\": \"{text}\"}}"));
    let drawn = write(folder.path(), "samples.jsonl", lines.join("\n"));
    let (address, _) = server(|_| Mood::Answers);
    let config = settings(folder.path(), &address);
    let out = folder.path().join("new/pairs.jsonl");
    let mut command = r2q();
    command.args(["prefer", "--judge-config"]).arg(config);
    command.arg("--samples").arg(drawn);
    succeed(command.arg("--out").arg(&out));
    let pairs = rows(&out);
    assert_eq!(pairs.len(), 1);
    let text = |side: &str| pairs[0][side].as_str().unwrap().to_string();
    assert_eq!(
        (text("chosen"), text("rejected")),
        (" one two".into(), " one".into())
    );
}

/// The trained model in another folder.
fn copy_of_model(folder: &Path, name: &str) -> PathBuf {
    let model = folder.join(name);
    copy(&run().join("model"), &model);
    model
}

#[test]
fn settings_are_checked_before_a_judge_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let asked = folder.path().join("asked");
    let line = format!("touch {}", asked.display());
    // A byte order mark is no part of the first row.
    let good = "\u{feff}{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    let odd = r#"{"prompt": "a", "completion": "c", "finished": "yes"}"#;
    let samples = write(folder.path(), "good.jsonl", good);
    let odd = write(folder.path(), "odd.jsonl", format!("{good}{odd}\n"));
    for (samples, flags, expected) in [
        (&samples, &["--tie-band", "-1"][..], "band must be finite"),
        (&samples, &["--bradley-terry", "-1"], "sharpness"),
        (&odd, &[], "`finished`"),
    ] {
        let mut command = r2q();
        command
            .args(["prefer", "--judge-command", &line])
            .args(flags);
        command.arg("--samples").arg(samples);
        let said = fail(command.arg("--out").arg(folder.path().join("pairs.jsonl")));
        assert!(said.contains(expected), "{flags:?}: {said}");
        assert!(!asked.exists(), "{flags:?}");
    }
    // A wrong path leaves no folder behind.
    let out = folder.path().join("eval");
    let eval = |b: &Path| {
        let mut command = r2q();
        command
            .args(["eval", "--judge", "memo", "--policy-a"])
            .arg(&samples);
        command.arg("--policy-b").arg(b).arg("--out").arg(&out);
        command
    };
    let said = fail(&mut eval(&folder.path().join("nowhere")));
    assert!(
        said.contains("--policy-b: ") && said.contains("nowhere"),
        "{said}"
    );
    assert!(!out.exists());
    // Nor does a folder that holds no model, prompts that are not there, or an empty file; and one that
    // was there is left as it was.
    let empty = write(folder.path(), "empty.jsonl", "\n");
    let unweighted = copy_of_model(folder.path(), "unweighted");
    std::fs::remove_file(unweighted.join("model.safetensors")).unwrap();
    let unadapted = folder.path().join("unadapted");
    std::fs::create_dir(&unadapted).unwrap();
    let settings = serde_json::json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
        "base_model_name_or_path": run().join("model"),
    });
    write(&unadapted, "adapter_config.json", settings.to_string());
    for made in [false, true] {
        if made {
            std::fs::create_dir(&out).unwrap();
        }
        for (b, prompts, expected) in [
            (folder.path(), "4", "config.json"),
            (&run().join("model"), "nowhere.jsonl", "nowhere.jsonl: "),
            (&empty, "4", "expected at least one completion"),
            // Weights that are not there, of a model and of adapters; other prompts than A's.
            (&unweighted, "4", "safetensors"),
            (&unadapted, "4", "adapter_model.safetensors"),
            (&run().join("model"), "4", "cannot be paired"),
        ] {
            let mut command = eval(b);
            let flag = match prompts {
                "4" => "--memo-prompts",
                _ => "--prompts",
            };
            let said = fail(command.args([flag, prompts]));
            assert!(said.contains(expected), "{said}");
            assert_eq!(out.exists(), made, "{said}");
        }
        let broken = copy_of_model(folder.path(), &format!("broken-{made}"));
        let weights = broken.join("model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        let end = bytes.len() - 4;
        bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&weights, bytes).unwrap();
        let mut sampled = r2q();
        sampled.args(["eval", "--judge", "memo", "--memo-prompts", "4"]);
        sampled.arg("--policy-a").arg(&broken);
        sampled
            .arg("--policy-b")
            .arg(&broken)
            .arg("--out")
            .arg(&out);
        let config =
            "base_url = \"http://localhost:1/v1\"\nmodel = \"m\"\napi_key_env = \"R2Q_NO\"\n";
        let config = write(folder.path(), "judge.toml", config);
        let mut judged = r2q();
        judged.arg("eval").arg("--judge-config").arg(config);
        judged.arg("--policy-a").arg(&samples);
        judged
            .arg("--policy-b")
            .arg(&samples)
            .arg("--out")
            .arg(&out);
        let mut banded = eval(&samples);
        banded.args(["--tie-band", "-1"]);
        for (command, expected) in [
            (&mut sampled, "NaN"),
            (&mut judged, "R2Q_NO"),
            (&mut banded, "band"),
        ] {
            let said = fail(command);
            assert!(said.contains(expected), "{said}");
            let left = out.exists().then(|| out.read_dir().unwrap().count());
            assert_eq!(left, made.then_some(0), "{said}");
        }
        // One process at a time.
        if made {
            let _lock = trainer::folder::enter(&out).unwrap();
            let said = fail(&mut eval(&samples));
            assert!(said.contains("another process is at work"), "{said}");
        }
    }
    // No memo, but it is read and judged.
    let said = fail(&mut eval(&samples));
    assert!(said.contains("sample 0: memo: expected a sender"), "{said}");
}

#[test]
fn bad_arguments_are_one_line_that_says_what_to_give() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "bad.jsonl", "{\"prompt\": 3}\n");
    let mut command = r2q();
    command
        .arg("sample")
        .arg("--policy")
        .arg(run().join("model"));
    command.arg("--out").arg(folder.path().join("out.jsonl"));
    let said = fail(&mut command);
    assert!(
        said.contains("--prompts FILE or --memo-prompts N"),
        "{said}"
    );
    for (flag, value, expected) in [
        ("--n", "0", "--n: expected at least 1, got 0"),
        ("--n", "18446744073709551615", "--n: expected at most 65536"),
        ("--workers", "0", "--workers: expected at least 1, got 0"),
        ("--memo-prompts", "0", "--memo-prompts: expected at least 1"),
        (
            "--n",
            "65000",
            "prompts times --n: expected at most 4194304, got 6500000",
        ),
    ] {
        let mut command = r2q();
        command.args(["sample", "--policy", "nowhere", flag, value]);
        if flag != "--memo-prompts" {
            command.args(["--memo-prompts", "100"]);
        }
        let said = fail(command.arg("--out").arg(folder.path().join("out.jsonl")));
        assert!(said.contains(expected), "{flag} {value}: {said}");
    }
    // That nothing can be written there is said before anything is sampled.
    let mut below = r2q();
    below.args(["sample", "--policy", "nowhere", "--memo-prompts", "1"]);
    let said = fail(below.arg("--out").arg(file.join("out.jsonl")));
    assert!(said.contains("out.jsonl: Not a directory"), "{said}");
    let mut slash = r2q();
    slash.args(["sample", "--policy", "nowhere", "--memo-prompts", "1"]);
    let said = fail(slash.arg("--out").arg(folder.path().join("results/")));
    assert!(
        said.contains("results/: expected the name of a file"),
        "{said}"
    );
    let said = fail(command.arg("--prompts").arg(&file));
    assert!(
        said.contains("bad.jsonl row 0") && said.contains("a string"),
        "{said}"
    );
    let mut command = r2q();
    command
        .arg("eval")
        .arg("--policy-a")
        .arg(&file)
        .arg("--policy-b")
        .arg(&file);
    let said = fail(command.arg("--out").arg(folder.path().join("eval")));
    assert!(said.contains("--judge memo"), "{said}");
}
