//! Completions as rows: what the commands write and read as JSON lines.

use std::io::{BufRead, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::JudgeError;
use crate::error::excerpt;

/// A completion of a prompt, and whatever else is known of it.
///
/// As JSON it is one flat object: `{"prompt": "..", "completion": "..", "finished": true}`. These
/// fields of the metadata have a meaning here; all others are passed on untouched:
///
/// - `finished`: whether the policy ended the text itself. `true` where it is left out.
/// - `n_tokens`: the length in tokens, for [`LengthUnit::Tokens`](crate::LengthUnit::Tokens).
/// - `completion_ids`: the tokens as they were drawn, for [`MemoReward`](crate::MemoReward).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The conditioning text.
    pub prompt: String,
    /// What the policy added.
    pub completion: String,
    /// All other fields of the row, in their order.
    #[serde(flatten)]
    pub metadata: Map<String, Value>,
}

impl Sample {
    /// A sample without metadata.
    pub fn new(prompt: impl Into<String>, completion: impl Into<String>) -> Self {
        Self {
            prompt: prompt.into(),
            completion: completion.into(),
            metadata: Map::new(),
        }
    }

    /// The sample with one more field of metadata.
    #[must_use]
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.metadata.insert(field.into(), value.into());
        self
    }

    /// Whether the policy ended the text itself rather than being cut off: the field `finished`,
    /// `true` where there is none. `index` is the place to name in the error.
    ///
    /// # Errors
    ///
    /// [`JudgeError::Metadata`] when the field is neither `true` nor `false`.
    pub fn finished(&self, index: usize) -> Result<bool, JudgeError> {
        match self.metadata.get("finished") {
            None => Ok(true),
            Some(Value::Bool(finished)) => Ok(*finished),
            Some(other) => Err(JudgeError::Metadata {
                index,
                field: "finished",
                expected: "true or false",
                value: excerpt(&other.to_string()),
            }),
        }
    }
}

/// A completion and its reward.
///
/// As JSON it is the sample's flat object with a field `reward` in front.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredSample {
    /// How good the completion is, in reward units.
    pub reward: f64,
    /// The completion.
    #[serde(flatten)]
    pub sample: Sample,
}

/// The rows of a JSON lines file; blank lines are skipped.
///
/// `name` stands for the file in messages.
///
/// # Errors
///
/// [`JudgeError::Line`] for a line that cannot be read or is no such row.
///
/// # Examples
///
/// ```
/// use judge::{Sample, read_jsonl};
///
/// let text = "{\"prompt\": \"Hi\", \"completion\": \" there\", \"n_tokens\": 1}\n";
/// let samples: Vec<Sample> = read_jsonl(text.as_bytes(), "samples.jsonl")?;
/// assert_eq!(samples, [Sample::new("Hi", " there").with("n_tokens", 1)]);
/// # Ok::<(), judge::JudgeError>(())
/// ```
pub fn read_jsonl<T: DeserializeOwned>(
    reader: impl BufRead,
    name: &str,
) -> Result<Vec<T>, JudgeError> {
    let mut rows = Vec::new();
    for (index, line) in reader.lines().enumerate() {
        let wrong = |reason: String| JudgeError::Line {
            name: name.to_string(),
            line: index + 1,
            reason,
        };
        let line = line.map_err(|error| wrong(error.to_string()))?;
        // A byte order mark before the first row, as some editors write it.
        let marked = line.strip_prefix('\u{feff}').filter(|_| index == 0);
        let row = marked.unwrap_or(&line).trim();
        if !row.is_empty() {
            rows.push(serde_json::from_str(row).map_err(|error| {
                // Its own line is always the first; the place in it is worth saying.
                let text = error.to_string();
                let what = text
                    .rsplit_once(" at line ")
                    .map_or(&*text, |(what, _)| what);
                wrong(format!("{what} (column {})", error.column()))
            })?);
        }
    }
    Ok(rows)
}

/// Writes rows as JSON lines.
///
/// # Errors
///
/// Any error of the writer.
pub fn write_jsonl<T: Serialize>(mut writer: impl Write, rows: &[T]) -> std::io::Result<()> {
    for row in rows {
        serde_json::to_writer(&mut writer, row)?;
        writer.write_all(b"\n")?;
    }
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_keeps_fields_it_does_not_know_in_their_order() {
        let line = r#"{"reward":0.1,"prompt":"p","completion":"c","z":[1],"a":null}"#;
        let rows: Vec<ScoredSample> = read_jsonl(line.as_bytes(), "x").unwrap();
        let mut written = Vec::new();
        write_jsonl(&mut written, &rows).unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), format!("{line}\n"));
    }

    #[test]
    fn a_bad_row_is_named_by_its_line() {
        let text = "{\"prompt\":\"p\",\"completion\":\"c\"}\n\n{\"prompt\":\"p\"}\n";
        let error = read_jsonl::<Sample>(text.as_bytes(), "s.jsonl").unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("s.jsonl: line 3: "), "{message}");
        assert!(message.contains("completion"), "{message}");
    }

    #[test]
    fn finished_is_true_unless_the_row_says_otherwise() {
        let sample = Sample::new("p", "c");
        assert!(sample.finished(0).unwrap());
        assert!(!sample.clone().with("finished", false).finished(0).unwrap());
        let error = sample.with("finished", "no").finished(4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sample 4: field `finished` should be true or false, got \"no\""
        );
    }
}
