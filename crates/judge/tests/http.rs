//! The judge behind a server that times out, talks nonsense, refuses and fails midway.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod server;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use judge::{
    Comparison, EvalOptions, EvalOutcome, HttpJudge, HttpJudgeConfig, JudgeError, Judgement,
    JudgementCache, Verdict, evaluate,
};
use server::{Act, Request, Server};

/// A short question, so that a test's server can read it.
const TEMPLATE: &str = "{{ prompt }}|{{ first }}|{{ second }}";

fn config(server: &Server) -> HttpJudgeConfig {
    let mut config = HttpJudgeConfig::new(&server.url, "tiny");
    config.template = TEMPLATE.into();
    config.timeout_s = 20.0;
    config.retries = 2;
    config.first_wait_s = 0.01;
    config.concurrency = 3;
    config
}

fn judge(config: HttpJudgeConfig, cache: &Path) -> HttpJudge {
    HttpJudge::new(config, JudgementCache::open(cache).unwrap()).unwrap()
}

fn run(judge: &HttpJudge, pairs: &[Comparison]) -> Result<EvalOutcome, JudgeError> {
    evaluate(pairs, judge, &EvalOptions::default(), &mut |_| ())
}

/// Pairs whose completions are numbers: A's is the larger in two of three.
fn pairs(n: usize) -> Vec<Comparison> {
    (0..n)
        .map(|i| {
            let a = if i % 3 == 0 { "1" } else { "3" };
            Comparison::new(&format!("prompt {i}"), a, "2")
        })
        .collect()
}

/// What an honest judge answers: the larger number, wherever it stands.
fn honest(request: &Request) -> Act {
    let numbers: Vec<i64> = request
        .question()
        .split('|')
        .skip(1)
        .map(|number| number.parse().unwrap())
        .collect();
    Act::say(if numbers[0] > numbers[1] {
        "I think [[A]]"
    } else {
        "[[B]]"
    })
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn cache(&self) -> std::path::PathBuf {
        self.0.path().join("cache.jsonl")
    }
}

#[test]
fn an_honest_judge_gives_the_true_win_rate_and_a_second_run_asks_nothing() {
    let folder = Folder::new();
    let server = Server::start(|_, request| honest(request));
    let pairs = pairs(12);
    let first = run(&judge(config(&server), &folder.cache()), &pairs).unwrap();
    assert_eq!((first.wins, first.ties, first.losses), (8, 0, 4));
    let position = first.position.unwrap();
    assert_eq!((position.n_pairs, position.n_disagreed), (12, 0));
    assert_eq!(server.n_requests(), 24);
    // Swapped sides are the same questions.
    let swapped: Vec<Comparison> = pairs.iter().cloned().map(Comparison::swapped).collect();
    for (pairs, wins) in [(&pairs, 8), (&swapped, 4)] {
        let again = run(&judge(config(&server), &folder.cache()), pairs).unwrap();
        assert_eq!((again.wins, again.ties), (wins, 0));
        assert_eq!(server.n_requests(), 24);
    }
}

#[test]
fn a_judge_that_goes_by_position_ties_everything_and_is_found_out() {
    let folder = Folder::new();
    let server = Server::start(|_, _| Act::say("[[A]]"));
    let outcome = run(&judge(config(&server), &folder.cache()), &pairs(6)).unwrap();
    assert_eq!((outcome.wins, outcome.ties, outcome.losses), (0, 6, 0));
    let position = outcome.position.unwrap();
    assert_eq!((position.n_disagreed, position.n_first_twice), (6, 6));
    // Asked in one order alone it would have won everything.
    let mut config = config(&server);
    config.both_orders = false;
    let outcome = run(&judge(config, &folder.cache()), &pairs(6)).unwrap();
    assert_eq!((outcome.wins, outcome.position), (6, None));
}

