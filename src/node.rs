//! [`Node`]: the overlay there is, and its builder. Building checks everything and touches nothing; starting opens sockets
//! and hands out an [`Overlay`] and a [`Runner`] that the embedder spawns.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use tokio::sync::{mpsc, watch};
use tracing::Instrument;

use crate::admission::Reserved;
use crate::backend::{Backend, Maker};
use crate::clock::{Clock, SystemClock};
use crate::driver::firewall::{FirewallChoice, FirewallDriver};
use crate::driver::netlink::NetlinkDriver;
use crate::driver::sysctl::SysctlDriver;
use crate::driver::{Driver, DriverError, NetworkNamespace};
use crate::engine::{Engine, Handle, Settings};
use crate::error::Error;
use crate::masquerade::MasqueradePolicy;
use crate::overlay::Overlay;
use crate::plan::Domain;
use crate::status::{Counters, PeerCounts, Phase, Status};
use crate::subnet::SubnetManager;
use crate::types::{Family, NodeName, Stack};
use crate::underlay::UnderlayChoice;

/// The name of the abstract unix socket that keeps a second overlay out of a network namespace. The kernel frees it with
/// the process that holds it, however that ends.
const LOCK: &str = "podnet/overlay";
/// How often, and how far apart, a lock that is held is asked for again.
const LOCK_TRIES: u32 = 10;
const LOCK_WAIT: Duration = Duration::from_millis(10);
/// Questions that may wait for the engine; more wait in their callers.
const QUEUE: usize = 16;
/// The shortest period of the full check (invariant 13).
const SHORTEST_CHECK: Duration = Duration::from_secs(10);
/// The longest: beyond it a check is none.
const LONGEST_CHECK: Duration = Duration::from_secs(24 * 3600);
/// How long before its end a lease is renewed unless something else is asked for: flannel's default.
const RENEW_MARGIN: Duration = Duration::from_secs(3600);
/// The least, and the most.
const SHORTEST_MARGIN: Duration = Duration::from_secs(1);
const LONGEST_MARGIN: Duration = Duration::from_secs(24 * 3600);

/// What is done about a setting of the host (`/proc/sys`) that pods need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostSetting {
    /// Set it, and set it again when somebody unsets it. It stays set after a shutdown, which names it.
    Set,
    /// Say so in the status when it is not as needed.
    Report,
    /// Do not look.
    Ignore,
}

/// A pod network node, ready to start.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use podnet::Node;
/// use podnet::config::NetworkConfig;
/// use podnet::subnet::memory::MemorySubnets;
/// use podnet::types::Stack;
///
/// let network = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?;
/// let subnets = MemorySubnets::assigned(network);
/// let problem = Node::builder("two words", subnets).build().unwrap_err();
/// assert!(problem.to_string().contains("two words"), "every problem is named: {problem}");
/// assert!(problem.to_string().contains("backend"));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Node {
    settings: Settings,
    masquerade: MasqueradePolicy,
    firewall: FirewallChoice,
    namespace: NetworkNamespace,
    drivers: Vec<Arc<dyn Driver>>,
}

/// The options of a [`Node`]. Each has a default but the backend.
///
/// | option | default |
/// |---|---|
/// | [`backend`](Self::backend) | none: at least one must be given |
/// | [`masquerade`](Self::masquerade) | [`MasqueradePolicy::default`] |
/// | [`firewall`](Self::firewall) | [`FirewallChoice::Nftables`] |
/// | [`underlay`](Self::underlay) | [`UnderlayChoice::Automatic`] |
/// | [`network_namespace`](Self::network_namespace) | the one of the thread that calls `start` |
/// | [`reserve`](Self::reserve) | nothing beside what the host itself shows |
/// | [`previous_subnets`](Self::previous_subnets) | none |
/// | [`adopt_flannel`](Self::adopt_flannel) | yes |
/// | [`ip_forward`](Self::ip_forward) | [`HostSetting::Set`] |
/// | [`bridge_netfilter`](Self::bridge_netfilter) | [`HostSetting::Report`] |
/// | [`router_advertisements`](Self::router_advertisements) | [`HostSetting::Set`] |
/// | [`public_addresses`](Self::public_addresses) | the underlay's own |
/// | [`require_encryption`](Self::require_encryption) | no |
/// | [`check_period`](Self::check_period) | 10 s, also the least |
/// | [`renew_margin`](Self::renew_margin) | an hour before the end of the lease |
/// | [`driver`](Self::driver) | netlink, the firewall of that choice, `/proc/sys` |
/// | [`clock`](Self::clock) | the system's |
#[derive(Debug)]
#[must_use = "a builder does nothing until `build`"]
pub struct NodeBuilder {
    name: String,
    manager: Arc<dyn SubnetManager>,
    backends: Vec<Arc<dyn Backend>>,
    masquerade: MasqueradePolicy,
    firewall: FirewallChoice,
    underlay: UnderlayChoice,
    namespace: NetworkNamespace,
    drivers: Vec<Arc<dyn Driver>>,
    reserved: Vec<Reserved>,
    previous: Option<Stack<Ipv4Network, Ipv6Network>>,
    adopt: bool,
    forwarding: HostSetting,
    bridge_netfilter: HostSetting,
    router_advertisements: HostSetting,
    public: Option<Stack<Ipv4Addr, Ipv6Addr>>,
    require_encryption: bool,
    check_period: Duration,
    renew_margin: Duration,
    clock: Arc<dyn Clock>,
}

