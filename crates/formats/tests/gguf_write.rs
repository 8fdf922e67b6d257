//! What is written as GGUF is read back: every type of value, tensors of several dtypes, and candle reads it too.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

mod support;

use candle_core::quantized::gguf_file;
use proptest::prelude::*;
use support::{Folder, assert_says, values};
use tallow_formats::gguf::{GgmlType, GgufFile, GgufTensor, GgufValue, MetaType, MetaValue, write_gguf};
use tallow_formats::{DType, TensorSource};

/// What the reader makes of a written value.
fn read_as(value: &MetaValue) -> GgufValue {
    match value {
        MetaValue::U8(x) => GgufValue::U64((*x).into()),
        MetaValue::U16(x) => GgufValue::U64((*x).into()),
        MetaValue::U32(x) => GgufValue::U64((*x).into()),
        MetaValue::U64(x) => GgufValue::U64(*x),
        MetaValue::I8(x) => GgufValue::I64((*x).into()),
        MetaValue::I16(x) => GgufValue::I64((*x).into()),
        MetaValue::I32(x) => GgufValue::I64((*x).into()),
        MetaValue::I64(x) => GgufValue::I64(*x),
        MetaValue::F32(x) => GgufValue::F32(*x),
        MetaValue::F64(x) => GgufValue::F64(*x),
        MetaValue::Bool(x) => GgufValue::Bool(*x),
        MetaValue::String(x) => GgufValue::String(x.clone()),
        MetaValue::Array(_, values) => GgufValue::Array(values.iter().map(read_as).collect()),
    }
}

fn one_value() -> impl Strategy<Value = MetaValue> {
    prop_oneof![
        any::<u8>().prop_map(MetaValue::U8),
        any::<i8>().prop_map(MetaValue::I8),
        any::<u16>().prop_map(MetaValue::U16),
        any::<i16>().prop_map(MetaValue::I16),
        any::<u32>().prop_map(MetaValue::U32),
        any::<i32>().prop_map(MetaValue::I32),
        any::<f32>().prop_map(MetaValue::F32),
        any::<bool>().prop_map(MetaValue::Bool),
        any::<String>().prop_map(MetaValue::String),
        any::<u64>().prop_map(MetaValue::U64),
        any::<i64>().prop_map(MetaValue::I64),
        any::<f64>().prop_map(MetaValue::F64),
    ]
}

fn any_value() -> impl Strategy<Value = MetaValue> {
    let same = |value: MetaValue, n: usize| MetaValue::Array(value.kind(), vec![value; n]);
    let array = (one_value(), 0..4usize).prop_map(move |(value, n)| same(value, n));
    let nested = (one_value(), 0..4usize, 0..3usize).prop_map(move |(value, n, m)| same(same(value, n), m));
    prop_oneof![3 => one_value(), 1 => array, 1 => nested]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_metadata_and_tensors_come_back(
        keys in proptest::collection::btree_map("[a-z.]{1,12}", any_value(), 0..8),
        tensors in proptest::collection::btree_map("[a-z.]{1,12}", proptest::collection::vec(any::<f32>(), 0..20), 0..5),
    ) {
        let folder = Folder::new();
        let path = folder.path().join("m.gguf");
        let metadata: Vec<(&str, MetaValue)> = keys.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let written: Vec<GgufTensor> = tensors
            .iter()
            .map(|(name, x)| GgufTensor::from_values(name.clone(), vec![x.len()], DType::F32, || Ok::<_, String>(x.clone())))
            .collect();
        write_gguf(&path, &metadata, &written).unwrap();
        let file = GgufFile::open(&path).unwrap();
        // As text: NaN is no equal of itself.
        let expected: Vec<_> = metadata.iter().map(|(k, v)| ((*k).to_owned(), read_as(v))).collect();
        prop_assert_eq!(format!("{:?}", file.metadata()), format!("{expected:?}"));
        prop_assert_eq!(file.names(), tensors.keys().map(String::as_str).collect::<Vec<_>>());
        for (name, x) in &tensors {
            let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
            prop_assert_eq!(file.bytes(name).unwrap(), &bytes[..]);
        }
    }
}

