//! What is heard of a command.

use lupin_abi::port::ExecStatus;

/// What a command tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecMessage {
    /// It runs.
    Started {
        /// Its pid inside the node.
        pid: u32,
    },
    /// It wrote something. Larger than a frame's chunk if the consumer was slow.
    Output {
        /// Whether to standard error.
        stderr: bool,
        /// What.
        data: Vec<u8>,
    },
    /// It took this many bytes of its standard input.
    Credit {
        /// Bytes.
        bytes: u32,
    },
    /// It is over, and all its output was delivered before.
    Exited(ExecStatus),
}
