use lupin_abi::Event as Happened;
use lupin_abi::event::{Cause, EVIDENCE_WORDS, EventKind};
use lupin_abi::fabric::NodeState;
use lupin_fabric::api::client::StreamItem;
use lupin_fabric::api::{HeartbeatStatus, NodeStatus, PodPhase, PodStatus};
use lupin_fabric::sys::usage::Usage;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::feed::Order;
use super::*;

const MS: u64 = 1_000_000;

fn node(id: u32, state: NodeState, run_ms: u64, delay_ms: u64) -> NodeStatus {
    let runs = state == NodeState::Joined;
    NodeStatus {
        id,
        name: format!("n{id}"),
        backend: "kvm".into(),
        state,
        generation: 4,
        cause: Cause::Hang,
        restarts: 3,
        in_state_ns: 20_000 * MS,
        joined_in_ns: None,
        pid: runs.then_some(100 + id),
        folder: "/".into(),
        detail: (!runs).then(|| "a word\x1b[2J to the operator".into()),
        heartbeat: runs.then_some(HeartbeatStatus {
            age_ns: 8 * MS,
            left_ns: 92 * MS,
            deadline_ns: 100 * MS,
        }),
        false_alarms: 7,
        usage: runs.then_some(Usage {
            memory_bytes: 64 << 20,
            run_ns: run_ms * MS,
            delay_ns: delay_ms * MS,
            processes: 1,
            threads: 4,
        }),
    }
}

fn status(run_ms: u64, delay_ms: u64) -> News {
    News::Status(PodStatus {
        pod: "demo".into(),
        pod_id: "07".into(),
        phase: PodPhase::Running,
        manager_pid: 17,
        epoch: 2,
        backup_pid: None,
        pod_file: "/demo.toml".into(),
        memory: "/demo.pod".into(),
        memory_bytes: 0,
        join_timeout_ms: 1000,
        newest_event: 0,
        nodes: vec![
            node(1, NodeState::Joined, run_ms, delay_ms),
            node(2, NodeState::Down, 0, 0),
        ],
    })
}

fn happened(seq: u64) -> StreamItem {
    StreamItem::Event(Happened {
        seq,
        time_ns: seq * 1000 * MS,
        epoch: 1,
        kind: EventKind::FailureDetected,
        node: 2,
        old_generation: 4,
        generation: 4,
        cause: Cause::VmmExit,
        evidence: [0; EVIDENCE_WORDS],
    })
}

fn shown(model: &mut Model, width: u16, height: u16, now: Instant) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| view::draw(frame, model, now))
        .unwrap();
    terminal.backend().to_string()
}

/// A model that has looked twice, a second apart: 500 ms of running, 125 ms of waiting.
fn model() -> (Model, Instant) {
    let (mut model, begin) = (Model::new("demo"), Instant::now());
    model.learn(status(1000, 0), begin);
    let now = begin + Duration::from_secs(1);
    model.learn(status(1500, 125), now);
    model.learn(News::Events((1..=3).map(happened).collect()), now);
    (model, now)
}

fn press(model: &mut Model, code: KeyCode) -> Outcome {
    model.key(KeyEvent::new(code, KeyModifiers::NONE))
}

#[test]
fn a_frame_shows_every_node_and_what_happened() {
    let (mut model, now) = model();
    let frame = shown(&mut model, 130, 24, now);
    for word in [
        "pod demo: running, 1 of 2 nodes joined, manager 17 (epoch 2), no backup",
        "STEAL",
        "joined",
        "down",
        "8.00 ms",
        "92.0 ms",
        "20 %",
        "50 %",
        "64 MiB",
        "hang",
        "+2.000000 s  n2 failed",
        "q quit",
    ] {
        assert!(frame.contains(word), "{word:?} is not in\n{frame}");
    }
    let plain = view::text(&model, now);
    for word in ["n1", "20 %", "50 %", "n2 failed"] {
        assert!(plain.contains(word), "{word:?} is not in\n{plain}");
    }
    assert!(!plain.contains('\x1b'));
}

