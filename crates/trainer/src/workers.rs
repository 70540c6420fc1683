//! Threads that take independent pieces of work side by side.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use burn::tensor::Device;

use crate::device::is_cpu;

/// Some threads, each with a pool of its own for the operations inside a piece of work.
///
/// On a CPU, small tensors leave cores idle inside each operation; two batches side by side do
/// not. A piece is computed alike on any number of workers, so that results do not depend on it.
#[derive(Clone, Debug)]
pub struct Workers {
    /// None where one worker takes everything on the caller's thread and its pool.
    pools: Arc<Vec<rayon::ThreadPool>>,
}

impl Workers {
    /// `count` workers; one works on the caller's thread.
    pub fn new(count: usize) -> Self {
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(1).build().ok();
        let pools: Option<Vec<_>> = match count {
            0 | 1 => None,
            _ => (0..count).map(|_| pool()).collect(),
        };
        // A system that grants no thread still gets its work done.
        Self {
            pools: Arc::new(pools.unwrap_or_default()),
        }
    }

    /// `count` workers for a device: a GPU runs one kernel at a time, and gets one.
    pub fn on(device: &Device, count: usize) -> Self {
        Self::new(if is_cpu(device) { count } else { 1 })
    }

    /// As many workers as the machine has cores, for a device that they compute on.
    pub fn one_per_core(device: &Device) -> Self {
        Self::on(
            device,
            std::thread::available_parallelism().map_or(1, usize::from),
        )
    }

    /// How many work side by side.
    pub fn count(&self) -> usize {
        self.pools.len().max(1)
    }

    /// The results of `work` on `0..n`, in order.
    ///
    /// # Panics
    ///
    /// If `work` does.
    pub fn map<T: Send>(&self, n: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        if self.pools.is_empty() || n <= 1 {
            return (0..n).map(work).collect();
        }
        let next = AtomicUsize::new(0);
        let results: Mutex<Vec<Option<T>>> = Mutex::new((0..n).map(|_| None).collect());
        std::thread::scope(|scope| {
            for pool in self.pools.iter() {
                scope.spawn(|| {
                    pool.install(|| {
                        loop {
                            let index = next.fetch_add(1, Ordering::Relaxed);
                            if index >= n {
                                return;
                            }
                            let result = work(index);
                            results.lock().expect("no worker panics holding the lock")[index] =
                                Some(result);
                        }
                    });
                });
            }
        });
        let results = results
            .into_inner()
            .expect("no worker panics holding the lock");
        let whole = |result: Option<T>| result.expect("every piece was worked on");
        results.into_iter().map(whole).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whatever_the_number_of_workers() {
        let expected: Vec<usize> = (0..37).map(|i| i * i).collect();
        for count in [0, 1, 2, 5] {
            assert_eq!(Workers::new(count).map(37, |i| i * i), expected);
        }
        assert!(Workers::new(3).map(0, |i| i).is_empty());
    }
}
