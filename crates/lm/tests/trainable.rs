//! What is frozen has no gradient, and recomputed blocks give the same ones.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use lm::{CompletionBatch, FreezeSpec, LoraConfig, Transformer};

const FAMILIES: [&str; 6] = [
    "llama_tied",
    "llama_untied",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt2",
];

fn base(name: &str) -> Transformer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/lm");
    Transformer::read(&folder.join(name), &Device::default()).unwrap()
}

fn all_linear() -> LoraConfig {
    LoraConfig {
        rank: 2,
        alpha: 4.0,
        rank_stabilized: false,
        targets: vec!["all-linear".into()],
    }
}

fn freeze(first_blocks: usize, names: &[&str]) -> FreezeSpec {
    FreezeSpec {
        first_blocks,
        names: names.iter().map(|name| name.to_string()).collect(),
    }
}

/// Sums of gradients by path.
#[derive(Default)]
struct Sums {
    path: Vec<String>,
    now: Option<Gradients>,
    by_path: BTreeMap<String, Tensor<1>>,
}

impl Sums {
    fn add(&mut self, model: &Transformer, gradients: Gradients) {
        self.now = Some(gradients);
        model.visit(self);
    }

    fn values(self) -> BTreeMap<String, Vec<f32>> {
        let values = |tensor: Tensor<1>| tensor.try_into_vec_as().unwrap();
        let by_path = self.by_path.into_iter();
        by_path.map(|(path, sum)| (path, values(sum))).collect()
    }
}

impl ModuleVisitor for Sums {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = param.val().grad(self.now.as_ref().unwrap()) else {
            return;
        };
        let count = gradient.shape().num_elements();
        let flat = gradient.reshape([count]);
        let path = self.path.join(".");
        let sum = match self.by_path.remove(&path) {
            Some(old) => old + flat,
            None => flat,
        };
        self.by_path.insert(path, sum);
    }
}

/// Pairs of which one shares its prompt's row, on a model said to be wide, and one cannot.
fn batch(device: &Device) -> CompletionBatch {
    let pairs: [(&[u32], &[u32], &[u32]); 2] = [
        (&[3, 4, 9, 9, 9, 9], &[5, 6, 1], &[7, 1]),
        (&[7, 8], &[12, 1], &[20, 21, 22, 23, 1]),
    ];
    CompletionBatch::for_pairs(&pairs, 1 << 20, device)
}

/// The loss, and the gradients that the graph of the whole model gives.
fn whole(model: &Transformer) -> (f32, BTreeMap<String, Vec<f32>>) {
    let scored = model.score(&batch(&model.device()), false);
    let loss = -scored.flat.mean();
    let mut sums = Sums::default();
    sums.add(model, loss.backward());
    (loss.inner().into_scalar(), sums.values())
}

/// The same block by block.
fn recomputed(model: &Transformer) -> (f32, BTreeMap<String, Vec<f32>>) {
    let batch = batch(&model.device());
    let checkpointed = model.checkpointed(&batch);
    let scored = model.score_hidden(&batch, checkpointed.hidden(), false);
    let loss = -scored.flat.mean();
    let mut sums = Sums::default();
    checkpointed.backward(model, &loss, |gradients| sums.add(model, gradients));
    (loss.inner().into_scalar(), sums.values())
}

#[test]
fn recomputed_blocks_give_the_same_bits() {
    for name in FAMILIES {
        let model = base(name);
        let adapted = model.clone().with_lora(&all_linear(), 3).unwrap();
        let embedding: &[&str] = match name {
            "gpt2" => &["*wte*", "*wpe*"],
            _ => &["*embed_*n*"],
        };
        let upper = model.clone().with_frozen(&freeze(1, embedding)).unwrap();
        let kinds = [("whole", model), ("adapted", adapted), ("upper", upper)];
        for (kind, model) in kinds {
            let model = model.train();
            let (loss, expected) = whole(&model);
            let (again, got) = recomputed(&model);
            assert_eq!(loss.to_bits(), again.to_bits(), "{name}, {kind}");
            let paths = |all: &BTreeMap<String, Vec<f32>>| all.keys().cloned().collect::<Vec<_>>();
            assert_eq!(paths(&expected), paths(&got), "{name}, {kind}");
            let trainable: Vec<String> = {
                let list = model.parameter_list().into_iter();
                let mut paths: Vec<String> = list.filter(|p| p.trainable).map(|p| p.path).collect();
                paths.sort();
                paths
            };
            assert_eq!(paths(&got), trainable, "{name}, {kind}");
            for (path, expected) in &expected {
                assert_eq!(expected, &got[path], "{name}, {kind}: {path}");
                let moves = expected.iter().any(|&x| x.abs() > 1e-5);
                // Nothing reaches `A` while `B` is zero; one bias for all keys moves no softmax.
                let still = path.ends_with(".a") || path.ends_with(".key.bias");
                assert!(moves || still, "{name}, {kind}: {path}");
            }
        }
    }
}

