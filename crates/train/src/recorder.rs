//! The files of a run that people look at: `metrics.jsonl`, TensorBoard events, `curve.svg`.

use std::path::{Path, PathBuf};

use crate::curve::write_curve_svg;
use crate::metrics::{METRICS_FILE, MetricsLog, Record, read_metrics};
use crate::tensorboard::EventLog;
use crate::trainer::{Event, Observer};
use crate::{Error, Result};

/// Writes what a run measures into its directory.
pub struct Recorder {
    dir: PathBuf,
    metrics: MetricsLog,
    events: EventLog,
    train: Vec<(u64, f64)>,
    valid: Vec<(u64, f64)>,
}

impl Recorder {
    /// In the run directory `dir`. A resumed run drops what was written past the step it resumes at.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn open(dir: &Path, resume_at_step: Option<u64>) -> Result<Self> {
        let metrics = MetricsLog::open(dir, resume_at_step)?;
        let events = EventLog::open(dir, resume_at_step).map_err(|e| Error::io(dir, e))?;
        let mut recorder = Self { dir: dir.to_path_buf(), metrics, events, train: vec![], valid: vec![] };
        if resume_at_step.is_some() {
            for record in read_metrics(&dir.join(METRICS_FILE))? {
                recorder.keep(&record);
            }
        }
        Ok(recorder)
    }

    fn keep(&mut self, record: &Record) {
        match record {
            Record::Step(step) => self.train.push((step.step, step.loss)),
            Record::Eval(eval) => self.valid.push((eval.step, eval.valid_loss)),
        }
    }

    /// `(step, loss)` of every training step so far.
    pub fn train_curve(&self) -> &[(u64, f64)] {
        &self.train
    }

    /// `(step, loss)` of every validation so far.
    pub fn valid_curve(&self) -> &[(u64, f64)] {
        &self.valid
    }

    /// Draws `curve.svg` of what there is.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn draw(&self) -> Result<()> {
        let path = self.dir.join("curve.svg");
        write_curve_svg(&path, &self.train, &self.valid, "loss, nats a token").map_err(|e| Error::io(&path, e))
    }
}

impl Observer for Recorder {
    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Step(record) => {
                self.metrics.step(record)?;
                self.events.step(record).map_err(|e| Error::io(self.events.path(), e))?;
                self.keep(&Record::Step(record.clone()));
            }
            Event::Eval(record) => {
                self.metrics.eval(record)?;
                self.events.eval(record).map_err(|e| Error::io(self.events.path(), e))?;
                self.keep(&Record::Eval(record.clone()));
                self.draw()?;
            }
            Event::Saved(_) | Event::Notice(_) => {}
        }
        Ok(())
    }
}