impl Node {
    /// Begins a node of this name with this store of leases.
    pub fn builder(name: impl Into<String>, subnets: impl SubnetManager) -> NodeBuilder {
        NodeBuilder {
            name: name.into(),
            manager: Arc::new(subnets),
            backends: Vec::new(),
            masquerade: MasqueradePolicy::default(),
            firewall: FirewallChoice::default(),
            underlay: UnderlayChoice::Automatic,
            namespace: NetworkNamespace::Current,
            drivers: Vec::new(),
            reserved: Vec::new(),
            previous: None,
            adopt: true,
            forwarding: HostSetting::Set,
            bridge_netfilter: HostSetting::Report,
            router_advertisements: HostSetting::Set,
            public: None,
            require_encryption: false,
            check_period: SHORTEST_CHECK,
            renew_margin: RENEW_MARGIN,
            clock: Arc::new(SystemClock::new()),
        }
    }

    /// Opens what the overlay needs in the kernel and hands it out. Nothing is changed before the runner is polled.
    ///
    /// The lease, the underlay and everything else that may come late is the runner's work: it waits, tries again, and the
    /// status says for what. Must be called inside a tokio runtime with time and I/O enabled.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyRunning`] when another overlay works in the namespace; [`Error::Driver`] when the namespace or a
    /// socket cannot be opened.
    pub async fn start(self) -> Result<(Arc<dyn Overlay>, Runner), Error> {
        let given: BTreeSet<Domain> = self.drivers.iter().map(|d| d.domain()).collect();
        // Who brings a kernel of his own has no namespace to share.
        let lock = if given.contains(&Domain::Netlink) { None } else { Some(lock(&self.namespace).await?) };
        let mut drivers: Vec<Arc<dyn Driver>> = Vec::new();
        if !given.contains(&Domain::Sysctl) {
            drivers.push(Arc::new(SysctlDriver::new(&self.namespace)));
        }
        if !given.contains(&Domain::Netlink) {
            drivers.push(Arc::new(NetlinkDriver::open(&self.namespace)?));
        }
        if !given.contains(&Domain::Firewall) {
            drivers.push(Arc::new(FirewallDriver::open(&self.namespace, self.firewall).await?));
        }
        drivers.extend(self.drivers);
        drivers.extend(self.settings.backends.iter().filter_map(|b| b.driver(&self.namespace)));
        let (commands, queue) = mpsc::channel(QUEUE);
        let (status, watcher) = watch::channel(Arc::new(starting(&self.settings.node)));
        let span = tracing::info_span!("podnet", node = %self.settings.node);
        let engine = Engine::new(self.settings, self.masquerade, drivers, queue, status);
        let work = async move {
            let farewell = engine.run().await;
            // The lock before the answer: who was told of the end may start anew at once.
            drop(lock);
            farewell.say();
        }
        .instrument(span);
        Ok((Arc::new(Handle::new(commands, watcher)), Runner { work: Box::pin(work) }))
    }
}

/// The work of an overlay: a future that the embedder spawns, and that returns after a shutdown.
///
/// It logs by `tracing`, inside a span `podnet` with the field `node`, so that several overlays of one process can be told apart.
///
/// Dropping it stops the work at the next await and leaves the network as it is; the handle then answers
/// [`Error::Stopped`].
#[must_use = "the overlay does nothing until its runner is spawned or awaited"]
pub struct Runner {
    work: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner").finish_non_exhaustive()
    }
}

impl Future for Runner {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.work.as_mut().poll(cx)
    }
}

impl NodeBuilder {
    /// Adds a backend. Of several, the first that a peer offers too reaches that peer.
    pub fn backend(mut self, backend: impl Backend) -> Self {
        self.backends.push(Arc::new(backend));
        self
    }

    /// Sets what is masqueraded and which forwarded packets are accepted.
    pub fn masquerade(mut self, policy: MasqueradePolicy) -> Self {
        self.masquerade = policy;
        self
    }

