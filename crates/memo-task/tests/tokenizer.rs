//! The tokenizer that the task writes, read by the real `tokenizers` crate.

use memo_task::{MemoConfig, MemoTask, Split};
use proptest::prelude::*;
use tokenizers::Tokenizer;

fn both() -> (MemoTask, Tokenizer) {
    let task = MemoTask::new(MemoConfig::default()).expect("the defaults are in range");
    let tokenizer = task.tokenizer_json().parse().expect("a tokenizer.json");
    (task, tokenizer)
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer
        .encode(text, false)
        .expect("any text has tokens")
        .get_ids()
        .to_vec()
}

#[test]
fn special_tokens_and_size_agree() {
    let (task, tokenizer) = both();
    assert_eq!(tokenizer.get_vocab_size(true), task.vocab_size());
    assert_eq!(tokenizer.token_to_id("<eos>"), Some(task.eos_id()));
    assert_eq!(tokenizer.token_to_id("<pad>"), Some(task.pad_id()));
    assert_eq!(tokenizer.token_to_id("<unk>"), Some(task.unk_id()));
    let config: serde_json::Value = serde_json::from_str(&task.tokenizer_config_json()).unwrap();
    assert_eq!(config["eos_token"], "<eos>");
    assert_eq!(config["pad_token"], "<pad>");
}

#[test]
fn generated_text_round_trips_without_unknown_tokens() {
    let (task, tokenizer) = both();
    for split in Split::ALL {
        for pair in task.pairs(split, 400, 3) {
            assert_eq!(pair.prompt_ids, ids(&tokenizer, &pair.prompt));
            for completion in [&pair.chosen, &pair.rejected] {
                let joined = format!("{}{}<eos>", pair.prompt, completion.text);
                let expected = [&pair.prompt_ids[..], &completion.ids].concat();
                assert_eq!(
                    ids(&tokenizer, &joined),
                    expected,
                    "joined and apart differ"
                );
                assert!(!expected.contains(&task.unk_id()), "{joined}");
                assert_eq!(tokenizer.decode(&expected, false).unwrap(), joined);
                assert_eq!(task.decode(&completion.ids), completion.text);
            }
        }
    }
}

#[test]
fn every_token_is_one_token() {
    let (task, tokenizer) = both();
    for id in 0..task.vocab_size() as u32 {
        let token = task.token(id).unwrap();
        assert_eq!(ids(&tokenizer, token), [id], "{token:?}");
        assert_eq!(task.encode(token), [id], "{token:?}");
    }
}

proptest! {
    #[test]
    fn our_encoding_is_that_of_the_tokenizers_crate(
        text in r"([ \n\t.,:<>a-cA-C0-9éß☃]| Maria| 40|crates| of|<eos>|<pad>|<unk>){0,12}",
    ) {
        let (task, tokenizer) = both();
        prop_assert_eq!(task.encode(&text), ids(&tokenizer, &text));
    }

    #[test]
    fn our_decoding_is_that_of_the_tokenizers_crate(
        sequence in prop::collection::vec(0_u32..320, 0..20),
    ) {
        let (task, tokenizer) = both();
        prop_assert_eq!(task.decode(&sequence), tokenizer.decode(&sequence, true).unwrap());
    }
}
