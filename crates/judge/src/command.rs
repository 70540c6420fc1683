//! Rewards from an external command that speaks JSON lines.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::excerpt;
use crate::{JudgeError, Reward, Sample};

/// The reward that a command gives.
///
/// The command is started once and kept. For each completion it reads one line, the sample's flat
/// JSON object with a field `id` in front, and writes one line:
///
/// ```json
/// {"id": 0, "prompt": "..", "completion": "..", "finished": true}
/// {"id": 0, "reward": -1.5}
/// ```
///
/// Answers may come in any order within a batch. A command that buffers its output must flush it
/// at the latest when all lines it was sent are answered; it is told the end by the end of its
/// input, at the end of the run. What it writes to standard error is shown when it fails.
///
/// After an error the command is ended; the next batch starts it afresh.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use judge::{CommandReward, Reward, Sample};
///
/// let reward = CommandReward::shell("python score.py", Duration::from_secs(60))?;
/// let rewards = reward.rewards(&[Sample::new("Say hello.", " Hello!")])?;
/// # Ok::<(), judge::JudgeError>(())
/// ```
pub struct CommandReward {
    program: String,
    args: Vec<String>,
    shown: String,
    deadline: Duration,
    running: Mutex<Option<Running>>,
}

impl CommandReward {
    /// Starts a program with arguments. `deadline` is the longest time to wait for the next reward
    /// while one is awaited.
    ///
    /// # Errors
    ///
    /// [`JudgeError::CommandStart`].
    pub fn new(program: &str, args: &[String], deadline: Duration) -> Result<Self, JudgeError> {
        let words = std::iter::once(program).chain(args.iter().map(String::as_str));
        let shown = words.collect::<Vec<_>>().join(" ");
        Self::start(program, args.to_vec(), shown, deadline)
    }

    /// Starts a line of the system's shell: `sh -c` or, on Windows, `cmd /C`.
    ///
    /// # Errors
    ///
    /// [`JudgeError::CommandStart`] when there is no shell; what the shell cannot find shows with
    /// the first batch.
    pub fn shell(line: &str, deadline: Duration) -> Result<Self, JudgeError> {
        let (shell, option) = if cfg!(windows) {
            ("cmd", "/C")
        } else {
            ("sh", "-c")
        };
        Self::start(
            shell,
            vec![option.into(), line.into()],
            line.into(),
            deadline,
        )
    }

    fn start(
        program: &str,
        args: Vec<String>,
        shown: String,
        deadline: Duration,
    ) -> Result<Self, JudgeError> {
        let reward = Self {
            program: program.into(),
            args,
            shown,
            deadline,
            running: Mutex::new(None),
        };
        // A program that does not exist is reported before anything is sampled for it.
        *reward
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(reward.spawn()?);
        Ok(reward)
    }

    fn spawn(&self) -> Result<Running, JudgeError> {
        let child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        child
            .map(Running::new)
            .map_err(|source| JudgeError::CommandStart {
                command: self.shown.clone(),
                source,
            })
    }

    /// Sends a batch and collects its rewards.
    fn ask(&self, running: &mut Running, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
        let mut places = HashMap::new();
        let mut lines = Vec::new();
        for (place, sample) in samples.iter().enumerate() {
            places.insert(running.next_id, place);
            let mut row = serde_json::Map::new();
            row.insert("id".into(), running.next_id.into());
            row.insert("prompt".into(), sample.prompt.clone().into());
            row.insert("completion".into(), sample.completion.clone().into());
            for (field, value) in sample.metadata.iter().filter(|(field, _)| *field != "id") {
                row.insert(field.clone(), value.clone());
            }
            lines.extend_from_slice(Value::Object(row).to_string().as_bytes());
            lines.push(b'\n');
            running.next_id += 1;
        }
        // A thread of its own writes: a command that answers as it reads would otherwise block on
        // a full pipe while we block on the other. That a command has closed its input shows below.
        if let Some(input) = &running.input {
            let _closed = input.send(lines);
        }
        let mut rewards = vec![0.0; samples.len()];
        let mut last = Instant::now();
        while !places.is_empty() {
            let left = self.deadline.saturating_sub(last.elapsed());
            let line = match running.output.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(JudgeError::CommandDeadline {
                        command: self.shown.clone(),
                        deadline: self.deadline,
                        line: running.n_lines,
                        answered: samples.len() - places.len(),
                        asked: samples.len(),
                        stderr: running.last_words(),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(JudgeError::CommandEnded {
                        command: self.shown.clone(),
                        ending: running.ending(),
                        line: running.n_lines,
                        answered: samples.len() - places.len(),
                        asked: samples.len(),
                        stderr: running.last_words(),
                    });
                }
            };
            running.n_lines += 1;
            let answer = line
                .map_err(|error| error.to_string())
                .and_then(|line| parse(&line, &mut places));
            let (place, reward) = answer.map_err(|reason| JudgeError::CommandLine {
                command: self.shown.clone(),
                line: running.n_lines,
                reason,
            })?;
            rewards[place] = reward;
            last = Instant::now();
        }
        Ok(rewards)
    }
}

