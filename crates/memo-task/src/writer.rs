//! Writers of completions: good ones in varied wording, and ones that err.

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::vocab::{
    ARRIVE_VERBS, ASIDES, CLOSERS, CUES, EOS, FRONT_CUES, MOVE_VERBS, OPENERS, SEND_VERBS, Vocab,
};
use crate::{Fact, Memo, MemoConfig, MemoError, Reader, RewardKind, TokenReward};

/// Pairs of facts that are never both wrong in one completion outside
/// [`Split::Unseen`](crate::Split::Unseen), where one of these pairs is wrong in each completion.
pub const UNSEEN_TOGETHER: [(Fact, Fact); 2] =
    [(Fact::Amount, Fact::Place), (Fact::Recipient, Fact::Day)];

/// One deliberate flaw of a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorruptionKind {
    /// The fact is stated with another value than the memo's.
    Wrong(Fact),
    /// The fact is left out.
    Omitted(Fact),
    /// A phrase that says nothing.
    Filler,
    /// A sentence that states facts again.
    Repeat,
}

/// A flaw and the tokens where its penalty stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corruption {
    /// What is wrong.
    pub kind: CorruptionKind,
    /// Indices into [`Completion::ids`], without gaps. For an omission, the end-of-text token.
    pub positions: std::ops::Range<usize>,
}

/// A summary with its true rewards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The text, beginning with a space and without the end-of-text token.
    pub text: String,
    /// The tokens, ending with the end-of-text token. `[seq]`
    pub ids: Vec<u32>,
    /// The true reward of each token, in reward units. `[seq]`
    pub rewards: Vec<f64>,
    /// Why each token earned its reward. `[seq]`
    pub kinds: Vec<RewardKind>,
    /// The fact whose role each value token stands in. `[seq]`
    pub facts: Vec<Option<Fact>>,
    /// The flaws that were put in, in no particular order.
    pub corruptions: Vec<Corruption>,
}

impl Completion {
    /// The summed true reward, in reward units.
    pub fn total_reward(&self) -> f64 {
        self.rewards.iter().sum()
    }

    /// Whether the completion has this flaw.
    pub fn has(&self, kind: CorruptionKind) -> bool {
        self.corruptions
            .iter()
            .any(|corruption| corruption.kind == kind)
    }

    /// Whether the completion has two wrong facts that training data never shows together.
    pub fn has_unseen_combination(&self) -> bool {
        UNSEEN_TOGETHER.iter().any(|(a, b)| {
            self.has(CorruptionKind::Wrong(*a)) && self.has(CorruptionKind::Wrong(*b))
        })
    }
}

/// What a completion is to say and how it is to err.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    omitted: [bool; 7],
    wrong: [Option<String>; 7],
    filler: bool,
    repeat: bool,
}

impl Plan {
    /// Flaws by the rates of the configuration, independently, but with the pairs of
    /// [`UNSEEN_TOGETHER`] kept apart, or with one of them forced.
    pub(crate) fn draw(
        vocab: &Vocab,
        config: &MemoConfig,
        memo: &Memo,
        unseen: bool,
        rng: &mut impl Rng,
    ) -> Self {
        let mut omitted = Fact::ALL.map(|_| rng.random_bool(config.omit_rate));
        let mut wrong =
            Fact::ALL.map(|fact| rng.random_bool(wrong_rate(vocab, config, memo, fact)));
        if unseen {
            let (a, b) = UNSEEN_TOGETHER[rng.random_range(0..UNSEEN_TOGETHER.len())];
            for fact in [a, b] {
                wrong[fact.index()] = true;
                omitted[fact.index()] = false;
            }
        } else {
            for (a, b) in UNSEEN_TOGETHER {
                if wrong[a.index()] && wrong[b.index()] {
                    let spared = if rng.random_bool(0.5) { a } else { b };
                    wrong[spared.index()] = false;
                }
            }
        }
        let mut plan = Self {
            omitted,
            filler: rng.random_bool(config.filler_rate),
            repeat: rng.random_bool(config.repeat_rate),
            ..Self::default()
        };
        for fact in Fact::ALL {
            if wrong[fact.index()] && !omitted[fact.index()] {
                let value = wrong_value(vocab, config, memo, fact, rng);
                plan.wrong[fact.index()] = Some(value);
            }
        }
        plan
    }
}

/// The probability that writers state a fact of this memo wrongly.
pub(crate) fn wrong_rate(vocab: &Vocab, config: &MemoConfig, memo: &Memo, fact: Fact) -> f64 {
    if vocab.values(fact).is_usual(memo.value(fact)) {
        config.usual_wrong_rate
    } else {
        config.unusual_wrong_rate
    }
}

/// A value for a fact that is not the memo's.
fn wrong_value(
    vocab: &Vocab,
    config: &MemoConfig,
    memo: &Memo,
    fact: Fact,
    rng: &mut impl Rng,
) -> String {
    let values = vocab.values(fact);
    let right = memo.value(fact);
    if rng.random_bool(config.lookalike_rate) {
        values.lookalike(right).to_owned()
    } else {
        values.draw(Some(right), rng).to_owned()
    }
}

