//! The pool: master, node and client over the transfer engine. Knows no HTTP client, no command line.

pub mod alloc;
pub mod arena_table;
pub mod client;
pub mod master;
pub mod model;
pub mod node;
pub mod rest;
pub mod wire;
