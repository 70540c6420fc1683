//! A judge behind an OpenAI-compatible server.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use ureq::Agent;

use crate::error::excerpt;
use crate::judge::{Comparison, Decision, Judge, Judgement, Progress, Verdict};
use crate::question::Question;
use crate::retry_after::retry_after;
use crate::{Answer, JudgeError, JudgementCache, QuestionKey};

/// Which server to ask, what, and how patiently.
///
/// As TOML or JSON, everything but `base_url` and `model` may be left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpJudgeConfig {
    /// Where the server is, such as `http://localhost:8000/v1`. `/v1` is added to an address
    /// without a path, and `/chat/completions` to one that does not end in it.
    pub base_url: String,
    /// The model to ask for.
    pub model: String,
    /// Stands for the address and the model where answers are kept, so that the same judge is
    /// known when its server has moved. Default: both.
    pub name: Option<String>,
    /// The environment variable that holds the API key, sent as a bearer token. Default: no key.
    pub api_key_env: Option<String>,
    /// A system message. Default: none.
    pub system: Option<String>,
    /// The question, a minijinja template of `prompt`, `first` and `second`, which must show all
    /// three and have the judge end with `[[A]]` for the first, `[[B]]` for the second, or
    /// `[[TIE]]`. Default: [`DEFAULT_TEMPLATE`].
    pub template: String,
    /// Further fields of the request. Default: `temperature` 0 and `max_tokens` 512.
    pub parameters: Map<String, Value>,
    /// Whether each pair is asked about in both orders, a disagreement being a tie. Default: yes.
    pub both_orders: bool,
    /// Requests at the same time, at least 1. Default 4.
    pub concurrency: usize,
    /// The longest a request may take, in seconds. Default 120.
    pub timeout_s: f64,
    /// How often a question is asked again after a timeout, a lost connection, or one of the
    /// statuses 408, 425, 429 and 5xx. Default 5.
    pub retries: u32,
    /// How often a question is asked again when the reply holds no verdict. Default 2.
    pub parse_retries: u32,
    /// The wait before the first retry, in seconds, doubled for each further one; the wait is drawn
    /// between half of this and all of it. Default 1.
    pub first_wait_s: f64,
    /// The longest wait, in seconds. A server that asks for a longer one by `Retry-After` has its
    /// question given up. Default 60.
    pub longest_wait_s: f64,
    /// After so many questions in a row that failed with all their retries, the others are given
    /// up unasked; at least 1. Default 8.
    pub give_up_after: usize,
}

/// The question that is asked unless another one is configured.
pub const DEFAULT_TEMPLATE: &str = "\
Compare two answers to a prompt. Judge how correct and how helpful they are. Their order and their \
length must not count.

<prompt>
{{ prompt }}
</prompt>

<answer A>
{{ first }}
</answer A>

<answer B>
{{ second }}
</answer B>

Which answer is better? End with [[A]] or [[B]], or with [[TIE]] if they are equally good.
";

impl Default for HttpJudgeConfig {
    fn default() -> Self {
        let mut parameters = Map::new();
        parameters.insert("temperature".into(), json!(0));
        parameters.insert("max_tokens".into(), json!(512));
        Self {
            base_url: String::new(),
            model: String::new(),
            name: None,
            api_key_env: None,
            system: None,
            template: DEFAULT_TEMPLATE.into(),
            parameters,
            both_orders: true,
            concurrency: 4,
            timeout_s: 120.0,
            retries: 5,
            parse_retries: 2,
            first_wait_s: 1.0,
            longest_wait_s: 60.0,
            give_up_after: 8,
        }
    }
}

impl HttpJudgeConfig {
    /// The defaults, for this server and model.
    pub fn new(base_url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            model: model.into(),
            ..Self::default()
        }
    }
}

