//! The suite fails where it should: a good backend is broken in one thing at a time, and that rule is reported.
