//! What is written of a scored row: lines of JSON, a row of the page, figures to add up.

use std::borrow::Cow;
use std::sync::OnceLock;

use dpo_loss::Beta;
use implicit_reward::{Candidate, TokenReadout, running_sums};
use lm::data::DataReport;
use lm::tokenizer::{Tokenizer, TokenizerError};
use report::{Card, PageRow, ScorePage, ScoredCompletion, ScoredRow, ScoredToken, TokenScores};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

use super::ScoreOptions;
use super::read::RowReadouts;
use super::rows::{Item, Side};

/// Readable texts of token ids, made when they are first asked for.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    tokenizer: &'a Tokenizer,
    words: Vec<OnceLock<String>>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, vocab_size: usize) -> Self {
        Self {
            tokenizer,
            words: (0..vocab_size).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The text of one id; the vocabulary's own spelling where it is no text by itself.
    pub(super) fn word(&self, id: u32) -> &str {
        self.words[id as usize].get_or_init(|| {
            let stored = self.tokenizer.token(id).unwrap_or_default();
            let text = self.tokenizer.decode(&[id], false).unwrap_or_default();
            if text.is_empty() || text.contains('\u{fffd}') {
                return stored;
            }
            // Some decoders drop the space before the first word of a text.
            let spaced = stored.starts_with('\u{2581}') && !text.starts_with(' ');
            if spaced { format!(" {text}") } else { text }
        })
    }
}

/// A completion as a line of `scores.jsonl`; the lists have an entry for each token.
struct Line<'a> {
    item: &'a Item,
    side: &'a Side,
    prompt: &'a str,
    tokens: &'a [Option<TokenReadout>],
    texts: &'a [Cow<'a, str>],
    total: &'a Total,
    /// Chosen less rejected, reward units; of a pair.
    margin: Option<f64>,
    beta: Beta,
    vocabulary: &'a Vocabulary<'a>,
}

impl<'a> Serialize for Line<'a> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (total, beta) = (self.total, self.beta);
        let column = |of: fn(&TokenReadout, Beta) -> f64| {
            let tokens = self.tokens.iter();
            List(tokens.map(move |t| t.as_ref().map(|t| of(t, beta) as f32)))
        };
        // A token that is not scored earns nothing: the policy did not choose it.
        let reward = |t: &Option<TokenReadout>| t.as_ref().map_or(0.0, |t| t.implicit_reward(beta));
        let rewards: Vec<f64> = self.tokens.iter().map(reward).collect();
        let running = running_sums(&rewards);

        let mut line = serializer.serialize_map(None)?;
        line.serialize_entry("row", &self.item.row)?;
        line.serialize_entry("side", self.side.name)?;
        line.serialize_entry("prompt", self.prompt)?;
        line.serialize_entry("reward", &total.reward)?;
        if let Some(margin) = self.margin {
            line.serialize_entry("margin", &margin)?;
        }
        line.serialize_entry("policy_logp", &total.policy_logp)?;
        line.serialize_entry("reference_logp", &total.reference_logp)?;
        line.serialize_entry("n_scored", &total.n_scored)?;
        line.serialize_entry("ids", &self.side.ids)?;
        line.serialize_entry("tokens", self.texts)?;
        line.serialize_entry("policy_logps", &column(|t, _| t.policy_logp))?;
        line.serialize_entry("reference_logps", &column(|t, _| t.reference_logp))?;
        line.serialize_entry("rewards", &column(TokenReadout::implicit_reward))?;
        line.serialize_entry("running_rewards", &List(running.iter().map(|&x| x as f32)))?;
        line.serialize_entry(
            "max_ent_advantages",
            &column(TokenReadout::max_ent_advantage),
        )?;
        line.serialize_entry("policy_entropies", &column(|t, _| t.policy_entropy))?;
        line.serialize_entry("policy_kls", &column(|t, _| t.policy_kl))?;
        line.serialize_entry("reference_kls", &column(|t, _| t.reference_kl))?;
        if self
            .tokens
            .iter()
            .flatten()
            .any(|t| !t.candidates.is_empty())
        {
            let alternatives = |t: &'a TokenReadout| Alternatives {
                candidates: &t.candidates,
                beta,
                vocabulary: self.vocabulary,
            };
            let tokens = self.tokens.iter();
            let alternatives = List(tokens.map(|t| t.as_ref().map(alternatives)));
            line.serialize_entry("alternatives", &alternatives)?;
        }
        line.end()
    }
}

