//! Pieces already encoded: text repeats its words, so most pieces are looked up rather than merged.

use crate::merge::MixMap;

/// Pieces longer than this are not remembered: they seldom repeat.
const MAX_PIECE: usize = 128;
/// The cache starts over past this many pieces, which bounds its memory (about 16 MB).
const MAX_PIECES: usize = 1 << 18;

/// One thread's memory of pieces and their ids.
#[derive(Default)]
pub(crate) struct PieceCache {
    pieces: MixMap<Box<[u8]>, (u32, u32)>,
    ids: Vec<u32>,
    symbols: Vec<u32>,
    ranks: Vec<u64>,
}

impl PieceCache {
    /// Appends the ids of `piece` to `out` if they are known.
    #[inline]
    pub(crate) fn lookup(&self, piece: &[u8], out: &mut Vec<u32>) -> bool {
        match self.pieces.get(piece) {
            Some(&(start, count)) => {
                out.extend_from_slice(&self.ids[start as usize..(start + count) as usize]);
                true
            }
            None => false,
        }
    }

    pub(crate) fn insert(&mut self, piece: &[u8], ids: &[u32]) {
        if piece.len() > MAX_PIECE {
            return;
        }
        if self.pieces.len() >= MAX_PIECES {
            self.pieces.clear();
            self.ids.clear();
        }
        self.pieces.insert(piece.into(), (self.ids.len() as u32, ids.len() as u32));
        self.ids.extend_from_slice(ids);
    }

    /// Room to merge in: symbols and ranks.
    pub(crate) fn scratch(&mut self) -> (&mut Vec<u32>, &mut Vec<u64>) {
        (&mut self.symbols, &mut self.ranks)
    }
}
