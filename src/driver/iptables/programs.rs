//! Which programs are run: iptables comes in several builds, and which of them a host uses was somebody's choice.
//!
//! Folders and paths are given; the environment is not read. Nothing is run here.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::driver::DriverError;
use crate::types::Family;

/// The programs of both families, by absolute paths.
///
/// ```
/// use podnet::driver::iptables::IptablesPrograms;
/// match IptablesPrograms::find(IptablesPrograms::FOLDERS) {
///     Ok(programs) => println!("{programs:?}"),
///     Err(error) => println!("{error}"), // names the folders, and the package to install
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IptablesPrograms {
    v4: Pair,
    v6: Pair,
}

/// The two programs of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pair {
    save: PathBuf,
    restore: PathBuf,
}

impl IptablesPrograms {
    /// Where distributions put them, in the order in which root's shell looks.
    pub const FOLDERS: [&'static str; 5] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"];

    /// Looks for `iptables-save`, `iptables-restore`, `ip6tables-save` and `ip6tables-restore` in these folders.
    ///
    /// The rule: all four come from one folder, the first that has them. The plain names go before the names of a variant
    /// (`iptables-nft-save`, then `iptables-legacy-save`) in any folder, as what stands behind the plain names is what the
    /// host's administrator chose (`update-alternatives`), and what kube-proxy and Docker run.
    ///
    /// # Errors
    ///
    /// [`DriverError::Program`] when no folder has all four of one kind. It names the folders.
    pub fn find(folders: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self, DriverError> {
        let folders: Vec<PathBuf> = folders.into_iter().map(|f| f.as_ref().to_owned()).collect();
        if let Some(found) = Self::each_kind(&folders).into_iter().next() {
            return Ok(found);
        }
        let folders: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        Err(DriverError::Program {
            attempted: "find the programs of iptables".into(),
            said: format!(
                "iptables-save, iptables-restore, ip6tables-save, ip6tables-restore: none of these folders has all four: {}",
                folders.join(", ")
            ),
            advice: "install the package iptables, give other folders, or use nftables, which needs no program".into(),
            retry: false,
        })
    }

    /// The first that are found under each kind of name.
    pub(in crate::driver) fn each_kind(folders: impl IntoIterator<Item = impl AsRef<Path>>) -> Vec<Self> {
        let folders: Vec<PathBuf> = folders.into_iter().map(|f| f.as_ref().to_owned()).collect();
        let of = |variant: &str| {
            folders.iter().find_map(|folder| {
                let pair = |name: &str| Pair {
                    save: folder.join(format!("{name}{variant}-save")),
                    restore: folder.join(format!("{name}{variant}-restore")),
                };
                let found = IptablesPrograms { v4: pair("iptables"), v6: pair("ip6tables") };
                found.problem().is_none().then_some(found)
            })
        };
        ["", "-nft", "-legacy"].into_iter().filter_map(of).collect()
    }

    /// Uses these programs: a build of one's own, say. Each is an absolute path.
    ///
    /// # Errors
    ///
    /// [`DriverError::Program`] names the first path that is not absolute or at which no program is.
    pub fn new(
        v4_save: impl Into<PathBuf>,
        v4_restore: impl Into<PathBuf>,
        v6_save: impl Into<PathBuf>,
        v6_restore: impl Into<PathBuf>,
    ) -> Result<Self, DriverError> {
        let programs = IptablesPrograms {
            v4: Pair { save: v4_save.into(), restore: v4_restore.into() },
            v6: Pair { save: v6_save.into(), restore: v6_restore.into() },
        };
        match programs.problem() {
            None => Ok(programs),
            Some((path, said)) => Err(DriverError::Program {
                attempted: "use the programs of iptables".into(),
                said: format!("{}: {said}", path.display()),
                advice: "give the absolute path of a program that may be executed".into(),
                retry: false,
            }),
        }
    }

    /// What prints the rules of a family.
    pub fn save(&self, family: Family) -> &Path {
        &self.of(family).save
    }

    /// What changes the rules of a family.
    pub fn restore(&self, family: Family) -> &Path {
        &self.of(family).restore
    }

    fn of(&self, family: Family) -> &Pair {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The first path that cannot be run, and why.
    fn problem(&self) -> Option<(&Path, String)> {
        let paths = [&self.v4.save, &self.v4.restore, &self.v6.save, &self.v6.restore];
        paths.into_iter().find_map(|path| {
            if !path.is_absolute() {
                return Some((path.as_path(), "the path is not absolute".to_owned()));
            }
            // Of the file behind links: `iptables` is one nearly everywhere.
            match std::fs::metadata(path) {
                Err(e) => Some((path.as_path(), e.to_string())),
                Ok(file) if !file.is_file() || file.permissions().mode() & 0o111 == 0 => {
                    Some((path.as_path(), "it is no file that may be executed".to_owned()))
                }
                Ok(_) => None,
            }
        })
    }
}