/// A judge that asks a language model behind `/v1/chat/completions`.
///
/// Every answer is kept in a [`JudgementCache`] as soon as it comes, so that a run that was ended
/// loses none and the next one asks only for what is missing. Failed requests are not kept; a reply
/// without a verdict is, as [`Answer::Unparsed`].
///
/// Two equal completions tie without being asked about.
///
/// # Examples
///
/// ```no_run
/// use judge::{Comparison, HttpJudge, HttpJudgeConfig, Judge, JudgementCache};
///
/// let mut config = HttpJudgeConfig::new("http://localhost:8000/v1", "judge-model");
/// config.api_key_env = Some("JUDGE_API_KEY".into());
/// let cache = JudgementCache::open("judgements.jsonl".as_ref())?;
/// let judge = HttpJudge::new(config, cache)?;
/// let pairs = [Comparison::new("Say hello.", "Hello!", "Bye!")];
/// let judgements = judge.judge(&pairs, &mut |progress| eprintln!("{}", progress.done))?;
/// # Ok::<(), judge::JudgeError>(())
/// ```
pub struct HttpJudge {
    config: HttpJudgeConfig,
    url: String,
    /// Who judges, as far as it may move an answer.
    fingerprint: String,
    question: Question,
    api_key: Option<String>,
    agent: Agent,
    cache: JudgementCache,
    /// No request is sent before this time, when the server asked for a pause.
    not_before: Mutex<Option<Instant>>,
    n_requests: AtomicUsize,
}

