//! From typed rows to token ids, by TRL's rules.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Content, DataError, DataReport, DropReason, LabelledRow, Location, PreferenceRow, SftBody,
    SftRow,
};
use crate::chat::{ChatTemplate, Message, RenderOptions};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// How the tokens of a text prompt and its completion are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boundary {
    /// Prompt and completion are encoded as one text, as TRL does; the completion starts where
    /// these tokens first differ from the prompt's own, so a token merged across the boundary
    /// belongs to the completion.
    #[default]
    Joined,
    /// Prompt and completion are encoded apart and put together, for tokenizers that would merge
    /// across nearly every boundary. Conversations are encoded as one text all the same.
    Apart,
}

/// What happens to a row that cannot be learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Treatment {
    /// It is left out and counted.
    Drop,
    /// It is an error that names the row.
    Refuse,
}

/// What happens to a row of which a completion says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmptyCompletions {
    /// It is an error that names the row.
    #[default]
    Refuse,
    /// It is left out and counted.
    Drop,
    /// The end of sequence alone is the completion, as TRL takes it.
    Keep,
}

/// How rows become tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizeOptions {
    /// Longest prompt with completion, in tokens; the end of a longer completion is cut.
    pub max_length: Option<usize>,
    /// The model's longest sequence; a row longer than it (after `max_length`) is an error.
    pub window: Option<usize>,
    /// The model's vocabulary; a token id outside it is an error.
    pub vocab_size: usize,
    /// How prompt and completion meet.
    pub boundary: Boundary,
    /// Rows whose prompt fills `max_length`. TRL drops them.
    pub long_prompts: Treatment,
    /// Rows with an empty completion.
    pub empty_completions: EmptyCompletions,
}

impl TokenizeOptions {
    /// No length limit, joined boundaries, long prompts dropped, empty completions refused.
    #[must_use]
    pub fn new(vocab_size: usize) -> Self {
        Self {
            max_length: None,
            window: None,
            vocab_size,
            boundary: Boundary::default(),
            long_prompts: Treatment::Drop,
            empty_completions: EmptyCompletions::default(),
        }
    }
}

/// A preference in tokens.
///
/// The sequences a model sees are `prompt_ids ++ chosen_ids` and `prompt_ids ++ rejected_ids`.
/// Completions are never empty; the prompt may be, and then the first completion token has nothing
/// to be predicted from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PreferencePair {
    /// Tokens that both sequences start with.
    pub prompt_ids: Vec<u32>,
    /// Tokens of the preferred completion, the end of sequence included where it was not cut.
    pub chosen_ids: Vec<u32>,
    /// Tokens of the dispreferred completion.
    pub rejected_ids: Vec<u32>,
    /// The row's [`Location::row`].
    pub row: usize,
}

/// A fine-tuning example in tokens; only the completion is learned.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SftExample {
    /// Tokens that are only read; empty where a text is learned whole.
    pub prompt_ids: Vec<u32>,
    /// Tokens that are learned.
    pub completion_ids: Vec<u32>,
    /// The row's [`Location::row`].
    pub row: usize,
}

/// A labelled completion in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LabelledExample {
    /// Tokens of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Tokens of the completion.
    pub completion_ids: Vec<u32>,
    /// Whether the completion is a desirable one.
    pub desirable: bool,
    /// The row's [`Location::row`].
    pub row: usize,
}

/// Examples in the order of their rows, and what became of the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized<T> {
    /// The rows that were kept.
    pub examples: Vec<T>,
    /// The counts.
    pub report: DataReport,
}

