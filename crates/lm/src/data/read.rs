//! Rows of JSON lines, JSON arrays and Parquet, one at a time.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_json::WriterBuilder;
use arrow_json::writer::LineDelimited;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::DataError;

/// Rows of a Parquet file converted at a time.
const PARQUET_BATCH: usize = 256;

/// Where a row stands; prints as `FILE line 12` or `FILE row 3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file, or a label for rows made in memory.
    pub file: Arc<Path>,
    /// The row's index in the file, from 0.
    pub row: usize,
    /// The line on which the row starts, from 1; `None` for Parquet and for rows made in memory.
    pub line: Option<usize>,
}

impl Location {
    /// The place of a row made in memory.
    #[must_use]
    pub fn in_memory(label: &str, row: usize) -> Self {
        Self {
            file: Path::new(label).into(),
            row,
            line: None,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        match self.line {
            Some(line) => write!(f, "{file} line {line}"),
            None => write!(f, "{file} row {}", self.row + 1),
        }
    }
}

/// A row as it was read: where it stands, and its columns in order. Null columns are left out.
#[derive(Debug, Clone, PartialEq)]
pub struct RawRow {
    /// Where it stands.
    pub location: Location,
    /// Its columns.
    pub columns: Map<String, Value>,
}

/// How a file holds its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An object on each line.
    JsonLines,
    /// One array of objects.
    JsonArray,
    /// Apache Parquet.
    Parquet,
}

/// Reads rows one at a time, so that memory does not grow with the file.
///
/// The format is told by the file's first bytes, not by its name. After an error the
/// reader ends, unless it was only a row that is no object.
#[derive(Debug)]
pub struct RowReader {
    file: Arc<Path>,
    format: Format,
    source: Source,
    row: usize,
    done: bool,
}

enum Source {
    Lines(Box<LineSource>),
    Parquet(Box<ParquetSource>),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lines(_) => "Lines",
            Self::Parquet(_) => "Parquet",
        })
    }
}

struct LineSource {
    input: BufReader<File>,
    line: usize,
    /// In an array: whether the opening bracket was read, and whether an element was.
    opened: bool,
    started: bool,
}

struct ParquetSource {
    batches: ParquetRecordBatchReader,
    ready: std::collections::VecDeque<Map<String, Value>>,
}

impl RowReader {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// A file that cannot be opened, or that starts as none of the formats does.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let io = |source| DataError::Io {
            path: path.to_path_buf(),
            source,
        };
        let mut file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(io(std::io::ErrorKind::IsADirectory.into()));
        }
        let (format, start) = sniff(&mut file, path)?;
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        let source = match format {
            Format::Parquet => Source::Parquet(Box::new(ParquetSource {
                batches: ParquetRecordBatchReaderBuilder::try_new(file)
                    .and_then(|builder| builder.with_batch_size(PARQUET_BATCH).build())
                    .map_err(|error| DataError::Format {
                        path: path.to_path_buf(),
                        message: format!("not a readable Parquet file: {error}"),
                    })?,
                ready: std::collections::VecDeque::new(),
            })),
            Format::JsonLines | Format::JsonArray => Source::Lines(Box::new(LineSource {
                input: BufReader::with_capacity(1 << 16, file),
                line: 0,
                opened: false,
                started: false,
            })),
        };
        Ok(Self {
            file: path.into(),
            format,
            source,
            row: 0,
            done: false,
        })
    }

    /// How the file holds its rows.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.file.to_path_buf()
    }

    fn read(&mut self) -> Result<Option<RawRow>, DataError> {
        let found = match (&mut self.source, self.format) {
            (Source::Lines(lines), Format::JsonLines) => lines.next_line(&self.file, self.row)?,
            (Source::Lines(lines), _) => lines.next_element(&self.file, self.row)?,
            (Source::Parquet(parquet), _) => parquet
                .next_row(&self.file)?
                .map(|columns| (None, Value::Object(columns))),
        };
        let Some((line, value)) = found else {
            return Ok(None);
        };
        let location = Location {
            file: self.file.clone(),
            row: self.row,
            line,
        };
        self.row += 1;
        match value {
            Value::Object(mut columns) => {
                columns.retain(|_, value| !value.is_null());
                Ok(Some(RawRow { location, columns }))
            }
            other => Err(DataError::NotAnObject {
                location,
                found: kind(&other),
            }),
        }
    }
}

