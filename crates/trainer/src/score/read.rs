//! Batches through both models, a tile of logits at a time.

use std::ops::RangeInclusive;

use burn::tensor::{Int, Tensor, TensorData};
use implicit_reward::{ReadoutError, TokenReadout, read_logits};
use lm::{CompletionBatch, Transformer};

use super::rows::Item;
use crate::error::TrainError;

/// Logits of a model that exist at a time, about: 16 MB.
const TILE_LOGITS: usize = 1 << 22;
/// Rows of them: enough for the matrix product to be more than a reading of its weights, and no more
/// than where more of them are no faster.
const TILE_ROWS: RangeInclusive<usize> = 64..=256;

/// What is read of a row: for each completion, for each token, its readout if it has one.
pub(super) type RowReadouts = Vec<Vec<Option<TokenReadout>>>;

/// The two models.
#[derive(Debug)]
pub(super) struct Models {
    pub policy: Transformer,
    pub reference: Transformer,
    /// Alternatives to keep at each token.
    pub candidates: usize,
}

/// A token to read, and where its readout goes.
struct Wanted {
    item: usize,
    side: usize,
    token: usize,
    id: u32,
}

/// A batch laid out, with the tokens to read of it.
struct Laid {
    batch: CompletionBatch,
    wanted: Vec<Wanted>,
    /// Places of the wanted tokens among all that the batch predicts; nothing if they are all.
    places: Option<Vec<i64>>,
}

impl Models {
    /// Reads every scored token of some rows.
    pub(super) fn read(&self, items: &[&Item]) -> Result<Vec<RowReadouts>, TrainError> {
        let mut readouts: Vec<RowReadouts> = items
            .iter()
            .map(|item| {
                item.sides
                    .iter()
                    .map(|side| vec![None; side.ids.len()])
                    .collect()
            })
            .collect();
        let Some(laid) = self.lay_out(items) else {
            return Ok(readouts);
        };
        self.tiles(&laid, |wanted, policy, reference| {
            let targets: Vec<u32> = wanted.iter().map(|wanted| wanted.id).collect();
            let read = read_logits(policy, reference, &targets, self.candidates)
                .map_err(|error| not_finite(&error, wanted, items))?;
            for (wanted, readout) in wanted.iter().zip(read) {
                readouts[wanted.item][wanted.side][wanted.token] = Some(readout);
            }
            Ok(())
        })?;
        Ok(readouts)
    }

    /// The same forward passes to the same logits, and nothing more; for timing.
    pub(super) fn run_bare(&self, items: &[&Item]) {
        if let Some(laid) = self.lay_out(items) {
            let dropped = |_: &[Wanted], policy: Tensor<2>, reference: Tensor<2>| {
                let device = policy.device();
                drop((policy, reference));
                device.sync().expect("a working device finishes its work");
                Ok(())
            };
            self.tiles(&laid, dropped).expect("nothing here fails");
        }
    }

    /// Nothing where no token is to be read.
    fn lay_out(&self, items: &[&Item]) -> Option<Laid> {
        // As a batch orders its completions: all first sides, then all second ones.
        let n_sides = items.first()?.sides.len();
        let order = (0..n_sides).flat_map(|side| (0..items.len()).map(move |item| (item, side)));
        let mut wanted = Vec::new();
        let mut places = Vec::new();
        let mut place = 0;
        for (item, side) in order {
            // With no prompt nothing stands before the first token.
            let first = usize::from(items[item].prompt_ids.is_empty());
            let completion = &items[item].sides[side];
            for (token, &id) in completion.ids.iter().enumerate().skip(first) {
                if completion.own.as_ref().is_none_or(|own| own[token]) {
                    wanted.push(Wanted {
                        item,
                        side,
                        token,
                        id,
                    });
                    places.push(place);
                }
                place += 1;
            }
        }
        if wanted.is_empty() {
            return None;
        }
        let device = self.policy.device();
        let prompt = |item: usize| &items[item].prompt_ids[..];
        let completion = |item: usize, side: usize| &items[item].sides[side].ids[..];
        let batch = if n_sides == 2 {
            let pairs: Vec<(&[u32], &[u32], &[u32])> = (0..items.len())
                .map(|item| (prompt(item), completion(item, 0), completion(item, 1)))
                .collect();
            CompletionBatch::for_pairs(&pairs, self.policy.config().hidden_size, &device)
        } else {
            let rows: Vec<(&[u32], &[u32])> = (0..items.len())
                .map(|item| (prompt(item), completion(item, 0)))
                .collect();
            CompletionBatch::new(&rows, &device)
        };
        Some(Laid {
            batch,
            places: (wanted.len() < place as usize).then_some(places),
            wanted,
        })
    }

    /// Gives `take` the logits of both models, `[rows, vocab]`, for some wanted tokens at a time.
    fn tiles(
        &self,
        laid: &Laid,
        mut take: impl FnMut(&[Wanted], Tensor<2>, Tensor<2>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let hidden = |model: &Transformer| {
            let hidden = model.completion_hidden(&laid.batch);
            match &laid.places {
                None => hidden,
                Some(places) => {
                    let data = TensorData::new(places.clone(), [places.len()]);
                    let places = Tensor::<1, Int>::from_data(data, &hidden.device());
                    hidden.select(0, places)
                }
            }
        };
        let (policy, reference) = (hidden(&self.policy), hidden(&self.reference));
        let rows = TILE_LOGITS / self.policy.config().vocab_size;
        let rows = rows.clamp(*TILE_ROWS.start(), *TILE_ROWS.end());
        for (tile, wanted) in laid.wanted.chunks(rows).enumerate() {
            let part = |hidden: &Tensor<2>| hidden.clone().narrow(0, tile * rows, wanted.len());
            let policy = self.policy.head(part(&policy));
            take(wanted, policy, self.reference.head(part(&reference)))?;
        }
        Ok(())
    }
}

fn not_finite(error: &ReadoutError, wanted: &[Wanted], items: &[&Item]) -> TrainError {
    match *error {
        ReadoutError::NotFinite {
            model, row, value, ..
        } => {
            let at = &wanted[row];
            let item = items[at.item];
            TrainError::NotFinite {
                place: format!(
                    "{}, {} token {}, under the {model}",
                    item.place, item.sides[at.side].name, at.token
                ),
                what: "logit",
                value: f64::from(value),
                rows: vec![item.row.to_string()],
            }
        }
        ReadoutError::Device(ref reason) => TrainError::Device {
            name: "logits".into(),
            reason: reason.clone(),
        },
    }
}
