//! `cargo xtask gpu-check`: all that only a machine with an NVIDIA card can say, in one command.
//!
//! What is missing is said first, all of it, before anything is built. Then: the parity suite, the
//! embedded job on the card beside the CPU, and training and decoding beside the peers. A check that
//! fails does not keep the others from running, for a card may be lent for this once; all that
//! failed is said at the end.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use crate::chores::{imports, succeed};
use crate::root;

/// The device when none is named.
const DEVICE: &str = "cuda:0";
/// Seeds of the embedded job.
const SEEDS: [&str; 3] = ["1", "2", "3"];
/// The comparison with peers: SmolLM2-135M's shape, 16 pairs of 512 tokens a step.
const PEERS: [&str; 10] = [
    "--shapes",
    "smollm2-135m",
    "--pairs",
    "16",
    "--prompt",
    "256",
    "--completion",
    "256",
    "--repetitions",
    "5",
];

/// Runs every check on the device that the arguments name, `cuda` or `cuda:N`.
pub(crate) fn gpu_check(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let device = match args {
        [] => DEVICE,
        [flag, name] if flag == "--device" => name.to_str().unwrap_or_default(),
        _ => bail!("gpu-check takes `--device cuda:N` and nothing else"),
    };
    let Some(number) = device.strip_prefix("cuda") else {
        bail!("gpu-check: expected a device `cuda` or `cuda:N`, got `{device}`");
    };
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let missing = missing(&python);
    if !missing.is_empty() {
        bail!(
            "nothing was checked, since this machine lacks:\n  {}",
            missing.join("\n  ")
        );
    }
    let out = root().join("target").join("gpu-check");
    if out.exists() {
        bail!(
            "{}: holds the results of an earlier check; move them away",
            out.display()
        );
    }
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let cargo = || {
        let mut command = Command::new(&cargo);
        command.current_dir(root());
        command
    };

    let mut failed = Vec::new();
    let mut check = |what: &str, command: &mut Command| {
        eprintln!("\n== {what}");
        if let Err(error) = succeed(command) {
            eprintln!("{error:#}");
            failed.push(what.to_owned());
        }
    };

    check(
        "the device",
        cargo().args(["xtask", "devices", "--device", device]),
    );
    check(
        "parity with the CPU",
        cargo()
            .args(["test", "--release", "--package", "trainer"])
            .args(["--features", "cuda", "--test", "parity"])
            .env("R2Q_DEVICE", device),
    );
    for seed in SEEDS {
        for device in ["cpu", device] {
            let run = out.join(format!("memo-{seed}-{}", device.replace(':', "")));
            check(
                &format!("the embedded job, seed {seed}, on {device}"),
                cargo()
                    .args(["xtask", "train", "--seed", seed, "--device", device])
                    .arg("--out")
                    .arg(run),
            );
        }
    }
    let peers = root().join("benches").join("peers");
    check(
        "the quality of the embedded job",
        Command::new(&python)
            .arg(peers.join("same_quality.py"))
            .arg(&out),
    );

    let card = number.strip_prefix(':').unwrap_or("0");
    for suite in ["train", "decode"] {
        for precision in ["f32", "bf16"] {
            check(
                &format!("{suite} beside the peers, in {precision}"),
                Command::new(&python)
                    .arg(peers.join("compare.py"))
                    .args([suite, "--device", "cuda", "--precision", precision])
                    .args(PEERS)
                    .arg("--json")
                    .arg(out.join(format!("peers-{suite}-{precision}.json")))
                    .env("CUDA_VISIBLE_DEVICES", card)
                    .current_dir(root()),
            );
        }
    }
    eprintln!("\nmeasurements: {}", out.display());
    if !failed.is_empty() {
        bail!("of the checks above, failed:\n  {}", failed.join("\n  "));
    }
    eprintln!("all checks passed");
    Ok(ExitCode::SUCCESS)
}

/// What the checks need and this machine lacks, a line each.
fn missing(python: &OsStr) -> Vec<String> {
    let mut missing = Vec::new();
    match Command::new("nvidia-smi").arg("-L").output() {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {}
        Ok(output) => missing.push(format!(
            "an NVIDIA card: `nvidia-smi -L` says: {}",
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim()
        )),
        Err(error) => missing.push(format!(
            "an NVIDIA card and its driver: `nvidia-smi` does not start: {error}"
        )),
    }
    let requirements = Path::new("benches").join("peers").join("requirements.txt");
    let packages = format!(
        "the peers' Python packages: `python3 -m venv peer && peer/bin/pip install -r {}`, then \
         `PYTHON=peer/bin/python cargo xtask gpu-check`",
        requirements.display()
    );
    match imports(python, "torch, transformers, trl, datasets") {
        Ok(said) if said.is_empty() => {
            let program = "import sys, torch; sys.exit(not torch.cuda.is_available())";
            let sees = Command::new(python).args(["-c", program]).status();
            if !sees.is_ok_and(|status| status.success()) {
                missing.push(
                    "a PyTorch that computes on the card: `torch.cuda.is_available()` is False"
                        .into(),
                );
            }
        }
        Ok(said) => missing.push(format!("{packages} ({said})")),
        Err(error) => missing.push(format!("{packages} ({}: {error})", python.display())),
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_arguments_and_devices_are_refused_before_anything_is_asked() {
        for (args, part) in [
            (&["--device", "wgpu"][..], "`wgpu`"),
            (&["--seed", "1"], "nothing else"),
            (&["cuda"], "nothing else"),
        ] {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            let error = gpu_check(&args).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn all_that_is_missing_is_said_at_once() {
        let missing = missing(OsStr::new("no-such-python"));
        let last = missing.last().unwrap();
        assert!(last.contains("no-such-python"), "{last}");
        assert!(last.contains("requirements.txt"), "{last}");
    }
}
