//! All flags, in one place: flanneld's, and what becomes of each of them here, then podnetd's own. The help, the reading and the
//! manual follow from it.

use crate::flags::Kind::{Bool, Int, List, Text};
use crate::flags::{Flag, Here, Kind, Of};

const fn flannel(name: &'static str, kind: Kind, value: &'static str, here: Here, help: &'static str) -> Flag {
    Flag { name, of: Of::Flannel, kind, value, help, here }
}

const fn own(name: &'static str, kind: Kind, value: &'static str, help: &'static str) -> Flag {
    Flag { name, of: Of::Podnetd, kind, value, help, here: Here::Works }
}

/// What is said of Kubernetes' flags.
const KUBERNETES: Here = Here::Refused(
    "needs the feature kubernetes, which this podnetd is built without: name a store of leases with -subnets instead",
);
const KLOG: Here = Here::NoEffect("podnetd logs by -v alone");

macro_rules! flags {
    ($($constant:ident = $flag:expr;)*) => {
        $(pub(crate) const $constant: &Flag = &$flag;)*
        /// All of them.
        pub(crate) static FLAGS: &[&Flag] = &[$($constant),*];
    };
}

flags! {
    ETCD_ENDPOINTS = flannel("etcd-endpoints", Text("http://127.0.0.1:4001,http://127.0.0.1:2379"), "URL[,URL...]", Here::Works, "the members of etcd");
    ETCD_PREFIX = flannel("etcd-prefix", Text("/coreos.com/network"), "KEY", Here::Works, "the key of etcd below which all is");
    ETCD_KEYFILE = flannel("etcd-keyfile", Text(""), "FILE", Here::Works, "the key of etcd's client certificate");
    ETCD_CERTFILE = flannel("etcd-certfile", Text(""), "FILE", Here::Works, "the client certificate for etcd");
    ETCD_CAFILE = flannel("etcd-cafile", Text(""), "FILE", Here::Works, "the authority that signed etcd's certificate");
    ETCD_USERNAME = flannel("etcd-username", Text(""), "NAME", Here::Works, "the user at etcd");
    ETCD_PASSWORD = flannel("etcd-password", Text(""), "PASSWORD", Here::Works, "the user's password; better in FLANNELD_ETCD_PASSWORD, since others see a command line");
    SUBNET_LEASE_RENEW_MARGIN = flannel("subnet-lease-renew-margin", Int(60), "MINUTES", Here::Works, "how long before its end a lease is renewed, 1 to 1439");

    IFACE = flannel("iface", List, "DEVICE|ADDRESS", Here::Works, "the device that carries the pod network; the first of several that is there");
    IFACE_REGEX = flannel("iface-regex", List, "REGEX", Here::Works, "the first device with an address, or else a name, that fits; asked after -iface");
    IFACE_CAN_REACH = flannel("iface-can-reach", Text(""), "ADDRESS", Here::Works, "the device by which the host reaches this address; asked last. Without all three: that of the default route");
    PUBLIC_IP = flannel("public-ip", Text(""), "ADDRESS", Here::Works, "the IPv4 address that other nodes are told, where it is not the device's");
    PUBLIC_IPV6 = flannel("public-ipv6", Text(""), "ADDRESS", Here::Works, "the same for IPv6");

    SUBNET_FILE = flannel("subnet-file", Text("/run/flannel/subnet.env"), "FILE", Here::Works, "where network, subnet and MTU are written for CNI plugins");
    IP_MASQ = flannel("ip-masq", Bool(false), "", Here::Works, "what leaves the cluster network leaves with the node's address");
    IP_MASQ_FULLY_RANDOM_DISABLE = flannel("ip-masq-fully-random-disable", Bool(false), "", Here::Works, "source ports are kept where they are free");
    IPTABLES_FORWARD_RULES = flannel("iptables-forward-rules", Bool(true), "", Here::Works, "packets from and to the cluster network are forwarded");
    IPTABLES_RESYNC = flannel("iptables-resync", Int(5), "SECONDS", Here::NoEffect("the kernel tells what changes, and every 10 s everything is looked at"), "how often the rules are looked at");
    IP_BLACKHOLE_ROUTE = flannel("ip-blackhole-route", Bool(false), "", Here::Refused("podnetd makes no blackhole for this node's own subnet: leave the flag out (-require-encryption makes one for the cluster network)"), "a blackhole for addresses of this node's subnet that no pod has");

    HEALTHZ_IP = flannel("healthz-ip", Text("0.0.0.0"), "ADDRESS", Here::Works, "where /healthz, /readyz, /status, /peers and /metrics are served");
    HEALTHZ_PORT = flannel("healthz-port", Int(0), "PORT", Here::Works, "the port for them; 0 for none");

    KUBE_SUBNET_MGR = flannel("kube-subnet-mgr", Bool(false), "", KUBERNETES, "leases are in Kubernetes");
    KUBE_API_URL = flannel("kube-api-url", Text(""), "URL", KUBERNETES, "Kubernetes' API");
    KUBE_ANNOTATION_PREFIX = flannel("kube-annotation-prefix", Text("flannel.alpha.coreos.com"), "PREFIX", KUBERNETES, "the prefix of the annotations");
    KUBECONFIG_FILE = flannel("kubeconfig-file", Text(""), "FILE", KUBERNETES, "how Kubernetes is reached");
    NET_CONFIG_PATH = flannel("net-config-path", Text("/etc/kube-flannel/net-conf.json"), "FILE", Here::NoEffect("it is for Kubernetes alone: every other store has the network's configuration in it"), "the network's configuration");
    SET_NODE_NETWORK_UNAVAILABLE = flannel("set-node-network-unavailable", Bool(true), "", Here::NoEffect("it is for Kubernetes alone"), "the node's condition NetworkUnavailable is set to false");

    V = flannel("v", Int(0), "LEVEL", Here::Works, "how much is logged: 0 what happens, 1 how, 4 everything");
    VMODULE = flannel("vmodule", Text(""), "PATTERN=N,...", KLOG, "a level for each source file");
    LOG_BACKTRACE_AT = flannel("log_backtrace_at", Text(":0"), "FILE:LINE", KLOG, "where a stack is logged");
    VERSION = flannel("version", Bool(false), "", Here::Works, "print the version and end");

    SUBNETS = own("subnets", Text(""), "STORE", "where leases are: file=PATH (nodes write how they are reached into it), file-readonly=PATH (they do not), or etcd (the default)");
    NODE_NAME = own("node-name", Text(""), "NAME", "this node's name; the default is the host's");
    FIREWALL = own("firewall", Text("config"), "WHERE", "where the rules go: nftables, iptables, auto (what the host needs), or config (as EnableNFTables of the network says; nftables where no iptables is installed)");
    RESERVE = own("reserve", List, "NETWORK", "no node gets a subnet in it: the service network");
    NEVER_MASQUERADE = own("never-masquerade", List, "NETWORK", "destinations that see the pods' own addresses");
    ADOPT_FLANNEL = own("adopt-flannel", Bool(true), "", "take over what flannel left on this node; false: leave it, and report it where it is in the way");
    NETWORK_CHECK = own("network-check", Int(180), "SECONDS", "about how often it is looked whether the network's configuration in the store has changed, which is told and not taken up; 0: never");
    HOST_SETTINGS = own("host-settings", Text("set"), "WHAT", "forwarding and router advertisements under /proc/sys: set them, report where they are wrong, or ignore them");
    REQUIRE_ENCRYPTION = own("require-encryption", Bool(false), "", "pod packets never leave this node in plain text: only backends that encrypt are used");
    WIREGUARD_KEY_FILE = own("wireguard-key-file", Text("/var/lib/podnet/wireguard.key"), "FILE", "with the backend wireguard: this node's private key, made where it is missing. flannel's is /run/flannel/wgkey");
    WIREGUARD_USERSPACE = own("wireguard-userspace", Text(""), "PROGRAM", "with the backend wireguard: /usr/bin/wireguard-go or a boringtun-cli, run where the kernel has no WireGuard");
    SOCKET = own("socket", Text("/run/podnet/podnetd.sock"), "FILE", "a unix socket, for root alone, that serves what -healthz-port serves; -show asks there. Empty for none");

    PLAN = own("plan", Bool(false), "", "print what these flags would change on this node, touch nothing, end; also beside a running podnetd");
    SHOW = own("show", Bool(false), "", "print this node and its peers, asked from the running podnetd at -socket (or -healthz-port), and end");
    REMOVE = own("remove", Bool(false), "", "take away all that podnet and flannel made on this node, and subnet.env, and end; stop podnetd before. If the store does not answer, subnet.env must say the network");
    LEAVE = own("leave", Bool(false), "", "with -remove: give the lease back, too");
    JSON = own("json", Bool(false), "", "-plan, -show and -remove answer in JSON");
    TIMEOUT = own("timeout", Int(30), "SECONDS", "how long -plan, -show and -remove wait for what they need");
}
