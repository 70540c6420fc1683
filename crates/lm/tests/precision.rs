//! Computing in bf16: close to f32, exact where it must be, and the same however weights are kept.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients, Tensor};
use lm::{CompletionBatch, Decoder, LlamaShape, ModelConfig, Precision, Transformer};

/// What logps of a few nats may be off by: eight bits are right to 1/256, and logits of a few nats are
/// sums of such products.
const LOGP_TOLERANCE: f32 = 0.1;
/// The least cosine between gradients of a parameter.
const COSINE: f64 = 0.99;

fn model(tied: bool) -> Transformer {
    let mut config = ModelConfig::llama(&LlamaShape {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 48,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        max_positions: 64,
        tied,
        eos_id: 1,
        pad_id: 0,
    })
    .unwrap();
    // Wide enough that tokens differ by nats.
    config.initializer_range = 0.2;
    Transformer::init(config, 5, &Device::default()).unwrap()
}

const PAIRS: [(&[u32], &[u32], &[u32]); 2] = [
    (&[3, 4, 9, 8], &[5, 6, 1], &[7, 1]),
    (&[7, 8], &[12, 1], &[20, 21, 22, 23, 1]),
];

fn logps(model: &Transformer) -> Vec<f32> {
    let batch = CompletionBatch::for_pairs(&PAIRS, 32, &model.device());
    model.score(&batch, false).flat.try_into_vec_as().unwrap()
}

#[test]
fn logps_in_bf16_are_near_those_in_f32_and_not_them() {
    for tied in [false, true] {
        let exact = logps(&model(tied));
        let rounded = logps(&model(tied).with_precision(Precision::Bf16));
        let gaps = exact.iter().zip(&rounded).map(|(a, b)| (a - b).abs());
        let largest = gaps.fold(0.0, f32::max);
        assert!(largest < LOGP_TOLERANCE, "{largest}");
        // Something was rounded indeed.
        assert!(largest > 1e-4, "{largest}");
        let again = logps(
            &model(tied)
                .with_precision(Precision::Bf16)
                .with_precision(Precision::F32),
        );
        assert_eq!(again, exact);
    }
}

/// Each parameter's gradient.
struct Collect<'a>(&'a Gradients, Vec<Vec<f32>>);

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad(self.0).unwrap();
        // As exact as the weights that it moves.
        assert_eq!(
            (gradient.dtype(), param.val().dtype()),
            (DType::F32, DType::F32)
        );
        self.1.push(gradient.try_into_vec_as().unwrap());
    }
}

fn gradients(model: Transformer) -> Vec<Vec<f32>> {
    let model = model.train();
    let batch = CompletionBatch::for_pairs(&PAIRS, 32, &model.device());
    let gradients = model.score(&batch, false).flat.mean().backward();
    let mut collect = Collect(&gradients, Vec::new());
    model.visit(&mut collect);
    collect.1
}

#[test]
fn gradients_through_bf16_are_in_f32_and_point_the_same_way() {
    let exact = gradients(model(false));
    let rounded = gradients(model(false).with_precision(Precision::Bf16));
    assert_eq!(exact.len(), rounded.len());
    for (exact, rounded) in exact.iter().zip(&rounded) {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum()
        };
        let cosine = dot(exact, rounded) / (dot(exact, exact) * dot(rounded, rounded)).sqrt();
        assert!(cosine > COSINE, "{cosine}");
    }
}

#[test]
fn matrices_kept_in_bf16_decode_to_the_same_logits() {
    for tied in [false, true] {
        let model = model(tied).with_precision(Precision::Bf16);
        let kept = model.clone().with_matrices_rounded();
        let decode = |model: &Transformer| -> Vec<Vec<f32>> {
            let decoder = Decoder::of_tensors(model);
            let (mut cache, first) = decoder.prefill(&[&[3, 4, 9][..], &[7]], 2).unwrap();
            let mut read = vec![first];
            for tokens in [[5, 6], [20, 1]] {
                read.push(decoder.step(&tokens, &mut cache));
            }
            let read = read.into_iter();
            read.map(|logits| logits.try_into_vec_as().unwrap())
                .collect()
        };
        assert_eq!(decode(&model), decode(&kept));
    }
}
