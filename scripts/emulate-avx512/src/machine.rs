//! Registers and operands: what the signal's context holds, and what such a CPU would have beside it.

use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::{Formatter, GasFormatter, Instruction, OpKind, Register};

/// A vector of 512 bits, little-endian.
pub(crate) type Z = [u8; 64];

/// Whether instructions that this CPU has are followed one by one, for the upper halves that they clear.
pub(crate) static EXACT: AtomicBool = AtomicBool::new(true);

/// The registers of one thread that this CPU lacks.
pub(crate) struct State {
    /// Bits 256 to 511 of the first sixteen vectors.
    pub(crate) high: [[u8; 32]; 16],
    /// Their lower bits as they were when last seen: if they differ, an instruction of this CPU has written, and cleared
    /// the upper ones. Two equal values are the case that this misses; `EXACT` does not.
    pub(crate) seen: [[u8; 32]; 16],
    /// The other sixteen vectors.
    pub(crate) more: [Z; 16],
    /// Masks.
    pub(crate) k: [u64; 8],
    /// Decoded instructions by address.
    pub(crate) decoded: Vec<(u64, Instruction)>,
}

impl State {
    pub(crate) fn new() -> Self {
        Self {
            high: [[0; 32]; 16],
            seen: [[0; 32]; 16],
            more: [[0; 64]; 16],
            k: [0; 8],
            decoded: vec![(0, Instruction::default()); 4096],
        }
    }

    /// Clears upper halves whose lower ones have changed.
    pub(crate) unsafe fn look(&mut self, c: &Ctx) {
        if EXACT.load(Ordering::Relaxed) {
            return;
        }
        for n in 0..16 {
            let low = unsafe { c.ymm(n) };
            if low != self.seen[n] {
                self.high[n] = [0; 32];
                self.seen[n] = low;
            }
        }
    }
}

/// Registers of the interrupted code, in its signal frame.
pub(crate) struct Ctx {
    pub(crate) gregs: *mut i64,
    pub(crate) fx: *mut u8,
}
impl Ctx {
    pub(crate) unsafe fn ymm(&self, i: usize) -> [u8; 32] {
        unsafe {
            let mut r = [0u8; 32];
            std::ptr::copy_nonoverlapping(self.fx.add(160 + 16 * i), r.as_mut_ptr(), 16);
            std::ptr::copy_nonoverlapping(self.fx.add(576 + 16 * i), r.as_mut_ptr().add(16), 16);
            r
        }
    }
    pub(crate) unsafe fn set_ymm(&self, i: usize, r: &[u8]) {
        unsafe {
            std::ptr::copy_nonoverlapping(r.as_ptr(), self.fx.add(160 + 16 * i), 16);
            std::ptr::copy_nonoverlapping(r.as_ptr().add(16), self.fx.add(576 + 16 * i), 16);
        }
    }
    fn gidx(r: Register) -> usize {
        use libc::*;
        (match r.full_register() {
            Register::RAX => REG_RAX,
            Register::RBX => REG_RBX,
            Register::RCX => REG_RCX,
            Register::RDX => REG_RDX,
            Register::RSI => REG_RSI,
            Register::RDI => REG_RDI,
            Register::RBP => REG_RBP,
            Register::RSP => REG_RSP,
            Register::R8 => REG_R8,
            Register::R9 => REG_R9,
            Register::R10 => REG_R10,
            Register::R11 => REG_R11,
            Register::R12 => REG_R12,
            Register::R13 => REG_R13,
            Register::R14 => REG_R14,
            Register::R15 => REG_R15,
            Register::RIP => REG_RIP,
            _ => panic!("reg {r:?}"),
        }) as usize
    }
    pub(crate) unsafe fn g(&self, r: Register) -> u64 {
        unsafe { *self.gregs.add(Self::gidx(r)) as u64 }
    }
    pub(crate) unsafe fn set_g(&self, r: Register, v: u64) {
        unsafe {
            let v = if r.size() == 4 {
                v as u32 as u64
            } else if r.size() == 8 {
                v
            } else {
                panic!("small gpr write")
            };
            *self.gregs.add(Self::gidx(r)) = v as i64;
        }
    }
}

/// Number and bytes of a vector register.
pub(crate) fn vnum(r: Register) -> Option<(usize, usize)> {
    let n = r as usize;
    let base = |b: Register| n.wrapping_sub(b as usize);
    if base(Register::XMM0) < 32 {
        Some((base(Register::XMM0), 16))
    } else if base(Register::YMM0) < 32 {
        Some((base(Register::YMM0), 32))
    } else if base(Register::ZMM0) < 32 {
        Some((base(Register::ZMM0), 64))
    } else {
        None
    }
}
/// Number of a mask register.
pub(crate) fn knum(r: Register) -> Option<usize> {
    let d = (r as usize).wrapping_sub(Register::K0 as usize);
    (d < 8).then_some(d)
}

/// An instruction about to be carried out.
pub(crate) struct M<'a> {
    pub(crate) s: &'a mut State,
    pub(crate) c: Ctx,
    pub(crate) i: Instruction,
}

