//! Any input as the key of a lease in etcd. What must hold of it is in `properties.rs`, which `make test` tries as well.

#![no_main]

#[path = "../properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(broken) = properties::subnet_key(text) {
        panic!("{broken}");
    }
});
