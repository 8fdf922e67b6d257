//! A seeded permutation that is computed at any index, without a table.

/// A bijection of `0..len`, decided by a key.
///
/// A balanced Feistel network over the smallest even number of bits that holds `len`, walked until it lands below
/// `len` (at most four steps on average): constant memory, and index `i` never depends on how the indices before it
/// were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; 6],
}

impl Permutation {
    pub(crate) fn new(len: u64, key: u64) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        let keys = std::array::from_fn(|round| mix(key ^ mix(round as u64 + 1)));
        Self { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Where index `i < len` goes.
    pub(crate) fn at(&self, i: u64) -> u64 {
        assert!(i < self.len, "index {i} of a permutation of {}", self.len);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = i;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            x = (left << self.half_bits) | right;
            if x < self.len {
                return x;
            }
        }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014, with Stafford's constants): every input bit reaches every output bit.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_hit_once() {
        for len in [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1024, 1025, 5000] {
            let p = Permutation::new(len, len ^ 99);
            let mut seen = vec![false; len as usize];
            for i in 0..len {
                assert!(!std::mem::replace(&mut seen[p.at(i) as usize], true), "{len}: {i} lands on a taken place");
            }
        }
    }

    #[test]
    fn keys_give_different_orders_and_order_is_mixed() {
        let (a, b) = (Permutation::new(1000, 1), Permutation::new(1000, 2));
        let same = (0..1000).filter(|&i| a.at(i) == b.at(i)).count();
        let fixed = (0..1000).filter(|&i| a.at(i) == i).count();
        let neighbours = (1..1000).filter(|&i| a.at(i).abs_diff(a.at(i - 1)) == 1).count();
        assert!(same < 10 && fixed < 10 && neighbours < 15, "{same} {fixed} {neighbours}");
    }

    /// A change here changes the order of data of every run that is being resumed.
    #[test]
    fn the_order_is_the_same_for_ever() {
        let p = Permutation::new(10, 42);
        assert_eq!((0..10).map(|i| p.at(i)).collect::<Vec<_>>(), [4, 5, 1, 7, 0, 3, 9, 2, 6, 8]);
        let p = Permutation::new(1_000_003, 7);
        assert_eq!([0, 1, 999_999].map(|i| p.at(i)), [658_557, 936_259, 161_352]);
    }

    #[test]
    fn large_domains_stay_in_range() {
        let p = Permutation::new(u64::from(u32::MAX) * 1000, 7);
        assert!((0..1000).all(|i| p.at(i * 1_000_003) < u64::from(u32::MAX) * 1000));
    }
}
