//! Failures of a device as errors.
//!
//! Burn computes behind the caller's back: what a device refuses shows when a value is read, as a
//! panic, in the thread that reads or in one of the backend's own. A device without memory is no
//! mistake of ours, and the user can do something about it.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::TrainError;

/// How backends say that there is no memory: `CubeCL`'s `IoError` and `LaunchError`, wgpu's own, and
/// the CUDA driver's.
const NO_MEMORY: [&str; 7] = [
    "can't allocate buffer of size",
    "out of device memory",
    "out-of-memory",
    "every page size the memory tracks",
    "Not enough memory left",
    "OUT_OF_MEMORY",
    "Out of Memory",
];

/// What was at work when the memory of a device ended, and what to do about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shortage {
    /// The work: the stage, its step and its batch.
    pub place: String,
    /// What to make smaller.
    pub lower: String,
    /// The rows that were computed on; none where they are not known.
    pub rows: Vec<String>,
}

/// Runs `work`; where a device has no memory for it, whether it says so by a panic or an error of
/// its own, that is [`TrainError::OutOfMemory`]. Any other panic goes on.
///
/// The tensors that `work` was at are lost: a run ends with this error.
///
/// # Errors
///
/// That one, or what `work` gave.
pub fn within_memory<T, E: From<TrainError> + Display>(
    work: impl FnOnce() -> Result<T, E>,
    shortage: impl FnOnce() -> Shortage,
) -> Result<T, E> {
    keep_quiet();
    let named = |said: String| {
        let Shortage { place, lower, rows } = shortage();
        E::from(TrainError::OutOfMemory {
            place,
            said,
            lower,
            rows,
        })
    };
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(error)) => match no_memory(&format!("{error:#}")) {
            Some(said) => Err(named(said)),
            None => Err(error),
        },
        Err(payload) => match no_memory(&said(&*payload)) {
            Some(said) => Err(named(said)),
            None => resume_unwind(payload),
        },
    }
}

/// How [`TrainError::OutOfMemory`] says it.
const NAMED: &str = "the device has no memory left";

/// The line in which a device says that it has no memory, if one does and no place was named yet.
fn no_memory(message: &str) -> Option<String> {
    if message.contains(NAMED) {
        return None;
    }
    let mut lines = message.lines();
    let line = lines.find(|line| NO_MEMORY.iter().any(|known| line.contains(known)))?;
    Some(line.trim().to_string())
}

/// Why a piece of work panicked.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

/// How many pieces of work are tried at present.
static TRIED: AtomicUsize = AtomicUsize::new(0);

/// Runs `work`; a panic in it is an error, of which nothing else is printed.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Failure> {
    keep_quiet();
    TRIED.fetch_add(1, Ordering::Relaxed);
    let result = catch_unwind(AssertUnwindSafe(work));
    TRIED.fetch_sub(1, Ordering::Relaxed);
    result.map_err(|payload| Failure(said(&*payload)))
}

/// Has panics that become errors print nothing, in whichever thread they come up.
fn keep_quiet() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let tried = TRIED.load(Ordering::Relaxed) > 0;
            if !tried && no_memory(&said(info.payload())).is_none() {
                before(info);
            }
        }));
    });
}

/// What a panic said.
fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(|text| &text[..]))
        .unwrap_or("a panic without words")
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_for_want_of_memory_is_an_error_that_names_batch_and_remedy() {
        let shortage = || Shortage {
            place: "sft step 3, 2 batches of 8 examples".into(),
            lower: "`sft.batch_size`".into(),
            rows: vec!["4".into(), "7".into()],
        };
        let panics = || -> Result<(), TrainError> {
            panic!("Error\nout of device memory allocating 12 bytes\n  0: some_function")
        };
        let error = within_memory(panics, shortage).unwrap_err().to_string();
        assert_eq!(
            error,
            "sft step 3, 2 batches of 8 examples: the device has no memory left (out of device \
             memory allocating 12 bytes); lower `sft.batch_size`; rows of the data, from 0: 4, 7"
        );
        assert!(error.contains(NAMED));
        let fine = || Ok::<i32, TrainError>(3);
        assert_eq!(within_memory(fine, shortage).unwrap(), 3);
    }

    #[test]
    fn an_error_for_want_of_memory_is_named_once() {
        let shortage = |place: &str| Shortage {
            place: place.into(),
            ..Shortage::default()
        };
        let error = within_memory(
            || {
                within_memory(
                    || {
                        anyhow::bail!(
                            "logits could not be read: \"can't allocate buffer of size: 9\""
                        )
                    },
                    || shortage("inner"),
                )
            },
            || shortage("outer"),
        );
        let error: anyhow::Result<()> = error;
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("inner: "), "{error}");
    }

    #[test]
    fn any_other_panic_goes_on() {
        let panics = || -> Result<(), TrainError> { panic!("index out of bounds") };
        let other = catch_unwind(|| within_memory(panics, Shortage::default));
        assert_eq!(said(&*other.unwrap_err()), "index out of bounds");
    }
}