impl HttpJudge {
    /// A judge with these settings, which keeps its answers in `cache`. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// [`JudgeError::Config`] for a setting out of range, [`JudgeError::Template`] for a template
    /// that does not show what is to be compared, and [`JudgeError::ApiKey`] when a variable is
    /// named but does not hold a key.
    pub fn new(config: HttpJudgeConfig, cache: JudgementCache) -> Result<Self, JudgeError> {
        check(&config)?;
        let url = endpoint(&config.base_url)?;
        let api_key = config.api_key_env.as_deref().map(api_key).transpose()?;
        let who = match &config.name {
            Some(name) => json!([name]),
            None => json!([url, config.model]),
        };
        let fingerprint = json!([who, config.system, config.parameters]).to_string();
        let mut agent = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(config.timeout_s)))
            .http_status_as_error(false)
            // A question belongs to one server; another address is the user's to name.
            .max_redirects(0)
            .max_redirects_will_error(false);
        if is_local(&url) {
            agent = agent.proxy(None);
        }
        Ok(Self {
            question: Question::new(&config.template)?,
            agent: agent.build().new_agent(),
            config,
            url,
            fingerprint,
            api_key,
            cache,
            not_before: Mutex::new(None),
            n_requests: AtomicUsize::new(0),
        })
    }

    /// The answers so far.
    #[must_use]
    pub fn cache(&self) -> &JudgementCache {
        &self.cache
    }

    /// Requests sent so far, retries among them.
    #[must_use]
    pub fn n_requests(&self) -> usize {
        self.n_requests.load(Ordering::Relaxed)
    }

    /// Asks a question until it has an answer that can be kept.
    fn ask(&self, asked: &Asked<'_>, stop: &AtomicBool) -> Result<Outcome, JudgeError> {
        let body = self.body(asked)?;
        let mut rng = ChaCha8Rng::seed_from_u64(asked.seed());
        let (mut n_failed, mut n_unparsed) = (0, 0);
        loop {
            if !self.await_turn(stop) {
                return Ok(Outcome::NotAsked);
            }
            self.n_requests.fetch_add(1, Ordering::Relaxed);
            match self.request(&body) {
                Ok(reply) => {
                    let answer = Question::answer(&reply);
                    n_unparsed += 1;
                    if answer != Answer::Unparsed || n_unparsed > self.config.parse_retries {
                        self.cache.record(&asked.key, answer, &reply)?;
                        return Ok(Outcome::Answered(answer, reply));
                    }
                }
                Err(Trouble::Everywhere(reason)) => {
                    return Err(JudgeError::Refused {
                        url: self.url.clone(),
                        reason: self.redact(&reason),
                    });
                }
                Err(Trouble::Here(reason)) => return Ok(Outcome::Failed(self.redact(&reason))),
                Err(Trouble::Now {
                    reason,
                    retry_after,
                }) => {
                    n_failed += 1;
                    let longest = Duration::from_secs_f64(self.config.longest_wait_s);
                    let reason = self.redact(&reason);
                    if n_failed > self.config.retries {
                        let reason = format!("{reason} ({n_failed} times)");
                        return Ok(Outcome::Failed(reason));
                    }
                    match retry_after {
                        Some(wait) if wait > longest => {
                            return Ok(Outcome::Failed(format!(
                                "{reason}; it asks to wait {} s, the longest wait is {} s",
                                wait.as_secs(),
                                self.config.longest_wait_s
                            )));
                        }
                        // What the server asks for holds for every question.
                        Some(wait) => self.pause(wait),
                        None => {
                            let doubled = 2f64.powi(n_failed.min(30) as i32 - 1);
                            let wait = (self.config.first_wait_s * doubled)
                                .min(self.config.longest_wait_s);
                            // Drawn, so that many that failed at once do not all return at once.
                            let wait = wait * rng.random_range(0.5..=1.0);
                            sleep(Instant::now() + Duration::from_secs_f64(wait), stop);
                        }
                    }
                }
            }
        }
    }

    /// The request's body.
    fn body(&self, asked: &Asked<'_>) -> Result<String, JudgeError> {
        let question = self
            .question
            .render(asked.prompt, asked.first, asked.second)?;
        let mut messages = Vec::new();
        if let Some(system) = &self.config.system {
            messages.push(json!({"role": "system", "content": system}));
        }
        messages.push(json!({"role": "user", "content": question}));
        let mut body = Map::new();
        body.insert("model".into(), self.config.model.clone().into());
        body.insert("messages".into(), messages.into());
        for (field, value) in &self.config.parameters {
            body.insert(field.clone(), value.clone());
        }
        Ok(Value::Object(body).to_string())
    }

    /// The text of one reply.
    fn request(&self, body: &str) -> Result<String, Trouble> {
        // A reply is a few sentences; a server that sends more is not a judge.
        const LONGEST: u64 = 4 << 20;
        let mut request = self
            .agent
            .post(&self.url)
            .header("content-type", "application/json");
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body).map_err(transport)?;
        let status = response.status().as_u16();
        let wait = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| retry_after(value, SystemTime::now()));
        let text = response
            .body_mut()
            .with_config()
            .limit(LONGEST)
            .read_to_string();
        if !(200..300).contains(&status) {
            let said = excerpt(text.unwrap_or_default().trim());
            return Err(refusal(status, wait, &said));
        }
        let text = text.map_err(transport)?;
        let reply = serde_json::from_str::<Value>(&text).ok().and_then(|reply| {
            let content = reply.pointer("/choices/0/message/content")?;
            content.as_str().map(String::from)
        });
        // The reply is kept and shown, so a key that a server echoes must not be in it.
        reply
            .map(|reply| self.redact(&reply))
            .ok_or_else(|| Trouble::Now {
                reason: format!(
                    "expected a chat completion with choices[0].message.content, got {}",
                    excerpt(text.trim())
                ),
                retry_after: None,
            })
    }

    /// The text without the API key, should it be there.
    fn redact(&self, text: &str) -> String {
        match &self.api_key {
            Some(key) => text.replace(key.as_str(), "***"),
            None => text.to_string(),
        }
    }

    /// Keeps all requests back for a while.
    fn pause(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut not_before = self
            .not_before
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *not_before = Some(not_before.map_or(until, |earlier| earlier.max(until)));
    }

    /// Waits until requests may be sent; `false` if there is no point in sending one any more.
    fn await_turn(&self, stop: &AtomicBool) -> bool {
        loop {
            if stop.load(Ordering::Relaxed) {
                return false;
            }
            let not_before = *self
                .not_before
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match not_before {
                Some(until) if until > Instant::now() => sleep(until, stop),
                _ => return true,
            }
        }
    }

    /// Asks the open questions and reports each as it is done.
    fn work(&self, open: &[&Asked<'_>], next: &AtomicUsize, shared: &Shared, to: &Sender<Done>) {
        while let Some(asked) = open.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = self.ask(asked, &shared.stop);
            match &outcome {
                Ok(Outcome::Answered(..)) => shared.n_in_a_row.store(0, Ordering::Relaxed),
                Ok(Outcome::Failed(_)) => {
                    let n = shared.n_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
                    if n >= self.config.give_up_after {
                        shared.stop.store(true, Ordering::Relaxed);
                    }
                }
                Ok(Outcome::NotAsked) => {}
                Err(_) => shared.stop.store(true, Ordering::Relaxed),
            }
            if to.send((asked.key.clone(), outcome)).is_err() {
                break;
            }
        }
    }

    /// Questions of a pair, A shown first and, if asked for, B shown first.
    fn questions<'a>(&self, pair: &'a Comparison) -> Vec<Asked<'a>> {
        let ask = |first: &'a str, second: &'a str| Asked {
            prompt: pair.prompt(),
            first,
            second,
            key: QuestionKey::new(
                &self.fingerprint,
                &self.config.template,
                pair.prompt(),
                first,
                second,
            ),
        };
        let (a, b) = (&*pair.a.completion, &*pair.b.completion);
        match (a == b, self.config.both_orders) {
            (true, _) => Vec::new(),
            (false, false) => vec![ask(a, b)],
            (false, true) => vec![ask(a, b), ask(b, a)],
        }
    }
}

