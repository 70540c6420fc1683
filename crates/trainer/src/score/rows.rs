//! Rows of a data file, a window at a time, and their tokens.

use std::path::Path;

use lm::chat::{ChatTemplate, Message, RenderOptions};
use lm::data::{
    Content, DataError, DataReport, DropReason, Location, PreferenceRow, RowReader, SftBody,
    SftRow, TokenizeOptions, Treatment, read_preferences, read_sft, tokenize_pair, tokenize_sft,
};
use lm::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde_json::Value;

use crate::error::TrainError;

/// A row in tokens.
#[derive(Clone, Debug)]
pub(super) struct Item {
    /// Index of the row in the file.
    pub row: usize,
    /// Where it stands, such as `line 12`.
    pub place: String,
    pub prompt_ids: Vec<u32>,
    /// Chosen and rejected, or one completion.
    pub sides: Vec<Side>,
}

/// A completion in tokens.
#[derive(Clone, Debug)]
pub(super) struct Side {
    pub name: &'static str,
    pub ids: Vec<u32>,
    /// Which tokens are the assistant's; all, if it is none.
    pub own: Option<Vec<bool>>,
}

impl Item {
    pub(super) fn longest(&self) -> usize {
        let completions = self.sides.iter().map(|side| side.ids.len());
        self.prompt_ids.len() + completions.max().unwrap_or(0)
    }

    /// Tokens of this row where each completion has a row of its own.
    pub(super) fn padded_tokens(&self) -> usize {
        self.sides.len() * self.longest()
    }
}

/// Rows of either kind.
pub(super) enum Window {
    Pairs(Vec<PreferenceRow>),
    Texts(Vec<SftRow>),
}

impl Window {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Pairs(rows) => rows.len(),
            Self::Texts(rows) => rows.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

type Reader<T> = Box<dyn Iterator<Item = Result<T, DataError>>>;

enum Source {
    Pairs(Reader<PreferenceRow>),
    Texts(Reader<SftRow>),
}

/// A file's rows; those that are malformed are refused or left out and counted.
pub(super) struct Rows {
    source: Source,
    malformed: Treatment,
    left: usize,
    dropped: DataReport,
    first: Option<DataError>,
    any: bool,
}

/// How many rows of a file will be scored: read once before the models are, so that a bad row is
/// told of at once and not after hours.
pub(super) fn count(
    path: &Path,
    malformed: Treatment,
    max_rows: Option<usize>,
) -> Result<usize, TrainError> {
    let mut rows = Rows::open(path, malformed, max_rows)?;
    let mut n = 0;
    loop {
        match rows.next_window(super::WINDOW)?.len() {
            0 => return Ok(n),
            more => n += more,
        }
    }
}

impl Rows {
    /// Opens a file; its first row says whether it holds preferences or single completions.
    pub(super) fn open(
        path: &Path,
        malformed: Treatment,
        max_rows: Option<usize>,
    ) -> Result<Self, TrainError> {
        let first = RowReader::open(path)?.find_map(Result::ok);
        let pairs = first.is_some_and(|row| {
            row.columns.contains_key("chosen") || row.columns.contains_key("rejected")
        });
        Ok(Self {
            source: if pairs {
                Source::Pairs(Box::new(read_preferences(path)?))
            } else {
                Source::Texts(Box::new(read_sft(path)?))
            },
            malformed,
            left: max_rows.unwrap_or(usize::MAX),
            dropped: DataReport::default(),
            first: None,
            any: false,
        })
    }

    /// What was left out so far.
    pub(super) fn dropped(&self) -> &DataReport {
        &self.dropped
    }

