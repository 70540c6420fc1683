//! A tile of a product: its sums stay in registers while its terms go by.

use pulp::Simd;

/// Rows of a tile. With registers of eight numbers its sums are 12 of 16, which leaves two for the
/// right side and one for the left.
pub(super) const ROWS: usize = 6;
/// Columns of a tile.
pub(super) const COLUMNS: usize = 16;
/// Terms to a turn of the loop over them. Of one alone, 12 multiply-adds, the turn itself is a
/// twentieth.
const UNROLLED: usize = 4;

/// A term of each row of a tile.
pub(super) type Left = [f32; ROWS];
/// A term of each column of a tile, or a row of it.
pub(super) type Right = [f32; COLUMNS];
/// The sums of a tile, `REGISTERS` to a row: [`COLUMNS`] numbers.
pub(super) type Sums<S, const REGISTERS: usize> = [[<S as Simd>::f32s; REGISTERS]; ROWS];

/// Sums of no terms.
#[inline(always)]
pub(super) fn none<S: Simd, const REGISTERS: usize>(simd: S) -> Sums<S, REGISTERS> {
    [[simd.splat_f32s(0.0); REGISTERS]; ROWS]
}

/// Adds the products of both sides' terms.
#[inline(always)]
pub(super) fn add<S: Simd, const REGISTERS: usize>(
    simd: S,
    sums: &mut Sums<S, REGISTERS>,
    left: &[Left],
    right: &[Right],
) {
    let (left, left_rest) = left.as_chunks::<UNROLLED>();
    let (right, right_rest) = right.as_chunks::<UNROLLED>();
    for (left, right) in left.iter().zip(right) {
        for (left, right) in left.iter().zip(right) {
            add_term(simd, sums, |row| left[row], right);
        }
    }
    for (left, right) in left_rest.iter().zip(right_rest) {
        add_term(simd, sums, |row| left[row], right);
    }
}

/// The same for [`COLUMNS`] terms, whose left side lies row by row.
#[inline(always)]
pub(super) fn add_rows<S: Simd, const REGISTERS: usize>(
    simd: S,
    sums: &mut Sums<S, REGISTERS>,
    left: &[Right; ROWS],
    right: &[Right; COLUMNS],
) {
    for (term, right) in right.iter().enumerate() {
        add_term(simd, sums, |row| left[row][term], right);
    }
}

#[inline(always)]
fn add_term<S: Simd, const REGISTERS: usize>(
    simd: S,
    sums: &mut Sums<S, REGISTERS>,
    left: impl Fn(usize) -> f32,
    right: &Right,
) {
    let (right, _) = S::as_simd_f32s(right);
    for (row, sums) in sums.iter_mut().enumerate() {
        let left = simd.splat_f32s(left(row));
        for (sum, &right) in sums.iter_mut().zip(right) {
            *sum = simd.mul_add_e_f32s(left, right, *sum);
        }
    }
}

/// The sums that rows hold.
#[inline(always)]
pub(super) fn load<S: Simd, const REGISTERS: usize>(
    simd: S,
    rows: &[Right; ROWS],
) -> Sums<S, REGISTERS> {
    let mut sums = none(simd);
    for (sums, row) in sums.iter_mut().zip(rows) {
        sums.copy_from_slice(S::as_simd_f32s(row).0);
    }
    sums
}

/// Writes sums to rows.
#[inline(always)]
pub(super) fn store<S: Simd, const REGISTERS: usize>(
    sums: Sums<S, REGISTERS>,
    rows: &mut [Right; ROWS],
) {
    for (sums, row) in sums.into_iter().zip(rows) {
        S::as_mut_simd_f32s(row).0.copy_from_slice(&sums);
    }
}
