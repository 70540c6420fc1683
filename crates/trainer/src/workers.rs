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
pub struct Workers(Threads);

#[derive(Clone, Debug)]
enum Threads {
    /// The caller's.
    Caller,
    /// One of rayon's own pool. From outside, every operation that cores share would hand itself to
    /// the pool and sleep until it is done, a thousand times a training step.
    Pool,
    /// One for each pool.
    Pools(Arc<Vec<rayon::ThreadPool>>),
}

impl Workers {
    /// `count` workers on a CPU.
    pub fn new(count: usize) -> Self {
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(1).build().ok();
        if count > 1
            && let Some(pools) = (0..count).map(|_| pool()).collect()
        {
            return Self(Threads::Pools(Arc::new(pools)));
        }
        // Also where a system grants no threads.
        Self(Threads::Pool)
    }

    /// `count` workers for a device: a GPU runs one kernel at a time, in an order that belongs to
    /// the caller's thread, and gets one.
    pub fn on(device: &Device, count: usize) -> Self {
        if is_cpu(device) {
            Self::new(count)
        } else {
            Self(Threads::Caller)
        }
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
        match &self.0 {
            Threads::Caller | Threads::Pool => 1,
            Threads::Pools(pools) => pools.len(),
        }
    }

    /// The result of `work`, which all cores share where one worker has them all.
    ///
    /// # Panics
    ///
    /// If `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match self.0 {
            Threads::Caller => work(),
            Threads::Pool | Threads::Pools(_) => rayon::scope(|_| work()),
        }
    }

    /// The results of `work` on `0..n`, in order.
    ///
    /// # Panics
    ///
    /// If `work` does.
    pub fn map<T: Send>(&self, n: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let pools = match &self.0 {
            Threads::Pools(pools) if n > 1 => pools,
            _ => return self.run(|| (0..n).map(&work).collect()),
        };
        let next = AtomicUsize::new(0);
        let results: Mutex<Vec<Option<T>>> = Mutex::new((0..n).map(|_| None).collect());
        std::thread::scope(|scope| {
            for pool in pools.iter() {
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

    #[test]
    fn what_cores_share_begins_in_a_pool() {
        for workers in [Workers::new(1), Workers::new(2)] {
            assert!(workers.run(rayon::current_thread_index).is_some());
            let within = workers.map(2, |_| rayon::current_thread_index().is_some());
            assert_eq!(within, [true, true]);
        }
    }
}
