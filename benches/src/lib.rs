//! Criterion benchmarks: one file under `benches/benches/` for each question.
//!
//! `cargo bench -p benches` runs all of them, `cargo bench -p benches --bench lm` one file, and a
//! word behind `--` only the ids that hold it. An id holds the size, and every timing ends after
//! the device is done.
//!
//! `cargo run --release -p benches --example growth` asks how the cost of a training step grows with
//! the length of its texts, and whether a long run drifts.
//!
//! `benches/peers` compares with PyTorch, TRL and transformers; its README says how.

/// `n` token ids below `vocab`, none of the first three, that look like no pattern; the same for the
/// same `seed`.
pub fn ids(n: usize, seed: usize, vocab: usize) -> Vec<u32> {
    let id = |place: usize| 3 + (place * 7919 + seed * 104_729) % (vocab - 3);
    (0..n).map(|place| id(place) as u32).collect()
}
