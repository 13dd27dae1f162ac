//! How a real etcd is reached safely: the server proves who it is, the client by certificate or by password, and what is wrong is
//! said in words that help and hold no secret.

use std::path::Path;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission};
use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets, EtcdTls};
use podnet::subnet::{LeaseRequest, SubnetManager};
use podnet::types::{Secret, Stack};
use podnet_tests::name;
use podnet_tests::real::etcd::{Etcd, Eye, missing, written};

#[path = "tls/authority.rs"]
mod authority;
use authority::Authority;

/// An etcd with such a certificate that asks its clients for theirs.
async fn etcd(folder: &Path, authority: &Authority, names: &[&str], expired: bool) -> Etcd {
    let (certificate, key) = authority.issue(names, expired);
    let flags = [
        format!("--cert-file={}", written(folder, "server.pem", &certificate)),
        format!("--key-file={}", written(folder, "server.key", &key)),
        format!("--trusted-ca-file={}", written(folder, "ca.pem", &authority.pem())),
        "--client-cert-auth=true".to_owned(),
    ];
    Etcd::with_tls(&flags).await
}

fn options(etcd: &Etcd, tls: EtcdTls) -> EtcdOptions {
    EtcdOptions::new(etcd.endpoints()).tls(tls).deadline(Duration::from_secs(10))
}

async fn answer(options: EtcdOptions) -> String {
    EtcdSubnets::new(options).unwrap().network().await.unwrap_err().to_string()
}