struct Alternatives<'a> {
    candidates: &'a [Candidate],
    beta: Beta,
    vocabulary: &'a Vocabulary<'a>,
}

impl Serialize for Alternatives<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let candidates = || self.candidates.iter();
        let numbers = |of: fn(&Candidate, Beta) -> f64| {
            let beta = self.beta;
            List(candidates().map(move |c| of(c, beta) as f32))
        };
        let words = candidates().map(|c| self.vocabulary.word(c.id));
        let mut lists = serializer.serialize_map(None)?;
        lists.serialize_entry("ids", &List(candidates().map(|c| c.id)))?;
        lists.serialize_entry("tokens", &List(words))?;
        lists.serialize_entry("policy_logps", &numbers(|c, _| c.policy_logp))?;
        lists.serialize_entry("reference_logps", &numbers(|c, _| c.reference_logp))?;
        lists.serialize_entry("rewards", &numbers(Candidate::advantage))?;
        lists.end()
    }
}

/// What an iterator gives, written as a list without being one.
struct List<I>(I);

impl<I: Iterator<Item: Serialize> + Clone> Serialize for List<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.clone())
    }
}

/// About what a token takes in a line, with five alternatives: no line is moved as it grows.
const TOKEN_BYTES: usize = 400;

/// How many of a window's rows there is room for: its first ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub page: usize,
    /// Rows of the page that are shown too.
    pub terminal: usize,
}

impl Room {
    /// Whether the row at some place of the window goes to the page, and to the terminal.
    pub(super) fn at(self, index: usize) -> [bool; 2] {
        let page = index < self.page;
        [page, page && index < self.terminal]
    }
}

/// What is written of a row.
#[derive(Clone, Debug)]
pub(super) struct Written {
    /// A line for each completion.
    pub lines: Vec<u8>,
    /// The row as the page holds it, if there is room.
    pub for_page: Option<PageRow>,
    /// The row for the terminal, if it is to be shown.
    pub for_terminal: Option<ScoredRow>,
    pub figures: Figures,
}

