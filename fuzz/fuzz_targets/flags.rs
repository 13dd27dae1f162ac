//! Any input as podnetd's command line and environment, an argument a line. What must hold of it is in `properties.rs`, which `make test` tries as well.

#![no_main]

#[path = "../properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(broken) = properties::flags(text) {
        panic!("{broken}");
    }
});
