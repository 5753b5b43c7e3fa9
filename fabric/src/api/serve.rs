//! Serving one client of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use lupin_abi::NodeId;
use lupin_abi::fabric::RingRead;
use lupin_abi::port::{Decoder, MAX_CHUNK, ToAgent, ToManager, encode};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::geteuid;

use super::clients::{Clients, REPLY_PATIENCE};
use super::control::{ControlError, PodControl};
use super::wire::{MAX_LINE, Reply, Request};
use crate::agent_link::{Exec, ExecMessage, ExecSpec, LinkError};

/// How often a follower looks for new events.
const FOLLOW_EVERY: Duration = Duration::from_millis(10);
/// Bytes of events that are written at once.
const EVENT_BATCH: usize = 64 << 10;
/// How long a command waits for the connection to its node's agent.
const LINK_PATIENCE: Duration = Duration::from_secs(3);

/// A reply as it goes over the wire.
pub(super) fn line(reply: &Reply) -> Vec<u8> {
    // Plain structures with string keys: their encoding cannot fail.
    let mut line = serde_json::to_vec(reply).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Serves requests until the client leaves or its connection becomes a stream that ends.
pub(super) fn serve(
    stream: &UnixStream,
    control: &dyn PodControl,
    clients: &Clients,
) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_request(&mut reader)? {
        let asked = clients.ask();
        let reply = match request {
            Err(refusal) => Err(refusal),
            Ok(Request::Status {}) => {
                let mut status = control.status();
                status.measure();
                Ok(Reply::Status(status))
            }
            Ok(Request::Kill { node }) => find(control, &node)
                .and_then(|node| control.kill(node))
                .map(|()| Reply::Done {}),
            Ok(Request::Steer { node, action }) => find(control, &node)
                .and_then(|node| control.steer(node, action))
                .map(|()| Reply::Done {}),
            Ok(Request::Upgrade { program }) => may_upgrade_to(program.as_deref(), stream)
                .and_then(|()| control.upgrade(program))
                .map(|()| Reply::Done {}),
            Ok(Request::Add { node }) => control.add(&node).map(|_| Reply::Done {}),
            Ok(Request::Reload { dry_run }) => control.reload(dry_run).map(Reply::Reloaded),
            Ok(Request::Down { grace_ms }) => {
                control.down(Duration::from_millis(grace_ms));
                Ok(Reply::Done {})
            }
            Ok(Request::Events { from, follow }) => match clients.stream_permit() {
                Ok(_permit) => {
                    drop(asked);
                    stream.set_write_timeout(None)?;
                    events(stream, control, from, follow)?;
                    stream.set_write_timeout(Some(REPLY_PATIENCE))?;
                    Ok(Reply::Done {})
                }
                Err(refusal) => Err(refusal),
            },
            Ok(Request::Exec {
                node,
                argv,
                env,
                cwd,
            }) => {
                let spec = ExecSpec { argv, env, cwd };
                let started = clients.stream_permit().and_then(|permit| {
                    let node = find(control, &node)?;
                    Ok((permit, start_command(control, node, spec)?))
                });
                match started {
                    Ok((_permit, exec)) => {
                        (&*stream).write_all(&line(&Reply::Exec {}))?;
                        drop(asked);
                        stream.set_write_timeout(None)?;
                        return command(stream, &exec, reader.buffer());
                    }
                    Err(refusal) => Err(refusal),
                }
            }
        };
        let reply = reply.unwrap_or_else(Reply::Error);
        (&*stream).write_all(&line(&reply))?;
    }
    Ok(())
}

/// Whether the client may have the manager execute this. The socket's group may steer pods, but a
/// program that runs as the manager is the manager's user's to choose, or root's.
fn may_upgrade_to(program: Option<&Path>, stream: &UnixStream) -> Result<(), ControlError> {
    let Some(program) = program else {
        return Ok(());
    };
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) if may_choose_programs(peer.uid(), geteuid().as_raw()) => Ok(()),
        _ => Err(ControlError::BadRequest {
            why: format!(
                "{}: only root and the manager's own user may name its next program; without a \
                 name it executes its own program file anew",
                program.display()
            ),
        }),
    }
}

fn may_choose_programs(client: u32, manager: u32) -> bool {
    client == 0 || client == manager
}

/// Reads a line. `None` at the end of the stream.
fn read_request(
    reader: &mut BufReader<&UnixStream>,
) -> io::Result<Option<Result<Request, ControlError>>> {
    let mut text = Vec::new();
    let limit = MAX_LINE as u64;
    reader.by_ref().take(limit).read_until(b'\n', &mut text)?;
    if text.len() == MAX_LINE && text.last() != Some(&b'\n') {
        // The rest of the line is not a request: the stream cannot be read on.
        return Err(io::ErrorKind::InvalidData.into());
    }
    if text.is_empty() {
        return Ok(None);
    }
    let request = serde_json::from_slice(&text);
    Ok(Some(request.map_err(|e| ControlError::BadRequest {
        why: e.to_string(),
    })))
}

fn find(control: &dyn PodControl, id_or_name: &str) -> Result<NodeId, ControlError> {
    let status = control.status();
    let node = status.find(id_or_name).map(|node| node.id);
    node.and_then(NodeId::new)
        .ok_or_else(|| ControlError::NoSuchNode {
            node: id_or_name.into(),
        })
}

