//! `tallow tokenizer`: train one, encode and decode with one.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use tallow_data::{ReadOptions, documents};
use tallow_formats::ModelLocation;
use tallow_formats::gguf::GgufFile;
use tallow_tokenizer::{EncodeOptions, PreTokenizer, Tokenizer, TokenizerKind, TrainEvent, TrainOptions, train};
use tallow_train::progress::{format_bytes, format_count, format_duration};

use super::meter::Meter;
use crate::exit;

/// What to do with tokenizers.
#[derive(Subcommand)]
pub enum TokenizerCommand {
    /// Learn a vocabulary from text
    Train(TrainArgs),
    /// Text to ids
    Encode(EncodeArgs),
    /// Ids to text
    Decode(DecodeArgs),
}

/// Arguments of `tallow tokenizer train`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow tokenizer train --input text/ --vocab-size 4096 --out tokenizer.json
  tallow tokenizer train --input a.jsonl.zst --field body --vocab-size 32000 --pre qwen2 --out tok/
  tallow tokenizer train --input text/ --vocab-size 8000 --kind unigram --out tokenizer.json")]
pub struct TrainArgs {
    /// Text: txt, jsonl or parquet files, each also .gz or .zst, or folders of them
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<PathBuf>,
    /// Tokens in all, special tokens and alphabet included
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// What to train
    #[arg(long, value_enum, default_value_t = Kind::Bpe)]
    kind: Kind,
    /// How BPE cuts text before merging, by llama.cpp's name, e.g. gpt-2, llama-bpe, qwen2, smollm
    #[arg(long, value_name = "NAME", value_parser = PreTokenizer::from_name)]
    pre: Option<PreTokenizer>,
    /// A file ending in .json, or a folder for tokenizer.json; its configuration goes beside it
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Special tokens in id order, from id 0 (the usual ones of the kind unless given); may be repeated
    #[arg(long, value_name = "TOKEN")]
    special: Vec<String>,
    /// Pairs seen less often are not merged
    #[arg(long, default_value_t = 2, value_name = "N")]
    min_frequency: u64,
    /// Field of the text in jsonl, and column in parquet
    #[arg(long, default_value = "text", value_name = "NAME")]
    field: String,
    /// One JSON object with what was made
    #[arg(long)]
    json: bool,
}

/// Kinds of tokenizers.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "lowercase")]
enum Kind {
    /// Byte-level byte-pair encoding
    Bpe,
    /// BERT's word pieces, lower-cased
    WordPiece,
    /// SentencePiece's Unigram language model
    Unigram,
}

impl From<Kind> for TokenizerKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Bpe => Self::Bpe,
            Kind::WordPiece => Self::WordPiece,
            Kind::Unigram => Self::Unigram,
        }
    }
}

/// Arguments of `tallow tokenizer encode`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow tokenizer encode --tokenizer tokenizer.json --text 'Hello there' --json
  tallow tokenizer encode --tokenizer model.gguf --input chapter.txt
  printf 'Hello' | tallow tokenizer encode --tokenizer models/gpt2 --input -")]
