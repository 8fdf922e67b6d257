//! Memory of the process and of the machine, as the system counts it.

use std::fs;

/// Largest resident set of this process so far, bytes. `None` where the system does not say (outside Linux).
pub fn peak_resident() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// Resident set of this process now, bytes.
pub fn resident() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

/// Resident memory of this process that no file stands behind, bytes: the system may take the pages of a mapped model back, so
/// they are nobody's need. All that is resident where the system does not tell them apart.
pub fn anonymous() -> Option<u64> {
    field("/proc/self/status", "RssAnon:").or_else(resident)
}

/// Memory that can be had without swapping, bytes.
pub fn available() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// A `Name:   123 kB` line.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_at_least_what_is_resident() {
        // Other tests allocate meanwhile, and the system counts in batches: some slack.
        let (now, peak) = (resident().unwrap_or(0), peak_resident().unwrap_or(0));
        let own = anonymous().unwrap_or(0);
        assert!(own > 0 && own <= now + (8 << 20), "{own} of {now}");
        assert!(now > 0 && peak + (8 << 20) >= now && available().is_some(), "{now} resident, {peak} at the peak");
    }
}
