//! Adapters agree with PEFT, train alone, and merge into what they were.
//!
//! Each folder of `testdata/lora` was made by `testdata/scripts/make_lora_fixture.py`. The variable
//! `R2Q_LORA_OUT` may name a directory into which adapters are written for PEFT to read, each with
//! our logits in `ours.json` (`testdata/README.md`).

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use lm::{AdapterFolder, CompletionBatch, Decoder, Decoding, Generate, LoraConfig, Transformer};
use serde_json::{Map, Value, json};

/// Logits are of order 1 to 10 and both sides compute in f32.
const PEFT_TOLERANCE: f64 = 1e-4;
/// The same product in another order, in f32.
const MERGE_TOLERANCE: f32 = 1e-5;

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata")
}

const ADAPTERS: [&str; 4] = ["gpt2", "gpt_neox", "llama", "llama_rslora"];

fn adapter(name: &str) -> PathBuf {
    testdata().join("lora").join(name)
}

fn base(name: &str) -> Transformer {
    Transformer::read(&testdata().join("lm").join(name), &Device::default()).unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The base model and the settings of a fixture.
fn fixture(name: &str) -> (Transformer, Value) {
    let golden = read_json(&adapter(name).join("golden.json"));
    (base(golden["base"].as_str().unwrap()), golden)
}

fn all_linear(rank: usize, alpha: f64) -> LoraConfig {
    LoraConfig {
        rank,
        alpha,
        rank_stabilized: false,
        targets: vec!["all-linear".into()],
    }
}

fn input(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
    let flat: Vec<i64> = rows.concat().into_iter().map(i64::from).collect();
    Tensor::from_data(TensorData::new(flat, [rows.len(), rows[0].len()]), device)
}

fn logits(model: &Transformer, rows: &[&[u32]]) -> Vec<f32> {
    let logits = model.logits(input(rows, &model.device()));
    logits.try_into_vec_as().unwrap()
}

const ROWS: [&[u32]; 2] = [&[5, 9, 11, 40, 7, 3, 99], &[60, 61, 62, 63, 64, 65, 4]];

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Moves every `B` off its zero.
struct Stir;

impl ModuleMapper for Stir {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        param.map(|value| {
            let shape = value.shape();
            let count = shape.num_elements();
            let moves: Vec<f32> = (0..count)
                .map(|i| 0.2 * ((i * 7919 + 13) % 101) as f32 / 101.0 - 0.1)
                .collect();
            let device = value.device();
            let moves = Tensor::<1>::from_data(TensorData::new(moves, [count]), &device);
            (value + moves.reshape(shape)).detach().require_grad()
        })
    }
}

/// A model with fresh adapters that change something.
fn stirred(model: Transformer, lora: &LoraConfig) -> Transformer {
    let model = model.with_lora(lora, 5).unwrap().train();
    model.map(&mut Stir).valid()
}

