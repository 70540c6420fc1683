//! Each operation in f32, as the processor has it, against its composed form in f64, which is held
//! against finite differences.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

use burn::tensor::{DType, Device, Tensor, TensorData};
use ops::{AdamWStep, Family, Heads, Spans, Turns};
use proptest::prelude::*;

/// f32 sums of a few hundred products of numbers of size one, in another order.
const F32_TOLERANCE: f64 = 2e-5;
/// A central difference of step 1e-5 is off by about 1e-10 of the third derivative, and by rounding.
const DIFFERENCE_TOLERANCE: f64 = 1e-8;
const STEP: f64 = 1e-5;

/// A matrix by rows, and its shape.
type Matrix = (Vec<f64>, [usize; 2]);

/// Numbers that look random, from a seed.
fn noise(seed: u64, shape: [usize; 2], scale: f64) -> Matrix {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 33) as f64 / (1u64 << 31) as f64 * 2.0 - 1.0) * scale
    };
    ((0..shape[0] * shape[1]).map(|_| next()).collect(), shape)
}

fn tensor((values, shape): &Matrix, dtype: DType) -> Tensor<2> {
    let data = TensorData::new(values.clone(), *shape);
    Tensor::from_data(data, (&Device::default(), dtype))
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.cast(DType::F64).try_into_vec_as().unwrap()
}

/// The largest difference, in units of one and the number's size.
fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let gaps = a
        .iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs() / (1.0 + b.abs()));
    // Not a number is the largest gap.
    gaps.fold(0.0, |most, gap| if gap <= most { most } else { gap })
}

/// What `run` gives, and the gradients of its sum, weighted at random.
fn pass(
    inputs: &[Matrix],
    dtype: DType,
    run: &dyn Fn(&[Tensor<2>]) -> Tensor<2>,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let inputs: Vec<Tensor<2>> = inputs
        .iter()
        .map(|input| tensor(input, dtype).autodiff().require_grad())
        .collect();
    let out = run(&inputs);
    let weights = tensor(&noise(99, out.dims(), 1.0), dtype).autodiff();
    let grads = (out.clone() * weights).sum().backward();
    let grads = inputs
        .iter()
        .map(|input| numbers(input.grad(&grads).unwrap()));
    (numbers(out.inner()), grads.collect())
}

/// The largest gap between f32 and f64, of values and gradients; and that without a graph the values
/// are those with one.
fn precision_gap(inputs: &[Matrix], run: &dyn Fn(&[Tensor<2>]) -> Tensor<2>) -> f64 {
    let (values, grads) = pass(inputs, DType::F32, run);
    let (exact, exact_grads) = pass(inputs, DType::F64, run);
    let plain: Vec<Tensor<2>> = inputs.iter().map(|i| tensor(i, DType::F32)).collect();
    assert_eq!(numbers(run(&plain)), values);
    let grads = grads.iter().zip(&exact_grads).map(|(a, b)| gap(a, b));
    let values = gap(&values, &exact);
    grads.fold(values, |most, gap| if gap <= most { most } else { gap })
}

/// The largest gap of the gradients in f64 to central differences.
fn difference_gap(inputs: &[Matrix], run: &dyn Fn(&[Tensor<2>]) -> Tensor<2>) -> f64 {
    let (_, grads) = pass(inputs, DType::F64, run);
    let value = |inputs: &[Matrix]| -> f64 {
        let inputs: Vec<Tensor<2>> = inputs.iter().map(|i| tensor(i, DType::F64)).collect();
        let out = run(&inputs);
        let (weights, _) = noise(99, out.dims(), 1.0);
        numbers(out).iter().zip(&weights).map(|(x, w)| x * w).sum()
    };
    let mut worst = 0.0;
    for (input, grads) in grads.iter().enumerate() {
        let differences: Vec<f64> = (0..grads.len())
            .map(|at| {
                let moved = |by: f64| {
                    let mut inputs = inputs.to_vec();
                    inputs[input].0[at] += by;
                    value(&inputs)
                };
                (moved(STEP) - moved(-STEP)) / (2.0 * STEP)
            })
            .collect();
        let gap = gap(grads, &differences);
        worst = if gap <= worst { worst } else { gap };
    }
    worst
}

