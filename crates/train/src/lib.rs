//! The training loop: objectives, optimizers, schedules, checkpoints, metrics.
//!
//! For: running a [`RunConfig`] from raw text or shards to a trained model, stopping and resuming bit for bit.
//! Not for: what a model is (`tallow-models`) or how an op works (`tallow-ops`).
//!
//! [`Run::prepare`] finds everything that a run file names and decides what it leaves open; [`Run::claim`] takes the
//! output directory; [`Run::into_trainer`] allocates; [`Trainer::train`] is the loop, and an [`Observer`] watches it.
//!
//! ```
//! use std::path::Path;
//! use tallow_train::RunConfig;
//!
//! let text = "output = 'runs/first'\n[model]\npreset = 'llama-14m'\n[train]\nsteps = 100\n";
//! let config = RunConfig::parse(text, Path::new("run.toml"), &["train.batch_size=4".into()])?;
//! assert_eq!(config.train.batch_size, 4);
//! # Ok::<(), tallow_train::Error>(())
//! ```
#![forbid(unsafe_code)]

mod added;
mod anomaly;
mod audit;
mod backward;
mod batch;
pub mod bench;
mod checkpoint;
mod config;
mod conversations;
pub mod curve;
mod error;
mod evaluate;
mod fit;
pub mod memory;
pub mod metrics;
mod neftune;
mod optimizer;
mod output;
mod plan;
pub mod profile;
pub mod progress;
mod recorder;
pub mod reference;
mod resolve;
mod run;
mod schedule;
pub mod tensorboard;
mod trainer;

pub use anomaly::{AnomalyConfig, AnomalyDetector};
pub use audit::audit_gradients;
pub use backward::{ActivationCheckpointing, LossSums, StepOptions, evaluate, forward_backward};
pub use checkpoint::{Artifact, Checkpoints, TrainState};
pub use config::{
    AdapterKind, AdapterSection, CheckpointSection, DataSection, DeviceConfig, EvalSection, InitSetting, ModelSection,
    ObjectiveKind, ObjectiveSection, ParallelSection, RunConfig, Source, TargetsSetting, TokenizerSection,
    TooLongSetting, TrainDtype, TrainOnSetting, TrainSection,
};
pub use error::{Error, Result};
pub use evaluate::{Score, Validation};
pub use fit::{AtBound, Largest};
pub use optimizer::{AdamW, OptimizerConfig, OptimizerKind};
pub use output::{OutputClaim, check_new, check_resumable};
pub use plan::{Held, MemoryPlan, StepShape, fitting_micro_batch};
pub use recorder::Recorder;
pub use resolve::{Facts, Resolved};
pub use run::{From, PrepareRun, Run};
pub use schedule::{ScheduleConfig, ScheduleKind};
pub use trainer::{Event, Finish, ModelParts, Observer, Trainer};
