//! Kept overlays: what they keep, and when they are refused.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::*;

const SIZE: u64 = 10 * BLOCK + 512;

struct Bench {
    folder: tempfile::TempDir,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let image = vec![1; SIZE as usize];
    let mut file = File::create(folder.path().join("image")).unwrap();
    file.write_all(&image).unwrap();
    Bench { folder }
}

fn open(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

impl Bench {
    fn image(&self) -> File {
        open(&self.folder.path().join("image"))
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("overlay")
    }

    fn kept(&self) -> Result<Overlay, OverlayError> {
        Overlay::kept(open(&self.path()), &self.image(), SIZE)
    }

    fn write(&self, overlay: &mut Overlay, offset: u64, len: usize, byte: u8) {
        let mut data = vec![byte; len];
        let memory = VolatileSlice::from(&mut data[..]);
        overlay.write(&self.image(), offset, &memory).unwrap();
    }

    fn read(&self, overlay: &Overlay) -> Vec<u8> {
        let mut data = vec![0; SIZE as usize];
        let memory = VolatileSlice::from(&mut data[..]);
        overlay.read(&self.image(), 0, &memory).unwrap();
        data
    }
}

#[test]
fn what_was_flushed_is_kept_and_the_rest_is_the_image_s() {
    let bench = bench();
    let mut overlay = bench.kept().unwrap();
    bench.write(&mut overlay, 100, 1, 2);
    bench.write(&mut overlay, 10 * BLOCK, 512, 3);
    overlay.flush().unwrap();
    bench.write(&mut overlay, 5 * BLOCK, BLOCK as usize, 4);
    drop(overlay);
    let overlay = bench.kept().unwrap();
    let mut expected = vec![1; SIZE as usize];
    expected[100] = 2;
    expected[10 * BLOCK as usize..].fill(3);
    assert!(bench.read(&overlay) == expected);
}

#[test]
fn a_block_that_was_copied_in_part_is_written_whole_the_next_time() {
    let bench = bench();
    let mut overlay = bench.kept().unwrap();
    // As if the host crashed between data and bitmap.
    bench.write(&mut overlay, 3 * BLOCK, BLOCK as usize, 9);
    drop(overlay);
    let mut overlay = bench.kept().unwrap();
    bench.write(&mut overlay, 3 * BLOCK + 8, 8, 5);
    let mut expected = vec![1; SIZE as usize];
    expected[3 * BLOCK as usize + 8..][..8].fill(5);
    assert!(
        bench.read(&overlay) == expected,
        "nothing of the lost write is left"
    );
}

#[test]
fn a_creation_that_was_interrupted_is_begun_again() {
    let bench = bench();
    open(&bench.path()).set_len(123_456).unwrap();
    let mut overlay = bench.kept().unwrap();
    bench.write(&mut overlay, 0, 512, 7);
    overlay.flush().unwrap();
    assert_eq!(bench.read(&bench.kept().unwrap())[..512], [7; 512]);
}

#[test]
fn what_is_no_overlay_of_this_image_is_refused_and_left_alone() {
    let bench = bench();
    std::fs::write(bench.path(), [b'x'; 8192]).unwrap();
    assert!(matches!(bench.kept(), Err(OverlayError::Foreign)));
    assert_eq!(std::fs::read(bench.path()).unwrap(), [b'x'; 8192]);
    std::fs::remove_file(bench.path()).unwrap();
    bench.kept().unwrap();

    let refused = |bench: &Bench, at: u64, bytes: &[u8]| {
        let good = std::fs::read(bench.path()).unwrap();
        open(&bench.path()).write_all_at(bytes, at).unwrap();
        let error = bench.kept().unwrap_err();
        std::fs::write(bench.path(), good).unwrap();
        error
    };
    assert!(matches!(refused(&bench, 8, &[9]), OverlayError::Version(9)));
    assert!(matches!(
        refused(&bench, 12, &[9]),
        OverlayError::Damaged(_)
    ));
    assert!(matches!(
        refused(&bench, 16, &[9]),
        OverlayError::OtherImage
    ));
    assert!(matches!(
        refused(&bench, PAGE + 2, &[1]),
        OverlayError::Damaged(_)
    ));
    open(&bench.path()).set_len(PAGE + 1).unwrap();
    assert!(matches!(bench.kept(), Err(OverlayError::Damaged(_))));
}

#[test]
fn an_image_that_was_changed_is_refused() {
    let bench = bench();
    drop(bench.kept().unwrap());
    let image = bench.image();
    image.write_all_at(&[2], 0).unwrap();
    // Whatever the resolution of the file system's clock is.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(10);
    image.set_modified(later).unwrap();
    let error = bench.kept().unwrap_err().to_string();
    assert!(error.contains("delete the overlay"), "{error}");
}