#[test]
fn logits_equal_pefts_for_separate_and_fused_layers() {
    for name in ADAPTERS {
        let (model, golden) = fixture(name);
        let vocab = model.config().vocab_size;
        let model = model.read_adapter(&adapter(name)).unwrap();
        let rows: Vec<Vec<u32>> = serde_json::from_value(golden["input_ids"].clone()).unwrap();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        for (kind, model) in [("adapted", model.clone()), ("merged", model.merge())] {
            let got = logits(&model, &rows);
            let entries = golden["logits_positions"]["entries"].as_array().unwrap();
            assert!(!entries.is_empty());
            for entry in entries {
                let row = entry["row"].as_u64().unwrap() as usize;
                let position = entry["position"].as_u64().unwrap() as usize;
                let expected: Vec<f64> =
                    serde_json::from_value(entry["logits_float32"].clone()).unwrap();
                let at = &got[(row * rows[0].len() + position) * vocab..][..vocab];
                for (got, expected) in at.iter().zip(expected) {
                    assert!(
                        (f64::from(*got) - expected).abs() < PEFT_TOLERANCE,
                        "{name}, {kind}: row {row} position {position}: {got} for {expected}"
                    );
                }
            }
        }
        let trainable = golden["n_trainable"].as_u64().unwrap() as usize;
        let lora = model.lora_config().unwrap();
        assert_eq!(lora.n_parameters(model.config()).unwrap(), trainable);
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_switched_off_one_leaves_the_base() {
    for name in ["llama_tied", "qwen2", "gpt_neox", "gpt2"] {
        let model = base(name);
        let before = logits(&model, &ROWS);
        let fresh = model.clone().with_lora(&all_linear(4, 8.0), 1).unwrap();
        assert_eq!(logits(&fresh, &ROWS), before, "{name}");
        let adapted = stirred(model, &all_linear(4, 8.0));
        assert!(largest_difference(&logits(&adapted, &ROWS), &before) > 0.1);
        let off = adapted.without_adapter();
        assert!(off.lora_config().is_none());
        assert_eq!(logits(&off, &ROWS), before, "{name}");
        // The original still has its adapters.
        assert!(adapted.lora_config().is_some());
    }
}

#[test]
fn merged_and_unmerged_agree_and_so_does_cached_decoding() {
    for name in [
        "llama_tied",
        "qwen2",
        "qwen3",
        "mistral",
        "gpt_neox",
        "gpt2",
    ] {
        let adapted = stirred(base(name), &all_linear(4, 8.0));
        let merged = adapted.merge();
        assert!(merged.lora_config().is_none());
        let expected = logits(&adapted, &ROWS);
        let difference = largest_difference(&logits(&merged, &ROWS), &expected);
        assert!(difference < MERGE_TOLERANCE, "{name}: {difference:e}");
        let options = Generate {
            max_new_tokens: 12,
            eos_ids: vec![],
            decoding: Decoding::Greedy,
            seed: 0,
        };
        let own = adapted.generate(&ROWS, &options).unwrap();
        assert_eq!(own, merged.generate(&ROWS, &options).unwrap(), "{name}");
        // Behind the cache as without it.
        let vocab = merged.config().vocab_size;
        let (_, cached) = Decoder::new(&adapted).prefill(&ROWS, 1).unwrap();
        let cached: Vec<f32> = cached.try_into_vec_as().unwrap();
        let last: Vec<f32> = expected
            .chunks(vocab)
            .skip(ROWS[0].len() - 1)
            .step_by(ROWS[0].len())
            .flatten()
            .copied()
            .collect();
        assert!(largest_difference(&cached, &last) < MERGE_TOLERANCE);
    }
}

#[test]
fn a_plain_folder_takes_the_merged_model_and_refuses_the_adapted_one() {
    let adapted = stirred(base("llama_untied"), &all_linear(2, 4.0));
    let folder = tempfile::tempdir().unwrap();
    let error = adapted.write(folder.path()).unwrap_err().to_string();
    assert!(error.contains("merge"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let merged = adapted.merge();
    merged.write(folder.path()).unwrap();
    let again = Transformer::read(folder.path(), &Device::default()).unwrap();
    assert_eq!(logits(&again, &ROWS), logits(&merged, &ROWS));
}

/// Names and gradients of the parameters that have one.
struct Taken<'a> {
    gradients: &'a Gradients,
    path: Vec<String>,
    taken: Vec<(String, Vec<f32>)>,
}

impl ModuleVisitor for Taken<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            let values = gradient.try_into_vec_as().unwrap();
            self.taken.push((self.path.join("."), values));
        }
    }
}

fn gradients(model: &Transformer, gradients: &Gradients) -> Vec<(String, Vec<f32>)> {
    let mut visitor = Taken {
        gradients,
        path: Vec::new(),
        taken: Vec::new(),
    };
    model.visit(&mut visitor);
    visitor.taken
}

/// A scalar of the model that every parameter moves.
fn loss(model: &Transformer) -> Tensor<1> {
    let rows: [(&[u32], &[u32]); 2] = [(&[5, 9, 11], &[40, 7, 3]), (&[60, 61], &[62, 63, 64])];
    let batch = CompletionBatch::new(&rows, &model.device());
    -model.score(&batch, false).flat.mean()
}

/// Adds to one number of the parameter at a path.
struct Nudge<'a> {
    at: &'a str,
    index: usize,
    by: f32,
    path: Vec<String>,
}

impl ModuleMapper for Nudge<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.path.join(".") != self.at {
            return param;
        }
        param.map(|value| {
            let (shape, device) = (value.shape(), value.device());
            let mut values: Vec<f32> = value.try_into_vec_as().unwrap();
            values[self.index] += self.by;
            let count = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [count]), &device).reshape(shape)
        })
    }
}

