//! Typed rows: what a column may hold, checked on every row.

use std::path::Path;

use serde_json::{Map, Value};

use super::read::kind;
use super::{DataError, DataReport, DropReason, Location, RawRow, RowReader, Treatment};
use crate::chat::Message;

/// What a prompt or a completion holds: text, or messages for a chat template.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Messages, each with a `role`.
    Chat(Vec<Message>),
}

impl Content {
    /// Whether there is nothing in it: no text, or no message that says or calls anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Chat(messages) => messages.iter().all(|message| {
                ["content", "tool_calls", "reasoning_content", "thinking"]
                    .iter()
                    .all(|key| match message.get(*key) {
                        None | Some(Value::Null) => true,
                        Some(Value::String(text)) => text.is_empty(),
                        Some(Value::Array(items)) => items.is_empty(),
                        Some(_) => false,
                    })
            }),
        }
    }

    /// What a person reads: the text, or the contents of the messages with a line between them.
    #[must_use]
    pub fn to_text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Chat(messages) => messages
                .iter()
                .map(|message| match message.get("content") {
                    Some(Value::String(text)) => text.clone(),
                    Some(Value::Array(parts)) => parts
                        .iter()
                        .filter_map(|part| part.get("text").and_then(Value::as_str))
                        .collect(),
                    _ => String::new(),
                })
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }

    fn form(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Chat(_) => "a list of messages",
        }
    }
}

/// A preference: a prompt with a chosen and a rejected completion.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferenceRow {
    /// Where the row stands.
    pub location: Location,
    /// The prompt; taken from the common start of the completions where the row has none.
    pub prompt: Content,
    /// The preferred completion, without the prompt.
    pub chosen: Content,
    /// The dispreferred completion, without the prompt.
    pub rejected: Content,
    /// JSON schemas of tools for the chat template.
    pub tools: Option<Vec<Value>>,
    /// Variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// Every other column, as it was.
    pub extra: Map<String, Value>,
}

/// A row of fine-tuning data.
#[derive(Debug, Clone, PartialEq)]
pub struct SftRow {
    /// Where the row stands.
    pub location: Location,
    /// What is learned.
    pub body: SftBody,
    /// JSON schemas of tools for the chat template.
    pub tools: Option<Vec<Value>>,
    /// Variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// Every other column, as it was.
    pub extra: Map<String, Value>,
}

/// What a row of fine-tuning data teaches.
#[derive(Debug, Clone, PartialEq)]
pub enum SftBody {
    /// A text (column `text`) or a conversation (column `messages`), learned whole.
    Whole(Content),
    /// A completion of a prompt; the prompt is not learned.
    Completion {
        /// The prompt.
        prompt: Content,
        /// The completion.
        completion: Content,
    },
}

/// A completion that is labelled good or bad by itself, as KTO reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledRow {
    /// Where the row stands.
    pub location: Location,
    /// The prompt.
    pub prompt: Content,
    /// The completion.
    pub completion: Content,
    /// Whether the completion is a desirable one.
    pub desirable: bool,
    /// JSON schemas of tools for the chat template.
    pub tools: Option<Vec<Value>>,
    /// Variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// Every other column, as it was.
    pub extra: Map<String, Value>,
}

impl PreferenceRow {
    /// A text preference made in memory; `label` and `row` name it in messages.
    #[must_use]
    pub fn from_text(label: &str, row: usize, prompt: &str, chosen: &str, rejected: &str) -> Self {
        Self {
            location: Location::in_memory(label, row),
            prompt: Content::Text(prompt.to_owned()),
            chosen: Content::Text(chosen.to_owned()),
            rejected: Content::Text(rejected.to_owned()),
            tools: None,
            template_kwargs: Map::new(),
            extra: Map::new(),
        }
    }

    /// A checked preference from the columns of a row.
    ///
    /// Without a `prompt` it is the longest common start of `chosen` and `rejected`: of characters
    /// for text, moved back over one space, and of messages for conversations. As in TRL, where
    /// one text is the start of the other, its last character stays with the completions.
    ///
    /// # Errors
    ///
    /// A column that is missing or of the wrong type, or text and messages in one row.
    pub fn from_raw(raw: RawRow) -> Result<Self, DataError> {
        let mut row = Columns::new(raw);
        let chosen = row.content("chosen")?;
        let rejected = row.content("rejected")?;
        row.same_form("rejected", &rejected, "chosen", &chosen)?;
        let (prompt, chosen, rejected) = if row.has("prompt") {
            let prompt = row.content("prompt")?;
            row.same_form("prompt", &prompt, "chosen", &chosen)?;
            (prompt, chosen, rejected)
        } else {
            split_prompt(chosen, rejected)
        };
        let (tools, template_kwargs) = row.template_columns()?;
        Ok(Self {
            location: row.location,
            prompt,
            chosen,
            rejected,
            tools,
            template_kwargs,
            extra: row.columns,
        })
    }
}