impl Written {
    pub(super) fn new(
        item: &Item,
        readouts: &RowReadouts,
        beta: Beta,
        (tokenizer, vocabulary): (&Tokenizer, &Vocabulary<'_>),
        [to_page, to_terminal]: [bool; 2],
    ) -> Result<Self, TokenizerError> {
        let n_prompt = item.prompt_ids.len();
        let mut prompt = String::new();
        let mut texts = Vec::with_capacity(item.sides.len());
        for side in &item.sides {
            // A completion's tokens are read behind their prompt: spaces and letters of several
            // tokens come out as in the text.
            let ids: Vec<u32> = item.prompt_ids.iter().chain(&side.ids).copied().collect();
            let mut pieces = tokenizer.decode_pieces(&ids)?;
            texts.push(pieces.split_off(n_prompt));
            prompt = pieces.concat();
        }
        let totals: Vec<Total> = readouts
            .iter()
            .map(|tokens| Total::of(tokens, beta))
            .collect();
        let margin = match &totals[..] {
            [chosen, rejected] => Some(chosen.reward - rejected.reward),
            _ => None,
        };
        let n_tokens: usize = item.sides.iter().map(|side| side.ids.len()).sum();
        let mut lines = Vec::with_capacity(n_tokens * TOKEN_BYTES);
        for (((side, tokens), texts), total) in
            item.sides.iter().zip(readouts).zip(&texts).zip(&totals)
        {
            let line = Line {
                item,
                side,
                prompt: &prompt,
                tokens,
                texts,
                total,
                margin,
                beta,
                vocabulary,
            };
            serde_json::to_writer(&mut lines, &line).expect("numbers and texts are JSON");
            lines.push(b'\n');
        }
        let row = to_page.then(|| ScoredRow {
            name: item.place.clone(),
            prompt,
            completions: item
                .sides
                .iter()
                .zip(readouts)
                .zip(texts)
                .zip(&totals)
                .map(|(((side, tokens), texts), total)| completion(side, tokens, texts, total))
                .collect(),
        });
        Ok(Self {
            lines,
            for_page: row.as_ref().map(|row| PageRow::new(row, beta.get())),
            for_terminal: row.filter(|_| to_terminal),
            figures: Figures::of(&totals, margin),
        })
    }
}

fn completion(
    side: &Side,
    tokens: &[Option<TokenReadout>],
    texts: Vec<Cow<'_, str>>,
    total: &Total,
) -> ScoredCompletion {
    let readout = |token: &TokenReadout| TokenScores {
        policy_logp: token.policy_logp,
        reference_logp: token.reference_logp,
        entropy: token.policy_entropy,
        kl: token.policy_kl,
        alternatives: token
            .candidates
            .iter()
            .map(|c| (c.id, c.policy_logp, c.reference_logp))
            .collect(),
    };
    ScoredCompletion {
        label: side.name.to_string(),
        total: total.reward,
        tokens: side
            .ids
            .iter()
            .zip(tokens)
            .zip(texts)
            .map(|((&id, token), text)| ScoredToken {
                text: text.into_owned(),
                id,
                readout: token.as_ref().map(readout),
            })
            .collect(),
    }
}

/// Sums over the scored tokens of a completion.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    n_scored: usize,
    reward: f64,
    policy_logp: f64,
    reference_logp: f64,
    entropy: f64,
    policy_kl: f64,
    reference_kl: f64,
}

impl Total {
    fn of(tokens: &[Option<TokenReadout>], beta: Beta) -> Self {
        let mut total = Self::default();
        for token in tokens.iter().flatten() {
            total.n_scored += 1;
            total.reward += token.implicit_reward(beta);
            total.policy_logp += token.policy_logp;
            total.reference_logp += token.reference_logp;
            total.entropy += token.policy_entropy;
            total.policy_kl += token.policy_kl;
            total.reference_kl += token.reference_kl;
        }
        total
    }
}

/// Sums over rows, for the summary.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures {
    n_rows: usize,
    n_pairs: usize,
    n_completions: usize,
    /// Pairs whose chosen completion has strictly more reward.
    n_ahead: usize,
    margin: f64,
    /// By side: the first completion of each row, and the second.
    rewards: [f64; 2],
    all: Total,
}

impl Figures {
    fn of(totals: &[Total], margin: Option<f64>) -> Self {
        let mut figures = Self {
            n_rows: 1,
            n_pairs: usize::from(margin.is_some()),
            n_completions: totals.len(),
            n_ahead: usize::from(margin.is_some_and(|margin| margin > 0.0)),
            margin: margin.unwrap_or(0.0),
            ..Self::default()
        };
        for (total, reward) in totals.iter().zip(&mut figures.rewards) {
            *reward = total.reward;
            figures.all.add(total);
        }
        figures
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.n_rows += other.n_rows;
        self.n_pairs += other.n_pairs;
        self.n_completions += other.n_completions;
        self.n_ahead += other.n_ahead;
        self.margin += other.margin;
        for (sum, reward) in self.rewards.iter_mut().zip(other.rewards) {
            *sum += reward;
        }
        self.all.add(&other.all);
    }

    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    pub(super) fn n_tokens(&self) -> usize {
        self.all.n_scored
    }