impl fmt::Debug for HttpJudge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key stays out.
        f.debug_struct("HttpJudge")
            .field("url", &self.url)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Judge for HttpJudge {
    fn identity(&self) -> String {
        match &self.config.name {
            Some(name) => name.clone(),
            None => format!("{} at {}", self.config.model, self.url),
        }
    }

    fn judge(
        &self,
        pairs: &[Comparison],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Judgement>, JudgeError> {
        let questions: Vec<Vec<Asked<'_>>> =
            pairs.iter().map(|pair| self.questions(pair)).collect();
        let mut outcomes = HashMap::new();
        let mut open = HashMap::new();
        let mut order = Vec::new();
        for asked in questions.iter().flatten() {
            if let Some((answer, reply)) = self.cache.get(&asked.key) {
                outcomes.insert(asked.key.clone(), Outcome::Answered(answer, reply));
            } else if open.insert(&asked.key, ()).is_none() {
                // The same question asked by two pairs is sent once.
                order.push(asked);
            }
        }
        let total = outcomes.len() + order.len();
        let mut done = outcomes.len();
        progress(Progress { done, total });
        let next = AtomicUsize::new(0);
        let shared = Shared::default();
        let mut failure = None;
        thread::scope(|scope| {
            let (to, from) = channel();
            for _ in 0..self.config.concurrency.min(order.len()) {
                let (to, order, next, shared) = (to.clone(), &order, &next, &shared);
                scope.spawn(move || self.work(order, next, shared, &to));
            }
            drop(to);
            for (key, outcome) in from {
                match outcome {
                    Ok(outcome) => {
                        outcomes.insert(key, outcome);
                    }
                    Err(error) => failure = failure.take().or(Some(error)),
                }
                done += 1;
                progress(Progress { done, total });
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        let combined = questions.iter().map(|asked| {
            let of_pair = asked.iter().map(|asked| &outcomes[&asked.key]);
            combine(&of_pair.collect::<Vec<_>>(), self.config.give_up_after)
        });
        Ok(combined.collect())
    }
}

/// What workers tell each other.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Questions that failed since the last that was answered.
    n_in_a_row: AtomicUsize,
}

type Done = (QuestionKey, Result<Outcome, JudgeError>);

/// One question: two completions in the order in which they are shown.
struct Asked<'a> {
    prompt: &'a str,
    first: &'a str,
    second: &'a str,
    key: QuestionKey,
}

impl Asked<'_> {
    /// Another one for each question and process: nothing but waits is drawn from it.
    fn seed(&self) -> u64 {
        let lengths = [self.prompt, self.first, self.second].map(str::len);
        let mixed = lengths.iter().fold(std::process::id() as usize, |seed, n| {
            seed.wrapping_mul(31).wrapping_add(*n)
        });
        mixed as u64
    }
}

/// What became of a question.
enum Outcome {
    Answered(Answer, String),
    Failed(String),
    /// Too many others failed.
    NotAsked,
}

/// Why a request has no reply.
enum Trouble {
    /// It may have one later.
    Now {
        reason: String,
        retry_after: Option<Duration>,
    },
    /// This question has none.
    Here(String),
    /// No question has one.
    Everywhere(String),
}

fn transport(error: ureq::Error) -> Trouble {
    use ureq::Error;
    let reason = error.to_string();
    match error {
        Error::BadUri(_) | Error::Http(_) | Error::InvalidProxyUrl | Error::TlsRequired => {
            Trouble::Everywhere(reason)
        }
        _ => Trouble::Now {
            reason,
            retry_after: None,
        },
    }
}

/// What a status other than success means.
fn refusal(status: u16, retry_after: Option<Duration>, said: &str) -> Trouble {
    let reason = match said {
        "" => format!("status {status}"),
        said => format!("status {status}: {said}"),
    };
    match status {
        408 | 425 | 429 | 500..=599 => Trouble::Now {
            reason,
            retry_after,
        },
        // Such as a text that is too long for the model.
        400 | 413 | 422 => Trouble::Here(reason),
        _ => Trouble::Everywhere(reason),
    }
}

/// The judgement that the answers in one or both orders make; no answers mean equal completions.
fn combine(outcomes: &[&Outcome], given_up_after: usize) -> Judgement {
    let mut verdicts = Vec::new();
    for (place, outcome) in outcomes.iter().enumerate() {
        let verdict = match outcome {
            Outcome::Answered(Answer::First, _) => Verdict::A,
            Outcome::Answered(Answer::Second, _) => Verdict::B,
            Outcome::Answered(Answer::Tie, _) => Verdict::Tie,
            Outcome::Answered(Answer::Unparsed, reply) => {
                return Judgement::Unparsed {
                    reply: excerpt(reply),
                };
            }
            Outcome::Failed(reason) => {
                return Judgement::Failed {
                    reason: reason.clone(),
                };
            }
            Outcome::NotAsked => {
                return Judgement::Failed {
                    reason: format!("not asked: {given_up_after} questions in a row had failed"),
                };
            }
        };
        // In the second order, B is shown first.
        verdicts.push(if place == 0 {
            verdict
        } else {
            verdict.swapped()
        });
    }
    let (verdict, orders) = match verdicts[..] {
        [] => (Verdict::Tie, None),
        [one] => (one, None),
        [one, other, ..] if one == other => (one, Some([one, other])),
        [one, other, ..] => (Verdict::Tie, Some([one, other])),
    };
    Judgement::Decided(Decision {
        verdict,
        credit: verdict.credit(),
        rewards: None,
        orders,
    })
}

/// Sleeps until then, or until there is no point in it any more.
fn sleep(until: Instant, stop: &AtomicBool) {
    const SLICE: Duration = Duration::from_millis(20);
    while !stop.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        thread::sleep(left.min(SLICE));
    }
}

