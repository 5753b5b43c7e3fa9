//! Asks the manager again and again, whichever process that is at the moment.

use std::io;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use lupin_fabric::api::client::StreamItem;
use lupin_fabric::api::{Client, ClientError, NodeAction, PodStatus};

use crate::pod::place::Place;

/// Most news that wait to be seen.
const BACKLOG: usize = 64;
/// Most events that are handed on at once; older ones do not fit on a screen.
pub(super) const EVENTS: usize = 200;

/// What the feed learns.
#[derive(Debug)]
pub(super) enum News {
    /// A snapshot.
    Status(PodStatus),
    /// New events, in order, and gaps between them.
    Events(Vec<StreamItem>),
    /// There is no manager at the moment, or it does not answer as it should.
    NoManager(String),
    /// What came of an order.
    Answer(String),
}

/// What an operator wants done with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Kill(String),
    Pause(String),
    Resume(String),
}

impl Order {
    fn give(&self, client: &mut Client) -> Result<String, ClientError> {
        match self {
            Self::Kill(node) => {
                client.kill(node)?;
                Ok(format!("{node} is being killed"))
            }
            Self::Pause(node) => {
                client.steer(node, NodeAction::Pause {})?;
                Ok(format!("{node} is being paused"))
            }
            Self::Resume(node) => {
                client.steer(node, NodeAction::Resume {})?;
                Ok(format!("{node} is let run again"))
            }
        }
    }
}

/// The thread that asks. Ends when its news are not wanted any more.
pub(super) struct Feed {
    pub(super) news: Receiver<News>,
    place: Place,
    sender: SyncSender<News>,
}

impl Feed {
    pub(super) fn start(place: Place, interval: Duration) -> io::Result<Self> {
        let (sender, news) = mpsc::sync_channel(BACKLOG);
        let (of_thread, to) = (place.clone(), sender.clone());
        std::thread::Builder::new()
            .name("feed".into())
            .spawn(move || ask(&of_thread, interval, &to))?;
        Ok(Self {
            news,
            place,
            sender,
        })
    }

    /// Gives an order on a thread of its own: the screen goes on, whatever the manager does.
    pub(super) fn order(&self, order: Order) {
        let (place, to) = (self.place.clone(), self.sender.clone());
        let work = move || {
            let given =
                Client::connect(&place.folder).and_then(|mut client| order.give(&mut client));
            let _ = to.send(News::Answer(given.unwrap_or_else(|e| e.to_string())));
        };
        if let Err(e) = std::thread::Builder::new().spawn(work) {
            let _ = self.sender.try_send(News::Answer(e.to_string()));
        }
    }
}

fn ask(place: &Place, interval: Duration, to: &SyncSender<News>) {
    let mut client: Option<Client> = None;
    let mut next = None;
    loop {
        match look(place, &mut client, &mut next) {
            Ok((status, events)) => {
                let events = (!events.is_empty()).then_some(News::Events(events));
                for news in events.into_iter().chain([News::Status(status)]) {
                    if to.send(news).is_err() {
                        return;
                    }
                }
            }
            Err(e) => {
                // A successor has a socket of its own.
                client = None;
                if to.send(News::NoManager(e.to_string())).is_err() {
                    return;
                }
            }
        }
        std::thread::sleep(interval);
    }
}

/// One look: a snapshot, and the events since the last look.
fn look(
    place: &Place,
    client: &mut Option<Client>,
    next: &mut Option<u64>,
) -> Result<(PodStatus, Vec<StreamItem>), ClientError> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => Client::connect(&place.folder)?,
    };
    let status = client.insert(connected).status()?;
    let mut stream = Client::connect(&place.folder)?.events(*next, false)?;
    let mut items = Vec::new();
    while let Some(item) = stream.next_item()? {
        *next = Some(match item {
            StreamItem::Event(event) => event.seq + 1,
            StreamItem::Lost { resume, .. } => resume,
        });
        items.push(item);
    }
    let old = items.len().saturating_sub(EVENTS);
    items.drain(..old);
    Ok((status, items))
}