impl SftRow {
    /// A text to learn whole, made in memory.
    #[must_use]
    pub fn from_text(label: &str, row: usize, text: &str) -> Self {
        Self::in_memory(label, row, SftBody::Whole(Content::Text(text.to_owned())))
    }

    /// A completion to learn, made in memory.
    #[must_use]
    pub fn from_completion(label: &str, row: usize, prompt: &str, completion: &str) -> Self {
        Self::in_memory(
            label,
            row,
            SftBody::Completion {
                prompt: Content::Text(prompt.to_owned()),
                completion: Content::Text(completion.to_owned()),
            },
        )
    }

    fn in_memory(label: &str, row: usize, body: SftBody) -> Self {
        Self {
            location: Location::in_memory(label, row),
            body,
            tools: None,
            template_kwargs: Map::new(),
            extra: Map::new(),
        }
    }

    /// A checked row from its columns: `prompt` and `completion`, or `messages`, or `text`.
    ///
    /// # Errors
    ///
    /// A column that is missing or of the wrong type, or text and messages in one row.
    pub fn from_raw(raw: RawRow) -> Result<Self, DataError> {
        let mut row = Columns::new(raw);
        let body = if row.has("completion") {
            let completion = row.content("completion")?;
            let prompt = row.content("prompt")?;
            row.same_form("prompt", &prompt, "completion", &completion)?;
            SftBody::Completion { prompt, completion }
        } else if row.has("messages") {
            match row.content("messages")? {
                chat @ Content::Chat(_) => SftBody::Whole(chat),
                Content::Text(_) => {
                    return Err(row.wrong("messages", "a list of messages", "a string"));
                }
            }
        } else if row.has("text") {
            match row.content("text")? {
                text @ Content::Text(_) => SftBody::Whole(text),
                Content::Chat(_) => {
                    return Err(row.wrong("text", "a string", "a list of messages"));
                }
            }
        } else {
            return Err(row.missing("text`, `messages`, or `prompt` with `completion"));
        };
        let (tools, template_kwargs) = row.template_columns()?;
        Ok(Self {
            location: row.location,
            body,
            tools,
            template_kwargs,
            extra: row.columns,
        })
    }
}

impl LabelledRow {
    /// A checked row from its columns: `prompt`, `completion` and a true or false `label`.
    ///
    /// # Errors
    ///
    /// A column that is missing or of the wrong type, or text and messages in one row.
    pub fn from_raw(raw: RawRow) -> Result<Self, DataError> {
        let mut row = Columns::new(raw);
        let prompt = row.content("prompt")?;
        let completion = row.content("completion")?;
        row.same_form("prompt", &prompt, "completion", &completion)?;
        let desirable = match row.take("label")? {
            Value::Bool(label) => label,
            other => return Err(row.wrong("label", "true or false", kind(&other))),
        };
        let (tools, template_kwargs) = row.template_columns()?;
        Ok(Self {
            location: row.location,
            prompt,
            completion,
            desirable,
            tools,
            template_kwargs,
            extra: row.columns,
        })
    }
}

/// Preferences of a file, one at a time.
///
/// Whether rows have a `prompt` is settled by the first one, and all must agree with it.
///
/// # Errors
///
/// A file that cannot be opened; then, row by row, what [`PreferenceRow::from_raw`] refuses.
pub fn read_preferences(
    path: &Path,
) -> Result<impl Iterator<Item = Result<PreferenceRow, DataError>> + use<>, DataError> {
    let mut explicit = None;
    Ok(fused(RowReader::open(path)?, move |raw: RawRow| {
        let here = raw.columns.contains_key("prompt");
        if *explicit.get_or_insert(here) != here {
            let column = "prompt".to_owned();
            let found = names(&raw.columns);
            return Err(if here {
                DataError::WrongType {
                    location: raw.location,
                    column,
                    expected: "no prompt, as in the first row".to_owned(),
                    found: "one".to_owned(),
                }
            } else {
                DataError::MissingColumn {
                    location: raw.location,
                    column,
                    found,
                }
            });
        }
        PreferenceRow::from_raw(raw)
    }))
}

