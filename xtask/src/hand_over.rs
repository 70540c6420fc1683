//! From a command line to the `r2q` program, built as its device needs.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

/// Builds `r2q` with the features of the device that `args` name, and becomes it.
///
/// The program keeps the current directory, so that relative paths mean what the user typed.
pub(crate) fn hand_over(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let features = features(&device(args))?;
    let profile = Profile::of_the_environment()?;
    let program = program(&profile)?;
    if !program.exists() {
        eprintln!("building r2q; the first time takes minutes");
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_of_this_package(name)) {
        build.env_remove(name);
    }
    let built = build
        .args(["build", profile.flag])
        .args(["--package", "trainer", "--bin", "r2q"])
        .args(["--features", &features])
        .arg("--manifest-path")
        .arg(crate::root().join("Cargo.toml"))
        .status()
        .context("starting cargo")?;
    if !built.success() {
        bail!("r2q did not build with the features `{features}`");
    }
    become_program(&program, args)
}

/// Whether cargo has set a variable for the package that it runs, which is this one.
///
/// Build scripts that look at theirs would run again, and what depends on them be built again, each time
/// that it is this program that starts the build.
fn is_of_this_package(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    ["CARGO_PKG_", "CARGO_MANIFEST_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// The value of `--device`, as the program will read it; `cpu` if there is none.
fn device(args: &[OsString]) -> String {
    let mut args = args.iter().map(|arg| arg.to_string_lossy());
    while let Some(arg) = args.next() {
        if arg == "--device" {
            // A missing value is for the program to complain about, on any build.
            return args.next().map_or_else(|| "cpu".into(), String::from);
        }
        if let Some(value) = arg.strip_prefix("--device=") {
            return value.to_string();
        }
    }
    "cpu".into()
}

/// The features of the `trainer` package that a device, or each of a list of them, needs beside its
/// default.
fn features(devices: &str) -> anyhow::Result<String> {
    let mut features = Vec::new();
    for device in devices.split(',') {
        let feature = match device {
            "cpu" => "flex",
            "wgpu" => "wgpu",
            "cuda" => "cuda",
            numbered if numbered.starts_with("cuda:") => "cuda",
            // Refused before a build of minutes, not after it.
            _ => bail!("device `{device}`: expected `cpu`, `wgpu`, `cuda` or `cuda:N`"),
        };
        if !features.contains(&feature) {
            features.push(feature);
        }
    }
    Ok(features.join(","))
}

/// How the program is built: optimised for runs, or as tests are, which CI has built already.
struct Profile {
    /// What cargo takes.
    flag: &'static str,
    /// The folder of what was built, in the target directory.
    folder: &'static str,
}

impl Profile {
    /// `release`, unless the variable `R2Q_PROFILE` says `dev`.
    fn of_the_environment() -> anyhow::Result<Self> {
        let named = std::env::var("R2Q_PROFILE").unwrap_or_else(|_| "release".into());
        match &named[..] {
            "release" => Ok(Self {
                flag: "--release",
                folder: "release",
            }),
            "dev" => Ok(Self {
                flag: "--profile=dev",
                folder: "debug",
            }),
            _ => bail!("R2Q_PROFILE: expected `release` or `dev`, got `{named}`"),
        }
    }
}

/// Where cargo puts the program: in the profile's folder, beside or at the one that this is in.
///
/// That holds wherever the user has cargo's target directory, and needs no second question to it.
fn program(profile: &Profile) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("finding this program's own path")?;
    let target = this
        .parent()
        .and_then(Path::parent)
        .with_context(|| format!("{}: not in a target directory of cargo", this.display()))?;
    let name = format!("r2q{}", std::env::consts::EXE_SUFFIX);
    Ok(target.join(profile.folder).join(name))
}

/// Runs the program in place of this one, so that signals and its exit code are its own.
#[cfg(unix)]
fn become_program(program: &Path, args: &[OsString]) -> anyhow::Result<ExitCode> {
    use std::os::unix::process::CommandExt;

    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}

#[cfg(not(unix))]
fn become_program(program: &Path, args: &[OsString]) -> anyhow::Result<ExitCode> {
    let status = Command::new(program)
        .args(args)
        .status()
        .with_context(|| format!("starting {}", program.display()))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device_of(line: &str) -> String {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        device(&args)
    }

    #[test]
    fn the_device_is_read_in_both_spellings_and_is_the_cpu_by_default() {
        assert_eq!(device_of("train --seed 3"), "cpu");
        assert_eq!(device_of("train --device cuda:1 --seed 3"), "cuda:1");
        assert_eq!(device_of("train --device=wgpu"), "wgpu");
        assert_eq!(device_of("train --device"), "cpu");
    }

    #[test]
    fn variables_of_this_package_are_told_from_the_users() {
        for name in [
            "CARGO_PKG_NAME",
            "CARGO_MANIFEST_DIR",
            "CARGO_MANIFEST_PATH",
        ] {
            assert!(is_of_this_package(OsStr::new(name)), "{name}");
        }
        for name in ["CARGO", "CARGO_HOME", "CARGO_TARGET_DIR", "PATH"] {
            assert!(!is_of_this_package(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn each_device_has_its_feature_and_others_are_refused_by_name() {
        let named = ["cpu", "wgpu", "cuda", "cuda:2", "cuda:0,cuda:1,cpu"];
        let features = named.map(|names| features(names).unwrap());
        assert_eq!(features, ["flex", "wgpu", "cuda", "cuda", "cuda,flex"]);
        let error = super::features("cpu,gpu").unwrap_err().to_string();
        assert!(error.contains("`gpu`"), "{error}");
    }
}
