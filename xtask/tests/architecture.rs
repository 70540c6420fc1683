//! ARCHITECTURE.md says which crate depends on which; cargo says whether that is so.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{CargoOpt, Dependency, DependencyKind, Metadata, MetadataCommand};

/// Names of the workspace's crates.
type Names = BTreeSet<String>;

/// The workspace as cargo sees it, asked without dependencies so that no network is needed.
fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .features(CargoOpt::AllFeatures)
        .no_deps()
        .exec()
        .unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn is_built_in(dependency: &&Dependency) -> bool {
    dependency.kind != DependencyKind::Development
}

/// Each crate's dependencies here, those of tests and examples left out.
fn dependencies(metadata: &Metadata) -> BTreeMap<String, Names> {
    let members: Names = metadata
        .packages
        .iter()
        .map(|p| p.name.to_string())
        .collect();
    let of = |package: &cargo_metadata::Package| {
        let built_in = package.dependencies.iter().filter(is_built_in);
        built_in
            .map(|dependency| dependency.name.clone())
            .filter(|name| members.contains(name))
            .collect()
    };
    let packages = metadata.packages.iter();
    packages
        .map(|package| (package.name.to_string(), of(package)))
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
    let (table, found) = (table(), dependencies(&metadata()));
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
    let metadata = metadata();
    let here = dependencies(&metadata);
    // A crate and all that it reaches inside the workspace.
    let reach = |name: &String| {
        let (mut seen, mut left) = (Names::new(), vec![name.clone()]);
        while let Some(name) = left.pop() {
            left.extend(here[&name].iter().cloned());
            seen.insert(name);
        }
        seen
    };
    for (name, row) in table().iter().filter(|(_, row)| row.depends_on.is_some()) {
        let reached = reach(name);
        let packages = metadata
            .packages
            .iter()
            .filter(|p| reached.contains(p.name.as_str()));
        let burn = packages
            .flat_map(|package| package.dependencies.iter().filter(is_built_in))
            .any(|dependency| dependency.name.starts_with("burn"));
        assert_eq!(burn, row.burn, "{name}");
    }
}

#[test]
fn only_the_trainer_chooses_a_backend() {
    let is_backend = |feature: &&String| {
        ["flex", "wgpu", "cuda", "vulkan", "metal", "rocm", "tch"].contains(&feature.as_str())
    };
    for package in metadata().packages {
        let dependencies = package.dependencies.iter().filter(is_built_in);
        for burn in dependencies.filter(|dependency| dependency.name == "burn") {
            let chosen: Vec<_> = burn.features.iter().filter(is_backend).collect();
            assert_eq!(
                chosen,
                Vec::<&String>::new(),
                "dependency burn of {}",
                package.name
            );
        }
        let forwards = package
            .features
            .values()
            .flatten()
            .any(|f| f == "burn/flex");
        assert_eq!(
            forwards,
            *package.name == "trainer",
            "features of {}",
            package.name
        );
    }
}
