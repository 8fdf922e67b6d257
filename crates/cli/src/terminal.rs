//! What a training run shows: a bar on a terminal, plain lines otherwise, JSON lines where asked for.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tallow_train::metrics::StepRecord;
use tallow_train::progress::{
    EtaEstimator, eval_line, format_bytes, format_count, format_duration, several, step_line,
};
use tallow_train::{Event, Observer, Recorder, Resolved, Result};

/// Plain lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Records a run's files and shows its progress.
pub struct Watcher {
    recorder: Recorder,
    shown: Shown,
    total: u64,
    eta: EtaEstimator,
    last_step: Instant,
    last_line: Option<Instant>,
}

/// A line for a person, on stderr. A reader that went away must not end a training run, as `eprintln!` would.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

enum Shown {
    Json,
    Lines,
    Bar(ProgressBar),
}

impl Watcher {
    /// For the run directory `dir`, continuing at `from_step` where a run is resumed.
    pub fn new(dir: &Path, resolved: &Resolved, from_step: Option<u64>, json: bool) -> anyhow::Result<Self> {
        let recorder = Recorder::open(dir, &title(resolved), from_step)?;
        let shown = if json {
            Shown::Json
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(resolved.steps);
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_position(from_step.unwrap_or(0));
            Shown::Bar(bar)
        } else {
            Shown::Lines
        };
        let watcher = Self {
            recorder,
            shown,
            total: resolved.steps,
            eta: EtaEstimator::new(),
            last_step: Instant::now(),
            last_line: None,
        };
        watcher.say(&format!(
            "{} parameters, {} of {} tokens, {} at once, about {} of memory",
            format_count(resolved.params),
            several(resolved.steps, "step"),
            resolved.run.train.batch_size * resolved.run.data.context_length,
            several(resolved.micro_batch_size as u64, "row"),
            format_bytes(resolved.memory.total())
        ));
        if let Some(step) = from_step.filter(|&step| step > 0 && step < resolved.steps) {
            watcher.say(&format!("continuing at step {step}"));
        }
        Ok(watcher)
    }

    /// Ends the bar and draws the curve a last time.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
        self.recorder.draw()?;
        Ok(())
    }

    /// Says that the run is complete and where its model is.
    pub fn done(&self, model: &Path) {
        self.tell(&json!({ "final": model }));
        if !matches!(self.shown, Shown::Json) {
            line(&format!("wrote {}", model.display()));
        }
    }

    /// A line for a person.
    fn say(&self, text: &str) {
        match &self.shown {
            Shown::Bar(bar) => bar.println(text),
            Shown::Lines | Shown::Json => line(text),
        }
    }

    /// A line for a program.
    fn tell(&self, value: &serde_json::Value) {
        if matches!(self.shown, Shown::Json) {
            // A reader that went away must not end a training run.
            let _ = writeln!(std::io::stdout(), "{value}");
        }
    }

    fn step(&mut self, record: &StepRecord) {
        self.eta.step(self.last_step.elapsed().as_secs_f64());
        self.last_step = Instant::now();
        let eta = self.eta.eta(self.total.saturating_sub(record.step));
        match &self.shown {
            Shown::Json => self.tell(&json!(record)),
            Shown::Bar(bar) => {
                bar.set_position(record.step);
                let left = eta.map_or_else(|| "?".into(), format_duration);
                let speed = format_count(record.tokens_per_s as u64);
                bar.set_message(format!("loss {:.4}  {speed} tokens/s  {left} left", record.loss));
            }
            Shown::Lines => {
                let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY);
                if due || record.step == self.total {
                    line(&step_line(record, self.total, eta));
                    self.last_line = Some(Instant::now());
                }
            }
        }
    }
}

/// What the curve is of.
fn title(resolved: &Resolved) -> String {
    let model = &resolved.run.model;
    let name = model.preset.as_deref().or(model.from.as_deref()).unwrap_or("model");
    // A picture is passed on: the folders above a model are nobody's business.
    let name = Path::new(name).file_name().map_or(name.into(), |name| name.to_string_lossy());
    format!("{name}: {} parameters", format_count(resolved.params))
}

impl Observer for Watcher {
    fn event(&mut self, event: Event) -> Result<()> {
        self.recorder.event(event.clone())?;
        match event {
            Event::Step(record) => self.step(record),
            Event::Eval(record) => {
                self.tell(&json!(record));
                if !matches!(self.shown, Shown::Json) {
                    self.say(&eval_line(record, self.total));
                }
            }
            Event::Saved(path) => self.tell(&json!({ "saved": path })),
            Event::RolledBack(step) => {
                self.tell(&json!({ "rolled_back_to": step }));
                if let Shown::Bar(bar) = &self.shown {
                    bar.set_position(step);
                }
            }
            Event::Notice(notice) => self.say(&notice),
            _ => {}
        }
        Ok(())
    }
}