/// Streams events until there are no more, or for ever with `follow`.
fn events(
    mut stream: &UnixStream,
    control: &dyn PodControl,
    from: Option<u64>,
    follow: bool,
) -> io::Result<()> {
    let ring = control.fabric();
    let mut next = from.unwrap_or_else(|| match ring.read(1) {
        RingRead::Lost { oldest } => oldest,
        _ => 1,
    });
    // There is no event 0; and without following, no event is newer than those of now.
    next = next.max(1);
    let end = ring.state().ring_head();
    let mut batch = Vec::new();
    loop {
        while batch.len() < EVENT_BATCH && (follow || next <= end) {
            match ring.read(next) {
                RingRead::Event(event) => {
                    batch.extend(line(&Reply::Event(event)));
                    next += 1;
                }
                RingRead::NotYet => break,
                RingRead::Lost { oldest } => {
                    // A ring that answers nonsense must not make us go back or stand still.
                    let resume = oldest.max(next + 1);
                    batch.extend(line(&Reply::EventsLost { from: next, resume }));
                    next = resume;
                }
            }
        }
        if !batch.is_empty() {
            stream.write_all(&batch)?;
            batch.clear();
        } else if !follow {
            return Ok(());
        } else {
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
            let limit = PollTimeout::try_from(FOLLOW_EVERY).unwrap_or(PollTimeout::MAX);
            // Hang-up and errors are always reported; a half-closed client still reads.
            if poll(&mut fds, limit)? > 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }
}

/// Starts a command as soon as the node's agent can be reached.
fn start_command(
    control: &dyn PodControl,
    node: NodeId,
    spec: ExecSpec,
) -> Result<Exec, ControlError> {
    if spec.argv.is_empty() {
        let why = "exec needs a program in argv".into();
        return Err(ControlError::BadRequest { why });
    }
    let deadline = Instant::now() + LINK_PATIENCE;
    loop {
        // Asked anew every time: the node may be restarted meanwhile.
        let link = control.link(node)?;
        match link.exec(spec.clone()) {
            Ok(exec) => return Ok(exec),
            Err(LinkError::NotConnected(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(LinkError::TooMany(limit)) => {
                return Err(ControlError::TooMany {
                    what: format!("commands on node {node}"),
                    limit,
                });
            }
            Err(LinkError::TooLong(why)) => return Err(ControlError::BadRequest { why }),
            Err(other) => {
                return Err(ControlError::Agent {
                    node: node.get(),
                    why: other.to_string(),
                });
            }
        }
    }
}

/// Carries a command's frames until it is over or the client leaves.
fn command(stream: &UnixStream, exec: &Exec, early: &[u8]) -> io::Result<()> {
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new().spawn_scoped(scope, || {
            // A client that leaves, or that breaks the protocol, has given the command up.
            let _ = client_frames(stream, exec, early);
            exec.cancel();
        });
        let done = reader.and_then(|_| agent_frames(stream, exec));
        // Ends the reader.
        let _ = stream.shutdown(Shutdown::Both);
        done
    })
}

/// From the command to the client.
fn agent_frames(mut stream: &UnixStream, exec: &Exec) -> io::Result<()> {
    let channel = 0;
    let mut send = |message: ToManager| {
        let frame = encode(&message).map_err(io::Error::other)?;
        stream.write_all(&frame)
    };
    while let Some(message) = exec.recv() {
        match message {
            ExecMessage::Started { pid } => send(ToManager::Started { channel, pid })?,
            ExecMessage::Credit { bytes } => send(ToManager::Credit { channel, bytes })?,
            ExecMessage::Output { stderr, data } => {
                for chunk in data.chunks(MAX_CHUNK) {
                    send(ToManager::Output {
                        channel,
                        stderr,
                        data: chunk.into(),
                    })?;
                }
            }
            ExecMessage::Exited(status) => return send(ToManager::Exited { channel, status }),
        }
    }
    Ok(())
}

/// From the client to the command.
fn client_frames(mut stream: &UnixStream, exec: &Exec, early: &[u8]) -> Result<(), FrameEnd> {
    let mut decoder = Decoder::new();
    decoder.push(early);
    let mut buffer = vec![0; 64 << 10];
    loop {
        while let Some(message) = decoder.next_message().map_err(|_| FrameEnd)? {
            let sent = match message {
                ToAgent::Stdin { data, .. } if data.is_empty() => exec.close_stdin(),
                ToAgent::Stdin { data, .. } => exec.send_stdin(&data),
                ToAgent::Signal { signal, .. } => exec.signal(signal),
                _ => return Err(FrameEnd),
            };
            match sent {
                // What comes after the end is late, not wrong.
                Ok(()) | Err(LinkError::Over | LinkError::NotConnected(_)) => {}
                Err(_) => return Err(FrameEnd),
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => decoder.push(&buffer[..bytes]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(FrameEnd),
        }
    }
}

/// The client's stream of frames cannot be read on.
#[derive(Debug)]
struct FrameEnd;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_could_run_it_as_the_manager_names_its_next_program() {
        for (client, manager, may) in [(0, 0, true), (0, 7, true), (7, 7, true), (7, 0, false)] {
            assert_eq!(
                may_choose_programs(client, manager),
                may,
                "{client} {manager}"
            );
        }
        let (mine, _other) = UnixStream::pair().unwrap();
        assert_eq!(may_upgrade_to(None, &mine), Ok(()));
        assert_eq!(may_upgrade_to(Some(Path::new("/x")), &mine), Ok(()));
    }
}
