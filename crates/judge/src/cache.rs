//! Answers that a judge gave, kept on disk so that none is asked for twice.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::JudgeError;
use crate::error::excerpt;

/// A judge's answer to one question, where two completions are shown one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// The completion shown first is better.
    First,
    /// The completion shown second is better.
    Second,
    /// Neither is.
    Tie,
    /// Nothing that could be read as one of these.
    Unparsed,
}

/// What was asked, as 64 hexadecimal digits; equal for equal questions only.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct QuestionKey(String);

impl QuestionKey {
    /// The SHA-256 of everything that may move the answer: who judges, the question's template,
    /// the prompt, and the completions in the order in which they are shown.
    ///
    /// As the order is part of the key and the names of the sides are not, A against B and B
    /// against A share their answers.
    #[must_use]
    pub fn new(judge: &str, template: &str, prompt: &str, first: &str, second: &str) -> Self {
        let mut hash = Sha256::new();
        for part in ["judgement 1", judge, template, prompt, first, second] {
            // With its length in front, no part can run into the next.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let digits = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self(digits)
    }
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Entry {
    key: QuestionKey,
    answer: Answer,
    /// What the judge wrote, for people to read.
    reply: String,
}

/// Answers by question, in a JSON lines file that only ever grows.
///
/// Each answer is written and flushed to disk when it comes. A line that a kill left half-written
/// is cut off when the file is opened next; everything before it counts. While a cache is open its
/// file is locked, so that two processes cannot write into each other's lines.
///
/// A line is `{"key": "<sha256>", "answer": "first", "reply": "[[A]]"}`.
#[derive(Debug)]
pub struct JudgementCache {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    answers: HashMap<QuestionKey, (Answer, String)>,
    file: Option<(PathBuf, File)>,
    /// Bytes of whole lines in the file.
    length: u64,
}

impl JudgementCache {
    /// A cache that forgets everything at the end of the process.
    #[must_use]
    pub fn in_memory() -> Self {
        Self {
            state: Mutex::new(State {
                answers: HashMap::new(),
                file: None,
                length: 0,
            }),
        }
    }

    /// Opens a cache, or begins one where there is no file.
    ///
    /// # Errors
    ///
    /// [`JudgeError::CacheLocked`] when another process has it open, [`JudgeError::Line`] when a
    /// line other than a half-written last one is no answer (the file is then left as it is), and
    /// [`JudgeError::Io`].
    pub fn open(path: &Path) -> Result<Self, JudgeError> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(JudgeError::io(path))?;
        // The system lets go of the lock when the process ends, however it ends. Where a file
        // system has no locks, the cache works without.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(JudgeError::CacheLocked { path: path.into() });
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(JudgeError::io(path))?;
        let (answers, length) = read(&bytes, path)?;
        if length < bytes.len() {
            // The half-written line goes, so that the next one does not continue it.
            file.set_len(length as u64).map_err(JudgeError::io(path))?;
        }
        Ok(Self {
            state: Mutex::new(State {
                answers,
                file: Some((path.into(), file)),
                length: length as u64,
            }),
        })
    }

    /// The answer to a question and the reply it was read from, if it was asked before.
    #[must_use]
    pub fn get(&self, key: &QuestionKey) -> Option<(Answer, String)> {
        self.lock().answers.get(key).cloned()
    }

    /// Keeps an answer: on disk when this returns. A later answer to the same question takes the
    /// place of an earlier one.
    ///
    /// # Errors
    ///
    /// [`JudgeError::Io`], a full disk for example; the file then ends with the line before.
    pub fn record(&self, key: &QuestionKey, answer: Answer, reply: &str) -> Result<(), JudgeError> {
        let mut state = self.lock();
        let state = &mut *state;
        if let Some((path, file)) = &mut state.file {
            let entry = Entry {
                key: key.clone(),
                answer,
                reply: reply.into(),
            };
            let mut line =
                serde_json::to_vec(&entry).map_err(|error| JudgeError::io(path)(error.into()))?;
            line.push(b'\n');
            let written = file.write_all(&line).and_then(|()| file.sync_data());
            if let Err(error) = written {
                // Best effort: should this fail too, opening cuts the line off.
                let _cut = file.set_len(state.length);
                let _end = file.seek(SeekFrom::End(0));
                return Err(JudgeError::io(path)(error));
            }
            state.length += line.len() as u64;
        }
        state.answers.insert(key.clone(), (answer, reply.into()));
        Ok(())
    }

    /// How many questions have an answer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().answers.len()
    }

