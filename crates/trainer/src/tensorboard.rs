//! A TensorBoard event file beside `metrics.jsonl`.
//!
//! A record is its length, a checksum of that, an `Event` message and a checksum of it, as
//! TensorFlow's `TFRecord` files have them. Scalars are all that is written, so that the three
//! message types are spelled out here.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use lm::files::write_atomically;
use serde_json::{Map, Value};

use crate::error::TrainError;

/// An open event file.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

/// The one event file of a run: a run that is resumed writes it anew from the metrics it keeps.
const NAME: &str = "events.out.tfevents.0.r2q";

impl EventFile {
    /// Begins the event file in `folder` with the metrics that are there already.
    ///
    /// # Errors
    ///
    /// Any error of the file system.
    pub(crate) fn create(folder: &Path, lines: &[Map<String, Value>]) -> Result<Self, TrainError> {
        std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
        let path = folder.join(NAME);
        let mut bytes = record(&version_event());
        for line in lines {
            bytes.extend(records_of(line));
        }
        write_atomically(&path, |file| file.write_all(&bytes)).map_err(TrainError::io(&path))?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(TrainError::io(&path))?;
        Ok(Self { path, file })
    }

    /// Appends the numbers of a line of metrics.
    ///
    /// # Errors
    ///
    /// Any error of the file system.
    pub(crate) fn write(&mut self, line: &Map<String, Value>) -> Result<(), TrainError> {
        self.file
            .write_all(&records_of(line))
            .map_err(TrainError::io(&self.path))
    }
}

/// One record with all numbers of a line, named `stage/metric`; evaluations are `eval/metric`, as
/// the Hugging Face trainers have it.
fn records_of(line: &Map<String, Value>) -> Vec<u8> {
    let stage = line.get("stage").and_then(Value::as_str).unwrap_or("train");
    let step = line.get("step").and_then(Value::as_i64).unwrap_or(0);
    let scalars: Vec<(String, f32)> = line
        .iter()
        .filter(|(name, _)| *name != "step")
        .filter_map(|(name, value)| {
            let tag = match name.strip_prefix("eval_") {
                Some(name) => format!("eval/{name}"),
                None => format!("{stage}/{name}"),
            };
            Some((tag, value.as_f64()? as f32))
        })
        .collect();
    if scalars.is_empty() {
        return Vec::new();
    }
    record(&scalar_event(step, &scalars))
}

/// `Event { wall_time = 1, file_version = 3 }`.
fn version_event() -> Vec<u8> {
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time());
    put_bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// `Event { wall_time = 1, step = 2, summary = 5 }` with
/// `Summary { value = 1 { tag = 1, simple_value = 2 } }`.
fn scalar_event(step: i64, scalars: &[(String, f32)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, scalar) in scalars {
        let mut value = Vec::new();
        put_bytes(&mut value, 1, tag.as_bytes());
        put_key(&mut value, 2, 5);
        value.extend(scalar.to_le_bytes());
        put_bytes(&mut summary, 1, &value);
    }
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time());
    put_key(&mut event, 2, 0);
    put_varint(&mut event, step.unsigned_abs());
    put_bytes(&mut event, 5, &summary);
    event
}

fn wall_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_secs_f64())
}

fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_key(out, field, 1);
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_checksum(&length).to_le_bytes());
    out.extend(event);
    out.extend(masked_checksum(event).to_le_bytes());
    out
}

/// CRC-32C, turned and shifted, so that a checksum of checksums stays a good one.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_bytes_that_tensorboard_writes() {
        // The first record of `EventFileWriter` of tensorboard 2.20 where the time is 1.
        let mut source = Vec::new();
        put_bytes(
            &mut source,
            1,
            b"tensorboard.summary.writer.event_file_writer",
        );
        let mut event = Vec::new();
        put_double(&mut event, 1, 1.0);
        put_bytes(&mut event, 3, b"brain.Event:2");
        put_bytes(&mut event, 10, &source);
        let expected = "4800000000000000fe92489d09000000000000f03f1a0d627261696e2e4576656e743a\
                        32522e0a2c74656e736f72626f6172642e73756d6d6172792e7772697465722e657665\
                        6e745f66696c655f777269746572e46c2db2";
        let bytes: String = record(&event).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn numbers_go_under_their_stage_and_words_do_not() {
        let line: Map<String, Value> =
            serde_json::from_str(r#"{"stage":"sft","step":300,"loss":0.5,"eval_loss":2,"x":null}"#)
                .unwrap();
        let bytes = records_of(&line);
        let has = |text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
        assert!(has(b"sft/loss") && has(b"eval/loss"));
        assert!(has(&0.5_f32.to_le_bytes()) && has(&2.0_f32.to_le_bytes()));
        // Step 300 as a varint.
        assert!(has(&[0x10, 0xac, 0x02]));
        assert!(!has(b"step") && !has(b"stage") && !has(b"sft/x"));
    }
}