#[test]
fn dtypes_blocks_and_shapes_are_kept_and_candle_reads_them() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let x = [1.5f32, -2.0, 0.25, 3.0, 65_504.0, 0.0];
    let of =
        |dtype| GgufTensor::from_values(format!("{dtype}"), vec![2, 3], dtype, move || Ok::<_, String>(x.to_vec()));
    let blocks: Vec<u8> = (0..68).map(|i| if i % 34 == 1 { 0x3c } else { (i % 34 * 3) as u8 }).collect();
    let q8 = GgufTensor::from_bytes("q".into(), vec![2, 32], DType::Ggml(GgmlType::Q8_0), || {
        Ok::<_, String>(blocks.clone())
    });
    let tensors = [of(DType::F16), of(DType::F32), q8, of(DType::BF16)];
    write_gguf(&path, &[("general.architecture", MetaValue::String("llama".into()))], &tensors).unwrap();
    let file = GgufFile::open(&path).unwrap();
    for dtype in [DType::F16, DType::F32] {
        assert_eq!(file.info(&dtype.to_string()).unwrap().shape, [2, 3]);
        assert_eq!(values(&file, &dtype.to_string()), x);
    }
    assert_eq!(values(&file, "BF16"), [1.5, -2.0, 0.25, 3.0, 65_536.0, 0.0]);
    assert_eq!(file.bytes("q").unwrap(), blocks);
    assert_eq!(std::fs::metadata(&path).unwrap().len() % 32, 0);
    let mut reader = std::fs::File::open(&path).unwrap();
    let theirs = gguf_file::Content::read(&mut reader).unwrap();
    assert_eq!(theirs.tensor_infos["F16"].shape.dims(), [2, 3]);
    let q = theirs.tensor(&mut reader, "q", &candle_core::Device::Cpu).unwrap();
    let q = q.dequantize(&candle_core::Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(q, values(&file, "q"));
}

#[test]
fn what_no_reader_could_take_is_not_written() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let floats = |name: &str, shape: &[usize], dtype, n: usize| {
        GgufTensor::from_values(name.into(), shape.to_vec(), dtype, move || Ok::<_, String>(vec![0.0; n]))
    };
    let q4 = DType::Ggml(GgmlType::Q4_K);
    type Case<'a> = (Vec<(&'a str, MetaValue)>, Vec<GgufTensor<'a>>, &'a str);
    let cases: Vec<Case> = vec![
        (vec![("a", MetaValue::U8(1)), ("a", MetaValue::U8(1))], vec![], "`a`: is there twice"),
        (vec![("a", MetaValue::Array(MetaType::U8, vec![MetaValue::I8(1)]))], vec![], "an array of U8 holds I8"),
        (vec![("general.alignment", MetaValue::U32(64))], vec![], "leave the key out"),
        (vec![], vec![floats("t", &[1], DType::F32, 1), floats("t", &[1], DType::F32, 1)], "is there twice"),
        (vec![], vec![floats("t", &[2], DType::F32, 1)], "4 bytes for shape [2] of F32, which takes 8"),
        (vec![], vec![floats("t", &[32], q4, 32)], "no whole number of Q4_K blocks"),
        (vec![], vec![floats("t", &[1], DType::U8, 1)], "GGUF has no type U8"),
        (vec![], vec![floats("t", &[1; 5], DType::F32, 1)], "5 dimensions"),
        (vec![], vec![floats(&"n".repeat(64), &[1], DType::F32, 1)], "64 bytes"),
        (vec![], vec![floats("t", &[usize::MAX, 2], DType::F32, 1)], "more than a computer can hold"),
    ];
    for (metadata, tensors, says) in cases {
        assert_says(says, &write_gguf(&path, &metadata, &tensors).unwrap_err().to_string(), &[says]);
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "{says}: something was left");
    }
}
