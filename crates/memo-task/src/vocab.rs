//! The words, the value pools, and the word-level tokenizer over them.

use std::collections::HashMap;

use rand::{Rng, RngExt};
use serde_json::json;

use crate::Fact;

pub(crate) const PAD: u32 = 0;
pub(crate) const EOS: u32 = 1;
pub(crate) const UNK: u32 = 2;
const SPECIALS: [&str; 3] = ["<pad>", "<eos>", "<unk>"];

/// How `tokenizers` cuts text: a word takes the space before it along, so that joining the tokens
/// gives the text back, and a value has one token wherever it stands.
const SPLIT_PATTERN: &str = r" ?[A-Za-z0-9:]+|[^A-Za-z0-9\s]|\n";

/// Senders, most common first. The last ones are rare: a right name may be a surprising one.
const SENDERS: &[&str] = &[
    "Maria", "Thomas", "Anna", "Peter", "Laura", "Daniel", "Emma", "Martin", "Julia", "Simon",
    "Clara", "David", "Nina", "Robert", "Eva", "Oscar", "Helen", "Victor", "Alice", "Hugo",
    "Marta", "Leon", "Ingrid", "Omar", "Bruno", "Astrid", "Freya", "Rashid", "Yuki", "Pilar",
    "Kwame", "Odile", "Saskia", "Fergus", "Ximena", "Thaddeus",
];

/// Recipients. They share no name with the senders, so that a small model can tell the two by the
/// name and need not learn which of two names stood behind which word.
const RECIPIENTS: &[&str] = &[
    "Hansen",
    "Silva",
    "Novak",
    "Weber",
    "Rossi",
    "Murphy",
    "Costa",
    "Larsen",
    "Moreau",
    "Fischer",
    "Garcia",
    "Jansen",
    "Dubois",
    "Ferrari",
    "Horvat",
    "Tanaka",
    "Virtanen",
    "Okafor",
    "Szabo",
    "Yilmaz",
    "Lindqvist",
    "Papadakis",
    "Kowalski",
    "Bergstrom",
    "Achebe",
    "Quiroga",
    "Zielinski",
    "Ishikawa",
    "Ngata",
    "Umarov",
    "Kjeldsen",
    "Xenakis",
    "Vandermeer",
    "Abernathy",
    "Oduya",
    "Featherstone",
];

const ITEMS: &[&str] = &[
    "apples", "books", "lamps", "cups", "pears", "plates", "candles", "boots", "lemons", "nails",
    "bricks", "towels", "onions", "maps", "ropes", "spoons", "tiles", "plums", "seeds", "pencils",
    "wheels", "drums", "shells", "tulips", "radios", "scarves", "kites", "masks", "walnuts",
    "oars", "violins", "lutes", "gourds", "anvils", "zithers", "sextants",
];

const PLACES: &[&str] = &[
    "London",
    "Paris",
    "Rome",
    "Vienna",
    "Oslo",
    "Lisbon",
    "Prague",
    "Dublin",
    "Basel",
    "Turin",
    "Porto",
    "Bergen",
    "Seville",
    "Ghent",
    "Verona",
    "Krakow",
    "Zagreb",
    "Riga",
    "Malmo",
    "Lille",
    "Graz",
    "Nantes",
    "Bruges",
    "Tallinn",
    "Utrecht",
    "Cadiz",
    "Aarhus",
    "Trieste",
    "Uppsala",
    "Kaunas",
    "Narvik",
    "Tartu",
    "Kotor",
    "Visby",
    "Ioannina",
    "Ljubljana",
];

const DAYS: &[&str] = &[
    "Monday",
    "Friday",
    "Tuesday",
    "Thursday",
    "Wednesday",
    "Saturday",
    "Sunday",
];

const TIMES: &[&str] = &[
    "9:00", "10:00", "12:00", "15:00", "8:00", "14:00", "11:00", "16:00", "17:00", "13:00",
    "18:00", "7:00",
];

const AMOUNTS: std::ops::RangeInclusive<u32> = 2..=40;
/// How much more common a multiple of ten is than another amount.
const ROUND_AMOUNT_WEIGHT: f64 = 26.0;

/// The share of a pool's frequency that its usual values make up; the rest are unusual.
const USUAL_MASS: f64 = 0.75;

/// Words of prompts that no summary uses.
const PROMPT_WORDS: &[&str] = &[
    "\n", "Memo:", "From:", "To:", "Goods:", "Place:", "Day:", "Time:", "Note:", " It", " comes",
    " goes", " lands", " is", " due", " holds", "Summary:",
];

