//! The thread on which devices do their I/O.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint};

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Why the device thread could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The event loop could not be set up, or is gone.
    #[error("device event loop: {0}")]
    Events(#[from] event_manager::Error),
    /// The thread could not be started.
    #[error("starting the device thread failed: {0}")]
    Spawn(#[source] std::io::Error),
}

/// An event loop on a thread of its own. Dropping it ends the loop and waits for the thread.
pub struct DeviceThread {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When descriptors or threads run out.
    pub fn spawn(name: &str) -> Result<Self, ThreadError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Relaxed: the flag carries no data, and the kick that follows it wakes the loop.
                while !stopped.load(Ordering::Relaxed) {
                    if let Err(e) = manager.run() {
                        log::error!("device event loop ends: {e}");
                        break;
                    }
                }
            })
            .map_err(ThreadError::Spawn)?;
        Ok(Self {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// Hands a subscriber to the loop and waits until its descriptors are watched. Not to be
    /// called from the device thread itself.
    ///
    /// # Errors
    /// When the loop has ended.
    pub fn add(&self, subscriber: Subscriber) -> Result<(), ThreadError> {
        self.endpoint.call_blocking(move |manager| {
            manager.add_subscriber(subscriber);
            Ok(())
        })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let kicked = self.endpoint.kick();
        if let (Ok(()), Some(thread)) = (kicked, self.thread.take())
            && thread.join().is_err()
        {
            log::error!("the device thread panicked");
        }
    }
}
