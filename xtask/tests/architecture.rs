//! ARCHITECTURE.md says which crate depends on which; cargo says whether that is so.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Names of the workspace's crates.
type Names = BTreeSet<String>;

/// The workspace's packages as cargo sees them; no other is asked for, so no network is needed.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    match metadata["packages"].take() {
        Value::Array(packages) => packages,
        other => panic!("expected a list of packages, got {other}"),
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap()
}

/// What a package depends on, for tests and examples alone left out.
fn built_in(package: &Value) -> impl Iterator<Item = &Value> {
    let dependencies = package["dependencies"].as_array().unwrap().iter();
    dependencies.filter(|dependency| dependency["kind"] != "dev")
}

/// Each crate's dependencies here.
fn dependencies(packages: &[Value]) -> BTreeMap<String, Names> {
    let members: Names = packages.iter().map(|p| name(p).to_string()).collect();
    let of = |package| {
        built_in(package)
            .map(|dependency| name(dependency).to_string())
            .filter(|name| members.contains(name))
            .collect()
    };
    let packages = packages.iter();
    packages
        .map(|package| (name(package).to_string(), of(package)))
        .collect()
}

/// A row of the table in ARCHITECTURE.md.
#[derive(Debug, PartialEq)]
struct Row {
    /// `None` where the table leaves the crate free: `benches` uses what it measures.
    depends_on: Option<Names>,
    burn: bool,
}

fn table() -> BTreeMap<String, Row> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("| Crate | Depends on | Burn |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    rows.map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, depends_on, burn] = cells[..] else {
            panic!("a row has three cells: {line}");
        };
        let named = |cell: &str| -> Names {
            cell.split('`')
                .skip(1)
                .step_by(2)
                .map(String::from)
                .collect()
        };
        let depends_on = match depends_on {
            "what it measures" => None,
            "nothing here" => Some(Names::new()),
            crates => Some(named(crates)),
        };
        let burn = match burn {
            "yes" => true,
            "no" => false,
            other => panic!("yes or no, not {other}: {line}"),
        };
        let name = name.trim_matches('`').to_string();
        (name, Row { depends_on, burn })
    })
    .collect()
}

#[test]
fn the_dependency_table_says_what_cargo_says() {
    let (table, found) = (table(), dependencies(&packages()));
    let named = |keys: Vec<&String>| keys.into_iter().cloned().collect::<Names>();
    assert_eq!(named(table.keys().collect()), named(found.keys().collect()));
    for (name, row) in &table {
        if let Some(expected) = &row.depends_on {
            assert_eq!(&found[name], expected, "dependencies of {name}");
        }
    }
}

#[test]
fn dependencies_point_to_rows_above() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let place = |name: &str| text.find(&format!("\n| `{name}` |")).unwrap();
    for (name, row) in table() {
        for dependency in row.depends_on.unwrap_or_default() {
            assert!(
                place(&dependency) < place(&name),
                "{name} stands above {dependency}"
            );
        }
    }
}

#[test]
fn crates_without_tensors_do_not_reach_burn() {
    let packages = packages();
    let here = dependencies(&packages);
    // A crate and all that it reaches inside the workspace.
    let reach = |from: &String| {
        let (mut seen, mut left) = (Names::new(), vec![from.clone()]);
        while let Some(next) = left.pop() {
            left.extend(here[&next].iter().cloned());
            seen.insert(next);
        }
        seen
    };
    let listed = table();
    for (from, row) in listed.iter().filter(|(_, row)| row.depends_on.is_some()) {
        let reached = reach(from);
        let burn = packages
            .iter()
            .filter(|package| reached.contains(name(package)))
            .flat_map(built_in)
            .any(|dependency| name(dependency).starts_with("burn"));
        assert_eq!(burn, row.burn, "{from}");
    }
}

#[test]
fn only_the_trainer_chooses_a_backend() {
    let backends = ["flex", "wgpu", "cuda", "vulkan", "metal", "rocm", "tch"];
    for package in packages() {
        for burn in built_in(&package).filter(|dependency| name(dependency) == "burn") {
            let features = burn["features"].as_array().unwrap();
            let chosen = features
                .iter()
                .any(|feature| backends.iter().any(|backend| feature == backend));
            assert!(!chosen, "dependency burn of {}", name(&package));
        }
        let features = package["features"].as_object().unwrap();
        let flex = features
            .values()
            .filter_map(Value::as_array)
            .flatten()
            .any(|feature| feature == "burn/flex");
        // `ops` has kernels of its own for a backend and `lm` decodes past one: both are told which
        // backends there are, and choose none.
        assert_eq!(
            flex,
            ["trainer", "lm", "ops"].contains(&name(&package)),
            "features of {}",
            name(&package)
        );
        let by_default = features.contains_key("default");
        assert_eq!(
            by_default,
            name(&package) == "trainer",
            "default features of {}",
            name(&package)
        );
    }
}
