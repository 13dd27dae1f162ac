use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};

use futures::future::join_all;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::lease::{BackendData, BackendKind, Endpoint, LeaseEvent, OwnLease};
use crate::types::Stack;

const NETWORK: &str = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}"#;

/// A file in a folder of its own, which goes with this.
struct Fixture {
    folder: TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new(text: &str) -> Self {
        let fixture = Self::empty();
        fixture.write(text);
        fixture
    }

    fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.json");
        Fixture { folder, path }
    }

    /// In place: truncated, then written.
    fn write(&self, text: &str) {
        std::fs::write(&self.path, text).unwrap();
    }

    fn replace(&self, text: &str) {
        let new = self.folder.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &self.path).unwrap();
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.path).unwrap()
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// A file with these nodes: number, and what stands behind the subnet.
fn cluster(nodes: &[(u8, &str)]) -> String {
    let nodes: Vec<String> =
        nodes.iter().map(|(n, more)| format!(r#"    "node-{n}": {{"subnet": "10.42.{n}.0/24"{more}}}"#)).collect();
    format!("{{\n  \"network\": {NETWORK},\n  \"nodes\": {{\n{}\n  }}\n}}\n", nodes.join(",\n"))
}

fn plain(nodes: &[u8]) -> String {
    cluster(&nodes.iter().map(|n| (*n, "")).collect::<Vec<_>>())
}

fn reached(port: u16) -> String {
    format!(
        r#", "reached": [{{"PublicIP": "10.240.0.101", "BackendType": "vxlan", "BackendData": {{ "Port": {port} }} }}]"#
    )
}

fn name(n: u8) -> NodeName {
    format!("node-{n}").parse().unwrap()
}

fn offer(port: u16) -> Offer {
    let data = BackendData::from_text(&format!(r#"{{"Port":{port}}}"#)).unwrap();
    let endpoints = Stack::V4(Endpoint { public_ip: [10, 240, 0, 101].into(), data });
    Offer { backend: BackendKind::of("vxlan"), endpoints }
}

fn request(n: u8) -> LeaseRequest {
    LeaseRequest { node: name(n), underlay: Stack::V4([10, 240, 0, 101].into()), previous: None }
}

async fn next(watch: &mut LeaseStream) -> Result<LeaseEvent, SubnetError> {
    let next = tokio::time::timeout(Duration::from_secs(30), watch.next());
    next.await.expect("within half a minute").expect("a watch does not end")
}

async fn event(watch: &mut LeaseStream) -> LeaseEvent {
    next(watch).await.unwrap()
}

async fn problem(watch: &mut LeaseStream) -> String {
    next(watch).await.unwrap_err().to_string()
}

/// What an event says in short: `+2` for an Upsert of node-2, `-2` for its removal, `=1,2` for a snapshot.
fn short(event: &LeaseEvent) -> String {
    let number = |node: &NodeName| node.as_str().trim_start_matches("node-").to_owned();
    match event {
        LeaseEvent::Snapshot(all) => {
            format!("={}", all.iter().map(|l| number(&l.node)).collect::<Vec<_>>().join(","))
        }
        LeaseEvent::Upsert(lease) => format!("+{}", number(&lease.node)),
        LeaseEvent::Remove(node) => format!("-{}", number(node)),
        LeaseEvent::Own(OwnLease::Changed(_)) => "own changed".to_owned(),
        LeaseEvent::Own(OwnLease::Lost(_)) => "own lost".to_owned(),
    }
}

async fn told(watch: &mut LeaseStream) -> String {
    short(&event(watch).await)
}

/// A watch of node-1 that has told its snapshot.
async fn watching(store: &FileSubnets) -> LeaseStream {
    let mut watch = store.watch(&name(1)).await.unwrap();
    assert!(matches!(event(&mut watch).await, LeaseEvent::Snapshot(_)));
    watch
}

fn reason(text: &str) -> String {
    Document::read(text).unwrap_err()
}

// What a file may say.

#[test]
fn a_broken_file_is_named_with_line_and_column_all_of_it_at_once() {
    let text = r#"{
  "network": {"Network": "10.42.0.0", "Backend": []},
  "nodes": {
    "node-1": {"subnet": "10.42.1.0"},
    "node-2": {"Subnet": "10.42.2.0/24"},
    "node-1": {"subnet": "10.42.3.0/24"},
    "two words": {},
    "node-4": {"subnet": "10.42.4.7/24", "reached": {}},
    "node-5": {"ipv6Subnet": "10.42.5.0/24"},
    "node-6": {"subnet": "10.42.6.0/24",
               "reached": [{"PublicIP": "1.2.3", "BackendTyp": "vxlan"}, {"publicip": "1.2.3.4"}, {"BackendType": "vxlan"}]}
  },
  "node": {},
  "nodes": {}
}"#;
    let problems = reason(text);
    let problems: Vec<&str> = problems.split(", and ").collect();
    for line in [
        r#"line 2 column 14: network.Network is "10.42.0.0"; allowed: an IPv4 network such as "10.42.0.0/16""#,
        r#"line 2 column 14: network.Backend is an array; allowed: an object such as {"Type":"vxlan"}"#,
        r#"line 4 column 26: nodes.node-1.subnet is "10.42.1.0"; allowed: an IPv4 network such as "10.42.1.0/24""#,
        "line 5 column 26: nodes.node-2.Subnet is no key of this format; allowed: subnet, ipv6Subnet, reached",
        "line 6 column 15: nodes.node-1 is there twice",
        r#"line 7 column 18: nodes.two words: "two words" is not a node name: 1 to 253 printable ASCII characters without white space are allowed"#,
        r#"line 8 column 26: nodes.node-4.subnet is "10.42.4.7/24"; allowed: an IPv4 network such as "10.42.1.0/24""#,
        r#"line 8 column 53: nodes.node-4.reached is {}; allowed: an array such as [{"PublicIP": "10.240.0.102", "BackendType": "vxlan"}]"#,
        r#"line 9 column 30: nodes.node-5.ipv6Subnet is "10.42.5.0/24"; allowed: an IPv6 network such as "2001:db8:42:1::/64""#,
        "line 11 column 64: nodes.node-6.reached[0].BackendTyp is no key of this format; allowed: PublicIP, PublicIPv6, BackendType, BackendData, BackendV6Data",
        r#"line 11 column 28: nodes.node-6.reached[0].PublicIP is "1.2.3"; allowed: an IPv4 address such as "10.240.0.102""#,
        r#"line 11 column 74: nodes.node-6.reached[1].BackendType is not set; allowed: a text such as "vxlan""#,
        "line 11 column 99: nodes.node-6.reached[2].PublicIP is not set; allowed: an IPv4 address, or PublicIPv6",
        "line 13 column 11: node is no key of this format; allowed: network, nodes",
        "line 14 column 12: nodes is there twice",
    ] {
        assert!(problems.contains(&line), "{line}\nis missing from\n{problems:#?}");
    }
    assert!(reason("{\n  \"network\": }").contains("line 2 column 14"));
    assert!(reason("{}").contains("network is not set") && reason("{}").contains("nodes is not set"));
    assert_eq!(reason("[]"), "line 1 column 1: the file is an array; allowed: an object");
}

#[test]
fn what_is_beyond_its_bounds_is_refused() {
    let many: Vec<String> =
        (0..=format::MAX_NODES).map(|n| format!(r#""n{n}": {{"subnet": "10.42.1.0/24"}}"#)).collect();
    let text = format!(r#"{{"network": {NETWORK}, "nodes": {{{}}}}}"#, many.join(","));
    assert!(reason(&text).contains("nodes are 4097; allowed: at most 4096"));
    let offers = vec![r#"{"PublicIP": "1.2.3.4", "BackendType": "vxlan"}"#; format::MAX_OFFERS + 1].join(",");
    let text = cluster(&[(1, &format!(r#", "reached": [{offers}]"#))]);
    assert!(reason(&text).contains("17 elements; allowed: at most 16"));
    let typos: String = (0..100).map(|n| format!(r#""k{n}": 0,"#)).collect();
    let text = format!("{{{typos}\"network\": {NETWORK}, \"nodes\": {{}}}}");
    assert_eq!(reason(&text).matches("is no key").count(), 32, "problems are bounded too");
    assert!(Document::read(&"[".repeat(format::MAX_BYTES)).is_err(), "depth costs no stack");
}

#[tokio::test]
async fn a_file_that_is_no_text_of_bounded_length_is_refused_without_being_read() {
    let fixture = Fixture::empty();
    let store = FileSubnets::shared(&fixture.path);
    std::fs::write(&fixture.path, vec![b' '; format::MAX_BYTES + 1]).unwrap();
    assert!(store.network().await.unwrap_err().to_string().contains("longer than 4194304 bytes"));
    std::fs::write(&fixture.path, b"{\n\"\xff\"}").unwrap();
    assert!(store.network().await.unwrap_err().to_string().contains("line 2 is not UTF-8"));
    std::fs::remove_file(&fixture.path).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &fixture.path, rustix::fs::Mode::RUSR).unwrap();
    assert!(store.network().await.unwrap_err().to_string().contains("not a regular file"), "and it does not hang");
}

#[test]
fn offers_are_exchanged_and_every_other_byte_stays() {
    let offers = |ports: &[u16]| format::offers(&ports.iter().map(|p| offer(*p)).collect::<Vec<_>>()).unwrap();
    let exchanged = |text: &str, offers: &str| {
        let document = Document::read(text).unwrap();
        document.entry(&name(1)).unwrap().with_reached(text, offers).unwrap()
    };
    let one = exchanged(&plain(&[0, 1, 2]), &offers(&[1]));
    let written = r#", "reached": [{"PublicIP":"10.240.0.101","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"Port":1}}]"#;
    assert_eq!(one, cluster(&[(0, ""), (1, written), (2, "")]));
    assert_eq!(exchanged(&one, &offers(&[])), cluster(&[(0, ""), (1, r#", "reached": []"#), (2, "")]));

    let lines = format!(
        "{{\"network\": {NETWORK}, \"nodes\": {{\"node-1\" :\t{{\n\t\t\"subnet\": \"10.42.1.0/24\"\n\t}}\n}} }}"
    );
    let with = exchanged(&lines, "[]");
    assert!(with.contains("\"10.42.1.0/24\",\n\t\t\"reached\": []\n\t}"), "{with}");
    assert!(Document::read(&with).is_ok());
}

proptest! {
    #[test]
    fn whatever_the_spacing_only_the_own_entry_changes(
        nodes in prop::collection::btree_map(0_u8..200, prop::option::of(1_u16..), 1..6),
        spaces in prop::collection::vec("[ \t\r\n]{0,3}", 1..20),
        pick in any::<prop::sample::Index>(),
        ports in prop::collection::vec(1_u16.., 0..3),
    ) {
        let entries: Vec<String> = nodes.keys().map(|n| n.to_string()).collect();
        let owner: u8 = pick.get(&entries).parse().unwrap();
        let entries: Vec<(u8, String)> =
            nodes.iter().map(|(n, port)| (*n, port.map(reached).unwrap_or_default())).collect();
        let entries: Vec<(u8, &str)> = entries.iter().map(|(n, more)| (*n, more.as_str())).collect();
        let mut spaces = spaces.iter().cycle();
        let text: String = cluster(&entries)
            .split_inclusive(['{', '}', '[', ']', ',', ' '])
            .flat_map(|part| [part, spaces.next().unwrap().as_str()])
            .collect();
        let before = Document::read(&text).unwrap();
        let offers: Vec<Offer> = ports.iter().map(|port| offer(*port)).collect();
        let new = before.entry(&name(owner)).unwrap().with_reached(&text, &format::offers(&offers).unwrap()).unwrap();
        let after = Document::read(&new).unwrap();
        prop_assert_eq!(after.nodes.len(), before.nodes.len());
        for (before, after) in before.nodes.iter().zip(&after.nodes) {
            prop_assert_eq!(&before.node, &after.node);
            prop_assert_eq!(before.subnets, after.subnets);
            prop_assert_eq!(if before.node == name(owner) { &offers } else { &before.offers }, &after.offers);
        }
    }

    #[test]
    fn a_damaged_file_is_read_or_refused_with_its_place(at in any::<prop::sample::Index>(), by in "\\PC{0,2}", cut in 0_usize..3) {
        let text = cluster(&[(1, &reached(1)), (2, "")]);
        let start = at.index(text.len());
        let damaged = [&text[..start], &by, &text[(start + cut).min(text.len())..]].concat();
        if let Err(reason) = Document::read(&damaged) {
            prop_assert!(reason.contains("line ") && reason.contains("column "), "{}\n{}", reason, damaged);
        }
    }
}

// The calls.

#[tokio::test]
async fn a_listed_node_has_its_subnet_and_an_unlisted_one_waits() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    let store = FileSubnets::shared(&fixture.path);
    assert_eq!(store.network().await.unwrap().networks(), Stack::V4("10.42.0.0/16".parse().unwrap()));
    let owned = store.acquire(&request(1)).await.unwrap();
    assert_eq!(owned.lease.subnets, Stack::V4("10.42.1.0/24".parse().unwrap()));
    assert_eq!((owned.remaining, owned.lease.offers.len()), (None, 0));
    assert_eq!(store.renew(&name(1)).await.unwrap(), owned);
    let second = store.acquire(&request(2)).await.unwrap();
    assert!(owned.lease.precedence < second.lease.precedence, "the upper one is the older");
    assert_eq!(store.acquire(&request(3)).await, Err(SubnetError::NotAssigned { node: name(3) }));
    fixture.replace(&plain(&[2, 3]));
    assert!(store.acquire(&request(3)).await.is_ok(), "added by hand");
    assert!(matches!(store.renew(&name(1)).await, Err(SubnetError::NotHeld { .. })));
    assert!(matches!(store.publish(&name(1), &[offer(1)]).await, Err(SubnetError::NotHeld { .. })));
    assert_eq!(store.release(&name(1)).await, Ok(()), "what is not held is released");
}

#[tokio::test]
async fn publishing_writes_the_nodes_own_entry_and_releasing_empties_it() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    std::fs::set_permissions(&fixture.path, PermissionsExt::from_mode(0o640)).unwrap();
    let store = FileSubnets::shared(&fixture.path);
    let published = store.publish(&name(1), &[offer(8472)]).await.unwrap();
    assert_eq!(published.lease.offers, [offer(8472)], "to the byte");
    let text = fixture.text();
    assert!(text.contains(r#""BackendData":{"Port":8472}"#), "{text}");
    assert_eq!(FileSubnets::read_only(&fixture.path).publish(&name(1), &[offer(8472)]).await.unwrap(), published);
    let metadata = std::fs::metadata(&fixture.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o640, "the mode stays");
    store.publish(&name(1), &[offer(8472)]).await.unwrap();
    let again = std::fs::metadata(&fixture.path).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(again.ino(), metadata.ino(), "what is there is not written again");
    store.release(&name(1)).await.unwrap();
    assert_eq!(fixture.text(), cluster(&[(1, r#", "reached": []"#), (2, "")]));
    let names = fixture.names();
    assert_eq!(names, [".cluster.json.lock".into(), "cluster.json".into()].into(), "nothing else is left");
}

#[tokio::test]
async fn a_broken_file_is_never_written_over() {
    let broken = plain(&[1]).replace("10.42.1.0/24", "10.42.1.0");
    let fixture = Fixture::new(&broken);
    let store = FileSubnets::shared(&fixture.path);
    let error = store.publish(&name(1), &[offer(1)]).await.unwrap_err();
    assert!(error.to_string().contains("line 4 column 26: nodes.node-1.subnet"), "{error}");
    assert!(!error.is_retryable());
    assert_eq!(fixture.text(), broken);
    fixture.write(&plain(&[1]));
    let data = BackendData::from_text("no JSON").unwrap();
    let wrong = Offer { endpoints: Stack::V4(Endpoint { public_ip: [1, 2, 3, 4].into(), data }), ..offer(1) };
    let error = store.publish(&name(1), &[wrong]).await.unwrap_err();
    assert!(error.to_string().contains("BackendData"), "{error}");
    assert_eq!(fixture.text(), plain(&[1]));
}

#[tokio::test]
async fn a_read_only_store_says_what_the_file_should_say_and_takes_it_when_it_does() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    let store = FileSubnets::read_only(&fixture.path);
    let error = store.publish(&name(1), &[offer(1)]).await.unwrap_err();
    assert!(matches!(error, SubnetError::Invalid { .. }), "{error}");
    let said = error.to_string();
    let (_, entry) = said.split_once("put in its place: ").unwrap();
    assert_eq!(fixture.text(), plain(&[1, 2]), "it writes nothing");
    assert_eq!(fixture.names(), ["cluster.json".to_owned()].into());
    fixture.write(&plain(&[1, 2]).replace(r#""node-1": {"subnet": "10.42.1.0/24"}"#, entry));
    let lease = store.publish(&name(1), &[offer(1)]).await.unwrap().lease;
    assert_eq!(lease.offers, [offer(1)]);
    store.release(&name(1)).await.unwrap();
    assert!(fixture.text().contains(entry), "it writes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stores_that_publish_into_one_file_at_once_lose_nothing() {
    let nodes: Vec<u8> = (0..40).collect();
    let fixture = Fixture::new(&plain(&nodes));
    let link = fixture.folder.path().join("link.json");
    symlink("cluster.json", &link).unwrap();
    let stores = [FileSubnets::shared(&fixture.path), FileSubnets::shared(link)];
    let tasks = nodes.iter().map(|n| {
        let (n, store) = (*n, stores[usize::from(n % 2)].clone());
        tokio::spawn(async move {
            store.publish(&name(n), &[offer(1)]).await.unwrap();
            store.publish(&name(n), &[offer(u16::from(n))]).await.unwrap()
        })
    });
    join_all(tasks).await.into_iter().for_each(|done| assert!(done.is_ok()));
    let document = Document::read(&fixture.text()).unwrap();
    for n in nodes {
        assert_eq!(document.entry(&name(n)).unwrap().offers, [offer(u16::from(n))], "{n}");
    }
    assert!(fixture.folder.path().join("link.json").is_symlink(), "a link stays a link");
}

#[tokio::test]
async fn a_writer_that_holds_the_lock_for_ever_is_an_error_and_no_hang() {
    let fixture = Fixture::new(&plain(&[1]));
    let held = disk::try_lock(&fixture.path).unwrap().unwrap();
    let store = FileSubnets::shared(&fixture.path);
    tokio::time::pause();
    let error = store.publish(&name(1), &[offer(1)]).await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains(".lock"), "{error}");
    drop(held);
    store.publish(&name(1), &[offer(1)]).await.unwrap();
}

#[tokio::test]
async fn what_a_crashed_writer_left_is_no_obstacle() {
    let fixture = Fixture::new(&plain(&[1]));
    std::fs::write(fixture.folder.path().join(".cluster.json.new"), "half a fi").unwrap();
    FileSubnets::shared(&fixture.path).publish(&name(1), &[offer(1)]).await.unwrap();
    assert!(Document::read(&fixture.text()).is_ok());
    assert!(!fixture.names().contains(".cluster.json.new"));
}

#[tokio::test]
async fn a_file_that_is_not_there_yet_is_an_error_that_says_what_to_do() {
    let fixture = Fixture::empty();
    let path = fixture.folder.path().join("later").join("cluster.json");
    let store = FileSubnets::shared(&path);
    let error = store.network().await.unwrap_err();
    assert!(error.is_retryable());
    let said = error.to_string();
    let (_, example) = said.split_once("put it there, such as ").unwrap();
    assert!(Document::read(example).is_ok(), "the example in the error is a good file: {example}");
    assert!(store.watch(&name(1)).await.is_err());
    assert!(store.publish(&name(1), &[offer(1)]).await.is_err());
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    std::fs::write(&path, example).unwrap();
    assert!(store.network().await.is_ok());
    assert_eq!(told(&mut store.watch(&name(1)).await.unwrap()).await, "=1");
}

// The watch.

#[tokio::test]
async fn a_watch_begins_with_a_snapshot_and_tells_differences_however_the_file_is_written() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    let store = FileSubnets::shared(&fixture.path);
    let mut watch = store.watch(&name(1)).await.unwrap();
    assert_eq!(told(&mut watch).await, "=1,2");
    fixture.replace(&plain(&[1, 2, 3]));
    assert_eq!(told(&mut watch).await, "+3", "replaced by rename");
    fixture.write(&cluster(&[(1, ""), (2, &reached(1)), (3, "")]));
    let LeaseEvent::Upsert(second) = event(&mut watch).await else { panic!("node-2 changed") };
    assert_eq!((second.node, second.offers), (name(2), vec![offer(1)]), "edited in place");
    // Written otherwise, the same.
    fixture.replace(&cluster(&[(1, ""), (2, &reached(1)), (3, "")]).replace("\n", "\n\n"));
    std::fs::remove_file(&fixture.path).unwrap();
    fixture.write(&plain(&[1, 3]));
    assert_eq!(told(&mut watch).await, "-2", "deleted and made anew, and nothing in between");
}

#[tokio::test]
async fn two_edits_of_the_same_length_within_a_moment_are_both_seen() {
    let fixture = Fixture::new(&cluster(&[(1, ""), (2, &reached(1))]));
    let mut watch = watching(&FileSubnets::shared(&fixture.path)).await;
    for port in (1..=9).rev().cycle().take(30) {
        fixture.write(&cluster(&[(1, ""), (2, &reached(port))]));
        let LeaseEvent::Upsert(second) = event(&mut watch).await else { panic!("node-2 changed") };
        assert_eq!(second.offers, [offer(port)]);
    }
}

#[tokio::test]
async fn a_node_that_comes_or_goes_changes_nobody_elses_lease_and_the_order_counts() {
    let fixture = Fixture::new(&plain(&[1, 2, 3]));
    let store = FileSubnets::shared(&fixture.path);
    let mut watch = watching(&store).await;
    fixture.replace(&plain(&[1, 3, 4]));
    assert_eq!([told(&mut watch).await, told(&mut watch).await], ["-2", "+4"]);
    fixture.replace(&plain(&[1, 5, 3, 4]));
    assert_eq!(told(&mut watch).await, "+5", "put between two others");
    fixture.replace(&plain(&[4, 1, 5, 3]));
    let mut moved = BTreeSet::new();
    for _ in 0..2 {
        moved.insert(told(&mut watch).await);
    }
    assert_eq!(moved, ["+5".to_owned(), "+3".to_owned()].into(), "those that are younger than node-4 now");
    let since = async |n| store.acquire(&request(n)).await.unwrap().lease.precedence;
    assert!(since(4).await < since(1).await && since(1).await < since(5).await && since(5).await < since(3).await);
}

#[tokio::test]
async fn a_file_that_is_written_bit_by_bit_does_not_flap() {
    // An editor that takes longer than half a second proves nothing: on a busy machine, it tries again.
    for _ in 0..20 {
        let fixture = Fixture::new(&plain(&[1, 2]));
        let mut watch = watching(&FileSubnets::shared(&fixture.path)).await;
        let begun = Instant::now();
        let mut heard = Vec::new();
        for part in ["", "{", &plain(&[1, 2])[..50]] {
            fixture.write(part);
            heard.extend(tokio::time::timeout(Duration::from_millis(50), watch.next()).await);
        }
        fixture.write(&plain(&[1, 2, 3]));
        heard.push(watch.next().await);
        if begun.elapsed() < Duration::from_millis(450) {
            assert!(matches!(&heard[..], [Some(Ok(event))] if short(event) == "+3"), "{heard:?}");
            return;
        }
    }
    panic!("this machine is too busy to write four files in half a second");
}

#[tokio::test]
async fn a_file_that_stays_broken_is_told_once_for_each_problem_and_the_last_good_one_counts() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    let store = FileSubnets::shared(&fixture.path);
    let mut watch = watching(&store).await;
    fixture.write("{\n\"network\"");
    assert!(problem(&mut watch).await.contains("line 2 column 9"));
    assert!(store.network().await.is_ok(), "the last good one");
    assert!(store.acquire(&request(2)).await.is_ok());
    assert_eq!(told(&mut store.watch(&name(2)).await.unwrap()).await, "=1,2");
    // The same problem once more, then another.
    fixture.write("{\n\"network\"");
    fixture.write(&plain(&[1, 2]).replace("subnet", "subnets"));
    assert!(problem(&mut watch).await.contains("nodes.node-1.subnets is no key"));
    std::fs::remove_file(&fixture.path).unwrap();
    assert!(problem(&mut watch).await.contains("No such file"));
    fixture.write(&plain(&[1, 2]));
    assert_eq!(told(&mut watch).await, "=1,2", "that it is over is told too");
    fixture.write(&plain(&[1, 2, 3]));
    assert_eq!(told(&mut watch).await, "+3");
}

#[tokio::test]
async fn a_swapped_link_is_followed_as_kubernetes_swaps_it() {
    let fixture = Fixture::empty();
    let at = |name: &str| fixture.folder.path().join(name);
    let version = |name: &str, nodes: &[u8]| {
        std::fs::create_dir(at(name)).unwrap();
        std::fs::write(at(name).join("cluster.json"), plain(nodes)).unwrap();
        symlink(name, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    version("..1", &[1]);
    symlink("..data/cluster.json", &fixture.path).unwrap();
    let mut watch = watching(&FileSubnets::read_only(&fixture.path)).await;
    for n in 2..6 {
        let begun = Instant::now();
        version(&format!("..{n}"), &[1, n]);
        std::fs::remove_dir_all(at(&format!("..{}", n - 1))).unwrap();
        let mut seen = vec![told(&mut watch).await];
        if n > 2 {
            seen.push(told(&mut watch).await);
        }
        assert_eq!(seen.last().unwrap(), &format!("+{n}"));
        assert!(begun.elapsed() < Duration::from_secs(4), "by notice, not by the slow look: {:?}", begun.elapsed());
    }
    // A link that leads into another folder: what happens there is noticed too.
    let elsewhere = Fixture::new(&plain(&[1, 5]));
    std::fs::remove_file(&fixture.path).unwrap();
    symlink(&elsewhere.path, &fixture.path).unwrap();
    elsewhere.replace(&plain(&[1, 5, 7]));
    assert_eq!(told(&mut watch).await, "+7");
    let begun = Instant::now();
    elsewhere.write(&plain(&[1, 5, 7, 8]));
    assert_eq!(told(&mut watch).await, "+8");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn without_notices_changes_are_seen_by_the_slow_look() {
    let fixture = Fixture::new(&plain(&[1]));
    let store = FileSubnets::shared(&fixture.path);
    let mut watch = Watch::begin(Arc::clone(&store.inner), name(1)).await.unwrap();
    watch.deafen();
    let mut watch: LeaseStream = watch.into_stream().boxed();
    assert_eq!(told(&mut watch).await, "=1");
    fixture.replace(&plain(&[1, 2]));
    tokio::time::pause();
    assert_eq!(told(&mut watch).await, "+2");
}

#[tokio::test]
async fn a_whole_folder_that_is_exchanged_is_seen_by_the_slow_look() {
    let fixture = Fixture::empty();
    let at = |name: &str| fixture.folder.path().join(name);
    for (folder, nodes) in [("now", vec![1]), ("then", vec![1, 2])] {
        std::fs::create_dir(at(folder)).unwrap();
        std::fs::write(at(folder).join("cluster.json"), plain(&nodes)).unwrap();
    }
    let mut watch = watching(&FileSubnets::shared(at("now").join("cluster.json"))).await;
    std::fs::rename(at("now"), at("before")).unwrap();
    std::fs::rename(at("then"), at("now")).unwrap();
    tokio::time::pause();
    assert_eq!(told(&mut watch).await, "+2");
    tokio::time::resume();
    std::fs::write(at("now").join("cluster.json"), plain(&[1, 2, 3])).unwrap();
    let begun = Instant::now();
    assert_eq!(told(&mut watch).await, "+3", "the new folder is the one that is watched");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_node_hears_of_its_own_lease_but_not_of_what_it_did_itself() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    let store = FileSubnets::shared(&fixture.path);
    store.acquire(&request(1)).await.unwrap();
    let mut watch = watching(&store).await;
    let mut peer = store.watch(&name(2)).await.unwrap();
    assert_eq!(told(&mut peer).await, "=1,2");
    store.publish(&name(1), &[offer(1)]).await.unwrap();
    assert_eq!(told(&mut peer).await, "+1");
    store.publish(&name(2), &[offer(2)]).await.unwrap();
    assert_eq!(told(&mut watch).await, "+2", "and nothing before that");

    fixture.write(&fixture.text().replace(r#""Port":1"#, r#""Port":7"#));
    let LeaseEvent::Own(OwnLease::Changed(lease)) = event(&mut watch).await else { panic!("somebody else did that") };
    assert_eq!(lease.offers, [offer(7)]);
    fixture.write(&plain(&[1, 2]).replace("10.42.1.0", "10.42.9.0"));
    assert_eq!([told(&mut watch).await, told(&mut watch).await], ["+2", "own changed"]);
    fixture.write(&plain(&[2]));
    let LeaseEvent::Own(OwnLease::Lost(why)) = event(&mut watch).await else { panic!("it is not listed") };
    assert!(why.contains("no longer listed in") && why.contains("cluster.json"), "{why}");
    assert_eq!(store.acquire(&request(1)).await, Err(SubnetError::NotAssigned { node: name(1) }));
    fixture.write(&plain(&[2, 1]));
    store.acquire(&request(1)).await.unwrap();
    fixture.write(&plain(&[2]));
    assert_eq!(told(&mut watch).await, "own lost", "once more");
}

#[tokio::test]
async fn two_processes_with_one_name_do_not_overwrite_each_other_as_fast_as_they_can() {
    let fixture = Fixture::new(&cluster(&[(1, &reached(1)), (2, "")]));
    let store = FileSubnets::shared(&fixture.path);
    let mut watch = watching(&store).await;
    fixture.write(&cluster(&[(1, &reached(2)), (2, "")]));
    assert_eq!(told(&mut watch).await, "own changed");
    let first = Instant::now();
    store.publish(&name(1), &[offer(1)]).await.unwrap();
    fixture.write(&cluster(&[(1, &reached(2)), (2, &reached(2))]));
    assert_eq!(told(&mut watch).await, "+2", "others are told at once");
    tokio::time::pause();
    assert_eq!(told(&mut watch).await, "own changed");
    assert!(first.elapsed() > Duration::from_secs(4), "{:?}", first.elapsed());
}

#[tokio::test]
async fn what_changed_between_acquiring_and_watching_is_told() {
    let fixture = Fixture::new(&plain(&[1]));
    let store = FileSubnets::shared(&fixture.path);
    store.acquire(&request(1)).await.unwrap();
    fixture.write(&plain(&[1]).replace("10.42.1.0", "10.42.9.0"));
    let mut watch = store.watch(&name(1)).await.unwrap();
    assert_eq!([told(&mut watch).await, told(&mut watch).await], ["=1", "own changed"]);
}

#[tokio::test]
async fn a_changed_network_needs_a_restart_and_the_nodes_go_on() {
    let fixture = Fixture::new(&plain(&[1, 2]));
    let store = FileSubnets::shared(&fixture.path);
    store.network().await.unwrap();
    let mut watch = watching(&store).await;
    let other = |nodes: &[u8]| plain(nodes).replace("10.42.0.0/16", "10.0.0.0/8");
    fixture.write(&other(&[1, 2]));
    let said = problem(&mut watch).await;
    assert!(said.contains("restart") && said.contains("10.42.0.0/16, backend vxlan"), "{said}");
    fixture.write(&other(&[1, 2, 3]));
    assert_eq!(told(&mut watch).await, "+3");
    assert_eq!(problem(&mut watch).await, said, "it still holds");
    fixture.write(&plain(&[1, 2, 3]).replace(": {\"Network\"", ":\n{   \"Network\""));
    assert_eq!(told(&mut watch).await, "=1,2,3", "the same network, written otherwise");
}

#[tokio::test]
async fn a_dropped_watch_leaves_nothing_behind() {
    let fixture = Fixture::new(&plain(&[1]));
    let store = FileSubnets::shared(&fixture.path);
    let watch = watching(&store).await;
    assert!(Arc::strong_count(&store.inner) > 1);
    drop(watch);
    assert_eq!(Arc::strong_count(&store.inner), 1);
}
