//! The difference between wish and picture, as steps: pure, deterministic, and empty once applied.
//!
//! It decides order (make before break) and what is left alone; it never decides what is wanted.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::{Desired, Fit, Key, Object, Owner, Picture, Plan, Step, Unit, UnitPlan};
use crate::types::DeviceName;

/// Whether a diff may delete what nobody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prune {
    /// Leave leftovers: the set of leases is not known to be whole yet.
    No,
    /// Delete what is ours and unwanted.
    Yes,
}

/// Everything that is to be done.
///
/// Costs time in proportion to wish and picture together.
pub fn diff(desired: &Desired, picture: &Picture, prune: Prune) -> Plan {
    let mut work = Work::new(desired, picture);
    for (unit, _) in desired.units() {
        work.make(unit);
    }
    if prune == Prune::Yes {
        let mut unwanted: Vec<(Key, Object)> = picture
            .objects()
            .filter(|(key, ..)| desired.owner(key).is_none())
            .map(|(key, object, _)| (key.clone(), object.clone()))
            .collect();
        unwanted.sort_by(|(a, _), (b, _)| b.rank().cmp(&a.rank()).then_with(|| a.cmp(b)));
        // A setting of the host is never unset: what it was before is not known after a restart.
        unwanted.retain(|(key, _)| !matches!(key, Key::Sysctl(_)));
        // What dies with its device needs no step of its own.
        let dying: HashSet<DeviceName> = unwanted.iter().filter_map(|(_, object)| object.makes().cloned()).collect();
        for (key, object) in unwanted {
            let dies = object.makes().is_none()
                && object.device().is_some_and(|d| dying.contains(d) || work.remade.contains(d));
            if !dies {
                work.plan.units.push(UnitPlan { unit: Unit::Leftover(key), steps: vec![Step::Delete(object)] });
            }
        }
    }
    work.plan
}

/// What is to be done for some units alone: those that changed, each with what it wanted before.
///
/// Costs time in proportion to those units, however large the rest is.
pub fn diff_units(desired: &Desired, picture: &Picture, changed: &[(Unit, Vec<Object>)]) -> Plan {
    let mut work = Work::new(desired, picture);
    let mut done = BTreeSet::new();
    for (unit, _) in changed {
        if done.insert(unit) {
            work.make(unit);
        }
    }
    let mut deleted = HashSet::new();
    for (unit, before) in changed {
        let mut steps = Vec::new();
        for object in before.iter().rev() {
            let key = object.key();
            let unwanted = desired.owner(&key).is_none() && deleted.insert(key.clone());
            if let Some((there, _)) = picture.get(&key).filter(|_| unwanted) {
                let dies = there.makes().is_none() && there.device().is_some_and(|d| work.remade.contains(d));
                if !dies {
                    steps.push(Step::Delete(there.clone()));
                }
            }
        }
        work.append(unit, steps);
    }
    work.plan
}

struct Work<'a> {
    desired: &'a Desired,
    picture: &'a Picture,
    /// Devices that this plan makes anew: nothing on them outlives it.
    remade: HashSet<DeviceName>,
    plan: Plan,
    /// What the conflicts in the plan keep out: each is named once.
    named: HashSet<Key>,
    /// Where in the plan a unit's steps are.
    places: HashMap<Unit, usize>,
}

impl<'a> Work<'a> {
    fn new(desired: &'a Desired, picture: &'a Picture) -> Self {
        Work {
            desired,
            picture,
            remade: HashSet::new(),
            plan: Plan::default(),
            named: HashSet::new(),
            places: HashMap::new(),
        }
    }

    /// The steps that bring about what a unit wants, up to the first conflict.
    fn make(&mut self, unit: &Unit) {
        let mut steps = Vec::new();
        for object in self.desired.unit(unit) {
            let key = object.key();
            if self.desired.owner(&key) != Some(unit) {
                continue;
            }
            // What is on a device that is not ours is not ours to touch either.
            let device = object.device().map(|d| Key::Link(d.clone()));
            let conflict = self.picture.conflict(&key).or_else(|| self.picture.conflict(device.as_ref()?));
            if let Some(conflict) = conflict {
                if self.named.insert(conflict.object.clone()) {
                    self.plan.conflicts.push(conflict.clone());
                }
                break;
            }
            steps.extend(self.step(object, &key));
        }
        self.append(unit, steps);
    }

