//! Documents keep their word: links lead somewhere, the book holds its pages, examples are tested.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// Markdown files directly in the root and testdata, and all of the book's.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("docs/src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    for folder in [root().to_path_buf(), root().join("testdata")] {
        let entries = std::fs::read_dir(folder).unwrap();
        found.extend(entries.map(|entry| entry.unwrap().path()));
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found.sort();
    found
}

/// Targets of `[text](target)` that are files, without their anchors; code blocks are left out.
fn links(text: &str) -> Vec<String> {
    let prose: String = text.split("```").step_by(2).collect();
    let after = prose.split("](").skip(1);
    after
        .filter_map(|rest| rest.split([')', ' ']).next())
        .filter(|target| !target.contains("://") && !target.starts_with('#'))
        .map(|target| target.split('#').next().unwrap_or(target).to_string())
        .collect()
}

#[test]
fn links_between_documents_lead_to_files() {
    let mut n_links = 0;
    for document in documents() {
        for link in links(&read(&document)) {
            let target = document.parent().unwrap().join(&link);
            assert!(target.exists(), "{} links to {link}", document.display());
            n_links += 1;
        }
    }
    assert!(n_links > 10, "only {n_links} links were found");
}

#[test]
fn the_summary_of_the_book_names_every_page() {
    let source = root().join("docs/src");
    let summary = source.join("SUMMARY.md");
    let named: Vec<PathBuf> = links(&read(&summary))
        .iter()
        .map(|link| source.join(link))
        .collect();
    for page in documents() {
        let in_book = page.starts_with(&source) && page != summary;
        assert!(
            !in_book || named.contains(&page),
            "SUMMARY.md misses {}",
            page.display()
        );
    }
}

/// Words inside the code spans of the book, so that `` `a`, `--b-c N` `` gives a, b-c and N.
fn code_words() -> HashSet<String> {
    let book = documents()
        .into_iter()
        .filter(|path| path.starts_with(root().join("docs/src")));
    let pages: Vec<String> = book.map(|path| read(&path)).collect();
    let spans = pages
        .iter()
        .flat_map(|page| page.split('`').skip(1).step_by(2));
    let is_part = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    spans
        .flat_map(|span| span.split(move |c| !is_part(c)))
        .map(|word| word.trim_start_matches('-').to_string())
        .collect()
}

/// Names of the fields whose declarations begin with `before`, attributes and comments aside.
fn fields<'a>(source: &'a str, before: &str) -> Vec<&'a str> {
    let declared = source.lines().filter_map(|line| line.strip_prefix(before));
    declared
        .filter_map(|line| line.split_once(": "))
        .map(|(name, _)| name)
        .filter(|name| {
            name.chars()
                .all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
        })
        .collect()
}

#[test]
fn the_guide_names_every_key_of_a_recipe() {
    let source = read(&root().join("crates/trainer/src/recipe.rs"));
    let (keys, words) = (fields(&source, "    pub "), code_words());
    assert!(keys.len() > 30, "only {} keys were found", keys.len());
    for key in keys {
        assert!(
            words.contains(key),
            "no page of the book names the key `{key}`"
        );
    }
}

#[test]
fn the_guide_names_every_flag() {
    let folder = root().join("crates/trainer/src");
    let files = [
        "main.rs",
        "cli/devices.rs",
        "cli/eval.rs",
        "cli/prefer.rs",
        "cli/reproduce.rs",
        "cli/sample.rs",
        "cli/search/mod.rs",
    ];
    let source: String = files.map(|file| read(&folder.join(file))).concat();
    let attributes = source.split("#[arg(").skip(1);
    let declarations = attributes.filter_map(|text| text.split_once(")]"));
    let words = code_words();
    let mut n_flags = 0;
    for (_, after) in declarations.filter(|(options, _)| options.contains("long")) {
        let flag = fields(after, "    ")[0].replace('_', "-");
        assert!(
            words.contains(&flag),
            "no page of the book names the flag `--{flag}`"
        );
        n_flags += 1;
    }
    assert!(n_flags > 80, "only {n_flags} flags were found");
}

#[test]
fn the_example_of_the_readme_is_tested_as_the_example_of_its_crate() {
    let readme = read(&root().join("README.md"));
    let tested: Vec<String> = read(&root().join("crates/dpo-loss/src/lib.rs"))
        .lines()
        .filter_map(|line| line.strip_prefix("//!").map(|line| line.trim().to_string()))
        .collect();
    let mut examples = readme.split("```rust").skip(1);
    let example = examples.next().unwrap().split("```").next().unwrap();
    for line in example
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
    {
        assert!(
            tested.iter().any(|known| known == line),
            "not in the crate's doctest: {line}"
        );
    }
    assert!(
        examples.next().is_none(),
        "a second example of the README is tested nowhere"
    );
}
