use super::*;

const GOOD: &str = "console=ttyS0 quiet lupin.node=3 lupin.generation=7 lupin.heartbeat_ms=4 \
    lupin.sections=fabric@0x140000000+0x200000,node@0x140600000+0x200000,\
system@0x140a00000+0x400000,pool@0x180000000+0x10000000 panic=-1\n";

#[test]
fn a_whole_command_line_is_understood() {
    let (identity, sections) = from_cmdline(GOOD).unwrap();
    assert_eq!(identity.node.get(), 3);
    assert_eq!(identity.generation, 7);
    assert_eq!(identity.heartbeat, Duration::from_millis(4));
    assert_eq!(identity.instance(), InstanceId::new(3, 7));
    assert_eq!(sections.fabric.start, 0x1_4000_0000);
    assert_eq!(sections.system.size, 0x40_0000);
    assert_eq!(sections.pool.end(), 0x1_9000_0000);
}

#[test]
fn the_heartbeat_has_a_default_and_the_last_word_wins() {
    let text = GOOD.replace("lupin.heartbeat_ms=4", "lupin.node=9");
    let (identity, _) = from_cmdline(&text).unwrap();
    assert_eq!(identity.heartbeat, DEFAULT_HEARTBEAT);
    assert_eq!(identity.node.get(), 9);
}

#[test]
fn each_missing_word_is_named() {
    for key in ["lupin.node", "lupin.generation", "lupin.sections"] {
        let text = GOOD.replace(&format!("{key}="), "x=");
        assert_eq!(from_cmdline(&text), Err(IdentityError::Missing(key)));
    }
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    for (from, to, name) in [
        ("node=3", "node=0", "node"),
        ("node=3", "node=1025", "node"),
        ("node=3", "node=99999999999", "lupin.node"),
        ("node=3", "node=-1", "lupin.node"),
        ("generation=7", "generation=0", "generation"),
        ("generation=7", "generation=x", "lupin.generation"),
        ("heartbeat_ms=4", "heartbeat_ms=0", "heartbeat_ms"),
        ("heartbeat_ms=4", "heartbeat_ms=100000", "heartbeat_ms"),
    ] {
        let text = GOOD.replace(&format!("lupin.{from}"), &format!("lupin.{to}"));
        match from_cmdline(&text) {
            Err(IdentityError::Value { key, .. }) => assert_eq!(key, name, "{to}"),
            other => panic!("{to}: {other:?}"),
        }
    }
}

#[test]
fn sections_are_checked_before_anything_is_written_to_sysfs() {
    for (from, to, say) in [
        ("fabric@", "fabrik@", "unknown section"),
        ("fabric@0x140000000", "fabric@0x140000800", "aligned"),
        ("+0x400000,", "+0x100000,", "aligned"),
        ("+0x400000,", "+0x0,", "empty"),
        ("+0x400000,", ",", "form"),
        ("node@0x140600000", "node@140600000", "form"),
        ("node@0x140600000", "node@0x+40600000", "form"),
        ("node@0x140600000", "node@0x140000000", "overlaps fabric"),
        ("node@0x140600000+0x200000,", "", "node is missing"),
        ("0x180000000", "0xffffffffffe00000", "beyond"),
    ] {
        let text = GOOD.replace(from, to);
        assert_ne!(text, GOOD, "{from}");
        match from_cmdline(&text) {
            Err(IdentityError::Sections(text)) => assert!(text.contains(say), "{to}: {text}"),
            other => panic!("{to}: {other:?}"),
        }
    }
    let twice = GOOD.replace(" panic", ",node@0x240600000+0x200000 panic");
    assert!(matches!(from_cmdline(&twice), Err(IdentityError::Sections(t)) if t.contains("twice")));
}