#[test]
fn every_size_can_be_drawn() {
    let (mut model, now) = model();
    for (width, height) in [(1, 1), (3, 2), (20, 5), (80, 6), (80, 14), (300, 80)] {
        shown(&mut model, width, height, now);
        shown(&mut Model::new("x"), width, height, now);
    }
    // No room for events, but for nodes.
    let low = shown(&mut model, 130, 8, now);
    assert!(low.contains("n1") && !low.contains("events"), "{low}");
}

#[test]
fn a_manager_that_is_gone_or_silent_is_told_and_the_next_one_is_shown() {
    let (mut model, now) = model();
    model.learn(News::NoManager("no manager listens".into()), now);
    let later = now + Duration::from_secs(2);
    let frame = shown(&mut model, 130, 24, later);
    assert!(
        frame.contains("no manager listens; shown as of 2 s ago"),
        "{frame}"
    );
    assert!(frame.contains("joined"), "{frame}");
    model.learn(status(1600, 125), later);
    assert!(!shown(&mut model, 130, 24, later).contains("ago"));
    let much_later = later + Duration::from_secs(9);
    let frame = shown(&mut model, 130, 24, much_later);
    assert!(
        frame.contains("does not answer; shown as of 9 s ago"),
        "{frame}"
    );
}

#[test]
fn arrows_select_and_a_kill_needs_a_yes() {
    let (mut model, now) = model();
    assert_eq!(model.selected, Some(1));
    assert_eq!(press(&mut model, KeyCode::Down), Outcome::Stay);
    assert_eq!(press(&mut model, KeyCode::Down), Outcome::Stay);
    assert_eq!(model.selected, Some(2));
    // What is said of the selected node, without what a terminal would obey.
    let frame = shown(&mut model, 130, 24, now);
    assert!(frame.contains("n2: a word[2J to the operator"), "{frame}");
    assert_eq!(
        press(&mut model, KeyCode::Char('p')),
        Outcome::Do(Order::Pause("n2".into()))
    );
    press(&mut model, KeyCode::Char('k'));
    assert!(shown(&mut model, 130, 24, now).contains("Kill n2? y/n"));
    assert_eq!(press(&mut model, KeyCode::Char('q')), Outcome::Stay);
    assert_eq!(model.confirm, None);
    press(&mut model, KeyCode::Home);
    press(&mut model, KeyCode::Char('k'));
    let done = press(&mut model, KeyCode::Char('y'));
    assert_eq!(done, Outcome::Do(Order::Kill("n1".into())));
    model.learn(News::Answer("n1 is being killed".into()), now);
    assert!(shown(&mut model, 130, 24, now).contains("n1 is being killed"));
    assert_eq!(press(&mut model, KeyCode::Char('q')), Outcome::Quit);
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(model.key(control_c), Outcome::Quit);
}

#[test]
fn shares_begin_anew_with_a_new_process_and_nodes_may_leave() {
    let (mut model, now) = model();
    assert!(model.shares(1).is_some());
    let News::Status(mut next) = status(5, 5) else {
        unreachable!()
    };
    next.nodes[0].pid = Some(999);
    model.learn(News::Status(next.clone()), now + Duration::from_secs(1));
    assert_eq!(model.shares(1), None);
    press(&mut model, KeyCode::End);
    next.nodes.truncate(1);
    model.learn(News::Status(next.clone()), now);
    assert_eq!(model.selected, Some(1));
    next.nodes.clear();
    model.learn(News::Status(next), now);
    assert_eq!(model.selected, None);
    press(&mut model, KeyCode::Up);
    assert_eq!(press(&mut model, KeyCode::Char('k')), Outcome::Stay);
    assert_eq!(model.confirm, None);
    shown(&mut model, 130, 24, now);
}

#[test]
fn old_events_make_room() {
    let (mut model, now) = model();
    for seq in 4..1000 {
        model.learn(News::Events(vec![happened(seq)]), now);
    }
    assert_eq!(model.events.len(), feed::EVENTS);
    let lost = StreamItem::Lost {
        from: 1000,
        resume: 1100,
    };
    model.learn(News::Events(vec![lost]), now);
    assert!(shown(&mut model, 130, 24, now).contains("(100 events are not on record"));
}
