//! Byte-pair merging: the pair of lowest rank first, the leftmost among equals, until no pair has a rule.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

/// A fast hash for keys that are already well mixed or short: multiply and fold. Not for keys an attacker chooses to
/// collide; here they are token ids of one vocabulary.
#[derive(Default, Clone, Copy)]
pub(crate) struct MixHasher(u64);

impl Hasher for MixHasher {
    #[inline]
    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value ^ 0x2545_F491_4F6C_DD1D) * 0x9E37_79B9_7F4A_7C15u128;
        self.0 = (product ^ (product >> 64)) as u64;
    }

    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            self.write_u64(u64::from_le_bytes(chunk.try_into().unwrap_or([0; 8])));
        }
        let mut last = [0; 8];
        let rest = chunks.remainder();
        last[..rest.len()].copy_from_slice(rest);
        self.write_u64(u64::from_le_bytes(last) ^ ((bytes.len() as u64) << 56));
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
}

pub(crate) type MixMap<K, V> = HashMap<K, V, BuildHasherDefault<MixHasher>>;

/// Above this many symbols a heap beats scanning for the lowest rank.
const HEAP_FROM: usize = 48;
const NONE: u32 = u32::MAX;

/// The merge rules of a vocabulary.
#[derive(Debug, Clone)]
pub(crate) struct MergeTable {
    /// `left << 32 | right` to `rank << 32 | merged`.
    rules: MixMap<u64, u64>,
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl MergeTable {
    /// Rules in rank order. A pair listed twice keeps its last rank, as in the `tokenizers` crate.
    pub(crate) fn new(merges: &[(u32, u32, u32)]) -> Self {
        let ranked = merges.iter().enumerate();
        Self { rules: ranked.map(|(rank, &(l, r, m))| (pair(l, r), (rank as u64) << 32 | u64::from(m))).collect() }
    }

    #[inline]
    fn rank(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        self.rules.get(&pair(left, right)).map(|&rule| ((rule >> 32) as u32, rule as u32))
    }

    /// Merges `symbols` in place; `ranks` is scratch space.
    pub(crate) fn merge(&self, symbols: &mut Vec<u32>, ranks: &mut Vec<u64>) {
        if symbols.len() < 2 {
            return;
        }
        if symbols.len() >= HEAP_FROM {
            return self.merge_long(symbols);
        }
        let rule = |l: u32, r: u32| self.rules.get(&pair(l, r)).copied().unwrap_or(u64::MAX);
        ranks.clear();
        ranks.extend(symbols.windows(2).map(|w| rule(w[0], w[1])));
        loop {
            let mut best = (u64::MAX, 0);
            for (at, &rank) in ranks.iter().enumerate() {
                if rank < best.0 {
                    best = (rank, at);
                }
            }
            let (found, at) = best;
            if found == u64::MAX {
                return;
            }
            symbols[at] = found as u32;
            symbols.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = rule(symbols[at - 1], symbols[at]);
            }
            if at < ranks.len() {
                ranks[at] = rule(symbols[at], symbols[at + 1]);
            }
        }
    }

    /// The same for long pieces: a heap of candidate pairs over a linked list, `O(n log n)`.
    fn merge_long(&self, symbols: &mut Vec<u32>) {
        let count = symbols.len() as u32;
        let mut next: Vec<u32> = (1..=count).map(|i| if i == count { NONE } else { i }).collect();
        let mut previous: Vec<u32> = (0..count).map(|i| i.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<Reverse<(u32, u32, u32, u32)>>, symbols: &[u32], at: u32, right: u32| {
            let (l, r) = (symbols[at as usize], symbols[right as usize]);
            if let Some((rank, _)) = self.rank(l, r) {
                heap.push(Reverse((rank, at, l, r)));
            }
        };
        for at in 0..count - 1 {
            offer(&mut heap, symbols, at, at + 1);
        }
        while let Some(Reverse((_, at, left, right))) = heap.pop() {
            let neighbour = next[at as usize];
            // An entry is stale when either side has merged with something else since.
            if neighbour == NONE || symbols[at as usize] != left || symbols[neighbour as usize] != right {
                continue;
            }
            let Some((_, merged)) = self.rank(left, right) else { continue };
            symbols[at as usize] = merged;
            symbols[neighbour as usize] = NONE;
            let after = next[neighbour as usize];
            next[at as usize] = after;
            next[neighbour as usize] = NONE;
            if after != NONE {
                previous[after as usize] = at;
                offer(&mut heap, symbols, at, after);
            }
            let before = previous[at as usize];
            if before != NONE {
                offer(&mut heap, symbols, before, at);
            }
        }
        symbols.retain(|&symbol| symbol != NONE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_heap_and_the_scan_agree(
            rules in proptest::collection::vec((0u32..6, 0u32..6), 0..12),
            text in proptest::collection::vec(0u32..4, 0..46),
        ) {
            let mut seen = std::collections::HashSet::new();
            let merges: Vec<_> = rules.into_iter().filter(|r| seen.insert(*r)).enumerate()
                .map(|(i, (l, r))| (l, r, 4 + i as u32)).collect();
            let table = MergeTable::new(&merges);
            let (mut short, mut long) = (text.clone(), text);
            table.merge(&mut short, &mut Vec::new());
            if long.len() > 1 {
                table.merge_long(&mut long);
            }
            prop_assert_eq!(short, long);
        }
    }
}
