//! An unpacked kernel package: the kernel itself and its modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::ImageError;
use crate::modinfo::dependencies;

/// A module, decompressed and ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name as `lsmod` prints it (underscores, no suffix).
    pub name: String,
    /// The object file.
    pub object: Vec<u8>,
}

/// A kernel package unpacked into a directory of its own.
///
/// Both layouts of Debian are understood: `boot/vmlinuz-RELEASE` beside
/// `lib/modules/RELEASE`, and everything in `usr/lib/modules/RELEASE`.
#[derive(Debug, Clone)]
pub struct KernelTree {
    release: String,
    image: PathBuf,
    modules: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl KernelTree {
    /// Looks at the kernel unpacked under `root`.
    ///
    /// # Errors
    /// [`ImageError::NotAKernel`] if it lacks the kernel or its modules, [`ImageError::Read`].
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let missing = |missing| ImageError::NotAKernel {
            root: root.into(),
            missing,
        };
        let modules = ["lib/modules", "usr/lib/modules"]
            .iter()
            .filter_map(|place| only_directory(&root.join(place)))
            .next()
            .ok_or_else(|| missing("lib/modules/RELEASE"))?;
        let release = match modules.file_name().and_then(|name| name.to_str()) {
            Some(name) => name.to_owned(),
            None => return Err(missing("lib/modules/RELEASE")),
        };
        let image = [
            root.join(format!("boot/vmlinuz-{release}")),
            modules.join("vmlinuz"),
        ]
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| missing("boot/vmlinuz-RELEASE"))?;
        let list = modules.join("modules.builtin");
        let builtin = fs::read_to_string(&list)
            .map_err(|source| ImageError::Read { path: list, source })?
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut files = BTreeMap::new();
        collect_modules(&modules.join("kernel"), &mut files)?;
        Ok(Self {
            release,
            image,
            modules,
            files,
            builtin,
        })
    }

    /// The kernel's release, as `uname -r` prints it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The file of the kernel itself (a bzImage).
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The folder of its modules, named after its release.
    pub fn modules_dir(&self) -> &Path {
        &self.modules
    }

    /// Whether there is such a module, as a file or built in. `-` and `_` are the same.
    pub fn has_module(&self, name: &str) -> bool {
        let name = normal(name);
        self.files.contains_key(&name) || self.builtin.contains(&name)
    }

    /// The named modules and all that they depend on, in an order in which each
    /// comes after its dependencies. Built-in ones are left out.
    ///
    /// # Errors
    /// [`ImageError::MissingModule`], [`ImageError::BadModule`], [`ImageError::ModuleCycle`],
    /// [`ImageError::Read`].
    pub fn modules<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<Module>, ImageError> {
        let mut order = LoadOrder {
            tree: self,
            open: Vec::new(),
            loaded: Vec::new(),
        };
        for name in names {
            order.add(&normal(name.as_ref()), "the image")?;
        }
        Ok(order.loaded)
    }
}

/// Depth-first walk over the dependencies.
struct LoadOrder<'a> {
    tree: &'a KernelTree,
    /// Modules on the way from the root to here, to notice circles.
    open: Vec<String>,
    loaded: Vec<Module>,
}

impl LoadOrder<'_> {
    fn add(&mut self, name: &str, wanted_by: &str) -> Result<(), ImageError> {
        let tree = self.tree;
        if self.loaded.iter().any(|module| module.name == name) || tree.builtin.contains(name) {
            return Ok(());
        }
        if self.open.iter().any(|open| open == name) {
            return Err(ImageError::ModuleCycle {
                module: name.into(),
                release: tree.release.clone(),
            });
        }
        let path = tree
            .files
            .get(name)
            .ok_or_else(|| ImageError::MissingModule {
                module: name.into(),
                release: tree.release.clone(),
                wanted_by: wanted_by.into(),
            })?;
        let object = read_module(path)?;
        let needed = dependencies(&object).map_err(|reason| ImageError::BadModule {
            path: path.clone(),
            reason: reason.into(),
        })?;
        self.open.push(name.into());
        for dependency in needed {
            self.add(&normal(&dependency), name)?;
        }
        self.open.pop();
        self.loaded.push(Module {
            name: name.into(),
            object,
        });
        Ok(())
    }
}

fn read_module(path: &Path) -> Result<Vec<u8>, ImageError> {
    let read = |source| ImageError::Read {
        path: path.into(),
        source,
    };
    if path.extension().is_some_and(|suffix| suffix == "xz") {
        let mut object = Vec::new();
        let packed = fs::File::open(path).map_err(read)?;
        lzma_rs::xz_decompress(&mut io::BufReader::new(packed), &mut object).map_err(|error| {
            ImageError::BadModule {
                path: path.into(),
                reason: error.to_string(),
            }
        })?;
        Ok(object)
    } else {
        fs::read(path).map_err(read)
    }
}

/// `pvpanic-pci` and `pvpanic_pci` name the same module.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file
        .strip_suffix(".ko")
        .or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(normal(stem))
}

fn collect_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    let read = |source| ImageError::Read {
        path: dir.into(),
        source,
    };
    for entry in fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let path = entry.path();
        if entry.file_type().map_err(read)?.is_dir() {
            collect_modules(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

fn only_directory(parent: &Path) -> Option<PathBuf> {
    let mut found = fs::read_dir(parent)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path());
    let first = found.find(|path| path.is_dir())?;
    found.all(|path| !path.is_dir()).then_some(first)
}

#[cfg(test)]
#[path = "kernel_test.rs"]
pub(crate) mod kernel_test;
