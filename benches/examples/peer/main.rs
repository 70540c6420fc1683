//! r2q's side of the comparison with its peers: one case, run whenever a line says so.
//!
//! `benches/peers/compare.py` starts it. After loading and warming up it writes a line of facts, and
//! from then on a line of JSON for each line `run` that it reads, until its input ends. While it
//! waits it uses no processor.

mod ceilings;
mod decode;
mod train;

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Parser;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// As in the program `r2q`.
#[global_allocator]
static ALLOCATOR: allocator::MiMalloc = allocator::MiMalloc;

#[derive(Debug, Parser)]
enum Case {
    /// What the machine can do at the moment.
    Ceilings(ceilings::Ceilings),
    /// Greedy decoding and beam search.
    Decode(decode::Decode),
    /// Tree search, and how much of its time is not the model's.
    Mcts(decode::TreeSearch),
    /// DPO steps.
    Train(train::Train),
}

fn main() -> anyhow::Result<()> {
    allocator::keep_freed_memory();
    match Case::parse() {
        Case::Ceilings(case) => ceilings::serve(&case),
        Case::Decode(case) => decode::serve(&case),
        Case::Mcts(case) => decode::serve_tree_search(&case),
        Case::Train(case) => train::serve(&case),
    }
}

/// Warms up, says so with `facts`, then runs once for each line.
fn serve(
    facts: &Value,
    warm_up: usize,
    mut run: impl FnMut() -> anyhow::Result<Value>,
) -> anyhow::Result<()> {
    for _ in 0..warm_up {
        run()?;
    }
    answer(facts)?;
    for line in std::io::stdin().lines() {
        let line = line?;
        anyhow::ensure!(line == "run", "expected a line `run`, got `{line}`");
        answer(&run()?)?;
    }
    Ok(())
}

fn answer(value: &Value) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
