//! `tallow data`: text to token shards, and a look into them.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use tallow_data::{
    OnMalformed, PrepareOptions, PrepareReport, SplitInspection, SplitReport, TextSplit, TokenDataset, inspect,
    prepare, verify,
};
use tallow_tokenizer::Tokenizer;
use tallow_train::progress::{format_bytes, format_count, format_duration};

use super::meter::Meter;
use super::preview::Marks;
use super::tokenizer::open_tokenizer;
use crate::exit;

/// What to do with data.
#[derive(Subcommand)]
pub enum DataCommand {
    /// Encode text into token shards: DIR/train and DIR/valid
    Prepare(PrepareArgs),
    /// Show what prepared shards hold
    Inspect(InspectArgs),
    /// Compare prepared shards with the hashes in their index
    Verify(VerifyArgs),
}

/// Arguments of `tallow data prepare`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow data prepare --input text/ --tokenizer tokenizer.json --out data --valid-fraction 0.01
  tallow data prepare --input a.jsonl.zst b.parquet --field body --tokenizer models/gpt2 --out data
  tallow data prepare --input a.txt --separator '---' --tokenizer tokenizer.json --out data")]
pub struct PrepareArgs {
    /// Text: txt, jsonl or parquet files, each also .gz or .zst, or folders of them
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<PathBuf>,
    /// tokenizer.json, a model's folder, a .gguf file, a SentencePiece .model, or a .tiktoken file
    #[arg(long, value_name = "T")]
    tokenizer: String,
    /// Folder to write; it appears when all is done
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the text to hold out, 0 to 0.5
    #[arg(long, default_value_t = 0.0, value_name = "F")]
    valid_fraction: f64,
    /// Field of the text in jsonl, and column in parquet
    #[arg(long, default_value = "text", value_name = "NAME")]
    field: String,
    /// What a document is in plain text
    #[arg(long, value_enum, default_value_t = Split::WholeFile)]
    split: Split,
    /// This string ends a document of plain text
    #[arg(long, value_name = "S", conflicts_with = "split")]
    separator: Option<String>,
    /// What to do with records that cannot be read
    #[arg(long, value_enum, default_value_t = Malformed::Report)]
    on_malformed: Malformed,
    /// Share of malformed records from which `--on-malformed report` fails
    #[arg(long, default_value_t = PrepareOptions::default().max_malformed_fraction, value_name = "F")]
    max_malformed_fraction: f64,
    /// Tokens after which a shard ends
    #[arg(long, default_value_t = PrepareOptions::default().shard_tokens, value_name = "N")]
    shard_tokens: u64,
    /// Do not end documents with the tokenizer's end-of-text token
    #[arg(long)]
    no_eos: bool,
    /// Begin documents with the tokenizer's begin-of-text token
    #[arg(long)]
    bos: bool,
    /// Replace `--out` if it exists
    #[arg(long)]
    overwrite: bool,
    /// One JSON object with what was read and written
    #[arg(long)]
    json: bool,
}

/// How plain text becomes documents.
#[derive(Clone, Copy, ValueEnum)]
enum Split {
    /// Each file is one
    WholeFile,
    /// Blank lines end one
    BlankLines,
}

/// What to do with records that cannot be read.
#[derive(Clone, Copy, ValueEnum)]
enum Malformed {
    /// Stop at the first
    Error,
    /// Skip, count, name them, and fail if they are too many
    Report,
    /// Skip, count and name them, however many
    Skip,
}

/// Arguments of `tallow data inspect`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow data inspect data
  tallow data inspect data/train --tokenizer tokenizer.json --documents 5
  tallow data inspect data --json")]
