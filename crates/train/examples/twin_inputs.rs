//! Writes all that another framework needs to repeat a run: initial weights, batches in their order, learning rates.
//!
//! ```text
//! cargo run --release -p tallow-train --example twin_inputs -- RUN.toml OUT_DIR [key=value]..
//! ```
//!
//! `OUT_DIR/init` is a Hugging Face directory of the weights before the first step, `OUT_DIR/batches.safetensors` has
//! `train.*` and `valid.*` (`ids`, `targets` with -100 where nothing is predicted, `positions`, `doc_start`, all i64
//! `[rows, context]`) and `lr` (f64, one a step), and `OUT_DIR/run.json` the rest. `scripts/compare/torch_twin.py` trains
//! on them with PyTorch.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use tallow_data::{Batch, IGNORE_INDEX};
use tallow_train::{PrepareRun, Run, RunConfig, TrainDtype};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: twin_inputs RUN.toml OUT_DIR [key=value]..".into());
    };
    let (path, out) = (PathBuf::from(path), PathBuf::from(out));
    let config = RunConfig::load(&path, &args.collect::<Vec<_>>())?;
    let base = path.parent().unwrap_or(Path::new("")).to_path_buf();
    let run = Run::prepare(config, &base, PrepareRun { resume: true, ..PrepareRun::default() })?;
    let resolved = run.resolved.clone();
    if resolved.run.objective.z_loss != 0.0 || resolved.run.train.dtype != TrainDtype::F32 {
        return Err("the twin knows neither z_loss nor bf16: set objective.z_loss=0 and train.dtype=f32".into());
    }
    std::fs::create_dir_all(&out)?;
    let (rows, context) = (resolved.run.train.batch_size, resolved.run.data.context_length);

    let mut train = Lists::default();
    let mut lrs = vec![];
    for step in 0..resolved.steps {
        train.push(&run.loader().batch(step * rows as u64, rows)?);
        lrs.push(resolved.lr(step));
    }
    let mut valid = Lists::default();
    if let Some(dataset) = run.validation() {
        let scored = match resolved.run.eval.max_tokens {
            0 => usize::MAX,
            tokens => tokens.div_ceil(context as u64) as usize,
        };
        for batch in dataset.sequential(context, 1)?.take(scored) {
            valid.push(&batch?);
        }
    }
    let mut tensors = HashMap::from([("lr".to_owned(), Tensor::new(lrs, &Device::Cpu)?)]);
    train.tensors("train", context, &mut tensors)?;
    valid.tensors("valid", context, &mut tensors)?;
    candle_core::safetensors::save(&tensors, out.join("batches.safetensors"))?;

    let optimizer = &resolved.run.optimizer;
    let facts = serde_json::json!({
        "steps": resolved.steps, "batch_size": rows, "eval_every": resolved.run.eval.every,
        "betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay,
        "grad_clip": optimizer.grad_clip,
        "no_decay": run.specs().iter().filter(|s| !s.decay).map(|s| &s.name).collect::<Vec<_>>(),
    });
    std::fs::write(out.join("run.json"), serde_json::to_string_pretty(&facts)?)?;
    run.into_trainer()?.save_final(&out.join("init"))?;
    Ok(())
}

/// The lists of batches, one behind another.
#[derive(Default)]
struct Lists {
    lists: [Vec<i64>; 4],
}

impl Lists {
    fn push(&mut self, batch: &Batch) {
        let target = |t: &u32| if *t == IGNORE_INDEX { -100 } else { i64::from(*t) };
        self.lists[0].extend(batch.input_ids.iter().map(|x| i64::from(*x)));
        self.lists[1].extend(batch.targets.iter().map(target));
        self.lists[2].extend(batch.positions.iter().map(|x| i64::from(*x)));
        self.lists[3].extend(batch.doc_start.iter().map(|x| i64::from(*x)));
    }

    fn tensors(self, of: &str, context: usize, into: &mut HashMap<String, Tensor>) -> Result<()> {
        for (name, list) in ["ids", "targets", "positions", "doc_start"].into_iter().zip(self.lists) {
            let rows = list.len() / context;
            into.insert(format!("{of}.{name}"), Tensor::from_vec(list, (rows, context), &Device::Cpu)?);
        }
        Ok(())
    }
}
