//! Matrix products, by kernels that were measured once and are chosen by shape: nothing is tried out
//! while a program runs, which took minutes, and the sums of a product are always in the same order.
//!
//! f32 is multiplied in f32. Kernels for NVIDIA's matrix units would round it to TF32, 10 bits.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{DType, TensorMetadata, calculate_matmul_output};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::std::InputBinding;

use super::{Card, elem, fresh};

/// Fewer rows than this read a matrix as vectors do.
const FEW_ROWS: usize = 8;
/// What a bulk copy of a card of NVIDIA's asks of places and steps, bytes.
const BULK_ALIGNMENT: usize = 16;

/// `[.., m, k]` times `[.., k, n]`, row by row in memory.
pub(super) fn product(a: CubeTensor, b: CubeTensor) -> CubeTensor {
    let shape = calculate_matmul_output(&a.shape(), &b.shape());
    let shape = shape.expect("the functions of this crate check shapes");
    let rank = shape.num_dims();
    let (rows, columns, inner) = (shape[rank - 2], shape[rank - 1], a.shape()[rank - 1]);
    let out = fresh(&a, shape, a.dtype);
    if out.shape().num_elements() == 0 {
        return out;
    }
    if inner == 0 {
        return Card::float_zeros(out.shape(), &out.device, a.dtype.into());
    }
    let exact = match (rows, columns) {
        // A column may stand anywhere; the kernel for few rows takes it for one of a row's.
        (..FEW_ROWS, 2..) => Strategy::Gemm(Default::default()),
        (_, ..=64) => Strategy::DoubleUnit(Default::default()),
        _ => Strategy::SimpleUnit(Default::default()),
    };
    if matches!(a.dtype, DType::BF16 | DType::F16) {
        if let Some([a, b]) = for_bulk_copies(&a, &b)
            && launch(Strategy::SpecializedTmaMma(Default::default()), a, b, &out)
        {
            return out;
        }
        let units = Strategy::SimpleCyclicMma(Default::default());
        if launch(units, a.clone(), b.clone(), &out) {
            return out;
        }
    }
    let done = [exact, Strategy::Naive]
        .into_iter()
        .any(|strategy| launch(strategy, a.clone(), b.clone(), &out));
    assert!(done, "a kernel without demands multiplies");
    out
}

/// Whether the device and the shapes have what a kernel needs; if so, it is on its way.
fn launch(strategy: Strategy, a: CubeTensor, b: CubeTensor, out: &CubeTensor) -> bool {
    let mut elems = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: elem(&a),
        rhs: elem(&b),
        out: elem(out),
    });
    let [a, b] = [a, b].map(|x| {
        let elem = elem(&x);
        InputBinding::new(x.binding(), elem)
    });
    let out = out.clone();
    let client = out.client.clone();
    launch_ref(&strategy.into(), &client, a, b, out.binding(), &mut elems).is_ok()
}

/// Both factors as bulk copies can read them: matrices row by row or column by column at aligned steps,
/// all as far apart. `None` if the device has no bulk copies, or rows are of a length that no step can be.
fn for_bulk_copies(a: &CubeTensor, b: &CubeTensor) -> Option<[CubeTensor; 2]> {
    let factors = [a, b];
    let can_be = |tensor: &CubeTensor| {
        let shape = tensor.meta.shape();
        let row = shape[shape.num_dims() - 1] * tensor.elem_size();
        row.is_multiple_of(BULK_ALIGNMENT) || is_for_bulk_copies(tensor)
    };
    let tma = &a.client.properties().features.tma;
    if tma.is_empty() || !factors.into_iter().all(can_be) {
        return None;
    }
    Some(factors.map(|tensor| {
        if is_for_bulk_copies(tensor) {
            return tensor.clone();
        }
        // Of dimensions of size one, a tensor that counts as row by row may have any steps.
        let tensor = into_contiguous(tensor.clone());
        let (client, device) = (tensor.client.clone(), tensor.device.clone());
        CubeTensor::new_contiguous(client, device, tensor.shape(), tensor.handle, tensor.dtype)
    }))
}

fn is_for_bulk_copies(tensor: &CubeTensor) -> bool {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let (rows, columns) = (shape.num_dims() - 2, shape.num_dims() - 1);
    let aligned = |numbers: usize| (numbers * tensor.elem_size()).is_multiple_of(BULK_ALIGNMENT);
    let along = |inner: usize, outer: usize| {
        strides[inner] == 1 && strides[outer] >= shape[inner] && aligned(strides[outer])
    };
    let evenly = |dim: usize| shape[dim] == 1 || strides[dim] == strides[dim + 1] * shape[dim + 1];
    let start = tensor.handle.offset_start.unwrap_or(0);
    (along(columns, rows) || along(rows, columns))
        && (0..rows.saturating_sub(1)).all(evenly)
        && (0..rows).all(|dim| aligned(strides[dim]))
        && start.is_multiple_of(BULK_ALIGNMENT as u64)
}
