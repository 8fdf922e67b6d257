//! `tallow doctor`: what this machine and this build can do, and what is missing.

use std::fs;
use std::io::Write;
use std::path::Path;

use clap::Args;
use serde::Serialize;
use tallow_kernels::peak;
use tallow_kernels::simd::{self, Level};
use tallow_train::memory;
use tallow_train::progress::format_bytes;

/// Arguments of `tallow doctor`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow doctor
  tallow doctor --json
  tallow doctor --threads 1")]
pub struct DoctorArgs {
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// All that is found.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    build: &'static str,
    devices: Vec<Device>,
    features: Features,
    cpu: Cpu,
    threads: usize,
    caches: Caches,
    memory: Memory,
    peak: Peak,
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    usable: bool,
}

/// What candle was compiled with.
#[derive(Serialize)]
struct Features {
    cuda: bool,
    metal: bool,
    accelerate: bool,
    mkl: bool,
}

#[derive(Serialize)]
struct Cpu {
    model: Option<String>,
    cores: usize,
    /// The level that the kernels use.
    simd: String,
    instructions: Vec<&'static str>,
}

/// Bytes, of the first core.
#[derive(Default, Serialize)]
struct Caches {
    l1d: Option<u64>,
    l2: Option<u64>,
    l3: Option<u64>,
}

/// Bytes.
#[derive(Serialize)]
struct Memory {
    total: Option<u64>,
    available: Option<u64>,
}

/// Measured, all threads together.
#[derive(Serialize)]
struct Peak {
    f32_gflops: f64,
    bf16_gflops: f64,
    /// Whether bf16 is multiplied by instructions for it.
    bf16_native: bool,
    /// Whether f32 products are made of bf16's.
    f32_in_parts: bool,
    read_gb_per_s: f64,
    copy_gb_per_s: f64,
}

/// Something that would make this faster or larger.
#[derive(Serialize)]
struct Missing {
    what: String,
    how: String,
}

/// Runs `tallow doctor`.
pub fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let report = Report::gather();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        report.print(&mut out)?;
    }
    Ok(())
}

impl Report {
    fn gather() -> Self {
        let features = Features {
            cuda: candle_core::utils::cuda_is_available(),
            metal: candle_core::utils::metal_is_available(),
            accelerate: candle_core::utils::has_accelerate(),
            mkl: candle_core::utils::has_mkl(),
        };
        let cpu = Cpu {
            model: cpu_model(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            simd: format!("{:?}", simd::level()).to_lowercase(),
            instructions: instructions(),
        };
        let bandwidth = peak::bandwidth();
        let peak = Peak {
            f32_gflops: peak::f32_flops() / 1e9,
            bf16_gflops: peak::bf16_flops() / 1e9,
            bf16_native: peak::native_bf16(),
            f32_in_parts: peak::f32_in_parts(),
            read_gb_per_s: bandwidth.read / 1e9,
            copy_gb_per_s: bandwidth.copy / 1e9,
        };
        let mut report = Self {
            version: env!("CARGO_PKG_VERSION"),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
            devices: devices(&features),
            features,
            cpu,
            threads: rayon::current_num_threads(),
            caches: caches(Path::new("/sys/devices/system/cpu/cpu0/cache")),
            memory: Memory { total: total_memory(), available: memory::available() },
            peak,
            missing: vec![],
        };
        report.missing = report.find_missing();
        report
    }

    fn find_missing(&self) -> Vec<Missing> {
        let mut missing = vec![];
        let mut add = |what: &str, how: &str| missing.push(Missing { what: what.into(), how: how.into() });
        if self.build == "debug" {
            add("this is a debug build, several times slower", "build with `cargo build --release`");
        }
        for device in self.devices.iter().filter(|d| !d.usable) {
            add(
                &format!("{} is there, but this build computes on the CPU only", device.name),
                "use the CPU for now; no feature of this version reaches the device",
            );
        }
        if let Ok(level) = std::env::var("TALLOW_SIMD") {
            add(&format!("TALLOW_SIMD={level} limits the instruction set"), "unset TALLOW_SIMD");
        } else if cfg!(target_arch = "x86_64") && simd::level() == Level::Scalar {
            add("the CPU has neither AVX2 nor AVX-512", "use a CPU of 2013 or later");
        }
        if !self.peak.bf16_native {
            add(
                "the CPU does not multiply bf16 faster than f32",
                "train with `train.dtype = \"f32\"` for speed; bf16 saves memory all the same",
            );
        }
        if self.threads < self.cpu.cores {
            let what = format!("only {} of {} cores are used", self.threads, self.cpu.cores);
            add(&what, "leave --threads and RAYON_NUM_THREADS unset to use all cores");
        }
        if self.memory.available.is_some_and(|bytes| bytes < 2 << 30) {
            add(
                "less than 2 GiB of memory is free",
                "close other programs, or train with small batches (`tallow plan`)",
            );
        }
        missing
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let size = |bytes: Option<u64>| bytes.map_or("?".into(), format_bytes);
        let yes = |b: bool| if b { "yes" } else { "no" };
        let (cpu, caches, peak) = (&self.cpu, &self.caches, &self.peak);
        writeln!(out, "tallow       {} ({} build)", self.version, self.build)?;
        for device in &self.devices {
            writeln!(
                out,
                "device       {}{}",
                device.name,
                if device.usable { "" } else { " (not usable by this build)" }
            )?;
        }
        let f = &self.features;
        let features = [("cuda", f.cuda), ("metal", f.metal), ("accelerate", f.accelerate), ("mkl", f.mkl)];
        let features: Vec<String> = features.iter().map(|(name, on)| format!("{name} {}", yes(*on))).collect();
        writeln!(out, "features     {}", features.join(", "))?;
        writeln!(out, "cpu          {}", cpu.model.as_deref().unwrap_or("unknown"))?;
        writeln!(out, "threads      {} of {} cores", self.threads, cpu.cores)?;
        writeln!(out, "simd         {} (of {})", cpu.simd, cpu.instructions.join(" "))?;
        writeln!(out, "caches       L1d {}, L2 {}, L3 {}", size(caches.l1d), size(caches.l2), size(caches.l3))?;
        writeln!(out, "memory       {} free of {}", size(self.memory.available), size(self.memory.total))?;
        let native = if peak.bf16_native { "native" } else { "widened to f32" };
        let parts = if peak.f32_in_parts { " (products in three parts of bf16)" } else { "" };
        writeln!(
            out,
            "peak         {:.1} GFLOP/s f32{parts}, {:.1} bf16 ({native})",
            peak.f32_gflops, peak.bf16_gflops
        )?;
        writeln!(out, "bandwidth    {:.1} GB/s read, {:.1} copy", peak.read_gb_per_s, peak.copy_gb_per_s)?;
        if self.missing.is_empty() {
            writeln!(out, "missing      nothing")?;
        }
        for missing in &self.missing {
            writeln!(out, "missing      {}\n             -> {}", missing.what, missing.how)?;
        }
        Ok(())
    }
}

/// The CPU, and what else is plugged in, usable or not.
fn devices(features: &Features) -> Vec<Device> {
    let mut devices = vec![Device { name: "cpu".into(), usable: true }];
    let gpus = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    devices.extend(gpus.map(|gpu| {
        let information = fs::read_to_string(gpu.path().join("information")).unwrap_or_default();
        let model = after_colon(&information, "Model").unwrap_or_else(|| "NVIDIA GPU".into());
        Device { name: format!("cuda ({model})"), usable: features.cuda }
    }));
    if features.metal {
        devices.push(Device { name: "metal".into(), usable: true });
    }
    devices
}

fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    after_colon(&text, "model name").or_else(|| after_colon(&text, "Model"))
}

