//! The distribution that is drawn from, against the processors and warpers of Hugging Face `generate`. The fixture is
//! written by scripts/fixtures/sampler_warpers.py, with the library versions inside.

use std::collections::BTreeMap;

use serde::Deserialize;
use tallow_sampler::{Sampler, SamplerOptions};

#[derive(Deserialize)]
struct Fixture {
    versions: BTreeMap<String, String>,
    history: Vec<u32>,
    /// `null` is -inf.
    logits: BTreeMap<String, Vec<Option<f32>>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    row: String,
    options: SamplerOptions,
    kept: Vec<u32>,
    probs: Vec<f64>,
}

/// Probabilities come from two f32 softmaxes with different roundings.
const TOLERANCE: f64 = 3e-6;

#[test]
fn distributions_agree_with_hugging_face() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/hf_warpers.json")).unwrap();
    assert!(fixture.versions.contains_key("transformers"));
    assert!(fixture.cases.len() >= 50, "{} cases", fixture.cases.len());
    for case in fixture.cases {
        let logits: Vec<f32> = fixture.logits[&case.row].iter().map(|l| l.unwrap_or(f32::NEG_INFINITY)).collect();
        // Hugging Face looks at the whole sequence.
        let options = SamplerOptions { repeat_last_n: -1, ..case.options };
        let mut sampler = Sampler::new(options.clone()).unwrap();
        let got = sampler.distribution(&logits, &fixture.history).unwrap();
        let ids: Vec<u32> = got.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, case.kept, "{} {options:?}", case.row);
        for ((id, ours), theirs) in got.iter().zip(&case.probs) {
            assert!((ours - theirs).abs() < TOLERANCE, "{} {options:?}: id {id}: {ours} {theirs}", case.row);
        }
    }
}