/// Tokens of preferences, made on all threads.
///
/// As TRL 1.16 does it: to text completions the end of sequence is appended unless they end with
/// it (conversations get theirs from the chat template); the prompt's tokens are the longest start
/// that the prompt alone shares with both joined texts; rows whose prompt fills `max_length` are
/// dropped and longer completions are cut at the end. No beginning of sequence is added beyond what
/// the tokenizer puts before any text.
///
/// # Errors
///
/// The first row that is refused, or [`DataError::AllDropped`].
///
/// # Examples
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lm::data::{TokenizeOptions, read_preferences, tokenize_pairs};
/// let tokenizer = lm::tokenizer::Tokenizer::from_folder("model".as_ref())?;
/// let template = lm::chat::ChatTemplate::from_tokenizer(&tokenizer)?;
/// let rows = read_preferences("pairs.jsonl".as_ref())?.collect::<Result<Vec<_>, _>>()?;
/// let options = TokenizeOptions { max_length: Some(512), ..TokenizeOptions::new(49152) };
/// let pairs = tokenize_pairs(&rows, &tokenizer, template.as_ref(), &options)?;
/// println!("{}", pairs.report);
/// # Ok(())
/// # }
/// ```
pub fn tokenize_pairs(
    rows: &[PreferenceRow],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
) -> Result<Tokenized<PreferencePair>, DataError> {
    tokenize_pairs_observed(rows, tokenizer, template, options, &|| ())
}

/// [`tokenize_pairs`], calling `observe` from any thread after each row, for a progress bar.
///
/// # Errors
///
/// As [`tokenize_pairs`].
pub fn tokenize_pairs_observed(
    rows: &[PreferenceRow],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
    observe: &(dyn Fn() + Sync),
) -> Result<Tokenized<PreferencePair>, DataError> {
    run(rows, observe, |row, report| {
        tokenize_pair(row.location.row, row, tokenizer, template, options, report)
    })
}

/// Tokens of one preference, or `None` where it is dropped; counts go to `report`.
///
/// For reading a long file row by row. `index` becomes [`PreferencePair::row`].
///
/// # Errors
///
/// A row that is refused.
pub fn tokenize_pair(
    index: usize,
    row: &PreferenceRow,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
    report: &mut DataReport,
) -> Result<Option<PreferencePair>, DataError> {
    let encoder = Encoder {
        location: &row.location,
        tools: row.tools.as_deref(),
        kwargs: &row.template_kwargs,
        tokenizer,
        template,
        options,
    };
    let sides = [("chosen", &row.chosen), ("rejected", &row.rejected)];
    let Some((prompt_ids, [chosen_ids, rejected_ids])) =
        encoder.completions(&row.prompt, sides, report)?
    else {
        return Ok(None);
    };
    report.identical += usize::from(chosen_ids == rejected_ids);
    Ok(Some(PreferencePair {
        prompt_ids,
        chosen_ids,
        rejected_ids,
        row: index,
    }))
}

/// Tokens of fine-tuning rows, made on all threads, by the rules of [`tokenize_pairs`].
///
/// A text or conversation that is learned whole has an empty prompt.
///
/// # Errors
///
/// The first row that is refused, or [`DataError::AllDropped`].
pub fn tokenize_sft(
    rows: &[SftRow],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
) -> Result<Tokenized<SftExample>, DataError> {
    run(rows, &|| (), |row, report| {
        let encoder = Encoder {
            location: &row.location,
            tools: row.tools.as_deref(),
            kwargs: &row.template_kwargs,
            tokenizer,
            template,
            options,
        };
        let found = match &row.body {
            SftBody::Whole(content) => encoder.whole(content, report)?.map(|ids| (vec![], ids)),
            SftBody::Completion { prompt, completion } => encoder
                .completions(prompt, [("completion", completion)], report)?
                .map(|(prompt_ids, [ids])| (prompt_ids, ids)),
        };
        Ok(found.map(|(prompt_ids, completion_ids)| SftExample {
            prompt_ids,
            completion_ids,
            row: row.location.row,
        }))
    })
}