fn check(config: &HttpJudgeConfig) -> Result<(), JudgeError> {
    let require = |holds: bool, field, expected, value: String| {
        if holds {
            Ok(())
        } else {
            Err(JudgeError::Config {
                field,
                expected,
                value,
            })
        }
    };
    require(
        !config.model.trim().is_empty(),
        "model",
        "the name of a model",
        format!("{:?}", config.model),
    )?;
    require(
        config.concurrency >= 1,
        "concurrency",
        "at least 1",
        config.concurrency.to_string(),
    )?;
    require(
        config.give_up_after >= 1,
        "give_up_after",
        "at least 1",
        config.give_up_after.to_string(),
    )?;
    // A day: beyond it, clocks of some systems overflow.
    const LONGEST_S: f64 = 86_400.0;
    for (field, value, lowest) in [
        ("timeout_s", config.timeout_s, f64::MIN_POSITIVE),
        ("first_wait_s", config.first_wait_s, 0.0),
        ("longest_wait_s", config.longest_wait_s, 0.0),
    ] {
        let expected = if lowest > 0.0 {
            "above 0 and at most a day, in seconds"
        } else {
            "between 0 and a day, in seconds"
        };
        require(
            (lowest..=LONGEST_S).contains(&value),
            field,
            expected,
            value.to_string(),
        )?;
    }
    for reserved in ["model", "messages", "stream"] {
        require(
            !config.parameters.contains_key(reserved),
            "parameters",
            "fields other than model, messages and stream",
            reserved.into(),
        )?;
    }
    Ok(())
}

/// Where to send questions.
fn endpoint(base_url: &str) -> Result<String, JudgeError> {
    const PATH: &str = "/chat/completions";
    let wrong = |expected| JudgeError::Config {
        field: "base_url",
        expected,
        // What may be a password is not shown.
        value: match base_url.contains('@') {
            true => "one with an @ in it".into(),
            false => format!("{base_url:?}"),
        },
    };
    let trimmed = base_url.trim().trim_end_matches('/');
    let Some((scheme @ ("http" | "https"), rest)) = trimmed.split_once("://") else {
        return Err(wrong("an address that begins with http:// or https://"));
    };
    let (host, path) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, ""),
    };
    if host.contains('@') {
        return Err(wrong(
            "without a password; api_key_env names where a key is",
        ));
    }
    if host.is_empty() || path.contains(['?', '#']) || host.contains(['?', '#']) {
        return Err(wrong("an address with a host and without a query"));
    }
    let path = match path {
        "" => format!("/v1{PATH}"),
        path if path.ends_with(PATH) => path.into(),
        path => format!("{path}{PATH}"),
    };
    Ok(format!("{scheme}://{host}{path}"))
}

/// Whether the address is this machine, which no proxy stands before.
fn is_local(url: &str) -> bool {
    let host = url.split("://").nth(1).unwrap_or_default();
    ["127.0.0.1", "localhost", "[::1]"].iter().any(|local| {
        let rest = host.strip_prefix(local);
        rest.is_some_and(|rest| rest.starts_with([':', '/']))
    })
}

