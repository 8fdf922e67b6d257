//! Counting the distinct pieces of a corpus: all that training needs to know of it.

use rayon::prelude::*;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use super::{TokenizerKind, TrainEvent, TrainOptions};
use crate::error::{Error, Result};
use crate::merge::MixMap;
use crate::split::Splitter;

/// Distinct pieces and how often each occurs, in byte order.
pub(crate) type Pieces = Vec<(Box<str>, u64)>;

/// Documents are gathered to about this many bytes, then counted on all threads.
const BATCH_BYTES: usize = 4 << 20;

/// Cuts documents the way the tokenizer-to-be will.
pub(crate) enum PieceCounter {
    ByteLevel(Splitter),
    Bert,
    /// `▁` for spaces, one in front, cut before each.
    Metaspace,
}

impl PieceCounter {
    pub(crate) fn new(options: &TrainOptions) -> Result<Self> {
        Ok(match options.kind {
            TokenizerKind::Bpe => Self::ByteLevel(options.pre.splitter()?),
            TokenizerKind::WordPiece => Self::Bert,
            TokenizerKind::Unigram => Self::Metaspace,
        })
    }

    pub(crate) fn count<S: AsRef<str> + Send + Sync>(
        &self,
        documents: impl Iterator<Item = Result<S>>,
        progress: &mut dyn FnMut(TrainEvent),
    ) -> Result<Pieces> {
        let mut total: MixMap<Box<str>, u64> = MixMap::default();
        let mut batch = Vec::new();
        let (mut gathered, mut seen, mut bytes) = (0, 0, 0);
        for document in documents {
            let document = document?;
            gathered += document.as_ref().len();
            batch.push(document);
            if gathered >= BATCH_BYTES {
                self.add_batch(&batch, &mut total)?;
                seen += batch.len() as u64;
                bytes += gathered as u64;
                progress(TrainEvent::Reading { documents: seen, bytes });
                batch.clear();
                gathered = 0;
            }
        }
        self.add_batch(&batch, &mut total)?;
        progress(TrainEvent::Reading { documents: seen + batch.len() as u64, bytes: bytes + gathered as u64 });
        let mut pieces: Pieces = total.into_iter().collect();
        // Byte order makes the result independent of threads and of hashing.
        pieces.par_sort_unstable();
        Ok(pieces)
    }

    fn add_batch<S: AsRef<str> + Send + Sync>(&self, batch: &[S], total: &mut MixMap<Box<str>, u64>) -> Result<()> {
        let counted = batch
            .par_iter()
            .try_fold(MixMap::default, |mut map: MixMap<Box<str>, u64>, document| {
                self.count_one(document.as_ref(), &mut |piece| match map.get_mut(piece) {
                    Some(count) => *count += 1,
                    None => {
                        map.insert(piece.into(), 1);
                    }
                })?;
                Ok::<_, Error>(map)
            })
            .try_reduce_with(|a, b| {
                let (mut large, small) = if a.len() >= b.len() { (a, b) } else { (b, a) };
                small.into_iter().for_each(|(piece, count)| *large.entry(piece).or_default() += count);
                Ok(large)
            });
        for (piece, count) in counted.transpose()?.unwrap_or_default() {
            *total.entry(piece).or_default() += count;
        }
        Ok(())
    }

    fn count_one(&self, text: &str, add: &mut dyn FnMut(&str)) -> Result<()> {
        match self {
            Self::ByteLevel(splitter) => splitter
                .split(text, &mut |piece| {
                    add(piece);
                    Ok(())
                })
                .map_err(Error::Encode),
            Self::Bert => {
                let mut normal = NormalizedString::from(text);
                BertNormalizer::default().normalize(&mut normal)?;
                let mut cut = PreTokenizedString::from(normal);
                BertPreTokenizer.pre_tokenize(&mut cut)?;
                let splits = cut.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
                splits.iter().filter(|(piece, ..)| !piece.is_empty()).for_each(|(piece, ..)| add(piece));
                Ok(())
            }
            Self::Metaspace => {
                let marked = format!(" {}", text.strip_prefix(' ').unwrap_or(text)).replace(' ', "▁");
                let mut start = 0;
                for (at, _) in marked.match_indices('▁').skip(1) {
                    add(&marked[start..at]);
                    start = at;
                }
                add(&marked[start..]);
                Ok(())
            }
        }
    }
}