impl M<'_> {
    pub(crate) unsafe fn vget(&self, n: usize) -> Z {
        unsafe {
            if n >= 16 {
                return self.s.more[n - 16];
            }
            let mut z = [0; 64];
            z[..32].copy_from_slice(&self.c.ymm(n));
            z[32..].copy_from_slice(&self.s.high[n]);
            z
        }
    }
    pub(crate) unsafe fn vset(&mut self, n: usize, z: &Z) {
        unsafe {
            if n >= 16 {
                self.s.more[n - 16] = *z;
                return;
            }
            self.c.set_ymm(n, &z[..32]);
            self.s.high[n].copy_from_slice(&z[32..]);
            self.s.seen[n].copy_from_slice(&z[..32]);
        }
    }
    pub(crate) unsafe fn addr(&self, op: u32) -> u64 {
        unsafe {
            self.i
                .virtual_address(op, 0, |r, _, _| {
                    Some(match r {
                        Register::DS | Register::ES | Register::SS | Register::CS => 0,
                        Register::FS | Register::GS => panic!("fs"),
                        _ => self.c.g(r),
                    })
                })
                .unwrap()
        }
    }
    /// Operand as 64 bytes; esz: element size for broadcast; len: bytes to read from memory
    pub(crate) unsafe fn src(&self, op: u32, esz: usize, len: usize) -> Z {
        unsafe {
            let mut z = [0u8; 64];
            match self.i.op_kind(op) {
                OpKind::Register => {
                    let r = self.i.op_register(op);
                    if let Some((n, _)) = vnum(r) {
                        z = self.vget(n);
                    } else if let Some(k) = knum(r) {
                        z[..8].copy_from_slice(&self.s.k[k].to_le_bytes());
                    } else {
                        z[..8].copy_from_slice(&self.c.g(r).to_le_bytes());
                    }
                }
                OpKind::Memory => {
                    let a = self.addr(op) as *const u8;
                    if self.i.is_broadcast() {
                        let mut e = [0u8; 8];
                        std::ptr::copy_nonoverlapping(a, e.as_mut_ptr(), esz);
                        for x in z.chunks_exact_mut(esz) {
                            x.copy_from_slice(&e[..esz]);
                        }
                    } else {
                        let mask = self.mask();
                        if self.i.op_mask() != Register::None && esz > 0 {
                            for e in 0..len / esz {
                                if mask >> e & 1 == 1 {
                                    std::ptr::copy_nonoverlapping(a.add(e * esz), z.as_mut_ptr().add(e * esz), esz);
                                }
                            }
                        } else {
                            std::ptr::copy_nonoverlapping(a, z.as_mut_ptr(), len);
                        }
                    }
                }
                k => panic!("src kind {k:?} {}", self.show()),
            }
            z
        }
    }
    pub(crate) fn imm(&self) -> u8 {
        self.i.immediate8()
    }
    pub(crate) fn mask(&self) -> u64 {
        match self.i.op_mask() {
            Register::None => !0,
            r => self.s.k[knum(r).unwrap()],
        }
    }
    pub(crate) fn show(&self) -> String {
        let mut s = String::new();
        GasFormatter::new().format(&self.i, &mut s);
        s
    }
    /// Vector length of the destination (register op 0), or of the widest register operand
    pub(crate) fn len(&self) -> usize {
        (0..self.i.op_count())
            .filter(|o| self.i.op_kind(*o) == OpKind::Register)
            .filter_map(|o| vnum(self.i.op_register(o)))
            .map(|x| x.1)
            .max()
            .unwrap_or(0)
    }
    /// Writes result with masking; len bytes valid, above zeroed
    pub(crate) unsafe fn put(&mut self, res: &Z, esz: usize, len: usize) {
        unsafe {
            let mask = self.mask();
            let zero = self.i.zeroing_masking();
            match self.i.op_kind(0) {
                OpKind::Register => {
                    let (n, _) = vnum(self.i.op_register(0)).unwrap_or_else(|| panic!("dst {}", self.show()));
                    let old = self.vget(n);
                    let mut z = [0u8; 64];
                    for e in 0..len / esz {
                        let r = e * esz..(e + 1) * esz;
                        if mask >> e & 1 == 1 {
                            z[r.clone()].copy_from_slice(&res[r]);
                        } else if !zero {
                            z[r.clone()].copy_from_slice(&old[r]);
                        }
                    }
                    self.vset(n, &z);
                }
                OpKind::Memory => {
                    let a = self.addr(0) as *mut u8;
                    for e in 0..len / esz {
                        if mask >> e & 1 == 1 {
                            std::ptr::copy_nonoverlapping(res.as_ptr().add(e * esz), a.add(e * esz), esz);
                        }
                    }
                }
                _ => panic!(),
            }
        }
    }
    pub(crate) unsafe fn putk(&mut self, bits: u64) {
        let k = knum(self.i.op_register(0)).unwrap();
        self.s.k[k] = bits & self.mask();
    }
}
