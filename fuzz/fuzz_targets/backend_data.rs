//! Any text as what a peer publishes for a backend, given to each of ours. What must hold of it is in `properties.rs`, which `make test` tries as well.

#![no_main]

#[path = "../properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(broken) = properties::backend_data(text) {
        panic!("{broken}");
    }
});
