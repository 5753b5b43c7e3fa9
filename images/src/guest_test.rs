use super::*;
use crate::kernel::kernel_test::FakeKernel;

fn pod_kernel() -> FakeKernel {
    let kernel = FakeKernel::new();
    for (module, depends) in [
        ("virtio", ""),
        ("virtio_pci", "virtio"),
        ("virtio_console", "virtio"),
        ("dax_hmem", ""),
        ("device_dax", ""),
        ("pvpanic-pci", ""),
        ("virtio_blk", "virtio"),
        ("rng-core", ""),
        ("virtio-rng", "rng-core,virtio"),
        ("extra", ""),
    ] {
        kernel.module(&format!("{module}.ko"), depends);
    }
    kernel
}

/// Any static program does for a busybox here.
fn program() -> PathBuf {
    std::env::current_exe().unwrap()
}

#[test]
fn an_image_holds_what_its_init_script_uses() {
    let kernel = pod_kernel();
    let tree = KernelTree::open(kernel.root()).unwrap();
    let image = GuestImage::new(&program())
        .agent(&program())
        .module("extra")
        .text("/etc/hello", "hello\n")
        .text("/usr/bin/say", "#!/bin/sh\necho hi\n");
    let archive = image.archive(&tree).unwrap();
    for path in [
        "/init",
        "/usr/bin/busybox",
        "/usr/bin/sh",
        "/bin",
        "/dev/console",
        "/tmp",
        AGENT_PATH,
        MODULE_LIST_PATH,
        "/usr/lib/modules/6.0-test/extra.ko",
        "/etc/hello",
        "/usr/bin/say",
    ] {
        assert!(archive.contains(path), "{path} is missing");
    }
    assert!(INIT_SCRIPT.contains(AGENT_PATH) && INIT_SCRIPT.contains(MODULE_LIST_PATH));
}

#[test]
fn building_twice_gives_the_same_bytes() {
    let kernel = pod_kernel();
    let tree = KernelTree::open(kernel.root()).unwrap();
    let image = GuestImage::new(&program());
    let out = kernel.root().join("image");
    image.write(&tree, &out).unwrap();
    assert_eq!(
        fs::read(&out).unwrap(),
        image.archive(&tree).unwrap().to_bytes()
    );
    let leftovers = fs::read_dir(kernel.root()).unwrap().count();
    assert_eq!(leftovers, 3, "boot, lib and the image, no temporary file");
}

#[test]
fn a_dynamic_program_is_refused_by_name() {
    let kernel = pod_kernel();
    let tree = KernelTree::open(kernel.root()).unwrap();
    // A program header table with one PT_INTERP entry.
    let mut dynamic = vec![0u8; 64 + 56];
    dynamic[..6].copy_from_slice(b"\x7fELF\x02\x01");
    dynamic[32] = 64;
    dynamic[54] = 56;
    dynamic[56] = 1;
    dynamic[64] = 3;
    dynamic[64 + 8] = 120;
    dynamic[64 + 32] = 8;
    dynamic.extend(b"/lib/ld\0");
    let path = kernel.root().join("boot/dynamic");
    fs::write(&path, dynamic).unwrap();
    let error = GuestImage::new(&program())
        .agent(&path)
        .archive(&tree)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("boot/dynamic") && error.contains("/lib/ld"),
        "{error}"
    );
}

#[test]
fn a_kernel_without_the_pods_devices_is_refused() {
    let kernel = FakeKernel::new();
    kernel.module("virtio_pci.ko", "");
    let tree = KernelTree::open(kernel.root()).unwrap();
    let error = GuestImage::new(&program())
        .archive(&tree)
        .unwrap_err()
        .to_string();
    assert!(error.contains("virtio_console"), "{error}");
}
