//! AMX: eight tile registers of 16 rows of 64 bytes, and an instruction that multiplies tiles of bf16 into a tile of f32.
//!
//! `tdpbf16ps c, a, b`: `c [16, 16] += a [16, 32] b [32, 16]`, where a row of `b` holds pairs of steps, `[pair][column][2]`.
//! Like `vdpbf16ps` it rounds to nearest and takes values below 2^-126 for zero. The compiler has no stable intrinsics for
//! it, so this is assembly. Linux lets a process have the registers only when it asks (`arch_prctl`); elsewhere they are not used.

/// Rows of a tile; also columns of a tile of f32, and pairs in a row of bf16.
pub(crate) const TILE: usize = 16;

/// Proof that this process may use AMX's tiles of bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(());

impl Amx {
    /// `Some` if the CPU has them and the system lets this process have them.
    pub(crate) fn new() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            static GRANTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            GRANTED.get_or_init(granted).then_some(Self(()))
        }
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        None
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn granted() -> bool {
    use std::arch::x86_64::__cpuid_count;
    /// Ask for a feature of the extended state, and which: the data of tiles.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    if crate::lanes::Avx512::new().is_none() || cfg!(tallow_emulated) {
        return false;
    }
    // AVX-512 is there, and so is leaf 7.
    let has = __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES;
    // SAFETY: the call changes nothing but what this process may use.
    has && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use tiles::Tiles;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles {
    use std::arch::asm;
    use std::marker::PhantomData;

    use super::{Amx, TILE};

    /// What `ldtilecfg` reads.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// All eight registers with all their rows.
    static CONFIG: Config = {
        let (mut row_bytes, mut rows, mut at) = ([0; 16], [0; 16], 0);
        while at < 8 {
            row_bytes[at] = 4 * TILE as u16;
            rows[at] = TILE as u8;
            at += 1;
        }
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };

    /// This thread's tile registers, configured for as long as this lives; they are of no meaning between two calls.
    pub(crate) struct Tiles(PhantomData<*const ()>);

    impl Tiles {
        pub(crate) fn configure(_: Amx) -> Self {
            // SAFETY: there is an `Amx` only where the instruction is; it reads 64 bytes.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, preserves_flags, readonly)) };
            Self(PhantomData)
        }

        /// `c = a b` if `fresh`, else `c += a b`, over `blocks` blocks of 32 steps. `a`: blocks of `[32, 32]`, two tiles one after the other; `b`: pairs of
        /// 32 columns, `[16 blocks][32][2]`; `c`: `[32, 32]`.
        ///
        /// # Safety
        /// `a` and `b` have twice `blocks` KiB, `c` has 4, and is filled if not `fresh`.
        pub(crate) unsafe fn square(&self, a: *const u16, b: *const u16, c: *mut f32, blocks: usize, fresh: bool) {
            // SAFETY: the caller's promise; the tiles are configured.
            unsafe {
                asm!(
                    "test {fresh:e}, {fresh:e}",
                    "jz 4f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 5f",
                    "4:",
                    "tileloadd tmm0, [{c} + {pitch}]",
                    "tileloadd tmm1, [{c} + {pitch} + 64]",
                    "tileloadd tmm2, [{c} + {pitch} + 2048]",
                    "tileloadd tmm3, [{c} + {pitch} + 2112]",
                    "5:",
                    "test {blocks}, {blocks}",
                    "jz 3f",
                    "2:",
                    "tileloadd tmm4, [{a} + {line}]",
                    "tileloadd tmm6, [{b} + {pitch}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {pitch} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 2048",
                    "add {b}, 2048",
                    "dec {blocks}",
                    "jnz 2b",
                    "3:",
                    "tilestored [{c} + {pitch}], tmm0",
                    "tilestored [{c} + {pitch} + 64], tmm1",
                    "tilestored [{c} + {pitch} + 2048], tmm2",
                    "tilestored [{c} + {pitch} + 2112], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    blocks = inout(reg) blocks => _,
                    c = in(reg) c,
                    fresh = in(reg) u32::from(fresh),
                    line = in(reg) 64usize,
                    pitch = in(reg) 128usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }

    /// A function `c [16, 16 n] (+)= a [16, k] b [k, 16 n]` over `blocks` blocks of 16 words of 32 bits, pairs of bf16;
    /// `strides` are those of the rows of `a`, `b` and `c` in words.
    macro_rules! row_of {
        ($name:ident, [$($zero:literal)*], [$($load:literal)*], [$($multiply:literal)*], [$($store:literal)*]) => {
            /// # Safety
            /// The tiles of this thread are configured; all words that sizes and strides name are there, those of `c` to write
            /// (and, if not `fresh`, filled).
            pub(crate) unsafe fn $name(
                a: *const f32, b: *const f32, c: *mut f32, strides: [usize; 3], blocks: usize, fresh: bool,
            ) {
                let [a_row, b_row, c_row] = strides.map(|words| 4 * words);
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(
                        "test {fresh:e}, {fresh:e}",
                        "jz 4f",
                        $($zero,)*
                        "jmp 5f",
                        "4:",
                        $($load,)*
                        "5:",
                        "test {blocks}, {blocks}",
                        "jz 3f",
                        "2:",
                        "tileloadd tmm4, [{a} + {a_row}]",
                        $($multiply,)*
                        "add {a}, 64",
                        "add {b}, {b_block}",
                        "dec {blocks}",
                        "jnz 2b",
                        "3:",
                        $($store,)*
                        a = inout(reg) a => _,
                        b = inout(reg) b => _,
                        blocks = inout(reg) blocks => _,
                        c = in(reg) c,
                        a_row = in(reg) a_row,
                        b_row = in(reg) b_row,
                        b_block = in(reg) TILE * b_row,
                        c_row = in(reg) c_row,
                        fresh = in(reg) u32::from(fresh),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    );
                }
            }
        };
    }

    impl Tiles {
        row_of!(
            row_of_two,
            ["tilezero tmm0" "tilezero tmm1"],
            ["tileloadd tmm0, [{c} + {c_row}]" "tileloadd tmm1, [{c} + {c_row} + 64]"],
            [
                "tileloadd tmm5, [{b} + {b_row}]"
                "tdpbf16ps tmm0, tmm4, tmm5"
                "tileloadd tmm6, [{b} + {b_row} + 64]"
                "tdpbf16ps tmm1, tmm4, tmm6"
            ],
            ["tilestored [{c} + {c_row}], tmm0" "tilestored [{c} + {c_row} + 64], tmm1"]
        );
        row_of!(
            row_of_four,
            ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
            [
                "tileloadd tmm0, [{c} + {c_row}]"
                "tileloadd tmm1, [{c} + {c_row} + 64]"
                "tileloadd tmm2, [{c} + {c_row} + 128]"
                "tileloadd tmm3, [{c} + {c_row} + 192]"
            ],
            [
                "tileloadd tmm5, [{b} + {b_row}]"
                "tdpbf16ps tmm0, tmm4, tmm5"
                "tileloadd tmm6, [{b} + {b_row} + 64]"
                "tdpbf16ps tmm1, tmm4, tmm6"
                "tileloadd tmm7, [{b} + {b_row} + 128]"
                "tdpbf16ps tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{b} + {b_row} + 192]"
                "tdpbf16ps tmm3, tmm4, tmm5"
            ],
            [
                "tilestored [{c} + {c_row}], tmm0"
                "tilestored [{c} + {c_row} + 64], tmm1"
                "tilestored [{c} + {c_row} + 128], tmm2"
                "tilestored [{c} + {c_row} + 192], tmm3"
            ]
        );

        /// What a turn of [`busy`](Self::busy) computes.
        pub(crate) const BUSY_FLOPS: usize = 4 * 2 * TILE * TILE * 2 * TILE;

        /// Multiplies without loading anything.
        pub(crate) fn busy(&self, turns: u64) {
            // SAFETY: the tiles are configured, and nothing is read or written.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                    "2:",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "dec {turns}",
                    "jnz 2b",
                    turns = inout(reg) turns.max(1) => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem),
                );
            }
        }
    }

    impl Tiles {
        /// `c = a b` if `fresh`, else `c += a b`, over `blocks` blocks of 32 steps in three parts: `h h + h m + m h + m m + h l +
        /// l h`, the small ones first. `a`: `[block][part][32, 32]`; `b`: `[block][part][16][32][2]`; `c`: `[32, 32]`.
        ///
        /// # Safety
        /// `a` and `b` have six times `blocks` KiB, `c` has 4, and is filled if not `fresh`.
        pub(crate) unsafe fn square_of_parts(
            &self,
            a: *const u16,
            b: *const u16,
            c: *mut f32,
            blocks: usize,
            fresh: bool,
        ) {
            macro_rules! load_a {
                ($at:literal) => {
                    concat!(
                        "tileloadd tmm4, [{a} + {line} + ",
                        $at,
                        "]\ntileloadd tmm5, [{a} + {line} + ",
                        $at,
                        " + 1024]"
                    )
                };
            }
            macro_rules! load_b {
                ($at:literal) => {
                    concat!(
                        "tileloadd tmm6, [{b} + {pitch} + ",
                        $at,
                        "]\ntileloadd tmm7, [{b} + {pitch} + ",
                        $at,
                        " + 64]"
                    )
                };
            }
            // What the next block of `a` needs from L2.
            macro_rules! prefetch {
                ($at:literal) => {
                    concat!(".irp x,0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960\nprefetcht0 [{a} + 6144 + ", $at, " + \\x]\n.endr")
                };
            }
            macro_rules! multiply {
                () => {
                    "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
                };
            }
            // SAFETY: the caller's promise; the tiles are configured.
            unsafe {
                asm!(
                    "test {fresh:e}, {fresh:e}",
                    "jz 4f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 5f",
                    "4:",
                    "tileloadd tmm0, [{c} + {pitch}]",
                    "tileloadd tmm1, [{c} + {pitch} + 64]",
                    "tileloadd tmm2, [{c} + {pitch} + 2048]",
                    "tileloadd tmm3, [{c} + {pitch} + 2112]",
                    "5:",
                    "test {blocks}, {blocks}",
                    "jz 3f",
                    "2:",
                    load_a!("4096"),
                    load_b!("0"),
                    multiply!(),
                    prefetch!("0"),
                    load_a!("2048"),
                    multiply!(),
                    prefetch!("1024"),
                    load_b!("2048"),
                    multiply!(),
                    prefetch!("2048"),
                    load_a!("0"),
                    multiply!(),
                    prefetch!("3072"),
                    load_b!("4096"),
                    multiply!(),
                    prefetch!("4096"),
                    load_b!("0"),
                    multiply!(),
                    prefetch!("5120"),
                    "add {a}, 6144",
                    "add {b}, 6144",
                    "dec {blocks}",
                    "jnz 2b",
                    "3:",
                    "tilestored [{c} + {pitch}], tmm0",
                    "tilestored [{c} + {pitch} + 64], tmm1",
                    "tilestored [{c} + {pitch} + 2048], tmm2",
                    "tilestored [{c} + {pitch} + 2112], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    blocks = inout(reg) blocks => _,
                    c = in(reg) c,
                    fresh = in(reg) u32::from(fresh),
                    line = in(reg) 64usize,
                    pitch = in(reg) 128usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            // SAFETY: the instruction is there. A thread without tiles in use is cheaper to switch.
            unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
        }
    }
}