/// The value of the first `key : value` line.
fn after_colon(text: &str, key: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
}

fn total_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 = after_colon(&text, "MemTotal")?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Sizes of the data and unified caches in a folder of the kernel's form.
fn caches(dir: &Path) -> Caches {
    let mut caches = Caches::default();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default().trim().to_owned();
        if read("type") == "Instruction" {
            continue;
        }
        let size = parse_size(&read("size"));
        match read("level").as_str() {
            "1" => caches.l1d = size,
            "2" => caches.l2 = size,
            "3" => caches.l3 = size,
            _ => {}
        }
    }
    caches
}

/// `32K`, `1024K`, `16M`.
fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.trim_end_matches(char::is_alphabetic).len());
    let scale = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

/// The instruction sets of this CPU that matter to the kernels.
fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("avx512fp16", is_x86_feature_detected!("avx512fp16")),
            ("amx", tallow_kernels::simd::best() >= tallow_kernels::simd::Level::Amx),
        ];
        all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        let all = [
            ("neon", std::arch::is_aarch64_feature_detected!("neon")),
            ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
            ("sve", std::arch::is_aarch64_feature_detected!("sve")),
        ];
        all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        vec![]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_caches() {
        let table =
            [("32K", Some(32 << 10)), ("16M", Some(16 << 20)), ("7", Some(7)), ("", None), ("K", None), ("1X", None)];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
    }

    #[test]
    fn caches_of_a_kernel_folder() {
        let dir = tempfile::tempdir().unwrap();
        for (i, (level, kind, size)) in
            [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")].into_iter().enumerate()
        {
            let index = dir.path().join(format!("index{i}"));
            fs::create_dir(&index).unwrap();
            for (name, value) in [("level", level), ("type", kind), ("size", size)] {
                fs::write(index.join(name), format!("{value}\n")).unwrap();
            }
        }
        let found = caches(dir.path());
        assert_eq!((found.l1d, found.l2, found.l3), (Some(48 << 10), Some(2 << 20), None));
        assert_eq!(caches(&dir.path().join("none")).l1d, None);
    }

    #[test]
    fn values_behind_colons() {
        let text = "processor\t: 0\nmodel name\t: Some CPU: fast\nmodel name : other\n";
        assert_eq!(after_colon(text, "model name").as_deref(), Some("Some CPU: fast"));
        assert_eq!(after_colon(text, "flags"), None);
    }
}