    /// The next `n` rows, or fewer at the end.
    pub(super) fn next_window(&mut self, n: usize) -> Result<Window, TrainError> {
        let n = n.min(self.left);
        let window = match &mut self.source {
            Source::Pairs(rows) => {
                let dropped = (&mut self.dropped, &mut self.first);
                Window::Pairs(take(rows, n, self.malformed, dropped)?)
            }
            Source::Texts(rows) => {
                let dropped = (&mut self.dropped, &mut self.first);
                Window::Texts(take(rows, n, self.malformed, dropped)?)
            }
        };
        self.left -= window.len();
        self.any |= !window.is_empty();
        match self.first.take() {
            Some(error) if !self.any => Err(DataError::AllMalformed(Box::new(error)).into()),
            first => {
                self.first = first;
                Ok(window)
            }
        }
    }
}

fn take<T>(
    rows: &mut Reader<T>,
    n: usize,
    malformed: Treatment,
    (dropped, first): (&mut DataReport, &mut Option<DataError>),
) -> Result<Vec<T>, TrainError> {
    let mut taken = Vec::new();
    while taken.len() < n {
        match rows.next() {
            None => break,
            Some(Ok(row)) => taken.push(row),
            Some(Err(error)) if malformed == Treatment::Drop && error.is_malformed_row() => {
                dropped.rows += 1;
                *dropped.dropped.entry(DropReason::Malformed).or_default() += 1;
                first.get_or_insert(error);
            }
            Some(Err(error)) => return Err(error.into()),
        }
    }
    Ok(taken)
}

/// From rows to tokens.
pub(super) struct Encoder {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub options: TokenizeOptions,
}

/// A conversation of which some turns are the assistant's.
struct Turns<'a> {
    location: &'a Location,
    prompt: &'a [Message],
    completion: &'a [Message],
    tools: Option<&'a [Value]>,
    kwargs: &'a serde_json::Map<String, Value>,
}

impl Encoder {
    /// The tokens of a window's rows, made on all threads; counts go to `report`.
    pub(super) fn encode(
        &self,
        window: Window,
        report: &mut DataReport,
    ) -> Result<Vec<Item>, TrainError> {
        type Encoded = Result<(Option<Item>, DataReport), TrainError>;
        let encoded: Vec<Encoded> = match window {
            Window::Pairs(rows) => rows.into_par_iter().map(|row| self.pair(&row)).collect(),
            Window::Texts(rows) => rows.into_par_iter().map(|row| self.text(&row)).collect(),
        };
        let mut items = Vec::with_capacity(encoded.len());
        for encoded in encoded {
            let (item, counts) = encoded?;
            *report += &counts;
            items.extend(item);
        }
        Ok(items)
    }