/// Tokens of labelled completions, made on all threads, by the rules of [`tokenize_pairs`].
///
/// # Errors
///
/// The first row that is refused, or [`DataError::AllDropped`].
pub fn tokenize_labelled(
    rows: &[LabelledRow],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
) -> Result<Tokenized<LabelledExample>, DataError> {
    run(rows, &|| (), |row, report| {
        let encoder = Encoder {
            location: &row.location,
            tools: row.tools.as_deref(),
            kwargs: &row.template_kwargs,
            tokenizer,
            template,
            options,
        };
        let found = encoder.completions(&row.prompt, [("completion", &row.completion)], report)?;
        Ok(found.map(|(prompt_ids, [completion_ids])| LabelledExample {
            prompt_ids,
            completion_ids,
            desirable: row.desirable,
            row: row.location.row,
        }))
    })
}

fn run<R: Sync, T: Send>(
    rows: &[R],
    observe: &(dyn Fn() + Sync),
    one: impl Fn(&R, &mut DataReport) -> Result<Option<T>, DataError> + Sync,
) -> Result<Tokenized<T>, DataError> {
    let outcomes: Vec<_> = rows
        .par_iter()
        .map(|row| {
            let mut report = DataReport::default();
            let outcome = one(row, &mut report).map(|example| (example, report));
            observe();
            outcome
        })
        .collect();
    let mut examples = Vec::with_capacity(rows.len());
    let mut report = DataReport::default();
    // In order, so that the first bad row of the file is the one reported.
    for outcome in outcomes {
        let (example, counts) = outcome?;
        report += &counts;
        examples.extend(example);
    }
    if examples.is_empty() && !rows.is_empty() {
        return Err(DataError::AllDropped {
            rows: report.rows,
            reasons: report.drop_summary(),
        });
    }
    Ok(Tokenized { examples, report })
}

struct Encoder<'a> {
    location: &'a Location,
    tools: Option<&'a [Value]>,
    kwargs: &'a Map<String, Value>,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    options: &'a TokenizeOptions,
}

