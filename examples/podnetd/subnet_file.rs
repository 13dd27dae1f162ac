//! Keeps `subnet.env` as it should be: a family is in it once it works on this node, a new subnet or MTU once that is in the kernel, and
//! whatever was right last is written again whenever the file is lost or says something else. It is replaced whole, so that nobody ever
//! reads half of it, and never taken away: pods go on living while the store is away, while something is repaired and when the daemon stops.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use podnet::flannel::subnet_env::{Earlier, Pair, SubnetEnv};
use podnet::status::{ConditionKind, ConditionState, FamilyStatus, Status};
use podnet::types::{Family, Mtu, Stack};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::node;

/// How often the file is looked at without being told.
const PERIOD: Duration = Duration::from_secs(1);
/// How long the first file waits for a family that does not work yet: an IPv6 address comes seconds after the IPv4 one, and pods that are
/// made in between would be without it for ever.
const LATE: Duration = Duration::from_secs(10);
/// What CNI plugins of any user may do.
const MODE: u32 = 0o644;
const FOLDER_MODE: u32 = 0o755;

/// How the file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// What it should say is not known yet.
    Waiting,
    /// It says this.
    Written(SubnetEnv),
    /// It could not be written.
    Failed(String),
}

/// How often it was written, and how often that failed.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    pub(crate) done: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// What the file says once all of this node's lease works.
pub(crate) fn whole(status: &Status, ip_masq: bool) -> Option<SubnetEnv> {
    let ((networks, subnets), mtu) = status.networks.zip(status.subnets).zip(status.pod_mtu)?;
    SubnetEnv::new(networks, subnets, mtu, ip_masq)
}

/// What the file should say now; `None` where what it says already has to do. `said` is what it says of each family: a family that is in it
/// and is not what it was for a while has pods that still run, and whoever reads meanwhile makes more of them.
fn news(status: &Status, ip_masq: bool, said: Option<&Families>) -> Option<SubnetEnv> {
    let whole = whole(status, ip_masq)?;
    // Where all that is wrong with the kernel is a family that failed, the other does not wait for it.
    let kernel = status.condition(ConditionKind::Kernel);
    let failed = |of: &FamilyStatus| of.state == ConditionState::Failed && kernel.message.contains(&of.message);
    if kernel.state != ConditionState::Met && !status.families.iter().any(failed) {
        return None;
    }
    let [v4, v6] = Family::BOTH.map(|family| status.is_ready_in(family));
    if !v4 && !v6 {
        return None;
    }
    let v4 = whole.families.v4().filter(|pair| v4 || said.and_then(Stack::v4) == Some(pair));
    let v6 = whole.families.v6().filter(|pair| v6 || said.and_then(Stack::v6) == Some(pair));
    Some(SubnetEnv { families: Stack::from_halves(v4.copied(), v6.copied())?, ..whole })
}

type Families = Stack<Pair<Ipv4Network>, Pair<Ipv6Network>>;

/// The families that the file of an earlier run says.
fn earlier(path: &Path) -> Option<Families> {
    let Earlier { networks, subnets } = node::earlier(path);
    // What the rest says does not matter.
    SubnetEnv::new(networks?, subnets?, Mtu::new(1500).ok()?, false).map(|said| said.families)
}