pub struct EncodeArgs {
    /// tokenizer.json, a model's folder, a .gguf file, a SentencePiece .model, or a .tiktoken file
    #[arg(long, value_name = "T")]
    tokenizer: String,
    #[command(flatten)]
    text: Text,
    /// Add what the tokenizer puts around a text (BOS and the like)
    #[arg(long)]
    add_special: bool,
    /// Read special tokens written in the text as those tokens
    #[arg(long)]
    parse_special: bool,
    /// One JSON object: ids, and tokens as the vocabulary writes them
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Text {
    /// The text
    #[arg(long, value_name = "S", allow_hyphen_values = true)]
    text: Option<String>,
    /// A file of UTF-8 text, or - for standard input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

/// Arguments of `tallow tokenizer decode`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow tokenizer decode --tokenizer tokenizer.json --ids 464,3139,286
  tallow tokenizer decode --tokenizer tokenizer.json --input ids.txt --skip-special --json")]
pub struct DecodeArgs {
    /// tokenizer.json, a model's folder, a .gguf file, a SentencePiece .model, or a .tiktoken file
    #[arg(long, value_name = "T")]
    tokenizer: String,
    #[command(flatten)]
    ids: Ids,
    /// Leave special tokens out
    #[arg(long)]
    skip_special: bool,
    /// One JSON object: text
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Ids {
    /// The ids
    #[arg(long, value_delimiter = ',', num_args = 1, value_name = "ID,ID,..")]
    ids: Option<Vec<u32>>,
    /// A file of ids with commas or white space between them, or - for standard input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

/// Runs `tallow tokenizer`.
pub fn run(command: TokenizerCommand) -> anyhow::Result<()> {
    match command {
        TokenizerCommand::Train(args) => run_train(args),
        TokenizerCommand::Encode(args) => run_encode(&args),
        TokenizerCommand::Decode(args) => run_decode(&args),
    }
}

fn run_train(args: TrainArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut options = TrainOptions {
        kind: args.kind.into(),
        vocab_size: args.vocab_size,
        special_tokens: (!args.special.is_empty()).then_some(args.special),
        min_frequency: args.min_frequency,
        ..TrainOptions::default()
    };
    if let Some(pre) = args.pre {
        options.pre = pre;
    }
    let reading = ReadOptions { field: args.field, ..ReadOptions::default() };
    let mut reader = documents(&args.input, reading)?;
    let mut meter = Meter::new();
    let mut failure = None;
    let texts = std::iter::from_fn(|| match reader.next()? {
        Ok(document) => Some(document.text),
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    let trained = train(texts, &options, |event| show(&mut meter, &event));
    drop(meter);
    if let Some(error) = failure {
        return Err(error.into());
    }
    let report = reader.into_report();
    if !report.problems().is_empty() {
        eprintln!("{}", report.problems());
    }
    let tokenizer = trained.map_err(usage_if_option)?;
    tokenizer.save(&args.out)?;
    let file = if args.out.is_dir() { args.out.join("tokenizer.json") } else { args.out };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let made = json!({
            "path": file,
            "kind": tokenizer.model(),
            "pre": tokenizer.pre_tokenizer().map(|pre| pre.name()),
            "vocab_size": tokenizer.vocab_size(),
            "documents": report.documents,
            "text_bytes": report.bytes,
            "malformed": report.num_malformed,
            "fingerprint": tokenizer.fingerprint(),
            "seconds": seconds,
        });
        writeln!(std::io::stdout(), "{made}")?;
    } else {
        eprintln!(
            "{}: {} tokens from {} of text in {} documents, {}",
            file.display(),
            tokenizer.vocab_size(),
            format_bytes(report.bytes),
            format_count(report.documents),
            format_duration(seconds)
        );
    }
    Ok(())
}

fn show(meter: &mut Meter, event: &TrainEvent) {
    match event {
        TrainEvent::Reading { documents, bytes } => {
            meter.set(0, 0, &format!("reading: {} documents, {}", format_count(*documents), format_bytes(*bytes)));
        }
        TrainEvent::Merging { done, total } => {
            meter.set(*done as u64, *total as u64, &format!("{done} of {total} tokens"));
        }
        TrainEvent::Warning(warning) => meter.say(&format!("warning: {warning}")),
        _ => {}
    }
}

/// A wrong option is the user's to mend.
fn usage_if_option(error: tallow_tokenizer::Error) -> anyhow::Error {
    match error {
        tallow_tokenizer::Error::BadOption { option, value, reason } => {
            exit::usage(format!("--{} {value}: {reason}", option.replace('_', "-")))
        }
        other => other.into(),
    }
}

fn run_encode(args: &EncodeArgs) -> anyhow::Result<()> {
    let tokenizer = open_tokenizer(&args.tokenizer)?;
    let text = match (&args.text.text, &args.text.input) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_text(path)?,
        (None, None) => String::new(),
    };
    // A tokenizer without such tokens adds none, as `encode(text, true)` of other programs does.
    let ids = match (args.add_special, args.parse_special) {
        (add_special, false) => tokenizer.encode(&text, add_special)?,
        (add_special, true) => {
            let options = EncodeOptions {
                add_bos: add_special && tokenizer.adds_bos(),
                add_eos: add_special && tokenizer.adds_eos(),
                parse_special: true,
            };
            tokenizer.encode_with(&text, options)?
        }
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let tokens: Vec<&str> = ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap_or_default()).collect();
        writeln!(out, "{}", json!({ "ids": ids, "tokens": tokens }))?;
    } else {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        writeln!(out, "{}", ids.join(","))?;
    }
    Ok(())
}

fn run_decode(args: &DecodeArgs) -> anyhow::Result<()> {
    let tokenizer = open_tokenizer(&args.tokenizer)?;
    let ids = match (&args.ids.ids, &args.ids.input) {
        (Some(ids), _) => ids.clone(),
        (None, Some(path)) => parse_ids(&read_text(path)?).with_context(|| path.display().to_string())?,
        (None, None) => vec![],
    };
    let text = tokenizer.decode(&ids, args.skip_special)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", json!({ "text": text }))?;
    } else {
        // Exactly the text, so that it can be written to a file; a prompt should not follow it on the same line.
        out.write_all(text.as_bytes())?;
        if std::io::stdout().is_terminal() {
            writeln!(out)?;
        }
        out.flush()?;
    }
    Ok(())
}

fn parse_ids(text: &str) -> anyhow::Result<Vec<u32>> {
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty());
    let ids = words
        .enumerate()
        .map(|(i, word)| word.parse().with_context(|| format!("entry {} is `{word}`, not an id", i + 1)));
    ids.collect()
}

/// The text of a file, or of standard input for `-`.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut bytes).context("standard input: cannot be read")?;
    } else {
        bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: not UTF-8 from byte {at} on; convert it first", path.display())
    })
}

/// The tokenizer that `name` names: a file of one, a model's folder or `.gguf`, a hub id, or a name in the local store.
pub fn open_tokenizer(name: &str) -> anyhow::Result<Tokenizer> {
    let path = Path::new(name);
    let location = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        ModelLocation::Gguf(path.to_owned())
    } else if path.exists() {
        ModelLocation::HfDir(path.to_owned())
    } else {
        tallow::open::locate_tokenizer(name)
            .with_context(|| format!("{name}: there is no such tokenizer, nor a model to take it from"))?
    };
    match location {
        ModelLocation::HfDir(path) => Ok(Tokenizer::from_path(path)?),
        ModelLocation::Gguf(path) => Ok(tallow::open::gguf_tokenizer(&GgufFile::open(&path)?)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_with_commas_and_white_space() {
        assert_eq!(parse_ids("1, 2\n3\t4,,5\n").unwrap(), [1, 2, 3, 4, 5]);
        assert!(parse_ids(" \n").unwrap().is_empty());
        let error = parse_ids("1 two").unwrap_err().to_string();
        assert!(error.contains("entry 2") && error.contains("two"), "{error}");
        assert!(parse_ids("4294967296").is_err());
    }
}
