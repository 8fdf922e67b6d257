//! `tallow plan`: what a run will take, before anything runs.

use std::io::Write;

use clap::Args;
use serde_json::json;
use tallow_kernels::simd::{self, Bf16};
use tallow_train::progress::{format_bytes, format_count, format_duration, several};
use tallow_train::{ActivationCheckpointing, Largest, Run, TrainDtype, memory};

use super::pretrain::{Job, RunFile, peak_flops};

/// Arguments of `tallow plan`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow plan run.toml
  tallow plan run.toml --memory 4GiB
  tallow plan run.toml --set train.micro_batch_size=4 --set train.activation_checkpointing=blocks --json")]
pub struct PlanArgs {
    #[command(flatten)]
    file: RunFile,
    /// Say what fits in this much memory: the largest batch, context and rank [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    memory: Option<u64>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Bytes, or a number of MiB or GiB.
fn memory_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err("expected a size such as 4GiB, 4GB or 800MiB".into()),
    };
    match text[..digits].parse::<f64>() {
        Ok(number) if number > 0.0 && number * unit < 1e18 => Ok((number * unit) as u64),
        _ => Err("expected a size such as 4GiB, 4GB or 800MiB".into()),
    }
}

/// Share of the measured peak that training steps of this program are expected to reach: with AMX packing and memory take more time
/// than the products (34% in f32 and 13% in bf16 at the default shape of `bench train`, 29% and 12% with LoRA).
fn expected_share(dtype: TrainDtype) -> f64 {
    match (simd::bf16(simd::level()), dtype) {
        (Some(Bf16::Tiles), TrainDtype::F32) => 0.3,
        (Some(Bf16::Tiles), TrainDtype::Bf16) => 0.12,
        _ => 0.6,
    }
}

/// Runs `tallow plan`.
pub fn run(args: PlanArgs) -> anyhow::Result<()> {
    let run = args.file.prepare_within(Job::Plan, true, args.memory)?;
    let resolved = &run.resolved;
    let memory = &resolved.memory;
    let flops = resolved.flops_per_token * resolved.tokens() as f64;
    let peak = peak_flops(resolved.run.train.dtype);
    let share = expected_share(resolved.run.train.dtype);
    let seconds = flops / (peak * share);
    let available = memory::available();
    let largest = args.memory.or(available).map(|memory| run.largest(memory)).transpose()?;
    if args.json {
        let plan = json!({
            "ranks": 1,
            "params": resolved.params,
            "trained": resolved.trained,
            "steps": resolved.steps,
            "tokens": resolved.tokens(),
            "train_tokens": run.train_tokens(),
            "documents": run.loader().dataset().num_documents(),
            "rows": run.loader().rows_per_epoch(),
            "steps_per_epoch": run.steps_per_epoch(),
            "passes": run.passes(),
            "held_out": run.validation().map_or(0, |valid| valid.num_documents()),
            "flops": flops,
            "flops_per_token": resolved.flops_per_token,
            "micro_batch_size": resolved.micro_batch_size,
            "memory": {
                "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
                "activations": memory.activations, "transient": memory.transient, "fixed": memory.fixed,
                "total": memory.total(), "available": available,
            },
            "peak_flops": peak,
            "expected_s": seconds,
            "largest": largest,
            "notes": run.notices(),
        });
        writeln!(std::io::stdout(), "{plan}")?;
    } else {
        print_plan(&run, flops, peak, seconds, available)?;
        if let Some(largest) = largest.filter(|largest| largest.fits) {
            print_largest(&run, largest)?;
        }
    }
    match largest.filter(|largest| !largest.fits) {
        // Of a memory that was named it is the answer; what is free now may be more by the time that the run starts.
        Some(largest) if args.memory.is_some() => Err(anyhow::anyhow!(does_not_fit(&run, largest))),
        Some(largest) if !args.json => Ok(writeln!(std::io::stdout(), "{}", does_not_fit(&run, largest))?),
        _ => Ok(()),
    }
}