/// Verbs with the sender as subject, most common first; each comes half as often as the one
/// before, so the last are right and rare.
pub(crate) const SEND_VERBS: &[&str] = &[
    " sends",
    " ships",
    " delivers",
    " forwards",
    " dispatches",
    " consigns",
];
/// Verbs with the crates as subject, as above.
pub(crate) const MOVE_VERBS: &[&str] = &[" go", " travel", " move", " journey"];
/// Verbs of the second sentence, as above.
pub(crate) const ARRIVE_VERBS: &[&str] = &[" arrive", " come", " land", " appear"];

/// The words before a value inside a sentence, most common first.
pub(crate) const CUES: &[(&str, Fact)] = &[
    (" from", Fact::Sender),
    (" to", Fact::Recipient),
    (" for", Fact::Recipient),
    (" in", Fact::Place),
    (" on", Fact::Day),
    (" this", Fact::Day),
    (" at", Fact::Time),
];
/// The words before a value at the start of a text.
pub(crate) const FRONT_CUES: &[(&str, Fact)] = &[
    (" In", Fact::Place),
    (" On", Fact::Day),
    (" At", Fact::Time),
];

/// Phrases that say nothing, by where they stand. None is the start of another.
pub(crate) const OPENERS: &[&[&str]] = &[
    &[" As", " you", " know"],
    &[" As", " we", " said", " before"],
];
pub(crate) const ASIDES: &[&[&str]] = &[
    &[" as", " you", " know"],
    &[" as", " we", " said", " before"],
    &[" once", " again"],
    &[" by", " the", " way"],
];
pub(crate) const CLOSERS: &[&[&str]] = &[
    &[" That", " is", " all", " we", " know", "."],
    &[" We", " hope", " this", " helps", "."],
];

/// What the reader needs to know about a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// A value, by the fact it can be the value of.
    Value(Fact),
    /// A word before a value, inside a sentence.
    Cue(Fact),
    /// A word before a value, at the start of a text.
    FrontCue(Fact),
    SendVerb,
    MoveVerb,
    ArriveVerb,
    /// ` crates` or ` Crates`.
    Crates,
    Of,
    They,
    Comma,
    Stop,
    /// A word of filler phrases only, of prompts, or a special token.
    Other,
}

/// The values that one fact can have, with their weights, most common first.
#[derive(Debug, Clone)]
pub(crate) struct Values {
    pub(crate) words: Vec<String>,
    weights: Vec<f64>,
    /// The first so many are usual, the others unusual.
    n_usual: usize,
    /// The usual value that writers put in place of an unusual one, by index; for a usual one,
    /// the next.
    lookalikes: Vec<usize>,
}

impl Values {
    /// Weight `1/rank`: the frequencies of words in text.
    fn zipf(words: &[&str]) -> Self {
        let weights: Vec<f64> = (1..=words.len()).map(|rank| 1.0 / rank as f64).collect();
        let n_usual = n_usual(&weights);
        Self {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            lookalikes: (0..words.len()).map(|at| (at + 1) % n_usual).collect(),
            weights,
            n_usual,
        }
    }

    /// The multiples of ten are usual, and what other amounts are rounded to by mistake.
    fn amounts() -> Self {
        let mut amounts: Vec<u32> = AMOUNTS.collect();
        amounts.sort_by_key(|amount| (!amount.is_multiple_of(10), *amount));
        let n_usual = amounts
            .iter()
            .filter(|amount| amount.is_multiple_of(10))
            .count();
        let weight = |amount: &u32| {
            if amount.is_multiple_of(10) {
                ROUND_AMOUNT_WEIGHT
            } else {
                1.0
            }
        };
        let lookalike = |amount: &u32| {
            let nearest = ((*amount as usize + 5) / 10).clamp(1, n_usual);
            if amount.is_multiple_of(10) {
                nearest % n_usual
            } else {
                nearest - 1
            }
        };
        Self {
            weights: amounts.iter().map(weight).collect(),
            words: amounts.iter().map(u32::to_string).collect(),
            lookalikes: amounts.iter().map(lookalike).collect(),
            n_usual,
        }
    }

    fn position(&self, value: &str) -> Option<usize> {
        self.words.iter().position(|word| word == value)
    }

    /// Whether a value is one of the common ones.
    pub(crate) fn is_usual(&self, value: &str) -> bool {
        self.position(value).is_some_and(|at| at < self.n_usual)
    }

    /// The usual value that writers put in place of this one; never the value itself.
    pub(crate) fn lookalike(&self, value: &str) -> &str {
        &self.words[self.position(value).map_or(0, |at| self.lookalikes[at])]
    }

