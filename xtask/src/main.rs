//! The front door: `cargo xtask train` and the repository's chores.
//!
//! What works on models is a command of the `r2q` program, in `crates/trainer`. This program is
//! small, so that it builds at once; it chooses the cargo features that `--device` needs, builds
//! `r2q` in the release profile, and hands over to it with the arguments as they came.

mod chores;
mod gpu_check;
mod hand_over;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

/// A command, and a line on what it does.
type Described = (&'static str, &'static str);

/// Commands of the `r2q` program.
const PROGRAM: [Described; 8] = [
    (
        "train",
        "train a policy from preferences; with no arguments, on the embedded memo task",
    ),
    (
        "score",
        "read the rewards of every token of a file off a policy and its reference",
    ),
    (
        "search",
        "search for completions with a policy: beam, best-first, tree search",
    ),
    ("sample", "sample completions of prompts from a policy"),
    (
        "prefer",
        "make a preference file of sampled completions, by a reward or a judge",
    ),
    (
        "eval",
        "compare two policies by a judge: win rate with intervals",
    ),
    (
        "reproduce",
        "run an experiment on a claim of the paper: credit, curves, beam, identification, first-error",
    ),
    (
        "devices",
        "list what this machine and build can compute on, and what others lack",
    ),
];

/// Commands of this program.
const CHORES: [Described; 4] = [
    ("ci", "run what CI runs: .ci/run"),
    (
        "fixtures",
        "remake the golden files under testdata/ with the peers' Python packages",
    ),
    ("book", "build the book, docs/, with mdBook"),
    (
        "gpu-check",
        "run what needs an NVIDIA card: parity, quality, speed beside the peers",
    ),
];

fn main() -> ExitCode {
    let result = run(std::env::args_os().skip(1).collect());
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(args: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let Some((command, rest)) = args.split_first() else {
        return help();
    };
    let command = command.to_string_lossy();
    match &*command {
        "-h" | "--help" | "help" => help(),
        "ci" => chores::ci(),
        "fixtures" => chores::fixtures(rest),
        "book" => chores::book(rest),
        "gpu-check" => gpu_check::gpu_check(rest),
        name if PROGRAM.iter().any(|(known, _)| *known == name) => hand_over::hand_over(&args),
        name => bail!(
            "no command `{name}`; did you mean `{}`? `cargo xtask` alone lists all",
            nearest(name)
        ),
    }
}

fn help() -> anyhow::Result<ExitCode> {
    let mut text = String::from("Usage: cargo xtask COMMAND [ARGUMENTS]\n");
    for (title, commands) in [("Models", &PROGRAM[..]), ("The repository", &CHORES)] {
        text += &format!("\n{title}:\n");
        for (name, line) in commands {
            text += &format!("  {name:9} {line}\n");
        }
    }
    text += "\nCommands on models take `--device cpu|wgpu|cuda[:N]` (default: cpu) and `--help`.\n";
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("writing the list of commands")?;
    Ok(ExitCode::SUCCESS)
}

/// The known command that is fewest edits away.
fn nearest(name: &str) -> &'static str {
    let commands = PROGRAM.iter().chain(&CHORES).map(|(known, _)| *known);
    commands
        .min_by_key(|known| edits(name, known))
        .expect("there are commands")
}

/// Levenshtein's distance: insertions, deletions and substitutions of characters.
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (above, a) in from.chars().enumerate() {
        let mut diagonal = above;
        row[0] = above + 1;
        for (column, b) in to.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[column + 1];
            row[column + 1] = substituted.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}

/// The repository's root.
fn root() -> PathBuf {
    // Cargo sets it when it runs this program; what was true at build time is the second best.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map_or(here.clone(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_count_insertions_deletions_and_substitutions() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!((edits("", "book"), edits("book", "")), (4, 4));
        assert_eq!(edits("ci", "ci"), 0);
    }

    #[test]
    fn an_unknown_command_is_named_with_its_nearest() {
        for (typed, meant) in [("trian", "train"), ("fixture", "fixtures"), ("CI", "ci")] {
            let error = run(vec![typed.into()]).unwrap_err().to_string();
            assert!(error.contains(&format!("`{typed}`")), "{error}");
            let meant = format!("did you mean `{meant}`");
            assert!(error.contains(&meant), "{error}");
        }
    }
}
