//! The true reward: a finite-state machine that reads a completion from left to right.

use serde::{Deserialize, Serialize};

use crate::vocab::{ASIDES, CLOSERS, EOS, OPENERS, Vocab, Word};
use crate::{Fact, Memo, RewardWeights};

/// Why a token earned its reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardKind {
    /// A value stated for the first time, as the memo has it: 0.
    Right,
    /// A word or mark that carries the sentence: 0.
    Connective,
    /// A value that is not the memo's in the role where it stands.
    Contradiction,
    /// A token that says nothing new.
    Filler,
    /// A token that does not fit where it stands.
    Ungrammatical,
    /// The end of the text, with facts missing.
    Missing,
    /// The end of the text, with nothing missing: 0.
    End,
    /// The last token of a text that was cut off before its end.
    Truncated,
    /// A token behind the end of the text: 0.
    AfterEnd,
}

/// The true reward of one token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenReward {
    /// In reward units, at most 0.
    pub reward: f64,
    /// Why.
    pub kind: RewardKind,
    /// The fact whose role the token stands in, for values only.
    pub fact: Option<Fact>,
}

/// Where in a sentence the reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    /// Nothing read.
    Start,
    /// Behind `On Monday` or `As you know`, before the subject.
    Fronted,
    /// Behind the sender as subject.
    SendVerb,
    /// Behind the verb.
    Object,
    /// Behind the amount.
    Crates,
    /// Behind ` crates`; the item may follow.
    Of,
    /// Behind the crates as subject.
    MoveVerb,
    /// Behind the core of the sentence: places and times may follow in any order.
    Adjuncts,
    /// Behind a full stop.
    Stop,
    /// Behind ` They`.
    ArriveVerb,
    /// A value of this role comes next.
    Slot(Fact),
    /// Inside a filler phrase.
    Phrase(Phrase),
    /// Behind the end of the text.
    End,
}

/// How far a filler phrase was read, while several may still be possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Phrase {
    group: &'static [&'static [&'static str]],
    /// Bit `i` stands for phrase `i` of the group.
    alive: u8,
    depth: usize,
    done: bool,
}