fn row(tensor: &Tensor<2>) -> Tensor<1> {
    let [rows, columns] = tensor.dims();
    tensor.clone().reshape([rows * columns])
}

fn linear(inputs: &[Tensor<2>]) -> Tensor<2> {
    let bias = inputs.get(2).map(row);
    ops::linear(inputs[0].clone(), inputs[1].clone(), bias)
}

fn transposed_linear(inputs: &[Tensor<2>]) -> Tensor<2> {
    ops::linear(inputs[0].clone(), inputs[1].clone().transpose(), None)
}

fn joined(inputs: &[Tensor<2>]) -> Tensor<2> {
    ops::joined_linear(inputs[0].clone(), &inputs[1..])
}

fn norm(inputs: &[Tensor<2>]) -> Tensor<2> {
    ops::rms_norm(inputs[0].clone(), row(&inputs[1]), 1e-3)
}

fn swiglu(inputs: &[Tensor<2>]) -> Tensor<2> {
    ops::swiglu(inputs[0].clone())
}

/// A case of attention.
#[derive(Clone, Debug)]
struct Case {
    heads: Heads,
    spans: Spans,
    turns: Option<Turns>,
}

impl Case {
    /// Families of given lengths, prompt first, one after the other in a row with `padding` behind
    /// each.
    fn packed(heads: Heads, lengths: &[Vec<usize>], padding: usize, turned: usize) -> Self {
        let mut next = 0;
        let mut positions = Vec::new();
        let mut families = Vec::new();
        for lengths in lengths {
            let mut runs = lengths.iter().enumerate().map(|(index, &length)| {
                let before = if index > 0 { lengths[0] } else { 0 };
                positions.extend((before..before + length).map(|p| p as u32));
                next += length;
                next - length..next
            });
            let prompt = runs.next().unwrap();
            let completions = runs.collect();
            families.push(Family {
                prompt,
                completions,
            });
            positions.resize(next + padding, 0);
            next += padding;
        }
        Self {
            heads,
            turns: (turned > 0).then(|| Turns::new(turned, 100.0, &positions, next)),
            spans: Spans::new(1, next, families),
        }
    }

    fn tokens(&self) -> usize {
        self.spans.dims()[1]
    }

    fn input(&self, seed: u64) -> Matrix {
        noise(seed, [self.tokens(), self.heads.joined()], 1.5)
    }

