//! What this crate asks of a tokenizer.

use crate::{Error, Result};

/// Text to token ids, as [`prepare`](crate::prepare) needs it.
///
/// Implementations are called from several threads at once, and must give the same ids for the same document whatever
/// else is in the call: that is what makes the order of the output independent of the number of threads.
pub trait Encode: Send + Sync {
    /// Token ids of each document, without any special token added; `[docs.len()]` lists, in the same order.
    ///
    /// # Errors
    /// If a document cannot be encoded.
    fn encode_documents(&self, docs: &[&str]) -> Result<Vec<Vec<u32>>>;

    /// Number of ids; every id is below it. Decides whether shards keep 2 or 4 bytes a token.
    fn vocab_size(&self) -> usize;

    /// The id that ends a document, if there is one.
    fn eos_id(&self) -> Option<u32>;

    /// The id that begins a document, if there is one.
    fn bos_id(&self) -> Option<u32>;

    /// A hash of everything that decides the ids. Two encoders with the same fingerprint give the same ids.
    fn fingerprint(&self) -> String;
}

/// The encoder without a tokenizer: one id a byte of UTF-8, and 256 for the end of a document.
///
/// A byte-level model needs nothing else, and it is what tests and examples prepare data with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Utf8Bytes;

impl Utf8Bytes {
    /// The id behind every document.
    pub const EOS: u32 = 256;
}

impl Encode for Utf8Bytes {
    fn encode_documents(&self, docs: &[&str]) -> Result<Vec<Vec<u32>>> {
        Ok(docs.iter().map(|d| d.bytes().map(u32::from).collect()).collect())
    }

    fn vocab_size(&self) -> usize {
        257
    }

    fn eos_id(&self) -> Option<u32> {
        Some(Self::EOS)
    }

    fn bos_id(&self) -> Option<u32> {
        None
    }

    fn fingerprint(&self) -> String {
        "utf8-bytes-v1".to_owned()
    }
}

/// Ids of `docs`, checked against what [`Encode`] promises.
pub(crate) fn encode_checked(encoder: &dyn Encode, docs: &[&str]) -> Result<Vec<Vec<u32>>> {
    let ids = encoder.encode_documents(docs)?;
    if ids.len() != docs.len() {
        return Err(Error::EncoderContract { what: format!("{} lists for {} documents", ids.len(), docs.len()) });
    }
    let vocab = encoder.vocab_size();
    match ids.iter().flatten().find(|&&id| id as usize >= vocab) {
        Some(id) => Err(Error::EncoderContract { what: format!("id {id} with a vocabulary of {vocab}") }),
        None => Ok(ids),
    }
}

impl Encode for tallow_tokenizer::Tokenizer {
    fn encode_documents(&self, docs: &[&str]) -> Result<Vec<Vec<u32>>> {
        tallow_tokenizer::Tokenizer::encode_documents(self, docs).map_err(|e| Error::Encode { source: Box::new(e) })
    }

    fn vocab_size(&self) -> usize {
        tallow_tokenizer::Tokenizer::vocab_size(self)
    }

    fn eos_id(&self) -> Option<u32> {
        tallow_tokenizer::Tokenizer::eos_id(self)
    }

    fn bos_id(&self) -> Option<u32> {
        tallow_tokenizer::Tokenizer::bos_id(self)
    }

    fn fingerprint(&self) -> String {
        tallow_tokenizer::Tokenizer::fingerprint(self)
    }
}
