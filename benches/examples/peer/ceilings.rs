//! The rates that nothing here can exceed: of multiplying matrices, and of reading memory.

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use clap::Args;
use serde_json::json;

use crate::decode::PrecisionName;

/// Tries of each rate in a run, of which the best counts.
const TRIES: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct Ceilings {
    /// Rows and columns of the matrices.
    #[arg(long, default_value_t = 2048)]
    size: usize,
    /// Mebibytes that are read, far more than any cache holds.
    #[arg(long, default_value_t = 1024)]
    mebibytes: usize,
    /// Threads that read, each its own part.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where to multiply.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What to multiply in.
    #[arg(long, value_enum, default_value = "f32")]
    precision: PrecisionName,
}

pub(crate) fn serve(case: &Ceilings) -> anyhow::Result<()> {
    let device = trainer::device(&case.device)?;
    let matrix = || {
        let normal = Distribution::Normal(0.0, 1.0);
        let matrix = Tensor::<2>::random([case.size, case.size], normal, &device);
        matrix.cast(match case.precision {
            PrecisionName::F32 => FloatDType::F32,
            PrecisionName::Bf16 => FloatDType::BF16,
        })
    };
    let (a, b) = (matrix(), matrix());
    let memory = vec![1_u64; case.mebibytes << 17];
    let facts = json!({ "size": case.size, "mebibytes": case.mebibytes });
    crate::serve(&facts, 1, || {
        let multiplying = best(|| multiply(&a, &b, &device));
        let reading = best(|| read(&memory, case.threads));
        Ok(json!({
            "gemm_gflops": 2.0 * (case.size as f64).powi(3) / multiplying / 1e9,
            "read_gb_per_s": size_of_val(&memory[..]) as f64 / reading / 1e9,
        }))
    })
}

/// Seconds of the fastest try.
fn best(task: impl Fn()) -> f64 {
    let seconds = |_| {
        let began = Instant::now();
        task();
        began.elapsed().as_secs_f64()
    };
    (0..TRIES).map(seconds).fold(f64::INFINITY, f64::min)
}

fn multiply(a: &Tensor<2>, b: &Tensor<2>, device: &Device) {
    black_box(ops::linear(a.clone(), b.clone(), None));
    device.sync().expect("a working device finishes its work");
}

/// Integers, since their sum may be taken in any order, as many at a time as a register holds.
fn read(memory: &[u64], threads: usize) {
    let part = memory.len().div_ceil(threads.max(1));
    std::thread::scope(|scope| {
        for part in memory.chunks(part) {
            scope.spawn(move || black_box(part.iter().fold(0, |sum: u64, x| sum.wrapping_add(*x))));
        }
    });
}
