//! `--disk`: what it may say, and what is refused.

use super::*;

fn parse(text: &str) -> Result<DiskSpec, OptionError> {
    text.parse()
}

#[test]
fn options_are_understood() {
    let spec = parse("path=/a").unwrap();
    assert_eq!((spec.readonly, spec.overlay, spec.id), (false, None, None));
    let spec = parse("path=/a,readonly=on,id=root").unwrap();
    assert!(spec.readonly);
    assert_eq!(spec.id.as_deref(), Some("root"));
    let overlay = parse("path=/a,overlay=/b,keep=on").unwrap().overlay;
    let expected = OverlaySpec {
        path: "/b".into(),
        keep: true,
    };
    assert_eq!(overlay, Some(expected));
}

#[test]
fn nonsense_is_refused_by_name() {
    for (text, word) in [
        ("readonly=on", "path"),
        ("path=", "path"),
        ("path=/a,readonly=yes", "yes"),
        ("path=/a,readonly=on,overlay=/b", "readonly"),
        ("path=/a,keep=on", "overlay"),
        ("path=/a,overlay=", "overlay"),
        ("path=/a,id=123456789012345678901", "20"),
        ("path=/a,id=a b", "a b"),
        ("path=/a,size=4G", "size"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(word), "{text}: {error}");
    }
}

#[test]
fn files_that_are_no_disks_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd");
    let refused = |options: &str| {
        let spec = parse(&format!("path={}{options}", path.display())).unwrap();
        spec.open().unwrap_err().to_string()
    };
    assert!(refused("").contains(path.to_str().unwrap()));
    std::fs::write(&path, [0; 513]).unwrap();
    assert!(refused("").contains("513"));
    std::fs::write(&path, []).unwrap();
    assert!(refused("").contains("0 bytes"));
    std::fs::write(&path, [0; 512]).unwrap();
    assert!(refused(",overlay=/nonexistent/o").contains("/nonexistent/o"));
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(refused(",readonly=on").contains("neither"));
}

#[test]
fn an_image_is_read_by_many_or_written_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, [0; 512]).unwrap();
    let open = |options: &str| {
        let options = options.replace('@', folder.path().to_str().unwrap());
        parse(&format!("path={}{options}", path.display()))
            .unwrap()
            .open()
    };
    let first = open(",readonly=on").unwrap();
    let second = open(",overlay=@/o").unwrap();
    assert_eq!((first.size(), second.size()), (512, 512));
    drop((first, second));
    let writer = open("").unwrap();
    // The lock of a VMM that ends comes free in time.
    let waiting = std::thread::scope(|scope| {
        let other = scope.spawn(|| open(",readonly=on").map(|_| ()));
        std::thread::sleep(Duration::from_millis(100));
        drop(writer);
        other.join().unwrap()
    });
    waiting.unwrap();
    let kept = open(",overlay=@/k,keep=on").unwrap();
    let error = open(",overlay=@/k,keep=on").unwrap_err();
    assert!(
        matches!(&error, DiskError::InUse { path, .. } if path.ends_with("k")),
        "{error}"
    );
    drop(kept);
}
