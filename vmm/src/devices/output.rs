//! Console output that never makes a vCPU wait.
//!
//! ```text
//! vCPU threads ──> bounded queue ──> "console" thread ──> file or terminal
//! ```
//!
//! A full disk, a stopped terminal or a slow pipe fills the queue; further bytes are dropped
//! and the gap is marked in the output.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that wait for the thread at most.
const CAPACITY: usize = 1 << 20;
/// How long the thread collects bytes before it writes: a guest writes them one by one.
const BATCH: Duration = Duration::from_millis(2);
/// How long the thread waits before it tries a non-blocking target again.
const RETRY: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
struct Queue {
    bytes: VecDeque<u8>,
    dropped: u64,
    closed: bool,
    finished: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // The queue is consistent after every statement.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writing end for the serial port. Writes never block and never fail.
#[derive(Clone, Debug)]
pub struct OutputWriter(Option<Arc<Shared>>);

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(shared) = &self.0 {
            let mut queue = shared.lock();
            let was_empty = queue.bytes.is_empty();
            let room = CAPACITY.saturating_sub(queue.bytes.len()).min(bytes.len());
            queue.bytes.extend(&bytes[..room]);
            queue.dropped += (bytes.len() - room) as u64;
            drop(queue);
            if was_empty {
                shared.changed.notify_all();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The queue and its thread.
#[derive(Debug)]
pub struct Output(Option<Arc<Shared>>);

impl Output {
    /// Output to nowhere.
    pub fn null() -> Self {
        Self(None)
    }

    /// Starts the thread that writes to `target`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(target: File) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        thread::Builder::new()
            .name("console".into())
            .spawn(move || drain(&theirs, target))?;
        Ok(Self(Some(shared)))
    }

    /// A writing end.
    pub fn writer(&self) -> OutputWriter {
        OutputWriter(self.0.clone())
    }

    /// Writes out what is queued, for at most `patience`.
    pub fn finish(&self, patience: Duration) {
        let Some(shared) = &self.0 else { return };
        let deadline = Instant::now() + patience;
        let mut queue = shared.lock();
        queue.closed = true;
        shared.changed.notify_all();
        while !queue.finished {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return;
            };
            queue = shared
                .changed
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn drain(shared: &Shared, mut target: File) {
    let mut failed = false;
    loop {
        let mut queue = shared.lock();
        while queue.bytes.is_empty() && !queue.closed {
            queue = shared
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if !queue.closed {
            drop(queue);
            thread::sleep(BATCH);
            queue = shared.lock();
        }
        let mut bytes: Vec<u8> = queue.bytes.drain(..).collect();
        let dropped = std::mem::take(&mut queue.dropped);
        let closed = queue.closed;
        drop(queue);
        if dropped > 0 {
            bytes.extend(format!("\r\n[lupin-vmm: {dropped} bytes lost]\r\n").into_bytes());
        }
        if let Err(e) = write_all(&mut target, &bytes)
            && !std::mem::replace(&mut failed, true)
        {
            log::error!("console output is lost from here on: {e}");
        }
        if closed {
            shared.lock().finished = true;
            shared.changed.notify_all();
            return;
        }
    }
}

/// `write_all` that also copes with a terminal that somebody made non-blocking.
fn write_all(target: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match target.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn everything_arrives_in_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let output = Output::start(file.reopen().unwrap()).unwrap();
        let mut writer = output.writer();
        for i in 0..1000 {
            writeln!(writer, "{i}").unwrap();
        }
        output.finish(Duration::from_secs(10));
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.lines().map(|l| l.parse::<u32>().unwrap()).eq(0..1000));
    }

    #[test]
    fn a_stuck_reader_costs_bytes_not_time() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start(File::from(OwnedFd::from(writer))).unwrap();
        let chunk = vec![b'x'; 64 << 10];
        let started = Instant::now();
        for _ in 0..64 {
            output.writer().write_all(&chunk).unwrap();
        }
        output.finish(Duration::from_millis(50));
        assert!(started.elapsed() < Duration::from_secs(5));
        let mut some = [0; 16];
        reader.read_exact(&mut some).unwrap();
        assert_eq!(some, [b'x'; 16]);
    }
}