#[test]
fn the_request_is_what_was_configured_and_the_key_is_written_nowhere() {
    // A variable that cargo sets stands for the key.
    const KEY: &str = "CARGO_PKG_REPOSITORY";
    let key = std::env::var(KEY).unwrap();
    let folder = Folder::new();
    let server = Server::start(|_, request| {
        // A server that echoes the key, as some do when they refuse it.
        Act::Say(format!("{} [[A]]", request.authorization.clone().unwrap()))
    });
    let mut config = config(&server);
    config.api_key_env = Some(KEY.into());
    config.system = Some("Be fair.".into());
    config.parameters.insert("seed".into(), 7.into());
    let judge = judge(config, &folder.cache());
    assert!(!format!("{judge:?}").contains(&key));
    run(&judge, &pairs(1)).unwrap();
    let request = &server.requests()[0];
    assert_eq!(request.path, "/v1/chat/completions");
    assert_eq!(request.authorization, Some(format!("Bearer {key}")));
    assert_eq!(request.body["model"], "tiny");
    assert_eq!(request.body["messages"][0]["content"], "Be fair.");
    assert_eq!(request.body["temperature"], 0);
    assert_eq!(request.body["seed"], 7);
    let kept = std::fs::read_to_string(folder.cache()).unwrap();
    assert!(
        kept.contains("Bearer *** [[A]]") && !kept.contains(&key),
        "{kept}"
    );
}

#[test]
fn nonsense_is_asked_again_then_recorded_and_never_guessed() {
    let folder = Folder::new();
    let server = Server::start(|_, _| Act::say("Both answers have their merits."));
    let mut config = config(&server);
    config.parse_retries = 1;
    let pairs = pairs(3);
    let outcome = run(&judge(config.clone(), &folder.cache()), &pairs).unwrap();
    assert_eq!((outcome.unparsed, outcome.win_rate), (3, None));
    assert_eq!(server.n_requests(), 12);
    let reply = "Both answers have their merits.".to_string();
    assert_eq!(outcome.judgements[0], Judgement::Unparsed { reply });
    // It is an answer, so it is not asked for again.
    server.change(|_, request| honest(request));
    let again = run(&judge(config, &folder.cache()), &pairs).unwrap();
    assert_eq!((again.unparsed, server.n_requests()), (3, 12));
}

#[test]
fn a_second_attempt_may_hold_the_verdict() {
    let folder = Folder::new();
    let server = Server::start(|n, request| match n {
        0 => Act::say("Hm."),
        1 => Act::Status(200, String::new(), "<html>busy</html>".into()),
        _ => honest(request),
    });
    let mut config = config(&server);
    config.concurrency = 1;
    let outcome = run(&judge(config, &folder.cache()), &pairs(1)).unwrap();
    assert_eq!((outcome.losses, server.n_requests()), (1, 4));
}

#[test]
fn passing_troubles_are_retried_with_growing_waits() {
    let folder = Folder::new();
    let server = Server::start(|n, request| match n {
        0 => Act::status(429),
        1 => Act::status(503),
        2 => Act::Drop,
        3 => Act::Hang(Duration::from_secs(10)),
        _ => honest(request),
    });
    let mut config = config(&server);
    config.concurrency = 1;
    config.both_orders = false;
    config.retries = 4;
    config.timeout_s = 1.5;
    config.first_wait_s = 0.1;
    let outcome = run(&judge(config, &folder.cache()), &pairs(1)).unwrap();
    assert_eq!((outcome.losses, outcome.errors), (1, 0));
    let times: Vec<Instant> = server.requests().iter().map(|request| request.at).collect();
    assert_eq!(times.len(), 5);
    // At least half of 0.1, 0.2, 0.4 s, and after the timeout of 1.5 s half of 0.8 s.
    for (i, least) in [0.05, 0.1, 0.2, 1.5 + 0.4].into_iter().enumerate() {
        let waited = (times[i + 1] - times[i]).as_secs_f64();
        // The server sees a request a little later than it was sent.
        assert!(
            waited > least - 0.03,
            "wait {i}: {waited} s, at least {least} s"
        );
    }
}

#[test]
fn retry_after_holds_back_every_request() {
    let folder = Folder::new();
    let wait = "Retry-After: 1\r\n";
    let server = Server::start(move |n, request| match n {
        0 => Act::Status(429, wait.into(), "slow down".into()),
        _ => honest(request),
    });
    let mut config = config(&server);
    config.concurrency = 1;
    let outcome = run(&judge(config, &folder.cache()), &pairs(2)).unwrap();
    assert_eq!((outcome.wins, outcome.losses), (1, 1));
    let requests = server.requests();
    let waited = requests[1].at - requests[0].at;
    // The first wait of the back-off is a hundredth of this.
    assert!(waited > Duration::from_millis(950), "{waited:?}");
}