    fn step(&mut self, wanted: &Object, key: &Key) -> Option<Step> {
        let doomed = wanted.makes().is_none() && wanted.device().is_some_and(|d| self.remade.contains(d));
        let Some((there, owner)) = self.picture.get(key).filter(|_| !doomed) else {
            if let Some(device) = wanted.makes() {
                // Whatever the picture says of a device that is not there is out of date.
                self.remade.insert(device.clone());
            }
            return Some(Step::Create(wanted.clone()));
        };
        let replace = || Step::Replace { from: there.clone(), to: wanted.clone() };
        match (there, wanted) {
            (Object::Link(is), Object::Link(want)) => match is.fit(want) {
                Fit::Same => (owner == Owner::Adoptable).then(replace),
                Fit::Alter => Some(replace()),
                Fit::Remake(why) => {
                    self.remade.insert(want.name.clone());
                    Some(Step::Remake { from: there.clone(), to: wanted.clone(), why })
                }
            },
            _ => (there != wanted || owner == Owner::Adoptable).then(replace),
        }
    }

    fn append(&mut self, unit: &Unit, steps: Vec<Step>) {
        if steps.is_empty() {
            return;
        }
        match self.places.get(unit).and_then(|place| self.plan.units.get_mut(*place)) {
            Some(plan) => plan.steps.extend(steps),
            None => {
                self.places.insert(unit.clone(), self.plan.units.len());
                self.plan.units.push(UnitPlan { unit: unit.clone(), steps });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::{
        Address, Conflict, Domain, Fdb, Link, LinkKind, Neighbour, NextHop, Route, Sysctl, SysctlName, Vxlan,
    };
    use crate::types::{Family, MacAddr, Mtu, NodeName, Vni};

    fn device(name: &str) -> DeviceName {
        name.parse().unwrap()
    }

    fn link(vni: u64, mtu: u32) -> Object {
        Object::Link(Link {
            name: device("flannel.1"),
            kind: LinkKind::Vxlan(Vxlan {
                vni: Vni::new(vni).unwrap(),
                port: 8472,
                local: "10.240.0.101".parse().unwrap(),
                underlay: Some(device("ens4")),
                learning: false,
                gbp: false,
            }),
            mtu: Mtu::new(mtu).unwrap(),
            mac: MacAddr::derived(b"me"),
            up: true,
            tx_checksum_offload: None,
        })
    }

    fn address() -> Object {
        Object::Address(Address { device: device("flannel.1"), address: "10.42.0.0/32".parse().unwrap() })
    }

    fn peer(n: u8, seed: u8) -> Vec<Object> {
        let (vtep, mac) = (std::net::IpAddr::from([10, 42, n, 0]), MacAddr([2, 0, 0, 0, seed, n]));
        vec![
            Object::Neighbour(Neighbour { device: device("flannel.1"), address: vtep, mac }),
            Object::Fdb(Fdb { device: device("flannel.1"), mac, remote: [10, 240, seed, n].into() }),
            Object::Route(Route {
                destination: format!("10.42.{n}.0/24").parse().unwrap(),
                metric: 0,
                next: NextHop::Gateway { device: device("flannel.1"), address: vtep, onlink: true },
            }),
        ]
    }

    fn node_unit() -> Unit {
        Unit::Node(Family::V4)
    }

    fn peer_unit(n: u8) -> Unit {
        Unit::Peer(format!("node-{n}").parse::<NodeName>().unwrap(), Family::V4)
    }

    fn wish(peers: &[u8]) -> Desired {
        let mut desired = Desired::new();
        desired.set(node_unit(), vec![link(1, 1410), address()]);
        for n in peers {
            desired.set(peer_unit(*n), peer(*n, 0));
        }
        desired
    }

    fn picture_of(objects: impl IntoIterator<Item = (Object, Owner)>) -> Picture {
        let mut picture = Picture::new();
        picture.observe(&Domain::Netlink, objects.into_iter().collect(), Vec::new());
        picture
    }

    fn carry_out(plan: &Plan, picture: &mut Picture) {
        plan.steps().for_each(|step| picture.acknowledge(step));
    }

    fn text(plan: &Plan) -> Vec<String> {
        plan.steps().map(|s| s.to_string().split(" vxlan").next().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn an_empty_kernel_is_filled_in_the_order_of_dependency() {
        let plan = diff(&wish(&[1]), &Picture::new(), Prune::Yes);
        assert_eq!(
            text(&plan),
            [
                "create link flannel.1",
                "create address 10.42.0.0/32 dev flannel.1",
                "create neighbour 10.42.1.0 lladdr 02:00:00:00:00:01 dev flannel.1 permanent",
                "create fdb 02:00:00:00:00:01 dst 10.240.0.1 dev flannel.1",
                "create route 10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink",
            ]
        );
    }

    #[test]
    fn a_peer_that_goes_is_taken_away_in_reverse_and_nothing_else_is_touched() {
        let mut desired = wish(&[1, 2]);
        let mut picture = Picture::new();
        carry_out(&diff(&desired, &picture, Prune::Yes), &mut picture);
        let before = desired.set(peer_unit(1), Vec::new());
        let plan = diff_units(&desired, &picture, &[(peer_unit(1), before)]);
        let kinds: Vec<String> =
            text(&plan).iter().map(|s| s.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(kinds, ["delete route", "delete fdb", "delete neighbour"]);
        assert_eq!(plan.units.len(), 1, "one unit: the steps fail together");
    }

    #[test]
    fn a_changed_mac_replaces_the_neighbour_and_takes_the_old_forwarding_entry_away() {
        let mut desired = wish(&[1]);
        let mut picture = Picture::new();
        carry_out(&diff(&desired, &picture, Prune::Yes), &mut picture);
        let before = desired.set(peer_unit(1), peer(1, 9));
        let plan = diff_units(&desired, &picture, &[(peer_unit(1), before)]);
        assert_eq!(
            text(&plan),
            [
                "replace neighbour 10.42.1.0 lladdr 02:00:00:00:00:01 dev flannel.1 permanent by neighbour 10.42.1.0 lladdr 02:00:00:00:09:01 dev flannel.1 permanent",
                "create fdb 02:00:00:00:09:01 dst 10.240.9.1 dev flannel.1",
                "delete fdb 02:00:00:00:00:01 dst 10.240.0.1 dev flannel.1",
            ]
        );
    }

    #[test]
    fn a_subnet_that_moves_to_another_node_is_never_without_its_route() {
        let mut desired = wish(&[1]);
        let mut picture = Picture::new();
        carry_out(&diff(&desired, &picture, Prune::Yes), &mut picture);
        let heir = Unit::Peer("heir".parse().unwrap(), Family::V4);
        let lost = desired.set(peer_unit(1), Vec::new());
        let gained = desired.set(heir.clone(), peer(1, 9));
        let plan = diff_units(&desired, &picture, &[(peer_unit(1), lost), (heir, gained)]);
        assert!(
            text(&plan).iter().all(|s| !s.starts_with("delete route") && !s.starts_with("delete neighbour")),
            "{plan}"
        );
    }

    #[test]
    fn invariant_02_leftovers_stay_until_the_set_of_leases_is_whole() {
        let stale = peer(7, 0).into_iter().map(|o| (o, Owner::Ours));
        let picture = picture_of(stale);
        assert!(text(&diff(&Desired::new(), &picture, Prune::No)).is_empty());
        assert_eq!(text(&diff(&Desired::new(), &picture, Prune::Yes)).len(), 3);
    }

    #[test]
    fn a_device_made_anew_takes_what_was_on_it_along() {
        let mut picture = Picture::new();
        carry_out(&diff(&wish(&[1]), &picture, Prune::Yes), &mut picture);
        let mut desired = wish(&[1]);
        desired.set(node_unit(), vec![link(2, 1410), address()]);
        let plan = diff(&desired, &picture, Prune::Yes);
        let steps = text(&plan);
        assert!(steps[0].starts_with("remake link"), "{plan}");
        assert!(steps[1..].iter().all(|s| s.starts_with("create")) && steps.len() == 5, "{plan}");
    }

    #[test]
    fn a_device_that_can_be_altered_keeps_what_is_on_it() {
        let mut picture = Picture::new();
        carry_out(&diff(&wish(&[1]), &picture, Prune::Yes), &mut picture);
        let mut desired = wish(&[1]);
        desired.set(node_unit(), vec![link(1, 1400), address()]);
        let plan = diff(&desired, &picture, Prune::Yes);
        assert_eq!(plan.steps().count(), 1, "{plan}");
    }

    #[test]
    fn what_flannel_left_is_marked_where_wanted_and_deleted_where_not() {
        let picture = picture_of(peer(1, 0).into_iter().chain(peer(7, 0)).map(|o| (o, Owner::Adoptable)));
        let mut desired = Desired::new();
        desired.set(peer_unit(1), peer(1, 0));
        let plan = diff(&desired, &picture, Prune::Yes);
        let words = |n: usize| text(&plan)[n].split(' ').take(3).collect::<Vec<_>>().join(" ");
        assert_eq!(words(2), "replace route 10.42.1.0/24");
        assert_eq!(words(3), "delete route 10.42.7.0/24");
    }

    #[test]
    fn invariant_03_what_stands_on_a_foreign_device_is_left_alone() {
        let mut picture = picture_of(peer(7, 0).into_iter().take(0).map(|o| (o, Owner::Ours)));
        let conflict = Conflict {
            object: Key::Link(device("flannel.1")),
            with: "a bridge of this name".into(),
            advice: "rename it".into(),
        };
        picture.observe(&Domain::Netlink, Vec::new(), vec![conflict.clone()]);
        let plan = diff(&wish(&[1, 2]), &picture, Prune::Yes);
        assert!(plan.is_empty(), "{plan}");
        assert_eq!(plan.conflicts, [conflict], "named once");
    }

    #[test]
    fn a_route_in_the_way_keeps_one_peer_out_and_no_other() {
        let mut picture = Picture::new();
        let key = Key::Route("10.42.1.0/24".parse().unwrap(), 0);
        let conflict = Conflict { object: key, with: "route of an operator".into(), advice: "remove it".into() };
        picture.observe(&Domain::Netlink, Vec::new(), vec![conflict]);
        let plan = diff(&wish(&[1, 2]), &picture, Prune::Yes);
        let routes: Vec<String> = text(&plan).into_iter().filter(|s| s.contains("route")).collect();
        assert_eq!(routes, ["create route 10.42.2.0/24 via 10.42.2.0 dev flannel.1 onlink"]);
    }

    #[test]
    fn a_setting_of_the_host_is_never_unset() {
        let sysctl = Sysctl { name: SysctlName::forwarding(Family::V4), value: "1".into() };
        let mut picture = Picture::new();
        picture.observe(&Domain::Sysctl, vec![(Object::Sysctl(sysctl), Owner::Ours)], Vec::new());
        assert!(diff(&Desired::new(), &picture, Prune::Yes).is_empty());
    }

    /// Any state that a kernel could be in, out of a small world.
    fn any_objects() -> impl Strategy<Value = Vec<(Object, Owner)>> {
        let owner = prop_oneof![3 => Just(Owner::Ours), 1 => Just(Owner::Adoptable)];
        let object = prop_oneof![
            (1_u64..3, 1400_u32..1402).prop_map(|(vni, mtu)| link(vni, mtu)),
            Just(address()),
            (0_u8..5, 0_u8..3, 0_usize..3).prop_map(|(n, seed, which)| peer(n, seed).remove(which)),
        ];
        proptest::collection::vec((object, owner), 0..24)
    }

    fn any_wish() -> impl Strategy<Value = Desired> {
        (proptest::option::of((1_u64..3, 1400_u32..1402)), proptest::collection::btree_map(0_u8..5, 0_u8..3, 0..5))
            .prop_map(|(node, peers)| {
                let mut desired = Desired::new();
                // Peers are wanted on a device that is wanted.
                let Some((vni, mtu)) = node else { return desired };
                desired.set(node_unit(), vec![link(vni, mtu), address()]);
                for (n, seed) in peers {
                    desired.set(peer_unit(n), peer(n, seed));
                }
                desired
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn invariant_01_after_a_diff_is_applied_the_next_is_empty(desired in any_wish(), objects in any_objects()) {
            let mut picture = picture_of(objects);
            let plan = diff(&desired, &picture, Prune::Yes);
            prop_assert_eq!(&plan, &diff(&desired, &picture, Prune::Yes), "deterministic");
            carry_out(&plan, &mut picture);
            let rest = diff(&desired, &picture, Prune::Yes);
            prop_assert!(rest.is_empty(), "left over: {}", rest);
            prop_assert_eq!(picture.len(), desired.len(), "and nothing else of ours is there");
        }

        #[test]
        fn invariant_04_nothing_is_created_on_what_is_not_there_yet(desired in any_wish(), objects in any_objects()) {
            let picture = picture_of(objects);
            let plan = diff(&desired, &picture, Prune::Yes);
            let mut ranks = std::collections::HashMap::new();
            for unit in &plan.units {
                let mut deleting = false;
                for step in &unit.steps {
                    let delete = matches!(step, Step::Delete(_));
                    prop_assert!(delete || !deleting, "a unit makes before it breaks: {}", plan);
                    deleting |= delete;
                    let rank = step.key().rank();
                    let last = ranks.insert((unit.unit.clone(), delete), rank);
                    prop_assert!(last.is_none_or(|l| if delete { l >= rank } else { l <= rank }), "{}", plan);
                }
            }
        }

        #[test]
        fn changes_of_units_lead_where_a_whole_diff_leads(first in any_wish(), second in any_wish()) {
            let mut picture = Picture::new();
            carry_out(&diff(&first, &picture, Prune::Yes), &mut picture);
            let mut desired = first;
            let units: BTreeSet<Unit> =
                desired.units().chain(second.units()).map(|(u, _)| u.clone()).collect();
            let changed: Vec<_> =
                units.into_iter().map(|u| { let before = desired.set(u.clone(), second.unit(&u).to_vec()); (u, before) }).collect();
            let plan = diff_units(&desired, &picture, &changed);
            carry_out(&plan, &mut picture);
            let rest = diff(&desired, &picture, Prune::Yes);
            prop_assert!(rest.is_empty(), "left over: {}", rest);
        }
    }
}
