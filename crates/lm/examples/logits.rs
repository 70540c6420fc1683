//! Prints the logits of a text as JSON, for comparing a written folder with another program.
//!
//! `cargo run --release -p lm --example logits -- MODEL TEXT [ADAPTER] > ours.json`, then
//! `python testdata/scripts/compare_logits.py MODEL ours.json [ADAPTER]` with transformers, and for
//! an adapter PEFT, installed.

use std::error::Error;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use lm::Transformer;
use lm::tokenizer::Tokenizer;

#[expect(clippy::print_stdout, reason = "an example shows its result")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(text)) = (arguments.next(), arguments.next()) else {
        return Err("usage: logits MODEL TEXT [ADAPTER]".into());
    };
    let device = Device::default();
    let ids = Tokenizer::from_folder(Path::new(&folder))?.encode(&text)?;
    let mut model = Transformer::read(Path::new(&folder), &device)?;
    if let Some(adapter) = arguments.next() {
        model = model.read_adapter(Path::new(&adapter))?;
    }
    let row: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let row = Tensor::<2, Int>::from_data(TensorData::new(row, [1, ids.len()]), &device);
    let logits: Vec<f32> = model.logits(row).try_into_vec_as()?;
    println!("{}", serde_json::json!({ "ids": ids, "logits": logits }));
    Ok(())
}
