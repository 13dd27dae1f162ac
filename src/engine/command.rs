//! How the embedder's handle and the engine talk: one bounded queue of questions, each with its own way back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};

use super::Engine;
use super::sight::COLLECT;
use crate::admission::Verdict;
use crate::driver::Driver;
use crate::error::Error;
use crate::lease::Lease;
use crate::masquerade::MasqueradePolicy;
use crate::overlay::{Overlay, Shutdown};
use crate::plan::{Object, Owner, Plan, Prune, Unit, diff};
use crate::status::{PeerState, PeerStatus, Report, RouteInForce, Status};

/// The peers, and whom to ask how their tunnels are: that takes its time, which is not the engine's.
type Asked = (Vec<PeerStatus>, Vec<Arc<dyn Driver>>);
/// How long it may take.
const SESSIONS: Duration = Duration::from_secs(2);
type Reply<T> = oneshot::Sender<Result<T, Error>>;

#[derive(Debug)]
pub(crate) enum Command {
    Lease(Reply<Lease>),
    Peers(Reply<Asked>),
    Plan(Reply<Plan>),
    Reconcile(Reply<Report>),
    Routes(Reply<Vec<RouteInForce>>),
    Masquerade(Reply<MasqueradePolicy>),
    SetMasquerade(MasqueradePolicy, Reply<Report>),
    Shutdown(Shutdown, Reply<Report>),
}

impl Command {
    /// Nobody waits for the answer any more: the question is withdrawn.
    pub(super) fn is_withdrawn(&self) -> bool {
        match self {
            Command::Lease(reply) => reply.is_closed(),
            Command::Peers(reply) => reply.is_closed(),
            Command::Plan(reply) => reply.is_closed(),
            Command::Reconcile(reply) | Command::SetMasquerade(_, reply) | Command::Shutdown(_, reply) => {
                reply.is_closed()
            }
            Command::Routes(reply) => reply.is_closed(),
            Command::Masquerade(reply) => reply.is_closed(),
        }
    }
}

/// The answer to a shutdown, which is given when all is closed.
#[derive(Debug)]
pub(crate) struct Farewell {
    pub(super) reply: Reply<Report>,
    pub(super) report: Report,
}

impl Farewell {
    /// Tells whoever asked for the shutdown. Whether somebody still waits does not matter.
    pub(crate) fn say(self) {
        let _ = self.reply.send(Ok(self.report));
    }
}

/// What [`Node::start`](crate::Node::start) hands out.
#[derive(Debug)]
pub(crate) struct Handle {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Arc<Status>>,
}

impl Handle {
    pub(crate) fn new(commands: mpsc::Sender<Command>, status: watch::Receiver<Arc<Status>>) -> Self {
        Handle { commands, status }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::Stopped)?;
        answer.await.unwrap_or(Err(Error::Stopped))
    }
}

#[async_trait]
impl Overlay for Handle {
    async fn lease(&self) -> Result<Lease, Error> {
        self.ask(Command::Lease).await
    }
    async fn peers(&self) -> Result<Vec<PeerStatus>, Error> {
        let (mut peers, drivers) = self.ask(Command::Peers).await?;
        let mut sessions = BTreeMap::new();
        for driver in drivers {
            // How it works is in the status; who asks for the peers gets what is known of them, and soon.
            match tokio::time::timeout(SESSIONS, driver.sessions()).await {
                Ok(Ok(found)) => sessions.extend(found.into_iter().map(|session| (session.subnet, session))),
                Ok(Err(error)) => {
                    tracing::debug!(%error, domain = %driver.domain(), "how the tunnels are is not known")
                }
                Err(_) => tracing::debug!(domain = %driver.domain(), "how the tunnels are was not told in time"),
            }
        }
        for of in peers.iter_mut().flat_map(|peer| &mut peer.families) {
            // Another node that claims the subnet has no part in it.
            if matches!(of.state, PeerState::Connected { .. }) {
                of.session = sessions.remove(&of.subnet);
            }
        }
        Ok(peers)
    }
    async fn plan(&self) -> Result<Plan, Error> {
        self.ask(Command::Plan).await
    }
    async fn reconcile(&self) -> Result<Report, Error> {
        self.ask(Command::Reconcile).await
    }
    async fn routes(&self) -> Result<Vec<RouteInForce>, Error> {
        self.ask(Command::Routes).await
    }
    async fn masquerade(&self) -> Result<MasqueradePolicy, Error> {
        self.ask(Command::Masquerade).await
    }
    async fn set_masquerade(&self, policy: MasqueradePolicy) -> Result<Report, Error> {
        self.ask(|reply| Command::SetMasquerade(policy, reply)).await
    }
    fn status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }
    async fn shutdown(&self, how: Shutdown) -> Result<Report, Error> {
        self.ask(|reply| Command::Shutdown(how, reply)).await
    }
}

