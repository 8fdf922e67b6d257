//! Runs compiled AVX-512 code (F, BW, DQ, VL, BF16) on an x86-64 Linux machine without it: `scripts/emulate-avx512/run`.
//!
//! Loaded before a program, it takes the signal that an unknown instruction raises, decodes the instruction where it
//! stands, carries it out on the thread's registers, those of the CPU in the signal's frame and the rest in memory, and lets
//! the program go on behind it. So the code that a compiler made is tested as it is, at about a microsecond an
//! instruction. Rounding is to nearest; exceptions and other rounding modes are not there.
//!
//! An instruction of 128 or 256 bits, which this CPU carries out itself, clears the upper bits of its result. To see them
//! all, the code is single-stepped from its first AVX-512 instruction to the `vzeroupper` that ends every such function. With
//! `EMULATE_FAST` set it is not, and a write is seen by its change: faster, and wrong where it writes what was there.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod execute;
mod machine;

use std::cell::UnsafeCell;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind};

use machine::{Ctx, EXACT, M, State, knum, vnum};

thread_local! {
    static STATE: UnsafeCell<Option<Box<State>>> = const { UnsafeCell::new(None) };
}

/// Whether this CPU lacks the instruction: EVEX encodings and everything on masks.
fn is_lacking(i: &Instruction) -> bool {
    let on_masks = || (0..i.op_count()).any(|o| i.op_kind(o) == OpKind::Register && knum(i.op_register(o)).is_some());
    match i.encoding() {
        EncodingKind::EVEX => true,
        EncodingKind::VEX => on_masks(),
        _ => false,
    }
}

/// The vector that an instruction of this CPU is about to write, clearing what is above 256 bits.
fn clears(i: &Instruction) -> Option<usize> {
    use Mnemonic::{Vcomisd, Vcomiss, Vptest, Vtestps, Vucomisd, Vucomiss};
    let only_reads = matches!(i.mnemonic(), Vptest | Vtestps | Vucomiss | Vcomiss | Vucomisd | Vcomisd);
    let writes =
        i.encoding() == EncodingKind::VEX && i.op_count() > 0 && i.op_kind(0) == OpKind::Register && !only_reads;
    writes.then(|| vnum(i.op_register(0))).flatten().map(|(n, _)| n)
}

/// The trap flag: a signal after the next instruction.
const SINGLE_STEP: i64 = 0x100;

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands over a context in the standard layout: 512 bytes as of fxsave, the header whose first word
    // says which parts are valid, and the upper halves of the 256-bit registers at 576.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let gregs = context.uc_mcontext.gregs.as_mut_ptr();
        let fx = context.uc_mcontext.fpregs.cast::<u8>();
        let valid = fx.add(512).cast::<u64>();
        if *valid & 2 == 0 {
            std::ptr::write_bytes(fx.add(160), 0, 256);
        }
        if *valid & 4 == 0 {
            std::ptr::write_bytes(fx.add(576), 0, 256);
        }
        *valid |= 6;
        let state = (*STATE.with(UnsafeCell::get)).get_or_insert_with(|| Box::new(State::new()));
        state.look(&Ctx { gregs, fx });
        let mut first = true;
        loop {
            let rip = *gregs.add(libc::REG_RIP as usize) as u64;
            let slot = (rip as usize >> 1) % state.decoded.len();
            if state.decoded[slot].0 != rip {
                let bytes = std::slice::from_raw_parts(rip as *const u8, 15);
                state.decoded[slot] = (rip, Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE).decode());
            }
            let i = state.decoded[slot].1;
            if is_lacking(&i) {
                first = false;
                *gregs.add(libc::REG_RIP as usize) = i.next_ip() as i64;
                execute::step(&mut M { s: &mut *state, c: Ctx { gregs, fx }, i });
                continue;
            }
            if first && signal == libc::SIGILL {
                eprintln!("emulate-avx512: not an instruction to emulate: {:?} at {rip:#x}", i.mnemonic());
                libc::abort();
            }
            let flags = gregs.add(libc::REG_EFL as usize);
            if matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
                state.high = [[0; 32]; 16];
                *flags &= !SINGLE_STEP;
                return;
            }
            if let Some(n) = clears(&i) {
                state.high[n] = [0; 32];
            }
            if EXACT.load(Ordering::Relaxed) {
                *flags |= SINGLE_STEP;
            }
            return;
        }
    }
}

extern "C" fn start() {
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and nothing else runs yet.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut());
        libc::sigaction(libc::SIGTRAP, &action, std::ptr::null_mut());
        EXACT.store(libc::getenv(c"EMULATE_FAST".as_ptr()).is_null(), Ordering::Relaxed);
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
