//! Kernels that compute a row by sums along it, a cube for each.

use burn::backend::TensorMetadata;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::{elem, like};
use crate::composed::NOWHERE;

/// Units that share a row: a few numbers for each of them in the rows of a language model.
const UNITS: u32 = 128;

/// The sum, or if `largest` the largest, of a number of each unit.
#[cube]
pub(super) fn together(value: f32, #[comptime] largest: bool) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let unit = UNIT_POS_X as usize;
    shared[unit] = value;
    sync_cube();
    let mut half = comptime!(UNITS as usize / 2).runtime();
    while half > 0 {
        if unit < half {
            if largest {
                shared[unit] = max(shared[unit], shared[unit + half]);
            } else {
                shared[unit] += shared[unit + half];
            }
        }
        sync_cube();
        half /= 2;
    }
    let all = shared[0];
    // Nobody writes to the memory again before all have read it.
    sync_cube();
    all
}

#[cube(launch, address_type = "dynamic")]
fn masked_softmax_kernel<F: Float, B: Int>(
    scores: &Tensor<F>,
    hidden: &Tensor<B>,
    out: &mut Tensor<F>,
    rows: usize,
    keys: usize,
    seq: usize,
    queries: usize,
    batch: usize,
    #[define(F, B)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let start = row * keys;
    // Queries of all heads of a row of the batch hide alike.
    let mask = (row / queries % batch * seq + row % seq) * keys;
    let mut highest = f32::new(NOWHERE);
    let mut key = UNIT_POS_X as usize;
    while key < keys {
        if hidden[mask + key] == B::from_int(0) {
            highest = max(highest, f32::cast_from(scores[start + key]));
        }
        key += CUBE_DIM_X as usize;
    }
    let highest = together(highest, true);
    let mut sum = f32::new(0.0);
    let mut key = UNIT_POS_X as usize;
    while key < keys {
        if hidden[mask + key] == B::from_int(0) {
            sum += (f32::cast_from(scores[start + key]) - highest).exp();
        }
        key += CUBE_DIM_X as usize;
    }
    let sum = together(sum, false);
    let mut key = UNIT_POS_X as usize;
    while key < keys {
        let mut weight = f32::new(0.0);
        if hidden[mask + key] == B::from_int(0) {
            weight = (f32::cast_from(scores[start + key]) - highest).exp() / sum;
        }
        out[start + key] = F::cast_from(weight);
        key += CUBE_DIM_X as usize;
    }
}

#[cube(launch, address_type = "dynamic")]
fn softmax_backward_kernel<F: Float>(
    weights: &Tensor<F>,
    grad: &Tensor<F>,
    out: &mut Tensor<F>,
    rows: usize,
    keys: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let start = row * keys;
    let mut sum = f32::new(0.0);
    let mut at = start + UNIT_POS_X as usize;
    while at < start + keys {
        sum += f32::cast_from(weights[at]) * f32::cast_from(grad[at]);
        at += CUBE_DIM_X as usize;
    }
    let mean = together(sum, false);
    let mut at = start + UNIT_POS_X as usize;
    while at < start + keys {
        out[at] = F::cast_from(f32::cast_from(weights[at]) * (f32::cast_from(grad[at]) - mean));
        at += CUBE_DIM_X as usize;
    }
}

/// `1 / rms(x)` of the row that begins at `start`.
#[cube]
fn inverse<F: Float>(x: &Tensor<F>, start: usize, columns: usize, eps: f32) -> f32 {
    let mut sum = f32::new(0.0);
    let mut at = start + UNIT_POS_X as usize;
    while at < start + columns {
        let x = f32::cast_from(x[at]);
        sum += x * x;
        at += CUBE_DIM_X as usize;
    }
    1.0 / (together(sum, false) / f32::cast_from(columns as u32) + eps).sqrt()
}

#[cube(launch, address_type = "dynamic")]
fn rms_norm_kernel<F: Float>(
    x: &Tensor<F>,
    weight: &Tensor<F>,
    out: &mut Tensor<F>,
    rows: usize,
    columns: usize,
    eps: f32,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let start = row * columns;
    let scale = inverse::<F>(x, start, columns, eps);
    let mut column = UNIT_POS_X as usize;
    while column < columns {
        let normal = f32::cast_from(x[start + column]) * scale;
        out[start + column] = F::cast_from(normal * f32::cast_from(weight[column]));
        column += CUBE_DIM_X as usize;
    }
}