    /// One value, drawn by weight, that is not `except`.
    pub(crate) fn draw(&self, except: Option<&str>, rng: &mut impl Rng) -> &str {
        let candidates = || {
            self.words
                .iter()
                .zip(&self.weights)
                .filter(|(word, _)| Some(word.as_str()) != except)
        };
        let total: f64 = candidates().map(|(_, weight)| weight).sum();
        let mut left = rng.random::<f64>() * total;
        let mut last = self.words[0].as_str();
        for (word, weight) in candidates() {
            last = word;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
        last
    }
}

/// How many of the first weights make up [`USUAL_MASS`] of the whole.
fn n_usual(weights: &[f64]) -> usize {
    let total: f64 = weights.iter().sum();
    let mut sum = 0.0;
    let reaches = |weight: &f64| {
        sum += weight;
        sum >= USUAL_MASS * total
    };
    weights
        .iter()
        .position(reaches)
        .map_or(weights.len(), |at| at + 1)
}

/// The vocabulary: tokens by id, ids by token, and what each token is to the reader.
#[derive(Debug, Clone)]
pub(crate) struct Vocab {
    tokens: Vec<String>,
    words: Vec<Word>,
    ids: HashMap<String, u32>,
    pools: [Values; 7],
}

impl Vocab {
    pub(crate) fn new() -> Self {
        let pools = [
            Values::zipf(SENDERS),
            Values::zipf(RECIPIENTS),
            Values::amounts(),
            Values::zipf(ITEMS),
            Values::zipf(PLACES),
            Values::zipf(DAYS),
            Values::zipf(TIMES),
        ];
        let mut vocab = Self {
            tokens: Vec::new(),
            words: Vec::new(),
            ids: HashMap::new(),
            pools,
        };
        for token in SPECIALS.iter().chain(PROMPT_WORDS) {
            vocab.add(token, Word::Other);
        }
        let fixed = [
            (".", Word::Stop),
            (",", Word::Comma),
            (" crates", Word::Crates),
            (" Crates", Word::Crates),
            (" of", Word::Of),
            (" They", Word::They),
        ];
        for (token, word) in fixed {
            vocab.add(token, word);
        }
        for (tokens, word) in [
            (SEND_VERBS, Word::SendVerb),
            (MOVE_VERBS, Word::MoveVerb),
            (ARRIVE_VERBS, Word::ArriveVerb),
        ] {
            for token in tokens {
                vocab.add(token, word);
            }
        }
        for (token, fact) in CUES {
            vocab.add(token, Word::Cue(*fact));
        }
        for (token, fact) in FRONT_CUES {
            vocab.add(token, Word::FrontCue(*fact));
        }
        for token in [OPENERS, ASIDES, CLOSERS]
            .into_iter()
            .flatten()
            .copied()
            .flatten()
        {
            vocab.add(token, Word::Other);
        }
        for fact in Fact::ALL {
            for word in vocab.pools[fact.index()].words.clone() {
                vocab.add(&format!(" {word}"), Word::Value(fact));
            }
        }
        vocab
    }

    /// Adds a token unless it is there: filler phrases share words with each other and with
    /// sentences.
    fn add(&mut self, token: &str, word: Word) {
        if !self.ids.contains_key(token) {
            self.ids.insert(token.to_owned(), self.tokens.len() as u32);
            self.tokens.push(token.to_owned());
            self.words.push(word);
        }
    }

    pub(crate) fn size(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub(crate) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub(crate) fn word(&self, id: u32) -> Word {
        self.words.get(id as usize).copied().unwrap_or(Word::Other)
    }

    pub(crate) fn values(&self, fact: Fact) -> &Values {
        &self.pools[fact.index()]
    }

    /// The ids of a text, as the `tokenizers` crate gives them for [`Vocab::tokenizer_json`].
    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            // Special tokens are cut out first, wherever they stand.
            let special_at = |at: usize| {
                let mut specials = SPECIALS.iter();
                specials.position(|special| rest[at..].starts_with(special))
            };
            // All of them begin so, and texts seldom hold it.
            let special = rest
                .match_indices('<')
                .find_map(|(at, _)| Some((at, special_at(at)?)));
            let Some((at, id)) = special else {
                self.encode_plain(rest, &mut ids);
                break;
            };
            self.encode_plain(&rest[..at], &mut ids);
            ids.push(id as u32);
            rest = &rest[at + SPECIALS[id].len()..];
        }
        ids
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        let mut at = 0;
        while at < text.len() {
            let mut len = match_len(&text[at..]);
            if len == 0 {
                // What no pattern matches stays together as one unknown piece.
                len = text[at..]
                    .char_indices()
                    .map(|(offset, _)| offset)
                    .find(|offset| match_len(&text[at + offset..]) > 0)
                    .unwrap_or(text.len() - at);
            }
            ids.push(self.id(&text[at..at + len]).unwrap_or(UNK));
            at += len;
        }
    }

