//! The operations of `crates/ops`: values, and the gradients of every input.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use ops::{AdamWStep, Family, Heads, Spans, Turns};

use super::{OP_TOLERANCE, assert_close, noise, numbers, on_both};

/// Inputs of an operation on one device.
struct Inputs {
    flat: Vec<Tensor<1>>,
    shapes: Vec<Vec<usize>>,
    device: Device,
}

impl Inputs {
    /// An input in its shape.
    fn get<const D: usize>(&self, index: usize) -> Tensor<D> {
        let shape: [usize; D] = self.shapes[index].clone().try_into().unwrap();
        self.flat[index].clone().reshape(shape)
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let n = tensor.shape().num_elements();
    tensor.reshape([n])
}

/// The values of an operation, and the gradients of all its inputs of a weighted sum of them, are
/// the CPU's. Inputs are noise from `-scale` to `scale`.
fn agrees(shapes: &[&[usize]], scale: f32, run: impl Fn(&Inputs) -> Tensor<1>) {
    let found = on_both(|device| {
        let inputs = |tracked: bool| {
            let flat = shapes.iter().enumerate().map(|(seed, shape)| {
                let mut values = noise(seed as u64 + 1, shape.iter().product());
                values.iter_mut().for_each(|value| *value *= scale);
                let tensor = Tensor::<1>::from_floats(&values[..], device);
                if tracked {
                    tensor.autodiff().require_grad()
                } else {
                    tensor
                }
            });
            Inputs {
                flat: flat.collect(),
                shapes: shapes.iter().map(|shape| shape.to_vec()).collect(),
                device: device.clone(),
            }
        };
        let plain = run(&inputs(false));
        let tracked = inputs(true);
        let values = run(&tracked);
        let weights = noise(99, values.shape().num_elements());
        let weights = Tensor::<1>::from_floats(&weights[..], device).autodiff();
        let gradients = (values.clone() * weights).sum().backward();
        let mut all = vec![numbers(plain), numbers(values.inner())];
        for input in &tracked.flat {
            all.push(numbers(input.grad(&gradients).unwrap()));
        }
        all
    });
    let [cpu, device] = found;
    for (at, (cpu, device)) in cpu.iter().zip(&device).enumerate() {
        let what = match at {
            0 => "values without a graph".into(),
            1 => "values".into(),
            input => format!("gradient of input {}", input - 2),
        };
        assert_close(cpu, device, OP_TOLERANCE, &what);
    }
}

/// The future is hidden, some keys are, and from one query all of them.
fn mask(shape: [usize; 4], device: &Device) -> Tensor<4, Bool> {
    let [rows, _, seq, keys] = shape;
    let chance = noise(7, rows * seq * keys);
    let hidden: Vec<bool> = (0..rows * seq * keys)
        .map(|at| {
            let (query, key) = (at / keys % seq, at % keys);
            key + seq > query + keys || chance[at] > 0.6 || at / keys == 1
        })
        .collect();
    Tensor::from_data(TensorData::new(hidden, shape), device)
}

#[test]
fn masked_softmax_agrees() {
    // One mask for all rows or one for each; two query heads for each key head; odd sizes.
    for (scores, hidden) in [
        ([2, 2, 10, 7], [1, 1, 5, 7]),
        ([3, 1, 6, 37], [3, 1, 6, 37]),
    ] {
        agrees(&[&scores], 8.0, |x| {
            flat(ops::masked_softmax(x.get(0), mask(hidden, &x.device)))
        });
    }
}

#[test]
fn linear_layers_agree() {
    agrees(&[&[9, 33], &[33, 5]], 1.0, |x| {
        flat(ops::linear(x.get(0), x.get(1), None))
    });
    agrees(&[&[1, 7], &[7, 12], &[12]], 1.0, |x| {
        flat(ops::linear(x.get(0), x.get(1), Some(x.get(2))))
    });
}

#[test]
fn norms_agree() {
    agrees(&[&[5, 3, 33], &[33]], 2.0, |x| {
        flat(ops::rms_norm::<3>(x.get(0), x.get(1), 1e-5))
    });
}

#[test]
fn swiglu_agrees() {
    agrees(&[&[7, 66]], 20.0, |x| flat(ops::swiglu(x.get(0))));
}

#[test]
fn products_agree() {
    // Few rows, one column, few columns, and more than a kernel's tile of each.
    for [m, k, n] in [[3, 5, 1], [3, 5, 6], [9, 16, 4], [70, 33, 66]] {
        agrees(&[&[2, 3, m, k], &[2, 3, k, n]], 1.0, |x| {
            flat(ops::product(x.get(0), x.get(1)))
        });
        // A factor that stands column by column.
        agrees(&[&[2, 3, m, k], &[2, 3, n, k]], 1.0, |x| {
            flat(ops::product(x.get(0), x.get::<4>(1).swap_dims(2, 3)))
        });
    }
}

#[test]
fn heads_agree() {
    let targets = [0, 10, 3, 3, 7];
    for (tied, weight) in [(false, [8, 11]), (true, [11, 8])] {
        let head = |hidden: Tensor<2>, weight: Tensor<2>, device: &Device| {
            let targets = Tensor::<1, Int>::from_ints(targets, device);
            ops::head_logps(&hidden, &weight, tied, &targets).unwrap()
        };
        agrees(&[&[5, 8], &weight], 2.0, |x| {
            head(x.get(0), x.get(1), &x.device).logps
        });
        let statistics = on_both(|device| {
            let hidden = Tensor::<1>::from_floats(&noise(1, 40)[..], device).reshape([5, 8]);
            let weight = Tensor::<1>::from_floats(&noise(2, 88)[..], device).reshape(weight);
            let head = head(hidden, weight, device);
            [head.entropy, head.mean_logit, head.top1].map(numbers)
        });
        let [cpu, device] = statistics;
        for (what, (cpu, device)) in ["entropy", "mean logit", "top-1"]
            .into_iter()
            .zip(cpu.iter().zip(&device))
        {
            assert_close(cpu, device, OP_TOLERANCE, what);
        }
    }
}

#[test]
fn attention_agrees() {
    let heads = Heads {
        queries: 4,
        keys: 2,
        width: 6,
    };
    // Two rows of which one is padded: a prompt with two completions, and a text of its own.
    let families = vec![
        Family {
            prompt: 0..3,
            completions: vec![3..5, 5..9],
        },
        Family {
            prompt: 9..16,
            completions: Vec::new(),
        },
    ];
    let positions = [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 0];
    agrees(&[&[18, heads.joined()]], 1.5, |x| {
        // Tables live where they are first used.
        let spans = Spans::new(2, 9, families.clone());
        let turns = Turns::new(4, 100.0, &positions, 9);
        let turned = ops::attention(x.get(0), heads, &spans, Some(&turns));
        turned
            .add(ops::attention(x.get(0), heads, &spans, None))
            .reshape([-1])
    });
}

#[test]
fn a_step_of_adamw_agrees() {
    let step = AdamWStep {
        grad_scale: 0.3,
        beta1: 0.9,
        beta2: 0.99,
        rate: 0.02,
        root_bias2: 0.4,
        epsilon: 1e-6,
        keep: 0.999,
    };
    let [cpu, device] = on_both(|device| {
        let [value, grad, first, second] =
            [1, 2, 3, 4].map(|seed| Tensor::<1>::from_floats(&noise(seed, 77)[..], device));
        // Rows that CUDA would leave gaps between, and that are not to be updated where they stand.
        let [value, grad, first, second] =
            [value, grad, first, second.abs()].map(|x| x.reshape([11, 7]));
        let kept = [value.clone(), first.clone(), second.clone()];
        let squares = ops::sum_of_squares(grad.clone());
        let (value, [first, second]) = ops::adamw(value, grad, [first, second], step);
        let [kept_value, kept_first, kept_second] = kept;
        let all = [value, first, second, kept_value, kept_first, kept_second];
        let all = all.into_iter().map(numbers);
        all.chain([numbers(squares)]).collect::<Vec<_>>()
    });
    for (cpu, device) in cpu.iter().zip(&device) {
        assert_close(cpu, device, OP_TOLERANCE, "a step of AdamW");
    }
}
