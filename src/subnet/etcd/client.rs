//! etcd as this store needs it: a handful of requests, each with a deadline, asked of the next member where one does not answer.
//! Every request may be repeated without harm, which the callers see to. No type of the client crate leaves this file.

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, Error, GetOptions, Identity, KeyValue,
    LeaseGrantOptions, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::options::EtcdOptions;
use crate::subnet::SubnetError;

/// The most bytes of one answer: the keys and values of some hundred thousand nodes.
const MAX_ANSWER: usize = 64 << 20;
/// A silent connection with an open watch is asked for a sign of life so often (etcd allows 5 s), and given up this much later.
const SIGN_OF_LIFE: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(4));
/// How long one call goes on where the cluster says that it is about to recover.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two rounds over all members.
const PAUSE: Duration = Duration::from_millis(150);

/// A key and what is under it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kv {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    /// 0: none, it stays until it is deleted.
    pub(super) lease: i64,
}

/// A change that a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Put(Kv),
    Delete { key: String, revision: i64 },
}

/// Keys at one revision.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) revision: i64,
    pub(super) kvs: Vec<Kv>,
}

/// What a transaction is for: what must hold, what is then done, and which keys are read if it does not hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Transaction {
    pub(super) when: Vec<Condition>,
    pub(super) then: Vec<Operation>,
    pub(super) otherwise_read: String,
}

#[derive(Debug, Clone)]
pub(super) enum Condition {
    /// No key begins with this.
    NoneBeginsWith(String),
    /// No key that begins with `prefix` was created after `revision`.
    NoneCreatedSince { prefix: String, revision: i64 },
    /// The key was written last at this revision.
    Unchanged { key: String, revision: i64 },
}

#[derive(Debug, Clone)]
pub(super) enum Operation {
    Put { key: String, value: String, lease: i64 },
    Delete { key: String },
}

/// How a transaction went.
#[derive(Debug)]
pub(super) enum Outcome {
    /// What was to be done is done, at this revision.
    Done(i64),
    /// A condition did not hold: what is under the key instead.
    Otherwise(Option<Kv>),
}

pub(super) struct Etcd {
    members: Vec<Member>,
    connect: ConnectOptions,
    deadline: Duration,
    /// The member that answered last.
    current: AtomicUsize,
    requests: AtomicU64,
}

struct Member {
    endpoint: String,
    client: Mutex<Option<Client>>,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<&str> = self.members.iter().map(|m| m.endpoint.as_str()).collect();
        f.debug_struct("Etcd").field("endpoints", &endpoints).finish_non_exhaustive()
    }
}

/// What to do about a failed request.
enum Failure {
    /// Ask the next member, and this one with a new connection.
    Member(String),
    /// The cluster is about to recover: ask again soon.
    Soon(String),
    /// No member will say otherwise.
    Refused(SubnetError),
}

/// What etcd answers to a request that is well-formed.
pub(super) enum Answer<T> {
    Good(T),
    /// There is no such etcd lease.
    NoSuchLease,
}

impl Etcd {
    pub(super) fn new(options: &EtcdOptions) -> Self {
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(options.deadline)
            .with_keep_alive(SIGN_OF_LIFE.0, SIGN_OF_LIFE.1)
            // etcd hangs up on a client that asks without an open request.
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(Duration::from_secs(30))
            .with_auto_token_refresh(true)
            .with_require_leader(true);
        if let Some((name, password)) = &options.user {
            connect = connect.with_user(name.as_str(), String::from_utf8_lossy(password.expose()));
        }
        if let Some(tls) = &options.tls {
            let mut config = TlsOptions::new().ca_certificate(Certificate::from_pem(&tls.ca));
            if let Some((certificate, key)) = &tls.client {
                config = config.identity(Identity::from_pem(certificate, key.expose()));
            }
            if let Some(domain) = &tls.domain {
                config = config.domain_name(domain);
            }
            connect = connect.with_tls(config);
        }
        let members = options.endpoints.iter().map(|e| Member { endpoint: e.clone(), client: Mutex::default() });
        Etcd {
            members: members.collect(),
            connect,
            deadline: options.deadline,
            current: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
        }
    }

