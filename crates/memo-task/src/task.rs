//! The task itself: what draws memos, completions and labels.

use std::collections::HashSet;

use mdp_core::bradley_terry;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::memo::FIELDS;
use crate::vocab::{EOS, PAD, UNK, Vocab};
use crate::writer::{self, Plan};
use crate::{
    Completion, Example, Fact, Layout, Memo, MemoConfig, MemoError, Pair, Reader, Split,
    TokenReward,
};

/// The embedded task: see the [crate's front page](crate).
#[derive(Debug, Clone)]
pub struct MemoTask {
    config: MemoConfig,
    vocab: Vocab,
}

impl MemoTask {
    /// The task with these numbers. The vocabulary is always the same.
    ///
    /// # Errors
    ///
    /// [`MemoError::Config`] when a number lies outside its range.
    pub fn new(config: MemoConfig) -> Result<Self, MemoError> {
        config.check()?;
        Ok(Self {
            config,
            vocab: Vocab::new(),
        })
    }

    /// The numbers the task was made with.
    pub fn config(&self) -> &MemoConfig {
        &self.config
    }

    /// How many tokens there are; ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.vocab.size()
    }

    /// The end-of-text token, `<eos>`.
    pub fn eos_id(&self) -> u32 {
        EOS
    }

    /// The padding token, `<pad>`.
    pub fn pad_id(&self) -> u32 {
        PAD
    }

    /// The token of everything outside the vocabulary, `<unk>`. No generated text holds it.
    pub fn unk_id(&self) -> u32 {
        UNK
    }

    /// The tokens of a text, without an end-of-text token; the same as the `tokenizers` crate
    /// gives for [`tokenizer_json`](Self::tokenizer_json).
    ///
    /// A prompt and its completion give the same tokens apart and joined.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.vocab.encode(text)
    }

    /// The text of tokens. Special tokens and ids outside the vocabulary give nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.vocab.decode(ids)
    }

    /// One token as it stands in the vocabulary (` Oslo`, `<eos>`), or `None` for an id outside.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.vocab.token(id)
    }

    /// The contents of `tokenizer.json`, in the format of Hugging Face `tokenizers`.
    pub fn tokenizer_json(&self) -> String {
        self.vocab.tokenizer_json()
    }

    /// The contents of `tokenizer_config.json`: the special tokens' names for transformers.
    pub fn tokenizer_config_json(&self) -> String {
        self.vocab.tokenizer_config_json()
    }

    /// What reads a completion of this memo and rewards it token by token.
    pub fn reader(&self, memo: &Memo) -> Reader<'_> {
        Reader::new(&self.vocab, self.config.weights, memo)
    }

    /// The true reward of each token of a completion, `[seq]`, for any ids whatever.
    ///
    /// A completion that holds no end-of-text token was cut off: its last token also bears the
    /// missing facts and [`RewardWeights::truncated`](crate::RewardWeights::truncated). Tokens
    /// behind the end of the text, such as padding, earn 0.
    pub fn token_rewards(&self, memo: &Memo, ids: &[u32]) -> Vec<TokenReward> {
        writer::read(self.reader(memo), ids)
    }

    /// The plainest perfect summary; its total reward is 0.
    ///
    /// # Errors
    ///
    /// [`MemoError::UnknownValue`] when the memo holds a value that is no token of the task.
    pub fn best_completion(&self, memo: &Memo) -> Result<Completion, MemoError> {
        self.check(memo)?;
        Ok(self.complete(memo, (writer::write_best(&self.vocab, memo), Vec::new())))
    }

    /// A perfect summary in varied wording and order; its total reward is 0.
    ///
    /// # Errors
    ///
    /// [`MemoError::UnknownValue`] when the memo holds a value that is no token of the task.
    pub fn good_completion(
        &self,
        memo: &Memo,
        rng: &mut impl Rng,
    ) -> Result<Completion, MemoError> {
        self.check(memo)?;
        Ok(self.complete(
            memo,
            writer::write(&self.vocab, memo, &Plan::default(), rng),
        ))
    }

    /// A summary of varied quality, drawn as in [`Split::Sft`] and [`Split::Train`].
    ///
    /// # Errors
    ///
    /// [`MemoError::UnknownValue`] when the memo holds a value that is no token of the task.
    pub fn sample_completion(
        &self,
        memo: &Memo,
        rng: &mut impl Rng,
    ) -> Result<Completion, MemoError> {
        self.check(memo)?;
        Ok(self.sample(memo, Split::Train, rng))
    }

    /// The probability that the task's writers state this fact of the memo wrongly, where they
    /// state it: [`MemoConfig::unusual_wrong_rate`] or [`MemoConfig::usual_wrong_rate`].
    ///
    /// To corrupt copies as the writers err, choose the fact in proportion to it.
    pub fn wrong_rate(&self, memo: &Memo, fact: Fact) -> f64 {
        writer::wrong_rate(&self.vocab, &self.config, memo, fact)
    }

    /// The completion with a wrong value at each of these facts, where it stated the right one.
    ///
    /// Nothing else changes: the two versions have the same length and differ at the positions
    /// that the new [`corruptions`](Completion::corruptions) name, one token each.
    ///
    /// # Errors
    ///
    /// [`MemoError::NotStated`] when the completion does not state one of the facts correctly.
    pub fn corrupt(
        &self,
        memo: &Memo,
        completion: &Completion,
        facts: &[Fact],
        rng: &mut impl Rng,
    ) -> Result<Completion, MemoError> {
        let parts = writer::corrupt(&self.vocab, &self.config, memo, completion, facts, rng)?;
        Ok(self.complete(memo, parts))
    }

    /// `n` examples with distinct memos. Fewer examples of the same split and seed are a prefix of
    /// more.
    pub fn examples(&self, split: Split, n: usize, seed: u64) -> Vec<Example> {
        self.each_example(split, n, seed).collect()
    }

    /// [`MemoTask::examples`], drawn as they are asked for: what is not kept takes no memory.
    pub fn each_example(
        &self,
        split: Split,
        n: usize,
        seed: u64,
    ) -> impl Iterator<Item = Example> + '_ {
        self.each(
            split,
            n,
            seed,
            Purpose::Examples,
            move |memo, prompt, rng| {
                let completion = self.sample(&memo, split, rng);
                let prompt_ids = self.encode(&prompt);
                Example {
                    memo,
                    prompt,
                    prompt_ids,
                    completion,
                }
            },
        )
    }

    /// `n` labelled pairs with distinct memos. Fewer pairs of the same split and seed are a prefix
    /// of more.
    ///
    /// Both completions are drawn alike, and the first is chosen with probability
    /// `σ(label_sharpness · (R_first − R_second))`: the Bradley-Terry model (eq. 1 of
    /// <https://arxiv.org/abs/2404.12358>) on the summed true reward.
    pub fn pairs(&self, split: Split, n: usize, seed: u64) -> Vec<Pair> {
        self.each_pair(split, n, seed).collect()
    }

    /// [`MemoTask::pairs`], drawn as they are asked for: what is not kept takes no memory.
    pub fn each_pair(&self, split: Split, n: usize, seed: u64) -> impl Iterator<Item = Pair> + '_ {
        self.each(split, n, seed, Purpose::Pairs, move |memo, prompt, rng| {
            let first = self.sample(&memo, split, rng);
            let second = loop {
                let second = self.sample(&memo, split, rng);
                if second.ids != first.ids {
                    break second;
                }
            };
            let p_first = self.p_preferred(&first, &second);
            let (chosen, rejected, p_chosen) = if rng.random::<f64>() < p_first {
                (first, second, p_first)
            } else {
                (second, first, 1.0 - p_first)
            };
            let prompt_ids = self.encode(&prompt);
            Pair {
                memo,
                prompt,
                prompt_ids,
                chosen,
                rejected,
                p_chosen,
            }
        })
    }

    /// The probability that the first of two completions is preferred.
    pub fn p_preferred(&self, first: &Completion, second: &Completion) -> f64 {
        // Sharpness scales both rewards, so that the label model itself has no parameter.
        let sharp =
            |completion: &Completion| self.config.label_sharpness * completion.total_reward();
        bradley_terry(sharp(first), sharp(second))
    }

    /// `n` items of distinct memos of a split.
    fn each<'a, T>(
        &'a self,
        split: Split,
        n: usize,
        seed: u64,
        purpose: Purpose,
        make: impl Fn(Memo, String, &mut ChaCha8Rng) -> T + 'a,
    ) -> impl Iterator<Item = T> + 'a {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(2 * split as u64 + purpose as u64);
        let mut seen = HashSet::with_capacity(n);
        let draw = move || {
            // There are some 5 thousand million memos, so a new one of the split is never far.
            let memo = loop {
                let memo = self.draw_memo(&mut rng);
                if Split::of(&memo) == split && seen.insert(memo.clone()) {
                    break memo;
                }
            };
            let prompt = draw_prompt(&memo, &mut rng);
            make(memo, prompt, &mut rng)
        };
        std::iter::repeat_with(draw).take(n)
    }

    fn draw_memo(&self, rng: &mut impl Rng) -> Memo {
        let mut values: [String; 7] = Default::default();
        for fact in Fact::ALL {
            values[fact.index()] = self.vocab.values(fact).draw(None, rng).to_owned();
        }
        Memo::from_values(values)
    }

    fn sample(&self, memo: &Memo, split: Split, rng: &mut impl Rng) -> Completion {
        let plan = Plan::draw(&self.vocab, &self.config, memo, split == Split::Unseen, rng);
        self.complete(memo, writer::write(&self.vocab, memo, &plan, rng))
    }

    fn complete(
        &self,
        memo: &Memo,
        (ids, mut corruptions): (Vec<u32>, Vec<writer::Corruption>),
    ) -> Completion {
        // An omission costs at the end of the text, wherever that came to stand.
        for corruption in &mut corruptions {
            if let writer::CorruptionKind::Omitted(_) = corruption.kind {
                corruption.positions = ids.len() - 1..ids.len();
            }
        }
        writer::complete(&self.vocab, self.reader(memo), ids, corruptions)
    }

    /// Nothing when every value of the memo is a token.
    fn check(&self, memo: &Memo) -> Result<(), MemoError> {
        for fact in Fact::ALL {
            let value = memo.value(fact);
            if !self
                .vocab
                .values(fact)
                .words
                .iter()
                .any(|word| word == value)
            {
                return Err(MemoError::UnknownValue {
                    fact,
                    value: value.to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Examples and pairs of one split and seed come from different streams.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Examples,
    Pairs,
}

fn draw_prompt(memo: &Memo, rng: &mut impl Rng) -> String {
    let layout = if rng.random_bool(0.5) {
        Layout::Record
    } else {
        Layout::Note
    };
    let mut order = FIELDS;
    writer::shuffle(&mut order, rng);
    memo.prompt_in_order(layout, &order)
}
