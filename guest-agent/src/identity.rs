//! Who this node is: from the kernel command line of a guest, or from flags of a namespace node.

use std::time::Duration;

use lupin_abi::layout::GRANULE;
use lupin_abi::{Generation, InstanceId, NodeId};

/// Heartbeat period when nobody says otherwise.
pub const DEFAULT_HEARTBEAT: Duration = Duration::from_millis(8);
/// Longest heartbeat period that is accepted.
pub const MAX_HEARTBEAT_MS: u64 = 1000;

/// This node, in this life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node's number.
    pub node: NodeId,
    /// The life that the node's process was started for.
    pub generation: Generation,
    /// Time between two heartbeats.
    pub heartbeat: Duration,
}

impl Identity {
    /// Checks the parts of an identity.
    ///
    /// # Errors
    /// [`IdentityError`] naming the part that is out of range.
    pub fn new(node: u32, generation: u32, heartbeat_ms: u64) -> Result<Self, IdentityError> {
        let range = |key: &str, value: u64, rule: &str| IdentityError::Value {
            key: key.into(),
            value: value.to_string(),
            rule: rule.into(),
        };
        let id = NodeId::new(node).ok_or_else(|| range("node", node.into(), "1 to 1024"))?;
        if generation == 0 {
            return Err(range("generation", 0, "at least 1"));
        }
        if !(1..=MAX_HEARTBEAT_MS).contains(&heartbeat_ms) {
            return Err(range("heartbeat_ms", heartbeat_ms, "1 to 1000"));
        }
        Ok(Self {
            node: id,
            generation,
            heartbeat: Duration::from_millis(heartbeat_ms),
        })
    }

    /// The word that owns what this node owns.
    pub fn instance(&self) -> InstanceId {
        InstanceId::of_node(self.node, self.generation)
    }
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub size: u64,
}

impl PhysRange {
    /// The first byte after the range.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }

    /// Whether `other` lies wholly inside.
    pub fn contains(&self, other: &PhysRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &PhysRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl std::fmt::Display for PhysRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.size)
    }
}

/// Where the sections of pod memory lie in a guest's physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sections {
    /// The fabric section.
    pub fabric: PhysRange,
    /// This node's own section.
    pub node: PhysRange,
    /// The system section, instances included.
    pub system: PhysRange,
    /// The pool.
    pub pool: PhysRange,
}

/// Why the node does not know who it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// A word is missing from the kernel command line.
    #[error("the kernel command line has no {0}: this system was not started as a node of a pod")]
    Missing(&'static str),
    /// A value is not a number or out of its range.
    #[error("{key} = {value:?} is not valid: expected {rule}")]
    Value {
        /// Which word or flag.
        key: String,
        /// What it says.
        value: String,
        /// What it may say.
        rule: String,
    },
    /// The list of sections is not well-formed.
    #[error("lupin.sections: {0}")]
    Sections(String),
}

/// Reads the identity and the sections from the text of a kernel command line.
///
/// Of a word given twice the last one counts, as everywhere in the kernel.
///
/// # Errors
/// [`IdentityError`] naming the word that is missing or not valid.
pub fn from_cmdline(text: &str) -> Result<(Identity, Sections), IdentityError> {
    let word = |key: &str| {
        text.split_whitespace()
            .filter_map(|w| w.strip_prefix(key)?.strip_prefix('='))
            .next_back()
    };
    let number = |key: &'static str, value: &str| {
        value.parse::<u64>().map_err(|_| IdentityError::Value {
            key: key.into(),
            value: value.into(),
            rule: "a decimal number".into(),
        })
    };
    let required = |key: &'static str| {
        let value = word(key).ok_or(IdentityError::Missing(key))?;
        let number = number(key, value)?;
        u32::try_from(number).map_err(|_| IdentityError::Value {
            key: key.into(),
            value: value.into(),
            rule: "a 32-bit number".into(),
        })
    };
    let node = required("lupin.node")?;
    let generation = required("lupin.generation")?;
    let heartbeat_ms = match word("lupin.heartbeat_ms") {
        Some(value) => number("lupin.heartbeat_ms", value)?,
        None => DEFAULT_HEARTBEAT.as_millis() as u64,
    };
    let sections = word("lupin.sections").ok_or(IdentityError::Missing("lupin.sections"))?;
    Ok((
        Identity::new(node, generation, heartbeat_ms)?,
        parse_sections(sections)?,
    ))
}

fn parse_sections(text: &str) -> Result<Sections, IdentityError> {
    let bad = |what: String| Err(IdentityError::Sections(what));
    let mut found: [Option<PhysRange>; 4] = [None; 4];
    const NAMES: [&str; 4] = ["fabric", "node", "system", "pool"];
    for item in text.split(',') {
        let Some((name, range)) = item.split_once('@') else {
            return bad(format!("{item:?} is not of the form name@0xADDR+0xSIZE"));
        };
        let Some(index) = NAMES.iter().position(|n| *n == name) else {
            return bad(format!("unknown section {name:?}"));
        };
        let parsed = range
            .split_once('+')
            .and_then(|(start, size)| Some((hex(start)?, hex(size)?)));
        let Some((start, size)) = parsed else {
            return bad(format!("{item:?} is not of the form name@0xADDR+0xSIZE"));
        };
        if size == 0 || start.checked_add(size).is_none() {
            return bad(format!("{item:?} is empty or beyond the address space"));
        }
        if !start.is_multiple_of(GRANULE) || !size.is_multiple_of(GRANULE) {
            return bad(format!("{item:?} is not aligned to 2 MiB"));
        }
        let range = PhysRange { start, size };
        if let Some(other) = found
            .iter()
            .position(|o| o.is_some_and(|o| o.overlaps(&range)))
        {
            return bad(format!("{name} at {range} overlaps {}", NAMES[other]));
        }
        if found[index].replace(range).is_some() {
            return bad(format!("{name} is given twice"));
        }
    }
    match found {
        [Some(fabric), Some(node), Some(system), Some(pool)] => Ok(Sections {
            fabric,
            node,
            system,
            pool,
        }),
        _ => {
            let missing = NAMES.iter().zip(found).find(|(_, f)| f.is_none());
            bad(format!("{} is missing", missing.map_or("one", |(n, _)| n)))
        }
    }
}

fn hex(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x")?;
    // `from_str_radix` alone would also take a sign.
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
#[path = "identity_test.rs"]
mod identity_test;
