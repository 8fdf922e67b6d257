//! Which instruction set the kernels use.

use std::sync::OnceLock;

/// Instruction sets, in rising order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Portable code.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 and AMX's tiles of bf16.
    Amx,
}

/// Instructions that multiply bf16 and add in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16 {
    /// AVX512-BF16: pairs, in vectors.
    Pairs,
    /// AMX: tiles.
    Tiles,
}

/// With which instructions bf16 is multiplied at `level`; `None` if it is widened to f32.
///
/// Intel's cores take two passes for a vector of pairs and then do no more of them than f32 of half the width: there
/// widening is faster, and only tiles are worth it.
pub fn bf16(level: Level) -> Option<Bf16> {
    if level >= Level::Amx && crate::amx::Amx::new().is_some() {
        return Some(Bf16::Tiles);
    }
    (level >= Level::Avx512 && has_pairs() && !slow_pairs()).then_some(Bf16::Pairs)
}

/// Whether this CPU has AVX512-BF16.
pub(crate) fn has_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        crate::lanes::Avx512::new().is_some() && (cfg!(tallow_emulated) || std::is_x86_feature_detected!("avx512bf16"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether this CPU is Intel's.
fn slow_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static INTEL: OnceLock<bool> = OnceLock::new();
        *INTEL.get_or_init(|| {
            let vendor = std::arch::x86_64::__cpuid(0);
            let text = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            !cfg!(tallow_emulated) && text.as_flattened() == b"GenuineIntel"
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `TALLOW_SIMD` holds what is not a level, or one that this CPU lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownLevel {
    /// What it holds.
    pub value: String,
    /// The best level of this CPU.
    pub best: Level,
}

impl std::error::Error for UnknownLevel {}

impl std::fmt::Display for UnknownLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { value, best } = self;
        write!(f, "TALLOW_SIMD = {value:?}: expected scalar, avx2, avx512 or amx; the best of this CPU is {best:?}")
    }
}

impl Level {
    fn parse(value: &str, best: Level) -> Result<Level, UnknownLevel> {
        let level = match value {
            "" => Some(best),
            "scalar" => Some(Level::Scalar),
            "avx2" => Some(Level::Avx2),
            "avx512" => Some(Level::Avx512),
            "amx" => Some(Level::Amx),
            _ => None,
        };
        level.filter(|level| *level <= best).ok_or_else(|| UnknownLevel { value: value.into(), best })
    }
}

/// Reads `TALLOW_SIMD` (`scalar`, `avx2`, `avx512`, `amx`; the best of this CPU where it is not set), for an error early on.
///
/// # Errors
/// If it names no level, or one that this CPU lacks.
pub fn init() -> Result<Level, UnknownLevel> {
    match std::env::var_os("TALLOW_SIMD") {
        Some(value) => Level::parse(&value.to_string_lossy(), best()),
        None => Ok(best()),
    }
}

/// The level that the kernels run at: what [`init`] says, or the best of this CPU where that is an error.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| init().unwrap_or_else(|error| error.best))
}

/// The best level of this CPU.
#[cfg(target_arch = "x86_64")]
pub fn best() -> Level {
    if crate::amx::Amx::new().is_some() {
        Level::Amx
    } else if crate::lanes::Avx512::new().is_some() {
        Level::Avx512
    } else if crate::lanes::Avx2::new().is_some() {
        Level::Avx2
    } else {
        Level::Scalar
    }
}

/// The best level of this CPU.
#[cfg(not(target_arch = "x86_64"))]
pub fn best() -> Level {
    Level::Scalar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_beyond_the_cpu_is_an_error() {
        assert_eq!(Level::parse("avx2", Level::Avx512), Ok(Level::Avx2));
        assert_eq!(Level::parse("", Level::Avx2), Ok(Level::Avx2));
        assert!(Level::parse("avx512", Level::Avx2).unwrap_err().to_string().contains("best of this CPU is Avx2"));
        assert!(Level::parse("sse9", Level::Avx2).is_err());
    }
}
