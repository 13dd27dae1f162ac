//! Tests of podnet as a whole; see the files beside this one.