    fn pair(&self, row: &PreferenceRow) -> Result<(Option<Item>, DataReport), TrainError> {
        let mut report = DataReport::default();
        let found = tokenize_pair(
            row.location.row,
            row,
            &self.tokenizer,
            self.template.as_ref(),
            &self.options,
            &mut report,
        )?;
        let Some(pair) = found else {
            return Ok((None, report));
        };
        let side = |name: &'static str, content: &Content, ids: Vec<u32>| {
            let own = match (&row.prompt, content) {
                (Content::Chat(prompt), Content::Chat(completion)) => {
                    let turns = Turns {
                        location: &row.location,
                        prompt,
                        completion,
                        tools: row.tools.as_deref(),
                        kwargs: &row.template_kwargs,
                    };
                    self.own_tokens(&turns, &pair.prompt_ids, &ids)?
                }
                _ => None,
            };
            Ok::<Side, TrainError>(Side { name, ids, own })
        };
        let sides = vec![
            side("chosen", &row.chosen, pair.chosen_ids)?,
            side("rejected", &row.rejected, pair.rejected_ids)?,
        ];
        let item = Item {
            row: row.location.row,
            place: place(&row.location),
            prompt_ids: pair.prompt_ids,
            sides,
        };
        Ok((Some(item), report))
    }

    fn text(&self, row: &SftRow) -> Result<(Option<Item>, DataReport), TrainError> {
        let rows = std::slice::from_ref(row);
        let template = self.template.as_ref();
        let tokenized = match tokenize_sft(rows, &self.tokenizer, template, &self.options) {
            Ok(tokenized) => tokenized,
            // One row, and it was dropped; of what the options leave, only these two can be why.
            Err(DataError::AllDropped { .. }) => {
                let mut report = DataReport::default();
                report.rows = 1;
                let empty = match &row.body {
                    SftBody::Whole(content) => content.is_empty(),
                    SftBody::Completion { completion, .. } => completion.is_empty(),
                };
                let reason = if empty {
                    DropReason::EmptyCompletion
                } else {
                    DropReason::PromptTooLong
                };
                report.dropped.insert(reason, 1);
                return Ok((None, report));
            }
            Err(error) => return Err(error.into()),
        };
        let Some(example) = tokenized.examples.into_iter().next() else {
            return Ok((None, tokenized.report));
        };
        let turns = |prompt, completion| Turns {
            location: &row.location,
            prompt,
            completion,
            tools: row.tools.as_deref(),
            kwargs: &row.template_kwargs,
        };
        let (prompt_ids, ids) = (&example.prompt_ids, &example.completion_ids);
        let own = match &row.body {
            SftBody::Whole(Content::Chat(messages)) => {
                self.own_tokens(&turns(&[], messages), prompt_ids, ids)?
            }
            SftBody::Completion {
                prompt: Content::Chat(prompt),
                completion: Content::Chat(completion),
            } => self.own_tokens(&turns(prompt, completion), prompt_ids, ids)?,
            _ => None,
        };
        let item = Item {
            row: row.location.row,
            place: place(&row.location),
            prompt_ids: example.prompt_ids,
            sides: vec![Side {
                name: "completion",
                ids: example.completion_ids,
                own,
            }],
        };
        Ok((Some(item), tokenized.report))
    }

    /// Which tokens of a completion the assistant wrote; nothing where all are its own.
    ///
    /// A turn of the assistant goes from the end of the conversation before it, rendered with the
    /// header of an answer, to the end of the conversation that it closes.
    fn own_tokens(
        &self,
        turns: &Turns<'_>,
        prompt_ids: &[u32],
        ids: &[u32],
    ) -> Result<Option<Vec<bool>>, TrainError> {
        let is_own =
            |message: &Message| message.get("role").and_then(Value::as_str) == Some("assistant");
        if !turns.prompt.is_empty() && turns.completion.iter().all(is_own) {
            return Ok(None);
        }
        let Some(template) = &self.template else {
            return Ok(None);
        };
        let whole: Vec<Message> = turns
            .prompt
            .iter()
            .chain(turns.completion)
            .cloned()
            .collect();
        let joined: Vec<u32> = prompt_ids.iter().chain(ids).copied().collect();
        // Where the tokens of the first `n` messages end in those of all.
        let end = |n: usize, add_generation_prompt: bool| -> Result<usize, TrainError> {
            if n == 0 {
                return Ok(0);
            }
            let options = RenderOptions {
                add_generation_prompt,
                tools: turns.tools,
                kwargs: Some(turns.kwargs),
            };
            let part = template.encode(&self.tokenizer, &whole[..n], &options)?;
            let common = part.iter().zip(&joined).take_while(|(a, b)| a == b);
            Ok(common.count())
        };
        let mut own = vec![false; ids.len()];
        for (n, message) in whole.iter().enumerate().skip(turns.prompt.len()) {
            if !is_own(message) {
                continue;
            }
            let (from, to) = (end(n, true)?, end(n + 1, false)?);
            if from >= to && from < joined.len() {
                return Err(TrainError::Score {
                    place: turns.location.to_string(),
                    reason: format!(
                        "message {n}: expected a chat template that writes each turn as it writes \
                         the conversation up to it, got other text; its tokens cannot be told apart"
                    ),
                });
            }
            for at in from..to {
                if let Some(own) = at
                    .checked_sub(prompt_ids.len())
                    .and_then(|at| own.get_mut(at))
                {
                    *own = true;
                }
            }
        }
        Ok(Some(own))
    }
}

fn place(location: &Location) -> String {
    match location.line {
        Some(line) => format!("line {line}"),
        None => format!("row {}", location.row + 1),
    }
}
