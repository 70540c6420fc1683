//! Chat templates, rendered as transformers renders them.
//!
//! A [`ChatTemplate`] is a Jinja template that comes with a model and turns messages into the text
//! the model was trained on. It is someone else's program, so it runs with bounded instructions,
//! recursion and output, sees plain data only, and every failure is a [`ChatError`] that names the
//! template. Not bounded is the memory of a string that a template doubles on purpose.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde_json::Map;

use crate::tokenizer::Tokenizer;

/// A chat message: `role`, `content`, and whatever else the template may read.
pub type Message = Map<String, serde_json::Value>;

/// Template instructions per rendering. A thousand long messages need less than a million.
const FUEL: u64 = 20_000_000;
/// Nested macro and include calls. Real templates use fewer than ten.
const RECURSION: usize = 100;
/// Longest text one rendering may produce, in bytes.
const LONGEST_TEXT: usize = 256 << 20;
/// The keys under which a message may carry its reasoning; the first is what templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What can be wrong with a chat template or with what it is asked to render.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// A file that should hold a template does not.
    #[error("{file}: {message}")]
    Malformed {
        /// The file.
        file: String,
        /// What was expected and what came.
        message: String,
    },
    /// The template is not valid Jinja.
    #[error("chat template `{name}` of {file}, line {line}: {message}")]
    Syntax {
        /// The template's name, `default` for the main one.
        name: String,
        /// Where the template came from.
        file: String,
        /// The line in the template, from 1.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// The template failed, or refused the conversation with `raise_exception`.
    #[error("chat template `{name}` of {file}, line {line}: {message}")]
    Render {
        /// The template's name.
        name: String,
        /// Where the template came from.
        file: String,
        /// The line in the template, from 1; 0 where it is not known.
        line: usize,
        /// What the template or the engine said.
        message: String,
    },
    /// There are named templates, none of which applies.
    #[error("{file}: has the chat templates {found}, but neither `default` nor one for this use")]
    NoDefault {
        /// Where the templates came from.
        file: String,
        /// Their names.
        found: String,
    },
    /// An empty conversation was given.
    #[error("a chat template needs at least one message, got none")]
    NoMessages,
}

/// What a rendering may be given besides the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions<'a> {
    /// Whether to end with the header after which the assistant's answer starts.
    pub add_generation_prompt: bool,
    /// JSON schemas of tools, or `None` for no tools.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Variables for the template (`enable_thinking` and the like); they win over special tokens.
    pub kwargs: Option<&'a Map<String, serde_json::Value>>,
}

