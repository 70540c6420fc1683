//! Each operation against Burn's own operations and, in f64, against finite differences.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, Device, Tensor, TensorData};
use proptest::prelude::*;

/// Two ways to round f32 exponentials and their sums.
const F32_TOLERANCE: f64 = 2e-6;
/// A central difference of step 1e-5 is off by about 1e-10 of the third derivative, and by rounding.
const DIFFERENCE_TOLERANCE: f64 = 1e-8;
const STEP: f64 = 1e-5;

/// `[batch, heads, groups * seq, keys]` and the rows of its mask.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    heads: usize,
    groups: usize,
    seq: usize,
    keys: usize,
    one_mask: bool,
}

impl Shape {
    fn scores(&self) -> [usize; 4] {
        [self.batch, self.heads, self.groups * self.seq, self.keys]
    }

    fn mask(&self) -> [usize; 4] {
        let rows = if self.one_mask { 1 } else { self.batch };
        [rows, 1, self.seq, self.keys]
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    (
        1..4usize,
        1..3usize,
        1..4usize,
        1..6usize,
        1..70usize,
        any::<bool>(),
    )
        .prop_map(|(batch, heads, groups, seq, keys, one_mask)| Shape {
            batch,
            heads,
            groups,
            seq,
            keys,
            one_mask,
        })
}

/// Numbers that look random, from a seed.
fn noise(seed: u64, n: usize, scale: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            ((state >> 33) as f64 / (1u64 << 31) as f64 * 2.0 - 1.0) * scale
        })
        .collect()
}

fn tensor<const D: usize>(values: &[f64], shape: [usize; D], of: (&Device, DType)) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), of)
}

/// What is hidden: the future, some keys at random, and all of some queries.
fn mask(shape: Shape, seed: u64, device: &Device) -> Tensor<4, Bool> {
    let [rows, _, seq, keys] = shape.mask();
    let chance = noise(seed, rows * seq * keys, 1.0);
    let hidden: Vec<bool> = (0..rows * seq * keys)
        .map(|at| {
            let (query, key) = (at / keys % seq, at % keys);
            let future = key + seq > query + keys;
            future || chance[at] > 0.6 || chance[at / keys * keys] < -0.8
        })
        .collect();
    Tensor::from_data(TensorData::new(hidden, shape.mask()), device)
}

/// The definition, of Burn's operations.
fn weights(scores: Tensor<4>, hidden: Tensor<4, Bool>, shape: Shape) -> Tensor<4> {
    let [rows, ..] = shape.mask();
    let Shape {
        batch,
        heads,
        groups,
        seq,
        keys,
        ..
    } = shape;
    let hidden: Tensor<5, Bool> = hidden.reshape([rows, 1, 1, seq, keys]);
    let hidden = hidden.expand([batch, heads, groups, seq, keys]);
    let scores: Tensor<5> = scores.reshape([batch, heads, groups, seq, keys]);
    softmax(scores.mask_fill(hidden.clone(), -1e30), 4)
        .mask_fill(hidden, 0.0)
        .reshape(shape.scores())
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    let values = tensor.cast(DType::F64).try_into_vec_as();
    values.expect("a CPU tensor can be read")
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let gaps = a
        .iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs() / (1.0 + b.abs()));
    // Not a number is the largest gap.
    gaps.fold(0.0, |most, gap| if gap <= most { most } else { gap })
}

/// What `run` gives, and the gradients of its sum weighted with `weights`.
fn gradients<const D: usize, const N: usize>(
    inputs: [Tensor<D>; N],
    weights: &Tensor<D>,
    run: impl Fn([Tensor<D>; N]) -> Tensor<D>,
) -> [Vec<f64>; N] {
    let inputs = inputs.map(|input| input.autodiff().require_grad());
    let loss = (run(inputs.clone()) * weights.clone().autodiff()).sum();
    let grads = loss.backward();
    inputs.map(|input| numbers(input.grad(&grads).expect("each input has a gradient")))
}

