//! Every backend computes what the CPU computes: operations, losses, training steps, decoding,
//! search.
//!
//! Built with a GPU's backend, this holds two devices in one process and compares them number by
//! number. `R2Q_DEVICE` names the one to hold against the CPU; without it, the first backend that
//! was built. A device that cannot be used fails the tests:
//!
//! ```text
//! cargo test -p trainer --features wgpu --test parity
//! R2Q_DEVICE=cuda:1 cargo test -p trainer --features cuda --test parity
//! ```
//!
//! A new operation needs a function of a few lines in `ops.rs`.

#![cfg(all(feature = "flex", any(feature = "wgpu", feature = "cuda")))]
#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

#[path = "../common/mod.rs"]
mod common;
mod decoding;
mod losses;
mod ops;
mod program;
mod training;

use burn::tensor::{Device, Tensor};

/// What an operation may be off by, relative to `1 + |x|`: two ways to round f32 exponentials,
/// quotients and sums of some dozen numbers. A wrong rule is off by 1e-2.
const OP_TOLERANCE: f64 = 1e-5;
/// What logps and losses may be off by, relative to `1 + |x|`: a few hundred such operations, one
/// after the other.
const LOGP_TOLERANCE: f64 = 1e-4;

/// The two sides: the CPU, and the device under test.
fn devices() -> [Device; 2] {
    let default = if cfg!(feature = "wgpu") {
        "wgpu"
    } else {
        "cuda"
    };
    let name = std::env::var("R2Q_DEVICE").unwrap_or_else(|_| default.into());
    assert_ne!(
        name, "cpu",
        "R2Q_DEVICE: the CPU is what it is held against"
    );
    let found = [trainer::device("cpu"), trainer::device(&name)];
    found.map(|device| device.unwrap_or_else(|error| panic!("{error}")))
}

/// What a computation gives on each of the two.
fn on_both<T>(compute: impl Fn(&Device) -> T) -> [T; 2] {
    devices().map(|device| compute(&device))
}

/// Numbers that look random, from -1 to 1, from a seed.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as f32 / (1_u64 << 31) as f32 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

/// Says where two lists of numbers are further apart than `tolerance`, relative to `1 + |x|`.
fn assert_close(cpu: &[f32], device: &[f32], tolerance: f64, what: &str) {
    assert_eq!(cpu.len(), device.len(), "{what}: how many numbers");
    for (at, (&cpu, &device)) in cpu.iter().zip(device).enumerate() {
        let gap = (f64::from(cpu) - f64::from(device)).abs() / (1.0 + f64::from(cpu).abs());
        // Not a number is on both sides, or the largest gap.
        let close = gap < tolerance || (cpu.is_nan() && device.is_nan());
        assert!(
            close,
            "{what}: number {at} is {cpu} on the CPU and {device} on the device, {gap:e} apart"
        );
    }
}
