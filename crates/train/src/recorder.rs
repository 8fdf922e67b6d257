//! The files of a run that people look at: `metrics.jsonl`, TensorBoard events, `curve.svg`.

use std::path::{Path, PathBuf};

use crate::curve::{Curve, CurveHistory};
use crate::metrics::{METRICS_FILE, MetricsLog, Record, for_each_record};
use crate::tensorboard::EventLog;
use crate::trainer::{Event, Observer};
use crate::{Error, Result};

/// Writes what a run measures into its directory.
pub struct Recorder {
    dir: PathBuf,
    metrics: MetricsLog,
    events: EventLog,
    history: CurveHistory,
}

impl Recorder {
    /// In the run directory `dir`, for a run of this `title`. A resumed run drops what was written past the step it
    /// resumes at.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn open(dir: &Path, title: &str, resume_at_step: Option<u64>) -> Result<Self> {
        let metrics = MetricsLog::open(dir, resume_at_step)?;
        let events = EventLog::open(dir, resume_at_step).map_err(|e| Error::io(dir, e))?;
        let mut history = CurveHistory::new(title);
        if resume_at_step.is_some() {
            for_each_record(&dir.join(METRICS_FILE), |record| history.push(&record))?;
        }
        Ok(Self { dir: dir.to_path_buf(), metrics, events, history })
    }

    /// The curve so far.
    pub fn curve(&self) -> Curve {
        self.history.curve()
    }

    /// Draws `curve.svg` of what there is.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn draw(&self) -> Result<()> {
        let path = self.dir.join("curve.svg");
        self.curve().write(&path).map_err(|e| Error::io(&path, e))
    }
}

impl Observer for Recorder {
    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Step(record) => {
                self.metrics.step(record)?;
                self.events.step(record).map_err(|e| Error::io(self.events.path(), e))?;
                self.history.push(&Record::Step(record.clone()));
            }
            Event::Eval(record) => {
                self.metrics.eval(record)?;
                self.events.eval(record).map_err(|e| Error::io(self.events.path(), e))?;
                self.history.push(&Record::Eval(record.clone()));
                self.draw()?;
            }
            Event::RolledBack(step) => {
                self.metrics = MetricsLog::open(&self.dir, Some(step))?;
                self.events = EventLog::open(&self.dir, Some(step)).map_err(|e| Error::io(&self.dir, e))?;
                self.history.back_to(step);
            }
            Event::Saving => self.metrics.sync()?,
            Event::Saved(_) | Event::Notice(_) => {}
        }
        Ok(())
    }
}