    fn run(&self) -> impl Fn(&[Tensor<2>]) -> Tensor<2> {
        move |inputs: &[Tensor<2>]| {
            let qkv = inputs[0].clone();
            ops::attention(qkv, self.heads, &self.spans, self.turns.as_ref())
        }
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let heads = (1..3usize, 1..4usize, 1..6usize).prop_map(|(keys, groups, half)| Heads {
        queries: keys * groups,
        keys,
        width: 2 * half,
    });
    // Runs longer than a block of queries, and empty prompts.
    let length = prop_oneof![4 => 0..9usize, 1 => 60..140usize];
    let family = prop::collection::vec(length, 1..4);
    let families = prop::collection::vec(family, 1..4);
    (heads, families, 0..3usize, 0..6usize).prop_map(|(heads, mut families, padding, half)| {
        families[0][0] += 1;
        Case::packed(heads, &families, padding, (2 * half).min(heads.width))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn linear_layers_agree(
        rows in 1..80usize, inputs in 1..70usize, outputs in 1..70usize, bias: bool, seed in 0u64..1000,
    ) {
        let mut all = vec![noise(seed, [rows, inputs], 1.0), noise(seed + 1, [inputs, outputs], 1.0)];
        if bias {
            all.push(noise(seed + 2, [1, outputs], 1.0));
        }
        prop_assert!(precision_gap(&all, &linear) < F32_TOLERANCE);
        all.truncate(1);
        all.push(noise(seed + 1, [outputs, inputs], 1.0));
        prop_assert!(precision_gap(&all, &transposed_linear) < F32_TOLERANCE);
    }

    #[test]
    fn layers_side_by_side_agree(
        rows in 1..200usize, inputs in 1..70usize, seed in 0u64..1000,
        outputs in prop::collection::vec(1..70usize, 1..5),
    ) {
        let mut all = vec![noise(seed, [rows, inputs], 1.0)];
        for (index, &outputs) in (1..).zip(&outputs) {
            all.push(noise(seed + index, [inputs, outputs], 1.0));
        }
        let gap = precision_gap(&all, &joined);
        prop_assert!(gap < F32_TOLERANCE, "{gap:e}");
        let [x, weights @ ..] = &all.iter().map(|x| tensor(x, DType::F32)).collect::<Vec<_>>()[..]
        else {
            unreachable!("an input comes first");
        };
        let apart = weights.iter().map(|weight| ops::linear(x.clone(), weight.clone(), None));
        prop_assert_eq!(
            numbers(ops::joined_linear(x.clone(), weights)),
            numbers(Tensor::cat(apart.collect(), 1))
        );
    }

    #[test]
    fn norms_agree(rows in 1..200usize, n in 1..300usize, seed in 0u64..1000) {
        let inputs = [noise(seed, [rows, n], 2.0), noise(seed + 1, [1, n], 2.0)];
        let gap = precision_gap(&inputs, &norm);
        prop_assert!(gap < F32_TOLERANCE, "{gap:e}");
    }

    #[test]
    fn swiglus_agree(rows in 1..40usize, n in 1..150usize, seed in 0u64..1000) {
        let gap = precision_gap(&[noise(seed, [rows, 2 * n], 20.0)], &swiglu);
        prop_assert!(gap < F32_TOLERANCE, "{gap:e}");
    }

    #[test]
    fn attentions_agree(case in cases(), seed in 0u64..1000) {
        let gap = precision_gap(&[case.input(seed)], &case.run());
        prop_assert!(gap < F32_TOLERANCE, "{gap:e}");
    }

    #[test]
    fn logps_and_statistics_are_those_of_the_logits(
        rows in 1..40usize, width in 1..40usize, vocab in 2..200usize, tied: bool, seed in 0u64..1000,
    ) {
        let shape = if tied { [vocab, width] } else { [width, vocab] };
        check_head(rows, noise(seed, [rows, width], 2.0), noise(seed + 1, shape, 1.0), tied)?;
    }

    #[test]
    fn a_step_of_adamw_is_the_composed_one(n in 1..400usize, clip: bool, seed in 0u64..1000) {
        let step = AdamWStep {
            grad_scale: if clip { 0.3 } else { 1.0 },
            beta1: 0.9,
            beta2: 0.99,
            rate: 0.02,
            root_bias2: 0.4,
            epsilon: 1e-6,
            keep: 0.999,
        };
        let inputs: Vec<Matrix> = (0..4).map(|i| noise(seed + i, [1, n], 1.0)).collect();
        let run = |dtype| {
            let [value, grad, first, second] = [0, 1, 2, 3].map(|i| tensor(&inputs[i], dtype));
            let kept = value.clone();
            let before = numbers(kept.clone());
            let (value, [first, second]) = ops::adamw(value, grad, [first, second.abs()], step);
            // Whoever else holds a tensor keeps what it was.
            assert_eq!(numbers(kept), before);
            [value, first, second].map(numbers)
        };
        for (a, b) in run(DType::F32).iter().zip(&run(DType::F64)) {
            prop_assert!(gap(a, b) < F32_TOLERANCE);
        }
        let squares = |dtype| numbers(ops::sum_of_squares(tensor(&inputs[0], dtype)));
        prop_assert!(gap(&squares(DType::F32), &squares(DType::F64)) < F32_TOLERANCE);
    }

    #[test]
    fn a_sum_in_place_is_the_sum(n in 1..40_000usize, turned: bool, seed in 0u64..1000) {
        let inputs = [0, 1].map(|i| noise(seed + i, [2, n], 1.0));
        let run = |dtype| {
            let [sum, x] = [0, 1].map(|i| tensor(&inputs[i], dtype));
            // However they lie, and whoever else holds them.
            let (sum, x) = if turned { (sum.transpose(), x.transpose()) } else { (sum, x) };
            let kept = sum.clone();
            let before = numbers(kept.clone());
            let summed = numbers(ops::accumulate(sum, x));
            assert_eq!(numbers(kept), before);
            summed
        };
        // One addition of each, in order.
        prop_assert!(gap(&run(DType::F32), &run(DType::F64)) < F32_TOLERANCE);
    }
}

/// The head against the softmax of its logits, in f64, and the gradients of the logps.
fn check_head(
    rows: usize,
    hidden: Matrix,
    weight: Matrix,
    tied: bool,
) -> Result<(), TestCaseError> {
    let vocab = weight.1[usize::from(!tied)];
    let targets: Vec<i64> = (0..rows).map(|i| (i * 7 % vocab) as i64).collect();
    let targets = Tensor::from_data(TensorData::new(targets, [rows]), &Device::default());
    let exact = |inputs: &[Tensor<2>]| {
        let weight = inputs[1].clone();
        let weight = if tied { weight.transpose() } else { weight };
        burn::tensor::activation::log_softmax(inputs[0].clone().matmul(weight), 1)
    };
    let picked = |inputs: &[Tensor<2>]| {
        let targets = targets.clone().reshape([rows, 1]);
        let targets = if inputs[0].is_autodiff() {
            targets.autodiff()
        } else {
            targets
        };
        exact(inputs).gather(1, targets)
    };
    let fused = |inputs: &[Tensor<2>]| {
        let out = ops::head_logps(&inputs[0], &inputs[1], tied, &targets).unwrap();
        out.logps.reshape([rows, 1])
    };
    let inputs = [hidden, weight];
    let (values, grads) = pass(&inputs, DType::F32, &fused);
    let (exact_values, exact_grads) = pass(&inputs, DType::F64, &picked);
    prop_assert!(gap(&values, &exact_values) < F32_TOLERANCE);
    for (a, b) in grads.iter().zip(&exact_grads) {
        prop_assert!(gap(a, b) < F32_TOLERANCE, "{:e}", gap(a, b));
    }
    let [hidden, weight] = [0, 1].map(|i| tensor(&inputs[i], DType::F32));
    let out = ops::head_logps(&hidden, &weight, tied, &targets).unwrap();
    let [hidden, weight] = [0, 1].map(|i| tensor(&inputs[i], DType::F64));
    let logps = exact(&[hidden.clone(), weight.clone()]);
    let entropy = -(logps.clone().exp() * logps.clone()).sum_dim(1);
    prop_assert!(gap(&numbers(out.entropy), &numbers(entropy)) < F32_TOLERANCE);
    let weight = if tied { weight.transpose() } else { weight };
    let mean = hidden.matmul(weight).mean_dim(1);
    prop_assert!(gap(&numbers(out.mean_logit), &numbers(mean)) < F32_TOLERANCE);
    let best = logps.argmax(1).reshape([rows]).equal(targets.clone());
    prop_assert_eq!(numbers(out.top1), numbers(best.float()));
    Ok(())
}

#[test]
fn logits_that_fill_more_than_a_tile_are_computed_again_on_the_way_back() {
    // 600 rows of 30,000 logits: two tiles, the second not whole.
    for tied in [false, true] {
        let shape = if tied { [30_000, 3] } else { [3, 30_000] };
        let (hidden, weight) = (noise(1, [600, 3], 2.0), noise(2, shape, 1.0));
        check_head(600, hidden, weight, tied).unwrap();
    }
}

#[test]
fn gradients_are_finite_differences() {
    let bias = [
        noise(1, [3, 4], 1.0),
        noise(2, [4, 5], 1.0),
        noise(3, [1, 5], 1.0),
    ];
    let joined_inputs = [
        noise(1, [3, 4], 1.0),
        noise(2, [4, 5], 1.0),
        noise(3, [4, 2], 1.0),
        noise(8, [4, 1], 1.0),
    ];
    let norm_inputs = [noise(4, [3, 5], 2.0), noise(5, [1, 5], 1.0)];
    let found = [
        difference_gap(&bias, &linear),
        difference_gap(&bias[..2], &linear),
        difference_gap(&joined_inputs, &joined),
        difference_gap(&norm_inputs, &norm),
        difference_gap(&[noise(6, [3, 8], 4.0)], &swiglu),
    ];
    for gap in found {
        assert!(gap < DIFFERENCE_TOLERANCE, "{found:?}");
    }
    let heads = Heads {
        queries: 4,
        keys: 2,
        width: 4,
    };
    let case = Case::packed(heads, &[vec![2, 2, 1], vec![0, 2], vec![3]], 1, 2);
    let gap = difference_gap(&[case.input(7)], &case.run());
    assert!(gap < DIFFERENCE_TOLERANCE, "{gap:e}");
}

#[test]
fn families_of_a_row_do_not_talk() {
    let heads = Heads {
        queries: 2,
        keys: 1,
        width: 8,
    };
    let lengths = [vec![70, 3, 90], vec![1], vec![5, 66]];
    let packed = Case::packed(heads, &lengths, 0, 8);
    let (values, [tokens, columns]) = packed.input(3);
    let together = numbers((packed.run())(&[tensor(
        &(values.clone(), [tokens, columns]),
        DType::F32,
    )]));
    let mut apart = Vec::new();
    let mut first = 0;
    for lengths in lengths {
        let n: usize = lengths.iter().sum();
        let alone = Case::packed(heads, &[lengths], 0, 8);
        let own = values[first * columns..(first + n) * columns].to_vec();
        apart.extend(numbers((alone.run())(&[tensor(
            &(own, [n, columns]),
            DType::F32,
        )])));
        first += n;
    }
    assert_eq!(together, apart);
}

#[test]
fn a_view_is_read_where_it_lies_and_left_as_it_was() {
    let whole = tensor(&noise(1, [12, 9], 1.0), DType::F32);
    let before = numbers(whole.clone());
    let view = || whole.clone().narrow(0, 2, 8).narrow(1, 1, 6);
    let copy = tensor(&(numbers(view()), [8, 6]), DType::F32);
    let weight = tensor(&noise(2, [6, 6], 1.0), DType::F32);
    let run = |x: Tensor<2>| {
        let out = ops::linear(x.clone(), weight.clone(), None);
        let normed = ops::rms_norm(x.clone(), row(&weight).narrow(0, 3, 6), 1e-5);
        [numbers(out), numbers(normed), numbers(ops::swiglu(x))]
    };
    assert_eq!(run(view()), run(copy));
    assert_eq!(numbers(whole), before);
}

#[test]
fn what_is_not_a_number_stays_so() {
    for at in [0, 7, 19] {
        let mut x = noise(1, [1, 20], 1.0);
        x.0[at] = f64::NAN;
        let x = tensor(&x, DType::F32);
        let ones = Tensor::<1>::ones([20], &Device::default());
        assert!(
            numbers(ops::rms_norm(x.clone(), ones, 1e-5))
                .iter()
                .all(|x| x.is_nan())
        );
        assert!(numbers(ops::swiglu(x.clone()))[at % 10].is_nan());
        let weight = tensor(&noise(2, [20, 5], 1.0), DType::F32);
        let target = Tensor::from_ints([3], &Device::default());
        let out = ops::head_logps(&x, &weight, false, &target).unwrap();
        assert!(numbers(out.logps)[0].is_nan());
    }
    // Far outside of what f32's exponentials hold, on both sides.
    let out = ops::swiglu(tensor(&(vec![-1e4, 1.0], [1, 2]), DType::F32));
    assert!(numbers(out)[0].abs() < 1e-30);
    let out = ops::swiglu(tensor(&(vec![1e4, 1.0], [1, 2]), DType::F32));
    assert!((numbers(out)[0] - 1e4).abs() < 1e-2);
}