impl Phrase {
    fn any_of(group: &'static [&'static [&'static str]]) -> Self {
        Self {
            group,
            alive: u8::MAX,
            depth: 0,
            done: false,
        }
    }

    /// The phrase one word further, or `None` where the word goes on with none of them.
    fn next(self, token: Option<&str>) -> Option<Self> {
        let mut next = Self {
            alive: 0,
            depth: self.depth + 1,
            ..self
        };
        for (i, words) in self.group.iter().enumerate() {
            let goes_on = token.is_some() && words.get(self.depth).copied() == token;
            if self.alive & (1 << i) != 0 && goes_on {
                next.alive |= 1 << i;
                next.done |= words.len() == next.depth;
            }
        }
        (next.alive != 0).then_some(next)
    }
}

/// What a token does in a stage that accepts it.
struct Step {
    reward: f64,
    kind: RewardKind,
    fact: Option<Fact>,
}

/// Reads the tokens of one completion and gives each its true reward.
///
/// The rules, as a person would put them:
///
/// - A completion is one sentence, or two. The first has the sender as subject (`Maria sends 40
///   crates of apples ...`) or the goods (`40 crates of apples go ...`); place, day and time may
///   stand in front (`On Monday, ...`). Sender, recipient, place, day and time may follow in any
///   order, each behind its cue (` from`, ` to` or ` for`, ` in`, ` on` or ` this`, ` at`). The
///   second sentence is `They arrive ...`. Commas may separate the parts. Any part may be left out.
/// - A value in a role earns 0 where it is the memo's and the role was not filled before, is
///   *filler* where it is the memo's and the role was filled before, and is a *contradiction*
///   otherwise, also when it is of another kind (` in Monday`).
/// - A cue of a role that was filled before, a second sentence that has nothing left to say, and
///   each token of a filler phrase is *filler*.
/// - A token that fits nowhere here is *ungrammatical*. The reader then goes on as a kind person
///   would: it skips ahead to the next part of the sentence where the token fits, and reads it
///   there; where it fits nowhere, the reader ignores it. A token so read costs the larger of the
///   two penalties.
/// - The end-of-text token costs the missing facts: those whose role was never filled. A role that
///   was filled wrongly is not missing as well. Before a full stop the token is ungrammatical too.
///
/// So the reward of a token depends on the memo and the tokens up to it, and every text that never
/// loses anything is bounded in length: nothing can be said for free twice.
///
/// # Examples
///
/// ```
/// use memo_task::{Fact, Memo, MemoConfig, MemoTask, RewardKind};
///
/// let task = MemoTask::new(MemoConfig::default())?;
/// let memo = Memo::parse(
///     "Note: It comes from Maria. It goes to Hansen. It holds 40 crates of apples. It lands in \
///      Oslo. It is due on Monday. It is due at 9:00.\nSummary:",
/// )?;
/// let mut reader = task.reader(&memo);
/// for id in task.encode(" Maria sends") {
///     assert_eq!(reader.step(id).reward, 0.0);
/// }
/// let wrong = reader.step(task.encode(" 30")[0]);
/// assert_eq!((wrong.reward, wrong.kind), (-1.0, RewardKind::Contradiction));
/// assert_eq!(wrong.fact, Some(Fact::Amount));
/// assert_eq!(reader.missing().count(), 5);
/// # Ok::<(), memo_task::MemoError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    vocab: &'a Vocab,
    weights: RewardWeights,
    /// The memo's value ids, by fact; `None` where the value is no token.
    truth: [Option<u32>; 7],
    stage: Stage,
    /// Where to go on behind a value or a filler phrase.
    back: Stage,
    filled: [bool; 7],
    after_comma: bool,
    goods_are_subject: bool,
    used_second_sentence: bool,
    sentence_is_filler: bool,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(vocab: &'a Vocab, weights: RewardWeights, memo: &Memo) -> Self {
        let truth = Fact::ALL.map(|fact| vocab.id(&format!(" {}", memo.value(fact))));
        Self {
            vocab,
            weights,
            truth,
            stage: Stage::Start,
            back: Stage::Adjuncts,
            filled: [false; 7],
            after_comma: false,
            goods_are_subject: false,
            used_second_sentence: false,
            sentence_is_filler: false,
        }
    }