pub struct InspectArgs {
    /// A folder of shards, or the one that holds train and valid
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Show the first documents as text, of examples what is learnt marked
    #[arg(long, value_name = "T")]
    tokenizer: Option<String>,
    /// How many documents to show
    #[arg(long, default_value_t = 3, value_name = "N")]
    documents: usize,
    /// How much of each
    #[arg(long, default_value_t = 40, value_name = "N")]
    tokens: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `tallow data verify`.
#[derive(Args)]
#[command(after_help = "\
Example:
  tallow data verify data")]
pub struct VerifyArgs {
    /// A folder of shards, or the one that holds train and valid
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `tallow data`.
pub fn run(command: DataCommand) -> anyhow::Result<()> {
    match command {
        DataCommand::Prepare(args) => run_prepare(args),
        DataCommand::Inspect(args) => run_inspect(&args),
        DataCommand::Verify(args) => run_verify(&args),
    }
}

fn run_prepare(args: PrepareArgs) -> anyhow::Result<()> {
    let tokenizer = open_tokenizer(&args.tokenizer)?;
    let options = PrepareOptions {
        field: args.field,
        text_split: match (args.separator, args.split) {
            (Some(separator), _) => TextSplit::Separator(separator),
            (None, Split::WholeFile) => TextSplit::WholeFile,
            (None, Split::BlankLines) => TextSplit::BlankLines,
        },
        on_malformed: match args.on_malformed {
            Malformed::Error => OnMalformed::Error,
            Malformed::Report => OnMalformed::Report,
            Malformed::Skip => OnMalformed::Skip,
        },
        max_malformed_fraction: args.max_malformed_fraction,
        valid_fraction: args.valid_fraction,
        shard_tokens: args.shard_tokens,
        append_eos: !args.no_eos,
        prepend_bos: args.bos,
        overwrite: args.overwrite,
        ..PrepareOptions::default()
    };
    let mut meter = Meter::new();
    let report = prepare(&args.input, &tokenizer, &args.out, &options, &mut |p| {
        let written = format!("{} documents, {} tokens", format_count(p.documents), format_count(p.tokens));
        meter.set(p.input_bytes_read, p.input_bytes, &written);
    });
    drop(meter);
    let report = report.map_err(usage_if_option)?;
    if !report.read.problems().is_empty() {
        eprintln!("{}", report.read.problems());
    }
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&report)?)?;
    } else {
        print_prepared(&report);
    }
    Ok(())
}

fn print_prepared(report: &PrepareReport) {
    for split in [&report.train, &report.valid].into_iter().filter(|split| split.shards > 0) {
        let SplitReport { path, documents, tokens, text_bytes, shards } = split;
        eprintln!(
            "{}: {} tokens of {} documents, {} of text, {shards} shard{}",
            path.display(),
            format_count(*tokens),
            format_count(*documents),
            format_bytes(*text_bytes),
            if *shards == 1 { "" } else { "s" }
        );
    }
    eprintln!("{}; {}", report.split_rule, format_duration(report.seconds));
}

/// A wrong option, or a folder in the way, is the user's to mend.
fn usage_if_option(error: tallow_data::Error) -> anyhow::Error {
    use tallow_data::Error::{Option, OutputExists};
    match error {
        Option { name: "append_eos", .. } => {
            exit::usage("the tokenizer has no end-of-text token; give --no-eos, or train one with such a token".into())
        }
        Option { name: "prepend_bos", .. } => exit::usage(
            "--bos: the tokenizer has no begin-of-text token; leave it out, or train one with such a token".into(),
        ),
        Option { name: "overwrite", reason, .. } => exit::usage(format!("--overwrite: {reason}")),
        Option { name, value, reason } => exit::usage(format!("{}: {reason}", flag(name, &value))),
        OutputExists { path } => exit::usage(format!(
            "{}: exists already; choose another --out, or replace it with --overwrite",
            path.display()
        )),
        other => other.into(),
    }
}

/// The flag that sets an option of the library.
fn flag(name: &str, value: &str) -> String {
    match name {
        "text_split" => "--separator ''".into(),
        name => format!("--{} {value}", name.replace('_', "-")),
    }
}

fn run_inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let tokenizer = args.tokenizer.as_deref().map(open_tokenizer).transpose()?;
    let splits = inspect(&args.dir, args.documents, args.tokens)?;
    if let Some(tokenizer) = &tokenizer {
        check_tokenizer(tokenizer, &splits)?;
    }
    let texts = |split: &SplitInspection| -> anyhow::Result<Option<Vec<String>>> {
        let Some(tokenizer) = &tokenizer else { return Ok(None) };
        Ok(Some(split.first_documents.iter().map(|ids| tokenizer.decode(ids, false)).collect::<Result<_, _>>()?))
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut found = vec![];
        for split in &splits {
            let mut value = serde_json::to_value(split)?;
            if let (Some(object), Some(texts)) = (value.as_object_mut(), texts(split)?) {
                object.insert("first_texts".into(), json!(texts));
            }
            found.push(value);
        }
        writeln!(out, "{}", json!({ "splits": found }))?;
        return Ok(());
    }
    for split in &splits {
        let shown = match &tokenizer {
            Some(tokenizer) if split.index.examples.is_some() => Some(masked(split, tokenizer, args.tokens)?),
            _ => texts(split)?.map(|texts| texts.iter().map(|text| format!("{text:?}")).collect()),
        };
        print_split(&mut out, split, shown)?;
    }
    Ok(())
}

