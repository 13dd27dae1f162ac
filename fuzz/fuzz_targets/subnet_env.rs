//! Any input as a subnet.env that an earlier run left. What must hold of it is in `properties.rs`, which `make test` tries as well.

#![no_main]

#[path = "../properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(broken) = properties::subnet_env(text) {
        panic!("{broken}");
    }
});