    /// Sets where the firewall rules go: nftables, iptables, or by a rule which of them. What an earlier run left in the other
    /// one is removed once they stand; with plain [`FirewallChoice::Nftables`], which runs no program, what is left in iptables is a
    /// warning.
    pub fn firewall(mut self, choice: FirewallChoice) -> Self {
        self.firewall = choice;
        self
    }

    /// Sets how the underlay is found.
    pub fn underlay(mut self, choice: UnderlayChoice) -> Self {
        self.underlay = choice;
        self
    }

    /// Sets the network namespace to work in.
    pub fn network_namespace(mut self, namespace: NetworkNamespace) -> Self {
        self.namespace = namespace;
        self
    }

    /// Uses this driver for its domain instead of the built-in one: a fake kernel in tests, another firewall. A node with a
    /// netlink driver of its own takes no lock of the namespace.
    pub fn driver(mut self, driver: impl Driver) -> Self {
        self.drivers.push(Arc::new(driver));
        self
    }

    /// Keeps every peer out whose subnet meets this range: the service network, say. `what` is for the status.
    pub fn reserve(mut self, network: IpNetwork, what: impl Into<String>) -> Self {
        self.reserved.push(Reserved { network, what: what.into() });
        self
    }

    /// The subnets that this node had before, which an allocating store gives again where it can.
    pub fn previous_subnets(mut self, subnets: Stack<Ipv4Network, Ipv6Network>) -> Self {
        self.previous = Some(subnets);
        self
    }

    /// Whether devices, routes and tables that flannel left are taken over (see `docs/ownership.md`), or left alone and
    /// reported as conflicts. Left alone, its VXLAN device goes on carrying pod packets in plain text until this node holds its lease,
    /// also with [`require_encryption`](NodeBuilder::require_encryption).
    pub fn adopt_flannel(mut self, adopt: bool) -> Self {
        self.adopt = adopt;
        self
    }

    /// What is done about `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding`.
    pub fn ip_forward(mut self, setting: HostSetting) -> Self {
        self.forwarding = setting;
        self
    }

    /// What is done about `net.bridge.bridge-nf-call-iptables` and its IPv6 twin, which service addresses need.
    pub fn bridge_netfilter(mut self, setting: HostSetting) -> Self {
        self.bridge_netfilter = setting;
        self
    }

    /// What is done about `net.ipv6.conf.*.accept_ra`: 0 on the overlay's devices, where a member could otherwise give this host a
    /// default route; and 2 on the underlay's device where it is 1 when podnet switches IPv6 forwarding on, which would
    /// otherwise make the host forget the default route that a router announced.
    pub fn router_advertisements(mut self, setting: HostSetting) -> Self {
        self.router_advertisements = setting;
        self
    }

    /// The addresses under which peers reach this node, where they are not the underlay's own: behind a NAT. They are published;
    /// packets leave with the underlay's own. A backend that needs one layer 2 does not serve a family in which they differ.
    pub fn public_addresses(mut self, addresses: Stack<Ipv4Addr, Ipv6Addr>) -> Self {
        self.public = Some(addresses);
        self
    }

    /// Whether pod packets may leave this node for another in encrypted form alone.
    ///
    /// With it, only backends that encrypt may be given, and a peer that offers none of them is unreachable. From the moment on
    /// when the cluster networks are known, a blackhole stands behind all routes to them, so that nothing follows the
    /// default route while the backend's device is not there; and VXLAN devices and routes to peers that an earlier
    /// configuration, or flannel (unless [what it left is not touched](NodeBuilder::adopt_flannel)), left are taken away at once,
    /// without waiting for the store to give this node its lease, or to tell the others'. Once this node holds its
    /// lease, a rule of the packet filter, whatever the masquerade policy, drops what goes to pods of other nodes by any device but the
    /// backend's ([`Hook::Seal`](crate::masquerade::Hook::Seal)). So neither flushed routes nor flushed rules let anything out; only
    /// both in the same moment do, until they are repaired. Both stay with [`Shutdown::Keep`](crate::Shutdown::Keep) and when
    /// the process is killed.
    ///
    /// Where the host itself uses the cluster network of a family (a connected LAN or VPN that covers it), that is a conflict, the family
    /// does not come up, and neither guard is set: it would cut the host off from that network. The status names it.
    /// A backend that encrypts without a device of its own has the blackhole alone.
    pub fn require_encryption(mut self, required: bool) -> Self {
        self.require_encryption = required;
        self
    }

    /// How often the kernel is compared as a whole: 10 s to a day. Longer where a comparison takes more than 0.2 % of that.
    pub fn check_period(mut self, period: Duration) -> Self {
        self.check_period = period;
        self
    }

    /// How long before its end this node's lease is renewed: up to a day, and at least 1 s; of a lease that does not last longer
    /// than that, a third. A twentieth of its term passes in any case. An outage of the store that is shorter than this costs no lease. Leases without end are not renewed.
    pub fn renew_margin(mut self, margin: Duration) -> Self {
        self.renew_margin = margin;
        self
    }

