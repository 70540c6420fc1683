//! AdamW with decoupled decay by group, global-norm clipping, and state named by parameter.
//!
//! Burn's own clipping is per tensor and its decay knows no groups; both would change the numbers
//! that a user knows from other trainers.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use lm::Transformer;
use lm::weights::HostTensor;
use ops::AdamWStep;

use crate::recipe::OptimizerRecipe;

/// Gradients of a model's parameters, flattened, by path.
#[derive(Clone, Debug, Default)]
pub struct FlatGradients {
    by_path: BTreeMap<String, Tensor<1>>,
}

impl FlatGradients {
    /// Takes the gradients of `model` out of a backward pass; parameters without one are left out.
    pub fn take(mut gradients: Gradients, model: &Transformer) -> Self {
        let mut visitor = Taker {
            path: Vec::new(),
            gradients: &mut gradients,
            taken: Self::default(),
        };
        model.visit(&mut visitor);
        visitor.taken
    }

    /// Adds other gradients.
    pub fn add(&mut self, other: Self) {
        for (path, gradient) in other.by_path {
            let sum = match self.by_path.remove(&path) {
                Some(old) => ops::accumulate(old, gradient),
                None => gradient,
            };
            self.by_path.insert(path, sum);
        }
    }

    /// The same on another device.
    #[must_use]
    pub fn to_device(self, device: &Device) -> Self {
        let moved = self.by_path.into_iter();
        Self {
            by_path: moved
                .map(|(path, gradient)| (path, gradient.to_device(device)))
                .collect(),
        }
    }

    /// The Euclidean norm over all parameters together.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn norm(&self) -> f64 {
        let squares: Vec<Tensor<1>> = self
            .by_path
            .values()
            .map(|gradient| ops::sum_of_squares(gradient.clone()))
            .collect();
        if squares.is_empty() {
            return 0.0;
        }
        let squares: Vec<f32> = Tensor::cat(squares, 0)
            .try_into_vec_as()
            .expect("gradients of a working device can be read");
        squares.iter().map(|&x| f64::from(x)).sum::<f64>().sqrt()
    }
}

struct Taker<'a> {
    path: Vec<String>,
    gradients: &'a mut Gradients,
    taken: FlatGradients,
}

impl ModuleVisitor for Taker<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad_remove(self.gradients) {
            let count = gradient.shape().num_elements();
            let flat = gradient.reshape([count]);
            self.taken.by_path.insert(self.path.join("."), flat);
        }
    }
}

/// AdamW: Loshchilov and Hutter, arXiv 1711.05101, as in PyTorch.
#[derive(Clone, Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    /// Updates so far.
    steps: usize,
    /// Running means of gradients and of their squares, flattened, by path.
    moments: BTreeMap<String, (Tensor<1>, Tensor<1>)>,
}

impl AdamW {
    /// An optimizer that has seen nothing.
    pub fn new(recipe: &OptimizerRecipe) -> Self {
        Self {
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            epsilon: recipe.epsilon,
            weight_decay: recipe.weight_decay,
            max_grad_norm: recipe.max_grad_norm,
            steps: 0,
            moments: BTreeMap::new(),
        }
    }

    /// Updates the model by `share` of the gradients, whose global norm `norm` is clipped first.
    ///
    /// A mean of gradients is a share of their sum, and so costs no pass of its own.
    pub fn step(
        &mut self,
        model: Transformer,
        gradients: FlatGradients,
        share: f64,
        norm: f64,
        learning_rate: f64,
    ) -> Transformer {
        self.steps += 1;
        // Added to the norm as in PyTorch, so that a zero gradient divides by no zero.
        const CLIP_EPSILON: f64 = 1e-6;
        let mut grad_scale = share;
        if self.max_grad_norm > 0.0 {
            grad_scale *= (self.max_grad_norm / (norm + CLIP_EPSILON)).min(1.0);
        }
        let mut mapper = Update {
            path: Vec::new(),
            optimizer: self,
            gradients,
            grad_scale,
            learning_rate,
        };
        model.map(&mut mapper)
    }

    /// Updates so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The state on the host, for a checkpoint.
    ///
    /// # Panics
    ///
    /// If the device fails.
    pub fn to_host(&self) -> BTreeMap<String, HostTensor> {
        let host = |tensor: &Tensor<1>| HostTensor {
            shape: tensor.dims().to_vec(),
            values: tensor
                .clone()
                .try_into_vec_as()
                .expect("moments of a working device can be read"),
        };
        self.moments
            .iter()
            .flat_map(|(path, (first, second))| {
                [
                    (format!("first.{path}"), host(first)),
                    (format!("second.{path}"), host(second)),
                ]
            })
            .collect()
    }

    /// Takes the state of a checkpoint back.
    pub fn restore(
        &mut self,
        steps: usize,
        mut tensors: BTreeMap<String, HostTensor>,
        device: &Device,
    ) {
        self.steps = steps;
        self.moments.clear();
        let upload = |host: HostTensor| {
            Tensor::<1>::from_data(TensorData::new(host.values, host.shape), device)
        };
        let firsts: Vec<String> = tensors
            .keys()
            .filter_map(|name| name.strip_prefix("first.").map(str::to_string))
            .collect();
        for path in firsts {
            let first = tensors.remove(&format!("first.{path}"));
            let second = tensors.remove(&format!("second.{path}"));
            if let (Some(first), Some(second)) = (first, second) {
                self.moments.insert(path, (upload(first), upload(second)));
            }
        }
    }
}

struct Update<'a> {
    path: Vec<String>,
    optimizer: &'a mut AdamW,
    gradients: FlatGradients,
    grad_scale: f64,
    learning_rate: f64,
}

impl ModuleMapper for Update<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let Some(gradient) = self.gradients.by_path.remove(&path) else {
            return param;
        };
        let adam = &mut *self.optimizer;
        let moments = adam.moments.remove(&path).unwrap_or_else(|| {
            let zeros = gradient.zeros_like();
            (zeros.clone(), zeros)
        });
        let steps = i32::try_from(adam.steps).unwrap_or(i32::MAX);
        let step = AdamWStep {
            grad_scale: self.grad_scale,
            beta1: adam.beta1,
            beta2: adam.beta2,
            rate: self.learning_rate / (1.0 - adam.beta1.powi(steps)),
            root_bias2: (1.0 - adam.beta2.powi(steps)).sqrt(),
            epsilon: adam.epsilon,
            // Biases and norms have one dimension; they are never decayed.
            keep: if D == 2 {
                1.0 - self.learning_rate * adam.weight_decay
            } else {
                1.0
            },
        };
        param.map(|value| {
            let shape = value.shape();
            let value = value.inner().reshape(gradient.shape());
            let (value, [first, second]) =
                ops::adamw(value, gradient, [moments.0, moments.1], step);
            adam.moments.insert(path, (first, second));
            Tensor::from_inner(value.reshape(shape)).require_grad()
        })
    }
}
