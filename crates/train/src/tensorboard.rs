//! TensorBoard event files: scalars of steps and validations, for whoever watches runs there.
//!
//! A file is a sequence of TFRecords (length, masked CRC-32C of it, payload, masked CRC-32C of that), each an `Event`
//! message of protocol buffers. The few fields used are encoded by hand. Public reference: TensorFlow's
//! `event.proto`, `summary.proto` and `record_writer`.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::metrics::{EvalRecord, StepRecord};

/// Appends scalars to an event file of a run directory.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
}

impl EventLog {
    /// Creates a new event file `events.out.tfevents.<unix>.<host>.tallow` in `dir`.
    ///
    /// Earlier files of the run stay: with `resume_at_step` steps done, TensorBoard is told to forget what they hold
    /// from the next step on.
    ///
    /// # Errors
    /// If the file cannot be created or written.
    pub fn open(dir: &Path, resume_at_step: Option<u64>) -> io::Result<Self> {
        let (path, file) = create(dir, unix_time() as u64, &host_name())?;
        let mut log = Self { path, file };
        log.record(&event(0, 3, b"brain.Event:2"))?;
        if let Some(step) = resume_at_step {
            // SessionLog { status: START }: what came before from this step on is void.
            log.record(&event(step + 1, 7, &varint_field(1, 1)))?;
        }
        Ok(log)
    }

    /// Where the events go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends scalars of one step; names with a slash are grouped by what is before it.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = bytes_field(1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((*value as f32).to_le_bytes());
            summary.extend(bytes_field(1, &entry));
        }
        self.record(&event(step, 5, &summary))
    }

    /// Appends a step.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn step(&mut self, record: &StepRecord) -> io::Result<()> {
        let mut values = vec![
            ("train/loss", record.loss),
            ("train/lr", record.lr),
            ("train/grad_norm", record.grad_norm),
            ("train/tokens", record.tokens as f64),
            ("speed/tokens_per_s", record.tokens_per_s),
            ("speed/data_wait_s", record.data_wait_s),
            ("speed/memory_bytes", record.memory as f64),
        ];
        values.extend(record.mfu.map(|mfu| ("speed/mfu", mfu)));
        self.scalars(record.step, &values)
    }

    /// Appends a validation.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn eval(&mut self, record: &EvalRecord) -> io::Result<()> {
        let values = [
            ("valid/loss", record.valid_loss),
            ("valid/bits_per_byte", record.bits_per_byte),
            ("valid/perplexity", record.perplexity),
        ];
        self.scalars(record.step, &values)
    }

    fn record(&mut self, payload: &[u8]) -> io::Result<()> {
        self.file.write_all(&tf_record(payload))?;
        self.file.flush()
    }
}