    /// Uses another clock, for tests.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Checks everything and touches nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Build`] with every problem, one sentence each.
    pub fn build(self) -> Result<Node, Error> {
        let mut problems = Vec::new();
        let name = self.name.parse::<NodeName>().map_err(|e| problems.push(e.to_string())).ok();
        if self.backends.is_empty() {
            problems.push("no backend is given: at least one is needed".to_owned());
        }
        let mut kinds = BTreeSet::new();
        let mut devices = BTreeSet::new();
        for backend in &self.backends {
            if self.require_encryption && !backend.capabilities().encrypts {
                problems.push(format!("encryption is required, and the backend {} does not encrypt", backend.kind()));
            }
            if !kinds.insert(backend.kind()) {
                problems.push(format!("the backend {} is given twice: one of a kind is allowed", backend.kind()));
            }
            // A backend may have one device for both families.
            let own: BTreeSet<_> = Family::BOTH.iter().flat_map(|family| backend.devices(*family)).collect();
            for device in own {
                if device.maker == Maker::OwnDriver && backend.driver(&self.namespace).is_none() {
                    let problem =
                        format!("the backend {} has no driver for its device {}", backend.kind(), device.name);
                    problems.push(problem);
                }
                if !devices.insert(device.name.clone()) {
                    problems.push(format!("two backends want the device {}: one may have it", device.name));
                }
            }
        }
        if !(SHORTEST_MARGIN..=LONGEST_MARGIN).contains(&self.renew_margin) {
            problems.push(format!("a renewal margin of {:?} is given: 1 s to a day are allowed", self.renew_margin));
        }
        if !(SHORTEST_CHECK..=LONGEST_CHECK).contains(&self.check_period) {
            problems.push(format!("a check period of {:?} is given: 10 s to a day are allowed", self.check_period));
        }
        let mut domains = BTreeSet::new();
        for domain in self
            .drivers
            .iter()
            .map(|d| d.domain())
            .chain(self.backends.iter().filter_map(|b| b.driver(&self.namespace)).map(|d| d.domain()))
        {
            if !domains.insert(domain.clone()) {
                problems.push(format!("two drivers are given for the domain {domain}: one is allowed"));
            }
        }
        // Where only the host opens sockets, nothing under /proc/sys can be set: what is missing is reported.
        let reachable = !matches!(self.namespace, NetworkNamespace::Sockets(_));
        let possible = |setting| if setting == HostSetting::Set && !reachable { HostSetting::Report } else { setting };
        let Some(node) = name.filter(|_| problems.is_empty()) else {
            return Err(Error::Build { problems });
        };
        Ok(Node {
            settings: Settings {
                node,
                manager: self.manager,
                backends: self.backends,
                underlay: self.underlay,
                reserved: self.reserved,
                previous: self.previous,
                adopt: self.adopt,
                forwarding: possible(self.forwarding),
                bridge_netfilter: possible(self.bridge_netfilter),
                router_advertisements: possible(self.router_advertisements),
                public: self.public,
                require_encryption: self.require_encryption,
                check_period: self.check_period,
                renew_margin: self.renew_margin,
                clock: self.clock,
            },
            masquerade: self.masquerade,
            firewall: self.firewall,
            namespace: self.namespace,
            drivers: self.drivers,
        })
    }
}

/// Takes the lock of a namespace; it is held as long as the socket is open.
///
/// Every program that this process starts has a copy of an overlay's socket between its fork and its exec: a lock that was just
/// given up may be held for a moment longer.
async fn lock(namespace: &NetworkNamespace) -> Result<OwnedFd, Error> {
    let mut tries = 0;
    loop {
        match namespace.abstract_socket(LOCK) {
            Ok(socket) => return Ok(socket),
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && tries < LOCK_TRIES => tries += 1,
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                return Err(Error::AlreadyRunning { lock: format!("@{LOCK}") });
            }
            Err(e) => {
                let attempted = "open a socket in the network namespace".to_owned();
                return Err(Error::Driver(DriverError::Io { attempted, reason: e.to_string() }));
            }
        }
        tokio::time::sleep(LOCK_WAIT).await;
    }
}

fn starting(node: &NodeName) -> Status {
    Status {
        node: node.clone(),
        phase: Phase::Starting,
        subnets: None,
        networks: None,
        pod_mtu: None,
        conditions: Vec::new(),
        peers: PeerCounts::default(),
        troubled: Vec::new(),
        conflicts: Vec::new(),
        more_conflicts: 0,
        warnings: Vec::new(),
        families: Vec::new(),
        lease_left: None,
        counters: Counters::default(),
    }
}
