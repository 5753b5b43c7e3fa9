//! How `pod top` looks.

use std::time::{Duration, Instant};

use lupin_abi::event::Cause;
use lupin_abi::fabric::NodeState;
use lupin_fabric::api::client::StreamItem;
use lupin_fabric::api::{NodeStatus, PodPhase};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Table, TableState};

use super::feed::Order;
use super::model::Model;
use crate::pod::text::{size, span, table};
use crate::pod::timeline::{relative, words};

/// A status older than this is called old.
const STALE: Duration = Duration::from_secs(3);
/// Lines of events beside the nodes, where there is room.
const EVENT_LINES: u16 = 9;
/// Lines of events in plain text.
const PLAIN_EVENTS: usize = 8;

const HEAD: [&str; 13] = [
    "ID",
    "NAME",
    "STATE",
    "FOR",
    "GEN",
    "BEAT",
    "LEFT",
    "STEAL",
    "CPU",
    "MEM",
    "RESTARTS",
    "ALARMS",
    "LAST FAILURE",
];

const WIDTHS: [Constraint; 13] = [
    Constraint::Length(4),
    Constraint::Min(8),
    Constraint::Length(10),
    Constraint::Length(12),
    Constraint::Length(6),
    Constraint::Length(8),
    Constraint::Length(8),
    Constraint::Length(6),
    Constraint::Length(6),
    Constraint::Length(9),
    Constraint::Length(8),
    Constraint::Length(6),
    Constraint::Length(16),
];

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model, now: Instant) {
    let area = frame.area();
    let events = if area.height >= 6 + EVENT_LINES {
        EVENT_LINES
    } else {
        0
    };
    let [summary, nodes, recent, footer] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Min(0),
        Constraint::Length(events),
        Constraint::Length(1),
    ])
    .areas(area);
    let mut lines = vec![Line::from(headline(model)).bold()];
    if let Some(trouble) = trouble(model, now) {
        lines.push(Line::from(trouble).fg(Color::Red));
    } else if let Some(detail) = detail(model) {
        lines.push(Line::from(detail).fg(Color::Yellow));
    }
    frame.render_widget(Paragraph::new(lines), summary);

    let rows = model.nodes().iter().map(|node| {
        let style = Style::new().fg(colour(node.state));
        Row::new(cells(model, node)).style(style)
    });
    let list = Table::new(rows, WIDTHS)
        .header(Row::new(HEAD).style(Style::new().add_modifier(Modifier::REVERSED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(model.row());
    frame.render_stateful_widget(list, nodes, &mut state);

    if events > 0 {
        let room = usize::from(recent.height.saturating_sub(1));
        let lines: Vec<Line<'_>> = timeline(model, room).into_iter().map(Line::from).collect();
        let block = Block::new().borders(Borders::TOP).title("events");
        frame.render_widget(Paragraph::new(lines).block(block), recent);
    }
    frame.render_widget(Paragraph::new(foot(model)), footer);
}

/// The same as plain text.
pub(super) fn text(model: &Model, now: Instant) -> String {
    let mut out = headline(model) + "\n";
    if let Some(trouble) = trouble(model, now) {
        out += &format!("{trouble}\n");
    }
    let rows: Vec<Vec<String>> = model
        .nodes()
        .iter()
        .map(|node| cells(model, node).to_vec())
        .collect();
    out += &table(&HEAD, &rows);
    for line in timeline(model, PLAIN_EVENTS) {
        out += &format!("{line}\n");
    }
    out
}

fn headline(model: &Model) -> String {
    let Some(status) = &model.status else {
        return format!("pod {}", model.pod);
    };
    let phase = match status.phase {
        PodPhase::Running => "running",
        PodPhase::GoingDown => "going down",
    };
    let joined = status.nodes.iter();
    let joined = joined
        .filter(|node| node.state == NodeState::Joined)
        .count();
    let backup = match status.backup_pid {
        Some(pid) => format!("backup {pid}"),
        None => "no backup".into(),
    };
    format!(
        "pod {}: {phase}, {joined} of {} nodes joined, manager {} (epoch {}), {backup}",
        status.pod,
        status.nodes.len(),
        status.manager_pid,
        status.epoch
    )
}

fn trouble(model: &Model, now: Instant) -> Option<String> {
    let age = model.seen.map(|seen| now.saturating_duration_since(seen));
    match (&model.trouble, age) {
        (Some(why), Some(age)) => Some(format!("{why}; shown as of {} s ago", age.as_secs())),
        (Some(why), None) => Some(why.clone()),
        (None, Some(age)) if age > STALE => Some(format!(
            "the manager does not answer; shown as of {} s ago",
            age.as_secs()
        )),
        _ => None,
    }
}

/// What an operator should know about the selected node.
fn detail(model: &Model) -> Option<String> {
    let node = model.nodes().get(model.row()?)?;
    let detail = node.detail.as_ref()?;
    let printable: String = detail.chars().filter(|c| !c.is_control()).collect();
    Some(format!("{}: {printable}", node.name))
}

fn cells(model: &Model, node: &NodeStatus) -> [String; 13] {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let beat = node.heartbeat.as_ref();
    let shares = model.shares(node.id);
    [
        node.id.to_string(),
        node.name.clone(),
        node.state.name().into(),
        span(node.in_state_ns),
        node.generation.to_string(),
        or_none(beat.map(|beat| span(beat.age_ns))),
        or_none(beat.map(|beat| span(beat.left_ns))),
        or_none(shares.map(|shares| percent(shares.steal))),
        or_none(shares.map(|shares| percent(shares.cpu))),
        or_none(node.usage.map(|usage| size(usage.memory_bytes))),
        node.restarts.to_string(),
        node.false_alarms.to_string(),
        match node.cause {
            Cause::None => "-".into(),
            cause => cause.name().into(),
        },
    ]
}

const fn colour(state: NodeState) -> Color {
    match state {
        NodeState::Joined => Color::Green,
        NodeState::Failing | NodeState::Down => Color::Red,
        NodeState::Absent => Color::DarkGray,
        _ => Color::Yellow,
    }
}

/// The newest events, the newest last.
fn timeline(model: &Model, most: usize) -> Vec<String> {
    let origin = model.events.iter().find_map(|item| match item {
        StreamItem::Event(event) => Some(event.time_ns),
        StreamItem::Lost { .. } => None,
    });
    let skip = model.events.len().saturating_sub(most);
    let lines = model.events.iter().skip(skip).map(|item| match item {
        StreamItem::Event(event) => {
            let time = relative(event.time_ns, origin.unwrap_or(event.time_ns));
            let name = model.name(event.node);
            format!("{time:>14} s  {}", words(event, &name))
        }
        StreamItem::Lost { from, resume } => format!(
            "{:>16}  ({} events are not on record any more)",
            "...",
            resume.saturating_sub(*from)
        ),
    });
    lines.collect()
}

fn foot(model: &Model) -> Line<'static> {
    if let Some(order) = &model.confirm {
        let question = match order {
            Order::Kill(node) => format!("Kill {node}? y/n"),
            Order::Pause(node) => format!("Pause {node}? y/n"),
            Order::Resume(node) => format!("Resume {node}? y/n"),
        };
        return Line::from(Span::from(question).bold().fg(Color::Red));
    }
    if let Some(answer) = &model.answer {
        return Line::from(answer.clone()).fg(Color::Yellow);
    }
    Line::from("q quit   up/down select   p pause or resume   k kill").fg(Color::DarkGray)
}