    /// Requests that were sent so far, repeated ones too.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<Kv>, SubnetError> {
        let get = |client: Client| async move {
            let mut answer = client.kv_client().max_decoding_message_size(MAX_ANSWER).get(key, None).await?;
            Ok(answer.take_kvs().into_iter().next().and_then(kv))
        };
        self.call(&format!("read {key}"), get).await
    }

    /// All keys that begin with `prefix`, in one request.
    pub(super) async fn list(&self, prefix: &str) -> Result<Listing, SubnetError> {
        let list = |client: Client| async move {
            let options = GetOptions::new().with_prefix();
            let mut answer =
                client.kv_client().max_decoding_message_size(MAX_ANSWER).get(prefix, Some(options)).await?;
            let revision = answer.header().map_or(0, |h| h.revision());
            Ok(Listing { revision, kvs: answer.take_kvs().into_iter().filter_map(kv).collect() })
        };
        self.call(&format!("list {prefix}"), list).await
    }

    /// How many keys begin with `prefix`, if none of them but `own` was written after `revision`, and that one last at its own: with the number
    /// that was listed then, the listing still holds.
    pub(super) async fn count_unless_written_since(
        &self,
        prefix: &str,
        (own, own_revision): (&str, i64),
        revision: i64,
    ) -> Result<Option<usize>, SubnetError> {
        let count = |client: Client| async move {
            let older = |from: String, end: Vec<u8>| {
                Compare::mod_revision(from, CompareOp::Less, revision.saturating_add(1)).with_range(end)
            };
            // Behind `own` comes `own` with a byte of zero.
            let when = [
                older(prefix.to_owned(), own.into()),
                older(format!("{own}\0"), end_of(prefix)),
                Compare::mod_revision(own, CompareOp::Equal, own_revision),
            ];
            let count = TxnOp::get(prefix, Some(GetOptions::new().with_prefix().with_count_only()));
            let answer = client.kv_client().txn(Txn::new().when(when).and_then([count])).await?;
            let counted = answer.op_responses().into_iter().find_map(|response| match response {
                TxnOpResponse::Get(get) if answer.succeeded() => usize::try_from(get.count()).ok(),
                _ => None,
            });
            Ok(counted)
        };
        self.call(&format!("count {prefix}"), count).await
    }

    pub(super) async fn transact(
        &self,
        attempted: &str,
        transaction: &Transaction,
    ) -> Result<Answer<Outcome>, SubnetError> {
        let transact = |client: Client| async move {
            let answer = client.kv_client().max_decoding_message_size(MAX_ANSWER).txn(transaction.to_etcd()).await?;
            if answer.succeeded() {
                return Ok(Outcome::Done(answer.header().map_or(0, |h| h.revision())));
            }
            let found = answer.op_responses().into_iter().find_map(|response| match response {
                TxnOpResponse::Get(mut get) => get.take_kvs().into_iter().next(),
                _ => None,
            });
            Ok(Outcome::Otherwise(found.and_then(kv)))
        };
        self.call(attempted, |client| without_lease(transact(client))).await
    }

    /// An etcd lease of the given number, which the caller made up: asked again after a lost answer, it is the same one. How
    /// long it lasts.
    pub(super) async fn grant(&self, id: i64, term: Duration) -> Result<Duration, SubnetError> {
        let ttl = i64::try_from(term.as_secs()).unwrap_or(i64::MAX);
        let grant = |client: Client| async move {
            let options = LeaseGrantOptions::new().with_id(id);
            match client.lease_client().grant(ttl, Some(options)).await {
                Err(Error::GRpcStatus(status)) if status.message().contains("lease already exists") => Ok(ttl),
                answer => Ok(answer?.ttl()),
            }
        };
        let ttl = self.call("grant an etcd lease", grant).await?;
        Ok(Duration::from_secs(u64::try_from(ttl).unwrap_or(0)))
    }

    /// Keeps an etcd lease for another term of its own. How long it lasts from when this was asked.
    pub(super) async fn keep_alive(&self, id: i64) -> Result<Answer<Duration>, SubnetError> {
        let keep = |client: Client| async move {
            let (mut keeper, mut answers) = client.lease_client().keep_alive(id).await?;
            // The first answer is not shown.
            keeper.keep_alive().await?;
            let ttl = answers.message().await?.map_or(0, |answer| answer.ttl());
            if ttl > 0 { Ok(ttl) } else { Err(Error::LeaseKeepAliveError("lease not found".to_owned())) }
        };
        Ok(match self.call("keep an etcd lease", |client| without_lease(keep(client))).await? {
            Answer::Good(ttl) => Answer::Good(Duration::from_secs(u64::try_from(ttl).unwrap_or(0))),
            Answer::NoSuchLease => Answer::NoSuchLease,
        })
    }

    /// Ends an etcd lease, and with it any key that is attached to it. Only for one that nobody has been told of.
    pub(super) async fn revoke(&self, id: i64) -> Result<(), SubnetError> {
        let revoke = |client: Client| async move { client.lease_client().revoke(id).await.map(drop) };
        self.call("revoke an etcd lease", |client| without_lease(revoke(client))).await.map(drop)
    }

    /// Every change of keys that begin with `prefix`, from a revision on.
    pub(super) async fn watch(&self, prefix: &str, revision: i64) -> Result<Changes, SubnetError> {
        let watch = |client: Client| async move {
            let options = WatchOptions::new().with_prefix().with_start_revision(revision).with_fragment();
            client.watch_client().max_decoding_message_size(MAX_ANSWER).watch(prefix, Some(options)).await
        };
        let stream = self.call(&format!("watch {prefix}"), watch).await?;
        Ok(Changes { stream, prefix: prefix.to_owned() })
    }

    /// Asks the members, beginning with the one that answered last.
    async fn call<'a, T, F: Future<Output = Result<T, Error>>>(
        &'a self,
        attempted: &str,
        request: impl Fn(Client) -> F + 'a,
    ) -> Result<T, SubnetError> {
        let begun = Instant::now();
        loop {
            let mut said = Vec::new();
            let mut soon = false;
            let first = self.current.load(Ordering::Relaxed);
            for turn in 0..self.members.len() {
                let number = first.wrapping_add(turn) % self.members.len().max(1);
                let Some(member) = self.members.get(number) else { break };
                match self.ask(member, &request).await {
                    Ok(answer) => {
                        self.current.store(number, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(Failure::Refused(error)) => return Err(named(error, attempted)),
                    Err(Failure::Member(reason)) => said.push(format!("{}: {reason}", member.endpoint)),
                    Err(Failure::Soon(reason)) => {
                        soon = true;
                        said.push(format!("{}: {reason}", member.endpoint));
                    }
                }
                tracing::debug!(attempted, member = %member.endpoint, reason = said.last(), "etcd did not answer");
                if begun.elapsed() >= PATIENCE {
                    break;
                }
            }
            if !soon || begun.elapsed() >= PATIENCE {
                return Err(SubnetError::Unavailable { attempted: attempted.to_owned(), reason: said.join("; ") });
            }
            sleep(PAUSE).await;
        }
    }

    /// Asks one member; once more where the connection that was there already is broken, which is only seen when it is used.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(
        &self,
        member: &Member,
        request: impl Fn(Client) -> F,
    ) -> Result<T, Failure> {
        let silent = || Failure::Member(format!("no answer within {:?}", self.deadline));
        let begun = Instant::now();
        loop {
            let mut reused = false;
            let asked = async {
                let (client, is_reused) = self.client(member).await?;
                reused = is_reused;
                self.requests.fetch_add(1, Ordering::Relaxed);
                request(client).await.map_err(|error| failure(&error))
            };
            let left = self.deadline.saturating_sub(begun.elapsed());
            let answer = timeout(left, asked).await.unwrap_or_else(|_| Err(silent()));
            let Err(Failure::Member(_)) = &answer else { return answer };
            if let Ok(mut client) = member.client.try_lock() {
                *client = None;
            }
            if !reused || begun.elapsed() >= self.deadline {
                return answer;
            }
        }
    }

    /// A client, and whether it was there already.
    async fn client(&self, member: &Member) -> Result<(Client, bool), Failure> {
        let mut held = member.client.lock().await;
        if let Some(client) = &*held {
            return Ok((client.clone(), true));
        }
        // Without a user this sends nothing: a failure is one of the options.
        let made = Client::connect([&member.endpoint], Some(self.connect.clone())).await;
        let client = made.map_err(|error| match &error {
            Error::TransportError(_) | Error::InvalidArgs(_) | Error::InvalidUri(_) => {
                Failure::Refused(SubnetError::Invalid {
                    object: format!("the options for etcd at {}", member.endpoint),
                    reason: words(&error),
                })
            }
            _ => failure(&error),
        })?;
        *held = Some(client.clone());
        Ok((client, false))
    }
}

