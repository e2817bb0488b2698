//! Which ranges of a segment are free.

pub mod offset;
