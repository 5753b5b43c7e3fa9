//! Control messages, and what a port still has to tell the driver.

/// Events of the control queue (virtio 1.2, 5.3.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    DeviceReady,
    PortReady,
    PortOpen,
    /// One that a driver does not send, or none at all.
    Other(u16),
}

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A message from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u32,
    pub(super) event: Event,
    pub(super) value: u16,
}

impl Message {
    /// Bytes of `struct virtio_console_control`.
    pub(super) const HEADER: usize = 8;

    /// `None`: too short to be a message.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, d, e, f, g, h] = bytes.first_chunk::<{ Self::HEADER }>()?;
        let event = match u16::from_le_bytes([e, f]) {
            DEVICE_READY => Event::DeviceReady,
            PORT_READY => Event::PortReady,
            PORT_OPEN => Event::PortOpen,
            other => Event::Other(other),
        };
        let (id, value) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([g, h]));
        Some(Self { id, event, value })
    }
}

/// A message to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Announcement {
    Add,
    Name,
    Open(bool),
}

impl Announcement {
    pub(super) fn to_bytes(self, id: u32, name: &str) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (PORT_ADD, 1),
            Self::Name => (PORT_NAME, 1),
            Self::Open(open) => (PORT_OPEN, u16::from(open)),
        };
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(u16::to_le_bytes(value));
        if self == Self::Name {
            bytes.extend(name.as_bytes());
        }
        bytes
    }
}

/// What one port has to tell the driver: state, not a list of messages, so that a driver that
/// never takes them cannot make it grow.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    /// The port has to be added.
    pub(super) add: bool,
    /// The driver has made the port; only then it takes the rest.
    ready: bool,
    name: bool,
    /// What the driver was told last about the host's end.
    told_open: bool,
    want_open: bool,
    /// The driver must see the end closed before it sees it open again.
    closed_first: bool,
}

impl Announcements {
    /// The driver has made the port.
    pub(super) fn ready(&mut self) {
        self.ready = true;
        self.name = true;
        self.told_open = false;
    }

    /// The host's end is `open` now and, if `closed_first`, was closed in between.
    pub(super) fn host_state(&mut self, open: bool, closed_first: bool) {
        self.want_open = open;
        self.closed_first |= closed_first;
    }

    /// The next thing to tell; [`told`](Self::told) says that it was.
    pub(super) fn next(&self) -> Option<Announcement> {
        if self.add {
            return Some(Announcement::Add);
        }
        if !self.ready {
            return None;
        }
        if self.name {
            return Some(Announcement::Name);
        }
        if self.told_open && (self.closed_first || !self.want_open) {
            return Some(Announcement::Open(false));
        }
        (self.want_open && !self.told_open).then_some(Announcement::Open(true))
    }

    /// The driver has the message of [`next`](Self::next).
    pub(super) fn told(&mut self) {
        match self.next() {
            Some(Announcement::Add) => self.add = false,
            Some(Announcement::Name) => self.name = false,
            Some(Announcement::Open(open)) => {
                self.told_open = open;
                self.closed_first = false;
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(state: &mut Announcements) -> Vec<Announcement> {
        std::iter::from_fn(|| state.next().inspect(|_| state.told())).collect()
    }

    #[test]
    fn order_is_add_name_open() {
        let mut state = Announcements {
            add: true,
            ..Default::default()
        };
        state.host_state(true, false);
        assert_eq!(drain(&mut state), [Announcement::Add]);
        state.ready();
        assert_eq!(
            drain(&mut state),
            [Announcement::Name, Announcement::Open(true)]
        );
        assert_eq!(drain(&mut state), []);
    }

    #[test]
    fn a_change_of_connection_is_shown_as_close_and_open() {
        let mut state = Announcements::default();
        state.ready();
        state.host_state(true, false);
        drain(&mut state);
        state.host_state(true, true);
        assert_eq!(
            drain(&mut state),
            [Announcement::Open(false), Announcement::Open(true)]
        );
        state.host_state(false, true);
        assert_eq!(drain(&mut state), [Announcement::Open(false)]);
    }

    #[test]
    fn closing_what_was_never_open_says_nothing() {
        let mut state = Announcements::default();
        state.ready();
        state.host_state(false, true);
        assert_eq!(drain(&mut state), [Announcement::Name]);
        state.host_state(true, false);
        assert_eq!(drain(&mut state), [Announcement::Open(true)]);
    }

    #[test]
    fn short_messages_are_none_and_unknown_events_survive() {
        assert_eq!(Message::parse(&[0; 7]), None);
        let message = Message::parse(&[1, 0, 0, 0, 9, 0, 1, 0]).unwrap();
        assert_eq!(
            message,
            Message {
                id: 1,
                event: Event::Other(9),
                value: 1
            }
        );
    }
}