/// The largest gap of each gradient to central differences.
fn difference_gap<const D: usize, const N: usize>(
    inputs: [Vec<f64>; N],
    shape: [usize; D],
    run: impl Fn([Tensor<D>; N]) -> Tensor<D>,
) -> f64 {
    let device = Device::default();
    let of = (&device, DType::F64);
    let n = inputs[0].len();
    let weights = noise(99, n, 1.0);
    let value = |inputs: &[Vec<f64>; N]| -> f64 {
        let out = numbers(run(inputs.each_ref().map(|input| tensor(input, shape, of))));
        out.iter().zip(&weights).map(|(x, w)| x * w).sum()
    };
    let found = gradients(
        inputs.each_ref().map(|input| tensor(input, shape, of)),
        &tensor(&weights, shape, of),
        &run,
    );
    let mut worst = 0.0;
    for input in 0..N {
        let differences: Vec<f64> = (0..n)
            .map(|at| {
                let moved = |by: f64| {
                    let mut inputs = inputs.clone();
                    inputs[input][at] += by;
                    value(&inputs)
                };
                (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
            })
            .collect();
        let gap = gap(&found[input], &differences);
        worst = if gap <= worst { worst } else { gap };
    }
    worst
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn masked_softmax_is_the_composed_one_with_its_gradient(shape in shapes(), seed in 0u64..1000) {
        let device = Device::default();
        let of = (&device, DType::F32);
        let n: usize = shape.scores().iter().product();
        let scores: Tensor<4> = tensor(&noise(seed, n, 8.0), shape.scores(), of);
        let hidden = mask(shape, seed + 1, &device);
        let fused = numbers(ops::masked_softmax(scores.clone(), hidden.clone()));
        let composed = numbers(weights(scores.clone(), hidden.clone(), shape));
        prop_assert!(gap(&fused, &composed) < F32_TOLERANCE, "{fused:?}\n{composed:?}");

        let factors = tensor(&noise(seed + 2, n, 1.0), shape.scores(), of);
        let fused = gradients([scores.clone()], &factors, |[scores]| {
            ops::masked_softmax(scores, hidden.clone())
        });
        let composed = gradients([scores], &factors, |[scores]| {
            weights(scores, hidden.clone(), shape)
        });
        prop_assert!(gap(&fused[0], &composed[0]) < F32_TOLERANCE);
    }
}

#[test]
fn gradients_are_finite_differences() {
    let device = Device::default();
    let shape = Shape {
        batch: 2,
        heads: 2,
        groups: 2,
        seq: 3,
        keys: 5,
        one_mask: false,
    };
    let n = shape.scores().iter().product();
    let hidden = mask(shape, 3, &device);
    let found = difference_gap([noise(1, n, 2.0)], shape.scores(), |[scores]| {
        ops::masked_softmax(scores, hidden.clone())
    });
    assert!(found < DIFFERENCE_TOLERANCE, "{found:e}");
}

#[test]
fn views_and_shared_tensors_are_left_as_they_were() {
    let device = Device::default();
    let of = (&device, DType::F32);
    let whole: Tensor<4> = tensor(&noise(1, 2 * 3 * 4 * 6, 2.0), [2, 3, 4, 6], of);
    let before = numbers(whole.clone());
    // A view that is neither whole nor in order.
    let view = whole.clone().narrow(1, 1, 2).swap_dims(2, 3);
    let shape = Shape {
        batch: 2,
        heads: 2,
        groups: 1,
        seq: 6,
        keys: 4,
        one_mask: true,
    };
    let hidden = mask(shape, 5, &device);
    let fused = numbers(ops::masked_softmax(view.clone(), hidden.clone()));
    let composed = numbers(weights(view.clone(), hidden, shape));
    assert!(gap(&fused, &composed) < F32_TOLERANCE);
    assert_eq!(numbers(whole), before);
}

#[test]
fn what_is_not_a_number_is_not_hidden_away() {
    let device = Device::default();
    let of = (&device, DType::F32);
    let n = 20;
    let nothing =
        Tensor::<4, Bool>::from_data(TensorData::new(vec![false; n], [1, 1, 1, n]), &device);
    for at in [0, 7, 19] {
        let mut scores = vec![0.5; n];
        scores[at] = f64::NAN;
        let weights = ops::masked_softmax(tensor(&scores, [1, 1, 1, n], of), nothing.clone());
        assert!(numbers(weights).iter().all(|w| w.is_nan()));
    }
}