#[test]
fn a_wait_longer_than_allowed_fails_the_pair_at_once() {
    let folder = Folder::new();
    let server =
        Server::start(|_, _| Act::Status(429, "Retry-After: 3600\r\n".into(), "quota".into()));
    let outcome = run(&judge(config(&server), &folder.cache()), &pairs(1)).unwrap();
    assert_eq!(outcome.errors, 1);
    let reason = outcome.first_error.unwrap();
    assert_eq!(
        reason,
        "status 429: quota; it asks to wait 3600 s, the longest wait is 60 s"
    );
    assert_eq!(server.n_requests(), 2);
}

#[test]
fn failing_midway_loses_nothing_and_a_rerun_asks_only_for_what_is_missing() {
    for trouble in [
        Act::status(500),
        Act::Drop,
        Act::Hang(Duration::from_secs(4)),
        Act::Status(200, String::new(), "not json".into()),
    ] {
        let folder = Folder::new();
        let bad = trouble.clone();
        let server = Server::start(move |n, request| match n {
            ..=8 => honest(request),
            _ => bad.clone(),
        });
        let mut config = config(&server);
        // Long enough for an honest answer on a loaded machine.
        config.timeout_s = 1.0;
        config.retries = 1;
        config.give_up_after = 3;
        let pairs = pairs(12);
        let broken = run(&judge(config.clone(), &folder.cache()), &pairs).unwrap();
        assert_eq!(broken.unparsed, 0);
        assert!(broken.errors >= 12 - 9 / 2, "{trouble:?}: {broken:?}");
        let kept = JudgementCache::open(&folder.cache()).unwrap().len();
        assert_eq!(kept, 9, "{trouble:?}");
        // Three questions in a row were tried twice each, with up to two more on their way.
        let n_before = server.n_requests();
        assert!(
            n_before <= 9 + 2 * (3 + 2),
            "{trouble:?}: {n_before} requests"
        );

        server.change(|_, request| honest(request));
        let mut config = config.clone();
        config.timeout_s = 20.0;
        let whole = run(&judge(config, &folder.cache()), &pairs).unwrap();
        assert_eq!((whole.wins, whole.losses, whole.errors), (8, 4, 0));
        assert_eq!(server.n_requests() - n_before, 24 - 9, "{trouble:?}");
    }
}

