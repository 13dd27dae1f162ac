//! Measurements of podnet; see the files beside this one.