/// Fine-tuning rows of a file, one at a time.
///
/// # Errors
///
/// A file that cannot be opened; then, row by row, what [`SftRow::from_raw`] refuses.
pub fn read_sft(
    path: &Path,
) -> Result<impl Iterator<Item = Result<SftRow, DataError>> + use<>, DataError> {
    Ok(fused(RowReader::open(path)?, SftRow::from_raw))
}

/// Labelled completions of a file, one at a time.
///
/// # Errors
///
/// A file that cannot be opened; then, row by row, what [`LabelledRow::from_raw`] refuses.
pub fn read_labelled(
    path: &Path,
) -> Result<impl Iterator<Item = Result<LabelledRow, DataError>> + use<>, DataError> {
    Ok(fused(RowReader::open(path)?, LabelledRow::from_raw))
}

/// All rows of a reader in memory, and the count of those that were dropped.
///
/// With [`Treatment::Drop`] rows with a missing or wrong column are left out and counted; add the
/// report to that of tokenising. Bad JSON and unreadable files are errors all the same.
///
/// # Errors
///
/// The first bad row, or [`DataError::AllMalformed`].
///
/// # Examples
///
/// ```no_run
/// # fn main() -> Result<(), lm::data::DataError> {
/// use lm::data::{Treatment, load_rows, read_preferences};
/// let (rows, dropped) = load_rows(read_preferences("pairs.jsonl".as_ref())?, Treatment::Drop)?;
/// println!("{} rows, {} dropped", rows.len(), dropped.n_dropped());
/// # Ok(())
/// # }
/// ```
pub fn load_rows<T>(
    reader: impl Iterator<Item = Result<T, DataError>>,
    malformed: Treatment,
) -> Result<(Vec<T>, DataReport), DataError> {
    let mut rows = Vec::new();
    let mut report = DataReport::default();
    let mut first = None;
    for row in reader {
        match row {
            Ok(row) => rows.push(row),
            Err(error) if malformed == Treatment::Drop && error.is_malformed_row() => {
                report.rows += 1;
                *report.dropped.entry(DropReason::Malformed).or_default() += 1;
                first.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    match first {
        Some(error) if rows.is_empty() => Err(DataError::AllMalformed(Box::new(error))),
        _ => Ok((rows, report)),
    }
}

/// Rows through a check; a file without any row is an error too.
fn fused<T>(
    mut reader: RowReader,
    mut check: impl FnMut(RawRow) -> Result<T, DataError>,
) -> impl Iterator<Item = Result<T, DataError>> {
    let mut any = false;
    std::iter::from_fn(move || match reader.next() {
        Some(raw) => {
            any = true;
            Some(raw.and_then(&mut check))
        }
        None if !any => {
            any = true;
            Some(Err(DataError::NoRows {
                path: reader.path(),
            }))
        }
        None => None,
    })
}

/// The columns of a row, taken out one after the other; what is left is extra.
struct Columns {
    location: Location,
    columns: Map<String, Value>,
    names: String,
}

impl Columns {
    fn new(raw: RawRow) -> Self {
        let names = names(&raw.columns);
        Self {
            location: raw.location,
            columns: raw.columns,
            names,
        }
    }

    fn has(&self, column: &str) -> bool {
        self.columns.contains_key(column)
    }

    fn missing(&self, column: &str) -> DataError {
        DataError::MissingColumn {
            location: self.location.clone(),
            column: column.to_owned(),
            found: self.names.clone(),
        }
    }

    fn wrong(&self, column: &str, expected: &str, found: &str) -> DataError {
        DataError::WrongType {
            location: self.location.clone(),
            column: column.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    fn take(&mut self, column: &str) -> Result<Value, DataError> {
        // `shift_remove` keeps the order of what is left.
        match self.columns.shift_remove(column) {
            Some(value) if !value.is_null() => Ok(value),
            _ => Err(self.missing(column)),
        }
    }

    fn content(&mut self, column: &str) -> Result<Content, DataError> {
        match self.take(column)? {
            Value::String(text) => Ok(Content::Text(text)),
            Value::Array(items) => items
                .into_iter()
                .enumerate()
                .map(|(i, item)| self.message(column, i, item))
                .collect::<Result<_, _>>()
                .map(Content::Chat),
            other => Err(self.wrong(column, "a string or a list of messages", kind(&other))),
        }
    }

    fn message(&self, column: &str, i: usize, item: Value) -> Result<Message, DataError> {
        let place = format!("{column}[{i}]");
        let message = match item {
            Value::Object(message) => message,
            other => {
                return Err(self.wrong(&place, "a message with a `role`", kind(&other)));
            }
        };
        match message.get("role") {
            Some(Value::String(_)) => {}
            None if message.contains_key("from") => {
                return Err(self.wrong(
                    &place,
                    "a message with `role` and `content`",
                    "one with `from` and `value`",
                ));
            }
            None => return Err(self.wrong(&place, "a message with a `role`", "one without")),
            Some(other) => {
                return Err(self.wrong(&format!("{place}.role"), "a string", kind(other)));
            }
        }
        match message.get("content") {
            None | Some(Value::Null | Value::String(_) | Value::Array(_)) => Ok(message),
            Some(other) => Err(self.wrong(&format!("{place}.content"), "a string", kind(other))),
        }
    }

    fn same_form(
        &self,
        column: &str,
        content: &Content,
        other_column: &str,
        other: &Content,
    ) -> Result<(), DataError> {
        if content.form() == other.form() {
            Ok(())
        } else {
            let expected = format!("{}, as `{other_column}` is", other.form());
            Err(self.wrong(column, &expected, content.form()))
        }
    }

    /// `tools`, a list of schemas or its JSON text, and `chat_template_kwargs`.
    #[expect(clippy::type_complexity, reason = "two optional columns, used at once")]
    fn template_columns(&mut self) -> Result<(Option<Vec<Value>>, Map<String, Value>), DataError> {
        let tools = match self.columns.shift_remove("tools") {
            None | Some(Value::Null) => None,
            Some(Value::Array(tools)) => Some(tools),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Array(tools)) => Some(tools),
                Ok(Value::Null) => None,
                _ => return Err(self.wrong("tools", "a list or its JSON text", "other text")),
            },
            Some(other) => {
                return Err(self.wrong("tools", "a list or its JSON text", kind(&other)));
            }
        };
        let kwargs = match self.columns.shift_remove("chat_template_kwargs") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(kwargs)) => kwargs,
            Some(other) => {
                return Err(self.wrong("chat_template_kwargs", "an object", kind(&other)));
            }
        };
        Ok((tools, kwargs))
    }
}

fn names(columns: &Map<String, Value>) -> String {
    if columns.is_empty() {
        return "no columns".to_owned();
    }
    columns
        .keys()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// TRL's `extract_prompt`.
///
/// Where the very first characters differ the prompt is empty; TRL 1.16 then looks at the last
/// character by mistake, which is not copied.
fn split_prompt(chosen: Content, rejected: Content) -> (Content, Content, Content) {
    match (chosen, rejected) {
        (Content::Text(chosen), Content::Text(rejected)) => {
            let (c, r): (Vec<char>, Vec<char>) =
                (chosen.chars().collect(), rejected.chars().collect());
            let n = prompt_length(&c, &r);
            let n = if n > 0 && n < c.len().min(r.len()) && c[n] != r[n] && c[n - 1] == ' ' {
                n - 1
            } else {
                n
            };
            let text = |chars: &[char]| Content::Text(chars.iter().collect());
            (text(&c[..n]), text(&c[n..]), text(&r[n..]))
        }
        (Content::Chat(mut chosen), Content::Chat(mut rejected)) => {
            let n = prompt_length(&chosen, &rejected);
            let chosen_rest = chosen.split_off(n);
            let rejected_rest = rejected.split_off(n);
            (
                Content::Chat(chosen),
                Content::Chat(chosen_rest),
                Content::Chat(rejected_rest),
            )
        }
        // The caller has checked that both are of one form.
        (chosen, rejected) => (Content::Text(String::new()), chosen, rejected),
    }
}

/// Index of the first difference, or the last common index where one is the start of the other.
fn prompt_length<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let shorter = a.len().min(b.len());
    (0..shorter)
        .find(|&i| a[i] != b[i])
        .unwrap_or(shorter.saturating_sub(1))
}
