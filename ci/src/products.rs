//! The programs that the project makes, and the guest image that holds some of them.

use std::path::{Path, PathBuf};

use lupin_images::GuestImage;

use crate::host::{self, RunError, say};
use crate::setup::Cache;

/// The products: their crate and their name.
const PRODUCTS: [(&str, &str); 5] = [
    ("lupin-vmm", "lupin-vmm"),
    ("lupin-fabric", "lupin-fabricd"),
    ("lupin-guest-agent", "lupin-guest-agent"),
    ("lupin-guest-agent", "lupin-supervise"),
    ("lupin-wordcount", "lupin-wordcount"),
];

/// Programs that only tests use.
const TEST_PROGRAMS: [(&str, &str); 3] = [
    ("xtask", "lupin-poke"),
    ("xtask", "lupin-member"),
    ("lupin-measure", "lupin-measure"),
];

/// The library's examples, which tests run on pods.
const EXAMPLES: (&str, [&str; 6]) = (
    "lupin",
    ["barrier", "heap", "locks", "map", "pod_allocator", "queue"],
);

/// Which of the two builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// Builds the products, and with the development profile the tests' own programs and the
/// library's examples. Returns the directory that they are in, the examples in `examples` there.
pub(crate) fn build(profile: Profile) -> Result<PathBuf, RunError> {
    let mut cargo = host::cargo("build");
    let tests: &[_] = if profile == Profile::Dev {
        &TEST_PROGRAMS
    } else {
        &[]
    };
    for (package, program) in PRODUCTS.iter().chain(tests) {
        cargo.args(["--package", package, "--bin", program]);
    }
    if profile == Profile::Dev {
        let (package, examples) = EXAMPLES;
        cargo.args(["--package", package]);
        for example in examples {
            cargo.args(["--example", example]);
        }
    }
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    host::run_ok(&mut cargo)?;
    Ok(directory(profile))
}

/// Where cargo puts them.
pub(crate) fn directory(profile: Profile) -> PathBuf {
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => host::checkout().join(dir),
        None => host::checkout().join("target"),
    };
    target.join("x86_64-unknown-linux-gnu").join(match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    })
}

/// The names of those programs that are in `directory`.
pub(crate) fn built(directory: &Path) -> Vec<&'static str> {
    PRODUCTS
        .iter()
        .chain(&TEST_PROGRAMS)
        .map(|(_, program)| *program)
        .filter(|program| directory.join(program).is_file())
        .collect()
}

/// A guest image with the agent and the applications that are in `directory`.
pub(crate) fn guest_image(cache: &Cache, directory: &Path) -> GuestImage {
    let mut image = GuestImage::new(&cache.busybox());
    for name in built(directory) {
        let program = directory.join(name);
        match name {
            // The last runs in namespace nodes only.
            "lupin-vmm" | "lupin-fabricd" | "lupin-measure" => {}
            "lupin-guest-agent" => image = image.agent(&program),
            application => image = image.program(&program, &format!("/usr/bin/{application}")),
        }
    }
    if !directory.join("lupin-guest-agent").is_file() {
        say!(
            "the guest image gets no agent: there is none in {}",
            directory.display()
        );
    }
    image
}
