//! The VXLAN backend.
