//! Matrix products.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;

use super::memory::{Window, values, written};

/// Multiplications and additions from which on all cores share a product.
const WORTH_SHARING: usize = 1 << 20;

/// Rows from which on `b` is met often enough to be packed for them.
#[cfg(target_arch = "x86_64")]
const WORTH_PACKING: usize = 24;

/// A matrix that is read: its numbers, and how far apart its rows and its columns are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_step: usize,
    pub(super) column_step: usize,
}

impl<'a> Matrix<'a> {
    /// `[rows, columns]`, row by row.
    pub(super) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// `[rows, columns]`, whose rows are `row_step` numbers apart.
    pub(super) fn strided(values: &'a [f32], rows: usize, columns: usize, row_step: usize) -> Self {
        let matrix = Self {
            values,
            rows,
            columns,
            row_step,
            column_step: 1,
        };
        matrix.check();
        matrix
    }

    /// What a tensor of two dimensions holds, however it lies; a copy of it would cost a pass.
    pub(super) fn of(tensor: &'a FlexTensor) -> Option<Self> {
        let shape = tensor.shape();
        let strides = tensor.layout().strides();
        let steps: Vec<usize> = strides
            .iter()
            .map(|&stride| usize::try_from(stride).ok())
            .collect::<Option<_>>()?;
        let matrix = Self {
            values: &tensor.storage::<f32>()[tensor.layout().start_offset()..],
            rows: shape[0],
            columns: shape[1],
            row_step: steps[0],
            column_step: steps[1],
        };
        matrix.check();
        Some(matrix)
    }

    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row_step + (self.columns - 1) * self.column_step;
            assert!(last < self.values.len(), "a matrix lies in its memory");
        }
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_step: self.column_step,
            column_step: self.row_step,
            ..self
        }
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }
}

/// What becomes of what stands where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Into {
    /// It is overwritten, and never read.
    Fresh,
    /// The product is added to it.
    Sum,
}

/// `a b`, on all cores where it is worth it.
///
/// # Panics
///
/// If the shapes do not fit.
pub(super) fn shared_product(out: Window, into: Into, a: Matrix<'_>, b: Matrix<'_>) {
    if !has_terms(out, into, a, b) {
        return;
    }
    let shared = a.rows * a.columns * b.columns >= WORTH_SHARING;
    #[cfg(target_arch = "x86_64")]
    if a.rows >= WORTH_PACKING
        && let Some(simd) = super::tiles::processor()
    {
        return super::tiles::product(simd, out, into, a, b, shared);
    }
    let parallelism = if shared {
        // 0: as many threads as the pool has.
        gemm::Parallelism::Rayon(0)
    } else {
        gemm::Parallelism::None
    };
    gemm(out, into, a, b, parallelism);
}

/// `a b` in memory of its own, row by row.
#[expect(unsafe_code, reason = "the product fills fresh memory")]
pub(super) fn new_product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let (rows, columns) = (a.rows, b.columns);
    // SAFETY: a fresh product writes every number of its window.
    unsafe {
        written(rows * columns, |at| {
            shared_product(Window::new(at, rows, columns), Into::Fresh, a, b);
        })
    }
}

/// Whether there is anything to add up. A fresh product of no terms is zero.
///
/// # Panics
///
/// If the shapes do not fit.
fn has_terms(mut out: Window, into: Into, a: Matrix<'_>, b: Matrix<'_>) -> bool {
    let (rows, columns) = out.dims();
    assert!(
        a.dims() == (rows, a.columns) && b.dims() == (a.columns, columns),
        "the product of {:?} and {:?} goes into {rows} by {columns}",
        a.dims(),
        b.dims()
    );
    if a.columns == 0 && columns > 0 && into == Into::Fresh {
        for row in 0..rows {
            out.row(row).fill(0.0);
        }
    }
    rows > 0 && columns > 0 && a.columns > 0
}

#[expect(unsafe_code, reason = "the `gemm` crate takes pointers")]
fn gemm(mut out: Window, into: Into, a: Matrix<'_>, b: Matrix<'_>, parallelism: gemm::Parallelism) {
    let (rows, columns) = out.dims();
    let (at, step) = out.raw();
    let signed = |step: usize| isize::try_from(step).expect("memory is smaller than that");
    // SAFETY: `check` holds that every number of `a` and `b` lies in its slice, and a window that
    // its rows lie in memory that is ours to write. What is fresh is not read.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            a.columns,
            at,
            1,
            signed(step),
            into == Into::Sum,
            a.values.as_ptr(),
            signed(a.column_step),
            signed(a.row_step),
            b.values.as_ptr(),
            signed(b.column_step),
            signed(b.row_step),
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The matrix of a tensor as it lies, or else of a copy in order.
pub(super) fn with_matrix<T>(tensor: &FlexTensor, run: impl FnOnce(Matrix<'_>) -> T) -> T {
    if let Some(matrix) = Matrix::of(tensor) {
        return run(matrix);
    }
    let copy = tensor.to_contiguous();
    let shape = copy.shape();
    run(Matrix::new(values(&copy), shape[0], shape[1]))
}
