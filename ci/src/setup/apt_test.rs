use super::*;

#[test]
fn an_offer_is_read_and_named() {
    let line = "'http://m/pool/q/qemu_10.deb' qemu-system-x86_1%3a10.0.2+ds_amd64.deb 10176912 SHA256:ab12";
    let offer = Offer::parse(line).unwrap();
    assert_eq!(offer.file, "qemu-system-x86_1%3a10.0.2+ds_amd64.deb");
    assert_eq!((offer.bytes, offer.sha256.as_str()), (10_176_912, "ab12"));
    assert_eq!(
        offer.name_and_version().unwrap(),
        "qemu-system-x86=1:10.0.2+ds"
    );
    for line in [
        "Reading package lists...",
        "'http://m/a.deb' a_1_all.deb 5 MD5Sum:00",
        "'http://m/a.deb' ../a_1_all.deb 5 SHA256:00",
        "'http://m/a.deb",
    ] {
        assert_eq!(Offer::parse(line), None, "{line}");
    }
}

#[test]
fn exact_dependencies_keep_their_version() {
    let list = " linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), other (>= 3), linux-image-x";
    assert_eq!(
        exact_dependencies(list, "linux-image-"),
        [
            "linux-image-6.1.0-56-cloud-amd64=6.1.192-2",
            "linux-image-x"
        ]
    );
}

#[test]
fn the_machines_proxy_is_kept_and_its_lists_are_not() {
    let machine = "APT::Architecture \"arm64\";\nAcquire::http::Proxy \"http://p:1\";\n\
                   Acquire::IndexTargets::deb::DEP-11::MetaKey \"x\";\nDir::Cache \"/var\";\n";
    let text = configuration(Path::new("/c/apt"), machine);
    assert!(text.contains("Acquire::http::Proxy \"http://p:1\";"));
    assert!(!text.contains("IndexTargets") && !text.contains("arm64") && !text.contains("/var"));
    assert!(text.contains("Dir::State \"/c/apt/state\";"));
}

#[test]
fn a_damaged_download_is_removed_and_both_hashes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.deb");
    fs::write(&path, "x").unwrap();
    let error = check_hash(&path, "00").unwrap_err().to_string();
    // The hash of "x".
    assert!(error.contains("wanted 00") && error.contains("2d711642b726b04401627ca9fbac32f5"));
    assert!(!path.exists());
}
