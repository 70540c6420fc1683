//! Models agree with transformers: logits, token logps and greedy text.
//!
//! Each folder of `testdata/lm` was made by `testdata/scripts/make_lm_fixtures.py`. The variable
//! `R2Q_GOLDEN` may name a directory with further folders of the same form.

#![expect(clippy::unwrap_used, reason = "helpers of tests unwrap as tests do")]

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lm::{Decoder, Decoding, Generate, ModelConfig, Transformer, weights::WeightFiles};
use serde_json::Value;

/// Logits are of order 1 to 10 and both sides compute in f32, whose own spread here is 2e-6.
const LOGIT_TOLERANCE: f64 = 1e-4;
/// A log-probability is a difference of logits and a normaliser, both near 1e-6 apart.
const LOGP_TOLERANCE: f64 = 1e-5;

fn folders() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/lm");
    let further = std::env::var_os("R2Q_GOLDEN").map(PathBuf::from);
    let mut folders = Vec::new();
    for root in std::iter::once(own).chain(further) {
        let entries =
            std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        folders.extend(
            entries
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.join("golden.json").is_file()),
        );
    }
    folders.sort();
    assert!(folders.len() >= 7, "the seven fixtures are there");
    folders
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().unwrap();
    values.iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    let values = value.as_array().unwrap();
    values.iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// The model of a folder under one of its two configuration styles.
fn load(folder: &Path, config_file: &str, device: &Device) -> Transformer {
    let path = folder.join(config_file);
    let Value::Object(raw) = read_json(&path) else {
        panic!("{} is no table", path.display())
    };
    let config = ModelConfig::from_json(raw, &path).unwrap();
    let files = WeightFiles::open(folder).unwrap();
    Transformer::from_files(config, &files, device).unwrap()
}

fn input(golden: &Value, device: &Device) -> Tensor<2, Int> {
    let rows = golden["input_ids"].as_array().unwrap();
    let rows: Vec<Vec<u32>> = rows.iter().map(ids).collect();
    let shape = [rows.len(), rows[0].len()];
    let flat: Vec<i64> = rows.iter().flatten().map(|&id| i64::from(id)).collect();
    Tensor::from_data(TensorData::new(flat, shape), device)
}

fn check_logits_and_logps(model: &Transformer, golden: &Value, device: &Device, name: &str) {
    let logits = model.logits(input(golden, device));
    let [_, seq, vocab] = logits.dims();
    let logits: Vec<f32> = logits.try_into_vec_as().unwrap();
    let at = |row: usize, position: usize| &logits[(row * seq + position) * vocab..][..vocab];
    let entries = golden["logits_positions"]["entries"].as_array().unwrap();
    assert!(!entries.is_empty());
    for entry in entries {
        let row = entry["row"].as_u64().unwrap() as usize;
        let position = entry["position"].as_u64().unwrap() as usize;
        let expected = numbers(&entry["logits_float64"]);
        for (token, (&got, expected)) in at(row, position).iter().zip(&expected).enumerate() {
            assert!(
                (f64::from(got) - expected).abs() < LOGIT_TOLERANCE,
                "{name}: row {row} position {position} token {token}: {got} against {expected}"
            );
        }
    }
    let lengths = ids(&golden["row_lengths"]);
    let logps = golden["token_logprobs"]["float64"].as_array().unwrap();
    for (row, expected) in logps.iter().enumerate() {
        let tokens = ids(&golden["input_ids"][row]);
        let expected = numbers(expected);
        assert_eq!(expected.len(), lengths[row] as usize - 1);
        for (position, expected) in expected.iter().enumerate() {
            let logits = at(row, position);
            let normaliser = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
            let got = f64::from(logits[tokens[position + 1] as usize]) - normaliser.ln();
            assert!(
                (got - expected).abs() < LOGP_TOLERANCE,
                "{name}: row {row} position {position}: logp {got} against {expected}"
            );
        }
    }
}

fn check_greedy(model: &Transformer, golden: &Value, name: &str) {
    let check = |prompt: &Value, expected: Vec<u32>, limit: &Value, eos_ids: Vec<u32>| {
        let options = Generate {
            max_new_tokens: limit.as_u64().unwrap() as usize,
            eos_ids,
            decoding: Decoding::Greedy,
            seed: 0,
        };
        let prompt = ids(prompt);
        let alone = model.generate(&[&prompt], &options).unwrap();
        assert_eq!(alone[0].ids, expected, "{name}: greedy");
        // Neighbours of other lengths, which pad this row, change nothing.
        let longer: Vec<u32> = prompt.iter().chain(&prompt).copied().collect();
        let rows = [&longer[..], &prompt, &prompt[..1]];
        let together = model.generate(&rows, &options).unwrap();
        assert_eq!(together[1], alone[0], "{name}: greedy in a batch");
    };
    let greedy = &golden["greedy"];
    for (case, eos_ids) in [("no_eos", vec![]), ("eos", vec![2])] {
        let expected = ids(&greedy["results"]["float64"][case]["tokens"]);
        check(
            &greedy["prompt"],
            expected,
            &greedy["max_new_tokens"],
            eos_ids,
        );
    }
    let hit = &golden["greedy_eos_hit"];
    let eos = hit["eos_id"].as_u64().unwrap() as u32;
    let expected = ids(&hit["tokens"]["float32"]);
    assert_eq!(expected.last(), Some(&eos), "{name}: the end token is kept");
    check(&hit["prompt"], expected, &hit["max_new_tokens"], vec![eos]);
}

