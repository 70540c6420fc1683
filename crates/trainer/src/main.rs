//! The r2q program.
fn main() {}