fn api_key(variable: &str) -> Result<String, JudgeError> {
    let wrong = |problem| JudgeError::ApiKey {
        variable: variable.into(),
        problem,
    };
    let key = std::env::var(variable).map_err(|error| {
        wrong(match error {
            std::env::VarError::NotPresent => "is not set",
            std::env::VarError::NotUnicode(_) => "holds something else than text",
        })
    })?;
    let key = key.trim();
    if key.is_empty() {
        return Err(wrong("is empty"));
    }
    if !key.chars().all(|c| c.is_ascii_graphic()) {
        return Err(wrong("holds characters that no key has"));
    }
    Ok(key.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_completed_as_users_write_them() {
        for (given, expected) in [
            (
                "http://localhost:8000",
                "http://localhost:8000/v1/chat/completions",
            ),
            ("http://h/v1/", "http://h/v1/chat/completions"),
            ("https://h/api/v3", "https://h/api/v3/chat/completions"),
            (
                "https://h/x/chat/completions",
                "https://h/x/chat/completions",
            ),
        ] {
            assert_eq!(endpoint(given).unwrap(), expected);
        }
        for given in [
            "",
            "localhost:8000",
            "ftp://h",
            "http://",
            "http://h/v1?key=1",
        ] {
            assert!(endpoint(given).is_err(), "{given}");
        }
    }

    #[test]
    fn a_password_in_the_address_is_refused_and_not_shown() {
        let message = endpoint("http://me:hunter2@host/v1")
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("api_key_env") && !message.contains("hunter2"),
            "{message}"
        );
    }

    #[test]
    fn only_this_machine_is_local() {
        assert!(is_local("http://127.0.0.1:80/v1"));
        assert!(is_local("http://localhost/v1"));
        assert!(!is_local("http://localhost.example.org/v1"));
        assert!(!is_local("https://api.example.org/v1"));
    }

    #[test]
    fn a_setting_out_of_range_is_refused_by_name() {
        let good = HttpJudgeConfig::new("http://h", "m");
        let refused = |change: fn(&mut HttpJudgeConfig)| {
            let mut config = good.clone();
            change(&mut config);
            let judge = HttpJudge::new(config, JudgementCache::in_memory());
            judge.unwrap_err().to_string()
        };
        assert!(refused(|c| c.model.clear()).starts_with("model must be"));
        assert!(refused(|c| c.concurrency = 0).starts_with("concurrency must be"));
        assert!(refused(|c| c.give_up_after = 0).starts_with("give_up_after must be"));
        assert!(refused(|c| c.timeout_s = 0.0).starts_with("timeout_s must be"));
        assert!(refused(|c| c.timeout_s = f64::NAN).starts_with("timeout_s must be"));
        assert!(refused(|c| c.first_wait_s = -1.0).starts_with("first_wait_s must be"));
        let message = refused(|c| {
            c.parameters.insert("stream".into(), true.into());
        });
        assert!(message.contains("got stream"), "{message}");
    }

    #[test]
    fn a_variable_without_a_key_is_named() {
        let mut config = HttpJudgeConfig::new("http://h", "m");
        config.api_key_env = Some("JUDGE_TEST_NO_SUCH_VARIABLE".into());
        let error = HttpJudge::new(config, JudgementCache::in_memory()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "environment variable JUDGE_TEST_NO_SUCH_VARIABLE should hold the judge's API key, \
             but is not set"
        );
    }

    #[test]
    fn orders_that_disagree_tie() {
        let answered = |answer| Outcome::Answered(answer, String::new());
        let of = |first, second| match combine(&[&answered(first), &answered(second)], 0) {
            Judgement::Decided(decision) => (decision.verdict, decision.orders.unwrap()),
            other => panic!("both are answered, got {other:?}"),
        };
        use Answer::{First, Second, Tie};
        // The second question shows B first, so opposite answers agree.
        assert_eq!(of(First, Second), (Verdict::A, [Verdict::A; 2]));
        assert_eq!(of(Second, First), (Verdict::B, [Verdict::B; 2]));
        assert_eq!(of(First, First), (Verdict::Tie, [Verdict::A, Verdict::B]));
        assert_eq!(of(Second, Second), (Verdict::Tie, [Verdict::B, Verdict::A]));
        assert_eq!(of(Tie, Second), (Verdict::Tie, [Verdict::Tie, Verdict::A]));
        assert_eq!(of(Tie, Tie), (Verdict::Tie, [Verdict::Tie; 2]));
    }
}