/// The first examples of a split, with marks for what is learnt.
fn masked(split: &SplitInspection, tokenizer: &Tokenizer, most: usize) -> anyhow::Result<Vec<String>> {
    let dataset = TokenDataset::open(std::slice::from_ref(&split.path))?;
    let example = |index: usize| {
        let runs = tallow_data::preview(&dataset, index as u64)?;
        let tokens = runs.iter().flat_map(|(ids, weight)| ids.iter().map(|&id| (id, *weight)));
        Marks::of_stdout().text(&tokens.take(most).collect::<Vec<_>>(), Some(tokenizer))
    };
    (0..split.first_documents.len()).map(example).collect()
}

fn check_tokenizer(tokenizer: &Tokenizer, splits: &[SplitInspection]) -> anyhow::Result<()> {
    let ours = tokenizer.fingerprint();
    match splits.iter().find(|s| s.index.tokenizer_fingerprint != ours) {
        None => Ok(()),
        Some(split) => {
            let hint = "give the one that prepared it";
            Err(exit::usage(format!("{}: was prepared with another tokenizer; {hint}", split.path.display())))
        }
    }
}

fn print_split(out: &mut impl Write, split: &SplitInspection, texts: Option<Vec<String>>) -> std::io::Result<()> {
    let index = &split.index;
    let [shortest, median, longest] = split.shortest_median_longest;
    writeln!(out, "{}", split.path.display())?;
    writeln!(
        out,
        "  tokens       {} ({} bytes each, vocabulary {})",
        index.num_tokens, index.token_bytes, index.vocab_size
    )?;
    writeln!(out, "  documents    {} ({shortest} to {longest} tokens, median {median})", index.num_documents)?;
    writeln!(out, "  text         {}, {:.3} bytes per token", format_bytes(index.text_bytes), split.bytes_per_token)?;
    let bytes: u64 = index.shards.iter().map(|s| s.bytes).sum();
    writeln!(out, "  shards       {} ({})", index.shards.len(), format_bytes(bytes))?;
    let ends =
        |wanted: bool, id: Option<u32>| if wanted { id.map_or("-".into(), |id| id.to_string()) } else { "-".into() };
    writeln!(
        out,
        "  eos, bos     {}, {}",
        ends(index.append_eos, index.eos_id),
        ends(index.prepend_bos, index.bos_id)
    )?;
    writeln!(out, "  tokenizer    {}", index.tokenizer_fingerprint)?;
    writeln!(out, "  split        {}", index.split_rule)?;
    writeln!(out, "  sources      {}", index.sources.len())?;
    let most = split.lengths.iter().map(|b| b.documents).max().unwrap_or(1).max(1);
    for bucket in &split.lengths {
        let bar = "█".repeat((bucket.documents * 30).div_ceil(most) as usize);
        writeln!(out, "  {:>10} to {:<10} tokens {:>8} {bar}", bucket.from, bucket.to, bucket.documents)?;
    }
    for (i, ids) in split.first_documents.iter().enumerate() {
        match texts.as_ref().and_then(|t| t.get(i)) {
            Some(text) => writeln!(out, "  document {i}: {text}")?,
            None => writeln!(out, "  document {i}: {ids:?}")?,
        }
    }
    Ok(())
}

fn run_verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let found = verify(&args.dir)?;
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&found)?)?;
    } else {
        for damage in &found.damaged {
            eprintln!("{}: {}", damage.path.display(), damage.reason);
        }
        eprintln!(
            "{} of {} shards are as written ({})",
            found.shards - found.damaged.len(),
            found.shards,
            format_bytes(found.bytes)
        );
    }
    damaged(&args.dir, found.damaged.len())
}

fn damaged(dir: &Path, count: usize) -> anyhow::Result<()> {
    anyhow::ensure!(count == 0, "{}: {count} damaged shards; prepare the data again or restore them", dir.display());
    Ok(())
}
