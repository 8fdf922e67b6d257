//! Encoding speed on text files, beside the `tokenizers` crate:
//! `cargo run --release -p tallow-tokenizer --example encode_speed -- TOKENIZER FILE..`

use std::time::Instant;
use tallow_tokenizer::Tokenizer;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let ours = Tokenizer::from_path(arguments.next().ok_or("missing argument TOKENIZER")?)?;
    let documents = arguments.map(std::fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = documents.iter().map(String::len).sum();
    let theirs = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&ours.to_json()?)?)?;
    let report =
        |name: &str, mut run: Box<dyn FnMut() -> Result<usize, Box<dyn std::error::Error + Send + Sync>> + '_>| {
            let mut seconds: Vec<f64> = Vec::new();
            let mut tokens = 0;
            for _ in 0..6 {
                let start = Instant::now();
                tokens = run()?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            // The first run warms caches and is left out of the median.
            let first = seconds.remove(0);
            seconds.sort_by(f64::total_cmp);
            let rate = |s: f64| bytes as f64 / 1e6 / s;
            println!(
                "{name:28} {tokens:9} tokens  first {:7.1} MB/s  median {:7.1} MB/s",
                rate(first),
                rate(seconds[2])
            );
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        };
    println!("{:.1} MB in {} documents, {} threads", bytes as f64 / 1e6, documents.len(), rayon::current_num_threads());
    report("tallow encode_documents", Box::new(|| Ok(ours.encode_documents(&documents)?.iter().map(Vec::len).sum())))?;
    report(
        "tallow encode, one thread",
        Box::new(|| {
            let mut tokens = 0;
            for document in &documents {
                tokens += ours.encode(document, false)?.len();
            }
            Ok(tokens)
        }),
    )?;
    report(
        "tokenizers encode_batch_fast",
        Box::new(|| {
            let texts: Vec<&str> = documents.iter().map(String::as_str).collect();
            Ok(theirs.encode_batch_fast(texts, false)?.iter().map(|e| e.get_ids().len()).sum())
        }),
    )?;
    report(
        "tokenizers, one thread",
        Box::new(|| {
            let mut tokens = 0;
            for document in &documents {
                tokens += theirs.encode_fast(document.as_str(), false)?.get_ids().len();
            }
            Ok(tokens)
        }),
    )?;
    Ok(())
}