/// Changes as they come. Cancel safe; dropping it ends the watch in etcd.
pub(super) struct Changes {
    stream: WatchStream,
    prefix: String,
}

/// What comes of a watch.
pub(super) enum Told {
    Changes(Vec<Change>),
    /// Changes since then are no longer known: list again.
    Compacted,
}

impl Changes {
    pub(super) async fn next(&mut self) -> Result<Told, SubnetError> {
        let broken = |reason| SubnetError::Unavailable { attempted: format!("watch {}", self.prefix), reason };
        loop {
            let Some(answer) = self.stream.message().await.map_err(|e| broken(words(&e)))? else {
                return Err(broken("etcd ended it".to_owned()));
            };
            if answer.compact_revision() != 0 {
                return Ok(Told::Compacted);
            }
            if answer.canceled() {
                return Err(broken(format!("etcd ended it: {}", answer.cancel_reason())));
            }
            let changes: Vec<Change> = answer.events().iter().filter_map(|event| change(event.kv()?)).collect();
            if !changes.is_empty() {
                return Ok(Told::Changes(changes));
            }
        }
    }
}

impl Transaction {
    fn to_etcd(&self) -> Txn {
        let when: Vec<Compare> = self.when.iter().map(Condition::to_etcd).collect();
        let then: Vec<TxnOp> = self.then.iter().map(Operation::to_etcd).collect();
        Txn::new().when(when).and_then(then).or_else([TxnOp::get(self.otherwise_read.as_str(), None)])
    }
}