/// The chat templates of a model, compiled.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    environment: Environment<'static>,
    names: Vec<String>,
    file: String,
    special: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The chat templates of a tokenizer's folder, or `None` where it has none.
    ///
    /// `chat_template.jinja` comes before `chat_template` of `tokenizer_config.json`, which is a
    /// string or a list of named templates; `additional_chat_templates/NAME.jinja` adds more.
    ///
    /// # Errors
    ///
    /// A template that is not a string, not UTF-8 or not valid Jinja.
    pub fn from_tokenizer(tokenizer: &Tokenizer) -> Result<Option<Self>, ChatError> {
        let mut sources: BTreeMap<String, String> = BTreeMap::new();
        let mut origin = "tokenizer_config.json";
        let shown = |name: &str| tokenizer.path().join(name).display().to_string();
        let malformed = |name: &str, message: String| ChatError::Malformed {
            file: shown(name),
            message,
        };
        if let Some(bytes) = tokenizer.file("tokenizer_config.json") {
            let config: serde_json::Value = serde_json::from_slice(bytes)
                .map_err(|error| malformed("tokenizer_config.json", error.to_string()))?;
            match config.get("chat_template") {
                None | Some(serde_json::Value::Null) => {}
                Some(serde_json::Value::String(source)) => {
                    sources.insert("default".to_owned(), source.clone());
                }
                Some(serde_json::Value::Array(items)) => {
                    for item in items {
                        let text = |key: &str| item.get(key).and_then(serde_json::Value::as_str);
                        let (Some(name), Some(source)) = (text("name"), text("template")) else {
                            return Err(malformed(
                                "tokenizer_config.json",
                                format!(
                                    "chat_template: expected objects with `name` and `template`, got {item}"
                                ),
                            ));
                        };
                        sources.insert(name.to_owned(), source.to_owned());
                    }
                }
                Some(other) => {
                    return Err(malformed(
                        "tokenizer_config.json",
                        format!("chat_template: expected a string or a list, got {other}"),
                    ));
                }
            }
        }
        let utf8 = |name: &str, bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| malformed(name, "a chat template must be UTF-8 text".to_owned()))
        };
        for relative in tokenizer.files() {
            let Some(name) = relative.to_str() else {
                continue;
            };
            let bytes = tokenizer.file(name).unwrap_or_default();
            if name == "chat_template.jinja" {
                sources.insert("default".to_owned(), utf8(name, bytes)?);
                origin = "chat_template.jinja";
            } else if relative.extension().is_some_and(|e| e == "jinja")
                && let Some(stem) = relative.file_stem().and_then(|s| s.to_str())
            {
                sources.insert(stem.to_owned(), utf8(name, bytes)?);
            }
        }
        if sources.is_empty() {
            return Ok(None);
        }
        Self::build(shown(origin), sources, tokenizer.special_tokens().clone()).map(Some)
    }

    /// A template from its source, with the special tokens it may use (`eos_token` and the like).
    ///
    /// # Errors
    ///
    /// A source that is not valid Jinja.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn main() -> Result<(), lm::chat::ChatError> {
    /// use lm::chat::{ChatTemplate, RenderOptions};
    /// let template = ChatTemplate::new(
    ///     "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    ///     [("eos_token".to_owned(), "</s>".to_owned())].into(),
    /// )?;
    /// let messages = [serde_json::json!({"role": "user", "content": "Hi"})];
    /// let messages: Vec<_> = messages.iter().filter_map(|m| m.as_object().cloned()).collect();
    /// assert_eq!(template.render(&messages, &RenderOptions::default())?, "user: Hi\n");
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(source: &str, special: BTreeMap<String, String>) -> Result<Self, ChatError> {
        let sources = [("default".to_owned(), source.to_owned())].into();
        Self::build("a template in memory".to_owned(), sources, special)
    }

    fn build(
        file: String,
        sources: BTreeMap<String, String>,
        special: BTreeMap<String, String>,
    ) -> Result<Self, ChatError> {
        let mut environment = environment();
        let names: Vec<String> = sources.keys().cloned().collect();
        for (name, source) in sources {
            environment
                .add_template_owned(name.clone(), without_generation_tags(&source))
                .map_err(|error| ChatError::Syntax {
                    name,
                    file: file.clone(),
                    line: error.line().unwrap_or(0),
                    message: error_text(&error),
                })?;
        }
        Ok(Self {
            inner: Arc::new(Inner {
                environment,
                names,
                file,
                special,
            }),
        })
    }

    /// The text of a conversation.
    ///
    /// What `apply_chat_template(messages, tokenize=False)` gives in transformers: with tools the
    /// template named `tool_use` is used where there is one, keys of messages that are null are
    /// left out, and reasoning is found under each of its usual names. Encode the result with
    /// [`Tokenizer::encode_plain`], since the template writes the special tokens itself.
    ///
    /// # Errors
    ///
    /// No messages, no template that applies, or a template that fails or refuses.
    pub fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions<'_>,
    ) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::NoMessages);
        }
        let name = self.pick(options.tools.is_some())?;
        let failed = |error: &Error| ChatError::Render {
            name: name.to_owned(),
            file: self.inner.file.clone(),
            line: error.line().unwrap_or(0),
            message: error_text(error),
        };
        let template = self
            .inner
            .environment
            .get_template(name)
            .map_err(|error| failed(&error))?;

        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (token, text) in &self.inner.special {
            context.insert(token, Value::from(text.as_str()));
        }
        for (key, value) in options.kwargs.into_iter().flatten() {
            context.insert(key, plain(value));
        }
        let messages: Vec<Value> = messages.iter().map(message).collect();
        context.insert("messages", Value::from(messages));
        context.insert(
            "tools",
            options.tools.map_or(Value::from(()), |tools| {
                tools.iter().map(plain).collect::<Vec<_>>().into()
            }),
        );
        context.insert("documents", Value::from(()));
        context.insert(
            "add_generation_prompt",
            Value::from(options.add_generation_prompt),
        );
        let mut text = Bounded::default();
        template
            .render_captured_to(Value::from_pairs(context), &mut text)
            .map_err(|error| failed(&error))?;
        String::from_utf8(text.bytes).map_err(|_| ChatError::Render {
            name: name.to_owned(),
            file: self.inner.file.clone(),
            line: 0,
            message: "the template wrote text that is not UTF-8".to_owned(),
        })
    }

    /// [`ChatTemplate::render`], then [`Tokenizer::encode_plain`].
    ///
    /// # Errors
    ///
    /// As [`ChatTemplate::render`]; a text that the tokenizer refuses is reported the same way.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &RenderOptions<'_>,
    ) -> Result<Vec<u32>, ChatError> {
        let text = self.render(messages, options)?;
        tokenizer
            .encode_plain(&text)
            .map_err(|error| ChatError::Malformed {
                file: self.inner.file.clone(),
                message: error.to_string(),
            })
    }

    fn pick(&self, with_tools: bool) -> Result<&str, ChatError> {
        let has = |name: &str| self.inner.names.iter().any(|n| n == name);
        if with_tools && has("tool_use") {
            Ok("tool_use")
        } else if has("default") {
            Ok("default")
        } else {
            Err(ChatError::NoDefault {
                file: self.inner.file.clone(),
                found: self.inner.names.join(", "),
            })
        }
    }
}

