//! `metrics.jsonl`: one JSON object a line for every step and every validation, kept whole over kills and resumes.
//!
//! A line with `valid_loss` is a validation, any other is a step. A number that is not finite is written as `null`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Name of the file within a run directory.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// The longest accepted line, in bytes.
const MAX_LINE: u64 = 1 << 20;

/// What one optimizer step measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens seen by then, over all ranks.
    pub tokens: u64,
    /// Mean negative log-likelihood of the batch, nats a target.
    #[serde(with = "nullable")]
    pub loss: f64,
    /// Learning rate.
    #[serde(with = "nullable")]
    pub lr: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(with = "nullable")]
    pub grad_norm: f64,
    /// Tokens a second of this step, over all ranks.
    #[serde(with = "nullable")]
    pub tokens_per_s: f64,
    /// Seconds of this step that went by waiting for its batch: microseconds where the loader keeps ahead.
    #[serde(default)]
    pub data_wait_s: f64,
    /// Model FLOPs utilisation: part of the measured peak, from 0 to 1. `None` where no peak is known.
    #[serde(default)]
    pub mfu: Option<f64>,
    /// The most bytes of memory of its own that the process had at the end of a step so far (without the pages of mapped files,
    /// where the system tells them apart); 0 if the system does not tell.
    pub memory: u64,
    /// Seconds of training so far, over all resumes.
    #[serde(with = "nullable")]
    pub elapsed_s: f64,
    /// Whether the step's gradient was thrown away.
    #[serde(default)]
    pub skipped: bool,
}

/// What one validation measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps done before it.
    pub step: u64,
    /// Mean negative log-likelihood, nats a target.
    #[serde(with = "nullable")]
    pub valid_loss: f64,
    /// Bits a byte of text; comparable over tokenizers.
    #[serde(with = "nullable")]
    pub bits_per_byte: f64,
    /// `exp(valid_loss)`.
    #[serde(with = "nullable")]
    pub perplexity: f64,
    /// Targets scored.
    pub tokens: u64,
}

/// A line of the metrics.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Record {
    /// A step.
    Step(StepRecord),
    /// A validation.
    Eval(EvalRecord),
}

impl Record {
    /// The step that it is of.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::Eval(record) => record.step,
        }
    }

    fn parse(line: &[u8]) -> serde_json::Result<Self> {
        let value: serde_json::Value = serde_json::from_slice(line)?;
        match value.get("valid_loss") {
            Some(_) => serde_json::from_value(value).map(Self::Eval),
            None => serde_json::from_value(value).map(Self::Step),
        }
    }
}

impl From<StepRecord> for Record {
    fn from(record: StepRecord) -> Self {
        Self::Step(record)
    }
}

impl From<EvalRecord> for Record {
    fn from(record: EvalRecord) -> Self {
        Self::Eval(record)
    }
}

/// Metrics that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line, not the last, is not a record.
    #[error("{}:{line}: not a line of metrics: {reason}; remove it, or move the file away", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A new run would write into the metrics of another.
    #[error("{}: holds the metrics of another run; resume that one, or choose another output", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

impl MetricsError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}

/// Appends records to `metrics.jsonl`, each handed to the system before the next, so that a kill loses none.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the metrics of the run directory `dir`, which must exist.
    ///
    /// `resume_at_step` is the number of steps done of the run that continues: lines past it are dropped, as is a last
    /// line that a kill left unfinished; the file is replaced at once or not at all. `None` is a new run.
    ///
    /// # Errors
    /// For a new run where there are metrics already, a line that is not a record, or an error of the file system.
    pub fn open(dir: &Path, resume_at_step: Option<u64>) -> Result<Self, MetricsError> {
        let path = dir.join(METRICS_FILE);
        let length = match std::fs::metadata(&path) {
            Ok(meta) => meta.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(MetricsError::io(&path, e)),
        };
        match resume_at_step {
            None if length > 0 => return Err(MetricsError::Exists { path }),
            Some(step) if length > 0 => keep_up_to(&path, step)?,
            _ => {}
        }
        let file = File::options().create(true).append(true).open(&path).map_err(|e| MetricsError::io(&path, e))?;
        Ok(Self { path, file })
    }

    /// Where the records go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a record, in one write.
    ///
    /// # Errors
    /// If the file system refuses, e.g. because the disk is full.
    pub fn write(&mut self, record: &Record) -> Result<(), MetricsError> {
        let line = to_line(record).map_err(|e| MetricsError::io(&self.path, e))?;
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(|e| MetricsError::io(&self.path, e))
    }

    /// Waits until all records are on the disk: a checkpoint that outlives the machine's power must find its lines.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn sync(&self) -> Result<(), MetricsError> {
        self.file.sync_all().map_err(|e| MetricsError::io(&self.path, e))?;
        // Only Unix lets a folder be opened to sync its entries.
        match self.path.parent().filter(|dir| cfg!(unix) && !dir.as_os_str().is_empty()) {
            Some(dir) => File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| MetricsError::io(dir, e)),
            None => Ok(()),
        }
    }

    /// Appends a step.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn step(&mut self, record: &StepRecord) -> Result<(), MetricsError> {
        self.write(&Record::Step(record.clone()))
    }

    /// Appends a validation.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn eval(&mut self, record: &EvalRecord) -> Result<(), MetricsError> {
        self.write(&Record::Eval(record.clone()))
    }
}

fn to_line(record: &Record) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    Ok(line)
}

