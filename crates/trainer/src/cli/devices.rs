//! `r2q devices`: what there is to compute on.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use trainer::{device, devices};

/// What `devices` takes.
#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Build with the backend of this device, and fail if it cannot be used: cpu, wgpu, cuda or
    /// cuda:N.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

impl DevicesArgs {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let mut text = String::new();
        for state in devices() {
            let line = match state.usable {
                Ok(what) => what,
                Err(why) => format!("not usable: {why}"),
            };
            text += &format!("{:8} {line}\n", state.name);
        }
        std::io::stdout()
            .write_all(text.as_bytes())
            .context("writing the list of devices")?;
        if let Some(name) = &self.device {
            device(name)?;
        }
        Ok(())
    }
}
