//! Who may join a group.
//!
//! A secret is a random token of at least 16 bytes, not a password: pod memory, which agents
//! alone map, holds SHA-256 of a random salt and the token. Against a token of 128 bits a slow
//! hash would win nothing, and it would cost every agent its responsiveness. Comparison takes the
//! same time wherever the difference is.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;

use lupin_abi::groups::{Admission, Group, HASH_SIZE, MAX_RULES, SALT_SIZE, Secret};
use sha2::{Digest, Sha256};

use super::GroupError;
use crate::peer::Peer;

/// What is kept of a secret: salt, and hash of both.
type Kept = ([u8; SALT_SIZE], [u8; HASH_SIZE]);

/// Checks a rule that a creator set; gives what is kept of its secret.
pub fn checked(admission: &Admission) -> Result<Option<Kept>, GroupError> {
    if admission.uids.len() > MAX_RULES || admission.gids.len() > MAX_RULES {
        let what = format!("more than {MAX_RULES} uids or gids; use a group of the system");
        return Err(GroupError::Rules(what));
    }
    let Some(secret) = &admission.secret else {
        return Ok(None);
    };
    if !(Secret::MIN..=Secret::MAX).contains(&secret.bytes().len()) {
        let (min, max) = (Secret::MIN, Secret::MAX);
        let what = format!("a secret of not {min} to {max} bytes; use a random token");
        return Err(GroupError::Rules(what));
    }
    let mut salt = [0; SALT_SIZE];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut salt))
        .map_err(GroupError::Salt)?;
    Ok(Some((salt, hash(&salt, secret))))
}

/// Judges who wants to join.
pub fn admit(group: &Group, secret: Option<&Secret>, peer: &Peer) -> Result<(), GroupError> {
    let denied = |why| {
        let name = group.name.clone();
        Err(GroupError::Denied { name, why })
    };
    if !rule_admits(group, peer) {
        return denied("its rule does not admit this user");
    }
    match (&group.secret, secret) {
        (None, _) => Ok(()),
        (Some(_), None) => denied("it asks for a secret"),
        (Some((salt, kept)), Some(secret)) if same(kept, &hash(salt, secret)) => Ok(()),
        (Some(_), Some(_)) => denied("the secret is wrong"),
    }
}

/// Whether the rule for users admits this one.
pub fn rule_admits(group: &Group, peer: &Peer) -> bool {
    if peer.uid == 0 {
        return true;
    }
    if group.uids.is_empty() && group.gids.is_empty() {
        return group.secret.is_some() || peer.uid == group.uid;
    }
    group.uids.contains(&peer.uid)
        || group.gids.contains(&peer.gid)
        || peer.groups.iter().any(|gid| group.gids.contains(gid))
}

fn hash(salt: &[u8; SALT_SIZE], secret: &Secret) -> [u8; HASH_SIZE] {
    let mut hasher = Sha256::new();
    hasher.update(salt);
    hasher.update(secret.bytes());
    hasher.finalize().into()
}

/// Compares without an early end.
fn same(a: &[u8; HASH_SIZE], b: &[u8; HASH_SIZE]) -> bool {
    let mut difference = 0;
    for (a, b) in a.iter().zip(b) {
        difference |= black_box(a ^ b);
    }
    black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use lupin_abi::InstanceId;

    const TOKEN: &[u8] = b"0123456789abcdef";

    fn peer(uid: u32, gid: u32, groups: &[u32]) -> Peer {
        Peer {
            pid: 1,
            uid,
            gid,
            groups: groups.to_vec(),
        }
    }

    fn group(admission: &Admission) -> Group {
        Group {
            name: "g".into(),
            creator: InstanceId::new(1, 1),
            uid: 5,
            gid: 6,
            uids: admission.uids.clone(),
            gids: admission.gids.clone(),
            secret: checked(admission).unwrap(),
            quota: None,
        }
    }

    #[test]
    fn all_that_is_set_must_hold() {
        let ask = |group: &Group, secret: Option<&[u8]>, peer: &Peer| {
            let secret = secret.map(Secret::new);
            admit(group, secret.as_ref(), peer).is_ok()
        };
        let none = group(&Admission::default());
        assert!(ask(&none, None, &peer(5, 1, &[])));
        assert!(ask(&none, None, &peer(0, 0, &[])));
        assert!(!ask(&none, None, &peer(6, 6, &[6])));

        let rules = Admission {
            uids: vec![7],
            gids: vec![8],
            ..Admission::default()
        };
        let by_rule = group(&rules);
        assert!(ask(&by_rule, None, &peer(7, 1, &[])));
        assert!(ask(&by_rule, None, &peer(1, 8, &[])));
        assert!(ask(&by_rule, None, &peer(1, 1, &[3, 8])));
        assert!(!ask(&by_rule, None, &peer(1, 7, &[7])));
        assert!(!ask(&by_rule, None, &peer(5, 6, &[])), "also its creator");

        let secret = Some(Secret::new(TOKEN));
        let by_secret = group(&Admission {
            secret: secret.clone(),
            ..Admission::default()
        });
        assert!(ask(&by_secret, Some(TOKEN), &peer(9, 9, &[])));
        for wrong in [&b""[..], b"0123456789abcdeF", b"0123456789abcdef0"] {
            assert!(!ask(&by_secret, Some(wrong), &peer(9, 9, &[])));
        }
        // A secret is not guessed by being root.
        assert!(!ask(&by_secret, None, &peer(0, 0, &[])));

        let both = group(&Admission { secret, ..rules });
        assert!(ask(&both, Some(TOKEN), &peer(7, 1, &[])));
        assert!(!ask(&both, Some(TOKEN), &peer(9, 9, &[])));
        assert!(!ask(&both, None, &peer(7, 1, &[])));
    }

    #[test]
    fn a_secret_is_kept_salted_and_not_shown() {
        let admission = Admission {
            secret: Some(Secret::new(TOKEN)),
            ..Admission::default()
        };
        let (one, two) = (checked(&admission).unwrap(), checked(&admission).unwrap());
        assert_ne!(one, two);
        assert!(!format!("{admission:?}").contains("48, 49"));
        for length in [0, 15, 257] {
            let secret = Some(Secret::new(vec![1; length]));
            let short = Admission {
                secret,
                ..Admission::default()
            };
            assert!(matches!(checked(&short), Err(GroupError::Rules(_))));
        }
    }
}
