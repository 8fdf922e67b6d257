//! Which room may depend on which: the table of ARCHITECTURE.md as data, and its check.

use crate::metadata::{Kind, Metadata, Package};

/// A room, its floor, and the rooms that it may use in `[dependencies]` and `[build-dependencies]`.
struct Room {
    name: &'static str,
    floor: u8,
    uses: Uses,
}

enum Uses {
    /// These rooms.
    Only(&'static [&'static str]),
    /// Every room but those for development and these.
    AllBut(&'static [&'static str]),
    /// Everything, for the tests that cross crates.
    Everything,
}

const fn room(name: &'static str, floor: u8, uses: Uses) -> Room {
    Room { name, floor, uses }
}

/// Rooms that only `[dev-dependencies]` may name.
const DEV_ONLY: [&str; 3] = ["testkit", "xtask", "tests"];

/// Packages that may use `anyhow`: nobody matches on their errors.
const ANYHOW: [&str; 3] = ["cli", "xtask", "tests"];

/// From the ground up. A new crate is a new line here, with its floor and the least that it needs.
const ROOMS: [Room; 17] = [
    room("kernels", 0, Uses::Only(&[])),
    room("tokenizer", 0, Uses::Only(&[])),
    room("formats", 0, Uses::Only(&[])),
    room("ops", 1, Uses::Only(&["kernels"])),
    room("data", 1, Uses::Only(&["tokenizer"])),
    room("testkit", 2, Uses::Only(&["kernels", "ops"])),
    room("nn", 2, Uses::Only(&["ops", "formats"])),
    room("models", 3, Uses::Only(&["nn", "ops", "formats"])),
    room("adapters", 3, Uses::Only(&["nn", "ops", "formats"])),
    room("train", 4, Uses::Only(&["adapters", "models", "nn", "ops", "formats", "data", "tokenizer", "kernels"])),
    room("sampler", 4, Uses::Only(&[])),
    room("engine", 5, Uses::Only(&["models", "nn", "ops", "sampler"])),
    room("eval", 5, Uses::Only(&[])),
    room("tallow", 7, Uses::AllBut(&["cli"])),
    room("cli", 8, Uses::AllBut(&[])),
    room("xtask", 8, Uses::Only(&[])),
    room("tests", 9, Uses::Everything),
];

/// The room that a package is: its name without the prefix.
pub fn room_of(package: &str) -> &str {
    package.strip_prefix("tallow-").unwrap_or(package)
}

/// Every violation, one readable line each.
pub fn check(metadata: &Metadata) -> Vec<String> {
    let members: Vec<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    metadata.packages.iter().flat_map(|package| check_package(package, &members)).collect()
}

fn check_package(package: &Package, members: &[&str]) -> Vec<String> {
    let name = room_of(&package.name);
    let Some(room) = ROOMS.iter().find(|room| room.name == name) else {
        return vec![format!("{}: not in the table of rooms; add it to ROOMS with its floor and edges", package.name)];
    };
    let mut violations = Vec::new();
    for dependency in &package.dependencies {
        if dependency.name == "anyhow" && !ANYHOW.contains(&name) {
            violations.push(format!("{name}: uses anyhow; a library gives a typed error (only {})", ANYHOW.join(", ")));
        }
        if !members.contains(&dependency.name.as_str()) {
            continue;
        }
        let used = room_of(&dependency.name);
        let (allowed, table) = match dependency.kind {
            Some(Kind::Dev) => (may_test_with(room, used), "[dev-dependencies]"),
            Some(Kind::Build) => (may_use(room, used), "[build-dependencies]"),
            None => (may_use(room, used), "[dependencies]"),
        };
        if !allowed {
            violations
                .push(format!("{name} -> {used} in {table} is not an allowed edge; allowed: {}", allowed_of(room)));
        }
    }
    violations
}

fn may_use(room: &Room, used: &str) -> bool {
    match &room.uses {
        Uses::Only(names) => names.contains(&used),
        Uses::AllBut(names) => used != room.name && !names.contains(&used) && !DEV_ONLY.contains(&used),
        Uses::Everything => true,
    }
}

/// Tests may also use the testkit, and any room on a lower floor.
fn may_test_with(room: &Room, used: &str) -> bool {
    let lower = ROOMS.iter().any(|other| other.name == used && other.floor < room.floor);
    used == "testkit" || may_use(room, used) || (lower && !DEV_ONLY.contains(&used))
}

