//! Properties over random logits, options and texts.

use proptest::prelude::*;
use tallow_sampler::{Candidate, Candidates, Sampler, SamplerOptions, StopMatcher, log_softmax_at, top_logprobs};

/// Logits with many ties, masked tokens, and now and then huge values; never all masked.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        6 => -20.0f32..20.0,
        3 => (-3i32..3).prop_map(|x| x as f32),
        1 => Just(f32::NEG_INFINITY),
        1 => prop_oneof![Just(f32::MAX), Just(f32::MIN), Just(-0.0f32)],
    ];
    prop::collection::vec(logit, 1..300).prop_map(|mut logits| {
        if logits.iter().all(|l| *l == f32::NEG_INFINITY) {
            logits[0] = 0.0;
        }
        logits
    })
}

fn options() -> impl Strategy<Value = SamplerOptions> {
    let filters = (prop_oneof![Just(0.0f32), 0.01f32..3.0], 0usize..50, 0.01f32..=1.0, 0.0f32..=1.0);
    let penalties = (0.5f32..2.0, -1.0f32..1.0, -1.0f32..1.0, prop_oneof![Just(-1i32), 1i32..20]);
    (filters, penalties, any::<u64>()).prop_map(|((temperature, top_k, top_p, min_p), penalties, seed)| {
        let (repetition_penalty, presence_penalty, frequency_penalty, repeat_last_n) = penalties;
        SamplerOptions {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            repeat_last_n,
            logit_bias: vec![(0, 0.5)],
            seed,
        }
    })
}

/// The candidates of `logits`, most likely first.
fn ranked(logits: &[f32]) -> Vec<Candidate> {
    let mut ranked: Vec<Candidate> = (0u32..).zip(logits).map(|(id, &score)| Candidate { id, score }).collect();
    ranked.sort_by(Candidate::rank);
    ranked
}

/// What a reader sees who looks at the whole text at once.
fn stop_by_search(text: &str, stops: &[String]) -> (String, Option<String>) {
    let found = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start, stop)));
    match found.min_by_key(|(end, start, _)| (*end, *start)) {
        Some((_, start, stop)) => (text[..start].to_string(), Some(stop.clone())),
        None => (text.to_string(), None),
    }
}

proptest! {
    #[test]
    fn a_token_is_always_from_the_distribution(
        logits in logits(), options in options(), history in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let history: Vec<u32> = history.iter().map(|index| index.index(logits.len()) as u32).collect();
        let mut sampler = Sampler::new(options.clone()).unwrap();
        let distribution = sampler.distribution(&logits, &history).unwrap();
        let total: f64 = distribution.iter().map(|(_, p)| p).sum();
        prop_assert!((total - 1.0).abs() < 1e-9);
        prop_assert!(distribution.windows(2).all(|pair| pair[0].0 < pair[1].0));
        prop_assert!(options.top_k == 0 || distribution.len() <= options.top_k);

        let sampled = sampler.sample(&logits, &history).unwrap();
        let drawn = distribution.iter().find(|(id, _)| *id == sampled.id);
        prop_assert!(drawn.is_some_and(|(_, p)| (p.ln() as f32 - sampled.drawn_logprob).abs() < 1e-5));
        prop_assert_eq!(sampled.num_candidates, distribution.len());
        prop_assert_eq!(sampled.logprob, log_softmax_at(&logits, sampled.id).unwrap());
        // A fresh sampler with the same options agrees: nothing is remembered between calls.
        prop_assert_eq!(Sampler::new(options).unwrap().sample(&logits, &history).unwrap(), sampled);
    }

    #[test]
    fn greedy_equals_top_1_and_the_first_of_a_stable_sort(logits in logits()) {
        let greedy = Sampler::new(SamplerOptions::greedy()).unwrap().sample(&logits, &[]).unwrap().id;
        let top_1 = SamplerOptions { top_k: 1, ..SamplerOptions::default() };
        prop_assert_eq!(greedy, Sampler::new(top_1).unwrap().sample(&logits, &[]).unwrap().id);
        prop_assert_eq!(greedy, ranked(&logits)[0].id);
    }

    #[test]
    fn a_filter_that_keeps_everything_changes_no_draw(logits in logits(), seed: u64) {
        let off = SamplerOptions { seed, ..SamplerOptions::default() };
        let all = SamplerOptions { top_k: logits.len(), ..off.clone() };
        let sampled = Sampler::new(off).unwrap().sample(&logits, &[]).unwrap();
        prop_assert_eq!(Sampler::new(all).unwrap().sample(&logits, &[]).unwrap(), sampled);
    }

    #[test]
    fn top_logprobs_is_the_head_of_a_full_sort(logits in logits(), k in 0usize..100) {
        let ids: Vec<u32> = top_logprobs(&logits, k).unwrap().iter().map(|top| top.0).collect();
        let expected: Vec<u32> = ranked(&logits).iter().take(k).map(|c| c.id).collect();
        prop_assert_eq!(ids, expected);
    }

    #[test]
    fn top_k_keeps_the_head_of_a_full_sort(logits in logits(), copies in 1usize..20, k in 1usize..100) {
        let logits = logits.repeat(copies);
        let mut candidates = Candidates::default();
        candidates.load(&logits).unwrap();
        candidates.keep_top(k);
        let mut head: Vec<u32> = ranked(&logits).iter().take(k).map(|c| c.id).collect();
        head.sort_unstable();
        prop_assert_eq!(candidates.as_slice().iter().map(|c| c.id).collect::<Vec<_>>(), head);
    }

    #[test]
    fn any_floats_give_a_token_or_an_error(bits in prop::collection::vec(any::<u32>(), 0..50), options in options()) {
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        if let Ok(sampled) = Sampler::new(options).unwrap().sample(&logits, &[]) {
            prop_assert!((sampled.id as usize) < logits.len());
        }
    }

    #[test]
    fn stops_do_not_depend_on_how_the_text_was_cut(
        text in "[abé]{0,40}", stops in prop::collection::vec("[abé]{1,5}", 0..4), cuts in prop::collection::vec(0usize..40, 0..10),
    ) {
        let mut matcher = StopMatcher::new(&stops, &[]).unwrap();
        let mut bounds: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).collect();
        bounds.extend([0, text.len()]);
        bounds.sort_unstable();
        let (mut shown, mut stopped) = (String::new(), None);
        let (expected, by) = stop_by_search(&text, &stops);
        for pair in bounds.windows(2) {
            let output = matcher.push(&text[pair[0]..pair[1]]);
            shown.push_str(&output.text);
            stopped = stopped.or(output.stopped);
            prop_assert!(expected.starts_with(&shown), "showed {shown:?} of {expected:?}");
        }
        shown.push_str(&matcher.finish());
        prop_assert_eq!((shown, stopped), (expected, by));
    }
}