impl Encoder<'_> {
    /// A prompt with its completions, each under its column's name.
    #[expect(
        clippy::type_complexity,
        reason = "prompt and completions, used at once"
    )]
    fn completions<const N: usize>(
        &self,
        prompt: &Content,
        sides: [(&str, &Content); N],
        report: &mut DataReport,
    ) -> Result<Option<(Vec<u32>, [Vec<u32>; N])>, DataError> {
        report.rows += 1;
        if self.options.empty_completions != EmptyCompletions::Keep {
            for (column, content) in sides {
                if content.is_empty() {
                    return self.empty(column, report).map(|()| None);
                }
            }
        }
        let (prompt_ids, mut completions, merged, appended) = match prompt {
            Content::Text(prompt) => self.text(prompt, sides)?,
            Content::Chat(prompt) => self.chat(prompt, sides)?,
        };
        for (ids, (column, _)) in completions.iter().zip(sides) {
            if ids.is_empty() {
                return self.empty(column, report).map(|()| None);
            }
        }
        // Behind no prompt the first token is predicted from nothing, so that no token is left.
        if prompt_ids.is_empty() && completions.iter().all(|ids| ids.len() == 1) {
            return self.empty(sides[0].0, report).map(|()| None);
        }
        self.in_vocabulary("prompt", &prompt_ids)?;
        for (ids, (column, _)) in completions.iter().zip(sides) {
            self.in_vocabulary(column, ids)?;
        }

        let n_prompt = prompt_ids.len();
        if let Some(max_length) = self.options.max_length {
            if n_prompt >= max_length {
                if self.options.long_prompts == Treatment::Refuse {
                    return Err(DataError::LongPrompt {
                        location: self.location.clone(),
                        tokens: n_prompt,
                        allowed: max_length.saturating_sub(1),
                    });
                }
                *report.dropped.entry(DropReason::PromptTooLong).or_default() += 1;
                return Ok(None);
            }
            for (i, ids) in completions.iter_mut().enumerate() {
                let room = max_length - n_prompt;
                if ids.len() > room {
                    report.tokens_cut += ids.len() - room;
                    ids.truncate(room);
                    match i {
                        0 => report.chosen_truncated += 1,
                        _ => report.rejected_truncated += 1,
                    }
                }
            }
        }
        for (ids, (column, _)) in completions.iter().zip(sides) {
            self.in_window(column, n_prompt + ids.len())?;
            report.longest = report.longest.max(n_prompt + ids.len());
            report.completion_tokens += ids.len();
        }
        report.kept += 1;
        report.completions += N;
        report.prompt_tokens += n_prompt;
        report.boundary_merged += usize::from(merged);
        report.eos_appended += appended;
        report.without_prompt += usize::from(n_prompt == 0);
        Ok(Some((prompt_ids, completions)))
    }

    #[expect(clippy::type_complexity, reason = "ids and two counts, used at once")]
    fn text<const N: usize>(
        &self,
        prompt: &str,
        sides: [(&str, &Content); N],
    ) -> Result<(Vec<u32>, [Vec<u32>; N], bool, usize), DataError> {
        let eos = self
            .tokenizer
            .eos_text()
            .map_err(|source| self.tokenizer_error(sides[0].0, source))?;
        let mut prompt_ids = self
            .tokenizer
            .encode(prompt)
            .map_err(|source| self.tokenizer_error("prompt", source))?;
        let mut completions = [const { Vec::new() }; N];
        let mut appended = 0;
        for (ids, (column, content)) in completions.iter_mut().zip(sides) {
            let Content::Text(completion) = content else {
                return Err(self.mixed(column, "a string"));
            };
            let ended = completion.ends_with(eos);
            appended += usize::from(!ended);
            let end = if ended { "" } else { eos };
            *ids = match self.options.boundary {
                Boundary::Joined => self.tokenizer.encode(&format!("{prompt}{completion}{end}")),
                Boundary::Apart => self.tokenizer.encode_plain(&format!("{completion}{end}")),
            }
            .map_err(|source| self.tokenizer_error(column, source))?;
        }
        let merged = match self.options.boundary {
            Boundary::Joined => split(&mut prompt_ids, &mut completions),
            Boundary::Apart => {
                // A tokenizer may end every text; the prompt is not the end here.
                while prompt_ids
                    .last()
                    .is_some_and(|id| self.tokenizer.eos_ids().contains(id))
                    && !prompt.ends_with(eos)
                {
                    prompt_ids.pop();
                }
                false
            }
        };
        Ok((prompt_ids, completions, merged, appended))
    }

    #[expect(clippy::type_complexity, reason = "ids and two counts, used at once")]
    fn chat<const N: usize>(
        &self,
        prompt: &[Message],
        sides: [(&str, &Content); N],
    ) -> Result<(Vec<u32>, [Vec<u32>; N], bool, usize), DataError> {
        let mut prompt_ids = self.rendered("prompt", prompt, true)?;
        let mut completions = [const { Vec::new() }; N];
        for (ids, (column, content)) in completions.iter_mut().zip(sides) {
            let Content::Chat(messages) = content else {
                return Err(self.mixed(column, "a list of messages"));
            };
            let whole: Vec<Message> = prompt.iter().chain(messages).cloned().collect();
            *ids = self.rendered(column, &whole, false)?;
        }
        let merged = split(&mut prompt_ids, &mut completions);
        Ok((prompt_ids, completions, merged, 0))
    }

    /// A text or conversation that is learned from its first token to its last.
    fn whole(
        &self,
        content: &Content,
        report: &mut DataReport,
    ) -> Result<Option<Vec<u32>>, DataError> {
        report.rows += 1;
        let column = match content {
            Content::Text(_) => "text",
            Content::Chat(_) => "messages",
        };
        if content.is_empty() {
            return self.empty(column, report).map(|()| None);
        }
        let mut ids = match content {
            Content::Text(text) => {
                let encode = || {
                    let eos = self.tokenizer.eos_text()?;
                    if text.ends_with(eos) {
                        return self.tokenizer.encode(text);
                    }
                    self.tokenizer.encode(&format!("{text}{eos}"))
                };
                let ids = encode().map_err(|source| self.tokenizer_error(column, source))?;
                let ended = self
                    .tokenizer
                    .eos_text()
                    .is_ok_and(|eos| text.ends_with(eos));
                report.eos_appended += usize::from(!ended);
                ids
            }
            Content::Chat(messages) => self.rendered(column, messages, false)?,
        };
        self.in_vocabulary(column, &ids)?;
        if let Some(max_length) = self.options.max_length
            && ids.len() > max_length
        {
            report.tokens_cut += ids.len() - max_length;
            report.chosen_truncated += 1;
            ids.truncate(max_length);
        }
        // The first token is predicted from nothing.
        if ids.len() < 2 {
            return self.empty(column, report).map(|()| None);
        }
        self.in_window(column, ids.len())?;
        report.kept += 1;
        report.completions += 1;
        report.completion_tokens += ids.len();
        report.longest = report.longest.max(ids.len());
        Ok(Some(ids))
    }

    fn rendered(
        &self,
        column: &str,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, DataError> {
        let template = self.template.ok_or_else(|| DataError::NoTemplate {
            location: self.location.clone(),
            tokenizer: self.tokenizer.path().to_path_buf(),
        })?;
        let options = RenderOptions {
            add_generation_prompt,
            tools: self.tools,
            kwargs: Some(self.kwargs),
        };
        template
            .encode(self.tokenizer, messages, &options)
            .map_err(|source| DataError::Template {
                location: self.location.clone(),
                column: column.to_owned(),
                source: Box::new(source),
            })
    }

    fn empty(&self, column: &str, report: &mut DataReport) -> Result<(), DataError> {
        if self.options.empty_completions == EmptyCompletions::Refuse {
            return Err(DataError::EmptyCompletion {
                location: self.location.clone(),
                column: column.to_owned(),
            });
        }
        *report
            .dropped
            .entry(DropReason::EmptyCompletion)
            .or_default() += 1;
        Ok(())
    }

    fn in_vocabulary(&self, column: &str, ids: &[u32]) -> Result<(), DataError> {
        let vocab_size = self.options.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            None => Ok(()),
            Some(&id) => Err(DataError::TokenOutsideVocabulary {
                location: self.location.clone(),
                column: column.to_owned(),
                id,
                vocab_size,
            }),
        }
    }

    fn in_window(&self, column: &str, tokens: usize) -> Result<(), DataError> {
        match self.options.window {
            Some(window) if tokens > window => Err(DataError::LongerThanWindow {
                location: self.location.clone(),
                column: column.to_owned(),
                tokens,
                window,
            }),
            _ => Ok(()),
        }
    }

    fn mixed(&self, column: &str, expected: &str) -> DataError {
        DataError::WrongType {
            location: self.location.clone(),
            column: column.to_owned(),
            expected: format!("{expected}, as `prompt` is"),
            found: "the other form".to_owned(),
        }
    }

    fn tokenizer_error(&self, column: &str, source: TokenizerError) -> DataError {
        DataError::Tokenizer {
            location: self.location.clone(),
            column: column.to_owned(),
            source: Box::new(source),
        }
    }
}

/// Cuts the prompt where it first differs from any of the joined sequences, and the prompt off
/// those. Returns whether the prompt lost tokens.
fn split<const N: usize>(prompt: &mut Vec<u32>, joined: &mut [Vec<u32>; N]) -> bool {
    let n = joined
        .iter()
        .map(|ids| {
            ids.iter()
                .zip(prompt.iter())
                .take_while(|(a, b)| a == b)
                .count()
        })
        .min()
        .unwrap_or(prompt.len());
    for ids in joined {
        ids.drain(..n);
    }
    let merged = n < prompt.len();
    prompt.truncate(n);
    merged
}
