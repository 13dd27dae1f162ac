//! Whose an object of the fake kernel is: the rules that [`Scope`] writes down, as the real driver follows them.

use ipnetwork::IpNetwork;

use super::state::{KernelRoute, LinkState, PROTOCOL_BOOT, PROTOCOL_KERNEL, State};
use crate::driver::Scope;
use crate::plan::{Owner, Route};
use crate::types::Family;

/// Whether a network lies wholly inside a cluster network.
pub(super) fn inside(scope: &Scope, network: IpNetwork) -> bool {
    match network {
        IpNetwork::V4(n) => scope.networks.v4().is_some_and(|c| c.prefix() <= n.prefix() && c.contains(n.network())),
        IpNetwork::V6(n) => scope.networks.v6().is_some_and(|c| c.prefix() <= n.prefix() && c.contains(n.network())),
    }
}

/// Whether a network and a cluster network have an address in common.
pub(super) fn overlaps(scope: &Scope, network: IpNetwork) -> bool {
    inside(scope, network)
        || match network {
            IpNetwork::V4(n) => scope.networks.v4().is_some_and(|c| n.contains(c.network())),
            IpNetwork::V6(n) => scope.networks.v6().is_some_and(|c| n.contains(c.network())),
        }
}

/// Whether a route of others is part of the host's view.
pub(super) fn matters(scope: &Scope, route: &KernelRoute) -> bool {
    route.destination.prefix() == 0 || route.protocol == PROTOCOL_KERNEL || overlaps(scope, route.destination)
}

/// Whether a route is flannel's by the written rule of adoption.
pub(super) fn is_adoptable(state: &State, scope: &Scope, route: &KernelRoute) -> bool {
    scope.adopt && has_legacy_marks(route) && inside(scope, route.destination) && over_our_device(state, scope, route)
}

/// The part of that rule which a route bears itself.
pub(super) fn has_legacy_marks(route: &KernelRoute) -> bool {
    route.protocol == PROTOCOL_BOOT && route.metric == Route::default_metric(Family::of(route.destination.ip()))
}

/// Whether a route leads over a device that is ours or to be ours.
pub(super) fn over_our_device(state: &State, scope: &Scope, route: &KernelRoute) -> bool {
    let Some((name, link)) = route.next.device().and_then(|d| state.links.get_key_value(d)) else { return false };
    link.is_ours() || (scope.devices.contains(name) && link_owner(scope, link).is_some())
}

/// Whose a link is that bears a name of ours; `None`: somebody else's, in the way.
pub(super) fn link_owner(scope: &Scope, link: &LinkState) -> Option<Owner> {
    if link.is_ours() {
        Some(Owner::Ours)
    } else if link.vxlan.is_some() && link.alias.is_none() && (scope.adopt || link.unfinished) {
        Some(Owner::Adoptable)
    } else {
        None
    }
}