/// A completion under construction.
#[derive(Debug, Default)]
struct Draft {
    tokens: Vec<String>,
    corruptions: Vec<Corruption>,
}

impl Draft {
    fn push(&mut self, token: &str) {
        self.tokens.push(token.to_owned());
    }

    /// Adds a value, wrong where the plan says so.
    fn value(&mut self, memo: &Memo, plan: &Plan, fact: Fact) {
        let wrong = plan.wrong[fact.index()].as_deref();
        if wrong.is_some() {
            self.note(CorruptionKind::Wrong(fact), 1);
        }
        let value = wrong.unwrap_or_else(|| memo.value(fact));
        self.push(&format!(" {value}"));
    }

    fn phrase(&mut self, words: &[&str]) {
        self.note(CorruptionKind::Filler, words.len());
        for word in words {
            self.push(word);
        }
    }

    /// Records a flaw of the next `len` tokens.
    fn note(&mut self, kind: CorruptionKind, len: usize) {
        let start = self.tokens.len();
        self.corruptions.push(Corruption {
            kind,
            positions: start..start + len,
        });
    }
}

/// Probability that a completion with a sender has the goods as its subject.
const GOODS_FIRST_RATE: f64 = 0.25;
/// Probability that place, day or time stands in front.
const FRONT_RATE: f64 = 0.2;
/// Probability that the second sentence takes the last parts.
const SECOND_SENTENCE_RATE: f64 = 0.3;
/// Probability that the parts behind the core are shuffled.
const SHUFFLE_RATE: f64 = 0.4;

/// Words a completion by the plan. Grammatical by construction: the [`Reader`] finds the flaws of
/// the plan and no others.
pub(crate) fn write(
    vocab: &Vocab,
    memo: &Memo,
    plan: &Plan,
    rng: &mut impl Rng,
) -> (Vec<u32>, Vec<Corruption>) {
    let mut draft = Draft::default();
    let says = |fact: Fact| !plan.omitted[fact.index()];

    let goods_first = !says(Fact::Sender) || rng.random_bool(GOODS_FIRST_RATE);
    let mut parts: Vec<Fact> = Vec::new();
    if goods_first {
        parts.push(Fact::Sender);
    }
    parts.extend([Fact::Recipient, Fact::Place, Fact::Day, Fact::Time]);
    parts.retain(|fact| says(*fact));
    if rng.random_bool(SHUFFLE_RATE) {
        shuffle(&mut parts, rng);
    }

    // Where a filler phrase goes, if at all: in front, behind one of the parts, or at the end.
    let filler_at = plan.filler.then(|| rng.random_range(0..3_u32));

    if filler_at == Some(0) {
        draft.phrase(OPENERS[rng.random_range(0..OPENERS.len())]);
        draft.push(",");
    } else if rng.random_bool(FRONT_RATE)
        && let Some(at) = parts.iter().position(|fact| front_cue(*fact).is_some())
    {
        let fact = parts.remove(at);
        draft.push(front_cue(fact).unwrap_or_default());
        draft.value(memo, plan, fact);
        draft.push(",");
    }

    let in_front = draft.tokens.is_empty();
    if !goods_first {
        draft.value(memo, plan, Fact::Sender);
        draft.push(pick_verb(SEND_VERBS, rng));
    }
    if says(Fact::Amount) {
        draft.value(memo, plan, Fact::Amount);
    }
    let capital = in_front && goods_first && !says(Fact::Amount);
    draft.push(if capital { " Crates" } else { " crates" });
    if says(Fact::Item) {
        draft.push(" of");
        draft.value(memo, plan, Fact::Item);
    }
    if goods_first {
        draft.push(pick_verb(MOVE_VERBS, rng));
    }

    // People stay in the first sentence: `They arrive to Peter` is no English.
    let is_person = |fact: &Fact| matches!(fact, Fact::Sender | Fact::Recipient);
    let mut second: Vec<Fact> = Vec::new();
    if rng.random_bool(SECOND_SENTENCE_RATE) {
        parts.sort_by_key(|fact| !is_person(fact));
        let n_people = parts.iter().filter(|fact| is_person(fact)).count();
        if n_people < parts.len() {
            second = parts.split_off(rng.random_range(n_people..parts.len()));
        }
    }
    let n_parts = parts.len() + second.len();
    let aside_behind = (filler_at == Some(1)).then(|| rng.random_range(0..n_parts.max(1)));
    let mut n_said = 0;
    for (sentence, facts) in [&parts, &second].into_iter().enumerate() {
        if sentence == 1 {
            if second.is_empty() {
                break;
            }
            draft.push(".");
            draft.push(" They");
            draft.push(pick_verb(ARRIVE_VERBS, rng));
        }
        for (i, fact) in facts.iter().enumerate() {
            draft.push(pick_cue(*fact, rng));
            draft.value(memo, plan, *fact);
            if aside_behind == Some(n_said) {
                draft.push(",");
                draft.phrase(ASIDES[rng.random_range(0..ASIDES.len())]);
                if i + 1 < facts.len() {
                    draft.push(",");
                }
            }
            n_said += 1;
        }
    }
    draft.push(".");

    // Facts are only said again where they are right, so that a repeat costs filler alone.
    if plan.repeat && second.is_empty() {
        let all_said = [
            Fact::Sender,
            Fact::Recipient,
            Fact::Place,
            Fact::Day,
            Fact::Time,
        ]
        .into_iter()
        .all(says);
        let mut again = vec![Fact::Place, Fact::Day, Fact::Time];
        again.retain(|fact| plan.wrong[fact.index()].is_none());
        if all_said && !again.is_empty() {
            again.truncate(rng.random_range(1..=2));
            draft.note(CorruptionKind::Repeat, 2 + 2 * again.len() + 1);
            draft.push(" They");
            draft.push(pick_verb(ARRIVE_VERBS, rng));
            for fact in again {
                draft.push(pick_cue(fact, rng));
                draft.value(memo, plan, fact);
            }
            draft.push(".");
        }
    }
    if filler_at == Some(2) {
        draft.phrase(CLOSERS[rng.random_range(0..CLOSERS.len())]);
    }

    for fact in Fact::ALL {
        if !says(fact) {
            draft.note(CorruptionKind::Omitted(fact), 1);
        }
    }
    let mut ids: Vec<u32> = draft
        .tokens
        .iter()
        .flat_map(|token| vocab.encode(token))
        .collect();
    ids.push(EOS);
    (ids, draft.corruptions)
}

