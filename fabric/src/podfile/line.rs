//! Where in a pod file a key stands.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The line, counted from 1, of what a complaint calls `key`: `heartbeat.poll_ms`, `[memory]`, or
/// of a node `[[node]] id = 3: cpus`, which may stand in `[defaults]`. For `[[node]] id` and
/// `[[node]] name`, the last node with that `value`.
pub(super) fn of(text: &str, key: &str, value: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let document = document.get_ref();
    let start = match key.strip_prefix("[[node]]") {
        None => find(document, key.trim_matches(['[', ']'])),
        Some(rest) => of_node(document, rest.trim(), value),
    }?;
    Some(text[..start.min(text.len())].matches('\n').count() + 1)
}

fn of_node(document: &DeTable<'_>, rest: &str, value: &str) -> Option<usize> {
    let DeValue::Array(nodes) = document.get("node")?.get_ref() else {
        return None;
    };
    let mut tables = nodes.iter().filter_map(|node| match node.get_ref() {
        DeValue::Table(table) => Some(table),
        _ => None,
    });
    let (which, id, field) = match rest.strip_prefix("id = ") {
        Some(rest) => {
            let (id, field) = rest.split_once(": ").unwrap_or((rest, "id"));
            ("id", id, field)
        }
        None => (rest, value.trim_matches('"'), rest),
    };
    let named = |table: &&DeTable<'_>| table.get(which).is_some_and(|v| is(v.get_ref(), id));
    let table = tables.rfind(named)?;
    find(table, field)
        .or_else(|| match document.get("defaults")?.get_ref() {
            DeValue::Table(defaults) => find(defaults, field),
            _ => None,
        })
        .or_else(|| find(table, which))
}

fn is(value: &DeValue<'_>, text: &str) -> bool {
    match value {
        DeValue::Integer(number) => number.as_str() == text,
        DeValue::String(string) => string == text,
        _ => false,
    }
}

/// Where the key at the end of a dotted path begins.
fn find(table: &DeTable<'_>, path: &str) -> Option<usize> {
    let (first, rest) = match path.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (path, None),
    };
    let named = |key: &&Spanned<toml::de::DeString<'_>>| key.get_ref() == first;
    let key = table.keys().find(named)?;
    match (rest, table.get(first)?.get_ref()) {
        (Some(rest), DeValue::Table(inner)) => find(inner, rest),
        (Some(_), _) => None,
        (None, _) => Some(key.span().start),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "name = \"x\"\n[heartbeat]\npoll_ms = 3\n\n[defaults]\non.panic.action = \
                        \"restart\"\n[[node]]\nid = 1\n[[node]]\nid = 2\nname = \"b\"\n\
                        [[node]]\nid = 2\nname = \"b\"\ncpus = 0\n";

    #[test]
    fn keys_are_found_where_they_stand() {
        for (key, value, line) in [
            ("name", "\"x\"", Some(1)),
            ("heartbeat.poll_ms", "3", Some(3)),
            ("[heartbeat]", "", Some(2)),
            ("[[node]] id", "2", Some(13)),
            ("[[node]] name", "\"b\"", Some(14)),
            ("[[node]] id = 2: cpus", "0", Some(15)),
            ("[[node]] id = 1: on.panic.action", "", Some(6)),
            ("[[node]] id = 1: kernel", "", Some(8)),
            ("memory.path", "", None),
            ("[[node]] id", "9", None),
        ] {
            assert_eq!(of(TEXT, key, value), line, "{key}");
        }
        assert_eq!(of("= nonsense", "name", ""), None);
    }
}