impl Condition {
    fn to_etcd(&self) -> Compare {
        match self {
            Condition::NoneBeginsWith(prefix) => Compare::version(prefix.as_str(), CompareOp::Equal, 0).with_prefix(),
            Condition::NoneCreatedSince { prefix, revision } => {
                Compare::create_revision(prefix.as_str(), CompareOp::Less, revision.saturating_add(1)).with_prefix()
            }
            Condition::Unchanged { key, revision } => Compare::mod_revision(key.as_str(), CompareOp::Equal, *revision),
        }
    }
}

impl Operation {
    fn to_etcd(&self) -> TxnOp {
        match self {
            Operation::Put { key, value, lease } => {
                TxnOp::put(key.as_str(), value.as_str(), Some(PutOptions::new().with_lease(*lease)))
            }
            Operation::Delete { key } => TxnOp::delete(key.as_str(), Some(DeleteOptions::new())),
        }
    }
}

/// The first key that is behind all that begin with `prefix`, which is text: none of its bytes is the last one.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

/// A key that is not text is none of flannel's.
fn kv(kv: KeyValue) -> Option<Kv> {
    let (create_revision, mod_revision, lease) = (kv.create_revision(), kv.mod_revision(), kv.lease());
    let (key, value) = kv.into_key_value();
    Some(Kv { key: String::from_utf8(key).ok()?, value, create_revision, mod_revision, lease })
}

/// A deleted key has no version. (Asking for the event's type could panic on one that is not known yet.)
fn change(told: &KeyValue) -> Option<Change> {
    if told.version() == 0 {
        let key = String::from_utf8(told.key().to_vec()).ok()?;
        return Some(Change::Delete { key, revision: told.mod_revision() });
    }
    kv(told.clone()).map(Change::Put)
}

/// The absence of an etcd lease is an answer and no failure.
async fn without_lease<T>(request: impl Future<Output = Result<T, Error>>) -> Result<Answer<T>, Error> {
    match request.await {
        Ok(answer) => Ok(Answer::Good(answer)),
        Err(Error::LeaseKeepAliveError(reason)) if reason.contains("lease not found") => Ok(Answer::NoSuchLease),
        Err(Error::GRpcStatus(status)) if status.message().contains("lease not found") => Ok(Answer::NoSuchLease),
        Err(error) => Err(error),
    }
}

/// gRPC's numbers of failures: <https://grpc.io/docs/guides/status-codes/>.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNIMPLEMENTED: i32 = 12;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

fn failure(error: &Error) -> Failure {
    let reason = words(error);
    let Error::GRpcStatus(status) = error else { return Failure::Member(reason) };
    // With what the caller attempted put in later.
    let refused = |advice: &str| {
        Failure::Refused(SubnetError::Unavailable { attempted: String::new(), reason: format!("{reason}{advice}") })
    };
    let recovering = ["no leader", "leader changed", "request timed out", "too many requests", "not leader"];
    match status.code() as i32 {
        _ if recovering.iter().any(|word| status.message().contains(word)) => Failure::Soon(reason),
        // A token from before a change of users or roles: the next connection gets another.
        code::INVALID_ARGUMENT if status.message().contains("revision of auth store is old") => Failure::Member(reason),
        code::INVALID_ARGUMENT | code::UNAUTHENTICATED if status.message().contains("auth") => {
            refused("; check the user and the password for etcd")
        }
        code::PERMISSION_DENIED => {
            refused("; give etcd's user a role that may read and write all keys below the prefix")
        }
        code::RESOURCE_EXHAUSTED if status.message().contains("database space exceeded") => {
            refused("; compact and defragment etcd, then disarm its alarm")
        }
        code::FAILED_PRECONDITION | code::OUT_OF_RANGE | code::INVALID_ARGUMENT | code::UNIMPLEMENTED => refused(""),
        _ => Failure::Member(reason),
    }
}

fn named(error: SubnetError, attempted: &str) -> SubnetError {
    match error {
        SubnetError::Unavailable { reason, .. } => SubnetError::Unavailable { attempted: attempted.to_owned(), reason },
        other => other,
    }
}

/// An error with its causes, each once.
fn words(error: &Error) -> String {
    let mut said = match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    let mut cause = match error {
        Error::GRpcStatus(status) => status.source(),
        Error::TransportError(error) => error.source(),
        _ => None,
    };
    while let Some(error) = cause {
        let text = error.to_string();
        if !said.contains(&text) {
            said = format!("{said}: {text}");
        }
        cause = error.source();
    }
    said
}
