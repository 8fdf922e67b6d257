//! Block-quantized types to f32. The layouts are those of ggml; the tests compare with candle's.

use half::f16;

use super::GgmlType;

/// Dequantizes whole blocks of `kind`: `bytes` holds exactly `out.len()` elements; what is past the shorter of the two is left.
pub fn dequantize_blocks(kind: GgmlType, bytes: &[u8], out: &mut [f32]) {
    row_function(kind)(bytes, out);
}

/// One block of `Q8_0`: 32 `values` as a scale in f16, the largest magnitude over 127, and 32 rounded multiples of it.
///
/// # Panics
/// If there are not 32 values or `block` has not 34 bytes.
pub fn quantize_q8_0(values: &[f32], block: &mut [u8]) {
    assert!(values.len() == 32 && block.len() == 34, "a block of Q8_0 is 32 values in 34 bytes");
    let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, x) in block[2..].iter_mut().zip(values) {
        *byte = (x * inverse).round() as i8 as u8;
    }
}

/// Dequantizes whole blocks: `bytes` holds exactly `out.len()` elements.
pub(crate) fn row_function(kind: GgmlType) -> fn(&[u8], &mut [f32]) {
    match kind {
        GgmlType::Q4_0 => |b, o| blocks::<18, 32>(b, o, q4_0),
        GgmlType::Q4_1 => |b, o| blocks::<20, 32>(b, o, q4_1),
        GgmlType::Q5_0 => |b, o| blocks::<22, 32>(b, o, q5_0),
        GgmlType::Q5_1 => |b, o| blocks::<24, 32>(b, o, q5_1),
        GgmlType::Q8_0 => |b, o| blocks::<34, 32>(b, o, q8_0),
        GgmlType::Q2_K => |b, o| blocks::<84, 256>(b, o, q2_k),
        GgmlType::Q3_K => |b, o| blocks::<110, 256>(b, o, q3_k),
        GgmlType::Q4_K => |b, o| blocks::<144, 256>(b, o, q4_k),
        GgmlType::Q5_K => |b, o| blocks::<176, 256>(b, o, q5_k),
        GgmlType::Q6_K => |b, o| blocks::<210, 256>(b, o, q6_k),
        GgmlType::Q8_K => |b, o| blocks::<292, 256>(b, o, q8_k),
    }
}

fn blocks<const BYTES: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; N]),
) {
    for (b, o) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        block(b, o);
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for i in 0..16 {
        out[i] = d * (f32::from(b[2 + i] & 15) - 8.0);
        out[i + 16] = d * (f32::from(b[2 + i] >> 4) - 8.0);
    }
}

fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for i in 0..16 {
        out[i] = d * f32::from(b[4 + i] & 15) + m;
        out[i + 16] = d * f32::from(b[4 + i] >> 4) + m;
    }
}

/// The fifth bits of a block of 32 at `at`.
fn fifth_bits(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let (d, high) = (half(b, 0), fifth_bits(b, 2));
    for i in 0..16 {
        let (low, up) = (u32::from(b[6 + i] & 15), u32::from(b[6 + i] >> 4));
        out[i] = d * ((low | (high >> i & 1) << 4) as f32 - 16.0);
        out[i + 16] = d * ((up | (high >> (i + 16) & 1) << 4) as f32 - 16.0);
    }
}

fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, high) = (half(b, 0), half(b, 2), fifth_bits(b, 4));
    for i in 0..16 {
        let (low, up) = (u32::from(b[8 + i] & 15), u32::from(b[8 + i] >> 4));
        out[i] = d * (low | (high >> i & 1) << 4) as f32 + m;
        out[i + 16] = d * (up | (high >> (i + 16) & 1) << 4) as f32 + m;
    }
}

fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for i in 0..32 {
        out[i] = d * f32::from(b[2 + i] as i8);
    }
}

fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, quants) = (&b[..16], &b[16..80]);
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (i, o) in out.iter_mut().enumerate() {
        // Each half of 128 takes 32 bytes, four values a byte, 32 apart.
        let (part, within) = (i / 128, i % 128);
        let q = quants[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let scale = scales[i / 16];
        *o = d * f32::from(scale & 15) * f32::from(q) - dmin * f32::from(scale >> 4);
    }
}

fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let (mask, quants, packed) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(b, 108);
    for (i, o) in out.iter_mut().enumerate() {
        let (part, within) = (i / 128, i % 128);
        let low = quants[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let high = mask[within % 32] >> (4 * part + within / 32) & 1;
        let q = i32::from(low) - if high == 0 { 4 } else { 0 };
        *o = d * (six_bits_q3(packed, i / 16) - 32) as f32 * q as f32;
    }
}

/// Scale `j` of 16: four low bits in the first eight bytes, two high bits in the last four.
fn six_bits_q3(packed: &[u8], j: usize) -> i32 {
    let low = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
    let high = packed[8 + j % 4] >> (2 * (j / 4)) & 3;
    i32::from(low | high << 4)
}

/// Scale and minimum `j` of 8 in twelve bytes.
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin, packed, quants) = (half(b, 0), half(b, 2), &b[4..16], &b[16..]);
    for j in 0..8 {
        let (scale, min) = scale_min(packed, j);
        let (d, m) = (d * scale, dmin * min);
        for l in 0..32 {
            let byte = quants[32 * (j / 2) + l];
            out[32 * j + l] = d * f32::from(if j % 2 == 0 { byte & 15 } else { byte >> 4 }) - m;
        }
    }
}

fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin, packed, high, quants) = (half(b, 0), half(b, 2), &b[4..16], &b[16..48], &b[48..]);
    for j in 0..8 {
        let (scale, min) = scale_min(packed, j);
        let (d, m) = (d * scale, dmin * min);
        for l in 0..32 {
            let byte = quants[32 * (j / 2) + l];
            let low = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            out[32 * j + l] = d * f32::from(low | (high[l] >> j & 1) << 4) - m;
        }
    }
}

fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half(b, 208);
    for (i, o) in out.iter_mut().enumerate() {
        // Each half of 128: two runs of 64 share bytes of `low`, four runs of 32 share bytes of `high`.
        let (part, within) = (i / 128, i % 128);
        let nibble = low[64 * part + within % 64] >> (4 * (within / 64)) & 15;
        let top = high[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let q = i32::from(nibble | top << 4) - 32;
        *o = d * f32::from(scales[i / 16] as i8) * q as f32;
    }
}

fn q8_k(b: &[u8; 292], out: &mut [f32; 256]) {
    let d = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    for i in 0..256 {
        out[i] = d * f32::from(b[4 + i] as i8);
    }
}
