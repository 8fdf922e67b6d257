//! What the instructions do: those that the kernels are compiled to. Another one ends the process with its name.

use iced_x86::{Mnemonic, OpKind, Register, RoundingControl};

use crate::machine::{M, Z, knum, vnum};

fn f(z: &Z, i: usize) -> f32 {
    f32::from_le_bytes(z[4 * i..4 * i + 4].try_into().unwrap())
}
fn d(z: &Z, i: usize) -> u32 {
    u32::from_le_bytes(z[4 * i..4 * i + 4].try_into().unwrap())
}
fn q(z: &Z, i: usize) -> u64 {
    u64::from_le_bytes(z[8 * i..8 * i + 8].try_into().unwrap())
}
fn w(z: &Z, i: usize) -> u16 {
    u16::from_le_bytes(z[2 * i..2 * i + 2].try_into().unwrap())
}
fn pf(z: &mut Z, i: usize, x: f32) {
    z[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
}
fn pd(z: &mut Z, i: usize, x: u32) {
    z[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
}
fn pq(z: &mut Z, i: usize, x: u64) {
    z[8 * i..8 * i + 8].copy_from_slice(&x.to_le_bytes());
}
fn pw(z: &mut Z, i: usize, x: u16) {
    z[2 * i..2 * i + 2].copy_from_slice(&x.to_le_bytes());
}
fn cmpf(p: u8, a: f32, b: f32) -> bool {
    let un = a.is_nan() || b.is_nan();
    match p & 15 {
        0 => a == b,
        1 => a < b,
        2 => a <= b,
        3 => un,
        4 => a != b,
        5 => !(a < b),
        6 => !(a <= b),
        7 => !un,
        8 => un || a == b,
        9 => !(a >= b),
        10 => !(a > b),
        11 => false,
        12 => a != b && !un,
        13 => a >= b,
        14 => a > b,
        _ => true,
    }
}
fn cmpo<T: PartialOrd>(p: u8, a: T, b: T) -> bool {
    match p & 7 {
        0 => a == b,
        1 => a < b,
        2 => a <= b,
        3 => false,
        4 => a != b,
        5 => a >= b,
        6 => a > b,
        _ => true,
    }
}
fn rnd(x: f32, imm: u8) -> f32 {
    assert!(imm >> 4 == 0, "rndscale with scale");
    match if imm & 4 != 0 { 0 } else { imm & 3 } {
        0 => x.round_ties_even(),
        1 => x.floor(),
        2 => x.ceil(),
        _ => x.trunc(),
    }
}
fn daz(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Carries one instruction out.
pub(crate) unsafe fn step(m: &mut M) {
    unsafe {
        use Mnemonic::*;
        let len = m.len();
        let mn = m.i.mnemonic();
        if m.i.rounding_control() != RoundingControl::None && m.i.rounding_control() != RoundingControl::RoundToNearest
        {
            panic!("rounding {}", m.show());
        }
        match mn {
            Vmovups | Vmovaps => {
                let z = m.src(1, 4, len);
                m.put(&z, 4, len)
            }
            Vmovdqa32 | Vmovdqu32 => {
                let z = m.src(1, 4, len);
                m.put(&z, 4, len)
            }
            Vmovdqa64 | Vmovdqu64 | Vmovupd | Vmovapd => {
                let z = m.src(1, 8, len);
                m.put(&z, 8, len)
            }
            Vmovdqu16 => {
                let z = m.src(1, 2, len);
                m.put(&z, 2, len)
            }
            Vmovdqu8 => {
                let z = m.src(1, 1, len);
                m.put(&z, 1, len)
            }
            Vmovss | Vmovd | Vmovq | Vmovsd => {
                let esz = if matches!(mn, Vmovss | Vmovd) { 4 } else { 8 };
                if m.i.op_count() == 3 {
                    let (mut r, b) = (m.src(1, 0, 16), m.src(2, 0, 16));
                    let old = m.src(0, 0, 16);
                    if m.mask() & 1 == 1 {
                        r[..esz].copy_from_slice(&b[..esz])
                    } else if m.i.zeroing_masking() {
                        r[..esz].fill(0)
                    } else {
                        r[..esz].copy_from_slice(&old[..esz])
                    }
                    r[16..].fill(0);
                    let n = vnum(m.i.op_register(0)).unwrap().0;
                    return m.vset(n, &r);
                }
                let z = m.src(1, esz, esz);
                let mut r = [0u8; 64];
                r[..esz].copy_from_slice(&z[..esz]);
                if m.i.op_kind(0) == OpKind::Register && vnum(m.i.op_register(0)).is_none() {
                    let mut e = [0u8; 8];
                    e[..esz].copy_from_slice(&z[..esz]);
                    m.c.set_g(m.i.op_register(0), u64::from_le_bytes(e));
                } else if m.i.op_kind(0) == OpKind::Memory {
                    m.put(&r, esz, esz)
                } else {
                    m.put(&r, esz, 16.max(esz))
                }
            }
            Vaddps | Vsubps | Vmulps | Vdivps | Vmaxps | Vminps | Vaddss | Vsubss | Vmulss | Vdivss | Vmaxss
            | Vminss => {
                let scalar = matches!(mn, Vaddss | Vsubss | Vmulss | Vdivss | Vmaxss | Vminss);
                let a = m.src(1, 4, len);
                let b = m.src(2, 4, if scalar { 4 } else { len });
                let mut r = a;
                for i in 0..if scalar { 1 } else { len / 4 } {
                    let (x, y) = (f(&a, i), f(&b, i));
                    pf(
                        &mut r,
                        i,
                        match mn {
                            Vaddps | Vaddss => x + y,
                            Vsubps | Vsubss => x - y,
                            Vmulps | Vmulss => x * y,
                            Vdivps | Vdivss => x / y,
                            Vmaxps | Vmaxss => {
                                if x > y {
                                    x
                                } else {
                                    y
                                }
                            }
                            _ => {
                                if x < y {
                                    x
                                } else {
                                    y
                                }
                            }
                        },
                    );
                }
                if scalar {
                    assert!(m.i.op_mask() == Register::None);
                    m.put(&r, 4, 16)
                } else {
                    m.put(&r, 4, len)
                }
            }
            Vsqrtps => {
                let a = m.src(1, 4, len);
                let mut r = a;
                for i in 0..len / 4 {
                    pf(&mut r, i, f(&a, i).sqrt())
                }
                m.put(&r, 4, len)
            }
            Vfmadd132ps | Vfmadd213ps | Vfmadd231ps | Vfnmadd132ps | Vfnmadd213ps | Vfnmadd231ps | Vfmsub132ps
            | Vfmsub213ps | Vfmsub231ps | Vfmadd132ss | Vfmadd213ss | Vfmadd231ss | Vfnmadd132ss | Vfnmadd213ss
            | Vfnmadd231ss | Vfmsub132ss | Vfmsub213ss | Vfmsub231ss => {
                let name = format!("{mn:?}");
                let scalar = name.ends_with("ss");
                let (x, y, z) = (m.src(0, 4, len), m.src(1, 4, len), m.src(2, 4, if scalar { 4 } else { len }));
                let mut r = x;
                let neg = name.starts_with("Vfn");
                let sub = name.contains("sub");
                for i in 0..if scalar { 1 } else { len / 4 } {
                    let (x, y, z) = (f(&x, i), f(&y, i), f(&z, i));
                    let (a, b, c) = if name.contains("132") {
                        (x, z, y)
                    } else if name.contains("213") {
                        (y, x, z)
                    } else {
                        (y, z, x)
                    };
                    let (a, c) = (if neg { -a } else { a }, if sub { -c } else { c });
                    pf(&mut r, i, a.mul_add(b, c));
                }
                if scalar { m.put(&r, 4, 16) } else { m.put(&r, 4, len) }
            }
            Vxorps | Vpxord | Vandps | Vpandd | Vorps | Vpord | Vandnps | Vpandnd | Vpxorq | Vpandq | Vporq
            | Vpandnq | Vxorpd | Vandpd | Vorpd => {
                let esz = if matches!(mn, Vpxorq | Vpandq | Vporq | Vpandnq | Vxorpd | Vandpd | Vorpd) { 8 } else { 4 };
                let (a, b) = (m.src(1, esz, len), m.src(2, esz, len));
                let mut r = [0u8; 64];
                for i in 0..len {
                    r[i] = match mn {
                        Vxorps | Vpxord | Vpxorq | Vxorpd => a[i] ^ b[i],
                        Vandps | Vpandd | Vpandq | Vandpd => a[i] & b[i],
                        Vandnps | Vpandnd | Vpandnq => !a[i] & b[i],
                        _ => a[i] | b[i],
                    }
                }
                m.put(&r, esz, len)
            }
            Vpternlogd | Vpternlogq => {
                let esz = if mn == Vpternlogd { 4 } else { 8 };
                let (a, b, c) = (m.src(0, esz, len), m.src(1, esz, len), m.src(2, esz, len));
                let t = m.imm();
                let mut r = [0u8; 64];
                for i in 0..len {
                    for bit in 0..8 {
                        let x = (a[i] >> bit & 1) << 2 | (b[i] >> bit & 1) << 1 | (c[i] >> bit & 1);
                        r[i] |= (t >> x & 1) << bit;
                    }
                }
                m.put(&r, esz, len)
            }
            Vbroadcastss | Vpbroadcastd | Vpbroadcastq | Vbroadcastsd | Vpbroadcastw | Vpbroadcastb => {
                let esz = match mn {
                    Vbroadcastss | Vpbroadcastd => 4,
                    Vpbroadcastw => 2,
                    Vpbroadcastb => 1,
                    _ => 8,
                };
                let z = if m.i.op_kind(1) == OpKind::Memory {
                    let mut z = [0u8; 64];
                    std::ptr::copy_nonoverlapping(m.addr(1) as *const u8, z.as_mut_ptr(), esz);
                    z
                } else {
                    m.src(1, esz, esz)
                };
                let len = vnum(m.i.op_register(0)).unwrap().1;
                let mut r = [0u8; 64];
                for x in r.chunks_exact_mut(esz) {
                    x.copy_from_slice(&z[..esz]);
                }
                m.put(&r, esz, len)
            }
            Vextractf64x4 | Vextracti64x4 | Vextractf32x4 | Vextracti32x4 | Vextractf64x2 | Vextracti64x2 => {
                let part = if matches!(mn, Vextractf64x4 | Vextracti64x4) { 32 } else { 16 };
                let z = m.src(1, 0, len);
                let at = (m.imm() as usize % (len / part)) * part;
                let mut r = [0u8; 64];
                r[..part].copy_from_slice(&z[at..at + part]);
                m.put(&r, if matches!(mn, Vextractf32x4 | Vextracti32x4) { 4 } else { 8 }, part)
            }
            Vinsertf64x4 | Vinserti64x4 | Vinsertf32x4 | Vinserti32x4 | Vinsertf64x2 | Vinserti64x2 => {
                let part = if matches!(mn, Vinsertf64x4 | Vinserti64x4) { 32 } else { 16 };
                assert!(m.i.op_mask() == Register::None);
                let (mut r, b) = (m.src(1, 0, len), m.src(2, 0, part));
                let at = (m.imm() as usize % (len / part)) * part;
                r[at..at + part].copy_from_slice(&b[..part]);
                m.put(&r, 8, len)
            }
            Kmovb | Kmovw | Kmovd | Kmovq => {
                let sz = match mn {
                    Kmovb => 1,
                    Kmovw => 2,
                    Kmovd => 4,
                    _ => 8,
                };
                let z = m.src(1, 0, sz);
                let v = q(&z, 0) & if sz == 8 { !0 } else { (1 << (8 * sz)) - 1 };
                if m.i.op_kind(0) == OpKind::Memory {
                    std::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), m.addr(0) as *mut u8, sz);
                } else if let Some(k) = knum(m.i.op_register(0)) {
                    m.s.k[k] = v
                } else {
                    m.c.set_g(m.i.op_register(0), v)
                }
            }
            Kshiftrw | Kshiftrb | Kshiftrd | Kshiftrq | Kshiftlw | Kshiftlb | Kshiftld | Kshiftlq => {
                let n = format!("{mn:?}");
                let bits = match n.as_bytes()[n.len() - 1] {
                    b'b' => 8,
                    b'w' => 16,
                    b'd' => 32,
                    _ => 64,
                };
                let full = if bits == 64 { !0 } else { (1u64 << bits) - 1 };
                let v = q(&m.src(1, 0, 8), 0) & full;
                let s = m.imm() as u32;
                let r = if s >= bits {
                    0
                } else if n.contains("shiftr") {
                    v >> s
                } else {
                    v << s & full
                };
                let k = knum(m.i.op_register(0)).unwrap();
                m.s.k[k] = r;
            }
            Kunpckbw | Kandw | Korw | Kxorw | Kandnw | Kandb | Korb | Kxnorw | Kunpckwd => {
                let (a, b) = (q(&m.src(1, 0, 8), 0), q(&m.src(2, 0, 8), 0));
                let k = knum(m.i.op_register(0)).unwrap();
                m.s.k[k] = match mn {
                    Kunpckbw => (a & 255) << 8 | b & 255,
                    Kunpckwd => (a & 0xffff) << 16 | b & 0xffff,
                    Kandw => a & b & 0xffff,
                    Korw => (a | b) & 0xffff,
                    Kxorw => (a ^ b) & 0xffff,
                    Kxnorw => !(a ^ b) & 0xffff,
                    Kandnw => !a & b & 0xffff,
                    Kandb => a & b & 255,
                    _ => (a | b) & 255,
                };
            }
            Knotw => {
                let a = q(&m.src(1, 0, 8), 0);
                let k = knum(m.i.op_register(0)).unwrap();
                m.s.k[k] = !a & 0xffff;
            }
            Kortestb | Kortestw | Kortestd => {
                let full = match mn {
                    Kortestb => 255,
                    Kortestw => 0xffff,
                    _ => 0xffff_ffff,
                };
                let v = (q(&m.src(0, 0, 8), 0) | q(&m.src(1, 0, 8), 0)) & full;
                let e = m.c.gregs.add(libc::REG_EFL as usize);
                *e = *e & !0x8d5 | if v == 0 { 0x40 } else { 0 } | if v == full { 1 } else { 0 };
            }
            Vucomiss | Vcomiss => {
                let (a, b) = (f(&m.src(0, 4, 4), 0), f(&m.src(1, 4, 4), 0));
                let e = m.c.gregs.add(libc::REG_EFL as usize);
                *e = *e & !0x8d5
                    | if a.is_nan() || b.is_nan() {
                        0x45
                    } else if a > b {
                        0
                    } else if a < b {
                        1
                    } else {
                        0x40
                    };
            }
            Vcmpps | Vcmpss => {
                let scalar = mn == Vcmpss;
                let (a, b) = (m.src(1, 4, len), m.src(2, 4, if scalar { 4 } else { len }));
                let p = m.imm();
                let mut r = 0;
                for i in 0..if scalar { 1 } else { len / 4 } {
                    r |= (cmpf(p, f(&a, i), f(&b, i)) as u64) << i
                }
                m.putk(r)
            }
            Vpcmpud | Vpcmpd | Vpcmpeqd | Vpcmpgtd | Vptestmd | Vptestnmd => {
                let (a, b) = (m.src(1, 4, len), m.src(2, 4, len));
                let mut r = 0;
                for i in 0..len / 4 {
                    let (x, y) = (d(&a, i), d(&b, i));
                    r |= (match mn {
                        Vpcmpud => cmpo(m.imm(), x, y),
                        Vpcmpd => cmpo(m.imm(), x as i32, y as i32),
                        Vpcmpeqd => x == y,
                        Vpcmpgtd => x as i32 > y as i32,
                        Vptestmd => x & y != 0,
                        _ => x & y == 0,
                    } as u64)
                        << i
                }
                m.putk(r)
            }
            Vpcmpuq | Vpcmpq | Vpcmpeqq | Vpcmpgtq | Vptestmq | Vptestnmq => {
                let (a, b) = (m.src(1, 8, len), m.src(2, 8, len));
                let mut r = 0;
                for i in 0..len / 8 {
                    let (x, y) = (q(&a, i), q(&b, i));
                    r |= (match mn {
                        Vpcmpuq => cmpo(m.imm(), x, y),
                        Vpcmpq => cmpo(m.imm(), x as i64, y as i64),
                        Vpcmpeqq => x == y,
                        Vpcmpgtq => x as i64 > y as i64,
                        Vptestmq => x & y != 0,
                        _ => x & y == 0,
                    } as u64)
                        << i
                }
                m.putk(r)
            }
            Vpcmpuw | Vpcmpw | Vpcmpeqw => {
                let (a, b) = (m.src(1, 2, len), m.src(2, 2, len));
                let mut r = 0;
                for i in 0..len / 2 {
                    let (x, y) = (w(&a, i), w(&b, i));
                    r |= (match mn {
                        Vpcmpuw => cmpo(m.imm(), x, y),
                        Vpcmpw => cmpo(m.imm(), x as i16, y as i16),
                        _ => x == y,
                    } as u64)
                        << i
                }
                m.putk(r)
            }
            Vpaddd | Vpsubd | Vpmulld | Vpmaxud | Vpminud | Vpmaxsd | Vpminsd => {
                let (a, b) = (m.src(1, 4, len), m.src(2, 4, len));
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    let (x, y) = (d(&a, i), d(&b, i));
                    pd(
                        &mut r,
                        i,
                        match mn {
                            Vpaddd => x.wrapping_add(y),
                            Vpsubd => x.wrapping_sub(y),
                            Vpmulld => x.wrapping_mul(y),
                            Vpmaxud => x.max(y),
                            Vpminud => x.min(y),
                            Vpmaxsd => (x as i32).max(y as i32) as u32,
                            _ => (x as i32).min(y as i32) as u32,
                        },
                    )
                }
                m.put(&r, 4, len)
            }
            Vpaddq | Vpsubq | Vpmuludq | Vpmullq => {
                let (a, b) = (m.src(1, 8, len), m.src(2, 8, len));
                let mut r = [0; 64];
                for i in 0..len / 8 {
                    let (x, y) = (q(&a, i), q(&b, i));
                    pq(
                        &mut r,
                        i,
                        match mn {
                            Vpaddq => x.wrapping_add(y),
                            Vpsubq => x.wrapping_sub(y),
                            Vpmullq => x.wrapping_mul(y),
                            _ => (x & 0xffff_ffff) * (y & 0xffff_ffff),
                        },
                    )
                }
                m.put(&r, 8, len)
            }
            Vpslld | Vpsrld | Vpsrad => {
                let a = m.src(1, 4, len);
                let n =
                    if matches!(m.i.op_kind(2), OpKind::Immediate8) { m.imm() as u64 } else { q(&m.src(2, 0, 16), 0) };
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    let x = d(&a, i);
                    pd(
                        &mut r,
                        i,
                        match mn {
                            Vpslld => {
                                if n > 31 {
                                    0
                                } else {
                                    x << n
                                }
                            }
                            Vpsrld => {
                                if n > 31 {
                                    0
                                } else {
                                    x >> n
                                }
                            }
                            _ => ((x as i32) >> n.min(31)) as u32,
                        },
                    )
                }
                m.put(&r, 4, len)
            }
            Vpsllq | Vpsrlq | Vpsraq => {
                let a = m.src(1, 8, len);
                let n =
                    if matches!(m.i.op_kind(2), OpKind::Immediate8) { m.imm() as u64 } else { q(&m.src(2, 0, 16), 0) };
                let mut r = [0; 64];
                for i in 0..len / 8 {
                    let x = q(&a, i);
                    pq(
                        &mut r,
                        i,
                        match mn {
                            Vpsllq => {
                                if n > 63 {
                                    0
                                } else {
                                    x << n
                                }
                            }
                            Vpsrlq => {
                                if n > 63 {
                                    0
                                } else {
                                    x >> n
                                }
                            }
                            _ => ((x as i64) >> n.min(63)) as u64,
                        },
                    )
                }
                m.put(&r, 8, len)
            }
            Vrndscaleps => {
                let a = m.src(1, 4, len);
                let p = m.imm();
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pf(&mut r, i, rnd(f(&a, i), p))
                }
                m.put(&r, 4, len)
            }
            Vreduceps => {
                let (a, p) = (m.src(1, 4, len), m.imm());
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    let x = f(&a, i);
                    pf(&mut r, i, if x.is_infinite() { 0.0 } else { x - rnd(x, p) })
                }
                m.put(&r, 4, len)
            }
            Vscalefps => {
                let (a, b) = (m.src(1, 4, len), m.src(2, 4, len));
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    // Rounded once: the product is exact in f64.
                    pf(&mut r, i, (f64::from(f(&a, i)) * f64::from(f(&b, i)).floor().exp2()) as f32)
                }
                m.put(&r, 4, len)
            }
            Vcvtps2dq | Vcvttps2dq => {
                let a = m.src(1, 4, len);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    let x = f(&a, i);
                    let y = if mn == Vcvtps2dq { x.round_ties_even() } else { x.trunc() };
                    pd(
                        &mut r,
                        i,
                        if y.is_nan() || y >= 2147483648.0 || y < -2147483648.0 {
                            0x8000_0000
                        } else {
                            y as i32 as u32
                        },
                    )
                }
                m.put(&r, 4, len)
            }
            Vcvtdq2ps => {
                let a = m.src(1, 4, len);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pf(&mut r, i, d(&a, i) as i32 as f32)
                }
                m.put(&r, 4, len)
            }
            Vpmovzxwd => {
                let a = m.src(1, if m.i.op_mask() == Register::None { 0 } else { 2 }, len / 2);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pd(&mut r, i, w(&a, i) as u32)
                }
                m.put(&r, 4, len)
            }
            Vpmovzxdq => {
                let a = m.src(1, 0, len / 2);
                let mut r = [0; 64];
                for i in 0..len / 8 {
                    pq(&mut r, i, d(&a, i) as u64)
                }
                m.put(&r, 8, len)
            }
            Vpmovzxbd | Vpmovsxbd => {
                let a = m.src(1, 0, len / 4);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pd(&mut r, i, if mn == Vpmovzxbd { a[i] as u32 } else { a[i] as i8 as i32 as u32 })
                }
                m.put(&r, 4, len)
            }
            Vpmovsxwd => {
                let a = m.src(1, 0, len / 2);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pd(&mut r, i, w(&a, i) as i16 as i32 as u32)
                }
                m.put(&r, 4, len)
            }
            Vpmovdw => {
                let a = m.src(1, 0, len);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pw(&mut r, i, d(&a, i) as u16)
                }
                m.put(&r, 2, len / 2)
            }
            Vpmovqd => {
                let a = m.src(1, 0, len);
                let mut r = [0; 64];
                for i in 0..len / 8 {
                    pd(&mut r, i, q(&a, i) as u32)
                }
                m.put(&r, 4, len / 2)
            }
            Vpmovqw => {
                let a = m.src(1, 0, len);
                let mut r = [0; 64];
                for i in 0..len / 8 {
                    pw(&mut r, i, q(&a, i) as u16)
                }
                m.put(&r, 2, len / 4)
            }
            Vpmovm2w => {
                let k = q(&m.src(1, 0, 8), 0);
                let mut r = [0; 64];
                for i in 0..len / 2 {
                    pw(&mut r, i, if k >> i & 1 == 1 { !0 } else { 0 })
                }
                m.put(&r, 2, len)
            }
            Vpmovm2d => {
                let k = q(&m.src(1, 0, 8), 0);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pd(&mut r, i, if k >> i & 1 == 1 { !0 } else { 0 })
                }
                m.put(&r, 4, len)
            }
            Vpermt2d | Vpermi2d | Vpermt2ps | Vpermi2ps => {
                let (x, y, b) = (m.src(0, 4, len), m.src(1, 4, len), m.src(2, 4, len));
                let (idx, a) = if matches!(mn, Vpermt2d | Vpermt2ps) { (y, x) } else { (x, y) };
                let n = len / 4;
                let mut r = [0; 64];
                for i in 0..n {
                    let j = d(&idx, i) as usize & (2 * n - 1);
                    pd(&mut r, i, if j < n { d(&a, j) } else { d(&b, j - n) })
                }
                m.put(&r, 4, len)
            }
            Vpermt2q | Vpermi2q | Vpermt2pd | Vpermi2pd => {
                let (x, y, b) = (m.src(0, 8, len), m.src(1, 8, len), m.src(2, 8, len));
                let (idx, a) = if matches!(mn, Vpermt2q | Vpermt2pd) { (y, x) } else { (x, y) };
                let n = len / 8;
                let mut r = [0; 64];
                for i in 0..n {
                    let j = q(&idx, i) as usize & (2 * n - 1);
                    pq(&mut r, i, if j < n { q(&a, j) } else { q(&b, j - n) })
                }
                m.put(&r, 8, len)
            }
            Vpermt2w | Vpermi2w => {
                let (x, y, b) = (m.src(0, 2, len), m.src(1, 2, len), m.src(2, 2, len));
                let (idx, a) = if mn == Vpermt2w { (y, x) } else { (x, y) };
                let n = len / 2;
                let mut r = [0; 64];
                for i in 0..n {
                    let j = w(&idx, i) as usize & (2 * n - 1);
                    pw(&mut r, i, if j < n { w(&a, j) } else { w(&b, j - n) })
                }
                m.put(&r, 2, len)
            }
            Vpermd | Vpermps => {
                let (idx, a) = (m.src(1, 4, len), m.src(2, 4, len));
                let n = len / 4;
                let mut r = [0; 64];
                for i in 0..n {
                    pd(&mut r, i, d(&a, d(&idx, i) as usize & (n - 1)))
                }
                m.put(&r, 4, len)
            }
            Vpshufd => {
                let a = m.src(1, 4, len);
                let p = m.imm() as usize;
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pd(&mut r, i, d(&a, i / 4 * 4 + (p >> (2 * (i % 4)) & 3)))
                }
                m.put(&r, 4, len)
            }
            Vpunpckldq | Vpunpckhdq | Vunpcklps | Vunpckhps => {
                let (a, b) = (m.src(1, 4, len), m.src(2, 4, len));
                let h = if matches!(mn, Vpunpckhdq | Vunpckhps) { 2 } else { 0 };
                let mut r = [0; 64];
                for l in 0..len / 16 {
                    for i in 0..2 {
                        pd(&mut r, 4 * l + 2 * i, d(&a, 4 * l + h + i));
                        pd(&mut r, 4 * l + 2 * i + 1, d(&b, 4 * l + h + i));
                    }
                }
                m.put(&r, 4, len)
            }
            Vpunpcklwd | Vpunpckhwd => {
                let (a, b) = (m.src(1, 0, len), m.src(2, 0, len));
                let h = if mn == Vpunpckhwd { 4 } else { 0 };
                let mut r = [0; 64];
                for l in 0..len / 16 {
                    for i in 0..4 {
                        pw(&mut r, 8 * l + 2 * i, w(&a, 8 * l + h + i));
                        pw(&mut r, 8 * l + 2 * i + 1, w(&b, 8 * l + h + i));
                    }
                }
                m.put(&r, 2, len)
            }
            Vshuff64x2 | Vshufi64x2 | Vshuff32x4 | Vshufi32x4 => {
                let (a, b) = (m.src(1, 4, len), m.src(2, 4, len));
                assert!(len == 64);
                let p = m.imm() as usize;
                let mut r = [0; 64];
                for l in 0..4 {
                    let s = if l < 2 { &a } else { &b };
                    let j = (p >> (2 * l) & 3) * 16;
                    r[16 * l..16 * l + 16].copy_from_slice(&s[j..j + 16]);
                }
                m.put(&r, 4, len)
            }
            Vpermq | Vpermpd if m.i.op_kind(2) == OpKind::Immediate8 => {
                let a = m.src(1, 8, len);
                let p = m.imm() as usize;
                let mut r = [0; 64];
                for i in 0..len / 8 {
                    pq(&mut r, i, q(&a, i / 4 * 4 + (p >> (2 * (i % 4)) & 3)))
                }
                m.put(&r, 8, len)
            }
            Vdpbf16ps => {
                let (c, a, b) = (m.src(0, 4, len), m.src(1, 4, len), m.src(2, 4, len));
                let mut r = [0; 64];
                let x = |z: &Z, i: usize| daz(f32::from_bits((w(z, i) as u32) << 16));
                for i in 0..len / 4 {
                    let mut t = daz(f(&c, i));
                    t = daz(x(&a, 2 * i + 1).mul_add(x(&b, 2 * i + 1), t));
                    t = daz(x(&a, 2 * i).mul_add(x(&b, 2 * i), t));
                    pf(&mut r, i, t);
                }
                m.put(&r, 4, len)
            }
            Vcvtneps2bf16 => {
                let a = m.src(1, 4, len);
                let mut r = [0; 64];
                for i in 0..len / 4 {
                    pw(&mut r, i, half::bf16::from_f32(daz(f(&a, i))).to_bits())
                }
                m.put(&r, 2, len / 2)
            }
            _ => {
                eprintln!("emulate-avx512: not emulated: {} ({mn:?}) at {:#x}", m.show(), m.i.ip());
                libc::abort()
            }
        }
    }
}