#[test]
fn gradients_reach_the_adapters_alone_and_are_finite_differences() {
    // Central differences of a loss near 5 in f32: rounding gives 1e-6 / 2e-2, curvature 1e-4.
    const STEP: f32 = 1e-2;
    const DIFFERENCE_TOLERANCE: f32 = 5e-4;
    for name in ["llama_tied", "gpt_neox", "gpt2"] {
        let lora = all_linear(3, 6.0);
        let model = stirred(base(name), &lora);
        let training = model.clone().train();
        let taken = gradients(&training, &loss(&training).backward());
        let n_trained: usize = taken.iter().map(|(_, values)| values.len()).sum();
        assert_eq!(n_trained, lora.n_parameters(model.config()).unwrap());
        let mut largest = 0.0_f32;
        for (path, values) in &taken {
            assert!(path.ends_with(".a") || path.ends_with(".b"), "{path}");
            let index = (0..values.len())
                .max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()))
                .unwrap();
            largest = largest.max(values[index].abs());
            let at = |by: f32| -> f32 {
                let mut nudge = Nudge {
                    at: path,
                    index,
                    by,
                    path: Vec::new(),
                };
                loss(&model.clone().map(&mut nudge)).into_scalar()
            };
            let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let error = (difference - values[index]).abs();
            assert!(
                error < DIFFERENCE_TOLERANCE * (1.0 + difference.abs()),
                "{name}: {path}: {} where differences give {difference}",
                values[index]
            );
        }
        assert!(largest > 0.02, "{name}: {largest}");
        // The reference of a model in training has nothing to differentiate.
        assert!(!loss(&training.without_adapter()).is_tracked());
    }
}

#[test]
fn fresh_adapters_are_uniform_within_one_over_the_root_of_their_inputs_from_their_seed() {
    let fresh = |seed| {
        let model = base("llama_tied");
        let model = model.with_lora(&all_linear(8, 8.0), seed).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.write_adapter(folder.path(), None).unwrap();
        let files =
            lm::weights::WeightFiles::open_file(&folder.path().join("adapter_model.safetensors"))
                .unwrap();
        let read = |name: &&str| ((*name).to_string(), files.read_any(name).unwrap());
        files.names().iter().map(read).collect::<Vec<_>>()
    };
    let first = fresh(1);
    assert_eq!(first, fresh(1));
    assert_ne!(first, fresh(2));
    for (name, tensor) in first {
        if name.contains(".lora_B.") {
            assert!(tensor.values.iter().all(|&x| x == 0.0), "{name}");
            continue;
        }
        let bound = 1.0 / (tensor.shape[1] as f32).sqrt();
        let largest = tensor.values.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        // 256 draws and more: the largest is within a twentieth of the bound but for one in 1e5.
        assert!(
            largest <= bound && largest > 0.95 * bound,
            "{name}: {largest}"
        );
    }
}

#[test]
fn a_written_adapter_reads_back_bit_by_bit() {
    let further = std::env::var_os("R2Q_LORA_OUT").map(PathBuf::from);
    for (name, targets, rank_stabilized, alpha) in [
        ("llama_tied", vec!["all-linear"], false, 8.0),
        ("qwen2", vec!["q_proj", "layers.0.mlp.gate_proj"], true, 2.5),
        ("gpt_neox", vec!["query_key_value", "dense"], false, 3.0),
        ("gpt2", vec!["c_attn", "mlp.c_proj"], false, 4.0),
    ] {
        let lora = LoraConfig {
            rank: 3,
            alpha,
            rank_stabilized,
            targets: targets.into_iter().map(str::to_string).collect(),
        };
        let model = stirred(base(name), &lora);
        let kept = tempfile::tempdir().unwrap();
        let folder = match &further {
            Some(further) => further.join(name),
            None => kept.path().to_path_buf(),
        };
        std::fs::create_dir_all(&folder).unwrap();
        let base_model = format!("testdata/lm/{name}");
        model.write_adapter(&folder, Some(&base_model)).unwrap();
        assert!(AdapterFolder::is_one(&folder));
        let settings = AdapterFolder::read(&folder).unwrap();
        assert_eq!(settings.base_model, Some(base_model));
        let again = base(name).read_adapter(&folder).unwrap();
        let expected = logits(&model, &ROWS);
        assert_eq!(logits(&again, &ROWS), expected, "{name}");
        let config = again.lora_config().unwrap();
        assert!((config.scale() - lora.scale()).abs() < 1e-12);
        if further.is_some() {
            let count = ROWS[0].len() * model.config().vocab_size;
            let ours = json!({ "ids": ROWS[0], "logits": expected[..count] });
            std::fs::write(folder.join("ours.json"), ours.to_string()).unwrap();
        }
    }
}