impl fmt::Debug for CommandReward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandReward")
            .field("command", &self.shown)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Reward for CommandReward {
    fn identity(&self) -> String {
        format!("command {}", self.shown)
    }

    fn rewards(&self, samples: &[Sample]) -> Result<Vec<f64>, JudgeError> {
        let mut kept = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running = match kept.take() {
            Some(running) => running,
            None => self.spawn()?,
        };
        let rewards = self.ask(&mut running, samples)?;
        // Kept only after a good answer: what a confused command still has in its pipes would
        // belong to the wrong batch.
        *kept = Some(running);
        Ok(rewards)
    }
}

/// The place and reward of an answer, or what was expected and what came.
fn parse(line: &str, places: &mut HashMap<u64, usize>) -> Result<(usize, f64), String> {
    let expected = r#"expected {"id": .., "reward": ..}"#;
    let answer: Value = serde_json::from_str(line)
        .map_err(|error| format!("{expected}, got {}: {error}", excerpt(line)))?;
    let Some(id) = answer.get("id").and_then(Value::as_u64) else {
        return Err(format!("{expected}, got no id in {}", excerpt(line)));
    };
    let reward = match answer.get("reward").map(Value::as_f64) {
        Some(Some(reward)) if reward.is_finite() => reward,
        Some(_) => {
            let found = excerpt(&answer["reward"].to_string());
            return Err(format!(
                "reward of id {id} is {found}, expected a finite number"
            ));
        }
        None => return Err(format!("{expected}, got no reward in {}", excerpt(line))),
    };
    match places.remove(&id) {
        Some(place) => Ok((place, reward)),
        None => Err(format!("id {id} was not asked for or is answered already")),
    }
}

/// A started command and the threads at its pipes.
struct Running {
    child: Child,
    /// `None` once the command's input is closed.
    input: Option<Sender<Vec<u8>>>,
    output: Receiver<io::Result<String>>,
    stderr: Arc<Mutex<Vec<u8>>>,
    next_id: u64,
    n_lines: usize,
}

impl Running {
    fn new(mut child: Child) -> Self {
        let (input, batches) = channel::<Vec<u8>>();
        if let Some(mut stdin) = child.stdin.take() {
            thread::spawn(move || {
                for batch in batches {
                    if stdin
                        .write_all(&batch)
                        .and_then(|()| stdin.flush())
                        .is_err()
                    {
                        break;
                    }
                }
            });
        }
        let (lines, output) = channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines() {
                    if lines.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let stderr = Arc::new(Mutex::new(Vec::new()));
        if let Some(mut from) = child.stderr.take() {
            let kept = Arc::clone(&stderr);
            thread::spawn(move || {
                let mut chunk = [0; 1024];
                while let Ok(n @ 1..) = from.read(&mut chunk) {
                    keep_end(
                        &mut kept.lock().unwrap_or_else(PoisonError::into_inner),
                        &chunk[..n],
                    );
                }
            });
        }
        Self {
            child,
            input: Some(input),
            output,
            stderr,
            next_id: 0,
            n_lines: 0,
        }
    }

    /// How a command that has closed its output ended.
    fn ending(&mut self) -> String {
        self.input = None;
        match self.wait() {
            Some(ending) => format!("ended with {ending}"),
            None => "closed its output".into(),
        }
    }

    /// The end of its standard error so far.
    fn last_words(&self) -> String {
        // The pipe's thread may still be reading what was written before the end.
        thread::sleep(Duration::from_millis(20));
        let kept = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).trim().to_string()
    }

    /// Waits a little for the command to end by itself.
    fn wait(&mut self) -> Option<std::process::ExitStatus> {
        const GRACE: Duration = Duration::from_secs(1);
        let start = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if start.elapsed() < GRACE => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.input = None;
        if self.wait().is_none() {
            // It may be gone by now, which is as good.
            let _gone = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}

/// Appends, and forgets all but the last few lines' worth.
fn keep_end(kept: &mut Vec<u8>, more: &[u8]) {
    const LONGEST: usize = 2000;
    kept.extend_from_slice(more);
    let excess = kept.len().saturating_sub(LONGEST);
    kept.drain(..excess);
}