    /// The facts whose role no value has filled yet, rightly or wrongly.
    pub fn missing(&self) -> impl Iterator<Item = Fact> + '_ {
        Fact::ALL
            .into_iter()
            .filter(|fact| !self.filled[fact.index()])
    }

    /// Whether the end-of-text token was read.
    pub fn ended(&self) -> bool {
        self.stage == Stage::End
    }

    /// What it costs, beside the last token's own reward, to stop here without an end-of-text
    /// token: the missing facts and [`RewardWeights::truncated`]. Zero once the text has ended.
    pub fn truncation(&self) -> f64 {
        if self.ended() {
            0.0
        } else {
            self.missing_cost() + self.weights.truncated
        }
    }

    /// The reward of the next token. Any id may come, also one outside the vocabulary.
    pub fn step(&mut self, id: u32) -> TokenReward {
        if self.ended() {
            return TokenReward {
                reward: 0.0,
                kind: RewardKind::AfterEnd,
                fact: None,
            };
        }
        if id == EOS {
            return self.end();
        }
        let word = self.vocab.word(id);
        let mut fits = true;
        match self.stage {
            Stage::Slot(fact) => {
                self.stage = self.back;
                if let Word::Value(_) = word {
                    return token_reward(self.fill(fact, id));
                }
                fits = false;
            }
            Stage::Phrase(phrase) => {
                if let Some(phrase) = phrase.next(self.vocab.token(id)) {
                    return token_reward(self.enter(phrase));
                }
                self.stage = self.back;
                fits = false;
            }
            _ => {}
        }
        let here = self.stage;
        if fits && let Some(step) = self.accept(here, id, word) {
            return token_reward(step);
        }
        let penalty = self.ungrammatical();
        let later = std::iter::once(&here).chain(later_stages(here));
        for &stage in later {
            if let Some(step) = self.accept(stage, id, word) {
                let fact = step.fact;
                let worse = if step.reward < penalty.reward {
                    step
                } else {
                    penalty
                };
                return token_reward(Step { fact, ..worse });
            }
        }
        token_reward(penalty)
    }

    /// What a stage does with a token that it accepts, going on to the next stage; `None` and no
    /// change where it does not accept it.
    fn accept(&mut self, stage: Stage, id: u32, word: Word) -> Option<Step> {
        let after_comma = self.after_comma;
        let step = match (stage, word) {
            (Stage::Start | Stage::Fronted, Word::Value(Fact::Sender | Fact::Recipient)) => {
                self.stage = Stage::SendVerb;
                self.fill(Fact::Sender, id)
            }
            (Stage::Start | Stage::Fronted, Word::Value(Fact::Amount)) => {
                self.goods_are_subject = true;
                self.stage = Stage::Crates;
                self.fill(Fact::Amount, id)
            }
            (Stage::Start | Stage::Fronted, Word::Crates) => {
                self.goods_are_subject = true;
                self.connective(Stage::Of)
            }
            (Stage::Start, Word::FrontCue(fact)) => self.cue(fact, Stage::Fronted),
            (Stage::Fronted, Word::Cue(fact @ (Fact::Place | Fact::Day | Fact::Time))) => {
                self.cue(fact, Stage::Fronted)
            }
            (Stage::SendVerb, Word::SendVerb) => self.connective(Stage::Object),
            (Stage::Object, Word::Value(Fact::Amount)) => {
                self.stage = Stage::Crates;
                self.fill(Fact::Amount, id)
            }
            (Stage::Object | Stage::Crates, Word::Crates) => self.connective(Stage::Of),
            (Stage::Of, Word::Of) => self.cue(Fact::Item, self.behind_goods()),
            // The item is left out: the next part begins here.
            (Stage::Of, _) => return self.accept(self.behind_goods(), id, word),
            (Stage::MoveVerb, Word::MoveVerb) => self.connective(Stage::Adjuncts),
            (Stage::Adjuncts, Word::Cue(fact)) => self.cue(fact, Stage::Adjuncts),
            (Stage::Fronted | Stage::Adjuncts, Word::Comma) if !after_comma => {
                let step = self.connective(stage);
                self.after_comma = true;
                return Some(step);
            }
            (Stage::Adjuncts, Word::Stop) => {
                let step = self.verb(Stage::Stop);
                self.sentence_is_filler = false;
                if after_comma {
                    self.ungrammatical()
                } else {
                    step
                }
            }
            (Stage::Stop, Word::They) => {
                let has_more = [
                    Fact::Sender,
                    Fact::Recipient,
                    Fact::Place,
                    Fact::Day,
                    Fact::Time,
                ]
                .into_iter()
                .any(|fact| !self.filled[fact.index()]);
                self.sentence_is_filler = self.used_second_sentence || !has_more;
                self.used_second_sentence = true;
                self.verb(Stage::ArriveVerb)
            }
            (Stage::ArriveVerb, Word::ArriveVerb) => self.verb(Stage::Adjuncts),
            _ => {
                let (group, back) = match stage {
                    Stage::Start => (OPENERS, Stage::Fronted),
                    Stage::Adjuncts => (ASIDES, Stage::Adjuncts),
                    Stage::Stop => (CLOSERS, Stage::Stop),
                    _ => return None,
                };
                let phrase = Phrase::any_of(group).next(self.vocab.token(id))?;
                self.back = back;
                self.enter(phrase)
            }
        };
        self.after_comma = false;
        Some(step)
    }

    fn behind_goods(&self) -> Stage {
        if self.goods_are_subject {
            Stage::MoveVerb
        } else {
            Stage::Adjuncts
        }
    }

    /// Puts a value into a role.
    fn fill(&mut self, fact: Fact, id: u32) -> Step {
        let was_filled = std::mem::replace(&mut self.filled[fact.index()], true);
        let (reward, kind) = if self.truth[fact.index()] != Some(id) {
            (self.weights.contradiction, RewardKind::Contradiction)
        } else if was_filled {
            (self.weights.filler, RewardKind::Filler)
        } else {
            (0.0, RewardKind::Right)
        };
        Step {
            reward,
            kind,
            fact: Some(fact),
        }
    }

    /// Reads a cue: filler where its role was filled before.
    fn cue(&mut self, fact: Fact, back: Stage) -> Step {
        self.back = back;
        let step = self.connective(Stage::Slot(fact));
        if self.filled[fact.index()] {
            self.filler()
        } else {
            step
        }
    }

    /// Reads a word of a sentence that is filler where it has nothing left to say.
    fn verb(&mut self, next: Stage) -> Step {
        let step = self.connective(next);
        if self.sentence_is_filler {
            self.filler()
        } else {
            step
        }
    }

    fn connective(&mut self, next: Stage) -> Step {
        self.stage = next;
        Step {
            reward: 0.0,
            kind: RewardKind::Connective,
            fact: None,
        }
    }

    fn ungrammatical(&self) -> Step {
        Step {
            reward: self.weights.ungrammatical,
            kind: RewardKind::Ungrammatical,
            fact: None,
        }
    }

    fn filler(&self) -> Step {
        Step {
            reward: self.weights.filler,
            kind: RewardKind::Filler,
            fact: None,
        }
    }

    /// Goes on inside a phrase, to its next word or back to the sentence behind its last.
    fn enter(&mut self, phrase: Phrase) -> Step {
        self.stage = if phrase.done {
            self.back
        } else {
            Stage::Phrase(phrase)
        };
        self.filler()
    }

    fn end(&mut self) -> TokenReward {
        let n_missing = self.missing().count();
        let mut reward = self.missing_cost();
        let mut kind = if n_missing > 0 {
            RewardKind::Missing
        } else {
            RewardKind::End
        };
        if self.stage != Stage::Stop {
            reward += self.weights.ungrammatical;
            if n_missing == 0 {
                kind = RewardKind::Ungrammatical;
            }
        }
        self.stage = Stage::End;
        TokenReward {
            reward,
            kind,
            fact: None,
        }
    }

    fn missing_cost(&self) -> f64 {
        self.missing().count() as f64 * self.weights.missing
    }
}

