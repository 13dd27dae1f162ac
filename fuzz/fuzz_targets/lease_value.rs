//! Any input as the value of a lease in etcd. What must hold of it is in `properties.rs`, which `make test` tries as well.

#![no_main]

#[path = "../properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(broken) = properties::lease_value(bytes) {
        panic!("{broken}");
    }
});