    /// Whether there is no answer yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // An answer is inserted whole or not at all, so what a panic left is sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Answers = HashMap<QuestionKey, (Answer, String)>;

/// The answers of a file and the length of its whole lines, in bytes.
fn read(bytes: &[u8], path: &Path) -> Result<(Answers, usize), JudgeError> {
    let mut answers = HashMap::new();
    let (mut length, mut n_lines) = (0, 0);
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        n_lines += 1;
        let wrong = |reason: String| JudgeError::Line {
            name: path.display().to_string(),
            line: n_lines,
            reason,
        };
        let Some(whole) = line.strip_suffix(b"\n") else {
            // Only a file of ours may lose its tail: a wrong path must not cost anybody a file.
            let start = br#"{"key":""#;
            if start.starts_with(line) || line.starts_with(start) {
                break;
            }
            let found = excerpt(&String::from_utf8_lossy(line));
            return Err(wrong(format!("expected a judge's answer, got {found}")));
        };
        let entry: Entry = serde_json::from_slice(whole).map_err(|error| {
            let found = excerpt(&String::from_utf8_lossy(whole));
            wrong(format!("expected a judge's answer, got {found}: {error}"))
        })?;
        answers.insert(entry.key, (entry.answer, entry.reply));
        length += line.len();
    }
    Ok((answers, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(prompt: &str) -> QuestionKey {
        QuestionKey::new("judge", "template", prompt, "first", "second")
    }

    fn filled(path: &Path, n: usize) {
        let cache = JudgementCache::open(path).unwrap();
        for i in 0..n {
            let reply = format!("line\n{i}");
            cache
                .record(&key(&i.to_string()), Answer::First, &reply)
                .unwrap();
        }
    }

    #[test]
    fn answers_are_there_when_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.jsonl");
        filled(&path, 3);
        let cache = JudgementCache::open(&path).unwrap();
        assert_eq!(cache.len(), 3);
        assert_eq!(
            cache.get(&key("1")),
            Some((Answer::First, "line\n1".into()))
        );
        assert_eq!(cache.get(&key("7")), None);
    }

    #[test]
    fn an_answer_is_on_disk_before_the_cache_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.jsonl");
        let cache = JudgementCache::open(&path).unwrap();
        cache.record(&key("a"), Answer::Tie, "[[TIE]]").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.ends_with("\"answer\":\"tie\",\"reply\":\"[[TIE]]\"}\n"),
            "{text}"
        );
    }

    #[test]
    fn a_file_cut_at_any_byte_keeps_every_whole_line_and_takes_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.jsonl");
        filled(&path, 2);
        let whole = std::fs::read(&path).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for end in 0..=whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            let cache = JudgementCache::open(&path).unwrap();
            let expected = usize::from(end >= first) + usize::from(end == whole.len());
            assert_eq!(cache.len(), expected, "cut at {end}");
            cache.record(&key("new"), Answer::Second, "B").unwrap();
            drop(cache);
            assert_eq!(JudgementCache::open(&path).unwrap().len(), expected + 1);
        }
    }

    #[test]
    fn a_file_that_is_no_cache_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        for text in [
            "my notes",
            "my notes\n",
            "{\"key\":\"0\"}\nmore",
            "{\"prompt\":\"x\"",
        ] {
            std::fs::write(&path, text).unwrap();
            let error = JudgementCache::open(&path).unwrap_err();
            assert!(error.to_string().contains("notes.txt: line 1: "), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_cache_that_is_open_cannot_be_opened_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.jsonl");
        let first = JudgementCache::open(&path).unwrap();
        let error = JudgementCache::open(&path).unwrap_err();
        assert!(matches!(error, JudgeError::CacheLocked { .. }), "{error}");
        drop(first);
        JudgementCache::open(&path).unwrap();
    }

    #[test]
    fn keys_differ_wherever_anything_that_was_asked_differs() {
        let parts = ["j", "t", "p", "a", "b"];
        let of =
            |parts: [&str; 5]| QuestionKey::new(parts[0], parts[1], parts[2], parts[3], parts[4]);
        let mut seen = std::collections::HashSet::from([of(parts)]);
        for i in 0..5 {
            let mut changed = parts;
            changed[i] = "other";
            assert!(seen.insert(of(changed)), "part {i}");
        }
        assert!(seen.insert(of(["j", "t", "p", "b", "a"])), "order");
        assert!(seen.insert(of(["jt", "", "p", "a", "b"])), "boundaries");
    }

    #[test]
    fn the_key_of_a_question_is_stable_across_versions() {
        // Changing it would make everybody's caches worthless; count up "judgement 1" if it must.
        let key = serde_json::to_string(&key("p")).unwrap();
        assert_eq!(key.len(), 66);
        assert_eq!(&key[1..9], "fe9011da");
    }
}