fn token_reward(step: Step) -> TokenReward {
    TokenReward {
        reward: step.reward,
        kind: step.kind,
        fact: step.fact,
    }
}

/// The parts of a sentence behind a stage, in order.
fn later_stages(stage: Stage) -> &'static [Stage] {
    const FIRST: &[Stage] = &[
        Stage::SendVerb,
        Stage::Object,
        Stage::Crates,
        Stage::Of,
        Stage::MoveVerb,
        Stage::Adjuncts,
    ];
    match stage {
        Stage::Start | Stage::Fronted => FIRST,
        Stage::SendVerb => &FIRST[1..],
        Stage::Object => &FIRST[2..],
        Stage::Crates => &FIRST[3..],
        Stage::Of => &FIRST[4..],
        Stage::MoveVerb => &FIRST[5..],
        Stage::Stop => &[Stage::ArriveVerb, Stage::Adjuncts],
        Stage::ArriveVerb => &FIRST[5..],
        Stage::Adjuncts | Stage::Slot(_) | Stage::Phrase(_) | Stage::End => &[],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{MemoConfig, MemoTask};

    /// Sums of a few decimal weights.
    const EXACT: f64 = 1e-12;

    fn memo() -> Memo {
        Memo::from_values(
            ["Maria", "Hansen", "40", "apples", "Oslo", "Monday", "9:00"].map(String::from),
        )
    }

    /// The rewards of a text with its end, as `token[reward]` where the reward is not 0.
    fn marked(text: &str) -> String {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
        let ids = task.encode(text);
        assert!(
            !ids.contains(&task.unk_id()) || text.contains("<unk>"),
            "{text}"
        );
        let rewards = task.token_rewards(&memo(), &ids);
        let mut marked = String::new();
        for (id, token) in ids.iter().zip(rewards) {
            marked.push_str(task.token(*id).unwrap());
            if token.reward.abs() > EXACT {
                marked.push_str(&format!("[{:.1}]", token.reward));
            }
        }
        marked
    }

    /// The text must earn exactly the rewards that stand in it.
    fn assert_marked(expected: &str) {
        let mut text = String::new();
        let mut depth = false;
        for c in expected.chars() {
            match c {
                '[' => depth = true,
                ']' => depth = false,
                _ if !depth => text.push(c),
                _ => {}
            }
        }
        assert_eq!(marked(&text), expected);
    }

    #[test]
    fn perfect_summaries_lose_nothing() {
        for text in [
            " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.<eos>",
            " Maria consigns 40 crates of apples at 9:00, on Monday for Hansen, in Oslo.<eos>",
            " On Monday, Maria ships 40 crates of apples to Hansen. They land in Oslo at 9:00.<eos>",
            " In Oslo at 9:00, 40 crates of apples go from Maria to Hansen this Monday.<eos>",
            " 40 crates of apples travel to Hansen in Oslo on Monday at 9:00 from Maria.<eos>",
        ] {
            assert_marked(text);
        }
    }

    #[test]
    fn a_contradiction_costs_at_its_value_and_is_not_missing_too() {
        assert_marked(
            " Anna[-1.0] sends 39[-1.0] crates of pears[-1.0] to Maria[-1.0] in Rome[-1.0] \
             on Friday[-1.0] at 8:00[-1.0].<eos>",
        );
        assert_marked(" 4[-1.0] crates of apples go from Hansen[-1.0] to Maria[-1.0].<eos>[-2.1]");
    }

    #[test]
    fn a_value_of_another_kind_contradicts_in_its_role() {
        assert_marked(
            " Maria sends 40 crates of apples to Oslo[-1.0] in Hansen[-1.0] on 9:00[-1.0]\
             .<eos>[-0.7]",
        );
    }

    #[test]
    fn missing_facts_cost_at_the_end() {
        assert_marked(" Crates go.<eos>[-4.9]");
        assert_marked(" Maria sends crates to Hansen.<eos>[-3.5]");
        assert_marked(" 40 crates of apples go in Oslo on Monday at 9:00.<eos>[-1.4]");
    }

    #[test]
    fn filler_costs_a_little_a_token() {
        assert_marked(
            " As[-0.1] you[-0.1] know[-0.1], Maria sends 40 crates of apples to Hansen, as[-0.1] \
             we[-0.1] said[-0.1] before[-0.1], in Oslo on Monday once[-0.1] again[-0.1] at 9:00. \
             That[-0.1] is[-0.1] all[-0.1] we[-0.1] know[-0.1].[-0.1]<eos>",
        );
    }

    #[test]
    fn facts_said_again_are_filler() {
        assert_marked(
            " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00 in[-0.1] \
             Oslo[-0.1]. They[-0.1] arrive[-0.1] on[-0.1] Monday[-0.1].[-0.1]<eos>",
        );
        assert_marked(
            " Maria sends 40 crates of apples to Hansen on Monday at 9:00. They arrive in Oslo. \
             They[-0.1] come[-0.1] in[-0.1] Rome[-1.0].[-0.1]<eos>",
        );
        // Setting a wrong value right does not undo it.
        assert_marked(
            " Maria sends 40 crates of apples to Hansen in Rome[-1.0] in[-0.1] Oslo[-0.1] on \
             Monday at 9:00.<eos>",
        );
    }

    #[test]
    fn what_does_not_fit_is_ungrammatical_and_reading_goes_on() {
        // The verb is left out: the amount is read where it belongs.
        assert_marked(" Maria 40[-0.2] crates of apples to Hansen in Oslo on Monday at 9:00.<eos>");
        // A contradiction that also does not fit costs the larger penalty.
        assert_marked(" Maria 30[-1.0] crates of apples to Hansen in Oslo on Monday at 9:00.<eos>");
        // Words of prompts and the unknown token are ignored.
        assert_marked(
            " Maria sends goes[-0.2]<unk>[-0.2] 40 crates of apples to in[-0.2] Oslo on \
             Monday at 9:00.<eos>[-0.7]",
        );
        // A filler phrase that breaks off.
        assert_marked(
            " Maria sends 40 crates of apples as[-0.1] you[-0.1] to[-0.2] Hansen in Oslo on \
             Monday at 9:00.<eos>",
        );
        assert_marked(
            " Maria sends 40 crates of apples,,[-0.2] to Hansen in Oslo on Monday at 9:00,\
             .[-0.2]<eos>",
        );
    }

    #[test]
    fn an_end_before_the_full_stop_is_ungrammatical_too() {
        assert_marked(
            " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00<eos>[-0.2]",
        );
        assert_marked("<eos>[-5.1]");
    }

    #[test]
    fn a_text_without_an_end_pays_for_it_on_its_last_token() {
        assert_marked(" Maria sends 40 crates of apples to Hansen in Oslo on Monday[-1.7]");
        assert_marked(" Maria sends 30[-5.5]");
    }

    #[test]
    fn tokens_behind_the_end_earn_nothing() {
        assert_marked(
            " Maria sends 40 crates of apples to Hansen in Oslo on Monday at 9:00.<eos> Rome<pad>",
        );
    }

    /// All that decides what the reader does next.
    type Key = (Stage, Stage, [bool; 7], [bool; 4]);

    fn key(reader: &Reader<'_>) -> Key {
        let flags = [
            reader.after_comma,
            reader.goods_are_subject,
            reader.used_second_sentence,
            reader.sentence_is_filler,
        ];
        (reader.stage, reader.back, reader.filled, flags)
    }

    /// The most tokens that can follow at no cost. Panics on a circle of free tokens.
    fn longest_free(reader: &Reader<'_>, known: &mut HashMap<Key, Option<usize>>) -> usize {
        if let Some(longest) = known.get(&key(reader)) {
            return longest.expect("a circle of free tokens");
        }
        known.insert(key(reader), None);
        let mut longest = 0;
        for id in 0..reader.vocab.size() as u32 {
            let mut next = reader.clone();
            if next.step(id).reward >= 0.0 && !next.ended() {
                longest = longest.max(1 + longest_free(&next, known));
            }
        }
        known.insert(key(reader), Some(longest));
        longest
    }

    #[test]
    fn no_text_goes_on_for_free() {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
        let mut known = HashMap::new();
        let longest = longest_free(&task.reader(&memo()), &mut known);
        // `40 crates of apples go`, five parts of two words, `They arrive` and two full stops are
        // 19. Before each of the five parts a comma may stand, but not before a full stop.
        assert_eq!(longest, 24, "{} states", known.len());
    }

    #[test]
    fn a_memo_with_an_unknown_value_contradicts_every_statement_of_it() {
        let task = MemoTask::new(MemoConfig::default()).unwrap();
        let strange = Memo {
            place: "Atlantis".to_owned(),
            ..memo()
        };
        let ids = task.encode(" Maria sends 40 crates of apples in Oslo");
        let kind = |ids: &[u32]| task.token_rewards(&strange, ids)[7].kind;
        assert_eq!(kind(&ids[..8]), RewardKind::Truncated);
        assert_eq!(
            kind(&[&ids[..], &[EOS]].concat()),
            RewardKind::Contradiction
        );
        assert!(
            task.best_completion(&strange)
                .unwrap_err()
                .to_string()
                .contains("Atlantis")
        );
    }
}