/// With `s = 1 / rms(x)` and `n = x s`: `s (g w − n mean(n g w))`, and `n g` of each number.
#[cube(launch, address_type = "dynamic")]
fn rms_norm_backward_kernel<F: Float>(
    x: &Tensor<F>,
    weight: &Tensor<F>,
    grad: &Tensor<F>,
    for_x: &mut Tensor<F>,
    products: &mut Tensor<F>,
    rows: usize,
    columns: usize,
    eps: f32,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let start = row * columns;
    let scale = inverse::<F>(x, start, columns, eps);
    let mut sum = f32::new(0.0);
    let mut column = UNIT_POS_X as usize;
    while column < columns {
        let normal = f32::cast_from(x[start + column]) * scale;
        let product = normal * f32::cast_from(grad[start + column]);
        products[start + column] = F::cast_from(product);
        sum += product * f32::cast_from(weight[column]);
        column += CUBE_DIM_X as usize;
    }
    let along = together(sum, false) / f32::cast_from(columns as u32);
    let mut column = UNIT_POS_X as usize;
    while column < columns {
        let normal = f32::cast_from(x[start + column]) * scale;
        let pulled = f32::cast_from(grad[start + column]) * f32::cast_from(weight[column]);
        for_x[start + column] = F::cast_from((pulled - normal * along) * scale);
        column += CUBE_DIM_X as usize;
    }
}

/// A cube for each row, and how many rows of how many columns there are.
pub(super) fn cubes(of: &CubeTensor) -> (CubeCount, CubeDim, [usize; 2]) {
    let shape = of.shape();
    let columns = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / columns.max(1);
    let count = calculate_cube_count_elemwise(&of.client, rows, CubeDim::new_1d(1));
    (count, CubeDim::new_1d(UNITS), [rows, columns])
}

pub(super) fn masked_softmax(scores: CubeTensor, hidden: CubeTensor) -> CubeTensor {
    let (scores, hidden) = (into_contiguous(scores), into_contiguous(hidden));
    let (shape, mask) = (scores.shape(), hidden.shape());
    let (count, dim, [rows, keys]) = cubes(&scores);
    let out = like(&scores);
    if rows * keys == 0 {
        return out;
    }
    let dtypes = [elem(&scores), elem(&hidden)];
    masked_softmax_kernel::launch(
        &out.client,
        count,
        dim,
        out.required_address_type(),
        scores.into_tensor_arg(),
        hidden.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        rows,
        keys,
        mask[2],
        shape[1] * shape[2],
        mask[0],
        dtypes,
    );
    out
}

pub(super) fn softmax_backward(weights: CubeTensor, grad: CubeTensor) -> CubeTensor {
    let (weights, grad) = (into_contiguous(weights), into_contiguous(grad));
    let (count, dim, [rows, keys]) = cubes(&weights);
    let out = like(&weights);
    if rows * keys == 0 {
        return out;
    }
    softmax_backward_kernel::launch(
        &out.client,
        count,
        dim,
        out.required_address_type(),
        weights.into_tensor_arg(),
        grad.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        rows,
        keys,
        elem(&out),
    );
    out
}

pub(super) fn rms_norm(x: CubeTensor, weight: CubeTensor, eps: f32) -> CubeTensor {
    let (x, weight) = (into_contiguous(x), into_contiguous(weight));
    let (count, dim, [rows, columns]) = cubes(&x);
    let out = like(&x);
    if rows * columns == 0 {
        return out;
    }
    rms_norm_kernel::launch(
        &out.client,
        count,
        dim,
        out.required_address_type(),
        x.into_tensor_arg(),
        weight.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        rows,
        columns,
        eps,
        elem(&out),
    );
    out
}

/// The gradient with respect to `x`, and what the one with respect to the weight adds up, row by row.
pub(super) fn rms_norm_backward(
    x: CubeTensor,
    weight: CubeTensor,
    eps: f32,
    grad: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let [x, weight, grad] = [x, weight, grad].map(into_contiguous);
    let (count, dim, [rows, columns]) = cubes(&x);
    let (for_x, products) = (like(&x), like(&x));
    if rows * columns == 0 {
        return (for_x, products);
    }
    rms_norm_backward_kernel::launch(
        &for_x.client,
        count,
        dim,
        for_x.required_address_type(),
        x.into_tensor_arg(),
        weight.into_tensor_arg(),
        grad.into_tensor_arg(),
        for_x.clone().into_tensor_arg(),
        products.clone().into_tensor_arg(),
        rows,
        columns,
        eps,
        elem(&for_x),
    );
    (for_x, products)
}
