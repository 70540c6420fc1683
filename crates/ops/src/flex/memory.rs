//! Memory that several threads fill, and tensors of it.

use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};

/// A tensor of `values`.
pub(super) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    let layout = Layout::contiguous(Shape::new(shape));
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

/// What a contiguous tensor of f32 holds.
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor
        .as_slice()
        .expect("a contiguous tensor of the type that was asked for")
}

/// A tensor that fills its memory, in order. Writing to it copies what others hold too.
pub(super) fn own(tensor: FlexTensor) -> FlexTensor {
    let tensor = tensor.to_contiguous();
    let whole = tensor.storage::<f32>().len();
    if tensor.layout().contiguous_offsets() == Some((0, whole)) {
        return tensor;
    }
    let copy = Bytes::from_elems(values(&tensor).to_vec());
    FlexTensor::new(copy, Layout::contiguous(tensor.shape()), DType::F32)
}

/// `n` numbers that `fill` writes. Clearing them first would cost a pass over memory, a tenth of a
/// training step in all.
///
/// # Safety
///
/// `fill` writes each of them.
#[expect(
    unsafe_code,
    reason = "memory is handed to a product or a kernel that writes all of it"
)]
pub(super) unsafe fn written(n: usize, fill: impl FnOnce(*mut f32)) -> Vec<f32> {
    let mut values = Vec::with_capacity(n);
    fill(values.as_mut_ptr());
    // SAFETY: the capacity is `n`, and the caller's `fill` has written all of it.
    unsafe { values.set_len(n) };
    values
}

/// Asks for a cache line to be fetched. It is a hint: nothing is read, wherever it points.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(unsafe_code, reason = "fetching ahead is an intrinsic")]
pub(super) fn prefetch(at: *const f32) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint that reads nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
}

/// A window into a row-major matrix that threads write to, each a window of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    at: *mut f32,
    rows: usize,
    columns: usize,
    /// Numbers from one row to the next.
    step: usize,
}

#[expect(
    unsafe_code,
    reason = "threads write to columns of one matrix side by side, which no slice can say"
)]
// SAFETY: whoever makes a window promises that no other thread touches its numbers.
unsafe impl Send for Window {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above; it is written through `&mut` alone.
unsafe impl Sync for Window {}

impl Window {
    /// The whole of a matrix `[rows, columns]`.
    ///
    /// # Safety
    ///
    /// `at` points to memory for that many numbers that nobody else reads or writes while the
    /// window or a part of it lives.
    #[expect(unsafe_code, reason = "made of a pointer")]
    pub(super) unsafe fn new(at: *mut f32, rows: usize, columns: usize) -> Self {
        Self {
            at,
            rows,
            columns,
            step: columns,
        }
    }

    /// Some rows and columns of it.
    ///
    /// # Safety
    ///
    /// No two threads write to parts that overlap.
    #[expect(
        unsafe_code,
        reason = "parts of one matrix are handed to several threads"
    )]
    pub(super) unsafe fn part(
        self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(columns.start <= columns.end && columns.end <= self.columns);
        Self {
            at: self.at.wrapping_add(rows.start * self.step + columns.start),
            rows: rows.len(),
            columns: columns.len(),
            step: self.step,
        }
    }

    /// A row, to be written.
    #[expect(unsafe_code, reason = "a slice of a window")]
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row lies in the matrix, and the window's maker promised that it is ours. The
        // memory may not have been written yet, which f32 does not mind: it is written first.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(row * self.step), self.columns) }
    }

    /// Asks for a part of a row to be fetched, before it is written.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn prefetch(&self, row: usize, columns: std::ops::Range<usize>) {
        for column in [columns.start, columns.end - 1] {
            prefetch(self.at.wrapping_add(row * self.step + column));
        }
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Where it begins, and numbers from one row to the next.
    pub(super) fn raw(&mut self) -> (*mut f32, usize) {
        (self.at, self.step)
    }
}