fn print_plan(run: &Run, flops: f64, peak: f64, seconds: f64, available: Option<u64>) -> std::io::Result<()> {
    let share = expected_share(run.resolved.run.train.dtype);
    let mut out = std::io::stdout().lock();
    let resolved = &run.resolved;
    let memory = &resolved.memory;
    let run_config = &resolved.run;
    writeln!(out, "model        {}", run.kind_in_words())?;
    writeln!(out, "data         {}", run.data_in_words())?;
    writeln!(
        out,
        "tokens       {} in the data, {} places in the run, padding included",
        format_count(run.train_tokens()),
        format_count(resolved.tokens())
    )?;
    writeln!(
        out,
        "steps        {} of {} x {}, {} at once: {:.2} passes over the data",
        several(resolved.steps, "step"),
        several(run_config.train.batch_size as u64, "row"),
        several(run_config.data.context_length as u64, "token"),
        several(resolved.micro_batch_size as u64, "row"),
        run.passes()
    )?;
    let buckets = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("transient", memory.transient),
        ("program", memory.fixed),
    ];
    for (name, bytes) in buckets {
        writeln!(out, "{name:12} {:>10}", format_bytes(bytes))?;
    }
    let available_text = available.map_or_else(String::new, |bytes| format!(" of {} available", format_bytes(bytes)));
    writeln!(out, "memory       {:>10}{available_text}", format_bytes(memory.total()))?;
    writeln!(out, "compute      {flops:.3e} FLOPs ({:.3e} a token)", resolved.flops_per_token)?;
    writeln!(
        out,
        "time         about {} if {:.0}% of this machine's {:.0} GFLOP/s is reached",
        format_duration(seconds),
        share * 100.0,
        peak / 1e9
    )?;
    run.notices().iter().try_for_each(|notice| writeln!(out, "{notice}"))
}

/// That a run does not fit, and with which other size it would.
fn does_not_fit(run: &Run, largest: Largest) -> String {
    let resolved = &run.resolved;
    let (needed, memory) = (format_bytes(resolved.memory.total()), format_bytes(largest.memory));
    let rank = largest.rank.filter(|_| run.adapter().is_some());
    // As many as divide the batch as it is.
    let batch = resolved.run.train.batch_size;
    let dividing = |most: usize| (1..=most.min(batch)).rev().find(|rows| batch.is_multiple_of(*rows));
    let rows = largest.micro_batch_size.and_then(dividing).map(|rows| format!("train.micro_batch_size = {rows}"));
    let context = largest.context_length.map(|tokens| format!("data.context_length = {tokens}"));
    let fitting: Vec<String> =
        [rows, context, rank.map(|rank| format!("adapter.rank = {rank}"))].into_iter().flatten().collect();
    let blocks = match resolved.run.train.activation_checkpointing {
        ActivationCheckpointing::None => "; train.activation_checkpointing = \"blocks\" needs less",
        ActivationCheckpointing::Blocks => "",
    };
    let way_out = match fitting.as_slice() {
        [] => {
            let rank = if run.adapter().is_some() { " or rank" } else { "" };
            format!("no smaller train.micro_batch_size, data.context_length{rank} alone makes it fit")
        }
        sizes => format!("it would with {}, each with all else as it is", sizes.join(", or ")),
    };
    format!("does not fit in {memory}: it takes {needed}; {way_out}{blocks}")
}

/// One line of a run that fits: what each could be with all else as it is.
fn print_largest(run: &Run, largest: Largest) -> std::io::Result<()> {
    let (memory, at_bound) = (format_bytes(largest.memory), largest.at_bound);
    let marked = |bound: bool, why: &str| if bound { format!(" ({why})") } else { String::new() };
    // What fits as it is fits with these, which are at least as large.
    let rows = largest.micro_batch_size.unwrap_or(run.resolved.micro_batch_size);
    let rows = format!("{rows} rows at once{}", marked(at_bound.micro_batch_size, "the most that is tried"));
    let context = largest.context_length.unwrap_or(run.resolved.run.data.context_length);
    let context = format!("context {context}{}", marked(at_bound.context_length, "the most that the model has"));
    let rank = largest.rank.filter(|_| run.adapter().is_some());
    let rank = rank.map(|rank| format!(", or rank {rank}{}", marked(at_bound.rank, "the most that its matrices have")));
    let rank = rank.unwrap_or_default();
    writeln!(
        std::io::stdout(),
        "fits         in {memory}; at most {rows} (of a train.batch_size that they divide), or {context}{rank}, each with all \
         else as it is"
    )
}
