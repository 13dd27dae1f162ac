//! Whose an object of the fake kernel is: the rules that [`Scope`] writes down, as the real driver follows them.

use super::state::{KernelRoute, LinkState, PROTOCOL_BOOT, State};
use crate::driver::netlink::ALIAS;
use crate::driver::{Scope, SeenRoute};
use crate::plan::{NextHop, Owner, Route};
use crate::types::{DeviceName, Family};

/// A route as the rules of the scope ask about it.
pub(super) fn seen(route: &KernelRoute) -> SeenRoute<'_> {
    SeenRoute {
        destination: route.destination,
        metric: route.metric,
        protocol: route.protocol,
        device: route.next.device(),
        gateway: match &route.next {
            NextHop::Gateway { address, .. } => Some(*address),
            _ => None,
        },
    }
}

/// Whether a route is flannel's by the written rule of adoption.
pub(super) fn is_adoptable(state: &State, scope: &Scope, route: &KernelRoute) -> bool {
    scope.adopts(&seen(route), over_our_device(state, scope, route))
}

/// The part of that rule which a route bears itself, and a request can ask for.
pub(super) fn has_legacy_marks(route: &KernelRoute) -> bool {
    route.protocol == PROTOCOL_BOOT && route.metric == Route::default_metric(Family::of(route.destination.ip()))
}

/// Whether a route leads over a device that is ours or to be ours.
pub(super) fn over_our_device(state: &State, scope: &Scope, route: &KernelRoute) -> bool {
    let Some((name, link)) = route.next.device().and_then(|d| state.links.get_key_value(d)) else { return false };
    link.is_ours() || is_served(scope, name, link) || link_owner(scope, name, link).is_some()
}

/// Whether a device is made by a backend's own driver, and marked by it; or flannel's, and about to be.
pub(super) fn is_served(scope: &Scope, name: &DeviceName, link: &LinkState) -> bool {
    match link.alias.as_deref() {
        Some(alias) => scope.served.contains(name) && alias == ALIAS,
        None => scope.adopts_served(name, &link.kind),
    }
}

/// Whose a link is; `None`: somebody else's, in the way if it bears a name of ours.
pub(super) fn link_owner(scope: &Scope, name: &DeviceName, link: &LinkState) -> Option<Owner> {
    if link.is_ours() {
        return Some(Owner::Ours);
    }
    let vni = link.vxlan.as_ref().filter(|_| link.alias.is_none())?.vni.get();
    let unfinished = link.unfinished && scope.devices.contains(name);
    (scope.adopts_device(name, vni) || unfinished).then_some(Owner::Adoptable)
}
