//! Weights of 4 bits: bit for bit what bitsandbytes makes of the tensors in `fixtures/bnb_4bit.safetensors`, written by
//! `scripts/fixtures/bnb_4bit.py`, and every instruction set against the scalar code.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use half::bf16;
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use tallow_kernels::four_bit::{Absmax, FourBit, FourBitError, Kind, dynamic_map};
use tallow_kernels::lanes::Element;
use tallow_kernels::rng::fill_normal;
use tallow_kernels::simd::Level;

const LEVELS: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];
const KINDS: [Kind; 2] = [Kind::Nf4, Kind::Fp4];

/// A storage type with its bits.
trait Bits: Element {
    fn read(bytes: &[u8]) -> Vec<Self>;
    fn bits(self) -> u32;
}

impl Bits for f32 {
    fn read(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Bits for bf16 {
    fn read(bytes: &[u8]) -> Vec<bf16> {
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect()
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

fn bits<T: Bits>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.bits()).collect()
}

fn random<T: Element>(len: usize, stream: u64) -> Vec<T> {
    let mut values = vec![0.0; len];
    fill_normal(&mut values, 17, stream, 0.05);
    values.into_iter().map(T::from_f32).collect()
}

struct Case<'a> {
    file: &'a SafeTensors<'a>,
    name: &'a str,
    kind: Kind,
    block: usize,
}

impl Case<'_> {
    fn part(&self, part: &str) -> safetensors::tensor::TensorView<'_> {
        self.file.tensor(&format!("{}.{part}", self.name)).unwrap()
    }

    fn f32s(&self, part: &str) -> Vec<f32> {
        f32::read(self.part(part).data())
    }

    fn check<T: Bits>(&self, level: Level) {
        let (x, name) = (self.part("x"), self.name);
        let values = T::read(x.data());
        let ours = FourBit::quantize(level, &values, x.shape(), self.kind, self.block, false).unwrap();
        assert_eq!(ours.codes(), self.part("codes").data(), "{name}: codes");
        let absmax = self.f32s("absmax");
        assert_eq!(bits(&ours.absmax().values()), bits(&absmax), "{name}: absmax");
        self.check_values::<T>(level, &ours, "values");

        // PyTorch's mean is a sum in an order of its own.
        let offset = self.f32s("offset")[0];
        let Absmax::Double { offset: mean, .. } = Absmax::double(&absmax) else { panic!("not double") };
        assert!((mean - offset).abs() <= 4.0 * f32::EPSILON * offset.abs(), "{name}: mean {mean} but {offset}");
        let double = Absmax::double_around(&absmax, offset);
        let codes = self.part("double_codes").data().to_vec();
        let theirs = Absmax::Double { codes, scales: self.f32s("scales"), offset };
        assert_eq!(double, theirs, "{name}: absmax in 8 bits");
        let ours = FourBit::from_parts(self.kind, x.shape(), self.block, ours.codes().to_vec(), double).unwrap();
        self.check_values::<T>(level, &ours, "double_values");
    }

    fn check_values<T: Bits>(&self, level: Level, ours: &FourBit, part: &str) {
        let mut out = vec![T::ZERO; ours.len()];
        ours.dequantize_into(level, 0..ours.len(), &mut out);
        assert_eq!(bits(&out), bits(&T::read(self.part(part).data())), "{} {level:?}: {part}", self.name);
    }
}