impl Iterator for RowReader {
    type Item = Result<RawRow, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.read().transpose();
        // A row that is no object is behind us; after any other error the place is lost.
        self.done = !matches!(next, Some(Ok(_) | Err(DataError::NotAnObject { .. })));
        next
    }
}

type Found = Option<(Option<usize>, Value)>;

impl LineSource {
    fn next_line(&mut self, file: &Arc<Path>, row: usize) -> Result<Found, DataError> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let n = self
                .input
                .read_until(b'\n', &mut bytes)
                .map_err(|source| DataError::Io {
                    path: file.to_path_buf(),
                    source,
                })?;
            if n == 0 {
                return Ok(None);
            }
            self.line += 1;
            if !bytes.trim_ascii().is_empty() {
                break;
            }
        }
        let location = || Location {
            file: file.clone(),
            row,
            line: Some(self.line),
        };
        parse(&bytes, location).map(|value| Some((Some(self.line), value)))
    }

    /// The next element of the array: its bytes are cut out by brackets and quotes, then parsed.
    fn next_element(&mut self, file: &Arc<Path>, row: usize) -> Result<Found, DataError> {
        let bad = |line: usize, message: &str| DataError::BadJson {
            location: Location {
                file: file.clone(),
                row,
                line: Some(line),
            },
            message: message.to_owned(),
        };
        if !self.opened {
            self.line = 1;
            self.skip_space(file)?;
            self.take(file)?; // The bracket that told the format.
            self.opened = true;
        }
        match self.skip_space(file)? {
            Some(b']') => {
                self.take(file)?;
                return match self.skip_space(file)? {
                    None => Ok(None),
                    Some(_) => Err(bad(self.line, "expected the end of the file after `]`")),
                };
            }
            Some(b',') if self.started => {
                self.take(file)?;
                self.skip_space(file)?;
            }
            Some(_) if self.started => return Err(bad(self.line, "expected `,` or `]`")),
            Some(_) => {}
            None => return Err(bad(self.line, "the array is not closed")),
        }
        let first_line = self.line;
        let mut bytes = Vec::new();
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        loop {
            let Some(byte) = self.peek(file)? else {
                return Err(bad(first_line, "the file ends within this row"));
            };
            if !quoted && depth == 0 && matches!(byte, b',' | b']') {
                break;
            }
            self.take(file)?;
            bytes.push(byte);
            if quoted {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => quoted = false,
                    _ => {}
                }
            } else {
                match byte {
                    b'"' => quoted = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
            }
        }
        self.started = true;
        let value = parse(&bytes, || Location {
            file: file.clone(),
            row,
            line: Some(first_line),
        })?;
        Ok(Some((Some(first_line), value)))
    }

    fn peek(&mut self, file: &Arc<Path>) -> Result<Option<u8>, DataError> {
        let buffer = self.input.fill_buf().map_err(|source| DataError::Io {
            path: file.to_path_buf(),
            source,
        })?;
        Ok(buffer.first().copied())
    }

    fn take(&mut self, file: &Arc<Path>) -> Result<(), DataError> {
        if self.peek(file)? == Some(b'\n') {
            self.line += 1;
        }
        self.input.consume(1);
        Ok(())
    }

    fn skip_space(&mut self, file: &Arc<Path>) -> Result<Option<u8>, DataError> {
        loop {
            match self.peek(file)? {
                Some(byte) if byte.is_ascii_whitespace() => self.take(file)?,
                other => return Ok(other),
            }
        }
    }
}

