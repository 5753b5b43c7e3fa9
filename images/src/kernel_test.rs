use super::*;
use crate::modinfo::tests::object_with_modinfo;

/// A kernel package on disk, removed when dropped.
pub(crate) struct FakeKernel(tempfile::TempDir);

impl FakeKernel {
    pub(crate) fn new() -> Self {
        let kernel = Self(tempfile::tempdir().unwrap());
        kernel.write("boot/vmlinuz-6.0-test", b"bzImage");
        kernel.write(
            "lib/modules/6.0-test/modules.builtin",
            b"kernel/drivers/pci-core.ko\n",
        );
        kernel
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn module(&self, file: &str, depends: &str) -> &Self {
        let object = object_with_modinfo(&format!("depends={depends}\0"));
        self.write(&format!("lib/modules/6.0-test/kernel/{file}"), &object);
        self
    }

    fn write(&self, path: &str, data: &[u8]) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn dependencies_come_first_and_once() {
    let kernel = FakeKernel::new();
    kernel
        .module("a/ring.ko", "core")
        .module("core.ko", "")
        .module("b/dev-one.ko", "ring,core,pci-core")
        .module("b/dev-two.ko", "core");
    let tree = KernelTree::open(kernel.root()).unwrap();
    let modules = tree.modules(&["dev_one", "dev-two"]).unwrap();
    assert_eq!(names(&modules), ["core", "ring", "dev_one", "dev_two"]);
    assert_eq!(tree.release(), "6.0-test");
    assert!(tree.image().ends_with("boot/vmlinuz-6.0-test"));
}

#[test]
fn a_built_in_module_needs_no_file() {
    let kernel = FakeKernel::new();
    kernel.module("x.ko", "");
    let tree = KernelTree::open(kernel.root()).unwrap();
    assert!(tree.has_module("pci_core"));
    assert!(tree.modules(&["pci-core"]).unwrap().is_empty());
}

#[test]
fn compressed_modules_come_out_decompressed() {
    let kernel = FakeKernel::new();
    let object = object_with_modinfo("depends=\0");
    let mut packed = Vec::new();
    lzma_rs::xz_compress(&mut object.as_slice(), &mut packed).unwrap();
    kernel.write("lib/modules/6.0-test/kernel/packed.ko.xz", &packed);
    let modules = KernelTree::open(kernel.root())
        .unwrap()
        .modules(&["packed"])
        .unwrap();
    assert_eq!(modules[0].object, object);
}

#[test]
fn a_missing_module_is_named_with_who_wants_it() {
    let kernel = FakeKernel::new();
    kernel.module("dev.ko", "absent");
    let tree = KernelTree::open(kernel.root()).unwrap();
    let error = tree.modules(&["dev"]).unwrap_err().to_string();
    assert!(
        error.contains("'absent'") && error.contains("needed by dev"),
        "{error}"
    );
    let error = tree.modules(&["nothing"]).unwrap_err().to_string();
    assert!(
        error.contains("'nothing'") && error.contains("6.0-test"),
        "{error}"
    );
}

#[test]
fn circles_and_damage_are_errors() {
    let kernel = FakeKernel::new();
    kernel.module("hen.ko", "egg").module("egg.ko", "hen");
    kernel.write("lib/modules/6.0-test/kernel/bad.ko", b"no ELF");
    kernel.write("lib/modules/6.0-test/kernel/worse.ko.xz", b"no xz");
    let tree = KernelTree::open(kernel.root()).unwrap();
    assert!(matches!(
        tree.modules(&["hen"]),
        Err(ImageError::ModuleCycle { .. })
    ));
    for name in ["bad", "worse"] {
        let error = tree.modules(&[name]).unwrap_err();
        assert!(matches!(error, ImageError::BadModule { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{name}.ko")), "{error}");
    }
}

#[test]
fn a_directory_without_a_kernel_says_so() {
    let empty = tempfile::tempdir().unwrap();
    let error = KernelTree::open(empty.path()).unwrap_err().to_string();
    assert!(error.contains("not an unpacked kernel"), "{error}");
}
