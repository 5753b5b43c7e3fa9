//! What `pod top` knows, and what its keys do.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use lupin_abi::fabric::NodeState;
use lupin_fabric::api::client::StreamItem;
use lupin_fabric::api::{NodeStatus, PodStatus};
use lupin_fabric::sys::usage::Usage;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::feed::{EVENTS, News, Order};

/// What a key leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Stay,
    Quit,
    Do(Order),
}

/// Shares of time between two looks at a node, 1 for all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Shares {
    /// Of one processor; more than 1 with several.
    pub cpu: f64,
    /// Of the time in which the node's threads wanted a processor: how much they waited for one.
    pub steal: f64,
}

/// A look at a node.
struct Sample {
    pid: Option<u32>,
    usage: Usage,
    at: Instant,
}

/// What is known.
pub(super) struct Model {
    pub pod: String,
    pub status: Option<PodStatus>,
    /// When the status came.
    pub seen: Option<Instant>,
    /// Why there is no newer one.
    pub trouble: Option<String>,
    pub events: VecDeque<StreamItem>,
    /// The id of the selected node.
    pub selected: Option<u32>,
    /// Waits for a yes.
    pub confirm: Option<Order>,
    /// What came of the last order.
    pub answer: Option<String>,
    samples: HashMap<u32, Sample>,
    shares: HashMap<u32, Shares>,
}

impl Model {
    pub(super) fn new(pod: &str) -> Self {
        Self {
            pod: pod.into(),
            status: None,
            seen: None,
            trouble: None,
            events: VecDeque::new(),
            selected: None,
            confirm: None,
            answer: None,
            samples: HashMap::new(),
            shares: HashMap::new(),
        }
    }

    /// Takes news in.
    pub(super) fn learn(&mut self, news: News, now: Instant) {
        match news {
            News::Status(status) => {
                self.measure(&status, now);
                let ids: Vec<u32> = status.nodes.iter().map(|node| node.id).collect();
                if !self.selected.is_some_and(|id| ids.contains(&id)) {
                    self.selected = ids.first().copied();
                }
                self.status = Some(status);
                self.seen = Some(now);
                self.trouble = None;
            }
            News::Events(items) => {
                self.events.extend(items);
                let old = self.events.len().saturating_sub(EVENTS);
                self.events.drain(..old);
            }
            News::NoManager(why) => self.trouble = Some(why),
            News::Answer(answer) => self.answer = Some(answer),
        }
    }

    /// Shares since the last look at the same process.
    fn measure(&mut self, status: &PodStatus, now: Instant) {
        let mut samples = HashMap::new();
        for node in &status.nodes {
            let Some(usage) = node.usage else {
                self.shares.remove(&node.id);
                continue;
            };
            match self.samples.get(&node.id) {
                Some(before) if before.pid == node.pid => {
                    let run = usage.run_ns.saturating_sub(before.usage.run_ns) as f64;
                    let delay = usage.delay_ns.saturating_sub(before.usage.delay_ns) as f64;
                    let passed = now.saturating_duration_since(before.at).as_nanos() as f64;
                    if passed > 0.0 {
                        let steal = if run + delay > 0.0 {
                            delay / (run + delay)
                        } else {
                            0.0
                        };
                        let cpu = run / passed;
                        self.shares.insert(node.id, Shares { cpu, steal });
                    }
                }
                _ => {
                    self.shares.remove(&node.id);
                }
            }
            let (pid, at) = (node.pid, now);
            samples.insert(node.id, Sample { pid, usage, at });
        }
        self.samples = samples;
    }

    pub(super) fn nodes(&self) -> &[NodeStatus] {
        self.status.as_ref().map_or(&[], |status| &status.nodes)
    }

    pub(super) fn shares(&self, node: u32) -> Option<Shares> {
        self.shares.get(&node).copied()
    }

    /// The name of an event's node.
    pub(super) fn name(&self, id: u32) -> String {
        let node = self.nodes().iter().find(|node| node.id == id);
        node.map_or_else(|| format!("node {id}"), |node| node.name.clone())
    }

    /// The row of the selected node.
    pub(super) fn row(&self) -> Option<usize> {
        let selected = self.selected?;
        self.nodes().iter().position(|node| node.id == selected)
    }

    fn select(&mut self, to: impl FnOnce(usize, usize) -> usize) {
        let (Some(row), Some(last)) = (self.row(), self.nodes().len().checked_sub(1)) else {
            return;
        };
        let row = to(row, last).min(last);
        self.selected = self.nodes().get(row).map(|node| node.id);
    }

    /// Takes a key in.
    pub(super) fn key(&mut self, key: KeyEvent) -> Outcome {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c' | 'd')) {
            return Outcome::Quit;
        }
        if let Some(order) = self.confirm.take() {
            // Anything but a yes is a no.
            return match key.code {
                KeyCode::Char('y' | 'Y') => Outcome::Do(order),
                _ => Outcome::Stay,
            };
        }
        self.answer = None;
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Outcome::Quit,
            KeyCode::Up => self.select(|row, _| row.saturating_sub(1)),
            KeyCode::Down => self.select(|row, _| row + 1),
            KeyCode::PageUp => self.select(|row, _| row.saturating_sub(10)),
            KeyCode::PageDown => self.select(|row, _| row + 10),
            KeyCode::Home => self.select(|_, _| 0),
            KeyCode::End => self.select(|_, last| last),
            KeyCode::Char('p') => {
                if let Some(node) = self.row().and_then(|row| self.nodes().get(row)) {
                    let name = node.name.clone();
                    return Outcome::Do(match node.state {
                        NodeState::Paused => Order::Resume(name),
                        _ => Order::Pause(name),
                    });
                }
            }
            KeyCode::Char('k') => {
                if let Some(id) = self.selected {
                    self.confirm = Some(Order::Kill(self.name(id)));
                }
            }
            _ => {}
        }
        Outcome::Stay
    }
}