impl ParquetSource {
    fn next_row(&mut self, file: &Arc<Path>) -> Result<Option<Map<String, Value>>, DataError> {
        let bad = |message: String| DataError::Format {
            path: file.to_path_buf(),
            message,
        };
        while self.ready.is_empty() {
            let Some(batch) = self.batches.next() else {
                return Ok(None);
            };
            let batch = batch.map_err(|error| bad(format!("damaged Parquet file: {error}")))?;
            let mut writer = WriterBuilder::new()
                .with_explicit_nulls(true)
                .build::<_, LineDelimited>(Vec::new());
            writer
                .write(&batch)
                .and_then(|()| writer.finish())
                .map_err(|error| bad(format!("a column cannot be read as JSON: {error}")))?;
            for row in serde_json::Deserializer::from_slice(&writer.into_inner()).into_iter() {
                self.ready
                    .push_back(row.map_err(|error| bad(error.to_string()))?);
            }
        }
        Ok(self.ready.pop_front())
    }
}

fn parse(bytes: &[u8], location: impl Fn() -> Location) -> Result<Value, DataError> {
    // Without the line's end, at which a row that stops too early would be told of the next line.
    let bytes = bytes.trim_ascii_end();
    let value = if bytes.trim_ascii_start().starts_with(b"{") {
        serde_json::from_slice(bytes).map(|OneOfEach(columns)| Value::Object(columns))
    } else {
        serde_json::from_slice(bytes)
    };
    value.map_err(|error| {
        // The parser counts lines from the row's own start.
        let text = error.to_string();
        let what = text
            .rsplit_once(" at line ")
            .map_or(&*text, |(what, _)| what);
        let mut location = location();
        location.line = location.line.map(|line| line + error.line().max(1) - 1);
        DataError::BadJson {
            location,
            message: format!("{what} (column {})", error.column()),
        }
    })
}

/// Columns of a row, none of them twice: of two values of one name JSON says not which is meant.
struct OneOfEach(Map<String, Value>);

impl<'de> Deserialize<'de> for OneOfEach {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(OneOfEach(Map::new()))
    }
}

impl<'de> Visitor<'de> for OneOfEach {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut access: A) -> Result<Self, A::Error> {
        while let Some(name) = access.next_key::<String>()? {
            if self.0.contains_key(&name) {
                return Err(A::Error::custom(format!("column `{name}` is there twice")));
            }
            self.0.insert(name, access.next_value()?);
        }
        Ok(self)
    }
}

/// The format by the first bytes, and where the content starts (after a byte order mark).
fn sniff(file: &mut File, path: &Path) -> Result<(Format, u64), DataError> {
    let mut head = [0u8; 4096];
    let mut n = 0;
    while n < head.len() {
        match file.read(&mut head[n..]) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(DataError::Io {
                    path: path.to_path_buf(),
                    source,
                });
            }
        }
    }
    let head = &head[..n];
    if head.starts_with(b"PAR1") {
        return Ok((Format::Parquet, 0));
    }
    let (start, text) = match head.strip_prefix(b"\xef\xbb\xbf") {
        Some(rest) => (3, rest),
        None => (0, head),
    };
    match text.trim_ascii_start().first() {
        Some(b'[') => Ok((Format::JsonArray, start)),
        Some(b'\x1f') => Err(DataError::Format {
            path: path.to_path_buf(),
            message: "the file looks compressed with gzip; unpack it first".to_owned(),
        }),
        // Anything else is read as lines, so that a bad first line is reported as such.
        Some(_) => Ok((Format::JsonLines, start)),
        None if n == 4096 => Ok((Format::JsonLines, start)),
        None => Err(DataError::NoRows {
            path: path.to_path_buf(),
        }),
    }
}

/// The kind of a JSON value, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