/// A growing text that refuses to grow without end.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl std::io::Write for Bounded {
    fn write(&mut self, more: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + more.len() > LONGEST_TEXT {
            return Err(std::io::Error::other(
                "the template writes more than 256 MiB",
            ));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The engine with what transformers adds to Jinja, and with Python's ways where they differ.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
    {
        env.set_syntax(syntax);
    }
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(
        |out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value| {
            if value.kind() == ValueKind::Invalid {
                value.try_iter()?;
            }
            let mut text = String::new();
            python_str(value, &mut text)?;
            out.write_str(&text).map_err(Error::from)
        },
    );
    env.add_function(
        "raise_exception",
        |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    env.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
            Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: unknown format `{format}`"),
            )
        })?;
        Ok(text)
    });
    env.add_filter("tojson", |value: &Value, options: Kwargs| {
        let json = Json {
            ensure_ascii: options
                .get::<Option<bool>>("ensure_ascii")?
                .unwrap_or(false),
            sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
            indent: options.get::<Option<usize>>("indent")?,
            separators: match options.get::<Option<Value>>("separators")? {
                Some(pair) if !pair.is_none() => Some((
                    pair.get_item_by_index(0)?.to_string(),
                    pair.get_item_by_index(1)?.to_string(),
                )),
                _ => None,
            },
        };
        options.assert_all_used()?;
        let mut text = String::new();
        json.write(value, 0, &mut text)?;
        Ok(text)
    });
    // In Python a string and a mapping are sequences and iterables too.
    env.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::String | ValueKind::Map
        )
    });
    env.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Iterable
        )
    });
    env
}