#[test]
fn frozen_parameters_are_those_that_were_named_and_stay_so_in_training() {
    let spec = freeze(
        1,
        &["model.embed_tokens.*", "*norm.weight", "lm_head.weight"],
    );
    let model = base("llama_untied").with_frozen(&spec).unwrap();
    let expected: Vec<String> = ["q", "k", "v", "o"]
        .iter()
        .map(|leaf| format!("model.layers.1.self_attn.{leaf}_proj.weight"))
        .chain(["gate", "up", "down"].map(|leaf| format!("model.layers.1.mlp.{leaf}_proj.weight")))
        .chain(["input", "post_attention"].map(|n| format!("model.layers.1.{n}_layernorm.weight")))
        .collect();
    for model in [model.clone(), model.train().valid().train()] {
        let list = model.parameter_list();
        let trained = list.iter().filter(|p| p.trainable);
        let mut names: Vec<&str> = trained.map(|p| &p.name[..]).collect();
        names.sort_unstable();
        let mut expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        expected.sort_unstable();
        // `*norm.weight` ends with the blocks' norms too.
        expected.retain(|name| !name.ends_with("norm.weight"));
        assert_eq!(names, expected);
    }
}

#[test]
fn parameters_are_counted_with_their_names_in_transformers_and_peft() {
    for name in FAMILIES {
        let model = base(name);
        let n = model.config().n_parameters();
        assert_eq!(model.n_trainable_parameters(), n, "{name}");
        assert!(model.parameter_list().iter().all(|p| !p.name.is_empty()));
        let lora = all_linear();
        let adapters = lora.n_parameters(model.config()).unwrap();
        let adapted = model.with_lora(&lora, 0).unwrap();
        assert_eq!(adapted.n_trainable_parameters(), adapters, "{name}");
        let list = adapted.parameter_list();
        let count: usize = list.iter().map(|p| p.count()).sum();
        assert_eq!(count, n + adapters);
        for parameter in list {
            let lora = parameter.name.contains(".lora_A.") || parameter.name.contains(".lora_B.");
            assert_eq!(parameter.trainable, lora, "{parameter:?}");
            assert!(!parameter.name.is_empty(), "{parameter:?}");
        }
        assert_eq!(adapted.merge().n_trainable_parameters(), n);
    }
}

#[test]
fn what_cannot_be_frozen_is_refused_by_name() {
    for (name, spec, expected) in [
        (
            "llama_tied",
            freeze(3, &[]),
            "3 blocks of a model that has 2",
        ),
        (
            "llama_tied",
            freeze(0, &["wte*"]),
            "`wte*` names no parameter",
        ),
        (
            "llama_tied",
            freeze(0, &["lm_head.*"]),
            "is its table `model.embed_tokens.weight`",
        ),
        ("gpt2", freeze(0, &["*"]), "nothing is left"),
    ] {
        let error = base(name).with_frozen(&spec).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let adapted = base("gpt2").with_lora(&all_linear(), 0).unwrap();
    let error = adapted.with_frozen(&freeze(1, &[])).unwrap_err();
    assert!(error.to_string().contains("LoRA"));
}

#[test]
fn the_memory_of_training_shrinks_with_what_is_trained() {
    let model = base("llama_untied");
    let n = model.config().n_parameters() as u64;
    let whole = model.training_memory(64);
    assert_eq!(
        (whole.weights, whole.gradients, whole.optimizer),
        (4 * n, 4 * n, 8 * n)
    );
    assert_eq!(whole.activations_per_token, 2 * whole.block_per_token);
    assert_eq!(whole.checkpoints_per_token, 4 * 2 * 32);
    assert!(model.training_memory(128).block_per_token > whole.block_per_token);
    assert!(whole.total(1000, 100, true) < whole.total(1000, 100, false));
    let upper = model
        .clone()
        .with_frozen(&freeze(1, &["model.embed_tokens.*"]))
        .unwrap();
    assert_eq!(
        upper.training_memory(64).activations_per_token,
        whole.block_per_token
    );
    let adapted = model
        .with_lora(&all_linear(), 0)
        .unwrap()
        .training_memory(64);
    assert!(adapted.optimizer * 5 < whole.optimizer && adapted.weights > whole.weights);
}