/// The user without whom users cannot be switched on.
async fn with_root(eye: &mut Eye) -> &mut Client {
    let client = &mut eye.0;
    client.role_add("root").await.unwrap();
    client.user_add("root", "root's", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client
}

async fn as_root(etcd: &Etcd) -> Client {
    let options = ConnectOptions::new().with_user("root", "root's");
    Client::connect(etcd.endpoints(), Some(options)).await.unwrap()
}

const NO_CONFIG: &str = "there is no such key";

/// No connection came about, and not for want of an answer.
fn assert_refused(what: &str, said: &str) {
    assert!(!said.contains(NO_CONFIG) && !said.contains("no answer within"), "{what}: {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn case_28_both_sides_prove_who_they_are_or_there_is_no_connection() {
    if missing("tls") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let etcd = etcd(folder.path(), &authority, &["127.0.0.1", "etcd.example"], false).await;
    let (certificate, key) = authority.issue(&["client"], false);
    let secret = || Secret::from(key.clone());
    let tls = || EtcdTls::new(authority.pem()).client_certificate(certificate.clone(), secret());
    // What etcd answers, so it was asked.
    let said = answer(options(&etcd, tls())).await;
    assert!(said.contains(NO_CONFIG), "{said}");
    let said = answer(options(&etcd, tls().domain("etcd.example"))).await;
    assert!(said.contains(NO_CONFIG), "{said}");

    let said = answer(options(&etcd, tls().domain("other.example"))).await;
    assert!(said.contains("certificate") && said.contains("other.example"), "{said}");
    let said =
        answer(options(&etcd, EtcdTls::new(Authority::new().pem()).client_certificate(certificate.clone(), secret())))
            .await;
    assert!(said.contains("certificate"), "{said}");
    assert_refused("another authority", &said);
    let said = answer(options(&etcd, EtcdTls::new(authority.pem()))).await;
    assert_refused("no client certificate", &said);
    let (stranger, strangers_key) = Authority::new().issue(&["client"], false);
    let said =
        answer(options(&etcd, EtcdTls::new(authority.pem()).client_certificate(stranger, strangers_key.into()))).await;
    assert_refused("another authority's client", &said);
    let said = answer(options(
        &etcd,
        EtcdTls::new(authority.pem()).client_certificate(certificate.clone(), "no key".to_owned().into()),
    ))
    .await;
    assert!(said.contains("options for etcd") && !said.contains("no key"), "{said}");
    let plain: Vec<String> = etcd.endpoints().iter().map(|e| e.replace("https", "http")).collect();
    let said = answer(EtcdOptions::new(plain).allow_plain_http(true)).await;
    assert_refused("without TLS", &said);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn case_28_an_expired_server_is_refused() {
    if missing("expired") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let etcd = etcd(folder.path(), &authority, &["127.0.0.1"], true).await;
    let (certificate, key) = authority.issue(&["client"], false);
    let said = answer(options(&etcd, EtcdTls::new(authority.pem()).client_certificate(certificate, key.into()))).await;
    assert!(said.to_lowercase().contains("expired"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn user_and_password_are_checked_and_a_missing_right_is_named() {
    if missing("password") {
        return;
    }
    let mut etcd = Etcd::single().await;
    let mut eye = etcd.eye().await;
    let prefix = "/auth";
    eye.put(&format!("{prefix}/config"), r#"{"Network":"10.42.0.0/16"}"#, None).await;
    let client = with_root(&mut eye).await;
    client.role_add("podnet").await.unwrap();
    let all = Permission::read_write(prefix).with_prefix();
    client.role_grant_permission("podnet", all).await.unwrap();
    for (user, role) in [("node", Some("podnet")), ("stranger", None)] {
        client.user_add(user, "hunter2", None).await.unwrap();
        if let Some(role) = role {
            client.user_grant_role(user, role).await.unwrap();
        }
    }
    client.auth_enable().await.unwrap();

    let store = |user: Option<(&str, &str)>| {
        let options = etcd.options(prefix);
        let options = match user {
            Some((user, password)) => options.user(user, password.to_owned().into()),
            None => options,
        };
        EtcdSubnets::new(options).unwrap()
    };
    let node = store(Some(("node", "hunter2")));
    let request = LeaseRequest { node: name("me"), underlay: Stack::V4([10, 240, 0, 1].into()), previous: None };
    node.acquire(&request).await.unwrap();
    node.publish(&request.node, &[]).await.unwrap();
    node.renew(&request.node).await.unwrap();
    let mut watch = node.watch(&request.node).await.unwrap();
    assert!(futures::StreamExt::next(&mut watch).await.unwrap().is_ok());
    node.release(&request.node).await.unwrap();
    let held = node.acquire(&request).await.unwrap();

    for (user, part) in [
        (Some(("node", "wrong-one")), "check the user and the password"),
        (Some(("stranger", "hunter2")), "permission denied"),
        (None, ""),
    ] {
        let error = store(user).network().await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains(part), "{error}");
        assert!(!error.to_string().contains("wrong-one") && !error.to_string().contains("hunter2"), "{error}");
    }
    // A member that starts anew knows none of the sessions that there were.
    etcd.stop(0);
    etcd.start_member(0);
    let begun = std::time::Instant::now();
    let renewed = loop {
        match node.renew(&request.node).await {
            Ok(renewed) => break renewed,
            Err(error) => assert!(error.is_retryable() && begun.elapsed() < Duration::from_secs(40), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(renewed.lease, held.lease);
    drop(watch);
    let mut watch = node.watch(&request.node).await.unwrap();
    assert!(futures::StreamExt::next(&mut watch).await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_write_is_told_so_and_leaves_no_etcd_lease_behind() {
    if missing("read only") {
        return;
    }
    let etcd = Etcd::single().await;
    let mut eye = etcd.eye().await;
    let prefix = "/read-only";
    eye.put(&format!("{prefix}/config"), r#"{"Network":"10.42.0.0/16"}"#, None).await;
    let client = with_root(&mut eye).await;
    client.role_add("reader").await.unwrap();
    let read = Permission::read(prefix).with_prefix();
    client.role_grant_permission("reader", read).await.unwrap();
    client.user_add("node", "hunter2", None).await.unwrap();
    client.user_grant_role("node", "reader").await.unwrap();
    client.auth_enable().await.unwrap();
    let store = EtcdSubnets::new(etcd.options(prefix).user("node", "hunter2".to_owned().into())).unwrap();
    let request = LeaseRequest { node: name("me"), underlay: Stack::V4([10, 240, 0, 1].into()), previous: None };
    for _ in 0..3 {
        let error = store.acquire(&request).await.unwrap_err().to_string();
        assert!(error.contains("permission denied"), "{error}");
    }
    let mut root = as_root(&etcd).await;
    assert_eq!(root.leases().await.unwrap().leases().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_from_before_a_change_of_users_is_replaced_at_once() {
    if missing("tokens") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // They last longer than a test, and hold the state of the users when they were given.
    let secret = written(folder.path(), "secret", "a secret of this test");
    let flags = format!("--auth-token=jwt,sign-method=HS256,ttl=1h,priv-key={secret}");
    let etcd = Etcd::with_flags(&[flags]).await;
    let mut eye = etcd.eye().await;
    let prefix = "/tokens";
    eye.put(&format!("{prefix}/config"), r#"{"Network":"10.42.0.0/16"}"#, None).await;
    let client = with_root(&mut eye).await;
    client.auth_enable().await.unwrap();
    let store = EtcdSubnets::new(etcd.options(prefix).user("root", "root's".to_owned().into())).unwrap();
    store.network().await.unwrap();
    let mut root = as_root(&etcd).await;
    root.user_add("another", "password", None).await.unwrap();
    store.network().await.unwrap();
}
