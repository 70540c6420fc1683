//! The front door, tried with a stand-in for cargo and one for the program.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// A process that one test starts may for a moment hold the other's half-written program open, and
/// an open program does not start.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A target directory with a copy of xtask and a program that says what it was given.
fn target(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(target.join("debug")).unwrap();
    std::fs::create_dir_all(target.join("release")).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_xtask"), target.join("debug/xtask")).unwrap();
    script(&target.join("cargo"), "echo cargo \"$@\"");
    script(
        &target.join("release/r2q"),
        "printf '<%s>' \"$@\"; pwd; exit 7",
    );
    target
}

fn script(path: &Path, line: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{line}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn xtask(target: &Path, cargo: &Path, args: &[&str]) -> Output {
    Command::new(target.join("debug/xtask"))
        .args(args)
        .env("CARGO", cargo)
        .current_dir(target)
        .output()
        .unwrap()
}

#[test]
fn arguments_folder_and_exit_code_are_the_programs_own() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let target = target("hand_over");
    let args = ["train", "--device", "cuda:1", "--data", "a b"];
    let output = xtask(&target, &target.join("cargo"), &args);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("--release --package trainer --bin r2q --features cuda"),
        "{said}"
    );
    let here = target.canonicalize().unwrap();
    let expected = format!("<train><--device><cuda:1><--data><a b>{}", here.display());
    assert!(said.contains(&expected), "{said}");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn a_failed_build_starts_nothing() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let target = target("failed_build");
    script(&target.join("cargo"), "exit 1");
    let output = xtask(&target, &target.join("cargo"), &["train"]);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(1), &b""[..])
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("error: r2q did not build"), "{said}");
}
