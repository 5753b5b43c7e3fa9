//! A namespace node that does nothing but store to pod memory, from several threads.
//!
//! It stands where the agent belongs and understands as much of the agent's command line as it
//! needs. The manager's namespace set-up starts it, so it is fenced like any namespace node.

use std::convert::Infallible;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use lupin_abi::PodHeader;
use lupin_abi::layout::HEADER_SIZE;

use crate::counters::{self, storers};

/// The flag with which the manager starts an agent in a namespace.
const AGENT_FLAG: &str = "--namespace";

/// Whether this process was started where the agent belongs.
pub fn is_wanted() -> bool {
    std::env::args().any(|argument| argument == AGENT_FLAG)
}

/// The life of the node.
pub fn run() -> ! {
    let Err(error) = store();
    eprintln!("node: {error}");
    std::process::exit(2)
}

fn store() -> Result<Infallible, Box<dyn std::error::Error>> {
    let number = |flag: &str| -> Result<i32, Box<dyn std::error::Error>> {
        let mut arguments = std::env::args().skip_while(|word| word != flag);
        let word = arguments.nth(1).ok_or(format!("there is no {flag}"))?;
        Ok(word.parse()?)
    };
    let node = u32::try_from(number("--node")?)?;
    let fd = number("--pod-memory-fd")?;
    // SAFETY: the manager lets this process inherit the descriptor for its own use.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut bytes = [0; HEADER_SIZE];
    file.read_exact_at(&mut bytes, 0)?;
    let header = PodHeader::decode(&bytes, file.metadata()?.len())?;
    counters::count(file, header.pool().offset, node, storers())
}
