use lupin_abi::groups::{Admission, GroupId, GroupRequest, Secret};
use lupin_abi::socket::{Lifetime, Request, SegmentName, encode};

use super::fuzz::Target;

const INPUTS: u64 = 1500;

/// Numbers that repeat from run to run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number that somebody may not have thought of.
    fn number(&mut self) -> u64 {
        let near = [0, 1, 2, 1 << 21, 1 << 32, 1 << 63, u64::MAX - (1 << 21)];
        let base = near[self.below(near.len() as u64) as usize];
        match self.below(3) {
            0 => base,
            1 => base.wrapping_add(self.below(5)).wrapping_sub(2),
            _ => self.next() >> self.below(64),
        }
    }

    fn name(&mut self) -> String {
        let names = ["a", "b", "g", "h", "", "../a", "a\0b", "x"];
        let name = names[self.below(names.len() as u64) as usize];
        name.repeat(1 + (self.below(8) / 7 * 70) as usize)
    }

    fn group(&mut self) -> GroupId {
        match self.below(4) {
            0 => GroupId::from_word(self.number()),
            index => GroupId::new(index as usize - 1, 1),
        }
    }

    fn threads(&mut self) -> Vec<(u32, u32)> {
        let some = self.below(4);
        (0..some)
            .map(|_| (self.below(6) as u32, 1 + self.below(3) as u32))
            .collect()
    }

    fn request(&mut self) -> Request {
        let group = (self.below(2) == 0).then(|| self.group());
        let name = self.name();
        let segment = SegmentName { group, name };
        let yes = self.below(2) == 0;
        let lifetime = match yes {
            true => Lifetime::Kept,
            false => Lifetime::Members,
        };
        match self.below(17) {
            0 => Request::RegisterThread {
                id: yes.then(|| self.below(6) as u32),
                tid: (self.below(3) == 0).then(|| self.number() as u32),
            },
            1 => Request::ReleaseThread {
                id: self.below(6) as u32,
                generation: self.below(4) as u32,
            },
            2..4 => Request::CreateSegment {
                segment,
                size: self.number(),
                mode: self.number() as u32,
                lifetime,
            },
            4 => Request::OpenSegment {
                segment,
                read_only: yes,
            },
            5..7 => Request::GrowSegment {
                segment,
                size: self.number(),
            },
            7 => Request::RenameSegment {
                segment,
                to: self.name(),
            },
            8 => Request::RemoveSegment {
                segment,
                revoke: yes,
            },
            9 => Request::ListSegments,
            10 => Request::Subscribe {
                from: self.number(),
            },
            11 => Request::ReopenSegment {
                entry: if yes { self.below(4) } else { self.number() } as u32,
                uses: self.below(4) as u32,
                read_only: self.below(2) == 0,
            },
            _ => Request::Group(self.about_groups()),
        }
    }

    fn about_groups(&mut self) -> GroupRequest {
        let (name, group) = (self.name(), self.group());
        let secret = (self.below(3) == 0).then(|| Secret::new(vec![7; self.below(40) as usize]));
        match self.below(10) {
            0 | 1 => GroupRequest::Create {
                name,
                admission: Admission {
                    secret,
                    uids: (0..self.below(10)).map(|n| n as u32).collect(),
                    gids: Vec::new(),
                },
                quota: (self.below(2) == 0).then(|| self.number()),
            },
            2 => GroupRequest::Remove { name },
            3 => GroupRequest::Join {
                name,
                secret,
                threads: self.threads(),
            },
            4 => GroupRequest::Leave {
                group,
                threads: self.threads(),
            },
            5 => GroupRequest::Members {
                group,
                after: self.number() as u32,
            },
            6 => GroupRequest::Watch {
                group,
                from: self.number(),
            },
            8 => GroupRequest::SetAdmission {
                name,
                admission: Admission {
                    secret,
                    ..Admission::default()
                },
            },
            7 => GroupRequest::Expel {
                name,
                thread: (self.below(6) as u32, 1 + self.below(3) as u32),
                process: self.below(2) == 0,
            },
            _ => GroupRequest::List,
        }
    }

    /// A few packets, most of them requests, some of them damaged.
    fn input(&mut self) -> Vec<u8> {
        let mut input = Vec::new();
        for _ in 0..1 + self.below(12) {
            let mut packet = encode(&self.request()).unwrap();
            if self.below(8) == 0 {
                let at = self.below(packet.len() as u64) as usize;
                match self.below(3) {
                    0 => packet.truncate(at),
                    1 => packet[at] ^= 1 << self.below(8),
                    _ => packet.insert(at, self.next() as u8),
                }
            }
            input.extend((packet.len() as u16).to_le_bytes());
            input.extend(packet);
        }
        input
    }
}

#[test]
fn whatever_a_client_sends_the_agent_serves_the_next_one() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut target = Target::new();
    for _ in 0..INPUTS {
        target.run(&numbers.input());
    }
    // Lengths and packets that are nothing at all.
    for len in 0..200 {
        let noise: Vec<u8> = (0..len).map(|_| numbers.next() as u8).collect();
        target.run(&noise);
    }
}
