use std::io::Write;

use vm_memory::Bytes;

use super::*;
use crate::arch::layout::MIB;

/// The smallest file that passes for a bzImage: a setup header and one sector of code.
fn bzimage(edit: impl FnOnce(&mut Vec<u8>)) -> tempfile::NamedTempFile {
    let mut bytes = vec![0u8; 3 * 512 + 64];
    bytes[0x1f1] = 1; // setup_sects
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    bytes[0x211] = 1; // loadflags: LOADED_HIGH
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    bytes[0x236..0x238].copy_from_slice(&1u16.to_le_bytes()); // xloadflags
    bytes[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
    bytes[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes()); // pref_address
    bytes[0x260..0x264].copy_from_slice(&(32u32 << 20).to_le_bytes()); // init_size
    bytes[1024..1028].copy_from_slice(b"code");
    edit(&mut bytes);
    file(&bytes)
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn boot(kernel: &Path, initramfs: &Path, ram: u64) -> (GuestMemoryMmap, Result<u64, LoadError>) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram as usize)]).unwrap();
    let command_line = CommandLine::new(None, "quiet");
    let spec = BootSpec {
        kernel,
        initramfs,
        command_line: &command_line,
        acpi: b"tables",
        ram_size: ram,
        sections: &[],
    };
    let entry = load(&memory, &spec);
    (memory, entry)
}

fn refusal(kernel: &Path, initramfs: &Path, ram: u64) -> String {
    boot(kernel, initramfs, ram).1.unwrap_err().to_string()
}

#[test]
fn loads_kernel_initramfs_and_parameters() {
    let (kernel, initramfs) = (bzimage(|_| {}), file(b"cpio"));
    let (memory, entry) = boot(kernel.path(), initramfs.path(), 128 * MIB);
    assert_eq!(entry.unwrap(), 16 * MIB + 0x200);
    let text = |at: u64| -> [u8; 4] { memory.read_obj(GuestAddress(at)).unwrap() };
    assert_eq!(&text(16 * MIB), b"code");
    assert_eq!(&text(128 * MIB - PAGE_SIZE), b"cpio");
    assert_eq!(&text(CMDLINE_START), b"cons");
    let image: u32 = memory
        .read_obj(GuestAddress(ZERO_PAGE_START + 0x218))
        .unwrap();
    let size: u32 = memory
        .read_obj(GuestAddress(ZERO_PAGE_START + 0x21c))
        .unwrap();
    assert_eq!((u64::from(image), size), (128 * MIB - PAGE_SIZE, 4));
    let rsdp: u64 = memory
        .read_obj(GuestAddress(ZERO_PAGE_START + 0x70))
        .unwrap();
    assert_eq!(rsdp, ACPI_START);
}

#[test]
fn names_what_is_wrong_with_a_kernel() {
    let initramfs = file(b"cpio");
    let check = |kernel: &Path, expected: &str| {
        let error = refusal(kernel, initramfs.path(), 128 * MIB);
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(&kernel.display().to_string()), "{error}");
    };
    check(Path::new("/nonexistent/vmlinuz"), "No such file");
    check(Path::new("/"), "not a regular file");
    check(file(b"").path(), "not a Linux bzImage");
    check(file(b"\x7fELF").path(), "ELF");
    check(bzimage(|b| b[0x202] = 0).path(), "HdrS");
    check(
        bzimage(|b| b[0x206..0x208].copy_from_slice(&0x0200u16.to_le_bytes())).path(),
        "protocol",
    );
    check(bzimage(|b| b[0x211] = 0).path(), "zImage");
    check(bzimage(|b| b[0x236] = 0).path(), "64-bit");
    check(bzimage(|b| b.truncate(1024)).path(), "truncated");
}

#[test]
fn names_what_is_wrong_with_an_initramfs() {
    let kernel = bzimage(|_| {});
    let gone = Path::new("/nonexistent/initrd");
    assert!(refusal(kernel.path(), gone, 128 * MIB).contains("/nonexistent/initrd"));
    assert!(refusal(kernel.path(), file(b"").path(), 128 * MIB).contains("empty"));
    let big = tempfile::NamedTempFile::new().unwrap();
    big.as_file().set_len(100 * MIB).unwrap();
    let error = refusal(kernel.path(), big.path(), 128 * MIB);
    assert!(error.contains("need at least 148 MiB"), "{error}");
    big.as_file().set_len(4 << 30).unwrap();
    let error = refusal(kernel.path(), big.path(), 128 * MIB);
    assert!(error.contains("do not fit"), "{error}");
}
