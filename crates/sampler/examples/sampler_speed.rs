//! Time of one sampled token over a vocabulary of 151,936 (Qwen's), for a few options.
//!
//! `cargo run --release -p tallow-sampler --example sampler_speed`

use std::time::Instant;

use tallow_sampler::{Result, Sampler, SamplerOptions};

fn main() -> Result<()> {
    // Bell-shaped logits, as a model's are: the sum of four uniform numbers.
    let uniform = |id: u64, stream| tallow_sampler::uniform(1, id, stream) as f32 - 0.5;
    let logits: Vec<f32> = (0..151_936).map(|id| (0..4).map(|stream| uniform(id, stream)).sum::<f32>() * 6.0).collect();
    let history: Vec<u32> = (0..64).collect();
    let base = SamplerOptions::default();
    let all = SamplerOptions { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..base.clone() };
    for (name, options) in [
        ("greedy", SamplerOptions::greedy()),
        ("temperature", SamplerOptions { temperature: 0.8, ..base.clone() }),
        ("top_k 40", SamplerOptions { top_k: 40, ..base.clone() }),
        ("top_p 0.95", SamplerOptions { top_p: 0.95, ..base.clone() }),
        ("min_p 0.05", SamplerOptions { min_p: 0.05, ..base.clone() }),
        ("t, top_k, top_p, min_p", all.clone()),
        ("the same and penalties", SamplerOptions { repetition_penalty: 1.1, ..all }),
    ] {
        let mut sampler = Sampler::new(options)?;
        let mut times = Vec::new();
        for position in 0..40 {
            let start = Instant::now();
            sampler.sample_at(&logits, &history, position)?;
            times.push(start.elapsed());
        }
        times.sort();
        println!("{name:24} {:7.0} us a token (median of {})", times[20].as_secs_f64() * 1e6, times.len());
    }
    Ok(())
}