fn keep_up_to(path: &Path, step: u64) -> Result<(), MetricsError> {
    let mut text = Vec::new();
    // The lines as they are: reading and writing a number again may change its last digit.
    each_line(path, |line, record| {
        if record.step() <= step {
            text.extend(line.trim_ascii());
            text.push(b'\n');
        }
    })?;
    write_atomic(path, &text).map_err(|e| MetricsError::io(path, e))
}

/// All records of a `metrics.jsonl`, in order. A last line that a kill left unfinished is left out.
///
/// # Errors
/// If the file cannot be read, or another line is not a record.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>, MetricsError> {
    let mut records = Vec::new();
    for_each_record(path, |record| records.push(record))?;
    Ok(records)
}

/// Gives `take` the records of [`read_metrics`] one by one.
///
/// # Errors
/// As [`read_metrics`].
pub fn for_each_record(path: &Path, mut take: impl FnMut(Record)) -> Result<(), MetricsError> {
    each_line(path, |_, record| take(record))
}

fn each_line(path: &Path, mut take: impl FnMut(&[u8], Record)) -> Result<(), MetricsError> {
    let io_error = |e| MetricsError::io(path, e);
    let mut reader = BufReader::new(File::open(path).map_err(io_error)?);
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        number += 1;
        let length = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).map_err(io_error)?;
        if length == 0 {
            return Ok(());
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match Record::parse(&line) {
            Ok(record) => take(&line, record),
            Err(_) if reader.fill_buf().map_err(io_error)?.is_empty() => return Ok(()),
            Err(e) => return Err(MetricsError::Line { path: path.into(), line: number, reason: e.to_string() }),
        }
    }
}

/// Replaces the content of `path` at once: written beside it, synced, renamed over it. On an error it is as it was.
pub(crate) fn write_atomic(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// JSON has no NaN: `null` stands for it both ways.
mod nullable {
    use serde::{Deserialize, Deserializer, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
    pub(super) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { to.serialize_f64(*value) } else { to.serialize_none() }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepRecord {
        StepRecord {
            step,
            tokens: step * 2048,
            loss: 10.0 / step as f64,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_s: 1234.5,
            data_wait_s: 0.0,
            mfu: None,
            memory: 1 << 30,
            elapsed_s: step as f64,
            skipped: false,
        }
    }

    fn eval(step: u64) -> EvalRecord {
        EvalRecord { step, valid_loss: 2.0, bits_per_byte: 0.75, perplexity: 2f64.exp(), tokens: 99 }
    }

    fn steps(path: &Path) -> Vec<u64> {
        read_metrics(path).unwrap().iter().map(Record::step).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        log.step(&step(1)).unwrap();
        log.eval(&eval(1)).unwrap();
        log.write(&step(2).into()).unwrap();
        let records = read_metrics(log.path()).unwrap();
        assert_eq!(records, [step(1).into(), eval(1).into(), step(2).into()]);
        let text = std::fs::read_to_string(log.path()).unwrap();
        assert!(text.starts_with(r#"{"step":1,"tokens":2048,"loss":10.0,"lr":0.001,"grad_norm":0.5"#), "{text}");
    }

    #[test]
    fn resuming_drops_what_lies_past_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        for s in 1..=7 {
            log.step(&step(s)).unwrap();
        }
        log.eval(&eval(5)).unwrap();
        log.eval(&eval(7)).unwrap();
        let mut log = MetricsLog::open(dir.path(), Some(5)).unwrap();
        assert_eq!(steps(log.path()), [1, 2, 3, 4, 5, 5]);
        log.step(&step(6)).unwrap();
        assert_eq!(steps(log.path()), [1, 2, 3, 4, 5, 5, 6]);
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [METRICS_FILE], "no temporary file stays");
    }

    #[test]
    fn a_kill_at_any_byte_of_a_write_loses_only_that_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        log.step(&step(1)).unwrap();
        let first = std::fs::metadata(&path).unwrap().len() as usize;
        log.step(&step(2)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in first..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut log = MetricsLog::open(dir.path(), Some(2)).unwrap();
            log.step(&step(3)).unwrap();
            // Without its newline a line is complete all the same.
            let expected = if cut == whole.len() - 1 { vec![1, 2, 3] } else { vec![1, 3] };
            assert_eq!(steps(&path), expected, "cut at {cut}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_come_back_as_nan() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        log.step(&StepRecord { loss: f64::NAN, grad_norm: f64::INFINITY, skipped: true, ..step(1) }).unwrap();
        let records = read_metrics(log.path()).unwrap();
        let [Record::Step(record)] = records.as_slice() else { panic!("{records:?}") };
        assert!(record.loss.is_nan() && record.grad_norm.is_nan() && record.skipped);
    }

    #[test]
    fn a_broken_line_inside_is_named_and_the_file_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let good = String::from_utf8(to_line(&step(1).into()).unwrap()).unwrap();
        let text = format!("{good}{{\"step\": \"one\"}}\n{good}");
        std::fs::write(&path, &text).unwrap();
        let message = MetricsLog::open(dir.path(), Some(9)).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl:2:"), "{message}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn a_new_run_never_mixes_with_another() {
        let dir = tempfile::tempdir().unwrap();
        MetricsLog::open(dir.path(), None).unwrap().step(&step(1)).unwrap();
        assert!(matches!(MetricsLog::open(dir.path(), None), Err(MetricsError::Exists { .. })));
        let missing = MetricsLog::open(&dir.path().join("none"), None).unwrap_err().to_string();
        assert!(missing.contains("none"), "{missing}");
    }

    #[test]
    fn a_line_without_end_is_an_error_not_all_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        std::fs::write(&path, vec![b'['; 3 << 20]).unwrap();
        assert!(matches!(read_metrics(&path), Err(MetricsError::Line { line: 1, .. })));
    }
}
