//! Answers a question, or continues a text, greedily.
//!
//! `cargo run --release -p lm --example generate -- MODEL TEXT [NEW_TOKENS]`
//!
//! `MODEL` is a Hugging Face folder. With a chat template the text is a user's message; without
//! one it is continued as it stands.

use std::error::Error;
use std::path::Path;

use burn::tensor::Device;
use lm::chat::{ChatTemplate, RenderOptions};
use lm::tokenizer::Tokenizer;
use lm::{Decoding, Generate, Transformer};
use serde_json::{Map, Value};

#[expect(clippy::print_stdout, reason = "an example shows its result")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(text)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate MODEL TEXT [NEW_TOKENS]".into());
    };
    let max_new_tokens = arguments.next().map_or(Ok(64), |count| count.parse())?;
    let tokenizer = Tokenizer::from_folder(Path::new(&folder))?;
    let prompt = match ChatTemplate::from_tokenizer(&tokenizer)? {
        Some(template) => {
            let message = [("role", "user"), ("content", &text)];
            let message: Map<String, Value> = message
                .into_iter()
                .map(|(key, value)| (key.to_string(), value.into()))
                .collect();
            let options = RenderOptions {
                add_generation_prompt: true,
                ..RenderOptions::default()
            };
            template.encode(&tokenizer, &[message], &options)?
        }
        None => tokenizer.encode(&text)?,
    };
    let model = Transformer::read(Path::new(&folder), &Device::default())?;
    let options = Generate {
        max_new_tokens,
        eos_ids: tokenizer.eos_ids().to_vec(),
        decoding: Decoding::Greedy,
        seed: 0,
    };
    let answer = model.generate(&[&prompt], &options)?.remove(0);
    println!("{}", tokenizer.decode(&answer.ids, true)?);
    Ok(())
}
