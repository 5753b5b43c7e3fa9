//! virtio-console with named ports: the fabric device.
//!
//! One device carries several byte streams ("ports", `VIRTIO_CONSOLE_F_MULTIPORT`). Stock drivers
//! show each as a character device, `/dev/virtio-ports/NAME` where udev runs, else the device whose
//! `/sys/class/virtio-ports/*/name` says NAME. Port 0, which the specification gives to a
//! terminal, is never added; the ports of [`ConsoleSpec`] are numbered from 1.
//!
//! | queue | use |
//! |---|---|
//! | 0, 1 | port 0, unused |
//! | 2, 3 | control messages to and from the driver |
//! | 2n+2, 2n+3 | port n: bytes to and from the guest |
//!
//! Two kinds of port exist: [`doorbell`] and [`bridge`]; see there for what the guest's user space
//! sees.

mod bridge;
mod control;
mod doorbell;

#[cfg(test)]
mod bridge_test;
#[cfg(test)]
mod console_test;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use event_manager::{EventOps, Events};
use vmm_sys_util::eventfd::EventFd;

use self::bridge::Bridge;
use self::control::{Announcements, Event, Message};
use self::doorbell::Doorbell;
use super::{DEVICE_EVENT, DeviceConfig, QueueError, VirtQueue, VirtioDevice};

/// Virtio device ID of a console.
const DEVICE_ID: u16 = 3;
/// Communication controller, other.
const PCI_CLASS: u32 = 0x07_80_00;
const FEATURE_MULTIPORT: u64 = 1 << 1;

const CONTROL_TO_GUEST: usize = 2;
const CONTROL_FROM_GUEST: usize = 3;

/// Descriptors per queue. Linux fills a receive queue with as many pages.
const QUEUE_SIZE: u16 = 64;

/// Ports at most, so that queues and event numbers stay small.
const MAX_PORTS: usize = 30;

/// Event numbers of one port, from `DEVICE_EVENT + EVENTS_PER_PORT * index`.
const EVENTS_PER_PORT: u32 = 4;

/// The ports of a console.
#[derive(Default)]
pub struct ConsoleSpec {
    /// Ports, numbered from 1 in this order.
    pub ports: Vec<PortSpec>,
}

/// One port.
pub struct PortSpec {
    /// The name that the guest sees, for example `org.example.agent`.
    pub name: String,
    /// What is at the host's end.
    pub backend: PortBackend,
}

/// What is at the host's end of a port.
pub enum PortBackend {
    /// A bell that the host rings: see [`doorbell`].
    Doorbell {
        /// Each wake-up of this descriptor puts one byte into the guest's receive queue.
        ring: EventFd,
        /// Counts the bytes put there.
        delivered: Arc<AtomicU64>,
        /// Told, on the device thread, how many bytes the guest has written. Must not block.
        on_write: Box<dyn FnMut(u64) + Send>,
    },
    /// A byte stream to whoever connects to a UNIX stream socket: see [`bridge`].
    Socket {
        /// Where to listen. A socket that a former process left there is replaced.
        path: PathBuf,
    },
}

/// Why a console could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Too many ports.
    #[error("a console has at most {MAX_PORTS} ports, not {0}")]
    TooManyPorts(usize),
    /// The socket could not be made.
    #[error("listening on {path} failed: {source}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// The device.
pub struct Console {
    ports: Vec<Port>,
    control_to_guest: Option<VirtQueue>,
    control_from_guest: Option<VirtQueue>,
}

struct Port {
    name: String,
    backend: Backend,
    announcements: Announcements,
}

enum Backend {
    Doorbell(Doorbell),
    Bridge(Bridge),
}

/// The two queues of a port, while the device runs.
#[derive(Default)]
struct PortQueues {
    to_guest: Option<VirtQueue>,
    from_guest: Option<VirtQueue>,
}

impl Backend {
    fn start(&mut self, queues: PortQueues) {
        match self {
            Self::Doorbell(port) => port.start(queues),
            Self::Bridge(port) => port.start(queues),
        }
    }