impl Engine {
    /// Answers everything but a shutdown, which ends the loop. Whoever asked may be gone: that is no error.
    pub(super) async fn answer(&mut self, command: Command) {
        match command {
            Command::Lease(reply) => {
                let reason = || self.control.trouble().map_or("no lease yet".to_owned(), ToString::to_string);
                let lease = self.control.lease.clone().ok_or_else(|| Error::NotReady { reason: reason() });
                let _ = reply.send(lease);
            }
            Command::Peers(reply) => {
                let _ = reply.send(Ok((self.peer_list(), self.drivers.clone())));
            }
            Command::Plan(reply) => {
                let plan = self.dry_run().await;
                let _ = reply.send(plan);
            }
            Command::Reconcile(reply) => {
                let report = self.reconcile_now().await;
                let _ = reply.send(report);
            }
            Command::Routes(reply) => {
                let _ = reply.send(Ok(self.routes()));
            }
            Command::Masquerade(reply) => {
                let _ = reply.send(Ok(self.masquerade.clone()));
            }
            Command::SetMasquerade(policy, reply) => {
                self.set_masquerade(policy);
                let report = match self.not_ready() {
                    Some(_) => Report::default(),
                    None => self.converge(true).await,
                };
                let _ = reply.send(Ok(report));
            }
            Command::Shutdown(_, reply) => {
                let _ = reply.send(Err(Error::Stopped));
            }
        }
    }

    /// A new look, so that a question is answered from what is there now.
    async fn look_now(&mut self) -> Result<(), Error> {
        if self.scope.is_some() {
            self.look_at_all().await?;
            self.refresh().await;
        }
        self.not_ready().map_or(Ok(()), Err)
    }

    async fn dry_run(&mut self) -> Result<Plan, Error> {
        let (due, check_at) = (self.compare, self.check_at);
        self.look_now().await?;
        let mut plan = diff(&self.desired, &self.picture, if self.whole { Prune::Yes } else { Prune::No });
        self.leave_blocked(&mut plan);
        self.leave_on_conflicts(&mut plan);
        // A question changes nothing, and hides nothing: what it found is looked at again, and repaired, right after.
        self.compare = due;
        self.check_at = check_at;
        if !plan.is_empty() {
            self.stale.extend(plan.steps().map(|step| step.key().domain()));
            self.look_at = self.look_at.max(self.settings.clock.now() + COLLECT);
        }
        Ok(plan)
    }

    async fn reconcile_now(&mut self) -> Result<Report, Error> {
        self.look_now().await?;
        Ok(self.converge(true).await)
    }

    fn routes(&self) -> Vec<RouteInForce> {
        let mut routes: Vec<RouteInForce> = self
            .picture
            .objects()
            .filter_map(|(key, object, owner)| match object {
                Object::Route(route) if owner == Owner::Ours => {
                    let unit = self.desired.owner(key).cloned().unwrap_or_else(|| Unit::Leftover(key.clone()));
                    Some(RouteInForce { route: route.clone(), unit })
                }
                _ => None,
            })
            .collect();
        routes.sort_by_key(|r| r.route.destination);
        routes
    }

    /// The backend and address by which a verdict says a peer is reached.
    pub(super) fn way(&self, verdict: &Verdict) -> Option<(crate::lease::BackendKind, std::net::IpAddr)> {
        match verdict {
            Verdict::Admitted { backend, peer } => {
                Some((self.settings.backends.get(*backend)?.kind(), peer.endpoint.public_ip))
            }
            _ => None,
        }
    }
}
