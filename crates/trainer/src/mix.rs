//! A model between two of one shape.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use lm::Transformer;

/// `(1 − alpha) model + alpha other`, parameter by parameter.
///
/// Both are on plain devices and of one shape. TR-DPO, equation 7 of arXiv 2404.09656.
pub(crate) fn mixed(model: Transformer, other: &Transformer, alpha: f64) -> Transformer {
    let mut collector = Collector::default();
    other.visit(&mut collector);
    model.map(&mut Mixer {
        path: Vec::new(),
        other: collector.tensors,
        alpha,
    })
}

#[derive(Default)]
struct Collector {
    path: Vec<String>,
    tensors: BTreeMap<String, Tensor<1>>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let count = tensor.shape().num_elements();
        self.tensors
            .insert(self.path.join("."), tensor.reshape([count]));
    }
}

struct Mixer {
    path: Vec<String>,
    other: BTreeMap<String, Tensor<1>>,
    alpha: f64,
}

impl ModuleMapper for Mixer {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(other) = self.other.remove(&self.path.join(".")) else {
            return param;
        };
        let alpha = self.alpha;
        param.map(|tensor| {
            let other = other.reshape(tensor.dims());
            tensor.mul_scalar(1.0 - alpha) + other.mul_scalar(alpha)
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use lm::{LlamaShape, ModelConfig};

    use super::*;

    #[test]
    fn every_parameter_lies_between_the_two() {
        let config = ModelConfig::llama(&LlamaShape {
            vocab_size: 16,
            hidden_size: 8,
            intermediate_size: 8,
            n_layers: 2,
            n_heads: 2,
            n_kv_heads: 2,
            max_positions: 16,
            tied: false,
            eos_id: 1,
            pad_id: 0,
        })
        .unwrap();
        let model = |seed| Transformer::init(config.clone(), seed, &Device::default()).unwrap();
        let (a, b) = (model(1).to_host(), model(2).to_host());
        let mixed = mixed(model(1), &model(2), 0.25).to_host();
        assert_eq!(mixed.len(), a.len());
        for (name, tensor) in mixed {
            for (i, got) in tensor.values.iter().enumerate() {
                let expected = 0.75 * a[&name].values[i] + 0.25 * b[&name].values[i];
                assert!((got - expected).abs() < 1e-6, "{name}");
            }
        }
    }
}