/// The engine's message with its causes; the kind alone says little.
fn error_text(error: &Error) -> String {
    let mut text = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "takes too many steps".to_owned(),
        (_, Some(detail)) => detail.to_owned(),
        (kind, None) => kind.to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// A message as the template sees it: no null keys, and reasoning under its usual names.
fn message(message: &Message) -> Value {
    let reasoning = REASONING
        .iter()
        .find_map(|key| message.get(*key).filter(|value| !value.is_null()));
    let mut pairs: Vec<(String, Value)> = Vec::with_capacity(message.len() + 2);
    if let Some(text) = reasoning
        && message.get("thinking").is_none_or(|v| v.is_null())
    {
        pairs.push(("thinking".to_owned(), plain(text)));
    }
    for (key, value) in message {
        if !value.is_null() {
            pairs.push((key.clone(), plain(value)));
        }
    }
    if let Some(text) = reasoning
        && message.get("reasoning_content").is_none_or(|v| v.is_null())
    {
        pairs.push(("reasoning_content".to_owned(), plain(text)));
    }
    Value::from_pairs(pairs)
}

fn plain(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::from(s.as_str()),
        serde_json::Value::Array(items) => Value::from(items.iter().map(plain).collect::<Vec<_>>()),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), plain(v))))
        }
    }
}

/// The template without transformers' `{% generation %}` marks, which render nothing themselves.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start..start + length + 2];
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        match inner {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length + 2..];
    }
    out.push_str(rest);
    out
}

/// `str(value)` of Python, which is what Jinja2 writes for `{{ value }}`.
fn python_str(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::String => {
            out.push_str(value.as_str().unwrap_or_default());
            Ok(())
        }
        _ => python_repr(value, out),
    }
}

fn python_repr(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') {
                '"'
            } else {
                '\''
            };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => {
                        out.push('\\');
                        out.push(c);
                    }
                    c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                        let _ = write!(out, "\\x{:02x}", c as u32);
                    }
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() {
                ('(', ')')
            } else {
                ('[', ']')
            };
            out.push(open);
            let mut n = 0;
            for item in value.try_iter()? {
                if n > 0 {
                    out.push_str(", ");
                }
                python_repr(&item, out)?;
                n += 1;
            }
            if value.is_tuple() && n == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                python_repr(&key, out)?;
                out.push_str(": ");
                python_repr(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

/// An integer, or a float as Python's `repr` writes it.
fn number(value: &Value, out: &mut String) {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float, out),
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

fn python_float(float: f64, out: &mut String) {
    if float.is_nan() {
        out.push_str("nan");
        return;
    }
    if float.is_infinite() {
        out.push_str(if float > 0.0 { "inf" } else { "-inf" });
        return;
    }
    // Rust's shortest digits are Python's too; only the layout differs.
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
    } else {
        let _ = write!(out, "{float:?}");
    }
}

/// `json.dumps` with the options that transformers' `tojson` passes on.
struct Json {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<usize>,
    separators: Option<(String, String)>,
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(x) if x.is_nan() => out.push_str("NaN"),
                Ok(x) if x.is_infinite() => {
                    out.push_str(if x > 0.0 { "Infinity" } else { "-Infinity" });
                }
                _ => number(value, out),
            },
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.block('[', ']', items.len(), depth, out, |i, out| {
                    self.write(&items[i], depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let colon = self.separators.as_ref().map_or(": ", |(_, colon)| colon);
                self.block('{', '}', keys.len(), depth, out, |i, out| {
                    match keys[i].as_str() {
                        Some(key) => self.string(key, out),
                        None => {
                            let mut key = String::new();
                            self.write(&keys[i], depth + 1, &mut key)?;
                            self.string(&key, out);
                        }
                    }
                    out.push_str(colon);
                    self.write(&value.get_item(&keys[i])?, depth + 1, out)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: a value of kind {kind} has no JSON"),
                ));
            }
        }
        Ok(())
    }

    fn block(
        &self,
        open: char,
        close: char,
        n: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        let newline = |depth: usize, out: &mut String| {
            if let Some(width) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', width * depth));
            }
        };
        let comma = match (&self.separators, self.indent) {
            (Some((comma, _)), _) => comma.as_str(),
            (None, Some(_)) => ",",
            (None, None) => ", ",
        };
        for i in 0..n {
            if i > 0 {
                out.push_str(comma);
            }
            newline(depth + 1, out);
            item(i, out)?;
        }
        if n > 0 {
            newline(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
