//! Squares of values turned in registers.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::{
    __m512i, _mm512_shuffle_i32x4, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

/// The transpose of 16 x 16 values of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let mut two = r;
    for i in 0..8 {
        two[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        two[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // `four[4 g + j]`: of rows 4 g to 4 g + 3 the columns j, 4 + j, 8 + j and 12 + j, one in a quarter.
    let mut four = two;
    for g in [0, 4, 8, 12] {
        four[g] = _mm512_unpacklo_epi64(two[g], two[g + 2]);
        four[g + 1] = _mm512_unpackhi_epi64(two[g], two[g + 2]);
        four[g + 2] = _mm512_unpacklo_epi64(two[g + 1], two[g + 3]);
        four[g + 3] = _mm512_unpackhi_epi64(two[g + 1], two[g + 3]);
    }
    let mut all = four;
    for j in 0..4 {
        let upper_even = _mm512_shuffle_i32x4::<0x88>(four[j], four[4 + j]);
        let upper_odd = _mm512_shuffle_i32x4::<0xdd>(four[j], four[4 + j]);
        let lower_even = _mm512_shuffle_i32x4::<0x88>(four[8 + j], four[12 + j]);
        let lower_odd = _mm512_shuffle_i32x4::<0xdd>(four[8 + j], four[12 + j]);
        all[j] = _mm512_shuffle_i32x4::<0x88>(upper_even, lower_even);
        all[8 + j] = _mm512_shuffle_i32x4::<0xdd>(upper_even, lower_even);
        all[4 + j] = _mm512_shuffle_i32x4::<0x88>(upper_odd, lower_odd);
        all[12 + j] = _mm512_shuffle_i32x4::<0xdd>(upper_odd, lower_odd);
    }
    all
}
