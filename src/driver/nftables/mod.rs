//! The firewall rules, over netlink: one table and one transaction a family, and no program.
//!
//! The rules of a family live in the table `podnet` (`ip podnet`, `ip6 podnet`). It is ours if its comment begins with
//! `podnet: `; a table of that name without it is a conflict, and never touched. The whole table is made anew in one
//! transaction whenever anything in it differs, so that packets meet the old rules or the new ones, and never none.
//! The table outlives the process: it has no owner flag.
//!
//! Rules of others stay as they are. flannel's own tables (`ip flannel-ipv4`, `ip6 flannel-ipv6`) are deleted in the
//! transaction that makes ours, if adoption is asked for, and reported if not. Chains that flannel's iptables mode left
//! in iptables-nft's tables, and chains that drop the cluster's forwarded packets, are reported. Where those are a reason
//! to use iptables instead, that is [`firewall`](super::firewall)'s to say. What iptables-legacy holds is invisible to
//! nftables.

mod attribute;
pub(super) mod connection;
pub(super) mod events;
pub(super) mod expression;
pub(super) mod forward;
pub(super) mod table;
#[cfg(test)]
pub(super) mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::{
    ChainMessage, GenMessage, NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute, SetElementList,
    SetElementMessage, SetMessage, TableMessage,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use self::connection::{Connection, Failure};
use self::expression::Expression;
use self::forward::{Direction, INET};
use self::table::{ChainSeen, Contents, POLICY_ACCEPT, RuleSeen, SetSeen, TableSeen, flannel_table, proto};
use super::firewall::step::RulesetStep;
use super::iptables::saved::place;
use super::{
    Change, ChangeStream, Driver, DriverError, Errno, NetworkNamespace, Observed, Scope, UnitResult, notifications,
};
use crate::masquerade::{Hook, Ruleset};
use crate::plan::{Conflict, Domain, Key, Object, Owner, Step, UnitPlan};
use crate::types::Family;

/// How often a question is asked again, and a transaction made again, because others changed rules meanwhile.
const TRIES: usize = 16;
/// How many chains of others are read to find out whether a base chain drops.
const CHAINS_READ: usize = 256;

/// Makes nftables hold the [`Ruleset`]s of both families.
///
/// All calls need a tokio runtime, and run on its threads for blocking work: they wait while other programs hold
/// the kernel's nftables lock. Measured (kernel 6.18): 0.4 ms to replace a family's rules; 0.3 ms to observe both
/// families, 22 ms beside 5 000 chains of others, which the kernel cannot leave out of its list.
#[derive(Debug)]
pub struct NftablesDriver {
    namespace: NetworkNamespace,
    connection: Arc<Mutex<Connection>>,
    port: u32,
}

impl NftablesDriver {
    /// Opens a netlink socket in the namespace, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`DriverError::Unsupported`] if the kernel knows no netfilter netlink, [`DriverError::NotPermitted`] if the
    /// namespace may not be entered. Whether the kernel has nftables, and whether we may change its rules, is first known
    /// when [observing](Driver::observe).
    pub fn open(namespace: &NetworkNamespace) -> Result<Self, DriverError> {
        let connection = Connection::open(namespace)?;
        let port = connection.port();
        Ok(NftablesDriver { namespace: namespace.clone(), connection: Arc::new(Mutex::new(connection)), port })
    }

    /// What [`Driver::observe`] tells, with what it says of iptables kept apart.
    pub(super) async fn look(&self, scope: &Scope) -> Result<Look, DriverError> {
        let scope = scope.clone();
        self.with(OBSERVE, move |connection| again(OBSERVE, || observe(connection, &scope))).await
    }

    /// Whether a chain of our or of flannel's iptables mode is among iptables-nft's, in a family.
    pub(super) async fn has_iptables_chains(&self, family: Family) -> Result<bool, DriverError> {
        self.with(OBSERVE, move |connection| {
            again(OBSERVE, || Ok(!flannel_iptables(&chains(connection)?, family).is_empty()))
        })
        .await
    }

    /// Runs `work` with the connection, on a thread that may block.
    async fn with<T: Send + 'static>(
        &self,
        attempted: &str,
        work: impl FnOnce(&mut Connection) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let connection = Arc::clone(&self.connection);
        let done = tokio::task::spawn_blocking(move || {
            // Every request has a number of its own: a connection that was left half way is fit for the next.
            work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner))
        });
        done.await.unwrap_or_else(|e| Err(DriverError::Io { attempted: attempted.into(), reason: e.to_string() }))
    }
}

