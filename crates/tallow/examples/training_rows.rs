//! The rows of a run in the order in which it trains on them, as `scripts/compare/peft_finetune.py` takes them: so two programs can
//! be compared over the same steps.
//!
//! ```text
//! cargo run --release -p tallow --example training_rows -- RUN.toml ROWS [KEY=VALUE..] > rows.jsonl
//! ```

use std::error::Error;
use std::io::Write;
use std::path::Path;

use serde_json::json;
use tallow::open::{OpenFiles, open_files};
use tallow::train::{From, PrepareRun, Run, Source};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [run, rows, set @ ..] = args.as_slice() else {
        return Err("usage: training_rows RUN.toml ROWS [KEY=VALUE..]".into());
    };
    let (path, rows): (&Path, usize) = (Path::new(run), rows.parse()?);
    let config = Source::read(path, set)?.with_default("objective.kind", "sft").config()?;
    let base = path.parent().unwrap_or(Path::new(""));
    let name = config.model.from.clone().ok_or("the run names no model.from")?;
    let local = base.join(&name);
    let OpenFiles { checkpoint, tokenizer } =
        open_files(if local.exists() { local.to_str().ok_or("a path that is no text")? } else { &name })?;
    let how = PrepareRun { from: Some(From { checkpoint, tokenizer }), resume: true, ..PrepareRun::default() };
    let run = Run::prepare(config, base, how)?;
    let batch = run.loader().batch(0, rows)?;
    if run.config().shape().prefix_lm || batch.weights.iter().any(|&weight| weight != 0.0 && weight != 1.0) {
        return Err("prefixes and weights of messages are not written: the rows would stand for another run".into());
    }
    let mut out = std::io::stdout().lock();
    for row in 0..batch.batch {
        let of = row * batch.context..(row + 1) * batch.context;
        let targets: Vec<i64> =
            batch.targets[of.clone()].iter().map(|&id| if id == u32::MAX { -100 } else { i64::from(id) }).collect();
        let line = json!({
            "input_ids": batch.input_ids[of.clone()],
            "targets": targets,
            "position_ids": batch.positions[of.clone()],
            "doc_start": batch.doc_start[of],
        });
        writeln!(out, "{line}")?;
    }
    Ok(())
}
