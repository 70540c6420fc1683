//! Chores of the repository.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};

use crate::root;

/// The fixtures in the order in which they are made: later ones start from the first's models.
const FIXTURES: [(&str, &str); 6] = [
    ("lm", "make_lm_fixtures.py"),
    ("lora", "make_lora_fixture.py"),
    ("trl", "make_trl_fixture.py"),
    ("losses", "make_loss_fixtures.py"),
    ("chat", "make_chat_fixture.py"),
    ("search", "make_beam_fixture.py"),
];

/// What the scripts import.
const PACKAGES: &str = "torch, transformers, trl, peft, tokenizers, safetensors, datasets, jinja2";

/// Runs `.ci/run`, which is what CI runs.
pub(crate) fn ci() -> anyhow::Result<ExitCode> {
    succeed(Command::new("bash").arg(".ci/run").current_dir(root()))
}

/// Remakes the named fixtures, or all, with the interpreter that `$PYTHON` names, or `python3`.
pub(crate) fn fixtures(names: &[OsString]) -> anyhow::Result<ExitCode> {
    let scripts = chosen(names)?;
    let folder = root().join("testdata");
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let missing = match imports(&python, PACKAGES) {
        Ok(missing) => missing,
        Err(error) => format!("`{}` does not start: {error}", python.display()),
    };
    if !missing.is_empty() {
        bail!(
            "{missing}\n\nThe scripts need the peers' Python packages. In the root of the \
             repository:\n\n{}\nand then `PYTHON=peer/bin/python cargo xtask fixtures`",
            recipe(&folder.join("README.md"))?
        );
    }
    for script in scripts {
        eprintln!("{script}");
        succeed(
            Command::new(&python)
                .arg(folder.join("scripts").join(script))
                .current_dir(root()),
        )?;
    }
    eprintln!("remade; `git diff --stat testdata` shows what moved, and the changelog says why");
    Ok(ExitCode::SUCCESS)
}

fn chosen(names: &[OsString]) -> anyhow::Result<Vec<&'static str>> {
    let known = |name: &OsString| FIXTURES.iter().any(|(known, _)| OsStr::new(known) == name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        let known = FIXTURES.map(|(name, _)| name).join(", ");
        bail!("no fixture `{}`; there are: {known}", unknown.display());
    }
    let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
    Ok(FIXTURES
        .iter()
        .filter(|(name, _)| wanted(name))
        .map(|(_, script)| *script)
        .collect())
}

/// What the interpreter says of the first of the packages that it lacks; nothing if it has all.
pub(crate) fn imports(python: &OsStr, packages: &str) -> std::io::Result<String> {
    let output = Command::new(python)
        .args(["-c", &format!("import {packages}")])
        .stdout(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(String::new());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(said.lines().last().unwrap_or("no answer").to_string())
}

/// The lines by which testdata's README makes the Python environment.
fn recipe(readme: &Path) -> anyhow::Result<String> {
    let text =
        std::fs::read_to_string(readme).with_context(|| format!("reading {}", readme.display()))?;
    let block = text.split("```").find(|block| block.contains("-m venv"));
    let lines = block.map(|block| {
        let lines = block
            .lines()
            .skip(1)
            .filter(|line| !line.starts_with("for "));
        lines.map(|line| format!("    {line}\n")).collect()
    });
    lines.with_context(|| format!("{}: holds no recipe", readme.display()))
}

/// Builds the book into `target/book`; further arguments, such as `--open`, go to mdBook.
pub(crate) fn book(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let out = root().join("target").join("book");
    let mut mdbook = Command::new("mdbook");
    mdbook
        .args(["build", "docs", "--dest-dir"])
        .arg(&out)
        .args(args)
        .current_dir(root());
    match mdbook.status() {
        Ok(status) if status.success() => {
            eprintln!("book: {}", out.join("index.html").display());
            Ok(ExitCode::SUCCESS)
        }
        Ok(status) => bail!("mdbook: {status}"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("mdbook is not installed: `cargo install mdbook --locked` builds it")
        }
        Err(error) => Err(error).context("starting mdbook"),
    }
}

/// Runs a command that must end well.
pub(crate) fn succeed(command: &mut Command) -> anyhow::Result<ExitCode> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("starting {name}"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fixture_script_is_known() {
        let scripts = std::fs::read_dir(root().join("testdata/scripts")).unwrap();
        let mut found: Vec<String> = scripts
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("make_"))
            .collect();
        let mut known = FIXTURES.map(|(_, script)| script);
        found.sort();
        known.sort_unstable();
        assert_eq!(found, known);
    }

    #[test]
    fn fixtures_are_made_in_order_whatever_order_they_are_named_in() {
        let scripts = chosen(&["chat".into(), "lm".into()]).unwrap();
        assert_eq!(scripts, ["make_lm_fixtures.py", "make_chat_fixture.py"]);
        let error = chosen(&["gpt".into()]).unwrap_err().to_string();
        assert!(error.contains("`gpt`"), "{error}");
    }

    #[test]
    fn the_recipe_for_the_peers_is_read_from_the_readme() {
        let recipe = recipe(&root().join("testdata/README.md")).unwrap();
        assert!(
            recipe.contains("-m venv") && recipe.contains("transformers=="),
            "{recipe}"
        );
    }
}
