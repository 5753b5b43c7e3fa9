//! The thread on which devices do their I/O.

use std::panic::{AssertUnwindSafe, catch_unwind};
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
    /// Starts the thread. Should its loop ever end by itself, `failed` is told why, on that thread:
    /// the machine has then lost its devices.
    ///
    /// # Errors
    /// When descriptors or threads run out.
    pub fn spawn(
        name: &str,
        failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, ThreadError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Unwind safe: nothing of the manager is used after a panic.
                let ended = catch_unwind(AssertUnwindSafe(|| {
                    // Relaxed: the flag carries no data, and a kick follows it.
                    while !stopped.load(Ordering::Relaxed) {
                        manager.run()?;
                    }
                    Ok::<(), event_manager::Error>(())
                }));
                match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => failed(ThreadError::from(e).to_string()),
                    Err(_) => failed("the device thread panicked".into()),
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
        if let (Ok(()), Some(thread)) = (kicked, self.thread.take()) {
            // Panics were caught and told by the thread itself.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use event_manager::{EventOps, Events};
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    struct Probe {
        event: EventFd,
        seen: Sender<u64>,
    }

    impl MutEventSubscriber for Probe {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _events: Events, _ops: &mut EventOps) {
            let value = self.event.read().unwrap();
            assert_ne!(value, 13, "told to panic");
            self.seen.send(value).unwrap();
        }
    }

    #[test]
    fn events_arrive_and_dropping_ends_the_thread() {
        let thread = DeviceThread::spawn("test", |why| panic!("{why}")).unwrap();
        let (seen, events) = channel();
        let event = EventFd::new(0).unwrap();
        let probe = Probe {
            event: event.try_clone().unwrap(),
            seen,
        };
        thread.add(Box::new(probe)).unwrap();
        event.write(5).unwrap();
        assert_eq!(events.recv_timeout(PATIENCE), Ok(5));
        drop(thread);
        assert!(
            events.recv_timeout(PATIENCE).is_err(),
            "the subscriber is gone"
        );
    }

    #[test]
    fn a_panic_is_told() {
        let (tell, told) = channel();
        let thread = DeviceThread::spawn("test", move |why| tell.send(why).unwrap()).unwrap();
        let event = EventFd::new(0).unwrap();
        let probe = Probe {
            event: event.try_clone().unwrap(),
            seen: channel().0,
        };
        thread.add(Box::new(probe)).unwrap();
        event.write(13).unwrap();
        assert_eq!(
            told.recv_timeout(PATIENCE).unwrap(),
            "the device thread panicked"
        );
    }
}
