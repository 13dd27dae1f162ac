//! Finding the programs that a demo asks for by name. It never runs one.

use std::path::PathBuf;

/// Where programs are that an ordinary user's PATH may not lead to.
const USUAL: [&str; 5] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/bin"];

/// The program's absolute path, searched in PATH and then in the usual folders.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).filter(|folder| folder.is_absolute());
    folders.chain(USUAL.map(PathBuf::from)).map(|folder| folder.join(name)).find(|program| program.is_file())
}
