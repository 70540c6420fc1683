//! Progress of long stages: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Lines go this far apart where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(15);

/// The progress of one stage.
#[derive(Debug)]
pub struct Progress {
    label: String,
    unit: &'static str,
    total: usize,
    done: usize,
    began: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Begins a stage of `total` units, of which `done` were done in an earlier session.
    #[expect(
        clippy::missing_panics_doc,
        reason = "the template is part of the source"
    )]
    pub fn new(label: &str, unit: &'static str, total: usize, done: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total as u64);
            let template = "{prefix:24} [{bar:30}] {pos}/{len} {msg} ETA {eta}";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            bar.set_style(style.progress_chars("=> "));
            bar.set_prefix(label.to_string());
            bar.set_position(done as u64);
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() {
            eprintln!("{label}: {total} {unit}");
        }
        Self {
            label: label.to_string(),
            unit,
            total,
            done: 0,
            began: Instant::now(),
            last_line: Instant::now(),
            bar,
        }
    }

    /// Counts `n` units more; `note` stands beside the rate.
    pub fn advance(&mut self, n: usize, note: &str) {
        self.done += n;
        let seconds = self.began.elapsed().as_secs_f64();
        let rate = self.done as f64 / seconds.max(1e-9);
        let message = format!("{rate:.1} {}/s {note}", self.unit);
        match &self.bar {
            Some(bar) => {
                bar.inc(n as u64);
                bar.set_message(message);
            }
            None if self.last_line.elapsed() >= LINE_INTERVAL => {
                self.last_line = Instant::now();
                let left = self.total.saturating_sub(self.done) as f64 / rate.max(1e-9);
                eprintln!(
                    "{}: {}/{} {message} ETA {left:.0}s",
                    self.label, self.done, self.total
                );
            }
            None => {}
        }
    }

    /// Ends the stage.
    pub fn finish(self) {
        let seconds = self.began.elapsed().as_secs_f64();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!(
            "{}: {} {} in {seconds:.1}s",
            self.label, self.done, self.unit
        );
    }
}
