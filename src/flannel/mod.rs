//! What exists for compatibility with flannel alone: its formats, which other parts share. What podnet would write
//! without flannel has no place here.

pub mod lease_attrs;
pub mod subnet_env;
pub mod subnet_key;