    pub(super) fn summary(&self, beta: Beta) -> Map<String, Value> {
        let mut summary = Map::new();
        let mut add = |key: &str, value: Value| summary.insert(key.to_string(), value);
        let rows = self.n_rows.max(1) as f64;
        let tokens = self.all.n_scored.max(1) as f64;
        add("beta", beta.get().into());
        add("rows", self.n_rows.into());
        add("completions", self.n_completions.into());
        add("tokens", self.all.n_scored.into());
        if self.n_pairs > 0 {
            let pairs = self.n_pairs as f64;
            add("rewards/chosen", (self.rewards[0] / pairs).into());
            add("rewards/rejected", (self.rewards[1] / pairs).into());
            add("rewards/margins", (self.margin / pairs).into());
            add("rewards/accuracies", (self.n_ahead as f64 / pairs).into());
        } else {
            add("rewards", (self.rewards[0] / rows).into());
        }
        add("reward_per_token", (self.all.reward / tokens).into());
        add(
            "policy_logp_per_token",
            (self.all.policy_logp / tokens).into(),
        );
        add(
            "reference_logp_per_token",
            (self.all.reference_logp / tokens).into(),
        );
        add(
            "policy_entropy_per_token",
            (self.all.entropy / tokens).into(),
        );
        add("policy_kl_per_token", (self.all.policy_kl / tokens).into());
        add(
            "reference_kl_per_token",
            (self.all.reference_kl / tokens).into(),
        );
        summary
    }
}

impl Total {
    fn add(&mut self, other: &Self) {
        self.n_scored += other.n_scored;
        self.reward += other.reward;
        self.policy_logp += other.policy_logp;
        self.reference_logp += other.reference_logp;
        self.entropy += other.entropy;
        self.policy_kl += other.policy_kl;
        self.reference_kl += other.reference_kl;
    }
}

/// The page of the first rows.
pub(super) fn page(
    page: &ScorePage,
    options: &ScoreOptions,
    summary: &Map<String, Value>,
    report: &DataReport,
    n_rows: usize,
) -> String {
    let number = |key: &str| summary.get(key).and_then(Value::as_f64);
    let mut cards = Vec::new();
    let mut card = |label: &str, value: Option<String>, note: &str| {
        cards.extend(value.map(|value| Card {
            label: label.into(),
            value,
            note: note.into(),
        }));
    };
    let signed = |key: &str| number(key).map(|x| format!("{x:+.3}").replace('-', "\u{2212}"));
    let share = number("rewards/accuracies").map(|x| format!("{:.1}%", 100.0 * x));
    let ahead = "share of pairs whose chosen completion has more reward";
    card("Chosen ahead", share, ahead);
    card(
        "Mean margin (reward units)",
        signed("rewards/margins"),
        "chosen less rejected",
    );
    card(
        "Mean reward of chosen",
        signed("rewards/chosen"),
        "reward units",
    );
    card(
        "Mean reward of rejected",
        signed("rewards/rejected"),
        "reward units",
    );
    card(
        "Mean reward",
        signed("rewards"),
        "reward units a completion",
    );
    let kl = number("policy_kl_per_token").map(|x| format!("{x:.4}"));
    card(
        "KL from the reference",
        kl,
        "nats a token, at the states of this file",
    );
    let tokens = number("tokens").map(|x| format!("{x:.0}"));
    let rate = number("tokens_per_second").map(|x| format!("{x:.0} a second"));
    card("Tokens scored", tokens, &rate.unwrap_or_default());

    let mut notes = vec![
        "A token's reward is \u{3b2} log(policy/reference): at an optimum its reward plus the \
         change of the soft value, not its reward alone. Rewards of different prompts have no \
         common origin."
            .to_string(),
    ];
    if page.n_rows() < n_rows {
        notes.push(format!(
            "The first {} of {n_rows} rows are shown; scores.jsonl holds all.",
            page.n_rows()
        ));
    }
    if report.n_dropped() > 0 {
        notes.push(format!("Rows left out: {}.", report.drop_summary()));
    }
    let subtitle = format!(
        "{}\npolicy {}, reference {}, \u{3b2} {}",
        options.command,
        options.policy.display(),
        options.reference.display(),
        number("beta").unwrap_or_default()
    );
    let name = options
        .data
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    page.to_html(&format!("Scores of {name}"), &subtitle, &cards, &notes)
}
