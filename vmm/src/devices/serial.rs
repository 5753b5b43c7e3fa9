//! The first serial port: a 16550 whose output goes to a file, to the terminal or nowhere.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::{fmt, io};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::output::{Output, OutputWriter};
use crate::run::options::{KeyValues, OptionError};

/// `--serial file=PATH|tty|null`
///
/// Where the first serial port (ttyS0, the kernel's console) leads: a file that is truncated
/// first, this terminal (Ctrl-A x stops the guest), or nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialSpec {
    /// Output to a file, no input.
    File(PathBuf),
    /// Standard input and output of the VMM.
    Tty,
    /// Output dropped, no input.
    #[default]
    Null,
}

impl FromStr for SerialSpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        match text {
            "tty" => Ok(Self::Tty),
            "null" => Ok(Self::Null),
            _ if text.contains('=') => Ok(Self::File(
                KeyValues::parse(text, &["file"])?.required("file")?.into(),
            )),
            _ => Err(OptionError::value(
                "serial",
                text,
                "use file=PATH, tty or null",
            )),
        }
    }
}

impl fmt::Display for SerialSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Tty => f.write_str("tty"),
            Self::Null => f.write_str("null"),
        }
    }
}

impl SerialSpec {
    /// Opens the output.
    ///
    /// # Errors
    /// When the file cannot be created or no thread can be started.
    pub fn open_output(&self) -> io::Result<Output> {
        match self {
            Self::Null => Ok(Output::null()),
            Self::File(path) => Output::start(
                OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(path)?,
            ),
            Self::Tty => Output::start(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
        }
    }
}

/// The interrupt of the serial port: an event descriptor bound to its GSI.
#[derive(Debug)]
pub struct InterruptLine(pub EventFd);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input thread that the guest has emptied the receive FIFO.
#[derive(Debug)]
pub struct InputDrained(pub EventFd);

impl SerialEvents for InputDrained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // Fails only when the counter is full, and then the thread has been told.
        let _ = self.0.write(1);
    }
}

/// The device.
pub type SerialDevice = Serial<InterruptLine, InputDrained, OutputWriter>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_where_it_leads() {
        assert_eq!("tty".parse(), Ok(SerialSpec::Tty));
        assert_eq!("null".parse(), Ok(SerialSpec::Null));
        assert!(
            "file=/a,b"
                .parse::<SerialSpec>()
                .unwrap_err()
                .to_string()
                .contains("\"b\"")
        );
        assert_eq!("file=/a".parse(), Ok(SerialSpec::File("/a".into())));
        assert!(
            "console"
                .parse::<SerialSpec>()
                .unwrap_err()
                .to_string()
                .contains("console")
        );
    }
}
