//! A member of a group, which does what it is told: for tests of groups and segments on pods.
//!
//! `lupin-member` reads commands from its standard input, a line each, and answers with a line each:
//! `ok ...` or `error: ...`. It ends with its input.
//!
//! | command | |
//! |---|---|
//! | `group NAME`, `join NAME` | creates a group; joins one, with the process as a thread instance |
//! | `next SECONDS` | the next notification, or `nothing` |
//! | `create NAME BYTES`, `open NAME` | a segment of the group |
//! | `grow BYTES`, `refresh`, `size`, `revoke` | what it says, of that segment |
//! | `read OFFSET`, `write OFFSET VALUE` | a word of it |
//! | `guard`, `intact` | errors in place of SIGBUS, and whether there was one |
//! | `expel ID GENERATION` | the process of that member |
//! | `thread` | has a thread join that ends without a word; its instance |

use std::fmt::Display;
use std::io::{BufRead, Write, stdin, stdout};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lupin::client::{GroupEvent, Lifetime, What};
use lupin::shm::Access;
use lupin::{Admission, InstanceId, Membership, Pod, Segment, Thread};

type Answer = Result<String, Box<dyn std::error::Error>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pod = Pod::attach()?;
    let thread = pod.register_thread(None)?;
    let mut member = Member {
        membership: None,
        segment: None,
        thread: &thread,
        pod: &pod,
    };
    for line in stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match member.obey(&words) {
            Ok(answer) => format!("ok {answer}"),
            Err(error) => format!("error: {error}"),
        };
        let mut out = stdout().lock();
        writeln!(out, "{}", answer.trim_end())?;
        out.flush()?;
    }
    Ok(())
}

struct Member<'p> {
    // Dropped before the thread, in this order.
    segment: Option<Segment>,
    membership: Option<(String, Membership)>,
    thread: &'p Thread,
    pod: &'p Pod,
}

impl Member<'_> {
    fn obey(&mut self, words: &[&str]) -> Answer {
        match *words {
            ["group", name] => {
                self.pod.create_group(name, Admission::default())?;
                nothing()
            }
            ["join", name] => {
                let membership = self.pod.join_group(name, None, &[self.thread])?;
                self.membership = Some((name.into(), membership));
                say(self.thread.instance())
            }
            ["next", seconds] => {
                let limit = Duration::from_secs(seconds.parse()?);
                let (_, membership) = self.membership.as_mut().ok_or("no group")?;
                match membership.notifications().next_within(limit)? {
                    Some(GroupEvent::Notice(notice)) => Ok(line_of(notice.what)),
                    Some(other) => Ok(format!("{other:?}")),
                    None => say("nothing"),
                }
            }
            ["create", name, bytes] => {
                let membership = self.membership()?;
                let segments = membership.segments();
                let created = segments.create(name, bytes.parse()?, Lifetime::Kept)?;
                say(self.segment.insert(created).len())
            }
            ["open", name] => {
                let opened = self.membership()?.segments();
                let opened = opened.open(name, Access::ReadWrite)?;
                say(self.segment.insert(opened).len())
            }
            ["grow", bytes] => {
                let segment = self.segment_mut()?;
                segment.grow(bytes.parse()?)?;
                say(segment.len())
            }
            ["refresh"] => say(self.segment_mut()?.refresh()?),
            ["size"] => say(self.segment_mut()?.len()),
            ["revoke"] => {
                let name = self.segment_mut()?.name().to_owned();
                self.membership()?.segments().revoke(&name)?;
                nothing()
            }
            ["read", at] => {
                let word: &AtomicU64 = self.segment_mut()?.get(at.parse()?)?;
                say(word.load(Ordering::Relaxed))
            }
            ["write", at, value] => {
                let word: &AtomicU64 = self.segment_mut()?.get(at.parse()?)?;
                word.store(value.parse()?, Ordering::Relaxed);
                nothing()
            }
            ["guard"] => {
                self.segment_mut()?.guard()?;
                nothing()
            }
            ["intact"] => {
                self.segment_mut()?.intact()?;
                nothing()
            }
            ["expel", id, generation] => {
                let (name, _) = self.membership.as_ref().ok_or("no group")?;
                let member = InstanceId::new(id.parse()?, generation.parse()?);
                let expulsion = self.pod.expel_process(name, member)?;
                Ok(format!("{} {:?}", expulsion.members, expulsion.memory))
            }
            ["thread"] => self.thread_that_ends(),
            _ => Err(format!("unknown command {words:?}").into()),
        }
    }

    fn membership(&self) -> Result<&Membership, &'static str> {
        let membership = self.membership.as_ref();
        Ok(&membership.ok_or("no group")?.1)
    }

    fn segment_mut(&mut self) -> Result<&mut Segment, &'static str> {
        self.segment.as_mut().ok_or("no segment")
    }

    /// As a thread that panics does: it drops nothing that would say goodbye.
    fn thread_that_ends(&self) -> Answer {
        let (name, _) = self.membership.as_ref().ok_or("no group")?;
        let ends = || -> Result<InstanceId, lupin::ClientError> {
            let own = self.pod.register_own_thread(None)?;
            let membership = self.pod.join_group(name, None, &[&own])?;
            let instance = own.instance();
            std::mem::forget((membership, own));
            Ok(instance)
        };
        let ended = std::thread::scope(|scope| scope.spawn(ends).join());
        say(ended.map_err(|_| "the thread panicked")??)
    }
}

fn nothing() -> Answer {
    Ok(String::new())
}

fn say(what: impl Display) -> Answer {
    Ok(what.to_string())
}

/// A notification as a line: what, the thread, the node.
fn line_of(what: What) -> String {
    let (word, member) = match what {
        What::Joined { member } => ("joined".to_owned(), member),
        What::Rejoined { member, .. } => ("rejoined".to_owned(), member),
        What::Left { member } => ("left".to_owned(), member),
        What::Died { member, end } => (format!("died({end:?})"), member),
        What::Expelled { member, .. } => ("expelled".to_owned(), member),
        What::NodeFailed { node } => return format!("node-failed {node}"),
        What::NodeBack { node } => return format!("node-back {node}"),
    };
    format!("{word} {} {}", member.thread, member.node)
}
