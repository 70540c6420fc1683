//! A memo, and the two ways it is written down.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::MemoError;

/// The seven things a memo states, each with a value of one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fact {
    /// Who sends: a first name.
    Sender,
    /// Who receives: a last name.
    Recipient,
    /// How many crates: 2 to 40.
    Amount,
    /// What is in them.
    Item,
    /// The town.
    Place,
    /// The day of the week.
    Day,
    /// The full hour, as `9:00`.
    Time,
}

impl Fact {
    /// All seven, in the order of [`Memo`]'s fields.
    pub const ALL: [Self; 7] = [
        Self::Sender,
        Self::Recipient,
        Self::Amount,
        Self::Item,
        Self::Place,
        Self::Day,
        Self::Time,
    ];

    /// The position in [`Fact::ALL`].
    pub(crate) fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sender => "sender",
            Self::Recipient => "recipient",
            Self::Amount => "amount",
            Self::Item => "item",
            Self::Place => "place",
            Self::Day => "day",
            Self::Time => "time",
        })
    }
}

/// The facts that a prompt states, apart from how it is laid out.
///
/// Values are plain words without spaces (`Maria`, `40`, `9:00`). A value outside the task's
/// vocabulary is allowed here; no token can then state it, so every statement of it contradicts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Memo {
    /// Who sends.
    pub sender: String,
    /// Who receives.
    pub recipient: String,
    /// How many crates.
    pub amount: String,
    /// What is in them.
    pub item: String,
    /// The town.
    pub place: String,
    /// The day of the week.
    pub day: String,
    /// The hour.
    pub time: String,
}

/// How a memo is written down. Six fields, as amount and item stand together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// One `Key: value` line a field.
    Record,
    /// One short sentence a field.
    Note,
}

/// The field order that is not shuffled; [`Fact::Amount`] stands for amount and item.
pub(crate) const FIELDS: [Fact; 6] = [
    Fact::Sender,
    Fact::Recipient,
    Fact::Amount,
    Fact::Place,
    Fact::Day,
    Fact::Time,
];

/// The last line of every prompt; the completion follows it.
const ASK: &str = "\nSummary:";

impl Memo {
    /// The value of one fact.
    pub fn value(&self, fact: Fact) -> &str {
        match fact {
            Fact::Sender => &self.sender,
            Fact::Recipient => &self.recipient,
            Fact::Amount => &self.amount,
            Fact::Item => &self.item,
            Fact::Place => &self.place,
            Fact::Day => &self.day,
            Fact::Time => &self.time,
        }
    }

    /// The memo of seven values in the order of [`Fact::ALL`].
    pub(crate) fn from_values(values: [String; 7]) -> Self {
        let [sender, recipient, amount, item, place, day, time] = values;
        Self {
            sender,
            recipient,
            amount,
            item,
            place,
            day,
            time,
        }
    }

    /// The prompt in one layout, with the fields in their plain order. It ends in `Summary:`.
    pub fn prompt(&self, layout: Layout) -> String {
        self.prompt_in_order(layout, &FIELDS)
    }

    pub(crate) fn prompt_in_order(&self, layout: Layout, order: &[Fact; 6]) -> String {
        let mut text = String::from(match layout {
            Layout::Record => "Memo:",
            Layout::Note => "Note:",
        });
        for &field in order {
            let value = self.value(field);
            let item = &self.item;
            text.push_str(&match (layout, field) {
                (Layout::Record, Fact::Sender) => format!("\nFrom: {value}"),
                (Layout::Record, Fact::Recipient) => format!("\nTo: {value}"),
                (Layout::Record, Fact::Place) => format!("\nPlace: {value}"),
                (Layout::Record, Fact::Day) => format!("\nDay: {value}"),
                (Layout::Record, Fact::Time) => format!("\nTime: {value}"),
                (Layout::Record, _) => format!("\nGoods: {value} crates of {item}"),
                (Layout::Note, Fact::Sender) => format!(" It comes from {value}."),
                (Layout::Note, Fact::Recipient) => format!(" It goes to {value}."),
                (Layout::Note, Fact::Place) => format!(" It lands in {value}."),
                (Layout::Note, Fact::Day) => format!(" It is due on {value}."),
                (Layout::Note, Fact::Time) => format!(" It is due at {value}."),
                (Layout::Note, _) => format!(" It holds {value} crates of {item}."),
            });
        }
        text.push_str(ASK);
        text
    }

    /// The memo that a prompt states, in either layout and any field order. What follows
    /// `Summary:` is ignored, so a prompt with its completion gives the memo too.
    ///
    /// # Errors
    ///
    /// [`MemoError::FactNotFound`] or [`MemoError::FactTwice`] when the prompt does not state each
    /// fact once.
    pub fn parse(prompt: &str) -> Result<Self, MemoError> {
        let memo = prompt.split(ASK).next().unwrap_or_default();
        let words: Vec<&str> = memo
            .split_whitespace()
            .map(|word| word.trim_end_matches('.'))
            .collect();
        let mut found: [Option<&str>; 7] = [None; 7];
        for pair in words.windows(2) {
            let fact = match pair[0] {
                "From:" | "from" => Fact::Sender,
                "To:" | "to" => Fact::Recipient,
                "Goods:" | "holds" => Fact::Amount,
                "of" => Fact::Item,
                "Place:" | "in" => Fact::Place,
                "Day:" | "on" => Fact::Day,
                "Time:" | "at" => Fact::Time,
                _ => continue,
            };
            if let Some(first) = found[fact.index()].replace(pair[1]) {
                let (first, second) = (first.to_owned(), pair[1].to_owned());
                return Err(MemoError::FactTwice {
                    fact,
                    first,
                    second,
                });
            }
        }
        let mut values: [String; 7] = Default::default();
        for fact in Fact::ALL {
            values[fact.index()] = found[fact.index()]
                .ok_or_else(|| MemoError::FactNotFound {
                    fact,
                    prompt: prompt.to_owned(),
                })?
                .to_owned();
        }
        Ok(Self::from_values(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memo() -> Memo {
        Memo::from_values(
            ["Maria", "Hansen", "40", "apples", "Oslo", "Monday", "9:00"].map(String::from),
        )
    }

    #[test]
    fn both_layouts_parse_back_to_the_memo() {
        for layout in [Layout::Record, Layout::Note] {
            assert_eq!(Memo::parse(&memo().prompt(layout)), Ok(memo()));
        }
    }

    #[test]
    fn a_completion_behind_the_prompt_is_ignored() {
        let text = memo().prompt(Layout::Note) + " Hansen sends 7 crates of maps to Maria.";
        assert_eq!(Memo::parse(&text), Ok(memo()));
    }

    #[test]
    fn a_prompt_without_a_place_is_refused_by_name() {
        let text = memo().prompt(Layout::Record).replace("Place: Oslo\n", "");
        assert!(
            Memo::parse(&text)
                .unwrap_err()
                .to_string()
                .contains("expected a place")
        );
    }

    #[test]
    fn a_prompt_with_two_days_is_refused_by_name() {
        let text = memo()
            .prompt(Layout::Record)
            .replace("Summary:", "Day: Friday\nSummary:");
        let message = Memo::parse(&text).unwrap_err().to_string();
        assert_eq!(
            message,
            "memo: expected one day, found \"Monday\" and \"Friday\""
        );
    }
}
