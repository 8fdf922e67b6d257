//! The training loop: objectives, optimizers, schedules, checkpoints, metrics.