/// Keeps the file until the overlay ends. Dropping it leaves the file as it is, or as it should be.
pub(crate) async fn keep(
    path: PathBuf,
    ip_masq: bool,
    mut status: watch::Receiver<Arc<Status>>,
    state: watch::Sender<State>,
    writes: Arc<Writes>,
) {
    let mut said: Option<SubnetEnv> = None;
    let earlier = earlier(&path);
    let mut waits: Option<Instant> = None;
    loop {
        let news = {
            let families = said.as_ref().map(|said| &said.families).or(earlier.as_ref());
            let status = status.borrow_and_update();
            let news = news(&status, ip_masq, families);
            let complete = news == whole(&status, ip_masq);
            waits = waits.filter(|_| news.is_some());
            news.filter(|_| said.is_some() || complete || waits.get_or_insert_with(Instant::now).elapsed() >= LATE)
        };
        let changed = news.is_some() && news != said;
        said = news.or(said);
        if let Some(said) = said {
            look_after(&path, said, changed, &state, &writes).await;
        }
        tokio::select! {
            alive = status.changed() => if alive.is_err() { return },
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

async fn look_after(path: &Path, said: SubnetEnv, changed: bool, state: &watch::Sender<State>, writes: &Writes) {
    let text = said.to_string();
    let (at, what) = (path.to_owned(), text.clone());
    let done = tokio::task::spawn_blocking(move || ensure(&at, &what)).await;
    let done = done.unwrap_or_else(|_| Err(io::Error::other("the task that writes it was stopped")));
    let now = match done {
        Ok(false) => State::Written(said),
        Ok(true) => {
            writes.done.fetch_add(1, Ordering::Relaxed);
            if changed {
                tracing::info!(path = %path.display(), says = text.replace('\n', " ").trim(), "wrote what CNI plugins read");
            } else {
                tracing::warn!(path = %path.display(), "what CNI plugins read was lost or said something else: written again");
            }
            State::Written(said)
        }
        Err(error) => {
            writes.failed.fetch_add(1, Ordering::Relaxed);
            State::Failed(format!("write {}: {error}; it is tried every {} s", path.display(), PERIOD.as_secs()))
        }
    };
    let before = state.send_replace(now.clone());
    match now {
        State::Failed(why) if before != State::Failed(why.clone()) => tracing::warn!("{why}"),
        _ => {}
    }
}

/// Makes the file say this, if it does not; whether it had to be written. Blocks.
pub(crate) fn ensure(path: &Path, text: &str) -> io::Result<bool> {
    if says(path, text) {
        return Ok(false);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.exists() {
        DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)?;
        // Whatever the umask says.
        fs::set_permissions(folder, Permissions::from_mode(FOLDER_MODE))?;
    }
    let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
    let mut beside = OsString::from(".");
    beside.push(name);
    beside.push(".podnetd");
    let beside = folder.join(beside);
    let written = replace(path, &beside, text);
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written?;
    // So that the name survives a crash, too; a file system that cannot sync a folder has the file all the same.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(true)
}

fn replace(path: &Path, beside: &Path, text: &str) -> io::Result<()> {
    // What a killed run left; never followed if it is a link.
    match fs::remove_file(beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(beside)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(Permissions::from_mode(MODE))?;
    file.sync_all()?;
    fs::rename(beside, path)
}

/// Whether the file is there and says this. Blocks.
pub(crate) fn says(path: &Path, text: &str) -> bool {
    let right = |meta: &fs::Metadata| {
        meta.is_file() && meta.permissions().mode() & 0o777 == MODE && meta.len() == text.len() as u64
    };
    if !fs::symlink_metadata(path).is_ok_and(|meta| right(&meta)) {
        return false;
    }
    let mut there = Vec::new();
    let longest = text.len() as u64 + 1;
    File::open(path).and_then(|file| file.take(longest).read_to_end(&mut there)).is_ok() && there == text.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<OsString> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn it_is_written_once_with_flannels_modes_and_nothing_is_left_beside_it() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("flannel/subnet.env");
        assert!(ensure(&path, TEXT).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o644, 0o755));
        assert_eq!(names(path.parent().unwrap()), ["subnet.env"]);
        assert!(!ensure(&path, TEXT).unwrap(), "it is not written again");
    }

    #[test]
    fn fault_39_whatever_was_done_to_it_is_repaired() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("subnet.env");
        let elsewhere = top.path().join("elsewhere");
        let damages: [(&str, &dyn Fn()); 7] = [
            ("deleted", &|| fs::remove_file(&path).unwrap()),
            ("truncated", &|| fs::write(&path, &TEXT[..40]).unwrap()),
            ("emptied", &|| fs::write(&path, "").unwrap()),
            ("altered, of the same length", &|| fs::write(&path, TEXT.replace("1450", "1400")).unwrap()),
            ("longer", &|| fs::write(&path, format!("{TEXT}FLANNEL_MTU=9000\n")).unwrap()),
            ("unreadable for others", &|| fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap()),
            ("a link to a file that says the same", &|| {
                fs::rename(&path, &elsewhere).unwrap();
                std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
            }),
        ];
        ensure(&path, TEXT).unwrap();
        for (damage, harm) in damages {
            harm();
            assert!(ensure(&path, TEXT).unwrap(), "{damage}");
            assert!(says(&path, TEXT), "{damage}");
        }
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), TEXT, "what a link led to is not touched");
    }

    #[test]
    fn where_it_cannot_be_replaced_the_old_one_stays_whole() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("subnet.env");
        fs::create_dir_all(path.join("in the way")).unwrap();
        assert!(ensure(&path, TEXT).is_err());
        assert!(path.join("in the way").is_dir());
        assert_eq!(names(top.path()), ["subnet.env"], "and nothing is left beside it");
    }

    #[test]
    fn what_a_killed_run_left_beside_it_is_replaced_and_not_followed() {
        let top = tempfile::tempdir().unwrap();
        let (path, victim) = (top.path().join("subnet.env"), top.path().join("victim"));
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, top.path().join(".subnet.env.podnetd")).unwrap();
        assert!(ensure(&path, TEXT).unwrap());
        assert_eq!((fs::read_to_string(&victim).unwrap().as_str(), says(&path, TEXT)), ("precious", true));
    }

    #[test]
    fn whoever_reads_while_it_is_replaced_reads_one_of_both_and_never_half() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("subnet.env");
        let texts = [TEXT.to_owned(), TEXT.replace("1450", "1410").replace("true", "false")];
        ensure(&path, &texts[0]).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..400).for_each(|i| assert!(ensure(&path, &texts[i % 2]).is_ok())));
            let mut reads = 0;
            while !writer.is_finished() || reads == 0 {
                let seen = fs::read_to_string(&path).unwrap();
                assert!(texts.contains(&seen), "{seen}");
                reads += 1;
            }
        });
    }
}