#[test]
fn settings_that_a_model_cannot_have_are_refused_with_what_it_has() {
    let lora = |rank, alpha, targets: &[&str]| LoraConfig {
        rank,
        alpha,
        rank_stabilized: false,
        targets: targets.iter().map(|target| target.to_string()).collect(),
    };
    for (name, lora, expected) in [
        ("llama_tied", lora(0, 8.0, &["q_proj"]), "rank"),
        ("llama_tied", lora(usize::MAX, 8.0, &["q_proj"]), "rank"),
        ("llama_tied", lora(4, f64::NAN, &["q_proj"]), "alpha"),
        ("llama_tied", lora(4, 8.0, &[]), "all-linear"),
        (
            "llama_tied",
            lora(4, 8.0, &["q_proj", "c_attn"]),
            "`c_attn`",
        ),
        ("llama_tied", lora(4, 8.0, &["proj"]), "q_proj, k_proj"),
        ("llama_tied", lora(4, 8.0, &["lm_head"]), "`lm_head`"),
        ("gpt2", lora(4, 8.0, &["q_proj"]), "c_attn, c_proj, c_fc"),
        (
            "gpt_neox",
            lora(4, 8.0, &["q_proj"]),
            "query_key_value, dense",
        ),
    ] {
        let error = base(name).with_lora(&lora, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let twice = base("gpt2").with_lora(&all_linear(2, 2.0), 0).unwrap();
    assert!(twice.with_lora(&all_linear(2, 2.0), 0).is_err());
}

/// The error of reading a copy of the `llama` fixture, changed.
fn refusal(change: impl Fn(&mut Map<String, Value>, &Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(adapter("llama").join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("adapter_config.json");
    let Value::Object(mut fields) = read_json(&path) else {
        panic!("settings are an object")
    };
    change(&mut fields, folder.path());
    std::fs::write(&path, Value::Object(fields).to_string()).unwrap();
    let read = base("llama_tied").read_adapter(folder.path());
    read.err().map_or(String::new(), |error| error.to_string())
}

#[test]
fn settings_that_would_change_the_numbers_are_refused_by_name() {
    assert_eq!(refusal(|_, _| {}), "");
    for (field, value) in [
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("lora_bias", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({"q_proj": 8})),
        ("alpha_pattern", json!({"q_proj": 16})),
        ("fan_in_fan_out", json!(true)),
        ("layers_to_transform", json!([0])),
        ("layers_pattern", json!("layers")),
        ("exclude_modules", json!(["o_proj"])),
        ("layer_replication", json!([[0, 2]])),
        ("trainable_token_indices", json!([3])),
        ("target_parameters", json!(["mlp.experts"])),
        ("alora_invocation_tokens", json!([1, 2])),
        ("init_lora_weights", json!("pissa")),
        ("a_field_of_a_later_version", json!(0.5)),
        ("peft_type", json!("IA3")),
        ("peft_type", json!(3)),
        ("task_type", json!("SEQ_CLS")),
        ("target_modules", json!(".*q_proj")),
        ("target_modules", json!(["q_proj", 7])),
        ("target_modules", json!(["nothing"])),
        ("target_modules", Value::Null),
        ("r", json!(0)),
        ("r", json!(-4)),
        ("r", json!("4")),
        ("lora_alpha", json!("8")),
        ("lora_alpha", json!(-8)),
        ("use_rslora", json!("yes")),
        ("lora_dropout", json!(2.0)),
    ] {
        let error = refusal(|fields, _| {
            fields.insert(field.into(), value.clone());
        });
        assert!(
            error.contains("adapter_config.json") && error.contains(field),
            "{field} = {value}: `{error}`"
        );
    }
    for field in ["peft_type", "r", "lora_alpha", "target_modules"] {
        let error = refusal(|fields, _| {
            fields.shift_remove(field);
        });
        assert!(error.contains(field), "{field}: `{error}`");
    }
}

#[test]
fn tensors_that_do_not_fit_their_settings_are_refused_by_name() {
    // Another rank than the file's, and layers that it has not, or has beside.
    let error = refusal(|fields, _| {
        fields.insert("r".into(), json!(3));
    });
    assert!(error.contains("[4, 32], expected [3, 32]"), "{error}");
    let error = refusal(|fields, _| {
        fields.insert("target_modules".into(), json!(["q_proj"]));
    });
    assert!(
        error.contains("of no layer that `target_modules` names"),
        "{error}"
    );
    let error = refusal(|fields, folder| {
        let other = adapter("llama_rslora").join("adapter_model.safetensors");
        std::fs::copy(other, folder.join("adapter_model.safetensors")).unwrap();
        fields.insert(
            "target_modules".into(),
            json!(["q_proj", "v_proj", "down_proj"]),
        );
    });
    assert!(
        error.contains("`base_model.model.model.layers.0.mlp.down_proj.lora_A.weight` is missing"),
        "{error}"
    );
    let error = refusal(|_, folder| {
        std::fs::write(folder.join("adapter_model.safetensors"), b"short").unwrap();
    });
    assert!(error.contains("truncated"), "{error}");
    let error = refusal(|_, folder| {
        std::fs::remove_file(folder.join("adapter_model.safetensors")).unwrap();
    });
    assert!(error.contains("adapter_model.safetensors"), "{error}");
    // Of another family.
    let error = base("gpt2").read_adapter(&adapter("llama")).unwrap_err();
    assert!(error.to_string().contains("gpt2"), "{error}");
}