#[async_trait]
impl Driver for NftablesDriver {
    fn domain(&self) -> Domain {
        Domain::Firewall
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.look(scope).await.map(Look::whole)
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let mut results = Vec::with_capacity(units.len());
        for unit in units {
            let mut result = UnitResult::default();
            for step in &unit.steps {
                let attempted = step.to_string();
                let step = step.clone();
                let done = self
                    .with(&attempted.clone(), move |connection| {
                        again(&attempted, || apply(connection, &attempted, &step))
                    })
                    .await;
                if !result.note(done) {
                    break;
                }
            }
            results.push(result);
        }
        results
    }

    async fn changes(&self, _scope: &Scope) -> Result<ChangeStream, DriverError> {
        let own_port = self.port;
        notifications::listen(
            &self.namespace,
            "listen to changes of nftables",
            (NETLINK_NETFILTER, &[events::GROUP]),
            events::RECEIVE_BUFFER,
            move |datagram| events::changes_in(datagram, own_port),
            Change::Domain(Domain::Firewall),
        )
    }
}

const OBSERVE: &str = "observe the nftables rules";

/// What was observed. What it has to say of iptables' own tables is another driver's affair where that one is in use.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub observed: Observed,
    /// Chains of our or of flannel's iptables mode.
    pub iptables_chains: Vec<Conflict>,
    /// Chains of iptables that drop what ours accepts.
    pub iptables_drops: Vec<Conflict>,
}

impl Look {
    /// All of it.
    pub(super) fn whole(self) -> Observed {
        let mut observed = self.observed;
        observed.warnings.extend(self.iptables_chains);
        observed.warnings.extend(self.iptables_drops);
        observed
    }
}

/// Does it until nobody else changed rules in between.
fn again<T>(attempted: &str, mut work: impl FnMut() -> Result<T, Failure>) -> Result<T, DriverError> {
    for _ in 0..TRIES {
        match work() {
            Err(Failure::Moved) => continue,
            Err(Failure::Error(e)) => return Err(e),
            Ok(done) => return Ok(done),
        }
    }
    Err(DriverError::Io {
        attempted: attempted.into(),
        reason: format!("other programs changed nftables rules each of {TRIES} times that it was tried"),
    })
}

/// The number of the current rules: every transaction counts it up.
fn generation(connection: &mut Connection, attempted: &str) -> Result<u32, Failure> {
    let question = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
    let answers = connection.ask(attempted, NetfilterProtoFamily::Unspec, question, false).map_err(|failure| {
        // What `nfnetlink_rcv_msg` answers where it knows no such subsystem.
        match failure {
            Failure::Error(DriverError::Refused { errno: Errno::INVAL | Errno::OPNOTSUPP, .. }) => {
                Failure::Error(connection::no_nftables(attempted))
            }
            other => other,
        }
    })?;
    // NFTA_GEN_ID
    answers.iter().find_map(|a| a.attributes().u32(1)).ok_or_else(|| {
        let attempted = attempted.to_owned();
        Failure::Error(DriverError::Io {
            attempted,
            reason: "the kernel did not tell the generation of the rules".into(),
        })
    })
}

fn tables(connection: &mut Connection, attempted: &str) -> Result<Vec<TableSeen>, Failure> {
    let question = NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() });
    let answers = connection.ask(attempted, NetfilterProtoFamily::Unspec, question, true)?;
    Ok(answers.iter().filter_map(TableSeen::read).collect())
}

fn chains(connection: &mut Connection) -> Result<Vec<ChainSeen>, Failure> {
    let question = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    let answers = connection.ask(OBSERVE, NetfilterProtoFamily::Unspec, question, true)?;
    Ok(answers.iter().filter_map(ChainSeen::read).collect())
}

/// The rules of a table, or of one of its chains.
fn rules(connection: &mut Connection, proto: u8, table: &str, chain: Option<&str>) -> Result<Vec<RuleSeen>, Failure> {
    let mut attributes = vec![RuleAttribute::Table(table.to_owned())];
    attributes.extend(chain.map(|c| RuleAttribute::Chain(c.to_owned())));
    let question = NfTablesMessage::GetRule(RuleMessage { attributes });
    let answers = connection.ask(OBSERVE, proto.into(), question, true)?;
    Ok(answers.iter().filter_map(RuleSeen::read).collect())
}

