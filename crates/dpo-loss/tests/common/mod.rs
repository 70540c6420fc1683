//! Batches in double precision, made from rows of numbers.
#![allow(dead_code, reason = "each test file uses a part of this")]

use burn::tensor::{DType, Device, Tensor, TensorData};
use dpo_loss::{PairTable, PairTokens, TokenLogps};

/// Numbers of completion tokens: one row for each completion, chosen rows first.
pub(crate) type Rows = Vec<Vec<f64>>;

/// A table `[rows, seq]` of doubles, zero past the end of each row.
pub(crate) fn table(rows: &[Vec<f64>], seq: usize, device: &Device) -> Tensor<2> {
    let mut flat = Vec::with_capacity(rows.len() * seq);
    for row in rows {
        flat.extend_from_slice(row);
        flat.resize(flat.len() + seq - row.len(), 0.0);
    }
    let data = TensorData::new(flat, [rows.len(), seq]);
    Tensor::from_data(data, (device, DType::F64))
}

/// A vector of doubles.
pub(crate) fn vector(numbers: &[f64], device: &Device) -> Tensor<1> {
    let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
    Tensor::from_data(data, (device, DType::F64))
}

/// The longest row.
pub(crate) fn longest(rows: &[Vec<f64>]) -> usize {
    rows.iter().map(Vec::len).max().unwrap_or(0)
}

/// One at each number of the rows.
pub(crate) fn ones(rows: &[Vec<f64>]) -> Rows {
    rows.iter().map(|row| vec![1.0; row.len()]).collect()
}

/// Log-probabilities of both halves from their table.
pub(crate) fn tokens(values: Tensor<2>, rows: &[Vec<f64>], device: &Device) -> PairTokens {
    let [_, seq] = values.dims();
    let mask = table(&ones(rows), seq, device);
    PairTokens::from_halves(TokenLogps { values, mask })
}

/// A pair table from rows.
pub(crate) fn pair_table(rows: &[Vec<f64>], seq: usize, device: &Device) -> PairTable {
    PairTable::from_halves(table(rows, seq, device))
}

/// The number in a tensor of one.
pub(crate) fn number(tensor: Tensor<1>) -> f64 {
    tensor.cast(DType::F64).into_scalar()
}

/// The largest gap between a table `[rows, seq]` and what is expected of its completion tokens.
pub(crate) fn largest_gap(got: &[f64], seq: usize, expected: &[Vec<f64>]) -> f64 {
    let mut worst = 0.0_f64;
    for (row, expected) in expected.iter().enumerate() {
        for (column, expected) in expected.iter().enumerate() {
            worst = worst.max((got[row * seq + column] - expected).abs());
        }
    }
    worst
}

/// The tensor, tracked where its device records gradients.
pub(crate) fn tracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.is_autodiff() {
        tensor.require_grad()
    } else {
        tensor
    }
}