/// A file that was not there before: the second counts up while the name is taken.
fn create(dir: &Path, unix: u64, host: &str) -> io::Result<(PathBuf, File)> {
    for second in unix..unix.saturating_add(1000) {
        let path = dir.join(format!("events.out.tfevents.{second}.{host}.tallow"));
        match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{}: too many event files", dir.display())))
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The machine's name, in letters that are safe in a file name.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").or_else(|_| std::env::var("COMPUTERNAME")).ok())
        .unwrap_or_default();
    let safe: String =
        name.trim().chars().take(64).map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect();
    if safe.is_empty() { "localhost".into() } else { safe }
}

/// `Event { wall_time: 1, step: 2, <field>: content }`.
fn event(step: u64, field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend(unix_time().to_le_bytes());
    out.extend(varint_field(2, step));
    out.extend(bytes_field(field, content));
    out
}

fn varint_field(field: u8, value: u64) -> Vec<u8> {
    let mut out = vec![field << 3];
    push_varint(&mut out, value);
    out
}

fn bytes_field(field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    push_varint(&mut out, content.len() as u64);
    out.extend(content);
    out
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn tf_record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(payload.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(payload);
    out.extend(masked_crc(payload).to_le_bytes());
    out
}

/// Rotated and offset, so that a checksum of data that holds checksums stays good.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected, byte by byte.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = crc_table();
    !data.iter().fold(!0, |crc, byte| TABLE[(crc as u8 ^ byte) as usize] ^ (crc >> 8))
}

const fn crc_table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut index = 0;
    while index < 256 {
        let (mut crc, mut bit) = (index as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A parsed field: number, and its varint, its 8 or 4 bytes, or its content.
    #[derive(Debug, PartialEq)]
    enum Field {
        Varint(u64),
        Double(f64),
        Float(f32),
        Bytes(Vec<u8>),
    }

    fn varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = data[0];
            *data = &data[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    fn take(data: &mut &[u8], n: usize) -> Vec<u8> {
        let (head, tail) = data.split_at(n);
        *data = tail;
        head.to_vec()
    }

    fn message(mut data: &[u8]) -> Vec<(u64, Field)> {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let field = match key & 7 {
                0 => Field::Varint(varint(&mut data)),
                1 => Field::Double(f64::from_le_bytes(take(&mut data, 8).try_into().unwrap())),
                2 => {
                    let n = varint(&mut data) as usize;
                    Field::Bytes(take(&mut data, n))
                }
                5 => Field::Float(f32::from_le_bytes(take(&mut data, 4).try_into().unwrap())),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    fn records(mut data: &[u8]) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while !data.is_empty() {
            let length = take(&mut data, 8);
            let check = u32::from_le_bytes(take(&mut data, 4).try_into().unwrap());
            assert_eq!(check, masked_crc(&length));
            let payload = take(&mut data, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(u32::from_le_bytes(take(&mut data, 4).try_into().unwrap()), masked_crc(&payload));
            out.push(payload);
        }
        out
    }

    /// Step, and tags with values, of an event with a summary.
    fn scalars(record: &[u8]) -> (u64, Vec<(String, f32)>) {
        let fields = message(record);
        let [(1, Field::Double(wall)), (2, Field::Varint(step)), (5, Field::Bytes(summary))] = fields.as_slice() else {
            panic!("{fields:?}")
        };
        assert!(*wall > 1.5e9);
        let values = message(summary).into_iter().map(|(number, value)| {
            let (1, Field::Bytes(value)) = (number, value) else { panic!("not a value") };
            let fields = message(&value);
            let [(1, Field::Bytes(tag)), (2, Field::Float(value))] = fields.as_slice() else { panic!("{fields:?}") };
            (String::from_utf8(tag.clone()).unwrap(), *value)
        });
        (*step, values.collect())
    }

    #[test]
    fn checksum_of_known_strings() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn written_events_parse_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path(), None).unwrap();
        log.scalars(300, &[("train/loss", 2.5), ("train/lr", 1e-3)]).unwrap();
        log.eval(&EvalRecord { step: 301, valid_loss: 2.0, bits_per_byte: 0.75, perplexity: 7.39, tokens: 9 }).unwrap();
        let name = log.path().file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("events.out.tfevents.") && name.ends_with(".tallow"), "{name}");

        let records = records(&std::fs::read(log.path()).unwrap());
        assert_eq!(message(&records[0])[2], (3, Field::Bytes(b"brain.Event:2".to_vec())));
        assert_eq!(scalars(&records[1]), (300, vec![("train/loss".into(), 2.5), ("train/lr".into(), 1e-3)]));
        let (step, values) = scalars(&records[2]);
        assert_eq!((step, values[1].0.as_str(), values[1].1), (301, "valid/bits_per_byte", 0.75));
        assert_eq!(records.len(), 3);
    }

    #[test]
    fn a_step_has_every_measure() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path(), None).unwrap();
        let record = StepRecord {
            step: 1,
            tokens: 2,
            loss: 3.0,
            lr: 4.0,
            grad_norm: 5.0,
            tokens_per_s: 6.0,
            data_wait_s: 7.0,
            mfu: Some(0.5),
            memory: 8,
            elapsed_s: 9.0,
            skipped: false,
        };
        log.step(&record).unwrap();
        let (_, values) = scalars(&records(&std::fs::read(log.path()).unwrap())[1]);
        let values: Vec<f32> = values.iter().map(|(_, v)| *v).collect();
        assert_eq!(values, [3.0, 4.0, 5.0, 2.0, 6.0, 7.0, 8.0, 0.5]);
    }

    #[test]
    fn resuming_opens_a_new_file_that_voids_later_steps() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventLog::open(dir.path(), None).unwrap();
        let second = EventLog::open(dir.path(), Some(41)).unwrap();
        assert_ne!(first.path(), second.path());
        let records = records(&std::fs::read(second.path()).unwrap());
        let fields = message(&records[1]);
        assert_eq!(fields[1], (2, Field::Varint(42)));
        assert_eq!(fields[2], (7, Field::Bytes(vec![8, 1])));
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = EventLog::open(Path::new("no/such/run"), None).unwrap_err().to_string();
        assert!(error.contains("no/such/run"), "{error}");
    }
}