/// The sets of our table with their elements.
fn sets(connection: &mut Connection, family: Family) -> Result<Vec<SetSeen>, Failure> {
    let table = || Ruleset::TABLE.to_owned();
    let question = NfTablesMessage::GetSet(SetMessage { attributes: vec![SetAttribute::Table(table())] });
    let answers = connection.ask(OBSERVE, proto(family), question, true)?;
    let mut sets: Vec<SetSeen> = answers.iter().filter_map(SetSeen::read).collect();
    for set in &mut sets {
        let attributes = vec![SetElementList::Table(table()), SetElementList::Set(set.name.clone())];
        let question = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
        for answer in connection.ask(OBSERVE, proto(family), question, true)? {
            set.add(&answer);
        }
    }
    Ok(sets)
}

fn is_table(table: &TableSeen, family: Family, name: &str) -> bool {
    table.family == u8::from(proto(family)) && table.name == name
}

fn observe(connection: &mut Connection, scope: &Scope) -> Result<Look, Failure> {
    let before = generation(connection, OBSERVE)?;
    let tables = tables(connection, OBSERVE)?;
    let chains = chains(connection)?;
    let mut look = Look::default();
    for family in Family::BOTH {
        let observed = &mut look.observed;
        let flannel = tables.iter().any(|t| is_table(t, family, flannel_table(family)));
        let adopted = flannel && scope.adopt;
        match tables.iter().find(|t| is_table(t, family, Ruleset::TABLE)) {
            Some(table) if table.is_ours() => {
                let contents = contents(connection, family, table, &chains)?;
                observed.objects.push((Object::Ruleset(table::decode(family, &contents, adopted)), Owner::Ours));
            }
            Some(_) => observed.conflicts.push(not_ours(family)),
            None if adopted => {
                let nothing = Ruleset::observed(family, Vec::new(), Vec::new(), true);
                observed.objects.push((Object::Ruleset(nothing), Owner::Adoptable));
            }
            None => {}
        }
        if flannel && !adopted {
            observed.warnings.push(flannel_beside(family));
        }
        look.iptables_chains.extend(flannel_iptables(&chains, family));
        let network = match family {
            Family::V4 => scope.networks.v4().map(|n| IpNetwork::from(*n)),
            Family::V6 => scope.networks.v6().map(|n| IpNetwork::from(*n)),
        };
        if let Some(network) = network {
            for (iptables, warning) in dropping(connection, &chains, network)? {
                let list = if iptables { &mut look.iptables_drops } else { &mut look.observed.warnings };
                list.push(warning);
            }
        }
    }
    if generation(connection, OBSERVE)? != before {
        return Err(Failure::Moved);
    }
    Ok(look)
}

fn contents(
    connection: &mut Connection,
    family: Family,
    table: &TableSeen,
    chains: &[ChainSeen],
) -> Result<Contents, Failure> {
    let ours = |c: &&ChainSeen| c.family == table.family && c.table == table.name;
    Ok(Contents {
        table: table.clone(),
        chains: chains.iter().filter(ours).cloned().collect(),
        rules: rules(connection, table.family, &table.name, None).map_err(gone)?,
        sets: sets(connection, family).map_err(gone)?,
    })
}

/// What was listed a moment ago and is not there now was deleted meanwhile.
fn gone(failure: Failure) -> Failure {
    match failure {
        Failure::Error(DriverError::Refused { errno: Errno::NOENT, .. }) => Failure::Moved,
        other => other,
    }
}

/// The base chains of others that drop packets of the cluster network on their way through, each with whether it is in
/// iptables' own table.
fn dropping(
    connection: &mut Connection,
    chains: &[ChainSeen],
    network: IpNetwork,
) -> Result<Vec<(bool, Conflict)>, Failure> {
    let family = Family::of(network.ip());
    let mut found = Vec::new();
    for (chain, base) in forward::at_forward_hook(chains, family, Ruleset::TABLE) {
        let mut read: HashMap<String, Vec<Vec<Expression>>> = HashMap::new();
        let mut chain_rules = |name: &str| -> Result<Option<Vec<Vec<Expression>>>, Failure> {
            if let Some(known) = read.get(name) {
                return Ok(Some(known.clone()));
            }
            if read.len() >= CHAINS_READ {
                return Ok(None);
            }
            let rules: Vec<_> = rules(connection, chain.family, &chain.table, Some(name))
                .map_err(gone)?
                .into_iter()
                .map(|rule| rule.expressions)
                .collect();
            read.insert(name.to_owned(), rules.clone());
            Ok(Some(rules))
        };
        let from = forward::drops(&chain.name, base, network, Direction::From, &mut chain_rules)?;
        let to = forward::drops(&chain.name, base, network, Direction::To, &mut chain_rules)?;
        let which = match (from, to) {
            (true, true) => "from and to",
            (true, false) => "from",
            (false, true) => "to",
            (false, false) => continue,
        };
        let warning = Conflict {
            object: Key::Ruleset(family),
            with: format!(
                "the chain {} of the table {} {} (hook forward, priority {}, policy {})",
                chain.name,
                word(chain.family),
                chain.table,
                base.priority,
                if base.policy == POLICY_ACCEPT { "accept" } else { "drop" },
            ),
            advice: format!(
                "it drops forwarded packets {which} {network}, and no accept in another table overrules that: \
                 let it accept them (Docker: in the chain DOCKER-USER; firewalld: as a source of the \
                 zone trusted, and by a policy from the zone ANY to the zone trusted with the target ACCEPT)"
            ),
        };
        found.push((chain.family != INET && chain.table == "filter", warning));
    }
    Ok(found)
}

