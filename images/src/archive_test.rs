use super::*;

/// (path, mode with type bits, link target or content)
fn read_back(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut rest = bytes;
    let mut entries = Vec::new();
    loop {
        let reader = newc::Reader::new(rest).expect("a readable entry");
        if reader.entry().is_trailer() {
            return entries;
        }
        let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
        assert_eq!(reader.entry().mtime(), 0, "{name} carries a time stamp");
        let mut data = Vec::new();
        rest = reader.to_writer(&mut data).expect("its content");
        entries.push((name, mode, data));
    }
}

#[test]
fn an_archive_reads_back_sorted_with_its_parents() {
    let mut archive = Archive::new();
    archive.file("/usr/bin/tool", 0o755, *b"tool!").unwrap();
    archive.symlink("/bin", "usr/bin").unwrap();
    archive.char_device("/dev/console", 0o600, 5, 1).unwrap();
    let entries = read_back(&archive.to_bytes());
    let seen: Vec<(&str, u32)> = entries.iter().map(|(n, m, _)| (n.as_str(), *m)).collect();
    assert_eq!(
        seen,
        [
            ("bin", 0o120_777),
            ("dev", 0o040_755),
            ("dev/console", 0o020_600),
            ("usr", 0o040_755),
            ("usr/bin", 0o040_755),
            ("usr/bin/tool", 0o100_755),
        ]
    );
    assert_eq!(entries[0].2, b"usr/bin");
    assert_eq!(entries[5].2, b"tool!");
}

#[test]
fn the_same_content_gives_the_same_bytes_in_any_order() {
    let mut one = Archive::new();
    one.file("/a", 0o644, *b"a")
        .unwrap()
        .file("/b/c", 0o644, *b"c")
        .unwrap();
    let mut other = Archive::new();
    other
        .file("/b/c", 0o644, *b"c")
        .unwrap()
        .file("/a", 0o644, *b"a")
        .unwrap();
    assert_eq!(one.to_bytes(), other.to_bytes());
}

#[test]
fn paths_that_leave_the_image_are_refused() {
    for path in ["relative", "/", "/a/../b", "/a//b", "/a/", ""] {
        let error = Archive::new().file(path, 0o644, *b"").unwrap_err();
        assert!(
            matches!(error, ImageError::BadPath { .. }),
            "{path}: {error}"
        );
    }
}

#[test]
fn one_place_holds_one_thing() {
    let mut archive = Archive::new();
    archive.file("/a", 0o644, *b"x").unwrap();
    archive
        .file("/a", 0o644, *b"x")
        .expect("the same again is no conflict");
    let error = archive.file("/a", 0o644, *b"y").unwrap_err();
    assert!(
        matches!(&error, ImageError::Occupied { path } if path == "/a"),
        "{error}"
    );
    let error = archive.file("/a/b", 0o644, *b"y").unwrap_err();
    assert!(
        matches!(&error, ImageError::Occupied { path } if path == "/a"),
        "{error}"
    );
}

#[test]
fn a_missing_host_file_is_named() {
    let error = Archive::new()
        .host_file(Path::new("/no/such/file"), "/x")
        .unwrap_err();
    assert!(error.to_string().contains("/no/such/file"), "{error}");
}
