//! The allocator of r2q's programs: mimalloc, told to keep the memory that is freed.
//!
//! A training step takes and frees some gigabytes of tensors, and the next one takes as much again. An
//! allocator that gives freed pages back to the system has them cleared at every step, and on a
//! virtual machine that reports free pages to its host they are taken away and handed out anew: a
//! quarter of a step's time went there (`docs/src/performance.md`). What is kept is reused, and
//! goes back when the program ends.
//!
//! A library does not choose its program's allocator: of the other crates only the program of
//! `trainer` uses this one, and benchmarks.
//!
//! # Examples
//!
//! ```
//! #[global_allocator]
//! static ALLOCATOR: allocator::MiMalloc = allocator::MiMalloc;
//!
//! fn main() {
//!     allocator::keep_freed_memory();
//!     let tensor = vec![0.0_f32; 1 << 20];
//!     assert_eq!(tensor.len(), 1 << 20);
//! }
//! ```

pub use mimalloc::MiMalloc;

use libmimalloc_sys::{mi_option_set_default, mi_option_t};

/// `mi_option_purge_delay`, which the bindings do not name.
const PURGE_DELAY: mi_option_t = 15;
/// Never.
const NEVER: std::ffi::c_long = -1;

/// From here on, freed memory is kept for what is allocated next. `MIMALLOC_PURGE_DELAY`, in
/// milliseconds, has the last word where the environment sets it.
///
/// Called first thing in `main` of a program whose allocator is [`MiMalloc`].
#[expect(unsafe_code, reason = "an option of the allocator, which is C")]
pub fn keep_freed_memory() {
    // SAFETY: it writes a number to a table that `PURGE_DELAY` lies in.
    unsafe { mi_option_set_default(PURGE_DELAY, NEVER) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "an option of the allocator, which is C")]
    fn the_option_is_the_delay_of_purging() {
        // SAFETY: it reads a number of a table that `PURGE_DELAY` lies in.
        let delay = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        // mimalloc 3's default, which no other option has: this is the number of the right one.
        assert_eq!(delay(), 1000);
        keep_freed_memory();
        assert_eq!(delay(), NEVER);
    }
}
