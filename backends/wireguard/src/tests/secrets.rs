//! Known keys are planted, and all that this crate says is searched for them: as bytes, in base64 and in hex.

use std::sync::{Arc, Mutex};

use podnet::plan::{Desired, Picture, Prune, Unit, diff};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

pub(crate) use super::OWN;
use super::*;

pub(crate) const PSK: &str = "Nbb0yRlLzk2+tHmjPuoW4j3UVnOZ8wbdLjnvMkRbMzI=";

/// Keeps all that is logged, at every level.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<String>>);

impl Visit for Log {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push_str(&format!("{field}={value:?} "));
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut self.clone());
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut self.clone());
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// The forms in which a secret could be told.
fn forms(base64: &str) -> Vec<String> {
    let bytes = *base64.parse::<PresharedKey>().unwrap().expose();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let list: Vec<String> = bytes.iter().map(u8::to_string).collect();
    let escaped: String = bytes.iter().flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect();
    let hex_list: Vec<String> = bytes.iter().map(|byte| format!("{byte:x}")).collect();
    vec![
        base64.to_owned(),
        base64.trim_end_matches('=').replace('+', "-").replace('/', "_"),
        hex.to_uppercase(),
        hex,
        list.join(", "),
        list.join(","),
        hex_list.join(", "),
        escaped,
        String::from_utf8_lossy(&bytes).into_owned(),
    ]
}

pub(crate) fn search(what: &str, text: &str) {
    for secret in [OWN, PSK] {
        for form in forms(secret) {
            // A part of it is a leak, too.
            let part: String = form.chars().take(form.chars().count() / 2).collect();
            assert!(!text.contains(&part), "{what} tells a secret");
        }
    }
}

#[test]
fn the_search_finds_what_it_is_for() {
    let bytes = *OWN.parse::<PresharedKey>().unwrap().expose();
    let leaks =
        [OWN.to_owned(), format!("{bytes:?}"), format!("{bytes:x?}"), format!("{:?}", wireguard_control::Key(bytes))];
    for leak in leaks {
        assert!(std::panic::catch_unwind(|| search("a leak", &leak)).is_err(), "{leak}");
    }
}

#[test]
fn case_22_no_key_and_no_psk_is_in_anything_that_is_printed_logged_serialised_or_planned() {
    let log = Log::default();
    let _guard = tracing::subscriber::set_default(log.clone());
    tracing::info!(proof = "the log is kept");
    let section = format!(r#"{{"Type":"wireguard","PSK":"{PSK}","Mode":"auto"}}"#);
    let config = config(&section);
    search("NetworkConfig", &format!("{config:?} {config:#?}"));
    let backend = WireGuard::from_config(&config, OWN.parse().unwrap()).unwrap();
    search("Debug of the backend", &format!("{backend:?} {backend:#?}"));
    search(
        "Debug of the driver",
        &format!("{:?} {:#?}", backend.driver(&Default::default()), backend.driver(&Default::default())),
    );
    let view = view(&backend, Stack::Dual((), ()));
    search("NodeView", &format!("{view:?}"));

    // A plan and its steps.
    let mut desired = Desired::new();
    for family in Family::BOTH {
        desired.set(Unit::Node(family), backend.node(&view, family).unwrap());
        let peer = peer(family, Some("10.240.0.101"), Some("2001:db8:f0::101"), (1, 1));
        desired.set(Unit::Peer(peer.name.clone(), family), backend.peer(&view, &peer).unwrap());
    }
    let plan = diff(&desired, &Picture::new(), Prune::Yes);
    assert!(plan.to_string().contains(r#""psk":"configured""#), "{plan}");
    search("a plan", &format!("{plan} {plan:?} {}", serde_json::to_string(&plan).unwrap()));

    // What happens on devices that are not there, that refuse, and in a folder that is not ours.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let nowhere = podnet::driver::NetworkNamespace::Path("/nowhere/netns".into());
    let lost = WireGuard::from_config(&config, OWN.parse().unwrap()).unwrap();
    let results = runtime.block_on(lost.driver(&nowhere).unwrap().apply(&plan.units));
    assert!(results.iter().all(|result| result.failed.is_some()));
    search("results", &format!("{results:?} {}", results[0].failed.as_ref().unwrap()));
    let error = runtime.block_on(lost.driver(&nowhere).unwrap().sessions()).unwrap_err();
    search("sessions", &format!("{error} {error:?}"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, OWN).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let error = PrivateKey::load_or_create(&file).unwrap_err();
    search("a refused file", &format!("{error} {error:?}"));
    std::fs::write(&file, format!("{OWN} and more")).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let error = PrivateKey::load_or_create(&file).unwrap_err();
    search("a broken file", &format!("{error} {error:?}"));

    let said = log.0.lock().unwrap().clone();
    assert!(said.contains("the log is kept"));
    search("the log", &said);
}