    fn stop(&mut self, ops: &mut EventOps) {
        match self {
            Self::Doorbell(port) => port.stop(),
            Self::Bridge(port) => port.stop(ops),
        }
    }

    fn guest_open(&mut self, open: bool, ops: &mut EventOps) -> Result<(), QueueError> {
        match self {
            Self::Doorbell(port) => port.guest_open(open),
            Self::Bridge(port) => port.guest_open(open, ops),
        }
    }

    /// Whether the guest should see the host's end as open, and whether it must first see it
    /// closed.
    fn take_host_state(&mut self) -> (bool, bool) {
        match self {
            Self::Doorbell(_) => (true, false),
            Self::Bridge(port) => port.take_host_state(),
        }
    }
}

impl Console {
    /// Makes the device and starts listening on its sockets.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn new(spec: ConsoleSpec) -> Result<Self, ConsoleError> {
        if spec.ports.len() > MAX_PORTS {
            return Err(ConsoleError::TooManyPorts(spec.ports.len()));
        }
        let mut ports = Vec::with_capacity(spec.ports.len());
        for (index, port) in spec.ports.into_iter().enumerate() {
            let events = DEVICE_EVENT + EVENTS_PER_PORT * index as u32;
            let backend = match port.backend {
                PortBackend::Doorbell {
                    ring,
                    delivered,
                    on_write,
                } => Backend::Doorbell(Doorbell::new(ring, delivered, on_write, events)),
                PortBackend::Socket { path } => Backend::Bridge(Bridge::listen(path, events)?),
            };
            ports.push(Port {
                name: port.name,
                backend,
                announcements: Announcements::default(),
            });
        }
        Ok(Self {
            ports,
            control_to_guest: None,
            control_from_guest: None,
        })
    }

    /// Takes in what the driver said on the control queue.
    fn control(&mut self, ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(mut queue) = self.control_from_guest.take() else {
            return Ok(());
        };
        let mut budget = queue.size();
        let outcome = loop {
            match queue.pop() {
                Ok(Some(chain)) => {
                    let mut bytes = [0; Message::HEADER];
                    let handled = queue.read(&chain, 0, &mut bytes).and_then(|len| {
                        match Message::parse(&bytes[..len]) {
                            Some(message) => self.driver_says(message, ops),
                            None => Ok(()),
                        }
                    });
                    // The buffer goes back only now: Linux waits for it, so whatever the guest
                    // does next comes after what this message has changed.
                    if let Err(e) = handled.and_then(|()| queue.done(&chain, 0)) {
                        break Err(e);
                    }
                }
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
            budget -= 1;
            if budget == 0 {
                queue.again();
                break Ok(());
            }
        };
        queue.interrupt();
        self.control_from_guest = Some(queue);
        outcome?;
        self.announce()
    }

    fn driver_says(&mut self, message: Message, ops: &mut EventOps) -> Result<(), QueueError> {
        let yes = message.value != 0;
        if message.event == Event::DeviceReady {
            for port in &mut self.ports {
                port.announcements = Announcements::default();
                port.announcements.add = yes;
                port.backend.guest_open(false, ops)?;
            }
            return Ok(());
        }
        let index = message.id.checked_sub(1).map(|n| n as usize);
        let Some(port) = index.and_then(|n| self.ports.get_mut(n)) else {
            log::debug!("console: message {message:?} for a port that does not exist");
            return Ok(());
        };
        match message.event {
            Event::PortReady if yes => port.announcements.ready(),
            Event::PortReady => {
                crate::guest_warn!("console: the driver cannot use port {}", port.name)
            }
            Event::PortOpen => {
                log::debug!(
                    "console: guest {} {}",
                    if yes { "opens" } else { "closes" },
                    port.name
                );
                port.backend.guest_open(yes, ops)?;
            }
            _ => log::debug!("console: unexpected message {message:?}"),
        }
        Ok(())
    }

    /// Tells the driver what it does not know yet, as far as it has buffers for that.
    fn announce(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.control_to_guest else {
            return Ok(());
        };
        let mut told = false;
        for (port, id) in self.ports.iter_mut().zip(1..) {
            let (open, closed_first) = port.backend.take_host_state();
            port.announcements.host_state(open, closed_first);
            while let Some(event) = port.announcements.next() {
                let Some(chain) = queue.pop()? else {
                    if told {
                        queue.interrupt();
                    }
                    return Ok(());
                };
                let bytes = event.to_bytes(id, &port.name);
                let len = queue.write(&chain, &bytes)?;
                if len < bytes.len() {
                    return Err(QueueError::Short { head: chain.head() });
                }
                queue.done(&chain, len as u32)?;
                port.announcements.told();
                told = true;
            }
        }
        if told {
            queue.interrupt();
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        FEATURE_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4 + 2 * self.ports.len()]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        // Columns and rows are not offered; port 0 counts.
        let mut bytes = [0; 12];
        bytes[4..8].copy_from_slice(&(self.ports.len() as u32 + 1).to_le_bytes());
        Arc::new(Config(bytes))
    }

    fn watch(&mut self, ops: &mut EventOps) {
        for port in &mut self.ports {
            match &mut port.backend {
                Backend::Doorbell(port) => port.watch(ops),
                Backend::Bridge(port) => port.watch(ops),
            }
        }
    }

    fn start(
        &mut self,
        features: u64,
        mut queues: Vec<Option<VirtQueue>>,
        _ops: &mut EventOps,
    ) -> Result<(), QueueError> {
        if features & FEATURE_MULTIPORT == 0 {
            crate::guest_warn!("console: the driver knows no named ports; the device stays silent");
            return Ok(());
        }
        let mut take = |n: usize| queues.get_mut(n).and_then(Option::take);
        self.control_to_guest = take(CONTROL_TO_GUEST);
        self.control_from_guest = take(CONTROL_FROM_GUEST);
        for (port, n) in self.ports.iter_mut().zip((4..).step_by(2)) {
            port.backend.start(PortQueues {
                to_guest: take(n),
                from_guest: take(n + 1),
            });
        }
        Ok(())
    }

    fn stop(&mut self, ops: &mut EventOps) {
        self.control_to_guest = None;
        self.control_from_guest = None;
        for port in &mut self.ports {
            port.announcements = Announcements::default();
            port.backend.stop(ops);
        }
    }

    fn notified(&mut self, queue: usize, ops: &mut EventOps) -> Result<(), QueueError> {
        match queue {
            CONTROL_TO_GUEST => return self.announce(),
            CONTROL_FROM_GUEST => return self.control(ops),
            _ => {}
        }
        let port = queue.checked_sub(4).and_then(|n| self.ports.get_mut(n / 2));
        match (port.map(|port| &mut port.backend), queue.is_multiple_of(2)) {
            (Some(Backend::Doorbell(port)), true) => port.ring_guest()?,
            (Some(Backend::Doorbell(port)), false) => port.take_bytes()?,
            (Some(Backend::Bridge(port)), true) => port.room_in_guest(ops)?,
            (Some(Backend::Bridge(port)), false) => port.bytes_from_guest(ops)?,
            (None, _) => {}
        }
        self.announce()
    }

    fn ready(&mut self, events: Events, ops: &mut EventOps) -> Result<(), QueueError> {
        let delta = events.data() - DEVICE_EVENT;
        match self
            .ports
            .get_mut((delta / EVENTS_PER_PORT) as usize)
            .map(|port| &mut port.backend)
        {
            Some(Backend::Doorbell(port)) => port.rung()?,
            Some(Backend::Bridge(port)) => port.ready(events, ops)?,
            None => {}
        }
        self.announce()
    }
}

struct Config([u8; 12]);

impl DeviceConfig for Config {
    fn size(&self) -> u32 {
        self.0.len() as u32
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.0.get(at as usize).copied().unwrap_or(0);
        }
    }
}