fn allowed_of(room: &Room) -> String {
    match &room.uses {
        Uses::Only([]) => "none".to_string(),
        Uses::Only(names) => names.join(", "),
        Uses::AllBut([]) => format!("all but {}", DEV_ONLY.join(", ")),
        Uses::AllBut(names) => format!("all but {}, {}", names.join(", "), DEV_ONLY.join(", ")),
        Uses::Everything => "all".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `cargo metadata` would say of a workspace with one package that has these dependencies `(name, kind)`, and
    /// all other rooms beside it.
    fn workspace(package: &str, dependencies: &[(&str, Option<&str>)]) -> Metadata {
        let listed: Vec<_> = dependencies
            .iter()
            .map(|(name, kind)| serde_json::json!({"name": name, "kind": kind, "req": "*"}))
            .collect();
        let mut packages =
            vec![serde_json::json!({"name": package, "manifest_path": "p/Cargo.toml", "dependencies": listed})];
        for other in ROOMS.iter().map(|room| package_of(room.name)).filter(|other| other != package) {
            packages.push(serde_json::json!({"name": other, "manifest_path": "o/Cargo.toml", "dependencies": []}));
        }
        serde_json::from_value(serde_json::json!({ "packages": packages })).unwrap()
    }

    fn package_of(room: &str) -> String {
        if room == "tallow" || room == "xtask" { room.to_string() } else { format!("tallow-{room}") }
    }

    fn violations(package: &str, dependencies: &[(&str, Option<&str>)]) -> Vec<String> {
        check(&workspace(package, dependencies))
    }

    #[test]
    fn allowed_edges_pass() {
        assert!(violations("tallow-ops", &[("tallow-kernels", None), ("candle-core", None)]).is_empty());
        assert!(violations("tallow-train", &[("tallow-models", None), ("tallow-data", None)]).is_empty());
        assert!(violations("tallow", &[("tallow-train", None), ("tallow-sampler", None)]).is_empty());
        assert!(violations("tallow-cli", &[("tallow-train", None), ("anyhow", None)]).is_empty());
        assert!(violations("tallow-tests", &[("tallow", Some("dev")), ("tallow-testkit", Some("dev"))]).is_empty());
    }

    #[test]
    fn forbidden_edges_are_named() {
        let upward = violations("tallow-ops", &[("tallow-nn", None)]);
        assert_eq!(upward, ["ops -> nn in [dependencies] is not an allowed edge; allowed: kernels"]);
        assert_eq!(violations("tallow-models", &[("tallow-tokenizer", None)]).len(), 1);
        assert_eq!(violations("tallow-sampler", &[("tallow-models", None), ("tallow-nn", None)]).len(), 2);
        assert_eq!(violations("tallow-data", &[("tallow-formats", Some("build"))]).len(), 1);
        assert_eq!(violations("tallow", &[("tallow-cli", None)]).len(), 1);
    }

    #[test]
    fn the_testkit_is_for_tests_alone() {
        assert_eq!(violations("tallow-ops", &[("tallow-testkit", None)]).len(), 1);
        assert_eq!(violations("tallow-cli", &[("tallow-testkit", None)]).len(), 1);
        assert!(violations("tallow-kernels", &[("tallow-testkit", Some("dev"))]).is_empty());
    }

    #[test]
    fn tests_may_look_down_but_not_up_or_sideways() {
        assert!(violations("tallow-models", &[("tallow-tokenizer", Some("dev"))]).is_empty());
        assert_eq!(violations("tallow-nn", &[("tallow-models", Some("dev"))]).len(), 1);
        assert_eq!(violations("tallow-sampler", &[("tallow-train", Some("dev"))]).len(), 1);
        assert_eq!(violations("tallow-cli", &[("xtask", Some("dev"))]).len(), 1);
    }

    #[test]
    fn anyhow_stays_out_of_libraries() {
        for kind in [None, Some("dev"), Some("build")] {
            assert_eq!(violations("tallow-nn", &[("anyhow", kind)]).len(), 1);
        }
        assert!(violations("xtask", &[("anyhow", None)]).is_empty());
    }

    #[test]
    fn a_package_outside_the_table_is_an_error() {
        let found = violations("tallow-surprise", &[]);
        assert_eq!(found, ["tallow-surprise: not in the table of rooms; add it to ROOMS with its floor and edges"]);
    }

    #[test]
    fn the_table_itself_points_down() {
        for room in &ROOMS {
            if let Uses::Only(names) = &room.uses {
                for name in *names {
                    let used = ROOMS.iter().find(|other| other.name == *name).unwrap();
                    assert!(used.floor < room.floor, "{} -> {name}", room.name);
                }
            }
        }
    }
}
