//! [`TensorSource`]: tensors by name, whatever file they are in.

use std::io::Read;
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::gguf::dequantize;
use crate::{DType, Error, Result};

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dtype in the file.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements. Readers have checked that it does not overflow.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Tensors by name.
pub trait TensorSource: Send + Sync {
    /// All names, in an order that depends on the file only.
    fn names(&self) -> Vec<&str>;

    /// What the file says of a tensor.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// The bytes of a tensor as they lie in the file.
    ///
    /// # Errors
    /// If there is no such tensor.
    fn bytes(&self, name: &str) -> Result<&[u8]>;

    /// The file that holds a tensor, or the source itself where there is no such tensor.
    fn path_of(&self, name: &str) -> &Path;

    /// Reads a tensor as f32, converting or dequantizing it; `out` has its number of elements.
    ///
    /// # Errors
    /// If there is no such tensor, `out` has another length, or its dtype is no number that f32 can hold.
    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let path = self.path_of(name);
        let info = self.info(name).ok_or_else(|| Error::tensor(path, name, "there is no such tensor"))?;
        if info.num_elements() != out.len() {
            let reason = format!("has {} elements but {} were asked for", info.num_elements(), out.len());
            return Err(Error::tensor(path, name, reason));
        }
        convert(self.bytes(name)?, info.dtype, out)
            .ok_or_else(|| Error::tensor(path, name, format!("holds {}, which cannot be read as weights", info.dtype)))
    }
}

/// Elements a task converts at once; a multiple of every block.
const CHUNK: usize = 1 << 16;

/// `None` if the dtype is no float. `bytes` holds exactly `out.len()` elements.
fn convert(bytes: &[u8], dtype: DType, out: &mut [f32]) -> Option<()> {
    let chunk_bytes = dtype.bytes(CHUNK)?;
    let each: fn(&[u8], &mut [f32]) = match dtype {
        DType::F64 => |b, o| fill(b, o, |x: [u8; 8]| f64::from_le_bytes(x) as f32),
        DType::F32 => |b, o| fill(b, o, f32::from_le_bytes),
        DType::F16 => |b, o| fill(b, o, |x: [u8; 2]| f16::from_le_bytes(x).to_f32()),
        DType::BF16 => |b, o| fill(b, o, |x: [u8; 2]| bf16::from_le_bytes(x).to_f32()),
        DType::Ggml(kind) => {
            let blocks = dequantize::row_function(kind);
            out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(chunk_bytes)).for_each(|(o, b)| blocks(b, o));
            return Some(());
        }
        _ => return None,
    };
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(chunk_bytes)).for_each(|(o, b)| each(b, o));
    Some(())
}

fn fill<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *o = convert(*b);
    }
}

/// Checks that a file can be opened without waiting (a pipe would block) and returns its size.
fn plain_size(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    match meta.is_file() {
        true => Ok(meta.len()),
        false => Err(Error::malformed(path, "is not a plain file")),
    }
}

/// Reads a file of at most `limit` bytes, however large it says it is.
pub(crate) fn read_capped(path: &Path, limit: u64, what: &str) -> Result<Vec<u8>> {
    let size = plain_size(path)?;
    let mut bytes = vec![];
    if size <= limit {
        let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    }
    match size.max(bytes.len() as u64) {
        size if size > limit => {
            Err(Error::malformed(path, format!("{size} bytes are too many for {what} (at most {limit})")))
        }
        _ => Ok(bytes),
    }
}

/// What `git clone` leaves in the place of a large file where Git LFS is not installed.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Maps a file for reading.
#[allow(unsafe_code, reason = "mapping a file")]
pub(crate) fn source_map(path: &Path) -> Result<memmap2::Mmap> {
    if plain_size(path)? == 0 {
        return Err(Error::malformed(path, "is empty; fetch it again"));
    }
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: the mapping is private to this process and only read. A file that another process cuts short while it is
    // mapped ends this one by a signal, as with every program that maps its weights; it cannot read other memory.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    if map.starts_with(LFS_POINTER) {
        return Err(Error::malformed(path, "is a pointer of Git LFS, not the file itself; run `git lfs pull`"));
    }
    Ok(map)
}
