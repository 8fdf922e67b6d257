//! The generator against the published vectors of Random123, and the distributions drawn from it.

use tallow_kernels::rng::*;

#[test]
fn philox_gives_the_published_vectors() {
    // Random123, kat_vectors, philox4x32 with 10 rounds.
    let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    for (counter, key, want) in [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
    ] {
        assert_eq!(philox4x32(counter, key), want);
    }
}

fn moments(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    (mean, (values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt())
}

#[test]
fn normals_have_the_right_moments() {
    let mut values = vec![0.0; 200_001];
    fill_normal(&mut values, 3, stream_of("model.embed_tokens.weight"), 0.02);
    let (mean, std) = moments(&values);
    assert!(mean.abs() < 2e-4 && (std - 0.02).abs() < 2e-4, "mean {mean}, std {std}");
    // A normal lies within one standard deviation with probability 0.6827, within two with 0.9545.
    for (bound, share) in [(0.02, 0.6827), (0.04, 0.9545)] {
        let within = values.iter().filter(|v| v.abs() < bound).count() as f64 / values.len() as f64;
        assert!((within - share).abs() < 0.005, "{within} within {bound}");
    }
}

#[test]
fn an_element_depends_on_seed_stream_and_index_alone() {
    let fill = |len: usize, seed, stream| {
        let mut values = vec![0.0; len];
        fill_normal(&mut values, seed, stream, 1.0);
        values
    };
    let (long, short) = (fill(50_000, 1, 2), fill(17, 1, 2));
    assert_eq!(long[..17], short);
    for i in [0, 1, 2, 3, 4, 8191, 8192, 8195, 49_999] {
        assert_eq!(long[i], normal(1, 2, i as u64), "element {i}");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    assert_eq!(pool.install(|| fill(50_000, 1, 2)), long);
    assert_ne!(fill(17, 2, 2), short);
    assert_ne!(fill(17, 1, 3), short);
    assert_ne!(stream_of("a.weight"), stream_of("b.weight"));
    assert_ne!(key_from(&[1, 2]), key_from(&[2, 1]));
}

#[test]
fn truncated_normals_stay_within() {
    let mut values = vec![0.0; 100_000];
    fill_truncated_normal(&mut values, 5, 1, 0.5, 2.0);
    assert!(values.iter().all(|v| v.abs() <= 1.0));
    // The standard deviation of a normal cut at 2 is 0.8796.
    let (mean, std) = moments(&values);
    assert!(mean.abs() < 5e-3 && (std - 0.5 * 0.8796).abs() < 3e-3, "mean {mean}, std {std}");
}

#[test]
fn uniforms_cover_their_interval() {
    let mut values = vec![0.0; 100_000];
    fill_uniform(&mut values, 5, 1, -3.0, 1.0);
    assert!(values.iter().all(|v| (-3.0..1.0).contains(v)));
    let (mean, std) = moments(&values);
    assert!((mean + 1.0).abs() < 0.02 && (std - 4.0 / 12f64.sqrt()).abs() < 0.01, "mean {mean}, std {std}");
}