/// nft's word for an `NFPROTO_*` at the forward hook.
fn word(proto: u8) -> &'static str {
    match NetfilterProtoFamily::from(proto) {
        NetfilterProtoFamily::IPv4 => "ip",
        NetfilterProtoFamily::IPv6 => "ip6",
        NetfilterProtoFamily::Inet => "inet",
        _ => "?",
    }
}

fn not_ours(family: Family) -> Conflict {
    let table = format!("{} {}", word(proto(family).into()), Ruleset::TABLE);
    Conflict {
        object: Key::Ruleset(family),
        with: format!("the nftables table {table}, which lacks podnet's comment or is held by another process"),
        advice: format!("find out who made it; `nft delete table {table}` removes it"),
    }
}

fn flannel_beside(family: Family) -> Conflict {
    let table = format!("{} {}", word(proto(family).into()), flannel_table(family));
    Conflict {
        object: Key::Ruleset(family),
        with: format!("flannel's nftables table {table}"),
        advice: format!("its rules work beside podnet's: ask for adoption, or `nft delete table {table}`"),
    }
}

/// What flannel's iptables mode, or ours, left in iptables-nft's tables.
fn flannel_iptables(chains: &[ChainSeen], family: Family) -> Vec<Conflict> {
    let left = |c: &&ChainSeen| {
        let ours = Hook::ALL.iter().any(|hook| place(*hook).chain == c.name);
        ours && c.family == u8::from(proto(family))
    };
    let iptables = if family == Family::V4 { "iptables" } else { "ip6tables" };
    chains
        .iter()
        .filter(left)
        .map(|chain| {
            let (whose, why) = if chain.name == place(Hook::Seal).chain {
                (
                    "podnet's own",
                    "it drops pod packets that leave by another device than the one that encrypted: if that is over",
                )
            } else {
                ("flannel's, or podnet's own,", "its rules work beside podnet's: once flannel is gone")
            };
            Conflict {
                object: Key::Ruleset(family),
                with: format!("{whose} chain {} of {iptables}, table {}", chain.name, chain.table),
                advice: format!(
                    "{why}, delete the rule that jumps to it, then `{iptables} -t {table} -F {name}` and `-X {name}`",
                    table = chain.table,
                    name = chain.name
                ),
            }
        })
        .collect()
}

/// One step. Whose the table is, is read in the same generation of rules in which it is changed.
fn apply(connection: &mut Connection, attempted: &str, step: &Step) -> Result<(), Failure> {
    let unfit = "it mixes address families, or has a comment of more than 100 bytes";
    let RulesetStep { family, to, adopt } = RulesetStep::read(attempted, step, table::fits, unfit)?;
    let generation = generation(connection, attempted)?;
    let tables = tables(connection, attempted)?;
    let mut changes = Vec::new();
    let mut kept = false;
    match tables.iter().find(|t| is_table(t, family, Ruleset::TABLE)) {
        Some(table) if table.is_ours() => {
            if let Some(rules) = &to {
                let chains = chains(connection)?;
                kept = table::keeps_frame(rules, &contents(connection, family, table, &chains)?);
            }
            if !kept {
                changes.push(table::delete(family, Ruleset::TABLE));
            }
        }
        Some(_) => {
            let Conflict { with, advice, .. } = not_ours(family);
            return Err(DriverError::InTheWay { attempted: attempted.to_owned(), with, advice }.into());
        }
        None => {}
    }
    if adopt && tables.iter().any(|t| is_table(t, family, flannel_table(family))) {
        changes.push(table::delete(family, flannel_table(family)));
    }
    if let Some(rules) = &to {
        changes.extend(if kept { table::refill(rules) } else { table::create(rules) });
    }
    connection.commit(attempted, generation, &changes)
}
