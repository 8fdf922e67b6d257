//! One file a command.

pub mod bench;
pub mod bench_ops;
pub mod chat;
pub mod completions;
pub mod convert;
pub mod data;
pub mod doctor;
pub mod finetune;
pub mod generate;
pub mod merge;
pub mod meter;
pub mod model;
pub mod plan;
pub mod pretrain;
pub mod preview;
pub mod quickstart;
pub mod reference;
pub mod sampling;
pub mod score;
pub mod stream;
pub mod tokenizer;