/// A completion of given tokens: its text and its true rewards.
pub(crate) fn complete(
    vocab: &Vocab,
    reader: Reader<'_>,
    ids: Vec<u32>,
    corruptions: Vec<Corruption>,
) -> Completion {
    let rewards = read(reader, &ids);
    Completion {
        text: vocab.decode(&ids),
        rewards: rewards.iter().map(|token| token.reward).collect(),
        kinds: rewards.iter().map(|token| token.kind).collect(),
        facts: rewards.iter().map(|token| token.fact).collect(),
        ids,
        corruptions,
    }
}

/// The rewards of a whole text; one that has no end pays for it on its last token.
pub(crate) fn read(mut reader: Reader<'_>, ids: &[u32]) -> Vec<TokenReward> {
    let mut rewards: Vec<TokenReward> = ids.iter().map(|id| reader.step(*id)).collect();
    if !reader.ended()
        && let Some(last) = rewards.last_mut()
    {
        last.reward += reader.truncation();
        last.kind = RewardKind::Truncated;
    }
    rewards
}

/// The plainest perfect summary.
pub(crate) fn write_best(vocab: &Vocab, memo: &Memo) -> Vec<u32> {
    let Memo {
        sender,
        recipient,
        amount,
        item,
        place,
        day,
        time,
    } = memo;
    let text = format!(
        " {sender} sends {amount} crates of {item} to {recipient} in {place} on {day} at {time}."
    );
    let mut ids = vocab.encode(&text);
    ids.push(EOS);
    ids
}

/// The same completion with wrong values at the first statement of some facts.
pub(crate) fn corrupt(
    vocab: &Vocab,
    config: &MemoConfig,
    memo: &Memo,
    completion: &Completion,
    facts: &[Fact],
    rng: &mut impl Rng,
) -> Result<(Vec<u32>, Vec<Corruption>), MemoError> {
    let mut ids = completion.ids.clone();
    let mut corruptions = completion.corruptions.clone();
    for &fact in facts {
        let at = (0..ids.len())
            .find(|at| {
                completion.kinds[*at] == RewardKind::Right && completion.facts[*at] == Some(fact)
            })
            .ok_or_else(|| MemoError::NotStated {
                fact,
                text: completion.text.clone(),
            })?;
        let value = wrong_value(vocab, config, memo, fact, rng);
        ids[at] = vocab
            .id(&format!(" {value}"))
            .ok_or(MemoError::UnknownValue { fact, value })?;
        let kind = CorruptionKind::Wrong(fact);
        corruptions.push(Corruption {
            kind,
            positions: at..at + 1,
        });
    }
    Ok((ids, corruptions))
}

fn front_cue(fact: Fact) -> Option<&'static str> {
    FRONT_CUES
        .iter()
        .find(|(_, role)| *role == fact)
        .map(|(cue, _)| *cue)
}

/// One of the words before a value; the second is right and rare.
fn pick_cue(fact: Fact, rng: &mut impl Rng) -> &'static str {
    const RARE_CUE_RATE: f64 = 0.2;
    let cues: Vec<&str> = CUES
        .iter()
        .filter(|(_, role)| *role == fact)
        .map(|(cue, _)| *cue)
        .collect();
    let rare = rng.random_bool(RARE_CUE_RATE);
    cues[usize::from(rare && cues.len() > 1)]
}

/// One verb, each half as likely as the one before.
fn pick_verb(verbs: &[&'static str], rng: &mut impl Rng) -> &'static str {
    let mut at = 0;
    while at + 1 < verbs.len() && rng.random_bool(0.5) {
        at += 1;
    }
    verbs[at]
}

pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut impl Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, rng.random_range(0..=last));
    }
}