#[test]
fn codes_scales_and_values_are_those_of_bitsandbytes() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bnb_4bit.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(bits(&f32::read(file.tensor("dynamic_map").unwrap().data())), bits(dynamic_map()));
    let cases: Vec<&str> = file.names().into_iter().filter_map(|name| name.strip_suffix(".x")).collect();
    assert_eq!(cases.len(), 16);
    for (name, level) in cases.iter().flat_map(|name| LEVELS.map(|level| (*name, level))) {
        let mut parts = name.split('.');
        let kind = if parts.next() == Some("nf4") { Kind::Nf4 } else { Kind::Fp4 };
        let block = parts.next().unwrap().parse().unwrap();
        let case = Case { file: &file, name, kind, block };
        match case.part("x").dtype() {
            Dtype::F32 => case.check::<f32>(level),
            Dtype::BF16 => case.check::<bf16>(level),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// By the definition: the entry of the table times the magnitude, in f32, rounded once.
fn by_definition<T: Bits>(four: &FourBit) -> Vec<T> {
    let absmax = four.absmax().values();
    let value = |i: usize| {
        let byte = four.codes()[i / 2];
        let code = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        T::from_f32(four.kind().table()[usize::from(code)] * absmax[i / four.block()])
    };
    (0..four.len()).map(value).collect()
}

fn check_ranges<T: Bits>(kind: Kind, block: usize, len: usize, double: bool) {
    let x = random::<T>(len + 1, len as u64);
    // One element in, so that no pointer is aligned.
    let scalar = FourBit::quantize(Level::Scalar, &x[1..], &[len], kind, block, double).unwrap();
    let want = by_definition::<T>(&scalar);
    for level in LEVELS {
        assert_eq!(FourBit::quantize(level, &x[1..], &[len], kind, block, double).unwrap(), scalar, "{level:?}");
        for (start, end) in [(0, len), (1, len), (3, len / 2), (len / 2 + 1, len), (len / 3, len / 3), (len - 1, len)] {
            let range = start.min(end)..end;
            let mut out = vec![T::from_f32(9.0); range.len() + 1];
            scalar.dequantize_into(level, range.clone(), &mut out[1..]);
            assert_eq!(bits(&out[1..]), bits(&want[range.clone()]), "{kind:?} {block} {len} {level:?} {range:?}");
        }
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_definition() {
    for kind in KINDS {
        for block in [32, 64, 4096] {
            for len in [1, 2, 31, 33, 64, 95, 257, 5_001, 40_003] {
                check_ranges::<f32>(kind, block, len, len % 2 == 0);
                check_ranges::<bf16>(kind, block, len, len % 2 == 1);
            }
        }
    }
}

#[test]
fn rows_are_a_range_and_threads_change_nothing() {
    let x = random::<f32>(700 * 90, 3);
    let four = FourBit::quantize(Level::Avx2, &x, &[700, 90], Kind::Nf4, 64, true).unwrap();
    let (mut whole, mut rows) = (vec![0f32; 700 * 90], vec![0f32; 300 * 90]);
    four.dequantize_into(Level::Avx2, 0..x.len(), &mut whole);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    pool.install(|| four.dequantize_rows(Level::Avx2, 13..313, &mut rows));
    assert_eq!(rows, whole[13 * 90..313 * 90]);
    let again = pool.install(|| FourBit::quantize(Level::Avx2, &x, &[700, 90], Kind::Nf4, 64, true).unwrap());
    assert_eq!(again, four);
}

#[test]
fn sizes_are_those_of_the_paper() {
    let x = random::<f32>(1 << 20, 5);
    let bits = |block, double| {
        FourBit::quantize(Level::Avx2, &x, &[1 << 10, 1 << 10], Kind::Nf4, block, double).unwrap().bits_per_weight()
    };
    assert_eq!(bits(64, false), 4.5);
    assert!((bits(64, true) - 4.127).abs() < 1e-3);
}

#[test]
fn what_cannot_be_is_an_error() {
    let quantize = |x: &[f32], shape: &[usize], block| {
        FourBit::quantize(Level::Avx2, x, shape, Kind::Nf4, block, false).unwrap_err()
    };
    for block in [0, 16, 48, 8192] {
        assert_eq!(quantize(&[0.0; 4], &[4], block), FourBitError::Block(block));
    }
    assert!(quantize(&[0.0; 4], &[5], 64).to_string().contains("4 entries, but shape [5] asks for 5"));
    assert!(matches!(quantize(&[0.0; 4], &[usize::MAX, 2], 64), FourBitError::Shape(_)));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![1.0; 40_000];
        x[33_333] = bad;
        x[33_334] = bad;
        assert!(matches!(quantize(&x, &[40_000], 64), FourBitError::NotFinite { index: 33_333, .. }));
    }
    let parts = |codes, absmax| FourBit::from_parts(Kind::Fp4, &[100], 64, vec![0; codes], absmax);
    assert!(parts(50, Absmax::Plain(vec![1.0; 2])).is_ok());
    assert!(parts(49, Absmax::Plain(vec![1.0; 2])).is_err());
    assert!(parts(50, Absmax::Plain(vec![1.0; 3])).is_err());
    assert!(parts(50, Absmax::Double { codes: vec![0; 2], scales: vec![], offset: 0.0 }).is_err());
    let empty = FourBit::quantize::<f32>(Level::Avx2, &[], &[0, 8], Kind::Nf4, 64, true).unwrap();
    empty.dequantize_rows::<f32>(Level::Avx2, 0..0, &mut []);
}

proptest! {
    #[test]
    fn a_value_is_off_by_half_the_widest_gap_at_most(x in prop::collection::vec(-1e3f32..1e3, 1..300)) {
        // Widest gaps: -1 to -0.696 in NF4, 2/3 to 1 in FP4.
        for (kind, half) in [(Kind::Nf4, 0.152), (Kind::Fp4, 0.167)] {
            let four = FourBit::quantize(Level::Avx2, &x, &[x.len()], kind, 32, false).unwrap();
            let mut out = vec![0f32; x.len()];
            four.dequantize_into(Level::Avx2, 0..x.len(), &mut out);
            for (i, (a, b)) in x.iter().zip(&out).enumerate() {
                prop_assert!((a - b).abs() <= half * four.absmax().values()[i / 32], "{} {}", a, b);
            }
        }
    }
}