    /// The text of ids; special tokens and ids outside the vocabulary give nothing.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        ids.iter()
            .filter(|id| **id as usize >= SPECIALS.len())
            .filter_map(|id| self.token(*id))
            .collect()
    }

    pub(crate) fn tokenizer_json(&self) -> String {
        let special = |(id, content): (usize, &&str)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        };
        let vocab: serde_json::Map<String, serde_json::Value> = self
            .tokens
            .iter()
            .zip(0_u32..)
            .map(|(token, id)| (token.clone(), id.into()))
            .collect();
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": SPECIALS.iter().enumerate().map(special).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": { "Regex": SPLIT_PATTERN },
                "behavior": "Isolated",
                "invert": false,
            },
            "post_processor": null,
            "decoder": { "type": "Fuse" },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": SPECIALS[UNK as usize] },
        });
        format!("{tokenizer:#}")
    }

    pub(crate) fn tokenizer_config_json(&self) -> String {
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIALS[PAD as usize],
            "eos_token": SPECIALS[EOS as usize],
            "unk_token": SPECIALS[UNK as usize],
            "clean_up_tokenization_spaces": false,
            "padding_side": "right",
        });
        format!("{config:#}")
    }
}

/// How many bytes [`SPLIT_PATTERN`] takes at the start of a text, 0 where it does not match.
fn match_len(text: &str) -> usize {
    let space = usize::from(text.starts_with(' '));
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b':';
    let word = text.as_bytes()[space..]
        .iter()
        .take_while(|byte| is_word(byte))
        .count();
    if word > 0 {
        return space + word;
    }
    match text.chars().next() {
        Some(first) if first == '\n' || !first.is_whitespace() => first.len_utf8(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_ids_are_where_the_model_expects_them() {
        let vocab = Vocab::new();
        assert_eq!(vocab.id("<pad>"), Some(PAD));
        assert_eq!(vocab.id("<eos>"), Some(EOS));
        assert_eq!(vocab.id("<unk>"), Some(UNK));
    }

    #[test]
    fn every_value_has_one_token_and_no_twin() {
        let vocab = Vocab::new();
        for pool in &vocab.pools {
            for word in &pool.words {
                assert!(
                    vocab.id(word).is_none(),
                    "{word} has a twin without its space"
                );
                let id = vocab
                    .id(&format!(" {word}"))
                    .expect("each value is a token");
                assert!(
                    matches!(vocab.word(id), Word::Value(_)),
                    "{word} is also a plain word"
                );
            }
        }
        let n_values: usize = pool_sizes(&vocab).iter().sum();
        let n_value_tokens = vocab
            .words
            .iter()
            .filter(|word| matches!(word, Word::Value(_)))
            .count();
        assert_eq!(n_values, n_value_tokens, "two pools share a word");
    }

    fn pool_sizes(vocab: &Vocab) -> Vec<usize> {
        vocab.pools.iter().map(|pool| pool.words.len()).collect()
    }

    #[test]
    fn every_value_has_a_usual_lookalike_that_is_another_value() {
        let vocab = Vocab::new();
        for pool in &vocab.pools {
            for word in &pool.words {
                let lookalike = pool.lookalike(word);
                assert_ne!(lookalike, word);
                assert!(pool.is_usual(lookalike), "{word} as {lookalike}");
            }
            let unusual = pool.words.len() - pool.n_usual;
            assert!(pool.n_usual >= 3 && unusual >= 3, "{:?}", pool.words);
        }
        let rounded = ["2", "14", "15", "37", "40", "10"]
            .map(|amount| vocab.values(Fact::Amount).lookalike(amount).to_owned());
        assert_eq!(rounded, ["10", "10", "20", "40", "10", "20"]);
    }

    #[test]
    fn no_filler_phrase_starts_another() {
        for phrases in [OPENERS, ASIDES, CLOSERS] {
            for (i, a) in phrases.iter().enumerate() {
                for (j, b) in phrases.iter().enumerate() {
                    assert!(i == j || !a.starts_with(b));
                }
            }
        }
    }

    #[test]
    fn text_is_cut_at_words_with_their_space() {
        let vocab = Vocab::new();
        let ids = vocab.encode("Memo:\nFrom: Maria, 9:00  Oslo<eos>é");
        let cut: Vec<_> = ids.iter().map(|id| vocab.token(*id).unwrap()).collect();
        let expected = [
            "Memo:", "\n", "From:", " Maria", ",", " 9:00", "<unk>", " Oslo", "<eos>", "<unk>",
        ];
        assert_eq!(cut, expected);
    }
}
