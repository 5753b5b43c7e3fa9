//! The guest kernel's command line.
//!
//! What the VMM needs comes first and what the operator adds comes last: the kernel lets the
//! last of two equal parameters win, and everything after `--` goes to init.

use crate::memory::PodMemory;

/// Parameters of every guest.
///
/// * A panic, an oops or a stuck processor must end the guest at once instead of leaving a
///   node that is neither alive nor dead.
/// * Reset goes through the ACPI register: a triple fault, the other way to reset without
///   firmware, could not be told from a crash.
/// * Devices are virtio without an IOMMU: a bounce buffer would only take 64 MiB of RAM.
const ALWAYS: &str = "console=ttyS0 panic=-1 oops=panic softlockup_panic=1 reboot=acpi \
                      swiotlb=noforce";

/// Parameters of a guest with pod memory: leave the dax regions idle, and keep the page
/// allocator from taking the shared memory for RAM.
const WITH_POD: &str = "dax_hmem.region_idle=1 modprobe.blacklist=kmem";

/// A command line under construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine(String);

impl CommandLine {
    /// The command line of a guest with the given pod memory, if any, and the operator's
    /// additions.
    pub fn new(pod: Option<&PodMemory>, extra: &str) -> Self {
        let mut line = String::from(ALWAYS);
        if let Some(pod) = pod {
            line.push_str(&format!(
                " {WITH_POD} lupin.node={} lupin.generation={} lupin.heartbeat_ms={} \
                 lupin.sections={}",
                pod.spec.node,
                pod.spec.generation,
                pod.spec.heartbeat_ms,
                pod.command_line_value(),
            ));
        }
        if !extra.trim().is_empty() {
            line.push(' ');
            line.push_str(extra.trim());
        }
        Self(line)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text with its terminating NUL, at most `limit` bytes.
    ///
    /// # Errors
    /// Says what is wrong with the text.
    pub fn to_bytes(&self, limit: usize) -> Result<Vec<u8>, String> {
        if let Some(c) = self.0.chars().find(|c| c.is_control()) {
            return Err(format!("contains the control character {c:?}"));
        }
        if self.0.len() >= limit {
            return Err(format!(
                "is {} bytes long with what the VMM adds; this kernel takes {}",
                self.0.len(),
                limit - 1
            ));
        }
        let mut bytes = self.0.clone().into_bytes();
        bytes.push(0);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn additions_come_last() {
        let line = CommandLine::new(None, " quiet console=hvc0 -- arg ");
        assert!(line.as_str().starts_with("console=ttyS0 "));
        assert!(line.as_str().ends_with(" quiet console=hvc0 -- arg"));
        assert!(!line.as_str().contains("dax_hmem"));
    }

    #[test]
    fn refuses_control_characters_and_excess() {
        assert!(
            CommandLine::new(None, "a\nb")
                .to_bytes(4096)
                .unwrap_err()
                .contains("\\n")
        );
        let error = CommandLine::new(None, &"x".repeat(3000))
            .to_bytes(2048)
            .unwrap_err();
        assert!(error.contains("2047"), "{error}");
        assert_eq!(
            CommandLine::new(None, "x").to_bytes(2048).unwrap().last(),
            Some(&0)
        );
    }
}