#[test]
fn logits_logps_and_greedy_text_equal_transformers_in_both_config_styles() {
    let device = Device::default();
    for folder in folders() {
        let golden = read_json(&folder.join("golden.json"));
        for config_file in ["config.json", "config_v4.json"] {
            let name = format!("{} with {config_file}", folder.display());
            let model = load(&folder, config_file, &device);
            check_logits_and_logps(&model, &golden, &device, &name);
            check_greedy(&model, &golden, &name);
        }
    }
}

#[test]
fn a_written_folder_reads_back_bit_by_bit() {
    let device = Device::default();
    for folder in folders() {
        let model = Transformer::read(&folder, &device).unwrap();
        let copy = tempfile::tempdir().unwrap();
        model.write(copy.path()).unwrap();
        let again = Transformer::read(copy.path(), &device).unwrap();
        assert_eq!(model.to_host(), again.to_host(), "{}", folder.display());
        assert_eq!(model.num_params(), model.config().n_parameters());
    }
}

#[test]
fn cached_decoding_equals_reading_the_whole_text_again() {
    let device = Device::default();
    for folder in folders() {
        let model = Transformer::read(&folder, &device).unwrap();
        for decoder in [Decoder::new(&model), Decoder::of_tensors(&model)] {
            check_cached(&decoder, &folder);
        }
    }
}

fn check_cached(decoder: &Decoder<'_>, folder: &Path) {
    // Logits of one model by two orders of summation.
    const CACHE_TOLERANCE: f32 = 1e-5;
    let model = decoder.model();
    let device = model.device();
    let vocab = model.config().vocab_size;
    let mut texts: Vec<Vec<u32>> =
        vec![vec![5, 9, 11, 40], vec![7, 3], vec![60, 61, 62, 63, 64, 65]];
    let (mut cache, mut logits) = decoder.prefill(&texts, 4).unwrap();
    for step in 0..4 {
        let got: Vec<f32> = logits.try_into_vec_as().unwrap();
        for (row, text) in texts.iter().enumerate() {
            let whole: Vec<i64> = text.iter().map(|&id| i64::from(id)).collect();
            let whole = Tensor::from_data(TensorData::new(whole, [1, text.len()]), &device);
            let expected: Vec<f32> = model.logits(whole).try_into_vec_as().unwrap();
            let last = &expected[(text.len() - 1) * vocab..];
            for (a, b) in got[row * vocab..][..vocab].iter().zip(last) {
                let close = (a - b).abs() < CACHE_TOLERANCE;
                assert!(
                    close,
                    "{}: step {step} row {row}: {a} {b}",
                    folder.display()
                );
            }
        }
        // A fork with rows reordered goes on as the rows it came from.
        let order = [2, 0, 1];
        let mut clone = cache.clone();
        cache = cache.select(&order);
        texts = order.iter().map(|&row| texts[row].clone()).collect();
        let tokens: Vec<u32> = (0..3).map(|row| 10 + step + row).collect();
        for (text, &token) in texts.iter_mut().zip(&tokens) {
            text.push(token);
        }
        let mut untouched = cache.clone();
        logits = decoder.step(&tokens, &mut cache);
        // Writing to one clone is not seen by another.
        let _ = decoder.step(&[1, 1, 1], &mut clone);
        let _ = decoder.step(&[1, 1, 1], &mut untouched);
    }
}

#[test]
fn nothing_is_decoded_from_logits_that_are_no_distribution() {
    let device = Device::default();
    let plain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/lm/llama_untied");
    let model = load(&plain, "config.json", &device);
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path()).unwrap();
    let hidden = model.config().hidden_size;
    // Of a state one number reaches the logits, and exceeds all numbers there: all are infinite. Or two,
    // and of half the tokens infinity is taken from infinity: some are NaN.
    for two in [false, true] {
        let mut tensors = model.to_host();
        let mut set = |name: &str, value: &dyn Fn(usize, usize) -> f32| {
            let values = &mut tensors.get_mut(name).unwrap().values;
            for (place, stored) in values.iter_mut().enumerate() {
                *stored = value(place / hidden, place % hidden);
            }
        };
        set("model.norm.weight", &|_, column| match column {
            0 => f32::MAX,
            1 if two => f32::MAX,
            _ => 0.0,
        });
        set("lm_head.weight", &|token, column| match column {
            0 => f32::MAX,
            1 if two && token % 2 == 0 => f32::MAX,
            1 if two => f32::MIN,
            _ => 0.0,
        });
        let path = folder.path().join("model.safetensors");
        lm::weights::write_safetensors(&path, &tensors, &Default::default()).unwrap();
        let broken = Transformer::read(folder.path(), &device).unwrap();
        let drawn = Decoding::Sample(lm::Sampling::default());
        for (decoding, tensors) in [
            (Decoding::Greedy, false),
            (Decoding::Greedy, true),
            (drawn.clone(), false),
            (drawn, true),
        ] {
            let options = Generate {
                max_new_tokens: 2,
                eos_ids: vec![],
                decoding,
                seed: 0,
            };
            let decoder = if tensors {
                Decoder::of_tensors(&broken)
            } else {
                Decoder::new(&broken)
            };
            let refused = decoder.generate(&[[1_u32, 2]], &options);
            assert!(
                matches!(refused, Err(lm::LmError::Logits { tokens: 0 })),
                "{two} {options:?}: {refused:?}"
            );
        }
    }
}