#[test]
fn a_refusal_of_everything_stops_at_once_and_keeps_what_there_is() {
    let folder = Folder::new();
    let server = Server::start(|n, request| match n {
        ..=3 => honest(request),
        _ => Act::status(401),
    });
    let mut config = config(&server);
    config.concurrency = 1;
    let error = run(&judge(config, &folder.cache()), &pairs(12)).unwrap_err();
    let expected = format!(
        "judge at {}/v1/chat/completions: status 401: status 401 says the server",
        server.url
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(server.n_requests(), 5);
    assert_eq!(JudgementCache::open(&folder.cache()).unwrap().len(), 4);
}

#[test]
fn a_pair_that_the_server_cannot_take_fails_alone() {
    let folder = Folder::new();
    let server = Server::start(
        |_, request| match request.question().contains("prompt 4|") {
            true => Act::Status(400, String::new(), "too long".into()),
            false => honest(request),
        },
    );
    let outcome = run(&judge(config(&server), &folder.cache()), &pairs(6)).unwrap();
    assert_eq!((outcome.wins, outcome.losses, outcome.errors), (3, 2, 1));
    let reason = "status 400: too long".to_string();
    assert_eq!(outcome.judgements[4], Judgement::Failed { reason });
}

#[test]
fn equal_completions_tie_unasked_and_equal_pairs_are_asked_once() {
    let folder = Folder::new();
    let server = Server::start(|_, request| honest(request));
    let same = Comparison::new("p", "5", "5");
    let pairs = [
        same,
        Comparison::new("p", "6", "5"),
        Comparison::new("p", "6", "5"),
        Comparison::new("p", "5", "6"),
    ];
    let outcome = run(&judge(config(&server), &folder.cache()), &pairs).unwrap();
    let verdicts: Vec<Verdict> = outcome
        .judgements
        .iter()
        .map(|judgement| match judgement {
            Judgement::Decided(decision) => decision.verdict,
            other => panic!("all are decided, got {other:?}"),
        })
        .collect();
    assert_eq!(verdicts, [Verdict::Tie, Verdict::A, Verdict::A, Verdict::B]);
    assert_eq!(server.n_requests(), 2);
}

#[test]
fn another_question_or_judge_is_asked_afresh_but_a_moved_server_is_not() {
    let folder = Folder::new();
    let server = Server::start(|_, request| honest(request));
    let elsewhere = Server::start(|_, request| honest(request));
    let asked = |change: &dyn Fn(&mut HttpJudgeConfig)| {
        let mut config = config(&server);
        config.name = Some("tiny".into());
        change(&mut config);
        let judge = judge(config, &folder.cache());
        run(&judge, &pairs(1)).unwrap();
        judge.n_requests()
    };
    assert_eq!(asked(&|_| ()), 2);
    assert_eq!(asked(&|_| ()), 0);
    assert_eq!(asked(&|c| c.base_url.clone_from(&elsewhere.url)), 0);
    assert_eq!(asked(&|c| c.timeout_s = 19.0), 0);
    assert_eq!(asked(&|c| c.name = Some("large".into())), 2);
    assert_eq!(asked(&|c| c.name = None), 2);
    assert_eq!(
        asked(&|c| c.template = TEMPLATE.replace("{{ prompt }}", "Q {{ prompt }}")),
        2
    );
    assert_eq!(asked(&|c| c.system = Some("Be strict.".into())), 2);
    assert_eq!(
        asked(&|c| {
            c.parameters.insert("temperature".into(), 1.into());
        }),
        2
    );
}

#[test]
fn requests_are_sent_side_by_side_but_never_more_than_allowed() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NOW: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    let folder = Folder::new();
    let server = Server::start(|_, request| {
        let now = NOW.fetch_add(1, Ordering::SeqCst) + 1;
        MOST.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        NOW.fetch_sub(1, Ordering::SeqCst);
        honest(request)
    });
    let mut seen = Vec::new();
    let judge = judge(config(&server), &folder.cache());
    let progress = &mut |progress: judge::Progress| seen.push((progress.done, progress.total));
    evaluate(&pairs(9), &judge, &EvalOptions::default(), progress).unwrap();
    let most = MOST.load(Ordering::SeqCst);
    assert!((2..=3).contains(&most), "{most} at the same time");
    assert_eq!(seen.first(), Some(&(0, 18)));
    assert_eq!(seen.last(), Some(&(18, 18)));
}

/// Where the child of the next test finds what it needs.
const CHILD_URL: &str = "R2Q_JUDGE_TEST_URL";
const CHILD_CACHE: &str = "R2Q_JUDGE_TEST_CACHE";

/// Not a test of its own: the process that the next test kills.
#[test]
#[ignore = "started by a_killed_judge_continues_where_it_was"]
fn judge_until_killed() {
    let mut config = HttpJudgeConfig::new(std::env::var(CHILD_URL).unwrap(), "tiny");
    config.template = TEMPLATE.into();
    config.concurrency = 1;
    let cache = std::env::var(CHILD_CACHE).unwrap();
    run(&judge(config, Path::new(&cache)), &pairs(12)).unwrap();
}

#[test]
fn a_killed_judge_continues_where_it_was() {
    const ANSWERED: usize = 7;
    let folder = Folder::new();
    let server = Server::start(|n, request| match n {
        ..ANSWERED => honest(request),
        _ => Act::Hang(Duration::from_secs(60)),
    });
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "judge_until_killed", "--ignored"])
        .env(CHILD_URL, &server.url)
        .env(CHILD_CACHE, folder.cache())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while server.n_requests() <= ANSWERED {
        assert!(start.elapsed() < Duration::from_secs(60), "the child asks");
        std::thread::sleep(Duration::from_millis(5));
    }
    // While it lives, nobody else may write.
    let error = JudgementCache::open(&folder.cache()).unwrap_err();
    assert!(matches!(error, JudgeError::CacheLocked { .. }), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();

    server.change(|_, request| honest(request));
    let n_before = server.n_requests();
    let outcome = run(&judge(config(&server), &folder.cache()), &pairs(12)).unwrap();
    assert_eq!((outcome.wins, outcome.losses, outcome.errors), (8, 4, 0));
    assert_eq!(server.n_requests() - n_before, 24 - ANSWERED);
}
